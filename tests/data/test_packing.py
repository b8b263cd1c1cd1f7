"""Packing and splitting lose nothing but what they say; batches shift, mask and number positions as defined."""

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from selkd.data.collate import collate
from selkd.data.packing import pack, split
from selkd.data.samples import EMPTY_SAMPLE, Sample
from selkd.errors import InputError

PAD = 0  # also the end-of-sequence token of the documents below
DOCUMENTS = st.lists(st.lists(st.integers(0, 99), max_size=12), max_size=8)
LENGTHS = st.integers(2, 9)
SIDES = st.sampled_from(["left", "right"])


def pieces(one: Sample) -> list[list[int]]:
    """The documents of a sample."""
    return [part.tolist() for part in np.split(one.token_ids, one.document_starts[1:])]


@given(DOCUMENTS, LENGTHS)
def test_packing_keeps_every_token_in_order_but_for_the_tail(documents: list[list[int]], length: int) -> None:
    packed = list(pack(documents, length))
    everything = [token for document in documents for token in document]
    assert all(len(one.token_ids) == length for one in packed)
    kept = [token for one in packed for token in one.token_ids.tolist()]
    assert kept == everything[: len(everything) // length * length]


@given(DOCUMENTS, LENGTHS)
def test_packing_puts_borders_at_documents_and_windows_only(documents: list[list[int]], length: int) -> None:
    ends = np.cumsum([len(document) for document in documents if document]).tolist()
    document_borders = {0, *ends}
    for index, one in enumerate(pack(documents, length)):
        begin = index * length
        expected = {0} | {border - begin for border in document_borders if begin <= border < begin + length}
        assert set(one.document_starts.tolist()) == expected


@given(DOCUMENTS, LENGTHS)
def test_splitting_loses_only_pieces_of_one_token(documents: list[list[int]], length: int) -> None:
    found = [one.token_ids.tolist() for one in split(documents, length)]
    expected = []
    for document in documents:
        rest = document
        while rest:
            expected.append(rest[:length])
            rest = rest[length:]
    assert found == [piece for piece in expected if len(piece) > 1]
    assert all(one.document_starts.tolist() == [0] for one in split(documents, length))


def test_packing_reads_no_more_documents_than_it_needs() -> None:
    read = []

    def stream() -> "list[int]":
        for number in range(100):
            read.append(number)
            yield [number] * 5

    windows = pack(stream(), 10)
    assert pieces(next(windows)) == [[0] * 5, [1] * 5]
    assert read == [0, 1]


@given(DOCUMENTS, LENGTHS, SIDES, st.integers(0, 3))
def test_a_batch_is_its_samples_shifted_within_documents(
    documents: list[list[int]], length: int, side: Literal["left", "right"], extra: int
) -> None:
    samples = [EMPTY_SAMPLE, *pack(documents, length), *split(documents, length)]
    width = max(len(one.token_ids) for one in samples) + extra
    batch = collate(samples, PAD, padding_side=side, pad_to=width)
    for row, one in enumerate(samples):
        # The truth, written out token by token from the documents.
        tokens, positions, targets, valid = [], [], [], []
        for piece in pieces(one):
            tokens += piece
            positions += range(len(piece))
            targets += [*piece[1:], PAD]
            valid += [True] * (len(piece) - 1) + [False]
        fill = width - len(tokens)
        padding = ([PAD] * fill, list(range(fill)), [PAD] * fill, [False] * fill)
        columns = ("input_ids", "position_ids", "targets", "valid_mask")
        for name, real, pad in zip(columns, (tokens, positions, targets, valid), padding, strict=True):
            expected = pad + real if side == "left" else real + pad
            assert batch[name][row].tolist() == expected, name
        assert bytes(batch["sample_ids"][row].tolist()) == one.id


def test_types_and_shapes_and_no_attention_mask() -> None:
    batch = collate([Sample(np.array([3, 4, 5]), np.array([0])), EMPTY_SAMPLE], PAD)
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()}
    assert kinds == {
        "input_ids": (torch.int64, (2, 3)),
        "position_ids": (torch.int64, (2, 3)),
        "targets": (torch.int64, (2, 3)),
        "valid_mask": (torch.bool, (2, 3)),
        "sample_ids": (torch.uint8, (2, 16)),
    }


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_end_token_that_is_also_the_pad_token_is_still_a_target(side: Literal["left", "right"]) -> None:
    batch = collate([Sample(np.array([3, PAD, 4, PAD]), np.array([0, 2]))], PAD, padding_side=side, pad_to=6)
    assert batch["targets"][batch["valid_mask"]].tolist() == [PAD, PAD]
    where = slice(2, None) if side == "left" else slice(None, 4)
    assert batch["valid_mask"][0, where].tolist() == [True, False, True, False]
    assert batch["valid_mask"].sum() == 2


@given(DOCUMENTS, LENGTHS, SIDES)
def test_an_id_does_not_depend_on_batch_order_or_padding(
    documents: list[list[int]], length: int, side: Literal["left", "right"]
) -> None:
    samples = [*split(documents, length), EMPTY_SAMPLE]
    together = collate(samples[::-1], PAD, padding_side=side, pad_to=20)["sample_ids"].flip(0)
    for row, one in enumerate(samples):
        assert torch.equal(collate([one], PAD)["sample_ids"][0], together[row])


def test_bad_batches_are_refused() -> None:
    one = Sample(np.array([3, 4, 5]), np.array([0]))
    with pytest.raises(InputError, match="pad_to: expected at least 3, the longest sample's tokens, got 2"):
        collate([one], PAD, pad_to=2)
    with pytest.raises(InputError, match="padding_side: expected 'left' or 'right', got 'top'"):
        collate([one], PAD, padding_side="top")
    with pytest.raises(InputError, match="expected at least one sample"):
        collate([], PAD)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,  # large enough that attention to another document would show
    )
    return LlamaForCausalLM(config).float().eval()


@torch.no_grad()
def logits(model: LlamaForCausalLM, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_documents_do_not_see_each_other_nor_the_padding(
    llama: LlamaForCausalLM, side: Literal["left", "right"]
) -> None:
    documents = [[5, 6, 7, 8, 1], [9], [11, 12, 13, 1], [20, 21, 22, 23, 24, 1]]
    (packed,) = pack(documents, 16)
    batch = collate([packed, EMPTY_SAMPLE], 1, padding_side=side, pad_to=21)
    found = logits(llama, batch["input_ids"], batch["position_ids"])[0]
    found = found[5:] if side == "left" else found[:16]
    for document, piece in zip(documents, found.split([len(document) for document in documents]), strict=True):
        alone = logits(llama, torch.tensor([document]), torch.arange(len(document))[None])[0]
        torch.testing.assert_close(piece, alone, rtol=1e-4, atol=1e-4)


def test_the_isolation_test_can_fail(llama: LlamaForCausalLM) -> None:
    """Positions that do not restart let a document see the ones before it, and the logits show it."""
    (packed,) = pack([[5, 6, 7, 8, 1], [11, 12, 13, 1]], 9)
    batch = collate([packed], 1)
    isolated = logits(llama, batch["input_ids"], batch["position_ids"])[0, 5:]
    leaking = logits(llama, batch["input_ids"], torch.arange(9)[None])[0, 5:]
    assert (isolated - leaking).abs().max() > 0.1
