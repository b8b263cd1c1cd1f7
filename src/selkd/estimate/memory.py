"""Memory by part and by stage, one device's.

Shapes: B batch, T positions, N selected positions, V classes, D hidden.
"""

from dataclasses import dataclass

import psutil
import torch

from selkd.data.collate import TOKENS_AT_ONCE
from selkd.estimate.architecture import Architecture
from selkd.estimate.body import BodyMemory, body_memory
from selkd.estimate.optimiser import optimiser_bytes
from selkd.estimate.plan import Plan
from selkd.evaluation.sample_scores import NEEDS_TEACHER
from selkd.maths.chunked import CHUNK_BYTES
from selkd.recipe.recipe import Recipe
from selkd.training.arguments import DistillArguments

# Tensors of one chunk of logits that are alive together: the student's, its gradient, what the criterion makes of both,
# and the teacher's.
_CHUNK_TENSORS = {"loss": 5, "score": 3, "draw": 4}


@dataclass(frozen=True)
class Setting:
    """What the memory depends on beside the models."""

    recipe: Recipe
    plan: Plan
    arguments: DistillArguments
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    is_cpu: bool


@dataclass(frozen=True)
class Memory:
    """Bytes. ``parts`` are those of training; ``stages`` are peaks; ``notes`` say what is rough."""

    parts: dict[str, int]
    stages: dict[str, int]
    notes: list[str]

    @property
    def peak(self) -> int:
        return max(self.stages.values())


def memory(student: Architecture, teacher: Architecture, setting: Setting) -> Memory:
    """The peaks of a run's stages and the parts of the training step.

    On a CPU memory that activations leave is not given back in time to serve gradients, so parts add up; the process
    itself counts. On an accelerator gradients grow as activations go, and only tensors count.
    """
    recipe, plan, arguments, notes = setting.recipe, setting.plan, setting.arguments, []
    shards = plan.devices if arguments.fsdp else 1
    length = min(recipe.data.max_length, max(1, round(plan.sample_tokens)))
    is_live = recipe.cache is None
    process = psutil.Process().memory_info().rss if setting.is_cpu else 0

    body = body_memory(
        student,
        plan.per_device_batch,
        length,
        setting.student_dtype,
        train=True,
        checkpointing=arguments.gradient_checkpointing,
    )
    inference = _at_once(student, setting.student_dtype, length), _at_once(teacher, setting.teacher_dtype, length)
    if not all(found.is_exact for found in (body, *inference)):
        notes.append("activations: a rule of thumb, as this architecture does not run on fake tensors")

    weights, teacher_weights = 4 * student.parameters, setting.teacher_dtype.itemsize * teacher.parameters
    optimiser, note = optimiser_bytes(arguments, student)
    notes += [note] if note else []
    gathered = _gathered(student, arguments) if shards > 1 else 0
    if arguments.fsdp:
        notes.append(_sharding(shards))
    parts = {
        "process": process,
        "student_weights": weights // shards + gathered,
        "gradients": weights // shards,
        "optimiser": optimiser // shards,
        "activations": body.activations,
        "loss": loss_bytes(student, setting, length),
        "teacher_weights": teacher_weights if is_live else 0,
        "teacher_activations": plan.per_device_batch * length * teacher.hidden * setting.teacher_dtype.itemsize
        if is_live
        else 0,
        # DDP's buckets are as large as the gradients.
        "communication": weights if plan.devices > 1 and shards == 1 else 0,
    }
    together = sum(parts.values())
    if setting.is_cpu:
        train = together
    else:
        # At the worst moment of the backward pass, or once all gradients are there.
        without = together - parts["gradients"] - parts["activations"]
        train = without + max(body.peak, parts["gradients"])
    if shards > 1:  # each process has loaded the whole student before it is sharded
        train = max(train, process + weights + weights // shards + parts["teacher_weights"])
    chunk = _chunk(setting.is_cpu)
    narrow = _compute_head(student, setting.student_dtype)
    scoring = weights + narrow + inference[0].peak + _CHUNK_TENSORS["score"] * chunk
    drawing = teacher_weights + inference[1].peak + _CHUNK_TENSORS["draw"] * chunk
    stages = {"train": train}
    if recipe.samples is not None and recipe.samples.metric != "random":
        with_teacher = recipe.samples.metric in NEEDS_TEACHER
        stages["score"] = process + scoring + (teacher_weights + inference[1].peak if with_teacher else 0)
    if not is_live:
        stages["cache"] = process + weights + drawing
    if recipe.evaluation.suite:
        stages["evaluate"] = process + scoring + drawing
    return Memory(parts, stages, notes)


def _gathered(student: Architecture, arguments: DistillArguments) -> int:
    """Weights that FSDP has whole on every device at once: the largest layer and the head, or all of them."""
    if arguments.fsdp_plugin_args["reshard_after_forward"] in (False, "shard_grad_op"):
        return 4 * student.parameters
    return 4 * (student.largest_layer + student.classes * student.hidden)


def _sharding(shards: int) -> str:
    if shards == 1:
        return "training.fsdp: planned for one process, which shards nothing; --gpus says how many there will be"
    return (
        f"training.fsdp: weights, gradients and optimiser state of the training are sharded over {shards} processes; "
        "layers are gathered whole while they run; each process loads the whole student, and so do the other stages"
    )


def loss_bytes(student: Architecture, setting: Setting, length: int) -> int:
    """The working set of the chunked loss and, for a metric that reads the head, of its scores."""
    plan = setting.plan
    head = student.classes * student.hidden
    # The head's gradient becomes the parameter's own, unless it is added to one that is there already.
    is_added = student.head_is_tied or plan.accumulation > 1
    picked = plan.per_device_batch * length * plan.largest_share
    rows = picked * student.hidden * (4 + 2 * setting.student_dtype.itemsize)
    chunk = _CHUNK_TENSORS["loss"] * _chunk(setting.is_cpu)
    chunk = min(chunk, int(_CHUNK_TENSORS["loss"] * 4 * plan.per_device_batch * length * student.classes))
    return round(_compute_head(student, setting.student_dtype) + (4 * head if is_added else 0) + rows + chunk)


def _at_once(architecture: Architecture, dtype: torch.dtype, length: int) -> BodyMemory:
    """The body without gradient on as many samples as the stages take at once."""
    return body_memory(architecture, max(1, TOKENS_AT_ONCE // length), length, dtype, train=False)


def _compute_head(student: Architecture, dtype: torch.dtype) -> int:
    return 0 if dtype == torch.float32 else student.classes * student.hidden * dtype.itemsize


def _chunk(is_cpu: bool) -> int:
    return CHUNK_BYTES["cpu" if is_cpu else "accelerator"]
