"""Answers and files that are not what they seem are refused with their place, and nothing of them is stored."""

import json
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_distributed import torchrun
from tiny import V, make_samples, make_tokenizer

from selkd import interrupts
from selkd.data.samples import Sample
from selkd.errors import InputError, Interrupted
from selkd.foreign.files import ReadOptions, open_sources
from selkd.foreign.responses import TokenNames, UnreadableAnswer, scored
from selkd.foreign.scored import Piece, Scored, Truncation
from selkd.foreign.served import ServedTeacher, stored_piece
from selkd.recipe.models import TeacherOptions
from selkd.teacher import build_cache
from selkd.teacher.build_cache import CacheBuild
from selkd_cache.verify import verify_cache
from selkd_cache.writer import SampleRows

NAN, INFINITY = float("nan"), float("inf")
SENT = [5, 6, 7]


def stored(answer: Any) -> None:
    known = scored(answer, TokenNames(make_tokenizer()), SENT)
    stored_piece(known, Piece(0, 3, np.array([1, 2])), Truncation(4, True, V))


def of_prompt(row: Any, rows: int = 3) -> dict[str, Any]:
    return {"choices": [{"prompt_logprobs": [None, {"6": {"logprob": -1.0}}, row, None][:rows]}]}


def of_echo(top: Any, tokens: Sequence[Any] = ("w5", "w6", "w7")) -> dict[str, Any]:
    return {"choices": [{"logprobs": {"tokens": list(tokens), "top_logprobs": [None, {"w6": -1.0}, top]}}]}


def test_a_good_answer_is_stored() -> None:
    stored(of_prompt({"7": {"logprob": -1.0}, "8": {"logprob": -INFINITY}, "9": -(10**400), str(V + 5): -1.5}))
    stored(of_echo({"w7": -1.0}))


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        {"choices": {}},
        {"choices": [[]]},
        {"choices": [{"prompt_token_ids": ["5", "6", "7"], "prompt_logprobs": [None, {}, {}]}]},
        {"choices": [{"prompt_token_ids": [5, 6, 8], **of_prompt({"7": -1.0})["choices"][0]}]},
        of_prompt({"7": -1.0}, rows=2),
        of_prompt({"8": -1.0}),
        of_prompt({"7": NAN}),
        of_prompt({"7": -1.0, "8": NAN}),
        of_prompt({"7": INFINITY}),
        of_prompt({"7": 10**400}),
        of_prompt({"7": 800.0}),
        of_prompt({"7": 0.5}),
        of_prompt({"7": -0.1, "8": -0.1}),
        of_prompt({"7": True}),
        of_prompt({"7": "-1"}),
        of_prompt({"7": -1.0, "w8": -1.0}),
        of_prompt({"7": -1.0, "²": -1.0}),
        of_prompt({"7": -1.0, "9" * 40: -1.0}),
        of_prompt({"7": -1.0, "-8": -1.0}),
        of_prompt({"7": -1.0, "07": -1.0, "007": -1.0, "8": 3}),
        of_prompt([["7", -1.0]]),
        of_echo({"w7": NAN}),
        of_echo({"w7": 1.0}),
        of_echo({"w7": -1.0}, ["w5", "w6"]),
        of_echo({"w7": -1.0}, ["w5", "w6", "w8"]),
        of_echo({"w7": -1.0}, ["w5", "w6", None]),
        of_echo({"w7": -1.0}, ["w5", "w6", ["w7"]]),
        of_echo({"w7": -1.0}, [5, 6, 7]),
    ],
    ids=lambda answer: json.dumps(answer)[:70],
)
def test_an_answer_that_no_teacher_gives_is_refused(answer: Any) -> None:
    with pytest.raises((UnreadableAnswer, InputError)):
        stored(answer)


