"""DistillKit's compressed distributions, as its Parquet files hold them: two codecs, read by their public description.

The bytes of a position, in the present codec (columns ``compressed_logprobs`` and ``bytepacked_indices``): the first
``exact_k`` log-probabilities as they are, the coefficients of a curve through the others, then for each bin of
residuals a scale and the residuals in a few bits, the highest bit first. With ``delta_encoding`` these are differences,
summed up at the end. The classes' ids are packed in ceil(log2 d) bits, the highest first. In the legacy codec the ids
are packed into 64-bit words, the lowest bits first, and the curve stands for all but the exact values.

Shapes: n positions, k classes, b bytes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from selkd.errors import InputError
from selkd.recipe.part import Count, Part, parse_part
from selkd.recipe.yaml_text import parse_yaml

CONFIG = "compression_config.yaml"  # DistillKit's name for it, in the folder of the Parquet files
Dtype = Literal["float16", "bfloat16", "float32", "float64"]
Decoded = tuple[np.ndarray, np.ndarray]  # class ids int64 and values float64, both [n, k]


class ResidualBin(Part):
    """Residuals that share a scale."""

    scale_dtype: Dtype
    element_bits: int = Field(ge=1, le=63)
    num_elements: Count


class Compression(Part):
    """How the present codec's values are stored."""

    d: Count
    k: Count
    exact_k: int = Field(ge=0)
    exact_dtype: Dtype = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: Dtype = "float32"
    residual_bins: list[ResidualBin]
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @model_validator(mode="after")
    def _possible(self) -> "Compression":
        if self.exact_k + sum(part.num_elements for part in self.residual_bins) > self.k:
            raise ValueError("exact_k and the bins' num_elements: more than k")
        return self

    @property
    def value_bytes(self) -> int:
        """b, of the values of a position."""
        terms = len(self.polynomial_terms or []) * _dtype(self.term_dtype).itemsize
        packed = sum((part.element_bits * part.num_elements + 7) // 8 for part in self.residual_bins)
        scales = sum(_dtype(part.scale_dtype).itemsize for part in self.residual_bins)
        return self.exact_k * _dtype(self.exact_dtype).itemsize + terms + packed + scales


class LegacyCompression(Part):
    """How the legacy codec's values are stored."""

    k: Count
    exact_k: int = Field(ge=0)
    polynomial_degree: int = Field(ge=0, le=64)
    vocab_size: Count
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: Dtype = "float32"


def read_compression(path: Path) -> Compression | LegacyCompression:
    """The configuration in a file. Raises InputError if it is none."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected DistillKit's configuration of its compression ({error}).") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected DistillKit's configuration of its compression, a mapping.")
    if "polynomial_degree" in content:
        return parse_part(LegacyCompression, content, path.name)
    return parse_part(Compression, content, path.name)


def decode(config: Compression, values: np.ndarray, ids: np.ndarray) -> Decoded:
    """The present codec's uint8 [n, b] values and ids."""
    left = torch.from_numpy(np.array(values))
    class_ids = _unpack(ids, int(np.ceil(np.log2(np.float32(config.d)))), config.k)  # in float32, as it is written
    if left.shape[1] < config.value_bytes:
        raise InputError(
            f"DistillKit: a position has {left.shape[1]} bytes of values, and by the configuration "
            f"{config.value_bytes}: it is another file's"
        )

    def take(count: int, dtype: torch.dtype) -> Tensor:
        nonlocal left
        size = count * dtype.itemsize
        # Not ``contiguous()``: of a single row it keeps the stride, and other dtypes can't be seen in it.
        taken, left = left[:, :size].clone(memory_format=torch.contiguous_format), left[:, size:]
        return taken.view(dtype) if count else torch.zeros(len(taken), 0, dtype=dtype)

    out = _dtype(config.exact_dtype)
    exact = take(config.exact_k, out)
    others = config.k - config.exact_k
    terms = config.polynomial_terms or []
    coefficients = take(len(terms), _dtype(config.term_dtype))
    residuals = []
    for part in config.residual_bins:
        scale = take(1, _dtype(part.scale_dtype))
        packed = take((part.element_bits * part.num_elements + 7) // 8, torch.uint8)
        numbers = torch.from_numpy(_unpack(packed.numpy(), part.element_bits, part.num_elements))
        # One bit is a sign; more are a signed number whose lowest value is written as 0.
        numbers = numbers * 2 - 1 if part.element_bits == 1 else numbers - 2 ** (part.element_bits - 1)
        residuals.append(numbers.float() * scale)
    residual = torch.cat([*residuals, torch.zeros(len(exact), others - sum(r.shape[1] for r in residuals))], dim=1)
    approximate = residual.to(out)
    if terms:
        dtype = _dtype(config.term_dtype)
        points = torch.linspace(0, 1, others, dtype=dtype) if config.normalize_t else torch.arange(others, dtype=dtype)
        curves: dict[Any, Callable[[Tensor], Tensor]] = {"sqrt": torch.sqrt, "exp": torch.exp}
        curve = torch.stack([curves[t](points) if t in curves else points ** int(t) for t in terms], dim=-1)
        approximate = (curve * coefficients[:, None]).sum(dim=-1) + approximate
    whole = torch.cat([exact, approximate], dim=1)
    if config.delta_encoding:
        whole = whole.float().cumsum(dim=1).to(out)
    return class_ids, whole.double().numpy()


def decode_legacy(config: LegacyCompression, packed: np.ndarray, exact: np.ndarray, terms: np.ndarray) -> Decoded:
    """The legacy codec's words uint64 [n, w], exact values [n, exact_k] and coefficients [n, terms]."""
    bits = int(np.ceil(np.log2(np.float32(config.vocab_size))))
    in_word = np.arange(64 // bits, dtype=np.uint64) * np.uint64(bits)
    ids = (packed[:, :, None] >> in_word) & np.uint64(2**bits - 1)
    ids = ids.reshape(len(packed), -1)[:, : config.k].astype(np.int64)
    points = torch.arange(config.k - config.exact_k, dtype=torch.float32) + 1
    sign = -1 if config.invert_polynomial else 1
    curves = [points ** (sign * degree) for degree in range(config.polynomial_degree + 1)]
    if config.with_sqrt_term:
        curves.append(points.sqrt())
    if ids.shape[1] != config.k or exact.shape[1] != config.exact_k or (len(points) and terms.shape[1] != len(curves)):
        raise InputError("DistillKit: the columns' widths are not those of the configuration: it is another file's")
    values = [torch.from_numpy(exact.astype(np.float32))]
    if len(points):
        dtype = _dtype(config.term_dtype)
        curve = torch.stack(curves, dim=-1).to(dtype)
        values.append((curve * torch.from_numpy(terms.astype(np.float32))[:, None]).sum(dim=-1).float())
    return ids, torch.cat(values, dim=1).double().numpy()


def _unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """``count`` integers of ``bits`` bits, int64 [n, count], from uint8 [n, b]; the highest bit comes first."""
    if packed.shape[1] * 8 < bits * count:
        raise InputError(
            f"DistillKit: {packed.shape[1]} bytes hold no {count} numbers of {bits} bits: the configuration is another "
            "file's"
        )
    flags = np.unpackbits(np.ascontiguousarray(packed), axis=1, count=bits * count).reshape(len(packed), count, bits)
    numbers = np.zeros(flags.shape[:2], np.int64)
    for place in range(bits):
        numbers = (numbers << 1) | flags[:, :, place]
    return numbers


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype
