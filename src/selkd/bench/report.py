"""Measures all the variants of a recipe's step."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from selkd.bench.measure import MEMORY_JOBS, Timing, in_own_process, interleaved
from selkd.bench.names import QUICK, QUICK_SAMPLES, checked_variants
from selkd.bench.progress import Progress
from selkd.bench.subject import BenchSubject
from selkd.bench.variants import last_step, objective_of, positions_of, step_of
from selkd.files import write_whole
from selkd.recipe.recipe import Recipe
from selkd.reporting.memory_plot import memory_plot
from selkd.run.record import environment
from selkd.selection.position_scores import choose_positions, score_positions

AGREEMENT_SAMPLES = 16
# What a cached step is to take of a training on text: at the same positions, and at all of them.
CACHED_GOALS = {"cross_entropy_chunked": 1.05, "cross_entropy_plain": 1.0}
TRACED = ("floor", "full_kd_plain", "full_kd", "se_kd_exact", "se_kd_two_stage", "recipe")


def bench(
    recipe: Recipe,
    *,
    repeats: int = 5,
    variants: Sequence[str] | None = None,
    memory: bool = True,
    trace: Path | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Measure the variants of a recipe's step: forward and backward pass of one micro-batch, no optimiser.

    Seconds are medians of ``repeats`` turns in one process, the variants interleaved after a warm-up. Ratios are to the
    floor of the same run; on a CPU also those of the processor's own seconds, which other work on the machine hardly
    changes. On a CPU each variant's memory is measured in a process of its own; on a GPU it is this process's
    allocations. ``selection_agreement`` is the share of the exact top positions, in float32, that the variant's scoring
    picks in float32; ``selection_agreement_as_run`` is the share that it picks in the step's own dtype.

    Args:
        variants: names of ``VARIANTS``; None measures all. The floor is always measured.
        memory: whether to measure memory.
        trace: a folder to write memory over time into, as ``memory.json`` and ``memory.svg``.
        quick: one turn of ``QUICK`` (unless ``variants`` are given) with at most two samples, and no memory.

    Each measurement is told on standard error. Ctrl-C or SIGTERM stop it: what was measured is the answer, whose
    ``notes`` say what is missing.

    Raises:
        InputError: a variant is unknown, ``repeats`` is below 1, or ``distill`` would refuse the recipe.
        KeyboardInterrupt: it was stopped before the floor was measured.
    """
    if quick:
        repeats, memory, variants = 1, False, variants or QUICK
    names = checked_variants(variants, repeats)
    subject = BenchSubject(recipe, QUICK_SAMPLES if quick else None)
    try:
        steps = {name: step_of(name, subject) for name in names}
        progress = Progress(len(names) * (repeats + 1 + memory))
        timings = interleaved(steps, repeats, subject.device, progress)
        if "floor" not in timings:
            raise KeyboardInterrupt
        if progress.stopped:
            answer = _answer(subject, timings, None, {})
            answer["notes"].append(_what_is_missing(names, timings, repeats))
            return answer
        agreements: dict[str, tuple[float, float]] = {}
        is_compared = False
        with progress.until_stopped():
            for name in names:
                if (agreement := _agreement(name, subject)) is not None:
                    agreements[name] = agreement
            is_compared = True
        if not is_compared:
            answer = _answer(subject, timings, None, agreements)
            answer["notes"].append("stopped: no memory, and the agreement of some variants was not measured")
            return answer

        def memory_of(job: str, measured: Sequence[str]) -> dict[str, Any]:
            found = {}
            with progress.until_stopped():
                for name in measured:
                    if subject.device.type == "cpu":
                        found[name] = in_own_process(job, name, recipe)
                    else:
                        found[name] = MEMORY_JOBS[job](steps[name], subject.device)
                    if job == "peak":
                        progress.told(name, f"{found[name] / 1e9:.2f} GB")
            return found

        peaks = memory_of("peak", names) if memory else None
        is_whole = peaks is None or len(peaks) == len(names)
        if trace is not None and is_whole:
            series = memory_of("trace", [name for name in names if name in TRACED])
            write_whole(trace / "memory.json", json.dumps(series) + "\n")
            write_whole(trace / "memory.svg", memory_plot(series) + "\n")
        answer = _answer(subject, timings, peaks, agreements)
        if not is_whole:
            answer["notes"].append("stopped: the memory of some variants was not measured")
        return answer
    finally:
        subject.close()


