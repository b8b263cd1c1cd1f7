"""Held-out text that stands in the training text: what is measured is a plain count's, and copies are dropped."""

import json
import logging
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chatty import chat_tokenizer
from tiny import make_tokenizer
from transformers import PreTrainedTokenizerBase

from selkd.data.copies import BOILERPLATE, COPY, NGRAM, Overlap, without_copies
from selkd.data.samples import Sample, SampleDataset
from selkd.data.splits import Splits, load_splits
from selkd.errors import InputError
from selkd.recipe.data import DataOptions
from selkd.recipe.part import parse_part

GENERATOR = np.random.default_rng(7)


def words(n: int) -> list[str]:
    return [f"w{i}" for i in GENERATOR.integers(2, 60, n)]


def runs_of(sample: Sample) -> list[tuple[int, tuple[int, ...]]]:
    """Every run of 13 tokens of one document of the sample, and where it begins."""
    borders = [*sample.document_starts.tolist(), len(sample.token_ids)]
    tokens = sample.token_ids.tolist()
    return [(at, tuple(tokens[at : at + 13])) for begin, end in pairwise(borders) for at in range(begin, end - 13 + 1)]


def counted(held_out: list[Sample], training: list[Sample], has_prompts: bool) -> list[tuple[int, int]]:
    """For each held-out sample, how many tokens count and how many of them are covered, by sets of tuples."""
    there = Counter(run for sample in training for _, run in runs_of(sample))
    found = []
    for sample in held_out:
        ignored, covered = set(), set()
        for at, run in runs_of(sample):
            if has_prompts and there[run] > 10:
                ignored |= set(range(at, at + 13))
            elif there[run]:
                covered |= set(range(at, at + 13))
        found.append((len(sample.token_ids) - len(ignored), len(covered - ignored)))
    return found


def texts() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Documents of which some hold others, whole or in part, with a word changed, or near their edges."""
    documents = [words(int(n)) for n in GENERATOR.integers(15, 90, 60)]
    for number in range(0, 40, 2):
        inner = list(documents[number + 1])
        if number % 4:
            inner[len(inner) // 2] = "w61"
        documents.append([*words(9), *inner, *words(9)])
        documents.append(documents[number][: 13 + number])
    return [{"text": " ".join(document)} for document in documents], {}


def exchanges() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Questions under one long template; some are asked twice with other words before them; some answers are set."""
    rows = [{"q": " ".join(words(20)), "a": " ".join(words(int(n)))} for n in GENERATOR.integers(1, 40, 60)]
    rows += [{"q": f"w3 w4 {row['q']}", "a": row["a"]} for row in rows[:25]]
    rows += [{"q": " ".join(words(18)), "a": " ".join(f"w{i}" for i in range(5, 30))} for _ in range(25)]
    template = " ".join(f"w{i}" for i in range(20, 45))
    shape = {"prompt_field": "q", "completion_field": "a", "template": f"{template} {{prompt}} w9 {{completion}}"}
    return rows, shape


def prompts() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows, shape = exchanges()
    return rows, {"prompt_field": "q", "template": shape["template"]}


def conversations() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows, _ = exchanges()
    messages = [[{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}] for row in rows]
    return [{"m": content} for content in messages], {"messages_field": "m", "max_length": 512}


SHAPES = {"texts": texts, "exchanges": exchanges, "prompts": prompts, "conversations": conversations}


def tokenizer_for(name: str) -> PreTrainedTokenizerBase:
    return chat_tokenizer() if name == "conversations" else make_tokenizer()


