"""Intervals of paired differences, the frontier, and both as tables and plots."""

import io
import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from made_run import demo_record, write_run
from rich.console import Console

from selkd.errors import InputError
from selkd.reporting import differences
from selkd.reporting.comparison import RunComparison, compare
from selkd.reporting.comparison_page import write_comparison
from selkd.reporting.comparison_plots import comparison_plots
from selkd.reporting.comparison_tables import as_json
from selkd.reporting.comparison_terminal import print_comparison
from selkd.reporting.differences import Sums, difference_in_kl
from selkd.reporting.frontier import Point, on_frontier
from selkd.reporting.measures import KL

POSITIONS = np.full(40, 255)
DIFFICULTY = np.random.default_rng(0).gamma(4.0, 0.2, 40)  # nats a position of each sample, the same for all students


def run(folder: Path, name: str, seed: int, by_sample: np.ndarray, seconds: float = 100.0) -> Path:
    record = demo_record()
    record["name"], record["recipe"]["seed"], record["recipe"]["data"]["path"] = name, seed, name
    record["fidelity"]["after"]["kl_nats"] = float(by_sample.mean())
    record["seconds"]["train"] = seconds
    path = write_run(folder / f"{name}-{seed}", record)
    positions = POSITIONS[: len(by_sample)]
    sums = {"positions": positions.tolist(), "after": {"kl_nats": (by_sample * positions).tolist()}}
    (path / "fidelity.json").write_text(json.dumps(sums))
    return path


def study(folder: Path, seeds: tuple[int, ...]) -> tuple[RunComparison, np.ndarray]:
    """Two recipes, and the difference in KL of each seed and sample [seeds, S]."""
    noise = np.random.default_rng(1)
    runs, found = [], []
    for seed in seeds:
        base = DIFFICULTY + noise.normal(0, 0.02, 40)
        difference = noise.normal(0.03, 0.05, 40) + noise.normal(0, 0.02)
        found.append(difference)
        runs += [run(folder, "base", seed, base, 300.0), run(folder, "other", seed, base + difference)]
    return compare(runs, "base"), np.array(found)


def test_with_one_seed_the_interval_is_over_the_samples(tmp_path: Path) -> None:
    comparison, found = study(tmp_path, (1,))
    row = difference_in_kl(comparison, comparison.groups[1])
    assert row is not None
    # The bootstrap of the paired samples, another way to the same interval.
    draws = np.random.default_rng(2).integers(0, 40, (20_000, 40))
    low, high = np.percentile(found[0][draws].mean(axis=1), [2.5, 97.5])
    assert (row.mean, row.over) == (pytest.approx(found.mean()), "held-out samples")
    assert (row.low, row.high) == (pytest.approx(low, abs=0.002), pytest.approx(high, abs=0.002))
    # It is far narrower than the interval of either student, whose samples differ much.
    assert row.high - row.low < 0.3 * 2 * 1.96 * DIFFICULTY.std() / math.sqrt(40)


def test_over_seeds_and_samples_both_count(tmp_path: Path) -> None:
    comparison, found = study(tmp_path, (1, 2, 3))
    row = difference_in_kl(comparison, comparison.groups[1])
    assert row is not None
    over_samples = found.mean(axis=0).std(ddof=1) / math.sqrt(40)
    over_seeds = found.mean(axis=1).std(ddof=1) / math.sqrt(3)
    half = math.hypot(1.96 * over_samples, 4.303 * over_seeds)  # t of two degrees of freedom
    assert row.high - row.mean == pytest.approx(half) == row.mean - row.low
    assert row.over == "held-out samples and seeds"
    assert as_json(comparison)["recipes"][1]["intervals"]["kl_nats"]["low"] == row.low


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    noise = np.random.default_rng(3)
    positions = noise.integers(50, 400, 60).astype(float)
    covered = 0
    for _ in range(1000):
        difference = noise.normal(0.1, 0.4, 60)
        error = differences._error_over_samples(
            [(Sums(positions, difference * positions), Sums(positions, 0 * positions))]
        )
        assert error is not None
        mean = (difference * positions).sum() / positions.sum()
        covered += abs(mean - 0.1) < 1.96 * error
    assert 920 <= covered <= 970


def test_few_samples_widen_the_interval_so_that_it_covers_the_truth() -> None:
    """Students' t, which is exact here: with 1.96 in its place, 86% of the intervals would."""
    noise, positions, covered = np.random.default_rng(3), np.full(4, 300.0), 0
    for _ in range(1000):
        pair = [(Sums(positions, noise.normal(0.1, 0.4, 4) * positions), Sums(positions, 0 * positions))]
        half = differences._half(differences._error_over_samples(pair), 4)
        assert half is not None
        covered += abs(pair[0][0].kl.sum() / positions.sum() - 0.1) < half
    assert 930 <= covered <= 970