def test_a_class_that_is_listed_twice_is_refused() -> None:
    with pytest.raises(InputError, match="listed twice"):
        Truncation(4, True, V).stored(np.array([[7, 8, 7]]), np.log([[0.5, 0.2, 0.1]]))
    # Beyond the kept ones, or beyond the vocabulary, nothing of it is stored.
    rows = Truncation(2, True, V).stored(
        np.array([[7, 8, V + 1, V + 1, -1, -1]]), np.log([[0.5, 0.2, 0.1, 0.1, 0.01, 0.01]])
    )
    assert rows.class_ids.tolist() == [7, 8, V]


def read(path: Path, **options: Any) -> list[Scored]:
    (source,) = open_sources([path], TokenNames(make_tokenizer()), ReadOptions(**options))
    return list(source.read())


AXOLOTL = {"input_ids": SENT, "target_token_ids": [[6], [7]], "target_logprobs": [[-1.0], [-1.0]]}


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"a":' * 50_000,
        '{"input_ids": [' + "9" * 5000 + "]}",
        "\x00",
        '"text"',
        json.dumps(AXOLOTL | {"input_ids": [5, 6, 10**30]}),
        json.dumps(AXOLOTL | {"input_ids": [5, 6.5, 7]}),
        json.dumps(AXOLOTL | {"input_ids": [[5], [6], [7]]}),
        json.dumps(AXOLOTL | {"input_ids": [5, -6, 7]}),
        json.dumps(AXOLOTL | {"input_ids": {"5": 6}}),
        json.dumps(AXOLOTL | {"target_token_ids": [[10**30], [7]]}),
        json.dumps(AXOLOTL | {"target_token_ids": [[6.5], [7]]}),
        json.dumps(AXOLOTL | {"target_token_ids": 6}),
        json.dumps(AXOLOTL | {"target_token_ids": [[6, 7], [7]]}),
        json.dumps(AXOLOTL | {"target_logprobs": [["x"], [-1.0]]}),
        json.dumps({"input_ids": SENT, "logprobs": [[{"token": 6, "logprob": -1.0}], [5]]}),
        json.dumps({"input_ids": SENT, "logprobs": [["ab"], ["ab"]]}),
        json.dumps({"prompt_token_ids": [10**30], "prompt_logprobs": [None]}),
    ],
    ids=lambda line: line[:60],
)
def test_a_line_that_is_none_is_refused_with_its_number(line: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(AXOLOTL) + "\n" + line + "\n")
    with pytest.raises(InputError, match=r"answers\.jsonl, line 2: "):
        read(path)
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=r"answers\.jsonl, line 1: "):
        read(path)


KIT = {"input_ids": [SENT], "compressed_logprobs": [[[0] * 8, [0] * 8]], "bytepacked_indices": [[[5, 6], [7, 8]]]}
CONFIG = "{d: 256, k: 2, exact_k: 2, exact_dtype: float32, residual_bins: [], delta_encoding: false}"


@pytest.mark.parametrize(
    "columns",
    [
        KIT | {"input_ids": [["a", "b"]]},
        KIT | {"input_ids": [None]},
        KIT | {"input_ids": [[5.5, 6.0, 7.0]]},
        KIT | {"input_ids": [[2**60]]},
        KIT | {"input_ids": [[5, None, 7]]},
        KIT | {"input_ids": [5]},
        KIT | {"compressed_logprobs": [None]},
        KIT | {"compressed_logprobs": [[None, None]]},
        KIT | {"compressed_logprobs": [[[0] * 8, [0] * 7]]},
        KIT | {"compressed_logprobs": [[["x"] * 8, ["y"] * 8]]},
        KIT | {"compressed_logprobs": [[[0] * 3, [0] * 3]]},
        KIT | {"bytepacked_indices": [[[5], [7]]]},
        KIT | {"bytepacked_indices": [[[5, 6]]]},
        {"input_ids": [SENT], "target_token_ids": [[["x"], ["y"]]], "target_logprobs": [[[-1.0], [-1.0]]]},
        {"input_ids": [SENT], "target_token_ids": [[[6], [7]]], "target_logprobs": [[[-1.0]]]},
        {"input_ids": [SENT], "target_token_ids": [[[6], None]], "target_logprobs": [[[-1.0], [-1.0]]]},
    ],
    ids=str,
)
def test_columns_of_other_types_are_refused_with_their_row(columns: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "compression_config.yaml").write_text(CONFIG)
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    with pytest.raises(InputError, match=r"data\.parquet(, row 1: |: can't be read as Parquet)"):
        read(tmp_path / "data.parquet")


