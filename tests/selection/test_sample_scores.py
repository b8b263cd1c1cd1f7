"""Keeping the highest samples, and the file of their scores."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selkd.errors import InputError
from selkd.selection.samples import SampleScores, highest


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_highest_keeps_the_share_and_prefers_the_lower_index(values: list[float], fraction: float) -> None:
    kept = highest(np.array(values), fraction).tolist()
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert kept == sorted(ranked[: len(kept)])
    assert fraction * len(values) - 1e-6 <= len(kept) < fraction * len(values) + 1


def test_a_score_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 1 is not finite"):
        highest(np.array([1.0, np.nan]), 0.5)


def test_scores_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "selection" / "samples.parquet"
    fingerprint = {"metric": "student_entropy", "data": "d"}
    scores = SampleScores(["00" * 16, "ff" * 16], np.array([0.25, 1 / 3]), fingerprint, np.array([False, True]))
    scores.write(path)
    back = SampleScores.read(path, {"metric": "student_entropy", "data": "d"})
    assert back.sample_ids == scores.sample_ids
    assert np.array_equal(back.scores, scores.scores)
    assert pq.read_table(path)["kept"].to_pylist() == [False, True]
    assert [p.name for p in path.parent.iterdir()] == ["samples.parquet"]


def test_scores_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    fingerprint = {"metric": "student_entropy", "data": "old"}
    SampleScores(["00" * 16], np.array([1.0]), fingerprint, np.array([True])).write(path)
    with pytest.raises(InputError, match=r"another data: stored 'old', expected 'new'.*Give another samples.path"):
        SampleScores.read(path, {"data": "new"})


def test_files_that_are_no_scores_are_refused(tmp_path: Path) -> None:
    text, table = tmp_path / "a.parquet", tmp_path / "b.parquet"
    text.write_text("hello")
    pq.write_table(pa.table({"x": [1]}), table)
    with pytest.raises(InputError, match="not a whole file of sample scores"):
        SampleScores.read(text)
    with pytest.raises(InputError, match="not sample scores written by selkd"):
        SampleScores.read(table)
    assert text.read_text() == "hello"


def test_no_flipped_bit_changes_what_is_read(tmp_path: Path) -> None:
    """Most are found; the others are in bytes that Parquet's reader does not look at."""
    generator = np.random.default_rng(3)
    path, values = tmp_path / "samples.parquet", generator.random(40)
    ids, cost = [f"{number:032x}" for number in range(40)], {"seconds": 1.5, "teacher_tokens": 3}
    written = SampleScores(ids, values, {"metric": "student_entropy"}, values > 0.5, cost)
    written.write(path)
    whole = path.read_bytes()
    found = 0
    for at, bit in zip(generator.integers(len(whole), size=400), generator.integers(8, size=400), strict=True):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(bit)
        path.write_bytes(damaged)
        try:
            read = SampleScores.read(path)
        except InputError as error:
            assert f"{path}: not a whole file of sample scores" in str(error)  # noqa: PT017  one of 400
            found += 1
        else:
            assert (read.sample_ids, read.fingerprint, read.cost) == (ids, written.fingerprint, cost)
            assert (read.scores == values).all()
            assert (read.kept == written.kept).all()
    assert found > 200
