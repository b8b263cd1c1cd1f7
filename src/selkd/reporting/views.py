"""From a run's files to what each section of the page shows: words, numbers already formatted, bars' widths, plots."""

import math
from typing import Any

from selkd.reporting import benchmarks, formats, plots, words
from selkd.reporting.formats import dig
from selkd.reporting.run_files import RunFiles

_STAGES = (
    ("prepare", "Prepare models and text"),
    ("score", "Score the samples"),
    ("cache", "Build the teacher cache"),
    ("train", "Train the student"),
    ("evaluate", "Evaluate"),
)


def header(record: dict[str, Any]) -> dict[str, Any]:
    """Who taught whom, and the student's layers where it was cut from the teacher: (kept, tooltip) a layer."""
    teacher, student = dig(record, "teacher", "parameters"), dig(record, "student", "parameters")
    kept = dig(record, "student", "pruned_from_teacher", "kept_layers")
    influence = dig(record, "student", "pruned_from_teacher", "influence")
    n_layers = dig(record, "teacher", "layers")
    layers = []
    if kept is not None and n_layers is not None:
        for layer in range(n_layers):
            told = f", influence {influence[layer]:.3f}" if influence and layer < len(influence) else ""
            layers.append((layer in kept, f"layer {layer}: {'kept' if layer in kept else 'dropped'}{told}"))
    return {
        "name": dig(record, "name") or "run",
        "version": dig(record, "environment", "selkd"),
        "teacher": words.model(dig(record, "teacher", "model")),
        "teacher_parameters": formats.parameters(teacher),
        "teacher_layers": formats.count(n_layers),
        "student": words.student(record),
        "student_parameters": formats.parameters(student),
        "student_layers": formats.count(dig(record, "student", "layers")),
        "size": formats.percent(formats.share(student, teacher), 0),
        "layers": layers,
        "summary": words.summary(record),
    }


def headline(record: dict[str, Any]) -> list[dict[str, str]]:
    """The four figures at the top."""
    before, after = dig(record, "fidelity", "before"), dig(record, "fidelity", "after")
    figures = []
    for key, name, form, told in (
        (
            "perplexity",
            "Perplexity",
            formats.perplexity,
            "How surprised the student is by unseen text; lower is better",
        ),
        ("kl_nats", "KL to the teacher", formats.nats, "How far its predictions lie from the teacher’s, in nats"),
        ("top1_agreement", "Top-1 agreement", formats.percent, "How often both rank the same next token first"),
    ):
        old, new = dig(before, key), dig(after, key)
        figures.append({"name": name, "before": form(old), "after": form(new), "told": told})
    total = formats.duration(dig(record, "seconds", "total"))
    cores = dig(record, "environment", "cores")
    device = dig(record, "environment", "device")
    place = {None: "", "cpu": f", on {cores} CPU cores" if cores else ", on the CPU"}.get(device, f", on {device}")
    told = f"All stages together{place}"
    figures.append({"name": "Time", "before": "", "after": total, "told": told})
    return figures


def fidelity(record: dict[str, Any]) -> dict[str, Any]:
    """The table before, after, teacher, with how much of the gap to the teacher was closed."""
    before, after = dig(record, "fidelity", "before"), dig(record, "fidelity", "after")
    teacher = dig(record, "fidelity", "teacher", "perplexity")
    rows: list[dict[str, Any]] = []
    for key, name, form, target, at_teacher in (
        ("perplexity", "Perplexity", formats.perplexity, teacher, formats.perplexity(teacher)),
        ("kl_nats", "KL to the teacher, nats", formats.nats, 0.0, "0"),
        ("top1_agreement", "Top-1 agreement", formats.percent, 1.0, "100%"),
    ):
        old, new = dig(before, key), dig(after, key)
        closed = _gap_closed(old, new, target, logarithmic=key == "perplexity")
        width = None if closed is None else 100 * min(1.0, max(0.0, closed))
        told = formats.percent(closed, 0)
        cells = {"name": name, "before": form(old), "after": form(new), "teacher": at_teacher}
        rows.append({**cells, "closed": told, "width": width})
    positions = dig(record, "fidelity", "positions")
    return {"positions": None if positions is None else formats.count(positions), "rows": rows}


def _gap_closed(before: float | None, after: float | None, target: float | None, logarithmic: bool) -> float | None:
    if before is None or after is None or target is None:
        return None
    if logarithmic:
        # Perplexity is the exponential of a loss in nats: its gap is measured there.
        if min(before, after, target) <= 0:
            return None
        before, after, target = math.log(before), math.log(after), math.log(target)
    gap = before - target
    closed = (before - after) / gap if gap else math.nan
    return closed if math.isfinite(closed) else None


def training(run: RunFiles) -> dict[str, Any]:
    """The plots of the training log; None where nothing of the kind was logged."""
    metrics = run.metrics
    weight = dig(run.record, "recipe", "criterion", "kd_weight")
    loss_told = "The loss that training minimises: the student’s distance from the teacher at the selected positions"
    if weight is not None and weight < 1:
        loss_told += f", mixed with {formats.fraction(1 - weight)} cross-entropy on the true next token"
    has_entropy = _logged(metrics, "selected_entropy_nats") and _logged(metrics, "mean_entropy_nats")
    held_out = _held_out_kl(run)
    agreement = next((key for line in metrics for key in line if _is_scoring_agreement(key)), None)
    return {
        "loss": plots.loss_plot(metrics) if _logged(metrics, "loss") else None,
        "loss_told": loss_told,
        "entropy": plots.entropy_plot(metrics) if has_entropy else None,
        "divergence": plots.divergence_plot(metrics, held_out) if held_out or _logged(metrics, "kd_nats") else None,
        "share": plots.share_plot(metrics) if _logged(metrics, "selected_share") else None,
        "agreement": None if agreement is None else plots.agreement_plot(metrics, agreement),
        "trained": dig(run.record, "train", "steps") is not None,
        "steps": formats.count(dig(run.record, "train", "steps")),
        "loss_first": formats.nats(dig(run.record, "train", "loss_first")),
        "loss_last": formats.nats(dig(run.record, "train", "loss_last")),
    }


