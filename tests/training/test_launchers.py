"""What ``accelerate launch`` says in the environment: honoured, or refused by its name, in Python and in recipes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench import Bench, put_back  # noqa: F401  a fixture
from tiny import make_arguments, make_model, make_prompts, make_samples, make_tokenizer
from tiny_run import make_recipe, make_task

from selkd import DistillTrainer, distill
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.record import environment
from selkd.run.workspace import Workspace

pytestmark = pytest.mark.usefixtures("put_back")

ON_POLICY = {"on_policy": {"max_new_tokens": 4}, "data": {"prompt_field": "q", "packing": False}}


def workspace(folder: Path, *, training: dict[str, Any] | None = None, **changes: Any) -> Workspace:
    """Of a recipe that says nothing of precision, unless ``training`` does."""
    recipe = make_recipe(folder, **changes)
    recipe["training"] = {k: v for k, v in recipe["training"].items() if k != "bf16"} | (training or {})
    return Workspace(parse_part(Recipe, recipe), folder / "run")


REFUSED = {
    "ACCELERATE_MIXED_PRECISION": ["fp16", "fp8"],
    "ACCELERATE_USE_DEEPSPEED": ["true", "True"],
    "ACCELERATE_USE_MEGATRON_LM": ["true"],
    "ACCELERATE_USE_PARALLELISM_CONFIG": ["true"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_what_a_launcher_asks_for_in_vain_is_refused_by_its_name(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the arguments say, and whatever precision the recipe finds best here."""
    monkeypatch.setenv(name, value)
    for bf16 in (False, True):
        with pytest.raises(InputError, match=name):
            make_arguments(tmp_path, bf16=bf16)
    with pytest.raises(InputError, match=name):
        _ = workspace(tmp_path).arguments


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "ACCELERATE_MIXED_PRECISION"])
def test_what_a_launcher_does_not_ask_for_is_no_reason(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "false")
    make_arguments(tmp_path)


def test_a_launcher_that_compiles_is_refused_at_once_and_by_what_accelerate_became(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = make_arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(InputError, match="ACCELERATE_DYNAMO_BACKEND=INDUCTOR is not supported"):
        make_arguments(tmp_path)
    with pytest.raises(InputError, match="ACCELERATE_DYNAMO_BACKEND=INDUCTOR is not supported"):
        distill(make_recipe(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "refused before scoring"
    with pytest.raises(InputError, match="Accelerate compiles by INDUCTOR"):  # a setting that came later
        DistillTrainer(make_model(1), make_model(0), arguments, make_samples(4), processing_class=make_tokenizer())


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"TP_SIZE": "2"}, "tp_size = 2 can't be honoured: tensor parallelism splits the head"),
        ({"CP_SIZE": "2"}, "cp_size = 2 can't be honoured: context parallelism splits a sample"),
        ({"SP_SIZE": "2"}, "sp_size = 2 can't be honoured: sequence parallelism splits a sample"),
        ({"DP_REPLICATE_SIZE": "2"}, "shards nothing"),
        ({"DP_REPLICATE_SIZE": "2", "DP_SHARD_SIZE": "2"}, "times dp_shard_size = 2 is 4, and there are 1 processes"),
        ({"DP_SHARD_SIZE": "0"}, "dp_shard_size must be at least 1, but got 0"),
    ],
)
def test_a_mesh_of_processes_splits_samples_and_weights_and_nothing_else(
    sizes: dict[str, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    for name, size in sizes.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}", size)
    if "DP_SHARD_SIZE" in sizes:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match=f"ACCELERATE_USE_PARALLELISM_CONFIG: .*{told}"):
        make_arguments(tmp_path)


def test_the_first_fsdp_and_its_state_dict_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"fsdp_config\.version: 1 can't be honoured"):
        make_arguments(tmp_path, fsdp=True, fsdp_config={"version": 1})
    with pytest.raises(InputError, match="state_dict_type: FSDP2 has no LOCAL_STATE_DICT"):
        make_arguments(tmp_path, fsdp=True, fsdp_config={"state_dict_type": "LOCAL_STATE_DICT"})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"fsdp_config\.version: 1 can't be honoured"):
        make_arguments(tmp_path)  # what Accelerate's launcher takes where nothing is said


@pytest.mark.parametrize("name", ["model", "teacher"])
def test_a_model_that_was_split_while_loading_is_refused(name: str, tmp_path: Path) -> None:
    models = {"model": make_model(1), "teacher": make_model(0)}
    models[name]._is_distributed_loading_by_transformers = True
    with pytest.raises(InputError, match=f"^{name}: it was loaded in parts over several processes"):
        DistillTrainer(
            **models, args=make_arguments(tmp_path), train_dataset=make_samples(4), processing_class=make_tokenizer()
        )


