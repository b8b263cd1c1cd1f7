"""The recipe's ``training`` part: ``transformers.TrainingArguments``' own names, less those that the recipe owns."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from selkd.errors import nearest

Accepted = Callable[[Any], bool]


def _only(value: Any) -> Accepted:
    return lambda given: given == value


# What no training of selkd can do, in a recipe or in ``DistillArguments``: key -> (the values that ask for nothing,
# what to do instead).
REFUSED: dict[str, tuple[Accepted, str]] = {
    "fp16": (_only(False), "gradients of single classes underflow in float16; use bf16, or neither for float32"),
    "fp16_full_eval": (_only(False), "it would round the student's weights; evaluation runs in the run's precision"),
    "bf16_full_eval": (_only(False), "it would round the student's weights; evaluation runs in the run's precision"),
    "torch_compile": (_only(False), "not supported with the chunked loss"),
    "torch_compile_backend": (_only(None), "not supported with the chunked loss"),
    "torch_compile_mode": (_only(None), "not supported with the chunked loss"),
    "use_liger_kernel": (_only(False), "selkd has its own loss"),
    "liger_kernel_config": (_only(None), "selkd has its own loss"),
    "deepspeed": (_only(None), "the loss reads the whole head, which ZeRO splits; use fsdp"),
    "parallelism_config": (_only(None), "samples are spread over data-parallel ranks only"),
    "use_cache": (_only(False), "training keeps no key-value cache"),
    "label_smoothing_factor": (_only(0.0), "the labels are the teacher's; criterion.kd_weight mixes in cross-entropy"),
    "average_tokens_across_devices": (_only(True), "the loss is always divided by the count of the whole step"),
    "neftune_noise_alpha": (_only(None), "its noise would depend on how a step is cut into micro-batches"),
    "train_sampling_strategy": (
        lambda given: str(given) in ("random", "sequential"),
        "random is shuffled by the seed, sequential keeps the data's order; batches by length are not made",
    ),
    "length_column_name": (_only("length"), "batches by length are not made"),
    "label_names": (_only(None), "the samples' targets are made from the rows"),
    "remove_unused_columns": (_only(True), "columns that no field names are left out in any case"),
    "ignore_data_skip": (_only(False), "a continued training goes on with the samples that it had not seen"),
    "restore_callback_states_from_checkpoint": (_only(True), "a policy's queue and the counts are callbacks' states"),
    "logging_nan_inf_filter": (_only(False), "a loss that is not finite stops the training"),
    "dataloader_in_order": (_only(True), "the order of samples would depend on the loader's processes"),
}
_ACCELERATOR = {
    "split_batches": (False, "per_device_train_batch_size says how many samples a process takes"),
    "dispatch_batches": (None, "every process reads its own samples"),
    "even_batches": (True, "the last batch is filled with samples that count nowhere"),
    "use_seedable_sampler": (True, "the order of samples is a function of the seed"),
}

# What the recipe says elsewhere, or what a run leaves without effect: key -> what to do instead.
OWNED = {
    "output_dir": "give the command's --out",
    "seed": "set the recipe's seed",
    "data_seed": "set the recipe's seed",
    "do_train": "selkd distill trains",
    "do_eval": "set evaluation.suite",
    "do_predict": "set evaluation.suite",
    "eval_strategy": "set evaluation.every_steps",
    "eval_steps": "set evaluation.every_steps",
    "eval_delay": "set evaluation.every_steps",
    "eval_on_start": "fidelity is always measured before training",
    "eval_accumulation_steps": "evaluation keeps no predictions",
    "eval_do_concat_batches": "evaluation keeps no predictions",
    "eval_use_gather_object": "evaluation keeps no predictions",
    "batch_eval_metrics": "evaluation keeps no predictions",
    "prediction_loss_only": "evaluation keeps no predictions",
    "include_for_metrics": "evaluation keeps no predictions",
    "per_device_eval_batch_size": "evaluation batches by tokens",
    "load_best_model_at_end": "set evaluation.keep_best",
    "metric_for_best_model": "set evaluation.keep_best",
    "greater_is_better": "set evaluation.keep_best",
    "resume_from_checkpoint": "run the same recipe into the same folder again",
    "push_to_hub": "give the recipe's hub",
    "hub_model_id": "give the recipe's hub",
    "hub_strategy": "give the recipe's hub",
    "hub_token": "give the recipe's hub",
    "hub_private_repo": "give the recipe's hub",
    "hub_always_push": "give the recipe's hub",
    "hub_revision": "give the recipe's hub",
    "train_sampling_strategy": "samples are shuffled by the seed",
    "auto_find_batch_size": "a batch size found by failing would not be reproducible; set per_device_train_batch_size",
    "dataloader_drop_last": "the last batch is filled with samples that count nowhere",
    "save_only_model": "a run is continued from its checkpoints, which need the optimiser",
}


# What Transformers takes and trips over hours later, trains nothing with or counts wrongly: key -> (allowed, how it is
# said).
RANGES: dict[str, tuple[Accepted, str]] = {
    "per_device_train_batch_size": (lambda value: value >= 1, "at least 1"),
    "gradient_accumulation_steps": (lambda value: value >= 1, "at least 1"),
    "num_train_epochs": (lambda value: 0 < value < float("inf"), "above 0"),
    "max_steps": (lambda value: value == -1 or value >= 1, "at least 1, or -1 for whole epochs"),
    "learning_rate": (lambda value: 0 <= value < float("inf"), "a finite number from 0"),
    "dataloader_num_workers": (lambda value: value >= 0, "at least 0"),
    "logging_steps": (lambda value: value > 0, "above 0"),
    "save_steps": (lambda value: value > 0, "above 0"),
    "include_num_input_tokens_seen": (
        lambda value: value in (False, True, "no", "all"),
        "no, or all with padding (which may be the end token, so that its id does not tell it)",
    ),
}
RECIPE_RANGES: dict[str, tuple[Accepted, str]] = RANGES | {
    "save_strategy": (lambda value: value != "best", "no, steps or epoch: the last student is kept, not the best"),
}


def check_supported(given: Mapping[str, Any]) -> None:
    """What any training refuses of ``TrainingArguments``, by their names, as the user gave them.

    Raises:
        ValueError: a value that selkd can't honour, or that no training could run with; the key is named.
    """
    for key, (is_accepted, instead) in REFUSED.items():
        if key in given and not is_accepted(given[key]):
            raise ValueError(f"{key}: {given[key]!r} can't be honoured; {instead}.")
    for key, (is_allowed, allowed) in RANGES.items():
        if key in given and not is_allowed(given[key]):
            raise ValueError(f"{key}: expected {allowed}, but got {given[key]!r}.")


def check_accelerator(config: Any) -> None:
    """The same of ``accelerator_config``, an ``AcceleratorConfig``. Raises ValueError."""
    for key, (kept, instead) in _ACCELERATOR.items():
        if getattr(config, key) != kept:
            raise ValueError(f"accelerator_config.{key}: {getattr(config, key)!r} can't be honoured; {instead}.")


@cache
def _adapters() -> dict[str, TypeAdapter[Any]]:
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    return {field.name: TypeAdapter(hints[field.name]) for field in fields(TrainingArguments) if field.init}


def check_training(given: Any) -> dict[str, Any]:
    """``given`` with every value coerced to its type (YAML reads ``1e-5`` as text).

    Raises:
        ValueError: a key that TrainingArguments lacks or that the recipe owns, or a value of the wrong type.
    """
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"expected keys of transformers.TrainingArguments, but got {given!r}")
    adapters, checked = _adapters(), {}
    for key, value in given.items():
        if key in OWNED or key in REFUSED:
            instead = OWNED[key] if key in OWNED else REFUSED[key][1]
            raise ValueError(f"training.{key}: not set here; {instead}.")
        if key not in adapters:
            names = [name for name in adapters if name not in OWNED and name not in REFUSED]
            raise ValueError(
                f"training.{key}: unknown key. Allowed: the names of transformers.TrainingArguments."
                f"{nearest(key, names)}"
            )
        try:
            checked[key] = adapters[key].validate_python(value)
        except ValidationError as error:
            fault = error.errors()[0]["msg"]
            raise ValueError(f"training.{key}: {fault[0].lower()}{fault[1:]}, but got {value!r}.") from None
        is_allowed, allowed = RECIPE_RANGES.get(key, (lambda _: True, ""))
        if not is_allowed(checked[key]):
            raise ValueError(f"training.{key}: expected {allowed}, but got {value!r}.")
    return checked
