"""Text to stored samples: budgets, the held-out split, reuse, and what is said when there is too little."""

import json
import logging
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from selkd.data import encoding
from selkd.data import splits as tokenised
from selkd.data.collate import collate
from selkd.data.encoding import encode
from selkd.data.samples import SampleDataset
from selkd.data.splits import Splits, is_held_out, load_splits
from selkd.errors import InputError, RunError
from selkd.recipe.data import DataOptions
from selkd.recipe.part import parse_part

WORDS = "the teacher shows each student where a careful answer begins and how it".split()  # noqa: SIM905


def document(number: int, words: int = 20) -> str:
    """The number, then words that no other document has in this order: what it shares with another is no copy."""
    order = np.random.default_rng(number).integers(len(WORDS), size=words - 1)
    return " ".join([str(number), *(WORDS[index] for index in order)])


TEXTS = [document(number, 10 + number % 23) for number in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE; the pad token is the end token, as in many models."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>", "<bos>"], initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS[:20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", model_max_length=16, verbose=True
    )


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write(tmp_path / "texts.jsonl", TEXTS)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def load(path: Path, tokenizer: PreTrainedTokenizerFast, **changes: object) -> Splits:
    fields = {"max_length": 32, "held_out_fraction": 0.2, "held_out_tokens": 320} | changes
    return load_splits(
        parse_part(DataOptions, {"path": str(path), **fields}), tokenizer, "tokenizer-1", path.parent / "cache"
    )


def documents_of(dataset: SampleDataset) -> list[list[int]]:
    """Every piece of a document in every sample."""
    pieces = []
    for one in dataset:
        borders = [*one.document_starts.tolist(), len(one.token_ids)]
        pieces += [one.token_ids[begin:end].tolist() for begin, end in pairwise(borders)]
    return pieces


def flat(dataset: SampleDataset) -> list[int]:
    return [token for one in dataset for token in one.token_ids.tolist()]


def test_the_splits_are_packed_documents_decided_by_content(tokenizer: PreTrainedTokenizerFast, texts: Path) -> None:
    splits = load(texts, tokenizer, held_out_tokens=100_000)
    truth: dict[bool, list[int]] = {True: [], False: []}
    for text in TEXTS:
        held_out = xxhash.xxh3_64_intdigest(text.encode("utf-8")) / 2**64 < 0.2
        truth[held_out] += [*tokenizer.backend_tokenizer.encode(text).ids, tokenizer.eos_token_id]
    for dataset, tokens in ((splits.train, truth[False]), (splits.held_out, truth[True])):
        assert len(dataset) > 5
        assert flat(dataset) == tokens[: len(tokens) // 32 * 32]
    assert splits.train_tokens == splits.train.lengths.sum() == 32 * len(splits.train)
    assert splits.documents == 200
    assert len(splits.fingerprint) == 32


def test_without_packing_each_sample_is_of_one_document(tokenizer: PreTrainedTokenizerFast, texts: Path) -> None:
    splits = load(texts, tokenizer, packing=False)
    assert all(one.document_starts.tolist() == [0] for one in splits.train)
    lengths = {len(one.token_ids) for one in splits.train}
    assert max(lengths) == 32
    assert len(lengths) > 5
    whole = {tuple(ids) for ids in encode(tokenizer, TEXTS)}
    assert sum(tuple(one.token_ids.tolist()) in whole for one in splits.train) > 5


def test_duplicates_are_never_in_both_splits(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "thrice.jsonl", TEXTS * 3)
    splits = load(path, tokenizer, packing=False, max_length=128, held_out_tokens=100_000)
    train, held_out = ([tuple(one.token_ids.tolist()) for one in part] for part in (splits.train, splits.held_out))
    assert len(train) + len(held_out) == 600
    assert len(set(train)) + len(set(held_out)) == 200
    assert len(set(held_out)) > 10
    assert not set(train) & set(held_out)


def test_every_document_ends_with_one_end_token_and_the_model_is_taught_it(
    tokenizer: PreTrainedTokenizerFast, texts: Path
) -> None:
    splits = load(texts, tokenizer)
    eos = tokenizer.eos_token_id
    inner = [piece for piece in documents_of(splits.train) if eos in piece]
    assert len(inner) > 50
    assert all(piece.index(eos) == len(piece) - 1 for piece in inner)
    batch = collate(list(splits.train), tokenizer.pad_token_id)
    assert (batch["targets"][batch["valid_mask"]] == eos).sum() > 50


def test_special_tokens_are_the_tokenizers_and_the_end_token_is_not_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 0)]
    )
    both = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")
    plain = tokenizer.backend_tokenizer.encode("a student").ids
    assert encode(both, ["a student"]) == [[1, *plain, 0]]
    assert encode(tokenizer, ["a student"]) == [[*plain, 0]]
    without_end = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    assert encode(without_end, ["a student"]) == [plain]


