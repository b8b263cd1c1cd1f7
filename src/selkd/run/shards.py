"""The shards of a recipe's cache, one at a time, for a launcher of one's own: Ray, a job array, a queue."""

from pathlib import Path

from selkd.errors import InputError
from selkd.recipe.recipe import Recipe
from selkd.run.cache import (
    cache_directory,
    cache_fingerprint,
    is_scored_from,
    larger_cache,
    require_built_here,
    row_source,
)
from selkd.run.directory import RunDirectory
from selkd.run.inputs import revisions_of
from selkd.run.score import cached_samples, stored_scores
from selkd.run.workspace import Workspace
from selkd.teacher.build_cache import CacheBuild, RowSource
from selkd.teacher.live import LiveTeacher


class CacheShards:
    """Writes shards of a run's cache: after ``pipeline.before_cache``, and before ``pipeline.cache_only``.

    Shards are planned by the data alone and keyed by content, so any number of processes, on any machines that see the
    folder, may each have their own and write whichever: the bytes are the same.

    Args:
        recipe: with a cache that its teacher builds.
        out: the run's folder.

    Attributes:
        missing: the numbers of the shards that are not there yet. None where a complete cache of more samples, which
            other recipes share, has all of these.

    Raises:
        InputError: the samples are not scored yet, the folder is another run's, or the recipe's cache is not built
            here: it is imported, or at an address.
    """

    def __init__(self, recipe: Recipe, out: Path) -> None:
        require_built_here(recipe)
        self._work = Workspace(recipe, out)
        run = RunDirectory.claim(out, recipe, is_writer=False)
        self._work.revisions = revisions_of(run.record)
        if recipe.samples is not None and not is_scored_from(recipe) and stored_scores(self._work) is None:
            raise InputError(f"{out}: its samples are not scored yet; run `selkd score` into it first")
        samples = cached_samples(self._work)
        self._directory, fingerprint = cache_directory(self._work, run), cache_fingerprint(self._work)
        self._build: CacheBuild | None = None
        if larger_cache(self._work, self._directory, fingerprint, samples) is None:
            self._build = CacheBuild(self._directory, fingerprint, samples)
        self.missing = [] if self._build is None else self._build.missing
        self._source: LiveTeacher | RowSource | None = None

    def write(self, number: int) -> None:
        """Write one shard. The teacher is loaded, or its server tried, for the first, and for the one after a failure.

        Raises:
            InputError: the cache in the folder is complete, or a server refused.
            RunError: a server did not answer, or the disk refused.
        """
        if self._build is None:
            raise InputError(f"{self._directory}: this cache of more samples is complete; no shard of it is missing")
        # A served teacher that failed has closed its connections, so what fails is not used again.
        source, self._source = self._source or row_source(self._work), None
        self._build.write([number], source, self._work.models.pad_token_id)
        self._source = source
