"""How far the student is from its teacher on held-out samples: one dense figure, whatever the training selects.

The training's loss is no such measure: it moves with the optimiser step, a schedule, random draws, the batch size and
the number of processes. Here every valid position counts once, sums come first, and there is one division.

Shapes: B batch, T positions, D hidden, V classes, N valid positions of the batch, C drawn classes.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalLoopOutput, default_compute_objective

from selkd.cache.reader import TeacherCache
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.maths.chunked import chunked_statistics, compute_dtype
from selkd.maths.divergence import log_softmax_
from selkd.maths.finite import require_finite
from selkd.maths.head import Head
from selkd.models.head import check_packing
from selkd.selection.position_scores import position_statistics
from selkd.teacher.targets import Batch, DrawnClasses, LiveTeacher, Teacher, TeacherTargets
from selkd.training.arguments import DistillArguments
from selkd.training.inputs import as_evaluated, require_stored, require_window
from selkd.training.objective import Objective
from selkd.training.sampling import FilledDataset, FilledSampler
from selkd.training.student import check_student

KL = "kl_nats"
"""Mean KL(p || q) of a live teacher and the student, temperature 1."""
DRAWS = "cross_entropy_to_draws_nats"
"""Mean of -sum w log q over the teacher's drawn classes, at the cache's temperature. Of independent draws it is an
unbiased estimate of KL(p || q) + H(p); H(p) is the same for every student, so that students compare by it."""


@torch.no_grad()
def divergence_sums(
    hidden_states: Tensor, head: Head, *, batch: Batch, teacher: TeacherTargets, is_live: bool, temperature: float
) -> dict[str, Tensor]:
    """``total_nats`` and ``positions`` over the valid positions of a batch, float64 scalars.

    Args:
        hidden_states: [B, T, D], the student's.
        head: the student's, over the classes that it shares with the teacher.
        teacher: the targets of the batch; ``is_live``: of its full distribution, else of drawn classes.
        temperature: of the drawn classes; a full distribution is compared at 1.

    Raises:
        RunError: a value is not finite; the sample and position are named.
    """
    valid = batch["valid_mask"].flatten().nonzero().flatten()
    picked, hidden = teacher.at(valid), hidden_states.flatten(0, 1)[valid]
    compute_head = head.to(compute_dtype(hidden_states))

    def cross_entropy_to_draws(student_logits: Tensor, rows: slice) -> Tensor:
        drawn = picked.chunk(rows)
        assert isinstance(drawn, DrawnClasses), "a cache holds drawn classes"
        log_q = log_softmax_(student_logits.div_(temperature)).gather(-1, drawn.class_ids)
        weights = drawn.counts / drawn.counts.sum(dim=-1, keepdim=True)
        return -(weights * log_q).sum(dim=-1, keepdim=True)

    if is_live:
        targets = batch["targets"].flatten()[valid]
        values = position_statistics(("kl",), hidden, compute_head, targets, picked.logits)["kl"]
    else:
        values = chunked_statistics(hidden, compute_head, cross_entropy_to_draws).squeeze(-1)
    require_finite(values, valid, batch, "the student's or the teacher's logits, in an evaluation")
    return {"total_nats": values.double().sum(), "positions": valid.new_tensor(len(valid), dtype=torch.float64)}


@dataclass
class HeldOutSums:
    """The sums of one evaluation, so far of this process."""

    parts: list[Tensor] = field(default_factory=list)

    def add(self, sums: dict[str, Tensor]) -> float:
        """Add a batch's; its own mean, 0 where it has no valid position."""
        self.parts.append(torch.stack([sums["total_nats"], sums["positions"]]))
        return float(sums["total_nats"] / sums["positions"].clamp(min=1))

    def total(self, device: torch.device) -> Tensor:
        """Float64 [2]: nats and positions."""
        return torch.stack(self.parts).sum(dim=0) if self.parts else torch.zeros(2, dtype=torch.float64, device=device)


