"""Packages that only some abilities need: the extra of selkd that installs each, and the words that ask for it."""

from importlib.util import find_spec

# The package, as it is imported -> the extra that installs it.
EXTRAS = {
    "bitsandbytes": "bitsandbytes",
    "deepspeed": "deepspeed",
    "gguf": "gguf",
    "lm_eval": "eval",
    "matplotlib": "plots",
    "mlflow": "mlflow",
    "peft": "peft",
    "tensorboard": "tensorboard",
    "torchao": "quantised",
    "trackio": "trackio",
    "wandb": "wandb",
}


def is_installed(package: str) -> bool:
    """Whether a package is there; it is not imported."""
    try:
        return find_spec(package) is not None
    except ValueError:  # a module that was put into sys.modules without a spec
        return True


def install(package: str) -> str:
    """The command that installs a package, by its extra where it has one; selkd itself is installed already."""
    return f"pip install 'selkd[{EXTRAS[package]}]'" if package in EXTRAS else f"pip install {package}"


def need(package: str) -> str:
    """``needs the package x: pip install 'selkd[x]'``."""
    return f"needs the package {package}: {install(package)}"
