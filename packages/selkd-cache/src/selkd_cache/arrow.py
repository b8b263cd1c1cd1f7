"""A cache as Arrow record batches and as a Parquet file, for what reads those; the only module that needs pyarrow."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selkd_cache.errors import InputError
from selkd_cache.files import replacing
from selkd_cache.fingerprint import n_scalars
from selkd_cache.reader import TeacherCache
from selkd_cache.rows import Rows
from selkd_cache.scalars import values_of

METADATA = b"selkd_cache"  # in the schema: the fingerprint as JSON
_COLUMNS = {"class_ids": pa.uint32(), "counts": pa.uint16()}
_SCALARS = ("entropy_nats", "ce_nats", "entropy_nats_at_temperature", "ce_nats_at_temperature")


def write_parquet(cache: TeacherCache, path: Path) -> None:
    """Writes all samples to a file, whole or not at all. What is in memory is a shard's model and a batch of samples.

    Raises:
        InputError: a sample is damaged.
        RunError: the disk refused.
    """
    batches = cache.to_arrow()
    with replacing(path) as file, pq.ParquetWriter(file, batches.schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)


def record_batches(
    samples: Iterable[tuple[bytes, Rows]], fingerprint: dict[str, str | int | float], positions_at_once: int
) -> "pa.RecordBatchReader":
    """See ``TeacherCache.to_arrow``."""
    if positions_at_once < 1:
        raise InputError(f"positions_at_once: expected at least 1, got {positions_at_once}")
    columns = {name: pa.list_(pa.list_(kind)) for name, kind in _COLUMNS.items()}
    columns |= dict.fromkeys(_SCALARS[: n_scalars(fingerprint)], pa.list_(pa.float32()))
    schema = pa.schema(
        [pa.field("sample_id", pa.binary()), *(pa.field(name, kind) for name, kind in columns.items())],
        metadata={METADATA: json.dumps(fingerprint).encode()},
    )

    def batches() -> Iterator[Any]:
        ids, rows, n_positions = [], [], 0
        for sample_id, of_sample in samples:
            ids.append(sample_id)
            rows.append(of_sample)
            n_positions += len(of_sample.row_lengths)
            if n_positions >= positions_at_once:
                yield _batch(ids, rows, schema)
                ids, rows, n_positions = [], [], 0
        if ids:
            yield _batch(ids, rows, schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


def _batch(ids: list[bytes], rows: list[Rows], schema: Any) -> Any:
    positions = _offsets([np.array([len(sample.row_lengths)]) for sample in rows])
    classes = _offsets([sample.row_lengths for sample in rows])
    arrays = [pa.array(ids, pa.binary())]
    for name, kind in _COLUMNS.items():
        values = pa.array(np.concatenate([getattr(sample, name) for sample in rows]), kind)
        arrays.append(pa.ListArray.from_arrays(positions, pa.ListArray.from_arrays(classes, values)))
    for number in range(len(schema) - len(arrays)):
        values = np.concatenate([values_of(sample.scalars[:, number]) for sample in rows if sample.scalars is not None])
        arrays.append(pa.ListArray.from_arrays(positions, pa.array(values, pa.float32())))
    return pa.record_batch(arrays, schema=schema)


def _offsets(lengths: list[np.ndarray]) -> Any:
    ends = np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)])
    if ends[-1] > np.iinfo(np.int32).max:
        raise InputError(f"a batch of {ends[-1]} classes is too large for Arrow's lists: use fewer positions_at_once")
    return pa.array(ends.astype(np.int32))
