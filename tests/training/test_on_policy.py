"""On-policy distillation: what is answered, what is learned of it, and that it is the off-policy step on that."""

import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_distributed import WORKER, torchrun
from tiny import V, make_arguments, make_model, make_prompts, make_tokenizer
from tiny_run import make_recipe, make_task

from selkd import DistillTrainer, distill
from selkd.data.samples import EMPTY_SAMPLE, Sample, SampleDataset
from selkd.data.splits import load_splits
from selkd.errors import InputError
from selkd.models.adapters import with_adapters
from selkd.models.generation import _Draw
from selkd.recipe.choices import OnPolicyOptions
from selkd.recipe.data import DataOptions
from selkd.recipe.files import load_recipe
from selkd.recipe.models import LoraOptions
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.workspace import Workspace
from selkd.training.on_policy import Answering, PromptCollator, Rollout, RolloutSums, prompt_length

PROMPTS = {"prompt_field": "question", "completion_field": "answer", "packing": False}
POSITIONS = {"metric": "student_entropy", "policy": "top_k", "fraction": 0.5}


def answering(dtype: torch.dtype = torch.float32, **options: Any) -> Answering:
    return Answering(OnPolicyOptions(**({"max_new_tokens": 10} | options)), 3, [1], 1, V, dtype)


def trainer(path: Path, samples: list[Sample], on_policy: dict[str, Any] | None, **changes: Any) -> DistillTrainer:
    args = make_arguments(
        path,
        criterion={"name": "reverse_kl"},
        positions=POSITIONS,
        on_policy=on_policy,
        data=None if on_policy is None else PROMPTS,
        **({"per_device_train_batch_size": 8} | changes),
    )
    return DistillTrainer(
        model=make_model(1),
        teacher=make_model(0, layers=3),
        args=args,
        train_dataset=SampleDataset.from_samples(samples),
        processing_class=make_tokenizer(),
    )


def weights(of: DistillTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in of.model.parameters()])


def test_a_prompt_is_what_stands_before_the_last_answer() -> None:
    tokens, start = np.arange(2, 10), np.zeros(1, np.int32)
    for mask, expected in {
        "00011111": 3,
        "01100011": 6,
        "00000000": 8,
        "00100110": 5,
        "01001011": 6,  # three answers: the prompt ends before the last
        "01111111": 1,
        "01010110": 5,  # three answers: before the last, not the second
        "01101001": 7,
        "10101010": 6,
    }.items():
        assert prompt_length(Sample(tokens, start, np.array([m == "1" for m in mask]))) == expected


def test_generated_tokens_alone_are_valid_and_fillers_stay() -> None:
    samples = [*make_prompts(3), EMPTY_SAMPLE]
    (batch,), rollouts, _ = answering()(make_model(3), [PromptCollator(1)(samples)], 0)
    assert len(rollouts) == 3
    for row, (sample, rollout) in enumerate(zip(samples[:3], rollouts, strict=True)):
        n = prompt_length(sample)
        assert rollout.prompt.tolist() == sample.token_ids[:n].tolist()
        assert batch["input_ids"][row, :n].tolist() == sample.token_ids[:n].tolist()
        assert batch["targets"][row][batch["valid_mask"][row]].tolist() == rollout.answer
        assert batch["valid_mask"][row].nonzero().flatten().tolist() == list(range(n - 1, n - 1 + len(rollout.answer)))
        assert batch["sample_ids"][row].numpy().tobytes() == rollout.sample.id
    assert batch["sample_ids"][3].numpy().tobytes() == EMPTY_SAMPLE.id
    assert not batch["valid_mask"][3].any()


def test_answers_do_not_depend_on_how_a_step_is_cut_and_change_with_it_and_the_seed() -> None:
    samples, model, collate = make_prompts(), make_model(3), PromptCollator(1)

    def found(cut: list[slice], step: int = 5, **options: Any) -> list[list[int]]:
        batches = [collate(samples[part]) for part in cut]
        return [rollout.answer for rollout in answering(**options)(model, batches, step)[1]]

    whole = found([slice(0, 8)])
    assert found([slice(0, 3), slice(3, 8)]) == whole
    assert found([slice(0, 8)], at_once=3) == whole
    assert found([slice(0, 8)], step=6) != whole
    assert found([slice(0, 8)], temperature=0.5) != whole


