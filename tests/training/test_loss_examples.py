"""The examples of one's own loop, each run as a reader runs it, on tiny models."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_distributed import torchrun
from tiny import make_model, make_tokenizer
from tiny_run import make_recipe
from transformers import AutoModelForCausalLM

import selkd
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.pipeline import cache_only

EXAMPLES = Path(__file__).parents[2] / "examples" / "own_loop"


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A teacher's and a student's folder, a text of 1,600 tokens, and the folder to write."""
    for name, model in (("teacher", make_model(0, layers=3)), ("student", make_model(1))):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    torch.manual_seed(3)
    lines = torch.randint(2, 83, (25, 64)).tolist()
    (tmp_path / "text.txt").write_text("\n".join(" ".join(f"w{token}" for token in line) for line in lines))
    return [str(tmp_path / name) for name in ("teacher", "student", "text.txt", "out")]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def require_learnt(losses: list[float], out: str, student: str) -> None:
    assert len(losses) == 6
    assert min(losses[3:]) < losses[0]
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (student, out))
    assert any((one != other).any() for one, other in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.parametrize("name", ["plain_loop", "own_trainer"])
def test_a_loop_of_ones_own_learns(name: str, arguments: list[str]) -> None:
    losses = example(name).main(*arguments)
    require_learnt(losses[:6], arguments[3], arguments[1])


def test_trls_trainer_learns(arguments: list[str]) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    require_learnt(example("trl_sft").main(*arguments), arguments[3], arguments[1])


@pytest.mark.parametrize("name", ["cached_trainer", "cached_trl_sft"])
def test_a_trainer_of_ones_own_learns_from_a_cache(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed samples with the plain trainer, single documents with TRL's."""
    if name == "cached_trl_sft":
        pytest.importorskip("trl", reason="TRL is not installed")
    monkeypatch.setenv("SELKD_CACHE", str(tmp_path / "selkd"))
    recipe_content = make_recipe(tmp_path, samples=None)
    recipe_content["data"]["packing"] = name != "cached_trl_sft"
    recipe = parse_part(Recipe, recipe_content)
    cache_only(recipe, tmp_path / "run")
    make_model(1).save_pretrained(tmp_path / "student")
    make_tokenizer().save_pretrained(tmp_path / "student")
    losses = example(name).main(*(str(tmp_path / part) for part in ("run", "student", "out")))
    assert len(losses) == 6
    before, after = (distance(tmp_path / part, tmp_path / "run") for part in ("student", "out"))
    assert after < before - 0.01


def distance(model_path: Path, run: Path) -> float:
    """The mean forward KL to the cached draws at every position, in nats; no batch of it is any that was trained on."""
    dataset = selkd.TeacherDataset.open(run)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    collator, sums, n_positions = selkd.TeacherCollator(dataset.cache), 0.0, 0
    for index in range(len(dataset)):
        batch = collator([dataset[index]])
        hidden = model.get_decoder()(batch["input_ids"], position_ids=batch.get("position_ids")).last_hidden_state
        known = {"class_ids": batch["teacher_class_ids"], "counts": batch["teacher_counts"]}
        targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        result = selkd.distillation_loss(
            hidden, model, known, targets, batch["valid_mask"], positions={"policy": "all"}
        )
        sums, n_positions = sums + result.values.sum().item(), n_positions + int(batch["valid_mask"].sum())
    return sums / n_positions


def test_two_processes_with_fsdp2_learn(arguments: list[str]) -> None:
    """They take the steps of one process, as each has half of its batch."""
    alone = example("plain_loop").main(*arguments)
    done = torchrun(str(EXAMPLES / "fsdp2.py"), *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads(done.stdout.splitlines()[-1])
    assert losses == pytest.approx(alone[:6], rel=1e-4)
    require_learnt(losses, arguments[3], arguments[1])
