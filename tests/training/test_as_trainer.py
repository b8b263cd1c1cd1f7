"""What users of ``transformers.Trainer`` expect of a trainer, of ``DistillTrainer``."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_trainer import RECIPES, assert_same, cached, logits_of, weights
from tiny import V, make_arguments, make_model, make_prompts, make_samples, make_tokenizer
from transformers import EarlyStoppingCallback, EvalPrediction, LlamaForCausalLM, TrainerCallback

from selkd import DistillTrainer
from selkd.data.collate import collate
from selkd.data.samples import Sample, SampleDataset
from selkd.errors import InputError

ROWS = [{"text": " ".join(f"w{2 + (7 * i + 3 * j * j) % (V - 2)}" for j in range(9 + 3 * i))} for i in range(5)]
OTHER_ROWS = [{"text": row["text"].replace("w1", "w2")} for row in ROWS]
UNPACKED = {"packing": False, "max_length": 32}


def make_trainer(out: Path, **options: Any) -> DistillTrainer:
    """A trainer; its own arguments by their names, the others those of ``DistillArguments``."""
    names = ("model", "model_init", "teacher", "train_dataset", "eval_dataset", "compute_metrics", "callbacks",
             "preprocess_logits_for_metrics", "optimizers")  # fmt: skip
    given: dict[str, Any] = {"teacher": make_model(0, layers=3), "train_dataset": make_samples(8)}
    given |= {name: options.pop(name) for name in names if name in options}
    if "model_init" not in given:
        given.setdefault("model", make_model(1))
    return DistillTrainer(args=make_arguments(out, **options), processing_class=make_tokenizer(), **given)


def evaluations(trainer: DistillTrainer, name: str = "eval_loss") -> dict[int, float]:
    """What was logged of the evaluations, by optimiser step."""
    return {log["step"]: log[name] for log in trainer.state.log_history if name in log}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Of the next token, as users of causal language models write it."""
    predicted, labels = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
    return {"accuracy": float((predicted == labels)[labels != -100].mean())}


def half_foreseen(count: int) -> SampleDataset:
    """Samples of which the student foresees about every second token."""
    student, generator, samples = make_model(1), np.random.default_rng(5), []
    for index in range(count):
        tokens = generator.integers(2, V, 2)
        for place in range(9 + index):
            with torch.no_grad():
                best = int(student(torch.from_numpy(tokens)[None]).logits[0, -1].argmax())
            tokens = np.append(tokens, best if place % 2 else generator.integers(2, V))
        samples.append(Sample(tokens, np.zeros(1, np.int32)))
    return SampleDataset.from_samples(samples)


def dense_accuracy(model: LlamaForCausalLM, samples: SampleDataset) -> float:
    batch = collate(list(samples), 1)
    with torch.no_grad():
        best = logits_of(model, batch).argmax(-1)
    return float((best == batch["targets"])[batch["valid_mask"]].double().mean())


# What evaluate and predict take


@pytest.mark.parametrize("as_given", [list, Dataset.from_list], ids=["a list", "a datasets.Dataset"])
def test_rows_are_evaluated_as_the_samples_that_they_become(as_given: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "a", eval_dataset=as_given(ROWS), **UNPACKED)
    samples = trainer.eval_dataset.samples
    assert isinstance(samples, SampleDataset)
    assert len(samples) == len(ROWS)
    expected = trainer.evaluate()["eval_loss"]
    late = make_trainer(tmp_path / "b", **UNPACKED)
    assert late.evaluate(as_given(ROWS))["eval_loss"] == expected
    assert late.evaluate(samples)["eval_loss"] == expected
    assert late.evaluate(as_given(OTHER_ROWS))["eval_loss"] != expected


def test_sets_have_names_in_the_constructor_and_in_the_call(tmp_path: Path) -> None:
    sets = {"first": ROWS, "second": OTHER_ROWS}
    trainer = make_trainer(tmp_path, eval_dataset=sets, **UNPACKED)
    metrics = trainer.evaluate()
    assert metrics["eval_first_loss"] != metrics["eval_second_loss"]
    assert metrics["eval_second_loss"] == trainer.evaluate(OTHER_ROWS)["eval_loss"]
    assert metrics["eval_first_loss"] == trainer.evaluate("first")["eval_loss"]
    called = make_trainer(tmp_path, **UNPACKED).evaluate(sets, metric_key_prefix="held_out")
    assert called["held_out_first_loss"] == metrics["eval_first_loss"]
    assert called["held_out_second_loss"] == metrics["eval_second_loss"]


