"""Estimates against what really happens: counts of a run, bytes that autograd saves, bytes of a cache."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import V, make_arguments, make_model
from tiny_run import make_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from selkd import distill
from selkd.errors import InputError
from selkd.estimate.estimate import estimate
from selkd.maths.chunked import CHUNK_BYTES, chunk_size
from selkd.models.head import hidden_states
from selkd.needs.architecture import describe
from selkd.needs.body import inference_peak, training_memory, why_rough
from selkd.needs.cache_size import BYTES_OF_OTHER_TEMPERATURE, BYTES_OF_SCALARS, MEASURED, bytes_of_draws
from selkd.needs.memory import memory, weights_bytes
from selkd.needs.optimiser import optimiser_bytes
from selkd.needs.plan import Plan
from selkd.recipe import packages
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.training.arguments import DistillArguments


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
    evaluated = ran_on["evaluate_before"] + ran_on["evaluate_after"] + ran_on["held_out"]
    assert queries["evaluate"] == pytest.approx(evaluated, rel=0.05)
    assert queries["evaluate"] - ran_on["held_out"] < 0.9 * queries["evaluate"]  # so the report's share is seen
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


SMALL = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
EXPERTS = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        (make_model(0, layers=4).config, 0.03),
        (AutoConfig.for_model("gpt_neox", intermediate_size=80, **SMALL), 0.10),
        (AutoConfig.for_model("mixtral", **EXPERTS), 0.15),
    ],
    ids=["llama", "gpt_neox", "mixtral"],
)
@pytest.mark.parametrize(("batch", "length"), [(4, 32), (3, 50)])
def test_activations_are_what_autograd_keeps(config: Any, tolerance: float, batch: int, length: int) -> None:
    model = AutoModelForCausalLM.from_config(config).train()
    memory = training_memory(describe(config), batch, length, torch.float32)
    assert memory.activations == pytest.approx(saved_bytes(model, batch, length), rel=tolerance)
    assert memory.peak > memory.activations


# Bytes that PyTorch's memory tracker gave for a run on fake tensors; docs/results/estimate.md tells how.
MEASURED_BODIES: dict[str, Any] = json.loads((Path(__file__).parent / "body_memory.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MEASURED_BODIES)
def test_a_body_takes_what_a_memory_tracker_measured(name: str) -> None:
    measured = MEASURED_BODIES[name]
    architecture = describe(AutoConfig.for_model(**measured["config"]))
    assert (why_rough(architecture) is not None) == measured["is_rough"]
    tolerance = 0.15 if measured["is_rough"] else 0.10
    for setting, by_step in measured["bytes"].items():
        batch, _, length, dtype = setting.split()
        shape = (int(batch), int(length), getattr(torch, dtype))
        for step, found in by_step.items():
            if step == "inference":
                counted: Any = inference_peak(architecture, *shape)
            else:
                memory = training_memory(architecture, *shape, checkpointing=step == "checkpointing")
                counted = [memory.activations, memory.peak]
            assert counted == pytest.approx(found, rel=tolerance), f"{setting}, {step}"


def test_a_quantised_teacher_weighs_what_was_measured() -> None:
    page = (Path(__file__).parents[2] / "docs/results/task.md").read_text(encoding="utf-8")
    measured = re.findall(r"^\| `((?:torchao|bitsandbytes)_\w+)`.*?\|.*?\|.*?\| ([\d.]+) \|", page, re.MULTILINE)
    assert len(measured) == 3
    architecture = describe(AutoConfig.for_model(**MEASURED_BODIES["smollm2_135m_whole"]["config"]))
    assert weights_bytes(architecture, torch.bfloat16, None) == 2 * architecture.parameters
    for quantization, megabytes in measured:
        counted = weights_bytes(architecture, torch.bfloat16, quantization)
        assert counted / 1e6 == pytest.approx(float(megabytes), rel=0.03), quantization


def test_chunks_of_float32_logits_count_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk has the same positions in each dtype, so both models' logits of one take twice the bytes."""
    device = torch.device("cpu")
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 2 * V * 5)
    recipe = recipe_of(tmp_path, classes={"sampler": "all"}, cache=None)
    plan = Plan(recipe, make_arguments(tmp_path), 1, 8, 8, 800, 700, 100, 2, 10, 1.0)
    model = describe(make_model(0).config)
    narrow, whole = (
        memory(model, model, plan, (dtype, dtype), is_cpu=True).parts["loss"]
        for dtype in (torch.bfloat16, torch.float32)
    )
    rows = plan.batch * plan.length * plan.selected_shares[1] * model.hidden_size * 2 * (4 - 2)
    head = model.vocab_size * model.hidden_size * 2
    assert whole - narrow == pytest.approx(rows - head + 2 * chunk_size(V, device) * V * (4 - 2), abs=1)


