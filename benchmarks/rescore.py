"""What ``selkd cache verify --rescore`` can tell: caches of the real teacher, judged by it and by altered ones.

    python benchmarks/rescore.py [--samples 8]

Samples of the Python manual; the cache is the bfloat16 teacher's at temperature 1. docs/results/cache.md has the table.
"""

import argparse
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selkd import load_recipe
from selkd.cache.reader import TeacherCache
from selkd.data.splits import load_splits
from selkd.models.loading import load_model
from selkd.models.sources import default_cache_dir, locate
from selkd.models.tokenizers import load_tokenizer, tokenizer_fingerprint
from selkd.recipe.choices import ClassOptions
from selkd.run.verify_cache import judged
from selkd.selection.classes import class_sampler
from selkd.teacher import recheck_cache as rescoring
from selkd.teacher.build_cache import build_cache

SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    n_samples = parser.parse_args().samples
    source, cpu = locate("demo", default_cache_dir()), torch.device("cpu")
    tokenizer = load_tokenizer(source)
    fingerprint = tokenizer_fingerprint(tokenizer)
    train = load_splits(load_recipe("demo").data, tokenizer, fingerprint, default_cache_dir()).train
    samples = train.select(np.arange(0, 20 * n_samples, 20))
    low, full = (load_model(source, dtype, cpu) for dtype in (torch.bfloat16, torch.float32))
    vocab_size = low.config.vocab_size
    tokens_at_once = rescoring.TOKENS_AT_ONCE
    for sampler, draws in (("rs_kd", 64), ("systematic", 64), ("top_k", 64), ("rs_kd", 8), ("systematic", 8)):
        classes = ClassOptions.model_validate({"sampler": sampler, "draws": draws})
        stored: dict[str, str | int | float] = {
            "sampler": sampler,
            "draws": draws,
            "temperature": 1.0,
            "vocabulary": vocab_size,
            "seed": SEED,
            "count_total": class_sampler(classes).total,
        }
        with tempfile.TemporaryDirectory() as folder:
            build_cache(Path(folder), stored, samples, lambda: low, classes, 1.0, SEED, 0)
            cache = TeacherCache.open(folder)
            variants: dict[str, dict[str, Any]] = {
                "the same": {},
                "float32": {"model": full},
                "each sample alone": {"at_once": 1},
                "without oneDNN": {"context": torch.backends.mkldnn.flags(enabled=False)},
                "temperature 1.05": {"temperature": 1.05},
                "temperature 1.1": {"temperature": 1.1},
                "temperature 2": {"temperature": 2.0},
            }
            for name, options in variants.items():
                rescoring.TOKENS_AT_ONCE = options.get("at_once", tokens_at_once)
                with options.get("context", nullcontext()):
                    found = rescoring.compare_again(
                        options.get("model", low), samples, range(len(samples)), classes,
                        options.get("temperature", 1.0), SEED, vocab_size, 0, cache.get,
                    )  # fmt: skip
                answer = judged({samples.ids[index]: again for index, again in found.items()}, is_exact=True)
                same = answer.identical_positions / answer.positions
                print(
                    f"{sampler:10} {draws:3}  {name:18} same counts {same:6.1%}  "
                    f"excess {answer.excess:+.5f} ± {answer.standard_error:.5f}  agrees {answer.agrees}"
                )


if __name__ == "__main__":
    main()
