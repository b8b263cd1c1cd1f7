"""Saving and resuming: checkpoints are sealed and checked, and a training keeps the schedule that it began with."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback, TrainerState

from selkd.errors import InputError, RunError
from selkd.files import saving
from selkd.teacher.cached import CachedTeacher
from selkd.training.arguments import DistillArguments
from selkd.training.checkpoints import ScheduleKept, stored_schedule
from selkd.training.evaluation import EvaluatingTrainer
from selkd.training.sampling import FilledSampler
from selkd.training.sealing import checkpoints_in, fault_of, last_complete_checkpoint, rotate, seal, unseal


class ResumingTrainer(EvaluatingTrainer):
    """The saving and resuming of ``DistillTrainer``."""

    teacher: Any
    train_dataset: Any  # a FilledDataset, once its rows have become samples
    _train_batch_size: int  # from the arguments, or the size that auto_find_batch_size arrived at
    _believed: Path | None = None  # the checkpoint that `last_checkpoint` found, so that it is not read twice

    def _renew(self, callback: TrainerCallback) -> None:
        self.remove_callback(type(callback))
        self.add_callback(callback)

    def _schedule(self) -> ScheduleKept:
        """What the optimiser steps see with the current batch size, accumulation and number of processes."""
        args = self.args
        sampler: FilledSampler = self._get_train_sampler()
        if len(sampler) == 0:
            raise InputError(
                f"train_dataset: {len(self.train_dataset)} samples don't fill a micro-batch of "
                f"{self._train_batch_size * args.world_size}. Give more, or a smaller batch."
            )
        cut = {
            "processes": args.world_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "per_device_train_batch_size": self._train_batch_size,
        }
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        return ScheduleKept(
            {
                "data": self.train_dataset.samples.digest,
                "teacher_cache": _cache_digest(self.teacher),
                **_arguments_schedule(args, self._train_batch_size),
                "samples_per_epoch": min(len(sampler), len(self.train_dataset)),
                "order_seed": sampler.seed,
                "sharding": None if plugin is None else plugin.state_dict_type.name,
                "cut": cut if _draws_in_forward(self.model) else None,
                "processes": args.world_size,
                "is_sealed": True,
            }
        )

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        epochs_and_steps: tuple[int, int] = super()._init_training_state(*args)
        self._renew(self._schedule())  # the checkpoint may name another number of processes
        return epochs_and_steps

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint in ``output_dir`` without a fault, by which all processes go; None: there is none.

        Those that are passed over, as they are damaged or were not written to their end, are told in the log.
        """
        self._believed = self._as_main_finds(lambda: last_complete_checkpoint(Path(self.args.output_dir)))
        return self._believed

    def _as_main_finds(self, find: Any) -> Any:
        """What ``find`` returns on the main process, for all of them: no two read the disk at the same moment."""
        answer = [find() if self.accelerator.is_main_process else None]
        return broadcast_object_list(answer)[0]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        believed, self._believed = self._believed, None
        if resume_from_checkpoint is True:
            last = self.last_checkpoint()
            if last is None:
                raise InputError(f"resume_from_checkpoint: no complete checkpoint in {self.args.output_dir}.")
            resume_from_checkpoint = str(last)
        elif resume_from_checkpoint and Path(resume_from_checkpoint) != believed:
            fault = self._as_main_finds(lambda: fault_of(Path(resume_from_checkpoint)))
            if fault is not None:
                raise InputError(
                    f"{resume_from_checkpoint}: damaged or incomplete: {fault}. Resume from another checkpoint; "
                    "resume_from_checkpoint=True takes the newest one without a fault."
                )
        if resume_from_checkpoint:
            self._require_resumable(Path(resume_from_checkpoint))
            self._finish_rotating(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _require_resumable(self, checkpoint: Path) -> None:
        """Raises InputError for a checkpoint without an optimiser, or of a training with another schedule."""
        if not any(checkpoint.glob("optimizer*")):
            raise InputError(
                f"{checkpoint}: holds no optimiser state, without which a training would begin anew and "
                "not go on. Resume from a checkpoint that was saved without save_only_model, or train from its model."
            )
        if self.train_dataset is not None:
            if self.args.auto_find_batch_size:  # the Trainer goes on with the checkpoint's
                state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
                self._train_batch_size = state.train_batch_size or self._train_batch_size
            self._schedule().require_same(checkpoint)

    def _finish_rotating(self, checkpoint: Path) -> None:
        """Remove what a training that was killed while it removed an old checkpoint left of that one.

        Where there are later ones nothing goes before the next checkpoint is there: they may be what one returns to.
        """
        if self.args.should_save and [checkpoint] == checkpoints_in(Path(self.args.output_dir))[-1:]:
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            rotate(checkpoint, self.args.save_total_limit, state.best_model_checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's; once all processes have written their parts, the main one seals it and removes old ones.

        An old checkpoint goes only when the new one can be believed.
        """
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            unseal(checkpoint)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with saving(checkpoint):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(checkpoint)
            rotate(checkpoint, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # a launcher may end all processes when the first one ends

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and (fault := self._as_main_finds(lambda: fault_of(Path(best)))) is not None:
            raise RunError(f"{best}: the best checkpoint is damaged or incomplete: {fault}.")
        super()._load_best_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's. The student is saved whole also where checkpoints are sharded, which only FSDP reads."""
        if _internal_call or not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        plugin = self.accelerator.state.fsdp_plugin
        kind = plugin.state_dict_type.name
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            super().save_model(output_dir)
        finally:
            plugin.set_state_dict_type(kind)


def _cache_digest(teacher: Any) -> str | None:
    """The digest of all that determines what a cached teacher gives; None of a live one, or of none."""
    if not isinstance(teacher, CachedTeacher):
        return None
    return xxhash.xxh3_128_hexdigest(json.dumps(dict(teacher.cache.fingerprint), sort_keys=True).encode())


def _draws_in_forward(model: nn.Module) -> bool:
    """Whether a forward of the training draws random numbers, so that how a step is cut decides which it draws."""
    modules = any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules())
    config: Any = getattr(model, "config", None)
    settings = {} if config is None else config.to_dict()
    return modules or any(
        isinstance(value, float) and value > 0 for name, value in settings.items() if "drop" in name or "jitter" in name
    )


def _arguments_schedule(args: DistillArguments, batch_size: int) -> dict[str, Any]:
    """The part of a schedule that arguments and the number of processes decide."""
    parts = args.plain_parts()
    return {
        "samples_per_step": batch_size * args.world_size * args.gradient_accumulation_steps,
        "seed": args.seed,
        **{name: parts[name] for name in ("criterion", "positions", "classes", "on_policy")},
        "precision": str(args.compute_dtype).removeprefix("torch."),
    }


def require_same_steps(args: DistillArguments) -> None:
    """Refuse before anything is loaded what resuming would refuse: arguments of other steps than the checkpoints have.

    Raises:
        InputError: the newest checkpoint in ``output_dir`` that can be read is of another schedule.
    """
    for checkpoint in reversed(checkpoints_in(Path(args.output_dir))):
        with suppress(OSError, ValueError):  # damaged: an earlier one says the same
            stored_schedule(checkpoint)
            break
    else:
        return
    ScheduleKept(_arguments_schedule(args, args.per_device_train_batch_size)).require_same(checkpoint)
