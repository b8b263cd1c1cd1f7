"""All that is to be known of one accelerator, in under 8 minutes and 60 GB, with no download: one JSON.

    python benchmarks/accelerator.py [--toy] [--seconds 460] [--section NAME ...] > accelerator.json

Models have random weights of Qwen3-8B's and 1.7B's shapes (``benchmarks/shapes``). Every section has its share of the
time and keeps what it has measured when it fails, is late or is stopped. Progress is told on standard error. Without a
GPU, or with --toy, the same code runs at toy size in seconds: its figures mean nothing.
"""

import argparse
import importlib
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from selkd.bench.measure import interleaved, peak_bytes, seconds_of
from selkd.bench.names import VARIANTS
from selkd.bench.subject import BenchSubject
from selkd.bench.variants import EVERY_CLASS, step_of
from selkd.data.samples import Sample, SampleDataset
from selkd.maths import chunked
from selkd.maths.divergence import entropy, forward_kl
from selkd.maths.head import Head
from selkd.models.head import check_packing, hidden_states
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.training.student import bind_distillation

HERE = Path(__file__).parent
MOST_BYTES = 60 << 30
Found = dict[str, Any]
TOY_SHAPE = {
    "vocab_size": 499, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
GOALS = {
    "se_kd_exact": "at most 1.10 of the floor",
    "se_kd_cached": "at most 1.05 of cross_entropy_chunked, below 1.00 of cross_entropy_plain",
    "entropy": "at most 1.10 of one product with the head",
    "logits": "no tensor as large as all positions' logits, of any dtype",
}


class Subject(BenchSubject):
    """``selkd bench``'s models and batch, but with random weights and random text."""

    def __init__(self, device: torch.device, is_toy: bool) -> None:
        self.device, self.is_toy = device, is_toy
        self.dtype = torch.float32 if is_toy else torch.bfloat16
        self._folder = tempfile.TemporaryDirectory(prefix="selkd-accelerator-")
        self.recipe = parse_part(
            Recipe, {"teacher": {"model": "none"}, "student": {"model": "none"}, "data": {"path": "none"}}
        )
        self.shape = (2, 48) if is_toy else (4, 1008)  # not 4,096 positions: a head is as wide
        vocab_size = int(self._config("qwen3-1.7b").vocab_size)
        self.work: Any = SimpleNamespace(vocab_size=vocab_size, models=SimpleNamespace(pad_token_id=0))

    def _config(self, name: str) -> Any:
        shape = json.loads((HERE / "shapes" / f"{name}.json").read_text())
        return AutoConfig.for_model(**(shape | TOY_SHAPE if self.is_toy else shape))

    def _model(self, name: str, dtype: torch.dtype) -> Any:
        torch.manual_seed(len(name))
        with self.device:
            return AutoModelForCausalLM.from_config(self._config(name), dtype=dtype)

    @cached_property
    def teacher(self) -> Any:
        return self._model("qwen3-8b", self.dtype).eval().requires_grad_(False)

    @cached_property
    def student(self) -> Any:
        model = self._model("qwen3-1.7b", torch.float32).train()
        bind_distillation(model, self.work.vocab_size)
        return model

    @cached_property
    def train(self) -> SampleDataset:
        generator, (batch, length) = np.random.default_rng(0), self.shape
        return SampleDataset.from_samples(
            [
                Sample(generator.integers(0, self.work.vocab_size, length), np.array([0, length // 3]))
                for _ in range(batch)
            ]
        )

    @property
    def samples(self) -> SampleDataset:  # type: ignore[override]
        return self.train


class Clock:
    """What is left of a section's seconds."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation gives back, and which operation it was.

    Heads, their copies and their gradients are left out: they are [V, D] or [D, V], of a width D in ``widths``.
    """

    def __init__(self, widths: set[int]) -> None:
        super().__init__()
        self.widths, self.elements, self.operation = widths, 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if not isinstance(tensor, Tensor) or (tensor.ndim == 2 and self.widths & set(tensor.shape)):
                continue
            if tensor.numel() > self.elements:
                self.elements, self.operation = tensor.numel(), str(func)
        return out


@contextmanager
def small_chunks(subject: Subject) -> Iterator[None]:
    """At toy size all positions would fit in one chunk: chunks of an eighth of them."""
    batch, length = subject.shape
    few = dict.fromkeys(chunked.CHUNK_BYTES, 2 * subject.work.vocab_size * batch * length // 8)
    with patch.dict(chunked.CHUNK_BYTES, few if subject.is_toy else {}):
        yield


def conformance(subject: Subject, found: Found, clock: Clock) -> None:  # noqa: ARG001
    """Every oracle case on the device, in float64: losses within 1e-8, gradients within 1e-6."""
    sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "training")]
    tests, conftest = (importlib.import_module(name) for name in ("test_objective", "conftest"))
    found["compared"], found["wrong"] = 0, []
    for path in conftest.CASES:
        content: Found = json.loads(path.read_text())
        case = content | {
            name: torch.tensor(content[name], dtype=dtype, device=subject.device)
            for name, dtype in (conftest.TENSORS | {"valid_mask": torch.bool}).items()
        }
        for name in case["loss"] | case["grad_student_logits"]:
            with subject.device:
                loss, gradient = tests.run(case, tests.recipe_of(case, name))
            found["compared"] += 1
            expected, wanted = case["loss"].get(name), case["grad_student_logits"].get(name)
            is_wrong = expected is not None and not abs(loss.item() - expected) <= 1e-8
            if wanted is not None:
                difference = gradient.cpu() - torch.tensor(wanted, dtype=torch.float64)
                is_wrong = is_wrong or not difference.abs().max().item() <= 1e-6
            if is_wrong:
                found["wrong"].append(f"{path.stem}: {name}")
    assert not found["wrong"], "oracle cases differ on this device"


def gradients(subject: Subject, found: Found, clock: Clock) -> None:  # noqa: ARG001
    """The chunked loss's gradients beside autograd's through dense logits in float64, in each precision."""
    n, width, classes = (40, 16, 211) if subject.is_toy else (1024, 512, 32_000)
    torch.manual_seed(0)
    hidden, weight, teacher = (
        torch.randn(*shape, device=subject.device, dtype=torch.float64) * scale
        for shape, scale in (((n, width), 1.0), ((classes, width), 0.1), ((n, classes), 2.0))
    )
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    p, log_q = teacher.softmax(-1), (hidden @ weight.T).log_softmax(-1)
    dense = torch.autograd.grad((p * (p.log() - log_q)).sum(-1).mean(), leaves)
    for dtype, least in ((torch.float32, 0.999999), (torch.bfloat16, 0.999)):
        low = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        head, ones = Head(low[1]), torch.ones(n, device=subject.device) / n
        loss, _ = chunked.chunked_loss(
            low[0], head, ones, lambda z, rows: forward_kl(z, teacher[rows].float(), teacher), chunk=n // 3
        )
        actual = torch.autograd.grad(loss, low)
        cosines = [
            torch.cosine_similarity(a.double().flatten(), d.flatten(), 0).item()
            for a, d in zip(actual, dense, strict=True)
        ]
        found[str(dtype)] = dict(zip(("hidden_cosine", "head_cosine"), cosines, strict=True))
        assert min(cosines) >= least, f"gradients in {dtype} point elsewhere"


def variants(subject: Subject, found: Found, clock: Clock) -> None:
    """``selkd bench``'s variants, each by itself: the floor, seconds and memory, and the goals' ratios.

    A cached step reads its classes from the cache itself, which takes ``cache_read_seconds`` of the CPU; in a training
    with ``dataloader_num_workers`` other processes do.
    """
    found["variants"], found["errors"] = {}, {}
    try:
        _time_variants(subject, found, clock)
    finally:  # late or stopped, what was timed has its ratios
        _add_ratios(found)


def _time_variants(subject: Subject, found: Found, clock: Clock) -> None:
    first = ("floor", "se_kd_exact", "se_kd_cached", "cross_entropy_chunked", "cross_entropy_plain")
    steps = {}
    for name in [*first, *(name for name in VARIANTS if name not in first and name != "recipe")]:
        if clock.left() < 0:
            found["errors"][name] = "no time was left"
            continue
        try:
            steps[name] = step_of(name, subject)
            found["variants"][name] = {"peak_bytes": peak_bytes(steps[name], subject.device, repeats=1)}
        except torch.OutOfMemoryError as error:  # a dense variant may not fit: that is its figure
            found["errors"][name] = str(error).splitlines()[0]
            steps.pop(name, None)
            subject.student.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            continue
        seconds = [seconds_of(steps[name], subject.device) for _ in range(2)]
        found["variants"][name]["seconds"] = min(seconds)
        print(f"  {name}: {min(seconds):.4f} s", file=sys.stderr)
    if "se_kd_cached" in steps:
        cached = subject.cached_teacher(EVERY_CLASS)
        reading = (seconds_of(lambda: cached.targets(subject.batch, 0), subject.device) for _ in range(3))
        found["cache_read_seconds"] = min(reading)
    for name, timing in interleaved(steps, 3, subject.device).items() if clock.left() > 0 else ():
        found["variants"][name]["seconds"] = timing.median


def _add_ratios(found: Found) -> None:
    timed = {name: figures for name, figures in found["variants"].items() if "seconds" in figures}
    measured = {name: figures["seconds"] for name, figures in timed.items()}
    for figures in timed.values() if "floor" in timed else ():
        figures["ratio_to_floor"] = figures["seconds"] / measured["floor"]
        figures["peak_bytes_above_floor"] = figures["peak_bytes"] - found["variants"]["floor"]["peak_bytes"]
    goals = (
        ("se_kd_exact", "floor", 1.10),
        ("se_kd_cached", "cross_entropy_chunked", 1.05),
        ("se_kd_cached", "cross_entropy_plain", 1.00),
    )
    found["goals"] = {
        f"{ours} / {other}": [measured[ours] / measured[other], most]
        for ours, other, most in goals
        if {ours, other} <= measured.keys()
    }


def entropies(subject: Subject, found: Found, clock: Clock) -> None:
    """Exact entropy beside one product with the head, as it is and with its elementwise part compiled."""
    batch, length = subject.shape
    head = subject.head.to(subject.dtype)
    hidden = torch.randn(batch * length, head.weight.shape[1], device=subject.device, dtype=subject.dtype)
    size = chunked.chunk_size(head.vocab_size, subject.device)

    @torch.no_grad()
    def product() -> None:
        for _ in chunked._chunked_logits(hidden, head, size):
            pass

    def timed(step: Callable[[], Any]) -> float:
        step()
        return min(seconds_of(step, subject.device) for _ in range(5))

    exact = chunked.chunked_entropy(hidden, head)
    found["product_seconds"] = timed(product)
    found["entropy_seconds"] = timed(lambda: chunked.chunked_entropy(hidden, head))
    found["goal"] = [found["entropy_seconds"] / found["product_seconds"], 1.10]
    for mebibytes in (16, 64, 128, 512):
        pieces = dict.fromkeys(chunked.PIECE_BYTES, mebibytes << 20)
        with patch.dict(chunked.PIECE_BYTES, {} if subject.is_toy else pieces):
            found[f"entropy_seconds, pieces of {mebibytes} MiB"] = timed(lambda: chunked.chunked_entropy(hidden, head))
    assert clock.left() > 0, "no time was left to compile"
    fused = torch.compile(entropy, dynamic=True, backend="eager" if subject.is_toy else "inductor")
    with patch.object(chunked, "entropy", fused):
        compiled = chunked.chunked_entropy(hidden, head)
        found["compiled_greatest_difference_nats"] = (compiled - exact).abs().max().item()
        found["compiled_seconds"] = timed(lambda: chunked.chunked_entropy(hidden, head))


def no_full_logits(subject: Subject, found: Found, clock: Clock) -> None:  # noqa: ARG001
    """No operation of our steps gives back as many numbers as all positions' logits; plain Full KD's do."""
    batch, length = subject.shape
    full = batch * length * subject.work.vocab_size
    widths = {model.config.hidden_size for model in (subject.student, subject.teacher)}
    assert not widths & {batch * length, int(subject.batch["valid_mask"].sum())}, "logits would pass for a head"
    found["full_logits_elements"] = full
    with small_chunks(subject):
        for name in ("se_kd_exact", "se_kd_cached", "full_kd", "full_kd_plain"):
            step = step_of(name, subject)
            with LargestTensor(widths) as largest:
                step()
            found[name] = {"largest_elements": largest.elements, "operation": largest.operation}
            if name != "full_kd_plain":
                assert largest.elements < full, f"{name}: {largest.operation} made as much as the full logits"
    assert found["full_kd_plain"]["largest_elements"] >= full, "the check itself sees nothing"


def profiles(subject: Subject, found: Found, clock: Clock) -> None:  # noqa: ARG001
    """The kernels that take longest in a step, and where the CPU waits for the device.

    One cudaDeviceSynchronize is the profiler's own, at its end.
    """
    is_cuda = subject.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * is_cuda
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense", "aten::nonzero")
    for name in ("se_kd_exact", "se_kd_cached", "full_kd"):
        step = step_of(name, subject)
        step()
        with torch.profiler.profile(activities=activities) as profile:
            step()
        rows = profile.key_averages()

        def microseconds(row: Any) -> float:
            return float(row.self_device_time_total if is_cuda else row.self_cpu_time_total)

        # Of a GPU the kernels themselves: the operations that start them have the same time once more.
        own = [row for row in rows if row.device_type == DeviceType.CUDA] if is_cuda else rows
        longest = sorted(own, key=microseconds, reverse=True)[:20]
        found[name] = {
            "kernels": [{"name": r.key[:120], "calls": r.count, "microseconds": microseconds(r)} for r in longest],
            "waits": {row.key: row.count for row in rows if row.key in waits},
        }


def chunk_sizes(subject: Subject, found: Found, clock: Clock) -> None:
    """A step of SE-KD and of Full KD with smaller and larger chunks of logits than now."""
    found["now_mebibytes"] = chunked.CHUNK_BYTES["accelerator"] >> 20
    for mebibytes in (64, 128, 256, 512, 1024):
        with patch.dict(chunked.CHUNK_BYTES, dict.fromkeys(chunked.CHUNK_BYTES, mebibytes << 20)):
            for name in ("se_kd_exact", "full_kd"):
                assert clock.left() > 0, "no time was left"
                step = step_of(name, subject)
                step()
                found[f"{name}, {mebibytes} MiB"] = min(seconds_of(step, subject.device) for _ in range(3))


def peers(subject: Subject, found: Found, clock: Clock) -> None:  # noqa: ARG001
    """TRL's and Liger's fused losses where they are installed: seconds and memory of a step."""
    spec = importlib.util.spec_from_file_location("benchmarks_peers", HERE / "peers.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    losses, found["not_measured"] = module.losses_of(subject, list(module.PEERS), False)
    for name, loss in losses.items():
        step = module.stepped(subject, loss)
        found[name] = {"peak_bytes": peak_bytes(step, subject.device, repeats=1)}
        found[name]["seconds"] = min(seconds_of(step, subject.device) for _ in range(3))


def packing(subject: Subject, found: Found, clock: Clock) -> None:
    """Which kinds of attention keep packed documents apart, and how long the student's body takes with each."""
    model, now = subject.student, subject.student.config._attn_implementation
    try:
        compiled = () if subject.is_toy else ("flex_attention",)
        for kind in ("sdpa", "flash_attention_2", "flash_attention_3", "eager", *compiled):
            assert clock.left() > 0, "no time was left"
            try:
                model.set_attn_implementation(kind)
                with subject.autocast():
                    check_packing(model)
                    with torch.no_grad():
                        step = lambda: hidden_states(model, **subject.inputs)  # noqa: E731
                        step()
                        found[kind] = {"seconds": min(seconds_of(step, subject.device) for _ in range(3))}
            except Exception as error:  # noqa: BLE001  not installed, not for this device, or not apart: all are told
                found[kind] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    finally:
        model.set_attn_implementation(now)
    assert "seconds" in found["sdpa"], "PyTorch's own attention does not keep packed documents apart"


def distill(subject: Subject, found: Found, clock: Clock) -> None:
    """A whole run of 20 steps of a toy, as a user starts it, on this device."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    folder = Path(subject._folder.name)
    recipe = importlib.import_module("tiny_run").make_recipe(folder)
    recipe["teacher"]["dtype"] = "auto"
    recipe["training"] |= {"max_steps": 20, "use_cpu": subject.device.type == "cpu"}
    del recipe["training"]["bf16"]
    (folder / "toy.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "selkd", "distill", str(folder / "toy.yaml"), "--out", str(folder / "run")]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(10, clock.left()))
    found["seconds"] = time.perf_counter() - started
    assert not done.returncode, "\n".join(done.stderr.strip().splitlines()[-5:])
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    found |= {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}


# Section -> its seconds; what one leaves is the next one's.
SECTIONS: dict[Callable[[Subject, Found, Clock], None], int] = {
    conformance: 30,
    gradients: 15,
    variants: 130,
    no_full_logits: 25,
    profiles: 40,
    entropies: 60,
    distill: 60,
    packing: 30,
    peers: 40,
    chunk_sizes: 30,
}


def _stop(number: int, _: Any) -> None:
    if number == signal.SIGALRM:
        raise TimeoutError("the section's time was over")
    raise KeyboardInterrupt


def run_section(section: Callable[..., None], subject: Subject, seconds: float) -> Found:
    """What a section found before it ended, and how it ended."""
    found: Found = {}
    started = time.monotonic()
    print(f"{section.__name__}: at most {seconds:.0f} s", file=sys.stderr)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        section(subject, found, Clock(seconds))
        found["error"] = None
    except KeyboardInterrupt:
        found["error"] = "stopped"
    except Exception as error:  # noqa: BLE001  whatever fails here, the other sections are still worth their time
        found["error"] = f"{type(error).__name__}: {error}"[:2000]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    found["took_seconds"] = time.monotonic() - started
    print(f"{section.__name__}: {found['error'] or 'done'}, {found['took_seconds']:.1f} s", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size, as on a machine without a GPU")
    parser.add_argument("--seconds", type=float, default=460, help="the most that all sections together may take")
    names = [section.__name__ for section in SECTIONS]
    parser.add_argument("--section", action="append", choices=names, help="this section alone; may be repeated")
    given = parser.parse_args()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, _stop)
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    if is_cuda:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, MOST_BYTES / whole))
    is_toy = given.toy or not is_cuda
    end = time.monotonic() + given.seconds
    subject = Subject(device, is_toy)
    answer: Found = {
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "torch": torch.__version__,
        "is_toy": is_toy,
        "shape": {"batch": subject.shape[0], "length": subject.shape[1], "classes": subject.work.vocab_size},
        "goals": GOALS,
        "sections": {},
    }
    try:
        spare = 0.0
        for section, share in SECTIONS.items():
            if given.section and section.__name__ not in given.section:
                continue
            seconds = min(share * given.seconds / sum(SECTIONS.values()) + spare, end - time.monotonic())
            if seconds < 1:
                answer["sections"][section.__name__] = {"error": "no time was left"}
                continue
            found = answer["sections"][section.__name__] = run_section(section, subject, seconds)
            spare = max(0.0, seconds - found["took_seconds"])
            if is_cuda:  # measuring a step's peak sets the device's own back
                peak = max(answer.get("peak_bytes", 0), torch.cuda.max_memory_reserved(device))
                answer["peak_bytes"] = peak
            if found["error"] == "stopped":
                break
    finally:
        subject.close()
        print(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()
