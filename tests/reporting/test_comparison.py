"""Several runs side by side: grouping by recipe, statistics over seeds, tables, plots and the page."""

import csv
import io
import json
import statistics
from pathlib import Path

import pytest
from made_run import BENCHMARKS, demo_record, write_run

from selkd.errors import InputError
from selkd.reporting.comparison import as_csv, as_json, as_markdown, compare, runs_as_csv
from selkd.reporting.comparison_page import write_comparison
from selkd.reporting.comparison_plots import budget_lines
from selkd.reporting.measures import ACCURACY, KL, PERPLEXITY

# (recipe, fraction) -> perplexity by seed
PERPLEXITIES = {
    ("full_kd", None): {1: 30.0, 2: 31.0, 3: 32.0},
    ("se_kd-0.2", 0.2): {1: 31.0, 2: 32.5, 3: 32.0},
    ("se_kd-0.5", 0.5): {1: 30.5, 3: 32.5},
}


def make_runs(folder: Path) -> list[Path]:
    runs = []
    for (name, fraction), seeds in PERPLEXITIES.items():
        for seed, perplexity in seeds.items():
            record = demo_record()
            record["name"], record["recipe"]["seed"] = name, seed
            record["recipe"]["samples"]["path"] = f"/somewhere/{seed}.parquet"
            positions = record["recipe"]["positions"]
            positions |= {"policy": "all", "metric": None} if fraction is None else {}
            positions["fraction"] = fraction
            record["fidelity"]["after"]["perplexity"] = perplexity
            runs.append(write_run(folder / f"{name}-{seed}", record))
    return runs


def test_runs_of_one_recipe_stand_together_whatever_their_seed_and_paths(tmp_path: Path) -> None:
    comparison = compare(make_runs(tmp_path))
    assert [(group.name, len(group.members)) for group in comparison.groups] == [
        ("full_kd", 3),
        ("se_kd-0.2", 3),
        ("se_kd-0.5", 2),
    ]
    assert comparison.baseline == "full_kd"


def test_means_deviations_and_paired_differences(tmp_path: Path) -> None:
    content = as_json(compare(make_runs(tmp_path)))
    full, narrow, half = (recipe["figures"]["perplexity"] for recipe in content["recipes"])
    assert full == {"mean": 31.0, "deviation": 1.0, "n": 3, "difference": None}
    # By hand: differences +1, +1.5, 0; and over the seeds 1 and 3 alone +0.5, +0.5, whatever seed 2 did.
    assert narrow["difference"] == {"mean": pytest.approx(2.5 / 3), "deviation": pytest.approx(0.7637626), "n": 3}
    assert half["difference"] == {"mean": 0.5, "deviation": 0.0, "n": 2}
    assert half["deviation"] == pytest.approx(statistics.stdev([30.5, 32.5]))
    # What a run cost is told, but no difference: the baseline's time is no measure of quality.
    assert content["recipes"][1]["figures"]["total_seconds"]["difference"] is None
    assert "accuracy" not in full
    assert [run["perplexity"] for run in content["recipes"][1]["runs"]] == [31.0, 32.5, 32.0]


def test_accuracy_is_the_suites_mean_or_that_of_what_counts() -> None:
    tasks = {"benchmarks": {"after": {"tasks": BENCHMARKS["after"]["tasks"]}}}
    assert ACCURACY.read({"benchmarks": BENCHMARKS}) == 0.412
    assert ACCURACY.read(tasks) == pytest.approx((0.4551 + 0.3) / 2)
    assert ACCURACY.read({"benchmarks": None}) is None


def test_another_baseline_turns_the_sign(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    there = compare(runs).difference(compare(runs).groups[1], PERPLEXITY)
    other = compare(runs, baseline="se_kd-0.2")
    back = other.difference(other.groups[0], PERPLEXITY)
    assert there is not None
    assert back is not None
    assert back.mean == -there.mean
    with pytest.raises(InputError, match=r"no run is called 'se_kd'\. There are full_kd, se_kd-0\.2"):
        compare(runs, baseline="se_kd")


def test_the_tables_agree_with_the_figures(tmp_path: Path) -> None:
    comparison = compare(make_runs(tmp_path), failed={"se_kd-0.5/seed-2": "out of | memory"})
    rows = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert [row["recipe"] for row in rows] == ["full_kd", "se_kd-0.2", "se_kd-0.5"]
    assert float(rows[2]["perplexity_difference"]) == 0.5
    assert rows[0]["perplexity_difference"] == ""
    runs = list(csv.DictReader(io.StringIO(runs_as_csv(comparison))))
    assert [(row["recipe"], row["seed"], float(row["perplexity"])) for row in runs][-1] == ("se_kd-0.5", "3", 32.5)
    markdown = as_markdown(comparison)
    assert "| se_kd-0.5 | 2 | 31.5 ± 1.41 (+0.50 ± 0.00) |" in markdown
    assert "Failed: se_kd-0.5/seed-2 (out of | memory)." in markdown.replace("\\|", "|")


def test_budget_lines_join_what_differs_in_the_fraction_alone(tmp_path: Path) -> None:
    groups = compare(make_runs(tmp_path)).groups
    (line,) = budget_lines(groups, "positions", KL)
    assert [fraction for fraction, _ in line.points] == [0.2, 0.5]
    assert line.unlimited is groups[0]
    assert line.name == "se_kd"
    assert budget_lines(groups, "samples", KL) == []


def test_two_recipes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    records = [demo_record(), demo_record()]
    records[1]["recipe"]["classes"]["draws"] = 12
    runs = [write_run(tmp_path / name, record) for name, record in zip(("a", "b"), records, strict=True)]
    assert [group.name for group in compare(runs).groups] == ["demo (a)", "demo (b)"]


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    with pytest.raises(InputError, match="the same recipe with the same seed"):
        compare([*runs, runs[0]])


def test_a_report_folder_holds_page_tables_and_pictures(tmp_path: Path) -> None:
    out = tmp_path / "out"
    content = write_comparison(compare(make_runs(tmp_path / "runs")), out, "Three recipes")
    assert json.loads((out / "table.json").read_text()) == content
    names = {"quality", "budget-positions-kl_nats", "budget-positions-perplexity", "time", "memory"}
    assert {path.stem for path in (out / "plots").iterdir()} == names
    for name in names:
        assert (out / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (out / "plots" / f"{name}.svg").read_text()
        assert "var(--" not in svg  # a paper has no page to take its colours from
        assert "#0f766e" in svg
        assert "#030303" not in svg
    first = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    write_comparison(compare(make_runs_again(tmp_path / "runs")), out, "Three recipes")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == first


def make_runs_again(folder: Path) -> list[Path]:
    return [folder / f"{name}-{seed}" for (name, _), seeds in PERPLEXITIES.items() for seed in seeds]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    runs = make_runs(tmp_path / "runs")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not a report of several runs \(no table\.json\)"):
        write_comparison(compare(runs), tmp_path / "mine", "x")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
