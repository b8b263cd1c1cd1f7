"""``DistillTrainer``: a ``transformers.Trainer`` whose loss is selective distillation.

Everything else is the Trainer's: arguments, logging, checkpoints, resuming, schedules, mixed precision, DDP, FSDP.
Recipes and Python train through this class, so it holds the rules of a training for both: what is refused, in which
precision products run, in which order samples come, and what a checkpoint must agree with.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from selkd import interrupts
from selkd.data.collate import collate
from selkd.data.samples import Sample
from selkd.errors import InputError
from selkd.maths.finite import require_all_finite
from selkd.maths.head import NarrowHead
from selkd.models.adapters import has_adapters
from selkd.models.documents import documents_known
from selkd.models.generation import stop_ids
from selkd.models.loading import window_of
from selkd.models.tokenizers import shared_classes
from selkd.recipe.choices import OnPolicyOptions
from selkd.selection.host import KeepingCollator, on_host, to_device, valid_index
from selkd.selection.positions import StepContext, step_context
from selkd.selection.queue import ScoreQueue
from selkd.selection.two_stage import by_frequency
from selkd.teacher.cached import CachedCollator, CachedTeacher
from selkd.teacher.targets import Batch, UnaskedTargets
from selkd.training.arguments import DistillArguments, require_accelerate_state
from selkd.training.callbacks import CheckpointAfterStep
from selkd.training.checkpoints import Queue, Totals
from selkd.training.inputs import (
    as_evaluated,
    as_teacher,
    as_trained,
    require_parameters,
    require_trainable,
    vocab_sizes,
    without_autocast,
)
from selkd.training.model_card import add_section, distillation_section
from selkd.training.named import student_of, teacher_of, tokenizer_of
from selkd.training.objective import PLACED
from selkd.training.on_policy import Answering, PromptCollator, RolloutLog, require_answers_fit, require_prompts
from selkd.training.resuming import ResumingTrainer
from selkd.training.sampling import FilledDataset, FilledSampler
from selkd.training.selection_log import SelectionLog
from selkd.training.step_numbers import StepNumbers
from selkd.training.student import bind_distillation
from selkd.training.unlogged import Unlogged
from selkd_cache.reader import TeacherCache

C = TypeVar("C", bound=TrainerCallback)


class DistillTrainer(ResumingTrainer):
    """Distils ``teacher`` into ``model``. ``EvaluatingTrainer`` documents ``evaluate`` and ``predict``.

    Args:
        model: the student on one device, with float32 weights; with ``bf16=True`` its products run in bfloat16. A name
            (``demo``, a local folder, a hub id) is loaded so.
        teacher: a model on one or several devices of any kind, or a ``TeacherCache`` that holds every sample; or the
            name of either.
        args: the arguments; None: the defaults, with ``tmp_trainer`` as output directory.
        train_dataset: a ``datasets.Dataset`` or a list of rows, whose fields the arguments name (texts, prompts with
            or without completions, conversations), or a ``SampleDataset``. With ``max_steps``, a stream of rows too
            (``datasets.IterableDataset``), which is read until there are samples for these steps.
        eval_dataset: a data set of the same kind, or a mapping of names to several.
        processing_class: the tokenizer, shared by both models; None: that of a student given by its name.
        **kwargs: other parameters of ``transformers.Trainer``. ``model_init``, in place of ``model``, makes a new
            student when a training begins. ``data_collator`` and ``compute_loss_func`` are refused, as selkd has its
            own collator and loss.

    Raises:
        InputError: something that can't be honoured, which the message names: an argument, a launcher's setting, a
            student in low precision or on several devices, a head that can't be read, models without a common
            vocabulary, samples that the cache lacks.
    """

    data_collator: Callable[[list[Sample]], Batch]
    _loader: Any = None  # the newest data loader with workers

    def __init__(
        self,
        model: PreTrainedModel | str | None = None,
        teacher: PreTrainedModel | TeacherCache | str | None = None,
        args: DistillArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        args = DistillArguments(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, DistillArguments):
            raise InputError(f"args: expected a DistillArguments, got a {type(args).__name__}.")
        if (model is None) == (kwargs.get("model_init") is None):
            raise InputError("model: give the student, or model_init, which makes it: exactly one of them.")
        processing_class = tokenizer_of(processing_class, model)
        require_parameters(args, teacher, processing_class, kwargs)
        model, teacher = student_of(model), teacher_of(teacher, args)
        assert teacher is not None, "require_parameters refuses None"
        assert processing_class is not None, "require_parameters refuses None"
        self._teacher_input, self._tokenizer = teacher, processing_class
        args.check()  # the caller may have changed them after they were made
        if model is not None:
            self._adopt(model)
        train_samples = as_trained(train_dataset, processing_class, args)
        evaluated = as_evaluated(eval_dataset, "eval_dataset", processing_class, args)
        # The names are those that errors give to the data sets.
        self._samples = {} if train_samples is None else {"train_dataset": train_samples}
        if isinstance(evaluated, dict):
            self._samples |= {f"eval_dataset[{name!r}]": filled.samples for name, filled in evaluated.items()}
        elif evaluated is not None:
            self._samples["eval_dataset"] = evaluated.samples
        # Any token can pad: masks, not token ids, tell padding from text.
        self._pad_token_id = 0 if processing_class.pad_token_id is None else int(processing_class.pad_token_id)
        collator: Callable[[list[Sample]], Batch] = partial(collate, pad_token_id=self._pad_token_id)
        if args.on_policy is not None:
            collator = PromptCollator(self._pad_token_id)
        super().__init__(
            model=model,
            args=args,
            train_dataset=None if train_samples is None else FilledDataset(train_samples),
            eval_dataset=evaluated,
            processing_class=processing_class,
            **kwargs | {"data_collator": KeepingCollator(collator)},
        )
        require_accelerate_state(self.accelerator.state, args, self.is_fsdp_enabled, has_adapters(self.model))
        checkpoints_at_once = self.pop_callback(JITCheckpointCallback)
        if checkpoints_at_once is not None:
            self.add_callback(CheckpointAfterStep(checkpoints_at_once))
        if self._use_cache is None:  # the Trainer switches it off, and would save the student that way
            del self.model.config.use_cache
        else:
            self.model.config.use_cache = self._use_cache
        self.loss_is_scaled_for_ga = True  # `compute_loss` divides by the normaliser of the whole step
        self._set_up()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, which ``push_to_hub`` calls, with the teacher, the method, the data and the figures."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            samples = self._samples.get("train_dataset")
            count = None if samples is None else len(samples)
            section = distillation_section(self.args, self._teacher_input, count, self.state.log_history)
            add_section(Path(self.args.output_dir) / "README.md", section)

    def _adopt(self, model: PreTrainedModel) -> None:
        """Make ``model`` the student: give its forward the distillation. Raises InputError if it can't be trained."""
        require_trainable(model, self._teacher_input)
        without_autocast(model)
        self._vocab_size = shared_classes(vocab_sizes(model, self._teacher_input), self._tokenizer)
        self._use_cache = getattr(model.config, "use_cache", None)  # None: it stands in a nested configuration
        bind_distillation(model, self._vocab_size)
        self._checked_packing = set()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        self._adopt(model)
        return model

    def _set_up(self) -> None:
        """Make loss, teacher and answers as the arguments say, and again when a trial of a search has changed them."""
        args = self.args
        self.teacher = as_teacher(self._teacher_input, args, self._vocab_size)
        self._is_teacher_checked = False
        for name, samples in self._samples.items():
            self._require_usable(samples, name)
        self.distillation_loss = args.objective
        if self.distillation_loss.positions.scoring == "two_stage":
            if not self._samples:
                raise InputError("positions.scoring: two_stage counts the classes of train_dataset, and there is none.")
            text = next(iter(self._samples.values()))
            self.distillation_loss = replace(
                self.distillation_loss, classes_by_frequency=by_frequency(text.token_counts(self._vocab_size))
            )
        if args.gradient_accumulation_steps > 1 and not self.is_fsdp_enabled:  # FSDP gathers the head for each
            self.distillation_loss = replace(self.distillation_loss, narrow=NarrowHead())
        self.answering = None if args.on_policy is None else self._make_answering(args.on_policy)
        if isinstance(self.teacher, CachedTeacher) and not isinstance(self.data_collator, CachedCollator):
            self.data_collator = CachedCollator(self.data_collator, self.teacher)  # the loader's workers read the cache
        self._begin()

    def _make_answering(self, options: OnPolicyOptions) -> Answering:
        """What answers prompts in this training. Raises InputError unless the student can answer them."""
        if not self.teacher.is_live:
            raise InputError(
                "on_policy: a TeacherCache holds the classes of the data's own tokens, and what the student will "
                "answer is not known before. Give a live teacher."
            )
        train_samples = self._samples.get("train_dataset")
        if train_samples is not None:
            windows = [(type(model).__name__, window_of(model)) for model in (self.model, self._teacher_input)]
            require_prompts(train_samples, options)
            require_answers_fit(train_samples, options, windows)
        stop = stop_ids(self.model, self._tokenizer)
        return Answering(options, self.args.seed, stop, self._pad_token_id, self._vocab_size, self.args.compute_dtype)

    def _begin(self) -> None:
        """Reset all counts before a training, and before another attempt of ``auto_find_batch_size``."""
        self._epoch = 0
        self._context = StepContext(0, None, 0.0, None)
        self._log = SelectionLog()
        self._micro_batches = 0  # how many of this step are still to come
        self._step = StepNumbers()
        self._saved_at = time.monotonic()
        self.is_interrupted = False  # whether a process was asked to end, and all do after this step
        kept: list[TrainerCallback] = [Totals(), Unlogged()]
        if self.answering is not None:
            kept.append(RolloutLog())
        if self.distillation_loss.positions.queue_size is not None:
            kept.append(Queue(self.distillation_loss.positions.queue_size))
        if self.train_dataset is not None:
            kept.append(self._schedule())
        for callback in kept:
            self._renew(callback)

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's; ``train_dataset`` may have been set to other rows since the trainer was made."""
        self._fill_train_dataset()
        loader = super().get_train_dataloader()
        if loader.num_workers:
            inner = getattr(loader, "base_dataloader", loader)  # Accelerate's stands around the one that forks
            inner.worker_init_fn = partial(_ignoring_signals, inner.worker_init_fn)
            self._loader = inner
        return loader

    def _fill_train_dataset(self) -> None:
        """Make samples of a ``train_dataset`` that was set to rows."""
        if self.train_dataset is None or isinstance(self.train_dataset, FilledDataset):
            return
        samples = as_trained(self.train_dataset, self._tokenizer, self.args)
        assert samples is not None, "train_dataset is not None"
        self._samples["train_dataset"], self.train_dataset = samples, FilledDataset(samples)
        self._set_up()

    def set_initial_training_values(self, args: DistillArguments, dataloader: DataLoader) -> Any:
        if self.model_init is None:
            self._begin()
        else:
            self._set_up()  # a new student may have another window, or other classes
        return super().set_initial_training_values(args, dataloader)

    def _run_epoch(self, model: nn.Module, epoch: int, **kwargs: Any) -> None:
        self._epoch = epoch  # for the sampler, as the Trainer's state is only updated after a step
        if self.state.global_step >= self.state.max_steps:  # the Trainer would make a step more before it looks
            self.control.should_training_stop = True
            return
        if kwargs["resume_from_checkpoint"] is not None and epoch == kwargs["epochs_trained"]:
            unlogged = self._kept(Unlogged)
            if unlogged.losses:  # a checkpoint of an earlier version has none
                unlogged.restore(self._tr_loss, self._log)
                self._globalstep_last_logged = unlogged.last_logged
        super()._run_epoch(model=model, epoch=epoch, **kwargs)

    def _load_callback_state(self) -> None:
        """As the Trainer's, with the callbacks in their order: the Trainer puts those of the checkpoint last."""
        order = [type(callback) for callback in self.callback_handler.callbacks]
        super()._load_callback_state()
        self.callback_handler.callbacks.sort(key=lambda callback: order.index(type(callback)))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._kept(Unlogged).keep(self._tr_loss, self._log, self._globalstep_last_logged)
        super()._save_checkpoint(model, trial)
        self._saved_at = time.monotonic()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``. ``True`` resumes from the newest checkpoint that is as it was written.

        Raises:
            InputError: there is none, or the one asked for is damaged; it has no optimiser (``save_only_model``); or
                its training's steps saw other samples or another loss.
        """
        if self.model is not None and not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise InputError("model: none of its weights is trained; set requires_grad on those that are to learn.")
        self._fill_train_dataset()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._end_workers()

    def _end_workers(self) -> None:
        """End persistent workers: they ignore signals, so a process that leaves would wait for them for ever."""
        iterator = None if self._loader is None else getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None

    def _hp_search_setup(self, trial: Any) -> None:
        if trial is None:
            super()._hp_search_setup(trial)
            return
        row_options, parts = self.args.data, self.args.plain_parts()
        for name, part in parts.items():
            setattr(self.args, name, part)  # the Trainer converts a trial's value to the type of the current one
        super()._hp_search_setup(trial)
        is_data_changed, self.args.data = self.args.data != parts["data"], row_options
        if is_data_changed:
            raise InputError("hp_space: how rows become samples is no part of a search; they were made before it.")
        self.args.check()
        self.args.require_packages()
        # A trial has an accelerator of its own.
        require_accelerate_state(self.accelerator.state, self.args, self.is_fsdp_enabled, has_adapters(self.model))
        self._set_up()

    @property
    def totals(self) -> Totals:
        """Counts over the steps so far."""
        return self._kept(Totals)

    @property
    def queue(self) -> ScoreQueue | None:
        """The recent scores of global-level selection; None for other policies."""
        return None if self.distillation_loss.positions.queue_size is None else self._kept(Queue).scores

    @property
    def rollouts(self) -> RolloutLog:
        """Counts over the student's answers so far."""
        return self._kept(RolloutLog)

    def _kept(self, kind: type[C]) -> C:
        """The callback of that class. It is looked up each time, as resuming replaces it by the checkpoint's."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, kind))

    def _step_context(self) -> StepContext:
        """Where in the run the next optimiser step is; the same for all its micro-batches and ranks."""
        return step_context(self.distillation_loss.positions, self.state.global_step, self.state.max_steps, self.queue)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's part in the step's loss, times the number of ranks, over which DDP and FSDP average.

        Args:
            num_items_in_batch: the normaliser of the whole step; None: the batch is a step of its own.

        A call that is no part of a training's step, as of a callback between two of them, is counted nowhere.

        Raises:
            RunError: a logit is not finite. Within a training's step this is found out before its update.
        """
        is_part = self._micro_batches > 0
        context = self._context if is_part else self._step_context()
        loss_of = self.distillation_loss if is_part else replace(self.distillation_loss, narrow=None)
        if num_items_in_batch is None:
            num_items_in_batch = self._normaliser([inputs], self.args.device, context)
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        with documents_known(on_host(inputs)["position_ids"]):
            distillation = partial(
                loss_of,
                batch=inputs,
                teacher=self.teacher.targets(inputs, context.step) if self._asks_teacher else UnaskedTargets(),
                context=context,
                normaliser=num_items_in_batch,
            )
            outputs = model(input_ids=ids, position_ids=positions, distillation=distillation)
        loss, checks = outputs.pop("loss"), outputs.pop("checks")
        scores, *_ = (outputs.pop(name) for name in PLACED)
        if is_part:
            kept = None if self.queue is None else scores.flatten()[valid_index(inputs)]
            self._step.add(outputs, checks, kept)
            if self.is_deepspeed_enabled and self._micro_batches == 1:  # its backward pass makes the update, too
                self._end_step()
        else:
            require_all_finite(checks)
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    @property
    def _asks_teacher(self) -> bool:
        return self.distillation_loss.needs_teacher

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one micro-batch; after a step's last one, and before the update, read the step's numbers."""
        self._check_student(model, self.train_dataset.samples.is_packed)
        loss = super().training_step(model, *args, **kwargs)
        self._micro_batches -= 1
        if self._micro_batches == 0:
            if self.distillation_loss.narrow is not None:
                self.distillation_loss.narrow.forget()  # the update may not show in the weights' version
            if not self.is_deepspeed_enabled:
                self._end_step()
        return loss

    def _end_step(self) -> None:
        """Count what was selected and push the step's scores, in the order of its samples over all ranks.

        The same exchange tells whether any process was asked to end, so that all end after the same step, and whether
        the first one's clock says that it is time for a checkpoint.
        """
        self._step.counts["ends"] = self._is_asked_to_end()
        self._step.counts["saves"] = self.is_world_process_zero() and self._is_time_to_save()
        sums, scores_read = self._step.read(self.args.device, self._over_processes)
        self._step = StepNumbers()
        ends, saves = sums.pop("ends"), sums.pop("saves")
        self.totals.teacher_tokens += int(sums.pop("teacher_tokens"))
        self.totals.positions_valid += int(sums["positions_valid"])
        self.totals.positions_selected += int(sums["positions_selected"])
        self._log.add(sums)
        if ends or saves:
            self.control.should_save = True
        if ends:
            self.control.should_training_stop = True
            self.is_interrupted = True
        if self.queue is not None:
            own = [scores.numpy() for scores in scores_read]
            by_rank = gather_object([own]) if self.accelerator.num_processes > 1 else [own]
            # Micro-batch m of rank r is batch m * ranks + r of the step, so this is the order that one process has.
            for micro_batch in zip(*by_rank, strict=True):
                for scores in micro_batch:
                    self.queue.push(scores)

    def _is_asked_to_end(self) -> bool:
        """Whether this process was asked to end, be it by a run's signals or by ``enable_jit_checkpoint``'s."""
        callbacks = self.callback_handler.callbacks
        at_once = any(callback.is_asked for callback in callbacks if isinstance(callback, CheckpointAfterStep))
        return at_once or interrupts.asked() is not None

    def _is_time_to_save(self) -> bool:
        seconds = self.args.save_seconds
        return seconds is not None and time.monotonic() - self._saved_at >= seconds

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The micro-batches of one optimiser step, and the normaliser of its loss."""
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        self._context = self._step_context()
        self._micro_batches = len(batches)
        if self.answering is not None:
            batches, rollouts, seconds = self.answering(self.model, batches, self._context.step)
            self.rollouts.add(rollouts, seconds)
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        self._step.counts["teacher_tokens"] = tokens if self.teacher.is_live and self._asks_teacher else 0
        self._step.counts["positions_valid"] = sum(int(on_host(batch)["valid_mask"].sum()) for batch in batches)
        return batches, self._normaliser(batches, device, self._context)

    def _normaliser(self, batches: list[Batch], device: torch.device, context: StepContext) -> Tensor:
        """What divides the loss of a step of these micro-batches and those of the other ranks."""
        own = sum(self.distillation_loss.normaliser(batch, context) for batch in batches)
        return self._over_processes(to_device(torch.tensor(own, dtype=torch.float64), device))

    def _get_train_sampler(self, train_dataset: Any = None) -> FilledSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return FilledSampler(
            len(dataset),
            self._train_batch_size * self.args.world_size,
            seed if self.args.train_sampling_strategy == "random" else None,
            lambda: self._epoch,
            self.args.dataloader_drop_last,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log also the selection and the answers since the last logged step."""
        if "loss" in logs and self._log.sums:
            logs.update(self._log.take(self.distillation_loss.positions, self._context))
            if self.answering is not None:
                logs.update(self.rollouts.take())
                if self.is_world_process_zero():
                    self.rollouts.write(self._tokenizer, self.answering.options.log_rollouts, self.state.global_step)
        super().log(logs, start_time)


def _ignoring_signals(begin: Callable[[int], None] | None, worker: int) -> None:
    interrupts.ignore_in_worker()
    if begin is not None:
        begin(worker)
