"""Which checkpoint a run goes on from."""

import json
from pathlib import Path

import pytest

from selkd.errors import InputError
from selkd.recipe.choices import ClassOptions, PositionOptions
from selkd.training.callbacks import StepLines
from selkd.training.checkpoints import ScheduleKept
from selkd.training.sealing import last_complete_checkpoint

STATE = '{"global_step": 1}'


def write(folder: Path, checkpoints: dict[str, str | None]) -> None:
    """A folder per name, with that text as its state; None: a checkpoint that holds no state yet."""
    for name, state in checkpoints.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").touch()
        if state is not None:
            (folder / name / "trainer_state.json").write_text(state)


@pytest.mark.parametrize(
    ("checkpoints", "expected"),
    [
        ({}, None),
        ({"checkpoint-5": STATE}, "checkpoint-5"),
        ({"checkpoint-5": STATE, "checkpoint-6": STATE, "checkpoint-7": STATE}, "checkpoint-7"),
        # By number: as text 9 comes after 10 and 100.
        ({"checkpoint-9": STATE, "checkpoint-10": STATE}, "checkpoint-10"),
        ({"checkpoint-100": STATE, "checkpoint-20": STATE, "checkpoint-9": STATE}, "checkpoint-100"),
        # Interrupted before its state, or within it.
        ({"checkpoint-8": STATE, "checkpoint-9": STATE, "checkpoint-10": None}, "checkpoint-9"),
        ({"checkpoint-8": STATE, "checkpoint-9": STATE, "checkpoint-10": STATE[:9]}, "checkpoint-9"),
        ({"checkpoint-8": STATE, "checkpoint-9": "", "checkpoint-10": None}, "checkpoint-8"),
        ({"checkpoint-9": "", "checkpoint-10": None}, None),
        # Not the Trainer's.
        (
            {"checkpoint-3": STATE, "checkpoint-best": STATE, "checkpoint-12-old": STATE, "my-checkpoint-13": STATE,
             "checkpoint-": STATE, "checkpoint--14": STATE, "checkpoint-1.5": STATE, "run-99": STATE},
            "checkpoint-3",
        ),
        ({"checkpoint-best": STATE}, None),
    ],
)  # fmt: skip
def test_the_latest_whole_checkpoint_is_found(
    checkpoints: dict[str, str | None], expected: str | None, tmp_path: Path
) -> None:
    write(tmp_path, checkpoints)
    assert last_complete_checkpoint(tmp_path) == (expected and tmp_path / expected)


def test_files_and_folders_that_are_not_there_are_no_checkpoints(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path / "none") is None
    write(tmp_path, {"checkpoint-2": STATE})
    (tmp_path / "checkpoint-11").touch()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_checkpoint_that_lacks_a_processs_random_state_is_not_whole(tmp_path: Path) -> None:
    """The first process writes its state without waiting for the others' files."""
    kept = {"stateful_callbacks": {"ScheduleKept": {"args": {}, "attributes": {"stored": {"processes": 2}}}}}
    write(tmp_path, {"checkpoint-4": json.dumps(kept), "checkpoint-6": json.dumps(kept)})
    for name, ranks in (("checkpoint-4", 2), ("checkpoint-6", 1)):
        (tmp_path / name / "optimizer.pt").touch()
        for rank in range(ranks):
            (tmp_path / name / f"rng_state_{rank}.pth").touch()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-6" / "rng_state_1.pth").touch()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_a_checkpoint_that_is_older_than_a_keys_name_is_resumed(tmp_path: Path) -> None:
    positions = PositionOptions().model_dump()
    former = {("probed_share" if key == "calibration_fraction" else key): value for key, value in positions.items()}
    classes = ClassOptions().model_dump()
    stored = {"processes": 1, "positions": former, "classes": {k: v for k, v in classes.items() if k != "tail"}}
    kept = {"stateful_callbacks": {"ScheduleKept": {"args": {}, "attributes": {"stored": stored}}}}
    write(tmp_path, {"checkpoint-4": json.dumps(kept)})
    ScheduleKept({"processes": 1, "positions": positions, "classes": classes}).require_same(tmp_path / "checkpoint-4")
    other = ScheduleKept({"processes": 1, "positions": positions | {"fraction": 0.5}})
    with pytest.raises(InputError, match="its training has positions = "):
        other.require_same(tmp_path / "checkpoint-4")


def test_lines_end_where_a_line_ends_and_nowhere_else(tmp_path: Path) -> None:
    """An answer may hold characters that end a line for Unicode; they are part of it."""
    lines = StepLines(tmp_path / "rollouts.jsonl")
    written = [{"step": 1, "answer": "a\u2028b\u0085c"}, {"step": 2, "answer": "d"}]
    lines.append(written)
    with lines.path.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "ans')
    assert lines.read() == written
    lines.cut(1)
    assert lines.read() == written[:1]
