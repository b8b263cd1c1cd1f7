"""The names that are built in: metrics, policies, class samplers, and criteria with the defaults of their options."""

POSITION_METRICS = (
    "student_entropy",
    "teacher_entropy",
    "student_ce",
    "teacher_ce",
    "kl",
    "reverse_kl",
    "kl_plus_student_entropy",
    "ce_ratio",
    "ce_ratio_plus_student_entropy",
    "soft_or",
    "random",
)
METRICS_OF_THE_STUDENT = ("student_entropy", "student_ce", "random")
POLICIES = ("all", "top_k", "random", "gls", "curriculum", "pos_rs", "pos_rs_corrected", "weighted")
SAMPLED_POLICIES = ("pos_rs", "pos_rs_corrected")
# Policies whose K picked positions share one coefficient; ``gls`` is always counted over the whole step.
HARD_POLICIES = ("all", "top_k", "random", "curriculum")
CLASS_SAMPLERS = ("all", "rs_kd", "systematic", "top_k")
# Each criterion with the options it has, and their defaults.
CRITERIA: dict[str, dict[str, float]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.5},
    "skew_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
    "total_variation": {},
    "dkd": {"alpha": 1.0, "beta": 8.0},
    "at_kd": {},
}
BUILT_IN: dict[str, tuple[str, ...]] = {
    "metric": POSITION_METRICS,
    "policy": POLICIES,
    "criterion": tuple(CRITERIA),
    "sampler": CLASS_SAMPLERS,
}
