"""What the stages of a run share: its models, loaded when first needed, its samples, device and precision."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.integrations import get_reporting_integration_callbacks

from selkd import plugins
from selkd.data.collate import collate
from selkd.data.samples import Sample
from selkd.data.splits import Splits, load_splits
from selkd.errors import InputError
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
from selkd.training.on_policy import longest_prompt

CALIBRATION_SAMPLES = 16
STUDENT_FORMAT = 1


class Workspace:
    """The inputs of one recipe, found and checked. Nothing is loaded before it is needed.

    Args:
        recipe: what to do.
        run_path: the run's folder.
    """

    def __init__(self, recipe: Recipe, run_path: Path) -> None:
        self.recipe = recipe
        self.run_path = run_path
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

    @cached_property
    def planned_arguments(self) -> DistillArguments:
        """The trainer's arguments, whether or not they can train here: this many processes, these packages.

        Unless the recipe says, precision is bfloat16 where the device computes in it, and a process of the data loader
        reads a teacher cache ahead where an accelerator trains.
        """
        recipe = self.recipe
        given: dict[str, Any] = {
            "report_to": "none",
            "logging_steps": 10,
            "logging_first_step": True,
            **recipe.training,
        }
        device = self.device
        if device.type == "cpu":
            given["use_cpu"] = True  # Transformers takes bfloat16 on a CPU only where the CPU was asked for
        elif recipe.cache is not None:  # a CPU's own cores are busy with the steps
            given.setdefault("dataloader_num_workers", 1)
        if "bf16" not in given:
            given["bf16"] = native_dtype(device) == torch.bfloat16
        with _refusals_told():
            arguments = DistillArguments(
                output_dir=str(self.run_path / "checkpoints"),
                seed=recipe.seed,
                criterion=recipe.criterion.model_dump(),
                positions=recipe.positions.model_dump(),
                classes=recipe.classes.model_dump(),
                on_policy=None if recipe.on_policy is None else recipe.on_policy.model_dump(),
                teacher_device=recipe.teacher.device,
                rollouts_file=str(self.run_path / "rollouts.jsonl"),
                max_length=recipe.data.max_length,
                packing=recipe.data.packing,
                **given,
            )
        if recipe.training.get("bf16") is False and arguments.compute_dtype == torch.bfloat16:
            raise InputError(
                "training.bf16: false, but the run was launched with mixed precision bf16. Set both alike."
            )
        return arguments

    @cached_property
    def arguments(self) -> DistillArguments:
        """The trainer's arguments, checked against this machine."""
        arguments = self.planned_arguments
        with _refusals_told():
            Trainer.get_optimizer_cls_and_kwargs(arguments)
            for callback in get_reporting_integration_callbacks(arguments.report_to):
                callback()
        if arguments.is_sharded:
            if self.state.num_processes == 1:
                raise InputError("training.fsdp: shards over several processes, and this is one. Start with torchrun.")
            try:
                self.recipe.check_sharded()
            except ValueError as error:
                raise InputError(f"{error}.") from None
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
        return self.planned_arguments.compute_dtype

    @cached_property
    def teacher_source(self) -> ModelSource:
        return self._first(lambda: locate(self.recipe.teacher.model, self.cache_dir))

    @cached_property
    def teacher_device(self) -> torch.device:
        """Where the teacher is. Raises InputError: no such device, or one that can't run it quantised."""
        options = self.recipe.teacher
        device = self.device if options.device is None else torch.device(options.device)
        require_device("teacher.device", device)
        if options.quantization is not None:
            require_quantization(options.quantization, device)
        return device

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
        fingerprint = tokenizer_fingerprint(self.tokenizer)
        return self._first(lambda: load_splits(self.recipe.data, self.tokenizer, fingerprint, self.cache_dir))

    def require_positions(self) -> None:
        """Raises InputError if a sample, or a prompt with its answer, may be longer than a model has positions for."""
        sources = [self.teacher_source] + ([self.student_source] if self.recipe.student.model is not None else [])
        for source in sources:
            limit = n_positions(source)
            if limit is not None and self.recipe.data.max_length > limit:
                raise InputError(
                    f"data.max_length: {self.recipe.data.max_length} tokens, but {source.name} has positions for "
                    f"{limit}. Lower data.max_length."
                )
            if limit is not None and self.recipe.on_policy is not None:
                answer = self.recipe.on_policy.max_new_tokens
                longest = longest_prompt(self.splits.train, limit - answer)
                if longest + answer > limit:
                    raise InputError(
                        f"on_policy.max_new_tokens: {answer} after a prompt of up to {longest} tokens, but "
                        f"{source.name} has positions for {limit}. Lower max_new_tokens, or data.max_length."
                    )

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
        if self.recipe.student.model is not None:
            model = self.recipe.student.model
            return self._first(lambda: locate(model, self.cache_dir))
        self.splits  # noqa: B018  found before the main process goes ahead to prune
        return self._first(self._pruned)

    @cached_property
    def vocab_size(self) -> int:
        """How many classes teacher and student share, read from their configurations: no weights are needed."""
        sizes = {"teacher": n_rows(self.teacher_source)}
        if self.recipe.student.model is not None:  # one that is cut from the teacher has its classes
            sizes["student"] = n_rows(self.student_source)
        return shared_classes(sizes, self.tokenizer)

    def _first(self, make: Any) -> Any:
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

    def _pruned(self) -> ModelSource:
        options = self.recipe.student.prune_from_teacher
        assert options is not None, "a student has exactly one source"
        samples = [self.splits.train[i] for i in range(min(CALIBRATION_SAMPLES, len(self.splits.train)))]
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "pruning.json").write_text(json.dumps(pruning, indent=1) + "\n", encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp's folders are private, but the cache may be shared
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same content
                raise
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