def test_sharding_that_would_shard_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "1")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match="fsdp: Accelerate shards a student over several processes on accelerators"):
        Bench(tmp_path, monkeypatch).trainer()


def test_a_launchers_flags_are_read_as_accelerate_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "1")
    with pytest.raises(InputError, match="ACCELERATE_USE_DEEPSPEED asks for DeepSpeed"):
        make_arguments(tmp_path)


@pytest.mark.parametrize("said", ["by the launcher", "by an argument", "by both"])
def test_bfloat16_is_what_runs(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if said != "by an argument":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = Bench(tmp_path, monkeypatch, **({} if said == "by the launcher" else {"bf16": True})).trainer()
    seen = set()
    layer = trainer.model.model.layers[0].mlp.gate_proj
    layer.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    trainer.train()
    trainer.evaluate()
    assert trainer.args.compute_dtype == torch.bfloat16
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("launched", "dtype"), [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_a_student_answers_in_the_launchers_precision(
    launched: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    prompts = SampleDataset.from_samples(make_prompts(8))
    trainer = Bench(tmp_path, monkeypatch, **ON_POLICY).trainer(train_dataset=prompts, eval_dataset=None)
    seen = set()
    answered = trainer.answering._answers

    def watched(*args: Any) -> Any:
        hook = trainer.model.model.layers[0].mlp.gate_proj.register_forward_hook(
            lambda _, __, output: seen.add(output.dtype)
        )
        yield from answered(*args)
        hook.remove()

    object.__setattr__(trainer.answering, "_answers", watched)
    trainer.train()
    assert seen == {dtype}


def test_a_state_that_differs_from_the_arguments_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch)
    arguments = bench.arguments()
    monkeypatch.setattr("accelerate.state.AcceleratorState.mixed_precision", property(lambda _: "bf16"))
    with pytest.raises(InputError, match=r"mixed precision bf16, the arguments to no\. Set both alike"):
        bench.trainer(args=arguments)


def test_a_recipe_says_in_what_precision_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launched = workspace(tmp_path)
    assert launched.dtype == torch.bfloat16
    assert environment(launched)["precision"] == "student bfloat16 over float32 weights, teacher float32"
    with pytest.raises(InputError, match=r"training.bf16: false, but the run was launched with mixed precision bf16"):
        _ = workspace(tmp_path, training={"bf16": False}).arguments
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    plain = workspace(tmp_path, training={"bf16": False})
    assert plain.dtype == torch.float32
    assert environment(plain)["precision"] == "student float32 over float32 weights, teacher float32"


def test_a_launcher_that_shards_an_answering_student_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not make_arguments(tmp_path).is_sharded
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert make_arguments(tmp_path).is_sharded
    with pytest.raises(InputError, match="on_policy: a student sharded by FSDP does not generate"):
        make_arguments(tmp_path, **ON_POLICY)


SHARDED = {
    "lora": ({"student": {"prune_from_teacher": {"layers": 2}, "lora": {"rank": 2}}}, r"student.lora"),
    "every_steps": (
        {"evaluation": {"every_steps": 2, "suite": ["fidelity", "paper"]}},
        r"evaluation.every_steps: benchmarks are measured by one process",
    ),
}


@pytest.mark.parametrize(("changes", "named"), SHARDED.values(), ids=SHARDED)
def test_a_recipe_that_a_launcher_shards_is_refused_what_shards_can_not_do(
    changes: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "lora" in changes.get("student", {}):
        pytest.importorskip("peft")
    work = workspace(tmp_path, **changes)
    work.state = SimpleNamespace(num_processes=2)
    assert not work.arguments.is_sharded
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    work = workspace(tmp_path, **changes)
    work.state = SimpleNamespace(num_processes=2)
    with pytest.raises(InputError, match=named):
        work.check()


def test_a_recipe_whose_answering_student_a_launcher_shards_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    task = make_task(tmp_path, packing=False)
    recipe = {"data": task, "on_policy": {"max_new_tokens": 4}, "samples": None, "cache": None, "classes": {}}
    with pytest.raises(InputError, match="on_policy: a student sharded by FSDP does not generate"):
        _ = workspace(tmp_path, **recipe).arguments


def test_one_process_that_a_launcher_shards_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match=r"training\.fsdp: shards over several processes, and this is one"):
        workspace(tmp_path).check()
