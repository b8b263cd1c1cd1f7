"""The answer of ``selkd eval`` in the terminal: figures with standard errors, comparisons, and how to read them."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from selkd.reporting import formats
from selkd.reporting.formats import DASH, dig

_SHARES = ("acc", "exact_match", "ece", "agreement", "prompt_level", "inst_level", "f1")
_TITLES = {
    "acc": "Acc (mean of HellaSwag, PIQA, ARC-Easy, GSM8K, LAMBADA)",
    "ifeval": "IFEval, prompts, strict",
    "perplexity": "LAMBADA perplexity",
    "ece_choices": "ECE, choices (mean of HellaSwag, PIQA, ARC-Easy)",
    "ece_last_word": "ECE, LAMBADA’s last word",
}


def print_evaluation(console: Console, answer: Mapping[str, Any]) -> None:
    """Print the answer of ``selkd.evaluation.command.evaluate_models``."""
    console.print(_figures_table(answer["models"]))
    suites = _suites_table(answer["models"])
    if suites.row_count:
        console.print("", suites)
    for line in (*_comparison_lines(answer["comparisons"]), *_notes(answer)):
        console.print(line, highlight=False, markup=False)


def _figures_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each metric and a column for each model, with value ± standard error. Shares are in per cent."""
    table = _table(("task", "metric", "shots", "examples"), models)
    for task in dict.fromkeys(name for model in models for name in model["tasks"]):
        results = [model["tasks"].get(task, {}) for model in models]
        first = next(result for result in results if result)
        lead = (task, str(first.get("shots", DASH)), f"{first['examples']:,}")
        for metric in dict.fromkeys(name for result in results for name in result.get("metrics", {})):
            counts = first.get("counts") == metric
            label = Text(("* " if counts else "") + metric, style="bold" if counts else "")
            figures = [_figure(metric, dig(result, "metrics", metric)) for result in results]
            table.add_row(Text(lead[0]), label, lead[1], lead[2], *figures)
            lead = ("", "", "")
    return table


def _suites_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each figure of a suite; no row if no suite has figures."""
    table = _table(("suite",), models)
    if all("paper" in model for model in models):
        for key, title in _TITLES.items():
            table.add_row(title, *(_figure(key, model["paper"][key]) for model in models))
    if all("validation" in model for model in models):
        table.add_row("validation accuracy (mean)", *(_figure("acc", model["validation"]) for model in models))
    return table


def _table(titles: Sequence[str], models: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title, justify="right" if title in ("shots", "examples") else "left", no_wrap=True)
    for model in models:
        table.add_column(Text(model["name"]), justify="right")  # as Text, so that a name is not read as markup
    return table


def _notes(answer: Mapping[str, Any]) -> Iterator[str]:
    """The sentences that a reader needs to read the tables correctly."""
    yield f"± is one standard error, by {answer['resamples']:,} resamples of the examples. * counts as the accuracy."
    first = answer["models"][0]
    for task, result in first["tasks"].items():
        if result.get("described"):
            rows = f"{result['examples']:,} of {result['rows']:,} rows"
            yield f"{task}: {rows}, {result['shots']}-shot; {result['described']}."
    if any("ece" in result["metrics"] for result in first["tasks"].values()):
        yield (
            "ece: 15 bins of equal width; over multiple choices, confidence is the chosen answer’s share of the "
            "choices’ probability; on lambada, the probability of the model’s own greedy last word."
        )
    for name, reason in first.get("left_out", {}).items():
        yield f"{name} was left out: {reason}."
    for model in answer["models"]:
        for task, sentence in model.get("cut", {}).items():
            yield f"{model['name']}, {task}: {sentence}."


def _comparison_lines(comparisons: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """``SE-KD against Full KD, acc: +0.4 ± 0.3`` for each comparison and each figure."""
    for comparison in comparisons:
        models = f"{comparison['model']} against {comparison['against']}"
        for key, title in (("acc", "Acc"), ("validation", "validation accuracy")):
            if key in comparison:
                yield f"{models}, {title}: {_signed('acc', comparison[key])}"
        for task, metrics in comparison["tasks"].items():
            for metric, difference in metrics.items():
                yield f"{models}, {task} {metric}: {_signed(metric, difference)}"
        for task in comparison.get("not_comparable", []):
            yield f"{models}, {task}: not comparable, because the two were measured on different requests"


def _figure(metric: str, estimate: Mapping[str, Any] | None) -> str:
    if estimate is None or estimate["value"] is None:
        return DASH
    return formats.plus_minus(estimate["value"], estimate["standard_error"], partial(_number, metric))


def _signed(metric: str, difference: Mapping[str, Any]) -> str:
    plain = _figure(metric, difference)
    value = difference["value"]
    return f"+{plain}" if formats.signed(value, partial(_number, metric)).startswith("+") else plain


def _number(metric: str, value: float | None) -> str:
    """Shares in per cent with one decimal, everything else to three or four digits."""
    if value is None:
        return DASH
    if metric == "ifeval" or any(part in metric for part in _SHARES):
        return formats.decimal(100 * value, 1)
    size = abs(value)
    return formats.decimal(value, 0 if size >= 1000 else 1 if size >= 10 else 3)
