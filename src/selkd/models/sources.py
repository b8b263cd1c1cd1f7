"""A model's files (the embedded default, a local folder or a hub id) and its fingerprint."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import xxhash
from huggingface_hub import errors as hub_errors

from selkd.errors import InputError
from selkd.files import write_whole
from selkd.models.demo import DEMO, DEMO_NAME, converted_gguf, demo_gguf

_FORMAT = "selkd-model-1"
# Keys of config.json that do not change what the model computes once its dtype has been chosen.
_INCIDENTAL = {"_name_or_path", "_model_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Weights only as safetensors: a .bin is a pickle. Mistral's repositories carry the weights twice, the second time as
# consolidated*.safetensors, which Transformers does not read.
WITHOUT_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model")
_HUB_FILES = ("*.safetensors", *WITHOUT_WEIGHTS)


@dataclass(frozen=True)
class ModelSource:
    """A model on this disk.

    Attributes:
        name: the hub id, or the folder as the user wrote it.
        path: a folder with config.json, *.safetensors and the tokenizer.
        fingerprint: 32 hex digits over weights and configuration, equal for equal models in different places.
    """

    name: str
    path: Path
    fingerprint: str


def default_cache_dir() -> Path:
    """$SELKD_CACHE, else $XDG_CACHE_HOME/selkd, else ~/.cache/selkd. An empty variable counts as unset."""
    if own := os.environ.get("SELKD_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "selkd"
    return Path.home() / ".cache" / "selkd"


def revision_of(source: ModelSource) -> str | None:
    """The hub's commit that the files are of; None of files that are not the hub's."""
    path = source.path
    return path.name if path.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", path.name) else None


def locate(model: str, cache_dir: Path, revision: str | None = None) -> ModelSource:
    """The files of ``model``: "demo", else a local folder or .gguf file, else a hub id, which is downloaded.

    Args:
        revision: the hub's commit; None: the newest. It matters for a hub id alone.

    Raises:
        InputError: there is no such model, a folder holds no model with safetensors weights, the hub can't be reached,
            or ``cache_dir`` can't be written.
        RunError: a converted model or the fingerprint's memo can't be written (for example because the disk is full).
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cache folder {cache_dir} can't be made: {error}. Set SELKD_CACHE to a folder that can be written."
        ) from error
    name, path = model, Path(model).expanduser()
    if model == DEMO:
        name, path = DEMO_NAME, converted_gguf(demo_gguf(), DEMO, cache_dir)
    elif model.endswith(".gguf") and path.is_file():
        path = converted_gguf(path, model, cache_dir)
    elif not path.is_dir():
        path = downloaded(model, revision=revision)
    return ModelSource(name, path, _fingerprint(model, path, cache_dir))


def downloaded(model: str, files: Sequence[str] = _HUB_FILES, revision: str | None = None) -> Path:
    """The folder in the hub's cache with the model's ``files`` (patterns), subfolders left out.

    Raises:
        InputError: there is no such model, or the hub can't be reached.
    """
    if not _HUB_ID.fullmatch(model):
        raise InputError(f"model {model!r}: there is no such folder, and it is not a hub id (owner/name) either.")
    try:
        folder = huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=list(files), ignore_patterns=["*/*", "consolidated*"]
        )
        return Path(folder)
    except hub_errors.RepositoryNotFoundError as error:
        raise InputError(
            f"model {model!r}: no such folder here, and the hub has no such model or does not show it to you. "
            "Check the name; for a gated or private model log in with `hf auth login`."
        ) from error
    except (OSError, ValueError, hub_errors.HTTPError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"model {model!r}: no such folder here, and it could not be fetched from the hub ({reason[0]}). "
            "Give a local folder with config.json and *.safetensors, or `demo` for the embedded default."
        ) from error


def _fingerprint(model: str, path: Path, cache_dir: Path) -> str:
    """A digest of config.json and every weight file, remembered by path, sizes and times.

    A copy may keep the time of modification of what it replaces, as a clock that was set back does. The time of the
    last change of the file's entry is nobody's to choose.
    """
    config, *weights = _model_files(model, path)
    # stat follows links, and a snapshot in the hub's cache consists of links to blobs.
    stats = {file.name: file.stat() for file in (config, *weights)}
    state = [[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()]
    memo = cache_dir / "fingerprints" / f"{xxhash.xxh3_64_hexdigest(os.fsencode(path.resolve()))}.json"
    if remembered := _remembered(memo, state):
        return remembered
    digest = xxhash.xxh3_128()
    digest.update(json.dumps([_FORMAT, _architecture(model, config)], sort_keys=True).encode())
    for file in weights:
        digest.update(json.dumps([file.name, file.stat().st_size]).encode())  # separates the files
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    fingerprint = digest.hexdigest()
    write_whole(memo, json.dumps({"format": _FORMAT, "files": state, "fingerprint": fingerprint}))
    return fingerprint


def _remembered(memo: Path, state: list[Any]) -> str | None:
    """The fingerprint in a memo of these files; None if there is no such memo or it is damaged."""
    try:
        content = json.loads(memo.read_text(encoding="utf-8"))
        return str(content["fingerprint"]) if (content["format"], content["files"]) == (_FORMAT, state) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _model_files(model: str, path: Path) -> list[Path]:
    """config.json, then the weight files by name."""
    config = path / "config.json"
    weights = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("consolidated"))
    if not config.is_file():
        raise InputError(f"model {model!r}: {path} has no config.json, so it is not a Transformers model.")
    if not weights:
        raise InputError(
            f"model {model!r}: {path} has no *.safetensors weights. Other formats (pickled .bin, GGUF) are not read; "
            "load the model with Transformers and save it again with save_pretrained."
        )
    return [config, *weights]


def _architecture(model: str, file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"model {model!r}: {file} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise InputError(f"model {model!r}: {file} holds a {type(config).__name__}, not an object.")
    return {key: value for key, value in config.items() if key not in _INCIDENTAL}
