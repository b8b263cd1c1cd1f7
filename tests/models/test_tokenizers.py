"""What identifies a tokenizer, and which pairs of tokenizers are refused."""

from pathlib import Path

import pytest
from tiny_families import tiny_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from selkd.errors import InputError
from selkd.models.sources import ModelSource
from selkd.models.tokenizers import (
    load_tokenizer,
    require_same_tokenizer,
    shared_classes,
    tokenizer_fingerprint,
    vocab_size,
)

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "d")]


def _tokenizer(
    merges: list[tuple[str, str]] = MERGES,
    *,
    vocabulary: list[str] | None = None,
    lowercase: bool = False,
    digits: bool = False,
    **special: str,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with <unk>, <s>, </s> first, then the 256 bytes, then the merged tokens."""
    tokens = vocabulary or ["<unk>", "<s>", "</s>", *ALPHABET, *(left + right for left, right in MERGES)]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    splits = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _vocabulary() -> list[str]:
    return sorted(_tokenizer().get_vocab(), key=_tokenizer().get_vocab().__getitem__)


def _source(folder: Path) -> ModelSource:
    return ModelSource("the-model", folder, "0" * 32)


def test_equal_tokenizers_pass_and_have_one_fingerprint() -> None:
    require_same_tokenizer(_tokenizer(), _tokenizer())
    assert tokenizer_fingerprint(_tokenizer()) == tokenizer_fingerprint(_tokenizer())
    assert len(bytes.fromhex(tokenizer_fingerprint(_tokenizer()))) == 16


def test_the_fingerprint_survives_saving(tmp_path: Path) -> None:
    _tokenizer().save_pretrained(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(_source(tmp_path))) == tokenizer_fingerprint(_tokenizer())


def test_the_fingerprint_ignores_padding_and_truncation() -> None:
    tokenizer = _tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.pad_token = "</s>"
    tokenizer(["the", "the dog"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before


@pytest.mark.parametrize(
    "other",
    [
        {"merges": MERGES[:2]},
        {"lowercase": True},
        {"digits": True},
        {"eos_token": "<s>"},
        {"vocabulary": ["<unk>", "<s>", "</s>", *reversed(ALPHABET), "th", "the", "Ġd"]},
    ],
)
def test_the_fingerprint_sees_whatever_changes_encodings(other: dict[str, object]) -> None:
    assert tokenizer_fingerprint(_tokenizer(**other)) != tokenizer_fingerprint(_tokenizer())


def test_another_vocabulary_is_refused_with_counts_and_first_differences() -> None:
    vocabulary = _vocabulary()
    vocabulary[3], vocabulary[4] = vocabulary[4], vocabulary[3]
    student = _tokenizer(vocabulary=[*vocabulary, "extra"])
    with pytest.raises(
        InputError,
        match=r"different tokenizers.*262 and 263 tokens, 3 of which differ; '!' is id 3 and id 4; '\"' is id 4 and "
        r"id 3; 'extra' is absent and id 262\. .*student\.prune_from_teacher",
    ):
        require_same_tokenizer(_tokenizer(), student)


def test_a_long_hostile_token_is_cut_and_escaped() -> None:
    student = _tokenizer(vocabulary=[*_vocabulary(), "\x1b[31m" + "x" * 1000])
    with pytest.raises(InputError) as caught:
        require_same_tokenizer(_tokenizer(), student)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_another_end_token_is_not_a_difference() -> None:
    require_same_tokenizer(_tokenizer(), _tokenizer(eos_token="<s>"))


def test_another_padding_token_is_not_a_difference() -> None:
    require_same_tokenizer(_tokenizer(pad_token="</s>"), _tokenizer(pad_token="<unk>"))


@pytest.mark.parametrize("other", [{"merges": MERGES[:1]}, {"lowercase": True}])
def test_equal_vocabularies_that_encode_differently_are_refused(other: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"The quick brown fox .* becomes ids \[.*\] and \[.*\] from token \d+ on"):
        require_same_tokenizer(_tokenizer(), _tokenizer(**other))


def test_digits_split_differently_are_found_by_a_probe() -> None:
    merges = [*MERGES, ("1", "2")]
    vocabulary = [*_vocabulary(), "12"]
    with pytest.raises(InputError, match=r"becomes ids"):
        require_same_tokenizer(
            _tokenizer(merges, vocabulary=vocabulary), _tokenizer(merges, vocabulary=vocabulary, digits=True)
        )


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"pad_token": "<s>"}, "<s>"),
        ({"additional_special_tokens": ["<|finetune_pad|>"]}, "<|finetune_pad|>"),
        ({}, "<unk>"),
        ({"unk_token": None}, "</s>"),
    ],
)
def test_a_padding_token_is_found_among_the_existing_ones(
    special: dict[str, object], expected: str, tmp_path: Path
) -> None:
    saved = _tokenizer(**special)
    saved.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(_source(tmp_path))
    assert tokenizer.pad_token == expected
    assert len(tokenizer) == len(saved)


def test_no_token_that_could_pad_is_refused(tmp_path: Path) -> None:
    _tokenizer(unk_token=None, eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'the-model': its tokenizer has no padding, unknown or end token"):
        load_tokenizer(_source(tmp_path))


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="model 'the-model': no tokenizer can be loaded"):
        load_tokenizer(_source(tmp_path))


def test_classes_are_counted_to_the_highest_id() -> None:
    assert vocab_size(_tokenizer()) == 262
    assert vocab_size(_tokenizer(additional_special_tokens=["<more>"])) == 263


def test_classes_in_common_are_those_of_the_smaller_vocabulary() -> None:
    assert shared_classes({"teacher": 320, "student": 288}, _tokenizer()) == 288
    assert shared_classes({"teacher": 262, "student": 262}, _tokenizer()) == 262


def test_a_model_with_fewer_classes_than_ids_is_refused() -> None:
    with pytest.raises(InputError, match="the student has 261 classes, but the tokenizer uses 262 ids"):
        shared_classes({"teacher": 320, "student": 261}, _tokenizer())
