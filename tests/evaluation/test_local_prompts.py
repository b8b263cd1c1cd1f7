"""Local rows give the prompts and the scores that the hub's rows give, and the prompts that the harness documents."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from tiny_benchmarks import ROWS, evaluated, save_model, write_rows
from transformers import AutoModelForCausalLM

from selkd.errors import InputError
from selkd.evaluation.benchmarks import KNOWN
from selkd.evaluation.harness import load_tasks, run_task, spread_rows
from selkd.recipe.evaluation import BENCHMARKS

REAL = Path(__file__).parents[2] / ".." / "shared" / "data"
HUB = {
    "hellaswag": "Rowan/hellaswag",
    "piqa": "baber/piqa",
    "arc_easy": "allenai/ai2_arc",
    "gsm8k": "openai/gsm8k",
    "lambada": "EleutherAI/lambada_openai",
    "ifeval": "google/IFEval",
}
# What the hub types otherwise than plain JSON would be.
HUB_FEATURES = {
    "piqa": Features(
        goal=Value("string"), sol1=Value("string"), sol2=Value("string"), label=ClassLabel(names=["0", "1"])
    ),
    "gsm8k": Features(question=Value("string"), answer=Value("string")),
    "arc_easy": Features(
        id=Value("string"),
        question=Value("string"),
        choices={"text": List(Value("string")), "label": List(Value("string"))},
        answerKey=Value("string"),
    ),
}
# (context, continuations or None where text is generated), written down from the harness's templates.
GOLDEN: dict[str, tuple[str, list[str] | None]] = {
    "hellaswag": (
        "Roof shingle removal: A man is sitting on a roof. He",
        [" is using wrap.", " is ripping tiles off.", " holds 0 cubes.", "  starts to pull."],
    ),
    "piqa": ("Question: How do I ready cage 0?\nAnswer:", [" Add bedding.", " Add paper scraps."]),
    "arc_easy": ("Question: Which of these 0 is warm?\nAnswer:", [" ice", " snow", " fire"]),
    "gsm8k": ("Question: Ann has 0 eggs and buys 2. How many?\nAnswer:", None),
    "lambada": ("He took the hat and gave it to her, and she was glad of the", [" hat"]),
    "ifeval": ("Write at least 2 sentences. Mention the word soup.", None),
    "arc_easy_validation": ("Question: Which of these 0 is warm?\nAnswer:", [" ice", " snow", " fire"]),
    "gsm8k_train": ("Question: What is 0 + 1?\nAnswer:", None),
}


def requests(task: Any, limit: int | None = None) -> list[tuple[int, Any]]:
    task.build_all_requests(samples=spread_rows(len(task.eval_docs), limit))
    return [(instance.doc_id, instance.args) for instance in task.instances]


def from_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The harness's ordinary task, with a hub that holds our rows: every split, as the hub types them."""
    benchmark = KNOWN[name]
    base = name.removesuffix("_train").removesuffix("_validation")
    asked = []

    def load_dataset(path: str, **options: Any) -> DatasetDict:
        asked.append((path, options))
        splits = {}
        for split, file in benchmark.files.items():
            splits[split] = Dataset.from_list(ROWS.get(file, ROWS[benchmark.file][:1]), features=HUB_FEATURES.get(base))
        return DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_tasks(name, None, 0)[name]
    assert [path for path, _ in asked] == [HUB[base]]
    assert not any(options.get("trust_remote_code") for _, options in asked)
    return task


