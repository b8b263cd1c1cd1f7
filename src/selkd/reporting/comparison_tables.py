"""Writes a comparison as JSON, CSV and Markdown."""

import csv
import io
from dataclasses import asdict
from typing import Any

from selkd.reporting import formats
from selkd.reporting.comparison import Group, RunComparison
from selkd.reporting.differences import Interval, difference_in_kl
from selkd.reporting.measures import PAID_SECONDS, ReportedMeasure, Summary


def as_json(comparison: RunComparison) -> dict[str, Any]:
    """The whole comparison as plain data: of each recipe the figures (mean, deviation, n, difference) and the runs."""
    recipes = []
    for group in comparison.groups:
        figures = {}
        for measure in comparison.measures:
            summary, difference = group.summary(measure), comparison.difference(group, measure)
            figures[measure.key] = {
                **(dict.fromkeys(("mean", "deviation", "n")) if summary is None else asdict(summary)),
                "difference": None if difference is None else asdict(difference),
            }
        members = [
            {"path": str(member.path), "seed": member.seed}
            | {measure.key: measure.read(member.record) for measure in comparison.measures}
            for member in group.members
        ]
        whys = {measure.key: comparison.why_not(group, measure) for measure in comparison.measures}
        not_compared = {key: why for key, why in whys.items() if why is not None}
        row = difference_in_kl(comparison, group)
        intervals = {} if row is None else {"kl_nats": {"difference": row.mean, **_plain_interval(row)}}
        recipes.append(
            {
                "name": group.name,
                "figures": figures,
                "intervals": intervals,
                "not_compared": not_compared,
                "runs": members,
            }
        )
    return {"baseline": comparison.baseline, "recipes": recipes, "failed": comparison.failed}


def _plain_interval(row: Interval) -> dict[str, Any]:
    return {"low": row.low, "high": row.high, "over": row.over}


def as_csv(comparison: RunComparison) -> str:
    """One row for each recipe; unknown figures are empty."""
    rows = []
    for recipe in as_json(comparison)["recipes"]:
        row = {"recipe": recipe["name"]}
        for key, figure in recipe["figures"].items():
            difference = figure["difference"] or {}
            row |= {f"{key}_{column}": figure[column] for column in ("mean", "deviation", "n")}
            row |= {f"{key}_difference": difference.get("mean")}
            row |= {f"{key}_difference_{column}": difference.get(column) for column in ("deviation", "n")}
        rows.append(row)
    return _csv(rows)


def runs_as_csv(comparison: RunComparison) -> str:
    """One row for each run."""
    rows = ((recipe["name"], run) for recipe in as_json(comparison)["recipes"] for run in recipe["runs"])
    return _csv([{"recipe": name, "seed": run["seed"], **run} for name, run in rows])


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def cells(comparison: RunComparison, group: Group) -> list[tuple[str, str]]:
    """Of each measure the mean ± deviation over seeds (7.31 ± 0.26) and the difference to the baseline (+0.4 ± 0.3)."""
    return [
        (_mean(group.summary(measure), measure), _difference(comparison.difference(group, measure), measure))
        for measure in comparison.measures
    ]


def _mean(summary: Summary | None, measure: ReportedMeasure) -> str:
    if summary is None:
        return formats.DASH
    is_same = summary.deviation == 0 and not measure.is_outcome  # a cost that no seed changes needs no deviation
    return formats.plus_minus(summary.mean, None if is_same else summary.deviation, measure.form)


def _difference(summary: Summary | None, measure: ReportedMeasure) -> str:
    if summary is None:
        return ""
    signed = formats.signed(summary.mean, measure.form)
    return (
        signed
        if summary.deviation is None
        else f"{signed} ± {measure.form(summary.deviation) if summary.deviation else '0'}"
    )


def as_markdown(comparison: RunComparison) -> str:
    """The table for a README: mean ± deviation and, in brackets, the paired difference to the baseline."""
    measures = comparison.measures
    lines = [
        "| | seeds | " + " | ".join(measure.name for measure in measures) + " |",
        "|---|---:|" + "---:|" * len(measures),
    ]
    for group in comparison.groups:
        figures = [f"{mean} ({difference})" if difference else mean for mean, difference in cells(comparison, group)]
        lines.append(f"| {_plain(group.name)} | {len(group.members)} | " + " | ".join(figures) + " |")
    notes = ["Mean ± deviation over seeds (n − 1)."]
    if comparison.baseline is not None:
        notes.append(f"In brackets the paired difference to {_plain(comparison.baseline)}, seed by seed.")
    notes += [_plain(note) for note in (*legend(comparison), *not_compared(comparison))]
    notes += [f"Failed: {_plain(name)} ({_plain(why)})." for name, why in comparison.failed.items()]
    return "\n".join(lines) + "\n\n" + " ".join(notes) + "\n"


def legend(comparison: RunComparison) -> list[str]:
    """Sentences on what the columns of costs count."""
    time = "Time is that of scoring, caching, training and evaluating, without preparing the text and the student"
    if PAID_SECONDS not in comparison.measures:
        return [f"{time}."]
    return [
        f"{time}. Some runs share scores or a cache. Time and teacher tokens are what each would cost alone: a shared "
        "part counts in full for every run that uses it, as it was measured where it was made.",
        "Paid here: what it really took, a shared part only for the run that made it.",
    ]


def not_compared(comparison: RunComparison) -> list[str]:
    """A sentence for each recipe and reason why figures have no mean or no difference."""
    whys: dict[tuple[str, str], list[str]] = {}
    for group in comparison.groups:
        for measure in comparison.measures:
            if (why := comparison.why_not(group, measure)) is not None:
                whys.setdefault((group.name, why), []).append(measure.name)
    return [f"{name}, {', '.join(names)}: {why}." for (name, why), names in whys.items()]


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
