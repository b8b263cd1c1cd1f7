"""``selkd tokens`` as a user meets it: what it prints, the page it writes, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import selkd
from tiny import make_model
from tiny_run import make_teacher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from selkd import reference
from selkd.data.collate import collate
from selkd.data.encoding import encode
from selkd.data.packing import split
from selkd.models.tokenizers import token_texts

TEXT = " ".join(f"w{2 + 7 * i % 80}" for i in range(60))
HOSTILE = (
    "</div><script>alert(1)</script>[red]x[/] :smile: \x1b[31m \x9b31m \x07 \u202e "
    "<img src=http://a.b/c onerror=x> \"&'"
)
TAGS = {"html", "head", "meta", "title", "style", "body", "main", "header", "footer", "div", "article"}
TAGS |= {"p", "h1", "h2", "h3", "span", "i", "mark"}


@pytest.fixture
def run_selkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    return lambda *arguments: selkd(monkeypatch, capsys, "tokens", *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one vocabulary, one of another, and one whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("models")
    make_teacher(folder / "student", seed=0)
    make_teacher(folder / "teacher", seed=1)
    make_model(2).save_pretrained(folder / "other")
    words = {"<unk>": 0, "<end>": 1} | {f"v{i}": i for i in range(2, 83)}
    other = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=other, eos_token="<end>", unk_token="<unk>").save_pretrained(
        folder / "other"
    )
    byte_tokenizer().save_pretrained(folder / "bytes")
    make_model(3, vocab_size=257, max_position_embeddings=512).save_pretrained(folder / "bytes")
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Each byte of UTF-8 a token: whatever the text, it survives."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)} | {"<end>": 256}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def expected(folder: Path, metric: str, max_length: int) -> dict[str, Any]:
    """Scores [B, T] and the batch, from the models' own full logits in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    samples = list(split(encode(tokenizer, [TEXT]), max_length))
    batch = collate(samples, tokenizer.pad_token_id)
    logits = [
        AutoModelForCausalLM.from_pretrained(folder / name)(batch["input_ids"]).logits.detach()
        for name in ("student", "teacher")
    ]
    scores = reference.importance(metric, *logits, batch["targets"], batch["valid_mask"])
    return {"scores": scores, "batch": batch, "samples": samples}


