"""What a quantised teacher loses and weighs: the demo's, on held-out text, against itself in bfloat16.

    python benchmarks/quantised.py [--samples 4]

Needs torchao and bitsandbytes. docs/results/task.md has the table.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from selkd import load_recipe
from selkd.data.splits import load_splits
from selkd.models.loading import load_model
from selkd.models.sources import default_cache_dir, locate
from selkd.models.tokenizers import load_tokenizer, tokenizer_fingerprint

FORMS = (None, "torchao_int8", "bitsandbytes_8bit", "bitsandbytes_4bit")
REPEATS = 3


def parts(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors in a weight, the scales that bitsandbytes keeps beside it included."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts(getattr(tensor, name))
        return
    yield tensor
    state = getattr(tensor, "quant_state", None)
    beside = [getattr(tensor, "SCB", None), getattr(state, "absmax", None), getattr(state, "code", None)]
    yield from (each for each in beside if isinstance(each, Tensor))


def size_bytes(model: torch.nn.Module) -> int:
    found = {part.data_ptr(): part.nbytes for weight in model.parameters() for part in parts(weight)}
    return sum(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4)
    count = parser.parse_args().samples
    source = locate("demo", default_cache_dir())
    tokenizer = load_tokenizer(source)
    splits = load_splits(load_recipe("demo").data, tokenizer, tokenizer_fingerprint(tokenizer), default_cache_dir())
    texts = [torch.from_numpy(splits.held_out[row].token_ids).long()[None] for row in range(count)]
    print(f"{sum(text.shape[1] for text in texts)} positions; KL is from the bfloat16 teacher to the quantised one")
    print("form               KL, nats  top-1 agreement  weights, MB  seconds")
    truth = torch.empty(0)
    for form in FORMS:
        model = load_model(source, torch.bfloat16, torch.device("cpu"), form)
        seconds = []
        with torch.no_grad():
            for _ in range(REPEATS):
                started = time.perf_counter()
                logits = torch.cat([model(text).logits[0] for text in texts])
                seconds.append(time.perf_counter() - started)
        found = logits.double().log_softmax(-1)
        truth = found if form is None else truth
        nats = float((truth.exp() * (truth - found)).sum(-1).mean())
        agreement = float((truth.argmax(-1) == found.argmax(-1)).double().mean())
        name = form or "bfloat16"
        print(f"{name:18} {nats:8.4f} {agreement:16.1%} {size_bytes(model) / 1e6:12.1f} {sorted(seconds)[1]:8.2f}")


if __name__ == "__main__":
    main()
