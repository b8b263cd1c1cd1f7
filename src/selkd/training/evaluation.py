"""How far the student is from its teacher on held-out samples: the mean over all valid positions.

The training's loss can't serve for this: it depends on the selected positions, a schedule, random draws, the batch size
and the number of processes. Here every valid position counts once, and one sum is divided by one count at the end.

Shapes: B batch, T positions, D hidden, V classes.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalLoopOutput, default_compute_objective

from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.maths.chunked import chunked_statistics, compute_dtype
from selkd.maths.divergence import log_softmax_, truncated_forward_kl
from selkd.maths.finite import require_finite
from selkd.maths.head import Head
from selkd.models.head import check_packing
from selkd.selection.host import valid_index
from selkd.selection.position_scores import position_statistics
from selkd.teacher.live import LiveTeacher
from selkd.teacher.targets import Batch, DrawnClasses, Teacher, TeacherTargets, TruncatedDistribution
from selkd.training.arguments import DistillArguments
from selkd.training.inputs import as_evaluated, require_stored, require_window
from selkd.training.objective import Objective
from selkd.training.sampling import FilledDataset, FilledSampler
from selkd.training.student import check_student
from selkd_cache.reader import TeacherCache

KL = "kl_nats"
"""Mean KL(p || q) of teacher and student, temperature 1; of a cache with scalars an unbiased estimate."""
DRAWS = "cross_entropy_to_draws_nats"
"""Mean cross-entropy -sum_v w_v log q(v) with the teacher's drawn classes, w_v the share of the draws, at the cache's
temperature. With independent draws it is an unbiased estimate of KL(p || q) + H(p). H(p) is the same for every student,
so students can be compared by it."""


@torch.no_grad()
def divergence_sums(
    hidden_states: Tensor, head: Head, *, batch: Batch, teacher: TeacherTargets, is_live: bool, temperature: float
) -> dict[str, Tensor]:
    """``total_nats``, the sum of ``KL`` or ``DRAWS`` over a batch's valid positions, and ``positions``, their number.

    It is ``KL`` where the teacher is live, or its targets have the entropy that goes with their draws.

    Args:
        hidden_states: the student's, [B, T, D].
        head: the student's head over the classes that it shares with the teacher.
        teacher: the teacher's targets for the batch.
        is_live: whether the targets are the full distribution, compared at temperature 1, or else drawn classes.
        temperature: the temperature at which the classes were drawn.

    Returns:
        float64 scalars.

    Raises:
        RunError: a value is not finite; the message names the sample and the position.
    """
    valid = valid_index(batch)
    picked, hidden = teacher.at(valid), hidden_states.flatten(0, 1)[valid]
    compute_head = head.to(compute_dtype(hidden_states))

    def cross_entropy_to_draws(student_logits: Tensor, rows: slice) -> Tensor:
        drawn = picked.chunk(rows)
        student_logits.div_(temperature)
        if isinstance(drawn, TruncatedDistribution):
            p = drawn.log_probabilities.exp()
            p_tail = (1 - p.sum(dim=-1)).clamp(min=0)
            entropy = -torch.xlogy(p, p).sum(dim=-1) - torch.xlogy(p_tail, p_tail)
            return (truncated_forward_kl(student_logits, *vars(drawn).values())[0] + entropy).unsqueeze(-1)
        assert isinstance(drawn, DrawnClasses), "a cache holds drawn classes"
        log_q = log_softmax_(student_logits).gather(-1, drawn.class_ids)
        weights = drawn.counts / drawn.counts.sum(dim=-1, keepdim=True)
        values = -(weights * log_q).sum(dim=-1)
        return (values if drawn.entropy is None else values - drawn.entropy).unsqueeze(-1)

    if is_live:
        targets = batch["targets"].flatten()[valid]
        values = position_statistics(("kl",), hidden, compute_head, targets, picked.scored_by())["kl"]
    else:
        values = chunked_statistics(hidden, compute_head, cross_entropy_to_draws).squeeze(-1)
    require_finite(values, valid, batch, "the student's or the teacher's logits, in an evaluation")
    return {"total_nats": values.double().sum(), "positions": valid.new_full((), len(valid), dtype=torch.float64)}


class EvaluatingTrainer(Trainer):
    """The evaluation of ``DistillTrainer``.

    ``evaluate`` measures how far the student is from its teacher on all valid positions of held-out samples, whichever
    positions the training selects, and reports it as ``eval_loss``. With a live teacher this is the mean KL (also
    ``eval_kl_nats``), and with a cache of unbiased draws at temperature 1 and scalars an unbiased estimate of it; with
    another cache it is the mean cross-entropy with its draws (also ``eval_cross_entropy_to_draws_nats``), which is KL
    plus the teacher's own entropy. ``compute_metrics`` and
    ``predict`` get the student's logits as from the Trainer; ``label_ids`` holds each token to be learned at its own
    index, and -100 elsewhere.
    """

    args: DistillArguments
    eval_dataset: Any  # a FilledDataset, or several by name, once its rows have become samples
    teacher: Teacher
    distillation_loss: Objective  # the Trainer itself writes `objective`, in a hyperparameter search
    _teacher_input: PreTrainedModel | TeacherCache  # as the caller passed it
    _tokenizer: PreTrainedTokenizerBase
    _checked_packing: set[bool]  # for which kinds of samples, packed or not, the student passed `check_student`
    _is_teacher_checked = False  # whether the teacher keeps packed documents apart
    _sums: list[Tensor] | None = None  # of the current evaluation, for each batch: nats and positions, float64 [2]
    _evaluates_packed = False  # whether the samples of the current evaluation are packed

    def _require_usable(self, samples: SampleDataset, name: str) -> None:
        """Raises InputError for samples, called ``name``, that a model can't take or that the cache lacks."""
        require_window(samples, name, [self.model, self._teacher_input], self.args)
        require_stored(self.teacher, samples)
        if samples.is_packed and isinstance(self.teacher, LiveTeacher) and not self._is_teacher_checked:
            check_packing(self.teacher.model)
            self._is_teacher_checked = True

    def _check_student(self, model: nn.Module, is_packed: bool) -> None:
        """Check a student when it is first used as it trains, and again when packed samples first come."""
        if is_packed not in self._checked_packing:
            check_student(model, self.accelerator.unwrap_model(self.model), self.args.compute_dtype, is_packed)
            self._checked_packing |= {is_packed, False}

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the Trainer's; ``eval_dataset`` may be rows, too."""
        if isinstance(eval_dataset, str):
            sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if eval_dataset not in sets:
                raise InputError(f"eval_dataset: no set is called {eval_dataset!r}; there are {sorted(sets)}.")
            sets[eval_dataset] = self._as_filled(sets[eval_dataset], f"eval_dataset[{eval_dataset!r}]")
        elif eval_dataset is None and self.eval_dataset is not None and not isinstance(self.eval_dataset, dict):
            self.eval_dataset = self._as_filled(self.eval_dataset, "eval_dataset")
        is_own = isinstance(eval_dataset, FilledDataset) and eval_dataset is self.eval_dataset
        if eval_dataset is None or isinstance(eval_dataset, str) or is_own:
            return super().get_eval_dataloader(eval_dataset)
        # Without a key: the Trainer keeps persistent workers by key, and they would go on with their old rows.
        return self._get_dataloader(
            self._as_filled(eval_dataset, "eval_dataset"),
            "Evaluation",
            self.args.eval_batch_size,
            self._get_eval_sampler,
        )

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As the Trainer's; ``test_dataset`` may be rows, too."""
        return super().get_test_dataloader(self._as_filled(test_dataset, "test_dataset"))

    def _as_filled(self, dataset: Any, name: str) -> FilledDataset:
        """The samples of one call, checked like those that were passed to the trainer."""
        if isinstance(dataset, FilledDataset):
            return dataset
        filled = as_evaluated(dataset, name, self._tokenizer, self.args)
        self._require_usable(filled.samples, name)
        return filled

    def _get_eval_sampler(self, eval_dataset: Any) -> FilledSampler:
        """The data set's order."""
        return FilledSampler(len(eval_dataset), self.args.eval_batch_size * self.args.world_size)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the Trainer's, with the mean over all valid positions in place of the mean of the batches' losses."""
        if self.is_fsdp_enabled and not self.accelerator._models:
            raise InputError("evaluate: Accelerate shards a student when its training begins; evaluate then, or after.")
        assert isinstance(dataloader.dataset, FilledDataset), "made by get_eval_dataloader or get_test_dataloader"
        self._sums, self._evaluates_packed = [], dataloader.dataset.samples.is_packed
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        no_batch = [torch.zeros(2, dtype=torch.float64, device=self.args.device)]
        total_nats, positions = self._over_processes(torch.stack(self._sums or no_batch).sum(dim=0)).tolist()
        mean = total_nats / positions
        name = KL if self.teacher.has_kl else DRAWS
        output.metrics[f"{metric_key_prefix}_loss"] = mean
        for key, value in ((name, mean), ("positions", int(positions))):
            output.metrics.setdefault(f"{metric_key_prefix}_{key}", value)  # a user's own metric of this name stays
        self._sums = None
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The mean of one batch and, unless ``prediction_loss_only``, the student's logits and the labels."""
        del ignore_keys  # they name outputs that this forward does not have
        self._check_student(model, self._evaluates_packed)
        inputs, step = self._prepare_inputs(inputs), self.state.global_step
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        measure = partial(
            divergence_sums,
            batch=inputs,
            teacher=self.teacher.targets(inputs, step, for_loss=False),
            is_live=self.teacher.is_live,
            temperature=self.distillation_loss.criterion.temperature,
        )
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = model(input_ids=ids, position_ids=positions, distillation=measure)
            if self._sums is not None:
                self._sums.append(torch.stack([sums["total_nats"], sums["positions"]]))
            loss = (sums["total_nats"] / sums["positions"].clamp(min=1)).float()
            if prediction_loss_only:
                return loss, None, None
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits.detach()
        is_label = torch.zeros_like(inputs["valid_mask"])
        is_label[:, 1:] = inputs["valid_mask"][:, :-1]
        return loss, logits, ids.masked_fill(~is_label, -100)

    def _over_processes(self, values: Tensor) -> Tensor:
        """The sum of every process's ``values``."""
        return self.accelerator.reduce(values, "sum") if self.accelerator.num_processes > 1 else values

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As ``Trainer.hyperparameter_search``; without other metrics it minimises ``eval_loss``."""
        return super().hyperparameter_search(hp_space, compute_objective or _objective_of, *args, **kwargs)


def _objective_of(metrics: dict[str, float]) -> float:
    """The Trainer's objective of a search, the sum of all metrics, without those that only go with an ``eval_loss``."""
    prefixes = [name.removesuffix("_loss") for name in metrics if name.endswith("_loss")]
    left_out = {
        f"{prefix}_{name}" for prefix in prefixes for name in (KL, DRAWS, "positions", "model_preparation_time")
    }
    return default_compute_objective({name: value for name, value in metrics.items() if name not in left_out})
