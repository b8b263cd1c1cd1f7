"""A short run of the recipe's own stages on its own text, to measure what can't be counted: speed and cache bytes."""

import json
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from selkd.cache.reader import TeacherCache
from selkd.data.samples import SampleDataset
from selkd.data.splits import Splits
from selkd.estimate.plan import is_local
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.cache import cache as build_or_find_cache
from selkd.run.directory import RunDirectory
from selkd.run.evaluate import evaluate
from selkd.run.prepare import prepare
from selkd.run.score import score
from selkd.run.train import train as train_student
from selkd.run.workspace import Workspace

STEPS = 3  # the first one warms up and is not counted
HELD_OUT_SAMPLES = 8
CACHED_TOKENS = 2048


@dataclass(frozen=True)
class Rates:
    """Measured on one device; None where the recipe has no such stage.

    Attributes:
        step_seconds: of one optimiser step, all its micro-batches.
        score_tokens_per_second, cache_tokens_per_second, evaluate_tokens_per_second: of those
        cache_bytes_per_position: of the shards of the small cache that was built.
        samples, seconds: what the probe scored, and the time that it took.
    """

    step_seconds: float
    score_tokens_per_second: float | None
    cache_tokens_per_second: float | None
    evaluate_tokens_per_second: float | None
    cache_bytes_per_position: float | None
    samples: int
    seconds: float


def probe(recipe: Recipe) -> Rates:
    """Score, cache, evaluate and train on a few samples in a temporary folder.

    Raises:
        InputError, RunError: as ``distill``.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="selkd-probe-") as folder:
        small = _shortened(recipe)
        path = Path(folder) / "run"
        work = Workspace(small, path, splits=_few(small, Workspace(small, path).splits))
        run = RunDirectory.claim(path, small, is_writer=True)
        prepare(work, run)
        train, held_out = work.splits.train, work.splits.held_out
        _ = work.models.student  # loaded before the clock starts
        rates: dict[str, float | None] = dict.fromkeys(("score", "cache", "evaluate"))
        with _clock() as clock:
            kept = score(work, run)
        if recipe.samples is not None:
            # Comparing some scores with exact ones is a smaller share of a whole run.
            checked = run.record.get("scoring_agreement", {}).get("seconds", 0.0)
            rates["score"] = _tokens(train) / (clock[0] - checked)
        if small.evaluation.suite:
            _ = work.models.teacher
            with _clock() as clock:
                evaluate(work, run, work.models.student, "before")
            rates["evaluate"] = _tokens(held_out) / clock[0]
        stored = None
        if recipe.cache is not None:
            _ = work.models.teacher
            with _clock() as clock:
                cache = build_or_find_cache(work, run, kept)
            assert cache is not None
            rates["cache"], stored = _tokens(kept) / clock[0], _shard_bytes(cache) / float(cache.stats()["positions"])
            train_student(work, run, kept, cache)
        else:
            train_student(work, run, kept, None)
        return Rates(
            step_seconds=_step_seconds(run.path / "metrics.jsonl"),
            score_tokens_per_second=rates["score"],
            cache_tokens_per_second=rates["cache"],
            evaluate_tokens_per_second=rates["evaluate"],
            cache_bytes_per_position=stored,
            samples=len(train),
            seconds=time.perf_counter() - started,
        )


def _shard_bytes(cache: TeacherCache) -> int:
    """Without plan and manifest, which hardly grow with the cache."""
    return sum(path.stat().st_size for path in cache.directory.iterdir() if path.suffix == ".selkd")


def _shortened(recipe: Recipe) -> Recipe:
    content = recipe.resolved()
    # One process trains here, so there is nothing to shard.
    own = {key: value for key, value in content["training"].items() if key not in ("fsdp", "fsdp_config")}
    training = {
        **own,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    changed = {**content, "training": training}
    if recipe.samples is not None:
        changed["samples"] = {**content["samples"], "path": None}
    if recipe.cache is not None:
        changed["cache"] = {"path": None}
    suite = [name for name in recipe.evaluation.suite if name == "fidelity"]  # benchmarks take longer than a probe may
    changed["evaluation"] = {"suite": suite}
    if not is_local(recipe):  # so much of it is fetched and tokenised, and no more
        length = recipe.data.max_length
        changed["data"] = {**content["data"], "tokens": length * (_samples_needed(recipe) + HELD_OUT_SAMPLES)}
        changed["data"]["held_out_tokens"] = max(length, HELD_OUT_SAMPLES * length)
    return parse_part(Recipe, changed)


def _samples_needed(recipe: Recipe) -> int:
    """So many that the kept ones fill a step, and a cache that is not all headers."""
    training = recipe.training
    step = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
    kept = max(step, math.ceil(CACHED_TOKENS / recipe.data.max_length) if recipe.cache is not None else 0)
    return math.ceil(kept / (1.0 if recipe.samples is None else recipe.samples.fraction))


def _few(recipe: Recipe, splits: Splits) -> Splits:
    """As many of the samples as the probe needs."""
    few = splits.train.select(range(min(len(splits.train), _samples_needed(recipe))))
    held_out = splits.held_out.select(range(min(len(splits.held_out), HELD_OUT_SAMPLES)))
    return replace(splits, train=few, held_out=held_out, train_tokens=_tokens(few))


def _tokens(samples: SampleDataset) -> int:
    return int(samples.lengths.sum())


@contextmanager
def _clock() -> Iterator[list[float]]:
    """A list that holds the seconds once the block is through."""
    found: list[float] = []
    started = time.perf_counter()
    yield found
    found.append(time.perf_counter() - started)


def _step_seconds(metrics: Path) -> float:
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    seconds = {line["step"]: float(line["seconds"]) for line in lines if "loss" in line}
    steps = sorted(seconds)
    if len(steps) == 1:
        return seconds[steps[0]]
    return (seconds[steps[-1]] - seconds[steps[0]]) / (steps[-1] - steps[0])
