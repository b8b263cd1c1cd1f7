"""Class samplers: probabilities in, drawn class ids and counts out.

Shapes: n positions, V classes, U draws, C distinct drawn classes (rows padded with count 0 and class 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selkd.plugins import Sampler, deferred
from selkd.recipe.choices import ClassOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

Drawn = tuple["Tensor", "Tensor"]  # class ids int64 [n, C], counts [n, C]
Draw = Callable[["Tensor", "Tensor", int], Drawn]  # probabilities [n, V], uniforms [n, u], draws U

BLOCK = 64  # classes a block; a draw first finds its block, then its class
TOP_K_UNITS = 65_535  # the probabilities of ``top_k`` are stored as multiples of 1/65,535, two bytes a class


def rs_kd(probabilities: Tensor, uniforms: Tensor, draws: int) -> Drawn:
    """U draws with replacement from p at each position (RS-KD): distinct class ids and how often each was drawn.

    E[counts / U] = p, so forward KL's gradient stays unbiased. The cumulative sums are float64: in float32, the tail of
    a large vocabulary would never be drawn.

    Args:
        probabilities: [n, V], rows summing to 1 up to rounding.
        uniforms: float64 [n, U] in [0, 1).
        draws: U.

    Returns:
        ``class_ids`` int64 and ``counts`` int64, both [n, C]; ids ascend within a row, counts of a row sum to U.
    """
    assert uniforms.shape == (len(probabilities), draws)
    return _at_points(probabilities, uniforms.sort(dim=-1).values)


Sampler.add("all", label="the teacher’s whole distribution", description="the whole distribution")
Sampler.add(
    "rs_kd",
    rs_kd,
    is_unbiased=True,
    least_same_draws=(0.72, 0.5),
    label="{draws} random draws from the teacher’s distribution",
    description="U = `draws` independent draws from p; forward KL to the counts over U. Unbiased for forward KL's "
    "gradient",
)


def systematic(probabilities: Tensor, uniforms: Tensor, draws: int) -> Drawn:
    """The classes at U equally spaced points of the cumulative distribution, all shifted by one uniform offset.

    Each count is floor or ceil of U * p(v). The expectation is that of ``rs_kd``, the variance a fraction of it. Args
    and returns are those of ``rs_kd``, except that ``uniforms`` is [n, 1].
    """
    assert uniforms.shape == (len(probabilities), 1)
    steps = torch.arange(draws, dtype=torch.float64, device=uniforms.device)
    return _at_points(probabilities, (steps + uniforms) / draws)


Sampler.add(
    "systematic",
    systematic,
    is_unbiased=True,
    is_evenly_spaced=True,
    n_uniforms=lambda _: 1,
    least_same_draws=(0.76, 0.5),
    label="{draws} evenly spaced draws from the teacher’s distribution",
    description="U equally spaced points through the cumulative distribution, one random offset: the same "
    "expectation, less variance. Beyond the paper",
)


def top_k(probabilities: Tensor, uniforms: Tensor, draws: int) -> Drawn:
    """The U most probable classes, of equal ones the lower id, with their probabilities.

    It is biased: renormalised, the tail gets no mass and the kept classes too much. It is the known baseline, not a
    recommendation. With ``classes.tail`` the mass that is left out counts as one class.

    Returns:
        ``class_ids`` int64, ascending within a row, and ``counts``, here probabilities in the given dtype, [n, U].
    """
    del uniforms
    order = probabilities.argsort(dim=-1, descending=True, stable=True)[:, :draws]
    class_ids = order.sort(dim=-1).values
    return class_ids, probabilities.gather(-1, class_ids)


Sampler.add(
    "top_k",
    top_k,
    n_uniforms=lambda _: 0,
    total=lambda _: TOP_K_UNITS,
    truncates=True,
    least_same_draws=(0.965, 0.9),
    label="the teacher’s {draws} most likely classes",
    description="the U most likely classes, renormalised. Biased; the known baseline. With `tail: true`, all others "
    "are one class more, with the mass that is left: never negative, a lower bound of KL(p ‖ q)",
)


def _at_points(probabilities: Tensor, points: Tensor) -> Drawn:
    """The classes in which ascending ``points`` [n, U] in [0, 1) of the cumulative distribution lie, counted.

    The search finds the block of ``BLOCK`` classes, then the class in it. Cumulative sums of all V classes in float64
    would take twice the time, and four times the memory of the probabilities.
    """
    n, vocab_size = probabilities.shape
    blocks = torch.nn.functional.pad(probabilities, (0, -vocab_size % BLOCK)).view(n, -1, BLOCK)
    # float32 is exact enough for the sum of the few classes of a block, but not for the sums over all blocks.
    cumulative = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    below_all = 1 - torch.finfo(torch.float64).eps  # a point that is rounded up to the total would lie in no class
    points = points.clamp(max=below_all) * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, points, right=True).clamp_(max=blocks.shape[1] - 1)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).to(torch.float64).cumsum(dim=-1)
    rest = points - torch.nn.functional.pad(cumulative, (1, 0)).gather(1, block)
    # The two sums of a block differ by a rounding: a point is kept below the second, so that it lies in a class of it.
    rest = torch.minimum(rest, inside[..., -1] * below_all)
    place = torch.searchsorted(inside, rest[..., None], right=True).squeeze(-1)
    return count_distinct(block * BLOCK + place)


def count_distinct(drawn: Tensor) -> Drawn:
    """The distinct ids and their counts, both [n, U], of ids [n, U] that ascend within each row."""
    is_new = torch.ones_like(drawn, dtype=torch.bool)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = is_new.cumsum(dim=-1) - 1
    # As many columns as draws: to find how many the fullest row needs, the host would wait for the device.
    class_ids = torch.zeros_like(drawn).scatter_(-1, slot, drawn)
    return class_ids, torch.zeros_like(drawn).scatter_add_(-1, slot, torch.ones_like(drawn))


def with_tail(class_ids: Tensor, probabilities: Tensor, vocab_size: int) -> Drawn:
    """Classes [n, C] and their probabilities with one class more, ``vocab_size``, which has the mass of all others."""
    rest = (1 - probabilities.double().sum(-1, keepdim=True)).clamp(min=0).to(probabilities)
    return torch.nn.functional.pad(class_ids, (0, 1), value=vocab_size), torch.cat([probabilities, rest], dim=-1)


def split_draws(counts: Tensor, uniforms: Tensor, n_first: int) -> tuple[Tensor, Tensor]:
    """``n_first`` of each position's draws at random, without replacement, and the rest of them: both counts [n, C].

    So the first are as if drawn alone. (The first by class id would be of the classes with low ids.)

    Args:
        counts: integers [n, C]; each row sums to U, or to 0.
        uniforms: [n, U] in [0, 1): the draws with the lowest are taken.
    """
    n_draws = uniforms.shape[-1]
    ends = counts.long().cumsum(dim=-1)
    draws = torch.arange(n_draws, device=counts.device).expand(len(counts), n_draws)
    class_of_draw = torch.searchsorted(ends, draws.contiguous(), right=True).clamp(max=counts.shape[-1] - 1)
    taken = torch.zeros_like(draws).scatter_(-1, uniforms.argsort(dim=-1)[:, :n_first], 1)
    taken = taken * (draws < ends[:, -1:])
    first = torch.zeros_like(ends).scatter_add_(-1, class_of_draw, taken).to(counts.dtype)
    return first, counts - first


def split_evenly(counts: Tensor, uniforms: Tensor, n_first: int) -> tuple[Tensor, Tensor]:
    """As ``split_draws``, but the first are evenly spaced among the draws in the order of the classes.

    Of equally spaced draws (``systematic``) they so are equally spaced, too. Taken at random they would scatter as
    independent ones do; and as all draws together hardly scatter, the rest would make up for what the first have.

    Args:
        counts: integers [n, C] in the order of the class ids; each row sums to U, or to 0.
        uniforms: [n, U] in [0, 1), of which the first column is used: which of the U places is the first.
    """
    n_draws = uniforms.shape[-1]
    offset = (uniforms[:, :1] * n_draws).long()
    # Draw k is one of the first where (k * n_first + offset) mod U < n_first, which is so for n_first of any U in turn.
    ends = counts.long().cumsum(dim=-1) * n_first + offset + (n_draws - n_first)
    first = ends.div(n_draws, rounding_mode="floor")
    before = (offset + (n_draws - n_first)).div(n_draws, rounding_mode="floor")
    first = first.diff(dim=-1, prepend=before).to(counts.dtype)
    return first, counts - first


def in_units(class_ids: Tensor, probabilities: Tensor) -> Drawn:
    """Probabilities [n, C], for storing, as integer counts that sum to ``TOP_K_UNITS``, by largest remainders.

    A class of the target moves by less than 1/65,535; classes that are rounded to 0 have count 0.
    """
    exact = probabilities.double()
    exact = exact / exact.sum(dim=-1, keepdim=True) * TOP_K_UNITS
    counts = exact.floor()
    missing = (TOP_K_UNITS - counts.sum(dim=-1, keepdim=True)).round()
    order = (exact - counts).argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return class_ids, (counts + (ranks < missing)).to(torch.int64)


@dataclass(frozen=True)
class ClassSampler:
    """A sampler with its number of draws.

    Attributes:
        draw: the sampler's function.
        draws: U.
        n_uniforms: how many uniforms a position needs.
        total: the sum of the integer counts of a stored row.
        keeps_tail: whether the mass of all classes that were left out is stored, as one class after the last.
        is_own: whether the sampler is a user's.
        is_unbiased: whether the expected share of each class among the draws is its probability.
    """

    draw: Draw
    draws: int
    n_uniforms: int
    total: int
    keeps_tail: bool = False
    is_own: bool = False
    is_unbiased: bool = False

    def __call__(self, probabilities: Tensor, uniforms: Tensor) -> Drawn:
        """Class ids and counts [n, C] of ``probabilities`` [n, V], with ``uniforms`` float64 [n, n_uniforms].

        ``probabilities`` must be finite: from NaN, the search would silently take the last class.
        """
        return self.draw(probabilities, uniforms, self.draws)

    def integers(self, probabilities: Tensor, uniforms: Tensor) -> Drawn:
        """The same draws, for storing: with integer counts that sum to ``total``; the tail is class V."""
        class_ids, counts = self(probabilities, uniforms)
        if self.keeps_tail:
            class_ids, counts = with_tail(class_ids, counts, probabilities.shape[-1])
        return in_units(class_ids, counts) if counts.is_floating_point() else (class_ids, counts)


def class_sampler(options: ClassOptions) -> ClassSampler:
    """The sampler that a recipe's ``classes`` name, which is not ``all``."""
    entry, draws = Sampler.find(options.sampler), options.draws
    draw = entry.drawn if entry.is_own else entry.function
    assert draws is not None, "ClassOptions requires draws with a sampler"
    assert draw is not None, f"{entry.name} draws no classes"
    return ClassSampler(
        draw, draws, entry.n_uniforms(draws), entry.total(draws), options.tail, entry.is_own, entry.is_unbiased
    )
