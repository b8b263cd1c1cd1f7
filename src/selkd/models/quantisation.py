"""A teacher in fewer bits: the package that quantises it, the devices, and Transformers' configuration."""

from typing import Any

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from selkd.errors import InputError
from selkd.extras import is_installed, need

# The package of each name in a recipe.
_PACKAGES = {
    "torchao_int8": "torchao",
    "bitsandbytes_8bit": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
}
# The settings that decide a quantised teacher's numbers beside its name; they are part of every fingerprint.
_FORMS = {"bitsandbytes_8bit": "no outliers apart", "bitsandbytes_4bit": "nf4"}


def precision_of(dtype: torch.dtype, quantization: str | None) -> str:
    """A teacher's dtype and quantisation in words: everything but its weights that changes its distribution."""
    return " ".join(filter(None, (str(dtype), quantization, _FORMS.get(quantization or ""))))


def require_quantization(quantization: str, device: torch.device) -> None:
    """Raises InputError unless the package is installed and can compute on the device."""
    if device.type not in ("cpu", "cuda"):
        raise InputError(
            f"teacher.quantization: {quantization} runs on the CPU and on CUDA, and the teacher is on {device}. Leave "
            "it out; a .gguf file (teacher.model) is read anywhere."
        )
    package = _PACKAGES[quantization]
    if not is_installed(package):
        raise InputError(f"teacher.quantization: {quantization} {need(package)}")


def quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    """The configuration with which ``from_pretrained`` quantises linear layers; products are in ``dtype``.

    Transformers itself leaves out the head, which the loss reads as a plain linear layer.
    """
    if quantization == "torchao_int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if quantization == "bitsandbytes_8bit":
        # With the usual threshold, columns with outliers are computed apart. The whole batch is searched for them, so a
        # sample's distribution would depend on the other samples.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
