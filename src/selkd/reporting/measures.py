"""The figures of a record that runs are compared by, and their mean, deviation and paired differences over seeds."""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from selkd.reporting import benchmarks, formats
from selkd.reporting.formats import Form, dig

Record = Mapping[str, Any]
_NORMAL = 1.96  # standard errors in half of a 95% interval


@dataclass(frozen=True)
class ReportedMeasure:
    """One figure of a run.

    Attributes:
        key: its name in files, with its unit.
        name: its name in words.
        read: reads the figure off a record; None where it was not measured.
        form: formats the figure for people.
        is_outcome: whether it tells how good the student is (else what it cost). Only outcomes show differences.
        conditions: reads off a record what the figure was measured on, in words -> value. Figures with other
            conditions are not compared.
        rows: for an outcome, a sentence on whether its rows are to choose by or to report.
    """

    key: str
    name: str
    read: Callable[[Record], float | None]
    form: Form
    is_outcome: bool = True
    conditions: Callable[[Record], Mapping[str, Any]] = lambda _: {}
    rows: str = ""

    @property
    def title(self) -> str:
        """The name with a capital, to begin a title or a row."""
        return formats.capital(self.name)


@dataclass(frozen=True)
class Summary:
    """The mean over ``n`` seeds and the sample deviation (n - 1), None for one seed."""

    mean: float
    deviation: float | None
    n: int


def _at(*keys: str) -> Callable[[Record], float | None]:
    return lambda record: dig(record, *keys)


def _share(part: str, whole: str) -> Callable[[Record], float | None]:
    return lambda record: formats.share(dig(record, "counts", part), dig(record, "counts", whole))


def _fidelity_conditions(record: Record) -> dict[str, Any]:
    """The teacher counts for perplexity too, which is over the classes that student and teacher share."""
    digest = dig(record, "data", "held_out_fingerprint") or dig(record, "data", "fingerprint")
    return {"held-out text": digest, "teacher": dig(record, "teacher", "fingerprint")}


def _fidelity(key: str, name: str, form: Form) -> ReportedMeasure:
    rows = "On the held-out text."
    return ReportedMeasure(key, name, _at("fidelity", "after", key), form, conditions=_fidelity_conditions, rows=rows)


def accuracy(name: str) -> ReportedMeasure:
    """The mean accuracy that ``benchmarks.accuracies`` calls ``name``."""

    def read(record: Record) -> float | None:
        mean = benchmarks.accuracies(record).get(name)
        return None if mean is None else mean.value

    def conditions(record: Record) -> dict[str, Any]:
        mean = benchmarks.accuracies(record).get(name)
        options = {key: dig(record, "recipe", "evaluation", key) for key in ("shots", "limit", "data", "chat_template")}
        return {"tasks": None if mean is None else mean.tasks, **options}

    rows = "On validation rows, to choose by." if name == "validation suite" else _TEST_ROWS
    key = "accuracy_" + re.sub(r"\W+", "_", name.removesuffix(" suite"))
    return ReportedMeasure(key, f"accuracy ({name})", read, formats.percent, conditions=conditions, rows=rows)


_TEST_ROWS = "On the rows to report, not to choose by; evaluation.suite has validation for that."
VALIDATION = accuracy("validation suite")
PERPLEXITY = _fidelity("perplexity", "perplexity", formats.perplexity)
KL = _fidelity("kl_nats", "KL to the teacher, nats", formats.nats)
AGREEMENT = _fidelity("top1_agreement", "top-1 agreement", formats.percent)


@dataclass(frozen=True)
class Closeness:
    """A measure of closeness to the teacher before and after training, with the teacher's own figure; None if unknown.

    ``teacher_text`` is that figure as text: the teacher's agreement with itself is exact and has no decimals. ``error``
    is the standard error of the figure after training, over the held-out samples.
    """

    measure: ReportedMeasure
    before: float | None
    after: float | None
    teacher: float | None
    teacher_text: str
    error: float | None = None

    @property
    def interval(self) -> str | None:
        """The 95% interval of the figure after training: 0.84 to 0.90; None if it is unknown."""
        if self.after is None or self.error is None:
            return None
        low, high = self.after - _NORMAL * self.error, self.after + _NORMAL * self.error
        if self.measure is AGREEMENT:
            low, high = max(0.0, low), min(1.0, high)
        return f"{self.measure.form(max(0.0, low))} to {self.measure.form(high)}"

    @property
    def gap_closed(self) -> float | None:
        """Which share of the way from the untrained student to the teacher was made good; None if unknown."""
        before, after, target = self.before, self.after, self.teacher
        if before is None or after is None or target is None:
            return None
        if self.measure is PERPLEXITY:
            # Perplexity is the exponential of a loss in nats: its gap is measured there.
            if min(before, after, target) <= 0:
                return None
            before, after, target = math.log(before), math.log(after), math.log(target)
        gap = before - target
        closed = (before - after) / gap if gap else math.nan
        return closed if math.isfinite(closed) else None


