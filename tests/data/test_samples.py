"""A sample's id, positions and mask; the memory-mapped dataset of samples."""

import struct

import numpy as np
import pytest
import xxhash
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from selkd.data.samples import EMPTY_SAMPLE, Sample, SampleDataset
from selkd.errors import InputError


def sample(token_ids: list[int], document_starts: list[int]) -> Sample:
    return Sample(np.array(token_ids), np.array(document_starts))


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    token_ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=30))
    starts = draw(st.sets(st.integers(0, len(token_ids) - 1))) | {0}
    return sample(token_ids, sorted(starts))


def test_the_id_is_the_documented_digest() -> None:
    expected = xxhash.xxh3_128(b"selkd sample 1" + struct.pack("<4I", 3, 7, 8, 2**31 - 1) + struct.pack("<2I", 0, 2))
    assert sample([7, 8, 2**31 - 1], [0, 2]).id == expected.digest()
    assert len(sample([7], [0]).id) == 16


def test_the_id_tells_tokens_and_borders_apart_and_ignores_the_arrays_dtype() -> None:
    different = [sample([1, 2, 3], [0]), sample([1, 2, 3], [0, 1]), sample([1, 2], [0]), sample([1, 3, 2], [0])]
    assert len({one.id for one in different}) == 4
    assert Sample(np.array([1, 2], np.uint16), np.array([0], np.int64)).id == sample([1, 2], [0]).id


@given(samples())
def test_positions_and_mask_agree_with_their_definitions(one: Sample) -> None:
    starts = set(one.document_starts.tolist())
    length = len(one.token_ids)
    expected_mask = [t + 1 < length and t + 1 not in starts for t in range(length)]
    assert one.valid_mask.tolist() == expected_mask
    assert one.n_valid == sum(expected_mask)
    assert one.position_ids.tolist() == [t - max(s for s in starts if s <= t) for t in range(length)]
    assert one.token_ids.dtype == one.document_starts.dtype == np.int32


def test_the_empty_sample_has_no_valid_position() -> None:
    assert EMPTY_SAMPLE.n_valid == 0
    assert not EMPTY_SAMPLE.valid_mask.any()


@pytest.mark.parametrize(
    ("token_ids", "document_starts", "message"),
    [
        ([], [0], r"token_ids: expected a 1-D array of at least one integer, got float64 \(0,\)"),
        ([0.5], [0], "token_ids: expected a 1-D array of at least one integer, got float64"),
        ([[1]], [0], r"token_ids: expected a 1-D array of at least one integer, got int64 \(1, 1\)"),
        ([1, -1], [0], r"token_ids: expected 0 to 2\^31 - 1, got -1 to 1"),
        ([2**31], [0], r"token_ids: expected 0 to 2\^31 - 1, got 2147483648"),
        ([1, 2], [1], "document_starts: expected ascending positions from 0 to below 2"),
        ([1, 2], [0, 2], "document_starts: expected ascending positions from 0 to below 2"),
        ([1, 2, 3], [0, 2, 2], "document_starts: expected ascending"),
        ([1, 2, 3], [0, 2, 1], "document_starts: expected ascending"),
        ([1, 2, 3], [], "document_starts: expected a 1-D array of at least one integer"),
    ],
)
def test_what_is_no_sample_is_refused(token_ids: list, document_starts: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sample(np.array(token_ids), np.array(document_starts))


THREE = [sample([5, 6, 7, 8], [0, 2]), sample([9, 9], [0]), sample([5, 6, 7, 8], [0, 2])]


def test_a_dataset_gives_back_its_samples() -> None:
    dataset = SampleDataset.from_samples(THREE)
    assert len(dataset) == 3
    assert [one.token_ids.tolist() for one in dataset] == [[5, 6, 7, 8], [9, 9], [5, 6, 7, 8]]
    assert [one.document_starts.tolist() for one in dataset] == [[0, 2], [0], [0, 2]]
    assert dataset.ids == [one.id for one in THREE]
    assert dataset.n_valid.tolist() == [2, 1, 2]
    assert dataset.lengths.tolist() == [4, 2, 4]
    with pytest.raises(IndexError):
        dataset[3]


def test_select_takes_rows_in_the_given_order() -> None:
    chosen = SampleDataset.from_samples(THREE).select(np.array([1, 0]))
    assert [one.token_ids.tolist() for one in chosen] == [[9, 9], [5, 6, 7, 8]]
    assert chosen.ids == [THREE[1].id, THREE[0].id]
    assert (chosen.n_valid.tolist(), chosen.lengths.tolist()) == ([1, 2], [2, 4])


def test_a_dataset_may_be_empty() -> None:
    dataset = SampleDataset.from_samples([])
    assert (len(dataset), dataset.ids, dataset.lengths.tolist(), dataset.n_valid.tolist()) == (0, [], [], [])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_reads_it(workers: int) -> None:
    loader = DataLoader(SampleDataset.from_samples(THREE), batch_size=2, collate_fn=list, num_workers=workers)
    assert [[one.token_ids.tolist() for one in batch] for batch in loader] == [[[5, 6, 7, 8], [9, 9]], [[5, 6, 7, 8]]]


def test_other_columns_are_refused() -> None:
    with pytest.raises(InputError, match=r"expected the columns .*token_ids.*, got .*'text'"):
        SampleDataset(Dataset.from_dict({"text": ["a"]}))
