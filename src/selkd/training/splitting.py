"""How several processes may split a training: samples always, the student's weights by FSDP2; the rest is refused."""

import os
from typing import Any

from accelerate import ParallelismConfig
from accelerate.utils import parse_flag_from_env
from transformers import PreTrainedModel, TrainingArguments

from selkd.errors import InputError

_LAUNCHED = "ACCELERATE_USE_PARALLELISM_CONFIG"
# A size of ``ParallelismConfig`` -> why it can't be more than one.
_REFUSED = {
    "tp_size": "tensor parallelism splits the head, which the loss reads whole, and gives several processes one sample",
    "cp_size": "context parallelism splits a sample, whose positions are selected as a whole",
    "sp_size": "sequence parallelism splits a sample, whose positions are selected as a whole",
}


def is_sharded(args: TrainingArguments) -> bool:
    """Whether these arguments or the launcher ask FSDP to shard the student."""
    return bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def require_supported_split(args: TrainingArguments) -> None:
    """Check how arguments and launcher ask for FSDP and for a mesh of processes.

    Raises:
        InputError: FSDP1, or a state dict that FSDP2 lacks; a mesh that splits more than samples and weights, that does
            not fit the number of processes, or that shards nothing.
    """
    if is_sharded(args):
        _require_fsdp2(args.fsdp_plugin_args or {})
    config, name = args.parallelism_config, "parallelism_config"
    if config is None and parse_flag_from_env(_LAUNCHED):
        config, name = _launched_parallelism(), _LAUNCHED
    if config is not None:
        _require_data_parallel(config, name, args)


def _require_fsdp2(plugin: dict[str, Any]) -> None:
    version = str(plugin.get("fsdp_version", os.environ.get("FSDP_VERSION", "1")))
    if version != "2":
        raise InputError(
            f"fsdp_config.version: {version} can't be honoured: Transformers gives FSDP1 up, and selkd was not tested "
            "with it. Set version: 2, or launch with --fsdp_version 2."
        )
    kind = str(plugin.get("state_dict_type", os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")))
    if kind not in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        raise InputError(
            f"fsdp_config.state_dict_type: FSDP2 has no {kind}; take FULL_STATE_DICT, or SHARDED_STATE_DICT."
        )


def _launched_parallelism() -> ParallelismConfig:
    try:
        return ParallelismConfig()  # of the environment
    except ValueError as error:
        raise InputError(f"{_LAUNCHED}: {error}.") from None


def _require_data_parallel(config: ParallelismConfig, name: str, args: TrainingArguments) -> None:
    for size, reason in _REFUSED.items():
        if getattr(config, size) > 1:
            raise InputError(f"{name}: {size} = {getattr(config, size)} can't be honoured: {reason}. Set it to 1.")
    if not is_sharded(args) or config.dp_shard_size == 1:
        raise InputError(
            f"{name}: shards nothing. Give dp_shard_size above 1 beside fsdp; several processes without it are DDP, "
            "which needs no parallelism_config."
        )
    if config.total_size != args.world_size:
        raise InputError(
            f"{name}: dp_replicate_size = {config.dp_replicate_size} times dp_shard_size = {config.dp_shard_size} "
            f"is {config.total_size}, and there are {args.world_size} processes. Make both alike."
        )


def require_whole(model: PreTrainedModel, name: str) -> None:
    """Raises InputError for a model, called ``name``, that Transformers split over processes while loading it."""
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise InputError(
            f"{name}: it was loaded in parts over several processes (tp_plan, distributed_config), and each process "
            "has samples of its own. Load it whole; FSDP shards a student, and a teacher may have a device_map."
        )
