"""``DistillArguments``: ``transformers.TrainingArguments`` and the recipe's parts that decide the loss."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, DynamoBackend, parse_flag_from_env
from transformers import Trainer, TrainingArguments, get_scheduler

from selkd.errors import InputError
from selkd.recipe.choices import ClassOptions, CriterionOptions, OnPolicyOptions, PositionOptions
from selkd.recipe.combinations import (
    check_batch,
    check_combination,
    check_sharded,
    on_policy_criterion,
)
from selkd.recipe.data import RowOptions
from selkd.recipe.models import check_device
from selkd.recipe.packages import check_packages
from selkd.recipe.part import Part, parse_part
from selkd.recipe.training import check_accelerator, check_supported
from selkd.training.objective import Objective
from selkd.training.splitting import is_sharded, require_supported_split
from selkd.training.zero import require_zero

# What ``accelerate launch`` sets to split the student in another way than by data-parallel ranks or FSDP -> the reason
# why selkd refuses it.
_LAUNCHERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed, whose configuration it does not show; give DistillArguments(deepspeed=…)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM: it splits the head, which the loss reads whole; use FSDP",
}
# The recipe's parts that are arguments of a training, too.
PARTS: dict[str, type[Part]] = {
    "criterion": CriterionOptions,
    "positions": PositionOptions,
    "classes": ClassOptions,
    "on_policy": OnPolicyOptions,
    "data": RowOptions,
}


@dataclass
class DistillArguments(TrainingArguments):
    """Arguments of ``DistillTrainer``: those of ``TrainingArguments``, and the recipe's parts that decide the loss.

    Arguments of ``TrainingArguments`` that selkd can't honour are refused by name (``selkd.recipe.training.REFUSED``),
    also where ``accelerate launch`` sets them. A part is passed as the recipe's part or as a mapping of its keys.

    Attributes:
        criterion: how teacher and student are compared.
        positions: which positions of a sample count, and how much.
        classes: which vocabulary classes are compared.
        on_policy: how the student answers prompts itself; None: it learns the data's completions.
        data: what the rows of a data set hold, and how they become samples.
        teacher_device: the device of a live teacher; None: the student's device.
        save_seconds: beside what ``save_strategy`` says, a checkpoint is written when so many seconds of training have
            passed since the last one; the first process's clock decides. None: no such checkpoint.
        rollouts_file: the file for some of the student's answers; None: ``rollouts.jsonl`` in ``output_dir``.

    Raises:
        InputError: a part that a recipe would refuse, or an argument that selkd can't honour.
    """

    # A loss that is not finite stops the training, and callbacks hold what a resumed training needs.
    logging_nan_inf_filter: bool = False
    restore_callback_states_from_checkpoint: bool = True
    criterion: CriterionOptions = field(default_factory=CriterionOptions)
    positions: PositionOptions = field(default_factory=PositionOptions)
    classes: ClassOptions = field(default_factory=lambda: ClassOptions.model_validate({}))
    on_policy: OnPolicyOptions | None = None
    data: RowOptions = field(default_factory=lambda: RowOptions.model_validate({}))
    teacher_device: str | None = None
    save_seconds: float | None = None
    rollouts_file: str | None = None

    def __new__(cls, *_: Any, **kwargs: Any) -> Self:
        if beside := [name for name in RowOptions.model_fields if name in kwargs]:
            keys = ", ".join(f"{name!r}: …" for name in beside)
            raise InputError(f"DistillArguments: {', '.join(beside)} belong in data; give data={{{keys}}}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, reason in _LAUNCHERS.items():
            if parse_flag_from_env(name) and not (name == "ACCELERATE_USE_DEEPSPEED" and self.deepspeed is not None):
                raise InputError(f"{name} asks for {reason}.")
        compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
        if compiler.lower() != "no":
            raise InputError(f"ACCELERATE_DYNAMO_BACKEND={compiler} is not supported: the chunked loss isn't compiled.")
        # Checked here, before the arguments' own bf16 hides what the launcher asked for.
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched not in ("no", "bf16"):
            raise InputError(
                f"ACCELERATE_MIXED_PRECISION={launched} is not supported: gradients of single classes underflow. "
                "Launch with bf16, or no for float32."
            )
        with _as_input_error("DistillArguments: {}"):
            check_supported(vars(self))
        given = self.accelerator_config
        super().__post_init__()
        if given is None or (isinstance(given, dict) and "non_blocking" not in given):
            self.accelerator_config.non_blocking = self.dataloader_pin_memory  # the host goes on while a batch moves
        self.check()

    def check(self) -> None:
        """Check the arguments again, as after a trial of a search has changed some. Raises InputError."""
        with _as_input_error("DistillArguments: {}"):
            check_supported(vars(self))
            check_accelerator(self.accelerator_config)
        if self.bf16 and self.mixed_precision != "bf16":
            raise InputError(
                "DistillArguments: bf16 was set when the arguments had been made, and would change nothing. Make them "
                "with bf16=True; it is no part of a search."
            )
        if self.save_seconds is not None and not self.save_seconds > 0:
            raise InputError(f"save_seconds: expected above 0, or None, but got {self.save_seconds!r}.")
        if self.teacher_device is not None:
            with _as_input_error("teacher_device: {}."):
                check_device(self.teacher_device)
        for name, part in PARTS.items():
            options = getattr(self, name)
            if options is not None or name != "on_policy":
                setattr(self, name, parse_part(part, {} if options is None else options, name))
        if self.on_policy is not None:
            self.criterion = on_policy_criterion(self.criterion)
        with _as_input_error("{}."):
            check_combination(self.criterion, self.positions, self.classes, self.on_policy, self.data)
            check_batch(self.per_device_train_batch_size, self.data)
            if self.is_sharded:
                check_sharded(self.on_policy, has_adapters=False)  # the trainer checks again when it has the model
        require_supported_split(self)
        require_zero(self)

    def require_packages(self) -> None:
        """Raises InputError for an optimiser or a tracker that is not installed. Who only estimates needs neither."""
        with _as_input_error("DistillArguments: {}"):
            check_packages(vars(self))

    def try_optimiser(self) -> None:
        """Make the optimiser and the schedule for a single number; raises what torch and Transformers do if they can't.

        A value that they refuse would stop the training only when all before it is done.
        """
        self.require_packages()
        kind, options = Trainer.get_optimizer_cls_and_kwargs(self)
        optimiser = kind([torch.nn.Parameter(torch.zeros(1))], **options)
        get_scheduler(self.lr_scheduler_type, optimiser, self.get_warmup_steps(100), 100, self.lr_scheduler_kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As ``TrainingArguments.to_dict``, with the parts as plain data, for logging and storing."""
        return super().to_dict() | self.plain_parts()

    def plain_parts(self) -> dict[str, dict[str, Any] | None]:
        """Each part's name with its content as plain data; None for a part that is None."""
        parts = {name: getattr(self, name) for name in PARTS}
        return {name: None if part is None else part.model_dump() for name, part in parts.items()}

    @property
    def n_gpu(self) -> int:
        """1 at most: a process trains on one device, as DataParallel would split the loss wrongly."""
        return min(1, super().n_gpu)

    @property
    def is_sharded(self) -> bool:
        """Whether these arguments or the launcher ask FSDP to shard the student."""
        return is_sharded(self)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the student's products, which these arguments or the launcher set."""
        return torch.bfloat16 if self.mixed_precision == "bf16" else torch.float32

    @property
    def objective(self) -> Objective:
        """The loss that these arguments describe."""
        return Objective(self.criterion, self.positions, self.seed)


