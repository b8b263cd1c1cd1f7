"""95% intervals of recipes' figures and of their paired differences, over held-out samples and over seeds.

Two students that are measured on the same samples differ by less than either is known: what a sample does to both falls
away. The uncertainty over the samples and that over the seeds add in squares, each with Student's t, as both may be
few. With one seed the interval is that of these two students, and not of their recipes.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from selkd.errors import InputError
from selkd.reporting.comparison import Group, Member, RunComparison
from selkd.reporting.formats import dig
from selkd.reporting.measures import KL, ReportedMeasure, paired
from selkd.sealed import FIDELITY, FILES, differences

_NORMAL = 1.96
# Student's t at 97.5%, for 1, 2, … degrees of freedom; from 30 on the normal distribution is near enough.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045),
)


@dataclass(frozen=True)
class Interval:
    """A figure or a difference with its 95% interval; ``over`` says what it is over, in words."""

    mean: float
    low: float
    high: float
    over: str

    @property
    def is_clear(self) -> bool:
        """Whether a difference is told apart from zero."""
        return self.low > 0 or self.high < 0


def difference_in_kl(comparison: RunComparison, group: Group) -> Interval | None:
    """KL of a recipe less that of the baseline, over the seeds that both have; None where it can't be had."""
    other = next((one for one in comparison.groups if one.name == comparison.baseline), None)
    if other is None or other is group or comparison.why_not(group, KL) is not None:
        return None
    difference = paired(group.values(KL), other.values(KL))
    if difference is None:
        return None
    mine = {member.seed: member for member in group.members}
    pairs = [(mine[base.seed], base) for base in other.members if base.seed in mine]
    sums = [(_sums(first), _sums(second)) for first, second in pairs]
    over_samples = None
    if sums and all(first is not None and second is not None for first, second in sums):
        known = [(first, second) for first, second in sums if first and second]
        over_samples = _half(_error_over_samples(known), len(known[0][0].positions))
    return _interval(difference.mean, difference.deviation, difference.n, over_samples)


def _error_over_samples(pairs: Sequence[tuple["Sums", "Sums"]]) -> float | None:
    """The standard error over the samples of the mean difference, averaged over the seeds first."""
    positions = pairs[0][0].positions
    if len(positions) < 2 or any(len(sums.positions) != len(positions) for pair in pairs for sums in pair):
        return None
    by_sample = np.mean([first.kl - second.kl for first, second in pairs], axis=0)
    mean = by_sample.sum() / positions.sum()
    scatter = float(np.sum((by_sample - mean * positions) ** 2)) * len(positions) / (len(positions) - 1)
    return math.sqrt(scatter) / float(positions.sum())


def interval(group: Group, measure: ReportedMeasure) -> Interval | None:
    """The mean of a recipe's figure with its 95% interval; None where it is unknown."""
    summary = group.summary(measure)
    if summary is None:
        return None
    errors = [dig(member.record, "fidelity", "standard_errors", "after", measure.key) for member in group.members]
    known = [error for error in errors if error is not None]
    # The samples are the same for all seeds, so more seeds make this part no smaller.
    error = statistics.fmean(known) if len(known) == len(errors) else None
    counts = [dig(member.record, "data", "held_out_samples") for member in group.members]
    over_samples = _half(error, min((count for count in counts if count is not None), default=None))
    return _interval(summary.mean, summary.deviation, summary.n, over_samples)


def _half(error: float | None, n: int | None) -> float | None:
    """Half the 95% interval of a mean of ``n`` values (None: unknown, taken for many) with this standard error."""
    if error is None or (n is not None and n < 2):
        return None
    return error * (_NORMAL if n is None or n - 2 >= len(_T) else _T[n - 2])


def _interval(mean: float, deviation: float | None, n: int, over_samples: float | None) -> Interval | None:
    """The interval over the samples, whose half is ``over_samples``, and over ``n`` seeds with this deviation."""
    parts = {}
    if over_samples is not None:
        parts["held-out samples"] = over_samples
    if (over_seeds := None if deviation is None else _half(deviation / math.sqrt(n), n)) is not None:
        parts["seeds"] = over_seeds
    if not parts:
        return None
    half = math.hypot(*parts.values())
    return Interval(mean, mean - half, mean + half, " and ".join(parts))


@dataclass(frozen=True, eq=False)
class Sums:
    """The positions and the sums of KL of each held-out sample, float64 [S]."""

    positions: np.ndarray
    kl: np.ndarray


def _sums(member: Member) -> Sums | None:
    """What the run kept of each sample after training; None of a run of an earlier version.

    Raises:
        InputError: the file is damaged.
    """
    path = member.path / FIDELITY
    if not path.is_file():
        return None
    files: Mapping[str, str] = member.record.get(FILES) or {}
    try:
        if FIDELITY in files and differences(member.path, dict(files), [FIDELITY]):
            raise ValueError("it changed since the run was finished")
        content = json.loads(path.read_text(encoding="utf-8"))
        positions = np.array(content["positions"], dtype=np.float64)
        after = content.get("after")
        kl = None if after is None else np.array(after["kl_nats"], dtype=np.float64)
        if positions.ndim != 1 or (kl is not None and kl.shape != positions.shape):
            raise ValueError("expected a number for each sample")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error}). `selkd distill` with the run's recipe makes it again.") from None
    return None if kl is None else Sums(positions, kl)
