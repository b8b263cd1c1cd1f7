"""How a step grows: memory of SE-KD's own part with the classes V and the positions N, time of all of it with T.

    python benchmarks/growth.py [--width 576] [--json]
    python benchmarks/growth.py --time [RECIPE] [--set KEY=VALUE ...] [--repeats 3] [--json]

Memory is on random tensors: exact entropy at all N positions, then forward KL at 20% of them with gradients for hidden
states and head, in bfloat16 over a float32 head; the peak above that of the tensors given (hidden states, heads and the
head's cast), in a process of its own for each row (Linux, on a CPU): the resident one, and that of the tensors, as
torch's profiler counts them, without what the allocator holds back. The gradient of the head, [V, D] in float32, is
part of it and told beside it, and what the dense form would need for logits alone, N x V in float32.

Time is of one sample of T tokens: the seconds of the floor (both bodies, forward and backward), which hold attention,
and of SE-KD with exact scores, a token; what lies between in one turn is SE-KD's own. In turns, medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from selkd.bench.measure import interleaved, peak_bytes
from selkd.bench.subject import BenchSubject
from selkd.bench.variants import step_of
from selkd.maths.chunked import ChunkedLogits, chunk_size, chunked_entropy, chunked_loss
from selkd.maths.divergence import forward_kl
from selkd.maths.head import Head
from selkd.recipe.files import load_recipe

LENGTHS = (256, 512, 1024, 2048, 4096)
CLASSES = (49_152, 98_304, 151_936, 262_144)
POSITIONS = (512, 1024, 4096)
ROWS = [(1024, v) for v in CLASSES] + [(n, CLASSES[0]) for n in POSITIONS if n != 1024]


def peak_of_tensors(step: Callable[[], None]) -> int:
    """The most bytes that tensors held at once during a call, beyond those alive before it."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes), default=0)


def peaks_above(n: int, vocab_size: int, width: int) -> tuple[int, int]:
    """The resident peak above what was there before, and that of the tensors alone."""
    generator = torch.Generator().manual_seed(0)
    hidden, teachers = (torch.randn(n, width, generator=generator) for _ in range(2))
    weight = torch.randn(vocab_size, width, generator=generator).div_(width**0.5).requires_grad_()
    hidden.requires_grad_()
    teachers_head = Head(torch.randn(vocab_size, width, generator=generator).bfloat16().div_(width**0.5))
    head = Head(weight)
    with torch.no_grad():
        narrow = head.to(torch.bfloat16)
    targets = torch.zeros(n, dtype=torch.int64)

    def nothing() -> None:
        chunked_entropy(hidden.detach()[:1], narrow, chunk=1)

    def step() -> None:
        picked = chunked_entropy(hidden.detach(), narrow).topk(n // 5).indices
        logits = ChunkedLogits(teachers[picked], teachers_head)
        coefficients = torch.full((len(picked),), 1 / len(picked))
        loss, _ = chunked_loss(
            hidden[picked],
            head,
            coefficients,
            lambda z, rows: forward_kl(z, logits(rows), targets[rows]),
            compute_head=narrow,
        )
        loss.backward()
        hidden.grad = weight.grad = None

    device = hidden.device
    before = peak_bytes(nothing, device)
    return peak_bytes(step, device) - before, peak_of_tensors(step)


def seconds_a_token(recipe: str, overrides: list[str], length: int, repeats: int) -> dict[str, float]:
    """Medians of the floor and of SE-KD with exact scores, one sample of ``length`` tokens."""
    shape = [f"data.max_length={length}", "training.per_device_train_batch_size=1"]
    subject = BenchSubject(load_recipe(recipe, [*overrides, *shape]))
    names = ("floor", "se_kd_exact")
    timings = interleaved({name: step_of(name, subject) for name in names}, repeats, subject.device)
    n = subject.batch["input_ids"].numel()
    subject.close()
    floor, ours = (timings[name].median for name in names)
    both = zip(*(timings[name].seconds for name in names), strict=True)
    beyond = [1000 * (b - a) / n for a, b in both]  # of the same turn
    return {
        "tokens": n,
        "floor_milliseconds_a_token": 1000 * floor / n,
        "se_kd_milliseconds_a_token": 1000 * ours / n,
        "beyond_floor_milliseconds_a_token": statistics.median(beyond),
        "beyond_floor_lowest": min(beyond),
        "beyond_floor_highest": max(beyond),
        "ratio_to_floor": ours / floor,
    }


def memory_row(n: int, vocab_size: int, width: int) -> dict[str, int]:
    command = [sys.executable, __file__, "--width", str(width), "--row", str(n), str(vocab_size)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak, of_tensors = map(int, said.split())
    return {
        "positions": n,
        "classes": vocab_size,
        "peak_bytes": peak,
        "tensors_bytes": of_tensors,
        "gradient_bytes": 4 * vocab_size * width,
        "tensors_beyond_gradient_bytes": of_tensors - 4 * vocab_size * width,
        "chunk_positions": chunk_size(vocab_size, torch.device("cpu")),
        "dense_logits_bytes": 4 * n * vocab_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", dest="overrides", default=[])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--row", nargs=2, type=int, help=argparse.SUPPRESS)  # N and V of the process that measures
    given = parser.parse_args()
    if given.row:
        print(*peaks_above(*given.row, given.width))
        return
    rows: list[dict[str, Any]]
    if given.time:
        rows = [seconds_a_token(given.recipe, given.overrides, length, given.repeats) for length in LENGTHS]
    else:
        rows = [memory_row(*row, given.width) for row in ROWS]
    if given.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(
            "  ".join(
                f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value:,}"
                for name, value in row.items()
            )
        )


if __name__ == "__main__":
    main()
