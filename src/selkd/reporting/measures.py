"""What runs are compared by: the figures of a record, and their mean, deviation and paired differences over seeds."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selkd.reporting import benchmarks, formats
from selkd.reporting.formats import dig

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """One figure of a run.

    Attributes:
        key: its name in files, with its unit.
        name: in words.
        read: the figure of a record, None where it was not measured.
        form: as people read it.
        is_outcome: whether it tells how good the student is (else what it cost): only then differences are told.
    """

    key: str
    name: str
    read: Callable[[Record], float | None]
    form: Callable[[float | None], str]
    is_outcome: bool = True


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


def _accuracy(record: Record) -> float | None:
    found = benchmarks.accuracy(record)
    return None if found is None else found.value


ACCURACY = Measure("accuracy", "accuracy", _accuracy, formats.percent)
PERPLEXITY = Measure("perplexity", "perplexity", _at("fidelity", "after", "perplexity"), formats.perplexity)
KL = Measure("kl_nats", "KL to the teacher, nats", _at("fidelity", "after", "kl_nats"), formats.nats)
AGREEMENT = Measure("top1_agreement", "top-1 agreement", _at("fidelity", "after", "top1_agreement"), formats.percent)
SECONDS = Measure("total_seconds", "time", _at("seconds", "total"), formats.duration, is_outcome=False)
MEASURES = (
    ACCURACY,
    PERPLEXITY,
    KL,
    AGREEMENT,
    Measure("positions_share", "positions", _share("positions_selected", "positions_valid"), formats.percent, False),
    Measure("samples_share", "samples", _share("samples_kept", "samples"), formats.percent, False),
    Measure("teacher_tokens", "teacher tokens", _at("counts", "teacher_tokens"), formats.parameters, False),
    SECONDS,
    Measure("train_seconds", "training time", _at("seconds", "train"), formats.duration, False),
    Measure("process_peak_bytes", "peak memory", _at("peak_memory_bytes", "process"), formats.data_size, False),
    Measure(
        "accelerator_peak_bytes",
        "peak on the accelerator",
        _at("peak_memory_bytes", "accelerator"),
        formats.data_size,
        False,
    ),
    Measure("cache_bytes", "cache", _at("teacher_cache", "bytes"), formats.data_size, False),
)


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
