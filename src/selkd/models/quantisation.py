"""A teacher in fewer bits: which package does it, where it runs, and how Transformers is asked for it."""

from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from selkd.errors import InputError

# The package of each name in a recipe, and the extra of selkd that brings it.
_PACKAGES = {
    "torchao_int8": ("torchao", "quantised"),
    "bitsandbytes_8bit": ("bitsandbytes", "bitsandbytes"),
    "bitsandbytes_4bit": ("bitsandbytes", "bitsandbytes"),
}
# What beside the name decides a quantised teacher's numbers: part of its precision's name, so of every fingerprint.
_FORMS = {"bitsandbytes_8bit": "no outliers apart", "bitsandbytes_4bit": "nf4"}


def precision_of(dtype: torch.dtype, quantization: str | None) -> str:
    """A teacher's dtype and form, in words: what beside its weights moves its distribution."""
    return " ".join(filter(None, (str(dtype), quantization, _FORMS.get(quantization or ""))))


def require_quantization(quantization: str, device: torch.device) -> None:
    """Raises InputError unless the package is there and the device is one that it computes on."""
    if device.type not in ("cpu", "cuda"):
        raise InputError(
            f"teacher.quantization: {quantization} runs on the CPU and on CUDA, and the teacher is on {device}. Leave "
            "it out; a .gguf file (teacher.model) is read anywhere."
        )
    package, extra = _PACKAGES[quantization]
    if find_spec(package) is None:
        raise InputError(
            f"teacher.quantization: {quantization} needs the package {package}: pip install 'selkd[{extra}]'"
        )


def quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    """What ``from_pretrained`` takes to quantise the linear layers as they are read; products are in ``dtype``.

    Transformers leaves the head out by itself, whatever its name: the loss reads it as a plain linear layer.
    """
    if quantization == "torchao_int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if quantization == "bitsandbytes_8bit":
        # At the usual threshold it keeps columns with outliers apart, and looks for them in the whole batch: what the
        # teacher says of a sample would depend on the samples beside it.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
