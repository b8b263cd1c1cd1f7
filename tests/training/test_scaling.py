"""What docs/scaling.md says of launchers, sharding and resuming: each training ends with the student of one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import make_trainer, result_of
from test_distributed import MULTI_GPU, WORKER, torchrun
from test_resuming import found_by, run
from test_sealing import flip_a_bit
from tiny_run import make_recipe
from transformers import LlamaForCausalLM

from selkd import distill
from selkd.errors import InputError
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.benchmarks import read_best
from selkd.training.sealing import fault_of, last_complete_checkpoint

# Four samples a step, whatever the number of processes.
BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
BY_TWO = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
BY_FOUR = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
SHARDS, OFFLOADED = {"state_dict_type": "SHARDED_STATE_DICT"}, {"cpu_offload": True}

REPLICATED = [
    "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer", "--fsdp_state_dict_type", "SHARDED_STATE_DICT",
    "--use_parallelism_config", "--parallelism_config_dp_replicate_size", "2",
    "--parallelism_config_dp_shard_size", "2",
]  # fmt: skip


def job(folder: str, changes: dict[str, Any], sharded: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    told = {} if sharded is None else {"sharded": sharded}
    return {"cases": ["top_k"], "folder": folder, "changes": changes, **told, **more}


@pytest.mark.slow
def test_launchers_shards_and_other_numbers_of_processes_make_one_student(tmp_path: Path) -> None:
    two = [
        job("full", BY_TWO, {}),
        job("shards", BY_TWO, SHARDS),
        job("offloaded shards", BY_TWO, SHARDS | OFFLOADED),
    ]
    run(
        tmp_path,
        *(each | {"kill_step": 3} for each in two),
        *(
            job(folder, BY_TWO, sharded, kill_step=3)
            for folder, sharded in (("full, by four", {}), ("by four", SHARDS))
        ),
        job("offloaded", BY_TWO, OFFLOADED),
    )

    checkpoint = tmp_path / "shards" / "top_k" / "checkpoint-3"
    with pytest.raises(InputError, match="sharding = 'SHARDED_STATE_DICT', this one None"):
        make_trainer("top_k", checkpoint.parent, tmp_path, **BY_ONE).train(resume_from_checkpoint=True)
    assert last_complete_checkpoint(checkpoint.parent) == checkpoint
    flip_a_bit(checkpoint / "pytorch_model_fsdp_0" / "__1_0.distcp")
    assert fault_of(checkpoint) == "pytorch_model_fsdp_0/__1_0.distcp is not as it was written"
    (checkpoint.with_name("checkpoint-2") / "optimizer_0" / ".metadata").unlink()
    assert last_complete_checkpoint(checkpoint.parent) == checkpoint.with_name("checkpoint-1")

    run(tmp_path, *two, launcher="accelerate", options=MULTI_GPU)
    by_four = [job("ddp", BY_FOUR), job("full, by four", BY_FOUR, {}), job("by four", BY_FOUR, SHARDS)]
    run(tmp_path, *by_four, processes=4, launcher="accelerate", options=MULTI_GPU)
    replicated = job("two replicas of two shards", BY_FOUR)  # the launcher alone says so
    run(tmp_path, replicated, processes=4, launcher="accelerate", options=REPLICATED)

    alone = make_trainer("top_k", tmp_path / "alone", tmp_path, **BY_ONE)
    alone.train()
    expected = result_of(alone)
    for each in (*two, job("offloaded", BY_TWO, OFFLOADED), *by_four, replicated):
        folder = each["folder"]
        found = found_by(folder, "top_k", tmp_path)
        if folder != "ddp":
            saved = LlamaForCausalLM.from_pretrained(tmp_path / f"{folder} top_k, saved")
            assert all(torch.equal(p, found["student"][name]) for name, p in saved.named_parameters()), folder
        for name, value in expected["student"].items():
            torch.testing.assert_close(found["student"][name], value, rtol=0, atol=2e-5, msg=f"{folder}: {name}")
        for name in ("positions_valid", "positions_selected"):
            assert found["totals"][name] == expected["totals"][name], folder


@pytest.mark.slow
def test_a_sharded_student_is_measured_on_the_way_as_a_whole_one_is(tmp_path: Path) -> None:
    """The few held-out samples are one batch, which the second process has no part of."""
    plain = make_recipe(tmp_path, evaluation={"suite": ["fidelity"], "every_steps": 2, "keep_best": "kl_nats"})
    plain["training"] |= {"max_steps": 6}
    layers = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "SHARDED_STATE_DICT"}
    sharded = plain | {"training": plain["training"] | {"fsdp": "full_shard", "fsdp_config": layers}}
    recipes = json.dumps({"ddp": plain, "cut": plain, "sharded": sharded})
    done = torchrun(str(WORKER.with_name("sharded_run.py")), str(tmp_path), recipes)
    assert done.returncode == 0, done.stderr[-3000:]

    lines: dict[str, list[dict[str, float]]] = {}
    for name in ("ddp", "sharded"):
        read = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        lines[name] = [line for line in read if "held_out_kl_nats" in line]
    assert [line["step"] for line in lines["ddp"]] == [2, 4, 6]
    for found, expected in zip(lines["sharded"], lines["ddp"], strict=True):
        for name in ("step", "held_out_perplexity", "held_out_kl_nats", "held_out_top1_agreement"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5)
    for kept in ("student", "best_student"):
        found, expected = (dict(LlamaForCausalLM.from_pretrained(tmp_path / name / kept).named_parameters())
                           for name in ("sharded", "ddp"))  # fmt: skip
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=f"{kept}: {name}")
    assert read_best(tmp_path / "sharded")["step"] == read_best(tmp_path / "ddp")["step"]

    cut = tmp_path / "cut"
    before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"samples_per_step = 8, this one 4: .* start as many processes as then"):
        distill(plain, cut)
    assert {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()} == before


def test_what_one_process_measures_is_refused_beside_shards(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, evaluation={"suite": ["fidelity", "paper"], "every_steps": 2})
    recipe["training"] |= {"fsdp": "full_shard"}
    with pytest.raises(InputError, match=r"evaluation\.every_steps: benchmarks are measured by one process"):
        parse_part(Recipe, recipe)