@dataclass
class Seen:
    """What a step drew, cut in one way: of each prompt the answer, the uniforms [T] and, a token, cumulatives [V]."""

    answers: list[list[int]]
    uniforms: list[np.ndarray]
    cumulatives: list[list[np.ndarray]]


def seen(monkeypatch: pytest.MonkeyPatch, samples: list[Sample], at_once: int | None, dtype: torch.dtype) -> Seen:
    """The answers to ``samples`` and the distributions that they were drawn from, as the draws themselves saw them."""
    calls: list[tuple[list[np.ndarray], list[torch.Tensor]]] = []

    class Watched(_Draw):
        def __init__(self, uniforms: torch.Tensor, prompt_width: int) -> None:
            super().__init__(uniforms, prompt_width)
            calls.append((list(uniforms.numpy()), []))

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            calls[-1][1].append(scores.clone())
            return super().__call__(input_ids, scores)

    with monkeypatch.context() as patch:
        patch.setattr("selkd.models.generation._Draw", Watched)
        (_, rollouts, _) = answering(dtype, at_once=at_once)(make_model(3), [PromptCollator(1)(samples)], 5)
    order = np.argsort([len(rollout.prompt) for rollout in rollouts], kind="stable")  # as they are answered
    found = Seen([rollout.answer for rollout in rollouts], [np.empty(0)] * len(rollouts), [[] for _ in rollouts])
    rows = iter(order.tolist())
    for uniforms, scores in calls:
        for place, of_row in enumerate(uniforms):
            row = next(rows)
            found.uniforms[row] = of_row
            found.cumulatives[row] = [
                cumulative(step[place]) for step in scores[: len(found.answers[row])]
            ]  # a row that has ended is carried along with pads
    return found


def cumulative(scores: torch.Tensor) -> np.ndarray:
    return np.asarray(torch.softmax(scores.double(), dim=-1).cumsum(dim=-1).numpy())


def exact(samples: list[Sample], of: Seen, dtype: torch.dtype) -> list[np.ndarray]:
    """[T, V] a prompt: the cumulatives along the answers of ``of``, by a plain forward: no padding, no key-value cache.

    In float64 they are what every other way rounds; in a lower ``dtype`` they show how much that rounding is.
    """
    model, found = make_model(3), []
    model = model.double() if dtype == torch.float64 else model
    is_low = dtype == torch.bfloat16
    for sample, answer in zip(samples, of.answers, strict=True):
        n = prompt_length(sample)
        ids = torch.tensor([[*sample.token_ids[:n].tolist(), *answer[:-1]]])
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_low):
            found.append(cumulative(model(ids).logits[0, n - 1 :]))
    return found