def test_without_rows_an_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="requires an eval_dataset"):
        make_trainer(tmp_path).evaluate()


def test_workers_that_stay_serve_the_rows_that_are_asked_for(tmp_path: Path) -> None:
    sets = {"own": make_samples(3, seed=1), "rows": make_samples(3, seed=2), "others": make_samples(3, seed=3)}
    plain = make_trainer(tmp_path / "a", **UNPACKED)
    expected = {name: plain.evaluate(samples)["eval_loss"] for name, samples in sets.items()}
    trainer = make_trainer(
        tmp_path / "b",
        eval_dataset=sets["own"],
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
        **UNPACKED,
    )
    loaders = []
    for name in ("own", "rows", "own", "others", "rows", "own"):
        metrics = trainer.evaluate() if name == "own" else trainer.evaluate(sets[name])
        assert metrics["eval_loss"] == expected[name], name
        if name == "own":
            loaders.append(trainer.callback_handler.eval_dataloader)
    assert loaders[0] is loaders[1] is loaders[2], "the own set's workers stay"
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == plain.evaluate(plain.train_dataset)["eval_loss"]
    trainer.eval_dataset = [row | {} for row in ROWS]
    assert trainer.evaluate()["eval_loss"] == plain.evaluate(ROWS)["eval_loss"]


@pytest.mark.parametrize("batch", [2, 5, 8])
def test_predict_gives_logits_and_each_label_at_its_own_place(batch: int, tmp_path: Path) -> None:
    samples = SampleDataset.from_samples([*make_samples(3), *make_prompts(2)])
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=batch)
    predictions, labels, metrics = trainer.predict(samples)
    assert predictions.shape == (5, int(samples.lengths.max()), V)
    assert labels.shape == predictions.shape[:2]
    for row, sample in enumerate(samples):
        length = len(sample.token_ids)
        is_target = np.append(False, sample.valid_mask[:-1])
        assert labels[row, :length].tolist() == np.where(is_target, sample.token_ids, -100).tolist()
        assert (labels[row, length:] == -100).all()
        with torch.no_grad():
            alone = logits_of(trainer.model, collate([sample], 1))[0]
        np.testing.assert_allclose(predictions[row, :length], alone.numpy(), atol=2e-5)
    assert metrics["test_loss"] == pytest.approx(trainer.evaluate(samples)["eval_loss"], rel=1e-9)
    assert trainer.predict(samples, metric_key_prefix="mine").metrics["mine_loss"] == metrics["test_loss"]


def test_predict_takes_rows(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **UNPACKED)
    found = trainer.predict(ROWS)
    assert found.predictions.shape[0] == len(ROWS)
    assert found.metrics["test_loss"] == trainer.evaluate(ROWS)["eval_loss"]
    with pytest.raises(InputError, match="test_dataset, row 0 has no field 'text'"):
        trainer.predict([{"body": "w3"}])


# Metrics


@pytest.mark.parametrize("options", [{}, {"eval_accumulation_steps": 1}, {"eval_accumulation_steps": 2}])
def test_metrics_are_computed_of_logits_and_labels(options: dict[str, Any], tmp_path: Path) -> None:
    samples = half_foreseen(7)
    trainer = make_trainer(
        tmp_path, eval_dataset=samples, compute_metrics=accuracy, per_device_eval_batch_size=3, **options
    )
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(dense_accuracy(make_model(1), samples), abs=1e-12)
    assert 0.3 < metrics["eval_accuracy"] < 0.7
    assert trainer.predict(samples).metrics["test_accuracy"] == metrics["eval_accuracy"]
    assert (
        metrics["eval_loss"]
        == make_trainer(tmp_path, eval_dataset=samples, per_device_eval_batch_size=3).evaluate()["eval_loss"]
    )


