"""How many of a position's draws should score it: selection by estimated KL against selection by KL itself.

    python benchmarks/scoring_draws.py --data DIR --student FOLDER [--positions 2044] [--json]

Real teacher and text (``benchmarks/cache.py`` names the files), a student in ``FOLDER``. For U = 64 draws and each
number that scores, over several draws: the share of the exact top fifth that is selected; the mean true KL of what is
selected, against that of the exact choice; and the loss at the selected positions less their true KL, which is the
bias: with the other draws, and with the very draws that scored. Fewer draws are left for the loss: ``noise`` is its
mean squared error against that of all draws. Draws are split as training splits them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from cache import TEXTS, Teacher, sampler
from torch import Tensor

from selkd.data.collate import collate
from selkd.maths.chunked import wide
from selkd.models.head import head_of, hidden_states
from selkd.models.loading import load_model
from selkd.models.sources import default_cache_dir, locate
from selkd.selection.classes import split_draws, split_evenly

DRAWS, FRACTION, REPEATS = 64, 0.2, 4
SHARES = (4, 8, 16, 24, 32)


@torch.inference_mode()
def measure(data: Path, student: str, positions: int) -> dict[str, Any]:
    teacher = Teacher(data)
    model = load_model(locate(student, default_cache_dir()), torch.float32, torch.device("cpu"))
    head, samples = head_of(model), teacher.samples(TEXTS["textbooks and encyclopedia"], positions)
    samples = samples[: max(1, positions // 511)]
    generator = torch.Generator().manual_seed(0)
    rows: dict[tuple[str, int], list[list[float]]] = {}
    for sample in samples:
        batch = collate([sample], 0)
        valid = batch["valid_mask"]
        of_teacher = hidden_states(teacher.model, batch["input_ids"], batch["position_ids"])[valid]
        of_student = hidden_states(model, batch["input_ids"], batch["position_ids"])[valid]
        log_p = wide(teacher.head.logits(of_teacher)).log_softmax(-1)
        log_q = wide(head.logits(of_student)).log_softmax(-1)
        p = log_p.exp()
        kl, entropy = (p * (log_p - log_q)).sum(-1), -(p * log_p).sum(-1)
        count = -(-len(kl) // round(1 / FRACTION))
        exact = kl.topk(count).indices
        for name in ("rs_kd", "systematic"):
            draw, split = sampler(name, DRAWS), split_evenly if name == "systematic" else split_draws
            for _ in range(REPEATS):
                noise = torch.rand(len(p), draw.n_uniforms, generator=generator, dtype=torch.float64)
                class_ids, counts = draw(p, noise)
                at_classes = log_q.gather(-1, class_ids)

                def estimate(part: Tensor, at_classes: Tensor = at_classes, entropy: Tensor = entropy) -> Tensor:
                    return -entropy - (part * at_classes).sum(-1) / part.sum(-1)

                split_noise = torch.rand(len(p), DRAWS, generator=generator, dtype=torch.float64)
                for n in (*SHARES, DRAWS):
                    first, rest = split(counts, split_noise, n) if n < DRAWS else (counts, counts)
                    picked = estimate(first).topk(count).indices
                    rows.setdefault((name, n), []).append(
                        [
                            len(set(picked.tolist()) & set(exact.tolist())) / count,
                            float(kl[picked].mean() / kl[exact].mean()),
                            float((estimate(rest) - kl)[picked].mean()),
                            float((estimate(first) - kl)[picked].mean()),
                            float((estimate(rest) - kl).square().mean()),
                        ]
                    )
    names = ("share_of_exact_choice", "kl_of_choice", "bias_of_other_draws", "bias_of_same_draws", "noise")
    found = []
    for (name, n), values in rows.items():
        *means, noise = torch.tensor(values).mean(0).tolist()
        noise /= torch.tensor(rows[name, DRAWS]).mean(0)[-1].item()
        found.append({"sampler": name, "scoring": n, **dict(zip(names, [*means, noise], strict=True))})
    return {"positions": sum(sample.n_valid for sample in samples), "draws": DRAWS, "points": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the texts")
    parser.add_argument("--student", required=True, help="a student's folder")
    parser.add_argument("--positions", type=int, default=2044)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.data, options.student, options.positions)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for point in found["points"]:
        print(
            "  ".join(f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in point.items())
        )


if __name__ == "__main__":
    main()
