"""Body and head against the model's own forward pass."""

import pytest
import torch
from tiny_families import FAMILIES, VOCABULARY, packed_batch, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig

from selkd.errors import InputError
from selkd.maths.head import Head
from selkd.models.head import check_head, check_packing, head_of, hidden_states


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_body_and_head_give_the_models_own_logits(family: str, dtype: torch.dtype, tolerance: float) -> None:
    model, batch = tiny_model(family, dtype), packed_batch()
    with torch.no_grad():
        hidden = hidden_states(model, batch["input_ids"], batch["position_ids"])
        expected = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    assert hidden.shape == (2, 16, 32)
    torch.testing.assert_close(head_of(model).logits(hidden), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gemma2", {"softcap": 2.0}),
        ("gemma3", {"softcap": 2.0}),
        ("cohere", {"scale": 0.25}),
        ("granite", {"scale": 1 / 3}),
        ("llama", {"scale": 1.0, "softcap": None, "bias": None}),
    ],
)
def test_head_reads_the_familys_own_terms(family: str, expected: dict[str, float | None]) -> None:
    head = head_of(tiny_model(family))
    assert {name: getattr(head, name) for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi", "cohere", "granite"])
def test_the_weight_alone_is_not_the_head(family: str) -> None:
    """Otherwise the comparison above could pass with scale, softcap and bias ignored."""
    model, batch = tiny_model(family), packed_batch()
    with torch.no_grad():
        hidden = hidden_states(model, batch["input_ids"], batch["position_ids"])
        expected = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    plain = Head(head_of(model).weight).logits(hidden)
    assert (plain - expected).abs().max() > 0.1


@pytest.mark.parametrize("tied", ["llama", "llama_tied", "gpt2"])
def test_gradients_reach_the_models_parameters(tied: str) -> None:
    model, batch = tiny_model(tied), packed_batch()
    arguments = (batch["input_ids"], batch["position_ids"])
    model(input_ids=arguments[0], position_ids=arguments[1], use_cache=False).logits.square().mean().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    head_of(model).logits(hidden_states(model, *arguments)).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_do_not_see_each_other(family: str) -> None:
    model, batch = tiny_model(family), packed_batch()
    with torch.no_grad():
        packed = hidden_states(model, batch["input_ids"], batch["position_ids"])
        second = hidden_states(model, batch["input_ids"][:1, 6:], batch["position_ids"][:1, 6:])
        joined = hidden_states(model, batch["input_ids"], batch["position_ids"][1:].expand(2, -1))
    # Gemma 2 takes its softmax in float32.
    torch.testing.assert_close(packed[:1, 6:], second, rtol=1e-5, atol=1e-5)
    # The same tokens as one document are something else, so the equality above says something.
    assert (joined[0, 6:] - packed[0, 6:]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checks_pass_on_known_families(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    check_head(model)
    check_packing(model)


def test_checks_leave_every_modules_mode_alone() -> None:
    model = tiny_model("gpt2").train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    check_head(model)  # GPT-2's dropout would make the two passes differ if it were on
    assert [module.training for module in model.modules()] == before


def test_check_head_refuses_logits_changed_behind_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float32)
    original = model.forward

    def scaled(*args: object, **kwargs: object) -> object:
        output = original(*args, **kwargs)
        output.logits = output.logits * 0.9
        return output

    monkeypatch.setattr(model, "forward", scaled)
    with pytest.raises(InputError, match=r"LlamaForCausalLM computes its logits .* max abs difference [\d.]+"):
        check_head(model)


def test_check_head_refuses_logits_that_are_not_numbers() -> None:
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(InputError, match=r"LlamaForCausalLM: expected numbers as logits, got nan.*use float32"):
        check_head(model)


def test_check_head_refuses_a_softcap_that_the_model_does_not_apply() -> None:
    """Transformers' Gemma 3 with a vision tower reads no final_logit_softcapping."""
    model = tiny_model("gemma3_vision", torch.float32)
    check_head(model)
    model.config.text_config.final_logit_softcapping = 2.0
    with pytest.raises(InputError, match="max abs difference"):
        check_head(model)


def test_check_head_refuses_a_scale_that_the_head_does_not_know() -> None:
    model = tiny_model("cohere", torch.bfloat16)
    model.logit_scale = 0.3  # the configuration says 0.25
    with pytest.raises(InputError, match="max abs difference"):
        check_head(model)


class _Adapter(nn.Module):
    """As PEFT wraps a layer: a weight attribute that is not all of the function."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden)


def test_head_of_refuses_an_adapter_on_the_head() -> None:
    model = tiny_model("llama")
    model.lm_head = _Adapter(model.lm_head)
    with pytest.raises(InputError, match=r"head of LlamaForCausalLM is a _Adapter.*adapter's target modules"):
        head_of(model)


def test_check_packing_refuses_a_model_without_position_ids() -> None:
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    check_head(model)
    with pytest.raises(InputError, match=r"BloomForCausalLM does not keep packed documents apart.*data\.packing"):
        check_packing(model)
