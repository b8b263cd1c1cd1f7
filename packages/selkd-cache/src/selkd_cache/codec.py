"""How the drawn classes of one sample become bytes and come back. Replace this module to change the coding.

The rest of the package uses ``NAME``, ``fit``, ``encode`` and ``decode``. The package's README defines the bytes.

A row is two sets of classes: the *singles*, which were drawn once, and the *heavies*, which were drawn more often. A
set is coded as the gaps between its ascending ranks, so neither the order of the draws nor the counts of the singles
cost anything. All sets of a sample are coded in *columns*: the first gap of each set, then the second gap of each set
that has one, and so on.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import constriction
import numpy as np

from selkd_cache.errors import InputError
from selkd_cache.frequency_model import TABLES, Model, Table
from selkd_cache.integers import to_codes
from selkd_cache.rows import Rows, check_totals

NAME: Final = "ranked-gaps-ans"

_LARGEST_ROWS: Final = 2**24
_HEADER = struct.Struct("<I")
_CATEGORICAL = constriction.stream.model.Categorical(perfect=False)
_UNIFORM = constriction.stream.model.Uniform()


class _Column(NamedTuple):
    """Values that are coded together: first their symbols, then their low bits."""

    table: Table
    cells: np.ndarray  # int64, context * symbols + symbol: the cell of the table that each value counts in
    values: np.ndarray  # int64
    context: np.ndarray  # int64


def fit(samples: Iterable[Rows]) -> Model:
    """The model of a shard with these samples. Raises InputError where the counts of all rows have not the same sum."""
    samples = list(samples)
    model = Model.of_classes(samples)
    n_coded = {table: np.zeros(np.prod(model.shape(table)), np.int64) for table in TABLES}
    for rows in samples:
        check_totals(rows, model.total)
        columns = _columns(model, rows)
        for table in TABLES:
            if cells := [column.cells for column in columns if column.table == table]:
                n_coded[table] += np.bincount(np.concatenate(cells), minlength=len(n_coded[table]))
    model.codes = {table: to_codes(n_coded[table]).reshape(model.shape(table)) for table in TABLES}
    return model


def encode(model: Model, rows: Rows) -> bytes:
    """The bytes of one sample, from which ``decode`` gives back exactly the same integers.

    Args:
        model: the model of the shard, fitted to this sample among others.
        rows: rows that ``rows.checked_rows`` has checked.

    Raises:
        InputError: the sample has more than 2^24 rows.
    """
    if len(rows.row_lengths) > _LARGEST_ROWS:
        raise InputError(f"a sample has at most {_LARGEST_ROWS} positions; got {len(rows.row_lengths)}")
    coder = constriction.stream.stack.AnsCoder()
    for column in reversed(_columns(model, rows)):
        buckets = model.buckets[column.table]
        symbols = column.cells - column.context * model.shape(column.table)[1]
        sizes = buckets.size[symbols]
        is_wide = sizes > 1
        if is_wide.any():
            low = (column.values - buckets.first[symbols])[is_wide]
            coder.encode_reverse(low.astype(np.int32), _UNIFORM, sizes[is_wide])
        coder.encode_reverse(symbols.astype(np.int32), _CATEGORICAL, model.weights[column.table][column.context])
    return _HEADER.pack(len(rows.row_lengths)) + coder.get_compressed().astype("<u4").tobytes()


def decode(model: Model, data: bytes) -> Rows:
    """The rows that these bytes were encoded from.

    Raises:
        InputError: these are not the bytes of a sample encoded with this model.
    """
    if len(data) < _HEADER.size or len(data) % 4:
        raise InputError(f"an encoded sample is damaged: {len(data)} bytes, expected a positive multiple of 4")
    (n_rows,) = _HEADER.unpack_from(data)
    # The arrays that decoding makes have n_rows entries: a damaged number must not ask for any amount of memory.
    if n_rows > _LARGEST_ROWS:
        raise InputError(f"an encoded sample is damaged: {n_rows} rows")
    try:
        words = np.frombuffer(data, "<u4", offset=_HEADER.size).astype(np.uint32)
        return _Decoder(model, constriction.stream.stack.AnsCoder(words)).rows(n_rows)
    except (ValueError, IndexError) as error:  # IndexError: the bytes have classes, their shard has none
        raise InputError(f"an encoded sample is damaged: {error}") from error


def _columns(model: Model, rows: Rows) -> list[_Column]:
    """Everything that is coded of a sample, in the order in which it is decoded."""
    n_rows = len(rows.row_lengths)
    row = np.repeat(np.arange(n_rows), rows.row_lengths)
    is_single = rows.counts == 1
    ranks = model.ranks(rows.class_ids)
    # Lists: the heavies of each row, then the singles of each row; ranks ascend within a list.
    lists = row + is_single * n_rows
    order = np.argsort(lists * (len(model.classes) + 1) + ranks)
    lists, ranks, counts = lists[order], ranks[order], rows.counts[order].astype(np.int64)
    sizes = np.bincount(lists, minlength=2 * n_rows)
    place = np.arange(len(lists)) - (np.cumsum(sizes) - sizes)[lists]
    left = sizes[lists] - place

    heavies, singles = sizes[:n_rows], sizes[n_rows:]
    columns = [_column(model, "singles", singles, np.zeros(n_rows, np.int64))]
    columns.append(_column(model, "heavies", heavies, model.buckets["singles"].of(singles)))

    is_first = place == 0
    previous = np.where(is_first, -1, np.roll(ranks, 1))
    rank_context = np.where(is_first, 0, model.context_of_rank[np.roll(ranks, 1)]) if len(ranks) else ranks
    contexts = model.gap_context((lists >= n_rows).astype(np.int64), rank_context, left)
    gaps = _column(model, "gaps", ranks - previous - 1, contexts)
    columns += _split(gaps, place, lists, sizes)

    is_heavy = lists < n_rows
    lists, place, left, counts = lists[is_heavy], place[is_heavy], left[is_heavy], counts[is_heavy]
    before = np.cumsum(counts) - counts
    before -= np.repeat(before[place == 0], heavies[heavies > 0])
    excess = model.total - singles[lists] - before - 2 * left
    is_open = left > 1  # the last count of a row is what the others leave of the total
    counted = _column(model, "counts", (counts - 2)[is_open], model.count_context(excess[is_open], left[is_open]))
    return columns + _split(counted, place[is_open], lists[is_open], heavies)


def _column(model: Model, table: Table, values: np.ndarray, context: np.ndarray) -> _Column:
    return _Column(table, context * model.shape(table)[1] + model.buckets[table].of(values), values, context)


def _split(column: _Column, place: np.ndarray, lists: np.ndarray, sizes: np.ndarray) -> list[_Column]:
    """One column for each place in the lists. Within a column, longer lists come first."""
    list_order = np.empty(len(sizes), np.int64)
    list_order[_longest_first(sizes)] = np.arange(len(sizes))
    order = np.lexsort((list_order[lists], place))
    parts = np.split(order, np.cumsum(np.bincount(place))[:-1]) if len(order) else []
    return [_Column(column.table, *(array[part] for array in column[1:])) for part in parts]


def _longest_first(sizes: np.ndarray) -> np.ndarray:
    return np.argsort(-sizes, kind="stable")


def _active(sizes: np.ndarray, least: int) -> Sequence[int]:
    """The number of lists that have more than 0, 1, 2, … classes beyond ``least``: the length of each column."""
    beyond = np.maximum(sizes - least, 0)
    n_with = np.bincount(beyond)
    active: Sequence[int] = (len(sizes) - np.cumsum(n_with))[:-1].tolist()
    return active


def _places(active: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """For each value, column by column: the number of its list, the longest being 0, and its place in that list."""
    n_active = np.array(active, np.int64)
    place = np.repeat(np.arange(len(active)), n_active)
    return np.arange(len(place)) - np.repeat(np.cumsum(n_active) - n_active, n_active), place


class _Decoder:
    """Takes one sample's symbols off the coder, in order."""

    def __init__(self, model: Model, coder: Any) -> None:
        self.model = model
        self.coder = coder

    def rows(self, n_rows: int) -> Rows:
        model = self.model
        singles = self.values("singles", np.zeros(n_rows, np.int64))
        heavies = self.values("heavies", model.buckets["singles"].of(singles))
        sizes = np.concatenate([heavies, singles])
        excess = model.total - singles - 2 * heavies
        is_empty = (singles == 0) & (heavies == 0)
        if (excess[~is_empty] < 0).any() or (excess[(heavies == 0) & ~is_empty] > 0).any():
            raise ValueError("classes of a row do not fit its draws")
        lists, ranks = self.ranks(sizes, n_rows)
        row, counts = lists % max(n_rows, 1), np.ones(len(lists), np.int64)
        counts[lists < n_rows] = 2 + self.excesses(heavies, excess)
        if not self.coder.is_empty():
            raise ValueError("bytes follow its end")
        ids = model.classes[ranks]
        keys = row.astype(np.uint64) << np.uint64(32) | ids
        order = np.argsort(keys)
        keys = keys[order]
        if (keys[1:] == keys[:-1]).any():
            raise ValueError("a class comes twice in a row")
        return Rows((heavies + singles).astype(np.uint16), ids[order], counts[order].astype(np.uint16))

    def values(self, table: Table, context: np.ndarray) -> np.ndarray:
        """int64: the next values of a table, one for each context."""
        if not len(context):
            return context
        buckets = self.model.buckets[table]
        symbols = self.coder.decode(_CATEGORICAL, self.model.weights[table].take(context, axis=0))
        values: np.ndarray = buckets.first.take(symbols, mode="clip")
        sizes = buckets.size.take(symbols, mode="clip")
        (is_wide,) = (sizes > 1).nonzero()
        if is_wide.size:
            values[is_wide] += self.coder.decode(_UNIFORM, sizes[is_wide])
        return values

    def ranks(self, sizes: np.ndarray, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The list and the rank of each class, in the order of the lists, ranks ascending within a list."""
        model = self.model
        order, active = _longest_first(sizes), _active(sizes, 0)
        number, place = _places(active)
        is_single = (order >= n_rows).astype(np.int64)
        contexts = model.gap_context(is_single[number], np.int64(0), sizes[order][number] - place)
        rank, rank_context = np.full(len(order), -1), np.zeros(len(order), np.int64)
        columns, start = [np.zeros(0, np.int64)], 0
        for n in active:
            gaps = self.values("gaps", contexts[start : start + n] + rank_context[:n])
            rank = rank[:n] + gaps + 1
            columns.append(rank)
            rank_context = model.context_of_rank.take(rank, mode="clip")
            start += n
        ranks = np.empty(len(number), np.int64)
        ranks[(np.cumsum(sizes) - sizes)[order][number] + place] = np.concatenate(columns)
        if ranks.size and ranks.max() >= len(model.classes):
            raise ValueError("a rank is beyond the last class")
        return np.repeat(np.arange(len(sizes)), sizes), ranks

    def excesses(self, heavies: np.ndarray, excess: np.ndarray) -> np.ndarray:
        """How often beyond two times each heavy class was drawn, in the order of the rows, ranks ascending.

        Args:
            heavies: how many heavy classes each row has.
            excess: the sum of the answer over each row.
        """
        order, active = _longest_first(heavies), _active(heavies, 1)
        number, place = _places(active)
        left, excess = heavies[order][number] - place, excess[order]
        columns, start = [np.zeros(0, np.int64)], 0
        for n in active:
            beyond = self.values("counts", self.model.count_context(excess[:n], left[start : start + n]))
            excess[:n] -= beyond
            if excess[:n].min() < 0:
                raise ValueError("the counts of a row are more than its draws")
            columns.append(beyond)
            start += n
        begin = (np.cumsum(heavies) - heavies)[order]
        excesses = np.empty(int(heavies.sum()), np.int64)
        excesses[begin[number] + place] = np.concatenate(columns)
        # The last class of each row takes what the others leave.
        has_heavies = heavies[order] > 0
        excesses[(begin + heavies[order] - 1)[has_heavies]] = excess[has_heavies]
        return excesses