def test_long_documents_are_neither_cut_nor_warned_about(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    text = document(1, 500)
    tokenizer(text)
    assert "longer than the specified maximum" in caplog.text  # the warning exists, and would be seen here
    caplog.clear()
    tokenizer.deprecation_warnings.clear()
    (token_ids,) = encode(tokenizer, [text])
    assert len(token_ids) > 500
    assert caplog.text == ""


@pytest.mark.parametrize(("tokens", "samples"), [(32, 1), (63, 1), (64, 2), (1000, 31)])
def test_a_budget_is_whole_samples_when_packing(
    tokenizer: PreTrainedTokenizerFast, texts: Path, tokens: int, samples: int
) -> None:
    splits = load(texts, tokenizer, tokens=tokens, held_out_fraction=0)
    assert len(splits.train) == samples
    assert splits.train_tokens == 32 * samples
    everything = load(texts, tokenizer, held_out_fraction=0)
    assert flat(splits.train) == flat(everything.train)[: 32 * samples]


def test_a_budget_holds_without_packing(tokenizer: PreTrainedTokenizerFast, texts: Path) -> None:
    splits = load(texts, tokenizer, tokens=500, packing=False)
    assert 500 - 32 < splits.train.lengths.sum() <= 500
    assert splits.held_out.lengths.sum() <= 320


def test_a_budget_stops_the_reading(
    tokenizer: PreTrainedTokenizerFast, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []

    def counting(tokenizer: PreTrainedTokenizerFast, batch: list[str]) -> list[list[int]]:
        encoded.extend(batch)
        return encode(tokenizer, batch)

    monkeypatch.setattr(encoding, "encode", counting)
    splits = load(texts, tokenizer, tokens=640)
    assert len(encoded) == 64  # one batch of documents is enough
    assert splits.documents < 64


@pytest.mark.parametrize("budget", [32, 100, 320])
def test_the_held_out_split_keeps_to_its_budget(tokenizer: PreTrainedTokenizerFast, texts: Path, budget: int) -> None:
    assert load(texts, tokenizer, held_out_tokens=budget).held_out.lengths.sum() == budget // 32 * 32


def test_no_held_out_split_on_request(tokenizer: PreTrainedTokenizerFast, texts: Path) -> None:
    splits = load(texts, tokenizer, held_out_fraction=0)
    assert len(splits.held_out) == 0
    assert splits.documents == 200


def test_a_document_is_held_out_by_its_hash_alone() -> None:
    share = sum(is_held_out(f"text {number}", 0.1) for number in range(10_000)) / 10_000
    assert 0.09 < share < 0.11
    assert not any(is_held_out(text, 0) for text in TEXTS)


def test_text_is_tokenised_once(
    tokenizer: PreTrainedTokenizerFast, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(texts, tokenizer)
    monkeypatch.setattr(encoding, "encode", None)  # a second pass would fail
    second = load(texts, tokenizer)
    assert second.train.ids == first.train.ids
    assert second.held_out.ids == first.held_out.ids
    assert (second.fingerprint, second.documents, second.train_tokens) == (
        first.fingerprint,
        first.documents,
        first.train_tokens,
    )
    moved = texts.with_name("moved.jsonl")
    texts.rename(moved)
    assert load(moved, tokenizer).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 16},
        {"packing": False},
        {"tokens": 640},
        {"held_out_fraction": 0.3},
        {"held_out_tokens": 64},
        {"text_field": "body"},
    ],
)
def test_each_option_changes_the_samples_and_the_fingerprint(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, changes: dict
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text, "body": f"body {text}"}) + "\n" for text in TEXTS))
    before, after = load(path, tokenizer), load(path, tokenizer, **changes)
    assert before.fingerprint != after.fingerprint
    assert (before.train.ids, before.held_out.ids) != (after.train.ids, after.held_out.ids)


