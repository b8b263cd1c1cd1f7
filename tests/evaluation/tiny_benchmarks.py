"""Rows of every benchmark in their original fields, made on the spot, and a model that reads bytes."""

import json
from pathlib import Path
from typing import Any

from tiny import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from selkd.evaluation.evaluated_model import EvaluatedModel
from selkd.models.pair import ModelSlot

BYTES = 257

ROWS: dict[str, list[dict[str, Any]]] = {
    "hellaswag_val.jsonl": [
        {
            "ind": 24 + n,
            "activity_label": "Roof shingle removal",
            "ctx_a": "A man is sitting on a roof.",
            "ctx_b": "he",
            "ctx": "A man is sitting on a roof. he",
            "endings": ["is using wrap.", "is ripping tiles off.", f"holds {n} cubes.", "[step] starts  to pull."],
            "source_id": "activitynet~v_-JhWjGDPHMY",
            "split": "val",
            "split_type": "indomain",
            "label": str(n % 4),
        }
        for n in range(6)
    ],
    "piqa_valid.jsonl": [
        {"goal": f"How do I ready cage {n}?", "sol1": "Add bedding.", "sol2": "Add paper scraps.", "label": n % 2}
        for n in range(6)
    ],
    "arc_easy_test.jsonl": [
        {
            "id": f"Q{n}",
            "question": f"Which of these {n} is warm?",
            "choices": {"text": ["ice", "snow", "fire"], "label": ["1", "2", "3"]},
            "answerKey": str(1 + n % 3),
        }
        for n in range(5)
    ]
    + [
        {
            "id": "Q5",
            "question": "Which is blue?",
            "choices": {"text": ["sky", "grass", "soot", "milk"], "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
        }
    ],
    "gsm8k_test.jsonl": [
        {"question": f"Ann has {n} eggs and buys 2. How many?", "answer": f"She has {n}+2.\n#### {n + 2}"}
        for n in range(4)
    ],
    "lambada_openai_test.jsonl": [
        {"text": f"He took the {word} and gave it to her, and she was glad of the {word}"}
        for word in ("hat", "lamp", "book", "ox", "chair", "pen")
    ],
    "ifeval_input_data.jsonl": [
        {
            "key": 1000,
            "prompt": "Write at least 2 sentences. Mention the word soup.",
            "instruction_id_list": ["length_constraints:number_sentences", "keywords:existence"],
            "kwargs": [{"num_sentences": 2, "relation": "at least"}, {"keywords": ["soup"]}],
        },
        {
            "key": 1001,
            "prompt": "Answer without any comma.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        },
    ],
}
ROWS["arc_easy_validation.jsonl"] = [row | {"id": f"V{row['id']}"} for row in ROWS["arc_easy_test.jsonl"][:4]]
ROWS["gsm8k_train.jsonl"] = [{"question": f"What is {n} + 1?", "answer": f"Simple.\n#### {n + 1}"} for n in range(3)]
ROWS["hellaswag_train.jsonl"] = ROWS["hellaswag_val.jsonl"][:3]
ROWS["piqa_train.jsonl"] = ROWS["piqa_valid.jsonl"][:3]


def write_rows(folder: Path, *names: str) -> Path:
    """The named files, or all of them, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ROWS:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]), encoding="utf-8")
    return folder


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<end>": 0} | {byte: 1 + i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def save_model(folder: Path, seed: int = 0, **config: object) -> Path:
    """A random model of bytes with its tokenizer."""
    options = {"vocab_size": BYTES, "max_position_embeddings": 4096, "eos_token_id": 0, "pad_token_id": 0}
    make_model(seed, **(options | config)).save_pretrained(folder)
    make_byte_tokenizer().save_pretrained(folder)
    return folder


def evaluated(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> EvaluatedModel:
    """A model in memory, of bytes unless another tokenizer is given, as what is to be measured."""
    slot = ModelSlot(lambda: model)
    return EvaluatedModel("model", "model", "model", model.dtype, None, slot, tokenizer or make_byte_tokenizer())
