"""What callers of the engine's functions give, checked: heads, teachers, batches.

Shapes: B batch, T positions, V classes, D hidden, C known classes of a position.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel

from selkd.errors import InputError, nearest
from selkd.maths.head import Head
from selkd.models.head import head_of
from selkd.plugins import Metric, Policy, Sampler
from selkd.recipe.choices import ClassOptions, CriterionOptions, PositionOptions
from selkd.recipe.combinations import check_cached, check_loss, n_scoring_draws
from selkd.selection.classes import ClassSampler, class_sampler
from selkd.selection.host import keep_on_host, on_host, to_device
from selkd.teacher.cached import ScoringDraws
from selkd.teacher.live import Drawing, LiveTargets, LogitsTargets, WholeTargets, class_uniforms
from selkd.teacher.targets import Batch, DrawnClasses, StoredTargets, TeacherScalars, TruncatedDistribution

Split = Callable[[Tensor], tuple[Tensor, Tensor]]
LmHead = nn.Module | Tensor | Mapping[str, Any]
IGNORED = -100  # the target that Transformers gives to a position that is not learned
FORMS = (
    ("hidden_states", "lm_head"),
    ("logits",),
    ("class_ids", "counts"),
    ("class_ids", "log_probabilities"),
)
SCALARS = ("entropy_nats", "ce_nats")  # [B, T], which may stand beside known classes


@dataclass(frozen=True)
class GivenTeacher:
    """A teacher in one of the forms that ``distillation_loss`` takes, checked.

    Attributes:
        given: the mapping.
        shape: B and T.
        device: where its tensors are.
        n_classes: how many classes it has; None if only some are known.
        classes: which of them are drawn; where it has counts, how these were drawn (``all``: it is not told).
    """

    given: Mapping[str, Any]
    shape: torch.Size
    device: torch.device
    n_classes: int | None
    classes: ClassOptions

    @classmethod
    def of(cls, given: Mapping[str, Any], classes: ClassOptions, shape: torch.Size | None = None) -> "GivenTeacher":
        """The teacher that a caller gave. Raises InputError unless it has one of the forms and, if told, the shape."""
        with_scalars = [{*form, *SCALARS} for form in FORMS if "class_ids" in form]
        if not isinstance(given, Mapping) or set(given) not in [*map(set, FORMS), *with_scalars]:
            got = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
            forms = "; ".join(" and ".join(form) for form in FORMS)
            raise InputError(
                f"teacher: expected a mapping of one of: {forms}; beside class_ids, {' and '.join(SCALARS)}, too. "
                f"Got {got or 'nothing'}."
            )
        tensors = {name: value for name, value in given.items() if name not in ("lm_head", *SCALARS)}
        first = next(iter(tensors.values()))
        shape = first.shape[:2] if shape is None else shape
        for name, value in tensors.items():
            if value.ndim != 3 or value.shape[:2] != shape:
                expected = ", ".join(map(str, shape))
                raise InputError(f"teacher.{name}: expected [{expected}, …], one row a position; got {_form(value)}.")
        for name in SCALARS:
            if name in given:
                require_shape(f"teacher.{name}", given[name], shape)
        n_classes = given["logits"].shape[-1] if "logits" in given else None
        if "lm_head" in given:
            n_classes = as_head(given["lm_head"], "teacher.lm_head", given["hidden_states"]).vocab_size
        return cls(given, shape, first.device, n_classes, classes)

    @property
    def has_scalars(self) -> bool:
        return SCALARS[0] in self.given

    @property
    def has_counts(self) -> bool:
        return "counts" in self.given

    @property
    def sampler(self) -> ClassSampler | None:
        """What draws classes from it; None: it is compared as it is given."""
        return None if self.n_classes is None or self.classes.sampler == "all" else class_sampler(self.classes)

    def targets(
        self, drawing: Drawing, vocab_size: int, split: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    ) -> WholeTargets | StoredTargets:
        """Its targets at every position of the batch, over the first ``vocab_size`` classes.

        Args:
            split: cuts counts into those of the draws that score positions and those of the others; None: no draws do.
        """
        flat = {name: value.detach().flatten(0, 1) for name, value in self.given.items() if name != "lm_head"}
        index = torch.arange(len(next(iter(flat.values()))), device=drawing.batch["valid_mask"].device)
        if "lm_head" in self.given:
            head = as_head(self.given["lm_head"], "teacher.lm_head", self.given["hidden_states"])
            return LiveTargets(drawing, index, head.slice_vocab(vocab_size), flat["hidden_states"])
        if "logits" in self.given:
            return LogitsTargets(drawing, index, flat["logits"][:, :vocab_size])
        if flat["class_ids"].device.type == "cpu" and int(flat["class_ids"].max()) >= vocab_size:
            raise InputError(
                f"teacher.class_ids: expected classes below {vocab_size}, which the student has; got "
                f"{int(flat['class_ids'].max())}."
            )
        scalars = None
        if self.has_scalars:
            entropy, cross_entropy = (flat[name].float() for name in SCALARS)
            goes_with_draws = drawing.temperature == 1.0 and Sampler.find(self.classes.sampler).is_unbiased
            scalars = TeacherScalars(entropy, cross_entropy, goes_with_draws)
        if self.has_counts:
            scoring, counts = (None, flat["counts"]) if split is None else split(flat["counts"])
            return StoredTargets(DrawnClasses, flat["class_ids"], counts, scalars, scoring)
        return StoredTargets(TruncatedDistribution, flat["class_ids"], flat["log_probabilities"], scalars)


def require_possible(criterion: CriterionOptions, positions: PositionOptions, teacher: GivenTeacher) -> None:
    """Raises InputError for parts that do not go together, or not with the form of the teacher."""
    require_stateless(positions)
    try:
        check_loss(criterion, teacher.classes)
        if teacher.n_classes is None:
            check_loss(criterion, ClassOptions(sampler="rs_kd"))
            known = _known_classes(positions, teacher)
            check_cached(positions, known, criterion.temperature, has_scalars=teacher.has_scalars)
        elif positions.scoring_draws is not None:
            raise ValueError("positions.scoring_draws: the teacher is given in full and scores so; leave it out")
    except ValueError as error:
        raise InputError(f"{error}.") from None


def _known_classes(positions: PositionOptions, teacher: GivenTeacher) -> ClassOptions:
    """How a teacher's given classes were picked. Raises ValueError where that must be told, or is and can't be."""
    if teacher.classes.sampler == "all":
        if teacher.has_counts and teacher.has_scalars and _uses_draws(positions):
            raise ValueError(
                f"positions.metric: {positions.metric} is estimated from unbiased draws, and counts alone don't tell "
                "how they came about; give it as classes, such as {'sampler': 'rs_kd', 'draws': 64} (a TeacherCollator "
                "has its cache's as .classes), or take a metric of the student (student_entropy, student_ce)"
            )
        return ClassOptions(sampler="top_k")
    if not teacher.has_counts or teacher.classes.tail:
        raise ValueError("classes: these tell how counts were drawn, without a tail; leave it out")
    return teacher.classes


def _uses_draws(positions: PositionOptions) -> bool:
    """Whether the metric is estimated from the draws of a teacher whose classes are given."""
    return positions.metric is not None and Metric.find(positions.metric).uses_draws


def require_stateless(positions: PositionOptions) -> None:
    if positions.queue_size is not None:
        raise InputError(
            f"positions.policy: {positions.policy} keeps a queue of scores from step to step, which a function can't. "
            "Train through DistillTrainer, or take the policy top_k."
        )


def as_head(lm_head: LmHead, name: str, hidden_states: Tensor) -> Head:
    """``lm_head`` as a view of its parameters. Raises InputError if it has none of its forms, or another width."""
    if isinstance(lm_head, PreTrainedModel):
        head = head_of(lm_head)
    elif isinstance(lm_head, Mapping):
        allowed = ("weight", "bias", "scale", "softcap")
        for key in lm_head:
            if key not in allowed:
                raise InputError(f"{name}: unknown key {key!r}. Allowed: {', '.join(allowed)}.{nearest(key, allowed)}")
        if "weight" not in lm_head:
            raise InputError(f"{name}: expected the key weight, [V, D]; got {', '.join(lm_head) or 'nothing'}.")
        head = Head(**lm_head)
    elif isinstance(lm_head, Tensor):
        head = Head(lm_head)
    elif isinstance(weight := getattr(lm_head, "weight", None), Tensor):
        head = Head(weight, getattr(lm_head, "bias", None))
    else:
        raise InputError(f"{name}: expected a layer, a weight [V, D], a mapping or a model; got {type(lm_head)}.")
    if head.weight.ndim != 2 or head.weight.shape[1] != hidden_states.shape[-1]:
        raise InputError(f"{name}: expected a weight [V, {hidden_states.shape[-1]}]; got {_form(head.weight)}.")
    if hasattr(head.weight, "full_tensor"):
        raise InputError(
            f"{name}: its weight is sharded. Call this inside the forward of the module that FSDP wraps, where the "
            "weight is whole."
        )
    return head


def shared_classes(n_student: int, teacher: GivenTeacher, vocab_size: int | None) -> int:
    """How many classes are compared: those of both models, or as many of each as ``vocab_size`` says."""
    sizes = {"student": n_student} | ({} if teacher.n_classes is None else {"teacher": teacher.n_classes})
    told = ", ".join(f"the {name} has {size} classes" for name, size in sizes.items())
    if vocab_size is None and len(set(sizes.values())) > 1:
        raise InputError(f"vocab_size: {told}. Give the number that both share, if one has padded its vocabulary.")
    if vocab_size is not None and not 1 <= vocab_size <= min(sizes.values()):
        raise InputError(f"vocab_size: expected 1 to {min(sizes.values())} ({told}), got {vocab_size}.")
    return n_student if vocab_size is None else vocab_size


def as_batch(
    hidden_states: Tensor, targets: Tensor, valid_mask: Tensor | None, position_ids: Tensor | None, *, skips: bool
) -> Batch:
    """The batch that the objective takes, on the device of ``targets``. Its mask is kept on the host, too.

    Args:
        skips: whether the first positions of documents are skipped, so that the host needs the position ids.

    Raises:
        InputError: shapes do not agree.
    """
    if hidden_states.ndim != 3:
        raise InputError(f"hidden_states: expected [B, T, D]; got {_form(hidden_states)}.")
    shape = hidden_states.shape[:2]
    require_shape("targets", targets, shape)
    if targets.device != hidden_states.device:
        raise InputError(
            f"targets: expected on {hidden_states.device}, where hidden_states are; got {targets.device}. Move them."
        )
    if targets.is_floating_point():
        raise InputError(f"targets: expected token ids, int64; got {_form(targets)}.")
    if valid_mask is None:
        valid_mask = targets != IGNORED
    if position_ids is None:
        position_ids = torch.arange(shape[1]).expand(shape)
    require_shape("valid_mask", valid_mask, shape)
    require_shape("position_ids", position_ids, shape)
    valid_mask = valid_mask.bool()
    host = {"valid_mask": valid_mask.cpu()} | ({"position_ids": position_ids.cpu()} if skips else {})
    valid_mask = to_device(valid_mask, targets.device)
    batch = {
        "targets": targets.long().masked_fill(~valid_mask, 0),
        "valid_mask": valid_mask,
        "position_ids": to_device(position_ids, targets.device),
    }
    return keep_on_host(batch, host)


def require_shape(name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise InputError(
            f"{name}: expected [{', '.join(map(str, shape))}], one for each position; got {_form(tensor)}."
        )


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def is_drawn(positions: PositionOptions, teacher: GivenTeacher) -> bool:
    """Whether random numbers of each sample are needed."""
    is_noise = positions.metric is not None and Metric.find(positions.metric).is_noise
    is_metric_drawn = is_noise or (teacher.has_counts and _uses_draws(positions))
    return is_metric_drawn or Policy.find(positions.policy).uniforms is not None or teacher.sampler is not None


def split_of(teacher: GivenTeacher, positions: PositionOptions, batch: Batch, seed: int, step: int) -> Split | None:
    """What splits a teacher's draws into those that score positions and the others; None if the metric needs none.

    Raises:
        InputError: there are draws, but too few.
    """
    if not teacher.has_counts or not _uses_draws(positions):
        return None
    draws = int(teacher.given["counts"].sum(dim=-1).max())
    if draws == 0:  # no position of the batch has any, and so none is valid: nothing is scored
        return None
    scoring = n_scoring_draws(positions, draws)
    if scoring >= draws:
        raise InputError(f"positions.scoring_draws: {scoring}, but teacher.counts has {draws} draws. Leave some.")
    return lambda counts: ScoringDraws(scoring, seed).split(counts, batch, step, draws)


def drawing_of(teacher: GivenTeacher, temperature: float, batch: Batch, seed: int, step: int) -> Drawing:
    sampler = teacher.sampler
    return Drawing(sampler, temperature, batch, class_uniforms(sampler, batch, seed, "classes", step))


def with_ids(batch: Batch, sample_ids: Tensor) -> Batch:
    """A batch of ``as_batch`` with these ids, which are kept on the host, too."""
    return keep_on_host(batch | {"sample_ids": sample_ids}, on_host(batch) | {"sample_ids": sample_ids.cpu()})


def ids_of_content(batch: Batch) -> Tensor:
    """An id for each sample, made of the tokens that it teaches, uint8 [B, 16]."""
    rows = zip(batch["targets"].cpu().numpy(), on_host(batch)["valid_mask"].numpy(), strict=True)
    digests = b"".join(xxhash.xxh3_128_digest(targets[valid].tobytes()) for targets, valid in rows)
    return torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, 16)


def numbered(count: int) -> Tensor:
    """An id for each row, uint8 [B, 16], as the specification numbers them."""
    return torch.from_numpy(np.arange(count * 2, dtype=np.int64).view(np.uint8).reshape(-1, 16))
