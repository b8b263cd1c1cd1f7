"""Runs the recipe's own stages on a few samples, to measure what can't be counted: speed and cache bytes."""

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from selkd.data.samples import SampleDataset
from selkd.data.splits import Splits
from selkd.needs.plan import is_local
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.cache import cache as build_or_find_cache
from selkd.run.directory import RunDirectory
from selkd.run.evaluate import evaluate
from selkd.run.prepare import prepare
from selkd.run.score import score
from selkd.run.train import train as train_student
from selkd.run.workspace import Workspace

T = TypeVar("T")
STEPS = 3  # the first one is a warm-up and does not count
HELD_OUT_SAMPLES = 8
CACHED_TOKENS = 2048


def probe(recipe: Recipe) -> dict[str, float | None]:
    """Score, cache, evaluate and train on a few samples in a temporary folder.

    Returns:
        Figures of one device, None for a stage that the recipe has not: ``step_seconds`` of one optimiser step with all
        its micro-batches; tokens a second of each stage (``score_tokens_per_second`` and so on);
        ``cache_bytes_per_position`` of the small cache's shards; how many ``samples`` the probe took, and its
        ``seconds``.

    Raises:
        InputError, RunError: as ``distill`` does.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="selkd-probe-") as folder:
        small = _shortened(recipe)
        path = Path(folder) / "run"
        splits = _first_samples(small, Workspace(small, path).splits)
        work = Workspace(small, path, splits=splits)
        run = RunDirectory.claim(path, small, is_writer=True)
        prepare(work, run)
        student = work.models.student  # loaded before the clock starts, as the teacher below
        kept, seconds = _clocked(lambda: score(work, run))
        rates: dict[str, float] = {}
        if recipe.samples is not None:
            # Some scores are compared with exact ones, which takes a smaller share of a whole run.
            seconds -= run.record.get("scoring_agreement", {}).get("seconds", 0.0)
            rates["score"] = splits.train_tokens / seconds
        if small.evaluation.suite or recipe.cache is not None:
            work.models.load_teacher()
        if small.evaluation.suite:
            _, seconds = _clocked(lambda: evaluate(work, run, student, "before"))
            rates["evaluate"] = _tokens(splits.held_out) / seconds
        cache, seconds = _clocked(lambda: build_or_find_cache(work, run, kept))
        if cache is not None:
            rates["cache"] = _tokens(kept) / seconds
            # Plan and manifest hardly grow with the cache, so they do not count.
            shards = sum(path.stat().st_size for path in cache.directory.iterdir() if path.suffix == ".selkd")
            rates["bytes"] = shards / float(cache.stats()["positions"])
        train_student(work, run, kept, cache)
        return {
            "step_seconds": _step_seconds(run.path / "metrics.jsonl"),
            "score_tokens_per_second": rates.get("score"),
            "cache_tokens_per_second": rates.get("cache"),
            "evaluate_tokens_per_second": rates.get("evaluate"),
            "cache_bytes_per_position": rates.get("bytes"),
            "samples": len(splits.train),
            "seconds": time.perf_counter() - started,
        }


def _shortened(recipe: Recipe) -> Recipe:
    content = recipe.resolved()
    # One process trains here, so there is nothing to shard.
    kept = {key: value for key, value in content["training"].items() if key not in ("fsdp", "fsdp_config")}
    short = {"max_steps": STEPS, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    content["training"] = {**kept, **short}
    if recipe.samples is not None:
        content["samples"]["path"] = None
    if recipe.cache is not None:
        content["cache"] = {"path": None}
    # Benchmarks take longer than a probe may.
    content["evaluation"] = {"suite": [name for name in recipe.evaluation.suite if name == "fidelity"]}
    if not is_local(recipe):  # download and tokenise no more than the probe needs
        length = recipe.data.max_length
        content["data"]["tokens"] = length * (_samples_needed(recipe) + HELD_OUT_SAMPLES)
        content["data"]["held_out_tokens"] = max(length, HELD_OUT_SAMPLES * length)
    return parse_part(Recipe, content)


def _samples_needed(recipe: Recipe) -> int:
    """How many samples fill one step with the kept ones, and a cache that is not all headers."""
    training = recipe.training
    step = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
    kept = max(step, math.ceil(CACHED_TOKENS / recipe.data.max_length) if recipe.cache is not None else 0)
    return math.ceil(kept / (1.0 if recipe.samples is None else recipe.samples.fraction))


def _first_samples(recipe: Recipe, splits: Splits) -> Splits:
    """The first samples of both splits, as many as the probe needs."""
    train = splits.train.select(range(min(len(splits.train), _samples_needed(recipe))))
    held_out = splits.held_out.select(range(min(len(splits.held_out), HELD_OUT_SAMPLES)))
    return replace(splits, train=train, held_out=held_out, train_tokens=_tokens(train))


def _tokens(samples: SampleDataset) -> int:
    return int(samples.lengths.sum())


def _clocked(stage: Callable[[], T]) -> tuple[T, float]:
    """Run a stage; return its answer and its seconds."""
    started = time.perf_counter()
    return stage(), time.perf_counter() - started


def _step_seconds(metrics: Path) -> float:
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    seconds = {line["step"]: float(line["seconds"]) for line in lines if "loss" in line}
    first, last = min(seconds), max(seconds)
    return seconds[first] if first == last else (seconds[last] - seconds[first]) / (last - first)