def test_intervals_of_few_samples_have_students_t(tmp_path: Path) -> None:
    few = np.array([0.30, 0.34, 0.29, 0.41])
    paths = [
        run(tmp_path, name, 1, by_sample)
        for name, by_sample in {"base": DIFFICULTY[:4], "other": few + DIFFICULTY[:4]}.items()
    ]
    comparison = compare(paths, "base")
    row, other = difference_in_kl(comparison, comparison.groups[1]), comparison.groups[1]
    assert row is not None
    assert row.high - row.mean == pytest.approx(3.182 * few.std(ddof=1) / math.sqrt(4))  # t of three degrees of freedom
    record = other.members[0].record
    for samples, t in ((4, 3.182), (3, 4.303), (400, 1.96), (None, 1.96)):
        record["data"]["held_out_samples"] = samples
        alone = differences.interval(other, KL)
        assert alone is not None
        assert alone.high - alone.mean == pytest.approx(t * record["fidelity"]["standard_errors"]["after"]["kl_nats"])


def test_a_damaged_file_of_sums_is_named(tmp_path: Path) -> None:
    comparison, _ = study(tmp_path, (1,))
    (tmp_path / "other-1" / "fidelity.json").write_text('{"positions": [1, 2], "after": {"kl_nats": [1]}}')
    with pytest.raises(InputError, match=r"other-1/fidelity\.json: damaged"):
        difference_in_kl(comparison, comparison.groups[1])
    (tmp_path / "other-1" / "fidelity.json").unlink()  # as in a run of an earlier version
    assert difference_in_kl(comparison, comparison.groups[1]) is None


points = some.lists(some.tuples(some.integers(1, 6), some.integers(1, 6)), min_size=1, max_size=12)


@given(points, some.booleans())
def test_on_the_frontier_is_what_nothing_beats(pairs: list[tuple[int, int]], is_lower: bool) -> None:
    all_points = [Point(str(number), float(cost), float(figure), None) for number, (cost, figure) in enumerate(pairs)]
    sign = 1 if is_lower else -1
    unbeaten = {
        (one.cost, one.figure)
        for one in all_points
        if not any(
            other.cost <= one.cost
            and sign * other.figure <= sign * one.figure
            and (other.cost, other.figure) != (one.cost, one.figure)
            for other in all_points
        )
    }
    best = on_frontier(all_points, lower_is_better=is_lower)
    assert {(point.cost, point.figure) for point in best} == unbeaten
    assert len(best) == len(unbeaten)


def test_a_study_has_its_forest_and_its_frontier(tmp_path: Path) -> None:
    comparison, _ = study(tmp_path, (1, 2, 3))
    drawn = {plot.name: plot for plot in comparison_plots(comparison)}
    assert {"differences", "frontier-total_seconds"} <= drawn.keys()
    # Both cost the same tokens and bytes: these axes would be empty.
    assert not {"frontier-teacher_tokens", "frontier-cache_bytes"} & drawn.keys()
    assert "95% intervals over held-out samples and seeds" in drawn["differences"].caption
    assert "With one seed" not in drawn["differences"].caption
    assert "other: +0.0" in drawn["differences"].svg
    write_comparison(comparison, tmp_path / "out", "A study")
    assert "KL to the teacher against time" in (tmp_path / "out" / "report.html").read_text()
    one, _ = study(tmp_path / "one", (1,))
    assert "With one seed" in next(plot for plot in comparison_plots(one) if plot.name == "differences").caption


def test_the_names_of_near_points_stand_apart(tmp_path: Path) -> None:
    recipes = {"cheap": (1.0, 50.0), "near": (0.99, 100.0), "nearer": (0.9899, 100.0), "nearest": (0.9898, 100.0)}
    paths = [run(tmp_path, name, 1, DIFFICULTY * factor, cost) for name, (factor, cost) in recipes.items()]
    drawn = {plot.name: plot for plot in comparison_plots(compare(paths))}
    figure = drawn["frontier-total_seconds"].figure
    figure.draw_without_rendering()
    names = figure.axes[0].texts
    assert {text.get_text() for text in names} == recipes.keys()
    boxes = [text.get_window_extent() for text in names]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


@pytest.mark.parametrize("width", [60, 80, 120, 300])
def test_the_terminals_tables_fit_its_width_and_lose_nothing(tmp_path: Path, width: int) -> None:
    comparison, found = study(tmp_path, (1, 2))
    out = io.StringIO()
    print_comparison(Console(file=out, width=width, color_system=None), comparison)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for figure in (
        "62.4%",
        "20.1%",
        "7 min 44 s",
        "4 min 24 s",
        "training time",
        "3.41 GB",
        "678 kB",
        f"{found.mean():+.3f}",
    ):
        assert figure in words, figure
    assert "…" not in text
    assert ("base (2 seeds)" in words) == ("other (2 seeds)" in words) is True


def test_names_are_no_markup(tmp_path: Path) -> None:
    record: dict[str, Any] = demo_record()
    record["name"] = "[red]x[/red] [/]"
    out = io.StringIO()
    comparison = compare([write_run(tmp_path / "a", record)], failed={"[bold]y": "[/]"})
    print_comparison(Console(file=out, width=100, color_system=None), comparison)
    assert "[red]x[/red] [/]" in out.getvalue()
    assert "Failed: [bold]y ([/])." in out.getvalue()
