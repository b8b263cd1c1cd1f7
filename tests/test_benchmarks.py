"""The scripts in benchmarks/ that tell what others' losses and whole runs cost: what they compute is what they say."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import make_model, make_samples
from tiny_run import make_recipe
from torch import Tensor
from transformers import AutoConfig

from selkd.bench.names import VARIANTS
from selkd.bench.subject import BenchSubject
from selkd.bench.variants import plain_loss
from selkd.models.head import head_of
from selkd.needs.architecture import describe
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe

FOLDER = Path(__file__).parent.parent / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def subject(tmp_path: Path) -> Any:
    found = BenchSubject(parse_part(Recipe, make_recipe(tmp_path)))
    yield found
    found.close()


def test_a_peer_that_is_not_there_or_fails_is_said_so(subject: BenchSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = script("peers")

    def version(package: str) -> str:
        if package == "trl":
            raise PackageNotFoundError(package)
        return "0"

    def fails(*_: Any) -> Callable[[], Tensor]:
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(peers, "version", version)
    monkeypatch.setattr(peers, "liger_loss", fails)
    found, missing = peers.losses_of(subject, ["trl", "liger"], False)
    assert found == {}
    assert missing == {
        "trl": "trl is not installed: pip install -e '.[peers]'",
        "liger": "liger-kernel does not run here: RuntimeError: no such kernel",
    }


def test_peers_get_the_hidden_states_and_heads_of_plain_full_kd(
    subject: BenchSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins compute what TRL and Liger document of what they are given: plain Full KD's loss and gradient."""
    peers = script("peers")

    def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, p = student.float().log_softmax(-1), teacher.float().softmax(-1)
        return torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1)

    class Trl:
        @staticmethod
        def apply(hs: Tensor, ws: Tensor, bs: Any, ht: Tensor, wt: Tensor, bt: Any, *rest: Any) -> tuple[Tensor, None]:
            assert rest == (0.0, 1.0, 1.0, None, 1.0, None)
            assert bs is bt is None
            return forward_kl(hs @ ws.T, ht @ wt.T), None

    class Liger:
        def __init__(self, **options: Any) -> None:
            assert options == {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 0.0, "compiled": False}

        def __call__(self, hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor, targets: Tensor, *_: None) -> Tensor:
            assert targets.shape == hs.shape[:1]
            return forward_kl(hs @ ws.T, ht @ wt.T).mean()

    monkeypatch.setitem(sys.modules, "trl", ModuleType("trl"))
    monkeypatch.setitem(sys.modules, "trl.kernels", ModuleType("trl.kernels"))
    chunked = SimpleNamespace(ChunkedDivergenceFunction=Trl)
    monkeypatch.setitem(sys.modules, "trl.kernels.chunked_divergence", chunked)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", SimpleNamespace(LigerFusedLinearJSDLoss=Liger))
    monkeypatch.setattr(peers, "version", lambda _: "0")
    found, missing = peers.losses_of(subject, ["trl", "liger"], False)
    assert missing == {}
    expected, gradient = peers.gradient_of(subject, lambda: plain_loss(subject))
    for name in ("trl", "liger"):
        value, theirs = peers.gradient_of(subject, found[name])
        assert value == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(theirs, gradient, rtol=1e-4, atol=1e-6)


def test_the_plain_run_trains_as_chunked_full_kd(tmp_path: Path) -> None:
    from test_trainer import trainer_of, weights

    full = {"positions": {"policy": "all"}, "classes": {"sampler": "all"}}
    samples, students = make_samples(8), []
    for name in ("plain", "chunked"):
        trainer = trainer_of(tmp_path / name, samples, full, per_device_train_batch_size=4, max_steps=2)
        if name == "plain":
            trainer.__class__ = script("whole_run").PlainTrainer
            trainer.teacher_model = make_model(0, layers=3).eval()
        trainer.train()
        students.append(weights(trainer.model))
    for name, value in students[0].items():
        torch.testing.assert_close(value, students[1][name], rtol=0, atol=2e-6)
    assert head_of(trainer.model).weight is not None


def test_a_whole_run_counts_its_stages_and_reuses_scores_and_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(json.dumps(make_recipe(tmp_path)))
    monkeypatch.setattr(sys, "argv", ["whole_run.py", str(path), "--out", str(tmp_path / "out")])
    script("whole_run").main()
    answer = json.loads(capsys.readouterr().out)
    cold, again = answer["seconds"]["3x"], answer["seconds"]["3x, scores and cache reused"]
    assert cold["samples"] == again["samples"]
    assert cold["steps"] == again["steps"]
    assert answer["ratio_to_full_kd_plain"]["full_kd_plain"] == 1.0
    assert (tmp_path / "out" / "scores.parquet").is_file()
    assert (tmp_path / "out" / "cache" / "manifest.json").is_file()


def test_the_sizing_page_is_what_its_command_prints(tmp_path: Path) -> None:
    sizing = script("sizing")
    page = (FOLDER.parent / "docs" / "sizing.md").read_text(encoding="utf-8")
    for teacher, students in sizing.PAIRS.items():
        assert all(page.count(f"| {teacher} → {student} |") == 2 for student in students)
    for cells in sizing.row(tmp_path, "Qwen3-8B", "Qwen3-0.6B"):
        assert f"| {' | '.join(['Qwen3-8B → Qwen3-0.6B', *cells])} |" in page


