"""``selkd eval`` as a user meets it: figures, what is kept, comparisons, and bad input."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_tokenizer
from tiny_benchmarks import ROWS, make_byte_tokenizer, save_model, write_rows
from tiny_run import make_recipe, make_text
from transformers import AutoModelForCausalLM

from selkd import distill
from selkd.cli.main import main
from selkd.errors import InputError
from selkd.evaluation.evaluated_model import find_model

Run = Callable[..., tuple[int, str, str]]
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"


@pytest.fixture
def selkd_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        given = ["selkd", "eval", *map(str, arguments), "--out", str(tmp_path / "kept"), "--dtype", "float32"]
        monkeypatch.setattr(sys, "argv", given)
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data")


def loglikelihood(model: Any, context: str, continuation: str) -> float:
    """Plain torch: the sum of the continuation's log-probabilities."""
    tokenizer = make_byte_tokenizer()
    before, after = tokenizer(context)["input_ids"], tokenizer(continuation)["input_ids"]
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([before + after])).logits[0].double(), dim=-1)
    return float(sum(log_p[len(before) - 1 + i, token] for i, token in enumerate(after)))


@pytest.mark.usefixtures("short_answers")
def test_the_paper_suite(selkd_eval: Run, data: Path, tmp_path: Path) -> None:
    """Every figure of ARC-Easy is computed again in plain torch; the suite's are means of the tasks'."""
    folder = save_model(tmp_path / "model")
    code, out, err = selkd_eval(folder, "--suite", "paper", "--data", data, "--json")
    assert code == 0, err
    answer = json.loads(out)
    (model,) = answer["models"]
    tasks = {name: content["metrics"] for name, content in model["tasks"].items()}
    assert tasks.keys() == {"hellaswag", "piqa", "arc_easy", "gsm8k", "lambada", "ifeval"}
    assert all(content["shots"] == 0 for content in model["tasks"].values())

    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    right, right_norm, confidence = [], [], []
    for row in ROWS["arc_easy_test.jsonl"]:
        texts, gold = row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
        scores = np.array([loglikelihood(loaded, f"Question: {row['question']}\nAnswer:", f" {t}") for t in texts])
        right.append(scores.argmax() == gold)
        right_norm.append((scores / [len(t) for t in texts]).argmax() == gold)
        confidence.append(np.exp(scores.max()) / np.exp(scores).sum())
    assert tasks["arc_easy"]["acc"]["value"] == pytest.approx(np.mean(right))
    assert tasks["arc_easy"]["acc_norm"]["value"] == pytest.approx(np.mean(right_norm))
    (kept,) = (tmp_path / "kept").rglob("arc_easy-*/examples.jsonl")
    examples = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [example["measures"]["ece"][0] for example in examples] == pytest.approx(confidence, rel=1e-4)
    assert [example["measures"]["ece"][1] for example in examples] == right

    words = [row["text"].rsplit(" ", 1) for row in ROWS["lambada_openai_test.jsonl"]]
    nll = -np.mean([loglikelihood(loaded, context, f" {word}") for context, word in words])
    assert tasks["lambada"]["perplexity"]["value"] == pytest.approx(np.exp(nll), rel=1e-4)

    counted = {"hellaswag": "acc_norm", "piqa": "acc", "arc_easy": "acc", "lambada": "acc"}
    values = [tasks[name][metric]["value"] for name, metric in counted.items()]
    values.append(tasks["gsm8k"]["exact_match,flexible-extract"]["value"])
    paper = model["paper"]
    assert paper["acc"]["value"] == pytest.approx(np.mean(values))
    choices = [tasks[name]["ece"]["value"] for name in ("hellaswag", "piqa", "arc_easy")]
    assert paper["ece_choices"]["value"] == pytest.approx(np.mean(choices))
    assert paper["ece_last_word"] == {k: v for k, v in tasks["lambada"]["ece"].items() if k != "higher_is_better"}
    assert paper["ifeval"]["value"] == tasks["ifeval"]["prompt_level_strict_acc"]["value"]
    assert "length-normalised" in paper["acc_is_the_mean_of"]["hellaswag"]
    assert "raw" in paper["acc_is_the_mean_of"]["piqa"]


