"""What the host knows of a batch's documents, told to Transformers, which would wait for the device to find out."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import masking_utils

_ASKED = "find_packed_sequence_indices"  # what Transformers calls with the position ids, before the first layer


@contextmanager
def documents_known(position_ids: Tensor) -> Iterator[None]:
    """Within the block, a body that runs on a batch need not ask its position ids whether samples are packed.

    Transformers reads the answer from the device: at the teacher's body the host waits for the step before, at the
    student's for the teacher.

    Args:
        position_ids: the batch's, [B, T], on the CPU; from 0 in each document and in the padding.
    """
    own = getattr(masking_utils, _ASKED, None)
    if own is None:  # this version asks otherwise, or not at all
        yield
        return
    has_one_each = bool((position_ids.diff(dim=-1) == 1).all())
    setattr(masking_utils, _ASKED, _one_document if has_one_each else _documents)
    try:
        yield
    finally:
        setattr(masking_utils, _ASKED, own)


def _documents(position_ids: Tensor) -> Tensor:
    """The number of the document that each token belongs to, [B, T]; only tokens of one document see each other."""
    return (position_ids == 0).cumsum(dim=-1)


def _one_document(position_ids: Tensor) -> None:
    """What stands for: each row is one document, so that the causal mask is enough."""
