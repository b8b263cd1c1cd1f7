"""Trainings that are killed and go on, for tests in this process and, as a script, for each of several.

As a script, started by torchrun: ``resuming.py OUT JOBS_JSON``. A job trains ``cases`` into ``folder``, with
``changes`` of arguments, under FSDP2 with the configuration ``sharded``; each ends before the update of ``kill_step``,
and the process by ``signal``.
"""

import gc
import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from tiny import V, make_arguments, make_model, make_prompts, make_samples, make_tokenizer
from torch.distributed.fsdp import CPUOffloadPolicy

from selkd import DistillTrainer, TeacherCache
from selkd.data.samples import SampleDataset
from selkd.models.adapters import with_adapters
from selkd.recipe.choices import ClassOptions
from selkd.recipe.models import LoraOptions
from selkd.teacher.build_cache import build_cache
from selkd.teacher.live import LiveTeacher
from selkd.training.sealing import last_complete_checkpoint

ENTROPY = {"metric": "student_entropy", "fraction": 0.4}
DRAWN = {"sampler": "rs_kd", "draws": 6}
# What is trained: a recipe's parts, arguments, and what is made beside them.
CASES: dict[str, dict[str, Any]] = {
    "all": {"positions": {"policy": "all"}},
    "top_k": {"positions": ENTROPY},
    "random": {"positions": {"policy": "random", "fraction": 0.4}},
    "gls": {"positions": {"policy": "gls", "fraction": 0.4, "queue_size": 90}},
    "curriculum": {"positions": {"policy": "curriculum", "fraction": 0.4, "curriculum_steps": 0.7}},
    "pos_rs": {"positions": {"policy": "pos_rs", "fraction": 0.4}},
    "pos_rs_corrected": {"positions": {"policy": "pos_rs_corrected", "metric": "kl", "fraction": 0.4, "skip_first": 1}},
    "weighted": {"positions": {"policy": "weighted", "metric": "kl"}},
    "pos_rs_corrected, cached": {
        "positions": {"policy": "pos_rs_corrected", "fraction": 0.4}, "classes": DRAWN, "cached": True,
    },
    "scheduled": {"positions": {**ENTROPY, "fraction": {"from": 1.0, "to": 0.2, "shape": "cosine"}}},
    "two_stage": {"positions": {**ENTROPY, "scoring": "two_stage", "frequent_classes": 20, "tail_classes": 20}},
    "per_position": {"positions": {**ENTROPY, "reduction": "per_position"}},
    "rs_kd": {"classes": DRAWN},
    "systematic": {"classes": {"sampler": "systematic", "draws": 6}},
    "top_k classes": {"classes": {"sampler": "top_k", "draws": 6}},
    "cached": {"classes": DRAWN, "positions": ENTROPY, "cached": True},
    "kl of a cache": {
        "classes": {"sampler": "systematic", "draws": 6}, "cached": True,
        "positions": {"metric": "kl", "fraction": 0.4},
    },
    "cached, read by workers": {
        "classes": DRAWN, "cached": True, "dataloader_num_workers": 2, "dataloader_persistent_workers": True,
    },
    "accumulated": {"positions": ENTROPY, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "bfloat16": {"positions": ENTROPY, "bf16": True},
    "a head kept for two micro-batches": {
        "positions": ENTROPY, "bf16": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
    },
    "a head kept beside adapters": {
        "positions": ENTROPY, "bf16": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
        "lora": {"rank": 4},
    },
    "dropout": {"positions": ENTROPY, "attention_dropout": 0.3},
    "adapters": {"positions": ENTROPY, "lora": {"dropout": 0.2, "rank": 4}},
    "on-policy": {"on_policy": {"max_new_tokens": 6, "fraction": 0.6}, "criterion": {"name": "reverse_kl"}},
    "in the data's order": {"train_sampling_strategy": "sequential", "data_seed": 5},
}  # fmt: skip
EPOCHS = 3


def make_trainer(case: str, out: Path, shared: Path, **changes: Any) -> DistillTrainer:
    """A training of 3 epochs of 4 optimiser steps (in one process), with a checkpoint every two steps.

    Args:
        out: the checkpoints' folder.
        shared: where a teacher's cache is built, if it is not there.
    """
    options = {
        "max_steps": -1, "num_train_epochs": EPOCHS, "per_device_train_batch_size": 2, "optim": "adamw_torch",
        "learning_rate": 1e-2, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 2,
        "dataloader_pin_memory": False, **CASES[case], **changes,
    }  # fmt: skip
    is_cached, lora = options.pop("cached", False), options.pop("lora", None)
    student = make_model(1, attention_dropout=options.pop("attention_dropout", 0.0))
    if lora is not None:
        student = with_adapters(student, LoraOptions(**lora), 3)
    samples = make_samples(7)
    if options.get("on_policy") is not None:
        samples = SampleDataset.from_samples(make_prompts(7))
        options |= {"prompt_field": "q", "completion_field": "a", "packing": False}
    teacher: Any = make_model(0, layers=3)
    if is_cached:
        drawn, folder = options["classes"], shared / f"cache of {options['classes']['sampler']}"
        fingerprint = {**drawn, "temperature": 1.0, "vocabulary": V, "seed": 11, "scalars": 2}
        live = LiveTeacher(make_model(0, layers=3), ClassOptions.model_validate(drawn), 1.0, 11, V)
        build_cache(folder, fingerprint, samples, lambda: live, 1)
        teacher = TeacherCache.open(folder)
    arguments = make_arguments(out, **options)
    if arguments.is_sharded:  # Accelerate shards on accelerators only; FSDP2 itself runs on CPUs, too
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = DistillTrainer(student, teacher, arguments, samples, processing_class=make_tokenizer())
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.cpu_offload:
        trainer.accelerator.state.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # an accelerator pins
    return trainer


class Killed(BaseException):
    """Stands for the end of a process: nothing in the trainer may catch it."""


def kill_at(trainer: DistillTrainer, step: int, place: str) -> None:
    """Let the training end at an optimiser step: in its last micro-batch, before the update, or while saving it."""

    def ends(*_: Any, **__: Any) -> None:
        raise Killed

    original = trainer.training_step

    def training_step(*arguments: Any, **options: Any) -> Any:
        loss = original(*arguments, **options)
        if trainer.state.global_step == step and place == "step":
            ends()
        if trainer.state.global_step >= step and place == "save":
            trainer._save_optimizer_and_scheduler = ends  # the model is written, the rest is not
        return loss

    trainer.training_step = training_step  # type: ignore[method-assign]


def go_on(trainer: DistillTrainer) -> None:
    """Train from the newest whole checkpoint, or from the start where there is none."""
    has_checkpoint = last_complete_checkpoint(Path(trainer.args.output_dir)) is not None
    trainer.train(resume_from_checkpoint=True if has_checkpoint else None)


def result_of(trainer: DistillTrainer) -> dict[str, Any]:
    """Everything that must be the same: the student, the counts, the queue, what was logged of each step."""
    clock = ("seconds", "runtime", "per_second", "flos")
    logs = [
        {name: value for name, value in line.items() if not any(word in name for word in clock)}
        for line in trainer.state.log_history
        if "loss" in line
    ]
    student = {name: whole(p).detach().clone() for name, p in trainer.model.named_parameters()}
    return {
        "student": student,
        "logs": logs,
        "totals": dict(vars(trainer.totals)),
        "queue": None if trainer.queue is None else trainer.queue.scores.tolist(),
        "rollouts": None if trainer.answering is None else {**trainer.rollouts.figures(), "seconds": None},
    }


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def kill_seed() -> int:
    """Drawn anew, unless ``SELKD_KILL_SEED`` says it. It is printed, and pytest shows what a failed test printed."""
    seed = int(os.environ.get("SELKD_KILL_SEED", random.SystemRandom().randrange(10**6)))
    print(f"SELKD_KILL_SEED={seed}")
    return seed


def _train_all(out: Path, job: dict[str, Any]) -> Iterator[tuple[str, DistillTrainer]]:
    """The trainings of a job, one after another; those that are killed give nothing."""
    changes = {"ddp_backend": "gloo", "save_steps": 1, **job.get("changes", {})}
    if "sharded" in job:
        layers = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        changes |= {"fsdp": "full_shard", "fsdp_config": layers | job["sharded"]}
    for case in job["cases"]:
        trainer = make_trainer(case, out / job["folder"] / case, out, **changes)
        if "kill_step" in job:
            kill_at(trainer, job["kill_step"], "step")
        try:
            go_on(trainer)
        except Killed:
            continue
        yield case, trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # as conftest.py does
    folder = Path(sys.argv[1])
    for job in json.loads(sys.argv[2]):
        for name, done in _train_all(folder, job):
            found = result_of(done)
            if done.is_fsdp_enabled:
                done.save_model(str(folder / f"{job['folder']} {name}, saved"))
            if done.is_world_process_zero():
                save_file(found.pop("student"), folder / f"{job['folder']} {name}.safetensors")
                (folder / f"{job['folder']} {name}.json").write_text(json.dumps(found))
        if job.get("signal"):  # the end of one rank, which takes the others along
            os.kill(os.getpid(), signal.SIGKILL)