def closeness(record: Record) -> list[Closeness]:
    """Every measure of closeness to the teacher, measured or not."""
    own = dig(record, "fidelity", "teacher", "perplexity")
    before, after = dig(record, "fidelity", "before"), dig(record, "fidelity", "after")
    errors = dig(record, "fidelity", "standard_errors", "after")
    return [
        Closeness(measure, dig(before, measure.key), dig(after, measure.key), teacher, text, dig(errors, measure.key))
        for measure, teacher, text in (
            (PERPLEXITY, own, formats.perplexity(own)),
            (KL, 0.0, "0"),
            (AGREEMENT, 1.0, "100%"),
        )
    ]


FEW_POSITIONS = 1_000  # a figure from fewer is told to be uncertain


def few_positions(record: Record) -> int | None:
    """The number of held-out positions, if the figures of fidelity come from few; None else, and where unknown."""
    positions = dig(record, "fidelity", "positions")
    return positions if positions is not None and positions < FEW_POSITIONS else None


def storage_layouts(record: Record) -> dict[str, float | None]:
    """Bytes a position of the teacher cache, and of the two usual ways to store a teacher's signal."""
    cache = dig(record, "teacher_cache")
    return {
        "this run’s cache": dig(cache, "bytes_per_position"),
        "fixed width, 3 bytes a draw": dig(cache, "fixed_width_bytes_per_position"),
        "full logits in bfloat16": dig(cache, "full_logits_bytes_per_position"),
    }


# A run's own stages. Tokenised text and a pruned student are reused by every later run here: no recipe's cost.
STAGES = ("score", "cache", "train", "evaluate")
_REUSED = "prune"


def cost_alone(record: Record, stage: str, what: str) -> float | None:
    """The ``seconds`` or ``teacher_tokens`` of a stage as if no other run had made its scores or its cache before."""
    shared = dig(record, "shared") or {}
    if stage in shared:
        return dig(shared, stage, what)
    return dig(record, what, stage)


def _seconds_alone(record: Record) -> float | None:
    if any(cost_alone(record, stage, "seconds") is None for stage in dig(record, "shared") or {}):
        return None
    known = [seconds for stage in STAGES if (seconds := cost_alone(record, stage, "seconds")) is not None]
    return sum(known) if known else None


def _tokens_alone(record: Record) -> float | None:
    by_stage, shared = dig(record, "teacher_tokens"), dig(record, "shared") or {}
    if by_stage is None:
        return dig(record, "counts", "teacher_tokens")
    known = [cost_alone(record, stage, "teacher_tokens") for stage in (by_stage.keys() | shared) - {_REUSED}]
    return None if None in known else sum(value for value in known if value is not None)


def _paid_seconds(record: Record) -> float | None:
    """The seconds that the run itself took; None where it shares nothing, for the recipe alone takes the same."""
    if not dig(record, "shared"):
        return None
    return sum(dig(record, "seconds", stage) or 0.0 for stage in STAGES)


def _paid_tokens(record: Record) -> float | None:
    if not dig(record, "shared"):
        return None
    return sum(value for stage, value in (dig(record, "teacher_tokens") or {}).items() if stage != _REUSED)


_cost = partial(ReportedMeasure, is_outcome=False)
SECONDS = _cost("total_seconds", "time", _seconds_alone, formats.duration)
PAID_SECONDS = _cost("paid_seconds", "time, paid here", _paid_seconds, formats.duration)
MEASURES = (
    PERPLEXITY,
    KL,
    AGREEMENT,
    _cost("positions_share", "positions", _share("positions_selected", "positions_valid"), formats.percent),
    _cost("samples_share", "samples", _share("samples_kept", "samples"), formats.percent),
    _cost("teacher_tokens", "teacher tokens", _tokens_alone, formats.parameters),
    _cost("paid_teacher_tokens", "teacher tokens, paid here", _paid_tokens, formats.parameters),
    SECONDS,
    PAID_SECONDS,
    _cost("train_seconds", "training time", _at("seconds", "train"), formats.duration),
    _cost("process_peak_bytes", "peak memory", _at("peak_memory_bytes", "process"), formats.data_size),
    _cost(
        "accelerator_peak_bytes", "peak on the accelerator", _at("peak_memory_bytes", "accelerator"), formats.data_size
    ),
    _cost("cache_bytes", "cache", _at("teacher_cache", "bytes"), formats.data_size),
)


def measures_of(records: Iterable[Record]) -> list[ReportedMeasure]:
    """The measures that at least one record has: the mean accuracies, suites first, then the others."""
    records = list(records)
    means = {name for record in records for name in benchmarks.accuracies(record)}
    suites = [f"{suite} suite" for suite in ("paper", "validation") if f"{suite} suite" in means]
    means_first = [accuracy(name) for name in [*suites, *sorted(means - set(suites))]]
    return [*means_first, *(m for m in MEASURES if any(m.read(record) is not None for record in records))]


def summarise(values: Sequence[float | None]) -> Summary | None:
    """The mean and deviation of the known, finite values; None if there are none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    return Summary(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def paired(figures: Mapping[int, float | None], baseline: Mapping[int, float | None]) -> Summary | None:
    """Figures less those of the baseline, over the seeds that both have: what a seed does to both falls away."""
    both = [(figures[seed], baseline[seed]) for seed in figures if seed in baseline]
    return summarise([figure - base for figure, base in both if figure is not None and base is not None])
