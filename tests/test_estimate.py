"""Estimates against what really happens: counts of a run, bytes that autograd saves, bytes of a cache."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model
from tiny_run import make_recipe
from transformers import LlamaConfig

from selkd import distill
from selkd.errors import InputError
from selkd.estimate.architecture import describe
from selkd.estimate.body import body_memory, optimiser_bytes_per_parameter
from selkd.estimate.estimate import estimate
from selkd.models.head import hidden_states
from selkd.recipe import Recipe, parse_part


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    return parse_part(Recipe, make_recipe(folder, **changes))


def test_counts_and_cache_bytes_are_those_of_the_run(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, name="real")
    answer = estimate(recipe, with_probe=True)
    assert not (tmp_path / "run").exists()
    record = distill(recipe, tmp_path / "run").record
    assert answer["parameters"] == {"teacher": record["teacher"]["parameters"], "student": 18176}
    assert answer["parameters"]["student"] == record["student"]["parameters"]
    assert answer["data"]["samples"] == record["counts"]["samples"]
    assert answer["data"]["samples_kept"] == record["counts"]["samples_kept"]
    assert answer["training"]["steps"] == record["train"]["steps"]
    # The kept samples' own lengths differ from the mean, and batches are padded.
    queries, ran_on = answer["teacher_tokens"], record["teacher_tokens"]
    assert queries["cache"] == pytest.approx(ran_on["cache"], rel=0.05)
    assert queries["evaluate"] == pytest.approx(ran_on["evaluate_before"] + ran_on["evaluate_after"], rel=0.05)
    assert answer["teacher_cache"]["positions"] == pytest.approx(record["teacher_cache"]["positions"], rel=0.05)
    assert answer["teacher_cache"]["is_measured"]
    assert answer["teacher_cache"]["bytes"] == pytest.approx(record["teacher_cache"]["bytes"], rel=0.15)
    seconds = answer["seconds"]
    assert seconds["train"] == pytest.approx(answer["training"]["steps"] * seconds["step"])
    assert seconds["total"] == pytest.approx(sum(seconds[k] for k in ("score", "cache", "train", "evaluate")))
    by_stage = record["peak_memory_bytes"]["by_stage"]
    assert by_stage.keys() == {"prepare", "score", "cache", "train", "evaluate"}
    assert max(stage["process"] for stage in by_stage.values()) <= record["peak_memory_bytes"]["process"]
    assert answer["memory_bytes"]["peak"] == max(answer["memory_bytes"]["stages"].values())
    json.dumps(answer, allow_nan=False)


def test_a_live_teacher_is_asked_in_every_epoch_and_stays_in_memory(tmp_path: Path) -> None:
    live = {"classes": {"sampler": "all"}, "cache": None}
    answer, cached = estimate(recipe_of(tmp_path, **live)), estimate(recipe_of(tmp_path))
    assert answer["teacher_cache"] is None
    assert answer["teacher_tokens"]["train"] == pytest.approx(3 * cached["teacher_tokens"]["cache"], abs=3)
    assert answer["memory_bytes"]["training_parts"]["teacher_weights"] == 4 * answer["parameters"]["teacher"]
    assert cached["memory_bytes"]["training_parts"]["teacher_weights"] == 0
    assert answer["seconds"] is None
    assert any("--probe" in note for note in answer["notes"])


def saved_bytes(model: torch.nn.Module, batch: int, length: int) -> int:
    """What autograd really keeps of a forward pass over packed documents: every storage once, less the weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # alive, so that its address is not given to another
        return tensor

    ids = torch.zeros(batch, length, dtype=torch.long)
    positions = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)]).expand(batch, length)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = hidden_states(model, ids, positions)
    kept[hidden.untyped_storage().data_ptr()] = hidden.untyped_storage()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("layers", "batch", "length"), [(2, 4, 32), (4, 3, 50)])