def test_a_text_of_one_token_has_no_distribution_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "compression_config.yaml").write_text(CONFIG)
    empty = {"input_ids": [[], [5], *KIT["input_ids"]]}
    empty |= {name: [[], [], *KIT[name]] for name in ("compressed_logprobs", "bytepacked_indices")}
    pq.write_table(pa.table(empty), tmp_path / "data.parquet")
    assert [known.class_ids.tolist()[1:] for known in read(tmp_path / "data.parquet")] == [[], [], [[5, 6], [7, 8]]]


def test_who_is_asked_to_end_waits_for_no_answer() -> None:
    """A server may take minutes over an answer, and a job's grace time is shorter."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        requests = {"parallel": 2, "attempts": 1, "timeout_seconds": 150}
        server = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        teacher = TeacherOptions.model_validate({"model": "ü\u2028", "server": server, "requests": requests})
        asked = ServedTeacher(teacher, TokenNames(make_tokenizer()), Truncation(4, True, V))
        raised = []

        def ask() -> None:
            try:
                asked.rows(list(make_samples(2)))
            except Interrupted as error:
                raised.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            connections = [silent.accept() for _ in range(2)]
            interrupts.ask("SIGTERM")
            thread.join(60)
        finally:
            interrupts.forget()
    assert len(connections) == 2
    assert raised, "it waits for the answers"


class Answers:
    """A teacher from elsewhere, whose rows are of one class each."""

    def __init__(self, class_id: int) -> None:
        self.class_id = class_id

    def rows(self, samples: Sequence[Sample]) -> list[SampleRows]:
        return [
            (s.id, np.ones(s.n_valid, int), np.full(s.n_valid, self.class_id), np.full(s.n_valid, 4)) for s in samples
        ]


FINGERPRINT = {"teacher": "toy", "vocabulary": V, "sampler": "top_k", "draws": 4, "temperature": 1.0}


def test_a_shard_of_a_faster_build_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's answers vary; a shard that a finished cache's manifest describes must not be written again."""
    monkeypatch.setattr(build_cache, "SHARD_TOKENS", 60)
    samples = make_samples(12)
    slower, faster = (CacheBuild(tmp_path, FINGERPRINT, samples) for _ in range(2))
    assert len(slower.missing) > 2

    class Slow(Answers):
        def rows(self, samples: Sequence[Sample]) -> list[SampleRows]:
            faster.run(lambda: Answers(7), 1)
            return super().rows(samples)

    slower.write(slower.missing, Slow(8), 1)
    assert verify_cache(tmp_path) == []


ONE_REFUSAL = """
import sys
from pathlib import Path
from accelerate import PartialState
from test_hostile import FINGERPRINT, Answers
from tiny import make_samples
from selkd.errors import InputError
from selkd.teacher import build_cache

rank = PartialState(cpu=True).process_index
build_cache.SHARD_TOKENS = 60

class Refusing(Answers):
    def rows(self, samples):
        if rank:
            raise InputError("teacher.server: refuses")
        return super().rows(samples)

build = build_cache.CacheBuild(Path(sys.argv[1], "cache"), FINGERPRINT, make_samples(12))
try:
    build.run(lambda: Refusing(7), 1)
except InputError as error:
    Path(sys.argv[1], f"rank-{rank}").write_text(str(error))
"""


@pytest.mark.slow
def test_a_refusal_on_one_process_is_told_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = (Path(__file__).parent, Path(__file__).parents[1] / "training")
    for folder in folders:
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    worker = tmp_path / "worker.py"
    worker.write_text(ONE_REFUSAL)
    done = torchrun(str(worker), str(tmp_path), timeout_seconds=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["teacher.server: refuses"] * 2
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert "shard-00000.selkd" in names
    assert names.isdisjoint({"shard-00001.selkd", "manifest.json"})