def chance_of_other_draws(one: np.ndarray, other: np.ndarray) -> float:
    """The measure of the uniforms that draw different classes from two [V] cumulatives."""
    one, other = np.append(0.0, one), np.append(0.0, other)
    shared = np.minimum(one[1:], other[1:]) - np.maximum(one[:-1], other[:-1])
    return float(1.0 - np.clip(shared, 0.0, None).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_alone_moves_an_answer_and_only_at_a_border(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another cut is other padding, and so other rounding. How much of it, a processor's kernels decide: in bfloat16
    none, a few or a fifth of these answers turn out otherwise. What holds with all of them: the distributions move by
    no more than the dtype rounds them anyhow; a draw differs only where the uniform lies between the places that a
    border had; and such uniforms are met as often as those places are apart.
    """
    samples = make_prompts(256)
    whole, parts = (seen(monkeypatch, samples, n, dtype) for n in (None, 3))
    along = exact(samples, whole, torch.float64)
    rounding = max(np.abs(a - b).max() for a, b in zip(exact(samples, whole, dtype), along, strict=True))
    assert rounding < {torch.float32: 2e-5, torch.bfloat16: 0.1}[dtype], "else the bounds below would say nothing"

    differing, expected = 0, 0.0
    for row, (one, other) in enumerate(zip(whole.answers, parts.answers, strict=True)):
        u = whole.uniforms[row]
        assert np.array_equal(u, parts.uniforms[row])
        for place, (mine, its) in enumerate(zip(whole.cumulatives[row], parts.cumulatives[row], strict=False)):
            assert max(np.abs(each - along[row][place]).max() for each in (mine, its)) <= 2 * rounding
            assert one[place] == (mine <= u[place] * mine[-1]).sum()
            assert other[place] == (its <= u[place] * its[-1]).sum()
            expected += chance_of_other_draws(mine, its)
            if one[place] != other[place]:
                differing += 1
                first, last = sorted((one[place], other[place]))
                borders = along[row][place][first:last]
                assert np.abs(borders - u[place]).max() <= 2 * rounding
                break
        else:
            assert one == other
    assert abs(differing - expected) <= 4 * np.sqrt(expected) + 1


def test_the_fraction_is_kept_on_average_and_the_rest_keeps_its_completion() -> None:
    some, samples = answering(fraction=0.3), make_prompts(200)
    chosen = [some.is_answered(sample, 0) for sample in samples]
    assert 0.2 < np.mean(chosen) < 0.4
    assert chosen != [some.is_answered(sample, 1) for sample in samples]
    (batch,), rollouts, _ = some(make_model(3), [PromptCollator(1)(samples[:8])], 0)
    assert len(rollouts) == sum(chosen[:8])
    for row, sample in enumerate(samples[:8]):
        assert (batch["sample_ids"][row].numpy().tobytes() == sample.id) != chosen[row]


def test_a_step_is_the_off_policy_step_on_the_answers(tmp_path: Path) -> None:
    samples = make_prompts()
    on = trainer(tmp_path, samples, {"max_new_tokens": 10})
    answered: list[Rollout] = []
    original = on.answering.__class__.__call__  # type: ignore[union-attr]

    def watched(self: Answering, *arguments: Any) -> Any:
        found = original(self, *arguments)
        answered.extend(found[1])
        return found

    Answering.__call__ = watched  # type: ignore[method-assign]
    try:
        on.train()
    finally:
        Answering.__call__ = original  # type: ignore[method-assign]
    off = trainer(tmp_path, [rollout.sample for rollout in answered], None)
    off.train()
    assert len(answered) == 8
    torch.testing.assert_close(weights(on), weights(off), rtol=0, atol=1e-6)
    assert (weights(on) - weights(trainer(tmp_path, samples, None))).abs().max() > 1e-3
    assert on.totals.positions_valid == sum(len(rollout.answer) for rollout in answered)


def test_low_precision_products_train_on(tmp_path: Path) -> None:
    """Accelerate wraps the forward for them; generating must not take the wrapper off, and the loss with it."""
    low = trainer(tmp_path, make_prompts(), {"max_new_tokens": 10}, bf16=True, max_steps=3)
    low.train()
    assert low.totals.positions_selected > 0
    assert (weights(low) - weights(trainer(tmp_path, make_prompts(), None))).abs().max() > 1e-3


def test_micro_batches_make_no_difference(tmp_path: Path) -> None:
    options = {"max_new_tokens": 10, "fraction": 0.6}
    whole = trainer(tmp_path, make_prompts(), options, max_steps=2)
    parts = trainer(
        tmp_path, make_prompts(), options, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    for each in (whole, parts):
        each.train()
    torch.testing.assert_close(weights(whole), weights(parts), rtol=0, atol=1e-5)


def test_prompts_are_rows_as_texts_are(tmp_path: Path) -> None:
    """A SampleDataset used to be asked for. The path is a recipe's: the same rows give the samples of their file."""
    words = [f"w{3 + n} w{9 + n}" for n in range(8)]
    rows = [{"question": text, "answer": f" w{20 + n}"} for n, text in enumerate(words)]
    fields = {"prompt_field": "question", "packing": False, "max_length": 32}
    trained = []
    for given in (rows, Dataset.from_list(rows), [{"question": row["question"]} for row in rows]):
        args = make_arguments(tmp_path, on_policy={"max_new_tokens": 6}, per_device_train_batch_size=8, **fields)
        on = DistillTrainer(make_model(1), make_model(0), args, given, processing_class=make_tokenizer())
        on.train()
        assert on.rollouts.figures()["rollouts"] == 8
        trained.append(weights(on))
    assert torch.equal(trained[0], trained[1])
    assert torch.equal(trained[0], trained[2])
    args = make_arguments(tmp_path, completion_field="answer", max_steps=1, **fields)
    off = DistillTrainer(make_model(1), make_model(0), args, rows, processing_class=make_tokenizer())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = parse_part(
        DataOptions,
        {"path": str(tmp_path / "rows.jsonl"), "completion_field": "answer", "held_out_fraction": 0, **fields},
        "data",
    )
    expected = load_splits(options, make_tokenizer(), "tiny", tmp_path / "cache").train
    assert [off.train_dataset[index].id for index in range(8)] == list(expected.ids)


def test_rows_that_do_not_serve_are_refused(tmp_path: Path) -> None:
    def trained_on(rows: Any, **options: Any) -> None:
        args = make_arguments(tmp_path, **options)
        DistillTrainer(make_model(1), make_model(0), args, rows, processing_class=make_tokenizer())

    rows, on = [{"question": "w3"}], {"on_policy": {}, "prompt_field": "question"}
    for given, options, message in [
        (rows, on, "data.packing: on_policy answers one prompt a sample; set data.packing: false"),
        (
            rows,
            on | {"packing": False, "prompt_field": "q"},
            "data.prompt_field: train_dataset, row 0 has no field 'q'",
        ),
        (
            rows,
            {"on_policy": {}, "packing": False},
            "on_policy: the student answers prompts, and data.text",
        ),
        (
            rows,
            {"prompt_field": "question"},
            "data.completion_field: without completions there is",
        ),
        (
            rows,
            {"prompt_field": "a", "text_field": "b"},
            "data.prompt_field: a row has one shape, and data.text_field",
        ),
        (rows, on | {"loss_on": "all"}, "data.loss_on: all makes a text of a prompt alone"),
        (
            rows,
            on | {"loss_on": "all", "completion_field": "a"},
            "data.loss_on: all learns prompts, and on_policy",
        ),
        ([{"data.name": "w3"}], {}, "data.text_field: train_dataset, row 0 has no field 'text'; it has data.name."),
        ([{"a": "w3"}], {"text_field": "data.path"}, "data.text_field: train_dataset, row 0 has no field 'data.path'"),
        ("w3 w4", {}, "train_dataset: expected a SampleDataset, a datasets.Dataset or a list of rows, got str"),
        (["w3 w4"], {}, "train_dataset, row 0: expected an object with the field 'text', got str"),
    ]:
        with pytest.raises(InputError, match=f"^{message}"):
            trained_on(given, **options)


def test_rows_without_anything_to_learn_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"q": "w3 w4", "a": " w5 w6"}, {"q": "w7 w8", "a": None}, {"q": "w3 w9", "a": None}]
    args = make_arguments(tmp_path, prompt_field="q", completion_field="a", packing=False)
    with caplog.at_level(logging.WARNING):
        DistillTrainer(make_model(1), make_model(0), args, rows, processing_class=make_tokenizer())
    assert "train_dataset: 2 of 3 documents hold nothing to learn and were left out" in caplog.text