def test_another_tokenizer_or_other_text_is_tokenised_anew(tokenizer: PreTrainedTokenizerFast, texts: Path) -> None:
    first = load(texts, tokenizer)
    options = DataOptions(path=str(texts), max_length=32, held_out_fraction=0.2, held_out_tokens=320)
    other = load_splits(options, tokenizer, "tokenizer-2", texts.parent / "cache")
    write(texts, TEXTS[::-1])
    third = load(texts, tokenizer)
    assert len({first.fingerprint, other.fingerprint, third.fingerprint}) == 3
    assert third.train.ids != first.train.ids
    assert len(list((texts.parent / "cache" / "tokenised").iterdir())) == 3


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_folder_is_streamed_or_downloaded_to_the_same_samples(
    tokenizer: PreTrainedTokenizerFast, texts: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(texts.parent / "hf"))
    folder = texts.parent / "dataset"
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.table({"text": TEXTS}), folder / "data" / "train-00000-of-00001.parquet")
    found = load(folder, tokenizer, tokens=960, streaming=streaming)
    assert found.train.ids == load(texts, tokenizer, tokens=960).train.ids


def test_too_little_text_is_refused_with_the_counts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "short.jsonl", ["the student", "each answer"])
    n_tokens = sum(len(ids) for ids in encode(tokenizer, ["the student", "each answer"]))
    message = (
        rf"short.jsonl gives {n_tokens} training tokens in 2 documents .*data.max_length is 64, data.tokens is None"
    )
    with pytest.raises(InputError, match=message):
        load(path, tokenizer, max_length=64, held_out_fraction=0)
    assert list((tmp_path / "cache" / "tokenised").iterdir()) == []  # nothing half-written is left


def test_a_budget_below_one_sample_is_refused_by_name(tokenizer: PreTrainedTokenizerFast, texts: Path) -> None:
    with pytest.raises(InputError, match=r"data.tokens: 31 tokens are fewer than one sample of data.max_length = 32"):
        load(texts, tokenizer, tokens=31)
    with pytest.raises(InputError, match=r"data.held_out_tokens: 31 tokens are fewer than one sample"):
        load(texts, tokenizer, held_out_tokens=31)
    load(texts, tokenizer, held_out_tokens=31, held_out_fraction=0)


def test_an_empty_held_out_split_is_refused_with_the_way_out(tokenizer: PreTrainedTokenizerFast, texts: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"data.held_out_fraction: at 1e-06, 0 of 200 documents .*0 means no",
    ):
        load(texts, tokenizer, held_out_fraction=1e-6)


def test_text_that_ends_before_the_budget_is_said(
    tokenizer: PreTrainedTokenizerFast, texts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = load(texts, tokenizer).train_tokens
    assert caplog.text == ""
    load(texts, tokenizer, tokens=full)
    assert caplog.text == ""
    load(texts, tokenizer, tokens=full + 32)
    assert f"data.tokens asks for {full + 32} training tokens; {texts} holds {full}." in caplog.text


@pytest.mark.parametrize("damage", ["summary.json", "train.arrow", "held_out.arrow"])
def test_damaged_samples_are_refused_and_left_in_place(
    tokenizer: PreTrainedTokenizerFast, texts: Path, damage: str
) -> None:
    splits = load(texts, tokenizer)
    file = texts.parent / "cache" / "tokenised" / splits.fingerprint / damage
    content = file.read_bytes()
    del splits
    file.unlink()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"The tokenised text in .* is damaged .*Move it away and run again"):
        load(texts, tokenizer)
    assert file.exists()


def test_a_disk_that_cannot_be_written_is_a_run_error(tokenizer: PreTrainedTokenizerFast, texts: Path) -> None:
    (texts.parent / "cache").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"cache/tokenised/\w+ can't be written .*Free space there"):
        load(texts, tokenizer)


def test_a_full_disk_is_a_run_error_and_leaves_nothing(
    tokenizer: PreTrainedTokenizerFast, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_samples: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenised, "record_batch", full)
    with pytest.raises(RunError, match="No space left on device"):
        load(texts, tokenizer)
    assert list((texts.parent / "cache" / "tokenised").iterdir()) == []


def test_two_processes_may_tokenise_the_same_text(
    tokenizer: PreTrainedTokenizerFast, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one finishes while this one is still reading: its result stands, ours is thrown away."""
    write_splits = tokenised._write_splits
    others: list[Splits] = []

    def slow(*arguments: object) -> None:
        write_splits(*arguments)
        if not others:
            others.append(None)
            others.append(load(texts, tokenizer))

    monkeypatch.setattr(tokenised, "_write_splits", slow)
    mine = load(texts, tokenizer)
    assert mine.train.ids == others[1].train.ids
    assert len(list((texts.parent / "cache" / "tokenised").iterdir())) == 1
