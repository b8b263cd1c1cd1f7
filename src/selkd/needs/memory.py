"""The memory of one device, by part and by stage."""

from dataclasses import dataclass

import psutil
import torch

from selkd.data.collate import TOKENS_AT_ONCE
from selkd.maths.chunked import CHUNK_BYTES
from selkd.needs.architecture import Architecture
from selkd.needs.body import inference_peak, training_memory, why_rough
from selkd.needs.optimiser import optimiser_bytes
from selkd.needs.plan import Plan
from selkd.training.arguments import DistillArguments

# How many tensors of one chunk of logits are alive together: the student's, its gradient, what the criterion makes of
# both, and the teacher's.
_CHUNK_TENSORS = {"loss": 5, "score": 3, "draw": 4}
# Bits of a weight of a linear layer, with the scales that NF4 keeps for every 64 of them.
_QUANTISED_BITS = {"torchao_int8": 8.0, "bitsandbytes_8bit": 8.0, "bitsandbytes_4bit": 4.5}


@dataclass(frozen=True)
class Memory:
    """Bytes of the training step's ``parts``, peak bytes of the ``stages``, and ``notes`` on what is rough."""

    parts: dict[str, int]
    stages: dict[str, int]
    notes: list[str]


def memory(
    student: Architecture, teacher: Architecture, plan: Plan, dtypes: tuple[torch.dtype, torch.dtype], *, is_cpu: bool
) -> Memory:
    """Count the parts of the training step and the peaks of a run's stages.

    On a CPU the memory of activations is not given back in time to serve gradients, so parts add up, and the process
    itself counts. On an accelerator gradients grow as activations go, and only tensors count.

    Args:
        dtypes: those of the student's products and of the teacher's weights.
    """
    recipe, arguments, length = plan.recipe, plan.arguments, plan.length
    shards, is_live = plan.devices if arguments.fsdp else 1, recipe.cache is None
    (dtype, teacher_dtype), chunk = dtypes, CHUNK_BYTES["cpu" if is_cpu else "accelerator"]
    body = training_memory(student, plan.batch, length, dtype, checkpointing=arguments.gradient_checkpointing)
    weights = 4 * student.parameters
    teacher_weights = weights_bytes(teacher, teacher_dtype, recipe.teacher.quantization)
    narrow_head = 0 if dtype == torch.float32 else student.vocab_size * student.hidden_size * dtype.itemsize
    optimiser, note = optimiser_bytes(arguments, student)
    parts = {
        "process": psutil.Process().memory_info().rss if is_cpu else 0,
        "student_weights": weights // shards + (_gathered(student, arguments) if shards > 1 else 0),
        "gradients": weights // shards,
        "optimiser": optimiser // shards,
        "activations": body.activations,
        "loss": narrow_head + _loss_bytes(student, plan, dtypes if is_live else (dtype,), chunk),
        "teacher_weights": teacher_weights if is_live else 0,
        "teacher_activations": plan.batch * length * teacher.hidden_size * teacher_dtype.itemsize if is_live else 0,
        # DDP's buckets are as large as the gradients.
        "communication": weights if plan.devices > 1 and shards == 1 else 0,
    }
    process, train = parts["process"], sum(parts.values())
    if not is_cpu:
        # At the worst moment of the backward pass, or once all gradients are there.
        train += max(body.peak, parts["gradients"]) - parts["gradients"] - parts["activations"]
    if shards > 1:  # each process has loaded the whole student before it is sharded
        train = max(train, process + weights + weights // shards + parts["teacher_weights"])

    samples = max(1, TOKENS_AT_ONCE // length)
    teacher_runs = teacher_weights + inference_peak(teacher, samples, length, teacher_dtype)
    scoring = weights + narrow_head + inference_peak(student, samples, length, dtype)
    scoring += _logits_bytes("score", chunk, (dtype,))
    drawing = teacher_runs + _logits_bytes("draw", chunk, (teacher_dtype,))
    stages = {"train": train}
    if plan.scores_samples:
        stages["score"] = process + scoring + (teacher_runs if plan.scores_by_teacher else 0)
    if not is_live:
        stages["cache"] = process + weights + drawing
    if recipe.evaluation.suite:
        stages["evaluate"] = process + scoring + drawing
    reasons = {"student": why_rough(student), "teacher": why_rough(teacher)}
    notes = [f"activations: a rough count of the {model}'s, as {why}" for model, why in reasons.items() if why]
    notes += [note] if note else []
    return Memory(parts, stages, notes + ([_sharding_note(shards)] if arguments.fsdp else []))


def weights_bytes(architecture: Architecture, dtype: torch.dtype, quantization: str | None) -> int:
    """Bytes of a teacher's weights. ``teacher.quantization`` narrows the linear layers of the blocks alone."""
    bits = 8 * dtype.itemsize
    narrower = 0.0 if quantization is None else bits - _QUANTISED_BITS[quantization]
    return round((bits * architecture.parameters - narrower * architecture.linear_weights) / 8)


def _gathered(student: Architecture, arguments: DistillArguments) -> int:
    """Bytes of the weights that FSDP gathers on every device at once: the largest block's and the head's, or all."""
    if arguments.fsdp_plugin_args["reshard_after_forward"] in (False, "shard_grad_op"):
        return 4 * student.parameters
    return 4 * (student.largest_block + student.vocab_size * student.hidden_size)


def _sharding_note(shards: int) -> str:
    if shards == 1:
        return "training.fsdp: planned for one process, which shards nothing; --gpus says how many there will be"
    return (
        f"training.fsdp: weights, gradients and optimiser state of the training are sharded over {shards} processes; "
        "layers are gathered whole while they run; each process loads the whole student, and so do the other stages"
    )


def _loss_bytes(student: Architecture, plan: Plan, dtypes: tuple[torch.dtype, ...], chunk: int) -> int:
    """Bytes that the chunked loss works on, including the scores of a metric that reads the head.

    Args:
        dtypes: those of the student's products and, if it is live, of the teacher's.
    """
    positions = plan.batch * plan.length
    # The head's gradient becomes the parameter's own, unless the parameter has one that it is added to.
    is_added = student.head_is_tied or plan.arguments.gradient_accumulation_steps > 1
    added = 4 * student.vocab_size * student.hidden_size if is_added else 0
    rows = positions * plan.selected_shares[1] * student.hidden_size * (4 + 2 * dtypes[0].itemsize)
    return round(added + rows) + _logits_bytes("loss", min(chunk, 4 * positions * student.vocab_size), dtypes)


def _logits_bytes(work: str, chunk: int, dtypes: tuple[torch.dtype, ...]) -> int:
    """Bytes of the logits of one chunk, whose products are in ``dtypes``: ``chunk`` is what one has in 16 bits."""
    return round(chunk * (_CHUNK_TENSORS[work] + sum(dtype.itemsize / 2 - 1 for dtype in dtypes)))
