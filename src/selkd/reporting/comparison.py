"""Runs side by side: which are the same recipe with another seed, what each recipe reached, and against a baseline."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selkd.errors import InputError
from selkd.reporting.formats import dig
from selkd.reporting.measures import Record, ReportedMeasure, Summary, measures_of, paired, summarise
from selkd.reporting.run_files import read_record, require_run

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
    members: tuple[Member, ...]

    @property
    def recipe(self) -> dict[str, Any]:
        """What is the same in all of its runs."""
        return comparable(self.members[0].record.get("recipe") or {})

    def values(self, measure: ReportedMeasure) -> dict[int, float | None]:
        """Seed -> figure."""
        return {member.seed: measure.read(member.record) for member in self.members}

    def asked(self, measure: ReportedMeasure) -> list[Mapping[str, Any]]:
        """What the runs that have the figure measured it on, each once."""
        asked = [measure.asked(m.record) for m in self.members if measure.read(m.record) is not None]
        return [question for number, question in enumerate(asked) if question not in asked[:number]]

    def summary(self, measure: ReportedMeasure) -> Summary | None:
        """None also where the runs did not measure the same."""
        return None if len(self.asked(measure)) > 1 else summarise(list(self.values(measure).values()))


@dataclass(frozen=True)
class RunComparison:
    """Several recipes; ``baseline`` is the name of the one that differences are told against, ``failed`` run -> why.

    ``failed`` has those whose record is damaged, too.
    """

    groups: tuple[Group, ...]
    baseline: str | None
    failed: dict[str, str]

    @property
    def measures(self) -> list[ReportedMeasure]:
        """Those that at least one run has."""
        return measures_of(member.record for group in self.groups for member in group.members)

    def difference(self, group: Group, measure: ReportedMeasure) -> Summary | None:
        """Paired over the seeds against the baseline.

        None for the baseline itself, for what is no outcome, and where the two did not measure the same.
        """
        other = self._baseline
        if other is None or other is group or not measure.is_outcome or self.why_not(group, measure) is not None:
            return None
        return paired(group.values(measure), other.values(measure))

    def why_not(self, group: Group, measure: ReportedMeasure) -> str | None:
        """Why there is no mean or no difference, where there are figures for it."""
        ours, other = group.asked(measure), self._baseline
        if len(ours) > 1:
            return f"no mean, as its runs differ in {_differing(ours)}"
        theirs = [] if other is None or other is group else other.asked(measure)
        if not ours or not theirs or ours == theirs:
            return None
        return f"no difference to {self.baseline}, as they differ in {_differing([*ours, *theirs])}"

    def alike(self, measure: ReportedMeasure) -> dict[str, Summary]:
        """Recipe -> mean, of those that measured the same as the baseline, or, if it has no mean, as the first one."""
        known = [(group, summary) for group in self.groups if (summary := group.summary(measure)) is not None]
        asked = {group.name: group.asked(measure) for group, _ in known}
        first = asked.get(self.baseline or "", next(iter(asked.values()), None))
        return {group.name: summary for group, summary in known if asked[group.name] == first}

    @property
    def _baseline(self) -> Group | None:
        return next((group for group in self.groups if group.name == self.baseline), None)


def _differing(asked: Sequence[Mapping[str, Any]]) -> str:
    parts = dict.fromkeys(part for question in asked for part in question)
    return " and ".join(part for part in parts if any(other.get(part) != asked[0].get(part) for other in asked))


def compare(runs: Sequence[Path], baseline: str | None = None, failed: dict[str, str] | None = None) -> RunComparison:
    """The runs in these folders, those of one recipe together. A run whose record is damaged counts as failed.

    Args:
        baseline: a recipe's name; the first one if not given.

    Raises:
        InputError: a folder that is no run, the same run twice, no run with a whole record, or a baseline that is not
            among them.
    """
    by_recipe: dict[str, dict[int, Member]] = {}
    failed = dict(failed or {})
    for path in runs:
        require_run(path)
        try:
            record = read_record(path)
        except InputError as error:
            failed[str(path)] = str(error)
            continue
        seed = int(dig(record, "recipe", "seed") or 0)
        key = json.dumps(comparable(record.get("recipe") or {}), sort_keys=True)
        member = by_recipe.setdefault(key, {}).setdefault(seed, Member(path, seed, record))
        if member.record is not record:
            raise InputError(
                f"{member.path} and {path}: the same recipe with the same seed. Give each run once; runs are averaged "
                "over their seeds."
            )
    if not by_recipe:
        raise InputError(f"no run has a whole record: {'; '.join(failed.values())}")
    members = [tuple(by_seed.values()) for by_seed in by_recipe.values()]
    names = _names([first for first, *_ in members])
    groups = tuple(Group(name, of_recipe) for name, of_recipe in zip(names, members, strict=True))
    if baseline is not None and baseline not in names:
        raise InputError(f"baseline: no run is called {baseline!r}. There are {', '.join(names)}.")
    if baseline is None and len(groups) > 1:
        baseline = names[0]
    return RunComparison(groups, baseline, failed)


def comparable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe less what changes no result but by chance: its name, its seed, where scores and cache are."""
    kept: dict[str, Any] = json.loads(json.dumps(recipe))
    for *parts, key in _INCIDENTAL:
        branch = dig(kept, *parts) if parts else kept
        if isinstance(branch, dict):
            branch.pop(key, None)
    return kept


def _names(first_runs: Sequence[Member]) -> list[str]:
    """Each recipe's name: its first run's, with as much of its path as tells apart those that share one."""
    names = [str(dig(member.record, "name") or member.path.name) for member in first_runs]
    paths = [member.path.absolute() for member in first_runs]
    longer = []
    for name, path in zip(names, paths, strict=True):
        others = [p for n, p in zip(names, paths, strict=True) if n == name and p != path]
        longer.append(f"{name} ({_short_of(path, others)})" if others else name)
    # A folder's name in brackets could be another run's own name; the numbers have the last word.
    return [name if longer.count(name) == 1 else f"{name} [{number}]" for number, name in enumerate(longer, start=1)]


def _short_of(path: Path, others: Sequence[Path]) -> str:
    """The end of ``path`` that no other has, in whole parts."""
    for length in range(1, len(path.parts)):
        if all(other.parts[-length:] != path.parts[-length:] for other in others):
            return "/".join(path.parts[-length:])
    return str(path)