def test_models_without_weights_are_estimated(tmp_path: Path) -> None:
    for name, layers in (("big", 4), ("little", 2)):
        make_model(0, layers=layers).config.save_pretrained(tmp_path / name)
    models = {"teacher": {"model": str(tmp_path / "big")}, "student": {"model": str(tmp_path / "little")}}
    recipe = parse_part(Recipe, models | {"data": {"path": "someone/text", "max_length": 16, "tokens": 4096}})
    answer = estimate(recipe, gpus=1)
    assert answer["parameters"]["teacher"] > answer["parameters"]["student"]
    narrow = parse_part(Recipe, recipe.model_dump() | {"teacher": models["teacher"] | {"quantization": "torchao_int8"}})
    parts = "memory_bytes", "training_parts"
    assert (
        estimate(narrow, gpus=1)[parts[0]][parts[1]]["teacher_weights"] < answer[parts[0]][parts[1]]["teacher_weights"]
    )


def test_what_is_counted_roughly_says_so(tmp_path: Path) -> None:
    assert not any("rough" in note for note in estimate(recipe_of(tmp_path))["notes"])
    config = AutoConfig.for_model("mixtral", **EXPERTS)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    notes = estimate(recipe_of(tmp_path))["notes"]
    assert "activations: a rough count of the student's, as it is a mixture of experts" in notes


def test_optimisers_by_name(tmp_path: Path) -> None:
    made = describe(make_model(0, layers=2).config)

    def state(**options: Any) -> tuple[int, str | None]:
        numbers, note = optimiser_bytes(DistillArguments(output_dir=str(tmp_path), use_cpu=True, **options), made)
        return round(numbers / made.parameters), note

    assert state() == (8, None)
    assert state(optim="sgd") == (0, None)
    assert state(optim="sgd", optim_args="momentum=0.9") == (4, None)
    assert state(optim="adagrad") == (4, None)
    arguments = DistillArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments.optim = "lomo"  # its package, which the arguments ask for, may not be here
    numbers, note = optimiser_bytes(arguments, made)
    assert round(numbers / made.parameters) == 8
    assert note == "optimiser: lomo is taken for Adam, two float32 numbers a parameter"


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


FSDP = {"fsdp": "full_shard", "fsdp_config": {"version": 2}}


def training(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"training": make_recipe(folder)["training"] | changes}


def test_fsdp_shards_what_the_processes_hold(tmp_path: Path) -> None:
    plain = estimate(recipe_of(tmp_path), gpus=4)["memory_bytes"]["training_parts"]
    answer = estimate(recipe_of(tmp_path, **training(tmp_path, **FSDP)), gpus=4)
    parts = answer["memory_bytes"]["training_parts"]
    for name in ("gradients", "optimiser"):
        assert parts[name] == plain[name] // 4
    assert plain["student_weights"] // 4 < parts["student_weights"] < plain["student_weights"]
    assert parts["communication"] == 0
    assert any("sharded over 4 processes" in note for note in answer["notes"])
    # Kept whole between forward and backward: all weights once more.
    whole = FSDP | {"fsdp": "shard_grad_op"}
    kept = estimate(recipe_of(tmp_path, **training(tmp_path, **whole)), gpus=4)["memory_bytes"]["training_parts"]
    assert kept["student_weights"] == plain["student_weights"] // 4 + plain["student_weights"]


def test_fsdp_without_a_number_of_processes_is_planned_for_this_one(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, **training(tmp_path, **FSDP))
    answer = estimate(recipe, with_probe=True)
    assert answer["memory_bytes"]["training_parts"]["gradients"] == 4 * answer["parameters"]["student"]
    assert answer["seconds"]["train"] > 0
    assert any("shards nothing; --gpus says how many" in note for note in answer["notes"])


