"""The engine for anybody's own loop: the chunked, selective loss as one function, and three parts of it by themselves.

They take hidden states and a head where others take logits, so logits [B, T, V] are never in memory. Rows line up as
everywhere in selkd: index t is about token t + 1.

A head, ``lm_head`` below, is an ``nn.Linear``, an ``nn.Embedding`` that is tied to it, a weight [V, D], a Transformers
model, of which the bias, scale and softcap are read, too, or a mapping with the keys ``weight`` [V, D] and, where the
head has them, ``bias`` [V], ``scale`` (a factor on the logits) and ``softcap`` (c in c * tanh(logits / c)).

Shapes: B batch, T positions, V classes, D hidden, C known classes of a position.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from selkd.errors import InputError
from selkd.maths import chunked
from selkd.maths.chunked import chunk_size, chunks
from selkd.maths.finite import require_all_finite
from selkd.plugins import Metric
from selkd.recipe.choices import ClassOptions, CriterionOptions, PositionOptions
from selkd.recipe.part import parse_part
from selkd.selection.position_scores import choose_positions
from selkd.selection.positions import step_context
from selkd.selection.randomness import position_uniforms
from selkd.selection.two_stage import by_frequency
from selkd.training.given import (
    GivenTeacher,
    LmHead,
    as_batch,
    as_head,
    drawing_of,
    ids_of_content,
    is_drawn,
    numbered,
    require_possible,
    require_shape,
    require_stateless,
    shared_classes,
    split_of,
    with_ids,
)
from selkd.training.objective import PLACED, Objective

Part = Mapping[str, Any]


class DistillationLoss(NamedTuple):
    """What ``distillation_loss`` returns. All but ``loss`` is detached.

    Attributes:
        loss: a scalar with gradient, float32 or float64.
        scores: the metric at the valid positions, [B, T], 0 elsewhere.
        coefficients: the weight of each position in the sum of its sample, [B, T]; 0 where it was not selected.
        values: the criterion at the selected positions in nats, [B, T], 0 elsewhere.
        sums: for logging: ``positions_selected``, and over these positions ``divergence_nats`` and, if the criterion
            has it, ``cross_entropy_nats``. Where it can be had, ``kl_nats``, the sum of KL(p || q) at temperature 1
            over ``kl_positions`` of them; of unbiased draws an unbiased estimate, of other drawn classes none.
    """

    loss: Tensor
    scores: Tensor
    coefficients: Tensor
    values: Tensor
    sums: dict[str, Tensor]


def distillation_loss(
    hidden_states: Tensor,
    lm_head: LmHead,
    teacher: Mapping[str, Any],
    targets: Tensor,
    valid_mask: Tensor | None = None,
    *,
    criterion: CriterionOptions | Part | None = None,
    positions: PositionOptions | Part | None = None,
    classes: ClassOptions | Part | None = None,
    vocab_size: int | None = None,
    divisor: Tensor | float | None = None,
    step: int = 0,
    total_steps: int = 1,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    token_counts: Tensor | None = None,
) -> DistillationLoss:
    """The selective distillation loss of a micro-batch, from hidden states; full logits are never in memory.

    Dense expression with the defaults, ``q`` and ``p`` [B, T, V] being the softmax of the student's and the teacher's
    logits; with ``positions`` the mean of a sample is over those that are selected::

        d = (p * (p.log() - q.log())).sum(-1)
        loss = torch.stack([d[i, valid_mask[i]].mean() for i in range(B)]).mean()

    ``selkd.reference.loss`` is the dense expression for every choice. The gradient reaches ``hidden_states`` and the
    head's own parameters through autograd: where DDP or FSDP wraps the model, call it inside the model's forward.
    Products run in autocast's dtype, or else in that of ``hidden_states``; sums in float32, or in float64.

    The host waits for an accelerator at the end, to raise an error before a value that is not finite is learned, and
    where scores alone tell how many positions are selected (``gls``, ``pos_rs``, ``weighted``). What it can't know
    otherwise it reads first, which waits as well: give ``valid_mask`` on the CPU, and with draws ``sample_ids``; a
    target or a mask on the device is read once.

    Args:
        hidden_states: the student's last, after its final norm, [B, T, D].
        lm_head: the student's head.
        teacher: a mapping, one of

            - ``hidden_states`` [B, T, D of the teacher] and ``lm_head``: its head runs at selected positions only;
            - ``logits`` [B, T, V];
            - ``class_ids`` and ``counts`` [B, T, C]: classes that were drawn from it at the criterion's temperature,
              and how often; rows are padded with count 0;
            - ``class_ids`` and ``log_probabilities`` [B, T, C]: its most probable classes at the criterion's
              temperature; all others count as one class with the mass that is left. Rows are padded with -inf.

            Beside ``class_ids`` may stand ``entropy_nats`` and ``ce_nats`` [B, T], the teacher's H(p) and -log p(y) at
            temperature 1: with them its metrics can be taken and, where ``classes`` says that counts are unbiased draws
            (``rs_kd`` or ``systematic``), the true KL is known. A metric with KL is then estimated from
            ``positions.scoring_draws`` of the draws, taken at random, and the loss has the others. Those of
            ``systematic`` are better split by ``DistillTrainer``, which spaces them evenly.
        targets: the true next tokens, int64 [B, T]: ``input_ids`` moved to the left by one.
        valid_mask: bool [B, T], on any device, the positions that may be selected; None: those whose target is not
            -100.
        criterion: the recipe's part of that name; None: forward KL.
        positions: the recipe's part; None: all of them.
        classes: the recipe's part: the classes that are drawn of a teacher that is given in full, None: all; or how
            given ``counts`` were drawn (``TeacherCollator.classes``), None: it is not known.
        vocab_size: how many classes both models share, where one of them has padded its vocabulary.
        divisor: what the sum over samples (with ``reduction: per_position``, over positions) is divided by; None: how
            many this micro-batch has. To accumulate gradients, give the number of the whole step on all ranks.
        step: the optimiser step, of which schedules and draws are a function.
        total_steps: the optimiser steps of the run, for schedules.
        seed: of the draws.
        sample_ids: uint8 [B, 16], of which the draws of each sample are a function; None: made from its targets.
        position_ids: int64 [B, T], from 0 in each document, for ``positions.skip_first``; None: one document a row.
        token_counts: how often each class occurs in the training text, [V], for ``positions.scoring: two_stage``.

    Raises:
        InputError: shapes do not agree, ``teacher`` is none of the four, a part is refused as in a recipe, or a choice
            needs what is not given.
        RunError: a logit is not finite; the message names the sample and the position.
    """
    criterion = parse_part(CriterionOptions, criterion or {}, "criterion")
    positions = parse_part(PositionOptions, positions or {}, "positions")
    classes = parse_part(ClassOptions, classes or {"sampler": "all"}, "classes")
    batch = as_batch(hidden_states, targets, valid_mask, position_ids, skips=bool(positions.skip_first))
    given = GivenTeacher.of(teacher, classes, batch["valid_mask"].shape)
    require_possible(criterion, positions, given)
    head = as_head(lm_head, "lm_head", hidden_states)
    head = head.slice_vocab(shared_classes(head.vocab_size, given, vocab_size))
    if sample_ids is not None:
        batch = with_ids(batch, sample_ids)
    elif is_drawn(positions, given):  # only then, as reading the targets makes the host wait for the device
        batch = with_ids(batch, ids_of_content(batch))
    if positions.scoring == "two_stage" and token_counts is None:
        raise InputError("positions.scoring: two_stage needs token_counts [V], how often the text has each class.")
    frequent = None if token_counts is None else by_frequency(token_counts[: head.vocab_size].cpu().numpy())
    objective, context = Objective(criterion, positions, seed, frequent), step_context(positions, step, total_steps)
    if divisor is None:
        divisor = objective.normaliser(batch, context)
    drawing = drawing_of(given, criterion.temperature, batch, seed, step)
    split = split_of(given, positions, batch, seed, step)
    teacher_targets = given.targets(drawing, head.vocab_size, split)
    outputs = objective(hidden_states, head, batch, teacher_targets, context=context, normaliser=divisor)
    require_all_finite(outputs.pop("checks"))
    scores, coefficients, values = (outputs.pop(name) for name in PLACED)
    return DistillationLoss(outputs.pop("loss"), scores, coefficients, values, outputs)


def chunked_entropy(hidden_states: Tensor, lm_head: LmHead) -> Tensor:
    """The entropy in nats, [...], of the distributions at hidden states [..., D], without gradient.

    Dense expression: ``torch.distributions.Categorical(logits=lm_head(hidden_states)).entropy()``. Products run in
    autocast's dtype, or else in that of ``hidden_states``; the result is float32, or float64.
    """
    head = as_head(lm_head, "lm_head", hidden_states)
    with torch.no_grad():
        narrow = head.to(chunked.compute_dtype(hidden_states))
        return chunked.chunked_entropy(hidden_states.flatten(0, -2), narrow).view(hidden_states.shape[:-1])


def select_positions(
    scores: Tensor,
    valid_mask: Tensor,
    positions: PositionOptions | Part | None = None,
    *,
    step: int = 0,
    total_steps: int = 1,
    sample_ids: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """The weight of each position in the sum of its sample, [B, T], in the dtype of ``scores``; 0: not selected.

    Args:
        scores: of any metric, [B, T], finite where valid; the policies ``random`` and ``all`` look at none.
        valid_mask: bool [B, T], the positions that may be selected.
        positions: the recipe's part of that name, whose ``metric`` and ``scoring`` say nothing here; without a policy
            the highest scores, and without a fraction 20%.
        step, total_steps, seed: as for ``distillation_loss``.
        sample_ids: uint8 [B, 16], of which the draws of each sample are a function; None: its number in the batch.

    Raises:
        InputError: shapes do not agree, the part is refused as in a recipe, or it needs more than scores (``gls`` a
            queue over the steps, ``skip_first`` the documents' borders).
    """
    if not isinstance(positions, PositionOptions):
        given = dict(positions or {})
        positions = given | {"policy": given.get("policy") or "top_k"}
    options = parse_part(PositionOptions, positions, "positions")
    require_stateless(options)
    if options.skip_first:
        raise InputError("positions.skip_first: set valid_mask to False there; documents' borders are not known here.")
    require_shape("valid_mask", valid_mask, scores.shape)
    batch = {
        "valid_mask": valid_mask.bool(),
        "sample_ids": numbered(len(scores)) if sample_ids is None else sample_ids,
        "position_ids": torch.zeros_like(valid_mask, dtype=torch.int64),
    }
    context = step_context(options, step, total_steps)
    if options.metric is not None and Metric.find(options.metric).is_noise:
        ids, mask = batch["sample_ids"].cpu().numpy(), batch["valid_mask"].cpu().numpy()
        scores = torch.from_numpy(position_uniforms(seed, ids, mask, "positions", step)).to(scores.device)
    return choose_positions(options, scores, batch, context, seed=seed)


@torch.no_grad()
def sample_classes(
    teacher: Mapping[str, Any],
    classes: ClassOptions | Part,
    *,
    temperature: float = 1.0,
    step: int = 0,
    seed: int = 0,
    sample_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """Classes drawn from a teacher at every position, in the form that ``distillation_loss`` takes as ``teacher``.

    Args:
        teacher: a mapping of ``hidden_states`` [B, T, D] and ``lm_head``, or of ``logits`` [B, T, V].
        classes: the recipe's part of that name, as ``{"sampler": "rs_kd", "draws": 64}``.
        temperature: the criterion's.
        step, seed, sample_ids: what the draws are a function of, as for ``select_positions``.

    Returns:
        ``class_ids`` int64 and ``counts``, or with ``tail`` ``log_probabilities``, all [B, T, C].

    Raises:
        InputError: ``teacher`` is neither, or the part is refused as in a recipe or draws nothing.
        RunError: a logit is not finite.
    """
    options = parse_part(ClassOptions, classes, "classes")
    if options.sampler == "all":
        raise InputError("classes.sampler: all draws nothing; name a sampler, as {'sampler': 'rs_kd', 'draws': 64}.")
    given = GivenTeacher.of(teacher, options)
    if given.n_classes is None:
        raise InputError("teacher: these classes are drawn already; give hidden_states and lm_head, or logits.")
    everywhere = torch.ones(given.shape, dtype=torch.bool, device=given.device)
    batch = {"valid_mask": everywhere, "sample_ids": numbered(len(everywhere)) if sample_ids is None else sample_ids}
    targets = given.targets(drawing_of(given, temperature, batch, seed, step), given.n_classes)
    parts = [targets.chunk(rows) for rows in chunks(everywhere.numel(), chunk_size(given.n_classes, given.device))]
    drawn = {name: [getattr(part, name) for part in parts] for name in vars(parts[0]) if name != "entropy"}
    require_all_finite(targets.checks)
    width = max(class_ids.shape[1] for class_ids in drawn["class_ids"])
    padding = {"class_ids": 0, "counts": 0, "log_probabilities": -torch.inf}
    return {
        name: torch.cat([pad(rows, (0, width - rows.shape[1]), value=padding[name]) for rows in several]).view(
            *given.shape, width
        )
        for name, several in drawn.items()
    }
