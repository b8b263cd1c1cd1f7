"""Tokenizers: loading one, its fingerprint, and whether two models have the same classes."""

import json
from collections.abc import Sequence
from typing import Any

import xxhash
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from selkd.errors import InputError
from selkd.models.sources import ModelSource

_FORMAT = "selkd-tokenizer-1"
# Text on which tokenizers with equal vocabularies differ: merges, digits, spaces, normalisation, bytes, specials.
MARKUP = "<s></s> <|endoftext|> <|im_start|>user\n[INST] <unk>"
PROBES = (
    "The quick brown fox doesn't jump over 3.14159 or 1234567 lazy dogs.",
    "def f(x):\n    return x  # \ttab\n\n\n    if x != 0x1F: pass\r\n",
    "  leading,   inner and trailing spaces   ",
    "naïve café ﬁne Ǆ İstanbul ½ ① 日本語 한국어 العربية हिन्दी",
    "🙂👩‍👩‍👧 \u200b\u00a0\ufeff e\u0301",
    MARKUP,
)
_CHARACTER_BYTES = 4  # the most bytes, and so the most tokens, of one character in UTF-8
# The padding token is left out: it decides no id of a text, and load_tokenizer may have chosen it.
_SPECIAL = ("bos_token", "eos_token", "unk_token")


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of ``source``. Without a padding token, an existing token pads, so that nothing is resized.

    The unknown or the end token may pad, because valid masks, not ids, tell padding apart.

    Raises:
        InputError: there is no tokenizer, or it has no token that could pad.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file makes Transformers and tokenizers stumble in every way
        raise InputError(
            f"model {source.name!r}: no tokenizer can be loaded from {source.path} ({type(error).__name__}: {error}). "
            "Give a model with the files of its tokenizer, undamaged."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _padding_token(source, tokenizer)
    return tokenizer


def _padding_token(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> str:
    named = [
        token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if "pad" in token.content.lower()
    ]
    for token in (*named, tokenizer.unk_token, tokenizer.eos_token):
        if token is not None:
            return token
    raise InputError(
        f"model {source.name!r}: its tokenizer has no padding, unknown or end token. Set pad_token in "
        f"{source.path / 'tokenizer_config.json'} to an existing token."
    )


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The text of each token in its place; joined, they are the text.

    In many vocabularies a token that is decoded alone loses the space before it, so each token is decoded after the one
    before. The last token of a character has the character as its text, the others have U+FFFD.
    """

    def decoded(first: int, end: int) -> str:
        return str(tokenizer.decode(list(token_ids[first:end]), clean_up_tokenization_spaces=False))

    texts: list[str] = []
    begin = 0  # the first token of the unfinished character
    for end in range(1, len(token_ids) + 1):
        context = max(0, begin - 1)
        before, after = decoded(context, begin), decoded(context, end)
        if after.endswith("\ufffd") and end - begin < _CHARACTER_BYTES and end < len(token_ids):
            texts.append("\ufffd")
            continue
        text = after[len(before) :] if after.startswith(before) else decoded(begin, end)
        texts.append(text if end - begin == 1 else text.lstrip("\ufffd") or "\ufffd")
        begin = end
    return texts


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest token id; the head's rows from here on are padding."""
    return max(tokenizer.get_vocab().values()) + 1


def shared_classes(sizes: dict[str, int], tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of classes that all have; families pad one vocabulary to different sizes.

    Args:
        sizes: the number of classes of each of them, by name (teacher, student, cache).

    Raises:
        InputError: one of them has fewer classes than the tokenizer has ids.
    """
    needed = vocab_size(tokenizer)
    for name, size in sizes.items():
        if size < needed:
            raise InputError(
                f"the {name} has {size} classes, but the tokenizer uses {needed} ids: they do not belong together. "
                "Use the models' own tokenizer."
            )
    return min(sizes.values())


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """32 hex digits over everything that decides a text's ids, so without padding and truncation settings."""
    special_ids = {name: getattr(tokenizer, f"{name}_id") for name in _SPECIAL}
    identity = [_FORMAT, _rules(tokenizer), tokenizer.get_vocab(), special_ids, _encodings(tokenizer)]
    return xxhash.xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The normaliser, splitter and merges of a fast tokenizer; None for a tokenizer in plain Python."""
    if not tokenizer.is_fast:
        return None
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {part: rules[part] for part in ("normalizer", "pre_tokenizer", "model", "post_processor")}


def _encodings(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [tokenizer(probe, truncation=False, padding=False)["input_ids"] for probe in PROBES]


def require_same_tokenizer(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raises InputError, which names the first differences, unless both have the same ids and encode every probe alike.

    A student with other classes can't learn the teacher's distribution. The token that ends a text may differ, as
    between a base model and its chat version, because the teacher's tokenizer alone prepares the text.
    """
    differences = _vocabulary_differences(teacher.get_vocab(), student.get_vocab())
    differences = differences or _encoding_differences(teacher, student)
    if differences:
        raise InputError(
            "teacher and student have different tokenizers, so their classes can't be compared: "
            + "; ".join(differences)
            + ". Use a student of the teacher's family, or prune one from the teacher (student.prune_from_teacher)."
        )


def _vocabulary_differences(teacher: dict[str, int], student: dict[str, int], shown: int = 3) -> list[str]:
    """The numbers of tokens and of differing tokens, and the first of these; empty if the vocabularies are equal."""
    tokens = [token for token in teacher.keys() | student.keys() if teacher.get(token) != student.get(token)]
    if not tokens:
        return []
    tokens.sort(key=lambda token: (min(teacher.get(token, 2**63), student.get(token, 2**63)), token))
    first = [f"{token!r:.60} is {_id(teacher, token)} and {_id(student, token)}" for token in tokens[:shown]]
    return [f"{len(teacher)} and {len(student)} tokens, {len(tokens)} of which differ", *first]


def _id(vocabulary: dict[str, int], token: str) -> str:
    return f"id {vocabulary[token]}" if token in vocabulary else "absent"


def _encoding_differences(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> list[str]:
    """The first probe that the two encode differently, and where; empty if there is none."""
    for probe, expected, actual in zip(PROBES, _encodings(teacher), _encodings(student), strict=True):
        if expected != actual and probe != MARKUP:  # which shared tokens are special may differ
            longer = max(len(expected), len(actual))
            at = next(i for i in range(longer) if expected[i : i + 1] != actual[i : i + 1])
            return [f"{probe!r:.80} becomes ids {expected[at : at + 5]} and {actual[at : at + 5]} from token {at} on"]
    return []
