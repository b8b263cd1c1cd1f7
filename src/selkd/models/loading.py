"""Models from disk into memory, in the dtype that suits the device."""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from selkd.errors import InputError
from selkd.models.quantisation import quantization_config, require_quantization
from selkd.models.sources import ModelSource

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
# The names that torch.cpu.get_capabilities() gives to bf16 arithmetic.
_X86_BF16 = ("avx512_bf16", "amx_bf16")
_ARM_BF16 = ("bf16", "sve_bf16")
# What torch.backends.cpu.get_cpu_capability() answers on x86 where PyTorch runs no AVX-512 kernels: the processor has
# none, or ATEN_CPU_CAPABILITY keeps PyTorch from them. Without vector extensions ARM is "DEFAULT", too.
_BELOW_AVX512 = ("AVX2", "DEFAULT", "NO AVX")


def native_dtype(device: torch.device) -> torch.dtype:
    """torch.bfloat16 where the device computes in it, else torch.float32: emulated bf16 is the slower of the two.

    On x86 ``ATEN_CPU_CAPABILITY=avx2`` makes of a processor with AVX-512 or AMX one without, here as in PyTorch.
    """
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # PyTorch versions without this function can't tell; float32 is right on every CPU.
        capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(capabilities.get(name) for name in _ARM_BF16)
        if torch.backends.cpu.get_cpu_capability() not in _BELOW_AVX512:
            native = native or any(capabilities.get(name) for name in _X86_BF16)
    return torch.bfloat16 if native else torch.float32


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called ``name``; "auto" is the device's native one.

    Raises:
        InputError: an unknown name.
    """
    if name == "auto":
        return native_dtype(device)
    if name not in _DTYPES:
        raise InputError(f"dtype {name!r} is unknown: expected one of auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def require_device(key: str, device: torch.device) -> None:
    """Raises InputError, which names ``key``, where this machine has no such device."""
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"{key}: {device}, but there are {torch.cuda.device_count()} CUDA devices. Give one that is here, or leave "
            "it out for the student's."
        )


def load_model(
    source: ModelSource, dtype: torch.dtype, device: torch.device, quantization: str | None = None
) -> PreTrainedModel:
    """The causal language model of ``source``, in eval mode.

    Args:
        quantization: as a recipe's ``teacher.quantization``; of the layers, never of the head.

    Raises:
        InputError: not a causal language model that this Transformers knows, damaged weights, or weights missing
            (Transformers would fill them with random numbers).
    """
    options: dict[str, Any] = {}
    if quantization is not None:
        require_quantization(quantization, device)
        options = {"quantization_config": quantization_config(quantization, dtype), "device_map": {"": device}}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise InputError(
            f"model {source.name!r} can't be loaded as a causal language model from {source.path}: {error}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise InputError(
            f"model {source.name!r}: {len(missing)} weights of {type(model).__name__} are not in "
            f"{source.path} ({shown}). The files are incomplete or belong to another kind of model."
        )
    return (model if options else model.to(device)).eval()


def n_parameters(model: torch.nn.Module) -> int:
    """The number of parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def read_config(source: ModelSource) -> Any:
    """The model's configuration; no weights are read. Raises InputError if this Transformers doesn't know it."""
    try:
        return AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {source.name!r}: its configuration can't be read from {source.path}: {error}"
        ) from error


def n_rows(source: ModelSource) -> int:
    """How many classes the model's head has. Raises as ``read_config``."""
    return int(read_config(source).get_text_config(decoder=True).vocab_size)


def n_positions(source: ModelSource) -> int | None:
    """How many positions the model was made for; None if its configuration names no limit. Raises as ``n_rows``."""
    return _limit(read_config(source))


def window_of(model: Any) -> int | None:
    """``n_positions`` of a model in memory, with adapters or without; None of what is no model, such as a cache."""
    config = getattr(model, "config", None)
    return None if config is None else _limit(config)


def _limit(config: Any) -> int | None:
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if limit is None else int(limit)
