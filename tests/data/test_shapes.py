"""Prompts and conversations: which tokens are learned, what fits in a sample, and what is said of what does not."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chatty import CHAT, MARKED, NO_PROMPT, PLAIN, REASONING, STRICT, chat_tokenizer
from transformers import PreTrainedTokenizerFast

from selkd.data.chat_encoding import encode_conversation
from selkd.data.collate import collate
from selkd.data.documents import Conversation, Exchange, document_of
from selkd.data.encoding import Encoder
from selkd.data.packing import Misfits, SampleMaker, samples_of_rows
from selkd.data.prompt_encoding import EncodedDocument, PartEncoder
from selkd.data.samples import Sample, SampleDataset
from selkd.data.splits import Splits, load_splits
from selkd.errors import InputError
from selkd.models.sources import default_cache_dir, locate
from selkd.models.tokenizers import load_tokenizer
from selkd.recipe.data import DataOptions, RowOptions
from selkd.recipe.part import parse_part


def learned(tokenizer: PreTrainedTokenizerFast, document: EncodedDocument) -> list[str]:
    """The text of each run of targets."""
    runs: list[list[int]] = []
    for index, (token, wanted) in enumerate(zip(document.token_ids, document.is_target, strict=True)):
        if wanted:
            if index == 0 or not document.is_target[index - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def options(**changes: Any) -> DataOptions:
    return parse_part(DataOptions, {"path": "x", **changes}, "data")


@pytest.mark.slow
@pytest.mark.real_teacher
def test_the_demos_own_chat_template() -> None:
    tokenizer = load_tokenizer(locate("demo", default_cache_dir()))
    (document,) = encode_conversation(PartEncoder(tokenizer), CHAT)
    assert learned(tokenizer, document) == ["the sum<|im_end|>", "it is<|im_end|>"]
    assert document.token_ids == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"][:-1]  # a line's end


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_the_assistants_turns_and_their_ends_are_learned(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    (document,) = encode_conversation(PartEncoder(tokenizer), CHAT)
    assert learned(tokenizer, document) == ["the sum<|im_end|>", "it is<|im_end|>"]
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert whole.startswith(tokenizer.decode(document.token_ids))


def test_a_template_that_rewrites_earlier_turns_gives_a_document_a_turn() -> None:
    tokenizer = chat_tokenizer(REASONING)
    first, second = encode_conversation(PartEncoder(tokenizer), CHAT)
    assert learned(tokenizer, first) == ["<think>\n\n</think>\n\nthe sum<|im_end|>"]
    assert learned(tokenizer, second) == ["<think>\n\n</think>\n\nit is<|im_end|>"]
    assert "the sum<|im_end|>" in tokenizer.decode(second.token_ids)


def test_without_a_generation_prompt_the_turns_header_is_not_learned() -> None:
    tokenizer = chat_tokenizer(NO_PROMPT)
    (document,) = encode_conversation(PartEncoder(tokenizer), CHAT)
    assert learned(tokenizer, document) == ["the sum</s>", "it is</s>"]
    hides = "{{ messages | length }}"
    with pytest.raises(InputError, match=r"does not show where an assistant's turn begins.*% generation %"):
        encode_conversation(PartEncoder(chat_tokenizer(hides)), CHAT)


@pytest.mark.parametrize("ends", ["", "</s>"])
def test_an_empty_turn_has_its_end_alone_to_learn(ends: str) -> None:
    """Also where the generation prompt ends with a space, which the template's own turn may not show."""
    turns = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}" + ends + "\n{% endfor %}"
    tokenizer = chat_tokenizer(turns + "{% if add_generation_prompt %}assistant: {% endif %}")
    for content, said in (("", ends), ("it is", f"it is{ends}")):
        answered = [CHAT[1], {"role": "assistant", "content": content}]
        (document,) = encode_conversation(PartEncoder(tokenizer), answered)
        assert learned(tokenizer, document) == [said] * bool(said)
        first, *rest = encode_conversation(PartEncoder(tokenizer), [*answered, *CHAT[1:3]])
        assert learned(tokenizer, first) == [said] * bool(said) + [f"{CHAT[2]['content']}{ends}"]
        assert not rest


def test_what_a_template_refuses_or_lacks_is_told() -> None:
    with pytest.raises(InputError, match=r"refuses a conversation of \['system'.*the user speaks first"):
        encode_conversation(PartEncoder(chat_tokenizer(STRICT)), CHAT)
    with pytest.raises(InputError, match="need a chat template, and the teacher's tokenizer has none"):
        Encoder(options(messages_field="messages"), chat_tokenizer(None))


