"""The closing table of the terminal: one run, or several side by side."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from selkd.reporting import formats
from selkd.reporting.formats import dig

Row = tuple[str, Callable[[dict[str, Any]], str]]


def _before_after(key: str, form: Callable[[float | None], str]) -> Callable[[dict[str, Any]], str]:
    return lambda record: formats.arrow(
        dig(record, "fidelity", "before", key), dig(record, "fidelity", "after", key), form
    )


def _value(form: Callable[[float | None], str], *keys: str) -> Callable[[dict[str, Any]], str]:
    return lambda record: form(dig(record, *keys))


def _share(part: str, whole: str) -> Callable[[dict[str, Any]], str]:
    return lambda record: formats.percent(formats.share(dig(record, "counts", part), dig(record, "counts", whole)))


def _samples(record: dict[str, Any]) -> str:
    kept, samples = dig(record, "counts", "samples_kept"), dig(record, "counts", "samples")
    return f"{formats.count(kept)} of {formats.count(samples)}" if kept is not None else formats.DASH


def _loss(record: dict[str, Any]) -> str:
    return formats.arrow(dig(record, "train", "loss_first"), dig(record, "train", "loss_last"), formats.nats)


_SECTIONS: tuple[tuple[Row, ...], ...] = (
    (
        ("perplexity", _before_after("perplexity", formats.perplexity)),
        ("  the teacher’s", _value(formats.perplexity, "fidelity", "teacher", "perplexity")),
        ("KL to the teacher, nats", _before_after("kl_nats", formats.nats)),
        ("top-1 agreement", _before_after("top1_agreement", formats.percent)),
        ("held-out positions", _value(formats.count, "fidelity", "positions")),
    ),
    (
        ("samples kept", _samples),
        ("positions selected", _share("positions_selected", "positions_valid")),
        ("teacher tokens", _value(formats.count, "counts", "teacher_tokens")),
        ("optimiser steps", _value(formats.count, "train", "steps")),
        ("loss", _loss),
        ("cache, a position", _value(formats.bytes_per_position, "teacher_cache", "bytes_per_position")),
    ),
    (
        ("time to prepare", _value(formats.duration, "seconds", "prepare")),
        ("  score", _value(formats.duration, "seconds", "score")),
        ("  cache", _value(formats.duration, "seconds", "cache")),
        ("  train", _value(formats.duration, "seconds", "train")),
        ("  evaluate", _value(formats.duration, "seconds", "evaluate")),
        ("total time", _value(formats.duration, "seconds", "total")),
        ("peak memory, process", _value(formats.data_size, "peak_memory_bytes", "process")),
        ("peak memory, accelerator", _value(formats.data_size, "peak_memory_bytes", "accelerator")),
    ),
)


def fidelity_table(records: Sequence[dict[str, Any]]) -> Table:
    """A rich Table with one column a run: fidelity before and after, what was selected, time, memory, cache.

    records: contents of the runs' record.json; null or absent values show as a dash.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("")
    for record in records:
        # Text, not str: a run's name is not markup.
        table.add_column(Text(str(dig(record, "name") or "run")), justify="right", no_wrap=len(records) <= 3)
    for number, rows in enumerate(_SECTIONS):
        if number:
            table.add_row()
        for name, cell in rows:
            table.add_row(Text(name, style="dim" if name.startswith(" ") else ""), *(Text(cell(r)) for r in records))
    return table


_PARTS = {
    "process": "Python and libraries",
    "student_weights": "student, weights",
    "gradients": "student, gradients",
    "optimiser": "optimiser",
    "activations": "student, activations",
    "loss": "loss",
    "teacher_weights": "teacher, weights",
    "teacher_activations": "teacher, activations",
    "communication": "communication",
}


def estimate_tables(answer: dict[str, Any]) -> list[Table | Text]:
    """What ``selkd estimate`` found, for people: memory by part, peaks by stage, queries, cache, time, notes."""
    found, devices = answer["memory_bytes"], answer["devices"]
    place = "this machine's CPU" if answer["device"] == "cpu" else f"each of {devices} accelerator(s)"
    whole = [
        ("teacher", f"{formats.parameters(answer['parameters']['teacher'])} parameters"),
        ("student", f"{formats.parameters(answer['parameters']['student'])} parameters"),
        (
            "samples kept",
            f"{formats.count(answer['data']['samples_kept'])} of {formats.count(answer['data']['samples'])}",
        ),
        ("optimiser steps", formats.count(answer["training"]["steps"])),
        ("samples a step", formats.count(answer["training"]["samples_per_step"])),
        ("teacher queries", f"{formats.count(answer['teacher_tokens']['total'])} tokens"),
    ]
    if (cache := answer["teacher_cache"]) is not None:
        about = "" if cache["is_measured"] else "about "
        told = (
            f"{formats.data_size(cache['bytes'])}, {formats.bytes_per_position(cache['bytes_per_position'])} a position"
        )
        whole.append(("teacher cache", about + told))
    if (seconds := answer["seconds"]) is not None:
        whole.append(("a step", formats.duration(seconds["step"])))
        whole += [
            (f"time to {name}", formats.duration(seconds[name]))
            for name in ("score", "cache", "train", "evaluate")
            if seconds[name] is not None
        ]
        whole.append(("total time", formats.duration(seconds["total"])))
    parts = [(_PARTS[name], formats.data_size(size)) for name, size in found["training_parts"].items() if size]
    stages = [(f"peak to {name}", formats.data_size(size)) for name, size in found["stages"].items()]
    return [
        _two_columns(f"the run on {place}", whole),
        _two_columns("memory of a training step", parts),
        _two_columns("memory by stage", [*stages, ("peak", formats.data_size(found["peak"]))]),
        *(Text(f"note: {note}", style="dim") for note in answer["notes"]),
    ]


def _two_columns(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column(title, min_width=28)
    table.add_column("", justify="right")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    table.add_row()
    return table
