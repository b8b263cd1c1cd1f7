"""Several runs side by side: grouping by recipe, statistics over seeds, tables, plots and the page."""

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from made_run import BENCHMARKS, demo_record, write_run

from selkd.errors import InputError
from selkd.reporting import benchmarks
from selkd.reporting.comparison import compare
from selkd.reporting.comparison_page import write_comparison
from selkd.reporting.comparison_plots import budget_lines, comparison_plots
from selkd.reporting.comparison_tables import as_csv, as_json, as_markdown, runs_as_csv
from selkd.reporting.measures import PERPLEXITY

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


def test_a_served_teacher_is_the_same_at_another_address(tmp_path: Path) -> None:
    runs = []
    for seed, changes in enumerate(
        ({}, {"server": "http://elsewhere:1/v1"}, {"requests": {"parallel": 2}}, {"model": "y"})
    ):
        record = demo_record()
        record["recipe"]["seed"] = seed
        served = {"model": "x", "server": "https://here/v1", "api_key_env": None, "requests": {"parallel": 8}}
        record["recipe"]["teacher"] |= served | changes
        runs.append(write_run(tmp_path / str(seed), record))
    assert [len(group.members) for group in compare(runs).groups] == [3, 1]


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
    assert not [key for key in content["recipes"][0]["figures"] if key.startswith("accuracy")]
    assert [run["perplexity"] for run in content["recipes"][1]["runs"]] == [31.0, 32.5, 32.0]


def test_an_accuracy_is_called_by_what_it_is_the_mean_of() -> None:
    after = BENCHMARKS["after"]
    assert benchmarks.accuracies({"benchmarks": BENCHMARKS})["paper suite"].value == 0.412
    (name, found), *others = benchmarks.accuracies({"benchmarks": {"after": {"tasks": after["tasks"]}}}).items()
    assert (name, found.value, others) == ("arc_easy, lambada", pytest.approx((0.4551 + 0.3) / 2), [])
    assert benchmarks.accuracies({"benchmarks": None}) == {}


def benchmarked(folder: Path, name: str, after: dict[str, Any], **options: Any) -> Path:
    record = demo_record()
    record["name"] = name
    record["recipe"]["evaluation"] |= {"suite": [name], **options}
    record["benchmarks"] = {"before": None, "after": after, "steps": [], "best": None}
    return write_run(folder / name, record)


def mean(value: float, *, paper: bool) -> dict[str, Any]:
    figure = {"value": value, "standard_error": 0.01}
    if paper:
        return {"tasks": {}, "paper": {"acc": figure, "acc_is_the_mean_of": {"arc_easy": "raw"}}}
    return {"tasks": {}, "validation": {**figure, "accuracy_is_the_mean_of": ["piqa_train"]}}


def test_means_of_different_suites_are_never_subtracted(tmp_path: Path) -> None:
    task = {"arc_easy": {"examples": 10, "counts": "acc", "metrics": {"acc": {"value": 0.9, "standard_error": None}}}}
    runs = [
        benchmarked(tmp_path, "paper", mean(0.64, paper=True)),
        benchmarked(tmp_path, "validation", mean(0.5, paper=False)),
        benchmarked(tmp_path, "task", {"tasks": task}),
    ]
    comparison = compare(runs)
    assert [m.name for m in comparison.measures][:3] == [
        "accuracy (paper suite)",
        "accuracy (validation suite)",
        "accuracy (arc_easy)",
    ]
    for recipe in as_json(comparison)["recipes"]:
        figures = [found for key, found in recipe["figures"].items() if key.startswith("accuracy_")]
        assert sum(found["mean"] is not None for found in figures) == 1
        assert all(found["difference"] is None for found in figures)


def test_the_same_suite_in_other_shots_or_examples_is_not_compared(tmp_path: Path) -> None:
    runs = [benchmarked(tmp_path, name, mean(0.6, paper=True)) for name in ("a", "b")]
    runs.append(benchmarked(tmp_path, "shots", mean(0.7, paper=True), shots=5, limit=3))
    first, alike, shots = as_json(compare(runs))["recipes"]
    assert first["not_compared"] == alike["not_compared"] == {}
    assert alike["figures"]["accuracy_paper"]["difference"]["mean"] == 0
    assert shots["figures"]["accuracy_paper"]["mean"] == 0.7
    assert shots["figures"]["accuracy_paper"]["difference"] is None
    assert shots["not_compared"] == {"accuracy_paper": "no difference to a, as they differ in shots and limit"}


