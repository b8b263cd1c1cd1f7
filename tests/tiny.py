"""A tiny teacher, student, tokenizer and data set, the same in every process that makes them."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selkd.data.samples import Sample, SampleDataset
from selkd.models.pair import ModelPair
from selkd.recipe.data import RowOptions
from selkd.training.arguments import DistillArguments

V = 83


def make_model(seed: int, layers: int = 2, **config: object) -> LlamaForCausalLM:
    """A random Llama whose distributions are far from uniform, float32."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**(options | config))).eval()


def make_pair(student: int = 1, teacher: int = 0) -> ModelPair:
    """A student of that seed and a larger teacher, made when they are asked for."""
    return ModelPair(lambda: make_model(student), lambda: make_model(teacher, 3), make_tokenizer(), V, torch.float32)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words ``w2`` … ``w82``, the padding token being the end token."""
    words = {"<unk>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, V)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>", unk_token="<unk>")


def make_samples(count: int = 8, length: int = 24, seed: int = 0, ragged: bool = True) -> SampleDataset:
    """Random samples, some of several documents, of different lengths if ``ragged``."""
    generator = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        size = int(generator.integers(length // 2, length + 1)) if ragged else length
        starts = [0] if index % 2 else [0, size // 3, size // 2]
        samples.append(Sample(generator.integers(2, V, size), np.array(starts)))
    return SampleDataset.from_samples(samples)


def make_prompts(count: int = 8, with_completions: bool = True) -> list[Sample]:
    """Random prompts of 2 to 8 tokens, with completions of 3 to 8 or none."""
    generator = np.random.default_rng(4)
    samples = []
    for _ in range(count):
        asked, told = generator.integers(2, 9), generator.integers(3, 9) if with_completions else 0
        tokens = generator.integers(2, V, asked + told)
        samples.append(Sample(tokens, np.zeros(1, np.int32), np.arange(asked + told) >= asked))
    return samples


def make_arguments(out: Path, **options: object) -> DistillArguments:
    """Full precision on the CPU, plain SGD, nothing on the side. The keys of ``data`` may stand beside the others."""
    rows = {key: options.pop(key) for key in RowOptions.model_fields if key in options}
    if rows:
        options["data"] = rows
    defaults: dict[str, object] = {
        "output_dir": str(out),
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 11,
        "positions": {"metric": "student_entropy", "fraction": 0.2},  # so that most tests select
    }
    return DistillArguments(**(defaults | options))
