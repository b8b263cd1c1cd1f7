"""One cache, one training: batch size, accumulation and number of processes change nothing but the order of sums.

Which classes a position has, how often each was drawn and which positions are selected are the same integers in each
layout. Weights differ by the rounding of sums alone, whose order is that of the batches; nothing else is let differ.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_distributed import WORKER, torchrun
from test_trainer import assert_same, cached, trainer_of, weights
from tiny import make_samples

from selkd.data.collate import collate
from selkd.teacher.cached import CachedTeacher
from selkd_cache import TeacherCache

RECIPE = {
    "positions": {"metric": "kl", "policy": "top_k", "fraction": 0.3},  # estimated from some of the draws
    "classes": {"sampler": "rs_kd", "draws": 8},
    "max_steps": 4,
    "learning_rate": 0.1,
}


def test_what_a_sample_gets_is_the_same_integers_in_any_batch(tmp_path: Path) -> None:
    samples = make_samples(16)
    cache = cached(samples, tmp_path / "cache")
    alone = {sample.id: CachedTeacher(cache).read(collate([sample], 1)) for sample in samples}
    reopened = CachedTeacher(TeacherCache.open(cache.directory))
    for size, side, seed in ((2, "right", 0), (5, "left", 1), (16, "right", 2)):
        order = np.random.default_rng(seed).permutation(16).tolist()
        for start in range(0, 16, size):
            members = [samples[index] for index in order[start : start + size]]
            batch = collate(members, 1, padding_side=side)
            read = reopened.read(batch)
            for row, sample in enumerate(members):
                length = len(sample.token_ids)
                here = slice(None, length) if side == "right" else slice(batch["input_ids"].shape[1] - length, None)
                for name, values in alone[sample.id].items():
                    width = values.shape[-1]
                    assert torch.equal(read[name][row, here, :width], values[0])
                    assert not read[name][row, here, width:].any()
                    assert int(read[name][row].sum()) == int(values.sum())


@pytest.mark.slow
def test_one_cache_gives_one_training(tmp_path: Path) -> None:
    samples = make_samples(16)
    cache = cached(samples, tmp_path / "cache", scalars=2)
    runs = []
    for batch, accumulation in [(8, 1), (4, 2), (2, 4), (1, 8)]:
        layout = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = trainer_of(tmp_path / f"{batch}", samples, RECIPE, teacher=cache, **layout)
        trainer.train()
        runs.append((weights(trainer.model), vars(trainer.totals), trainer.state.log_history[-2]))
    done = torchrun(str(WORKER), str(tmp_path), "ddp", json.dumps(RECIPE), "16")  # 2 processes, 2 batches of 2
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["world"] == 2
    runs.append((load_file(tmp_path / "weights.safetensors"), answer["totals"], answer["log"]))
    first, totals, log = runs[0]
    assert totals["teacher_tokens"] == 0
    for other, other_totals, other_log in runs[1:]:
        assert_same(first, other, tolerance=3e-6)
        assert {name: other_totals[name] for name in ("positions_valid", "positions_selected")} == {
            name: totals[name] for name in ("positions_valid", "positions_selected")
        }
        for figure in ("loss", "kl_nats"):
            assert other_log[figure] == pytest.approx(log[figure], rel=1e-5)
    started = trainer_of(tmp_path / "none", samples, RECIPE, teacher=cache)
    assert max((first[name] - value).abs().max() for name, value in weights(started.model).items()) > 1e-3
