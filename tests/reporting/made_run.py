"""A run's files written by hand, with values such as the demo's run has.

Not in conftest.py, whose name other folders share: tests import this module.
"""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

RECIPE: dict[str, Any] = {
    "teacher": {"model": "demo", "dtype": "auto"},
    "student": {"prune_from_teacher": {"layers": 20}},
    "data": {"path": "demo", "tokens": 107_000, "max_length": 256, "packing": True},
    "criterion": {"name": "forward_kl", "temperature": 1.0, "kd_weight": 1.0},
    "positions": {"metric": "student_entropy", "policy": "top_k", "fraction": 0.2, "reduction": "per_sample"},
    "classes": {"sampler": "rs_kd", "draws": 64},
    "samples": {"metric": "student_entropy", "fraction": 0.2},
    "cache": {"path": None},
    "training": {
        "learning_rate": 2.0e-4,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
    },
    "evaluation": {"suite": ["fidelity"], "every_steps": None},
    "seed": 1337,
}

TEXT = """The with statement is used to wrap the execution of a block with methods defined by a context manager. \
This allows common try…except…finally usage patterns to be encapsulated for convenient reuse.

   with_stmt: "with" ( "(" with_stmt_contents ","? ")" | with_stmt_contents ) ":" suite

The execution of the with statement with one "item" proceeds as follows: the context expression is evaluated to obtain \
a context manager, its __enter__() is loaded for later use, and its __exit__() is loaded for later use. \
If a target was included in the with statement, the return value from __enter__() is assigned to it. \
The with statement guarantees that if the __enter__() method returns without an error, then \
__exit__() will always be called."""


def example(text: str, sample_id: str) -> dict[str, Any]:
    """Tokens with scores that no model gave: a fixed mixture that looks like entropies."""
    tokens = re.findall(r" ?\w+|\s+| ?[^\w\s]", text)
    n = len(tokens)
    scores: list[float | None] = [
        round(abs(2.3 + 2.2 * math.sin(7.1 * t + len(tokens[t + 1])) - 0.25 * len(tokens[t + 1].strip())), 3)
        for t in range(n - 1)
    ]
    cut = sorted(score for score in scores if score is not None)[-math.ceil(0.2 * (n - 1))]
    selected = [score is not None and score >= cut for score in scores]
    return {
        "sample_id": sample_id,
        "tokens": tokens,
        "scores": [*scores, None],
        "selected": [*selected, False],
        "valid": [*[True] * (n - 1), False],
    }


def by_entropy(scale: float) -> list[dict[str, Any]]:
    edges, counts = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, None), (3_100, 2_600, 2_300, 3_900, 3_620, 800)
    return [
        {
            "from_nats": start,
            "to_nats": end,
            "positions": count,
            "cross_entropy_nats": 2.0,
            "teacher_cross_entropy_nats": 1.5,
            "kl_nats": scale * (0.35 + 0.16 * row),
            "top1_agreement": 0.6,
        }
        for row, (start, end, count) in enumerate(zip(edges, edges[1:], counts, strict=False))
    ]


def held_out() -> dict[str, Any]:
    """A held_out.json: a fixed mixture that looks like KL, most of it lower after training."""
    texts = []
    for number, text in enumerate(TEXT.partition("If a target")[::2]):
        tokens = re.findall(r" ?\w+|\s+| ?[^\w\s]", text)
        n = len(tokens)
        before = [round(abs(1.4 + 1.9 * math.sin(3.7 * t + number)) + 0.01, 4) for t in range(n - 1)]
        after = [round(value * (0.45 + 0.5 * abs(math.sin(1.3 * t)) ** 3), 4) for t, value in enumerate(before)]
        after[5] = before[5] + 0.4
        first = [*tokens[1:], None]
        texts.append(
            {
                "sample_id": f"{number:032x}",
                "tokens": tokens,
                "valid": [*[True] * (n - 1), False],
                "before": [*before, None],
                "after": [*after, None],
                "teacher_first": first,
                "before_first": [*[" the"] * (n - 1), None],
                "after_first": first,
            }
        )
    return {
        "nats_of": "kl",
        "is_held_out": True,
        "texts": texts,
        "new_tokens": 40,
        "continuations": [
            {
                "prompt": "The with statement is used to wrap the execution of",
                "teacher": {"text": " a block with methods defined by a context manager.", "tokens": 10, "same": 10},
                "before": {"text": " the the block of of a method", "tokens": 7, "same": 0, "same_text": ""},
                "after": {"text": " a block with a manager.", "tokens": 6, "same": 3, "same_text": " a block with"},
            }
        ],
        "why_no_teacher": None,
        "why_not_written": None,
    }


