"""Writes the tables of docs/results/study.md from the record.

    python studies/page.py            # write them
    python studies/page.py --check    # exit code 1 if the page is not what the record says

A table stands between ``<!-- study: NAME -->`` and ``<!-- end of study -->``. Arms are compared with the table's first
one on the same seeds and documents: at equal student tokens (the first arm's last step), at equal work counted, and at
equal seconds, where ``docs/results/study_seconds.json`` has an arm's seconds of a step on an idle machine. Between
two measured steps each document's sum is interpolated.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from inference import Difference, holm, paired, verdict
from records import Line, read_lines
from tables import RATES, TABLES, StudyTables

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SHARE_OF_COST = 0.75  # the cost at which arms are compared, as a share of the first arm's whole cost
MARGIN = 0.02  # of the first arm's KL: what counts as good
EMPTY = "No run yet."
AGAIN = "dense_again"  # the first arm with other seeds: what is found there is noise, and no hypothesis
Seconds = Mapping[str, float]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true")
    given = options.parse_args()
    seconds_file, page = RESULTS / "study_seconds.json", RESULTS / "study.md"
    seconds = json.loads(seconds_file.read_text(encoding="utf-8")) if seconds_file.exists() else {}
    before = page.read_text(encoding="utf-8")
    tables = StudyTables.read(TABLES, Path(), Path())
    after = filled(before, tables_of(tables, read_lines(RESULTS / "study.jsonl"), seconds))
    if not given.check:
        page.write_text(after, encoding="utf-8")
    return int(given.check and before != after)


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
            shown[name] = compared(tables.content["tables"][name]["arms"], of_table, seconds or {})
        else:
            shown[name] = _of_steps(of_table, is_rates=name.startswith(RATES))
    return shown


def compared(arms: Sequence[str], lines: Sequence[Line], seconds: Seconds) -> str:
    """The table of arms that have a line, each compared with the first."""
    by_arm: dict[str, dict[int, Line]] = {}
    for line in lines:
        by_arm.setdefault(line["arm"], {})[line["seed"] % 100] = line  # the noise floor's seed 101 beside seed 1
    first = arms[0]
    if first not in by_arm:
        return f"{EMPTY}\n"
    steps = next(iter(by_arm[first].values()))["steps"]
    ways = {
        "equal tokens": lambda _: float(steps),
        "equal work": lambda line: _steps_for(line, by_arm[first], _work),
        "equal seconds": lambda line: _steps_for(line, by_arm[first], lambda one: seconds.get(one["arm"])),
    }
    rows = [
        ["arm", "seeds", f"KL at step {steps}, nats", *ways, "p (Holm)", "at equal tokens", "could have found"],
        ["---"] * (len(ways) + 6),
    ]
    present = [arm for arm in arms if arm in by_arm]
    found = {way: {arm: _difference(by_arm[first], by_arm[arm], at) for arm in present[1:]} for way, at in ways.items()}
    tokens = {arm: one for arm, one in found["equal tokens"].items() if one is not None and arm != AGAIN}
    adjusted = dict(zip(tokens, holm([one.p for one in tokens.values()]), strict=True))
    margin = MARGIN * _mean(by_arm[first], steps)
    for arm in present:
        row = [f"`{arm}`", str(len(by_arm[arm])), f"{_mean(by_arm[arm], steps):.4f}"]
        row += [_shown(found[way].get(arm)) for way in ways]
        if arm in tokens:
            one = tokens[arm]
            row += [f"{adjusted[arm]:.3f}", verdict(one, adjusted[arm], margin), f"{one.detectable:.4f}"]
        else:
            row += ["", "noise: other seeds" if arm == AGAIN else "", ""]
        rows.append(row)
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def at_step(line: Line, step: float) -> np.ndarray | None:
    """The documents' sums at ``step``, interpolated between measured ones; None after the last."""
    measured = {int(name): np.array(values) for name, values in line["kl_nats"].items()}
    known = sorted(measured)
    if step > known[-1] + 1e-9:
        return None
    above = next(one for one in known if one >= step - 1e-9)
    below = max((one for one in known if one <= step), default=above)
    share = 0.0 if above == below else (step - below) / (above - below)
    return np.asarray((1 - share) * measured[below] + share * measured[above])


def _difference(first: Mapping[int, Line], arm: Mapping[int, Line], at: Any) -> Difference | None:
    """``arm`` less ``first`` on the seeds that both have, at the steps that ``at`` gives for a line."""
    pairs = []
    for seed in sorted(first.keys() & arm.keys()):
        if first[seed]["held_out"] != arm[seed]["held_out"]:
            raise ValueError(f"seed {seed}: {arm[seed]['arm']} was measured on other documents")
        both = [at(line) for line in (arm[seed], first[seed])]
        sums = [
            None if step is None else at_step(line, step)
            for line, step in zip((arm[seed], first[seed]), both, strict=True)
        ]
        if any(one is None for one in sums):
            return None
        pairs.append(sums)
    if not pairs:
        return None
    ours, theirs = (np.stack(column) for column in zip(*pairs, strict=True))
    return paired(ours, theirs, np.array(next(iter(first.values()))["positions"], dtype=float))


def _steps_for(line: Line, first: Mapping[int, Line], cost_of_step: Any) -> float | None:
    """The steps of ``line`` that cost as much as ``SHARE_OF_COST`` of the first arm's steps."""
    base = first.get(line["seed"] % 100, next(iter(first.values())))
    ours, theirs = cost_of_step(line), cost_of_step(base)
    return None if not ours or not theirs else SHARE_OF_COST * base["steps"] * theirs / ours


def _work(line: Line) -> float:
    return float(line["cost"]["work_in_steps"] / line["steps"])


def _mean(lines: Mapping[int, Line], step: int) -> float:
    of_seeds = [at_step(line, min(step, line["steps"])) for line in lines.values()]
    positions = np.array(next(iter(lines.values()))["positions"])
    return float(np.mean([one.sum() / positions.sum() for one in of_seeds if one is not None]))


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
