"""Pruned models against the original with layers skipped."""

from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, LAYERS, VOCABULARY, packed_batch, randomised, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from selkd.errors import InputError
from selkd.models.pruning import block_influence, keep_layers, prune


def _logits(model: torch.nn.Module) -> torch.Tensor:
    batch = packed_batch()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


def _identity(hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return hidden_states


def _logits_without(model: torch.nn.Module, skipped: set[int]) -> torch.Tensor:
    """The original with the ``skipped`` layers' forward replaced by the identity."""
    names = {"GPT2LMHeadModel": "transformer.h", "Gemma3ForConditionalGeneration": "model.language_model.layers"}
    layers = model.get_submodule(names.get(type(model).__name__, "model.layers"))
    original = {index: layers[index].forward for index in skipped}
    for index in skipped:
        layers[index].forward = _identity
    try:
        return _logits(model)
    finally:
        for index, forward in original.items():
            layers[index].forward = forward


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_kept_gives_identical_logits(family: str) -> None:
    model = tiny_model(family)
    assert torch.equal(_logits(keep_layers(model, range(LAYERS))), _logits(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [[0, 3], [1, 2, 3], [2]])
def test_kept_layers_compute_what_the_original_does_with_the_others_skipped(
    family: str, kept: list[int], tmp_path: Path
) -> None:
    model = tiny_model(family)
    pruned = keep_layers(model, kept)
    expected = _logits_without(model, set(range(LAYERS)) - set(kept))
    torch.testing.assert_close(_logits(pruned), expected)
    assert (expected - _logits(model)).abs().max() > 1e-3

    assert type(pruned) is type(model)
    assert pruned.config.get_text_config().num_hidden_layers == len(kept)
    assert not pruned.training
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager").eval()
    assert torch.equal(_logits(again), _logits(pruned))


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "gemma3_vision"])
def test_lists_by_layer_are_cut_with_the_layers(family: str) -> None:
    pruned = keep_layers(tiny_model(family), [1, 2, 3])
    assert pruned.config.get_text_config().layer_types == ["full_attention", "sliding_attention", "full_attention"]


def test_numbers_of_dense_layers_are_renumbered_and_routers_kept() -> None:
    model = tiny_model("qwen3_moe")
    pruned = keep_layers(model, [1, 3])
    assert pruned.config.mlp_only_layers == [0]
    assert torch.equal(pruned.model.layers[1].mlp.gate.weight, model.model.layers[3].mlp.gate.weight)


def test_as_many_experts_as_layers_are_not_taken_for_the_layers() -> None:
    """Experts may be a ModuleList too; Mixtral's are one tensor here, so a nested list is put beside them."""
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.extra = torch.nn.ModuleList(torch.nn.Identity() for _ in range(LAYERS))
    assert len(block_influence(model, [packed_batch()])) == LAYERS


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gemma2", "cohere"])
def test_tied_weights_stay_tied_also_on_disk(family: str, tmp_path: Path) -> None:
    pruned = keep_layers(tiny_model(family), [0, 2])
    pruned.save_pretrained(tmp_path)
    for model in (pruned, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_untied_weights_stay_untied() -> None:
    pruned = keep_layers(tiny_model("llama"), [0, 2])
    assert pruned.get_output_embeddings().weight is not pruned.get_input_embeddings().weight


def test_the_pruned_model_shares_no_memory_and_can_be_trained() -> None:
    model = tiny_model("llama_tied")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = keep_layers(model, [0, 2])
    assert all(parameter.requires_grad for parameter in pruned.parameters())
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_dtype_is_kept() -> None:
    pruned = keep_layers(tiny_model("llama", torch.bfloat16), [0, 2])
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}


def test_layers_that_depend_on_their_number_are_refused() -> None:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=4, scale_attn_by_inverse_layer_idx=True
    )
    model = randomised(config)
    keep_layers(model, [0, 1])  # the first layers keep their numbers
    with pytest.raises(InputError, match=r"GPT2LMHeadModel can't be cut to layers \[0, 2\].*depend on their number"):
        keep_layers(model, [0, 2])


def test_a_layer_of_another_kind_in_its_place_is_refused() -> None:
    """decoder_sparse_step 2 makes every second layer a mixture: layer 1 can't become layer 0."""
    model = tiny_model("qwen3_moe")
    config = type(model.config).from_dict(model.config.to_dict() | {"decoder_sparse_step": 2, "mlp_only_layers": []})
    with pytest.raises(InputError, match=r"Qwen3MoeForCausalLM can't be cut to layers \[1\]"):
        keep_layers(randomised(config), [1])


@pytest.mark.parametrize("kept", [[], [1, 1], [2, 0], [-1, 0], [0, 4]])
def test_bad_indices_are_refused(kept: list[int]) -> None:
    with pytest.raises(InputError, match="expected ascending numbers from 0 to 3"):
        keep_layers(tiny_model("llama"), kept)


def test_block_influence_is_one_minus_the_mean_cosine_at_valid_positions() -> None:
    model, batch = tiny_model("llama"), packed_batch()
    with torch.no_grad():
        states = model.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], output_hidden_states=True, use_cache=False
        ).hidden_states
    influence = block_influence(model, [batch])
    for layer in range(LAYERS - 1):  # the last recorded state has gone through the final norm
        before, after = states[layer], states[layer + 1]
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        assert influence[layer] == pytest.approx(1 - cosine[batch["valid_mask"]].mean().item(), abs=1e-6)


def test_block_influence_does_not_depend_on_how_text_is_cut_into_batches() -> None:
    model, batch = tiny_model("llama"), packed_batch()
    rows = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(2)]
    assert block_influence(model, rows) == pytest.approx(block_influence(model, [batch]), abs=1e-6)


def test_a_layer_that_changes_nothing_has_no_influence_and_goes_first() -> None:
    model, batch = tiny_model("llama"), packed_batch()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    pruned, kept, influence = prune(model, 3, [batch])
    assert influence[2] == pytest.approx(0, abs=1e-6)
    assert kept == [0, 1, 3]
    torch.testing.assert_close(_logits(pruned), _logits(model))


def test_no_hook_is_left_behind() -> None:
    model = tiny_model("llama")
    prune(model, 2, [packed_batch()])
    assert not any(layer._forward_hooks for layer in model.model.layers)


@pytest.mark.parametrize("n_keep", [0, -1, LAYERS, 30])
def test_a_number_of_layers_out_of_range_is_refused(n_keep: int) -> None:
    with pytest.raises(
        InputError, match=rf"student\.prune_from_teacher\.layers is {n_keep}: the teacher has 4 layers, so 1 to 3"
    ):
        prune(tiny_model("llama"), n_keep, [packed_batch()])


def test_text_without_a_valid_position_is_refused() -> None:
    batch = packed_batch()
    batch["valid_mask"][:] = False
    with pytest.raises(InputError, match="no valid position"):
        block_influence(tiny_model("llama"), [batch])


def test_an_end_token_list_as_long_as_the_layers_is_not_cut() -> None:
    model = randomised(LlamaConfig(**_small(), eos_token_id=[2, 3, 4]))
    assert keep_layers(model, [0, 1]).config.eos_token_id == [2, 3, 4]


def test_two_lists_of_layers_are_refused() -> None:
    model = randomised(MixtralConfig(**_small(), num_local_experts=2, num_experts_per_tok=1))
    model.model.others = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    with pytest.raises(InputError, match=r"expected one list of 3 layers, found \['layers', 'others'\]"):
        keep_layers(model, [0])


def _small() -> dict[str, int]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
