"""Writes the tables and pictures of docs/results/study.md from the record.

    python studies/page.py            # write them
    python studies/page.py --check    # exit code 1 if the page is not what the record says

A table stands between ``<!-- study: NAME -->`` and ``<!-- end of study -->``, its pictures beside the page. Arms are
compared as ``compare.py`` says. Beside the record ``study_seconds.json`` has their seconds of a step on an idle
machine, and ``study_tasks.json`` what ``tasks.py`` measured.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compare import WAYS, Compared, Seconds
from inference import Difference, holm, holm_level, verdict
from plots import file_names, pictures
from records import Line, bodies_and_heads, rates_of, read_lines, work_of
from tables import RATES, TABLES, StudyTables
from tasks import TASKS
from transformers import AutoConfig

from selkd.needs.architecture import describe

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SHAPES = Path(__file__).parents[1] / "benchmarks" / "shapes"
MARGIN = 0.1  # of what the first arm gained: what counts as good
EMPTY = "No run yet."
AGAIN = "dense_again"  # the first arm with other seeds: what is found there is noise, and no hypothesis
WORK = "work_in_steps"
COSTS = ("teacher_queries_in_steps", "head_passes_in_steps", "work_in_steps")
FIGURES = {"perplexity": "perplexity", "top1_agreement": "top-1 agreement", "calibration_error": "calibration error"}


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true")
    given = options.parse_args(arguments)
    page = RESULTS / "study.md"
    seconds, tasks = (_content(RESULTS / file) for file in ("study_seconds.json", "study_tasks.json"))
    before = page.read_text(encoding="utf-8")
    tables = StudyTables.read(TABLES, Path(), Path())
    lines = read_lines(RESULTS / "study.jsonl")
    shown = tables_of(tables, lines, seconds) | {"tasks": tasks_of(tasks), "sizes": at_other_sizes()}
    after = filled(before, shown)
    drawn = {RESULTS / file: content for file, content in pictures_of(tables, lines, seconds).items()}
    if given.check:
        return int(before != after or not all(file.exists() and _alike(file, drawn[file]) for file in drawn))
    page.write_text(after, encoding="utf-8")
    for file, content in drawn.items():
        file.write_bytes(content)
    return 0


def _content(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return content


def _alike(file: Path, picture: bytes) -> bool:
    """Whether the file shows that picture; the last digits of a place differ between kinds of processor."""
    texts = (file.read_text(encoding="utf-8"), picture.decode())
    first, second = (re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}", text) for text in texts)
    return first == second


def filled(text: str, shown: Mapping[str, str]) -> str:
    """``text`` with each table between its marks."""
    begin, end = "<!-- study: ", "<!-- end of study -->"
    parts = text.split(begin)
    for number, part in enumerate(parts[1:], start=1):
        name, _, rest = part.partition(" -->")
        parts[number] = f"{name} -->\n\n{shown[name]}\n{end}{rest.partition(end)[2]}"
    return begin.join(parts)


def tables_of(tables: StudyTables, lines: Sequence[Line], seconds: Mapping[str, Seconds]) -> dict[str, str]:
    """Table -> Markdown, of all tables and tables of rates; of a start what each epoch gave."""
    shown = {}
    for name in tables.names:
        of_table = [line for line in lines if line["table"] == name]
        if not of_table:
            shown[name] = f"{EMPTY}\n"
        elif name in tables.content["tables"]:
            shown[name] = _of_arms(name, tables.content["tables"][name], of_table, seconds.get(name, {}))
        else:
            shown[name] = _of_steps(of_table, is_rates=name.startswith(RATES))
    return shown


def pictures_of(tables: StudyTables, lines: Sequence[Line], seconds: Mapping[str, Seconds]) -> dict[str, bytes]:
    """File name -> SVG, of all tables that have lines."""
    made: dict[str, bytes] = {}
    for name, content in tables.content["tables"].items():
        of_table = [line for line in lines if line["table"] == name]
        table = Compared.of(_shown_arms(content), of_table, seconds.get(name, {}))
        if table is not None and table.others:
            made |= pictures(name, table)
    return made


def _shown_arms(content: Mapping[str, Any]) -> list[str]:
    """A table's arms, and those that have left the product and can't be run again: their lines stay."""
    return [*content["arms"], *content.get("left", [])]


def _of_arms(name: str, content: Mapping[str, Any], lines: Sequence[Line], seconds: Seconds) -> str:
    """Everything about one table: all arms against the first, some against others, what they spent, pictures."""
    table = Compared.of(_shown_arms(content), lines, seconds)
    if table is None:
        return f"{EMPTY}\n"
    runs = sum(line["arm"] in content["arms"] for line in lines)
    planned = len(content["arms"]) * len(content["seeds"])
    parts = [] if runs == planned else [f"Unfinished: {runs} of {planned} runs are done.\n"]
    parts.append(compared(table))
    for arms in content.get("against", []):
        among = Compared.of(arms, lines, seconds)
        if among is not None and among.others:
            parts.append(compared(among))
    parts.append(spent(table))
    if table.others:
        parts += [f"![{title}]({file})\n" for file, title in file_names(name).items()]
    return "\n".join(parts)


def compared(table: Compared) -> str:
    """Each arm compared with the first."""
    steps, found, gain = table.first.steps, table.differences, table.gain
    rows = [["arm", "seeds", f"KL at step {steps}, nats", *WAYS, "p (Holm)", "at equal steps", "could have found"]]
    rows.append(["---"] * len(rows[0]))
    rows.append(["before training", "", f"{table.first.kl(0):.4f}", *[""] * (len(rows[0]) - 3)])
    tested = {arm: one for arm, one in found[WAYS[0]].items() if arm != AGAIN}
    p_values = [one.p for one in tested.values()]
    adjusted = dict(zip(tested, holm(p_values), strict=True))
    margin = MARGIN * -gain.value if gain.high < 0 else None
    noise = found[WAYS[0]].get(AGAIN)
    for name, arm in table.arms.items():
        row = [f"`{name}`", str(len(arm.lines)), f"{arm.kl(min(steps, arm.steps)):.4f}"]
        row += [_shown(found[way].get(name)) for way in WAYS]
        if name in tested:
            one, level = tested[name], holm_level(p_values, list(tested).index(name))
            found_so = verdict(one, adjusted[name], margin)
            if noise is not None and found_so in ("better", "worse") and abs(one.value) <= abs(noise.value):
                found_so = "within the noise"
            is_known = one.seeds > 1
            row += (
                [f"{adjusted[name]:.3f}", found_so, f"{one.detectable(level):.4f}"] if is_known else ["", found_so, ""]
            )
        else:
            row += ["", "noise: other seeds" if name == AGAIN else "", ""]
        rows.append(row)
    return _table(rows)


def spent(table: Compared) -> str:
    """What each arm cost, as multiples of the first arm's steps with the same seeds, and the other figures at its last.

    ``as run``: the seconds of a step in the runs themselves, beside whatever else the machine did.
    """
    heads = [
        "arm",
        "steps",
        "positions a step",
        "teacher queries",
        "head passes",
        "work a step",
        "seconds a step",
        "as run",
    ]
    heads += ["once: work, in steps", "once: queries, in steps", "runs to break even", *FIGURES.values()]
    rows = [heads, ["---"] * len(heads)]
    for name, arm in table.arms.items():
        first = table.first_beside(arm)
        row = [f"`{name}`", str(arm.steps), f"{arm.cost_of_step('positions'):.0f}"]
        row += [_times(arm.cost_of_step(key), first.cost_of_step(key)) for key in COSTS]
        row.append(_times(table.seconds.get(name), table.seconds.get(first.name)))
        row.append(_times(arm.seconds_as_run, first.seconds_as_run))
        once = arm.cost_once("work")
        saved = first.cost_of_step(WORK) * first.steps - arm.cost_of_step(WORK) * arm.steps
        row += [_times(once, first.cost_of_step(WORK)) if once else ""]
        queries = arm.cost_once("teacher_queries")
        row += [_times(queries, first.cost_of_step("teacher_queries_in_steps")) if queries else ""]
        row.append(f"{once / saved:.1f}" if once and saved > 0 else "")
        row += [_form(figure, arm.figure(figure)) for figure in FIGURES]
        rows.append(row)
    return _table(rows)


SIZES = {"teacher": "qwen3-8b.json", "student": "qwen3-1.7b.json"}  # the paper's models
SELECTIONS = {  # passes of the student's head that score a position, share of the positions
    "all positions": (0, 1.0),
    "random 45%": (0, 0.45),
    "random 20%": (0, 0.2),
    "the highest 20% by the student's entropy": (1, 0.2),
}


def at_other_sizes() -> str:
    """The work of a step of the paper's models, counted as ``records.costs`` counts it; 1: all positions, live."""
    shapes = {role: json.loads((SHAPES / file).read_text(encoding="utf-8")) for role, file in SIZES.items()}
    of_models = bodies_and_heads({role: describe(AutoConfig.for_model(**shape)) for role, shape in shapes.items()})
    whole = work_of(*of_models, tokens=1, queries=1, of_student=3, of_teacher=1)
    rows = [["a step at", "the teacher in memory", "from a cache"], ["---"] * 3]
    for name, (scored, share) in SELECTIONS.items():
        passes = scored + 3 * share
        live = work_of(*of_models, tokens=1, queries=1, of_student=passes, of_teacher=share)
        cached = work_of(*of_models, tokens=1, queries=0, of_student=passes, of_teacher=0)
        rows.append([name, f"{live / whole:.2f}", f"{cached / whole:.2f}"])
    return _table(rows)


