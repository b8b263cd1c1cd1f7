"""How SE-KD's own part of a step grows: memory with the classes V and the positions N, on random tensors.

    python benchmarks/growth.py [--width 576] [--json]

Exact entropy at all N positions, then forward KL at 20% of them with gradients for hidden states and head, in bfloat16
over a float32 head. Memory is the peak above that of the tensors given (hidden states, heads and the head's cast), in a
process of its own for each row (Linux, on a CPU): the gradient of the head, [V, D] in float32, is part of it and told
beside it. What the dense form would need for logits alone, N x V in float32, for comparison. Growth of a whole step's
time with T is ``selkd bench RECIPE --set data.max_length=T --set training.per_device_train_batch_size=B``.
"""

import argparse
import json
import subprocess
import sys

import torch

from selkd.bench.measure import peak_bytes
from selkd.maths.chunked import ChunkedLogits, chunk_size, chunked_entropy, chunked_loss
from selkd.maths.divergence import forward_kl
from selkd.maths.head import Head

CLASSES = (49_152, 98_304, 151_936, 262_144)
POSITIONS = (512, 1024, 4096)
ROWS = [(1024, v) for v in CLASSES] + [(n, CLASSES[0]) for n in POSITIONS if n != 1024]


def peak_above(n: int, n_classes: int, width: int) -> int:
    generator = torch.Generator().manual_seed(0)
    hidden, teachers = (torch.randn(n, width, generator=generator) for _ in range(2))
    weight = torch.randn(n_classes, width, generator=generator).div_(width**0.5).requires_grad_()
    hidden.requires_grad_()
    teachers_head = Head(torch.randn(n_classes, width, generator=generator).bfloat16().div_(width**0.5))
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
            narrow_head=narrow,
        )
        loss.backward()
        hidden.grad = weight.grad = None

    device = hidden.device
    before = peak_bytes(nothing, device)
    return peak_bytes(step, device) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--row", nargs=2, type=int, help=argparse.SUPPRESS)  # N and V of the process that measures
    given = parser.parse_args()
    if given.row:
        print(peak_above(*given.row, given.width))
        return
    found = []
    for n, n_classes in ROWS:
        command = [sys.executable, __file__, "--width", str(given.width), "--row", str(n), str(n_classes)]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found.append(
            {
                "positions": n,
                "classes": n_classes,
                "peak_bytes": peak,
                "gradient_bytes": 4 * n_classes * given.width,
                "beyond_gradient_bytes": peak - 4 * n_classes * given.width,
                "chunk_positions": chunk_size(n_classes, torch.device("cpu"), torch.bfloat16),
                "dense_logits_bytes": 4 * n * n_classes,
            }
        )
    if given.json:
        print(json.dumps(found, indent=2))
        return
    for row in found:
        print("  ".join(f"{name} {value:,}" for name, value in row.items()))


if __name__ == "__main__":
    main()
