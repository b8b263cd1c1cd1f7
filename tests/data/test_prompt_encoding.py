"""Which tokens are learned, of tokenizers and chat templates of every kind: prompts are the tokens they are alone,
answers say their text and no more, and nothing else is ever selected.

``after(tokenizer, ids)`` is what tokens say after other text. Alone, decoders take a first space away.
"""

import re
from typing import Any

import pytest
import torch
from chatty import ALL_TEMPLATES, CHAT, KINDS, chat_tokenizer, tokenizer_of
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from selkd.data.chat_encoding import encode_conversation
from selkd.data.collate import collate
from selkd.data.documents import Conversation, Exchange
from selkd.data.encoding import Encoder
from selkd.data.packing import Misfits, SampleMaker
from selkd.data.prompt_encoding import PartEncoder
from selkd.errors import InputError
from selkd.recipe.choices import PositionOptions
from selkd.recipe.data import DataOptions
from selkd.recipe.part import parse_part
from selkd.selection.position_scores import choose_positions
from selkd.selection.positions import select, step_context

Turns = list[tuple[str, str]]

WORDS = st.text("the sum\n<|>é ", min_size=1, max_size=12).filter(lambda text: text.strip())
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)
# These put a space after each special token of a text, which is the tokenizer's own way to read a prompt.
SPACE_AFTER_SPECIAL = ("bytes_prefixed", "metaspace_always", "normalised")
SAYS = {  # what is learned of an answer
    "plain": "{}<|im_end|>",
    "marked": "{}<|im_end|>",
    "reasoning": "<think>\n\n</think>\n\n{}<|im_end|>",
    "no_prompt": "{}</s>",
    "in_words": " {} </s>",
    "spaced": "{}</s>",
    "marked_spaced": "{}</s>",
}
HEADERS = {"no_prompt": "[assistant] ", "marked_spaced": "assistant: "}  # where a template has no generation prompt


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def after(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    before = tokenizer("e", add_special_tokens=False)["input_ids"]
    said, start = text_of(tokenizer, before + ids), text_of(tokenizer, before)
    assert said.startswith(start)
    return said[len(start) :]


def runs(ids: list[int], wanted: list[bool]) -> list[list[int]]:
    """The tokens of each run of wanted ones."""
    found: list[list[int]] = []
    for index, (token, is_wanted) in enumerate(zip(ids, wanted, strict=True)):
        if is_wanted:
            if index == 0 or not wanted[index - 1]:
                found.append([])
            found[-1].append(token)
    return found


def options(**changes: Any) -> DataOptions:
    return parse_part(DataOptions, {"path": "x", **changes}, "data")


def messages_of(turns: Turns, system: bool, template: str) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": "be brief"}] if system else []
    for asked, told in turns:
        answer = told.strip() if template == "no_prompt" else told  # which trims
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return messages


def prompt_of(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], template: str) -> str:
    """The text that an answer is asked with."""
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return asked + HEADERS.get(template, "")


def plain_spaces(text: str, kind: str) -> str:
    """Without the spaces at the text's beginning and after special tokens, of kinds that put some there."""
    special = r"(^|<\|im_start\|>|<\|im_end\|>|</?s>) +"
    return re.sub(special, r"\1", text) if kind in SPACE_AFTER_SPECIAL else text


@examples(250)
@given(
    turns=TURNS,
    kind=st.sampled_from(sorted(KINDS)),
    template=st.sampled_from(sorted(ALL_TEMPLATES)),
    system=st.booleans(),
    oh=st.booleans(),
)
def test_conversations_decode_to_what_the_template_shows_and_targets_to_what_the_assistant_says(
    turns: Turns, kind: str, template: str, system: bool, oh: bool
) -> None:
    """decode(ids) == the rendering up to the last answer's end (of three kinds: but for spaces after special tokens);
    each run of targets says an answer and its end, exactly; what is before the first is tokenizer(prompt)."""
    tokenizer = tokenizer_of(kind, template)
    messages = messages_of(turns, system, template)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    trailing = [{"role": "user", "content": "oh"}] if oh else []
    documents = encode_conversation(PartEncoder(tokenizer), [*messages, *trailing])
    said = [after(tokenizer, run) for document in documents for run in runs(document.token_ids, document.is_target)]
    assert said == [SAYS[template].format(messages[index]["content"]) for index in answers]
    for document, last in zip(documents, answers if len(documents) > 1 else answers[-1:], strict=True):
        shown = tokenizer.apply_chat_template(messages[: last + 1], tokenize=False).rstrip()
        assert plain_spaces(text_of(tokenizer, document.token_ids), kind) == plain_spaces(shown, kind)
        first = last if len(documents) > 1 else answers[0]
        prompt = tokenizer(prompt_of(tokenizer, messages[:first], template), add_special_tokens=False)["input_ids"]
        assert document.token_ids[: document.is_target.index(True)] == prompt