def test_what_follows_the_last_answer_is_left_out_and_a_question_alone_is_a_prompt() -> None:
    tokenizer = chat_tokenizer(PLAIN)
    encode = PartEncoder(tokenizer)
    assert encode_conversation(encode, [*CHAT, {"role": "user", "content": "oh"}]) == encode_conversation(encode, CHAT)
    (prompt,) = encode_conversation(encode, CHAT[:2])
    assert not any(prompt.is_target)
    assert tokenizer.decode(prompt.token_ids).endswith("<|im_start|>assistant\n")


def test_loss_on_all_learns_the_prompt_too() -> None:
    tokenizer = chat_tokenizer(PLAIN)
    for fields in ({"messages_field": "m"}, {"prompt_field": "p", "completion_field": "c"}):
        document = Conversation(tuple(CHAT)) if "messages_field" in fields else Exchange("a?", "b")
        chosen = options(**fields, loss_on="all", packing=False)
        documents = Encoder(chosen, tokenizer)(document)
        (sample,) = SampleMaker(chosen)(documents)
        assert sample.n_valid == len(sample.token_ids) - 1


def test_loss_on_all_counts_no_turn_twice_and_cuts_no_prompt_to_nothing() -> None:
    """Also where the template rewrites earlier turns, and where the prompt alone fills a sample."""
    tokenizer = chat_tokenizer(REASONING)
    documents = Encoder(options(messages_field="m", loss_on="all"), tokenizer)(Conversation(tuple(CHAT)))
    assert len(documents) == 1
    assert all(message["content"] in tokenizer.decode(documents[0].token_ids) for message in CHAT[:-1])
    maker = SampleMaker(options(messages_field="m", loss_on="all", packing=False, max_length=12))
    long_prompt = EncodedDocument(list(range(40)), [False] * 30 + [True] * 10)
    assert list(maker([long_prompt])) == []
    assert maker.misfits == Misfits(too_long=1)


def test_a_template_of_ones_own_puts_white_space_to_the_completion() -> None:
    tokenizer = chat_tokenizer()
    encode = Encoder(
        options(prompt_field="q", completion_field="a", template="Q: {prompt}\nA: {completion} ."), tokenizer
    )
    (document,) = encode(Exchange("the {completion}?", "so it is"))
    assert learned(tokenizer, document) == [" so it is .<|im_end|>"]
    (prompt,) = Encoder(options(prompt_field="q", template="Q: {prompt}\nA: {completion} ."), tokenizer)(
        Exchange("the {completion}?", None)
    )
    assert prompt.token_ids == document.token_ids[: len(prompt.token_ids)]
    assert tokenizer.decode(prompt.token_ids) == "Q: the {completion}?\nA:"


def test_the_chat_template_serves_prompts_and_completions() -> None:
    tokenizer = chat_tokenizer()
    (document,) = Encoder(options(prompt_field="q", completion_field="a", template="chat"), tokenizer)(
        Exchange("so?", "it is")
    )
    assert learned(tokenizer, document) == ["it is<|im_end|>"]


def test_a_token_across_the_border_is_taken_apart() -> None:
    tokenizer = chat_tokenizer()
    (single,) = tokenizer("the")["input_ids"]
    found = PartEncoder(tokenizer)([("t", False), ("he", True)])
    assert single not in found.token_ids
    assert found.token_ids[:1] == tokenizer("t")["input_ids"]
    assert found.is_target == [False, *[True] * (len(found.token_ids) - 1)]


