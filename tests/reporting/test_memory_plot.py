"""The plot of memory over time: long readings are thinned, their peaks are not."""

from hypothesis import given
from hypothesis import strategies as st

from selkd.reporting.memory_plot import _POINTS, _thinned, memory_plot


@given(st.lists(st.floats(0, 1e3), max_size=2000))
def test_thinned_readings_keep_their_peak_and_their_order(heights: list[float]) -> None:
    seconds = [0.004 * index for index in range(len(heights))]
    at, kept = _thinned(seconds, heights)
    assert len(kept) == len(at) <= _POINTS
    assert max(kept, default=None) == max(heights, default=None)
    assert at == sorted(set(at))
    assert all(heights[round(second / 0.004)] == height for second, height in zip(at, kept, strict=True))
    if len(heights) <= _POINTS:
        assert kept == heights


def test_a_long_trace_is_a_small_picture_that_tells_its_peak() -> None:
    n = 13_000
    trace = {
        "seconds": [0.004 * index for index in range(n)],
        "bytes": [1e9 + (3e9 if index == 7_777 else index % 13) for index in range(n)],
        "step_seconds": [0.0, 26.0, 52.0],
    }
    picture = memory_plot({"floor": trace})
    assert "4.00 GB" in picture
    assert len(picture) < 100_000
