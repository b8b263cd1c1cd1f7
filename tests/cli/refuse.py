"""Runs commands that are to be refused, each in a process forked from one that has imported what they need.

``python refuse.py ROOT light|heavy < cases.json`` prints a line of JSON for each. A case is a mapping with
``arguments``, ``here`` (the folder it runs in) and ``listed`` (the folders that it must leave as they are). A light
case's process has imported neither torch nor Transformers; whether it did is part of its result.
"""

import gc
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

LIGHT = """cli.main recipe.files recipe.pruning sweep.study evaluation.options tokens.policy tokens.text tokens.views
    bench.names reporting.page reporting.comparison reporting.comparison_page"""
HEAVY = """run.pipeline run.verify_cache sweep.sweep evaluation.command tokens.command bench.report estimate.estimate
    estimate.probe"""
SECONDS = 100  # after which a case is ended: no judgement of its speed


def listing(folders: list[str]) -> dict[str, list[int]]:
    """All that is in the folders, files with their size, number and time of modification.

    Of folders only that they are there: a run's is made and locked while its inputs are looked for, then taken away.
    """
    found: dict[str, list[int]] = {}
    for path in [path for folder in folders for path in sorted(Path(folder).rglob("*"))]:
        status = path.lstat()
        found[str(path)] = [] if path.is_dir() else [status.st_size, status.st_ino, status.st_mtime_ns]
    return found


def refused(case: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Exit code, output, what was imported and what changed of one case, run in a process of its own."""
    before = listing(case["listed"])
    outputs = [scratch / "out", scratch / "err", scratch / "modules"]
    child = os.fork()
    if child == 0:
        _run(case, outputs)
    _, status = os.waitpid(child, 0)
    out, err, modules = (path.read_text(errors="replace") if path.exists() else "" for path in outputs)
    for path in outputs:
        path.unlink(missing_ok=True)
    after = listing(case["listed"])
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "out": out, "err": err, "modules": modules.split(), "changed": changed}


def _run(case: dict[str, Any], outputs: list[Path]) -> None:
    code: Any = 70
    try:
        signal.alarm(SECONDS)
        os.chdir(case["here"])
        for descriptor, path in ((0, Path(os.devnull)), (1, outputs[0]), (2, outputs[1])):
            flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(path, flags, 0o600), descriptor)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["selkd", *case["arguments"]]
        try:
            sys.modules["selkd.cli.main"].main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        sys.stdout.flush()
        sys.stderr.flush()
        outputs[2].write_text(" ".join(name for name in ("torch", "transformers") if name in sys.modules))
    finally:
        os._exit(code if isinstance(code, int) else 1)


def main() -> None:
    root, kind = Path(sys.argv[1]), sys.argv[2]
    for name in (LIGHT if kind == "light" else f"{LIGHT} {HEAVY}").split():
        importlib.import_module(f"selkd.{name}")
    if kind == "heavy":
        import torch

        torch.set_num_threads(1)
    sys.modules["selkd.recipe.files"].load_recipe("demo")  # fills what is read once in a process
    gc.freeze()  # so that no case's process looks through, and copies, what was imported here
    for case in json.load(sys.stdin):
        print(json.dumps({"name": case["name"], **refused(case, root)}), flush=True)


if __name__ == "__main__":
    main()
