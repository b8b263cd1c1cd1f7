"""DeepSpeed's ZeRO: what is refused by name, and with the package a training that equals one without it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from selkd import DistillArguments
from selkd.errors import InputError
from selkd.training import zero

STAGE_2 = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}
WORKER = """
import json, sys
from tiny import make_model, make_samples, make_tokenizer
from selkd import DistillArguments, DistillTrainer
config = json.loads(sys.argv[1])
args = DistillArguments(
    output_dir=sys.argv[2], use_cpu=True, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
    report_to=[], save_strategy="no", logging_steps=1, learning_rate=1e-3, deepspeed=config,
    positions={"policy": "top_k", "fraction": 0.3, "metric": "student_entropy"},
)
trainer = DistillTrainer(make_model(1), make_model(0), args, make_samples(16), processing_class=make_tokenizer())
trainer.train()
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
size = float(sum(weight.double().abs().sum() for weight in trainer.model.parameters()))
print(json.dumps([type(trainer.model_wrapped).__name__, losses, size]))
"""


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, {}, "ZeRO stage 3 splits the head"),
        (STAGE_2, {"bf16": True}, "its bf16 holds the student's weights"),
        (STAGE_2 | {"fp16": {"enabled": True}}, {}, "its fp16 holds"),
        (STAGE_2, {"save_strategy": "steps"}, "save_strategy='no'"),
        ("nowhere.json", {}, "nowhere.json can't be read as JSON"),
    ],
)
def test_what_zero_would_break_is_refused(
    config: Any, changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero, "is_installed", lambda _: True)
    args = DistillArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **{"save_strategy": "no"} | changes)
    args.deepspeed = config
    with pytest.raises(InputError, match=message):
        args.check()


def test_a_missing_deepspeed_is_asked_for_by_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "is_installed", lambda _: False)
    args = DistillArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], save_strategy="no")
    args.deepspeed = STAGE_2
    with pytest.raises(InputError, match=r"pip install 'selkd\[deepspeed\]'"):
        args.check()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero_2_takes_the_steps_of_a_training_without_it(tmp_path: Path) -> None:
    """Its CPU backend compiles an operator the first time, with ninja and a compiler."""
    found = []
    for config in (None, STAGE_2):
        environment = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29571",
        }
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", WORKER, json.dumps(config), str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | environment | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": path},
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads([line for line in done.stdout.splitlines() if line.startswith('["')][-1]))
    (_, plain, weights), (engine, losses, other) = found
    assert engine == "DeepSpeedEngine"
    assert losses == pytest.approx(plain, rel=1e-5)
    assert other == pytest.approx(weights, rel=1e-6)
