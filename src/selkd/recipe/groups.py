"""What the named recipes are for: the groups in which ``selkd recipes`` lists them."""

GROUPS: dict[str, tuple[str, ...]] = {
    "To begin with": ("demo", "full_kd", "random_pos", "rs_kd", "se_kd_3x"),
    "Baselines": ("full_kd_ce", "full_kd_t2", "random_samples", "weighted_kd", "at_kd", "dkd"),
    "Which positions: by what the student shows": ("se_kd", "student_ce"),
    "Which positions: by what the teacher shows, too": (
        "teacher_entropy",
        "teacher_ce",
        "kl",
        "reverse_kl",
        "kl_plus_student_entropy",
        "ce_ratio",
        "ce_ratio_plus_student_entropy",
        "soft_or",
    ),
    "Which positions: another way to pick them": (
        "gls",
        "curriculum",
        "pos_rs",
        "pos_rs_corrected",
        "se_kd_scheduled",
    ),
    "Which samples": (
        "top_samples",
        "top_samples_kl",
        "top_samples_ce_ratio",
        "se_kd_top_samples",
    ),
    "Few classes, from a cache on disk": ("se_kd_3x_systematic", "top_samples_rs_kd"),
    "The student answers itself (on-policy)": (
        "gsm8k_on_policy",
        "gsm8k_off_policy",
        "full_kd_on_policy",
        "se_kd_on_policy",
        "random_pos_on_policy",
        "pos_rs_on_policy",
        "pos_rs_corrected_on_policy",
        "top_samples_on_policy",
        "se_kd_top_samples_on_policy",
    ),
}


def grouped(lines: dict[str, str]) -> dict[str, dict[str, str]]:
    """Group -> recipe -> its line; a recipe that no group names comes last."""
    known = {title: {name: lines[name] for name in names if name in lines} for title, names in GROUPS.items()}
    rest = {name: line for name, line in lines.items() if not any(name in group for group in known.values())}
    return {title: group for title, group in (known | {"Others": rest}).items() if group}