@examples(250)
@given(
    prompt=st.text("the sum\n<|>é ", min_size=1, max_size=12),
    completion=WORDS,
    kind=st.sampled_from(sorted(KINDS)),
    template=st.sampled_from([None, "Q: {prompt}\nA: {completion}", "user: {prompt} so,{completion} ."]),
)
def test_exchanges_are_the_prompts_tokens_then_the_completions_text(
    prompt: str, completion: str, kind: str, template: str | None
) -> None:
    """decode(ids) == decode(tokenizer(prompt)) + the completion's text, and what is given to generation is a prefix."""
    tokenizer = tokenizer_of(kind)
    fields = {"prompt_field": "q", "completion_field": "a", "template": template}
    (document,) = Encoder(options(**fields), tokenizer)(Exchange(prompt, completion))
    (asked,) = Encoder(options(prompt_field="q", template=template), tokenizer)(Exchange(prompt, None))
    text = prompt if template is None else template.partition("{completion}")[0].rstrip().replace("{prompt}", prompt)
    assert asked.token_ids == tokenizer(text)["input_ids"]
    assert document.token_ids[: len(asked.token_ids)] == asked.token_ids
    assert document.is_target == [index >= len(asked.token_ids) for index in range(len(document.token_ids))]
    answer = completion if template is None else template.partition("{prompt}")[2].replace("{completion}", completion)
    answer = answer if template is None else answer[len(template.partition("{prompt}")[2].partition("{")[0].rstrip()) :]
    assert text_of(tokenizer, document.token_ids) == text_of(tokenizer, asked.token_ids) + answer + "</s>"


@examples(120)
@given(
    chats=st.lists(TURNS, min_size=1, max_size=4),
    kind=st.sampled_from(sorted(KINDS)),
    template=st.sampled_from(sorted(ALL_TEMPLATES)),
    system=st.booleans(),
    packing=st.booleans(),
    fraction=st.sampled_from([0.2, 1.0]),
    policy=st.sampled_from(["top_k", "random", "curriculum", "weighted"]),
    extra=st.integers(0, 5),
)
def test_only_what_the_assistant_says_is_ever_valid_or_selected(
    chats: list[Turns], kind: str, template: str, system: bool, packing: bool, fraction: float, policy: str, extra: int
) -> None:
    """Random chats, packed or not, padded on either side: no prompt, template or pad position is touched."""
    tokenizer = tokenizer_of(kind, template)
    encode, documents, said = PartEncoder(tokenizer), [], []
    for turns in chats:
        messages = messages_of(turns, system, template)
        documents += encode_conversation(encode, messages)
        said += [SAYS[template].format(m["content"]) for m in messages if m["role"] == "assistant"]
    samples = list(SampleMaker(options(messages_field="m", max_length=400, packing=packing))(documents))
    width = max(len(sample.token_ids) for sample in samples) + extra
    given = {"policy": policy} | ({} if policy == "weighted" else {"fraction": fraction})
    chosen = PositionOptions.model_validate(given | ({"curriculum_steps": 9} if policy == "curriculum" else {}))
    for side in ("left", "right"):
        batch = collate(samples, tokenizer.pad_token_id, padding_side=side, pad_to=width)  # type: ignore[arg-type]
        valid_mask = batch["valid_mask"]
        scores = torch.rand(valid_mask.shape, generator=torch.Generator().manual_seed(1))
        scores += 9 * ~valid_mask  # what must not be selected looks best
        context = step_context(chosen, 0, 1)
        for coefficients in (
            select(chosen, scores, valid_mask, context),
            choose_positions(chosen, scores, batch, context, seed=0),
        ):
            assert not coefficients[~valid_mask].any()
            assert coefficients.any()
        found = []
        for row, sample in enumerate(samples):
            length = len(sample.token_ids)
            offset = width - length if side == "left" else 0
            inside = valid_mask[row, offset : offset + length].tolist()
            assert int(valid_mask[row].sum()) == sum(inside)
            ids = sample.token_ids.tolist()
            found += [after(tokenizer, run) for run in runs(ids[1:], inside[:-1])]
        assert sorted(found) == sorted(said), "exactly the assistant's words, each turn ended"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "answer"), [("so t", "he sum"), ("so ", "the sum"), ("so", " the"), ("é", "\nit")])
def test_a_token_across_the_border_is_taken_apart_without_a_space(kind: str, prompt: str, answer: str) -> None:
    tokenizer = tokenizer_of(kind)
    found = PartEncoder(tokenizer)([(prompt, False), (answer, True)])
    begin = found.is_target.index(True)
    assert found.token_ids[:begin] == tokenizer(prompt)["input_ids"]
    assert after(tokenizer, found.token_ids[begin:]) == answer


def test_no_prompt_at_all_leaves_the_answer_as_it_stands_alone() -> None:
    for kind in KINDS:
        tokenizer = tokenizer_of(kind)
        found = PartEncoder(tokenizer)([("", False), ("the sum", True)])
        assert found.token_ids == tokenizer("the sum")["input_ids"]
        assert found.is_target == [token != tokenizer.convert_tokens_to_ids("<s>") for token in found.token_ids]


