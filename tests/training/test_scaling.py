"""What docs/scaling.md says of launchers, sharding and resuming: each training ends with the student of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import make_trainer, result_of
from test_resuming import found_by, run
from test_sealing import flip_a_bit
from transformers import LlamaForCausalLM

from selkd.errors import InputError
from selkd.training.sealing import fault_of, last_complete_checkpoint

# Four samples a step, whatever the number of processes.
BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
BY_TWO = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
BY_FOUR = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
SHARDS, OFFLOADED = {"state_dict_type": "SHARDED_STATE_DICT"}, {"cpu_offload": True}


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

    run(tmp_path, *two, launcher="accelerate")
    replicated = job("two replicas of two shards", BY_FOUR | {"replicas": 2}, SHARDS)
    by_four = [job("full, by four", BY_FOUR, {}), job("by four", BY_FOUR, SHARDS)]
    run(tmp_path, job("ddp", BY_FOUR), replicated, *by_four, processes=4, launcher="accelerate")

    alone = make_trainer("top_k", tmp_path / "alone", tmp_path, **BY_ONE)
    alone.train()
    expected = result_of(alone)
    for each in (*two, job("offloaded", BY_TWO, OFFLOADED), job("ddp", BY_FOUR), replicated, *by_four):
        folder = each["folder"]
        found = found_by(folder, "top_k", tmp_path)
        if folder != "ddp":
            saved = LlamaForCausalLM.from_pretrained(tmp_path / f"{folder} top_k, saved")
            assert all(torch.equal(p, found["student"][name]) for name, p in saved.named_parameters()), folder
        for name, value in expected["student"].items():
            torch.testing.assert_close(found["student"][name], value, rtol=0, atol=2e-5, msg=f"{folder}: {name}")
        for name in ("positions_valid", "positions_selected"):
            assert found["totals"][name] == expected["totals"][name], folder
