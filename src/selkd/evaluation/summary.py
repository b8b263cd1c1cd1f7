"""A model's results in one mapping, and two models against each other: what ``selkd eval`` answers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from selkd.evaluation.benchmarks import ACC, KNOWN
from selkd.evaluation.intervals import Estimate, difference, mean_of
from selkd.evaluation.results import TaskResult
from selkd.recipe.evaluation import SUITES

CHOICES = ("hellaswag", "piqa", "arc_easy")
Results = Mapping[str, TaskResult]


def summarise(results: Results, suite: Sequence[str], left_out: Sequence[str]) -> dict[str, Any]:
    """Every task's figures, and those of the suites, as plain data.

    ``paper.acc`` is the mean over HellaSwag, PIQA, ARC-Easy, GSM8K and LAMBADA, null unless all five were measured.
    ``paper.ece_choices`` is the mean ECE of the three multiple-choice benchmarks, ``paper.ece_last_word`` LAMBADA's.
    ``cut``, where there is any, names the tasks whose prompts were too long for the model.
    """
    answer: dict[str, Any] = {"tasks": {name: result.summary() for name, result in results.items()}}
    if "paper" in suite:
        figures = {name: asdict(figure) for name, figure in _paper_figures(results).items()}
        answer["paper"] = {**figures, "acc_is_the_mean_of": {name: KNOWN[name].described for name in ACC}}
    if "validation" in suite:
        names = [name for name in SUITES["validation"] if name in results]
        answer["validation"] = {**asdict(_mean_accuracy(results, names)), "accuracy_is_the_mean_of": names}
    if cut := {name: _cut(result) for name, result in results.items() if result.details.get("prompts_cut")}:
        answer["cut"] = cut
    if left_out:
        answer["left_out"] = {name: f"no file {KNOWN[name].file} in the data folders" for name in left_out}
    return answer


def _paper_figures(results: Results) -> dict[str, Estimate]:
    """The paper's columns: Acc, IFEval, perplexity (LAMBADA's) and both calibration errors."""
    return {
        "acc": _mean_accuracy(results, ACC),
        "ifeval": _mean_accuracy(results, ["ifeval"]),
        "perplexity": _figure(results, "lambada", "perplexity"),
        "ece_choices": mean_of([_figure(results, name, "ece") for name in CHOICES]),
        "ece_last_word": _figure(results, "lambada", "ece"),
    }


def _mean_accuracy(results: Results, names: Iterable[str]) -> Estimate:
    return mean_of([_figure(results, name, KNOWN[name].metric) for name in names])


def _figure(results: Results, name: str, metric: str) -> Estimate:
    return results[name].estimates[metric] if name in results else Estimate(None, None)


def _cut(result: TaskResult) -> str:
    return (
        f"{result.details['prompts_cut']:,} of {len(result.examples):,} prompts were longer, with room for the answer, "
        f"than the model's {result.details['model_tokens']:,} tokens and were cut from the left"
    )


def compare(ours: Results, theirs: Results) -> dict[str, Any]:
    """``ours`` less ``theirs`` on every metric that both have, paired example by example.

    Each difference has a ``standard_error`` (null where the harness gives only a figure) and a ``value``. A task that
    was not measured on the same requests is left out and named.
    """
    both = [name for name in ours if name in theirs]
    paired = [name for name in both if ours[name].question == theirs[name].question]
    tasks = {name: _differences(ours[name], theirs[name]) for name in paired}
    answer: dict[str, Any] = {"tasks": {}}
    for name, figures in tasks.items():
        answer["tasks"][name] = {metric: asdict(figure) for metric, figure in figures.items()}
    for suite, names in (("acc", ACC), ("validation", [name for name in SUITES["validation"] if name in tasks])):
        if names and all(name in tasks for name in names):
            answer[suite] = asdict(mean_of([tasks[name][KNOWN[name].metric] for name in names]))
    if len(paired) < len(both):
        answer["not_comparable"] = [name for name in both if name not in paired]
    return answer


def _differences(ours: TaskResult, theirs: TaskResult) -> dict[str, Estimate]:
    """Metric -> difference, by the metrics' names in order."""
    differences = {}
    for metric in sorted(ours.estimates.keys() & theirs.estimates.keys()):
        if metric in ours.kinds and metric in theirs.kinds:
            differences[metric] = difference(ours.measure(metric), theirs.measure(metric))
        elif metric in ours.figures and metric in theirs.figures:
            differences[metric] = Estimate(ours.figures[metric] - theirs.figures[metric], None)
    return differences
