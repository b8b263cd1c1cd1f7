"""Writing a cache shard by shard, by one process or several; an interrupted build is continued."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from selkd_cache.errors import InputError, RunError
from selkd_cache.files import is_temporary, remove_temporary_files, replacing
from selkd_cache.fingerprint import (
    Fingerprint,
    check_fingerprint,
    check_same_fingerprint,
    count_total,
    n_scalars,
    n_stored_classes,
)
from selkd_cache.manifest import (
    MANIFEST,
    PLAN,
    contradictions,
    make_manifest,
    make_plan,
    read_manifest,
    read_plan,
    render,
    settled_files,
    write_document,
)
from selkd_cache.rows import Rows, check_totals, checked_rows
from selkd_cache.sample_index import INDEX_FILE, describe_index, write_sample_index
from selkd_cache.shard import check_sample_ids, read_shard, shard_name, shard_problem, write_shard

SampleRows = (
    tuple[bytes, np.ndarray, np.ndarray, np.ndarray]
    | tuple[bytes, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]
)


class CacheWriter:
    """Writes the shards of one cache.

    Every process makes its own writer with the same arguments and writes its share of ``missing_shards()``. Once all
    have written, one of them calls ``finish()``. The same calls continue an interrupted build and repair a damaged
    cache.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: Fingerprint,
        shard_ids: Sequence[Sequence[bytes]],
        *,
        repair: bool = False,
    ) -> None:
        """Makes the folder for this plan, or opens it.

        Args:
            directory: a new or empty folder, or one in which this same cache was begun.
            fingerprint: everything that determines the content: strings, integers and finite floats, at least
                ``draws`` (U) and ``vocabulary`` (V), and ``count_total`` if the counts of a row do not sum to U.
            shard_ids: the sample ids (16 raw bytes) of each shard, in order; a function of the data alone.
            repair: write ``plan.json`` anew if it is lost or unreadable and the folder has no other cache's manifest,
                or if the manifest shows that another plan took its place.

        Raises:
            InputError: an argument is bad, or the folder is not a cache's or has another fingerprint or plan; it stays
                as it was.
            RunError: the folder can't be made or written.
        """
        check_fingerprint(fingerprint)
        if not shard_ids or not all(shard_ids):
            raise InputError("a cache needs at least one shard, and each shard at least one sample")
        check_sample_ids([sample_id for ids in shard_ids for sample_id in ids])
        self.directory = Path(directory)
        self._shard_ids = [list(ids) for ids in shard_ids]
        self._n_classes = n_stored_classes(fingerprint)
        self._count_total, self._n_scalars = count_total(fingerprint), n_scalars(fingerprint)
        self._plan = make_plan(fingerprint, shard_ids)
        _, self._plan_checksum = render(self._plan)
        self._claim_folder(repair)

    def missing_shards(self, among: Iterable[int] | None = None, *, blocks: bool = True) -> list[int]:
        """The numbers of the missing or damaged shards, of all shards or of those ``among``.

        They are compared with the manifest where there is one.

        Args:
            blocks: read every byte; else, of those written since the manifest, header, model, index and footer, as
                ``verify_cache`` says.
        """
        manifest = self._manifest()
        document = self._plan if manifest is None else manifest
        settled = set() if blocks or manifest is None else settled_files(self.directory, manifest)
        return [
            number
            for number in (range(len(self._shard_ids)) if among is None else among)
            if shard_name(number) not in settled
            and shard_problem(self.directory, number, self._plan_checksum, document, blocks=blocks, decode=False)
        ]

    def require_writable(self) -> None:
        """Raises RunError if no file can be made in the folder. Callers ask before they run the teacher."""
        try:
            with TemporaryFile(dir=self.directory):
                pass
        except OSError as error:
            raise RunError(f"the teacher cache folder {self.directory} can't be written: {error}") from error

    def write_shard(self, number: int, samples: Iterable[SampleRows]) -> None:
        """Writes one shard, which appears under its name once it is whole and on disk.

        Where another build was faster, its whole shard stays: its manifest may list it already, and what gives the rows
        may vary, as a server's answers do in their last bits.

        Args:
            number: which shard of the plan.
            samples: (sample_id, row_lengths, class_ids, counts) of each planned sample in the planned order, the arrays
                as in ``rows.Rows``, and with scalars a fifth, their numbers in nats, [n, s]. May be a generator; the
                rows of the shard are held in memory.

        Raises:
            InputError: the samples are not the planned ones, rows can't be stored without loss, or the counts of a row
                do not sum to the fingerprint's ``count_total`` (by default ``draws``).
            RunError: the disk refused; finished shards are untouched.
        """
        if not 0 <= number < len(self._shard_ids):
            raise InputError(f"shard {number} is not planned: there are shards 0 to {len(self._shard_ids) - 1}")
        with replacing(self.directory / shard_name(number), lambda: not self.missing_shards([number])) as file:
            write_shard(file, number, self._plan_checksum, self._as_planned(number, samples))

    def finish(self) -> None:
        """Checks that every planned sample is there and writes index and manifest, which completes the cache.

        Of a cache that is complete and was not written since, only the two JSON files are read. What interrupted writes
        of this cache left behind is removed, so call it once all processes have written.

        Raises:
            RunError: shards are missing or damaged, or the disk refused.
        """
        if read_plan(self.directory / PLAN)[1] != self._plan_checksum:
            raise RunError(f"{PLAN} in {self.directory} changed during the build: another build uses the same folder")
        manifest = self._manifest()
        if manifest is not None and len(settled_files(self.directory, manifest)) == len(self._shard_ids) + 1:
            remove_temporary_files(self.directory)
            return
        shards, sample_ids, problems = [], [], []
        for number in range(len(self._shard_ids)):
            try:
                shard = read_shard(self.directory, number, self._plan_checksum)
                shard.check(self._plan, number)
            except InputError as error:
                problems.append(str(error))
                continue
            shards.append(shard.entry)
            sample_ids.append(shard.index["sample_id"].copy())  # the shard itself need not stay in memory
        if problems:
            raise RunError(
                f"the teacher cache in {self.directory} is incomplete: {len(problems)} of {len(self._shard_ids)} "
                f"shards are missing or damaged ({'; '.join(problems[:3])}): build these, then finish"
            )
        remove_temporary_files(self.directory)
        write_sample_index(self.directory, self._plan_checksum, sample_ids)
        index = describe_index(self.directory / INDEX_FILE)
        path, content = self.directory / MANIFEST, make_manifest(self._plan, self._plan_checksum, shards, index)
        if not path.exists() or path.read_bytes() != render(content)[0]:
            write_document(path, content)

    def _manifest(self) -> dict[str, Any] | None:
        """The folder's manifest; None where it has none that can be read, another cache's, or one against the plan."""
        with suppress(InputError):
            manifest = read_manifest(self.directory / MANIFEST)
            if manifest["plan"] == self._plan_checksum and not contradictions(manifest, self._plan):
                return manifest
        return None

    def _claim_folder(self, repair: bool) -> None:
        plan_path = self.directory / PLAN
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{self.directory} is no folder: use another cache.path") from error
        except OSError as error:
            raise RunError(f"the teacher cache folder {self.directory} can't be used: {error}") from error
        try:
            if require_claimable(self.directory):
                self._check_same_plan(plan_path)
                return
        except InputError:
            if not (repair and self._is_ours(plan_path)):
                raise
        write_document(plan_path, self._plan)

    def _is_ours(self, plan_path: Path) -> bool:
        """Whether a folder without this cache's plan is nevertheless this cache's.

        A readable manifest decides. Without one, a shard of this cache decides, unless another plan can be read: one
        shard that strayed into another cache's folder does not make the folder this cache's.
        """
        with suppress(InputError):
            return bool(read_manifest(self.directory / MANIFEST)["plan"] == self._plan_checksum)
        with suppress(InputError):
            read_plan(plan_path)
            return False
        for number in range(len(self._shard_ids)):
            with suppress(InputError):
                read_shard(self.directory, number, self._plan_checksum)
                return True
        return False

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
        for sample_id, row_lengths, class_ids, counts, *rest in samples:
            scalars = rest[0] if rest else None
            if n_written == len(planned) or sample_id != planned[n_written]:
                expected = planned[n_written].hex() if n_written < len(planned) else "no more"
                got = sample_id.hex() if isinstance(sample_id, bytes) else repr(sample_id)
                raise InputError(
                    f"shard {number} takes its samples in the planned order: expected {expected} after {n_written} "
                    f"samples, got {got}"
                )
            if len(class_ids) and np.max(class_ids) >= self._n_classes:
                raise InputError(
                    f"sample {sample_id.hex()} has class id {np.max(class_ids)}; by its fingerprint the cache holds "
                    f"{self._n_classes} classes"
                )
            try:
                n_given = 0 if scalars is None else scalars.shape[-1]
                if n_given != self._n_scalars:
                    raise InputError(f"expected {self._n_scalars} scalars a position by the fingerprint; got {n_given}")
                rows = checked_rows(row_lengths, class_ids, counts, scalars)
                check_totals(rows, self._count_total)
            except InputError as error:
                raise InputError(f"sample {sample_id.hex()}: {error}") from error
            yield sample_id, rows
            n_written += 1
        if n_written < len(planned):
            raise InputError(f"shard {number} expected {len(planned)} samples and got {n_written}")


def require_claimable(directory: Path) -> bool:
    """Whether a cache was begun in the folder, which need not be there yet. Nothing is written.

    Raises:
        InputError: it is no folder, can't be made or written, or holds something else.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"{directory} is no folder, as {existing} is a file: use another cache.path")
    if not (directory / MANIFEST).exists() and not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(
            f"{directory}: no cache can be built there, as {existing} may not be written: use another cache.path"
        )
    try:
        names = [path.name for path in directory.iterdir()] if directory.exists() else []
    except OSError as error:
        raise RunError(f"the teacher cache folder {directory} can't be used: {error}") from error
    # The plan is looked for after the listing, because another process of this build may be a step ahead.
    if (directory / PLAN).exists():
        return True
    # A build that was killed before its plan was in place leaves temporary files; others are not selkd's.
    if foreign := sorted(name for name in names if not is_temporary(name)):
        raise InputError(
            f"{directory} is not a teacher cache and not empty (it holds {foreign[0]!r}): "
            "use a new or empty folder as cache.path; nothing in it was changed"
        )
    return False
