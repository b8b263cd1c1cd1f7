from contextlib import suppress

import numpy as np
import pytest
import zstandard
from cache_samples import assert_same_rows, make_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from selkd.cache.codec import Rows, decode, encode
from selkd.errors import InputError


def rows_of(position_rows: list[dict[int, int]]) -> Rows:
    """Rows from one {class id: count} a position."""
    flat = [pair for row in position_rows for pair in sorted(row.items())]
    return Rows(
        np.array([len(row) for row in position_rows], np.uint16),
        np.array([pair[0] for pair in flat], np.uint32),
        np.array([pair[1] for pair in flat], np.uint16),
    )


def positions(largest_id: int) -> st.SearchStrategy[list[dict[int, int]]]:
    row = st.dictionaries(st.integers(0, largest_id), st.integers(1, 2**16 - 1), max_size=12)
    return st.lists(row, max_size=30)


@settings(deadline=None)
@given(positions(2**18 - 1))
def test_a_round_trip_gives_back_every_integer(position_rows: list[dict[int, int]]) -> None:
    rows = rows_of(position_rows)
    assert_same_rows(decode(encode(*rows)), rows)


@settings(deadline=None)
@given(positions(2**32 - 1))
def test_a_round_trip_holds_ids_of_32_bits(position_rows: list[dict[int, int]]) -> None:
    rows = rows_of(position_rows)
    assert_same_rows(decode(encode(*rows)), rows)


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
        [dict.fromkeys(range(2**16 - 1), 1)],
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
        "long row",
    ],
)
def test_a_round_trip_of_the_extremes(position_rows: list[dict[int, int]]) -> None:
    rows = rows_of(position_rows)
    assert_same_rows(decode(encode(*rows)), rows)


def test_any_integer_dtype_is_taken() -> None:
    rows = make_rows(1)
    assert encode(*(array.astype(np.int64) for array in rows)) == encode(*rows)


def test_encoding_is_deterministic() -> None:
    assert encode(*make_rows(2)) == encode(*make_rows(2))


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
        encode(np.array(lengths), np.array(ids), np.array(counts))


def test_an_id_beyond_64_bit_signed_integers_is_refused() -> None:
    with pytest.raises(InputError, match="got 18446744073709551615"):
        encode(np.array([1]), np.array([2**64 - 1], np.uint64), np.array([1]))


def test_every_cut_is_refused() -> None:
    data = encode(*make_rows(3))
    for size in range(len(data)):
        with pytest.raises(InputError):
            decode(data[:size])


def test_sizes_without_contents_are_refused_before_memory_is_taken() -> None:
    with pytest.raises(InputError, match="0 byte planes for 4294967295 values"):
        decode(b"\xff\xff\xff\xff\0\0\0\0\0\0\0")
    with pytest.raises(InputError, match="a byte plane has the wrong size"):
        decode(b"\xff\xff\xff\xff" + encode(*make_rows(3))[4:])


def test_bytes_after_the_end_are_refused() -> None:
    with pytest.raises(InputError, match="1 bytes follow its end"):
        decode(encode(*make_rows(3)) + b"\0")


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused_in_words(data: bytes) -> None:
    with suppress(InputError):
        decode(data)


@settings(deadline=None)
@given(st.data())
def test_a_changed_byte_is_refused_in_words_or_decodes_to_arrays_that_agree(data: st.DataObject) -> None:
    damaged = bytearray(encode(*make_rows(4)))
    at = data.draw(st.integers(0, len(damaged) - 1))
    # The largest sizes would be allocated honestly; a shard's checksums stand before the decoder.
    damaged[at] ^= data.draw(st.integers(1, 255)) if at >= 8 else 1
    try:
        rows = decode(bytes(damaged))
    except InputError:
        return
    assert rows.row_lengths.sum(dtype=np.int64) == len(rows.class_ids) == len(rows.counts)


def test_real_looking_rows_take_less_than_plain_storage() -> None:
    """Ids of a Zipf law, as a language model's draws are: far below the 3 bytes a draw of the fixed-width layout."""
    rng = np.random.default_rng(0)
    drawn = np.minimum(rng.zipf(1.3, (511, 64)) - 1, 49_151)
    rows = rows_of([dict(zip(*np.unique(row, return_counts=True), strict=True)) for row in drawn])
    assert len(encode(*rows)) / 511 < 0.25 * 3 * 64


def coded(*planes_of_arrays: list[list[int]], n_rows: int, n_classes: int, after_frame: bytes = b"") -> bytes:
    """A block put together by hand, so that it may mean what the encoder refuses."""
    data = n_rows.to_bytes(4, "little") + n_classes.to_bytes(4, "little") + bytes(map(len, planes_of_arrays))
    for planes in planes_of_arrays:
        for plane in planes:
            frame = zstandard.compress(bytes(plane)) + after_frame
            data += len(frame).to_bytes(4, "little") + frame
    return data


def test_a_block_put_together_by_hand_is_read() -> None:
    rows = decode(coded([[0, 2]], [[44, 254], [1, 1]], [[60, 4]], n_rows=2, n_classes=2))
    assert_same_rows(rows, rows_of([{}, {300: 60, 300 + 1 + 510: 4}]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (coded([[2]], [[255, 255]] * 4, [[1, 1]], n_rows=1, n_classes=2), "a class id is beyond 32 bits"),
        (coded([[2]], [[1, 1]], [[1, 0]], n_rows=1, n_classes=2), "counts do not agree"),
        (coded([[3]], [[1, 1]], [[1, 1]], n_rows=1, n_classes=2), "counts do not agree"),
        (coded([[2]], [[1, 1, 1]], [[1, 1]], n_rows=1, n_classes=2), "a byte plane has the wrong size"),
        (coded([[2]] * 3, [[1, 1]], [[1, 1]], n_rows=1, n_classes=2), "3 byte planes for 1 values"),
        (coded([[2]], [], [[1, 1]], n_rows=1, n_classes=2), "0 byte planes for 2 values"),
        (
            coded([[1]], [[1]], [[1]], n_rows=1, n_classes=1, after_frame=b"x"),
            "1 bytes of unused data",
        ),
    ],
    ids=["wide id", "zero count", "lengths", "plane size", "many planes", "no plane", "after a frame"],
)
def test_a_block_that_no_encoder_writes_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode(data)
