"""What the stages of a run share: its models, loaded when first needed, its samples, device and precision."""

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
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.integrations import get_reporting_integration_callbacks

from selkd import plugins
from selkd.data.collate import collate
from selkd.data.samples import Sample, SampleDataset
from selkd.data.splits import Splits, load_splits
from selkd.errors import InputError
from selkd.files import new_folder
from selkd.models.adapters import with_adapters
from selkd.models.head import check_head, check_packing
from selkd.models.loading import (
    load_model,
    n_positions,
    n_rows,
    native_dtype,
    require_device,
    resolve_dtype,
)
from selkd.models.pair import ModelPair
from selkd.models.pruning import prune
from selkd.models.quantisation import precision_of, require_quantization
from selkd.models.sources import ModelSource, default_cache_dir, locate
from selkd.models.tokenizers import load_tokenizer, require_same_tokenizer, shared_classes, tokenizer_fingerprint
from selkd.recipe.recipe import Recipe
from selkd.training.arguments import DistillArguments
from selkd.training.on_policy import require_answers_fit

T = TypeVar("T")
CALIBRATION_SAMPLES = 16
STUDENT_FORMAT = 1


class Workspace:
    """The inputs of one recipe. Each is found, checked and loaded when it is first asked for.

    Args:
        recipe: what to do.
        run_path: the run's folder.
        splits, teacher_source, student_source: taken in place of what the recipe names: a few samples for a probe, or
            models' files without weights for an estimate.
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
        # Processes wait for the one that tokenises, prunes or converts, which may take longer than the default allows.
        timeout = timedelta(seconds=recipe.training.get("ddp_timeout", 24 * 3600))
        together: dict[str, Any] = {}
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            together = {"timeout": timeout}
            if "ddp_backend" in recipe.training:
                together["backend"] = recipe.training["ddp_backend"]
        self.state = PartialState(cpu=self._on_cpu, **together)
        self.cache_dir = default_cache_dir()
        self.teacher_tokens: dict[str, int] = {}

    def check(self) -> None:
        """Refuse what this machine and these processes can't do, before anything is loaded or written.

        Raises:
            InputError: an optimiser or a logging package that is not here, sharding in one process or of what can't be
                sharded, a device for the teacher that is not here, or one that can't run it quantised.
        """
        with _refusals_told():
            Trainer.get_optimizer_cls_and_kwargs(self.arguments)
            for callback in get_reporting_integration_callbacks(self.arguments.report_to):
                callback()
        if self.arguments.is_sharded:
            if self.state.num_processes == 1:
                raise InputError("training.fsdp: shards over several processes, and this is one. Start with torchrun.")
            try:
                self.recipe.check_sharded()
            except ValueError as error:
                raise InputError(f"{error}.") from None
        require_device("teacher.device", self.teacher_device)
        if self.recipe.teacher.quantization is not None:
            require_quantization(self.recipe.teacher.quantization, self.teacher_device)

    @cached_property
    def arguments(self) -> DistillArguments:
        """The trainer's arguments; ``check`` tells whether they can train here.

        Unless the recipe says, precision is bfloat16 where the device computes in it, and a process of the data loader
        reads a teacher cache ahead where an accelerator trains.
        """
        recipe = self.recipe
        options: dict[str, Any] = {
            "report_to": "none",
            "logging_steps": 10,
            "logging_first_step": True,
            **recipe.training,
        }
        if self.device.type == "cpu":
            options["use_cpu"] = True  # Transformers takes bfloat16 on a CPU only where the CPU was asked for
        elif recipe.cache is not None:  # a CPU's own cores are busy with the steps
            options.setdefault("dataloader_num_workers", 1)
        options.setdefault("bf16", native_dtype(self.device) == torch.bfloat16)
        with _refusals_told():
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
        """Where the models are: an accelerator if there is one and training.use_cpu does not say otherwise."""
        return torch.device("cpu") if self._on_cpu else self.state.device

    @cached_property
    def own_parts(self) -> dict[str, str]:
        """A digest of the source of each part that is a user's own."""
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
        return self._teacher_source or self._first(lambda: locate(self.recipe.teacher.model, self.cache_dir))

    @property
    def teacher_device(self) -> torch.device:
        device = self.recipe.teacher.device
        return self.device if device is None else torch.device(device)

    @property
    def teacher_dtype(self) -> torch.dtype:
        return resolve_dtype(self.recipe.teacher.dtype, self.teacher_device)

    @property
    def teacher_precision(self) -> str:
        return precision_of(self.teacher_dtype, self.recipe.teacher.quantization)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that both models share."""
        tokenizer = load_tokenizer(self.teacher_source)
        if self.recipe.student.model is not None:
            require_same_tokenizer(tokenizer, load_tokenizer(self.student_source))
        return tokenizer

    @cached_property
    def splits(self) -> Splits:
        if self._splits is not None:
            return self._splits
        fingerprint = tokenizer_fingerprint(self.tokenizer)
        return self._first(lambda: load_splits(self.recipe.data, self.tokenizer, fingerprint, self.cache_dir))

    def require_positions(self) -> None:
        """Raises InputError if a sample, or a prompt with its answer, may be longer than a model has positions for."""
        sources = [self.teacher_source] + ([self.student_source] if self.recipe.student.model is not None else [])
        windows = {source.name: n_positions(source) for source in sources}
        length = self.recipe.data.max_length
        for name, window in windows.items():
            if window is not None and length > window:
                raise InputError(
                    f"data.max_length: {length} tokens, but {name} has positions for {window}. Lower data.max_length."
                )
        if self.recipe.on_policy is not None:
            require_answers_fit(self.splits.train, self.recipe.on_policy, windows)

    @cached_property
    def models(self) -> ModelPair:
        """The student, initial until training changes it, and its teacher; each is loaded when it is asked for."""
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
        """The initial student's files; one that is cut from the teacher is made once and kept in the cache folder."""
        if self._student_source is not None:
            return self._student_source
        model = self.recipe.student.model
        if model is not None:
            return self._first(lambda: locate(model, self.cache_dir))
        samples = self.splits.train  # every process reads the text before the main one goes ahead to prune
        return self._first(lambda: self._pruned(samples))

    @cached_property
    def vocab_size(self) -> int:
        """How many classes teacher and student share, read from their configurations: no weights are needed."""
        sizes = {"teacher": n_rows(self.teacher_source)}
        if self.recipe.student.model is not None:  # one that is cut from the teacher has its classes
            sizes["student"] = n_rows(self.student_source)
        return shared_classes(sizes, self.tokenizer)

    def _first(self, make: Callable[[], T]) -> T:
        """``make()`` on the main process first, so that the others find what it left on disk."""
        with self.state.main_process_first():
            return make()

    @cached_property
    def pruning(self) -> dict[str, Any] | None:
        """Which layers a pruned student kept, and every layer's block influence."""
        if self.recipe.student.prune_from_teacher is None:
            return None
        content: dict[str, Any] = json.loads((self.student_source.path / "pruning.json").read_text(encoding="utf-8"))
        return content

    def _pruned(self, train: SampleDataset) -> ModelSource:
        options = self.recipe.student.prune_from_teacher
        assert options is not None, "a student has exactly one source"
        samples = [train[i] for i in range(min(CALIBRATION_SAMPLES, len(train)))]
        if self.recipe.data.is_prompt_only:  # influence is measured on the prompts themselves
            samples = [Sample(sample.token_ids, sample.document_starts) for sample in samples]
        key = (STUDENT_FORMAT, self.teacher_source.fingerprint, self.teacher_precision, options.layers)
        digest = xxhash.xxh3_128_hexdigest(repr((key, [sample.id for sample in samples])).encode())
        folder = self.cache_dir / "students" / digest
        if not folder.exists():
            batches = [collate(samples[i : i + 4], int(self.tokenizer.pad_token_id)) for i in range(0, len(samples), 4)]
            student, kept, influence = prune(self.models.teacher, options.layers, batches)
            self.teacher_tokens["prune"] = sum(batch["input_ids"].numel() for batch in batches)
            save_model(student, self.tokenizer, folder, {"kept_layers": kept, "influence": influence})
        return locate(str(folder), self.cache_dir)


@contextmanager
def _refusals_told() -> Iterator[None]:
    """What Transformers refuses of ``training``, as bad input."""
    try:
        yield
    except InputError:  # our own words
        raise
    except (ValueError, ImportError, TypeError, RuntimeError) as error:
        raise InputError(f"training: Transformers refuses it: {error}") from error


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, pruning: dict[str, Any]
) -> None:
    """Save model, tokenizer and ``pruning.json`` as a new folder, whole or not at all."""
    with new_folder(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        (new / "pruning.json").write_text(json.dumps(pruning, indent=1) + "\n", encoding="utf-8")
