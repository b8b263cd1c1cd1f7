import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from cache_samples import assert_same_rows, make_rows
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from second_reader import frequencies, read_block, read_model

from selkd_cache import codec
from selkd_cache.codec import decode, encode, fit
from selkd_cache.errors import InputError
from selkd_cache.frequency_model import Model
from selkd_cache.integers import Buckets, to_codes, weights
from selkd_cache.rows import Rows, checked_rows
from selkd_cache.scalars import LARGEST_CODE, bound_of, codes_of, values_of

Row = dict[int, int]


def rows_of(position_rows: list[Row]) -> Rows:
    """Rows from one {class id: count} a position."""
    flat = [pair for row in position_rows for pair in sorted(row.items())]
    return Rows(
        np.array([len(row) for row in position_rows], np.uint16),
        np.array([pair[0] for pair in flat], np.uint32),
        np.array([pair[1] for pair in flat], np.uint16),
    )


def as_dicts(rows: Rows) -> list[Row]:
    """What ``rows_of`` was given."""
    pairs = iter(zip(rows.class_ids.tolist(), rows.counts.tolist(), strict=True))
    return [dict(next(pairs) for _ in range(length)) for length in rows.row_lengths.tolist()]


def through_bytes(model: Model) -> Model:
    return Model.from_bytes(model.to_bytes(), has_scalars=bool(model.largest_codes))


def assert_round_trip(samples: list[Rows]) -> None:
    model = fit(samples)
    stored = through_bytes(model)
    for rows in samples:
        assert_same_rows(decode(stored, encode(model, rows)), rows)


@st.composite
def row_of_total(draw: st.DrawFn, total: int, largest_id: int) -> Row:
    """An empty row, or classes whose counts sum to the total."""
    n = draw(st.integers(0, min(total, 12)))
    ids = draw(st.sets(st.integers(0, largest_id), min_size=n, max_size=n))
    cuts = sorted(draw(st.sets(st.integers(1, total - 1), min_size=n - 1, max_size=n - 1))) if n > 1 else []
    counts = np.diff([0, *cuts, total]).tolist()
    return dict(zip(ids, counts, strict=True)) if n else {}


@st.composite
def shards(draw: st.DrawFn) -> list[list[Row]]:
    """Samples of one shard, of any total."""
    total = draw(st.sampled_from([1, 2, 12, 64, 2**16 - 1]))
    row = row_of_total(total, draw(st.sampled_from([15, 2**18 - 1, 2**32 - 1])))
    return draw(st.lists(st.lists(row, max_size=20), min_size=1, max_size=4))


@given(shards())
def test_a_round_trip_gives_back_every_integer(samples: list[list[Row]]) -> None:
    assert_round_trip([rows_of(rows) for rows in samples])


@examples(60)
@given(shards())
def test_a_reader_written_from_the_document_reads_the_same(samples: list[list[Row]]) -> None:
    model = fit([rows_of(rows) for rows in samples])
    second = read_model(model.to_bytes())
    for rows in samples:
        assert read_block(second, encode(model, rows_of(rows))) == rows


@pytest.mark.parametrize(
    "position_rows",
    [
        [],
        [{}],
        [{}, {}, {}],
        [{0: 1}],
        [{2**32 - 1: 2**16 - 1}],
        [{0: 1, 2**32 - 1: 1}] * 5,
        [{131_071: 1, 131_072: 2, 151_935: 3}],
        [{}, {7: 64}, {}],
        [{7: 2, 8: 2}, {9: 4}, {1: 1, 2: 1, 3: 1, 4: 1}],
        [dict.fromkeys(range(2**16 - 1), 1)],
        [dict.fromkeys(range(0, 2**16 - 2, 2), 2) | {2**20: 1}],
    ],
    ids=[
        "no position",
        "one empty row",
        "empty rows",
        "zero",
        "extremes",
        "widest gap",
        "17 bits",
        "edges",
        "kinds",
        "long row",
        "long heavy row",
    ],
)
def test_a_round_trip_of_the_extremes(position_rows: list[Row]) -> None:
    assert_round_trip([rows_of(position_rows)])


