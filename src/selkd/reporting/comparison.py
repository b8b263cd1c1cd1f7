"""Runs side by side: which are the same recipe with another seed, what each recipe reached, and against a baseline."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selkd.errors import InputError
from selkd.reporting import formats
from selkd.reporting.formats import dig
from selkd.reporting.measures import MEASURES, Measure, Record, Summary, paired, summarise
from selkd.reporting.run_files import read_run

# What tells runs of one recipe apart without changing what is compared.
_INCIDENTAL = (("name",), ("seed",), ("samples", "path"), ("cache", "path"))


@dataclass(frozen=True)
class Member:
    """One run: where it is, its seed and its record."""

    path: Path
    seed: int
    record: Record


@dataclass(frozen=True)
class Group:
    """The runs of one recipe, one a seed."""

    name: str
    recipe: dict[str, Any]
    members: tuple[Member, ...]

    def values(self, measure: Measure) -> dict[int, float | None]:
        """Seed -> figure."""
        return {member.seed: measure.read(member.record) for member in self.members}

    def summary(self, measure: Measure) -> Summary | None:
        return summarise(list(self.values(measure).values()))


@dataclass(frozen=True)
class Comparison:
    """Several recipes; ``baseline`` is the name of the one that differences are told against, ``failed`` run -> why."""

    groups: tuple[Group, ...]
    baseline: str | None
    failed: dict[str, str]

    @property
    def measures(self) -> list[Measure]:
        """Those that at least one run has."""
        return [m for m in MEASURES if any(group.summary(m) is not None for group in self.groups)]

    def difference(self, group: Group, measure: Measure) -> Summary | None:
        """Paired over the seeds against the baseline; None for the baseline itself and for what is no outcome."""
        other = next((found for found in self.groups if found.name == self.baseline), None)
        if other is None or other is group or not measure.is_outcome:
            return None
        return paired(group.values(measure), other.values(measure))


def compare(runs: Sequence[Path], baseline: str | None = None, failed: dict[str, str] | None = None) -> Comparison:
    """The runs in these folders, those of one recipe together.

    Args:
        baseline: a recipe's name; the first one if not given.

    Raises:
        InputError: a folder that is no run, the same run twice, or a baseline that is not among them.
    """
    found: dict[str, list[Member]] = {}
    recipes: dict[str, dict[str, Any]] = {}
    for path in runs:
        record = read_run(path).record
        recipe = _comparable(record)
        key = json.dumps(recipe, sort_keys=True)
        recipes.setdefault(key, recipe)
        found.setdefault(key, []).append(Member(path, int(dig(record, "recipe", "seed") or 0), record))
    for members in found.values():
        seen: dict[int, Path] = {}
        for member in members:
            if member.seed in seen:
                raise InputError(
                    f"{seen[member.seed]} and {member.path}: the same recipe with the same seed. Give each run once; "
                    "runs are averaged over their seeds."
                )
            seen[member.seed] = member.path
    names = _names(list(found.values()))
    groups = tuple(
        Group(name, recipes[key], tuple(members)) for (key, members), name in zip(found.items(), names, strict=True)
    )
    if baseline is not None and baseline not in names:
        raise InputError(f"baseline: no run is called {baseline!r}. There are {', '.join(names)}.")
    if baseline is None and len(groups) > 1:
        baseline = names[0]
    return Comparison(groups, baseline, failed or {})


def _comparable(record: Record) -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads(json.dumps(dig(record, "recipe") or {}))
    for *parts, key in _INCIDENTAL:
        branch = dig(recipe, *parts) if parts else recipe
        if isinstance(branch, dict):
            branch.pop(key, None)
    return recipe


def _names(groups: list[list[Member]]) -> list[str]:
    """Each group's name: its first run's, with the folder where two share one, and a number where that is no help."""
    names = [str(dig(members[0].record, "name") or members[0].path.name) for members in groups]
    told = [
        name if names.count(name) == 1 else f"{name} ({members[0].path.name})"
        for name, members in zip(names, groups, strict=True)
    ]
    return [name if told.count(name) == 1 else f"{name} {number}" for number, name in enumerate(told, start=1)]


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything as plain data: a recipe its figures (mean, deviation, n, difference) and its runs."""

    def plain(summary: Summary | None) -> dict[str, Any] | None:
        return None if summary is None else {"mean": summary.mean, "deviation": summary.deviation, "n": summary.n}

    recipes = []
    for group in comparison.groups:
        figures = {
            measure.key: (plain(group.summary(measure)) or dict.fromkeys(("mean", "deviation", "n")))
            | {"difference": plain(comparison.difference(group, measure))}
            for measure in comparison.measures
        }
        members = [
            {"path": str(member.path), "seed": member.seed}
            | {measure.key: measure.read(member.record) for measure in comparison.measures}
            for member in group.members
        ]
        recipes.append({"name": group.name, "figures": figures, "runs": members})
    return {"baseline": comparison.baseline, "recipes": recipes, "failed": comparison.failed}


