"""A cache is built from a teacher behind a real server, over HTTP, whatever befalls the requests."""

import json
import logging
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from completions_server import digest
from tiny import V
from tiny_run import make_recipe, make_teacher, make_text

from selkd.errors import InputError, RunError
from selkd.foreign import client
from selkd.foreign.scored import pieces
from selkd.models.tokenizers import PROBES
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.pipeline import cache_only, distill
from selkd.run.workspace import Workspace
from selkd.teacher import build_cache
from selkd_cache.reader import TeacherCache

SERVER = Path(__file__).with_name("completions_server.py")
CLASSES = {"sampler": "top_k", "draws": 8, "tail": True}
KEY = "secret-4711"


class Served:
    """One server's process for all tests of this file; each gives it settings of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.turn, self.whole = folder, 0, 0
        self.undisturbed: list[dict[str, Any]] = []
        self.set()
        self.process = subprocess.Popen([sys.executable, str(SERVER), str(folder / "settings.json")])
        while not (folder / "ready").exists():
            assert self.process.poll() is None, "the server ended"
            time.sleep(0.05)
        self.url = f"http://127.0.0.1:{(folder / 'ready').read_text()}/v1"

    def set(self, **settings: Any) -> str:
        """The server's address, which from now on behaves like this."""
        self.turn += 1
        own = {"turn": self.turn, "log": str(self.log), "ready": str(self.folder / "ready")}
        new = self.folder / "settings.new"
        new.write_text(json.dumps({"model": str(self.folder / "teacher")} | own | settings))
        new.rename(self.folder / "settings.json")
        return self.url if self.turn > 1 else ""

    @property
    def log(self) -> Path:
        return self.folder / f"log-{self.turn}"

    def requests(self) -> list[dict[str, Any]]:
        """What was asked since the last ``set``."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    make_teacher(folder / "teacher")
    make_teacher(folder / "student", seed=1)
    make_text(folder / "text.jsonl", n_sections=60)
    running = Served(folder)
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture(autouse=True)
def small_shards_and_short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cache, "SHARD_TOKENS", 300)
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def recipe(served: Served, url: str, **changes: Any) -> Recipe:
    requests = {"parallel": 4, "timeout_seconds": 20.0, "attempts": 5} | changes.pop("requests", {})
    teacher = {"model": "toy", "server": url, "requests": requests} | changes.pop("teacher", {})
    given: dict[str, Any] = {
        "teacher": teacher,
        "student": {"model": str(served.folder / "student")},
        "classes": CLASSES,
        "samples": None,
        "evaluation": {},
    }
    return parse_part(Recipe, make_recipe(served.folder, **(given | changes)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "cost.json"}


@pytest.fixture(scope="module")
def undisturbed(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the cache that a well-behaved server gives."""
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_cache, "SHARD_TOKENS", 300)
        cache_only(recipe(served, served.set()), out)
    served.whole, served.undisturbed = len(served.requests()), served.requests()
    files = contents(out / "teacher_cache")
    assert sum(name.startswith("shard-") for name in files) > 3
    return files


def test_nothing_but_the_training_text_and_probes_is_sent(
    served: Served, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    assert undisturbed
    splits = Workspace(recipe(served, served.url), tmp_path).splits
    sent = {digest(s.token_ids[p.begin : p.end].tolist()) for s in splits.train for p in pieces(s)}
    held_out = {digest(s.token_ids[p.begin : p.end].tolist()) for s in splits.held_out for p in pieces(s)}
    assert {line["prompt"] for line in served.undisturbed} == sent | {digest(text) for text in PROBES}
    assert not held_out & sent
    fields = {
        "model",
        "prompt",
        "temperature",
        "max_tokens",
        "prompt_logprobs",
        "return_token_ids",
        "add_special_tokens",
    }
    assert {field for line in served.undisturbed for field in line["fields"]} == fields


def test_it_is_the_cache_that_the_same_model_in_memory_gives(
    served: Served, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """To a unit of 1/65,535 a class: the server's probabilities come from another softmax, and through JSON."""
    (tmp_path / "served").mkdir()
    for name, content in undisturbed.items():
        (tmp_path / "served" / name).write_bytes(content)
    here = {"teacher": {"model": str(served.folder / "teacher"), "dtype": "float32"}}
    given = recipe(served, "http://127.0.0.1:1/v1").resolved() | here
    given["evaluation"] = {"suite": []}
    cache_only(parse_part(Recipe, given), tmp_path / "memory")
    one, other = TeacherCache.open(tmp_path / "served"), TeacherCache.open(tmp_path / "memory" / "teacher_cache")
    assert one.sample_ids() == other.sample_ids()
    assert len(one) > 40
    for sample_id in one.sample_ids():
        counts = [dense(cache, sample_id) for cache in (one, other)]
        assert counts[0].shape == counts[1].shape
        assert (counts[0] - counts[1]).abs().max() <= 1


def n_samples(shard: Path) -> int:
    manifest = json.loads((shard.parent / "manifest.json").read_text())
    return next(entry["samples"] for entry in manifest["shards"] if entry["name"] == shard.name)


def dense(cache: TeacherCache, sample_id: bytes) -> torch.Tensor:
    rows = cache.get(sample_id)
    counts = torch.zeros(len(rows.row_lengths), V + 1, dtype=torch.int64)
    position = torch.arange(len(rows.row_lengths)).repeat_interleave(torch.from_numpy(rows.row_lengths.astype(int)))
    counts[position, torch.from_numpy(rows.class_ids.astype(int))] = torch.from_numpy(rows.counts.astype(int))
    assert (counts.sum(-1) == 65535).all()
    return counts


def test_faults_change_no_byte(served: Served, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    names = ["reset", "429", "500", "truncated", "cut", "503", "slow", "dripping", "nested", "garbled"]
    faults = {str(number): names[number // 3 % len(names)] for number in range(7, 80, 3)}
    url = served.set(faults=faults, slow_seconds=3)
    # Requests are counted over all texts, so by chance one text meets several faults after another.
    cache_only(recipe(served, url, requests={"timeout_seconds": 2.0, "attempts": 15}), tmp_path)
    assert contents(tmp_path / "teacher_cache") == undisturbed
    met = {line["fault"] for line in served.requests()}
    assert met == {*names, None}


def test_a_killed_build_goes_on_where_it_was(served: Served, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    url = served.set(always="slow", slow_seconds=0.3, **{"from": 40})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(served, url).resolved()))
    code = (
        "import sys; from selkd.teacher import build_cache; build_cache.SHARD_TOKENS = 300\n"
        "from selkd.run.pipeline import cache_only; from selkd.recipe.files import load_recipe\n"
        "from pathlib import Path; cache_only(load_recipe(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    shards = tmp_path / "run" / "teacher_cache"
    while len(list(shards.glob("shard-*.selkd"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in shards.glob("shard-*.selkd")}
    assert not (shards / "manifest.json").exists()
    # Meanwhile the server has moved: it is the same teacher, and the run goes on.
    moved = served.set().replace("127.0.0.1", "localhost")
    cache_only(recipe(served, moved, requests={"parallel": 2}), tmp_path / "run")
    assert contents(shards) == undisturbed
    assert all((shards / name).stat().st_mtime_ns == time_ns for name, time_ns in kept.items())
    assert len(served.requests()) <= served.whole - sum(n_samples(shards / name) for name in kept)


def test_the_echo_of_plain_completions_gives_the_same(
    served: Served, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    cache_only(recipe(served, served.set(), requests={"protocol": "openai"}), tmp_path)
    assert contents(tmp_path / "teacher_cache") == undisturbed


def test_another_tokenizer_is_found_before_a_word_is_sent(served: Served, tmp_path: Path) -> None:
    for protocol in ("vllm", "openai"):
        url = served.set(shift=1)
        with pytest.raises(InputError, match=r"not those that were sent|not those of this tokenizer"):
            cache_only(recipe(served, url, requests={"protocol": protocol}), tmp_path / protocol)
        assert len(served.requests()) == 1


def test_what_a_server_refuses_is_told_without_a_word_of_the_text(served: Served, tmp_path: Path) -> None:
    url = served.set(faults={"12": "400"})
    with pytest.raises(InputError, match="status 400") as raised:
        cache_only(recipe(served, url), tmp_path / "refused")
    assert "no:" not in str(raised.value)
    url = served.set(always="500")
    with pytest.raises(RunError, match=r"no whole answer in 5 attempts.*status 500"):
        cache_only(recipe(served, url), tmp_path / "down")
    assert len(served.requests()) == 5
    with pytest.raises(RunError, match="ConnectError"):
        cache_only(recipe(served, "http://127.0.0.1:1/v1"), tmp_path / "nobody")
    with pytest.raises(InputError, match=r"more than [\d,]+ bytes"):
        cache_only(recipe(served, served.set(faults={"12": "huge"})), tmp_path / "huge")
    # A probe is selkd's own text, so what the server says of it may be told.
    with pytest.raises(InputError, match=r"status 400.*no: The quick"):
        cache_only(recipe(served, served.set(always="400")), tmp_path / "probe")


def test_retry_after_is_waited_for(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    monkeypatch.setattr(client.CompletionsClient, "_wait", lambda _, seconds: waits.append(seconds))
    url = served.set(faults={"0": "429", "1": "500", "2": "500", "3": "500"}, retry_after="7")
    cache_only(recipe(served, url), tmp_path)
    assert waits[0] == 7
    assert len(waits) == 4
    assert all(0.5 * 0.01 * 2**n <= wait <= 0.01 * 2**n for n, wait in enumerate(waits[1:], start=1))
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 90 < client._seconds(date) <= 100
    far = "Fri, 31 Dec 99999999999 23:59:59 GMT"
    for unreadable in ("soon", "nan", "-3", None, far):
        assert client._seconds(unreadable) == 0


def test_the_key_goes_to_the_server_and_nowhere_else(
    served: Served,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = served.set(key=KEY)
    named = {"teacher": {"api_key_env": "TOY_KEY"}}
    with pytest.raises(InputError, match="TOY_KEY, which is not set"):
        cache_only(recipe(served, url, **named), tmp_path / "unset")
    with pytest.raises(InputError, match=r"status 401.*teacher\.api_key_env"):
        cache_only(recipe(served, url), tmp_path / "without")
    monkeypatch.setenv("TOY_KEY", KEY)
    with caplog.at_level(logging.DEBUG):
        cache_only(recipe(served, url, **named), tmp_path / "run")
    assert f"the text's tokens go to {url}, with the key in $TOY_KEY" in caplog.text
    assert contents(tmp_path / "run" / "teacher_cache") == undisturbed
    assert all(line["key"] == f"Bearer {KEY}" for line in served.requests()[2:])
    text = json.loads((served.folder / "text.jsonl").read_text().splitlines()[0])["text"].split()
    for word in (KEY, " ".join(text[:3]), ", ".join(word[1:] for word in text[:3])):
        assert word not in caplog.text
        for path in (tmp_path / "run").rglob("*"):
            assert not path.is_file() or path.suffix == ".parquet" or word.encode() not in path.read_bytes()


def test_a_redirect_is_not_followed(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0.2)
        place = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/v1/completions"
        url = served.set(always="redirect", elsewhere=place)
        with pytest.raises(InputError, match="sends the request elsewhere"):
            cache_only(recipe(served, url, teacher={"api_key_env": "TOY_KEY"}), tmp_path)
        with pytest.raises(TimeoutError):
            elsewhere.accept()


def test_a_student_trains_from_a_server_that_is_gone(served: Served, tmp_path: Path) -> None:
    cache_only(recipe(served, served.set()), tmp_path)
    run = distill(recipe(served, "http://127.0.0.1:1/v1"), tmp_path)
    losses = [
        json.loads(line)["loss"] for line in (run.path / "metrics.jsonl").read_text().splitlines() if "loss" in line
    ]
    assert losses[-1] < 0.9 * losses[0]
    assert run.record["teacher"]["fingerprint"] == "known by its name: toy"
    assert run.record["fidelity"] is None
    page, card = (run.path / "report.html").read_text(), (run.student / "README.md").read_text()
    for text in (page, card):
        assert "most likely classes" in text
        assert "biased" in text.lower()
    assert "127.0.0.1" not in card


def test_a_certificate_is_checked(served: Served, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    got = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            for _ in range(2):
                connection, _ = listening.accept()
                with suppress(OSError), context.wrap_socket(connection, server_side=True) as secured:
                    got.append(secured.recv(10))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        url = f"https://127.0.0.1:{listening.getsockname()[1]}/v1"
        with pytest.raises(RunError, match=r"no whole answer in 2 attempts .the last: ConnectError"):
            cache_only(recipe(served, url, requests={"attempts": 2}), tmp_path / "run")
        thread.join(timeout=20)
    assert got == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": {"sampler": "rs_kd", "draws": 8}}, r"classes\.sampler: rs_kd draws from the whole distribution"),
        ({"classes": {"sampler": "all"}}, r"cache: the full distribution|classes\.sampler: all"),
        ({"classes": {"sampler": "top_k", "draws": 8}}, r"classes\.tail"),
        ({"cache": None}, "cache: a teacher with teacher.server does not train live"),
        ({"positions": {"metric": "kl", "policy": "top_k"}}, r"positions\.metric: kl needs the teacher's full"),
        ({"positions": {"metric": "teacher_ce", "policy": "top_k"}}, r"positions\.metric: teacher_ce"),
        ({"samples": {"metric": "kl"}}, r"samples\.metric: kl needs the teacher's full"),
        ({"criterion": {"temperature": 2.0}}, r"criterion\.temperature: a server gives .* at temperature 1"),
        ({"evaluation": {"suite": ["fidelity"]}}, r"evaluation\.suite: fidelity .* needs the teacher's logits"),
        ({"student": {"prune_from_teacher": {"layers": 2}}}, "are not here; give student.model"),
        ({"teacher": {"dtype": "bfloat16"}}, r"teacher\.dtype"),
        ({"teacher": {"imported": True}}, r"teacher\.imported"),
        ({"teacher": {"server": None}}, r"teacher\.requests: an option of teacher\.server"),
        ({"teacher": {"api_key_env": "my key"}}, r"teacher\.api_key_env"),
        ({"teacher": {"server": "ftp://host/v1"}}, r"expected an address such as"),
        ({"teacher": {"server": "https://me:secret@host/v1"}}, "without user, password"),
        ({"teacher": {"server": "https://host/v1?key=secret"}}, "without user, password"),
    ],
)
def test_what_needs_more_than_a_server_gives_is_refused_before_any_request(
    served: Served, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        recipe(served, "http://127.0.0.1:1/v1", **changes)
    assert "secret" not in str(raised.value)


def test_commands_that_need_the_teacher_say_so(served: Served) -> None:
    from selkd.bench.subject import BenchSubject
    from selkd.estimate.estimate import estimate

    given = recipe(served, "http://127.0.0.1:1/v1")
    needing: list[Callable[[Recipe], Any]] = [estimate, BenchSubject]
    for command in needing:
        with pytest.raises(InputError, match="the teacher's model is not here"):
            command(given)
