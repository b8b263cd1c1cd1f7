"""A training that was killed ends with the student of one that was not, bit for bit."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import CASES, EPOCHS, Killed, go_on, kill_at, kill_seed, make_trainer, result_of
from safetensors.torch import load_file
from test_distributed import WORKER, torchrun
from tiny import make_samples

from selkd import TeacherCache
from selkd.errors import InputError
from selkd.training.sampling import FilledDataset
from selkd.training.sealing import last_complete_checkpoint


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["student"].keys() == expected["student"].keys()
    for name, value in expected["student"].items():
        assert torch.equal(found["student"][name], value), name
    for part in ("logs", "totals", "queue", "rollouts"):
        assert found[part] == expected[part], part


@pytest.mark.parametrize("case", CASES)
def test_whatever_is_killed_when_the_student_is_the_same(case: str, tmp_path: Path) -> None:
    straight = make_trainer(case, tmp_path / "straight", tmp_path)
    straight.train()
    expected = result_of(straight)
    assert len(expected["logs"]) == EPOCHS * 4

    chosen = random.Random(kill_seed())
    for place in ("step", "save", "step"):  # each later than the one before: what is done stays done
        last = last_complete_checkpoint(tmp_path / "killed")
        begun = 0 if last is None else int(last.name.rpartition("-")[2])
        killed = make_trainer(case, tmp_path / "killed", tmp_path)
        kill_at(killed, chosen.randrange(begun, EPOCHS * 4 - 2), place)
        with pytest.raises(Killed):
            go_on(killed)
    resumed = make_trainer(case, tmp_path / "killed", tmp_path)
    go_on(resumed)
    assert_equal(result_of(resumed), expected)


def test_a_case_that_ends_otherwise_is_told(tmp_path: Path) -> None:
    """The comparison above can fail: another seed gives another student."""
    results = []
    for seed in (11, 12):
        trainer = make_trainer("top_k", tmp_path / str(seed), tmp_path, seed=seed)
        trainer.train()
        results.append(result_of(trainer))
    with pytest.raises(AssertionError):
        assert_equal(*results)


def found_by(folder: str, case: str, tmp_path: Path) -> dict[str, Any]:
    """What ``resuming.py`` left of a case."""
    left = json.loads((tmp_path / f"{folder} {case}.json").read_text())
    return left | {"student": load_file(tmp_path / f"{folder} {case}.safetensors")}


def run(tmp_path: Path, *jobs: dict[str, Any], **launched: Any) -> int:
    """``resuming.py`` in two processes, or as ``launched`` says; its exit code."""
    done = torchrun(str(WORKER.with_name("resuming.py")), str(tmp_path), json.dumps(jobs), **launched)
    if not any("signal" in job for job in jobs):
        assert done.returncode == 0, done.stderr[-3000:]
    return done.returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "cases"),
    [
        ("ddp", ["top_k", "gls", "cached, read by workers", "adapters", "on-policy", "bfloat16"]),
        ("fsdp2", ["top_k", "gls"]),
    ],
)
def test_two_processes_go_on_in_every_epoch(strategy: str, cases: list[str], tmp_path: Path) -> None:
    """Killed within the second and within the third epoch of four steps each, whose orders are not the first one's."""
    job: dict[str, Any] = {"cases": cases, "changes": {"per_device_train_batch_size": 1}}
    if strategy == "fsdp2":
        job["sharded"] = {}
    straight, killed = job | {"folder": "straight"}, job | {"folder": "killed"}
    chosen = random.Random(kill_seed())
    run(tmp_path, straight, killed | {"kill_step": chosen.choice((5, 6, 7))})
    ended = run(tmp_path, killed | {"kill_step": chosen.choice((9, 10, 11)), "signal": True})
    assert ended != 0, "a rank that a signal ends is no success"
    run(tmp_path, killed)
    for case in cases:
        assert_equal(found_by("killed", case, tmp_path), found_by("straight", case, tmp_path))


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_samples_or_is_refused(tmp_path: Path) -> None:
    """One process that takes four micro-batches a step sees what two processes see that take two each, or one of two.

    Seven samples in micro-batches of one, or two: the last step of an epoch is a part of one.
    """
    cases = ["top_k", "gls", "random", "cached", "on-policy"]
    ways: dict[str, dict[str, Any]] = {  # four samples a step each
        "two": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        "one": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        "one, pairs": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    }
    job = {"cases": cases, "changes": ways["two"]}
    killed_by_two = [job | {"folder": way, "kill_step": 3} for way in ("one", "one, pairs")]
    run(tmp_path, job | {"folder": "straight"}, *killed_by_two, {**killed_by_two[0], "cases": ["dropout"]})
    for case in cases:
        killed = make_trainer(case, tmp_path / "killed by one" / case, tmp_path, **ways["one"], save_steps=1)
        kill_at(killed, 3, "step")
        with pytest.raises(Killed):
            killed.train()
    run(tmp_path, job | {"folder": "killed by one"})

    for case in cases:
        expected, found = found_by("straight", case, tmp_path), {"two": found_by("killed by one", case, tmp_path)}
        for way in ("one", "one, pairs"):
            one = make_trainer(case, tmp_path / way / case, tmp_path, save_steps=1, **ways[way])
            one.train(resume_from_checkpoint=True)
            found[way] = result_of(one)
        for way, answer in found.items():
            for name, value in expected["student"].items():  # up to the order of sums
                torch.testing.assert_close(answer["student"][name], value, rtol=0, atol=2e-5, msg=f"{case}, {way}")
            padded = {"teacher_tokens": answer["totals"]["teacher_tokens"]}  # as far as micro-batches are padded
            assert answer["totals"] == expected["totals"] | padded, (case, way)

    folder = tmp_path / "one" / "top_k"
    assert last_complete_checkpoint(folder) == folder / "checkpoint-6", "its own checkpoints are one process's"
    with pytest.raises(InputError, match=r"samples_per_step = 4, this one 2: .* set per_device_train_batch_size and"):
        make_trainer("top_k", folder, tmp_path).train(resume_from_checkpoint=True)
    # The two processes drew their dropout for micro-batches of their own.
    with pytest.raises(InputError, match=r"its training has cut = .*'processes': 2.*, this one .*'processes': 1"):
        make_trainer("dropout", tmp_path / "one" / "dropout", tmp_path, **ways["one"]).train(
            resume_from_checkpoint=True
        )


