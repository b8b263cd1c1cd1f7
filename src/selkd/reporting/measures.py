"""What runs are compared by: the figures of a record, and their mean, deviation and paired differences over seeds."""

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


@dataclass(frozen=True)
class ReportedMeasure:
    """One figure of a run.

    Attributes:
        key: its name in files, with its unit.
        name: in words.
        read: the figure of a record, None where it was not measured.
        form: as people read it.
        is_outcome: whether it tells how good the student is (else what it cost): only then are differences shown.
        asked: what the figure was measured on, in words -> value: figures of other questions are not compared.
        rows: for an outcome, whether its rows are to choose by or to report.
    """

    key: str
    name: str
    read: Callable[[Record], float | None]
    form: Form
    is_outcome: bool = True
    asked: Callable[[Record], Mapping[str, Any]] = lambda _: {}
    rows: str = ""

    @property
    def title(self) -> str:
        """The name as a title or a row begins with it."""
        return formats.capital(self.name)


@dataclass(frozen=True)
class Summary:
    """Of ``n`` seeds; ``deviation`` is the sample's (n - 1), None for one seed."""

    mean: float
    deviation: float | None
    n: int


def _at(*keys: str) -> Callable[[Record], float | None]:
    return lambda record: dig(record, *keys)


def _share(part: str, whole: str) -> Callable[[Record], float | None]:
    return lambda record: formats.share(dig(record, "counts", part), dig(record, "counts", whole))


def _fidelity_asked(record: Record) -> dict[str, Any]:
    """Perplexity too: it is over the classes that student and teacher share."""
    digest = dig(record, "data", "held_out_fingerprint") or dig(record, "data", "fingerprint")
    return {"held-out text": digest, "teacher": dig(record, "teacher", "fingerprint")}


def _fidelity(key: str, name: str, form: Form) -> ReportedMeasure:
    rows = "On the held-out text."
    return ReportedMeasure(key, name, _at("fidelity", "after", key), form, asked=_fidelity_asked, rows=rows)


def accuracy(of: str) -> ReportedMeasure:
    """The mean accuracy that ``benchmarks.accuracies`` calls ``of``."""

    def read(record: Record) -> float | None:
        mean = benchmarks.accuracies(record).get(of)
        return None if mean is None else mean.value

    def asked(record: Record) -> dict[str, Any]:
        mean = benchmarks.accuracies(record).get(of)
        options = {key: dig(record, "recipe", "evaluation", key) for key in ("shots", "limit", "data", "chat_template")}
        return {"tasks": None if mean is None else mean.tasks, **options}

    rows = "On validation rows, to choose by." if of == "validation suite" else _TEST_ROWS
    key = "accuracy_" + re.sub(r"\W+", "_", of.removesuffix(" suite"))
    return ReportedMeasure(key, f"accuracy ({of})", read, formats.percent, asked=asked, rows=rows)


_TEST_ROWS = "On test rows, to report and not to choose by; evaluation.suite has validation for that."
VALIDATION = accuracy("validation suite")
PERPLEXITY = _fidelity("perplexity", "perplexity", formats.perplexity)
KL = _fidelity("kl_nats", "KL to the teacher, nats", formats.nats)
AGREEMENT = _fidelity("top1_agreement", "top-1 agreement", formats.percent)


@dataclass(frozen=True)
class Closeness:
    """A measure of closeness to the teacher before and after training, and the teacher's own figure; None if unknown.

    ``teacher_text`` is the teacher's figure as text: its agreement with itself is exact, and stands without decimals.
    """

    measure: ReportedMeasure
    before: float | None
    after: float | None
    teacher: float | None
    teacher_text: str

    @property
    def gap_closed(self) -> float | None:
        """How much of the way from the untrained student to the teacher was made good, as a share; None if unknown."""
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
    return [
        Closeness(measure, dig(before, measure.key), dig(after, measure.key), teacher, text)
        for measure, teacher, text in (
            (PERPLEXITY, own, formats.perplexity(own)),
            (KL, 0.0, "0"),
            (AGREEMENT, 1.0, "100%"),
        )
    ]


# What is kept on the machine for every later run, tokenised text and a student that was cut, is no recipe's own cost.
STAGES = ("score", "cache", "train", "evaluate")
_KEPT = "prune"


def alone(record: Record, stage: str, what: str) -> float | None:
    """``seconds`` or ``teacher_tokens`` of a stage if no other run had made its scores or its cache before."""
    shared = dig(record, "shared") or {}
    if stage in shared:
        return dig(shared, stage, what)
    return dig(record, what, stage)


def _seconds_alone(record: Record) -> float | None:
    if any(alone(record, stage, "seconds") is None for stage in dig(record, "shared") or {}):
        return None
    known = [seconds for stage in STAGES if (seconds := alone(record, stage, "seconds")) is not None]
    return sum(known) if known else None


def _tokens_alone(record: Record) -> float | None:
    by_stage, shared = dig(record, "teacher_tokens"), dig(record, "shared") or {}
    if by_stage is None:
        return dig(record, "counts", "teacher_tokens")
    known = [alone(record, stage, "teacher_tokens") for stage in (by_stage.keys() | shared) - {_KEPT}]
    return None if None in known else sum(value for value in known if value is not None)


def _paid_seconds(record: Record) -> float | None:
    """Told where something is shared; elsewhere it is what the recipe takes alone."""
    if not dig(record, "shared"):
        return None
    return sum(dig(record, "seconds", stage) or 0.0 for stage in STAGES)


def _paid_tokens(record: Record) -> float | None:
    if not dig(record, "shared"):
        return None
    return sum(value for stage, value in (dig(record, "teacher_tokens") or {}).items() if stage != _KEPT)


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
    """Those that at least one record has: a column for each mean accuracy, suites first, then the others."""
    records = list(records)
    means = {of for record in records for of in benchmarks.accuracies(record)}
    suites = [f"{suite} suite" for suite in ("paper", "validation") if f"{suite} suite" in means]
    means_first = [accuracy(of) for of in [*suites, *sorted(means - set(suites))]]
    return [*means_first, *(m for m in MEASURES if any(m.read(record) is not None for record in records))]


def summarise(values: Sequence[float | None]) -> Summary | None:
    """Mean and deviation of what is known and finite; None if nothing is."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    return Summary(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def paired(ours: Mapping[int, float | None], theirs: Mapping[int, float | None]) -> Summary | None:
    """Ours minus theirs, seed by seed, over the seeds that both have: what the seed does to both falls away."""
    both = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    return summarise([mine - other for mine, other in both if mine is not None and other is not None])
