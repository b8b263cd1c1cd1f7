"""``DistillArguments``: ``transformers.TrainingArguments`` and what a recipe says about the loss."""

import os
import re
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
from selkd.recipe.data import DataOptions
from selkd.recipe.models import check_device
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import check_parts, on_policy_criterion
from selkd.recipe.training import check_accelerator, check_supported
from selkd.training.objective import Objective

# How ``accelerate launch`` asks for what splits the student in other ways than data-parallel ranks and FSDP do.
_LAUNCHERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed: the loss reads the whole head, which ZeRO splits; use FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM: it splits the head, which the loss reads whole; use FSDP",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism: samples are spread over data-parallel ranks",
}
_DATA_KEY = re.compile(rf"(?<![\w./'-])data\.(?=(?:{'|'.join(DataOptions.model_fields)})\b)")


@dataclass
class DistillArguments(TrainingArguments):
    """Arguments of ``DistillTrainer``: those of ``TrainingArguments``, and what a recipe says about the loss.

    What selkd can't honour of ``TrainingArguments`` is refused by name (``selkd.recipe.training.REFUSED``), whether it
    comes as an argument or from ``accelerate launch``.

    Attributes:
        criterion, positions, classes: the recipe's parts of those names, as mappings; checked here.
        on_policy: the recipe's part of that name; None: the student doesn't answer. It needs prompts, and
            ``packing=False``.
        rollouts_file: where some of its answers are written; None: ``rollouts.jsonl`` in ``output_dir``.
        teacher_device: where a live teacher is put; None: the student's device.
        max_length, packing, text_field, prompt_field, completion_field, messages_field, template, loss_on: how the rows
            of a data set become samples, as the recipe's ``data`` says; none of the fields: ``text_field`` is ``text``.

    Raises:
        InputError: a part that a recipe would refuse, or an argument that selkd can't honour.
    """

    # A loss that is not finite stops the training, and callbacks hold what a resumed one needs.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "always False"})
    restore_callback_states_from_checkpoint: bool = field(default=True, metadata={"help": "always True"})
    criterion: dict[str, Any] | None = field(default=None, metadata={"help": "the recipe's criterion"})
    positions: dict[str, Any] | None = field(default=None, metadata={"help": "the recipe's positions"})
    classes: dict[str, Any] | None = field(default=None, metadata={"help": "the recipe's classes"})
    on_policy: dict[str, Any] | None = field(default=None, metadata={"help": "the recipe's on_policy"})
    teacher_device: str | None = field(default=None, metadata={"help": "where a live teacher is put"})
    rollouts_file: str | None = field(default=None, metadata={"help": "where some answers are written"})
    max_length: int = field(default=512, metadata={"help": "tokens of a sample at most"})
    packing: bool = field(default=True, metadata={"help": "fill samples with several documents"})
    text_field: str | None = field(default=None, metadata={"help": "the rows' field of a text"})
    prompt_field: str | None = field(default=None, metadata={"help": "the rows' field of a prompt"})
    completion_field: str | None = field(default=None, metadata={"help": "the rows' field of its completion"})
    messages_field: str | None = field(default=None, metadata={"help": "the rows' field of a conversation"})
    template: str | None = field(default=None, metadata={"help": "chat, or a text with {prompt} and {completion}"})
    loss_on: str | None = field(default=None, metadata={"help": "completions, or all"})

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
        criterion = parse_part(CriterionOptions, self.criterion or {}, "criterion")
        positions = parse_part(PositionOptions, self.positions or {}, "positions")
        classes = parse_part(ClassOptions, self.classes or {}, "classes")
        if self.on_policy is not None:
            self.on_policy = parse_part(OnPolicyOptions, self.on_policy, "on_policy").model_dump()
            if self.is_sharded:
                raise InputError("on_policy: a student sharded by FSDP does not generate; use one GPU, or DDP.")
        try:
            criterion = criterion if self.on_policy is None else on_policy_criterion(criterion)
            check_parts(criterion, positions, classes)
        except ValueError as error:
            raise InputError(str(error)) from None
        self._check_rows()
        self.criterion, self.positions = criterion.model_dump(), positions.model_dump()
        self.classes = classes.model_dump()

    def _check_rows(self) -> None:
        """Raises InputError for fields that don't go together, in the words of a recipe less its ``data.``."""
        try:
            options = self.data_options("train_dataset")
        except InputError as error:
            raise of_arguments(error) from None
        if self.on_policy is None and options.is_prompt_only:
            raise InputError(
                "completion_field: without completions there is nothing to learn from; give it, or let the student "
                "answer (on_policy={})."
            )
        if self.on_policy is not None and self.loss_on == "all":
            raise InputError("loss_on: all learns prompts, and on_policy what the student answers; leave it out.")

    def data_options(self, name: str) -> DataOptions:
        """How the rows of ``name`` (train_dataset, eval_dataset) become samples. Raises InputError as a recipe."""
        names = ("text_field", "prompt_field", "completion_field", "messages_field", "template", "loss_on")
        given = {key: getattr(self, key) for key in (*names, "max_length", "packing")}
        return parse_part(DataOptions, {"path": name, **given}, "data")

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
        return Objective(
            CriterionOptions.model_validate(self.criterion),
            PositionOptions.model_validate(self.positions),
            self.seed,
        )

    @property
    def on_policy_options(self) -> OnPolicyOptions | None:
        return None if self.on_policy is None else OnPolicyOptions.model_validate(self.on_policy)

    @property
    def class_options(self) -> ClassOptions:
        return ClassOptions.model_validate(self.classes)


@contextmanager
def _told() -> Iterator[None]:
    """What can't be honoured, as bad input."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"DistillArguments: {error}") from None


def of_arguments(error: InputError) -> InputError:
    """A recipe's refusal of its ``data`` in the names of these arguments, which don't stand below ``data``."""
    said, listed, columns = str(error).partition("; it has ")  # a row's own fields keep their names
    return InputError(_DATA_KEY.sub("", said) + listed + columns)


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
    if is_sharded and has_adapters:
        raise InputError("fsdp: adapters are trained on one GPU or with DDP.")
    if is_sharded and args.on_policy is not None:
        raise InputError("on_policy: a student sharded by FSDP does not generate; use one GPU, or DDP.")
