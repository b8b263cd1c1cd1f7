"""What a trainer is given, brought to one form or refused: how many classes, the samples, the teacher."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selkd.cache.reader import TeacherCache
from selkd.data.in_memory import samples_of_rows
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.models.head import check_head, head_of
from selkd.models.loading import window_of
from selkd.recipe_choices import needs_teacher
from selkd.teacher import CachedTeacher, LiveTeacher, Teacher
from selkd.training.arguments import DistillArguments, of_arguments


def sizes(student: PreTrainedModel, teacher: PreTrainedModel | TeacherCache) -> dict[str, int]:
    """How many classes each side has."""
    if isinstance(teacher, TeacherCache):
        return {"student": head_of(student).n_classes, "teacher cache": int(teacher.fingerprint["vocabulary"])}
    return {"student": head_of(student).n_classes, "teacher": head_of(teacher).n_classes}


def as_samples(
    dataset: Any, name: str, tokenizer: PreTrainedTokenizerBase, args: DistillArguments
) -> SampleDataset | None:
    """The samples of ``dataset``, called ``name``: as they are, or made of its rows. Raises InputError as a recipe."""
    if dataset is None or isinstance(dataset, SampleDataset):
        return dataset
    options = args.data_options(name)
    if args.on_policy is not None and options.packing:
        raise InputError(f"packing: on_policy answers one prompt a sample; {name} needs packing=False.")
    try:
        return samples_of_rows(dataset, options, tokenizer)
    except InputError as error:
        raise of_arguments(error) from None


def require_window(samples: SampleDataset, name: str, models: list[Any], args: DistillArguments) -> None:
    """Raises InputError where a sample is longer than a model has positions for."""
    on_policy = args.on_policy_options
    if on_policy is not None and on_policy.fraction == 1 and name == "train_dataset":
        return  # no completion of the data is learned: `Answers` looks at prompts and answers
    longest = int(samples.lengths.max(initial=0))
    for model in models:
        limit = window_of(model)
        if limit is not None and longest > limit:
            raise InputError(
                f"max_length: {name} has a sample of {longest} tokens, but {type(model).__name__} has positions for "
                f"{limit}. Make the samples shorter."
            )


def as_teacher(
    teacher: PreTrainedModel | TeacherCache,
    args: DistillArguments,
    n_classes: int,
    splits: list[SampleDataset | None],
) -> Teacher:
    """The teacher, put on its device; a cache, checked against the arguments and the samples of ``splits``.

    Raises:
        InputError: the cache is of other classes, another sampler, or lacks samples; the metric needs a live teacher;
            the model's head can't be read.
    """
    temperature = args.objective.criterion.temperature
    if isinstance(teacher, TeacherCache):
        stored = int(teacher.fingerprint["vocabulary"])
        if stored > n_classes:
            raise InputError(
                f"{teacher.directory}: its draws are from {stored} classes, but the student has {n_classes}: some may "
                "be classes that it lacks. Build another cache over the classes that both models share."
            )
        metric = args.objective.positions.metric
        if needs_teacher(metric):
            raise InputError(
                f"positions.metric: {metric} needs the teacher's full distribution, and a TeacherCache holds drawn "
                "classes alone. Take a metric of the student (student_entropy, student_ce), or give a live teacher."
            )
        expected = {
            "sampler": args.class_options.sampler,
            "draws": args.class_options.draws,
            "temperature": temperature,
        }
        for field, value in expected.items():
            if teacher.fingerprint.get(field) != value:
                raise InputError(
                    f"{teacher.directory}: the cache's {field} is {teacher.fingerprint.get(field)!r}, these arguments "
                    f"say {value!r}. Set it to the cache's, or build another cache."
                )
        for samples in splits:
            missing = [sample_id for sample_id in samples.ids if sample_id not in teacher] if samples else []
            if missing:
                raise InputError(
                    f"{teacher.directory}: the cache lacks {len(missing)} samples, the first {missing[0].hex()}. "
                    "Build it from this data, or give a live teacher."
                )
        return CachedTeacher(teacher)
    check_head(teacher)
    teacher.eval().requires_grad_(False)
    device = args.device if args.teacher_device is None else torch.device(args.teacher_device)
    # A quantised model can't be moved, and need not be: cuda:0 is cuda.
    if teacher.device.type != device.type or device.index not in (None, teacher.device.index):
        teacher = teacher.to(device)
    return LiveTeacher(teacher, args.class_options, temperature, args.seed, n_classes)
