"""A sample: one training sequence of tokens, its documents' borders, and an id of this content.

Legend: L tokens of a sample, n documents in it, N samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset, Features, List, Value
from torch.utils.data import Dataset as TorchDataset

from selkd.errors import InputError

ID_TAG = b"selkd sample 1"
_TARGETS_TAG = b"selkd sample 1, some targets"
ID_BYTES = 16
FEATURES = Features(
    {
        "id": Value("binary"),
        "token_ids": List(Value("int32")),
        "document_starts": List(Value("int32")),
        "is_target": List(Value("bool")),  # null: every token
        "n_valid": Value("int32"),
    }
)
_ROWS_AT_ONCE = 4096
_TOKENS_AT_ONCE = 2**19


@dataclass(frozen=True, eq=False)
class Sample:
    """One training sequence. The arrays are kept as int32; compare two samples by ``id``.

    Args:
        token_ids: [L] integers, L >= 1, each in 0 ... 2^31 - 1.
        document_starts: [n] integers, ascending, the first 0, all below L: where each document begins. A document
            does not see the others, and no target crosses a border.
        is_target: [L] booleans, the tokens that are learned; the others belong to a prompt or a template. None: all
            tokens. It becomes None, too, if only first tokens of documents are False, for these are never targets.

    Raises:
        InputError: the arrays are not as above.
    """

    token_ids: np.ndarray
    document_starts: np.ndarray
    is_target: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", _int32("token_ids", self.token_ids))
        object.__setattr__(self, "document_starts", _int32("document_starts", self.document_starts))
        starts = self.document_starts
        if starts[0] != 0 or starts[-1] >= len(self.token_ids) or (np.diff(starts) <= 0).any():
            raise InputError(
                f"Sample.document_starts: expected ascending positions from 0 to below {len(self.token_ids)} "
                f"(the number of tokens), got {starts[:8].tolist()}."
            )
        if self.is_target is not None:
            object.__setattr__(self, "is_target", self._checked_targets(np.asarray(self.is_target)))

    def _checked_targets(self, is_target: np.ndarray) -> np.ndarray | None:
        if is_target.dtype != bool or is_target.shape != self.token_ids.shape:
            raise InputError(
                f"Sample.is_target: expected {len(self.token_ids)} booleans, one a token, got {is_target.dtype} "
                f"{is_target.shape}."
            )
        possible = np.ones(len(self.token_ids), dtype=bool)
        possible[self.document_starts] = False
        targets = is_target & possible
        return None if (targets == possible).all() else targets

    @cached_property
    def id(self) -> bytes:
        """16 bytes: xxh3_128 of tag, L, token ids and document starts (little-endian uint32).

        The id depends on the content alone: not on the row, the batch, the padding or the machine. If only some tokens
        are targets, the tag is another, and the packed bits of ``is_target`` come before the document starts.
        """
        digest = xxhash.xxh3_128(ID_TAG if self.is_target is None else _TARGETS_TAG)
        digest.update(np.uint32(len(self.token_ids)).astype("<u4").tobytes())
        digest.update(self.token_ids.astype("<u4").tobytes())
        if self.is_target is not None:
            digest.update(np.packbits(self.is_target).tobytes())
        digest.update(self.document_starts.astype("<u4").tobytes())
        return digest.digest()

    @property
    def position_ids(self) -> np.ndarray:
        """int32 [L], from 0 in each document."""
        lengths = np.diff(self.document_starts, append=np.int32(len(self.token_ids)))
        return np.arange(len(self.token_ids), dtype=np.int32) - np.repeat(self.document_starts, lengths)

    @property
    def valid_mask(self) -> np.ndarray:
        """bool [L]: position t is valid where token t+1 exists, belongs to the same document and is a target."""
        if self.is_target is not None:
            return np.append(self.is_target[1:], False)
        valid = np.ones(len(self.token_ids), dtype=bool)
        valid[self.document_starts - 1] = False  # the token before each start; for the first one -1, the last token
        return valid

    @property
    def n_valid(self) -> int:
        """How many positions are valid: without a prompt, every token but the last of each document."""
        return int(self.valid_mask.sum())


class TokenBlock(NamedTuple):
    """The tokens of some samples laid end to end.

    Attributes:
        token_ids: int32 [n].
        document_starts: int64: where each document begins; every sample begins one.
    """

    token_ids: np.ndarray
    document_starts: np.ndarray


def _int32(name: str, values: np.ndarray) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"Sample.{name}: expected a 1-D array of at least one integer, got {array.dtype} {array.shape}."
        )
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise InputError(f"Sample.{name}: expected 0 to 2^31 - 1, got {array.min()} to {array.max()}.")
    return np.ascontiguousarray(array, dtype=np.int32)


EMPTY_SAMPLE = Sample(np.zeros(1, np.int32), np.zeros(1, np.int32))
"""One token and no valid position. It fills the last batch of an epoch under DDP without counting in any loss."""


def record_batch(samples: Sequence[Sample]) -> pa.RecordBatch:
    """The samples as Arrow rows of ``FEATURES``."""
    columns = {name: [getattr(sample, name) for sample in samples] for name in FEATURES}
    return pa.RecordBatch.from_pydict(columns, schema=FEATURES.arrow_schema)


class SampleDataset(TorchDataset[Sample]):
    """N samples, read one at a time from a memory-mapped ``datasets.Dataset`` with the columns of ``FEATURES``.

    It is a map-style dataset for ``torch.utils.data.DataLoader``. Two rows with the same content have the same id.

    Raises:
        InputError: the dataset has other columns.
    """

    def __init__(self, rows: Dataset) -> None:
        if rows.features != FEATURES:
            raise InputError(f"SampleDataset: expected the columns {FEATURES}, got {rows.features}.")
        self._rows = rows.with_format("arrow")

    @classmethod
    def from_samples(cls, samples: Sequence[Sample]) -> "SampleDataset":
        """A dataset of these samples, in memory."""
        table = pa.Table.from_batches([record_batch(samples)])
        return cls(Dataset.from_dict({name: table[name] for name in table.column_names}, features=FEATURES))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``; IndexError where there is none."""
        row = self._rows[int(index)]
        is_target = row["is_target"][0]
        return Sample(
            row["token_ids"][0].values.to_numpy(),
            row["document_starts"][0].values.to_numpy(),
            is_target.values.to_numpy(zero_copy_only=False) if is_target.is_valid else None,
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: Sequence[int] | np.ndarray) -> "SampleDataset":
        """The samples at these indices, in this order. The tokens are not copied."""
        return SampleDataset(self._rows.select([int(index) for index in indices]))

    @cached_property
    def ids(self) -> list[bytes]:
        """The N ids, 16 bytes each, in row order."""
        return [sample_id for table in self._tables("id") for sample_id in table["id"].to_pylist()]

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits that identify the samples and their order."""
        return xxhash.xxh3_128_hexdigest(b"".join(self.ids))

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [N]: tokens of each sample."""
        return self._numbers("token_ids")

    @cached_property
    def n_documents(self) -> np.ndarray:
        """int64 [N]: documents in each sample."""
        return self._numbers("document_starts")

    @cached_property
    def is_packed(self) -> bool:
        """Whether a sample holds several documents, which must not see each other."""
        return bool((self.n_documents > 1).any())

    @cached_property
    def n_valid(self) -> np.ndarray:
        """int64 [N]: valid positions of each sample."""
        return self._numbers("n_valid")

    def token_blocks(self) -> Iterator[TokenBlock]:
        """The tokens of all samples in row order, about half a million at a time."""
        rows_at_once = _TOKENS_AT_ONCE // int(self.lengths.max(initial=1)) + 1
        for table in self._tables("token_ids", "document_starts", rows_at_once=min(rows_at_once, _ROWS_AT_ONCE)):
            for rows in table.to_batches():
                tokens, starts = rows["token_ids"], rows["document_starts"]
                sample_starts = np.cumsum([0, *pc.list_value_length(tokens).to_numpy()[:-1]])
                n_documents = pc.list_value_length(starts).to_numpy()
                document_starts = starts.flatten().to_numpy() + np.repeat(sample_starts, n_documents)
                yield TokenBlock(tokens.flatten().to_numpy(), document_starts)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """int64 [vocab_size]: how often each class occurs in the samples. Greater token ids are left out."""
        counts = np.zeros(vocab_size, np.int64)
        for table in self._tables("token_ids"):
            for chunk in table["token_ids"].chunks:
                ids = chunk.flatten().to_numpy()
                counts += np.bincount(ids[ids < vocab_size], minlength=vocab_size)
        return counts

    def _numbers(self, column: str) -> np.ndarray:
        """int64 [N]: the numbers in a column, or the lengths of its lists."""
        is_list = isinstance(FEATURES[column], List)
        columns = (table[column] for table in self._tables(column))
        parts = [(pc.list_value_length(values) if is_list else values).to_numpy() for values in columns]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def _tables(self, *columns: str, rows_at_once: int = _ROWS_AT_ONCE) -> Iterator[pa.Table]:
        return self._rows.select_columns(list(columns)).iter(batch_size=rows_at_once)
