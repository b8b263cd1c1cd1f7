"""``DistillArguments``: ``transformers.TrainingArguments`` and what a recipe says about the loss."""

import re
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from selkd.errors import InputError
from selkd.recipe import check_parts, on_policy_criterion, parse_part
from selkd.recipe_choices import ClassOptions, CriterionOptions, PositionOptions
from selkd.recipe_data import DataOptions
from selkd.recipe_models import check_device
from selkd.recipe_on_policy import OnPolicyOptions
from selkd.training.objective import Objective

_DATA_KEY = re.compile(rf"(?<![\w./'-])data\.(?=(?:{'|'.join(DataOptions.model_fields)})\b)")


@dataclass
class DistillArguments(TrainingArguments):
    """Arguments of ``DistillTrainer``.

    Attributes:
        criterion, positions, classes: the recipe's parts of those names, as mappings; checked here.
        on_policy: the recipe's part of that name; None: the student doesn't answer. It needs prompts, and
            ``packing=False``.
        rollouts_file: where some of its answers are written; None: ``rollouts.jsonl`` in ``output_dir``.
        teacher_device: where a live teacher is put; None: the student's device.
        max_length, packing, text_field, prompt_field, completion_field, messages_field, template, loss_on: how the rows
            of a data set become samples, as the recipe's ``data`` says; none of the fields: ``text_field`` is ``text``.

    Raises:
        InputError: a part that a recipe would refuse.
    """

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
        super().__post_init__()
        if self.fp16 or self.deepspeed:
            raise InputError(
                "DistillArguments: fp16 and deepspeed are not supported (gradients of single classes underflow in "
                "float16; ZeRO splits the head that the loss reads whole). Use bf16, and fsdp."
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
        try:
            criterion = criterion if self.on_policy is None else on_policy_criterion(criterion)
            check_parts(criterion, positions, classes)
        except ValueError as error:
            raise InputError(str(error)) from None
        self._check_rows()
        self.criterion, self.positions = criterion.model_dump(), positions.model_dump()
        self.classes = classes.model_dump()
        self.remove_unused_columns = False
        self.prediction_loss_only = True
        self.label_names = ["targets"]
        self.restore_callback_states_from_checkpoint = True
        self.logging_nan_inf_filter = False

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


def of_arguments(error: InputError) -> InputError:
    """A recipe's refusal of its ``data`` in the names of these arguments, which don't stand below ``data``."""
    said, listed, columns = str(error).partition("; it has ")  # a row's own fields keep their names
    return InputError(_DATA_KEY.sub("", said) + listed + columns)


def require_one_device(args: TrainingArguments) -> None:
    """Raises InputError where one process would train on several GPUs: DataParallel splits the loss wrongly."""
    if args.n_gpu > 1:
        raise InputError(
            f"{args.n_gpu} GPUs in one process would train with DataParallel, which splits the loss wrongly. "
            f"Start one process a GPU (torchrun --nproc-per-node {args.n_gpu}), or show one (CUDA_VISIBLE_DEVICES)."
        )