REFUSED = {
    "text_field and": ({"text_field": "t", "prompt_field": "p"}, "a row has one shape"),
    "completion alone": ({"completion_field": "c"}, "data.completion_field: a completion follows a prompt"),
    "template of text": ({"template": "chat"}, "data.template: without effect on texts"),
    "loss of text": ({"loss_on": "all"}, "data.loss_on: without effect on texts"),
    "template of messages": ({"messages_field": "m", "template": "{prompt}{completion}"}, "take the tokenizer's chat"),
    "template without places": ({"prompt_field": "p", "template": "Q: {prompt}"}, "then {completion} once"),
    "turned template": ({"prompt_field": "p", "template": "{completion}{prompt}"}, "then {completion} once"),
    "loss of prompts": ({"prompt_field": "p", "loss_on": "all"}, "all makes a text of a prompt alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_shapes_that_are_none_are_refused(name: str) -> None:
    given, message = REFUSED[name]
    with pytest.raises(InputError) as caught:
        options(**given)
    assert message in str(caught.value)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Splits:
    fields = {"max_length": 48, "held_out_fraction": 0.2, "path": str(path)} | changes
    return load_splits(options(**fields), tokenizer, "tokenizer", path.parent / "cache")


ROWS = [{"question": f"what is {i}?", "answer": f"it is the sum {i * i}."} for i in range(60)]


@pytest.mark.parametrize("packing", [True, False])
def test_prompts_to_samples_and_back_from_disk(packing: bool, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    path = write(tmp_path / "rows.jsonl", ROWS)
    splits = load(path, tokenizer, prompt_field="question", completion_field="answer", packing=packing, max_length=96)
    assert splits.misfits == Misfits()
    found = []
    for sample in [*splits.train, *splits.held_out]:
        assert len(sample.token_ids) <= 96
        assert packing or len(sample.document_starts) == 1
        assert sample.is_target is not None
        batch = collate([sample], 0)
        assert int(batch["valid_mask"].sum()) == sample.n_valid
        text = tokenizer.decode(batch["targets"][batch["valid_mask"]])
        found += text.removesuffix("<|im_end|>").split("<|im_end|>")
    assert sorted(found) == sorted(row["answer"] for row in ROWS)
    assert splits.train.n_valid.tolist() == [sample.n_valid for sample in splits.train]
    assert (max(len(s.document_starts) for s in splits.train) > 1) == packing


def test_one_question_with_two_answers_lies_in_one_split(tmp_path: Path) -> None:
    rows = [row | {"answer": answer} for row in ROWS for answer in ("so", "the sum")]
    tokenizer = chat_tokenizer()
    splits = load(write(tmp_path / "r.jsonl", rows), tokenizer, prompt_field="question", completion_field="answer",
                  packing=False)  # fmt: skip
    asked = [
        {tokenizer.decode(s.token_ids[~s.is_target]) for s in part if s.is_target is not None}
        for part in (splits.train, splits.held_out)
    ]
    assert asked[0]
    assert asked[1]
    assert not asked[0] & asked[1]


def test_what_does_not_fit_is_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        *ROWS,
        {"question": "q" * 48, "answer": "lost"},
        {"question": "q" * 47, "answer": "one token of it stays"},
        {"question": "q" * 30, "answer": "a" * 30},
    ]
    path, tokenizer = write(tmp_path / "rows.jsonl", rows), chat_tokenizer()
    for _ in range(2):  # said again when read back
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            splits = load(path, tokenizer, prompt_field="question", completion_field="answer", held_out_fraction=0)
        assert splits.misfits == Misfits(cut=2, too_long=1)
        assert "1 of 63 prompts are longer than data.max_length = 48 and were left out" in caplog.text
        assert "2 of 63 documents were cut at data.max_length = 48" in caplog.text
    lost = tokenizer("lost")["input_ids"]
    assert not any(lost == sample.token_ids[-len(lost) :].tolist() for sample in splits.train)
    only = write(tmp_path / "only.jsonl", [{"question": "q" * 60, "answer": "lost"}])
    with pytest.raises(InputError, match=r"1 prompts alone are longer than data.max_length = 48.*Raise"):
        load(only, tokenizer, prompt_field="question", completion_field="answer", held_out_fraction=0)


def test_prompts_alone_are_samples_without_a_target(tmp_path: Path) -> None:
    splits = load(write(tmp_path / "r.jsonl", ROWS), chat_tokenizer(), prompt_field="question", packing=False)
    assert splits.train.n_valid.sum() == 0
    assert len(splits.train) + len(splits.held_out) == len(ROWS)


def test_rows_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    cases: list[tuple[Any, dict[str, str], str]] = [
        ({"q": "x"}, {"prompt_field": "question"}, "data.prompt_field: .*has no field 'question'; it has q"),
        ({"q": 5}, {"prompt_field": "q"}, "data.prompt_field: 'q' of .* is int, expected text"),
        ({"m": "hi"}, {"messages_field": "m"}, "data.messages_field: 'm' of .* is str, expected a list of messages"),
        ({"m": [{"role": "user"}]}, {"messages_field": "m"}, "expected messages with role and content"),
    ]
    for number, (row, fields, message) in enumerate(cases):
        with pytest.raises(InputError, match=message):
            load(write(tmp_path / f"{number}.jsonl", [row]), chat_tokenizer(), **fields)


def test_packing_keeps_documents_whole_and_apart() -> None:
    generator = np.random.default_rng(0)
    documents = []
    for number in range(200):
        size = int(generator.integers(2, 40))
        documents.append(EncodedDocument([number] * size, [index >= size // 2 for index in range(size)]))
    chosen = options(messages_field="m", max_length=48)
    samples = list(SampleMaker(chosen)(documents))
    pieces = [
        (int(piece[0]), len(piece), int(wanted.sum()))
        for sample in samples
        for piece, wanted in zip(
            np.split(sample.token_ids, sample.document_starts[1:]),
            np.split(sample.is_target, sample.document_starts[1:]),  # type: ignore[arg-type]
            strict=True,
        )
    ]
    assert sorted(pieces) == [(n, len(d.token_ids), sum(d.is_target)) for n, d in enumerate(documents)]
    assert sum(len(d.token_ids) for d in documents) / (48 * len(samples)) > 0.9
    assert [s.id for s in SampleMaker(chosen)(documents)] == [s.id for s in samples]


def test_the_targets_are_part_of_a_samples_id_and_all_of_them_are_none() -> None:
    tokens, starts = np.arange(5), np.array([0, 3])
    plain = Sample(tokens, starts)
    ids = {plain.id}
    for mask in ([0, 1, 1, 0, 0], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0]):
        ids.add(Sample(tokens, starts, np.array(mask, dtype=bool)).id)
    assert len(ids) == 4
    same = Sample(tokens, starts, np.array([0, 1, 1, 0, 1], dtype=bool))
    assert (same.is_target, same.id, same.n_valid) == (None, plain.id, 3)
    with pytest.raises(InputError, match=r"Sample\.is_target: expected 5 booleans"):
        Sample(tokens, starts, np.ones(4, dtype=bool))
    assert SampleDataset.from_samples([plain, same])[1].id == plain.id


def test_a_message_with_more_than_its_content_is_refused() -> None:
    """The template would show it, and it would not be learned."""
    said = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}], "id": 7}
    with pytest.raises(InputError, match="a message with tool_calls, which selkd does not pass to the chat template"):
        document_of({"messages": [said]}, options(messages_field="messages"), "row 1")
    harmless = {"role": "assistant", "content": "4", "tool_calls": None, "id": 7}
    assert document_of({"messages": [harmless]}, options(messages_field="messages"), "row 1") is not None


def test_a_null_completion_is_a_prompt_alone() -> None:
    """So it is counted as unanswered, and not passed over."""
    chosen = options(prompt_field="q", completion_field="a")
    assert document_of({"q": "2 + 2?", "a": None}, chosen, "row 1") == Exchange("2 + 2?", None)
    assert document_of({"q": None, "a": "4"}, chosen, "row 1") is None


FOUND: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "messages": ({"messages": CHAT, "id": 1}, {"messages_field": "messages"}),
    "ultrachat": ({"prompt": "w2", "prompt_id": "x", "messages": CHAT}, {"messages_field": "messages"}),
    "prompt": ({"prompt": "w2", "completion": "w3"}, {"prompt_field": "prompt", "completion_field": "completion"}),
    "text": ({"text": "w2", "messages": CHAT}, {"text_field": "text"}),
}
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]} for m in CHAT
]


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", "/"])
def test_the_ecosystems_own_fields_are_found_and_told(
    name: str, suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row, expected = FOUND[name]
    path = tmp_path / ("rows" + suffix)
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    elif suffix == "/":
        path.mkdir()
        (path / "a.txt").write_text("w2")
        (path / "b.jsonl").write_text(json.dumps(row))
    else:
        path.write_text("\n" + json.dumps(row) + "\n")
    found = options(path=str(path))
    keys = ("text_field", "prompt_field", "completion_field", "messages_field")
    assert {key: getattr(found, key) for key in keys if getattr(found, key)} == expected
    assert ("took" in caplog.text) == (name != "text")
    # What is named is not looked for, and a resolved recipe names all.
    assert options(path=str(path), text_field="other").text_field == "other"
    assert parse_part(DataOptions, found.model_dump()) == found


def test_rows_without_a_known_field_name_the_keys_to_set(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for row, message in (
        ({"question": "w2", "answer": "w3"}, "no field 'text'; it has answer, question, and none.*data.prompt_field"),
        ({"messages": CHAT, "conversations": SHAREGPT}, "has messages and conversations; say which is meant"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(InputError, match=message):
            options(path=str(path))
        with pytest.raises(InputError, match=message):
            samples_of_rows([row], "train_dataset", RowOptions.model_validate({}), chat_tokenizer(PLAIN))


def test_sharegpt_is_the_same_conversation() -> None:
    tokenizer = chat_tokenizer(PLAIN)
    made = [
        samples_of_rows([row], "rows", RowOptions.model_validate({}), tokenizer)[0]
        for row in ({"messages": CHAT}, {"conversations": SHAREGPT})
    ]
    assert made[0].id == made[1].id
    with pytest.raises(InputError, match="holds a message from 'observation'; known are human, gpt"):
        document_of({"c": [{"from": "observation", "value": "w2"}]}, options(messages_field="c"), "x")
