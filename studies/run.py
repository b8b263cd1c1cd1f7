"""One table of the study: every run that is not done yet, in the order of value, and a line of the record for each.

    python studies/prepare.py --data DIR --out TEXTS
    python studies/run.py recovered --data TEXTS --out RUNS          # a starting student, which is kept
    python studies/run.py rates_recovered --data TEXTS --out RUNS    # its learning rates
    python studies/run.py headline --data TEXTS --out RUNS           # a table, one seed after another
    python studies/run.py headline --data TEXTS --out RUNS --scale paper --list

The same command goes on where it was interrupted. A run is done when its line is in the record, which it takes over
from another table that had the same run; its folder stays, without the student's weights unless ``--keep`` is given.
``--list`` prints the runs and whether they are done; with ``--scale`` it checks the recipes of another size, which
``selkd estimate`` takes from ``--recipes DIR``. ``--time`` times a step of each arm, on an idle machine, into
docs/results/study_seconds.json. On two cores, two commands with ``OMP_NUM_THREADS=1`` and ``--share 1/2`` and ``2/2``
are faster than one after another with both.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compare import require_alike
from records import Line, append, digest, line_of, rates_of, read_lines, seconds_of_step
from tables import RATES, TABLES, StudyRun, StudyTables

from selkd.errors import InputError
from selkd.recipe.choices import FractionSchedule
from selkd.recipe.files import to_yaml
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.sweep.runner import run_apart
from selkd.sweep.sharing import with_shared_paths

RECORD = Path(__file__).parents[1] / "docs" / "results" / "study.jsonl"
TIMED_STEPS = 7


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("table", help="a starting student, rates_ and its name, or a table of tables.yaml")
    options.add_argument("--data", type=Path, required=True, help="the folder that prepare.py wrote")
    options.add_argument("--out", type=Path, required=True, help="the folder of the runs")
    options.add_argument("--record", type=Path, default=RECORD, help="the file of the lines (docs/results/study.jsonl)")
    options.add_argument("--tables", type=Path, default=TABLES, help="the file of the tables (studies/tables.yaml)")
    options.add_argument("--scale", help="a part of scales, such as paper")
    options.add_argument("--seeds", type=int, help="only the first so many seeds")
    options.add_argument("--arms", nargs="+", metavar="ARM", help="only these arms of the table")
    options.add_argument("--share", default="1/1", metavar="K/N", help="only each Nth run, from the Kth on")
    options.add_argument("--list", action="store_true", help="print the runs, and do none")
    options.add_argument("--keep", action="store_true", help="keep the students' weights, for tasks.py")
    options.add_argument("--time", action="store_true", help="time a step of each arm instead, twice in turns")
    options.add_argument("--recipes", type=Path, help="write the runs' recipes into this folder, and do none")
    given = options.parse_args(arguments)
    try:
        return _run_table(given)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run_table(given: argparse.Namespace) -> int:
    tables = StudyTables.read(given.tables, given.data, given.out, given.scale)
    lines = read_lines(given.record)
    runs = [
        run
        for run in tables.runs(given.table, _rates(tables, given.table, given.arms, lines))
        if given.arms is None or run.arm in given.arms
    ]
    if unknown := set(given.arms or ()) - {run.arm for run in runs}:
        raise InputError(f"--arms: {given.table} has no {', '.join(sorted(unknown))}")
    if given.seeds is not None:
        runs = [run for run in runs if run.seed % 100 <= given.seeds]
    first, every = map(int, given.share.split("/"))
    runs = runs[first - 1 :: every]
    done = _done(runs, lines, is_own_scale=given.scale is None)
    if given.recipes is not None:
        given.recipes.mkdir(parents=True, exist_ok=True)
        for run in runs:
            (given.recipes / f"{run.recipe.name}.yaml").write_text(to_yaml(run.recipe), encoding="utf-8")
    if given.list or given.recipes is not None:
        for run in runs:
            print(f"{run.id}: {'done' if run.id in done else 'to do'}")
        return 0
    if given.time:
        return _time([run for run in runs if run.seed == runs[0].seed], given)
    failed = [run.id for run in runs if run.id not in done and not (_takes_over(run, lines, given) or _run(run, given))]
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    if given.table.startswith(RATES) and not failed:
        print(json.dumps(rates_of(read_lines(given.record), given.table), indent=1))
    return 1 if failed else 0


def _done(runs: Sequence[StudyRun], lines: Sequence[Line], *, is_own_scale: bool) -> set[str]:
    """The ids of the runs that have a line. At another scale the lines of other recipes are passed over.

    Raises:
        InputError: a line is of another recipe than the run that it should be of.
    """
    by_id = {(line["table"], line["arm"], line["seed"]): line for line in lines}
    found = {run.id: line for run in runs if (line := by_id.get((run.table, run.arm, run.seed))) is not None}
    other = [run.id for run in runs if run.id in found and found[run.id]["recipe"] != digest(run.recipe)]
    if other and is_own_scale:
        raise InputError(
            f"{', '.join(other)}: the record has a line of another recipe. Take the lines out, with those of all that "
            "began with its student, or undo the change of tables.yaml."
        )
    return set(found) - set(other)


def _rates(
    tables: StudyTables, table: str, arms: Sequence[str] | None, lines: Sequence[Line]
) -> Mapping[str, float] | None:
    """The learning rate of each family of ``arms``, as the table of rates of the table's start found it; of the other
    families any."""
    if tables.scale is not None or table not in tables.content["tables"]:
        return None
    name = f"{RATES}{tables.content['tables'][table]['start']}"
    needed = {tables.family(arm) for arm in arms or tables.content["tables"][table]["arms"] if arm in tables.arms}
    runs = [run for run in tables.runs(name) if run.arm.rpartition("_")[0] in needed]
    if missing := sorted({run.id for run in runs} - _done(runs, lines, is_own_scale=True)):
        raise InputError(f"{table}: no learning rate yet; run {name} first. Missing: {', '.join(missing)}")
    of_grid = {run.arm for run in runs}
    any_rate = dict.fromkeys(tables.content["families"], tables.content["rates"][0])
    return any_rate | rates_of([line for line in lines if line["arm"] in of_grid], name)


def _time(runs: Sequence[StudyRun], given: argparse.Namespace) -> int:
    """Seconds of a step of each arm: the least of two turns' medians over a few steps, all arms in each turn.

    A scheduled fraction has steps of several costs, so that arm is not timed.
    """
    runs = [run for run in runs if not isinstance(run.recipe.positions.fraction, FractionSchedule)]
    path = given.record.with_name("study_seconds.json")
    of_tables = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    seconds = of_tables.setdefault(given.table, {})
    for turn in (1, 2):
        for run in runs:
            content = run.recipe.resolved()
            content["training"] |= {"max_steps": TIMED_STEPS}
            content["evaluation"] |= {"suite": [], "every_steps": None}
            recipe = with_shared_paths(parse_part(Recipe, content), (given.out / "shared").absolute())
            folder = given.out / "timing" / run.id / str(turn)
            if why := run_apart(recipe, folder, given.out / "logs" / f"timing-{given.table}-{run.arm}.log"):
                print(f"{run.arm}: failed: {why}", file=sys.stderr)
                return 1
            shutil.rmtree(folder / "student")
            found = seconds_of_step(folder)
            seconds[run.arm] = found if turn == 1 else min(found, seconds[run.arm])
            print(f"{run.arm}: {found} s a step", file=sys.stderr, flush=True)
    path.write_text(json.dumps(of_tables, indent=1) + "\n", encoding="utf-8")
    return 0


def _takes_over(run: StudyRun, lines: Sequence[Line], given: argparse.Namespace) -> bool:
    """Add the line of another table's run of the same recipe and seed; False if none is, or weights are wanted."""
    if given.keep or run.table == run.arm:
        return False
    own = (digest(run.recipe), run.seed)
    same = next((line for line in lines if (line["recipe"], line["seed"]) == own and line["table"] != run.table), None)
    if same is None:
        return False
    taken = {**same, "table": run.table, "arm": run.arm}
    try:
        require_alike([*_lines_beside(run, given), taken])
    except ValueError:
        return False  # it began with another student than this table's lines: this run is done anew
    append(given.record, taken)
    print(f"{run.id}: the same as {same['table']}/{same['arm']}", file=sys.stderr)
    return True