def _what_is_missing(names: Sequence[str], timings: dict[str, Timing], repeats: int) -> str:
    """What a bench that was stopped did not measure."""
    fewer = [name for name in names if name in timings and len(timings[name].seconds) < repeats]
    missing = [name for name in names if name not in timings]
    parts = [f"fewer than {repeats} turns of {', '.join(fewer)}" if fewer else ""]
    parts += [f"none of {', '.join(missing)}" if missing else "", "no memory, no agreement"]
    return f"stopped: {'; '.join(filter(None, parts))}. A variant of one turn may be of the warm-up"


def _agreement(name: str, subject: BenchSubject) -> tuple[float, float] | None:
    """The share of exact float32 selection that a variant picks, in float32 and in the step's own dtype.

    None unless the variant picks the top positions by the student's entropy.
    """
    positions = positions_of(name, subject)
    if positions is None or positions.metric != "student_entropy" or positions.policy != "top_k":
        return None
    objective, context = objective_of(subject, positions), last_step(positions)
    head = subject.head
    agreeing, as_run, compared = 0, 0, 0
    size = len(subject.samples)
    count = min(len(subject.train), max(AGREEMENT_SAMPLES, size))
    for start in range(0, count, size):
        batch = subject.batch_of(subject.train.select(range(start, min(start + size, count))))
        hidden = subject.student_hidden(batch)
        counts = objective.agreement(hidden, head, batch, context)
        agreeing, compared = agreeing + int(counts["agreeing_positions"]), compared + int(counts["compared_positions"])
        exact = score_positions("student_entropy", hidden.float(), head, batch, None)
        with torch.no_grad():
            scored = objective.score(hidden, head.to(subject.dtype), batch, None, context)
        chosen, best = (
            choose_positions(positions, scores.values, batch, context, seed=0) > 0 for scores in (scored, exact)
        )
        as_run += int((chosen & best).sum())
    return agreeing / compared, as_run / compared


def _answer(
    subject: BenchSubject,
    timings: dict[str, Timing],
    peaks: dict[str, int] | None,
    agreements: dict[str, tuple[float, float]],
) -> dict[str, Any]:
    machine = environment(subject.work)
    device = str(machine["processor"] or platform.machine())
    batch, length = subject.batch["input_ids"].shape
    floor, is_cpu = timings["floor"], subject.device.type == "cpu"
    on_policy = "on_policy: steps are on the data's completions; generation is not measured"
    variants = []
    for name, timing in timings.items():
        agreement, as_run = agreements.get(name, (None, None))
        variants.append(
            {
                "name": name,
                "seconds": timing.median,
                "seconds_range": [min(timing.seconds), max(timing.seconds)],
                "ratio_to_floor": timing.median / floor.median,
                "cpu_seconds": timing.cpu_median if is_cpu else None,
                "cpu_ratio_to_floor": timing.cpu_median / floor.cpu_median if is_cpu else None,
                "cpu_seconds_range": [min(timing.cpu_seconds), max(timing.cpu_seconds)] if is_cpu else None,
                "peak_bytes_above_floor": peaks[name] - peaks["floor"] if peaks and name in peaks else None,
                "selection_agreement": agreement,
                "selection_agreement_as_run": as_run,
            }
        )
    seconds = {name: timing.median for name, timing in timings.items()}
    cached = {
        other: {"ratio": seconds["se_kd_cached"] / seconds[other], "at_most": most}
        for other, most in CACHED_GOALS.items()
        if {"se_kd_cached", other} <= seconds.keys()
    }
    notes = [on_policy] if subject.recipe.on_policy is not None else []
    notes += [f"se_kd_cached / {name}: {of['ratio']:.2f}, aim {of['at_most']:.2f}" for name, of in cached.items()]
    return {
        "device": f"{device}, {torch.get_num_threads()} threads" if is_cpu else device,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "precision": machine["precision"],
        "recipe": subject.recipe.name,
        "torch": torch.__version__,
        "shape": {
            "batch": batch,
            "length": length,
            "classes": subject.work.vocab_size,
            "valid_positions": int(subject.batch["valid_mask"].sum()),
        },
        "floor_seconds": floor.median,
        "variants": variants,
        "cached_goals": cached,
        "notes": notes,
    }