def test_what_was_measured_is_kept_and_what_is_damaged_is_not(
    selkd_eval: Run, data: Path, tmp_path: Path, no_measuring: Callable[[], None]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One day it rained, and the river rose above the bridge. " * 60)
    model = save_model(tmp_path / "model")
    arguments = (model, "--suite", "arc_easy", "--suite", "fidelity", "--limit", 3, "--data", data, "--text", text)
    arguments += ("--json",)
    code, first, err = selkd_eval(*arguments)
    assert code == 0, err
    (examples,) = (tmp_path / "kept").rglob("arc_easy-*/examples.jsonl")
    assert [json.loads(line)["row"] for line in examples.read_text().splitlines()] == [0, 2, 4]
    examples.write_text(examples.read_text().replace("Question", "question"))
    assert selkd_eval(*arguments)[0] == 0
    assert "Question" in examples.read_text()  # measured again
    no_measuring()
    code, again, _ = selkd_eval(*arguments)
    assert code == 0
    assert json.loads(again)["models"][0]["tasks"]["fidelity"] == json.loads(first)["models"][0]["tasks"]["fidelity"]
    other = save_model(tmp_path / "other", seed=1)
    for changed in ((*arguments, "--limit", 4), (other, *arguments[1:])):
        code, _, err = selkd_eval(*changed)
        assert code == 1
        assert "it was measured again" in err


def test_cut_prompts_are_told(selkd_eval: Run, data: Path, tmp_path: Path) -> None:
    long, short = save_model(tmp_path / "long"), save_model(tmp_path / "short", max_position_embeddings=48)
    asked = (f"long={long}", f"short={short}", "--suite", "piqa", "--data", data)
    code, out, err = selkd_eval(*asked, "--json")
    assert code == 0, err
    roomy, tight = json.loads(out)["models"]
    assert "cut" not in roomy
    told = "6 of 6 prompts were longer, with room for the answer, than the model's 48 tokens and were cut from the left"
    assert tight["cut"] == {"piqa": told}
    assert [m["tasks"]["piqa"]["prompts_cut"] for m in (roomy, tight)] == [0, 6]
    code, out, _ = selkd_eval(*asked)  # found again, and told again
    assert f"short, piqa: {told}." in " ".join(out.split())
    assert "long, piqa:" not in out


def test_a_kept_result_of_another_format_is_refused(selkd_eval: Run, data: Path, tmp_path: Path) -> None:
    arguments = (save_model(tmp_path / "model"), "--suite", "piqa", "--data", data)
    assert selkd_eval(*arguments)[0] == 0
    (kept,) = (tmp_path / "kept").rglob("piqa-*/result.json")
    written = kept.read_text()
    assert '"format": "selkd-eval-2"' in written
    for other in ('"selkd-eval-99"', "null"):
        kept.write_text(written.replace('"selkd-eval-2"', other))
        code, _, err = selkd_eval(*arguments)
        assert code == 2
        told = " ".join(err.split())
        assert "result.json: expected the format 'selkd-eval-2', got " in told
        assert "Move its folder away to measure again" in told
        assert other in kept.read_text()
    kept.write_text("[]")  # damaged: measured anew
    assert selkd_eval(*arguments)[0] == 0
    assert json.loads(kept.read_text())["format"] == "selkd-eval-2"


@pytest.mark.usefixtures("short_answers")
def test_numbers_that_are_not_finite_are_an_error(selkd_eval: Run, data: Path, tmp_path: Path) -> None:
    """PIQA's accuracy was 0.5, and GSM8K's 0, whatever the logits."""
    broken = {"nan": save_model(tmp_path / "nan"), "huge": save_model(tmp_path / "huge")}
    for kind, folder in broken.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            if kind == "nan":
                model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
            else:
                model.model.norm.weight.mul_(3000.0)
        model.save_pretrained(folder)
    cases = {
        ("nan", "piqa"): (1, "piqa: the model's logits: expected a finite number, got nan. The model's weights"),
        ("nan", "gsm8k"): (1, "gsm8k: the model's logits: expected a finite number, got nan"),
        ("nan", "lambada"): (1, "lambada: the model's logits: expected a finite number, got nan"),
        ("nan", "fidelity"): (2, "LlamaForCausalLM: expected numbers as logits, got nan on a few tokens"),
        ("huge", "lambada"): (1, "lambada: one of its figures: expected a finite number, got inf"),
        ("huge", "fidelity"): (1, "fidelity, perplexity: expected a finite number, got inf"),
    }
    for (kind, task), (expected, message) in cases.items():
        local = () if task == "fidelity" else ("--data", data)
        code, out, err = selkd_eval(broken[kind], "--suite", task, *local, "--limit", 2, "--json")
        assert (code, out) == (expected, ""), (kind, task, err)
        assert message in err
        assert "Traceback" not in err
    assert not list((tmp_path / "kept").rglob("result.json"))


def test_two_models_are_compared_example_by_example(selkd_eval: Run, data: Path, tmp_path: Path) -> None:
    ours, theirs = save_model(tmp_path / "a"), save_model(tmp_path / "b", seed=1)
    suite = ("--suite", "hellaswag", "--suite", "lambada", "--data", data)
    code, out, err = selkd_eval(f"SE-KD={ours}", f"Full KD={theirs}", *suite, "--json")
    assert code == 0, err
    answer = json.loads(out)
    (comparison,) = answer["comparisons"]
    assert (comparison["model"], comparison["against"]) == ("SE-KD", "Full KD")
    figures = [model["tasks"]["lambada"]["metrics"]["perplexity"] for model in answer["models"]]
    found = comparison["tasks"]["lambada"]["perplexity"]
    assert found["value"] == pytest.approx(figures[0]["value"] - figures[1]["value"])
    assert found["standard_error"] > 0
    assert comparison["tasks"]["hellaswag"].keys() == {"acc", "acc_norm", "ece"}
    assert "acc" not in comparison  # the suite's, of which three benchmarks are missing

    code, out, _ = selkd_eval(f"SE-KD={ours}", f"same={ours}", *suite)
    assert code == 0
    assert "SE-KD against same, lambada acc: 0.0 ± 0" in " ".join(out.split())
    assert "0-shot; accuracy by log-likelihood a character (length-normalised)" in " ".join(out.split())


def test_a_model_may_be_a_runs_student_and_have_a_sign_in_its_path(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "lr=0.1" / "student")
    (tmp_path / "lr=0.1" / "record.json").write_text('{"name": "slow"}')
    device = torch.device("cpu")
    found = [
        find_model(given, "float32", device)
        for given in (str(folder), str(tmp_path / "lr=0.1"), f"mine={tmp_path / 'lr=0.1'}")
    ]
    assert [model.name for model in found] == [str(folder), "slow", "mine"]
    assert len({model.fingerprint for model in found}) == 1
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "record.json").write_text("{}")
    with pytest.raises(InputError, match="is a run without a finished student"):
        find_model(str(tmp_path / "empty"), "float32", device)
    for nameless in ("", "x=", f"={folder}"):
        with pytest.raises(InputError, match=r"expected MODEL or NAME=MODEL\."):
            find_model(nameless, "float32", device)


