"""Tasks of the user's own, by path, by folder, in a recipe; and how quickly an unknown name is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_eval_command import Run, selkd_eval  # noqa: F401  a fixture
from tiny_benchmarks import save_model

from selkd.errors import InputError
from selkd.evaluation.harness import load_tasks
from selkd.recipe.evaluation import EvaluationOptions
from selkd.recipe.part import parse_part

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}, train: {rows}}}}}
test_split: test
fewshot_split: train
num_fewshot: 1
output_type: generate_until
doc_to_text: "Q: {{{{question}}}} A:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_gen_toks: 3, until: ["\\n"]}}
process_results: !function scoring.lengths
metric_list:
  - {{metric: letters, aggregation: mean, higher_is_better: true}}
"""
SCORING = """\
EACH = 1
def lengths(doc, results):
    return {"letters": EACH * len(doc["answer"])}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with two tasks of one's own and a group of them; a row's measure is the length of its answer."""
    folder = tmp_path / "own"
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"q{n}", "answer": "a" * n}) + "\n" for n in range(1, 5)))
    (folder / "scoring.py").write_text(SCORING)
    for name in ("mine", "yours"):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, rows=rows))
    (folder / "both.yaml").write_text("group: both_of_us\ntask: [mine, yours]\n")
    return folder


def test_own_tasks_are_measured_by_path_name_and_group(selkd_eval: Run, own: Path, tmp_path: Path) -> None:  # noqa: F811
    model = save_model(tmp_path / "model")
    for arguments, names in (
        (("--suite", own / "mine.yaml"), {"mine"}),
        (("--suite", "yours", "--include-path", own), {"yours"}),
        (("--suite", "both_of_us", "--include-path", own), {"mine", "yours"}),
    ):
        code, out, err = selkd_eval(model, *arguments, "--json")
        assert code == 0, err
        assert "runs your own code" in err  # a task's file is code, as module:function is
        (answer,) = json.loads(out)["models"]
        assert answer["tasks"].keys() == names
        for task in answer["tasks"].values():
            assert task["metrics"]["letters"]["value"] == pytest.approx(2.5)
            assert task["shots"] == 1  # of its file
    (own / "scoring.py").write_text(SCORING.replace("EACH = 1", "EACH = 2"))  # what was kept is not found again
    for module in [name for name, loaded in sys.modules.items() if str(own) in str(getattr(loaded, "__file__", ""))]:
        del sys.modules[module]  # as in a new process
    code, out, _ = selkd_eval(model, "--suite", own / "mine.yaml", "--json")
    assert json.loads(out)["models"][0]["tasks"]["mine"]["metrics"]["letters"]["value"] == pytest.approx(5)
    code, _, err = selkd_eval(model, "--suite", own / "mine.yaml", "--no-plugins")
    assert code == 2
    assert "--no-plugins refuses it" in err


@pytest.mark.parametrize("template", ["{{question.", "{{nothing.here}}"])
def test_a_template_that_cannot_be_applied_is_told_with_the_task(
    template: str,
    selkd_eval: Run,  # noqa: F811
    own: Path,
    tmp_path: Path,
) -> None:
    text = (own / "mine.yaml").read_text()
    (own / "mine.yaml").write_text(text.replace("Q: {{question}} A:", template))
    code, _, err = selkd_eval(save_model(tmp_path / "model"), "--suite", own / "mine.yaml")
    assert code == 2
    assert "mine" in err
    assert "the harness can't make a" in err


def test_what_is_no_task_of_ones_own_is_refused(own: Path, tmp_path: Path) -> None:
    (own / "run.yaml").write_text(
        (own / "mine.yaml").read_text().replace("task: mine", "task: runs\nunsafe_code: true")
    )
    (tmp_path / "empty").mkdir()
    for name in ("pipe", "link"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / "x.yaml")  # the harness would wait for a writer
    (tmp_path / "link" / "x.yaml").symlink_to(tmp_path / "nowhere")
    (tmp_path / "plain.yaml").write_text("a: 1\n")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "x.yaml").write_text("task: piqa\n")
    for content, message in (
        ({"suite": ["mine2"], "include_path": [str(own)]}, "evaluation.suite: 'mine2' is not known. .*'mine'"),
        ({"suite": ["none.yaml"]}, "evaluation.suite: there is no file 'none.yaml'"),
        ({"suite": [str(tmp_path / "plain.yaml")]}, "is no task of lm-evaluation-harness"),
        ({"suite": ["mine"], "include_path": str(tmp_path / "empty")}, "evaluation.include_path: no .yaml file"),
        ({"suite": ["mine"], "include_path": "nowhere"}, "evaluation.include_path: no folder 'nowhere'"),
        ({"suite": ["x"], "include_path": str(tmp_path / "pipe")}, "has the name of a task's file and is none"),
        ({"suite": ["x"], "include_path": str(tmp_path / "link")}, "has the name of a task's file and is none"),
        ({"suite": ["piqa"], "include_path": str(hidden)}, "a task is called 'piqa', as one of selkd's is"),
        ({"include_path": str(own)}, "evaluation.include_path: only benchmarks have include_path"),
    ):
        with pytest.raises(InputError, match=message):
            parse_part(EvaluationOptions, content, "evaluation")
    with pytest.raises(InputError, match="runs the model's code"):
        load_tasks("runs", None, 0, [str(own)])
    assert parse_part(EvaluationOptions, {"suite": ["mine", "mine"], "include_path": str(own)}).suite == ["mine"]


def test_an_unknown_task_is_refused_without_the_harness() -> None:
    code = (
        "import sys\nfrom selkd.recipe.files import load_recipe\n"
        "try: load_recipe('se_kd', ['evaluation.suite=[boolqq]'])\nexcept ValueError as error: print(error)\n"
        "load_recipe('se_kd', ['evaluation.suite=[boolq, mmlu]'])\n"
        "print([name for name in ('lm_eval', 'torch', 'datasets') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Did you mean 'boolq'?" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