def demo_record() -> dict[str, Any]:
    influence = [round(0.03 + 0.32 * math.exp(-layer / 2) + 0.002 * layer * (layer % 3), 4) for layer in range(30)]
    dropped = set(sorted(range(30), key=lambda layer: influence[layer])[:10])
    return {
        "name": "demo",
        "recipe": copy.deepcopy(RECIPE),
        "environment": {
            "selkd": "0.1.0",
            "python": "3.11.15",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "platform": "Linux-6.8-x86_64",
            "processor": "AMD EPYC",
            "cores": 2,
            "device": "cpu",
            "precision": "bfloat16",
            "world_size": 1,
        },
        "teacher": {"model": "demo", "parameters": 134_515_008, "layers": 30, "fingerprint": "5f0c" * 8},
        "student": {
            "model": None,
            "pruned_from_teacher": {
                "kept_layers": [layer for layer in range(30) if layer not in dropped],
                "influence": influence,
            },
            "parameters": 99_113_088,
            "layers": 20,
            "fingerprint": "a91e" * 8,
        },
        "data": {"documents": 83, "train_samples": 417, "train_tokens": 106_752, "held_out_samples": 64},
        "counts": {
            "samples": 417,
            "samples_kept": 84,
            "positions_valid": 42_714,
            "positions_selected": 8_600,
            "teacher_tokens": 46_000,
        },
        "seconds": {"prepare": 21.4, "score": 91.2, "cache": 24.9, "train": 127.3, "evaluate": 48.0, "total": 316.9},
        "peak_memory_bytes": {
            "process": 3_412_000_000,
            "accelerator": None,
            "by_stage": {
                "prepare": {"process": 702_000_000, "accelerator": None},
                "score": {"process": 1_640_000_000, "accelerator": None},
                "cache": {"process": 1_210_000_000, "accelerator": None},
                "train": {"process": 3_412_000_000, "accelerator": None},
                "evaluate": {"process": 1_905_000_000, "accelerator": None},
            },
        },
        "teacher_cache": {
            "bytes": 678_000,
            "positions": 21_357,
            "bytes_per_position": 31.7,
            "fixed_width_bytes_per_position": 192,
            "full_logits_bytes_per_position": 98_304,
        },
        "fidelity": {
            "before": {"perplexity": 98.87, "kl_nats": 1.782, "top1_agreement": 0.481},
            "after": {"perplexity": 35.96, "kl_nats": 0.887, "top1_agreement": 0.624},
            "teacher": {"perplexity": 17.98},
            "positions": 16_320,
            "by_entropy": {"before": by_entropy(1.9), "after": by_entropy(1.0)},
            "standard_errors": {
                "before": {"perplexity": 3.1, "kl_nats": 0.031, "top1_agreement": 0.006},
                "after": {"perplexity": 1.1, "kl_nats": 0.017, "top1_agreement": 0.005},
            },
        },
        "train": {"steps": 22, "loss_first": 2.513, "loss_last": 1.305, "kl_nats_first": 1.91, "kl_nats_last": 0.94},
    }


def demo_metrics() -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "epoch": step / 11,
            "loss": 1.2 + 1.5 * math.exp(-step / 7) + 0.08 * math.sin(5.0 * step),
            "kd_nats": 1.2 + 1.5 * math.exp(-step / 7) + 0.08 * math.sin(5.0 * step),
            "kl_nats": 0.75 + 1.5 * math.exp(-step / 7) + 0.08 * math.sin(5.0 * step),
            "learning_rate": 2e-4 * (1 - step / 23),
            "grad_norm": 3.1,
            "selected_share": 0.2013,
            "selected_entropy_nats": 5.2 - 0.4 * (1 - math.exp(-step / 6)) + 0.05 * math.sin(3.0 * step),
            "mean_entropy_nats": 3.1 - 0.35 * (1 - math.exp(-step / 6)) + 0.05 * math.sin(2.0 * step),
            "seconds": 5.7,
        }
        for step in range(1, 23)
    ]


OVERLAP: dict[str, Any] = {
    "positions": {
        "metrics": ["student_entropy", "teacher_entropy", "kl", "ce_ratio_plus_student_entropy"],
        "overlap": [[1.0, 0.62, 0.41, 0.87], [0.62, 1.0, 0.33, 0.55], [0.41, 0.33, 1.0, None], [0.87, 0.55, None, 1.0]],
    },
    "samples": {"metrics": ["student_entropy", "kl"], "overlap": [[1.0, 0.22], [0.22, 1.0]]},
}
BENCHMARKS: dict[str, Any] = {
    "before": {"tasks": {"arc_easy": {"counts": "acc", "metrics": {"acc": {"value": 0.33, "standard_error": None}}}}},
    "after": {
        "tasks": {
            "arc_easy": {"counts": "acc", "metrics": {"acc": {"value": 0.4551, "standard_error": 0.012}}},
            "lambada": {
                "counts": "acc",
                "metrics": {
                    "acc": {"value": 0.3, "standard_error": 0.01},
                    "perplexity": {"value": 23.4, "standard_error": 1.25},
                },
            },
        },
        "paper": {"acc": {"value": 0.412, "standard_error": None}, "acc_is_the_mean_of": {"arc_easy": "raw"}},
    },
    "steps": [],
    "best": None,
}


def write_run(folder: Path, record: dict[str, Any]) -> Path:
    """A run directory with only what every run has."""
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(record["recipe"], sort_keys=False))
    return folder
