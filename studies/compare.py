"""The arms of one table side by side: each against the table's first one, on the same seeds and documents.

Arms are compared at equal steps (the first arm's last one), at equal work counted, and at equal seconds, where an arm's
seconds of a step on an idle machine are known. Between two measured steps each document's sum is interpolated.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from inference import Difference, paired
from records import Line

# Two arms are compared at the cost of this share of the dearer one's steps: 14 of 20, which was measured, or 21 of 30,
# just after a measured step. The cheaper one is read later on its way, where KL is nearly straight.
SHARE_OF_STEPS = 0.7
SAME_NATS = 0.01  # of a document: the last digits are a processor's, and bfloat16 moves a document by about 0.1
WAYS = ("equal steps", "equal work", "equal seconds")
Seconds = Mapping[str, float]


@dataclass(frozen=True)
class Arm:
    """An arm's lines by seed; the noise floor's seed 101 stands beside seed 1."""

    name: str
    lines: Mapping[int, Line]

    @property
    def any_line(self) -> Line:
        return next(iter(self.lines.values()))

    @property
    def steps(self) -> int:
        return int(self.any_line["steps"])

    @property
    def measured(self) -> list[int]:
        """The steps that every seed was measured at."""
        return sorted(set.intersection(*({int(step) for step in line["kl_nats"]} for line in self.lines.values())))

    def cost_of_step(self, key: str) -> float:
        """The mean of the seeds of a cost that grows with the steps, such as ``work_in_steps``, of one step."""
        return statistics.fmean(line["cost"][key] / line["steps"] for line in self.lines.values())

    def cost_once(self, key: str) -> float:
        """The mean of the seeds of what is spent before the first step, such as ``work``, and can be shared by runs."""
        return statistics.fmean(line["cost"][key] - line["cost"][f"{key}_in_steps"] for line in self.lines.values())

    @property
    def seconds_as_run(self) -> float | None:
        """The median of the seeds' medians; None if a run was too short to tell."""
        times = [line["seconds_of_step"] for line in self.lines.values() if line["seconds_of_step"] is not None]
        return statistics.median(times) if times else None

    def kl(self, step: float) -> float:
        """The mean of the seeds at ``step``, in nats a position."""
        of_seeds = [at_step(line, step) for line in self.lines.values()]
        positions = sum(self.any_line["positions"])
        return float(np.mean([one.sum() / positions for one in of_seeds if one is not None]))

    def figure(self, name: str) -> float:
        """The mean of the seeds of a figure after training, such as ``perplexity``."""
        return statistics.fmean(line["figures"][name] for line in self.lines.values())


@dataclass(frozen=True)
class Compared:
    """The arms of a table that have a line, in the table's order; the first is what the others are compared with."""

    arms: Mapping[str, Arm]
    seconds: Seconds

    @classmethod
    def of(cls, names: Sequence[str], lines: Sequence[Line], seconds: Seconds) -> "Compared | None":
        """None where the first arm of ``names`` has no line yet."""
        by_name: dict[str, dict[int, Line]] = {}
        for line in lines:
            by_name.setdefault(line["arm"], {})[line["seed"] % 100] = line
        if names[0] not in by_name:
            return None
        require_alike([line for line in lines if line["arm"] in names])
        return cls({name: Arm(name, by_name[name]) for name in names if name in by_name}, seconds)

    @property
    def first(self) -> Arm:
        return next(iter(self.arms.values()))

    @property
    def others(self) -> list[Arm]:
        return list(self.arms.values())[1:]

    def first_beside(self, arm: Arm) -> Arm:
        """The first arm on the seeds of ``arm``, whose documents are the same; on all of its own where none is."""
        same = {seed: line for seed, line in self.first.lines.items() if seed in arm.lines}
        return Arm(self.first.name, same or self.first.lines)

    @cached_property
    def differences(self) -> dict[str, dict[str, Difference]]:
        """Way of equal cost -> arm -> its difference to the first; an arm that can't be compared so has none."""
        found: dict[str, dict[str, Difference]] = {}
        for way, steps_of in zip(WAYS, (self._equal_steps, self._equal_work, self._equal_seconds), strict=True):
            all_arms = {arm.name: _difference(self.first.lines, arm.lines, steps_of) for arm in self.others}
            found[way] = {name: one for name, one in all_arms.items() if one is not None}
        return found

    @property
    def gain(self) -> Difference:
        """The first arm at its last step less before its first."""
        first = self.first
        sums = [[at_step(line, step) for line in first.lines.values()] for step in (first.steps, 0)]
        after, before = (np.stack([one for one in of_seeds if one is not None]) for of_seeds in sums)
        return paired(after, before, np.array(first.any_line["positions"], dtype=float))

    def _equal_steps(self, *_: Line) -> tuple[float, float]:
        return float(self.first.steps), float(self.first.steps)

    def _equal_work(self, *pair: Line) -> tuple[float, float] | None:
        return _steps_of_equal_cost(*((line, work_of_step(line)) for line in pair))

    def _equal_seconds(self, *pair: Line) -> tuple[float, float] | None:
        return _steps_of_equal_cost(*((line, self.seconds.get(line["arm"])) for line in pair))


