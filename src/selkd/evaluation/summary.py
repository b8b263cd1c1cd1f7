"""A model's results in one mapping, and two models against each other: what ``selkd eval`` answers."""

from collections.abc import Mapping, Sequence
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
    ``cut``, where there is any, tells of the tasks whose prompts were too long for the model.
    ``paper.ece_choices`` is the mean ECE of the three multiple-choice benchmarks, ``paper.ece_last_word`` LAMBADA's.
    """
    answer: dict[str, Any] = {"tasks": {name: result.summary() for name, result in results.items()}}
    if "paper" in suite:
        answer["paper"] = {name: asdict(found) for name, found in paper_figures(results).items()} | {
            "acc_is_the_mean_of": {name: KNOWN[name].described for name in ACC}
        }
    if "validation" in suite:
        measured = _measured(results, SUITES["validation"])
        answer["validation"] = {**asdict(validation_accuracy(results)), "accuracy_is_the_mean_of": measured}
    cut = {name: _cut(result) for name, result in results.items() if result.details.get("prompts_cut")}
    if cut:
        answer["cut"] = cut
    if left_out:
        answer["left_out"] = {name: f"no file {KNOWN[name].file} in the data folders" for name in left_out}
    return answer


def paper_figures(results: Results) -> dict[str, Estimate]:
    """The paper's columns: Acc, IFEval, perplexity (LAMBADA's) and both calibration errors."""
    return {
        "acc": mean_of([_counted(results, name) for name in ACC]),
        "ifeval": _counted(results, "ifeval"),
        "perplexity": _of(results, "lambada", "perplexity"),
        "ece_choices": mean_of([_of(results, name, "ece") for name in CHOICES]),
        "ece_last_word": _of(results, "lambada", "ece"),
    }


def validation_accuracy(results: Results) -> Estimate:
    """The mean accuracy over those of the validation suite's benchmarks that were measured."""
    return mean_of([_counted(results, name) for name in _measured(results, SUITES["validation"])])


def compare(ours: Results, theirs: Results) -> dict[str, Any]:
    """``ours`` less ``theirs`` on every metric that both have, paired example by example.

    Each difference has a ``standard_error`` (null where the harness gives only a figure) and a ``value``. A task that
    was not measured on the same requests is left out and named.
    """
    tasks: dict[str, dict[str, Estimate]] = {}
    unpaired = []
    for name in ours:
        if name not in theirs:
            continue
        if ours[name].question != theirs[name].question:
            unpaired.append(name)
            continue
        tasks[name] = _differences(ours[name], theirs[name])
    answer: dict[str, Any] = {
        "tasks": {name: {metric: asdict(found) for metric, found in metrics.items()} for name, metrics in tasks.items()}
    }
    for label, names in (("acc", ACC), ("validation", tuple(n for n in SUITES["validation"] if n in tasks))):
        if names and all(name in tasks for name in names):
            answer[label] = asdict(mean_of([tasks[name][KNOWN[name].metric] for name in names]))
    if unpaired:
        answer["not_comparable"] = unpaired
    return answer


def _differences(ours: TaskResult, theirs: TaskResult) -> dict[str, Estimate]:
    found = {}
    for metric in ours.figures.keys() | ours.kinds.keys():
        mine, other = ours.measure(metric), theirs.measure(metric)
        if mine is not None and other is not None:
            found[metric] = difference(mine, other)
        elif (a := ours.figures.get(metric)) is not None and (b := theirs.figures.get(metric)) is not None:
            found[metric] = Estimate(a - b, None)
    return {metric: found[metric] for metric in sorted(found)}


def _cut(result: TaskResult) -> str:
    return (
        f"{result.details['prompts_cut']:,} of {len(result.examples):,} prompts were longer, with room for the answer, "
        f"than the model's {result.details['model_tokens']:,} tokens and were cut from the left"
    )


def _measured(results: Results, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in results]


def _counted(results: Results, name: str) -> Estimate:
    return _of(results, name, KNOWN[name].metric)


def _of(results: Results, name: str, metric: str) -> Estimate:
    return results[name].estimates[metric] if name in results else Estimate(None, None)
