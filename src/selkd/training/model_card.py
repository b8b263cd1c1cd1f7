"""What a trainer's model card says beside Transformers' own: the teacher, the method, the data and the figures."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selkd.plugins import Criterion, Metric, Policy, Sampler
from selkd.training.arguments import DistillArguments
from selkd_cache.reader import TeacherCache

_FIGURES = re.compile(r"(loss|kl_nats|cross_entropy_to_draws_nats)$")


def distillation_section(
    args: DistillArguments, teacher: Any, samples: int | None, history: Sequence[Mapping[str, Any]]
) -> str:
    """The section of the card, in Markdown. Of a local path it shows the last part alone.

    Args:
        teacher: the model, or its cache.
        samples: how many samples were trained on; None: none were given.
        history: the Trainer's logged lines.
    """
    positions, classes = args.positions, args.classes
    metric = Metric.in_words(positions.metric) if positions.metric else ""
    share = "" if positions.fraction is None else _share(positions.fraction)
    lines = [
        f"Teacher: `{_name(teacher)}`" + (", read from a cache of its answers" if _is_cache(teacher) else "") + ".",
        f"Criterion: {Criterion.in_words(args.criterion.name)}, temperature {args.criterion.temperature:g}.",
        f"Positions: {Policy.in_words(positions.policy, share=share, metric=metric)}.",
        f"Classes: {Sampler.in_words(classes.sampler, draws=str(classes.draws))}.",
    ]
    if samples is not None:
        lines.append(f"Data: {samples:,} samples of at most {args.data.max_length:,} tokens.")
    evaluated: Mapping[str, Any] = next(
        (line for line in reversed(history) if any(key.startswith("eval_") for key in line)), {}
    )
    for key, value in evaluated.items():
        if isinstance(value, float) and _FIGURES.search(key):
            lines.append(f"{key}: {value:.4g}, at step {evaluated.get('step')}.")
    return "\n".join(["## Distillation", "", "By selkd, from its teacher:", "", *(f"- {line}" for line in lines), ""])


def add_section(card: Path, section: str) -> None:
    """Put the section before the card's own account of the training."""
    text = card.read_text(encoding="utf-8")
    before, mark, after = text.partition("## Training procedure")
    card.write_text(f"{before}{section}\n{mark}{after}" if mark else f"{text}\n{section}", encoding="utf-8")


def _is_cache(teacher: Any) -> bool:
    return isinstance(teacher, TeacherCache)


def _name(teacher: Any) -> str:
    if isinstance(teacher, TeacherCache):
        return str(teacher.fingerprint.get("teacher", "unknown"))
    name = str(getattr(teacher.config, "_name_or_path", "") or type(teacher).__name__)
    return Path(name).name if Path(name).exists() else name


def _share(fraction: Any) -> str:
    return f"{fraction:.0%}" if isinstance(fraction, float) else "a scheduled share"