def test_another_teacher_than_the_cache_that_it_began_with_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_trainer("cached", tmp_path / "run", tmp_path)
    kill_at(first, 5, "step")
    with pytest.raises(Killed):
        first.train()
    live = make_trainer("cached", tmp_path / "run", tmp_path, cached=False)
    with pytest.raises(
        InputError, match=r"teacher_cache = '.*', this one None: .* give the cache, or the live teacher"
    ):
        live.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    other = make_trainer("cached", tmp_path / "run", tmp_path)
    drawn_otherwise = dict(other.teacher.cache.fingerprint) | {"seed": 12}
    with monkeypatch.context() as changed:
        changed.setattr(TeacherCache, "fingerprint", drawn_otherwise)
        with pytest.raises(InputError, match="teacher_cache = "):
            other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    same = make_trainer("cached", tmp_path / "run", tmp_path)
    same.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert same.state.global_step == same.state.max_steps


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"per_device_train_batch_size": 3}, "samples_per_step = 2, this one 3"),
        ({"seed": 12}, "seed = 11, this one 12"),
        ({"data_seed": 4}, "order_seed = 11, this one 4"),
        ({"train_sampling_strategy": "sequential"}, "order_seed = 11, this one None"),
        ({"dataloader_drop_last": True}, "samples_per_epoch = 7, this one 6"),
        ({"seed": 12, "data_seed": 11}, "seed = 11, this one 12"),
        ({"positions": {"metric": "student_entropy", "fraction": 0.5}}, "positions = .*'fraction': 0.4"),
        ({"criterion": {"name": "jsd"}}, "criterion = .*'name': 'forward_kl'"),
        ({"classes": {"sampler": "rs_kd", "draws": 6}}, "classes = .*'sampler': 'all'"),
    ],
)
def test_another_schedule_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    first = make_trainer("top_k", tmp_path / "run", tmp_path)
    kill_at(first, 5, "step")
    with pytest.raises(Killed):
        first.train()
    with pytest.raises(InputError, match=rf"checkpoint-4: its training has {told}"):
        make_trainer("top_k", tmp_path / "run", tmp_path, **changes).train(resume_from_checkpoint=True)
    more = make_trainer("top_k", tmp_path / "run", tmp_path)
    more.train_dataset = make_samples(16)  # settled as the constructor's
    with pytest.raises(InputError, match="give the data that it began with"):
        more.train(resume_from_checkpoint=True)
    other = make_trainer("top_k", tmp_path / "run", tmp_path)
    other.train_dataset = FilledDataset(other.train_dataset.samples.select([0, 1, 2, 3, 4, 6, 5]))
    with pytest.raises(InputError, match="give the data that it began with"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_samples_that_another_cut_would_drop_are_no_schedule_to_go_on_with(tmp_path: Path) -> None:
    """Of seven samples, micro-batches of two leave one out in each epoch; micro-batches of one leave out none."""
    dropping: dict[str, Any] = {"dataloader_drop_last": True, "save_steps": 1}
    first = make_trainer("top_k", tmp_path / "run", tmp_path, **dropping, gradient_accumulation_steps=2)
    first.train()
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    with pytest.raises(InputError, match="samples_per_epoch = 6, this one 7"):
        make_trainer("top_k", tmp_path / "run", tmp_path, **dropping, **cut).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="resume_from_checkpoint: no complete checkpoint in"):
        make_trainer("top_k", tmp_path / "run", tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_its_optimiser_is_refused(tmp_path: Path) -> None:
    """Transformers would go on with an optimiser that remembers nothing, and say nothing."""
    make_trainer("top_k", tmp_path / "run", tmp_path, save_only_model=True, num_train_epochs=1).train()
    with pytest.raises(InputError, match="checkpoint-4: holds no optimiser state"):
        make_trainer("top_k", tmp_path / "run", tmp_path).train(resume_from_checkpoint=True)
