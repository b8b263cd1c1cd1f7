"""Runs side by side: which are the same recipe with another seed, what each recipe reached, and against a baseline."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selkd.errors import InputError
from selkd.reporting.formats import dig
from selkd.reporting.measures import Measure, Record, Summary, measures_of, paired, summarise
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
    recipe: dict[str, Any]
    members: tuple[Member, ...]

    def values(self, measure: Measure) -> dict[int, float | None]:
        """Seed -> figure."""
        return {member.seed: measure.read(member.record) for member in self.members}

    def asked(self, measure: Measure) -> list[Mapping[str, Any]]:
        """What the runs that have the figure measured it on, each once."""
        found = [measure.asked(m.record) for m in self.members if measure.read(m.record) is not None]
        return [asked for number, asked in enumerate(found) if asked not in found[:number]]

    def summary(self, measure: Measure) -> Summary | None:
        """None also where the runs did not measure the same."""
        return None if len(self.asked(measure)) > 1 else summarise(list(self.values(measure).values()))


@dataclass(frozen=True)
class Comparison:
    """Several recipes; ``baseline`` is the name of the one that differences are told against, ``failed`` run -> why.

    ``failed`` has those whose record is damaged, too.
    """

    groups: tuple[Group, ...]
    baseline: str | None
    failed: dict[str, str]

    @property
    def measures(self) -> list[Measure]:
        """Those that at least one run has."""
        return measures_of(member.record for group in self.groups for member in group.members)

    def difference(self, group: Group, measure: Measure) -> Summary | None:
        """Paired over the seeds against the baseline.

        None for the baseline itself, for what is no outcome, and where the two did not measure the same.
        """
        other = self._baseline
        if other is None or other is group or not measure.is_outcome or self.why_not(group, measure) is not None:
            return None
        return paired(group.values(measure), other.values(measure))

    def why_not(self, group: Group, measure: Measure) -> str | None:
        """Why there is no mean or no difference, where there are figures for it."""
        ours, other = group.asked(measure), self._baseline
        if len(ours) > 1:
            return f"no mean, as its runs differ in {_differing(ours)}"
        theirs = [] if other is None or other is group else other.asked(measure)
        if not ours or not theirs or ours == theirs:
            return None
        return f"no difference to {self.baseline}, as they differ in {_differing([*ours, *theirs])}"

    def alike(self, measure: Measure) -> list[Group]:
        """The recipes with a mean that measured the same as the baseline, or, if it has none, as the first one."""
        known = [group for group in self.groups if group.summary(measure) is not None]
        first = next((group for group in known if group is self._baseline), known[0] if known else None)
        return [group for group in known if first is not None and group.asked(measure) == first.asked(measure)]

    @property
    def _baseline(self) -> Group | None:
        return next((found for found in self.groups if found.name == self.baseline), None)


def _differing(asked: Sequence[Mapping[str, Any]]) -> str:
    parts = dict.fromkeys(part for found in asked for part in found)
    return " and ".join(part for part in parts if any(found.get(part) != asked[0].get(part) for found in asked))


def compare(runs: Sequence[Path], baseline: str | None = None, failed: dict[str, str] | None = None) -> Comparison:
    """The runs in these folders, those of one recipe together. A run whose record is damaged counts as failed.

    Args:
        baseline: a recipe's name; the first one if not given.

    Raises:
        InputError: a folder that is no run, the same run twice, no run with a whole record, or a baseline that is not
            among them.
    """
    found: dict[str, list[Member]] = {}
    recipes: dict[str, dict[str, Any]] = {}
    failed = dict(failed or {})
    for path in runs:
        require_run(path)
        try:
            record = read_record(path)
        except InputError as error:
            failed[str(path)] = str(error)
            continue
        recipe = comparable(dig(record, "recipe") or {})
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
    if not found:
        raise InputError(f"no run has a whole record: {'; '.join(failed.values())}")
    names = _names(list(found.values()))
    groups = tuple(
        Group(name, recipes[key], tuple(members)) for (key, members), name in zip(found.items(), names, strict=True)
    )
    if baseline is not None and baseline not in names:
        raise InputError(f"baseline: no run is called {baseline!r}. There are {', '.join(names)}.")
    if baseline is None and len(groups) > 1:
        baseline = names[0]
    return Comparison(groups, baseline, failed)


def comparable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe less what changes no result but by chance: its name, its seed, where scores and cache are."""
    kept: dict[str, Any] = json.loads(json.dumps(recipe))
    for *parts, key in _INCIDENTAL:
        branch = dig(kept, *parts) if parts else kept
        if isinstance(branch, dict):
            branch.pop(key, None)
    return kept


def _names(groups: list[list[Member]]) -> list[str]:
    """Each group's name: its first run's, with as much of its path as tells apart those that share one."""
    names = [str(dig(members[0].record, "name") or members[0].path.name) for members in groups]
    paths = [members[0].path.absolute() for members in groups]
    told = []
    for name, path in zip(names, paths, strict=True):
        others = [p for n, p in zip(names, paths, strict=True) if n == name and p != path]
        told.append(f"{name} ({_short_of(path, others)})" if others else name)
    # A folder's name in brackets could be another run's own name; the numbers have the last word.
    return [name if told.count(name) == 1 else f"{name} [{number}]" for number, name in enumerate(told, start=1)]


def _short_of(path: Path, others: Sequence[Path]) -> str:
    """The end of ``path`` that no other has, in whole parts."""
    for length in range(1, len(path.parts)):
        if all(other.parts[-length:] != path.parts[-length:] for other in others):
            return "/".join(path.parts[-length:])
    return str(path)
