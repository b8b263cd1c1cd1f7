"""The recipe's ``training`` part: the keys of ``transformers.TrainingArguments``, and which of them are refused."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from selkd.errors import cut, nearest, shown
from selkd.recipe.part import LARGEST_COUNT, reason
from selkd.recipe.training_keys import training_keys

Accepted = Callable[[Any], bool]


def _only(accepted: Any) -> Accepted:
    return lambda value: value == accepted


def count(least: int, *, or_null: bool = False) -> tuple[Accepted, str]:
    """The range of a whole number from ``least``, or null."""

    def is_allowed(value: Any) -> bool:
        return or_null if value is None else least <= value <= LARGEST_COUNT and value == int(value)

    return is_allowed, f"at least {least}, at most {LARGEST_COUNT:,}" + (", or null" if or_null else "")


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
# Keys of ``accelerator_config`` that may not be changed: key -> (the value that is kept, the reason).
_ACCELERATOR = {
    "split_batches": (False, "per_device_train_batch_size says how many samples a process takes"),
    "dispatch_batches": (None, "every process reads its own samples"),
    "even_batches": (True, "the last batch is filled with samples that count nowhere"),
    "use_seedable_sampler": (True, "the order of samples is a function of the seed"),
}
_LOG_LEVELS = ("passive", "detail", "debug", "info", "warning", "error", "critical")

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
    "deepspeed": "use fsdp; ZeRO-1 and 2 are for DistillArguments(deepspeed=…), as a run needs checkpoints",
    "parallelism_config": "launch with accelerate's --parallelism_config_dp_replicate_size and _dp_shard_size",
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
    "local_rank": "the launcher tells each process its rank",
    "save_only_model": "a run is continued from its checkpoints, which need the optimiser",
}  # fmt: skip

# Values that Transformers accepts although they fail later, train nothing or count wrongly: key -> (which values are
# allowed, in words).
RANGES: dict[str, tuple[Accepted, str]] = {
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), count(1)),
    "num_train_epochs": (lambda value: 0 < value <= LARGEST_COUNT, f"above 0, at most {LARGEST_COUNT:,}"),
    "max_steps": (
        lambda value: value == -1 or 1 <= value <= LARGEST_COUNT,
        f"at least 1, at most {LARGEST_COUNT:,}, or -1 for whole epochs",
    ),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "adam_epsilon"),
        (lambda value: 0 <= value < float("inf"), "a finite number from 0"),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (lambda value: 0 <= value < 1, "a number from 0 and below 1")),
    "max_grad_norm": (lambda value: value is None or value >= 0, "a number from 0; 0 to clip nothing"),
    "warmup_steps": (
        lambda value: value == 0 or _is_steps_or_share(value),
        "a whole number of optimiser steps, or a share of them below 1",
    ),
    **dict.fromkeys(
        ("logging_steps", "save_steps"),
        (
            lambda value: _is_steps_or_share(value),
            "a whole number of optimiser steps, or a share of them above 0 and below 1",
        ),
    ),
    "dataloader_num_workers": count(0),
    **dict.fromkeys(
        ("save_total_limit", "torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_bucket_cap_mb"),
        count(1, or_null=True),
    ),
    "ddp_timeout": count(1),
    "dataloader_multiprocessing_context": (
        lambda value: value in (None, "fork", "forkserver", "spawn"),
        "fork, forkserver or spawn",
    ),
    **dict.fromkeys(
        ("log_level", "log_level_replica"),
        (lambda value: value in _LOG_LEVELS, ", ".join(_LOG_LEVELS)),
    ),
    "include_num_input_tokens_seen": (
        lambda value: value in (False, True, "no", "all"),
        "no, or all. Tokens can't be counted without padding, because padding may be the end token",
    ),
}
RECIPE_RANGES: dict[str, tuple[Accepted, str]] = RANGES | {
    "save_strategy": (lambda value: value != "best", "no, steps or epoch: the last student is kept, not the best"),
}

_CHECKPOINTING = (
    "use_reentrant",
    "preserve_rng_state",
    "determinism_check",
    "debug",
    "early_stop",
    "every_n_layers",
    "offload",
)
_XLA = ("xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt", "xla_fsdp_settings")
# Keys that hold keys of their own: key -> these.
NESTED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), _CHECKPOINTING),
    "accelerator_config": (*_ACCELERATOR, "non_blocking", "gradient_accumulation_kwargs", "use_configured_state"),
    "fsdp_config": (
        "version", "reshard_after_forward", "cpu_offload", "auto_wrap_policy", "min_num_params",
        "transformer_layer_cls_to_wrap", "activation_checkpointing", "state_dict_type", "cpu_ram_efficient_loading",
        "forward_prefetch", "backward_prefetch", "use_orig_params", "sync_module_states", "limit_all_gathers", *_XLA,
    ),
}  # fmt: skip


def check_supported(arguments: Mapping[str, Any]) -> None:
    """Check values of ``TrainingArguments`` by their keys, and those that act only beside others.

    Raises:
        ValueError: selkd can't honour a value, no training could run with it, or it would change nothing; the message
            names the key.
    """
    for key, (is_accepted, instead) in REFUSED.items():
        if key in arguments and not is_accepted(arguments[key]):
            raise ValueError(f"{key}: {shown(arguments[key])} can't be honoured; {instead}.")
    for key, (is_allowed, allowed) in RANGES.items():
        if key in arguments and not _is_in(is_allowed, arguments[key]):
            raise ValueError(f"{key}: expected {allowed}, but got {shown(arguments[key])}.")
    for key in NESTED:
        if isinstance(arguments.get(key), Mapping):
            _check_nested(key, arguments[key])
    _check_together(arguments)


def check_accelerator(config: Any) -> None:
    """Raises ValueError for a value of an ``AcceleratorConfig``, or of its keys, that selkd can't honour."""
    given = config if isinstance(config, Mapping) else vars(config)
    for key, (kept, instead) in _ACCELERATOR.items():
        if given.get(key, kept) != kept:
            raise ValueError(f"accelerator_config.{key}: {shown(given[key])} can't be honoured; {instead}.")


