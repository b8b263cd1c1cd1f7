"""DeepSpeed's ZeRO beside the chunked loss: stages 1 and 2 leave every process the whole head; the rest is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from selkd.errors import InputError
from selkd.extras import is_installed, need


def require_zero(args: TrainingArguments) -> None:
    """Check the configuration of DeepSpeed that these arguments give, if they give one.

    Raises:
        InputError: DeepSpeed is not installed, its configuration can't be read, splits the weights or rounds them, or
            the training writes checkpoints.
    """
    if args.deepspeed is None:
        return
    if not is_installed("deepspeed"):
        raise InputError(f"deepspeed: ZeRO {need('deepspeed')}.")
    config = _content(args.deepspeed)
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    if stage not in (0, 1, 2):
        raise InputError(
            f"deepspeed: ZeRO stage {stage} splits the head over the processes, and the loss reads it whole. Take "
            "stage 1 or 2, or fsdp, which gathers the head."
        )
    for name in ("fp16", "bf16"):
        if (config.get(name) or {}).get("enabled") is True or (name == "bf16" and args.bf16):
            raise InputError(
                f"deepspeed: its {name} holds the student's weights in that precision, in which small updates round to "
                "nothing. Leave it out, and bf16 too: products run in float32. With bf16, use fsdp."
            )
    if str(getattr(args.save_strategy, "value", args.save_strategy)) != "no":
        raise InputError(
            "deepspeed: its checkpoints are in parts that selkd neither seals nor resumes from. Set "
            "save_strategy='no', and save the student at the end (save_model)."
        )


def _content(given: Any) -> Mapping[str, Any]:
    if isinstance(given, Mapping):
        return given
    try:
        content = json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"deepspeed: {given} can't be read as JSON ({error}).") from None
    if not isinstance(content, Mapping):
        raise InputError(f"deepspeed: {given} is no mapping of DeepSpeed's keys.")
    return content
