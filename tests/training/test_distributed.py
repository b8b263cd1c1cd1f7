"""Two processes take the step that one process takes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_trainer import RECIPES, assert_same, trainer_of, weights
from tiny import make_samples

WORKER = Path(__file__).with_name("distributed_worker.py")


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node"],
    "accelerate": ["accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no",
                   "--dynamo_backend", "no", "--num_processes"],
}  # fmt: skip
# Starts processes as for accelerators; which device they take is theirs to say.
MULTI_GPU = ("--multi_gpu",)


def torchrun(
    *arguments: str,
    processes: int = 2,
    launcher: str = "torchrun",
    options: Sequence[str] = (),
    timeout_seconds: int = 300,
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(processes), *options, *arguments]
    paths = [str(WORKER.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_seconds, env=environment, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "recipe"),
    [("ddp", "se-kd"), ("ddp", "per position"), ("ddp", "corrected draws"), ("ddp", "gls"), ("fsdp2", "se-kd")],
)
def test_two_processes_take_the_step_of_one(strategy: str, recipe: str, tmp_path: Path) -> None:
    steps = {"max_steps": 3 if recipe == "gls" else 1}  # gls has a threshold from its second step on
    alone = trainer_of(tmp_path / "alone", make_samples(7), RECIPES[recipe], per_device_train_batch_size=7, **steps)
    alone.train()
    done = torchrun(str(WORKER), str(tmp_path), strategy, json.dumps(RECIPES[recipe] | steps))
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["world"] == 2
    assert_same(weights(alone.model), load_file(tmp_path / "weights.safetensors"), tolerance=3e-6)
    assert answer["log"]["loss"] == pytest.approx(alone.state.log_history[-2]["loss"], rel=1e-5)
    if strategy == "ddp":
        for name in ("kd_nats", "selected_share"):
            assert answer["log"][name] == pytest.approx(alone.state.log_history[-2][name], rel=1e-5)
        assert answer["totals"]["positions_valid"] == alone.totals.positions_valid
        assert answer["totals"]["positions_selected"] == alone.totals.positions_selected
        if alone.queue is not None:
            assert answer["queue"] == pytest.approx(alone.queue.scores.tolist(), rel=1e-3)