class EvaluatingTrainer(Trainer):
    """The part of ``DistillTrainer`` that measures.

    ``evaluate`` measures how far the student is from its teacher on all valid positions of held-out samples, whatever
    the training selects, and calls it ``eval_loss``: mean KL to a live teacher (also ``eval_kl_nats``), or of a cache
    the mean cross-entropy to its draws (``eval_cross_entropy_to_draws_nats``), which is KL plus the teacher's own
    entropy. ``compute_metrics`` and ``predict`` get the student's logits as from the Trainer, where ``label_ids`` are
    the tokens to be learned, each at its own context, and -100 elsewhere.
    """

    args: DistillArguments
    eval_dataset: Any  # a FilledDataset, or several by name, once they are settled
    teacher: Teacher
    distillation_loss: Objective  # `objective` is a search's figure, which the Trainer writes
    _given_teacher: PreTrainedModel | TeacherCache
    _tokenizer: PreTrainedTokenizerBase
    _checked_packing: set[bool]  # what this student was found to compute as it should: samples packed, or not
    _keeps_apart = False  # whether the teacher was found to keep packed documents apart
    _held_out: HeldOutSums | None = None  # of the evaluation that runs
    _measures_packed = False  # whether its samples are packed

    def _require_usable(self, samples: SampleDataset, name: str) -> None:
        """Refuse samples, called ``name``, that a model can't take or that a cache lacks."""
        require_window(samples, name, [self.model, self._given_teacher], self.args)
        require_stored(self.teacher, samples)
        if samples.is_packed and isinstance(self.teacher, LiveTeacher) and not self._keeps_apart:
            check_packing(self.teacher.model)
            self._keeps_apart = True

    def _check_student(self, model: nn.Module, is_packed: bool) -> None:
        """Once for each student, when it is where it trains, as it trains; again where packed samples first come."""
        if is_packed not in self._checked_packing:
            check_student(model, self.accelerator.unwrap_model(self.model), self.args.compute_dtype, is_packed)
            self._checked_packing |= {is_packed, False}

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the Trainer's; ``eval_dataset`` may be rows, too."""
        if isinstance(eval_dataset, str):
            sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if eval_dataset not in sets:
                raise InputError(f"eval_dataset: no set is called {eval_dataset!r}; there are {sorted(sets)}.")
            sets[eval_dataset] = self._as_given(sets[eval_dataset], f"eval_dataset[{eval_dataset!r}]")
        elif eval_dataset is None and self.eval_dataset is not None and not isinstance(self.eval_dataset, dict):
            self.eval_dataset = self._as_given(self.eval_dataset, "eval_dataset")
        is_own = isinstance(eval_dataset, FilledDataset) and eval_dataset is self.eval_dataset
        if eval_dataset is None or isinstance(eval_dataset, str) or is_own:
            return super().get_eval_dataloader(eval_dataset)
        # Without a key: persistent workers are kept for the trainer's own sets, and would go on with other rows.
        return self._get_dataloader(
            self._as_given(eval_dataset, "eval_dataset"),
            "Evaluation",
            self.args.eval_batch_size,
            self._get_eval_sampler,
        )

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As the Trainer's; ``test_dataset`` may be rows, too."""
        return super().get_test_dataloader(self._as_given(test_dataset, "test_dataset"))

    def _as_given(self, dataset: Any, name: str) -> FilledDataset:
        """Samples that come with the call of an evaluation, checked as those that came with the trainer."""
        if isinstance(dataset, FilledDataset):
            return dataset
        found = as_evaluated(dataset, name, self._tokenizer, self.args)
        self._require_usable(found.samples, name)
        return found

    def _get_eval_sampler(self, eval_dataset: Any) -> FilledSampler:
        """In the data set's order."""
        return FilledSampler(len(eval_dataset), self.args.eval_batch_size * self.args.world_size)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the Trainer's, whose mean of batches' losses gives way to the mean over all valid positions."""
        if self.is_fsdp_enabled and not self.accelerator._models:
            raise InputError("evaluate: Accelerate shards a student when its training begins; evaluate then, or after.")
        self._held_out, self._measures_packed = HeldOutSums(), _samples_of(dataloader).is_packed
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        total_nats, positions = self._over_processes(self._held_out.total(self.args.device)).tolist()
        mean = total_nats / positions
        name = KL if self.teacher.is_live else DRAWS
        output.metrics[f"{metric_key_prefix}_loss"] = mean
        for key, value in ((name, mean), ("positions", int(positions))):
            output.metrics.setdefault(f"{metric_key_prefix}_{key}", value)  # a user's metric of this name stays
        self._held_out = None
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """One batch of an evaluation: its own mean and, where they are asked for, the student's logits and labels."""
        del ignore_keys  # of outputs that are not made here
        self._check_student(model, self._measures_packed)
        inputs, step = self._prepare_inputs(inputs), self.state.global_step
        live = self.teacher if isinstance(self.teacher, LiveTeacher) else None
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        measure = partial(
            divergence_sums,
            batch=inputs,
            teacher=self.teacher.targets(inputs, step) if live is None else live.targets(inputs, step, draws=False),
            is_live=self.teacher.is_live,
            temperature=self.distillation_loss.criterion.temperature,
        )
        with torch.no_grad(), self.compute_loss_context_manager():
            held_out = HeldOutSums() if self._held_out is None else self._held_out
            mean = held_out.add(model(input_ids=ids, position_ids=positions, distillation=measure))
            loss = torch.tensor(mean, device=ids.device)
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
        """As ``Trainer.hyperparameter_search``, by ``eval_loss`` where no metrics are computed."""
        return super().hyperparameter_search(hp_space, compute_objective or _objective_of, *args, **kwargs)


def _samples_of(dataloader: DataLoader) -> SampleDataset:
    dataset = dataloader.dataset
    assert isinstance(dataset, FilledDataset), "an evaluation's data sets are settled before it"
    return dataset.samples


def _objective_of(metrics: dict[str, float]) -> float:
    """The Trainer's objective of a search, which adds up all metrics, without what comes beside each ``eval_loss``."""
    sets = [name.removesuffix("_loss") for name in metrics if name.endswith("_loss")]
    beside = {f"{each}_{name}" for each in sets for name in (KL, DRAWS, "positions", "model_preparation_time")}
    return default_compute_objective({name: value for name, value in metrics.items() if name not in beside})
