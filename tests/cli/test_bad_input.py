"""Every kind of bad input ends as bad input: exit code 2, the key or the place named, nothing written, nothing deleted.

What a recipe or the arguments alone decide is refused without torch and without Transformers, so within two seconds.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bad_input import CASES, Case
from tiny_run import make_recipe

HERE = Path(__file__).parent
Answers = dict[str, dict[str, Any]]


def placed(case: Case, root: Path) -> dict[str, Any]:
    """A case with its files in a folder of its own, ready to run."""
    here, toy = root / "cases" / str(CASES.index(case)), root / "toy"
    here.mkdir(parents=True)
    for name, content in case.files.items():
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    if case.prepare is not None:
        case.prepare(here, toy)
    arguments = [argument.replace("{toy}", str(toy)).replace("{here}", str(here)) for argument in case.arguments]
    listed = [str(here), str(toy)] + ([] if case.needs_models else [str(root / "cache" / "light")])
    return {"name": case.name, "arguments": arguments, "here": str(here), "listed": listed}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """The result of every case, by its name."""
    root = tmp_path_factory.mktemp("bad")
    (root / "toy").mkdir()
    (root / "toy" / "recipe.yaml").write_text(json.dumps(make_recipe(root / "toy")))
    common = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    runners = []
    for kind, needs_models in (("light", False), ("heavy", True)):
        scratch, cache = root / kind, root / "cache" / kind
        scratch.mkdir()
        cache.mkdir(parents=True)
        cases = [placed(case, root) for case in CASES if case.needs_models == needs_models]
        (root / f"{kind}.json").write_text(json.dumps(cases))
        with (root / f"{kind}.json").open() as given, (root / f"{kind}.jsonl").open("w") as told:
            command = [sys.executable, HERE / "refuse.py", scratch, kind]
            environment = {**os.environ, **common, "SELKD_CACHE": str(cache)}
            runners.append(subprocess.Popen(command, stdin=given, stdout=told, env=environment))
    assert [runner.wait() for runner in runners] == [0, 0]
    lines = [line for kind in ("light", "heavy") for line in (root / f"{kind}.jsonl").read_text().splitlines()]
    return {answer["name"]: answer for answer in map(json.loads, lines)}


def test_there_are_250_cases_with_names_of_their_own() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 250


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_ends_as_bad_input(case: Case, answers: Answers) -> None:
    answer = answers[case.name]
    said = re.sub(r"[\s│]+", " ", answer["err"])  # Typer breaks its lines within a box
    assert answer["code"] == 2, said[-2000:]
    assert re.search(case.message, said), said[:2000]
    assert "Traceback" not in said
    assert len(said) < 4000
    assert answer["out"] == ""
    assert answer["changed"] == []
    if not case.needs_models:
        assert answer["modules"] == []
