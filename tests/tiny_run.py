"""A whole run at toy size: a teacher's folder, a text file and a recipe, made on the spot."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tiny import V, make_model, make_tokenizer


def make_teacher(folder: Path, seed: int = 0) -> Path:
    """A random Llama of 4 layers with its tokenizer."""
    make_model(seed, layers=4).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_text(path: Path, n_sections: int = 150, seed: int = 0) -> Path:
    """JSON Lines of documents of 20 to 60 words."""
    generator = np.random.default_rng(seed)
    documents = [
        " ".join(f"w{i}" for i in generator.integers(2, V, generator.integers(20, 60))) for _ in range(n_sections)
    ]
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in documents))
    return path


def make_task(folder: Path, n_rows: int = 60, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A recipe's ``data``: questions of 2 to 8 words with answers of 3 to 12, in ``folder``."""
    generator = np.random.default_rng(seed)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{i}" for i in generator.integers(2, V, generator.integers(low, high)))

    path = folder / "task.jsonl"
    rows = [{"question": words(2, 9), "answer": words(3, 13)} for _ in range(n_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "path": str(path),
        "prompt_field": "question",
        "completion_field": "answer",
        "template": "{prompt} w3 {completion}",
        "max_length": 32,
        "held_out_fraction": 0.2,
    } | changes


def make_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """SE-KD 3X on the toy teacher and text in ``folder``, which are made if they are not there."""
    teacher, text = folder / "teacher", folder / "text.jsonl"
    if not teacher.exists():
        make_teacher(teacher)
    if not text.exists():
        make_text(text)
    return {
        "name": "toy",
        "teacher": {"model": str(teacher), "dtype": "float32"},
        "student": {"prune_from_teacher": {"layers": 2}},
        "data": {"path": str(text), "max_length": 32, "held_out_fraction": 0.15},
        "positions": {"metric": "student_entropy", "policy": "top_k", "fraction": 0.2},
        "classes": {"sampler": "rs_kd", "draws": 32},
        "samples": {"metric": "student_entropy", "fraction": 0.3},
        "cache": {"path": None},
        "training": {
            "learning_rate": 0.001,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 3,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
        },
        "seed": 3,
    } | changes