def test_the_smaller_of_two_models_of_one_class_decides_how_long_answers_may_be(tmp_path: Path) -> None:
    def made(student: int, teacher: int) -> DistillTrainer:
        small, large = (make_model(seed, max_position_embeddings=size) for seed, size in ((1, student), (0, teacher)))
        args = make_arguments(tmp_path, on_policy={"max_new_tokens": 10}, data=PROMPTS)
        samples = SampleDataset.from_samples(make_prompts())
        return DistillTrainer(small, large, args, samples, processing_class=make_tokenizer())

    made(64, 64)
    for student, teacher in ((12, 64), (64, 12)):
        with pytest.raises(InputError, match=r"max_new_tokens: 10 after a prompt of up to .* has positions for 12"):
            made(student, teacher)


def test_samples_of_plain_text_have_no_prompt_to_answer(tmp_path: Path) -> None:
    text = [Sample(np.arange(2, 12), np.array([0])), Sample(np.arange(3, 9), np.array([0]))]
    with pytest.raises(InputError, match="on_policy: samples of plain text, without a prompt to answer"):
        trainer(tmp_path, text, {})


def test_an_evaluation_on_prompts_alone_and_answers_past_the_window_are_refused(tmp_path: Path) -> None:
    rows = [{"q": "w3 w4"}, {"q": "w7 w8 w9"}]
    options: dict[str, Any] = {"prompt_field": "q", "packing": False, "max_length": 32}

    def made(new_tokens: int, **datasets: Any) -> DistillTrainer:
        args = make_arguments(tmp_path, on_policy={"max_new_tokens": new_tokens}, **options)
        return DistillTrainer(make_model(1), make_model(0), args, rows, processing_class=make_tokenizer(), **datasets)

    window = make_model(1).config.max_position_embeddings
    longest = int(made(window - 8).train_dataset.samples.lengths.max())
    made(window - longest)
    with pytest.raises(InputError, match=f"max_new_tokens: {window - longest + 1} after a prompt of up to {longest}"):
        made(window - longest + 1)

    # The answer takes the place of the data's completion, which need not fit beside it.
    with_answers = SampleDataset.from_samples([Sample(np.arange(2, 32), np.array([0]), np.arange(30) >= 10)])

    def on(student: Any, new_tokens: int) -> None:
        args = make_arguments(tmp_path, on_policy={"max_new_tokens": new_tokens}, **options)
        DistillTrainer(student, make_model(0), args, with_answers, processing_class=make_tokenizer())

    adapted = with_adapters(make_model(1), LoraOptions(), 0)
    for student in (make_model(1), adapted):
        on(student, window - 10)
        with pytest.raises(InputError, match=f"max_new_tokens: {window - 9} after a prompt of up to 10 tokens"):
            on(student, window - 9)

    # Where some samples keep their completion, it has to fit, too.
    long = SampleDataset.from_samples([Sample(np.arange(window + 1) % V, np.array([0]), np.arange(window + 1) >= 10)])
    for on_policy, refused in (({"fraction": 0.5, "max_new_tokens": 4}, True), ({"max_new_tokens": 4}, False)):
        args = make_arguments(tmp_path, on_policy=on_policy, completion_field="a", **options)
        with (
            pytest.raises(InputError, match=f"train_dataset has a sample of {window + 1}") if refused else nullcontext()
        ):
            DistillTrainer(make_model(1), make_model(0), args, long, processing_class=make_tokenizer())
    args = make_arguments(tmp_path, packing=False)
    with pytest.raises(InputError, match=f"^data.max_length: train_dataset has a sample of {window + 1} tokens, but"):
        DistillTrainer(make_model(1), make_model(0), args, long, processing_class=make_tokenizer())
    with pytest.raises(InputError, match="eval_dataset: prompts alone"):
        made(4, eval_dataset=rows)


