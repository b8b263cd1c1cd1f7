"""Documents to tokens: texts, prompts with completions, conversations."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice

from transformers import PreTrainedTokenizerBase

from selkd.data.chat_encoding import encode_conversation, require_chat_template
from selkd.data.documents import Conversation, Document, Exchange
from selkd.data.prompt_encoding import Marked, PartEncoder
from selkd.recipe.data import CHAT, RowOptions

_DOCUMENTS_AT_ONCE = 64


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, uncut, with the tokenizer's special tokens and one end-of-sequence token at the end.

    Markup of special tokens in the text (``<|im_start|>``) is read as those tokens.
    """
    # verbose=False: a document longer than the model's window is no mistake here, it will be cut into samples.
    encoded: list[list[int]] = tokenizer(
        list(texts), truncation=False, padding=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    eos = tokenizer.eos_token_id
    if eos is None:
        return encoded
    return [token_ids if token_ids[-1:] == [eos] else [*token_ids, eos] for token_ids in encoded]


class Encoder:
    """The tokens of documents, and which of them are learned.

    Args:
        options: what the documents are, their template, and what the loss is on.
        tokenizer: the one that both models share.

    Raises:
        InputError: the tokenizer has no chat template where one is needed; when documents that ask for an answer are
            encoded, also: it has no fast form.
    """

    def __init__(self, options: RowOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        self.options, self.tokenizer = options, tokenizer
        self.chat_template = require_chat_template(tokenizer) if options.template == CHAT else None

    @cached_property
    def _encode_parts(self) -> PartEncoder:
        return PartEncoder(self.tokenizer)

    def encoded(self, documents: Iterable[Document]) -> Iterator[tuple[Document, list[Marked]]]:
        """Each document with its token sequences. Some are read at a time: together, texts are encoded faster."""
        documents = iter(documents)
        while batch := list(islice(documents, _DOCUMENTS_AT_ONCE)):
            if self.options.has_prompts:
                yield from ((document, self(document)) for document in batch)
            else:
                texts = [str(text) for text in batch]
                for text, token_ids in zip(texts, encode(self.tokenizer, texts), strict=True):
                    yield text, [Marked(token_ids, [True] * len(token_ids))]

    def __call__(self, document: Document) -> list[Marked]:
        """The tokens of a document that asks for an answer; a conversation may become several documents (see
        ``encode_conversation``).

        A completion ends with the end-of-sequence token, which is learned; a chat's turn ends as its template says.
        Where ``loss_on`` is ``all``, the prompt isn't marked yet: ``Fitting`` marks it once more than the prompt fits.
        """
        assert not isinstance(document, str), "texts are encoded by `encode`"
        if isinstance(document, Exchange) and self.options.template == CHAT:
            document = _conversation(document)
        if isinstance(document, Conversation):
            learns_all = self.options.loss_on == "all"
            return encode_conversation(self._encode_parts, document.messages, learns_all=learns_all)
        return [self._exchange(document)]

    def _exchange(self, exchange: Exchange) -> Marked:
        opening, middle, closing = "", "", ""
        if self.options.template is not None:
            opening, _, rest = self.options.template.partition("{prompt}")
            middle, _, closing = rest.partition("{completion}")
        # White space between the two is the completion's: a prompt that ends with it is other tokens than the text's.
        asked = middle.rstrip()
        prompt = f"{opening}{exchange.prompt}{asked}"
        if exchange.completion is None:
            return self._encode_parts([(prompt, False)], ended=False)
        answer = f"{middle[len(asked) :]}{exchange.completion}{closing}"
        marked, eos = self._encode_parts([(prompt, False), (answer, True)]), self.tokenizer.eos_token_id
        if eos is None:
            return marked
        if marked.token_ids[-1:] == [eos]:  # put there by the tokenizer: it ends the completion
            return Marked(marked.token_ids, [*marked.is_target[:-1], True])
        return Marked([*marked.token_ids, eos], [*marked.is_target, True])


def _conversation(exchange: Exchange) -> Conversation:
    asked = {"role": "user", "content": exchange.prompt}
    if exchange.completion is None:
        return Conversation((asked,))
    return Conversation((asked, {"role": "assistant", "content": exchange.completion}))