def _run(run: StudyRun, given: argparse.Namespace) -> bool:
    """Do one run and add its line; False if it failed.

    Raises:
        InputError: it began with another student than the record's lines of its table.
    """
    is_start = run.table == run.arm
    path = given.out / run.table if is_start else given.out / "runs" / run.id
    print(f"{run.id}: running", file=sys.stderr, flush=True)
    recipe = with_shared_paths(run.recipe, (given.out / "shared").absolute())
    why = run_apart(recipe, path, given.out / "logs" / f"{run.id}.log")
    if why is not None:
        print(f"{run.id}: failed: {why}", file=sys.stderr, flush=True)
        return False
    line: dict[str, Any] = line_of(path, run.table, run.arm, run.seed)
    try:
        require_alike([*_lines_beside(run, given), line])
    except ValueError as error:
        raise InputError(
            f"{run.id}: not recorded: {error}. The starting student, or this processor's arithmetic, is another. "
            f"Begin a record of its own with --record FILE, its table of rates first; the run in {path} is kept."
        ) from None
    append(given.record, line)
    if not is_start and not given.keep:
        for weights in (path / "student").glob("*.safetensors"):
            weights.unlink()
    print(f"{run.id}: KL {line['figures']['kl_nats']:.4f} nats", file=sys.stderr, flush=True)
    return True


def _lines_beside(run: StudyRun, given: argparse.Namespace) -> list[Line]:
    return [line for line in read_lines(given.record) if line["table"] == run.table]


if __name__ == "__main__":
    sys.exit(main())
