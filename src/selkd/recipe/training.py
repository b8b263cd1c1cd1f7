"""The recipe's ``training`` part: the keys of ``transformers.TrainingArguments``, and which of them are refused."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from selkd.errors import nearest

Accepted = Callable[[Any], bool]


def _only(accepted: Any) -> Accepted:
    return lambda value: value == accepted


# Keys that neither a recipe nor ``DistillArguments`` may change: key -> (which values are accepted, the reason).
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
        lambda value: str(value) in ("random", "sequential"),
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

# Keys that a recipe may not set, as it has other keys for them or a run ignores them: key -> what to do instead.
OWNED = {
    "output_dir": "give the command's --out",
    **dict.fromkeys(("seed", "data_seed"), "set the recipe's seed"),
    "do_train": "selkd distill trains",
    **dict.fromkeys(("do_eval", "do_predict"), "set evaluation.suite"),
    **dict.fromkeys(("eval_strategy", "eval_steps", "eval_delay"), "set evaluation.every_steps"),
    "eval_on_start": "fidelity is always measured before training",
    **dict.fromkeys(
        (
            "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics",
            "prediction_loss_only", "include_for_metrics",
        ),
        "evaluation keeps no predictions",
    ),
    "per_device_eval_batch_size": "evaluation batches by tokens",
    **dict.fromkeys(
        ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), "set evaluation.keep_best"
    ),
    "resume_from_checkpoint": "run the same recipe into the same folder again",
    **dict.fromkeys(
        (
            "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push",
            "hub_revision",
        ),
        "give the recipe's hub",
    ),
    "train_sampling_strategy": "samples are shuffled by the seed",
    "auto_find_batch_size": "a batch size found by failing would not be reproducible; set per_device_train_batch_size",
    "dataloader_drop_last": "the last batch is filled with samples that count nowhere",
    "save_only_model": "a run is continued from its checkpoints, which need the optimiser",
}  # fmt: skip

# Values that Transformers accepts although they fail later, train nothing or count wrongly: key -> (which values are
# allowed, in words).
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
        "no, or all. Tokens can't be counted without padding, because padding may be the end token",
    ),
}
RECIPE_RANGES: dict[str, tuple[Accepted, str]] = RANGES | {
    "save_strategy": (lambda value: value != "best", "no, steps or epoch: the last student is kept, not the best"),
}


def check_supported(arguments: Mapping[str, Any]) -> None:
    """Check values of ``TrainingArguments`` by their keys.

    Raises:
        ValueError: selkd can't honour a value, or no training could run with it; the message names the key.
    """
    for key, (is_accepted, instead) in REFUSED.items():
        if key in arguments and not is_accepted(arguments[key]):
            raise ValueError(f"{key}: {arguments[key]!r} can't be honoured; {instead}.")
    for key, (is_allowed, allowed) in RANGES.items():
        if key in arguments and not is_allowed(arguments[key]):
            raise ValueError(f"{key}: expected {allowed}, but got {arguments[key]!r}.")


def check_accelerator(config: Any) -> None:
    """Raises ValueError for a value of an ``AcceleratorConfig`` that selkd can't honour."""
    for key, (kept, instead) in _ACCELERATOR.items():
        if getattr(config, key) != kept:
            raise ValueError(f"accelerator_config.{key}: {getattr(config, key)!r} can't be honoured; {instead}.")


@cache
def _adapters() -> dict[str, TypeAdapter[Any]]:
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    return {field.name: TypeAdapter(hints[field.name]) for field in fields(TrainingArguments) if field.init}


def check_training(content: Any) -> dict[str, Any]:
    """The recipe's ``training`` with every value coerced to its type (YAML reads ``1e-5`` as text).

    Raises:
        ValueError: TrainingArguments lacks a key, a recipe may not set it, or its value is of the wrong type.
    """
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"expected keys of transformers.TrainingArguments, but got {content!r}")
    adapters, checked = _adapters(), {}
    for key, value in content.items():
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
