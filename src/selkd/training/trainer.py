"""``DistillTrainer``: a ``transformers.Trainer`` whose loss is selective distillation.

Everything else is the Trainer's: arguments, logging, checkpoints, resuming, schedules, mixed precision, DDP, FSDP.
"""

import base64
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from selkd.cache.reader import TeacherCache
from selkd.data.batching import collate
from selkd.data.samples import Sample
from selkd.errors import InputError
from selkd.models.head import check_head, check_packing
from selkd.models.loading import require_device
from selkd.models.tokenizers import shared_classes
from selkd.recipe_choices import FractionSchedule
from selkd.selection.positions import Place, place_of
from selkd.selection.queue import ScoreQueue
from selkd.selection.two_stage import by_frequency
from selkd.teacher import Batch, CachedCollator, CachedTeacher
from selkd.training.answers import Answers
from selkd.training.arguments import DistillArguments, require_one_device
from selkd.training.callbacks import RolloutLog
from selkd.training.inputs import as_samples, as_teacher, require_window, sizes
from selkd.training.objective import Budget
from selkd.training.rollout import PromptCollator
from selkd.training.sampling import FilledDataset, FilledSampler
from selkd.training.student import bind_distillation


class Totals(TrainerCallback, ExportableState):
    """Sums over the optimiser steps so far, all ranks together. Part of every checkpoint."""

    def __init__(self) -> None:
        self.positions_valid = 0
        self.positions_selected = 0
        self.teacher_tokens = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": dict(vars(self))}


class Queue(TrainerCallback, ExportableState):
    """The queue of global-level selection. Part of every checkpoint, as little-endian float64 in base64."""

    def __init__(self, capacity: int) -> None:
        self.scores = ScoreQueue(capacity)

    def state(self) -> dict[str, Any]:
        return {"args": {"capacity": self.scores.capacity}, "attributes": {"encoded": self.encoded}}

    @property
    def encoded(self) -> str:
        return base64.b64encode(self.scores.scores.astype("<f8").tobytes()).decode()

    @encoded.setter
    def encoded(self, text: str) -> None:
        self.scores.scores = np.frombuffer(base64.b64decode(text), dtype="<f8").astype(np.float64)


