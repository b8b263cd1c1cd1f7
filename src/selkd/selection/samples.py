"""Sample selection: which samples are kept by their scores, and the file that keeps both for later runs.

The file is Parquet with the columns ``sample_id``, ``score`` and ``kept``. The schema's metadata has its fingerprint,
and a digest of all that is read of it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from selkd.errors import InputError
from selkd.files import write_whole

FORMAT = 2  # files of format 1 have no digest; they are still read
COLUMNS = ("sample_id", "score", "kept")
_AGAIN = "Move it away, and `selkd distill` with the same recipe scores the samples again; nothing was changed."


def highest(scores: np.ndarray, fraction: float) -> np.ndarray:
    """Ascending indices of the ceil(l * N) samples with the highest of ``scores`` [N]; of equal ones, the lower index.

    Raises:
        ValueError: a score is not finite.
    """
    if not np.isfinite(scores).all():
        raise ValueError(f"the score of sample {int(np.flatnonzero(~np.isfinite(scores))[0])} is not finite")
    count = max(0, math.ceil(fraction * len(scores) - 1e-9))
    return np.sort(np.argsort(-scores, kind="stable")[:count])


@dataclass(frozen=True)
class SampleScores:
    """Scores of all samples of a training split, in its order.

    Attributes:
        sample_ids: ids of 32 hex digits.
        scores: float64 [N].
        fingerprint: everything that the scores depend on, field -> value.
        kept: bool [N], which samples the run that wrote the file keeps.
        cost: ``seconds`` and ``teacher_tokens`` that scoring took, for runs that share the file; None if unknown.
    """

    sample_ids: list[str]
    scores: np.ndarray
    fingerprint: dict[str, str]
    kept: np.ndarray
    cost: dict[str, float] | None = None

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        table = pa.table({"sample_id": self.sample_ids, "score": self.scores, "kept": self.kept})
        meta = {"format": str(FORMAT), "fingerprint": json.dumps(self.fingerprint, sort_keys=True)}
        meta |= {"cost": json.dumps(self.cost)}
        meta |= {"digest": _digest(meta, table)}
        content = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({f"selkd.{key}": text for key, text in meta.items()}), content)
        write_whole(path, content.getvalue().to_pybytes())

    @classmethod
    def read(cls, path: Path, expected: dict[str, str] | None = None) -> "SampleScores":
        """The scores in the file at ``path``.

        Raises:
            InputError: it is no such file, it is damaged, or its fingerprint differs from ``expected`` in a field,
                which is named.
        """
        try:
            read = cls._of(*_table(path))
        except Exception as error:  # noqa: BLE001  Parquet's reader raises whatever a flipped bit leads it to
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{path}: not a whole file of sample scores ({reason:.300}). {_AGAIN}") from None
        for field, value in (expected or {}).items():
            if read.fingerprint.get(field) != value:
                raise InputError(
                    f"{path}: these scores are of another {field}: stored {read.fingerprint.get(field)!r}, expected "
                    f"{value!r}. Give another samples.path (and another --out, if the run has begun), or move the file "
                    "away to score again; nothing was changed."
                )
        return read

    @classmethod
    def _of(cls, table: pa.Table, meta: dict[str, str]) -> "SampleScores":
        return cls(
            table["sample_id"].to_pylist(),
            table["score"].to_numpy(),
            json.loads(meta["fingerprint"]),
            table["kept"].to_numpy(),
            json.loads(meta.get("cost", "null")),  # files of earlier versions have none
        )


def _table(path: Path) -> tuple[pa.Table, dict[str, str]]:
    """The table and selkd's metadata of a file. Raises ValueError if its digest differs, and what the reader raises."""
    table = pq.read_table(path)
    meta = {key.decode(): text.decode() for key, text in (table.schema.metadata or {}).items()}
    meta = {key.removeprefix("selkd."): text for key, text in meta.items() if key.startswith("selkd.")}
    if "fingerprint" not in meta or not set(COLUMNS) <= set(table.column_names):
        raise ValueError("Parquet, but not sample scores written by selkd")
    digest = meta.pop("digest", None)
    if (meta.get("format"), digest) == ("1", None):
        return table, meta
    if meta.get("format") != str(FORMAT):
        raise ValueError(f"format {meta.get('format')}, expected {FORMAT}")
    if digest != _digest(meta, table):
        raise ValueError("damaged: what it holds does not match its digest")
    return table, meta


def _digest(meta: Mapping[str, str], table: pa.Table) -> str:
    """32 hex digits over the metadata and every value of the table."""
    digest = xxhash.xxh3_128(json.dumps(meta, sort_keys=True).encode())
    digest.update(json.dumps([str(field.type) for field in table.schema]).encode())
    digest.update(json.dumps(table["sample_id"].to_pylist()).encode())
    digest.update(np.asarray(table["score"].to_numpy(), dtype="<f8").tobytes())
    digest.update(np.asarray(table["kept"].to_numpy(), dtype=bool).tobytes())
    return digest.hexdigest()
