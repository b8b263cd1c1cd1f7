"""Which checkpoint a training goes on from."""

from pathlib import Path

from selkd.training.checkpoints import last_whole_checkpoint


def test_the_newest_checkpoint_that_was_written_to_its_end_is_taken(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path / "none") is None
    for name, state in {
        "checkpoint-2": "{}",
        "checkpoint-9": "{}",
        "checkpoint-10": "{}",  # by number, not by letters
        "checkpoint-11": '{"global_step": 1',  # torn
        "checkpoint-12": None,  # never reached
        "checkpoint-99-copy": "{}",
        "my-checkpoint-98": "{}",
        "checkpoint-": "{}",
    }.items():
        (tmp_path / name).mkdir()
        if state is not None:
            (tmp_path / name / "trainer_state.json").write_text(state)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
