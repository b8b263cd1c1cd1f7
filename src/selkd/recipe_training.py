"""The recipe's ``training`` part: ``transformers.TrainingArguments``' own names, less those that the recipe owns."""

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from selkd.recipe_errors import nearest

# What the recipe says elsewhere, or what the distillation loss would leave without effect: key -> what to do instead.
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
    "load_best_model_at_end": "set evaluation.keep_best",
    "metric_for_best_model": "set evaluation.keep_best",
    "greater_is_better": "set evaluation.keep_best",
    "resume_from_checkpoint": "run the same recipe into the same folder again",
    "remove_unused_columns": "the samples' columns are all used",
    "label_names": "the samples' columns are fixed",
    "label_smoothing_factor": "set criterion.kd_weight to mix in cross-entropy",
    "average_tokens_across_devices": "the loss is always averaged over the whole step",
    "train_sampling_strategy": "samples are shuffled by the seed",
    "length_column_name": "samples are shuffled by the seed",
    "push_to_hub": "give the recipe's hub",
    "hub_model_id": "give the recipe's hub",
    "hub_strategy": "give the recipe's hub",
    "hub_token": "give the recipe's hub",
    "hub_private_repo": "give the recipe's hub",
    "hub_always_push": "give the recipe's hub",
    "hub_revision": "give the recipe's hub",
    "use_liger_kernel": "selkd has its own loss",
    "auto_find_batch_size": "a batch size found by failing would not be reproducible; set per_device_train_batch_size",
    "fp16_full_eval": "evaluation uses the run's precision",
    "per_device_eval_batch_size": "evaluation batches by tokens",
    "fp16": "gradients of single classes underflow in float16; use bf16, or neither for float32",
    "use_cache": "training keeps no key-value cache",
    "liger_kernel_config": "selkd has its own loss",
    "torch_compile": "not supported with the chunked loss",
    "torch_compile_backend": "not supported with the chunked loss",
    "torch_compile_mode": "not supported with the chunked loss",
    "deepspeed": "the loss reads the whole head, which ZeRO splits; use fsdp",
    "parallelism_config": "samples are spread over data-parallel ranks only",
    "dataloader_drop_last": "the last batch is filled with samples that count nowhere",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "restore_callback_states_from_checkpoint": "always done",
    "save_only_model": "a run is continued from its checkpoints, which need the optimiser",
    "ignore_data_skip": "a continued run goes on with the samples that it had not seen",
    "bf16_full_eval": "evaluation uses the run's precision",
}


# What Transformers takes and trips over hours later, or takes and trains nothing: key -> (allowed, how it is said).
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "per_device_train_batch_size": (lambda value: value >= 1, "at least 1"),
    "gradient_accumulation_steps": (lambda value: value >= 1, "at least 1"),
    "num_train_epochs": (lambda value: 0 < value < float("inf"), "above 0"),
    "max_steps": (lambda value: value == -1 or value >= 1, "at least 1, or -1 for whole epochs"),
    "learning_rate": (lambda value: 0 <= value < float("inf"), "a finite number from 0"),
    "dataloader_num_workers": (lambda value: value >= 0, "at least 0"),
    "logging_steps": (lambda value: value > 0, "above 0"),
    "save_steps": (lambda value: value > 0, "above 0"),
    "save_strategy": (lambda value: value != "best", "no, steps or epoch: the last student is kept, not the best"),
}


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
        if key in OWNED:
            raise ValueError(f"training.{key}: not set here; {OWNED[key]}.")
        if key not in adapters:
            names = [name for name in adapters if name not in OWNED]
            raise ValueError(
                f"training.{key}: unknown key. Allowed: the names of transformers.TrainingArguments."
                f"{nearest(key, names)}"
            )
        try:
            checked[key] = adapters[key].validate_python(value)
        except ValidationError as error:
            fault = error.errors()[0]["msg"]
            raise ValueError(f"training.{key}: {fault[0].lower()}{fault[1:]}, but got {value!r}.") from None
        is_allowed, allowed = RANGES.get(key, (lambda _: True, ""))
        if not is_allowed(checked[key]):
            raise ValueError(f"training.{key}: expected {allowed}, but got {value!r}.")
    return checked
