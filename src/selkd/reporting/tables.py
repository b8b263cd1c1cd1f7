"""The terminal's tables: of finished runs side by side, of ``selkd estimate`` and of ``selkd bench``."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rich.table import Table
from rich.text import Text

from selkd.reporting import formats
from selkd.reporting.formats import Form, dig
from selkd.reporting.measures import AGREEMENT, KL, PERPLEXITY, ReportedMeasure, closeness, few_positions
from selkd.reporting.training_figures import true_kl

Record = dict[str, Any]
Row = tuple[str, Callable[[Record], str]]


def _before_after(measure: ReportedMeasure) -> Row:
    def cell(record: Record) -> str:
        before, after = (dig(record, "fidelity", when, measure.key) for when in ("before", "after"))
        change = formats.arrow(before, after, measure.form)
        if few_positions(record) is None:
            return change
        span = next(row.interval for row in closeness(record) if row.measure is measure)
        return change if span is None else f"{change} ({span})"

    return measure.name, cell


def _held_out(record: Record) -> str:
    few = few_positions(record)
    return formats.count(dig(record, "fidelity", "positions")) + ("" if few is None else ", few: see the 95% intervals")


def _value(name: str, form: Form, *keys: str) -> Row:
    return name, lambda record: form(dig(record, *keys))


def _samples(record: Record) -> str:
    kept, samples = dig(record, "counts", "samples_kept"), dig(record, "counts", "samples")
    return formats.DASH if kept is None else f"{formats.count(kept)} of {formats.count(samples)}"


def _positions(record: Record) -> str:
    selected, valid = dig(record, "counts", "positions_selected"), dig(record, "counts", "positions_valid")
    return formats.percent(formats.share(selected, valid))


def _loss(record: Record) -> str:
    return formats.arrow(dig(record, "train", "loss_first"), dig(record, "train", "loss_last"), formats.nats)


def _selected_kl(record: Record) -> str:
    return formats.arrow(*true_kl(record), formats.nats)


_SECTIONS: tuple[tuple[Row, ...], ...] = (
    (
        _before_after(PERPLEXITY),
        _value("  the teacher’s", formats.perplexity, "fidelity", "teacher", "perplexity"),
        _before_after(KL),
        _before_after(AGREEMENT),
        ("held-out positions", _held_out),
    ),
    (
        ("samples kept", _samples),
        ("positions selected", _positions),
        ("  KL there, nats", _selected_kl),
        _value("teacher tokens", formats.count, "counts", "teacher_tokens"),
        _value("optimiser steps", formats.count, "train", "steps"),
        ("loss as minimised", _loss),
        _value("cache, a position", formats.bytes_per_position, "teacher_cache", "bytes_per_position"),
    ),
    (
        _value("time to prepare", formats.duration, "seconds", "prepare"),
        *(
            _value(f"  {stage}", formats.duration, "seconds", stage)
            for stage in ("score", "cache", "train", "evaluate")
        ),
        _value("total time", formats.duration, "seconds", "total"),
        _value("peak memory, process", formats.data_size, "peak_memory_bytes", "process"),
        _value("peak memory, accelerator", formats.data_size, "peak_memory_bytes", "accelerator"),
    ),
)


def fidelity_table(records: Sequence[Record]) -> Table:
    """A table with one column for each run: fidelity before and after, what was selected, cache, time and memory.

    Args:
        records: the contents of the runs' record.json; null or absent values show as a dash.
    """
    table = _table("")
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
    """The tables of an estimate: the run as a whole, memory by part, peaks by stage; then the notes."""
    memory, parameters, data = answer["memory_bytes"], answer["parameters"], answer["data"]
    place = "this machine's CPU" if answer["device"] == "cpu" else f"each of {answer['devices']} accelerator(s)"
    run = {
        "teacher": f"{formats.parameters(parameters['teacher'])} parameters",
        "student": f"{formats.parameters(parameters['student'])} parameters",
        "samples kept": f"{formats.count(data['samples_kept'])} of {formats.count(data['samples'])}",
        "optimiser steps": formats.count(answer["training"]["steps"]),
        "samples a step": formats.count(answer["training"]["samples_per_step"]),
        "teacher queries": f"{formats.count(answer['teacher_tokens']['total'])} tokens",
    }
    if (cache := answer["teacher_cache"]) is not None:
        size, share = formats.data_size(cache["bytes"]), formats.bytes_per_position(cache["bytes_per_position"])
        run["teacher cache"] = f"{'' if cache['is_measured'] else 'about '}{size}, {share} a position"
    if (seconds := answer["seconds"]) is not None:
        names = {"step": "a step", "total": "total time"}
        run |= {
            names.get(name, f"time to {name}"): formats.duration(value)
            for name, value in seconds.items()
            if value is not None
        }
    parts = {_PARTS[name]: formats.data_size(size) for name, size in memory["training_parts"].items() if size}
    stages = {f"peak to {name}": formats.data_size(size) for name, size in memory["stages"].items()}
    return [
        _two_columns(f"the run on {place}", run),
        _two_columns("memory of a training step", parts),
        _two_columns("memory by stage", stages | {"peak": formats.data_size(memory["peak"])}),
        *(Text(f"note: {note}", style="dim") for note in answer["notes"]),
    ]


def bench_table(answer: dict[str, Any]) -> Table:
    """One row for each variant: seconds, ratio to the floor, its range, memory above the floor, agreement."""
    shape = answer["shape"]
    title = f"{answer['device']}; {answer['precision']}; B = {shape['batch']}, T = {shape['length']}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("variant", no_wrap=True)
    for heading in ("seconds", "x floor", "range", "peak above floor", "agreement"):
        table.add_column(heading, justify="right")
    floor = answer["floor_seconds"]
    for variant in answer["variants"]:
        low, high = (seconds / floor for seconds in variant["seconds_range"])
        peak, agreement = variant["peak_bytes_above_floor"], variant["selection_agreement"]
        table.add_row(
            variant["name"],
            f"{variant['seconds']:.3f}",
            f"{variant['ratio_to_floor']:.2f}",
            f"{low:.2f} to {high:.2f}",
            "" if peak is None else f"{formats.signed(peak / 1e9, partial(formats.decimal, digits=2))} GB",
            "" if agreement is None else formats.percent(agreement),
        )
    return table


def _two_columns(title: str, rows: dict[str, str]) -> Table:
    table = _table(title, min_width=28)
    table.add_column("", justify="right")
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    table.add_row()
    return table


def _table(title: str, min_width: int | None = None) -> Table:
    """A table without lines, with its first column."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column(title, min_width=min_width)
    return table