@pytest.mark.parametrize("metric", ["student_entropy", "soft_or"])
def test_json_agrees_with_the_reference(run_selkd, folder: Path, monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    monkeypatch.setattr("selkd.tokens.command.native_dtype", lambda _: torch.float32)
    options = {
        "top_k": {},
        "top_k,fraction=0.07": {"fraction": 0.07},
        "curriculum,progress=0.5": {"progress": 0.5},
        "pos_rs,smoothing=2,coverage=0.3": {"smoothing": 2, "coverage": 0.3},
        "pos_rs_corrected,skip_first=3": {"skip_first": 3},
        "gls": {},
        "weighted": {},
        "random": {},
        "all": {},
        "top_k,fraction={from: 1.0, to: 0.2},progress=0.5": {"fraction": 0.6},
    }
    policies = [argument for label in options for argument in ("--policy", label)]
    teacher = ("--teacher", folder / "teacher") if metric == "soft_or" else ()
    arguments = ("--metric", metric, "--max-length", 24, "--seed", 5, "--json", *teacher)
    code, out, err = run_selkd(folder / "student", TEXT, *arguments, *policies)
    assert code == 0, err
    found, truth = json.loads(out), expected(folder, metric, 24)
    assert [len(sample["tokens"]) for sample in found["samples"]] == [24, 24, 13]  # 60 words and the end token
    assert "".join(found["samples"][0]["tokens"]) == " ".join(TEXT.split()[:24])
    assert found["metric"] == metric
    assert [option["label"] for option in found["options"]] == list(options)
    for row, sample in enumerate(found["samples"]):
        length, valid = len(sample["tokens"]), truth["batch"]["valid_mask"][row].tolist()
        assert sample["valid"] == valid[:length]
        assert sample["sample_id"] == truth["samples"][row].id.hex()
        for position, score in enumerate(sample["scores"]):
            value = truth["scores"][row, position].item() if valid[position] else None
            assert score == (None if value is None else pytest.approx(value, abs=2e-4))
    for index, (label, option) in enumerate(options.items()):
        coefficients = reference.select(
            label.partition(",")[0],
            truth["scores"],
            truth["batch"]["valid_mask"],
            **{"fraction": 0.2, "seed": 5, "sample_ids": truth["batch"]["sample_ids"].numpy()} | option,
        )
        if label == "gls":  # its weights are of a whole step; here they only say which
            coefficients = (coefficients > 0) / (coefficients > 0).sum(dim=-1, keepdim=True)
        for row, sample in enumerate(found["samples"]):
            wanted = coefficients[row, : len(sample["tokens"])].tolist()
            assert sample["coefficients"][index] == pytest.approx(wanted, rel=1e-3), label


def test_a_process_that_is_piped_hostile_text(folder: Path, tmp_path: Path) -> None:
    """No colour in a pipe: what is selected stands between marks; nothing of the text works as code anywhere."""
    command = [sys.executable, "-m", "selkd", "tokens", folder / "bytes", "--html", tmp_path / "page.html"]
    done = subprocess.run(
        [*map(str, command), "--policy", "top_k", "--policy", "pos_rs"], input=HOSTILE.encode(), capture_output=True
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, err
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out)
    head, first, second = re.split(r"^top_k  .*|^pos_rs  .*", out, flags=re.MULTILINE)
    length = len(HOSTILE.encode())
    assert f"{length + 1} tokens" in head
    for block in (first, second):
        text = re.sub("[«»]", "", block)
        assert "</div><script>alert(1)</script>[red]x[/] :smile: ␛[31m" in text
        assert "<img src=http://a.b/c onerror=x> \"&'<end>" in text
    assert first.count("«") == -(-length // 5)
    assert f"top_k  {-(-length // 5)} of {length} positions" in out
    assert "drawn with seed 1337" in second

    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert tags_of(page) <= TAGS
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import", page)
    assert page.count('<mark class="plain">') >= -(-length // 5)
    # Values are there for the keyboard as for the pointer: no tooltip that only a mouse shows.
    assert " title=" not in page
    assert page.count('data-tip="') == 2 * (length + 1)
    stops = re.findall(r'<span [^>]*data-tip="([^"]*)" tabindex="0" role="note" aria-label="([^"]*)"', page)
    assert len(stops) >= 2 * 8
    assert all(label.endswith(tip) and "selected" in tip for tip, label in stops)


def tags_of(page: str) -> set[str]:
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, _: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(page)
    return set(tags)


def test_a_browser_shows_the_page_without_a_complaint(run_selkd, folder: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    page, broken = tmp_path / "page.html", tmp_path / "broken.html"
    text = (HOSTILE + "\n") * 8
    arguments = ("--policy", "weighted", "--policy", "top_k", "--policy", "all", "--max-length", 400)
    code, _, err = run_selkd(folder / "bytes", text, "--html", page, *arguments)
    assert code == 0, err
    # What would be seen if one token were not escaped: the page's own policy refuses the image, aloud.
    broken.write_text(page.read_text(encoding="utf-8").replace("<footer>", "<img src=http://a.b/c><footer>"))

    def browse(file: Path) -> tuple[str, str]:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=390,800"]
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        done = subprocess.run(
            [browser, *flags, profile, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=60
        )
        return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)

    dom, complaints = browse(page)
    assert complaints == ""
    assert tags_of(dom) <= TAGS
    assert dom.count("<article>") == 9  # three policies on three samples
    assert "a.b/c" in browse(broken)[1]


def test_colours_reach_a_terminal(run_selkd, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    code, out, err = run_selkd(folder / "student", TEXT)
    assert code == 0, err
    assert len(re.findall(r"\x1b\[7;38;[0-9;]*mw\d+\x1b\[0m", out)) == 12  # ceil(20% of 60), reversed
    assert "«" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    code, out, err = run_selkd(folder / "student", TEXT)
    assert "38;" not in out
    assert len(re.findall(r"«w\d+»", out)) == 12


def test_a_metric_and_a_policy_of_the_users_own(
    run_selkd, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_of_tokens.py").write_text(
        "def target_logit(student_logits, targets):\n"
        "    return student_logits.gather(-1, targets[:, None]).squeeze(-1)\n"
        "def first(valid_mask):\n"
        "    return valid_mask & (valid_mask.cumsum(-1) == 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ("--metric", "mine_of_tokens:target_logit", "--policy", "mine_of_tokens:first", "--json")
    code, out, err = run_selkd(folder / "student", TEXT, *arguments)
    assert code == 0, err
    (sample,) = json.loads(out)["samples"]
    assert sample["selected"] == [True] + [False] * 60


def test_the_text_comes_from_a_file_or_the_demo(run_selkd, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w2 w3 w4", encoding="utf-8")
    code, out, err = run_selkd(folder / "student", "--file", tmp_path / "text.txt", "--json", "--teacher", "none")
    assert code == 0
    assert "so it was not loaded" in err
    assert json.loads(out)["samples"][0]["tokens"] == ["w2", " w3", " w4", " <end>"]
    with pytest.MonkeyPatch.context() as patch, Path("/dev/null").open() as nothing:
        patch.setattr(sys, "stdin", nothing)
        code, _, err = run_selkd(folder / "bytes")
    assert code == 0
    assert "demo text" in err


def test_what_is_refused(run_selkd, folder: Path, tmp_path: Path) -> None:
    student = folder / "student"
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    cases: dict[tuple[object, ...], str] = {
        ("nowhere", TEXT, "--metric", "student_entropi"): "Did you mean 'student_entropy'",
        ("nowhere", TEXT, "--policy", "topk"): "Did you mean 'top_k'",
        ("nowhere", TEXT, "--policy", "pos_rs,smoothin=2"): "Did you mean 'smoothing'",
        ("nowhere", TEXT, "--policy", "pos_rs,smoothing"): "expected key=value",
        ("nowhere", TEXT, "--policy", "pos_rs,smoothing=0"): "positions.smoothing",
        ("nowhere", TEXT, "--policy", "top_k,clip=0.5"): "positions.clip: an option of pos_rs",
        ("nowhere", TEXT, "--policy", "curriculum,progress=2"): "the share of the run that is done",
        ("nowhere", TEXT, "--policy", "curriculum,curriculum_steps=4000"): "a text has none",
        ("nowhere", TEXT, "--policy", "top_k,fraction=0.1,fraction=0.2"): "stands twice",
        ("nowhere", TEXT, "--policy", "fraction=0.1"): "the policy's name comes first",
        ("nowhere", TEXT, "--fraction", "0"): "positions.fraction",
        ("nowhere", TEXT, "--metric", "kl"): "give --teacher MODEL",
        ("nowhere", TEXT, "--policy", "top_k,metric=ce_ratio"): "metric ce_ratio looks at the teacher",
        ("nowhere", TEXT, "--html", tmp_path): "this is a folder",
        ("nowhere", TEXT, "--html", tmp_path / "none" / "a.html"): "there is no folder",
        ("nowhere", "--file", tmp_path / "latin.txt", "--html", tmp_path / "latin.txt"): "this is the text",
        ("nowhere", TEXT, "--file", tmp_path / "latin.txt"): "give one of them",
        ("nowhere", "--file", tmp_path / "latin.txt"): "is not UTF-8 text",
        ("nowhere", "--file", tmp_path / "none.txt"): "can't be read",
        ("nowhere", "half a pair: \ud800"): "is not UTF-8 text",
        ("nowhere", "  "): "holds no text",
        (tmp_path / "none", TEXT): "there is no such folder",
        (student, TEXT, "--max-length", "65"): "has positions for 64",
        (student, TEXT, "--metric", "kl", "--teacher", folder / "other"): "different tokenizers",
    }
    for arguments, message in cases.items():
        code, out, err = run_selkd(*arguments)
        assert code == 2, (arguments, err)
        assert out == ""
        assert message in err, (arguments, err)
        assert "Traceback" not in err


def test_scores_that_are_not_finite_stop_it(
    run_selkd, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "endless_metric.py").write_text("def at_w9(targets):\n    return 1.0 / (targets - 9)\n")
    monkeypatch.chdir(tmp_path)
    code, out, err = run_selkd(folder / "student", TEXT, "--metric", "endless_metric:at_w9")
    assert code == 1
    assert out == ""
    assert "endless_metric:at_w9 is inf at position 0 of sample 1 (after the token 'w2')" in err


def test_the_tokens_texts_join_to_the_text() -> None:
    tokenizer = byte_tokenizer()
    for text in ("naïve 日本語 🙂👩‍👩‍👧!", "\ufffd\ufffdx", "🙂"):
        texts = token_texts(tokenizer, tokenizer(text)["input_ids"])
        assert len(texts) == len(text.encode())
        assert "".join(texts).replace("\ufffd", "") == text.replace("\ufffd", "")
