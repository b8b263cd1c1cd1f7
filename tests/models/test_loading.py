"""Models from disk into memory."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, packed_batch, tiny_model

from selkd.errors import InputError
from selkd.models.loading import load_model, n_parameters, n_rows, native_dtype, resolve_dtype
from selkd.models.sources import ModelSource

CPU = torch.device("cpu")


def _source(folder: Path) -> ModelSource:
    return ModelSource("the-model", folder, "0" * 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_loaded_in_eval_mode_and_the_dtype_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = tiny_model("gpt2", torch.float32)
    saved.save_pretrained(tmp_path)
    model = load_model(_source(tmp_path), dtype, CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(module.training for module in model.modules())
    if dtype == torch.float32:
        ids = packed_batch()["input_ids"]
        assert torch.equal(model(input_ids=ids).logits, saved(input_ids=ids).logits)


def test_missing_weights_are_refused_not_invented(tmp_path: Path) -> None:
    tiny_model("llama", torch.float32).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights of LlamaForCausalLM are not in .*layers\.1\.mlp\.up_proj\.weight"):
        load_model(_source(tmp_path), torch.float32, CPU)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.json", '{"model_type": "unheard_of"}', ": its configuration can't be read"),
        ("config.json", "{}", ": its configuration can't be read"),
        ("model.safetensors", "not a header" * 1000, " can't be loaded as a causal language model"),
        ("model.safetensors", "too small", r": .*config.json describes a model .* weight files, 9 bytes, can't hold"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path: Path, file: str, content: str, told: str) -> None:
    tiny_model("llama", torch.float32).save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=f"model 'the-model'{told}"):
        load_model(_source(tmp_path), torch.float32, CPU)


def test_tied_parameters_are_counted_once() -> None:
    untied, tied = n_parameters(tiny_model("llama")), n_parameters(tiny_model("llama_tied"))
    assert untied - tied == 101 * 32


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_are_counted_from_the_configuration_alone(family: str, tmp_path: Path) -> None:
    tiny_model(family).config.save_pretrained(tmp_path)
    assert n_rows(_source(tmp_path)) == 101


def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(InputError, match="model 'the-model': its configuration can't be read"):
        n_rows(_source(tmp_path))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtypes_by_name(name: str) -> None:
    assert resolve_dtype(name, CPU) == getattr(torch, name)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(InputError, match="dtype 'int8' is unknown: expected one of auto, bfloat16, float32, float16"):
        resolve_dtype("int8", CPU)


@pytest.mark.parametrize(
    ("kernels", "capabilities", "expected"),
    [
        ("AVX512", {"avx512_bf16": True}, torch.bfloat16),
        ("AVX512", {"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ("AVX512", {"avx2": True, "avx512_bf16": False}, torch.float32),
        # PyTorch is held below what the processor has.
        ("AVX2", {"avx512_bf16": True, "amx_bf16": True}, torch.float32),
        ("DEFAULT", {"avx512_bf16": True, "amx_bf16": True}, torch.float32),
        # ARM: its vector extension is named, or "DEFAULT".
        ("DEFAULT", {"bf16": True, "neon": True}, torch.bfloat16),
        ("SVE256", {"bf16": False, "sve_bf16": True}, torch.bfloat16),
        ("DEFAULT", {"bf16": False, "neon": True}, torch.float32),
        ("AVX512", {}, torch.float32),
    ],
)
def test_auto_is_bf16_where_pytorch_computes_in_it(
    kernels: str, capabilities: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
    assert native_dtype(CPU) == resolve_dtype("auto", CPU) == expected


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="about x86")
def test_a_processor_held_to_avx2_is_one_without_bf16() -> None:
    """So that the environment variable shows what such a machine would do."""
    code = "import torch; from selkd.models.loading import native_dtype; print(native_dtype(torch.device('cpu')))"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.float32"


@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_on_an_accelerator_leaves_emulation_out(
    supported: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or supported
    )
    assert native_dtype(torch.device("cuda")) == expected


def test_auto_on_an_unknown_device_is_float32() -> None:
    assert native_dtype(torch.device("meta")) == torch.float32