def _held_out_kl(run: RunFiles) -> list[tuple[int, float]]:
    """(optimiser step, KL in nats) on the held-out text: before training, every so many steps, after it."""
    found = {0: dig(run.record, "fidelity", "before", "kl_nats")}
    found |= {
        line["step"]: line["held_out_kl_nats"] for line in run.metrics if line.get("held_out_kl_nats") is not None
    }
    if (steps := dig(run.record, "train", "steps")) is not None:
        found[steps] = dig(run.record, "fidelity", "after", "kl_nats")
    return [(step, value) for step, value in sorted(found.items()) if value is not None]


def _is_scoring_agreement(key: str) -> bool:
    """Whether a key of the log is the agreement of approximate with exact scoring (not the student's with its
    teacher)."""
    return key.endswith("agreement") and not key.startswith("held_out")


def _logged(metrics: list[dict[str, Any]], key: str) -> bool:
    return any(line.get(key) is not None for line in metrics)


def storage(record: dict[str, Any]) -> dict[str, Any]:
    """The teacher cache beside the two usual ways to store a teacher's signal."""
    cache = dig(record, "teacher_cache")
    sizes = [
        ("this run’s cache", dig(cache, "bytes_per_position")),
        ("fixed width, 3 bytes a draw", dig(cache, "fixed_width_bytes_per_position")),
        ("full logits in bfloat16", dig(cache, "full_logits_bytes_per_position")),
    ]
    known = [(name, float(size)) for name, size in sizes if size]
    ours, positions = sizes[0][1], dig(cache, "positions")
    rows = [
        {
            "name": name[:1].upper() + name[1:],
            "position": formats.bytes_per_position(size),
            "whole": formats.data_size(size * positions if size is not None and positions is not None else None),
            "times": formats.times(size, ours),
        }
        for name, size in sizes
    ]
    return {
        "there": cache is not None,
        "live": dig(record, "recipe", "cache") is None,
        "plot": plots.storage_plot(known) if ours and len(known) > 1 else None,
        "rows": rows,
        "bytes": formats.data_size(dig(cache, "bytes")),
        "positions": formats.count(positions),
    }


def costs(record: dict[str, Any]) -> dict[str, Any]:
    """Time and peak memory by stage, each with its bar, and of the whole run."""
    peaks = {place: dig(record, "peak_memory_bytes", place) for place in ("process", "accelerator")}
    place = "process" if peaks["accelerator"] is None else "accelerator"
    seconds = {key: dig(record, "seconds", key) for key, _ in _STAGES}
    memory = {key: dig(record, "peak_memory_bytes", "by_stage", key, place) for key, _ in _STAGES}
    rows = [
        {
            "name": name,
            "time": formats.duration(seconds[key]),
            "width": _width(seconds[key], seconds),
            "memory": formats.data_size(memory[key]),
            "memory_width": _width(memory[key], memory),
        }
        for key, name in _STAGES
    ]
    return {
        "rows": rows,
        "has_memory": any(value is not None for value in memory.values()),
        "total": formats.duration(dig(record, "seconds", "total")),
        "whole": formats.data_size(peaks[place]),
        "process": formats.data_size(peaks["process"]),
        "accelerator": formats.data_size(peaks["accelerator"]),
    }


def _width(value: float | None, among: dict[str, float | None]) -> float:
    """A bar's width in percent of the longest one."""
    longest = max((other for other in among.values() if other), default=0)
    return 100 * value / longest if value and longest else 0.0


def benchmark_table(record: dict[str, Any]) -> list[dict[str, str]]:
    """A row a measured number: its name, before and after training, and its standard error."""
    before, after = benchmarks.scores(record, "before"), benchmarks.scores(record, "after")

    def told(score: benchmarks.Score | None) -> str:
        return formats.DASH if score is None else formats.score(score.value)

    rows = []
    for path in dict.fromkeys([*before, *after]):
        stderr = None if path not in after else after[path].stderr
        cells = {"name": " ".join(path), "before": told(before.get(path)), "after": told(after.get(path))}
        rows.append({**cells, "stderr": formats.DASH if stderr is None else f"± {formats.score(stderr)}"})
    return rows


def facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What one needs to repeat the run: versions, hardware, data, fingerprints."""

    def text(*keys: str) -> str:
        return formats.or_dash(dig(record, *keys))

    cores, ranks = text("environment", "cores"), text("environment", "world_size")
    versions = [f"{name} {text('environment', name)}" for name in ("selkd", "torch", "transformers", "python")]
    return [
        ("Versions", ", ".join(versions)),
        ("Platform", text("environment", "platform")),
        ("Processor", f"{text('environment', 'processor')}, {cores} cores"),
        ("Device", f"{text('environment', 'device')}, {text('environment', 'precision')}, world size {ranks}"),
        ("Documents", formats.count(dig(record, "data", "documents"))),
        ("Training tokens", formats.count(dig(record, "data", "train_tokens"))),
        ("Held-out samples", formats.count(dig(record, "data", "held_out_samples"))),
        ("Teacher fingerprint", text("teacher", "fingerprint")),
        ("Student fingerprint", text("student", "fingerprint")),
    ]
