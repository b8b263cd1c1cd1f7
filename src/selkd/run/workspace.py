"""What the stages of a run share: its models, samples, device and precision, each loaded when first needed."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import get_reporting_integration_callbacks

from selkd import plugins
from selkd.data.collate import collate
from selkd.data.samples import Sample, SampleDataset
from selkd.data.splits import Splits, load_splits
from selkd.errors import InputError
from selkd.files import new_folder
from selkd.foreign.client import require_key
from selkd.models.adapters import with_adapters
from selkd.models.head import check_head, check_packing
from selkd.models.loading import (
    load_model,
    n_layers,
    n_positions,
    n_rows,
    native_dtype,
    require_device,
    resolve_dtype,
)
from selkd.models.pair import ModelPair
from selkd.models.pruning import prune, require_fewer_layers
from selkd.models.quantisation import precision_of, require_quantization
from selkd.models.sources import ModelSource, default_cache_dir, locate
from selkd.models.tokenizers import load_tokenizer, require_same_tokenizer, shared_classes, tokenizer_fingerprint
from selkd.recipe.foreign import require_model_here
from selkd.recipe.pruning import CALIBRATION_SAMPLES
from selkd.recipe.recipe import Recipe
from selkd.training.arguments import DistillArguments
from selkd.training.on_policy import require_answers_fit

T = TypeVar("T")
STUDENT_FORMAT = 2


class Workspace:
    """The inputs of one recipe. Each is found, checked and loaded when it is first asked for.

    Args:
        recipe: the recipe.
        run_path: the run's folder.
        splits: replaces the recipe's data, as a probe does with a few samples.
        teacher_source: replaces the recipe's teacher, as an estimate does with a model without weights.
        student_source: replaces the recipe's student in the same way.

    Attributes:
        revisions: the hub's commits of ``teacher`` and ``student``, where a run began with one.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_path: Path,
        *,
        splits: Splits | None = None,
        teacher_source: ModelSource | None = None,
        student_source: ModelSource | None = None,
    ) -> None:
        self.recipe = recipe
        self.run_path = run_path
        self._splits, self._teacher_source, self._student_source = splits, teacher_source, student_source
        # MPS has no float64, which the class draws need: a Mac computes on its CPU.
        self._on_cpu = bool(recipe.training.get("use_cpu")) or torch.backends.mps.is_available()
        process_group: dict[str, Any] = {}
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Processes wait for the main one to tokenise, prune or convert, which may take longer than the default.
            process_group["timeout"] = timedelta(seconds=recipe.training.get("ddp_timeout", 24 * 3600))
            if "ddp_backend" in recipe.training:
                process_group["backend"] = recipe.training["ddp_backend"]
        self.state = PartialState(cpu=self._on_cpu, **process_group)
        self.cache_dir = default_cache_dir()
        self.revisions: dict[str, str] = {}

    def check(self) -> None:
        """Check that this machine and these processes can run the recipe; nothing is loaded or written.

        Raises:
            InputError: an optimiser or a logging package is not installed, the student can't be sharded, the teacher's
                device is not here, or it can't run the teacher quantised.
        """
        with _as_input_error():
            self.arguments.try_optimiser()
            for callback in get_reporting_integration_callbacks(self.arguments.report_to):
                callback()
        if self.arguments.is_sharded:
            if self.state.num_processes == 1:
                raise InputError("training.fsdp: shards over several processes, and this is one. Start with torchrun.")
            try:
                self.recipe.check_sharded()
            except ValueError as error:
                raise InputError(f"{error}.") from None
        if self.recipe.teacher.server is not None:
            require_key(self.recipe.teacher)
        require_device("teacher.device", self.teacher_device)
        if self.recipe.teacher.quantization is not None:
            require_quantization(self.recipe.teacher.quantization, self.teacher_device)

    @cached_property
    def arguments(self) -> DistillArguments:
        """The trainer's arguments; ``check`` checks whether they can train here.

        Unless the recipe says otherwise, products run in bfloat16 if the device computes in it, and beside an
        accelerator a process of the data loader reads the teacher cache ahead.
        """
        recipe = self.recipe
        options: dict[str, Any] = {
            "report_to": "none",
            "logging_steps": 10,
            "logging_first_step": True,
            "save_total_limit": 2,
            **recipe.training,
        }
        if recipe.run.save_minutes is not None and options.get("save_strategy") != "no":
            options["save_seconds"] = 60 * recipe.run.save_minutes
        if not options.pop("enable_jit_checkpoint", True):
            raise InputError(
                "training.enable_jit_checkpoint: false, but a run always saves and ends on a signal. Leave it out."
            )
        if self.device.type == "cpu":
            options["use_cpu"] = True  # without it Transformers refuses bfloat16 on a CPU
        elif recipe.cache is not None:  # on a CPU all cores are busy with the steps
            options.setdefault("dataloader_num_workers", 1)
        options.setdefault("bf16", native_dtype(self.device) == torch.bfloat16)
        with _as_input_error():
            arguments = DistillArguments(
                output_dir=str(self.run_path / "checkpoints"),
                seed=recipe.seed,
                criterion=recipe.criterion,
                positions=recipe.positions,
                classes=recipe.classes,
                on_policy=recipe.on_policy,
                data=recipe.data,
                teacher_device=recipe.teacher.device,
                rollouts_file=str(self.run_path / "rollouts.jsonl"),
                **options,
            )
        if recipe.training.get("bf16") is False and arguments.compute_dtype == torch.bfloat16:
            raise InputError(
                "training.bf16: false, but the run was launched with mixed precision bf16. Set both alike."
            )
        return arguments

    @property
    def device(self) -> torch.device:
        """The models' device: an accelerator, if there is one and training.use_cpu is not set."""
        return torch.device("cpu") if self._on_cpu else self.state.device

    @cached_property
    def own_parts(self) -> dict[str, str]:
        """The digest of the source of each part that is a user's own: its kind -> the digest."""
        recipe = self.recipe
        return plugins.digests(
            metric=recipe.positions.metric,
            policy=recipe.positions.policy,
            criterion=recipe.criterion.name,
            sampler=recipe.classes.sampler,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the student's products."""
        return self.arguments.compute_dtype

    @cached_property
    def teacher_source(self) -> ModelSource:
        """The teacher's files. Raises InputError where it is served, or its answers were imported."""
        require_model_here(self.recipe.teacher)
        return self._teacher_source or self._main_process_first(
            lambda: locate(self.recipe.teacher.model, self.cache_dir, self.revisions.get("teacher"))
        )

    @property
    def teacher_fingerprint(self) -> str:
        """What identifies the teacher: the digest of its files, or, where they are not here, its name."""
        teacher = self.recipe.teacher
        return f"known by its name: {teacher.model}" if teacher.is_foreign else self.teacher_source.fingerprint

    @property
    def teacher_name(self) -> str:
        return self.recipe.teacher.model if self.recipe.teacher.is_foreign else self.teacher_source.name

    @property
    def teacher_device(self) -> torch.device:
        device = self.recipe.teacher.device
        return self.device if device is None else torch.device(device)

    @property
    def teacher_dtype(self) -> torch.dtype:
        return resolve_dtype(self.recipe.teacher.dtype, self.teacher_device)

    @property
    def teacher_precision(self) -> str:
        if self.recipe.teacher.is_foreign:
            return "unknown"
        return precision_of(self.teacher_dtype, self.recipe.teacher.quantization)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that both models share."""
        if self.recipe.teacher.is_foreign:  # whether it has the same one is found out when it answers
            return load_tokenizer(self.student_source)
        tokenizer = load_tokenizer(self.teacher_source)
        if self.recipe.student.model is not None:
            require_same_tokenizer(tokenizer, load_tokenizer(self.student_source))
        return tokenizer

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        return tokenizer_fingerprint(self.tokenizer)

    @cached_property
    def splits(self) -> Splits:
        if self._splits is not None:
            return self._splits
        fingerprint = self.tokenizer_fingerprint  # before the block, as every process needs it
        return self._main_process_first(
            lambda: load_splits(self.recipe.data, self.tokenizer, fingerprint, self.cache_dir)
        )

    def require_positions(self) -> None:
        """Raises InputError if a sample, or a prompt with its answer, may exceed the positions of a model."""
        sources = [] if self.recipe.teacher.is_foreign else [self.teacher_source]
        sources += [self.student_source] if self.recipe.student.model is not None else []
        windows = [(source.name, n_positions(source)) for source in sources]
        length = self.recipe.data.max_length
        for name, window in windows:
            if window is not None and length > window:
                raise InputError(
                    f"data.max_length: {length} tokens, but {name} has positions for {window}. Lower data.max_length."
                )
        if self.recipe.on_policy is not None:
            require_answers_fit(self.splits.train, self.recipe.on_policy, windows)

    def require_layers(self) -> None:
        """Raises InputError if a student can't be cut from the teacher to the layers asked for; nothing is loaded."""
        options = self.recipe.student.prune_from_teacher
        if options is not None:
            require_fewer_layers(options.layers, n_layers(self.teacher_source))

    @cached_property
    def models(self) -> ModelPair:
        """The student, which is the initial one until it is trained, and its teacher; each is loaded when asked for."""
        return ModelPair(self._load_student, self._load_teacher, self.tokenizer, self.vocab_size, self.dtype)

    def _load_teacher(self) -> PreTrainedModel:
        quantization = self.recipe.teacher.quantization
        return self._checked(load_model(self.teacher_source, self.teacher_dtype, self.teacher_device, quantization))

    def _load_student(self) -> PreTrainedModel:
        model = self._checked(load_model(self.student_source, torch.float32, self.device))
        lora = self.recipe.student.lora
        return model if lora is None else with_adapters(model, lora, self.recipe.seed)

    def _checked(self, model: PreTrainedModel) -> PreTrainedModel:
        check_head(model)
        if self.recipe.data.packing:
            check_packing(model)
        return model

    @cached_property
    def student_source(self) -> ModelSource:
        """The initial student's files; a student cut from the teacher is made once and kept in the cache folder."""
        if self._student_source is not None:
            return self._student_source
        model = self.recipe.student.model
        if model is not None:
            return self._main_process_first(lambda: locate(model, self.cache_dir, self.revisions.get("student")))
        samples = self.splits.train  # before the block: all processes take part in reading the text
        return self._main_process_first(lambda: self._pruned(samples))

    @cached_property
    def vocab_size(self) -> int:
        """How many classes teacher and student share, read from their configurations: no weights are needed."""
        sizes = {} if self.recipe.teacher.is_foreign else {"teacher": n_rows(self.teacher_source)}
        if self.recipe.student.model is not None:  # a student cut from the teacher has the teacher's classes
            sizes["student"] = n_rows(self.student_source)
        return shared_classes(sizes, self.tokenizer)

    def _main_process_first(self, make: Callable[[], T]) -> T:
        """``make()`` on the main process first, so that the others find its result on disk."""
        with self.state.main_process_first():
            return make()

    @cached_property
    def pruning(self) -> dict[str, Any] | None:
        """Which layers a student that was cut from the teacher kept, and why, and the tokens that this took."""
        if self.recipe.student.prune_from_teacher is None:
            return None
        content: dict[str, Any] = json.loads((self.student_source.path / "pruning.json").read_text(encoding="utf-8"))
        return content

    def _pruned(self, train: SampleDataset) -> ModelSource:
        options = self.recipe.student.prune_from_teacher
        assert options is not None, "a student has exactly one source"
        samples = [train[i] for i in range(min(CALIBRATION_SAMPLES, len(train)))]
        if self.recipe.data.is_prompt_only:  # measure the influence on the prompts themselves
            samples = [Sample(sample.token_ids, sample.document_starts) for sample in samples]
        key = (STUDENT_FORMAT, self.teacher_source.fingerprint, self.teacher_precision, options.layers)
        digest = xxhash.xxh3_128_hexdigest(repr((key, [sample.id for sample in samples])).encode())
        folder = self.cache_dir / "students" / digest
        if not folder.exists():
            batches = [collate(samples[i : i + 4], int(self.tokenizer.pad_token_id)) for i in range(0, len(samples), 4)]
            student, kept, influence = prune(self.models.teacher, options.layers, batches)
            tokens = sum(batch["input_ids"].numel() for batch in batches)
            pruning = {"kept_layers": kept, "influence": influence, "teacher_tokens": tokens}
            with new_folder(folder) as new:
                student.save_pretrained(new)
                self.tokenizer.save_pretrained(new)
                (new / "pruning.json").write_text(json.dumps(pruning, indent=1) + "\n", encoding="utf-8")
        return locate(str(folder), self.cache_dir)


@contextmanager
def _as_input_error() -> Iterator[None]:
    """Turn the errors by which Transformers refuses a value of ``training`` into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, ImportError, TypeError, RuntimeError) as error:
        raise InputError(f"training: Transformers refuses it: {error}") from error