def test_a_resumed_training_ends_where_a_straight_one_does(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6}
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    straight = trainer(tmp_path / "straight", make_prompts(), options, **changes)
    straight.train()
    written = (tmp_path / "straight" / "rollouts.jsonl").read_text()
    moved = (tmp_path / "straight").rename(tmp_path / "moved")
    resumed = trainer(moved, make_prompts(), options, **changes)
    resumed.train(resume_from_checkpoint=str(moved / "checkpoint-2"))
    torch.testing.assert_close(weights(resumed), weights(straight), rtol=0, atol=1e-6)
    assert (moved / "rollouts.jsonl").read_text() == written
    assert not (tmp_path / "straight").exists()
    figures = [each.rollouts.figures() | {"seconds": 0} for each in (straight, resumed)]
    assert figures[0] == figures[1]
    assert figures[0]["rollouts"] == 16


def test_what_is_said_of_answers() -> None:
    prompt = np.arange(2, 4)
    rollouts = [Rollout(prompt, [5, 6, 5, 6, 5, 6, 5, 6], False), Rollout(prompt, [9, 1], True)]
    figures = RolloutSums.of(rollouts, 1.5).figures()
    assert figures == {
        "rollouts": 2,
        "tokens": 10,
        "mean_tokens": 5.0,
        "longest_tokens": 8,
        "ended_share": 0.5,
        "repeated_share": 3 / 5,
        "seconds": 1.5,
    }
    assert RolloutSums.of([], 0.0).figures()["mean_tokens"] is None