def _times(cost: float | None, of_first: float | None) -> str:
    return f"{cost / of_first:.2f}" if cost is not None and of_first else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _form(figure: str, value: float) -> str:
    return f"{value:.2f}" if figure == "perplexity" else f"{value:.1%}"


def _shown(one: Difference | None) -> str:
    return "" if one is None else f"{one.value:+.4f} ({one.low:+.4f} to {one.high:+.4f})"


def tasks_of(tasks: Mapping[str, Any]) -> str:
    """What ``tasks.py`` measured, with standard errors; in brackets the paired difference to the table's first arm."""
    parts = []
    for name, measured in tasks.items():
        rows = [["student", *TASKS], ["---"] * (len(TASKS) + 1)]
        for student, figures in measured["rows"].items():
            rows.append([f"`{student}`", *(_score(figures[task]) for task in TASKS)])
        limit = "all rows" if measured["limit"] is None else f"at most {measured['limit']} rows"
        told = f"`{name}`, seed {measured['seed']}, {limit} of each, zero-shot, {measured['dtype']}, per cent:"
        parts.append(f"{told}\n\n{_table(rows)}")
    return "\n".join(parts) or f"{EMPTY}\n"


def _score(figure: Mapping[str, float]) -> str:
    shown = f"{100 * figure['value']:.1f} ± {100 * figure['standard_error']:.1f}"
    if "difference" not in figure:
        return shown
    return f"{shown} ({100 * figure['difference']:+.1f} ± {100 * figure['difference_error']:.1f})"


def _of_steps(lines: Sequence[Line], is_rates: bool) -> str:
    rows = ["| run | learning rate | step: KL, nats |\n| --- | --- | --- |\n"]
    for line in lines:
        total = sum(line["positions"])
        by_step = ", ".join(f"{step}: {sum(values) / total:.4f}" for step, values in line["kl_nats"].items())
        rows.append(f"| `{line['arm']}` | {line['learning_rate']:g} | {by_step} |\n")
    if not is_rates:
        return "".join(rows)
    rates = rates_of(lines, lines[0]["table"])
    grid = [line["learning_rate"] for line in lines]
    ends = [family for family, rate in rates.items() if rate in (min(grid), max(grid))]
    told = ", ".join(f"{family} {rate:g}" for family, rate in rates.items())
    at_end = f" At an end of the grid: {', '.join(ends)}." if ends else ""
    return "".join(rows) + f"\nThe lowest KL at the last step is each family's rate: {told}.{at_end}\n"


if __name__ == "__main__":
    sys.exit(main())
