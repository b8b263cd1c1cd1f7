"""Documents to tokens: texts, prompts with completions, conversations."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice

from transformers import PreTrainedTokenizerBase

from selkd.data.chat_encoding import encode_conversation, require_chat_template
from selkd.data.documents import Conversation, Document, Exchange
from selkd.data.prompt_encoding import EncodedDocument, PartEncoder
from selkd.recipe.data import CHAT, RowOptions

_DOCUMENTS_AT_ONCE = 64


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each full text, with the tokenizer's special tokens and one end-of-sequence token at the end.

    Markup of special tokens in the text (``<|im_start|>``) becomes those tokens.
    """
    # verbose=False: without it, a document longer than the model's window gives a warning, but it is cut later.
    encoded: list[list[int]] = tokenizer(
        list(texts), truncation=False, padding=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    eos = tokenizer.eos_token_id
    if eos is None:
        return encoded
    return [token_ids if token_ids[-1:] == [eos] else [*token_ids, eos] for token_ids in encoded]


class Encoder:
    """Encodes documents: their tokens, and which of the tokens are learned.

    Args:
        options: what the documents are, their template, and what the loss is on.
        tokenizer: the tokenizer that both models share.

    Raises:
        InputError: the tokenizer lacks a chat template that is needed; or, once prompts are encoded, it has no fast
            form.
    """

    def __init__(self, options: RowOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        self.options, self.tokenizer = options, tokenizer
        self.chat_template = require_chat_template(tokenizer) if options.template == CHAT else None

    @cached_property
    def _encode_parts(self) -> PartEncoder:
        return PartEncoder(self.tokenizer)

    def encoded(self, documents: Iterable[Document]) -> Iterator[tuple[Document, list[EncodedDocument]]]:
        """Each document with the documents that it is encoded as. Texts are encoded in batches, which is faster."""
        documents = iter(documents)
        while batch := list(islice(documents, _DOCUMENTS_AT_ONCE)):
            if self.options.has_prompts:
                yield from ((document, self(document)) for document in batch)
            else:
                texts = [str(text) for text in batch]
                for text, token_ids in zip(texts, encode(self.tokenizer, texts), strict=True):
                    yield text, [EncodedDocument(token_ids, [True] * len(token_ids))]

    def __call__(self, document: Document) -> list[EncodedDocument]:
        """Encode a document with a prompt; a conversation may become several documents (see ``encode_conversation``).

        A completion ends with the end-of-sequence token, which is learned; a chat's turn ends as its template says.
        If ``loss_on`` is ``all``, ``SampleMaker`` marks the prompt as learned, once it knows that more than that fits.
        """
        assert not isinstance(document, str), "texts are encoded by `encode`"
        if isinstance(document, Exchange) and self.options.template == CHAT:
            document = _conversation(document)
        if isinstance(document, Conversation):
            learns_all = self.options.loss_on == "all"
            return encode_conversation(self._encode_parts, document.messages, learns_all=learns_all)
        return [self._exchange(document)]

    def _exchange(self, exchange: Exchange) -> EncodedDocument:
        opening, middle, closing = "", "", ""
        if self.options.template is not None:
            opening, _, rest = self.options.template.partition("{prompt}")
            middle, _, closing = rest.partition("{completion}")
        # White space before the completion belongs to it: at a prompt's end it would become other tokens.
        prompt_end = middle.rstrip()
        prompt = f"{opening}{exchange.prompt}{prompt_end}"
        if exchange.completion is None:
            return self._encode_parts([(prompt, False)], ended=False)
        answer = f"{middle[len(prompt_end) :]}{exchange.completion}{closing}"
        marked, eos = self._encode_parts([(prompt, False), (answer, True)]), self.tokenizer.eos_token_id
        if eos is None:
            return marked
        if marked.token_ids[-1:] == [eos]:  # the tokenizer has added it; it ends the completion
            return EncodedDocument(marked.token_ids, [*marked.is_target[:-1], True])
        return EncodedDocument([*marked.token_ids, eos], [*marked.is_target, True])


def _conversation(exchange: Exchange) -> Conversation:
    user = {"role": "user", "content": exchange.prompt}
    if exchange.completion is None:
        return Conversation((user,))
    return Conversation((user, {"role": "assistant", "content": exchange.completion}))