def test_more_rows_than_16_bits_count() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 1000, (2, 70_000)).astype(np.uint32)
    ids = np.stack([first, first + 1 + second], axis=1).ravel()
    assert_round_trip([Rows(np.full(70_000, 2, np.uint16), ids, np.tile(np.array([1, 3], np.uint16), 70_000))])


def test_encoding_is_deterministic() -> None:
    samples = [make_rows(number) for number in range(3)]
    first, second = fit(samples), fit(samples)
    assert first.to_bytes() == second.to_bytes()
    assert encode(first, samples[1]) == encode(second, samples[1])


def test_a_second_reader_reads_real_looking_rows() -> None:
    samples = [zipf_rows(number, n=40) for number in range(3)]
    model = fit(samples)
    second = read_model(model.to_bytes())
    for rows in samples:
        assert read_block(second, encode(model, rows)) == as_dicts(rows)


def test_rows_of_another_total_are_refused() -> None:
    with pytest.raises(InputError, match=r"must sum to 5; got 6 at row 1 \(1 such rows\)"):
        fit([rows_of([{1: 2, 3: 3}, {1: 5, 2: 1}])])
    with pytest.raises(InputError, match="sum to at most 65535; got 65536"):
        fit([rows_of([{1: 2**15, 2: 2**15}])])