def test_a_prompt_that_ends_with_the_end_token_keeps_it_and_what_a_tokenizer_puts_there_goes() -> None:
    asked = "so?<|im_end|>"
    for ends in (False, True):
        tokenizer = chat_tokenizer()
        if ends:
            end = [("<|im_end|>", tokenizer.eos_token_id)]
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="$A <|im_end|>", special_tokens=end
            )
        fields = {"prompt_field": "q", "completion_field": "a"}
        (prompt,) = Encoder(options(prompt_field="q"), tokenizer)(Exchange(asked, None))
        (answered,) = Encoder(options(**fields), tokenizer)(Exchange(asked, "it is"))
        assert text_of(tokenizer, prompt.token_ids) == asked
        assert text_of(tokenizer, answered.token_ids) == f"{asked}it is<|im_end|>"
        assert answered.token_ids[: answered.is_target.index(True)] == prompt.token_ids


def test_neither_an_earlier_call_nor_markup_read_as_text_changes_the_tokens() -> None:
    tokenizer = tokenizer_of("bytes")
    parts = [("the</s>sum ", False), ("so it is", True)]
    expected = PartEncoder(tokenizer)(parts)
    tokenizer("the sum of the parts", truncation=True, max_length=2, padding="max_length")
    assert PartEncoder(tokenizer)(parts) == expected
    as_text = PreTrainedTokenizerFast(tokenizer_object=KINDS["bytes"](), split_special_tokens=True)
    found = PartEncoder(as_text)(parts).token_ids
    assert as_text.convert_tokens_to_ids("</s>") not in found
    assert text_of(as_text, found) == "the</s>sum so it is"


def test_normal_forms_are_no_change_of_text_but_a_space_is() -> None:
    composing = KINDS["bytes_prefixed"]()
    composing.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=composing)
    found = PartEncoder(tokenizer)([("so e", False), ("e\u0301", True)])
    assert after(tokenizer, found.token_ids[found.is_target.index(True) :]) == "\u00e9"
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "so": 1, "the": 2, "sothe": 3}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(
        InputError, match=r"after a prompt, the tokenizer .* makes ' the' of the text 'the'\..*white space"
    ):
        PartEncoder(PreTrainedTokenizerFast(tokenizer_object=words))([("so", False), ("the", True)])


UNENDED = [*CHAT, {"role": "user", "content": "oh, the parts"}]


@pytest.mark.parametrize("template", ALL_TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_on_all_learns_every_message_to_the_last(kind: str, template: str) -> None:
    """As one document, its tokens those of the whole rendering, also where the template rewrites earlier turns."""
    tokenizer = tokenizer_of(kind, template)
    chosen = {"messages_field": "m", "loss_on": "all", "packing": False}
    (document,) = Encoder(options(**chosen), tokenizer)(Conversation(tuple(UNENDED)))
    shown = tokenizer.apply_chat_template(UNENDED, tokenize=False).rstrip()
    assert document.token_ids == tokenizer(shown, add_special_tokens=False)["input_ids"]
    first = document.is_target.index(True)
    prompt = plain_spaces(prompt_of(tokenizer, UNENDED[:2], template), kind)
    assert prompt.startswith(plain_spaces(text_of(tokenizer, document.token_ids[:first]), kind))
    assert not prompt.startswith(plain_spaces(text_of(tokenizer, document.token_ids[: first + 1]), kind))
    (sample,) = SampleMaker(options(**chosen, max_length=400))([document])
    assert sample.n_valid == len(sample.token_ids) - 1
    maker = SampleMaker(options(**chosen, max_length=first))
    assert list(maker([document])) == []
    assert maker.misfits == Misfits(too_long=1)


def test_a_conversation_without_an_answer_is_none_to_learn_from() -> None:
    chosen = options(messages_field="m", loss_on="all")
    encode, maker = Encoder(chosen, chat_tokenizer()), SampleMaker(chosen)
    assert list(maker(encode(Conversation(tuple(UNENDED[:2]))))) == []
    assert maker.misfits == Misfits(unanswered=1)


def test_a_space_that_the_template_puts_before_an_answer_is_the_answers() -> None:
    """Of a template without a generation prompt: an answer is asked for with what is rendered, without that space."""
    tokenizer = tokenizer_of("metaspace_first", "in_words")
    (document,) = encode_conversation(PartEncoder(tokenizer), UNENDED[:3])
    (asked,) = encode_conversation(PartEncoder(tokenizer), UNENDED[:2])
    assert document.token_ids[: len(asked.token_ids)] == asked.token_ids
    assert tokenizer.convert_ids_to_tokens(document.token_ids)[len(asked.token_ids)] == "▁the"


def test_marks_are_taken_as_they_are_where_offsets_leave_out_white_space() -> None:
    """The tokenizer's own mask loses an answer that begins with a space, and takes a prompt's token across a mark."""
    tokenizer = tokenizer_of("bytes_trimmed", "marked")
    messages = [{"role": "user", "content": "so?"}, {"role": "assistant", "content": " the sum "}]
    (document,) = encode_conversation(PartEncoder(tokenizer), messages)
    assert [after(tokenizer, run) for run in runs(document.token_ids, document.is_target)] == [" the sum <|im_end|>"]