def test_logits_may_be_reduced_before_they_are_kept(tmp_path: Path) -> None:
    shapes = []

    def best(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shapes.append((logits.ndim, logits.shape[:2] == labels.shape))
        return logits.argmax(-1)

    def of_best(prediction: EvalPrediction) -> dict[str, float]:
        labels = prediction.label_ids[:, 1:]
        return {"accuracy": float((prediction.predictions[:, :-1] == labels)[labels != -100].mean())}

    samples = half_foreseen(7)
    trainer = make_trainer(
        tmp_path, eval_dataset=samples, compute_metrics=of_best, preprocess_logits_for_metrics=best,
        per_device_eval_batch_size=2,
    )  # fmt: skip
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(dense_accuracy(make_model(1), samples), abs=1e-12)
    assert trainer.evaluate()["eval_accuracy"] > 0.3
    assert shapes[:4] == [(3, True)] * 4


def test_metrics_may_ask_for_inputs_and_losses(tmp_path: Path) -> None:
    samples, seen = make_samples(5), []
    trainer = make_trainer(
        tmp_path, eval_dataset=samples, compute_metrics=lambda given: seen.append(given) or {}, max_length=64,
        include_for_metrics=["inputs", "loss"], per_device_eval_batch_size=1,
    )  # fmt: skip
    trainer.evaluate()
    for row, sample in enumerate(samples):
        assert seen[0].inputs[row, : len(sample.token_ids)].tolist() == sample.token_ids.tolist()
        alone = trainer.evaluate(samples.select([row]))["eval_loss"]
        assert seen[0].losses[row] == pytest.approx(alone, rel=1e-6)
    assert len(seen[0].losses) == len(seen[0].inputs) == 5


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_metrics_may_be_computed_batch_by_batch(batch: int, tmp_path: Path) -> None:
    samples, sums, rows, last = half_foreseen(7), np.zeros(2), [], []

    def running(prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        labels = prediction.label_ids[:, 1:]
        hits = (prediction.predictions[:, :-1].argmax(-1) == labels)[labels != -100]
        sums[:] += hits.sum().item(), len(hits)
        rows.append(len(labels))
        last.append(compute_result)
        return {"accuracy": sums[0] / sums[1]} if compute_result else {}

    trainer = make_trainer(
        tmp_path, eval_dataset=samples, compute_metrics=running, batch_eval_metrics=True,
        per_device_eval_batch_size=batch,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(dense_accuracy(make_model(1), samples), abs=1e-12)
    assert sum(rows) == 7, "fillers are shown to nobody"
    assert last == [False] * (len(last) - 1) + [True]


# Evaluation while training


class Recorder(TrainerCallback):
    """Weights at each step, and what was called."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.calls: Counter[str] = Counter()
        self.metrics: dict[str, dict[str, float]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        del args, control
        self.weights[state.global_step] = weights(model)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        del args, state, control
        self.calls["evaluate"] += 1
        self.metrics["evaluate"] = metrics

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        del args, state, control
        self.calls["predict"] += 1
        self.metrics["predict"] = metrics

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        del args, state, control
        self.calls["step"] += len(eval_dataloader) > 0


def test_callbacks_hear_of_evaluations_and_predictions(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make_trainer(tmp_path, eval_dataset=make_samples(5), callbacks=[recorder], per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    assert recorder.calls == {"evaluate": 1, "step": 3}
    assert recorder.metrics["evaluate"]["eval_loss"] == metrics["eval_loss"]
    predicted = trainer.predict(make_samples(3))
    assert recorder.calls == {"evaluate": 1, "predict": 1, "step": 5}
    assert recorder.metrics["predict"]["test_loss"] == predicted.metrics["test_loss"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2, "max_steps": 5}, [2, 4, 5]),
        ({"eval_strategy": "epoch", "num_train_epochs": 3, "max_steps": -1}, [2, 4, 6]),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "max_steps": 3}, [0, 2, 3]),
        ({"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 2, "max_steps": 3}, [2, 3]),
    ],
    ids=["steps", "epochs", "on start", "later"],
)
def test_evaluations_come_when_they_are_asked_for(options: dict[str, Any], expected: list[int], tmp_path: Path) -> None:
    recorder, samples = Recorder(), make_samples(5, seed=3)
    trainer = make_trainer(tmp_path, eval_dataset=samples, callbacks=[recorder], learning_rate=0.05, **options)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    found = evaluations(trainer)
    assert list(found) == expected
    for step, value in found.items():
        student = make_model(1)
        student.load_state_dict(recorder.weights.get(step, {}), strict=False)
        alone = make_trainer(tmp_path / "alone", model=student).evaluate(samples)["eval_loss"]
        assert value == pytest.approx(alone, rel=1e-6)
    assert found.get(0, start) == start


def worsening(model: LlamaForCausalLM) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """An optimiser that learns for three steps and then goes back up the slope, far."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0 if step < 3 else -4.0)


BEST: dict[str, dict[str, Any]] = {
    "steps": {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
    "every other step": {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
    "epochs": {"save_strategy": "epoch", "eval_strategy": "epoch", "per_device_train_batch_size": 8},
    "best": {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"},
    "one kept": {
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1,
    },
    "a set's": {
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "metric_for_best_model": "eval_second_loss",
    },
    "a metric": {
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "metric_for_best_model": "sureness", "greater_is_better": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", BEST.values(), ids=BEST)
def test_the_best_student_is_loaded_at_the_end(options: dict[str, Any], tmp_path: Path) -> None:
    student, recorder, held_out = make_model(1), Recorder(), make_samples(6, seed=3)
    is_metric = "greater_is_better" in options
    sureness = iter([0.1, 0.7, 0.2, 0.5, 0.6, 0.3])  # highest where eval_loss is not lowest
    metric = f"eval_{options.get('metric_for_best_model', 'loss').removeprefix('eval_')}"
    trainer = make_trainer(
        tmp_path, model=student, callbacks=[recorder], optimizers=worsening(student), max_steps=6,
        train_dataset=make_samples(8), load_best_model_at_end=True, positions={"policy": "all"},
        eval_dataset={"first": make_samples(3, seed=8), "second": held_out} if "second" in metric else held_out,
        compute_metrics=(lambda _: {"sureness": next(sureness)}) if is_metric else None, **options,
    )  # fmt: skip
    trainer.train()
    found = evaluations(trainer, metric)
    best = (max if is_metric else min)(found, key=lambda step: found[step])
    assert (best == 2) if is_metric else (1 < best < 6)
    assert max(found) == 6
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    assert trainer.state.best_metric == found[best]
    assert_same(weights(trainer.model), recorder.weights[best], tolerance=0)
    assert_same(recorder.weights[best], load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"), tolerance=0)
    if options["save_strategy"] == "best":
        kept = {int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")}
        assert kept == {step for step in found if found[step] == min(found[s] for s in found if s <= step)}
    if "save_total_limit" in options:
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{best}"]
    if "second" not in metric and not is_metric:
        assert trainer.evaluate()["eval_loss"] == pytest.approx(found[best], rel=1e-9)


def test_the_trainings_own_loss_would_have_chosen_another_student(tmp_path: Path) -> None:
    """The fraction grows easier by the step, so that the selected loss falls while the student gets worse."""
    student, held_out = make_model(1), make_samples(6, seed=3)
    positions = {"policy": "curriculum", "metric": "kl", "fraction": 0.2, "curriculum_steps": 6}
    trainer = make_trainer(
        tmp_path, model=student, max_steps=6, learning_rate=0.05, load_best_model_at_end=True, positions=positions,
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, eval_dataset=held_out,
    )  # fmt: skip
    trainer.train()
    dense = evaluations(trainer)
    batch = collate(list(held_out), 1)
    selected = {}
    for step in dense:
        with torch.no_grad():
            checkpoint = LlamaForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}").eval()
            q, p = (torch.log_softmax(logits_of(m, batch), -1) for m in (checkpoint, make_model(0, layers=3)))
        kl, total = (p.exp() * (p - q)).sum(-1), 0.0
        for row, valid in zip(kl, batch["valid_mask"], strict=True):
            scores = row[valid].sort().values
            count = -(-len(scores) // 5)
            start = int((len(scores) - count) * min(1, step / 6))
            total += float(scores[start : start + count].mean())
        selected[step] = total
    best = min(dense, key=lambda step: dense[step])
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    assert best != min(selected, key=lambda step: selected[step])


@pytest.mark.parametrize("patience", [1, 2])
def test_early_stopping_stops_when_the_student_gets_worse(patience: int, tmp_path: Path) -> None:
    student = make_model(1)
    trainer = make_trainer(
        tmp_path, model=student, optimizers=worsening(student), max_steps=9, eval_dataset=make_samples(6, seed=3),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=patience)], load_best_model_at_end=True,
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, positions={"policy": "all"},
    )  # fmt: skip
    trainer.train()
    found = evaluations(trainer)
    best = min(found, key=lambda step: found[step])
    assert trainer.state.global_step == best + patience < 9


def test_a_plateau_lowers_the_learning_rate(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, max_steps=5, eval_dataset=make_samples(4), eval_strategy="steps", eval_steps=1, learning_rate=1e-12,
        lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"patience": 1, "factor": 0.5},
        metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer.train()
    # The first evaluation is the best; patience is over at the third, and at the fifth again.
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.25e-12)
    assert trainer.lr_scheduler.best == pytest.approx(min(evaluations(trainer).values()))


# A student made anew


def test_model_init_makes_the_student_of_each_training(tmp_path: Path) -> None:
    made: list[LlamaForCausalLM] = []

    def make() -> LlamaForCausalLM:
        made.append(make_model(1))
        return made[-1]

    trainer = make_trainer(tmp_path, model_init=make, eval_dataset=make_samples(4, seed=3), max_steps=2)
    plain = make_trainer(tmp_path, eval_dataset=make_samples(4, seed=3), max_steps=2)
    assert len(made) == 1
    assert trainer.model is made[0]
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    plain.train()
    for count in (2, 3):
        trainer.train()
        assert len(made) == count
        assert trainer.model is made[-1]
        assert_same(weights(trainer.model), weights(plain.model), tolerance=0)
        assert vars(trainer.totals) == vars(plain.totals)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert_same(weights(made[0]), weights(make_model(1)), tolerance=0)


def test_model_init_may_take_the_trial(tmp_path: Path) -> None:
    trials: list[Any] = []

    def make(trial: Any) -> LlamaForCausalLM:
        trials.append(trial)
        return make_model(1)

    make_trainer(tmp_path, model_init=make).train()
    assert trials == [None, None]


def test_a_student_that_cannot_learn_is_refused_whenever_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trainable weights are torch\.bfloat16"):
        make_trainer(tmp_path, model_init=lambda: make_model(1).bfloat16())
    students = iter([make_model(1), make_model(1).bfloat16()])
    trainer = make_trainer(tmp_path, model_init=lambda: next(students))
    with pytest.raises(InputError, match=r"trainable weights are torch\.bfloat16"):
        trainer.train()


def test_a_training_may_begin_again(tmp_path: Path) -> None:
    """Counts, the queue and the log are those of the last training; the student goes on."""
    trainer = make_trainer(tmp_path, max_steps=3, learning_rate=0.0, **RECIPES["gls"])
    trainer.train()
    totals, queue, log = vars(trainer.totals).copy(), trainer.queue.scores.copy(), trainer.state.log_history
    trainer.train()
    assert vars(trainer.totals) == totals
    assert np.array_equal(trainer.queue.scores, queue)
    assert [each for each in log if "loss" in each] == [each for each in trainer.state.log_history if "loss" in each]


# A search


def search(trainer: DistillTrainer, **options: Any) -> Any:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return trainer.hyperparameter_search(backend="optuna", **options)


def searched(out: Path, **options: Any) -> DistillTrainer:
    return make_trainer(
        out, model_init=lambda: make_model(1), eval_dataset=make_samples(5, seed=3), max_steps=2, **options
    )


@pytest.mark.parametrize("evaluated", [{}, {"eval_strategy": "steps", "eval_steps": 1}], ids=["at its end", "inside"])
def test_a_search_over_learning_rates_minimises_the_held_out_loss(evaluated: dict[str, Any], tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    rates = [1e-3, 0.05, 50.0]
    trainer = searched(tmp_path / "a", **evaluated)
    trainer.evaluate()  # which leaves a time behind that is no objective
    found = search(
        trainer,
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        n_trials=3, direction="minimize", sampler=optuna.samplers.GridSampler({"learning_rate": rates}),
    )  # fmt: skip
    expected = {}
    for rate in rates:
        alone = make_trainer(tmp_path / "b", learning_rate=rate, eval_dataset=make_samples(5, seed=3), max_steps=2)
        alone.train()
        expected[rate] = alone.evaluate()["eval_loss"]
    best = min(expected, key=lambda rate: expected[rate])
    assert found.hyperparameters == {"learning_rate": best}
    assert found.objective == pytest.approx(expected[best], rel=1e-9)


def test_a_search_over_positions_trains_by_each_of_them(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    fractions, found = [0.1, 1.0], {}
    by_entropy: dict[str, Any] = {"metric": "student_entropy"}
    trainer = searched(tmp_path / "a", positions=by_entropy | {"fraction": 0.5}, learning_rate=0.05)

    def objective(metrics: dict[str, float]) -> float:
        found[trainer.args.positions.fraction] = (metrics["eval_loss"], trainer.totals.positions_selected)
        return metrics["eval_loss"]

    # By position, as the Trainer takes it.
    pytest.importorskip("optuna").logging.set_verbosity(optuna.logging.ERROR)
    best = trainer.hyperparameter_search(
        lambda trial: {"positions": by_entropy | {"fraction": trial.suggest_categorical("fraction", fractions)}},
        objective, 2, "minimize", "optuna", sampler=optuna.samplers.GridSampler({"fraction": fractions}),
    )  # fmt: skip
    expected = {}
    for fraction in fractions:
        alone = make_trainer(
            tmp_path / "b", learning_rate=0.05, positions=by_entropy | {"fraction": fraction}, max_steps=2,
            eval_dataset=make_samples(5, seed=3),
        )  # fmt: skip
        alone.train()
        expected[fraction] = (alone.evaluate()["eval_loss"], alone.totals.positions_selected)
    assert found == expected
    assert best.objective == min(loss for loss, _ in expected.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"positions": {"metric": "student_entropy", "fraction": 3.0}}, "positions.fraction"),
        ({"criterion": {"name": "jsd"}, "classes": {"sampler": "rs_kd"}}, "criterion.name: jsd of drawn classes"),
        ({"data": {"max_length": 8}}, "hp_space: how rows become samples"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
    ids=["out of range", "parts that don't fit", "made before", "not honoured"],
)
def test_a_trial_is_refused_as_arguments_are(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        search(searched(tmp_path), hp_space=lambda _: values, n_trials=1)


def test_a_searchs_objective_adds_up_metrics_alone(tmp_path: Path) -> None:
    trainer = searched(tmp_path, compute_metrics=lambda _: {"kept_positions": 2.0, "half": 0.5})
    assert search(trainer, hp_space=lambda _: {}, n_trials=1, direction="maximize").objective == 2.5


# A batch size that is found


class OutOfMemory:
    """An error as of a GPU's, at these calls of a student's body (the check of the student makes two)."""

    def __init__(self, student: LlamaForCausalLM, largest: int, after: int = 0) -> None:
        self.largest, self.left, self.sizes = largest, after, []
        student.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        del args
        if module.training:
            self.sizes.append(len(kwargs["input_ids"]))
            if self.sizes[-1] > self.largest:
                self.left -= 1
                if self.left < 0:
                    raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.mark.parametrize("recipe", ["se-kd", "gls"])
def test_a_batch_size_is_found_and_counts_alone(recipe: str, tmp_path: Path) -> None:
    options = {"max_steps": 3, "learning_rate": 0.05, **RECIPES[recipe]}
    student = make_model(1)
    memory = OutOfMemory(student, largest=5)
    trainer = make_trainer(
        tmp_path / "a", model=student, auto_find_batch_size=True, per_device_train_batch_size=8, **options
    )
    trainer.train()
    assert memory.sizes == [8, 7, 6, 5, 5, 5]
    plain = make_trainer(tmp_path / "b", per_device_train_batch_size=5, **options)
    plain.train()
    assert_same(weights(trainer.model), weights(plain.model), tolerance=0)
    assert vars(trainer.totals) == vars(plain.totals)
    losses = [[log for log in t.state.log_history if "loss" in log] for t in (trainer, plain)]
    assert losses[0] == losses[1]
    if recipe == "gls":
        assert np.array_equal(trainer.queue.scores, plain.queue.scores)
    assert trainer.args.per_device_train_batch_size == 8


def test_what_an_attempt_had_counted_is_dropped(tmp_path: Path) -> None:
    """The failure comes in the second micro-batch of the second step, when there are counts and scores to forget."""
    options = {"max_steps": 3, "gradient_accumulation_steps": 2, "learning_rate": 0.0, **RECIPES["gls"]}
    samples, student = make_samples(24), make_model(1)
    memory = OutOfMemory(student, largest=3, after=3)
    trainer = make_trainer(
        tmp_path / "a", model=student, auto_find_batch_size=True, per_device_train_batch_size=4,
        train_dataset=samples, **options,
    )  # fmt: skip
    trainer.train()
    assert memory.sizes == [4] * 4 + [3] * 6
    plain = make_trainer(tmp_path / "b", per_device_train_batch_size=3, train_dataset=samples, **options)
    plain.train()
    assert vars(trainer.totals) == vars(plain.totals)
    assert np.array_equal(trainer.queue.scores, plain.queue.scores)
    losses = [[log for log in t.state.log_history if "loss" in log] for t in (trainer, plain)]
    assert losses[0] == losses[1]


def test_a_training_goes_on_with_the_batch_size_that_it_found(tmp_path: Path) -> None:
    options = {
        "max_steps": 4, "per_device_train_batch_size": 8, "auto_find_batch_size": True, "save_strategy": "steps",
        "save_steps": 2, "learning_rate": 0.05, **RECIPES["se-kd"],
    }  # fmt: skip
    student = make_model(1)
    OutOfMemory(student, largest=6)
    straight = make_trainer(tmp_path / "a", model=student, **options)
    straight.train()
    resumed = make_trainer(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same(weights(straight.model), weights(resumed.model), tolerance=0)
    assert vars(straight.totals) == vars(resumed.totals)


def test_an_evaluation_without_memory_does_not_shrink_the_batches(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, auto_find_batch_size=True, eval_dataset=make_samples(4), eval_strategy="steps", eval_steps=1
    )

    def full(module: torch.nn.Module, _: Any) -> None:
        if not module.training and trainer.state.global_step:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

    trainer.model.model.register_forward_pre_hook(full)
    with pytest.raises(RuntimeError, match="reduce `per_device_eval_batch_size` instead"):
        trainer.train()


# Arguments and loaders


@pytest.mark.parametrize("recipe", ["se-kd", "gls"])
def test_arguments_are_left_as_they_were(recipe: str, tmp_path: Path) -> None:
    args = make_arguments(
        tmp_path, **RECIPES[recipe], eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, auto_find_batch_size=True,
    )  # fmt: skip
    before = json.dumps(args.to_dict(), default=str, sort_keys=True)
    student = make_model(1)
    OutOfMemory(student, largest=3)
    trainer = DistillTrainer(
        model=student, teacher=make_model(0, layers=3), args=args, train_dataset=make_samples(4),
        eval_dataset=make_samples(4), processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    trainer.predict(make_samples(2))
    assert json.dumps(args.to_dict(), default=str, sort_keys=True) == before


def ids_of(loader: Any) -> list[list[bytes]]:
    """The ids of the samples of each batch, without fillers."""
    return [
        [
            ids.numpy().tobytes()
            for ids, valid in zip(batch["sample_ids"], batch["valid_mask"], strict=True)
            if valid.any()
        ]
        for batch in loader
    ]


def test_loaders_have_the_shapes_and_orders_that_were_asked_for(tmp_path: Path) -> None:
    samples, held_out = make_samples(7), make_samples(5, seed=3)
    trainer = make_trainer(
        tmp_path, train_dataset=samples, eval_dataset=held_out, per_device_train_batch_size=3,
        per_device_eval_batch_size=2,
    )  # fmt: skip
    training = ids_of(trainer.get_train_dataloader())
    assert [len(ids) for ids in training] == [3, 3, 1]
    seen = [sample_id for ids in training for sample_id in ids]
    assert sorted(seen) == sorted(samples.ids)
    assert seen != samples.ids
    assert ids_of(trainer.get_eval_dataloader()) == [held_out.ids[:2], held_out.ids[2:4], held_out.ids[4:]]
    assert ids_of(trainer.get_eval_dataloader(samples)) == [samples.ids[i : i + 2] for i in range(0, 7, 2)]
    assert ids_of(trainer.get_test_dataloader(samples)) == [samples.ids[i : i + 2] for i in range(0, 7, 2)]
    for loader in (trainer.get_eval_dataloader(), trainer.get_test_dataloader(samples)):
        assert all(len(batch["input_ids"]) == 2 for batch in loader)


def order(out: Path, **options: Any) -> list[bytes]:
    loader = make_trainer(out, train_dataset=make_samples(11), per_device_train_batch_size=2, **options)
    return [sample_id for batch in ids_of(loader.get_train_dataloader()) for sample_id in batch]


def test_a_seed_of_the_data_changes_their_order_alone(tmp_path: Path) -> None:
    by_seed, by_data_seed = order(tmp_path), order(tmp_path, data_seed=5)
    assert by_seed != by_data_seed
    assert sorted(by_seed) == sorted(by_data_seed)
    assert order(tmp_path, data_seed=5, seed=12) == by_data_seed
    assert order(tmp_path, seed=5) == by_data_seed
    options = {"per_device_train_batch_size": 8, "max_steps": 2, **RECIPES["random"]}  # a step sees all samples
    students = []
    for name, seeds in (("a", {}), ("b", {"data_seed": 5}), ("c", {"seed": 12, "data_seed": 11})):
        trainer = make_trainer(tmp_path / name, **options, **seeds)
        trainer.train()
        students.append(weights(trainer.model))
    assert_same(students[0], students[1])
    with pytest.raises(AssertionError):  # the seed itself is that of the random positions, too
        assert_same(students[0], students[2])


def test_the_datas_order_may_be_kept(tmp_path: Path) -> None:
    assert order(tmp_path, train_sampling_strategy="sequential") == make_samples(11).ids


def test_a_last_batch_may_be_dropped_in_training_alone(tmp_path: Path) -> None:
    kept = order(tmp_path, dataloader_drop_last=True)
    assert len(kept) == 10
    assert kept == order(tmp_path)[:10]
    trainer = make_trainer(
        tmp_path, dataloader_drop_last=True, eval_dataset=make_samples(5), per_device_eval_batch_size=2,
        train_dataset=make_samples(11), max_steps=-1, num_train_epochs=1,
    )  # fmt: skip
    assert trainer.evaluate()["eval_positions"] == int(make_samples(5).n_valid.sum())
    trainer.train()
    assert trainer.state.global_step == 2


def test_columns_that_no_field_names_are_left_out(tmp_path: Path) -> None:
    rows = [row | {"labels": 3, "source": "a", "input_ids": [1]} for row in ROWS]
    trainer = make_trainer(tmp_path / "a", train_dataset=Dataset.from_list(rows), eval_dataset=rows, **UNPACKED)
    plain = make_trainer(tmp_path / "b", train_dataset=ROWS, eval_dataset=ROWS, **UNPACKED)
    assert trainer.train_dataset.samples.ids == plain.train_dataset.samples.ids
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    with pytest.raises(InputError, match="remove_unused_columns: False can't be honoured"):
        make_arguments(tmp_path, remove_unused_columns=False)


def test_a_cache_serves_them_all(tmp_path: Path) -> None:
    """Training, evaluation, prediction and the best student, without the teacher's model."""
    samples = make_samples(8)
    cache = cached(samples, tmp_path / "cache")
    trainer = make_trainer(
        tmp_path / "run", teacher=cache, train_dataset=samples.select(range(5)), eval_dataset=samples.select([5, 6]),
        classes={"sampler": "rs_kd", "draws": 8}, max_steps=3, learning_rate=0.05, load_best_model_at_end=True,
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, compute_metrics=accuracy,
    )  # fmt: skip
    trainer.train()
    found = evaluations(trainer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(found.values()), rel=1e-9)
    predicted = trainer.predict(samples.select([7]))
    assert predicted.metrics["test_accuracy"] == dense_accuracy(trainer.model, samples.select([7]))