class DistillTrainer(Trainer):
    """Distils ``teacher`` into ``model``.

    Args:
        model: the student, float32 weights (with ``bf16=True`` products run in bfloat16 under autocast).
        teacher: a model, or a ``TeacherCache`` that holds every training sample.
        args: a ``DistillArguments``.
        train_dataset, eval_dataset: a ``datasets.Dataset`` or a list of rows, whose fields the arguments name (texts,
            prompts with or without completions, conversations), or a ``SampleDataset``.
        processing_class: the tokenizer, shared by both models.
        **kwargs: what else ``transformers.Trainer`` takes.

    Raises:
        InputError: a head that can't be read, no class in common, samples that the cache lacks, DataParallel.
    """

    args: DistillArguments

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | TeacherCache,
        args: DistillArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        require_one_device(args)
        if args.teacher_device is not None:
            require_device("teacher_device", torch.device(args.teacher_device))
        if processing_class is None:
            raise InputError("processing_class: expected the tokenizer that both models share, got None.")
        if args.device.type == "mps":
            raise InputError("the MPS device has no float64, which the class draws need. Set use_cpu=True.")
        if teacher is model:
            raise InputError("teacher: the student itself can't be its own teacher; give another model.")
        low = {
            str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)
        }
        if low:
            raise InputError(
                f"model: trainable weights are {', '.join(sorted(low))}, in which small updates round to nothing. Load "
                "the student in float32; with bf16=True products still run in bfloat16."
            )
        check_head(model)
        if args.packing:
            for packed in (model, teacher):
                if not isinstance(packed, TeacherCache):
                    check_packing(packed)
        train_samples = as_samples(train_dataset, "train_dataset", processing_class, args)
        eval_samples = as_samples(eval_dataset, "eval_dataset", processing_class, args)
        skipped = args.objective.positions.skip_first or 0
        if train_samples is not None and skipped >= args.max_length - 1:
            raise InputError(
                f"positions.skip_first: {skipped} leaves no position of samples of max_length = {args.max_length} "
                "tokens. Lower it."
            )
        for samples, name in ((train_samples, "train_dataset"), (eval_samples, "eval_dataset")):
            if samples is not None:
                require_window(samples, name, [model, teacher], args)
        n_classes = shared_classes(sizes(model, teacher), processing_class)
        self.teacher = as_teacher(teacher, args, n_classes, [train_samples, eval_samples])
        self.objective = args.objective
        if self.objective.positions.scoring == "two_stage":
            text = train_samples or eval_samples
            if text is None:
                raise InputError("positions.scoring: two_stage counts the classes of train_dataset, and there is none.")
            ordered = by_frequency(text.token_counts(n_classes))
            self.objective = replace(self.objective, classes_by_frequency=ordered)
        self._place = Place(0, None, 0.0, None)
        self._window: dict[str, Tensor] = {}  # sums since the last logged step
        self._window_valid = 0
        self._micro_batches = 0  # of this step, still to come
        self._selected: list[Tensor] = []  # of this step, a count a micro-batch
        self._scores: list[np.ndarray] = []  # of this step, the valid scores of each micro-batch
        bind_distillation(model, n_classes)
        pad_token_id = 0 if processing_class.pad_token_id is None else processing_class.pad_token_id  # never told by id
        use_cache = getattr(model.config, "use_cache", None)  # None: nested, in the text's configuration
        data_collator: Callable[[list[Sample]], Batch] = partial(collate, pad_token_id=pad_token_id)
        self.answers = None if args.on_policy is None else Answers(args, model, processing_class, n_classes)
        if self.answers is not None:
            self.answers.require_prompts(train_samples, self.teacher)
            self.answers.require_positions(train_samples, [model, teacher])
            if eval_samples is not None and not eval_samples.n_valid.any():
                raise InputError(
                    "eval_dataset: prompts alone. The evaluation is on completions of the data; give some, or None."
                )
            data_collator = PromptCollator(pad_token_id)
        if isinstance(self.teacher, CachedTeacher):  # read by the data loader's workers, ahead of training
            data_collator = CachedCollator(data_collator, self.teacher)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=None if train_samples is None else FilledDataset(train_samples),
            eval_dataset=None if eval_samples is None else FilledDataset(eval_samples),
            processing_class=processing_class,
            **kwargs,
        )
        if use_cache is None:  # the Trainer switches it off, and would save the student so
            del model.config.use_cache
        else:
            model.config.use_cache = use_cache
        self.loss_is_scaled_for_ga = True  # `compute_loss` divides by the whole step's count
        self.add_callback(Totals())
        if self.answers is not None:
            self.add_callback(RolloutLog())
        queue_size = self.objective.positions.queue_size
        if queue_size is not None:
            self.add_callback(Queue(queue_size))

    @property
    def totals(self) -> Totals:
        """Sums so far; looked up each time, as resuming replaces the callback by the checkpoint's."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, Totals))

    @property
    def queue(self) -> ScoreQueue | None:
        """The recent scores of global-level selection; None for other policies."""
        found = (callback.scores for callback in self.callback_handler.callbacks if isinstance(callback, Queue))
        return next(found, None)

    @property
    def rollouts(self) -> RolloutLog:
        """The student's answers so far, in sums; looked up each time, as ``totals``."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, RolloutLog))

    def _find_place(self) -> Place:
        """Where the run is: the same for all micro-batches and ranks of the optimiser step that begins."""
        return place_of(self.objective.positions, self.state.global_step, self.state.max_steps, self.queue)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the step's loss; DDP and FSDP average over ranks, so times their number."""
        assert num_items_in_batch is not None, "the step's count is known before the forward pass"
        distillation = partial(
            self.objective,
            batch=inputs,
            teacher=self.teacher.targets(inputs, self._place.step),
            place=self._place,
            normaliser=num_items_in_batch,
        )
        outputs = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], distillation=distillation)
        loss, scores = outputs.pop("loss"), outputs.pop("scores")
        if model.training:
            self._selected.append(outputs["positions_selected"])
            if self.queue is not None:
                self._scores.append(scores[inputs["valid_mask"]].double().cpu().numpy())
            for name, value in outputs.items():
                self._window[name] = self._window.get(name, 0) + value.detach()
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; after the last one of a step, what the step as a whole leaves behind."""
        loss = super().training_step(*args, **kwargs)
        self._micro_batches -= 1
        if self._micro_batches == 0:
            self._end_step()
        return loss

    def _end_step(self) -> None:
        """Count what was selected and push the step's scores, in the order of its samples over all ranks."""
        selected = torch.stack(self._selected).sum()
        several = self.accelerator.num_processes > 1
        self.totals.positions_selected += int(self.accelerator.reduce(selected, "sum") if several else selected)
        if self.queue is not None:
            # Rank r's micro-batch m holds batch m * ranks + r of the step, so this is the order of one process.
            of_ranks = gather_object([self._scores]) if several else [self._scores]
            for scores in (scores for micro_batch in zip(*of_ranks, strict=True) for scores in micro_batch):
                self.queue.push(scores)
        self._selected, self._scores = [], []

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Batch], int]:
        """The micro-batches of one optimiser step, and what its loss is divided by."""
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        self._place = self._find_place()
        self._micro_batches = len(batches)
        if self.answers is not None:
            batches, sums = self.answers(self.model, batches, self._place.step)
            self.rollouts.add(sums)
        budget, tokens = self._step_budget(batches, device)
        self.totals.positions_valid += budget.valid
        if self.teacher.is_live:
            self.totals.teacher_tokens += tokens
        self._window_valid += budget.valid
        return batches, self.objective.normaliser(budget)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> int:
        """In evaluation a batch is a step of its own."""
        self._place = self._find_place()
        return self.objective.normaliser(self._step_budget(batch_samples, device)[0])

    def _step_budget(self, batches: list[Batch], device: torch.device) -> tuple[Budget, int]:
        """The budget of some micro-batches over all ranks, and their tokens."""
        budgets = [self.objective.budget(batch, self._place) for batch in batches]
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        counts = torch.tensor([*map(sum, zip(*budgets, strict=True)), tokens], device=device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, "sum")
        *budget, tokens = counts.tolist()
        return Budget(*budget), tokens

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        multiple = self.args.train_batch_size * self.args.world_size
        return FilledSampler(len(dataset), multiple, self.args.seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        """In the data set's order."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was selected since the last logged step: means in nats, the selected share."""
        if "loss" in logs and self._window:
            logs.update(self._selection_logs())
            if self.answers is not None:
                logs.update(self.answers.logs())
                if self.is_world_process_zero():
                    self.rollouts.write(self.answers.shown(self.state.global_step))
        super().log(logs, start_time)

    def _selection_logs(self) -> dict[str, float]:
        names = sorted(self._window)
        sums = torch.stack([self._window[name].float() for name in names])
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, "sum")
        total = dict(zip(names, sums.tolist(), strict=True))
        n_valid, self._window, self._window_valid = self._window_valid, {}, 0
        selected, valid = max(1, total["positions_selected"]), max(1, n_valid)
        logs = {"kd_nats": total["divergence_nats"] / selected, "selected_share": total["positions_selected"] / valid}
        if "cross_entropy_nats" in total:
            logs["ce_nats"] = total["cross_entropy_nats"] / selected
        for name in ("entropy_nats", "score"):
            if f"selected_{name}" in total:
                logs[f"selected_{name}"] = total[f"selected_{name}"] / selected
            if f"valid_{name}" in total:
                logs[f"mean_{name}"] = total[f"valid_{name}"] / valid
        if total.get("compared_positions"):
            logs["selection_agreement"] = total["agreeing_positions"] / total["compared_positions"]
        if isinstance(self.objective.positions.fraction, FractionSchedule):
            logs["fraction"] = self._place.fraction
        if self._place.threshold is not None:
            logs["threshold"] = self._place.threshold
        return logs
