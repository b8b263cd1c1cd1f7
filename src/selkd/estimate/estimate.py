"""``estimate`` answers with the counts, memory and, after a probe, time and cache bytes of a whole run."""

from pathlib import Path
from typing import Any

import torch

from selkd.errors import InputError
from selkd.estimate.probe import probe
from selkd.models.loading import resolve_dtype
from selkd.models.sources import default_cache_dir
from selkd.needs.architecture import Architecture, find_files, teacher_and_student
from selkd.needs.cache_size import MEASURED, SOURCE, typical_bytes
from selkd.needs.memory import Memory, memory
from selkd.needs.plan import Plan, make_plan, tokens_to_plan
from selkd.recipe.evaluation import benchmarks_of
from selkd.recipe.foreign import require_model_here
from selkd.recipe.recipe import Recipe
from selkd.run.workspace import Workspace

Rates = dict[str, float | None]


def estimate(
    recipe: Recipe, *, gpus: int | None = None, tokens: int | None = None, with_probe: bool = False
) -> dict[str, Any]:
    """Estimate what a run of ``recipe`` needs.

    Args:
        gpus: how many accelerators to plan for, computing in bfloat16; None plans for this machine's device.
        tokens: how many training tokens to plan for; None takes the recipe's.
        with_probe: whether to run a few steps here to measure step time, speed of the stages and bytes of the cache.

    Returns:
        The answer of ``selkd estimate --json``: plain data.

    Raises:
        InputError: ``distill`` would refuse the models or the text, or a CPU is to be probed for accelerators.
    """
    require_model_here(recipe.teacher)
    cache_dir = default_cache_dir()
    teacher_source = find_files(recipe.teacher.model, cache_dir)  # tokenising needs its tokenizer alone
    student_source = None if recipe.student.model is None else find_files(recipe.student.model, cache_dir)
    work = Workspace(
        recipe, Path("runs"), teacher_source=teacher_source, student_source=student_source
    )  # writes nothing
    is_cpu = work.device.type == "cpu" and gpus is None
    if gpus is not None and with_probe and work.device.type == "cpu":
        raise InputError("--probe: it measures this machine's device, a CPU, and --gpus plans accelerators. Leave one.")
    teacher, student = teacher_and_student(recipe, teacher_source, student_source)
    planned = tokens_to_plan(recipe, tokens)
    text = work.splits if planned is None else planned
    plan = make_plan(recipe, work.arguments, gpus or work.state.num_processes, text)
    needed = memory(student, teacher, plan, _dtypes(work, is_cpu), is_cpu=is_cpu)
    rates = probe(recipe) if with_probe else None
    return {
        "recipe": recipe.name,
        "device": "cpu" if is_cpu else "accelerator",
        "devices": plan.devices,
        "parameters": {"teacher": teacher.parameters, "student": student.parameters},
        "data": {
            "samples": plan.samples,
            "samples_kept": plan.samples_kept,
            "train_tokens": plan.train_tokens,
            "held_out_tokens": plan.held_out_tokens,
        },
        "training": {
            "steps": plan.steps,
            "epochs": plan.epochs,
            "samples_per_step": plan.samples_per_step,
            "tokens": plan.trained_tokens,
            "positions_selected_share": plan.selected_shares[0],
        },
        "memory_bytes": {
            "of": "process" if is_cpu else "accelerator",
            "training_parts": needed.parts,
            "stages": needed.stages,
            "peak": max(needed.stages.values()),
        },
        "teacher_tokens": plan.teacher_tokens,
        "teacher_cache": _cache(plan, rates),
        "floating_point_operations": _operations(plan, student, teacher),
        "seconds": None if rates is None else _seconds(plan, rates),
        "probe": rates,
        "notes": _notes(plan, needed, gpus, is_probed=with_probe),
    }


