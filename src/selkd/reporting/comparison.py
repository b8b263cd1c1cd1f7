"""Groups runs of one recipe with several seeds, and compares recipes with a baseline."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selkd.errors import InputError
from selkd.recipe.choices import PositionOptions, SampleOptions
from selkd.recipe.foreign import without_address
from selkd.reporting.formats import dig
from selkd.reporting.measures import Record, ReportedMeasure, Summary, measures_of, paired, summarise
from selkd.reporting.run_files import read_record, require_run

# Keys that may differ between runs of one recipe without changing what is compared.
_INCIDENTAL = (("name",), ("seed",), ("run",), ("samples", "path"), ("cache", "path"))


@dataclass(frozen=True)
class Member:
    """One run: its folder, its seed and its record."""

    path: Path
    seed: int
    record: Record


@dataclass(frozen=True)
class Group:
    """The runs of one recipe, one a seed."""

    name: str
    members: tuple[Member, ...]

    @property
    def recipe(self) -> dict[str, Any]:
        """The part of the recipe that is the same in all of its runs."""
        return comparable(self.members[0].record.get("recipe") or {})

    def values(self, measure: ReportedMeasure) -> dict[int, float | None]:
        """The figure of each seed."""
        return {member.seed: measure.read(member.record) for member in self.members}

    def conditions(self, measure: ReportedMeasure) -> list[Mapping[str, Any]]:
        """The different conditions under which runs of the group measured the figure."""
        by_run = [measure.conditions(m.record) for m in self.members if measure.read(m.record) is not None]
        return [conditions for number, conditions in enumerate(by_run) if conditions not in by_run[:number]]

    def summary(self, measure: ReportedMeasure) -> Summary | None:
        """The mean over the seeds; None also where the runs did not measure the same."""
        return None if len(self.conditions(measure)) > 1 else summarise(list(self.values(measure).values()))


@dataclass(frozen=True)
class RunComparison:
    """Several recipes side by side.

    Attributes:
        baseline: the name of the recipe that the others are compared with.
        failed: run -> why it failed, also of runs whose record is damaged.
    """

    groups: tuple[Group, ...]
    baseline: str | None
    failed: dict[str, str]

    @property
    def measures(self) -> list[ReportedMeasure]:
        """The measures that at least one run has."""
        return measures_of(member.record for group in self.groups for member in group.members)

    def difference(self, group: Group, measure: ReportedMeasure) -> Summary | None:
        """The difference to the baseline, paired over the seeds.

        None for the baseline itself, for a measure that is no outcome, and where the two did not measure the same.
        """
        other = self._baseline
        if other is None or other is group or not measure.is_outcome or self.why_not(group, measure) is not None:
            return None
        return paired(group.values(measure), other.values(measure))

    def why_not(self, group: Group, measure: ReportedMeasure) -> str | None:
        """Why there are figures but no mean or no difference; None where nothing is missing."""
        conditions, other = group.conditions(measure), self._baseline
        if len(conditions) > 1:
            return f"no mean, as its runs differ in {_differing(conditions)}"
        base = [] if other is None or other is group else other.conditions(measure)
        if not conditions or not base or conditions == base:
            return None
        return f"no difference to {self.baseline}, as they differ in {_differing([*conditions, *base])}"

    def alike(self, measure: ReportedMeasure) -> dict[str, Summary]:
        """The means, by recipe, of those that measured the same as the baseline or, if it has no mean, as the first."""
        known = [(group, summary) for group in self.groups if (summary := group.summary(measure)) is not None]
        conditions = {group.name: group.conditions(measure) for group, _ in known}
        base = conditions.get(self.baseline or "", next(iter(conditions.values()), None))
        return {group.name: summary for group, summary in known if conditions[group.name] == base}

    @property
    def _baseline(self) -> Group | None:
        return next((group for group in self.groups if group.name == self.baseline), None)


def _differing(conditions: Sequence[Mapping[str, Any]]) -> str:
    """Name the parts in which the conditions are not all the same."""
    first, parts = conditions[0], dict.fromkeys(part for one in conditions for part in one)
    return " and ".join(part for part in parts if any(other.get(part) != first.get(part) for other in conditions))


def compare(runs: Sequence[Path], baseline: str | None = None, failed: dict[str, str] | None = None) -> RunComparison:
    """Compare the runs in these folders. A run whose record is damaged counts as failed.

    Args:
        baseline: a recipe's name; the first one if not given.

    Raises:
        InputError: a folder is no run, a run is given twice, no run has a whole record, or the baseline is not among
            them.
    """
    by_recipe: dict[tuple[str, int], dict[int, Member]] = {}  # by the recipe and the how-manieth run of each seed
    failed = dict(failed or {})
    known: set[Path] = set()
    for path in runs:
        require_run(path)
        if path.resolve() in known:
            raise InputError(f"{path}: given twice. Give each run once; runs are averaged over their seeds.")
        known.add(path.resolve())
        try:
            record = read_record(path)
        except InputError as error:
            failed[str(path)] = str(error)
            continue
        seed = int(dig(record, "recipe", "seed") or 0)
        key = json.dumps(comparable(record.get("recipe") or {}), sort_keys=True)
        again = next(n for n in itertools.count() if seed not in by_recipe.get((key, n), {}))
        by_recipe.setdefault((key, again), {})[seed] = Member(path, seed, record)
    if not by_recipe:
        raise InputError(f"no run has a whole record: {'; '.join(failed.values())}")
    members = [tuple(by_seed.values()) for by_seed in by_recipe.values()]
    names = _names(members)
    groups = tuple(Group(name, runs_of_one) for name, runs_of_one in zip(names, members, strict=True))
    if baseline is not None and baseline not in names:
        raise InputError(f"baseline: no run is called {baseline!r}. There are {', '.join(names)}.")
    if baseline is None and len(groups) > 1:
        baseline = names[0]
    return RunComparison(groups, baseline, failed)


def comparable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved recipe without name, seed, the paths of scores and cache, and how a teacher's server is reached."""
    kept: dict[str, Any] = json.loads(json.dumps(recipe))
    if isinstance(kept.get("teacher"), dict):
        kept["teacher"] = without_address(kept["teacher"])
    for name, part in (("positions", PositionOptions), ("samples", SampleOptions)):
        if kept.get(name):  # a run may be older than a key's name
            kept[name] = part.with_current_names(kept[name])
    for *parts, key in _INCIDENTAL:
        branch = dig(kept, *parts) if parts else kept
        if isinstance(branch, dict):
            branch.pop(key, None)
    return kept