def _steps_of_equal_cost(
    ours: tuple[Line, float | None], theirs: tuple[Line, float | None]
) -> tuple[float, float] | None:
    """The steps of each of two lines, given with what a step costs, at which both have cost the same."""
    (line, cost), (other, other_cost) = ours, theirs
    if not cost or not other_cost:
        return None
    dearer = line if cost > other_cost else other
    spent = SHARE_OF_STEPS * dearer["steps"] * max(cost, other_cost)
    return spent / cost, spent / other_cost


def require_alike(lines: Sequence[Line]) -> None:
    """Check that all began with one student, measured on the same documents, and each arm with one recipe.

    Raises:
        ValueError: naming the arms that differ.
    """
    first = lines[0]
    recipes = {line["arm"]: line["recipe"] for line in lines}
    for line in lines:
        if line["held_out"] != first["held_out"]:
            raise ValueError(f"seed {line['seed']}: {line['arm']} was measured on other documents than {first['arm']}")
        if not np.allclose(line["kl_nats"]["0"], first["kl_nats"]["0"], rtol=0, atol=SAME_NATS):
            raise ValueError(f"seed {line['seed']}: {line['arm']} began with another student than {first['arm']}")
        if line["recipe"] != recipes[line["arm"]]:
            raise ValueError(f"seed {line['seed']}: {line['arm']} has another recipe than its other seeds")


def work_of_step(line: Line) -> float:
    return float(line["cost"]["work_in_steps"] / line["steps"])


def at_step(line: Line, step: float) -> np.ndarray | None:
    """The documents' sums at ``step``, interpolated between measured ones; None after the last."""
    measured = {int(name): np.array(values) for name, values in line["kl_nats"].items()}
    known = sorted(measured)
    if step > known[-1] + 1e-9:
        return None
    above = next(one for one in known if one >= step - 1e-9)
    below = max((one for one in known if one <= step), default=above)
    share = 0.0 if above == below else (step - below) / (above - below)
    return np.asarray((1 - share) * measured[below] + share * measured[above])


def _difference(
    first: Mapping[int, Line],
    arm: Mapping[int, Line],
    steps_of: Callable[[Line, Line], tuple[float, float] | None],
) -> Difference | None:
    """``arm`` less ``first`` on the seeds that both have, at the steps that ``steps_of`` gives for a pair of lines."""
    pairs: list[list[np.ndarray]] = []
    for seed in sorted(first.keys() & arm.keys()):
        lines = (arm[seed], first[seed])
        steps = steps_of(*lines)
        if steps is None:
            return None
        both = [one for one in map(at_step, lines, steps) if one is not None]
        if len(both) < 2:
            return None
        pairs.append(both)
    if not pairs:
        return None
    ours, theirs = (np.stack(column) for column in zip(*pairs, strict=True))
    return paired(ours, theirs, np.array(next(iter(first.values()))["positions"], dtype=float))
