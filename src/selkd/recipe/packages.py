"""The packages that values of ``transformers.TrainingArguments`` need, looked for before a model is."""

from collections.abc import Iterable, Mapping
from typing import Any

from selkd.extras import is_installed, need

# How names of ``optim`` begin -> the package. torch has those that are in none, and bitsandbytes the rest.
_OPTIMISERS = (
    (("adamw_torch_4bit", "adamw_torch_8bit"), "torchao"),
    (("galore_",), "galore_torch"),
    (("apollo_",), "apollo_torch"),
    (("lomo", "adalomo"), "lomo_optim"),
    (("grokadamw",), "grokadamw"),
    (("schedule_free_",), "schedulefree"),
    (("stable_adamw",), "optimi"),
)
_BITSANDBYTES = ("_bnb", "_8bit", "paged_", "ademamix", "lion")
# Names of ``report_to`` whose package is called otherwise.
_TRACKERS = {"azure_ml": "azureml", "flyte": "flytekitplugins", "none": None, "all": None}


def check_packages(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError, which begins with the key, for an optimiser or a tracker whose package is not installed."""
    optimiser = str(getattr(arguments.get("optim"), "value", arguments.get("optim") or ""))
    package = _optimiser_package(optimiser)
    if package is not None and not is_installed(package):
        raise ValueError(f"optim: {optimiser} {need(package)}.")
    for tracker in _named(arguments.get("report_to")):
        package = _TRACKERS.get(tracker, tracker)
        if package is None or is_installed(package) or (tracker == "tensorboard" and is_installed("tensorboardX")):
            continue
        raise ValueError(f"report_to: {tracker} {need(package)}.")


def _optimiser_package(name: str) -> str | None:
    for beginnings, package in _OPTIMISERS:
        if name.startswith(beginnings):
            return package
    return "bitsandbytes" if any(part in name for part in _BITSANDBYTES) else None


def _named(trackers: Any) -> Iterable[str]:
    return [trackers] if isinstance(trackers, str) else list(trackers or ())
