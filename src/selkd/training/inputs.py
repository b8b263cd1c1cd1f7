"""The inputs of a trainer, checked and brought to one form: the student, the samples, the teacher."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selkd.data.packing import samples_of_rows
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.models.head import check_head, head_of
from selkd.models.loading import require_device, window_of
from selkd.plugins import Metric, Sampler
from selkd.recipe.choices import ClassOptions, PositionOptions
from selkd.recipe.combinations import check_cached, n_scoring_draws
from selkd.teacher.cached import CachedTeacher, ScoringDraws
from selkd.teacher.live import LiveTeacher
from selkd.teacher.targets import Teacher
from selkd.training.arguments import DistillArguments
from selkd.training.sampling import FilledDataset
from selkd.training.splitting import require_whole
from selkd_cache.fingerprint import TAIL
from selkd_cache.reader import TeacherCache


def require_parameters(args: DistillArguments, teacher: Any, tokenizer: Any, others: Mapping[str, Any]) -> None:
    """Raises InputError for a parameter of the trainer that is missing or not supported, or a device that is not here.

    Args:
        others: the trainer's other parameters, by the Trainer's names.
    """
    if teacher is None:
        raise InputError("teacher: expected a model or a TeacherCache, got None.")
    if tokenizer is None:
        raise InputError("processing_class: expected the tokenizer that both models share, got None.")
    if others.get("data_collator") is not None:
        raise InputError(
            "data_collator: batches carry masks, documents' borders and sample ids, and are made by selkd. Give "
            "rows or a SampleDataset, and leave it out."
        )
    if others.get("compute_loss_func") is not None:
        raise InputError(
            "compute_loss_func: the loss is the distillation's. Give a criterion of your own by its name "
            "(criterion={'name': 'module:function'}), and leave it out."
        )
    args.require_packages()
    if args.teacher_device is not None:
        require_device("teacher_device", torch.device(args.teacher_device))
    if args.device.type == "mps":
        raise InputError("the MPS device has no float64, which the class draws need. Set use_cpu=True.")


def require_trainable(student: PreTrainedModel, teacher: PreTrainedModel | TeacherCache) -> None:
    """Raises InputError for a student in low precision, on several devices, with a prompt adapter or as teacher."""
    if teacher is student:
        raise InputError("teacher: the student itself can't be its own teacher; give another model.")
    if getattr(getattr(student, "active_peft_config", None), "is_prompt_learning", False):
        raise InputError(
            "model: its adapter learns a prompt (prefix or prompt tuning), which moves every position of the text. "
            "Take adapters of layers (LoRA, IA3)."
        )
    require_whole(student, "model")
    devices = set((getattr(student, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise InputError(
            f"model: its device_map spreads it over {len(devices)} devices, and a student trains on one. Load it "
            "without device_map; the teacher may be spread, and FSDP shards a student over processes."
        )
    low = {str(p.dtype) for p in student.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)}
    if low:
        raise InputError(
            f"model: trainable weights are {', '.join(sorted(low))}, in which small updates round to nothing. Load "
            "the student in float32; with bf16=True products still run in bfloat16."
        )


def without_autocast(model: PreTrainedModel) -> None:
    """Remove the autocast that an earlier training's Accelerate left around the model's forward."""
    extract_model_from_parallel(model, keep_fp32_wrapper=False)


def vocab_sizes(student: PreTrainedModel, teacher: PreTrainedModel | TeacherCache) -> dict[str, int]:
    """How many classes the student and the teacher, or its cache, have; by the names that errors give them."""
    if isinstance(teacher, TeacherCache):
        return {"student": head_of(student).vocab_size, "teacher cache": int(teacher.fingerprint["vocabulary"])}
    return {"student": head_of(student).vocab_size, "teacher": head_of(teacher).vocab_size}


def as_trained(dataset: Any, tokenizer: PreTrainedTokenizerBase, args: DistillArguments) -> SampleDataset | None:
    """The samples of ``train_dataset``; of a stream as many as the training's steps take.

    Raises:
        InputError: as ``as_samples``; a stream without ``max_steps``, or one that differs from process to process.
    """
    a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    enough = args.max_steps * a_step if args.max_steps > 0 else None
    samples = as_samples(dataset, "train_dataset", tokenizer, args, enough)
    may_differ = args.world_size > 1 and not hasattr(dataset, "__len__")
    if samples is not None and may_differ and len(set(gather_object([samples.digest]))) > 1:
        raise InputError(
            "train_dataset: the processes read different rows of the stream. Give all of them the same one, in the "
            "same order; which samples a process trains on is decided here."
        )
    return samples


def as_samples(
    dataset: Any, name: str, tokenizer: PreTrainedTokenizerBase, args: DistillArguments, enough: int | None = None
) -> SampleDataset | None:
    """The samples of ``dataset``, which errors call ``name``; made of its rows where it is not samples already.

    Args:
        enough: how many samples are made of a stream, see ``samples_of_rows``.

    Raises:
        InputError: rows that a recipe's data file would be refused for.
    """
    if dataset is None or isinstance(dataset, SampleDataset):
        return dataset
    if isinstance(dataset, FilledDataset):
        return dataset.samples
    return samples_of_rows(dataset, name, args.data, tokenizer, enough)


def as_evaluated(dataset: Any, name: str, tokenizer: PreTrainedTokenizerBase, args: DistillArguments) -> Any:
    """The samples of an evaluation as a ``FilledDataset``, or as one for each name of a mapping; None for None.

    Raises:
        InputError: as ``as_samples``, or no sample has a position to measure.
    """
    if isinstance(dataset, Mapping):
        return {key: as_evaluated(rows, f"{name}[{key!r}]", tokenizer, args) for key, rows in dataset.items()}
    samples = as_samples(dataset, name, tokenizer, args)
    if samples is None:
        return None
    if not samples.n_valid.any():
        raise InputError(f"{name}: prompts alone. The evaluation is on completions of the data; give some, or None.")
    return FilledDataset(samples)


def require_window(samples: SampleDataset, name: str, models: list[Any], args: DistillArguments) -> None:
    """Raises InputError if a sample is longer than a model has positions for."""
    on_policy = args.on_policy
    if on_policy is not None and on_policy.fraction == 1 and name == "train_dataset":
        return  # answers replace all completions: `require_answers_fit` checks their length
    longest = int(samples.lengths.max(initial=0))
    for model in models:
        limit = window_of(model)
        if limit is not None and longest > limit:
            raise InputError(
                f"data.max_length: {name} has a sample of {longest} tokens, but {type(model).__name__} has positions "
                f"for {limit}. Make the samples shorter."
            )


def as_teacher(teacher: PreTrainedModel | TeacherCache, args: DistillArguments, vocab_size: int) -> Teacher:
    """A model as a ``LiveTeacher`` on its device, a cache as a ``CachedTeacher`` that agrees with the arguments.

    Raises:
        InputError: the cache holds classes that the student lacks, or was drawn otherwise than the arguments say; the
            metric needs a live teacher; the head can't be read; ``teacher_device`` contradicts a ``device_map``.
    """
    temperature = args.criterion.temperature
    if isinstance(teacher, TeacherCache):
        stored = int(teacher.fingerprint["vocabulary"])
        if stored > vocab_size:
            raise InputError(
                f"{teacher.directory}: its draws are from {stored} classes, but the student has {vocab_size}: some may "
                "be classes that it lacks. Build another cache over the classes that both models share."
            )
        expected = {"sampler": args.classes.sampler, "draws": args.classes.draws, "temperature": temperature}
        expected[TAIL] = "one class" if args.classes.tail else None
        for field, value in expected.items():
            if teacher.fingerprint.get(field) != value:
                raise InputError(
                    f"{teacher.directory}: the cache's {field} is {teacher.fingerprint.get(field)!r}, these arguments "
                    f"say {value!r}. Set it to the cache's, or build another cache."
                )
        cached = CachedTeacher(teacher)
        try:
            check_cached(args.positions, args.classes, temperature, has_scalars=cached.has_scalars)
        except ValueError as error:
            raise InputError(f"{error}.") from None
        return CachedTeacher(teacher, scoring_draws(args.positions, args.classes, args.seed))
    if args.positions.scoring_draws is not None:
        raise InputError("positions.scoring_draws: a live teacher scores by its whole distribution. Leave it out.")
    require_whole(teacher, "teacher")
    teacher.eval().requires_grad_(False)
    teacher = _on_device(teacher, args)
    check_head(teacher)
    return LiveTeacher(teacher, args.classes, temperature, args.seed, vocab_size)


def scoring_draws(positions: PositionOptions, classes: ClassOptions, seed: int) -> ScoringDraws | None:
    """Which of a cache's draws score positions; None if the metric is not estimated from any."""
    if positions.metric is None or not Metric.find(positions.metric).uses_draws:
        return None
    assert classes.draws is not None, "a cache holds drawn classes"
    is_even = Sampler.find(classes.sampler).is_evenly_spaced
    return ScoringDraws(n_scoring_draws(positions, classes.draws), seed, is_even)