def as_csv(comparison: Comparison) -> str:
    """A row a recipe; unknown figures are empty."""
    measures = comparison.measures
    columns = ("mean", "deviation", "n", "difference", "difference_deviation", "difference_n")
    rows: list[list[Any]] = [["recipe", *(f"{measure.key}_{column}" for measure in measures for column in columns)]]
    for group in comparison.groups:
        row: list[Any] = [group.name]
        for measure in measures:
            for summary in (group.summary(measure), comparison.difference(group, measure)):
                row += ["", "", ""] if summary is None else [summary.mean, summary.deviation, summary.n]
        rows.append(row)
    return _csv(rows)


def runs_as_csv(comparison: Comparison) -> str:
    """A row a run."""
    measures = comparison.measures
    rows: list[list[Any]] = [["recipe", "seed", "path", *(measure.key for measure in measures)]]
    for group in comparison.groups:
        for member in group.members:
            figures = [measure.read(member.record) for measure in measures]
            rows.append([group.name, member.seed, member.path, *figures])
    return _csv(rows)


def _csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(["" if cell is None else cell for cell in row] for row in rows)
    return text.getvalue()


def cell(summary: Summary | None, measure: Measure) -> str:
    """7.31 ± 0.26 (the deviation over seeds)."""
    if summary is None:
        return formats.DASH
    told = measure.form(summary.mean)
    return told if summary.deviation is None else f"{told} ± {measure.form(summary.deviation)}"


def difference_cell(summary: Summary | None, measure: Measure) -> str:
    """+0.4 ± 0.3, with the sign always said."""
    if summary is None:
        return ""
    return ("+" if summary.mean > 0 else "") + cell(summary, measure)


def as_markdown(comparison: Comparison) -> str:
    """The table for a README: mean ± deviation, and the paired difference to the baseline beneath."""
    measures = comparison.measures
    lines = [
        "| | seeds | " + " | ".join(measure.name for measure in measures) + " |",
        "|---|---:|" + "---:|" * len(measures),
    ]
    for group in comparison.groups:
        cells = [_markdown_cell(comparison, group, measure) for measure in measures]
        lines.append(f"| {_plain(group.name)} | {len(group.members)} | " + " | ".join(cells) + " |")
    notes = ["Mean ± deviation over seeds (n − 1)."]
    if comparison.baseline is not None:
        notes.append(f"In brackets the paired difference to {_plain(comparison.baseline)}, seed by seed.")
    notes += [f"Failed: {_plain(name)} ({_plain(why)})." for name, why in comparison.failed.items()]
    return "\n".join(lines) + "\n\n" + " ".join(notes) + "\n"


def _markdown_cell(comparison: Comparison, group: Group, measure: Measure) -> str:
    told = cell(group.summary(measure), measure)
    difference = difference_cell(comparison.difference(group, measure), measure)
    return f"{told} ({difference})" if difference else told


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
