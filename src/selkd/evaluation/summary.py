"""One model's results as plain data, and two models compared, for the answer of ``selkd eval``."""

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
    """The figures of every task and of the suites, as plain data.

    ``paper.acc`` is the mean over HellaSwag, PIQA, ARC-Easy, GSM8K and LAMBADA, null unless all five were measured.
    ``paper.ece_choices`` is the mean ECE of the three multiple-choice benchmarks, ``paper.ece_last_word`` LAMBADA's.
    ``cut`` exists only if prompts were too long for the model, and names their tasks.
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
    """The paper's columns: Acc, IFEval, LAMBADA's perplexity, and both calibration errors."""
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


def compare(results: Results, subtracted: Results) -> dict[str, Any]:
    """``results`` less ``subtracted`` on every metric that both have, paired example by example.

    Each difference has a ``value`` and a ``standard_error``, which is null if the harness gives only a figure. A task
    that the two models were measured on with different requests is named in ``not_comparable``.
    """
    both = [name for name in results if name in subtracted]
    paired = [name for name in both if results[name].question == subtracted[name].question]
    tasks = {name: _differences(results[name], subtracted[name]) for name in paired}
    answer: dict[str, Any] = {"tasks": {}}
    for name, figures in tasks.items():
        answer["tasks"][name] = {metric: asdict(figure) for metric, figure in figures.items()}
    for suite, names in (("acc", ACC), ("validation", [name for name in SUITES["validation"] if name in tasks])):
        if names and all(name in tasks for name in names):
            answer[suite] = asdict(mean_of([tasks[name][KNOWN[name].metric] for name in names]))
    if len(paired) < len(both):
        answer["not_comparable"] = [name for name in both if name not in paired]
    return answer


def _differences(result: TaskResult, subtracted: TaskResult) -> dict[str, Estimate]:
    """The difference of each metric, sorted by name."""
    differences = {}
    for metric in sorted(result.estimates.keys() & subtracted.estimates.keys()):
        if metric in result.kinds and metric in subtracted.kinds:
            differences[metric] = difference(result.measure(metric), subtracted.measure(metric))
        elif metric in result.figures and metric in subtracted.figures:
            differences[metric] = Estimate(result.figures[metric] - subtracted.figures[metric], None)
    return differences
