"""A teacher in another form or on another device: what runs here, and what is refused before anything is loaded."""

from pathlib import Path

import pytest
import torch
from tiny import make_arguments, make_model, make_samples, make_tokenizer
from tiny_run import make_recipe

from selkd import DistillTrainer, distill
from selkd.data.collate import collate
from selkd.errors import InputError
from selkd.models import quantisation
from selkd.models.demo import demo_gguf
from selkd.models.quantisation import require_quantization
from selkd.models.sources import default_cache_dir, locate
from selkd.recipe.choices import ClassOptions
from selkd.recipe.files import load_recipe
from selkd.teacher.live import LiveTeacher

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is refused without CUDA")


@CPU_ONLY
def test_what_this_machine_lacks_is_refused_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(tmp_path)
    teacher = recipe["teacher"] | {"quantization": "bitsandbytes_8bit"}
    with pytest.raises(InputError, match="a student is not cut from quantised layers"):
        distill(recipe | {"teacher": teacher}, tmp_path / "run")
    recipe["student"] = {"model": recipe["teacher"]["model"]}
    monkeypatch.setattr(quantisation, "is_installed", lambda _: False)
    with pytest.raises(InputError, match=r"bitsandbytes_8bit needs the package bitsandbytes: pip install 'selkd\[bits"):
        distill(recipe | {"teacher": teacher}, tmp_path / "run")
    with pytest.raises(InputError, match=r"teacher.device: cuda:1, but there are 0 CUDA devices"):
        distill(recipe | {"teacher": recipe["teacher"] | {"device": "cuda:1"}}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_devices_and_unknown_forms_are_refused() -> None:
    for name in ("gpu0", "cuda:", "meta", "cpu:x", "0"):
        with pytest.raises(
            InputError, match=f"teacher.device: expected cpu, cuda, or one of several as cuda:1, got '{name}'"
        ):
            load_recipe("se_kd", [f"teacher.device='{name}'"])
    with pytest.raises(InputError, match=r"teacher.quantization: 'int3' is not known"):
        load_recipe("se_kd", ["teacher.quantization=int3"])
    with pytest.raises(InputError, match=r"torchao_int8 runs on the CPU and on CUDA, and the teacher is on mps.*gguf"):
        require_quantization("torchao_int8", torch.device("mps"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_a_teacher_on_another_device_says_the_same() -> None:
    batch = {name: tensor.cuda() for name, tensor in collate(list(make_samples()), 1).items()}
    options = ClassOptions.model_validate({})
    index = batch["valid_mask"].flatten().nonzero().flatten()
    found = []
    for device in ("cpu", "cuda"):
        targets = LiveTeacher(make_model(0).to(device), options, 1.0, 0, 83).targets(batch, 0)
        logits = targets.at(index).logits(slice(0, len(index)))
        assert logits.device.type == "cuda"
        found.append(logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_the_teachers_device_is_where_it_is_put(tmp_path: Path) -> None:
    trainer = DistillTrainer(
        model=make_model(3),
        teacher=make_model(0),
        args=make_arguments(tmp_path, teacher_device="cpu"),
        train_dataset=make_samples(),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    assert trainer.teacher.model.device.type == "cpu"
    with pytest.raises(
        InputError, match=r"teacher_device: expected cpu, cuda, or one of several as cuda:1, got 'gpu0'"
    ):
        make_arguments(tmp_path, teacher_device="gpu0")
    with pytest.raises(
        InputError, match=r"teacher_device: cuda:97, but there are \d CUDA devices. Give one that is here"
    ):
        DistillTrainer(
            model=make_model(3),
            teacher=make_model(0),
            args=make_arguments(tmp_path, teacher_device="cuda:97"),
            train_dataset=make_samples(),
            processing_class=make_tokenizer(),
        )


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not one at all")
    with pytest.raises(InputError, match="not a GGUF file that Transformers reads"):
        locate(str(tmp_path / "x.gguf"), tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.real_teacher
def test_a_gguf_file_is_the_model_in_it() -> None:
    demo, file = (locate(name, default_cache_dir()) for name in ("demo", str(demo_gguf())))
    assert file.fingerprint == demo.fingerprint
    assert file.path == demo.path