@pytest.mark.parametrize("name", BENCHMARKS)
def test_local_and_hub_rows_give_the_same_requests(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = load_tasks(name, [write_rows(tmp_path)], 0)[name]
    assert requests(local) == requests(from_hub(name, monkeypatch))


@pytest.mark.parametrize("name", GOLDEN)
def test_the_prompts_are_the_documented_ones(name: str, tmp_path: Path) -> None:
    context, continuations = GOLDEN[name]
    task = load_tasks(name, [write_rows(tmp_path)], 0)[name]
    first = [arguments for row, arguments in requests(task) if row == 0]
    assert {arguments[0] for arguments in first} == {context}
    if continuations is not None:
        assert [arguments[1] for arguments in first] == continuations


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("name", ["arc_easy", "hellaswag", "lambada", "gsm8k"])
def test_local_and_hub_rows_give_the_same_scores(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model")).eval()
    outputs = []
    for task in (load_tasks(name, [write_rows(tmp_path / "data")], 0)[name], from_hub(name, monkeypatch)):
        rows = spread_rows(len(task.eval_docs), 4)
        task.build_all_requests(samples=rows)
        outputs.append(run_task(name, task, rows, evaluated(model), batch_size=2))
    assert outputs[0] == outputs[1]
    assert all(len(example["measures"]) >= 2 for example in outputs[0].examples)


def test_solved_examples_come_before_the_question(tmp_path: Path) -> None:
    data = write_rows(tmp_path)
    (context, _), *_ = (arguments for _, arguments in requests(load_tasks("gsm8k", [data], 2)["gsm8k"]))
    assert context.count("\n\nQuestion:") == 2
    assert context.count("#### ") == 2
    for name in ("lambada", "gsm8k_train"):  # there is nothing to take them from
        task = load_tasks(name, [data], 2)[name]
        assert task.get_config("num_fewshot") == 0
        assert "\n\n" not in requests(task)[0][1][0]


def test_the_published_nested_shape_of_arc_is_read(tmp_path: Path) -> None:
    flat = write_rows(tmp_path / "flat")
    nested = [
        {
            "id": row["id"],
            "question": {
                "stem": row["question"],
                "choices": [
                    {"text": text, "label": label}
                    for text, label in zip(row["choices"]["text"], row["choices"]["label"], strict=True)
                ],
            },
            "answerKey": row["answerKey"],
        }
        for row in ROWS["arc_easy_test.jsonl"]
    ]
    (tmp_path / "arc_easy_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in nested))
    expected = requests(load_tasks("arc_easy", [flat], 0)["arc_easy"])
    assert requests(load_tasks("arc_easy", [tmp_path], 0)["arc_easy"]) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 7 is not valid JSON"),
        ("[1]", "line 7: expected an object with goal, sol1, sol2, label"),
        ('{"goal": "x", "sol1": "a", "label": 0}', "line 7: piqa rows have .*; missing: sol2"),
    ],
)
def test_faulty_rows_are_named(line: str, message: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path, "piqa_valid.jsonl") / "piqa_valid.jsonl"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(InputError, match=message):
        load_tasks("piqa", [tmp_path], 0)


def test_rows_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no file piqa_valid.jsonl in"):
        load_tasks("piqa", [tmp_path], 0)
    (tmp_path / "piqa_valid.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no rows"):
        load_tasks("piqa", [tmp_path], 0)

    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"can't load its rows .*Couldn't reach.*a folder that holds piqa_valid.jsonl"):
        load_tasks("piqa", None, 0)
    with pytest.raises(InputError, match="has no local form"):
        load_tasks("boolq", [tmp_path], 0)


def test_a_limit_is_spread_over_all_rows() -> None:
    assert spread_rows(10, None) == range(10)
    assert spread_rows(10, 20) == range(10)
    assert spread_rows(10, 4) == [0, 2, 5, 7]
    assert len(set(spread_rows(10_042, 1_000))) == 1_000


@pytest.mark.skipif(not REAL.is_dir(), reason="the real benchmark files are not beside this checkout")
@pytest.mark.parametrize(("name", "rows"), [("piqa", 919), ("arc_easy", 1188), ("gsm8k", 660), ("ifeval", 271)])
def test_the_real_files_are_read_whole(name: str, rows: int) -> None:
    task = load_tasks(name, [REAL / "eval"], 0)[name]
    assert len(task.eval_docs) == rows
    assert requests(task, 20)
