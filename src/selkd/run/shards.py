"""The shards of a recipe's cache, one at a time, for a launcher of one's own: Ray, a job array, a queue."""

from functools import cached_property
from pathlib import Path

from selkd.errors import InputError
from selkd.recipe.recipe import Recipe
from selkd.run.cache import cache_directory, cache_fingerprint, row_source
from selkd.run.directory import RunDirectory
from selkd.run.inputs import revisions_of
from selkd.run.score import kept_samples, stored_scores
from selkd.run.workspace import Workspace
from selkd.teacher.build_cache import CacheBuild, RowSource
from selkd.teacher.live import LiveTeacher


class CacheShards:
    """Writes shards of the cache of a run whose samples are scored: after ``score_only``, and before ``cache_only``.

    Shards are planned by the data alone and keyed by content, so any number of processes, on any machines that see the
    folder, may each have their own and write whichever: the bytes are the same.

    Args:
        recipe: with a cache.
        out: the run's folder.

    Attributes:
        missing: the numbers of the shards that are not there yet.

    Raises:
        InputError: the samples are not scored yet, or the folder is another run's.
    """

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self._work = Workspace(recipe, out)
        run = RunDirectory.claim(out, recipe, is_writer=False)
        self._work.revisions = revisions_of(run.record)
        if recipe.samples is not None and stored_scores(self._work) is None:
            raise InputError(f"{out}: its samples are not scored yet; run `selkd score` into it first")
        samples = kept_samples(self._work)
        self._build = CacheBuild(cache_directory(self._work, run), cache_fingerprint(self._work), samples)
        self.missing = self._build.missing

    @cached_property
    def _source(self) -> LiveTeacher | RowSource:
        return row_source(self._work)

    def write(self, number: int) -> None:
        """Write one shard. The teacher is loaded, or its server tried, for the first."""
        self._build.write([number], self._source, self._work.models.pad_token_id)
