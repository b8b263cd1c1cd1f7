"""The stage that finds the models, tokenises the text, cuts the student and records all of them."""

from selkd.run.cache import require_own_cache
from selkd.run.directory import RunDirectory
from selkd.run.inputs import held_inputs
from selkd.run.record import COUNTS, count_teacher_tokens, environment, timed
from selkd.run.score import stored_scores
from selkd.run.workspace import Workspace
from selkd.sealed import INPUTS
from selkd.training.resuming import require_same_steps

STUDENT_KEYS = ("fingerprint", "parameters", "layers", "trained_parameters")  # later stages record these


def prepare(work: Workspace, run: RunDirectory) -> None:
    """Find the models, tokenise the text, cut the student, and record them; of a finished run, nothing is recorded.

    Raises:
        InputError: an input is not the one that the run began with, or scores or a cache are there and were made from
            others, or the training has other steps with this number of processes. Nothing was written.
    """
    with timed(run, "prepare"):
        work.require_layers()
        work.require_positions()
        inputs = held_inputs(work, run)
        if run.is_finished or run.is_left_as_it_is:
            return
        stored_scores(work)  # refused before anything is written
        require_own_cache(work, run)
        if run.record.get("train") is None:  # it is still to be trained, or to be trained on
            require_same_steps(work.arguments)
        splits, recipe = work.splits, work.recipe
        n_valid = int(splits.train.n_valid.sum())
        run.record[INPUTS] = inputs
        run.record.update(
            own_parts=work.own_parts,
            name=run.record.get("name") or _called(work, run),
            recipe=recipe.resolved(),
            environment=environment(work),
            data={
                "documents": splits.documents,
                "train_samples": len(splits.train),
                "train_tokens": splits.train_tokens,
                "train_positions": n_valid,
                "held_out_samples": len(splits.held_out),
                "held_out_overlap": splits.overlap.described(),
                "cut_documents": splits.misfits.cut,
                "prompts_too_long": splits.misfits.too_long,
                "documents_without_target": splits.misfits.unanswered,
                "fingerprint": splits.fingerprint,
                "held_out_fingerprint": splits.held_out.digest,
            },
        )
        run.record.setdefault("counts", dict.fromkeys(COUNTS))["samples"] = len(splits.train)
        for part in ("fidelity", "train", "teacher_cache", "benchmarks", "on_policy"):
            run.record.setdefault(part, None)
        source = work.student_source
        run.record["student"] = {
            "model": recipe.student.model,
            "initial_fingerprint": source.fingerprint,
            "pruned_from_teacher": work.pruning,
        } | {k: v for k, v in (run.record.get("student") or {}).items() if k in STUDENT_KEYS}
        teacher = {"model": work.teacher_name, "fingerprint": work.teacher_fingerprint}
        run.record["teacher"] = {**(run.record.get("teacher") or {}), **teacher}
        pruning = work.pruning  # by this run or, on this machine, by one before it
        count_teacher_tokens(run, **({} if pruning is None else {"prune": pruning["teacher_tokens"]}))
    run.save()


def _called(work: Workspace, run: RunDirectory) -> str:
    """What the run is called: as the recipe says, or else as its folder."""
    is_given = "name" in work.recipe.model_fields_set
    return (work.recipe.name if is_given else None) or run.path.absolute().name
