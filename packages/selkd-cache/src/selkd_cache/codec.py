"""How the drawn classes of one sample become bytes and come back. Replace this module to change the coding.

The rest of the package uses ``NAME``, ``fit``, ``encode`` and ``decode``. The package's README defines the bytes.

A row has two kinds of classes: the *singles*, which were drawn once, and the *heavies*, which were drawn more often.
The classes of one kind and one group are a set. A set is coded as the gaps between its ascending ranks, so neither the
order of the draws nor the counts of the singles cost anything. All sets of a sample are coded in *columns*: the first
gap of each set, then the second gap of each set that has one, and so on. The scalars follow, in contexts of the draws.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import constriction
import numpy as np

from selkd_cache.errors import InputError
from selkd_cache.frequency_model import Model, Table, scalar_tables
from selkd_cache.integers import to_codes
from selkd_cache.rows import LARGEST_COUNT, Rows, check_totals, row_starts
from selkd_cache.scalars import sixteenths_of_log2

NAME: Final = "ranked-gaps-ans"
NAME_WITH_SCALARS: Final = "grouped-gaps-ans"
GROUPS: Final = 2  # of classes, where scalars are stored, too (docs/results/cache.md)

_LARGEST_ROWS: Final = 2**24
_LARGEST_CLASSES: Final = 2**26  # of one sample
_AT_ONCE: Final = 2**16  # values, for each of which a copy of its context's weights is made
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
    """The model of a shard with these samples, which all have scalars or all have none.

    Raises:
        InputError: the counts of all rows have not the same sum.
    """
    samples = list(samples)
    model = Model.of_classes(samples, GROUPS)
    n_coded = {table: np.zeros(np.prod(model.shape(table)), np.int64) for table in model.tables}
    for rows in samples:
        check_totals(rows, model.total)
        columns = _columns(model, rows)
        for table in model.tables:
            if cells := [column.cells for column in columns if column.table == table]:
                n_coded[table] += np.bincount(np.concatenate(cells), minlength=len(n_coded[table]))
    model.codes = {table: to_codes(n_coded[table]).reshape(model.shape(table)) for table in model.tables}
    return model


def encode(model: Model, rows: Rows) -> bytes:
    """The bytes of one sample, from which ``decode`` gives back exactly the same integers.

    Args:
        model: the model of the shard, fitted to this sample among others.
        rows: rows that ``rows.checked_rows`` has checked.

    Raises:
        InputError: the sample has more than 2^24 rows, or more than 2^26 classes in all of them.
    """
    if len(rows.row_lengths) > _LARGEST_ROWS:
        raise InputError(f"a sample has at most {_LARGEST_ROWS} positions; got {len(rows.row_lengths)}")
    if len(rows.counts) > _LARGEST_CLASSES:
        raise InputError(f"a sample has at most {_LARGEST_CLASSES} classes in all rows; got {len(rows.counts)}")
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


def decode(model: Model, data: bytes, n_classes: int | None = None) -> Rows:
    """The rows that these bytes were encoded from.

    Args:
        n_classes: how many classes all rows together have, by the shard's index; None: not known. A few bytes may hold
            millions of classes, so this is compared before there is room for them.

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
        return _Decoder(model, constriction.stream.stack.AnsCoder(words)).rows(n_rows, n_classes)
    except (ValueError, IndexError) as error:  # IndexError: the bytes have classes, their shard has none
        raise InputError(f"an encoded sample is damaged: {error}") from error


