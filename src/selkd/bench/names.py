"""The names of the variants that ``selkd bench`` measures; they are checked without torch."""

from collections.abc import Sequence

from selkd.errors import InputError, nearest

# Name -> description: the floor, the variants to compare with it, then an ablation of the heads.
VARIANTS = {
    "floor": "both models' bodies and a trivial loss: no head, no distillation",
    "full_kd_plain": "Full KD on both models' full logits",
    "full_kd": "Full KD, chunked: 100% of the positions",
    "se_kd_exact": "20% of the positions by the student's exact entropy",
    "se_kd_two_stage": "the same, the entropy estimated first and exact for the best",
    "recipe": "the recipe's own step",
    "se_kd_dense_heads": "20% chosen from both models' full logits",
    "se_kd_dense_student_head": "the student's full logits, the teacher's at the selected positions",
    "se_kd_dense_teacher_head": "the teacher's full logits, the student's at the selected positions",
    "se_kd_cached": "20% of the positions, the teacher's drawn classes from a cache",
    "cross_entropy_plain": "no teacher: cross-entropy with the text on the student's full logits",
    "cross_entropy_chunked": "no teacher: chunked cross-entropy at the positions of se_kd_cached",
}

# What --quick measures, in one turn, with so many samples at most.
QUICK = ("floor", "full_kd", "se_kd_exact", "se_kd_two_stage", "se_kd_cached", "cross_entropy_chunked")
QUICK_SAMPLES = 2


def checked_variants(variants: Sequence[str] | None, repeats: int) -> list[str]:
    """The names of the variants to measure; None stands for all, and the floor is always one.

    Raises:
        InputError: a variant is unknown, or ``repeats`` is below 1.
    """
    if repeats < 1:
        raise InputError(f"--repeats: expected at least 1, got {repeats}.")
    for name in variants or ():
        if name not in VARIANTS:
            raise InputError(
                f"--variant: {name!r} is not known. Allowed: {', '.join(VARIANTS)}.{nearest(name, VARIANTS)}"
            )
    return [name for name in VARIANTS if variants is None or name in variants or name == "floor"]