def held_out(folder: Path, name: str, seed: int, text: str, teacher: str = "t") -> Path:
    record = demo_record()
    record["name"] = record["recipe"]["name"] = name
    record["recipe"]["seed"] = seed
    record["recipe"]["data"]["path"] = name
    record["data"]["held_out_fingerprint"], record["teacher"]["fingerprint"] = text, teacher
    return write_run(folder / f"{name}-{seed}", record)


def test_fidelity_is_paired_on_the_same_held_out_text_and_teacher_alone(tmp_path: Path) -> None:
    runs = [held_out(tmp_path, name, 1, text, teacher) for name, text, teacher in (
        ("base", "x", "t"), ("same", "x", "t"), ("text", "y", "t"), ("teacher", "x", "u"))]  # fmt: skip
    comparison = compare(runs)
    _, same, text, teacher = as_json(comparison)["recipes"]
    assert same["figures"]["perplexity"]["difference"]["mean"] == 0
    for recipe, part in ((text, "held-out text"), (teacher, "teacher")):
        why = f"no difference to base, as they differ in {part}"
        assert recipe["not_compared"] == dict.fromkeys(("perplexity", "kl_nats", "top1_agreement"), why)
        assert recipe["figures"]["kl_nats"]["difference"] is None
    told = (
        "text, perplexity, KL to the teacher, nats, top-1 agreement: no difference to base, as they differ in held-out"
    )
    assert told in as_markdown(comparison)
    write_comparison(comparison, tmp_path / "out", "Four")
    assert "no difference to base, as they differ in held-out text" in (tmp_path / "out" / "report.html").read_text()
    (quality,) = [plot for plot in comparison_plots(comparison) if plot.name == "quality"]
    assert quality.caption.endswith("Not measured on the same: text, teacher.")


def test_seeds_of_one_recipe_on_other_text_have_no_mean(tmp_path: Path) -> None:
    (group,) = as_json(compare([held_out(tmp_path, "a", 1, "x"), held_out(tmp_path, "a", 2, "y")]))["recipes"]
    assert group["figures"]["perplexity"]["mean"] is None
    assert group["not_compared"]["perplexity"] == "no mean, as its runs differ in held-out text"


@pytest.mark.parametrize("suites", [("paper",), ("paper", "validation")])
def test_budgets_are_shown_on_validation_rows_where_there_are_some(suites: tuple[str, ...], tmp_path: Path) -> None:
    runs = []
    for fraction in (0.1, 0.2):
        record = demo_record()
        record["name"], record["recipe"]["positions"]["fraction"] = f"k-{fraction}", fraction
        after = mean(0.6, paper=True) | (mean(0.5, paper=False) if "validation" in suites else {})
        record["benchmarks"] = {"before": None, "after": after, "steps": [], "best": None}
        runs.append(write_run(tmp_path / f"{fraction}", record))
    budget, perplexity = [plot for plot in comparison_plots(compare(runs)) if plot.name.startswith("budget-")]
    assert budget.name == f"budget-positions-accuracy_{suites[-1]}"
    rows = "On validation rows, to choose by." if "validation" in suites else "On the rows to report, not to choose by"
    assert budget.caption.startswith(rows)
    assert perplexity.caption.startswith("On the held-out text.")


def sharing(folder: Path, name: str, paid: float, alone: float | None) -> Path:
    """A run that paid so many seconds for its scores; whoever made them, ``alone`` (None: nobody knows)."""
    record = demo_record()
    record["name"] = record["recipe"]["data"]["path"] = name
    record["seconds"] |= {"prepare": 50.0, "score": paid, "cache": 3.0, "train": 5.0, "evaluate": 2.0}
    record["teacher_tokens"] = {"prune": 7, "evaluate_before": 100} | ({"score": 1000} if paid > 1 else {})
    cost = None if alone is None else {"seconds": alone, "teacher_tokens": 1000}
    record["shared"] = {"score": cost}
    return write_run(folder / name, record)


def test_a_shared_part_counts_in_full_for_every_run_that_uses_it(tmp_path: Path) -> None:
    runs = [sharing(tmp_path, "made", 20.0, 20.0), sharing(tmp_path, "read", 0.1, 20.0)]
    comparison = compare([*runs, sharing(tmp_path, "unknown", 0.1, None)])
    told = {
        recipe["name"]: [recipe["figures"][key]["mean"] for key in ("total_seconds", "paid_seconds")]
        for recipe in as_json(comparison)["recipes"]
    }
    assert told == {"made": [30.0, 30.0], "read": [30.0, pytest.approx(10.1)], "unknown": [None, pytest.approx(10.1)]}
    tokens = [
        [recipe["figures"][key]["mean"] for key in ("teacher_tokens", "paid_teacher_tokens")]
        for recipe in as_json(comparison)["recipes"]
    ]
    assert tokens == [[1100, 1100], [1100, 100], [None, 100]]
    assert "a shared part counts in full for every run that uses it" in as_markdown(comparison)
    (time,) = [plot for plot in comparison_plots(comparison) if plot.name == "time"]
    beside = [text.get_text() for text in time.figure.axes[0].texts]
    assert [text for text in beside if text.endswith(" s")] == ["30.0 s", "30.0 s", "more than 10.0 s"]
    # Without sharing there is one column of time.
    plain = compare(make_runs(tmp_path / "plain"))
    assert "paid_seconds" not in [measure.key for measure in plain.measures]
    assert "Paid here" not in as_markdown(plain)


