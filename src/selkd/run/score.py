"""The stage that scores the samples with the initial student and keeps the highest."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from selkd.data.samples import SampleDataset
from selkd.evaluation.sample_scores import score_samples
from selkd.plugins import Metric
from selkd.recipe.choices import SampleOptions
from selkd.run.cache import all_cached, is_scored_from, open_cache
from selkd.run.directory import RunDirectory
from selkd.run.enough import warn_if_short
from selkd.run.record import cost_of, count_teacher_tokens, note_shared, timed
from selkd.run.workspace import Workspace
from selkd.sealed import SCORES
from selkd.selection.randomness import sample_generator
from selkd.selection.samples import SampleScores, highest
from selkd.selection.two_stage import Estimator, by_frequency
from selkd.teacher.cached import CachedTeacher
from selkd_cache.reader import TeacherCache

COMPARED_SAMPLES = 32  # how many approximate sample scores are compared with exact ones, at least


def score(work: Workspace, run: RunDirectory) -> SampleDataset:
    """The kept samples. The frozen initial student scores all, unless a file has their scores."""
    train, options = work.splits.train, work.recipe.samples
    if options is None:
        run.record["counts"]["samples_kept"] = len(train)
        run.save()
        return train
    place = _as_main_finds(_scores_files(work))
    whole = all_cached(work, run) if place is None else None  # its time is the cache's
    with timed(run, "score"):
        scores = _scored_and_counted(work, run, whole) if place is None else _read(work, options, place)
        if options.path:
            note_shared(run, "score", scores.cost)
        if work.state.is_main_process:
            for path in _scores_files(work):
                if not path.exists():  # a file keeps the choice of the run that wrote it
                    scores.write(path)
        work.state.wait_for_everyone()
    run.record["counts"]["samples_kept"] = int(scores.kept.sum())
    run.save()
    return train.select(np.flatnonzero(scores.kept))


def kept_samples(work: Workspace) -> SampleDataset:
    """The recipe's kept samples, for commands that only look at a run: nothing is written."""
    train = work.splits.train
    if work.recipe.samples is None:
        return train
    scores = stored_scores(work) or scored(work, open_cache(work))
    return train.select(np.flatnonzero(scores.kept))


def cached_samples(work: Workspace) -> SampleDataset:
    """The samples that the recipe's cache is built of: the kept ones, or all where it scores them."""
    return work.splits.train if is_scored_from(work.recipe) else kept_samples(work)


def stored_scores(work: Workspace) -> SampleScores | None:
    """The scores in the run's own file, or in the one that the recipe shares; None if there is neither.

    Raises:
        InputError: the file is damaged, or its scores are of another text, student or metric.
    """
    options, place = work.recipe.samples, _first_there(_scores_files(work))
    return None if options is None or place is None else _read(work, options, place)


def shared_scores(work: Workspace) -> SampleScores | None:
    """Those in the file that the recipe shares, for all processes if the main one finds it; None if it has none.

    Raises:
        InputError: as ``stored_scores``.
    """
    options, place = work.recipe.samples, _as_main_finds(_scores_files(work)[1:])
    return None if options is None or place is None else _read(work, options, place)


def _read(work: Workspace, options: SampleOptions, path: Path) -> SampleScores:
    """The scores in a file, with the samples that this recipe keeps."""
    stored = SampleScores.read(path, _fingerprint(work, options))
    return replace(stored, kept=_kept(stored.scores, options))


def _scores_files(work: Workspace) -> list[Path]:
    """The run's own file of scores, which is as the run began, and the one that it shares with others, if it does."""
    shared = None if work.recipe.samples is None else work.recipe.samples.path
    return [work.run_path / SCORES, *([Path(shared).expanduser()] if shared else [])]


def _first_there(paths: Sequence[Path]) -> Path | None:
    return next((path for path in paths if path.exists()), None)


def _as_main_finds(paths: Sequence[Path]) -> Path | None:
    """The first of the files that is there, as the main process sees it: another run may write one between two looks,
    and processes that score wait for each other."""
    return cast(Path | None, broadcast_object_list([_first_there(paths)])[0])


def _scored_and_counted(work: Workspace, run: RunDirectory, cache: TeacherCache | None) -> SampleScores:
    warn_if_short(work, "score")
    scores = scored(work, cache)
    assert scores.cost is not None, "it was measured"
    if tokens := int(scores.cost["teacher_tokens"]):
        count_teacher_tokens(run, score=tokens)
    options = work.recipe.samples
    if options is not None and options.scoring == "approximate" and not run.is_finished:
        run.record["scoring_agreement"] = _scoring_agreement(work, options, scores.scores)
    run.save()  # before the scores are there: a run that is killed between the two does not count again
    return scores


def scored(work: Workspace, cache: TeacherCache | None) -> SampleScores:
    """Scores of all samples by the frozen initial student, and by the teacher's ``cache`` if there is one."""
    options, train = work.recipe.samples, work.splits.train
    assert options is not None, "a recipe without samples scores none"
    started = time.perf_counter()
    instead = _estimator(work, options) if cache is None else CachedTeacher(cache)
    scores, tokens = score_samples(options.metric, train, work.models, work.recipe.seed, instead)
    cost = cost_of(time.perf_counter() - started, tokens)
    sample_ids = [sample_id.hex() for sample_id in train.ids]
    return SampleScores(sample_ids, scores, _fingerprint(work, options), _kept(scores, options), cost)


def _kept(scores: np.ndarray, options: SampleOptions) -> np.ndarray:
    """bool [N]: which of the samples with these scores are kept."""
    kept = np.zeros(len(scores), dtype=bool)
    kept[highest(scores, options.fraction)] = True
    return kept


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
        if options.from_cache:
            fingerprint["metric"] += f", from a cache{_draws_scored_by(work, options)}"
        fingerprint |= {"teacher": work.teacher_source.fingerprint, "teacher_precision": work.teacher_precision}
    return fingerprint


def _draws_scored_by(work: Workspace, options: SampleOptions) -> str:
    """What scores from a cache depend on beside its teacher: the draws, for a metric that is estimated from them."""
    if not Metric.find(options.metric).uses_draws:
        return ""
    classes = work.recipe.classes
    return f" of {classes.draws} draws by {classes.sampler}, seed {work.recipe.seed}"


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
