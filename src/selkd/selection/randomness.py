"""Random numbers of a sample: a function of (seed, sample id, stream), never drawn from a shared generator.

So they do not depend on the batch, the padding, the order or the rank in which a sample is processed.
"""

import numpy as np
import xxhash


def sample_generator(seed: int, sample_id: bytes, *stream: int | str) -> np.random.Generator:
    """A generator for one sample. ``stream`` names the use: what is drawn, and at which optimiser step."""
    key = xxhash.xxh3_128_digest(sample_id + repr((seed, *stream)).encode())
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype="<u8")))


def position_uniforms(
    seed: int, sample_ids: np.ndarray, valid_mask: np.ndarray, *stream: int | str, draws: int | None = None
) -> np.ndarray:
    """Uniforms in [0, 1) at the valid positions, 0 elsewhere: float64 [B, T], or [B, T, draws].

    The numbers of the i-th valid position of a sample do not depend on padding.

    Args:
        sample_ids: uint8 [B, 16].
        valid_mask: bool [B, T].
    """
    trailing = () if draws is None else (draws,)
    uniforms = np.zeros((*valid_mask.shape, *trailing))
    for row, (sample_id, valid) in enumerate(zip(sample_ids, valid_mask, strict=True)):
        generator = sample_generator(seed, sample_id.tobytes(), *stream)
        uniforms[row, valid] = generator.random((int(valid.sum()), *trailing))
    return uniforms


def draw_uniforms(seed: int, sample_ids: np.ndarray, draws: np.ndarray, *stream: int | str) -> np.ndarray:
    """As many uniforms in [0, 1) for each sample as ``draws`` [B] says, then zeros: float64 [B, max draws]."""
    uniforms = np.zeros((len(draws), int(draws.max(initial=0))))
    for row, (sample_id, count) in enumerate(zip(sample_ids, draws.tolist(), strict=True)):
        uniforms[row, :count] = sample_generator(seed, sample_id.tobytes(), *stream).random(count)
    return uniforms