def test_a_shape_has_the_parameters_that_its_name_says() -> None:
    for name, shape in script("sizing").SHAPES.items():
        billions = describe(AutoConfig.for_model(**shape)).parameters / 1e9
        assert billions == pytest.approx(float(name.rpartition("-")[2].removesuffix("B")), rel=0.25), name


def test_the_accelerators_script_measures_all_of_it_at_toy_size(tmp_path: Path) -> None:
    """The same code as on a GPU, in a process as it is started there; each section's content, not its figures."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / "accelerator.py"), "--toy"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    answer = json.loads(done.stdout)
    assert answer["is_toy"]
    sections = answer["sections"]
    assert {name: found["error"] for name, found in sections.items()} == dict.fromkeys(sections)
    assert (sections["conformance"]["compared"], sections["conformance"]["wrong"]) == (52, [])
    assert sections["gradients"].keys() >= {"torch.float32", "torch.bfloat16"}
    variants = sections["variants"]
    assert variants["variants"].keys() == set(VARIANTS) - {"recipe"}
    assert all(each["seconds"] > 0 and each["peak_bytes"] > 0 for each in variants["variants"].values())
    assert variants["goals"].keys() == {
        "se_kd_exact / floor",
        "se_kd_cached / cross_entropy_chunked",
        "se_kd_cached / cross_entropy_plain",
    }
    logits = sections["no_full_logits"]
    assert logits["full_logits_elements"] == 2 * 48 * 499
    assert logits["full_kd_plain"]["largest_elements"] >= logits["full_logits_elements"]
    for name in ("se_kd_exact", "se_kd_cached", "full_kd"):
        assert 0 < logits[name]["largest_elements"] < logits["full_logits_elements"]
        profile = sections["profiles"][name]
        assert any("mm" in kernel["name"] for kernel in profile["kernels"])
        assert "waits" in profile
    entropies = sections["entropies"]
    assert entropies["compiled_greatest_difference_nats"] < 1e-5
    assert {"product_seconds", "entropy_seconds", "compiled_seconds", "goal"} <= entropies.keys()
    assert sections["distill"]["steps"] == 20
    assert sections["packing"]["sdpa"]["seconds"] > 0
    assert "flash_attention_2" in sections["packing"]
    assert set(sections["peers"]) - {"error", "took_seconds"} >= {"not_measured"}
    assert "full_kd, 256 MiB" in sections["chunk_sizes"]


def test_the_accelerators_script_mixes_no_tensor_of_the_host_with_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sections on the tests' accelerator that is none, where no step of ours waits for the device."""
    monkeypatch.syspath_prepend(str(FOLDER.parent / "tests" / "training"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "conftest", raising=False)  # pytest's own may be another folder's
    waits, accelerator = importlib.import_module("waits"), script("accelerator")
    subject = accelerator.Subject(torch.device("cpu"), is_toy=True)
    subject.cached_teacher(accelerator.EVERY_CLASS)  # inference mode would hide from the dispatch that counts
    with waits.accelerator(monkeypatch) as seen:
        for model in (subject.student, subject.teacher):
            model.set_attn_implementation("eager")
            waits.moved(model)
        subject.device = waits.DEVICE
        for section in (accelerator.conformance, accelerator.gradients, accelerator.no_full_logits):
            section(subject, {}, accelerator.Clock(60))
        for name in ("floor", "full_kd", "se_kd_exact", "se_kd_two_stage", "se_kd_cached", "cross_entropy_chunked"):
            step = accelerator.step_of(name, subject)
            step()
            seen.waits.clear()
            step()
            assert not seen.waits, name
    subject.close()


LATE = """
import json, signal, sys, time
sys.path.insert(0, sys.argv[1])
import accelerator
signal.signal(signal.SIGALRM, accelerator._stop)
signal.signal(signal.SIGTERM, accelerator._stop)
def late(subject, found, clock):
    found["kept"] = 1
    time.sleep(60)
def fails(subject, found, clock):
    found["kept"] = 2
    raise ValueError("no such kernel")
def stopped(subject, found, clock):
    found["kept"] = 3
    signal.raise_signal(signal.SIGTERM)
print(json.dumps([accelerator.run_section(each, None, 0.5) for each in (late, fails, stopped)]))
"""


def test_a_section_that_is_late_fails_or_is_stopped_keeps_what_it_measured() -> None:
    done = subprocess.run([sys.executable, "-c", LATE, str(FOLDER)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert [each["kept"] for each in found] == [1, 2, 3]
    assert [each["error"] for each in found] == [
        "TimeoutError: the section's time was over",
        "ValueError: no such kernel",
        "stopped",
    ]


def test_a_bench_becomes_the_lines_of_the_figures_file() -> None:
    answer = {
        "variants": [
            {"name": "floor", "seconds": 3.3812, "ratio_to_floor": 1.0, "peak_bytes_above_floor": 0},
            {"name": "full_kd", "seconds": 5.1, "ratio_to_floor": 1.508, "peak_bytes_above_floor": 204_000_000},
            {"name": "se_kd_cached", "seconds": 2.3, "ratio_to_floor": 0.68, "peak_bytes_above_floor": None},
        ],
        "cached_goals": {"cross_entropy_plain": {"ratio": 0.7512, "at_most": 1.0}},
    }
    assert script("step_figures").lines_of(answer) == [
        "floor: 3.38 s",
        "full_kd: 1.51 x",
        "se_kd_cached: 0.68 x",
        "full_kd_memory: 0.20 GB",
        "se_kd_cached_of_cross_entropy_plain: 0.75",  # no multiple of the floor
    ]