def _names(groups: Sequence[tuple[Member, ...]]) -> list[str]:
    """Name runs of several seeds by their recipe, others and those that share one by their first run.

    Of a path goes into the name as much as tells apart what would still be called alike.
    """
    own = [str(dig(first.record, "name") or first.path.absolute().name) for first, *_ in groups]
    recipes = [str(dig(first.record, "recipe", "name") or name) for (first, *_), name in zip(groups, own, strict=True)]
    names = [
        recipe if len(members) > 1 and recipes.count(recipe) == 1 else name
        for members, recipe, name in zip(groups, recipes, own, strict=True)
    ]
    paths = [first.path.absolute() for first, *_ in groups]
    longer = []
    for name, path in zip(names, paths, strict=True):
        others = [p for n, p in zip(names, paths, strict=True) if n == name and p != path]
        longer.append(f"{name} ({_short_of(path, others)})" if others else name)
    # A name with its folder in brackets could be another run's own name: numbers tell those apart.
    return [name if longer.count(name) == 1 else f"{name} [{number}]" for number, name in enumerate(longer, start=1)]


def _short_of(path: Path, others: Sequence[Path]) -> str:
    """The end of ``path`` that no other has, in whole parts."""
    for length in range(1, len(path.parts)):
        if all(other.parts[-length:] != path.parts[-length:] for other in others):
            return "/".join(path.parts[-length:])
    return str(path)
