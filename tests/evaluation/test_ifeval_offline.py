"""IFEval without a network: nltk's sentence model comes from a package, and the harness's verifier judges."""

import subprocess
import sys
from pathlib import Path

import nltk
import pytest

from selkd.evaluation.ifeval import prepare_ifeval

TEXT = "Dr. Smith went to Washington. He met Mr. Jones at 3 p.m. on Friday. Was it late? No!"


@pytest.fixture
def no_nltk_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *_: pytest.fail("nltk would download"))


@pytest.mark.usefixtures("no_nltk_data")
def test_the_sentence_model_is_put_in_place_once(tmp_path: Path) -> None:
    with pytest.raises(LookupError):
        nltk.data.find("tokenizers/punkt_tab/english/")
    prepare_ifeval(tmp_path)
    tokenizer = nltk.data.load("nltk:tokenizers/punkt/english.pickle")  # as the harness asks for it
    assert tokenizer.tokenize(TEXT) == [
        "Dr. Smith went to Washington.",
        "He met Mr. Jones at 3 p.m. on Friday.",
        "Was it late?",
        "No!",
    ]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.t*") if path.is_file()}
    assert len(files) == 4
    prepare_ifeval(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_the_harness_imports_and_judges_without_a_network(tmp_path: Path) -> None:
    """In a fresh process with every connection refused and no data of nltk's on this machine."""
    code = f"""
import socket
def refused(*arguments, **options): raise OSError("no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refused
import nltk
nltk.data.path = []
from pathlib import Path
from selkd.evaluation.ifeval import prepare_ifeval
prepare_ifeval(Path({str(tmp_path)!r}))
from lm_eval.tasks.ifeval.utils import process_results
doc = {{"key": 1, "prompt": "x", "instruction_id_list": ["length_constraints:number_sentences", "keywords:existence"],
       "kwargs": [{{"num_sentences": 2, "relation": "at least"}}, {{"keywords": ["soup"]}}]}}
for answer in ("Dr. No ate soup. It was hot.", "Dr. No ate soup", "*It was hot. He ate.*"):
    found = process_results(doc, [answer])
    print(int(found["prompt_level_strict_acc"]), found["inst_level_strict_acc"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-3:] == ["1 [True, True]", "0 [False, True]", "0 [True, False]"]
