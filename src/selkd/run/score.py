"""The stage that scores the samples with the initial student and keeps the highest."""

import time
from pathlib import Path

import numpy as np
import torch

from selkd.data.samples import SampleDataset
from selkd.evaluation.sample_scores import score_samples
from selkd.recipe.choices import SampleOptions
from selkd.run.directory import RunDirectory
from selkd.run.record import cost_of, count_teacher_tokens, note_shared, timed
from selkd.run.workspace import Workspace
from selkd.selection.randomness import sample_generator
from selkd.selection.samples import SampleScores, highest
from selkd.selection.two_stage import Estimator, by_frequency

COMPARED_SAMPLES = 32  # how many approximate sample scores are compared with exact ones, at least


def score(work: Workspace, run: RunDirectory) -> SampleDataset:
    """The kept samples. The frozen initial student scores all, unless a file has their scores."""
    train, options = work.splits.train, work.recipe.samples
    if options is None:
        run.record["counts"]["samples_kept"] = len(train)
        run.save()
        return train
    with timed(run, "score"):
        own = run.path / "selection" / "samples.parquet"
        path = Path(options.path).expanduser() if options.path else own
        fingerprint = _fingerprint(work, options)
        is_new = not path.exists()
        if not is_new:
            stored = SampleScores.read(path, fingerprint)
            scores, cost = stored.scores, stored.cost
        else:
            started = time.perf_counter()
            estimate = _estimator(work, options)
            scores, tokens = score_samples(options.metric, train, work.models, work.recipe.seed, estimate)
            cost = cost_of(time.perf_counter() - started, tokens)
            if estimate is not None:
                run.record["scoring_agreement"] = _scoring_agreement(work, options, scores)
            if tokens:
                count_teacher_tokens(run, score=tokens)
            run.save()  # before the scores are there: a run that is killed between the two does not count again
        if options.path:
            note_shared(run, "score", cost)
        kept = highest(scores, options.fraction)
        if work.state.is_main_process:
            sample_scores = SampleScores([sample_id.hex() for sample_id in train.ids], scores, fingerprint, cost)
            if is_new:
                sample_scores.write(path, kept)
            if own != path:  # a shared file keeps the choice of the run that wrote it
                sample_scores.write(own, kept)
        work.state.wait_for_everyone()
    run.record["counts"]["samples_kept"] = len(kept)
    run.save()
    return train.select(kept)


def _fingerprint(work: Workspace, options: SampleOptions) -> dict[str, str]:
    """Everything that the scores depend on."""
    seed = str(work.recipe.seed)
    metric = options.metric
    if options.scoring == "approximate":  # the order of the classes depends on data and classes, which stand below
        classes = f"{options.frequent_classes} frequent and about {options.tail_classes} other classes"
        share = options.calibration_fraction
        source = f"told by {share:g} of the positions" if share else "told by the text"
        metric += f", estimated from {classes}, {source}, seed {seed}"
    fingerprint = {
        "metric": metric,
        "data": work.splits.fingerprint,
        "student": work.student_source.fingerprint,
        "classes": str(work.vocab_size),
        "precision": str(work.dtype),
    }
    if options.metric == "random":
        fingerprint["seed"] = seed
    if options.needs_teacher:
        fingerprint |= {"teacher": work.teacher_source.fingerprint, "teacher_precision": work.teacher_precision}
    return fingerprint


def _estimator(work: Workspace, options: SampleOptions) -> Estimator | None:
    """Estimates approximate scores; None if scores are exact."""
    if options.scoring == "exact":
        return None
    ordered = torch.from_numpy(by_frequency(work.splits.train.token_counts(work.vocab_size))).to(work.device)
    return Estimator(options, ordered, work.recipe.seed)


def _scoring_agreement(work: Workspace, options: SampleOptions, scores: np.ndarray) -> dict[str, float | int | None]:
    """Approximate ``scores`` [N] against exact scores of a few samples, which the seed draws."""
    train, seed = work.splits.train, work.recipe.seed
    count = min(len(train), max(COMPARED_SAMPLES, len(train) // 50))
    drawn = np.sort(sample_generator(seed, b"", "compared samples").choice(len(train), count, replace=False))
    started = time.perf_counter()
    exact, _ = score_samples(options.metric, train.select(drawn), work.models, seed)
    seconds = time.perf_counter() - started
    approximate = scores[drawn]
    varies = bool(np.ptp(exact) > 0 and np.ptp(approximate) > 0)
    exact_choice, choice = highest(exact, options.fraction), highest(approximate, options.fraction)
    return {
        "samples_compared": count,
        "share_of_exact_choice": len(np.intersect1d(exact_choice, choice)) / max(1, len(exact_choice)),
        "correlation": float(np.corrcoef(exact, approximate)[0, 1]) if varies else None,
        "seconds": round(seconds, 3),
    }
