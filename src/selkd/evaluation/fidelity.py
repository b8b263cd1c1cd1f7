"""Fidelity: how close the student is to its teacher, and both to the text, on held-out samples.

Legend: S samples, K entropy buckets, N positions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from selkd.data.samples import SampleDataset
from selkd.evaluation.calibration import calibration_error
from selkd.evaluation.statistics_pass import over_samples
from selkd.maths.finite import not_finite
from selkd.models.pair import ModelPair
from selkd.plugins import Metric

ENTROPY_EDGES = (0.1, 0.5, 1.0, 2.0, 4.0)
"""The upper ends of the buckets of the teacher's entropy, in nats; the last bucket is open."""
_SUMMED = ("student_ce", "teacher_ce", "kl", "top1_agreement")
_CALIBRATION = ("student_confidence", "student_right")
_MEANS = ("cross_entropy_nats", "teacher_cross_entropy_nats", "kl_nats", "top1_agreement")


@dataclass(frozen=True)
class Fidelity:
    """Means over ``positions`` held-out positions.

    Attributes:
        perplexity: exp of the student's mean cross-entropy with the text.
        kl_nats: the mean KL(p || q) of teacher p and student q at temperature 1.
        top1_agreement: the share of positions at which both rank the same class first.
        calibration_error: the expected calibration error of the student's first class at each position, as a prediction
            of the text: the mean over 15 bins of |confidence - share right|.
        teacher_perplexity: exp of the teacher's mean cross-entropy with the text.
        positions: the number of positions measured.
        teacher_tokens: the number of tokens that the teacher ran on, padding included.
        sums: float64 [S, K, 5], the sums over each sample and bucket: positions, the student's cross-entropy, the
            teacher's cross-entropy, KL, agreements.
        statistics: those that the built-in metrics are computed from, by name, float32 [N] each.
        sample_of: the sample of each position, int64 [N]; the positions of one sample are in order.
    """

    perplexity: float
    kl_nats: float
    top1_agreement: float
    calibration_error: float
    teacher_perplexity: float
    positions: int
    teacher_tokens: int
    sums: Tensor
    statistics: dict[str, Tensor]
    sample_of: Tensor

    def by_entropy(self) -> list[dict[str, float | int | None]]:
        """The means within each bucket of the teacher's entropy, as plain data.

        The teacher's entropy does not depend on the student, so the buckets of two students hold the same positions.
        A bucket has its range ``from_nats`` to ``to_nats`` (exclusive; None: open), its number of ``positions``, and
        the means ``cross_entropy_nats``, ``teacher_cross_entropy_nats``, ``kl_nats`` and ``top1_agreement``, None
        without a position.
        """
        buckets = []
        starts, ends = (0.0, *ENTROPY_EDGES), (*ENTROPY_EDGES, None)
        for (count, *sums), start, end in zip(self.sums.sum(dim=0).tolist(), starts, ends, strict=True):
            means = [total / count if count else None for total in sums]
            bucket = {"from_nats": start, "to_nats": end, "positions": int(count)}
            buckets.append(bucket | dict(zip(_MEANS, means, strict=True)))
        return buckets


def fidelity(models: ModelPair, samples: SampleDataset, description: str = "evaluating") -> Fidelity:
    """Measure the student against its teacher on every valid position of ``samples``.

    Sums are float64, divided once at the end. Several processes share the work, and each returns the full result.

    Raises:
        RunError: a figure is not finite.
    """
    of_metrics = dict.fromkeys(name for metric in Metric.builtin().values() for name in metric.statistics)
    names = tuple(of_metrics | dict.fromkeys(("teacher_entropy", *_SUMMED, *_CALIBRATION)))

    def columns_of(group: list[int], valid_mask: Tensor, statistics: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        row_of = valid_mask.nonzero()[:, 0].cpu()
        return torch.tensor(group)[row_of], torch.stack([statistics[name] for name in names]).cpu()

    parts, tokens = over_samples(names, samples, models, columns_of, description)
    sample_of = torch.cat([indices for indices, _ in parts])
    statistics = dict(zip(names, torch.cat([columns for _, columns in parts], dim=1), strict=True))
    sums = _sums(statistics, sample_of, len(samples))
    positions, student_nll, teacher_nll, kl, agreed = sums.sum(dim=(0, 1)).tolist()
    figures = {
        "perplexity": float(torch.tensor(student_nll / positions, dtype=torch.float64).exp()),
        "kl_nats": kl / positions,
        "top1_agreement": agreed / positions,
        "calibration_error": calibration_error(*(statistics[name].double().numpy() for name in _CALIBRATION)),
        "teacher_perplexity": float(torch.tensor(teacher_nll / positions, dtype=torch.float64).exp()),
    }
    for name, value in figures.items():
        if not math.isfinite(value):
            raise not_finite(f"fidelity, {name}", value)
    return Fidelity(
        **figures,
        positions=int(positions),
        teacher_tokens=tokens,
        sums=sums,
        statistics={name: statistics[name].float() for name in of_metrics},
        sample_of=sample_of,
    )


def _sums(statistics: dict[str, Tensor], sample_of: Tensor, n_samples: int) -> Tensor:
    """``Fidelity.sums`` of the positions of all samples."""
    entropy, n_buckets = statistics["teacher_entropy"], len(ENTROPY_EDGES) + 1
    bucket = torch.bucketize(entropy, torch.tensor(ENTROPY_EDGES).to(entropy.dtype), right=True)
    columns = torch.stack([torch.ones_like(entropy), *(statistics[name] for name in _SUMMED)], dim=1).double()
    sums = columns.new_zeros(n_samples * n_buckets, columns.shape[1])
    return sums.index_add_(0, sample_of * n_buckets + bucket, columns).view(n_samples, n_buckets, -1)
