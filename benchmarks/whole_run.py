"""A whole SE-KD 3X run, scoring and cache included, against a Full KD run with plain full logits on the same text.

    python benchmarks/whole_run.py [RECIPE] [--set KEY=VALUE ...] [--out DIR]

Three runs into DIR (a temporary folder if not given): Full KD, both models' full logits in float32, every sample, as
most scripts do it; the recipe as it is; and the recipe again with the scores and the cache of the run before. Seconds
are the processor's own (all threads; with OMP_NUM_THREADS=1 other work on the machine hardly changes them), of
scoring, caching and training; loading the models, tokenising and evaluating are left out of all three. Peak
memory is not measured: ``selkd bench`` does.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback

from selkd.bench.variants import plain_kl
from selkd.recipe.files import load_recipe
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.cache import cache as find_cache
from selkd.run.pipeline import start
from selkd.run.prepare import prepare
from selkd.run.score import score
from selkd.teacher.targets import Batch
from selkd.training.trainer import DistillTrainer


class PlainTrainer(DistillTrainer):
    """Full KD from full logits; everything else is the trainer's own."""

    teacher_model: Any

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,  # noqa: ARG002
        num_items_in_batch: Any = None,
    ) -> Any:
        valid, given = inputs["valid_mask"], {name: inputs[name] for name in ("input_ids", "position_ids")}
        with torch.no_grad():
            teacher_logits: Tensor = self.teacher_model(**given, use_cache=False).logits
        student_logits: Tensor = model(**given, use_cache=False).logits
        sums = (plain_kl(student_logits, teacher_logits) * valid).sum(dim=-1) / valid.sum(dim=-1).clamp(min=1)
        self._step.add({"positions_selected": valid.sum()}, [], None)
        return sums.sum() / num_items_in_batch


def trained(seconds: dict[str, float], trainer: DistillTrainer) -> None:
    for theirs in (PrinterCallback, ProgressCallback):  # both write to standard output, which is for the answer
        trainer.remove_callback(theirs)
    timed(seconds, "train", trainer.train)


def timed(seconds: dict[str, float], name: str, job: Callable[[], Any]) -> Any:
    started = time.process_time()
    found = job()
    seconds[name] = time.process_time() - started
    return found


def full_kd(recipe: Recipe, out: Path) -> dict[str, float]:
    """Seconds of a run that trains on every sample and position from full logits."""
    changes = {"cache": None, "samples": None, "classes": {"sampler": "all"}, "positions": {"policy": "all"}}
    with start(parse_part(Recipe, recipe.resolved() | changes), out) as (work, _):
        seconds: dict[str, float] = {}
        trainer = PlainTrainer(
            model=work.models.student,
            teacher=work.models.teacher,
            args=work.arguments,
            train_dataset=work.splits.train,
            processing_class=work.tokenizer,
        )
        trainer.teacher_model = work.models.teacher
        trained(seconds, trainer)
    return seconds


def as_given(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Seconds of the recipe's own stages, models and tokenised text being in memory before."""
    with start(recipe, out) as (work, run):
        prepare(work, run)
        for load in (lambda: work.splits, lambda: work.models.student, lambda: work.models.teacher):
            load()
        seconds: dict[str, float] = {}
        samples = timed(seconds, "score", lambda: score(work, run))
        cache = timed(seconds, "cache", lambda: find_cache(work, run, samples))
        trainer = DistillTrainer(
            model=work.models.student,
            teacher=work.models.teacher if cache is None else cache,
            args=work.arguments,
            train_dataset=samples,
            processing_class=work.tokenizer,
        )
        trained(seconds, trainer)
        agreement = run.record.get("scoring_agreement")
    return {**seconds, "samples": len(samples), "steps": trainer.state.global_step, "scoring_agreement": agreement}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    quiet = ["evaluation.suite=[]", 'training.save_strategy="no"', "training.disable_tqdm=true"]
    with ExitStack() as stack:
        out = given.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="selkd-whole-run-")))
        kept = [f"samples.path={out / 'scores.parquet'}", f"cache.path={out / 'cache'}"]
        recipe = load_recipe(given.recipe, [*(given.overrides or ()), *quiet, *kept])
        seconds = {"3x": as_given(recipe, out / "3x"), "3x, scores and cache reused": as_given(recipe, out / "again")}
        seconds["full_kd_plain"] = full_kd(recipe, out / "full")
    total = {name: sum(each.get(part) or 0 for part in ("score", "cache", "train")) for name, each in seconds.items()}
    ratios = {name: value / total["full_kd_plain"] for name, value in total.items()}
    print(json.dumps({"seconds": seconds, "total": total, "ratio_to_full_kd_plain": ratios}, indent=2))


if __name__ == "__main__":
    main()