@contextmanager
def _as_input_error(message: str) -> Iterator[None]:
    """Turn a ValueError of the block into an InputError with its text in place of the message's ``{}``."""
    try:
        yield
    except ValueError as error:
        raise InputError(message.format(error)) from None


def require_accelerate_state(
    state: AcceleratorState, args: DistillArguments, is_sharded: bool, has_adapters: bool
) -> None:
    """Check how Accelerate was set up, be it by arguments, by a launcher or by a state made earlier.

    Args:
        is_sharded: whether Accelerate shards the student with FSDP.
        has_adapters: whether adapters are trained.

    Raises:
        InputError: selkd can't train with this set-up, or it is not the one that the arguments ask for.
    """
    if state.distributed_type in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise InputError(
            f"Accelerate was set to {state.distributed_type.value}: selkd trains on one device, with DDP or FSDP."
        )
    if state.dynamo_plugin.backend != DynamoBackend.NO:
        raise InputError(
            f"Accelerate compiles by {state.dynamo_plugin.backend.value}, and the chunked loss isn't compiled."
        )
    if str(state.mixed_precision) != ("bf16" if args.compute_dtype == torch.bfloat16 else "no"):
        raise InputError(
            f"Accelerate was set to mixed precision {state.mixed_precision}, the arguments to {args.mixed_precision}. "
            "Set both alike: bf16, or no."
        )
    if args.is_sharded and not is_sharded:
        raise InputError(
            "fsdp: Accelerate shards a student over several processes on accelerators, and here it would shard "
            "nothing. Start several processes on accelerators, or leave fsdp out."
        )
    if is_sharded:
        with _as_input_error("{}."):
            check_sharded(args.on_policy, has_adapters)