def load(folder: Path, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **fields: Any) -> Splits:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"path": str(path), "held_out_fraction": 0.3, "held_out_tokens": 100_000, "max_length": 128} | fields
    return load_splits(parse_part(DataOptions, options), tokenizer, "tokenizer", folder / "cache")


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "one by one"])
@pytest.mark.parametrize("name", SHAPES)
def test_what_is_measured_and_dropped_is_what_a_plain_count_finds(
    name: str, packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, shape = SHAPES[name]()
    tokenizer, has_prompts = tokenizer_for(name), name != "texts"
    (tmp_path / "all").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("selkd.data.copies.COPY", 2.0)  # so that nothing is dropped
        everything = load(tmp_path / "all", rows, tokenizer, packing=packing, **shape)
    splits = load(tmp_path, rows, tokenizer, packing=packing, **shape)
    found = counted(list(everything.held_out), list(splits.train), has_prompts)
    is_kept = [covered == 0 or 2 * covered < tokens for tokens, covered in found]
    assert splits.train.ids == everything.train.ids
    assert splits.held_out.ids == [i for i, keep in zip(everything.held_out.ids, is_kept, strict=True) if keep]
    kept = [pair for pair, keep in zip(found, is_kept, strict=True) if keep]
    assert splits.overlap == Overlap(
        samples=len(found),
        copies=len(found) - len(kept),
        tokens=sum(tokens for tokens, _ in found),
        covered=sum(covered for _, covered in found),
        kept_tokens=sum(tokens for tokens, _ in kept),
        kept_covered=sum(covered for _, covered in kept),
    )
    assert 0 < splits.overlap.copies < len(found)
    assert splits.overlap.kept_covered > 0
    if has_prompts:
        assert splits.overlap.tokens < everything.held_out.lengths.sum()  # the template does not count


def sample(*documents: list[int]) -> Sample:
    starts = np.cumsum([0, *map(len, documents[:-1])])
    return Sample(np.array([token for document in documents for token in document]), starts)


def measured(held_out: list[Sample], training: list[Sample], has_prompts: bool = False) -> tuple[list[Sample], Overlap]:
    blocks = SampleDataset.from_samples(training).token_blocks()
    return without_copies(held_out, blocks, has_prompts=has_prompts)


def test_a_run_lies_within_one_document() -> None:
    text = list(range(100, 120))
    _, overlap = measured([sample(text)], [sample(text[:10], text[10:])])
    assert overlap.covered == 0
    _, overlap = measured([sample(text[:10], text[10:])], [sample(text)])
    assert overlap.covered == 0
    _, overlap = measured([sample([1, 2], text[:13], [3])], [sample([9], text)])
    assert (overlap.covered, overlap.tokens) == (13, 16)
    assert measured([sample(text[:12])], [sample(text)])[1].covered == 0  # shorter than a run
    assert measured([sample([5])], [sample([5])])[1] == Overlap(1, 0, 1, 0, 1, 0)
    assert measured([], [sample(text)]) == ([], Overlap())


def test_half_of_the_tokens_make_a_copy() -> None:
    there, new = list(range(100, 113)), list(range(200, 240))
    assert (NGRAM, COPY) == (13, 0.5)
    exactly, less = sample(there + new[:13]), sample(there + new[:14])
    kept, overlap = measured([exactly, less], [sample(there)])
    assert [one.id for one in kept] == [less.id]
    assert overlap == Overlap(2, 1, 53, 26, 27, 13)
    assert (overlap.share, overlap.kept_share) == (26 / 53, 13 / 27)


@pytest.mark.parametrize("times", [BOILERPLATE, BOILERPLATE + 1])
def test_what_prompts_have_in_common_does_not_count(times: int) -> None:
    template, question = list(range(100, 130)), list(range(200, 220))
    training = [sample([*template, 300 + number]) for number in range(times)]
    kept, overlap = measured([sample(template + question)], training, has_prompts=True)
    assert len(kept) == (times > BOILERPLATE)
    assert (overlap.tokens, overlap.covered) == ((20, 0) if times > BOILERPLATE else (50, 30))
    assert measured([sample(template + question)], training)[1].covered == 30  # of texts, everything counts


def test_the_blocks_of_a_data_set_are_its_tokens_and_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [sample(words_of, [2, 3]) for words_of in ([1, 2, 3], [4], [5, 6, 7, 8])] * 5
    monkeypatch.setattr("selkd.data.samples._TOKENS_AT_ONCE", 12)
    blocks = list(SampleDataset.from_samples(samples).token_blocks())
    assert len(blocks) > 3
    assert np.concatenate([block.token_ids for block in blocks]).tolist() == [
        token for one in samples for token in one.token_ids.tolist()
    ]
    for block in blocks:
        pieces = np.split(block.token_ids, block.document_starts[1:])
        assert [piece.tolist() for piece in pieces[1::2]] == [[2, 3]] * (len(pieces) // 2)
    assert list(SampleDataset.from_samples(samples).select([]).token_blocks()) == []


def test_copies_are_told_at_every_run_and_a_split_of_copies_alone_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, _ = texts()
    for _ in range(2):  # the second time from the store
        caplog.clear()
        with caplog.at_level(logging.WARNING, "selkd"):
            splits = load(tmp_path, rows, make_tokenizer(), packing=False)
        overlap = splits.overlap
        assert f"{overlap.copies} of {overlap.samples} held-out samples are copies of training text" in caplog.text
        assert f"{100 * overlap.kept_share:.1f}% of the held-out tokens stand in the training text" in caplog.text
    (tmp_path / "unrelated").mkdir()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "selkd"):
        plain = load(tmp_path / "unrelated", rows[:40], make_tokenizer(), packing=False)
    assert plain.overlap.copies == plain.overlap.covered == 0
    assert not caplog.text
    same = words(40)
    (tmp_path / "alone").mkdir()
    with pytest.raises(InputError, match=r"all \d+ held-out samples of .* are copies of its training text"):
        load(tmp_path / "alone", [{"text": " ".join([f"w{i}", *same])} for i in range(2, 60)], make_tokenizer())