def test_a_run_answers_learns_and_tells(tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path, data=make_task(tmp_path, packing=False), cache=None, classes={"sampler": "all"}, samples=None,
        on_policy={"max_new_tokens": 12, "fraction": 0.5, "log_rollouts": 3},
    )  # fmt: skip
    run, again = distill(recipe, tmp_path / "run"), distill(recipe, tmp_path / "again")
    record = run.record
    assert record["recipe"]["criterion"]["name"] == "reverse_kl"
    told, counts = record["on_policy"], record["counts"]
    assert 0.3 * 3 * counts["samples"] < told["rollouts"] < 0.7 * 3 * counts["samples"]
    assert told["longest_tokens"] <= 12
    lines = [json.loads(line) for line in (run.path / "rollouts.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} <= set(range(1, record["train"]["steps"] + 1))
    assert all(line["prompt"].endswith("w3") and line["answer_tokens"] <= 12 for line in lines)
    metrics = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert {"rollout_mean_tokens", "rollout_ended_share", "rollout_seconds"} <= metrics[0].keys()
    assert told | {"seconds": 0} == again.record["on_policy"] | {"seconds": 0}
    students = [(each.student / "model.safetensors").read_bytes() for each in (run, again)]
    assert students[0] == students[1]
    assert record["fidelity"]["positions"] > 0


def test_prompts_alone_are_enough(tmp_path: Path) -> None:
    data = make_task(tmp_path, packing=False, completion_field=None)
    recipe = make_recipe(
        tmp_path, data=data, cache=None, classes={"sampler": "all"}, samples=None, evaluation={"suite": []},
        on_policy={"max_new_tokens": 6},
    )  # fmt: skip
    run = distill(recipe, tmp_path / "run")
    assert run.record["on_policy"]["rollouts"] == 3 * run.record["counts"]["samples"]
    assert run.record["counts"]["positions_valid"] == run.record["on_policy"]["tokens"]


def test_a_recipes_answers_are_held_against_its_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not against its longest sample: an answer takes the completion's place."""
    monkeypatch.setenv("SELKD_CACHE", str(tmp_path / "cache"))

    def workspace(new_tokens: int) -> Workspace:
        recipe = make_recipe(
            tmp_path, data=make_task(tmp_path, packing=False), cache=None, classes={"sampler": "all"}, samples=None,
            on_policy={"max_new_tokens": new_tokens},
        )  # fmt: skip
        return Workspace(parse_part(Recipe, recipe), tmp_path / "run")

    longest = max(prompt_length(sample) for sample in workspace(8).splits.train)
    assert longest < 16
    workspace(64 - longest).require_positions()
    message = (
        f"on_policy.max_new_tokens: {65 - longest} after a prompt of up to {longest} tokens, but .* positions for 64"
    )
    with pytest.raises(InputError, match=message):
        workspace(65 - longest).require_positions()


@pytest.mark.slow
def test_two_processes_answer_what_one_does(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 10, "fraction": 0.7}
    alone = trainer(tmp_path / "alone", make_prompts(7), options, per_device_train_batch_size=7)
    alone.train()
    given = {"criterion": {"name": "reverse_kl"}, "positions": POSITIONS, "data": PROMPTS, "on_policy": options}
    done = torchrun(str(WORKER), str(tmp_path), "ddp", json.dumps(given))
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads((tmp_path / "answer.json").read_text())
    for name, parameter in load_file(tmp_path / "weights.safetensors").items():
        torch.testing.assert_close(parameter, alone.model.state_dict()[name], rtol=0, atol=3e-6)
    told = {name: value for name, value in answer["rollouts"].items() if name != "seconds"}
    assert told == {name: value for name, value in alone.rollouts.figures().items() if name != "seconds"}
    assert answer["totals"]["positions_valid"] == alone.totals.positions_valid


REFUSED = {
    ("cache={path: null}", "classes={sampler: rs_kd}", "criterion.name=forward_kl"): "cache: it holds the teacher's "
    "classes for the data's own tokens",
    (
        "data={path: demo}",
    ): "on_policy: the student answers prompts, and data.text_field has none; give data.prompt_field",
    ("data.packing=true",): "data.packing: on_policy answers one prompt a sample; set data.packing: false",
    ("data.loss_on=all",): "data.loss_on: all learns prompts",
    ("data.completion_field=null", "on_policy.fraction=0.5"): "on_policy.fraction: below 1 the other samples keep",
    ("data.completion_field=null",): "evaluation.suite: fidelity is measured on completions",
    ("data.completion_field=null", "evaluation.suite=[]", "samples={fraction: 0.2}"): "samples: a sample is scored",
    ("data.completion_field=null", "on_policy=null"): "data.completion_field: without completions there is nothing",
    ("on_policy.temperature=0", "on_policy.top_p=0.5"): "on_policy.top_p: without effect at temperature 0",
    ("on_policy.max_new_tokens=0",): "on_policy.max_new_tokens: input should be greater than or equal to 1",
    ("on_policy.max_tokens=9",): r"on_policy.max_tokens: unknown key.*Did you mean 'max_new_tokens'\?",
    ("classes={sampler: rs_kd}",): "criterion.name: reverse_kl of drawn classes would be a biased estimate",
    ("criterion.kd_weight=0.9",): "criterion.kd_weight: expected 1.0 beside on_policy, got 0.9.*tokens that it drew; "
    "set it to 1.0, and keep some of the data's completions with on_policy.fraction",
    ("criterion.kd_weight=0.9", "on_policy.fraction=0.5"): "criterion.kd_weight: expected 1.0 beside on_policy",
    ("training.fsdp=full_shard",): "on_policy: a student sharded by FSDP does not generate",
}


@pytest.mark.parametrize("overrides", REFUSED, ids=lambda given: " ".join(given))
def test_what_does_not_go_together_is_refused_with_the_reason(overrides: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=f"(?s){REFUSED[overrides]}"):
        load_recipe("se_kd_on_policy", list(overrides))


def test_reverse_kl_is_the_default_and_a_named_criterion_stays() -> None:
    given = {"teacher": {"model": "demo"}, "student": {"model": "demo"}, "on_policy": {},
             "data": {"path": "x.jsonl", "prompt_field": "q", "completion_field": "a", "packing": False}}  # fmt: skip
    assert parse_part(Recipe, given).criterion.name == "reverse_kl"
    recipe = parse_part(Recipe, given | {"criterion": {"temperature": 2.0}})
    assert (recipe.criterion.name, recipe.criterion.temperature) == ("reverse_kl", 2.0)
    assert parse_part(Recipe, given | {"criterion": {"name": "jsd"}}).criterion.beta == 0.5
    assert parse_part(Recipe, recipe.resolved()) == recipe


def test_a_cache_and_packed_samples_are_refused_by_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Sample(np.arange(2, 10), np.array([0, 4]))
    with pytest.raises(InputError, match=r"on_policy: samples of several documents"):
        trainer(tmp_path, [packed], {})
    with pytest.raises(InputError, match=r"on_policy\.fraction: input should be greater than 0"):
        make_arguments(tmp_path, on_policy={"fraction": 0}, data=PROMPTS)
    with pytest.raises(InputError, match=r"criterion\.kd_weight: expected 1.0 beside on_policy, got 0.5"):
        make_arguments(tmp_path, on_policy={}, data=PROMPTS, criterion={"kd_weight": 0.5})
    off = trainer(tmp_path, make_prompts(), None)
    monkeypatch.setattr("selkd.training.trainer.as_teacher", lambda *_: type("Cached", (), {"is_live": False})())
    assert off.answering is None
    with pytest.raises(InputError, match="on_policy: a TeacherCache holds the classes of the data's own tokens"):
        trainer(tmp_path, make_prompts(), {})
