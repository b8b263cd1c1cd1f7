"""The answer of ``selkd eval`` for people: a table of figures with their standard errors, and the comparisons."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

DASH = "–"
_SHARES = ("acc", "exact_match", "ece", "agreement", "prompt_level", "inst_level", "f1")
_TITLES = {
    "acc": "Acc (mean of HellaSwag, PIQA, ARC-Easy, GSM8K, LAMBADA)",
    "ifeval": "IFEval, prompts, strict",
    "perplexity": "LAMBADA perplexity",
    "ece_choices": "ECE, choices (mean of HellaSwag, PIQA, ARC-Easy)",
    "ece_last_word": "ECE, LAMBADA’s last word",
}


def figures_table(answer: Mapping[str, Any]) -> Table:
    """One row a metric, one column a model: value ± standard error. Shares are in per cent."""
    models = answer["models"]
    table = _table(("task", "metric", "shots", "examples"), models)
    for task in dict.fromkeys(name for model in models for name in model["tasks"]):
        found = [model["tasks"].get(task, {}) for model in models]
        first = next(content for content in found if content)
        for number, metric in enumerate(dict.fromkeys(key for content in found for key in content.get("metrics", {}))):
            counted = first.get("counts") == metric
            cells = [_cell(metric, content.get("metrics", {}).get(metric)) for content in found]
            lead = (task, str(first.get("shots", DASH)), f"{first['examples']:,}") if number == 0 else ("", "", "")
            label = Text(("* " if counted else "") + metric, style="bold" if counted else "")
            table.add_row(Text(lead[0]), label, lead[1], lead[2], *cells)
    return table


def suites_table(answer: Mapping[str, Any]) -> Table | None:
    """The suites' own figures, one row each; None where no suite has any."""
    models = answer["models"]
    table = _table(("suite",), models)
    for title, metric, found in _suite_rows(models):
        table.add_row(Text(title), *(_cell(metric, estimate) for estimate in found))
    return table if table.row_count else None


def _table(titles: Sequence[str], models: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title, justify="right" if title in ("shots", "examples") else "left", no_wrap=True)
    for model in models:
        table.add_column(Text(model["name"]), justify="right")  # Text, not str: a name is no markup
    return table


def notes(answer: Mapping[str, Any]) -> Iterator[str]:
    """What a reader must know to read the table right."""
    yield f"± is one standard error, by {answer['resamples']:,} resamples of the examples. * counts as the accuracy."
    for model in answer["models"][:1]:
        for task, content in model["tasks"].items():
            if content.get("described"):
                rows = f"{content['examples']:,} of {content['rows']:,} rows"
                yield f"{task}: {rows}, {content['shots']}-shot; {content['described']}."
        if any("ece" in content["metrics"] for content in model["tasks"].values()):
            yield (
                "ece: 15 bins of equal width; over multiple choices, confidence is the chosen answer’s share of the "
                "choices’ probability; on lambada, the probability of the model’s own greedy last word."
            )
        for name, reason in model.get("left_out", {}).items():
            yield f"{name} was left out: {reason}."


def comparison_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    """``SE-KD against Full KD, acc: +0.4 ± 0.3`` for each comparison and each figure."""
    for comparison in answer["comparisons"]:
        who = f"{comparison['model']} against {comparison['against']}"
        for key, title in (("acc", "Acc"), ("validation", "validation accuracy")):
            if key in comparison:
                yield f"{who}, {title}: {_signed('acc', comparison[key])}"
        for task, metrics in comparison["tasks"].items():
            for metric, found in metrics.items():
                yield f"{who}, {task} {metric}: {_signed(metric, found)}"
        for task in comparison.get("not_comparable", []):
            yield f"{who}, {task}: not comparable, they were asked different things"


def _suite_rows(models: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[Any]]]:
    if all("paper" in model for model in models):
        for key, title in _TITLES.items():
            yield title, key, [model["paper"][key] for model in models]
    if all("validation" in model for model in models):
        yield "validation accuracy (mean)", "acc", [model["validation"] for model in models]


def _cell(metric: str, found: Mapping[str, Any] | None) -> Text:
    return Text(_plain(metric, found))


def _plain(metric: str, found: Mapping[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return DASH
    error = found["standard_error"]
    return _number(metric, found["value"]) + (f" ± {_number(metric, error)}" if error is not None else "")


def _signed(metric: str, found: Mapping[str, Any]) -> str:
    plain = _plain(metric, found)
    return plain if plain.startswith(("-", DASH)) else f"+{plain}"


def _number(metric: str, value: float) -> str:
    """Shares in per cent with one decimal, everything else to three or four digits."""
    if metric == "ifeval" or any(part in metric for part in _SHARES):
        return f"{100 * value:.1f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
