"""``estimate``: counts, memory and, after a probe, time and cache bytes of a whole run, as plain data."""

from pathlib import Path
from typing import Any

import torch

from selkd.errors import InputError
from selkd.estimate.architecture import Architecture, describe, find, student_config
from selkd.estimate.cache_size import MEASURED, SOURCE, typical_bytes
from selkd.estimate.memory import Memory, Setting, memory
from selkd.estimate.plan import Plan, make_plan, teacher_tokens
from selkd.estimate.probe import Rates, probe
from selkd.evaluation.sample_scores import NEEDS_TEACHER
from selkd.models.loading import read_config, resolve_dtype
from selkd.models.sources import default_cache_dir
from selkd.recipe.evaluation import benchmarks_of
from selkd.recipe.recipe import Recipe
from selkd.run.workspace import Workspace


def estimate(
    recipe: Recipe, *, gpus: int | None = None, tokens: int | None = None, with_probe: bool = False
) -> dict[str, Any]:
    """What ``recipe`` needs.

    Args:
        gpus: plan for so many accelerators that compute in bfloat16; None: for this machine's device.
        tokens: plan for so many training tokens; None: for the recipe's.
        with_probe: run a few steps here to measure step time, speed of the stages and bytes of the cache.

    Raises:
        InputError: what ``distill`` refuses of models and text; a probe on a CPU for a plan of accelerators.
    """
    cache_dir = default_cache_dir()
    source = find(recipe.teacher.model, cache_dir)  # tokenising needs its tokenizer alone
    student_source = None if recipe.student.model is None else find(recipe.student.model, cache_dir)
    work = Workspace(recipe, Path("runs"), teacher_source=source, student_source=student_source)  # writes nothing there
    is_cpu = work.device.type == "cpu" and gpus is None
    if gpus is not None and with_probe and work.device.type == "cpu":
        raise InputError("--probe: it measures this machine's device, a CPU, and --gpus plans accelerators. Leave one.")
    teacher_config = read_config(source)
    teacher = describe(teacher_config)
    student = describe(student_config(recipe, teacher_config, cache_dir))
    plan = make_plan(recipe, work, gpus or work.state.num_processes, tokens)
    setting = _setting(recipe, work, plan, is_cpu)
    needed = memory(student, teacher, setting)
    rates = probe(recipe) if with_probe else None
    queries = teacher_tokens(recipe, plan)
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
            "positions_selected_share": plan.selected_share,
        },
        "memory_bytes": {
            "of": "process" if is_cpu else "accelerator",
            "training_parts": needed.parts,
            "stages": needed.stages,
            "peak": needed.peak,
        },
        "teacher_tokens": queries,
        "teacher_cache": _cache(recipe, plan, rates),
        "floating_point_operations": _operations(recipe, plan, student, teacher, queries["total"]),
        "seconds": None if rates is None else _seconds(recipe, plan, rates),
        "probe": None if rates is None else vars(rates),
        "notes": _notes(recipe, plan, needed, rates, gpus),
    }


def _setting(recipe: Recipe, work: Workspace, plan: Plan, is_cpu: bool) -> Setting:
    if is_cpu or work.device.type != "cpu":
        student, teacher = work.dtype, work.teacher_dtype
    else:  # accelerators that are not here: what they compute in unless the recipe says otherwise
        student = torch.bfloat16 if recipe.training.get("bf16", True) else torch.float32
        name = recipe.teacher.dtype
        teacher = torch.bfloat16 if name == "auto" else resolve_dtype(name, torch.device("cpu"))
    return Setting(recipe, plan, work.arguments, student, teacher, is_cpu)


def _cache(recipe: Recipe, plan: Plan, rates: Rates | None) -> dict[str, Any] | None:
    if recipe.cache is None:
        return None
    measured = None if rates is None else rates.cache_bytes_per_position
    assert recipe.classes.draws is not None, "a cache holds drawn classes"
    each = typical_bytes(recipe.classes.sampler, recipe.classes.draws) if measured is None else measured
    return {
        "positions": plan.positions_kept,
        "bytes": round(each * plan.positions_kept),
        "bytes_per_position": each,
        "is_measured": measured is not None,
    }


def _operations(
    recipe: Recipe, plan: Plan, student: Architecture, teacher: Architecture, queries: int
) -> dict[str, float]:
    """2 a parameter and token forward, 6 forward and backward; the head counts as run in full."""
    scores = recipe.samples is not None and recipe.samples.metric != "random"
    found = {
        "student": 6.0 * student.parameters * plan.trained_tokens
        + 2.0 * student.parameters * (plan.train_tokens * scores + plan.held_out_tokens * plan.evaluations),
        "teacher": 2.0 * teacher.parameters * queries,
    }
    return {**found, "total": sum(found.values())}


def _seconds(recipe: Recipe, plan: Plan, rates: Rates) -> dict[str, float | None]:
    """Of the stages on all devices together, from what one of them does; loading and tokenising not counted."""

    def stage(tokens: int, rate: float | None) -> float | None:
        return None if rate is None else tokens / rate / plan.devices

    found = {
        "score": stage(plan.train_tokens, rates.score_tokens_per_second),
        "cache": stage(plan.kept_tokens, rates.cache_tokens_per_second) if recipe.cache is not None else None,
        "train": plan.steps * rates.step_seconds,
        "evaluate": stage(plan.held_out_tokens * plan.evaluations, rates.evaluate_tokens_per_second),
    }
    return {"step": rates.step_seconds, **found, "total": sum(value or 0.0 for value in found.values())}


def _cache_note(recipe: Recipe) -> str:
    known = recipe.classes.sampler in MEASURED
    taken = "" if known else f"{recipe.classes.sampler} is taken for rs_kd; "
    return f"cache bytes: {taken}as measured of {SOURCE}; other text or teachers differ, --probe measures them"


def _notes(recipe: Recipe, plan: Plan, needed: Memory, rates: Rates | None, gpus: int | None) -> list[str]:
    notes = list(needed.notes)
    if rates is None:
        notes.append("time: not known without --probe, which runs a few steps here")
        if recipe.cache is not None:
            notes.append(_cache_note(recipe))
    else:
        if plan.devices > 1:
            notes.append("time: one device's, divided by their number; communication is not counted")
        if names := benchmarks_of([name for name in recipe.evaluation.suite if name != "fidelity"]):
            notes.append(
                f"time: the benchmarks ({', '.join(names)}) are not counted, and may take longer than the rest"
            )
    if gpus is not None:
        notes.append("memory: tensors on one accelerator; its context and fragmentation take some more")
    if recipe.on_policy is not None:
        notes.append(
            "on_policy: the answers' key-value cache is not counted, and "
            + ("the probed step's time includes generating them" if rates else "the time to generate them neither")
            + "; steps and tokens are counted as if the data's completions were learned"
        )
    if recipe.student.lora is not None:
        notes.append("student.lora: counted as if every weight were trained; adapters need less")
    if recipe.teacher.quantization is not None:
        notes.append("teacher.quantization: the teacher is counted as it is without")
    if recipe.teacher.device is not None:
        notes.append("teacher.device: the teacher is counted on the student's device")
    if recipe.samples is not None and recipe.samples.metric in NEEDS_TEACHER:
        notes.append(f"scoring by {recipe.samples.metric} runs the teacher over every sample")
    return notes
