"""One distillation step against its floor (both bodies and a trivial loss), on the embedded default's real models.

    python benchmarks/step.py [--layers 8] [--batch 2] [--length 512] [--repeats 5] [--json]

Times: one process, the variants interleaved, medians after a warm-up, as ratios to the floor of the same run. Memory
(Linux): the peak resident size during the steps, in a process of its own for each variant, less the floor's.
Precision is the same for all: bfloat16 autocast over float32 student weights, bfloat16 teacher (float32 where the
machine has no bfloat16).
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selkd import load_recipe
from selkd.data.batching import collate
from selkd.data.tokenised import load_splits
from selkd.models.head import hidden_states
from selkd.models.loading import load_model, native_dtype
from selkd.models.pruning import keep_layers
from selkd.models.sources import default_cache_dir, locate
from selkd.models.tokenizers import load_tokenizer, tokenizer_fingerprint
from selkd.recipe import ClassOptions, CriterionOptions, PositionOptions
from selkd.teacher import LiveTeacher
from selkd.training.objective import Objective
from selkd.training.student import bind_distillation

Batch = dict[str, Tensor]
Step = Callable[[], None]
VARIANTS = ("floor", "full_kd_plain", "full_kd", "se_kd")
CPU = torch.device("cpu")


def load(layers: int, batch: int, length: int) -> tuple[PreTrainedModel, PreTrainedModel, Batch, torch.dtype]:
    """Teacher, a student of some of its layers, and one batch of the Python manual."""
    source, dtype = locate("demo", default_cache_dir()), native_dtype(CPU)
    teacher = load_model(source, dtype, CPU)
    n_teacher = teacher.config.num_hidden_layers
    kept = [round(i * (n_teacher - 1) / (layers - 1)) for i in range(layers)]
    student = keep_layers(load_model(source, torch.float32, CPU), kept).train()
    tokenizer = load_tokenizer(source)
    options = load_recipe("demo").data.model_copy(
        update={"max_length": length, "tokens": None, "held_out_tokens": 2**14}
    )
    train = load_splits(options, tokenizer, tokenizer_fingerprint(tokenizer), default_cache_dir()).train
    return teacher, student, collate([train[i] for i in range(batch)], int(tokenizer.pad_token_id)), dtype


def steps_of(teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch, dtype: torch.dtype) -> dict[str, Step]:
    """Each variant's forward and backward pass."""
    n_classes = teacher.config.vocab_size
    bind_distillation(student, n_classes)
    live = LiveTeacher(teacher, ClassOptions.model_validate({}), 1.0, 0, n_classes)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    autocast = partial(torch.autocast, "cpu", dtype=dtype, enabled=dtype != torch.float32)

    def backward(loss: Tensor) -> None:
        loss.backward()
        student.zero_grad(set_to_none=True)

    def floor() -> None:
        with torch.no_grad():
            hidden_states(teacher, **inputs)
        with autocast():
            loss = hidden_states(student, **inputs).float().mean()
        backward(loss)

    def full_kd_plain() -> None:
        with torch.no_grad():
            teacher_logits = teacher(**inputs, use_cache=False).logits
        with autocast():
            student_logits = student(**inputs, use_cache=False).logits
        log_q = torch.log_softmax(student_logits.float(), dim=-1)
        p = torch.softmax(teacher_logits.float(), dim=-1)
        kl = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1)
        backward(kl[batch["valid_mask"]].mean())

    def ours(positions: PositionOptions) -> None:
        objective = Objective(CriterionOptions(), positions, seed=0)
        normaliser = objective.normaliser(objective.budget(batch["valid_mask"]))
        loss = partial(objective, batch=batch, teacher=live.targets(batch, 0), step=0, normaliser=normaliser)
        with autocast():
            outputs = student(**inputs, distillation=loss)
        backward(outputs["loss"])

    return {
        "floor": floor,
        "full_kd_plain": full_kd_plain,
        "full_kd": partial(ours, PositionOptions.model_validate({"policy": "all"})),
        "se_kd": partial(ours, PositionOptions.model_validate({"fraction": 0.2})),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("batch", 2), ("length", 512), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)  # the process of one variant's memory
    options = parser.parse_args()

    teacher, student, batch, dtype = load(options.layers, options.batch, options.length)
    steps = steps_of(teacher, student, batch, dtype)
    if options.peak_of:
        steps[options.peak_of]()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
        for _ in range(2):
            steps[options.peak_of]()
        status = Path("/proc/self/status").read_text()
        print(1024 * int(status.partition("VmHWM:")[2].split()[0]))
        return

    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(options.repeats + 1):
        for name in VARIANTS:
            started = time.perf_counter()
            steps[name]()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    command = [sys.executable, __file__, *(f"--{n}={getattr(options, n)}" for n in ("layers", "batch", "length"))]
    peaks = {
        name: int(subprocess.run([*command, "--peak-of", name], capture_output=True, text=True, check=True).stdout)
        for name in VARIANTS
    }
    floor = statistics.median(seconds["floor"])
    answer = {
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."),
        "shape": {"batch": options.batch, "length": options.length, "student_layers": options.layers},
        "floor_seconds": floor,
        "variants": [
            {
                "name": name,
                "seconds": statistics.median(seconds[name]),
                "ratio_to_floor": statistics.median(seconds[name]) / floor,
                "ratio_range": [min(seconds[name]) / floor, max(seconds[name]) / floor],
                "peak_bytes_above_floor": peaks[name] - peaks["floor"],
            }
            for name in VARIANTS
        ],
    }
    if options.json:
        print(json.dumps(answer, indent=2))
        return
    print(f"{answer['device']}, {answer['dtype']}, {answer['shape']}")
    for variant in answer["variants"]:
        low, high = variant["ratio_range"]
        print(
            f"{variant['name']:14} {variant['seconds']:6.2f} s  {variant['ratio_to_floor']:.2f} x floor "
            f"({low:.2f} to {high:.2f})  {variant['peak_bytes_above_floor'] / 1e9:+.2f} GB"
        )


if __name__ == "__main__":
    main()
