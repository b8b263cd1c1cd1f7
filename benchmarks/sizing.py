"""What fits on which accelerators, by ``selkd estimate``: ``python benchmarks/sizing.py [TEACHER:STUDENT ...]``.

Prints the two tables of docs/sizing.md. The models have the sizes of ``shapes.json``; nothing is downloaded, and no
model takes memory. Every figure is an estimate: none of these runs was made.
"""

import json
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoConfig

from selkd.estimate.estimate import estimate
from selkd.recipe.files import load_recipe

SHAPES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "shapes.json").read_text(encoding="utf-8"))
PAIRS = {
    "Qwen3-8B": ["Qwen3-0.6B", "Qwen3-1.7B"],
    "Qwen3-14B": ["Qwen3-4B"],
    "Qwen3-32B": ["Qwen3-8B"],
    "Llama-3.1-8B": ["Llama-3.2-1B", "Llama-3.2-3B"],
    "Llama-3.1-70B": ["Llama-3.1-8B"],
    "Gemma-3-4B": ["Gemma-3-1B"],
    "Gemma-3-12B": ["Gemma-3-4B"],
    "Gemma-3-27B": ["Gemma-3-4B"],
}
MACHINES = {"24 GB": (1, 24), "48 GB": (1, 48), "80 GB": (1, 80), "8 x 80 GB": (8, 80)}  # devices, GB of each
SPARE = 0.93  # the share of a device's memory that tensors may take: its context and fragmentation take the rest
SPARING = ["training.optim=adamw_bnb_8bit", "training.gradient_checkpointing=true"]
# From the plainest to the most sparing: the first that fits is shown. With a cache, no stage has the teacher beside the
# student's gradients.
WAYS: dict[str, tuple[str, list[str]]] = {
    "live": ("se_kd", []),
    "live, sparing": ("se_kd", SPARING),
    "3X": ("se_kd_3x", []),
    "3X, sparing": ("se_kd_3x", SPARING),
    "3X, sparing, NF4": ("se_kd_3x", [*SPARING, "teacher.quantization=bitsandbytes_4bit"]),
}
TIMED = ["se_kd", "se_kd_3x"]
OPERATIONS_PER_SECOND = 1e14  # of one device: about a third of what an A100 or a 4090 has in bfloat16 at best


def main() -> None:
    asked = [tuple(argument.split(":")) for argument in sys.argv[1:]]
    pairs = asked or [(teacher, student) for teacher, students in PAIRS.items() for student in students]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        rows = [(teacher, student, *row(folder, teacher, student)) for teacher, student in pairs]
    print(table(["teacher → student", *MACHINES], ([f"{t} → {s}", *fits] for t, s, fits, _ in rows)))
    print()
    heads = ["teacher → student", *(f"`{recipe}`" for recipe in TIMED)]
    print(table(heads, ([f"{t} → {s}", *hours] for t, s, _, hours in rows)))


def row(folder: Path, teacher: str, student: str) -> tuple[list[str], list[str]]:
    """Of a pair: what fits on each of ``MACHINES``, and the hours of ``TIMED`` on one device."""
    models = [f"teacher.model={written(folder, teacher)}", f"student.model={written(folder, student)}"]
    fits = []
    for devices, gigabytes in MACHINES.values():
        sharded = ["training.fsdp=full_shard"] if devices > 1 else []
        peaks = ((way, peak(recipe, [*models, *more, *sharded], devices)) for way, (recipe, more) in WAYS.items())
        fits.append(next((f"{way}: {size:.0f} GB" for way, size in peaks if size <= SPARE * gigabytes), "–"))
    operations = [
        estimate(load_recipe(recipe, models), gpus=1)["floating_point_operations"]["total"] for recipe in TIMED
    ]
    return fits, [f"{total / OPERATIONS_PER_SECOND / 3600:.1f} h" for total in operations]


def peak(recipe: str, settings: list[str], devices: int) -> float:
    """The peak of a run on each of the devices, GB."""
    return float(estimate(load_recipe(recipe, settings), gpus=devices)["memory_bytes"]["peak"]) / 1e9


def written(folder: Path, name: str) -> Path:
    """A folder with the model's configuration and nothing else, which is all that an estimate reads."""
    if not (folder / name).exists():
        AutoConfig.for_model(**SHAPES[name]).save_pretrained(folder / name)
    return folder / name


def table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