def test_a_runs_student_on_its_own_training_text_is_told(
    selkd_eval: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(tmp_path, samples=None, cache=None, classes={"sampler": "all"}, evaluation={"suite": []})
    recipe["training"]["max_steps"] = 1
    run, other = distill(recipe, tmp_path / "run").path, make_text(tmp_path / "other.jsonl", seed=5)
    shares = {}
    for text in (recipe["data"]["path"], other):
        caplog.clear()
        code, out, err = selkd_eval(run, f"copy={run / 'student'}", "--text", text, "--json")
        assert code == 0, err
        student, copy = json.loads(out)["models"]
        shares[text] = student["training_overlap"]
        assert copy["training_overlap"] is None  # nobody knows what a folder of weights was trained on
        assert ("of the tokens that fidelity is measured on stand in the text" in caplog.text) == (text != other)
    assert shares[other] == 0
    assert shares[recipe["data"]["path"]] > 0.5
    shutil.rmtree(Path(os.environ["SELKD_CACHE"]) / "tokenised")
    code, out, _ = selkd_eval(run, "--text", other, "--json")
    assert json.loads(out)["models"][0]["training_overlap"] is None


def test_a_validation_suite_says_what_it_had_to_leave_out(selkd_eval: Run, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", "arc_easy_validation.jsonl", "piqa_train.jsonl")
    code, out, err = selkd_eval(save_model(tmp_path / "m"), "--suite", "validation", "--data", data, "--json")
    assert code == 0, err
    (model,) = json.loads(out)["models"]
    assert model["tasks"].keys() == {"arc_easy_validation", "piqa_train"}
    assert model["left_out"].keys() == {"gsm8k_train", "hellaswag_train"}
    assert model["validation"]["accuracy_is_the_mean_of"] == ["arc_easy_validation", "piqa_train"]
    values = [model["tasks"][name]["metrics"]["acc"]["value"] for name in model["tasks"]]
    assert model["validation"]["value"] == pytest.approx(np.mean(values))


def test_bad_input_exits_with_2(selkd_eval: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selkd.recipe.evaluation.harness_tasks", lambda: ["boolq", "copa"])  # the true list takes long
    model = save_model(tmp_path / "model")
    short = save_model(tmp_path / "short", max_position_embeddings=128)
    cases: dict[tuple[object, ...], str] = {
        (model, "--suite", "papper"): "and the 2 tasks of lm-evaluation-harness. Did you mean 'paper'?",
        (model, "--suite", "piqa", "--data", tmp_path / "none"): "data: no folder",
        (model, "--suite", "piqa", "--data", tmp_path): "piqa: none of piqa_valid.jsonl is in",
        (model, "--suite", "paper", "--data", tmp_path): "paper: none of hellaswag_val.jsonl",
        (tmp_path / "none", "--suite", "piqa", "--data", data): "there is no such folder",
        (model, model, "--suite", "piqa", "--data", data): "two models are called",
        (f"x={model}", "x=", "--suite", "piqa", "--data", data): "expected MODEL or NAME=MODEL",
        (short, "--suite", "ifeval", "--data", data): "answers may be 1280 tokens long, and the model has 128",
        (model, "--suite", "piqa", "--data", data, "--chat-template"): "the tokenizer has none",
        (model, "--suite", "piqa", "--data", data, "--teacher", model): "add --suite fidelity",
        (model, "--text", tmp_path / "none.txt"): "there is no file or folder",
        (model, "--text-field", "body", "--suite", "piqa", "--data", data): "text_field: only the suite fidelity looks",
        (model, "--text", "x.txt", "--suite", "piqa", "--data", data): "text: only the suite fidelity looks at it",
        (model, "--shots", 2): "shots: only benchmarks look at it, and the suite is fidelity. Leave it out, or add",
        (model, "--chat-template"): "chat_template: only benchmarks look at it",
        (model, "--batch-size", 2): "batch_size: only benchmarks look at it",
        (model, "--data", data): "data: only benchmarks look at it",
        (
            model,
            "--suite",
            "lambada",
            "--suite",
            "piqa_train",
            "--data",
            data,
            "--shots",
            2,
        ): "lambada, piqa_train can't",
    }
    for arguments, message in cases.items():
        code, out, err = selkd_eval(*arguments)
        assert code == 2, (arguments, err)
        assert message in err
        assert "Traceback" not in err
        assert out == ""


def test_bad_input_is_found_before_any_weights_are_loaded(
    selkd_eval: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what only the second model or the last task can't do."""

    def refuse(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("selkd.evaluation.evaluated_model.load_model", refuse)
    monkeypatch.setattr("selkd.recipe.evaluation.harness_tasks", lambda: ["boolq"])
    model, other = save_model(tmp_path / "model"), save_model(tmp_path / "other")
    make_tokenizer().save_pretrained(other)
    short = save_model(tmp_path / "short", max_position_embeddings=128)
    chat = make_byte_tokenizer()
    chat.chat_template = CHAT_TEMPLATE
    chat.save_pretrained(save_model(tmp_path / "chat"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "piqa_valid.jsonl").write_text("{}\n")
    cases: dict[tuple[object, ...], str] = {
        (model, other, "--teacher", model): "teacher and student have different tokenizers",
        (model, "--suite", "fidelity", "--suite", "piqa", "--data", tmp_path / "broken"): "piqa rows have goal, sol1",
        (model, "--suite", "hellaswag", "--suite", "boolq", "--data", data): "boolq: has no local form",
        (model, short, "--suite", "piqa", "--suite", "gsm8k", "--data", data): "the model has 128 positions",
        (tmp_path / "chat", model, "--suite", "piqa", "--data", data, "--chat-template"): "the tokenizer has none",
    }
    for arguments, message in cases.items():
        code, _, err = selkd_eval(*arguments)
        assert code == 2, (arguments, err)
        assert message in err
        assert not (tmp_path / "kept").exists()
    (tmp_path / "kept").write_text("a file")
    code, _, err = selkd_eval(model, "--suite", "piqa", "--data", data)
    assert code == 2
    assert "kept: expected a folder that can be written" in err


def test_an_answer_of_other_prompts_or_settings_is_not_found_again(
    selkd_eval: Run, data: Path, tmp_path: Path, no_measuring: Callable[[], None]
) -> None:
    """A tokenizer without a chat template used to be answered with the plain prompts' result."""
    model = save_model(tmp_path / "model")
    plain = (model, "--suite", "piqa", "--data", data)
    assert selkd_eval(*plain)[0] == 0
    assert selkd_eval(*plain, "--chat-template")[0] == 2
    chat = make_byte_tokenizer()
    chat.chat_template = CHAT_TEMPLATE
    chat.save_pretrained(model)
    no_measuring()
    assert selkd_eval(*plain)[0] == 0
    settings = model / "generation_config.json"
    with_penalty = json.dumps(json.loads(settings.read_text()) | {"repetition_penalty": 1.5})
    for change in ("template", "template of other words", "penalty"):
        if change == "template of other words":
            chat.chat_template += " "
            chat.save_pretrained(model)
        if change == "penalty":
            settings.write_text(with_penalty)
        code, _, err = selkd_eval(*plain, *(() if change == "penalty" else ("--chat-template",)))
        assert code == 1
        assert "it was measured again" in err
