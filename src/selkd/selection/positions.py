"""Position policies: scores in, final coefficients out.

A policy returns the coefficients a_it of ``loss_i = sum_t a_it * l_it``, which nothing divides by their sum again. A
policy that picks K positions of a sample gives 1/K to these and 0 to the others.

Shapes: B batch, T positions, K draws or picked positions of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from selkd.plugins import Policy, deferred
from selkd.recipe.choices import FractionSchedule, PositionOptions
from selkd.selection.queue import ScoreQueue

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")


class StepContext(NamedTuple):
    """What a policy knows of an optimiser step; the same for all its micro-batches and ranks.

    Attributes:
        step: the optimiser step, from 0.
        fraction: k at this step; None: every position is taken.
        progress: from 0 to 1, how far the curriculum's window has moved; for other policies, the share of the run that
            is done.
        threshold: the threshold of gls; None until its queue has enough scores.
    """

    step: int
    fraction: float | None
    progress: float
    threshold: float | None


def step_context(options: PositionOptions, step: int, total_steps: int, queue: ScoreQueue | None = None) -> StepContext:
    """The context of optimiser step ``step`` of ``total_steps``."""
    fraction = fraction_at(options.fraction, step, total_steps)
    span: float = total_steps
    if isinstance(options.curriculum_steps, int):
        span = options.curriculum_steps
    elif options.curriculum_steps is not None:
        span = options.curriculum_steps * total_steps
    threshold = None if queue is None or fraction is None else queue.threshold(fraction)
    return StepContext(step, fraction, min(1.0, step / max(1e-9, span)), threshold)


def fraction_at(fraction: float | FractionSchedule | None, step: int, total_steps: int) -> float | None:
    """The fraction at an optimiser step. A schedule moves during the first share ``over`` of all steps."""
    if not isinstance(fraction, FractionSchedule):
        return fraction
    done = min(1.0, step / max(1e-9, fraction.over * total_steps))
    if fraction.shape == "cosine":
        done = (1 - float(torch.cos(torch.tensor(torch.pi * done, dtype=torch.float64)))) / 2
    return fraction.start + (fraction.to - fraction.start) * done


def counts_of(fraction: float, n_valid: Tensor) -> Tensor:
    """K = ceil(k * n) of each sample, as in decimal arithmetic: 0.07 of 100 is 7. int64, as ``n_valid`` [B]."""
    return torch.ceil(fraction * n_valid.to(torch.float64) - 1e-9).clamp_(min=0).to(torch.int64)


def eligible(options: PositionOptions, batch: dict[str, Tensor]) -> Tensor:
    """The mask of the valid positions [B, T] without the first ``skip_first`` of each document."""
    valid_mask = batch["valid_mask"]
    return valid_mask & (batch["position_ids"] >= options.skip_first) if options.skip_first else valid_mask


def counts_at(context: StepContext, n_valid: Tensor) -> Tensor:
    """K of each sample at a step, int64 as ``n_valid`` [B]; without a fraction it is n."""
    return n_valid if context.fraction is None else counts_of(context.fraction, n_valid)


@dataclass(frozen=True)
class Candidates:
    """The arguments of a built-in policy's function.

    Attributes:
        scores: u [B, T]; finite where valid, anything elsewhere.
        valid_mask: bool [B, T], the eligible positions.
        counts: K of each sample, int64 [B].
        context: the optimiser step's.
        options: the recipe's.
        uniforms: float64 [B, at least max K] in [0, 1) for policies that draw, else None.
    """

    scores: Tensor
    valid_mask: Tensor
    counts: Tensor
    context: StepContext
    options: PositionOptions
    uniforms: Tensor | None = None


# A policy that gives K positions the same coefficient goes with either reduction.
PICKED: tuple[Literal["per_sample", "per_position"], ...] = ("per_sample", "per_position")
MITIGATIONS = {"smoothing": 1.0, "clip": None, "skip_first": 0, "coverage": 0.0}


def take_all(candidates: Candidates) -> Tensor:
    """Every valid position, a = 1/n (Full KD)."""
    return _spread(candidates.valid_mask, candidates.scores.dtype)


Policy.add(
    "all",
    take_all,
    picks_counts=True,
    ranks=False,
    fraction="none",
    label="every position",
    description="1/n on every valid position. Full KD",
    reductions=PICKED,
)


def take_top(candidates: Candidates) -> Tensor:
    """The K valid positions with the highest scores, of equal ones the earlier; a = 1/K."""
    return _spread(mark_highest(candidates.scores, candidates.valid_mask, candidates.counts), candidates.scores.dtype)


Policy.add(
    "top_k",
    take_top,
    picks_counts=True,
    label="the {share} of positions where {metric} is highest",
    description="1/K on the K highest scores, equal ones to the earlier position. SE-KD with `student_entropy`",
    reductions=PICKED,
)

Policy.add(
    "random",
    take_top,  # of uniform noise, so K positions without replacement, all sets equally likely
    picks_counts=True,
    ranks=False,
    metric="random",
    label="a random {share} of the positions",
    description="1/K on K positions, uniform, without replacement. RandomPos",
    reductions=PICKED,
)


def take_above(candidates: Candidates) -> Tensor:
    """gls: the valid positions whose score reaches the threshold; ``take_top`` while there is no threshold.

    The loss is divided by the whole step's budget, the sum of ceil(k*n), so only the signs of these coefficients count.
    """
    if candidates.context.threshold is None:
        return take_top(candidates)
    return _spread(candidates.valid_mask & (candidates.scores >= candidates.context.threshold), candidates.scores.dtype)


Policy.add(
    "gls",
    take_above,
    picks_counts=True,
    reductions=("per_position",),
    options={"queue_size": 30_000},
    label="about {share} of the positions, those above a running threshold on {metric}",
    description="global-level selection: every score at or above the (1-k) quantile of the last `queue_size` valid "
    "scores, as they stood when the step began, with 1/(sum of K over the step). `top_k` picks until a tenth of "
    "the queue is filled",
)


def take_window(candidates: Candidates) -> Tensor:
    """Curriculum: of the positions in ascending order of score, K from number floor((n - K) * progress) on; a = 1/K."""
    n_valid = candidates.valid_mask.sum(dim=-1)
    start = (
        torch.floor((n_valid - candidates.counts) * candidates.context.progress + 1e-9).to(torch.int64).unsqueeze(-1)
    )
    ranks = _ranks(candidates.scores.masked_fill(~candidates.valid_mask, torch.inf), descending=False)
    picked = (ranks >= start) & (ranks < start + candidates.counts.unsqueeze(-1)) & candidates.valid_mask
    return _spread(picked, candidates.scores.dtype)


Policy.add(
    "curriculum",
    take_window,
    picks_counts=True,
    options={"curriculum_steps": 1.0},
    label="a window of {share} of the positions that moves from easy to hard by {metric}",
    description="1/K on K scores in ascending order from floor((n - K) · progress), progress = min(1, step / "
    "`curriculum_steps`)",
    reductions=PICKED,
)


def draw(candidates: Candidates) -> Tensor:
    """Pos RS-KD: K draws with replacement in proportion to u; a = c_t/K. Its expectation is weighted KD."""
    return _drawn(candidates, is_corrected=False)


Policy.add(
    "pos_rs",
    draw,
    label="a {share} draw of the positions in proportion to {metric}",
    description="c/K, c how often K draws with replacement hit the position, probability r = u / sum u. In "
    "expectation weighted KD",
    uniforms="of draws",
    options=MITIGATIONS,
)


def draw_corrected(candidates: Candidates) -> Tensor:
    """Pos RS-KD with importance correction: a = c_t / (K * n * r_t).

    Its expectation is Full KD's mean, except for positions that are never drawn: those with u = 0, and, if ``coverage``
    leaves nothing to draw, all but those that it takes for sure.
    """
    return _drawn(candidates, is_corrected=True)


Policy.add(
    "pos_rs_corrected",
    draw_corrected,
    label="a {share} draw of the positions in proportion to {metric}, corrected to stay unbiased",
    description="c/(K · n · r), the same draws. In expectation Full KD",
    uniforms="of draws",
    is_corrected=True,
    options=MITIGATIONS,
)


def weigh(candidates: Candidates) -> Tensor:
    """Weighted KD: every valid position, a = u / sum u."""
    return _proportional(candidates.scores.double().clamp(min=0), candidates.valid_mask).to(candidates.scores.dtype)


Policy.add(
    "weighted",
    weigh,
    fraction="none",
    label="every position, weighted by {metric}",
    description="u / sum u on every valid position. Weighted KD",
)


def select(
    options: PositionOptions, scores: Tensor, valid_mask: Tensor, context: StepContext, uniforms: Tensor | None = None
) -> Tensor:
    """Coefficients [B, T] of the policy, in the dtype of ``scores``; a row without valid positions is all 0.

    Args:
        scores: [B, T], the metric's values (noise for ``random``; ignored by ``all``), finite where valid.
        valid_mask: bool [B, T], the eligible positions.
        uniforms: float64 [B, max K or more], random numbers of each sample, for policies that draw.
    """
    counts = counts_at(context, valid_mask.sum(dim=-1))
    policy = Policy.find(options.policy)
    if policy.is_own:
        return policy.coefficients(
            scores=scores, valid_mask=valid_mask, counts=counts, progress=context.progress, uniforms=uniforms
        )
    coefficients: Tensor = policy.function(Candidates(scores, valid_mask, counts, context, options, uniforms))
    return coefficients


def _drawn(candidates: Candidates, is_corrected: bool) -> Tensor:
    assert candidates.uniforms is not None, "a policy that draws needs uniforms"
    options, counts = candidates.options, candidates.counts
    n_valid = candidates.valid_mask.sum(dim=-1, keepdim=True)
    sure_counts = counts_of(options.coverage or 0.0, counts)
    sure = mark_highest(candidates.scores, candidates.valid_mask, sure_counts)
    drawable, draws = candidates.valid_mask & ~sure, (counts - sure_counts).unsqueeze(-1)
    u = _clipped(candidates.scores, candidates.valid_mask, options).masked_fill(~drawable, 0)
    # The probability is in proportion to u^(1/s). Divided by the highest u, no power overflows.
    highest = u.amax(dim=-1, keepdim=True)
    r = _proportional((u / highest.masked_fill(highest == 0, 1.0)) ** (1 / (options.smoothing or 1.0)), drawable)

    cumulative = r.cumsum(dim=-1)
    total = cumulative[:, -1:]
    points = candidates.uniforms * total
    points = points.minimum(torch.nextafter(total, torch.zeros_like(total)))  # rounding must not reach past the last
    places = torch.searchsorted(cumulative, points.contiguous(), right=True).clamp_(max=r.shape[-1] - 1)
    is_draw = torch.arange(points.shape[-1], device=r.device) < draws
    times = torch.zeros_like(r).scatter_add_(-1, places, is_draw.to(r.dtype))
    if is_corrected:
        drawn = times / (draws * n_valid * r).masked_fill(times == 0, 1.0)
        return (drawn + sure.to(r.dtype) / n_valid.clamp(min=1)).to(candidates.scores.dtype)
    return ((times + sure) / counts.unsqueeze(-1).clamp(min=1)).to(candidates.scores.dtype)


def _clipped(scores: Tensor, valid_mask: Tensor, options: PositionOptions) -> Tensor:
    """u, at least 0 and cut at its quantile ``clip``, float64 [B, T]; 0 where not valid."""
    u = scores.double().clamp(min=0).masked_fill(~valid_mask, torch.nan)
    if options.clip is not None and u.shape[-1]:
        u = u.minimum(u.nanquantile(options.clip, dim=-1, keepdim=True))
    return u.nan_to_num(nan=0.0)


def _proportional(u: Tensor, mask: Tensor) -> Tensor:
    """u / sum u over ``mask``, 0 elsewhere; uniform over ``mask`` in a row where all u are 0."""
    u = u.masked_fill(~mask, 0)
    u = torch.where(u.sum(dim=-1, keepdim=True) > 0, u, mask.to(u.dtype))
    total = u.sum(dim=-1, keepdim=True)
    return u / total.masked_fill(total == 0, 1.0)


def mark_highest(scores: Tensor, mask: Tensor, counts: Tensor) -> Tensor:
    """Marks the ``counts`` [B] highest scores of each row, of equal ones the earlier: bool [B, T]."""
    return (_ranks(scores.masked_fill(~mask, -torch.inf), descending=True) < counts.unsqueeze(-1)) & mask


def _ranks(scores: Tensor, descending: bool) -> Tensor:
    """The rank of each position in the stable order of its row, int64 [B, T]."""
    order = scores.argsort(dim=-1, descending=descending, stable=True)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


def _spread(picked: Tensor, dtype: torch.dtype) -> Tensor:
    """1/K on the K picked positions of each row."""
    return picked.to(dtype) / picked.sum(dim=-1, keepdim=True).clamp(min=1)