def test_a_damaged_run_is_named_and_left_out(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    (runs[0] / "record.json").write_text('{"name": ')
    comparison = compare(runs)
    assert [len(group.members) for group in comparison.groups] == [2, 3, 2]
    assert comparison.failed.keys() == {str(runs[0])}
    assert f"Failed: {runs[0]} ({runs[0]}/record.json: expected JSON" in as_markdown(comparison)
    with pytest.raises(InputError, match=r"no run has a whole record: .*expected JSON"):
        compare(runs[:1])


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = []
    for number, folder in enumerate(("one/a/seed-1", "two/a/seed-1", "two/b/seed-2")):
        record = demo_record()
        record["recipe"]["classes"]["draws"] = 12 + number
        runs.append(write_run(tmp_path / folder, record))
    names = [group.name for group in compare(runs).groups]
    assert names == ["demo (one/a/seed-1)", "demo (two/a/seed-1)", "demo (seed-2)"]


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
    assert "| se_kd-0.5 | 2 | 31.5 ± 1.41 (+0.50 ± 0) |" in markdown
    assert "Failed: se_kd-0.5/seed-2 (out of | memory)." in markdown.replace("\\|", "|")


def test_budget_lines_join_what_differs_in_the_fraction_alone(tmp_path: Path) -> None:
    comparison = compare(make_runs(tmp_path))
    (line,) = budget_lines(comparison, "positions", PERPLEXITY)
    assert [(fraction, figure.mean) for fraction, figure in line.points] == [
        (0.2, pytest.approx(95.5 / 3)),
        (0.5, 31.5),
    ]
    assert line.unlimited == ("full_kd", comparison.groups[0].summary(PERPLEXITY))
    assert line.name == "se_kd"
    assert budget_lines(comparison, "samples", PERPLEXITY) == []


def test_two_recipes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    records = [demo_record(), demo_record()]
    records[1]["recipe"]["classes"]["draws"] = 12
    runs = [write_run(tmp_path / name, record) for name, record in zip(("a", "b"), records, strict=True)]
    assert [group.name for group in compare(runs).groups] == ["demo (a)", "demo (b)"]


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    with pytest.raises(InputError, match="given twice"):
        compare([*runs, runs[0].parent / "." / runs[0].name])


def test_runs_of_one_recipe_are_called_after_their_folders_and_several_seeds_after_the_recipe(tmp_path: Path) -> None:
    def record(name: str, seed: int = 1337, draws: int = 64) -> dict[str, Any]:
        content = demo_record()
        content["name"] = name
        content["recipe"] |= {"name": "demo", "seed": seed}
        content["recipe"]["classes"]["draws"] = draws
        return content

    alike = [write_run(tmp_path / name, record(name)) for name in ("first", "again")]
    assert [group.name for group in compare(alike).groups] == ["first", "again"]
    seeds = [write_run(tmp_path / f"s{seed}", record(f"s{seed}", seed, draws=12)) for seed in (1, 2)]
    other = record("third")
    other["recipe"]["name"] = "wide"
    comparison = compare([*seeds, write_run(tmp_path / "third", other)])
    assert [(group.name, len(group.members)) for group in comparison.groups] == [("demo", 2), ("third", 1)]


def test_a_report_folder_holds_page_tables_and_pictures(tmp_path: Path) -> None:
    out = tmp_path / "out"
    content = write_comparison(compare(make_runs(tmp_path / "runs")), out, "Three recipes")
    assert json.loads((out / "table.json").read_text()) == content
    names = {"differences", "quality", "budget-positions-kl_nats", "budget-positions-perplexity", "time", "memory"}
    assert {path.stem for path in (out / "plots").iterdir()} == names
    for name in names:
        assert (out / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (out / "plots" / f"{name}.svg").read_text()
        assert "var(--" not in svg  # a paper has no page to take its colours from
        assert ("#626c79" if name == "differences" else "#0f766e") in svg  # no KL differs here
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
