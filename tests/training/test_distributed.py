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


ONE_IS_DAMAGED = """
import os, sys
import torch
from tiny import make_arguments, make_model, make_samples, make_tokenizer
from transformers import TrainerCallback
from selkd import DistillTrainer
from selkd.errors import RunError
rank = int(os.environ["RANK"])
class Damage(TrainerCallback):
    def on_step_end(self, *_, model, **__):
        if rank:
            with torch.no_grad():
                model.model.norm.weight[0] = float("nan")
        self.weights = [weight.detach().clone() for weight in model.parameters()]
student, damage = make_model(1), Damage()
trainer = DistillTrainer(
    student, make_model(0), make_arguments(sys.argv[1], max_steps=3, ddp_backend="gloo"),
    make_samples(16), processing_class=make_tokenizer(), callbacks=[damage],
)
try:
    trainer.train()
except RunError as error:
    same = all(torch.equal(a, b) for a, b in zip(student.parameters(), damage.weights, strict=True))
    with open(f"{sys.argv[1]}/{rank}.txt", "w") as told:
        told.write(f"{rank or same} {trainer.state.global_step} {error}")
"""


@pytest.mark.slow
def test_all_processes_end_before_the_update_where_one_is_not_finite(tmp_path: Path) -> None:
    """Gradients are averaged over the processes, so that the update of each would take the damage."""
    (tmp_path / "worker.py").write_text(ONE_IS_DAMAGED)
    done = torchrun(str(tmp_path / "worker.py"), str(tmp_path), timeout_seconds=100)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, damaged = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert whole.startswith("True 1 position ")
    assert whole.removeprefix("True") == damaged.removeprefix("1")