@pytest.mark.parametrize(
    ("lengths", "ids", "counts", "message"),
    [
        ([1], [2**32], [1], "class_ids must lie from 0 to 4294967295; got 4294967296 to 4294967296"),
        ([1], [-1], [1], "class_ids must lie from 0 to 4294967295; got -1"),
        ([1], [5], [2**16], "counts must lie from 1 to 65535; got 65536"),
        ([1], [5], [0], "counts must lie from 1 to 65535; got 0"),
        ([2**16], [5], [1], "row_lengths must lie from 0 to 65535; got 65536"),
        ([-1, 2], [5], [1], "row_lengths must lie from 0 to 65535; got -1"),
        ([2], [5], [1], "the sum of row_lengths, 2; got 1 class_ids and 1 counts"),
        ([1], [5], [1, 1], "the sum of row_lengths, 1; got 1 class_ids and 2 counts"),
        ([2], [6, 5], [1, 1], "ascend strictly within a row; got 5 after 6 at index 1"),
        ([1, 2], [9, 5, 5], [1, 1, 1], "ascend strictly within a row; got 5 after 5 at index 2"),
        ([1], [5.0], [1], "class_ids must be a one-dimensional array of integers; got float64"),
        ([[1]], [5], [1], r"row_lengths must be a one-dimensional array of integers; got int64 \[1, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused(lengths: list, ids: list, counts: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked_rows(np.array(lengths), np.array(ids), np.array(counts))


def test_an_id_beyond_64_bit_signed_integers_is_refused() -> None:
    with pytest.raises(InputError, match="got 18446744073709551615"):
        checked_rows(np.array([1]), np.array([2**64 - 1], np.uint64), np.array([1]))


def test_any_integer_dtype_is_taken() -> None:
    rows = make_rows(1)
    assert_same_rows(checked_rows(*(array.astype(np.int64) for array in rows[:3])), rows)


def test_no_cut_of_a_block_passes_for_the_whole() -> None:
    model = fit([make_rows(3)])
    data = encode(model, make_rows(3))
    n_refused = 0
    for size in range(len(data)):
        try:
            rows = decode(model, data[:size])
        except InputError:
            n_refused += 1
        else:  # what is left may mean other rows: a shard's checksums stand before the decoder
            assert as_dicts(rows) != as_dicts(make_rows(3))
    assert n_refused > 0.9 * len(data)


def test_every_cut_of_a_model_is_refused() -> None:
    data = fit([make_rows(3)]).to_bytes()
    for size in range(len(data)):
        with pytest.raises(InputError, match="model"):
            Model.from_bytes(data[:size])
    with pytest.raises(InputError, match="1 bytes follow its end"):
        Model.from_bytes(data + b"\0")


def test_sizes_without_contents_are_refused_before_memory_is_taken() -> None:
    model = fit([make_rows(3)])
    with pytest.raises(InputError, match="4294967295 rows"):
        decode(model, b"\xff\xff\xff\xff" + encode(model, make_rows(3))[4:])
    with pytest.raises(InputError, match="does not hold 16777215 bytes"):
        Model.from_bytes(model.to_bytes()[:4] + b"\xff\xff\xff\0" + model.to_bytes()[8:])


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused_in_words(data: bytes) -> None:
    model = fit([make_rows(3)])
    with suppress(InputError):
        decode(model, (len(data) % 50).to_bytes(4, "little") + data)
    with suppress(InputError):
        Model.from_bytes(data)


@given(st.data())
def test_a_changed_byte_is_refused_in_words_or_decodes_to_rows_of_the_total(data: st.DataObject) -> None:
    """Without the checksums that stand before the decoder: damage is never an array that does not agree with itself."""
    model = fit([make_rows(4)])
    damaged = bytearray(encode(model, make_rows(4)))
    at = data.draw(st.integers(4, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    try:
        rows = decode(model, bytes(damaged))
    except InputError:
        return
    assert {sum(row.values()) for row in as_dicts(rows) if row} <= {64}


@given(st.data())
def test_a_changed_byte_of_a_model_is_refused_in_words_or_another_model(data: st.DataObject) -> None:
    model = fit([make_rows(4)])
    block = encode(model, make_rows(4))
    damaged = bytearray(model.to_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(InputError):
        decode(Model.from_bytes(bytes(damaged)), block)


def zipf_rows(seed: int, n: int = 511) -> Rows:
    """64 draws a position of a Zipf law, as a language model's are."""
    drawn = np.minimum(np.random.default_rng(seed).zipf(1.3, (n, 64)) - 1, 49_151)
    return rows_of([dict(zip(*np.unique(row, return_counts=True), strict=True)) for row in drawn])


def test_real_looking_rows_take_less_than_their_draws_tell() -> None:
    """Draws of one known law: within a twelfth of the entropy of the draws' multiset, model included."""
    samples = [zipf_rows(seed) for seed in range(32)]
    model = fit(samples)
    size = len(model.to_bytes()) + sum(len(encode(model, rows)) for rows in samples)
    # -log2 P(multiset) = -log2(64! / prod counts!) - sum counts * log2 p
    weights = np.arange(1, 49_152, dtype=float) ** -1.3
    zeta = 3.9319492118  # Riemann's, at 1.3
    p = np.append(weights / zeta, 1 - weights.sum() / zeta)
    log_factorial = np.concatenate([[0], np.cumsum(np.log2(np.arange(1, 65)))])
    bits = 0.0
    for rows in samples:
        counts = rows.counts.astype(int)
        bits -= (counts * np.log2(p[rows.class_ids])).sum()
        bits -= 511 * log_factorial[64] - log_factorial[counts].sum()
    assert bits / 8 < size < bits / 8 * (1 + 1 / 12)


@pytest.mark.parametrize("mantissa_bits", [1, 3])
def test_buckets_and_low_bits_stand_for_each_value_once(mantissa_bits: int) -> None:
    values = np.arange(70_000)
    buckets = Buckets(mantissa_bits, 69_999)
    of = buckets.of(values)
    assert (np.diff(of) >= 0).all()
    assert of[-1] == buckets.n - 1
    low = values - buckets.first[of]
    assert low.min() == 0
    assert (low < buckets.size[of]).all()


def test_frequencies_sum_to_the_precision_and_none_is_zero() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 128, (50, 30)).astype(np.uint8)
    codes[0] = 0
    found = weights(codes).astype(np.int64) + 1
    assert (found.sum(axis=1) == 2**24).all()
    assert found.min() >= 1
    assert np.ptp(found[0, 1:]) == 0  # of a context that never came, all symbols alike


@pytest.mark.parametrize("largest", [40, 100, 127])
def test_weights_are_the_specified_frequencies_less_one(largest: int) -> None:
    """Against the specification's integers, also where counts are beyond what doubles hold."""
    rng = np.random.default_rng(largest)
    codes = rng.integers(0, largest + 1, (200, 31)).astype(np.uint8) * (rng.random((200, 31)) < 0.4).astype(np.uint8)
    codes[:3] = 0
    assert (weights(codes) + 1).tolist() == [frequencies(row.tobytes()) for row in codes]


def test_codes_keep_small_counts_and_the_size_of_large_ones() -> None:
    counts = np.concatenate([np.arange(8), 2 ** np.arange(3, 31)])
    codes = to_codes(counts)
    assert codes[:8].tolist() == list(range(8))
    assert (codes[1:] > 0).all()
    by_value = [code if code < 4 else (4 + code % 4) * 2 ** (code // 4 - 1) for code in codes.tolist()]
    assert by_value == counts.tolist()


def test_the_tables_of_a_model_survive_storing() -> None:
    model = fit([make_rows(number) for number in range(5)])
    stored = through_bytes(model)
    np.testing.assert_array_equal(stored.ids, model.ids)
    np.testing.assert_array_equal(stored.order, model.order)
    for table in model.tables:
        np.testing.assert_array_equal(stored.codes[table], model.codes[table])
        assert stored.weights[table].dtype == np.float32


def test_a_sample_of_too_many_rows_is_refused() -> None:
    rows = Rows(np.zeros(2**24 + 1, np.uint16), np.zeros(0, np.uint32), np.zeros(0, np.uint16))
    with pytest.raises(InputError, match="at most 16777216 positions; got 16777217"):
        encode(fit([make_rows(1)]), rows)


def test_a_block_that_claims_many_rows_takes_little_memory_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """No table is copied for all rows at once, of a few bytes that claim millions of rows or of a long sample."""
    model = through_bytes(fit([make_rows(1)]))
    claimed = 2**20
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="damaged"):
            decode(model, np.array([claimed, 12_345, 99_999], "<u4").tobytes())
        assert tracemalloc.get_traced_memory()[1] < 130 * claimed
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(codec, "_AT_ONCE", 7)
    assert_round_trip([with_scalars(make_rows(number), number) for number in range(2)])


def test_classes_in_a_shard_without_any_are_refused() -> None:
    """A block of another shard, whose model says that no class was ever drawn."""
    empty = fit([rows_of([{}, {}])])
    block = encode(fit([rows_of([{3: 1}, {4: 1}])]), rows_of([{3: 1}, {4: 1}]))
    without_classes = Model(1, empty.ids, empty.octaves)
    shapes = {table: np.ones(without_classes.shape(table), np.uint8) for table in without_classes.tables}
    without_classes.codes = shapes
    with pytest.raises(InputError, match="damaged"):
        decode(without_classes, block)


def with_scalars(rows: Rows, seed: int, n_scalars: int = 2, spread: float = 3.0) -> Rows:
    """The rows with scalars from 1e-9 to some tens of nats, some of them 0."""
    generator = np.random.default_rng(seed)
    shape = (len(rows.row_lengths), n_scalars)
    numbers = generator.exponential(spread, shape) * 10 ** -generator.choice([0, 0, 1, 4, 9], shape).astype(float)
    numbers[generator.random(shape) < 0.1] = 0.0
    return checked_rows(*rows[:3], numbers)


@pytest.mark.parametrize("n_scalars", [2, 4])
def test_scalars_come_back_in_both_readers(n_scalars: int) -> None:
    samples = [with_scalars(make_rows(number), number, n_scalars) for number in range(4)]
    model = fit(samples)
    stored = Model.from_bytes(model.to_bytes(), has_scalars=True)
    second = read_model(model.to_bytes(), 3)
    assert stored.n_groups > 1
    for rows in samples:
        block = encode(model, rows)
        assert_same_rows(decode(stored, block), rows)
        read = read_block(second, block)
        assert [row for row, _ in read] == as_dicts(rows)
        np.testing.assert_array_equal(np.array([numbers for _, numbers in read]), values_of(rows.scalars))


def test_codes_of_scalars_are_the_nearest_and_within_their_bound() -> None:
    codes = np.arange(LARGEST_CODE + 1)
    assert (np.diff(values_of(codes)) > 0).all()
    np.testing.assert_array_equal(codes_of(values_of(codes)), codes)
    generator = np.random.default_rng(0)
    numbers = np.concatenate([generator.exponential(3, 5000), 10 ** generator.uniform(-9, 3, 20_000), [0.0, 1.0]])
    errors = np.abs(values_of(codes_of(numbers)) - numbers)
    assert (errors <= bound_of(numbers)).all()
    assert (errors / bound_of(numbers)).max() > 0.9
    assert codes_of(np.array([np.inf, 5000.0])).tolist() == [LARGEST_CODE] * 2
    for wrong in (-0.1, np.nan):
        with pytest.raises(InputError, match="scalars are numbers from 0"):
            codes_of(np.array([1.0, wrong]))


def test_damaged_blocks_with_scalars_are_refused_or_decoded_otherwise() -> None:
    """No bit that flips makes anything but an InputError or other rows."""
    samples = [with_scalars(make_rows(number), number) for number in range(3)]
    model = fit(samples)
    block = encode(model, samples[0])
    generator = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(block)
        damaged[generator.integers(len(block))] ^= 1 << int(generator.integers(8))
        with suppress(InputError):
            decode(model, bytes(damaged))


def test_a_shard_with_scalars_groups_its_classes_alike_on_every_run() -> None:
    samples = [with_scalars(make_rows(number), number) for number in range(4)]
    assert fit(samples).to_bytes() == fit(samples).to_bytes()
    with pytest.raises(InputError, match="damaged"):
        Model.from_bytes(fit(samples).to_bytes())  # of a version without scalars


def cheap_rows(n: int) -> Rows:
    """Rows that are all alike, of which a shard's model lets any number take next to no bytes."""
    ids = np.tile(np.arange(8, dtype=np.uint32), n)
    return Rows(np.full(n, 8, np.uint16), ids, np.ones(8 * n, np.uint16))


def narrowed(model: Model) -> Model:
    """The same tables in a model of two classes, in which a list of eight has no room."""
    narrow = Model(8, model.ids[:2], model.octaves[:2])
    narrow.codes = model.codes | {"gaps": np.zeros(narrow.shape("gaps"), np.uint8)}
    return narrow


def test_a_few_bytes_of_many_classes_take_no_memory_before_the_index_is_compared() -> None:
    n = 2**15
    rows = cheap_rows(n)
    model = fit([rows])
    block = encode(model, rows)
    assert len(block) < 40
    assert_same_rows(decode(model, block, 8 * n), rows)
    for of, n_classes, message in (
        (model, 8 * n - 1, f"its rows do not agree with the index: {8 * n} classes, expected {8 * n - 1}"),
        (narrowed(model), 8 * n, "a list of classes is longer than its group"),
    ):
        tracemalloc.start()
        try:
            with pytest.raises(InputError, match=message):
                decode(of, block, n_classes)
            assert tracemalloc.get_traced_memory()[1] < 200 * n
        finally:
            tracemalloc.stop()
    few = cheap_rows(50)
    model = fit([few])
    for of, n_classes in ((model, 399), (narrowed(model), 400)):
        with pytest.raises(AssertionError):
            read_block(read_model(of.to_bytes()), encode(model, few), n_classes)


def test_a_sample_of_too_many_classes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = cheap_rows(3)
    model = fit([rows])
    block = encode(model, rows)
    monkeypatch.setattr(codec, "_LARGEST_CLASSES", 23)
    with pytest.raises(InputError, match="at most 23 classes in all rows; got 24"):
        encode(model, rows)
    with pytest.raises(InputError, match="damaged: 24 classes in all rows"):
        decode(model, block)
