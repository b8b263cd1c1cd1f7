"""The stage that scores the samples with the initial student and chooses which to keep."""

import time
from pathlib import Path

import numpy as np
import torch

from selkd.data.samples import SampleDataset
from selkd.evaluation.sample_scores import score_samples
from selkd.run.directory import RunDirectory
from selkd.run.record import cost_of, count_teacher_tokens, note_shared, timed
from selkd.run.workspace import Workspace
from selkd.selection.randomness import sample_generator
from selkd.selection.samples import SampleScores, highest
from selkd.selection.two_stage import Estimator, by_frequency

COMPARED_SAMPLES = 32  # at least so many approximate sample scores are compared with exact ones


def score(work: Workspace, run: RunDirectory) -> SampleDataset:
    """The samples that are kept: scored by the frozen initial student, or read from where they were scored."""
    train, options = work.splits.train, work.recipe.samples
    if options is None:
        run.record["counts"]["samples_kept"] = len(train)
        run.save()
        return train
    with timed(run, "score"):
        path = Path(options.path).expanduser() if options.path else run.path / "selection" / "samples.parquet"
        fingerprint = {
            "metric": options.metric + _approximation(work),
            "data": work.splits.fingerprint,
            "student": work.student_source.fingerprint,
            "classes": str(work.vocab_size),
            "precision": str(work.dtype),
            **({"seed": str(work.recipe.seed)} if options.metric == "random" else {}),
            **(
                {"teacher": work.teacher_source.fingerprint, "teacher_precision": work.teacher_precision}
                if options.needs_teacher
                else {}
            ),
        }
        own = run.path / "selection" / "samples.parquet"
        is_new = not path.exists()
        if not is_new:
            stored = SampleScores.read(path, fingerprint)
            scores, cost = stored.scores, stored.cost
        else:
            started = time.perf_counter()
            scores, tokens = _score(work, train, _estimator(work) if options.scoring == "approximate" else None)
            cost = cost_of(time.perf_counter() - started, tokens)
            if options.scoring == "approximate":
                run.record["scoring_agreement"] = _scoring_agreement(work, scores)
            if tokens:
                count_teacher_tokens(work, run, score=tokens)
        if options.path:
            note_shared(run, "score", cost)
        kept = highest(scores, options.fraction)
        if work.state.is_main_process:
            found = SampleScores([sample_id.hex() for sample_id in train.ids], scores, fingerprint, cost)
            if is_new:
                found.write(path, kept)
            if own != path:  # a shared file keeps the choice of the run that wrote it
                found.write(own, kept)
        work.state.wait_for_everyone()
    run.record["counts"]["samples_kept"] = len(kept)
    run.save()
    return train.select(kept)


def _score(work: Workspace, samples: SampleDataset, estimator: Estimator | None) -> tuple[np.ndarray, int]:
    """Scores of some of the training samples, and the tokens that the teacher ran on."""
    assert work.recipe.samples is not None
    return score_samples(work.recipe.samples.metric, samples, work.models, work.recipe.seed, estimator)


def _approximation(work: Workspace) -> str:
    """What approximate scores depend on beyond exact ones; the classes' order follows from data and classes."""
    options = work.recipe.samples
    if options is None or options.scoring == "exact":
        return ""
    classes = f"{options.frequent_classes} frequent and about {options.tail_classes} other classes"
    share = options.calibration_fraction
    told = f"told by {share:g} of the positions" if share else "told by the text"
    return f", estimated from {classes}, {told}, seed {work.recipe.seed}"


def _estimator(work: Workspace) -> Estimator:
    options = work.recipe.samples
    assert options is not None, "a recipe that scores samples"
    ordered = torch.from_numpy(by_frequency(work.splits.train.token_counts(work.vocab_size))).to(work.device)
    return Estimator(options, ordered, work.recipe.seed)


def _scoring_agreement(work: Workspace, scores: np.ndarray) -> dict[str, float | int | None]:
    """Approximate ``scores`` [N] against exact ones on a few samples, drawn by the seed."""
    options, train = work.recipe.samples, work.splits.train
    assert options is not None
    count = min(len(train), max(COMPARED_SAMPLES, len(train) // 50))
    generator = sample_generator(work.recipe.seed, b"", "compared samples")
    some = np.sort(generator.choice(len(train), count, replace=False))
    started = time.perf_counter()
    exact, _ = _score(work, train.select(some), None)
    seconds = time.perf_counter() - started
    varies = bool(np.ptp(exact) > 0 and np.ptp(scores[some]) > 0)
    best, found = highest(exact, options.fraction), highest(scores[some], options.fraction)
    return {
        "samples_compared": count,
        "share_of_exact_choice": len(np.intersect1d(best, found)) / max(1, len(best)),
        "correlation": float(np.corrcoef(exact, scores[some])[0, 1]) if varies else None,
        "seconds": round(seconds, 3),
    }
