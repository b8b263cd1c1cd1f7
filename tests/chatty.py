"""Small tokenizers and chat templates of the kinds that are met."""

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# As SmolLM2's and many others': no marks, a turn ends with its token and a line's end.
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: only the last turn shows (empty) reasoning, so a conversation is not the start of a longer one.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_PROMPT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}</s>\n{% endfor %}"  # no generation prompt
)
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}" + PLAIN
TEMPLATES = {"plain": PLAIN, "marked": MARKED, "reasoning": REASONING, "no_prompt": NO_PROMPT}
SPECIAL = ["<|im_end|>", "<|im_start|>", "</s>"]


def chat_tokenizer(template: str | None = PLAIN) -> PreTrainedTokenizerFast:
    """Bytes, few merges; ``<|im_end|>`` ends a text and pads."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator(["the answer is the sum of the parts, so it is"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


# As Llama 2's: words for roles, the system's turn inside the user's, no generation prompt, a space before an answer.
IN_WORDS = (
    "{% if messages[0]['role'] == 'system' %}{% set head = '<<SYS>>' + messages[0]['content'] + '<</SYS>> ' %}"
    "{% set messages = messages[1:] %}{% else %}{% set head = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.first %}{{ head }}{% endif %}"
    "{{ m['content'] }} [/INST]{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
# The generation prompt ends with a space, which a word's token would take with it.
SPACED = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Marks right after and before plain text: a token would lie across either.
MARKED_SPACED = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %} {% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)
ALL_TEMPLATES = TEMPLATES | {"in_words": IN_WORDS, "spaced": SPACED, "marked_spaced": MARKED_SPACED}

_TEXT = ["the answer is the sum of the parts, so it is", "user: the sum? assistant: it is"] * 4
_BYTES = [f"<0x{value:02X}>" for value in range(256)]


def _bytes(prefix: bool, trim: bool) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        _TEXT, trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return backend


def _added() -> Tokenizer:
    backend = _bytes(prefix=False, trim=True)
    backend.add_tokens([AddedToken("the sum", normalized=False), AddedToken("\n\n", normalized=True)])
    backend.add_special_tokens([AddedToken("assistant", special=True), AddedToken("[/INST]", special=True)])
    return backend


def _with_bytes(backend: Tokenizer) -> Tokenizer:
    """What isn't known is spelt in bytes, as SentencePiece does."""
    state = json.loads(backend.to_str())
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary += [[token, -20.0] for token in _BYTES]
    else:
        vocabulary |= {token: len(vocabulary) + at for at, token in enumerate(_BYTES)}
    state["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(state))


def _sentencepiece(scheme: str, unigram: bool) -> Tokenizer:
    backend = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", *SPECIAL]
    backend.train_from_iterator(
        _TEXT,
        trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>")
        if unigram
        else trainers.BpeTrainer(vocab_size=120, special_tokens=special),
    )
    backend = _with_bytes(backend)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme), decoders.Fuse()]
    )
    return backend


def _normalised() -> Tokenizer:
    """As Llama 2's: the normaliser puts the space, words are not split, and a text begins with its token."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=140, special_tokens=["<unk>", "<s>", *SPECIAL])
    backend.train_from_iterator(_TEXT, trainer)
    backend = _with_bytes(backend)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    begin = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return backend


KINDS = {
    "bytes": lambda: _bytes(prefix=False, trim=False),
    "bytes_trimmed": lambda: _bytes(prefix=False, trim=True),
    "bytes_prefixed": lambda: _bytes(prefix=True, trim=True),
    "added": _added,
    "metaspace_first": lambda: _sentencepiece("first", unigram=False),
    "metaspace_always": lambda: _sentencepiece("always", unigram=False),
    "unigram": lambda: _sentencepiece("first", unigram=True),
    "normalised": _normalised,
}


@cache
def tokenizer_of(kind: str, template: str = "plain") -> PreTrainedTokenizerFast:
    """A tokenizer of a kind, with one of the templates."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = ALL_TEMPLATES[template]
    return tokenizer


CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the parts?"},
    {"role": "assistant", "content": "the sum"},
    {"role": "user", "content": "so?"},
    {"role": "assistant", "content": "it is"},
]
