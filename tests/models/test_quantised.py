"""Quantised teachers on the CPU, where the package is installed: the layers are, the head is not, and a run learns.

``make test-quantised`` runs this with torchao and bitsandbytes, which are no part of the development environment.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import V, make_model, make_tokenizer
from tiny_run import make_recipe
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from selkd import distill
from selkd.models.head import check_head, head_of
from selkd.models.loading import load_model
from selkd.models.quantisation import precision_of, quantization_config
from selkd.models.sources import default_cache_dir, locate

CPU = torch.device("cpu")
# The divergence from the unquantised model that its bits explain, nats.
FORMS = {"torchao_int8": 0.05, "bitsandbytes_8bit": 0.1, "bitsandbytes_4bit": 1.0}
# Widths that the 4-bit kernel for CPUs takes: multiples of 64.
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


def installed(form: str) -> str:
    package = form.partition("_")[0]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: make test-quantised")
    return form


def saved(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def neox() -> PreTrainedModel:
    """Its head is called embed_out."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["tied", "untied", "neox"])
@pytest.mark.parametrize("form", FORMS)
def test_layers_are_quantised_and_the_head_stays_a_plain_linear_layer(tmp_path: Path, form: str, kind: str) -> None:
    model = neox() if kind == "neox" else make_model(0, **SIZES, tie_word_embeddings=kind == "tied")
    source = locate(str(saved(tmp_path / "model", model)), tmp_path / "cache")
    found = load_model(source, torch.bfloat16, CPU, installed(form))
    assert torch.equal(head_of(found).weight, head_of(model).weight.to(torch.bfloat16))
    check_head(found)
    linear = [m for m in found.modules() if isinstance(m, torch.nn.Linear) and m is not found.get_output_embeddings()]
    plain = [m for m in linear if type(m.weight) in (torch.Tensor, torch.nn.Parameter)]
    assert linear
    assert not plain
    ids = torch.arange(2, 80).reshape(2, -1)
    with torch.no_grad():
        assert 0 < divergence(model.to(torch.bfloat16)(ids).logits, found(ids).logits) < FORMS[form]


@pytest.mark.parametrize("form", FORMS)
def test_what_it_says_of_a_sample_does_not_depend_on_those_beside_it(tmp_path: Path, form: str) -> None:
    """With its usual threshold bitsandbytes finds outlying columns in the whole batch."""
    model = make_model(0, **SIZES)
    model.model.layers[1].input_layernorm.weight.data[3] = 20.0  # outliers, in some samples
    source = locate(str(saved(tmp_path / "model", model)), tmp_path / "cache")
    found = load_model(source, torch.bfloat16, CPU, installed(form))
    ids = torch.arange(2, 82).reshape(8, -1)
    with torch.no_grad():
        together = found(ids).logits
        for row in range(8):
            assert divergence(found(ids[row : row + 1]).logits, together[row : row + 1]) < 1e-3


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_run_learns_from_it(tmp_path: Path, form: str, is_cached: bool) -> None:
    saved(tmp_path / "teacher", make_model(0, layers=4, **SIZES))
    saved(tmp_path / "student", make_model(5))
    recipe = make_recipe(tmp_path)
    if not is_cached:
        recipe |= {"cache": None, "classes": {"sampler": "all"}}
    recipe |= {
        "student": {"model": str(tmp_path / "student")},
        "teacher": recipe["teacher"] | {"quantization": installed(form)},
    }
    recipe["training"] |= {"learning_rate": 0.01}
    run = distill(recipe, tmp_path / "run")
    fidelity = run.record["fidelity"]
    assert fidelity["after"]["kl_nats"] < fidelity["before"]["kl_nats"]
    assert form in run.record["environment"]["precision"]
    assert AutoModelForCausalLM.from_pretrained(run.student).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.real_teacher
@pytest.mark.parametrize("form", FORMS)
def test_the_demos_teacher_quantised(form: str) -> None:
    source = locate("demo", default_cache_dir())
    ids = torch.arange(1000, 1200)[None]
    with torch.no_grad():
        expected = load_model(source, torch.bfloat16, CPU)(ids).logits
        assert divergence(expected, load_model(source, torch.bfloat16, CPU, installed(form))(ids).logits) < 1.0


def test_what_decides_a_quantised_teachers_numbers_is_in_the_name_of_its_precision() -> None:
    """Which every fingerprint holds: caches and scores of another form are never taken for this one's."""
    four = quantization_config(installed("bitsandbytes_4bit"), torch.bfloat16)
    assert precision_of(torch.bfloat16, "bitsandbytes_4bit").split() == [
        "torch.bfloat16", "bitsandbytes_4bit", four.bnb_4bit_quant_type,
    ]  # fmt: skip
    eight = quantization_config("bitsandbytes_8bit", torch.bfloat16)
    assert eight.llm_int8_threshold == 0
    assert precision_of(torch.bfloat16, "bitsandbytes_8bit") == "torch.bfloat16 bitsandbytes_8bit no outliers apart"
    assert precision_of(torch.float32, None) == "torch.float32"
