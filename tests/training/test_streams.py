"""A stream of rows: trained on as a list of the same rows, in one process and two, and after a resume.

As a script, started by torchrun: ``test_streams.py OUT KIND`` trains in each process and writes the student.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from resuming import Killed, kill_at, result_of
from safetensors.torch import load_file, save_file
from tiny import make_arguments, make_model, make_tokenizer
from torch import distributed as dist

from selkd import DistillTrainer
from selkd.errors import InputError

ROWS = [{"text": " ".join(f"w{(7 * row + 3 * word) % 40}" for word in range(5 + row % 9))} for row in range(200)]
STEPS, A_STEP = 4, 4
read: list[int] = []


def rows(offset: int = 0) -> Iterator[dict[str, str]]:
    for number, row in enumerate(ROWS[offset:]):
        read.append(number)
        yield row


def streamed(offset: int = 0) -> IterableDataset:
    return IterableDataset.from_generator(rows, gen_kwargs={"offset": offset})


def make_trainer(out: Path, train: Any, **changes: Any) -> DistillTrainer:
    options = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 8}
    options |= {"save_strategy": "steps", "save_steps": 2, "positions": {"policy": "random", "fraction": 0.5}}
    args = make_arguments(out, **options | changes)
    return DistillTrainer(make_model(1), make_model(0), args, train, processing_class=make_tokenizer())


def test_a_stream_is_trained_on_as_a_list_of_its_rows_and_goes_on(tmp_path: Path) -> None:
    read.clear()
    trainer = make_trainer(tmp_path / "stream", streamed())
    assert len(trainer.train_dataset) == STEPS * A_STEP
    n_read = len(read)
    assert n_read < len(ROWS), "no more is read than is needed"
    trainer.train()
    listed = make_trainer(tmp_path / "list", trainer.train_dataset.samples)
    listed.train()
    assert_same(result_of(trainer), result_of(listed))

    killed = make_trainer(tmp_path / "killed", streamed())
    kill_at(killed, 3, "step")
    with pytest.raises(Killed):
        killed.train()
    other = make_trainer(tmp_path / "killed", streamed(offset=1))
    with pytest.raises(InputError, match="data = "):
        other.train(resume_from_checkpoint=True)
    again = make_trainer(tmp_path / "killed", (row for row in ROWS))  # any iterable of rows is a stream
    again.train(resume_from_checkpoint=True)
    assert_same(result_of(again), result_of(trainer))


def test_a_stream_that_ends_before_is_trained_on_several_times(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", ROWS[150:], max_steps=20)
    assert len(whole.train_dataset) < 20 * A_STEP
    assert make_trainer(tmp_path / "stream", streamed(150), max_steps=20).train_dataset.samples.ids == (
        whole.train_dataset.samples.ids
    )


def test_what_a_stream_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train_dataset: how many rows .* is not known .* Set max_steps"):
        make_trainer(tmp_path, streamed(), max_steps=-1, num_train_epochs=1)
    with pytest.raises(InputError, match=r"eval_dataset: how many rows .* is not known .* give some of them"):
        make_trainer(tmp_path, ROWS).evaluate(streamed())
    with pytest.raises(InputError, match="0 rows give fewer tokens"):
        make_trainer(tmp_path, iter([]))


@pytest.mark.slow
def test_two_processes_train_on_one_stream(tmp_path: Path) -> None:
    from test_distributed import torchrun  # here, as the script does without it

    done = torchrun(__file__, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    trainer = make_trainer(tmp_path / "one", streamed(), optim="sgd")
    trainer.train()
    two = load_file(tmp_path / "two.safetensors")
    for name, weights in trainer.model.named_parameters():
        torch.testing.assert_close(two[name], weights.detach(), rtol=0, atol=2e-6)
    assert "read different rows of the stream" in (tmp_path / "refused.txt").read_text()


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, weights in expected.pop("student").items():
        assert torch.equal(found["student"][name], weights), name
    found.pop("student")
    assert found == expected


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    trained = make_trainer(
        folder / "two", Dataset.from_list(ROWS).to_iterable_dataset(), gradient_accumulation_steps=1, ddp_backend="gloo"
    )
    trained.train()
    if trained.is_world_process_zero():
        save_file(
            {name: p.detach().clone() for name, p in trained.model.named_parameters()}, folder / "two.safetensors"
        )
    try:
        make_trainer(folder / "other", streamed(dist.get_rank()), gradient_accumulation_steps=1, ddp_backend="gloo")
    except InputError as error:
        if trained.is_world_process_zero():
            (folder / "refused.txt").write_text(str(error))
    dist.barrier()
    dist.destroy_process_group()
