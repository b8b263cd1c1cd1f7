"""``DistillArguments``: ``transformers.TrainingArguments`` and what a recipe says about the loss."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, DynamoBackend, parse_flag_from_env
from transformers import TrainingArguments

from selkd.errors import InputError
from selkd.recipe.choices import ClassOptions, CriterionOptions, OnPolicyOptions, PositionOptions
from selkd.recipe.combinations import check_combination, check_sharded, on_policy_criterion
from selkd.recipe.data import RowOptions
from selkd.recipe.models import check_device
from selkd.recipe.part import Part, parse_part
from selkd.recipe.training import check_accelerator, check_supported
from selkd.training.objective import Objective

# How ``accelerate launch`` asks for what splits the student in other ways than data-parallel ranks and FSDP do.
_LAUNCHERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed: the loss reads the whole head, which ZeRO splits; use FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM: it splits the head, which the loss reads whole; use FSDP",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism: samples are spread over data-parallel ranks",
}
# The parts of a recipe that a training takes, by the names that both give them.
PARTS: dict[str, type[Part]] = {
    "criterion": CriterionOptions,
    "positions": PositionOptions,
    "classes": ClassOptions,
    "on_policy": OnPolicyOptions,
    "data": RowOptions,
}


@dataclass
class DistillArguments(TrainingArguments):
    """Arguments of ``DistillTrainer``: those of ``TrainingArguments``, and what a recipe says about the loss.

    What selkd can't honour of ``TrainingArguments`` is refused by name (``selkd.recipe.training.REFUSED``), whether it
    comes as an argument or from ``accelerate launch``.

    Attributes:
        criterion, positions, classes: how teacher and student are compared, and where. These and the two parts below
            are given as the recipe's parts of those names or as mappings of their keys, and are checked parts once the
            arguments are made.
        on_policy: how the student answers prompts itself; None: it learns the data's completions.
        data: what the rows of a data set hold, and how they become samples (``RowOptions``).
        rollouts_file: where some of the student's answers are written; None: ``rollouts.jsonl`` in ``output_dir``.
        teacher_device: where a live teacher is put; None: the student's device.

    Raises:
        InputError: a part that a recipe would refuse, or an argument that selkd can't honour.
    """

    # A loss that is not finite stops the training, and callbacks hold what a resumed one needs.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Always False."})
    restore_callback_states_from_checkpoint: bool = field(default=True, metadata={"help": "Always True."})
    criterion: CriterionOptions = field(
        default_factory=CriterionOptions, metadata={"help": "How teacher and student are compared."}
    )
    positions: PositionOptions = field(
        default_factory=PositionOptions, metadata={"help": "Which positions of a sample count, and how much."}
    )
    classes: ClassOptions = field(
        default_factory=lambda: ClassOptions.model_validate({}),
        metadata={"help": "Which vocabulary classes are compared."},
    )
    on_policy: OnPolicyOptions | None = field(
        default=None, metadata={"help": "How the student answers prompts itself; None: it does not."}
    )
    data: RowOptions = field(
        default_factory=lambda: RowOptions.model_validate({}),
        metadata={"help": "What rows hold, and how they become samples."},
    )
    teacher_device: str | None = field(
        default=None, metadata={"help": "Where a live teacher is put; None: the student's device."}
    )
    rollouts_file: str | None = field(default=None, metadata={"help": "Where some of the student's answers go."})

    def __post_init__(self) -> None:
        for name, reason in _LAUNCHERS.items():
            if parse_flag_from_env(name):
                raise InputError(f"{name} asks for {reason}.")
        compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
        if compiler.lower() != "no":
            raise InputError(f"ACCELERATE_DYNAMO_BACKEND={compiler} is not supported: the chunked loss isn't compiled.")
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # looked at here: bf16 would hide it
        if launched not in ("no", "bf16"):
            raise InputError(
                f"ACCELERATE_MIXED_PRECISION={launched} is not supported: gradients of single classes underflow. "
                "Launch with bf16, or no for float32."
            )
        with _told():
            check_supported(vars(self))
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """What ``__post_init__`` checks, anew where a trial of a search has changed something. Raises InputError."""
        with _told():
            check_supported(vars(self))
            check_accelerator(self.accelerator_config)
        if self.bf16 and self.mixed_precision != "bf16":
            raise InputError(
                "DistillArguments: bf16 was set when the arguments had been made, and would change nothing. Make them "
                "with bf16=True; it is no part of a search."
            )
        if self.teacher_device is not None:
            try:
                check_device(self.teacher_device)
            except ValueError as error:
                raise InputError(f"teacher_device: {error}.") from None
        for name, part in PARTS.items():
            options = getattr(self, name)
            if options is not None or name != "on_policy":
                setattr(self, name, parse_part(part, {} if options is None else options, name))
        if self.on_policy is not None:
            self.criterion = on_policy_criterion(self.criterion)
        try:
            check_combination(self.criterion, self.positions, self.classes, self.on_policy, self.data)
            if self.is_sharded:
                check_sharded(self.on_policy, has_adapters=False)  # the model is not there yet to tell
        except ValueError as error:
            raise InputError(f"{error}.") from None

    def to_dict(self) -> dict[str, Any]:
        """As ``TrainingArguments.to_dict``, the parts as plain data, for whoever logs or stores them."""
        return super().to_dict() | self.plain_parts()

    def plain_parts(self) -> dict[str, dict[str, Any] | None]:
        """Each part as plain data; None for one that is not there."""
        parts = {name: getattr(self, name) for name in PARTS}
        return {name: None if part is None else part.model_dump() for name, part in parts.items()}

    @property
    def n_gpu(self) -> int:
        """A process trains on one device: DataParallel over the others would split the loss wrongly."""
        return min(1, super().n_gpu)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP shards the student, as these arguments or the launcher say."""
        return bool(self.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the student's products, as these arguments or the launcher say."""
        return torch.bfloat16 if self.mixed_precision == "bf16" else torch.float32

    @property
    def objective(self) -> Objective:
        return Objective(self.criterion, self.positions, self.seed)


@contextmanager
def _told() -> Iterator[None]:
    """What can't be honoured, as bad input."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"DistillArguments: {error}") from None


def require_realised(state: AcceleratorState, args: DistillArguments, is_sharded: bool, has_adapters: bool) -> None:
    """What Accelerate became, wherever it was said: in arguments, by a launcher or by a state made before.

    Args:
        is_sharded: whether FSDP shards the student, as Accelerate has it.
        has_adapters: whether adapters are trained.

    Raises:
        InputError: it is no place for a training of selkd, or another one than the arguments say.
    """
    if state.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
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
        try:
            check_sharded(args.on_policy, has_adapters)
        except ValueError as error:
            raise InputError(f"{error}.") from None
