"""Sample selection: which samples are kept by their scores, and the file that keeps both for later runs.

The file is Parquet with the columns ``sample_id``, ``score`` and ``kept``; the schema's metadata has its fingerprint.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selkd.errors import InputError, RunError
from selkd.files import write_whole

FORMAT = 1


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
        cost: ``seconds`` and ``teacher_tokens`` that scoring took, for runs that share the file; None if unknown.
    """

    sample_ids: list[str]
    scores: np.ndarray
    fingerprint: dict[str, str]
    cost: dict[str, float] | None = None

    def write(self, path: Path, kept: np.ndarray) -> None:
        """Write the scores, and which samples are ``kept`` (indices), whole or not at all."""
        is_kept = np.zeros(len(self.scores), dtype=bool)
        is_kept[kept] = True
        table = pa.table({"sample_id": self.sample_ids, "score": self.scores, "kept": is_kept})
        meta = {"selkd.format": str(FORMAT), "selkd.fingerprint": json.dumps(self.fingerprint, sort_keys=True)}
        meta |= {"selkd.cost": json.dumps(self.cost)}
        content = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata(meta), content)
        try:
            write_whole(path, content.getvalue().to_pybytes())
        except RunError as error:
            raise RunError(f"{error}, or give another samples.path") from error

    @classmethod
    def read(cls, path: Path, expected: dict[str, str] | None = None) -> "SampleScores":
        """The scores in the file at ``path``.

        Raises:
            InputError: it is no such file, or its fingerprint differs from ``expected`` in a field, which is named.
        """
        try:
            table = pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{path}: not a file of sample scores ({error}). Give another samples.path.") from None
        meta = table.schema.metadata or {}
        if b"selkd.fingerprint" not in meta or not {"sample_id", "score"} <= set(table.column_names):
            raise InputError(f"{path}: Parquet, but not sample scores written by selkd. Give another samples.path.")
        if meta[b"selkd.format"] != str(FORMAT).encode():
            raise InputError(f"{path}: format {meta[b'selkd.format'].decode()}, expected {FORMAT}. Score again.")
        fingerprint = json.loads(meta[b"selkd.fingerprint"])
        for field, value in (expected or {}).items():
            if fingerprint.get(field) != value:
                raise InputError(
                    f"{path}: these scores are of another {field}: stored {fingerprint.get(field)!r}, expected "
                    f"{value!r}. Give another samples.path; nothing was changed."
                )
        cost = json.loads(meta.get(b"selkd.cost", b"null"))  # files of earlier versions have none
        return cls(table["sample_id"].to_pylist(), table["score"].to_numpy(), fingerprint, cost)