def test_the_probe_leaves_out_what_only_benchmarks_and_the_best_student_need(tmp_path: Path) -> None:
    best = {"suite": ["fidelity"], "every_steps": 2, "keep_best": "perplexity"}
    assert estimate(recipe_of(tmp_path, evaluation=best), with_probe=True)["seconds"]["evaluate"] > 0
    pytest.importorskip("lm_eval")
    (tmp_path / "rows").mkdir()
    rows = {"suite": ["fidelity", "arc_easy"], "data": [str(tmp_path / "rows")], "limit": 3, "shots": 1}
    answer = estimate(recipe_of(tmp_path, evaluation=rows), with_probe=True)
    assert answer["seconds"]["evaluate"] > 0
    assert any("the benchmarks (arc_easy) are not counted" in note for note in answer["notes"])


def test_optimisers_of_8_bits_keep_the_embedding_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda _: True)  # they are counted, not made
    plain = estimate(recipe_of(tmp_path), gpus=1)["memory_bytes"]["training_parts"]["optimiser"]
    made = describe(make_model(0, layers=2).config)
    embedding, rest = made.vocab_size * made.hidden_size, made.parameters - made.vocab_size * made.hidden_size

    def kept(name: str) -> int:
        recipe = recipe_of(tmp_path, **training(tmp_path, optim=name))
        return int(estimate(recipe, gpus=1)["memory_bytes"]["training_parts"]["optimiser"])

    assert plain == 8 * made.parameters
    # By hand: a byte a number and a float32 scale for 256 of them.
    for name, states in (("adamw_8bit", 2), ("paged_adamw_8bit", 2), ("lion_8bit", 1), ("ademamix_8bit", 3)):
        assert kept(name) == pytest.approx(states * (rest * (1 + 4 / 256) + 4 * embedding), abs=2)
    assert kept("adamw_torch_8bit") == pytest.approx(2 * made.parameters * (1 + 4 / 256), abs=1)


def measured_bytes() -> list[tuple[str, int, float]]:
    """(sampler, U, bytes a position) of both tables in docs/results/cache.md."""
    page = (Path(__file__).parents[2] / "docs" / "results" / "cache.md").read_text(encoding="utf-8")
    of_text = re.findall(
        r"^\| [a-z ]+ \| (rs_kd|systematic|top_k) (\d+) \| [\d,]+ \| [\d.]+ \| ([\d.]+) \|", page, re.M
    )
    found = [(sampler, int(draws), float(size)) for sampler, draws, size in of_text]
    for row in re.findall(
        r"^\| (\d+) \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \| [\d.]+ \|$", page, re.M
    ):
        found += [(sampler, int(row[0]), float(size)) for sampler, size in zip(MEASURED, row[1:], strict=True)]
    return found


def test_cache_bytes_without_a_probe_are_near_the_measured_ones() -> None:
    points = measured_bytes()
    assert len(points) == 9 + 3 * 7
    for sampler, draws, size in points:
        assert bytes_of_draws(sampler, draws) == pytest.approx(size, rel=0.15)
    # 96 draws are not among what is interpolated.
    for sampler, size in (("rs_kd", 34.3), ("systematic", 36.5), ("top_k", 176.3)):
        assert bytes_of_draws(sampler, 96) == pytest.approx(size, rel=0.02)


def test_the_answer_says_whose_cache_bytes_they_are(tmp_path: Path) -> None:
    answer = estimate(recipe_of(tmp_path, classes={"sampler": "top_k", "draws": 64}))
    assert answer["teacher_cache"]["bytes_per_position"] == pytest.approx(126.7 + BYTES_OF_SCALARS)
    warm = estimate(recipe_of(tmp_path, classes={"sampler": "top_k", "draws": 64}, criterion={"temperature": 2.0}))
    more = warm["teacher_cache"]["bytes_per_position"] - answer["teacher_cache"]["bytes_per_position"]
    assert more == pytest.approx(BYTES_OF_OTHER_TEMPERATURE)
    assert any("as measured of SmolLM2-135M over textbooks" in note for note in answer["notes"])