def test_activations_are_what_autograd_keeps(layers: int, batch: int, length: int) -> None:
    model = make_model(0, layers=layers).train()
    found = body_memory(describe(model.config), batch, length, torch.float32, train=True)
    assert found.is_exact
    assert found.activations == pytest.approx(saved_bytes(model, batch, length), rel=0.03)
    assert found.peak > found.activations


def test_checkpointing_and_inference_keep_less() -> None:
    made = describe(make_model(0, layers=4).config)
    plain = body_memory(made, 4, 64, torch.float32, train=True)
    less = body_memory(made, 4, 64, torch.float32, train=True, checkpointing=True)
    nothing = body_memory(made, 4, 64, torch.float32, train=False)
    assert less.is_exact
    assert nothing.activations < less.activations < 0.5 * plain.activations


def test_an_architecture_that_no_fake_tensor_runs_gets_the_rule_of_thumb(monkeypatch: pytest.MonkeyPatch) -> None:
    made = describe(LlamaConfig(hidden_size=256, intermediate_size=683, num_hidden_layers=6, num_attention_heads=4))
    exact = body_memory(made, 4, 128, torch.bfloat16, train=True)

    def refuse(*_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("selkd.estimate.body._run", refuse)
    rough = body_memory(made, 4, 128, torch.bfloat16, train=True)
    assert (exact.is_exact, rough.is_exact) == (True, False)
    assert rough.activations == pytest.approx(exact.activations, rel=0.5)


def test_the_optimiser_is_asked_what_it_keeps() -> None:
    assert optimiser_bytes_per_parameter(torch.optim.AdamW, ()) == 8
    assert optimiser_bytes_per_parameter(torch.optim.SGD, ()) == 0
    assert optimiser_bytes_per_parameter(torch.optim.SGD, (("momentum", 0.9),)) == 4


def test_accelerators_share_the_steps_and_with_fsdp_the_weights(tmp_path: Path) -> None:
    one, four = (estimate(recipe_of(tmp_path), gpus=gpus) for gpus in (1, 4))
    assert (one["memory_bytes"]["of"], one["memory_bytes"]["training_parts"]["process"]) == ("accelerator", 0)
    assert four["training"]["samples_per_step"] == 4 * one["training"]["samples_per_step"]
    # 52 samples, 4 a device: 13 steps an epoch, or 4.
    assert (one["training"]["steps"], four["training"]["steps"]) == (39, 12)
    parts = four["memory_bytes"]["training_parts"]
    assert parts["communication"] == parts["gradients"] == 4 * four["parameters"]["student"]
    assert one["memory_bytes"]["training_parts"]["communication"] == 0


def test_another_number_of_tokens(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    answer = estimate(recipe, tokens=32_000)
    assert (answer["data"]["samples"], answer["data"]["samples_kept"]) == (1000, 300)
    assert answer["teacher_cache"]["positions"] == 300 * 31
    with pytest.raises(InputError, match=r"--tokens: 8 are fewer than one sample of data\.max_length = 32"):
        estimate(recipe, tokens=8)


def test_a_budget_that_moves_counts_with_its_average(tmp_path: Path) -> None:
    moving = {"fraction": {"from": 1.0, "to": 0.2, "over": 0.5}}
    answer = estimate(recipe_of(tmp_path, positions=moving), tokens=3200)
    # Half of the run at 0.6 on average, half at 0.2.
    assert answer["training"]["positions_selected_share"] == pytest.approx(0.4)


def test_what_can_not_be_estimated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--probe: it measures this machine's device, a CPU"):
        estimate(recipe_of(tmp_path), gpus=2, with_probe=True)
    hub = make_recipe(tmp_path)["data"] | {"path": "someone/text"}
    with pytest.raises(InputError, match=r"data\.tokens: not given, and someone/text is not on this machine"):
        estimate(recipe_of(tmp_path, data=hub))
    assert estimate(recipe_of(tmp_path, data=hub), tokens=3200)["data"]["samples"] == 100
    with pytest.raises(InputError, match="layers is 4: the teacher has 4 layers, so 1 to 3 can be kept"):
        estimate(recipe_of(tmp_path, student={"prune_from_teacher": {"layers": 4}}))