def _on_device(teacher: PreTrainedModel, args: DistillArguments) -> PreTrainedModel:
    """The teacher on ``teacher_device``, else where its ``device_map`` put it, else on the student's device."""
    device_map = getattr(teacher, "hf_device_map", None)
    if device_map and args.teacher_device is None:
        return teacher
    if device_map and len(set(device_map.values())) > 1:
        raise InputError(
            f"teacher_device: {args.teacher_device}, but the teacher's device_map spreads it over "
            f"{len(set(device_map.values()))} places. Leave teacher_device out, or load the teacher without device_map."
        )
    device = args.device if args.teacher_device is None else torch.device(args.teacher_device)
    without_autocast(teacher)
    # A quantised model can't be moved, and need not be moved from cuda:0 to cuda.
    if teacher.device.type != device.type or device.index not in (None, teacher.device.index):
        teacher = teacher.to(device)
    return teacher


def require_stored(teacher: Teacher, samples: SampleDataset) -> None:
    """Raises InputError if a cached teacher lacks some of the samples."""
    if isinstance(teacher, CachedTeacher):
        missing = [sample_id for sample_id in samples.ids if sample_id not in teacher.cache]
        if missing:
            raise InputError(
                f"{teacher.cache.directory}: the cache lacks {len(missing)} samples, the first {missing[0].hex()}. "
                "Build it from this data, or give a live teacher."
            )
