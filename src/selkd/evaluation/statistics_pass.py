"""One pass of a student, and of its teacher if needed, over samples gives statistics of every valid position.

Shapes: B samples of a batch, T positions, N valid positions of the batch.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from selkd.data.collate import TOKENS_AT_ONCE, collate, group_by_tokens
from selkd.data.samples import SampleDataset
from selkd.errors import Interrupted, RunError
from selkd.interrupts import asked, interrupted, raise_together
from selkd.maths.finite import require_finite
from selkd.maths.head import Head
from selkd.maths.importance import OF_STUDENT
from selkd.models.head import evaluating
from selkd.models.pair import ModelPair
from selkd.selection.position_scores import TeacherSide, position_statistics
from selkd.selection.two_stage import Estimator
from selkd.teacher.cached import CachedTeacher

R = TypeVar("R")
Instead = Estimator | CachedTeacher
"""What takes the place of exact statistics of both models: an estimator of entropy, or a cached teacher."""
Reduce = Callable[[list[int], Tensor, dict[str, Tensor]], R]
"""Called with the indices of a batch's B samples, their valid mask [B, T], and the statistics by name, [N] each, in the
order of the mask. Returns plain data or tensors on the CPU."""


def over_samples(
    names: Sequence[str],
    samples: SampleDataset,
    models: ModelPair,
    reduce: Reduce[R],
    description: str,
    instead: Instead | None = None,
) -> tuple[list[R], int]:
    """The result of ``reduce`` for each batch, and the number of tokens that the teacher ran on, padding included.

    Samples of about the same length share a batch of ``TOKENS_AT_ONCE`` tokens. Several processes share the batches,
    and each returns the results of all.

    Args:
        names: names of ``selkd.maths.importance.statistics``. The teacher is loaded only if one of them needs it.
        description: the purpose of the pass, such as "scoring", for the progress bar and for errors.
        instead: an estimator of ``student_entropy``, which must be the only name; or a cached teacher that has every
            sample, of which ``kl`` is an unbiased estimate; None: statistics are exact.

    Raises:
        RunError: a statistic is not finite; the message names sample and position.
    """
    state = PartialState()
    groups = group_by_tokens(samples.lengths, TOKENS_AT_ONCE)
    mine = groups[state.process_index :: state.num_processes]
    # Each forward of a sharded student needs all processes: one with a batch fewer takes part with another's.
    n_together = -(-len(groups) // state.num_processes) if models.is_sharded else len(mine)
    through_student, needs_teacher = models.through_student(), not OF_STUDENT.issuperset(names)
    cached = instead if isinstance(instead, CachedTeacher) else None
    with_teacher = needs_teacher and cached is None

    def one_batch(group: list[int]) -> tuple[R, int]:  # its tensors are freed before the next one's
        padded = collate([samples[index] for index in group], models.pad_token_id)
        batch = {name: tensor.to(models.student_device) for name, tensor in padded.items()}
        valid_mask = batch["valid_mask"]

        def measure(hidden: Tensor, head: Head) -> dict[str, Tensor]:
            if not isinstance(instead, Estimator):
                side: TeacherSide | None = models.teacher_logits(batch) if with_teacher else None
                if needs_teacher and cached is not None:
                    valid = valid_mask.flatten().nonzero().flatten()
                    side = cached.targets(batch, 0, for_loss=False).at(valid).scored_by()
                targets = batch["targets"][valid_mask]
                return position_statistics(names, hidden[valid_mask], head, targets, side)
            estimates = [instead(row[mask], head, "samples") for row, mask in zip(hidden, valid_mask, strict=True)]
            return {"student_entropy": torch.cat(estimates)}

        statistics = through_student(batch, measure)
        index, totals = valid_mask.flatten().nonzero().flatten(), torch.stack(list(statistics.values())).sum(dim=0)
        require_finite(totals, index, batch, f"the student's or the teacher's logits, while {description}")
        return reduce(group, valid_mask, statistics), valid_mask.numel() if with_teacher else 0

    reduced: list[R] = []
    tokens = 0
    error: RunError | Interrupted | None = None
    progress = tqdm(total=sum(map(len, mine)), desc=description, unit=" samples", disable=not state.is_main_process)
    with evaluating(models.student), evaluating(models.teacher) if with_teacher else nullcontext(), progress:
        for group in (mine + groups[:1])[:n_together]:
            error = error or (None if asked() is None else interrupted())
            if models.is_sharded:
                raise_together(error)
            if error is not None:  # told to the others first, which would wait
                break
            try:
                part, of_teacher = one_batch(group)
            except RunError as raised:
                error = raised
                continue
            if len(reduced) < len(mine):
                reduced.append(part)
                tokens += of_teacher
                progress.update(len(group))
    raise_together(error)
    if state.num_processes > 1:
        reduced, tokens = gather_object(reduced), sum(gather_object([tokens]))
    return reduced, tokens