def _check_nested(key: str, content: Mapping[str, Any]) -> None:
    """Raises ValueError for a key that Transformers and Accelerate would ignore, or fail on late."""
    for name in content:
        if str(name).removeprefix("fsdp_" if key == "fsdp_config" else "") not in NESTED[key]:
            allowed = ", ".join(NESTED[key])
            raise ValueError(f"{key}.{name}: unknown key. Allowed here: {allowed}.{nearest(name, NESTED[key])}")
    if key == "accelerator_config":
        check_accelerator(content)


def _check_together(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for a value without effect beside the others, or that fails beside them late."""
    if not arguments.get("dataloader_num_workers", 0):
        for key in (
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
        ):
            if arguments.get(key):
                raise ValueError(f"{key}: only processes of the data loader have it; set dataloader_num_workers, too.")
    if not (arguments.get("activation_checkpointing") or arguments.get("gradient_checkpointing")):
        for key in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if arguments.get(key):
                raise ValueError(f"{key}: without effect; set {key.removesuffix('_kwargs')}: true, too.")
    schedule = getattr(arguments.get("lr_scheduler_type"), "value", arguments.get("lr_scheduler_type"))
    if schedule == "constant" and arguments.get("warmup_steps"):
        raise ValueError("warmup_steps: the schedule constant has none; set lr_scheduler_type: constant_with_warmup.")
    if schedule in ("constant", "constant_with_warmup") and arguments.get("lr_scheduler_kwargs"):
        raise ValueError(f"lr_scheduler_kwargs: the schedule {schedule} has none; leave it out.")


def _is_steps_or_share(value: float) -> bool:
    return 0 < value < 1 or (1 <= value <= LARGEST_COUNT and value == int(value))


def _is_in(is_allowed: Accepted, value: Any) -> bool:
    try:
        return is_allowed(value)
    except TypeError:  # no number at all
        return False


def check_training(content: Any) -> dict[str, Any]:
    """The recipe's ``training`` with every value coerced to its type; Transformers is not imported.

    Raises:
        ValueError: TrainingArguments lacks a key, a recipe may not set it, or its value is of the wrong type or refused
            by ``check_supported``. All such keys are named, one on a line.
    """
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"training: expected keys of transformers.TrainingArguments, but got {shown(content)}")
    checked, faults = {}, []
    for key, value in content.items():
        try:
            checked[key] = _checked(key, value)
        except ValueError as error:
            faults.append(f"training.{error}")
    if faults:
        raise ValueError("\n".join(faults))
    try:
        check_supported(checked)
        if checked.get("fsdp_config") and not checked.get("fsdp"):
            raise ValueError("fsdp_config: without effect; set fsdp, too.")
    except ValueError as error:
        raise ValueError(f"training.{error}") from None
    return checked


def _checked(key: str, value: Any) -> Any:
    keys = training_keys()
    if key in OWNED or key in REFUSED:
        raise ValueError(f"{key}: not set here; {OWNED[key] if key in OWNED else REFUSED[key][1]}.")
    if key not in keys:
        names = [name for name in keys if name not in OWNED and name not in REFUSED]
        raise ValueError(
            f"{cut(key)}: unknown key. Allowed: the names of transformers.TrainingArguments.{nearest(key, names)}"
        )
    if key in NESTED and isinstance(value, str):
        raise ValueError(f"{key}: expected a mapping, but got {shown(value)}; write its keys here.")
    try:
        checked = keys[key].validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{key}: {reason(error.errors()[0])}") from None
    is_allowed, allowed = RECIPE_RANGES.get(key, (lambda _: True, ""))
    if not _is_in(is_allowed, checked):
        raise ValueError(f"{key}: expected {allowed}, but got {shown(value)}.")
    return checked
