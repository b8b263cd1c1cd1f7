"""Writes the tables and pictures of docs/results/study.md from the record.

    python studies/page.py            # write them
    python studies/page.py --check    # exit code 1 if the page is not what the record says

A table stands between ``<!-- study: NAME -->`` and ``<!-- end of study -->``, its pictures beside the page. Arms are
compared as ``compare.py`` says; ``docs/results/study_seconds.json`` has their seconds of a step on an idle machine.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from compare import WAYS, Compared, Seconds
from inference import Difference, holm, verdict
from plots import file_names, pictures
from records import Line, read_lines
from tables import RATES, TABLES, StudyTables

RESULTS = Path(__file__).parents[1] / "docs" / "results"
MARGIN = 0.02  # of the first arm's KL: what counts as good
EMPTY = "No run yet."
AGAIN = "dense_again"  # the first arm with other seeds: what is found there is noise, and no hypothesis
COSTS = ("teacher_queries_in_steps", "head_passes_in_steps", "work_in_steps")
FIGURES = {"perplexity": "perplexity", "top1_agreement": "top-1 agreement", "calibration_error": "calibration error"}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true")
    given = options.parse_args()
    seconds_file, page = RESULTS / "study_seconds.json", RESULTS / "study.md"
    seconds = json.loads(seconds_file.read_text(encoding="utf-8")) if seconds_file.exists() else {}
    before = page.read_text(encoding="utf-8")
    tables = StudyTables.read(TABLES, Path(), Path())
    lines = read_lines(RESULTS / "study.jsonl")
    after = filled(before, tables_of(tables, lines, seconds))
    drawn = {RESULTS / file: content for file, content in pictures_of(tables, lines, seconds).items()}
    if given.check:
        return int(before != after or any(not file.exists() or file.read_bytes() != drawn[file] for file in drawn))
    page.write_text(after, encoding="utf-8")
    for file, content in drawn.items():
        file.write_bytes(content)
    return 0


def write_page(page: Path, shown: Mapping[str, str]) -> None:
    page.write_text(filled(page.read_text(encoding="utf-8"), shown), encoding="utf-8")


def filled(text: str, shown: Mapping[str, str]) -> str:
    """``text`` with each table between its marks."""
    begin, end = "<!-- study: ", "<!-- end of study -->"
    parts = text.split(begin)
    for number, part in enumerate(parts[1:], start=1):
        name, _, rest = part.partition(" -->")
        parts[number] = f"{name} -->\n\n{shown[name]}\n{end}{rest.partition(end)[2]}"
    return begin.join(parts)


def tables_of(tables: StudyTables, lines: Sequence[Line], seconds: Seconds | None = None) -> dict[str, str]:
    """Table -> Markdown, of all tables and tables of rates; of a start what each epoch gave."""
    shown = {}
    for name in tables.names:
        of_table = [line for line in lines if line["table"] == name]
        if not of_table:
            shown[name] = f"{EMPTY}\n"
        elif name in tables.content["tables"]:
            arms = tables.content["tables"][name]["arms"]
            shown[name] = compared(arms, of_table, seconds or {}) + spent(arms, of_table, seconds or {})
            shown[name] += "".join(f"\n![{title}]({file})\n" for file, title in file_names(name).items())
        else:
            shown[name] = _of_steps(of_table, is_rates=name.startswith(RATES))
    return shown


def pictures_of(tables: StudyTables, lines: Sequence[Line], seconds: Seconds) -> dict[str, bytes]:
    """File name -> SVG, of all tables that have lines."""
    made: dict[str, bytes] = {}
    for name, content in tables.content["tables"].items():
        table = Compared.of(content["arms"], [line for line in lines if line["table"] == name], seconds)
        if table is not None and table.others:
            made |= pictures(name, table)
    return made


def compared(arms: Sequence[str], lines: Sequence[Line], seconds: Seconds) -> str:
    """The table of arms that have a line, each compared with the first."""
    table = Compared.of(arms, lines, seconds)
    if table is None:
        return f"{EMPTY}\n"
    steps, found = table.first.steps, table.differences
    rows = [["arm", "seeds", f"KL at step {steps}, nats", *WAYS, "p (Holm)", "at equal tokens", "could have found"]]
    rows.append(["---"] * len(rows[0]))
    tokens = {arm: one for arm, one in found["equal tokens"].items() if arm != AGAIN}
    adjusted = dict(zip(tokens, holm([one.p for one in tokens.values()]), strict=True))
    margin = MARGIN * table.first.kl(steps)
    for name, arm in table.arms.items():
        row = [f"`{name}`", str(len(arm.lines)), f"{arm.kl(min(steps, arm.steps)):.4f}"]
        row += [_shown(found[way].get(name)) for way in WAYS]
        if name in tokens:
            one = tokens[name]
            row += [f"{adjusted[name]:.3f}", verdict(one, adjusted[name], margin), f"{one.detectable:.4f}"]
        else:
            row += ["", "noise: other seeds" if name == AGAIN else "", ""]
        rows.append(row)
    return _table(rows)


def spent(arms: Sequence[str], lines: Sequence[Line], seconds: Seconds) -> str:
    """What each arm's steps cost, as multiples of the first arm's, and the other figures at its last step."""
    table = Compared.of(arms, lines, seconds)
    if table is None:
        return ""
    rows = [["arm", "steps", "teacher queries", "head passes", "work a step", "seconds a step", *FIGURES.values()]]
    rows.append(["---"] * len(rows[0]))
    first = table.first
    for name, arm in table.arms.items():
        costs = [arm.cost_of_step(key) / first.cost_of_step(key) for key in COSTS]
        times = [seconds.get(one) for one in (name, first.name)]
        row = [f"`{name}`", str(arm.steps), *(f"{cost:.2f}" for cost in costs)]
        row.append(f"{times[0] / times[1]:.2f}" if times[0] and times[1] else "")
        row += [_form(figure, arm.figure(figure)) for figure in FIGURES]
        rows.append(row)
    return "\n" + _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _form(figure: str, value: float) -> str:
    return f"{value:.2f}" if figure == "perplexity" else f"{value:.1%}"


def _shown(one: Difference | None) -> str:
    return "" if one is None else f"{one.value:+.4f} ({one.low:+.4f} to {one.high:+.4f})"


def _of_steps(lines: Sequence[Line], is_rates: bool) -> str:
    rows = ["| run | learning rate | step: KL, nats |\n| --- | --- | --- |\n"]
    for line in lines:
        total = sum(line["positions"])
        by_step = ", ".join(f"{step}: {sum(values) / total:.4f}" for step, values in line["kl_nats"].items())
        rows.append(f"| `{line['arm']}` | {line['learning_rate']:g} | {by_step} |\n")
    return "".join(rows) + ("\nThe lowest KL at the last step is each family's rate.\n" if is_rates else "")


if __name__ == "__main__":
    sys.exit(main())