def _dtypes(work: Workspace, is_cpu: bool) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the student's products and of the teacher's weights."""
    if is_cpu or work.device.type != "cpu":
        return work.dtype, work.teacher_dtype
    # The accelerators are not here: assume bfloat16 unless the recipe says otherwise.
    name = work.recipe.teacher.dtype
    teacher = resolve_dtype("bfloat16" if name == "auto" else name, work.device)
    return torch.bfloat16 if work.recipe.training.get("bf16", True) else torch.float32, teacher


def _cache(plan: Plan, rates: Rates | None) -> dict[str, Any] | None:
    if plan.recipe.cache is None:
        return None
    measured, classes = (rates or {}).get("cache_bytes_per_position"), plan.recipe.classes
    assert classes.draws is not None, "a cache holds drawn classes"
    size = typical_bytes(plan.recipe) if measured is None else measured
    return {
        "positions": plan.cached_positions,
        "bytes": round(size * plan.cached_positions),
        "bytes_per_position": size,
        "is_measured": measured is not None,
    }


def _operations(plan: Plan, student: Architecture, teacher: Architecture) -> dict[str, float]:
    """Count 2 operations a parameter and token forward, 6 forward and backward; the head counts as run in full."""
    forward = plan.evaluated_tokens + (plan.train_tokens if plan.scores_samples else 0)
    by_student = student.parameters * (6.0 * plan.trained_tokens + 2.0 * forward)
    by_teacher = 2.0 * teacher.parameters * plan.teacher_tokens["total"]
    return {"student": by_student, "teacher": by_teacher, "total": by_student + by_teacher}


def _seconds(plan: Plan, rates: Rates) -> dict[str, float | None]:
    """Seconds of each stage on all devices together, from one device's speed, without loading and tokenising."""

    def stage(name: str, tokens: int) -> float | None:
        rate = rates[f"{name}_tokens_per_second"]
        return None if rate is None else tokens / rate / plan.devices

    step = rates["step_seconds"]
    assert step is not None, "every recipe trains"
    by_stage = {
        "score": stage("score", plan.train_tokens),
        "cache": stage("cache", plan.kept_tokens),
        "train": plan.steps * step,
        "evaluate": stage("evaluate", plan.evaluated_tokens),
    }
    return {"step": step, **by_stage, "total": sum(value or 0.0 for value in by_stage.values())}


def _notes(plan: Plan, needed: Memory, gpus: int | None, *, is_probed: bool) -> list[str]:
    """Say what the answer leaves out or takes for granted."""
    recipe, sampler = plan.recipe, plan.recipe.classes.sampler
    stand_in = "" if sampler in MEASURED else f"{sampler} is taken for rs_kd; "
    benchmarks = benchmarks_of([name for name in recipe.evaluation.suite if name != "fidelity"])
    notes = {
        "time: not known without --probe, which runs a few steps here": not is_probed,
        f"cache bytes: {stand_in}as measured of {SOURCE}; other text or teachers differ, --probe measures them": (
            not is_probed and recipe.cache is not None
        ),
        "time: one device's, divided by their number; communication is not counted": is_probed and plan.devices > 1,
        f"time: the benchmarks ({', '.join(benchmarks)}) are not counted, and may take longer than the rest": (
            is_probed and bool(benchmarks)
        ),
        "memory: tensors on one accelerator; its context and fragmentation take some more": gpus is not None,
        "on_policy: the answers' key-value cache is not counted, and "
        + ("the probed step's time includes generating them" if is_probed else "the time to generate them neither")
        + "; steps and tokens are counted as if the data's completions were learned": recipe.on_policy is not None,
        "student.lora: counted as if every weight were trained; adapters need less": recipe.student.lora is not None,
        "teacher.device: the teacher is counted on the student's device": recipe.teacher.device is not None,
    }
    if recipe.samples is not None:
        notes[f"scoring by {recipe.samples.metric} runs the teacher over every sample"] = plan.scores_by_teacher
    return needed.notes + [note for note, holds in notes.items() if holds]
