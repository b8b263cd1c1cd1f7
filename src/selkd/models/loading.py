"""Loads models from disk into memory, in the dtype that suits the device."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from selkd.errors import InputError, shown
from selkd.models.quantisation import quantization_config, require_quantization
from selkd.models.sources import ModelSource
from selkd.recipe.part import LARGEST_COUNT

# The sizes in a configuration that decide how much memory a model takes; a family may lack some.
_SIZES = ("hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
# The names of bf16 arithmetic in torch.cpu.get_capabilities().
_X86_BF16 = ("avx512_bf16", "amx_bf16")
_ARM_BF16 = ("bf16", "sve_bf16")
# The answers of torch.backends.cpu.get_cpu_capability() on x86 if PyTorch runs no AVX-512 kernels, because the CPU has
# none or ATEN_CPU_CAPABILITY forbids them. ARM without vector extensions is "DEFAULT", too.
_BELOW_AVX512 = ("AVX2", "DEFAULT", "NO AVX")


def native_dtype(device: torch.device) -> torch.dtype:
    """torch.bfloat16 if the device computes in it, else torch.float32, which is faster than emulated bf16.

    On x86, ``ATEN_CPU_CAPABILITY=avx2`` switches AVX-512 and AMX off, here as in PyTorch.
    """
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # Without this function, PyTorch can't tell; float32 is right on every CPU.
        capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(capabilities.get(name) for name in _ARM_BF16)
        if torch.backends.cpu.get_cpu_capability() not in _BELOW_AVX512:
            native = native or any(capabilities.get(name) for name in _X86_BF16)
    return torch.bfloat16 if native else torch.float32


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called ``name``; "auto" is the device's native dtype. Raises InputError if the name is unknown."""
    if name == "auto":
        return native_dtype(device)
    if name not in _DTYPES:
        raise InputError(f"dtype {name!r} is unknown: expected one of auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def require_device(key: str, device: torch.device) -> None:
    """Raises InputError, which names ``key``, if this machine does not have the device."""
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"{key}: {device}, but there are {torch.cuda.device_count()} CUDA devices. Give one that is here, or "
            "leave it out to use the student's."
        )


def load_model(
    source: ModelSource, dtype: torch.dtype, device: torch.device, quantization: str | None = None
) -> PreTrainedModel:
    """The causal language model of ``source``, in eval mode.

    Args:
        quantization: a recipe's ``teacher.quantization``, which quantises the layers but not the head.

    Raises:
        InputError: this version of Transformers knows no such causal language model, or weights are damaged or missing
            (Transformers would fill them with random numbers).
    """
    read_config(source)  # sizes that no weights can have would fill the memory first
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
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # damaged files make Transformers stumble in every way
        raise InputError(
            f"model {source.name!r} can't be loaded as a causal language model from {source.path}: {error}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise InputError(
            f"model {source.name!r}: {len(missing)} weights of {type(model).__name__} are not in "
            f"{source.path} ({shown}). The files are incomplete or belong to a model of another kind."
        )
    return (model if options else model.to(device)).eval()


def n_parameters(model: torch.nn.Module) -> int:
    """The number of parameters; tied parameters are counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def read_config(source: ModelSource) -> Any:
    """The model's configuration.

    Raises:
        InputError: this version of Transformers does not know it, a size in it is none, or the weight files can't hold
            a model of these sizes.
    """
    try:
        config = AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
        sizes = {name: getattr(config.get_text_config(decoder=True), name, None) for name in _SIZES}
    except Exception as error:  # a damaged file makes Transformers stumble in every way
        raise InputError(
            f"model {source.name!r}: its configuration can't be read from {source.path} "
            f"({type(error).__name__}: {error})."
        ) from error
    for name, size in sizes.items():
        if size is not None and not (isinstance(size, int) and 1 <= size <= LARGEST_COUNT):
            raise InputError(
                f"model {source.name!r}: {name} in {source.path / 'config.json'} is {shown(size)}, expected a whole "
                f"number from 1 to {LARGEST_COUNT:,}."
            )
    _require_weights_for(sizes, source)
    return config


def _require_weights_for(sizes: Mapping[str, int | None], source: ModelSource) -> None:
    """Raises InputError if the weight files are too small for the embeddings and one number a layer and channel."""
    channels, classes, layers = (sizes[name] or 0 for name in ("hidden_size", "vocab_size", "num_hidden_layers"))
    bits = 8 * sum(file.stat().st_size for file in source.path.glob("*.safetensors"))
    if bits and channels * (classes + layers) > bits:  # no weight has less than a bit
        given = ", ".join(f"{name} = {size:,}" for name, size in sizes.items() if size is not None)
        raise InputError(
            f"model {source.name!r}: {source.path / 'config.json'} describes a model ({given}) that its weight files, "
            f"{bits // 8:,} bytes, can't hold. Give the configuration that belongs to these weights."
        )


def n_rows(source: ModelSource) -> int:
    """The number of classes of the model's head. Raises as ``read_config``."""
    return int(read_config(source).get_text_config(decoder=True).vocab_size)


def n_layers(source: ModelSource) -> int:
    """The number of the model's layers. Raises as ``read_config``."""
    return int(read_config(source).get_text_config(decoder=True).num_hidden_layers)


def n_positions(source: ModelSource) -> int | None:
    """The most positions that the model takes; None if its configuration has no limit. Raises as ``read_config``."""
    return _limit(read_config(source))


def window_of(model: Any) -> int | None:
    """``n_positions`` of a model in memory; None for an object that is no model, such as a teacher's cache."""
    config = getattr(model, "config", None)
    return None if config is None else _limit(config)


def _limit(config: Any) -> int | None:
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if limit is None else int(limit)
