"""A damaged or half-written checkpoint is never gone on from: the one before it is, and it is said."""

import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from resuming import Killed, go_on, kill_at, make_trainer, result_of
from test_resuming import assert_equal
from tiny_run import make_recipe

from selkd import distill
from selkd.errors import InputError, RunError
from selkd.training.sealing import DIGESTS, checkpoints_in, fault_of, last_complete_checkpoint, rotate


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(5).randrange(len(content))] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": Path.unlink,
    "a bit flipped": flip_a_bit,
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of steps 2, 4, 6 and 8 of a training that ended after 8 of 12."""
    out = tmp_path_factory.mktemp("killed")
    trainer = make_trainer("gls", out, out)
    kill_at(trainer, 9, "step")
    with pytest.raises(Killed):
        trainer.train()
    return out


def files_of(checkpoint: Path) -> Iterator[str]:
    return (path.relative_to(checkpoint).as_posix() for path in sorted(checkpoint.rglob("*")) if path.is_file())


def test_every_damage_of_every_file_is_found_and_the_checkpoint_before_is_used(
    killed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = list(files_of(killed / "checkpoint-8"))
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "config.json", "trainer_state.json"} < set(names)
    assert set(json.loads((killed / "checkpoint-8" / DIGESTS).read_text())) == set(names) - {DIGESTS}
    assert last_complete_checkpoint(killed) == killed / "checkpoint-8"
    for name in names:
        for kind, damage in DAMAGES.items():
            out = shutil.copytree(killed, tmp_path / "damaged")
            damage(out / "checkpoint-8" / name)
            caplog.clear()
            assert last_complete_checkpoint(out) == out / "checkpoint-6", (name, kind)
            (said,) = caplog.messages
            assert "checkpoint-8 is damaged or incomplete: " in said
            # A digest that is itself damaged is one that another file does not have.
            assert name in said or name == DIGESTS, said
            assert "checkpoint-6 is used" in said
            assert (out / "checkpoint-8").is_dir(), "nothing is deleted"
            shutil.rmtree(out)


def test_the_student_is_the_same_after_the_newest_checkpoint_was_damaged(killed: Path, tmp_path: Path) -> None:
    straight = make_trainer("gls", tmp_path / "straight", tmp_path)
    straight.train()
    out = shutil.copytree(killed, tmp_path / "damaged")
    flip_a_bit(out / "checkpoint-8" / "optimizer.pt")
    (out / "checkpoint-6" / "scheduler.pt").unlink()
    resumed = make_trainer("gls", out, tmp_path)
    go_on(resumed)
    assert_equal(result_of(resumed), result_of(straight))
    assert fault_of(out / "checkpoint-8") is None, "it was written again"


def test_a_checkpoint_that_is_named_is_refused_where_it_is_damaged(killed: Path, tmp_path: Path) -> None:
    out = shutil.copytree(killed, tmp_path / "damaged")
    truncate(out / "checkpoint-8" / "scheduler.pt")
    with pytest.raises(InputError, match=r"checkpoint-8: damaged or incomplete: scheduler.pt is not as it was written"):
        make_trainer("gls", out, tmp_path).train(resume_from_checkpoint=str(out / "checkpoint-8"))
    with pytest.raises(InputError, match=r"checkpoint-7: damaged or incomplete: it was not written to its end"):
        make_trainer("gls", out, tmp_path).train(resume_from_checkpoint=str(out / "checkpoint-7"))
    for checkpoint in out.iterdir():
        (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InputError, match="resume_from_checkpoint: no complete checkpoint in"):
        make_trainer("gls", out, tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_from_before_there_were_digests_goes_on_by_the_old_rule(killed: Path, tmp_path: Path) -> None:
    out = shutil.copytree(killed, tmp_path / "old")
    state = out / "checkpoint-8" / "trainer_state.json"
    (out / "checkpoint-8" / DIGESTS).unlink()
    assert last_complete_checkpoint(out) == out / "checkpoint-6", "one of today is complete with its digests only"
    content = json.loads(state.read_text())
    del content["stateful_callbacks"]["ScheduleKept"]["attributes"]["stored"]["is_sealed"]
    state.write_text(json.dumps(content))
    assert last_complete_checkpoint(out) == out / "checkpoint-8"
    make_trainer("gls", out, tmp_path).train(resume_from_checkpoint=True)


def test_the_checkpoint_before_goes_only_when_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(_: Path) -> None:
        raise Killed

    out = tmp_path / "run"
    make_trainer("top_k", out, tmp_path, save_total_limit=1, max_steps=2).train()
    trainer = make_trainer("top_k", out, tmp_path, save_total_limit=1)
    monkeypatch.setattr("selkd.training.resuming.seal", ends)
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=True)
    assert {path.name for path in out.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert last_complete_checkpoint(out) == out / "checkpoint-2"


def test_a_clock_that_was_wrong_removes_no_new_checkpoint(tmp_path: Path) -> None:
    for step in (2, 4, 6, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    os.utime(tmp_path / "checkpoint-2", (4e9, 4e9))
    (tmp_path / "checkpoint-best").mkdir()
    rotate(tmp_path / "checkpoint-6", 2, None)  # that of step 9 was passed over when the training went on
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-6", "checkpoint-best"}
    rotate(tmp_path / "checkpoint-6", 1, str(tmp_path / "checkpoint-4"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-6", "checkpoint-best"}
    rotate(tmp_path / "checkpoint-6", None, None)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_run_whose_only_checkpoint_is_damaged_says_so_and_trains_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path)
    recipe["training"] |= {"max_steps": 4, "save_steps": 3}
    expected = distill(recipe, tmp_path / "straight").record["student"]["fingerprint"]

    def ends(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("selkd.run.train._save", ends)
        with pytest.raises(Killed):
            distill(recipe, tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        truncate(checkpoint / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        again = distill(recipe, tmp_path / "run")
    assert "model.safetensors is not as it was written. In its place the training begins anew" in caplog.text
    assert again.record["student"]["fingerprint"] == expected


def test_a_checkpoint_that_was_being_removed_when_the_training_was_killed_goes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    make_trainer("top_k", out, tmp_path, save_total_limit=2, num_train_epochs=2).train()
    (out / "checkpoint-2").mkdir()
    assert [path.name for path in checkpoints_in(out)] == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]
    make_trainer("top_k", out, tmp_path, save_total_limit=2, num_train_epochs=2).train(resume_from_checkpoint=True)
    assert [path.name for path in checkpoints_in(out)] == ["checkpoint-6", "checkpoint-8"]


def test_later_checkpoints_stay_until_the_next_one_is_there(tmp_path: Path) -> None:
    out = tmp_path / "run"
    make_trainer("top_k", out, tmp_path, save_total_limit=2, num_train_epochs=2).train()
    trainer = make_trainer("top_k", out, tmp_path, save_total_limit=1, num_train_epochs=2)
    trainer._finish_rotating(out / "checkpoint-6")
    assert [path.name for path in checkpoints_in(out)] == ["checkpoint-6", "checkpoint-8"]
    trainer._finish_rotating(out / "checkpoint-8")
    assert [path.name for path in checkpoints_in(out)] == ["checkpoint-8"]


def test_a_checkpoint_that_can_not_be_read_is_not_taken_for_a_damaged_one(
    killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("selkd.training.sealing.file_digest", refuses)
    with pytest.raises(RunError, match=r"checkpoint-8 can't be read .*Permission denied.* Make it readable"):
        last_complete_checkpoint(killed)
    assert "Permission denied" in str(fault_of(killed / "checkpoint-8"))
