"""What selection by draws does to the loss at what is selected: made-up distributions in float64, no model, no text.

    python benchmarks/toy_draws.py

``positions``: the top fifth by KL estimated from some of 64 draws; "bias" is the mean loss of the other draws there
less the true KL, for parts taken at random and evenly spaced. ``samples``: the top fifth of samples by the mean of all
draws (``samples.from_cache``), which the loss then has, too. All in nats, with the standard error of the bias.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from selkd.recipe.choices import ClassOptions
from selkd.selection.classes import class_sampler, split_draws, split_evenly

DRAWS, CLASSES, FRACTION = 64, 400, 0.2
Split = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class Toy:
    """n positions of a peaked teacher and a student near it.

    Attributes:
        kl: KL(p || q), [n].
    """

    def __init__(self, n: int, distance: float, generator: torch.Generator) -> None:
        self.generator = generator
        spread = 0.5 + 3.5 * self.uniform(n, 1)
        logits = spread * self.normal(n, CLASSES)
        self.p = logits.softmax(-1)
        far = distance * (0.3 + 1.2 * self.uniform(n, 1))
        self.log_q = (0.8 * logits + far * self.normal(n, CLASSES)).log_softmax(-1)
        self.entropy = -torch.xlogy(self.p, self.p).sum(-1)
        self.kl = -self.entropy - (self.p * self.log_q).sum(-1)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def drawn(self, name: str) -> tuple[Tensor, Tensor]:
        sampler = class_sampler(ClassOptions.model_validate({"sampler": name, "draws": DRAWS}))
        return sampler(self.p, self.uniform(len(self.p), sampler.n_uniforms))

    def estimate(self, class_ids: Tensor, counts: Tensor) -> Tensor:
        return -self.entropy - (counts * self.log_q.gather(-1, class_ids)).sum(-1) / counts.sum(-1)


def positions(generator: torch.Generator) -> None:
    toy = Toy(20_000, 1.0, generator)
    count = round(FRACTION * len(toy.kl))
    exact = toy.kl.topk(count).indices
    for name in ("rs_kd", "systematic"):
        class_ids, counts = toy.drawn(name)
        all_draws = toy.estimate(class_ids, counts) - toy.kl
        splits: list[tuple[str, Split | None]] = [("at random", split_draws), ("evenly", split_evenly), ("all", None)]
        for how, split in splits:
            for n in (4, 8, 16, 32) if split else (DRAWS,):
                noise = toy.uniform(len(counts), DRAWS)
                first, rest = split(counts, noise, n) if split else (counts, counts)
                picked = toy.estimate(class_ids, first).topk(count).indices
                errors = toy.estimate(class_ids, rest) - toy.kl
                print(
                    f"positions  {name:10} {how:9} {n:2} score  "
                    f"of the exact choice {np.isin(picked, exact).mean():.2f}  "
                    f"KL / exact {toy.kl[picked].mean() / toy.kl[exact].mean():.2f}  "
                    f"bias {errors[picked].mean():+.3f} ± {errors[picked].std() / count**0.5:.3f}  "
                    f"noise {errors.square().mean() / all_draws.square().mean():.2f}",
                    flush=True,
                )


def samples(generator: torch.Generator, n_samples: int = 400) -> None:
    for length in (511, 64, 16):
        for likeness, spread in (("unlike", 0.25), ("alike", 0.05)):
            kl, estimates = [], []
            for _ in range(n_samples):
                distance = float(torch.randn((), generator=generator) * spread)
                toy = Toy(length, float(np.exp(distance)), generator)
                kl.append(toy.kl.mean())
                estimates.append([toy.estimate(*toy.drawn(name)).mean() for name in ("rs_kd", "systematic")])
            truth, estimated = torch.stack(kl), torch.tensor(estimates, dtype=torch.float64)
            for name, values in zip(("rs_kd", "systematic"), estimated.unbind(1), strict=True):
                errors = (values - truth)[values.topk(round(FRACTION * n_samples)).indices]
                print(
                    f"samples of {length:3} positions, {likeness} (KL {truth.mean():.2f} ± {truth.std():.2f})  "
                    f"{name:10} bias {errors.mean():+.4f} ± {errors.std() / len(errors) ** 0.5:.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    seeded = torch.Generator().manual_seed(0)
    positions(seeded)
    samples(seeded)
