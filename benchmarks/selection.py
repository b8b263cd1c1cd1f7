"""What selecting positions costs: each policy on one batch of scores, all of it, random draws included.

    python benchmarks/selection.py [--batch 16] [--length 4096] [--repeats 7] [--json]

Medians in milliseconds, after a warm-up. A step's own time is told by ``selkd bench``.
"""

import argparse
import json
import platform
import statistics
import time

import torch

from selkd.plugins import Policy
from selkd.recipe.choices import PositionOptions
from selkd.selection.position_scores import choose_positions
from selkd.selection.positions import step_context
from selkd.selection.queue import ScoreQueue
from selkd.selection.randomness import position_uniforms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 16), ("length", 4096), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    shape = given.batch, given.length
    scores = torch.rand(shape, generator=generator) * 8
    batch = {
        "valid_mask": torch.ones(shape, dtype=torch.bool),
        "position_ids": torch.arange(given.length).expand(shape),
        "sample_ids": torch.randint(256, (given.batch, 16), generator=generator, dtype=torch.uint8),
    }
    queue = ScoreQueue(30_000)
    queue.push(scores.flatten().numpy())
    milliseconds = {}
    for policy in Policy.builtin():
        options = PositionOptions.model_validate({"policy": policy, "fraction": 0.2})
        times = []
        for step in range(given.repeats + 1):
            started = time.perf_counter()
            used = scores
            if policy == "random":
                ids, mask = batch["sample_ids"].numpy(), batch["valid_mask"].numpy()
                used = torch.from_numpy(position_uniforms(0, ids, mask, "positions", step))
            place = step_context(options, step, 100, queue if policy == "gls" else None)
            choose_positions(options, used, batch, place, seed=0)
            times.append(1000 * (time.perf_counter() - started))
        milliseconds[policy] = statistics.median(times[1:])
    if given.json:
        print(json.dumps({"batch": given.batch, "length": given.length, "milliseconds": milliseconds}, indent=2))
        return
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{machine}, B = {given.batch}, T = {given.length}")
    for policy, value in milliseconds.items():
        print(f"{policy:18}{value:8.1f} ms")


if __name__ == "__main__":
    main()
