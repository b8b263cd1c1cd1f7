"""Building a cache: shard by shard, by one process or several, continued wherever it was interrupted."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from selkd.cache.codec import Rows
from selkd.cache.files import is_temporary, remove_temporaries, replacing
from selkd.cache.manifest import (
    MANIFEST,
    PLAN,
    Fingerprint,
    check_fingerprint,
    check_same_fingerprint,
    make_manifest,
    make_plan,
    read_plan,
    render,
    write_document,
)
from selkd.cache.shard import check_sample_ids, check_shard, read_shard, shard_name, write_shard
from selkd.errors import InputError, RunError

SampleRows = tuple[bytes, np.ndarray, np.ndarray, np.ndarray]


class CacheWriter:
    """Writes the shards of one cache.

    Every process makes its own writer with the same arguments and writes its share of ``missing_shards()``; once all
    have written, one of them calls ``finish()``. The same calls continue an interrupted build, or repair a damaged
    cache.
    """

    def __init__(self, directory: Path, fingerprint: Fingerprint, shard_ids: Sequence[Sequence[bytes]]) -> None:
        """Opens the folder for this plan, or makes it.

        Args:
            directory: a new or empty folder, or one in which this same cache was begun.
            fingerprint: everything that determines the content; strings, integers and finite floats, with at least
                ``draws`` (U) and ``vocabulary`` (V).
            shard_ids: the sample ids (16 raw bytes) of each shard in order; a function of the data alone.

        Raises:
            InputError: a bad argument, a folder that is not ours, or one of another fingerprint or plan; it stays
                untouched.
            RunError: the folder can't be made or written.
        """
        check_fingerprint(fingerprint)
        if not shard_ids or not all(shard_ids):
            raise InputError("a cache needs at least one shard, and each shard at least one sample")
        check_sample_ids([sample_id for ids in shard_ids for sample_id in ids])
        self.directory = Path(directory)
        self._shard_ids = [list(ids) for ids in shard_ids]
        self._vocabulary = int(fingerprint["vocabulary"])
        self._plan = make_plan(fingerprint, shard_ids)
        _, self._plan_checksum = render(self._plan)
        self._claim_folder()

    def missing_shards(self) -> list[int]:
        """The numbers of the shards that are not there, or not whole: each finished one is read and checked in full."""
        return [number for number in range(len(self._shard_ids)) if not self._is_whole(number)]

    def write_shard(self, number: int, samples: Iterable[SampleRows]) -> None:
        """Writes one shard: it appears under its name only once it is whole and on disk.

        Args:
            number: which shard of the plan.
            samples: (sample_id, row_lengths, class_ids, counts) of each planned sample in the planned order; the arrays
                as in ``codec.Rows``. May be a generator: a sample is written as it comes.

        Raises:
            InputError: other samples than planned, or rows that can't be stored exactly.
            RunError: the disk refused; finished shards are untouched.
        """
        if not 0 <= number < len(self._shard_ids):
            raise InputError(f"shard {number} is not planned: there are shards 0 to {len(self._shard_ids) - 1}")
        with replacing(self.directory / shard_name(number)) as file:
            write_shard(file, number, self._plan_checksum, self._as_planned(number, samples))

    def finish(self) -> None:
        """Checks that every planned sample is there exactly once, and writes the manifest: the cache is complete.

        Removes what interrupted writes of this cache left behind, so call it when no process writes any more.

        Raises:
            RunError: shards are missing or damaged, or the disk refused.
        """
        if read_plan(self.directory / PLAN)[1] != self._plan_checksum:
            raise RunError(f"{PLAN} in {self.directory} changed during the build: another build uses the same folder")
        shards = []
        problems = []
        for number, planned in enumerate(self._plan["shards"]):
            try:
                shard = read_shard(self._path(number), number, self._plan_checksum)
            except InputError as error:
                problems.append(str(error))
                continue
            if shard.ids_digest != planned["ids_digest"]:
                problems.append(f"{shard_name(number)} holds other samples than planned")
            shards.append(shard)
        if problems:
            raise RunError(
                f"the teacher cache in {self.directory} is incomplete: {len(problems)} of {len(self._shard_ids)} "
                f"shards are missing or damaged ({'; '.join(problems[:3])}): build these, then finish"
            )
        remove_temporaries(self.directory)
        manifest, path = make_manifest(self._plan, self._plan_checksum, shards), self.directory / MANIFEST
        if not path.exists() or path.read_bytes() != render(manifest)[0]:
            write_document(path, manifest)

    def _path(self, number: int) -> Path:
        return self.directory / shard_name(number)

    def _is_whole(self, number: int) -> bool:
        try:
            check_shard(self._path(number), number, self._plan_checksum, self._plan["shards"][number]["ids_digest"])
        except InputError:
            return False
        return True

    def _claim_folder(self) -> None:
        plan_path = self.directory / PLAN
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            names = [path.name for path in self.directory.iterdir()]
            # Asked after the listing: another process of this build may be a step ahead.
            is_begun = plan_path.exists()
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{self.directory} is no folder: use another cache.path") from error
        except OSError as error:
            raise RunError(f"the teacher cache folder {self.directory} can't be used: {error}") from error
        if is_begun:
            self._check_same_plan(plan_path)
            return
        # Remains of a build that was killed before its plan was in place are ours; anything else is not.
        if foreign := sorted(name for name in names if not is_temporary(name)):
            raise InputError(
                f"{self.directory} is not a teacher cache and not empty (it holds {foreign[0]!r}): "
                "use a new or empty folder as cache.path; nothing in it was changed"
            )
        write_document(plan_path, self._plan)

    def _check_same_plan(self, plan_path: Path) -> None:
        stored, checksum = read_plan(plan_path)
        if checksum == self._plan_checksum:
            return
        check_same_fingerprint(stored["fingerprint"], self._plan["fingerprint"], self.directory)
        raise InputError(
            f"the teacher cache in {self.directory} was planned for other samples: stored {stored['n_samples']} in "
            f"{len(stored['shards'])} shards, expected {self._plan['n_samples']} in {len(self._shard_ids)}; "
            "use another cache.path"
        )

    def _as_planned(self, number: int, samples: Iterable[SampleRows]) -> Iterator[tuple[bytes, Rows]]:
        planned = self._shard_ids[number]
        n_written = 0
        for sample_id, row_lengths, class_ids, counts in samples:
            if n_written == len(planned) or sample_id != planned[n_written]:
                expected = planned[n_written].hex() if n_written < len(planned) else "no more"
                got = sample_id.hex() if isinstance(sample_id, bytes) else repr(sample_id)
                raise InputError(
                    f"shard {number} takes its samples in the planned order: expected {expected} after {n_written} "
                    f"samples, got {got}"
                )
            if len(class_ids) and np.max(class_ids) >= self._vocabulary:
                raise InputError(
                    f"sample {sample_id.hex()} has class id {np.max(class_ids)}; the fingerprint's vocabulary is "
                    f"{self._vocabulary}"
                )
            yield sample_id, Rows(row_lengths, class_ids, counts)
            n_written += 1
        if n_written < len(planned):
            raise InputError(f"shard {number} expected {len(planned)} samples and got {n_written}")
