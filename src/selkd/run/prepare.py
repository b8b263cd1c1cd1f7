"""The stage that finds the models, tokenises the text, cuts the student and records all of them."""

from selkd.errors import InputError
from selkd.run.directory import RunDirectory
from selkd.run.record import COUNTS, count_teacher_tokens, environment, timed
from selkd.run.workspace import Workspace

STUDENT_KEYS = ("fingerprint", "parameters", "layers", "trained_parameters")  # later stages record these


def prepare(work: Workspace, run: RunDirectory) -> None:
    """Find the models, tokenise the text, cut the student, and record them."""
    with timed(run, "prepare"):
        work.require_positions()
        splits, recipe = work.splits, work.recipe
        n_valid = int(splits.train.n_valid.sum())
        own = work.own_parts
        changed = [kind for kind, digest in run.record.get("own_parts", own).items() if own.get(kind) != digest]
        if changed:
            raise InputError(
                f"{run.path}: the source of this recipe's own {changed[0]} changed since the run began. Give another "
                "--out, or restore it; nothing was changed."
            )
        run.record.update(
            own_parts=own,
            name=recipe.name or run.path.name,
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
        teacher = {"model": work.teacher_source.name, "fingerprint": work.teacher_source.fingerprint}
        run.record["teacher"] = {**(run.record.get("teacher") or {}), **teacher}
        pruning = work.pruning  # by this run or, on this machine, by one before it
        count_teacher_tokens(run, **({} if pruning is None else {"prune": pruning["teacher_tokens"]}))
    run.save()