def _columns(model: Model, rows: Rows) -> list[_Column]:
    """Everything that is coded of a sample, in the order in which it is decoded."""
    n_rows, n_groups = len(rows.row_lengths), model.n_groups
    row = np.repeat(np.arange(n_rows), rows.row_lengths)
    is_single = rows.counts == 1
    groups, ranks = model.ranks(rows.class_ids)
    # Lists: of each group the heavies of each row, then of each group the singles of each row; ranks ascend in a list.
    lists = row + (is_single * n_groups + groups) * n_rows
    order = np.argsort(lists * (len(model.ids) + 1) + ranks)
    lists, ranks, counts = lists[order], ranks[order], rows.counts[order].astype(np.int64)
    sizes = np.bincount(lists, minlength=2 * n_groups * n_rows)
    place = np.arange(len(lists)) - (np.cumsum(sizes) - sizes)[lists]
    left = sizes[lists] - place

    by_kind = sizes.reshape(2, n_groups, n_rows)
    heavies, singles = by_kind.sum(axis=1)
    columns = [_column(model, "singles", singles, np.zeros(n_rows, np.int64))]
    columns.append(_column(model, "heavies", heavies, model.buckets["singles"].of(singles)))
    for kind in (1, 0):
        of_later = np.cumsum(by_kind[kind, ::-1], axis=0)[::-1]
        for group in range(n_groups - 1):
            context = model.part_context(kind, group, of_later[group])
            columns.append(_column(model, "parts", by_kind[kind, group], context))

    is_first = place == 0
    previous = np.where(is_first, -1, np.roll(ranks, 1))
    rank_context = np.where(is_first, 0, model.context_of_rank[np.roll(ranks, 1)]) if len(ranks) else ranks
    contexts = model.gap_context(lists // max(n_rows, 1), rank_context, left)
    gaps = _column(model, "gaps", ranks - previous - 1, contexts)
    columns += _split(gaps, place, lists, sizes)

    is_heavy = lists < n_groups * n_rows
    row, counts = lists[is_heavy] % max(n_rows, 1), counts[is_heavy]
    order = np.argsort(row, kind="stable")  # in a row: by group, in a group by rank
    row, counts = row[order], counts[order]
    place = np.arange(len(row)) - (np.cumsum(heavies) - heavies)[row]
    left = heavies[row] - place
    before = np.cumsum(counts) - counts
    before -= np.repeat(before[place == 0], heavies[heavies > 0])
    excess = model.total - singles[row] - before - 2 * left
    is_open = left > 1  # the last count of a row is what the others leave of the total
    counted = _column(model, "counts", (counts - 2)[is_open], model.count_context(excess[is_open], left[is_open]))
    columns += _split(counted, place[is_open], row[is_open], heavies)
    return columns + _scalar_columns(model, rows)


def _scalar_columns(model: Model, rows: Rows) -> list[_Column]:
    if rows.scalars is None:
        return []
    columns, codes = [], rows.scalars.astype(np.int64).T
    uncertainty, heaviest = _summary(model, rows)
    for number, values in enumerate(codes):
        nats, quarter = scalar_tables(number)
        contexts = model.scalar_context(number, uncertainty, heaviest, codes[number - 1])
        columns.append(_column(model, nats, values >> 5, contexts[0]))
        columns.append(_column(model, quarter, values & 31, contexts[1] + (values >> 5)))
    return columns


def _summary(model: Model, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the draws' own entropy in sixteenths of a bit, and how often its heaviest class was drawn, int64."""
    log2, is_filled = sixteenths_of_log2(model.total), rows.row_lengths > 0
    uncertainty, heaviest = np.zeros((2, len(rows.row_lengths)), np.int64)
    if len(rows.counts):
        counts, starts = rows.counts.astype(np.int64), row_starts(rows.row_lengths)
        known = np.add.reduceat(counts * log2[counts], starts)
        uncertainty[is_filled] = (model.total * log2[model.total] - known) // model.total
        heaviest[is_filled] = np.maximum.reduceat(counts, starts)
    return uncertainty, heaviest


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
    return np.argsort((LARGEST_COUNT - sizes).astype(np.uint16), kind="stable")  # a radix sort


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

    def rows(self, n_rows: int, n_classes: int | None) -> Rows:
        model = self.model
        singles = self.values("singles", np.zeros(n_rows, np.int64))
        heavies = self.values("heavies", model.buckets["singles"].of(singles))
        found = int(singles.sum() + heavies.sum())
        if n_classes not in (None, found):
            raise ValueError(f"its rows do not agree with the index: {found} classes, expected {n_classes}")
        if found > _LARGEST_CLASSES:
            raise ValueError(f"{found} classes in all rows")
        excess = model.total - singles - 2 * heavies
        is_empty = (singles == 0) & (heavies == 0)
        if (excess[~is_empty] < 0).any() or (excess[(heavies == 0) & ~is_empty] > 0).any():
            raise ValueError("classes of a row do not fit its draws")
        of_singles, of_heavies = (self.parts(kind, left) for kind, left in ((1, singles), (0, heavies)))
        lists, places = self.places(np.concatenate([*of_heavies, *of_singles]), n_rows)
        row, counts = lists % max(n_rows, 1), np.ones(len(lists), np.int64)
        (at,) = (lists < model.n_groups * n_rows).nonzero()
        if model.n_groups > 1:
            at = at[np.argsort(row[at], kind="stable")]
        counts[at] = 2 + self.excesses(heavies, excess)
        # A row, the place of its class and the count share 64 bits: rows and classes are below 2^24.
        keys = (row << 40 | model.order[places] << 16 | counts).view(np.uint64)
        keys.sort()
        entries = keys >> np.uint64(16)
        if (entries[1:] == entries[:-1]).any():
            raise ValueError("a class comes twice in a row")
        ids = model.ids[(entries & np.uint64(2**24 - 1)).view(np.int64)]
        rows = Rows((heavies + singles).astype(np.uint16), ids, keys.astype(np.uint16))
        rows = rows._replace(scalars=self.scalars(rows)) if model.largest_codes else rows
        if not self.coder.is_empty():
            raise ValueError("bytes follow its end")
        return rows

    def parts(self, kind: int, left: np.ndarray) -> list[np.ndarray]:
        """How many of the rows' classes of a kind, ``left``, are of each group."""
        parts = []
        for group in range(self.model.n_groups - 1):
            parts.append(self.values("parts", self.model.part_context(kind, group, left)))
            left = left - parts[-1]
            if left.min(initial=0) < 0:
                raise ValueError("the groups of a row have more classes than it has")
        return [*parts, left]

    def scalars(self, rows: Rows) -> np.ndarray:
        """The codes of the rows' scalars, uint16 [n, s]."""
        model, codes = self.model, np.zeros((len(self.model.largest_codes) + 1, len(rows.row_lengths)), np.int64)
        uncertainty, heaviest = _summary(model, rows)
        for number in range(len(codes) - 1):
            nats, quarter = scalar_tables(number)
            contexts = model.scalar_context(number, uncertainty, heaviest, codes[number - 1])
            codes[number] = self.values(nats, contexts[0])
            codes[number] = codes[number] << 5 | self.values(quarter, contexts[1] + codes[number])
        if (codes[:-1].max(axis=1, initial=0) > model.largest_codes).any():
            raise ValueError("a scalar is above the largest of its shard")
        return codes[:-1].T.astype(np.uint16)

    def values(self, table: Table, context: np.ndarray) -> np.ndarray:
        """int64: the next values of a table, one for each context."""
        if not len(context):
            return context
        buckets = self.model.buckets[table]
        weights, decode = self.model.weights[table], self.coder.decode
        parts = range(0, len(context), _AT_ONCE)
        decoded = [decode(_CATEGORICAL, weights.take(context[at : at + _AT_ONCE], axis=0)) for at in parts]
        symbols = decoded[0] if len(decoded) == 1 else np.concatenate(decoded)
        values: np.ndarray = buckets.first.take(symbols, mode="clip")
        sizes = buckets.size.take(symbols, mode="clip")
        (is_wide,) = (sizes > 1).nonzero()
        if is_wide.size:
            values[is_wide] += self.coder.decode(_UNIFORM, sizes[is_wide])
        return values

    def places(self, sizes: np.ndarray, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The list of each class and its place among the model's, in the order of the lists, ascending in a list."""
        model = self.model
        if (sizes.reshape(2, model.n_groups, n_rows).max(axis=(0, 2), initial=0) > model.group_sizes).any():
            raise ValueError("a list of classes is longer than its group")
        order, active = _longest_first(sizes), _active(sizes, 0)
        number, place = _places(active)
        kind = order // max(n_rows, 1)
        contexts = model.gap_context(kind[number], np.int64(0), sizes[order][number] - place)
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
        lists = np.repeat(np.arange(len(sizes)), sizes)
        group = lists // max(n_rows, 1) % model.n_groups
        if (ranks >= model.group_sizes[group]).any():
            raise ValueError("a rank is beyond the last class")
        return lists, ranks + model.first_of_group[group]

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
