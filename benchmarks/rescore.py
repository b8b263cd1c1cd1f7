"""What ``selkd cache verify --rescore`` can tell: caches of the real teacher, drawn again by it and by altered ones.

    python benchmarks/rescore.py [--samples 12] [--samplers 4]

Samples of the Python manual; the cache is the bfloat16 teacher's at temperature 1. docs/results/cache.md has the table.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from selkd import load_recipe
from selkd.data.splits import load_splits
from selkd.maths.importance import statistics
from selkd.models.loading import load_model
from selkd.models.sources import default_cache_dir, locate
from selkd.models.tokenizers import load_tokenizer, tokenizer_fingerprint
from selkd.plugins import Sampler
from selkd.recipe.choices import ClassOptions
from selkd.run.verify_cache import judged
from selkd.selection.classes import class_sampler
from selkd.teacher import build_cache as building
from selkd.teacher.cached import CachedTeacher
from selkd.teacher.live import LiveTeacher
from selkd.teacher.recheck_cache import compare_again
from selkd_cache.fingerprint import SCALARS
from selkd_cache.reader import TeacherCache

SEED = 1
SAMPLERS = (("rs_kd", 64), ("rs_kd", 8), ("systematic", 64), ("top_k", 64))


def perturbed(model: PreTrainedModel, share: float) -> PreTrainedModel:
    """The model with normal noise on each weight matrix, of ``share`` of the matrix's own standard deviation."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(SEED)
    for weight in model.parameters():
        if weight.ndim == 2:
            noise = torch.randn(weight.shape, generator=generator)
            weight.data = (weight.data.float() + share * weight.data.float().std() * noise).to(weight.dtype)
    return model


class Softer(LiveTeacher):
    """A teacher whose own distribution is the one at its temperature, in its scalars, too."""

    def _scalars(self, logits: Tensor, targets: Tensor) -> Tensor:
        return statistics(("teacher_entropy", "teacher_ce"), logits, logits / self.temperature, targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--samplers", type=int, default=len(SAMPLERS), help="how many of the samplers, from the first")
    options = parser.parse_args()
    n_samples = options.samples
    source, cpu = locate("demo", default_cache_dir()), torch.device("cpu")
    tokenizer = load_tokenizer(source)
    fingerprint = tokenizer_fingerprint(tokenizer)
    train = load_splits(load_recipe("demo").data, tokenizer, fingerprint, default_cache_dir()).train
    samples = train.select(np.arange(0, 20 * n_samples, 20))
    low, full = (load_model(source, dtype, cpu) for dtype in (torch.bfloat16, torch.float32))
    vocab_size = low.config.vocab_size
    variants: dict[str, dict[str, Any]] = {
        "the same": {},
        "float32": {"model": full},
        "each sample alone": {"tokens_at_once": 1},
        "without oneDNN": {"with_onednn": False},
        "weights + 1%": {"model": perturbed(low, 0.01)},
        "weights + 3%": {"model": perturbed(low, 0.03)},
        "temperature 1.05": {"temperature": 1.05},
        "temperature 1.1": {"temperature": 1.1},
        "temperature 2": {"temperature": 2.0},
    }
    tokens_at_once = building.TOKENS_AT_ONCE
    for sampler, draws in SAMPLERS[: options.samplers]:
        classes = ClassOptions.model_validate({"sampler": sampler, "draws": draws})
        about: dict[str, str | int | float] = {
            "sampler": sampler,
            "draws": draws,
            "temperature": 1.0,
            "vocabulary": vocab_size,
            "seed": SEED,
            "count_total": class_sampler(classes).total,
            SCALARS: 2,
        }

        def teacher(classes: ClassOptions = classes, **options: Any) -> LiveTeacher:
            temperature = options.get("temperature", 1.0)
            return Softer(options.get("model", low), classes, temperature, SEED, vocab_size)

        with tempfile.TemporaryDirectory() as folder:
            building.build_cache(Path(folder), about, samples, teacher, 0)
            cached = CachedTeacher(TeacherCache.open(folder))
            for name, altered in variants.items():
                building.TOKENS_AT_ONCE = altered.get("tokens_at_once", tokens_at_once)
                with torch.backends.mkldnn.flags(enabled=altered.get("with_onednn", True)):
                    shares = compare_again(teacher(**altered), cached, samples, range(len(samples)), 0)
                building.TOKENS_AT_ONCE = tokens_at_once
                answer = judged(shares, Sampler.find(sampler).least_same_draws)
                print(
                    f"{sampler:10} {draws:3}  {name:18} {answer.positions} positions  "
                    f"identical {answer.identical_positions / answer.positions:6.1%}  same {answer.same_draws:.4f}  "
                    f"worst sample {answer.worst_same_draws:.4f}  scalars {answer.scalar_error:.4f} nats on average, "
                    f"{answer.worst_scalar_error:.3f} at most  agrees {answer.agrees}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
