"""Says in plain English what a run did, for the page and the model card."""

import re
from collections.abc import Mapping
from typing import Any

from selkd.plugins import Criterion, Metric, Policy, Sampler
from selkd.reporting import formats
from selkd.reporting.formats import dig

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LOCAL_FILES = "local files"


def metric(name: str | None) -> str:
    """A metric in words; a user's own metric keeps its name."""
    return formats.DASH if name is None else Metric.in_words(name)


def metric_unit(name: str | None) -> str:
    """A metric's unit; an empty string for a metric without one or of the user's own."""
    entry = None if name is None else Metric.known().get(name)
    return "" if entry is None else entry.unit


def criterion(recipe: Any) -> str:
    name = dig(recipe, "criterion", "name")
    return formats.DASH if name is None else Criterion.in_words(name)


def model(name: str | None) -> str:
    """A model's name without its owner or its folders."""
    if name is None:
        return formats.DASH
    return last_part(DEMO_MODEL if name == "demo" else name)


def last_part(place: str) -> str:
    """The last part of a path or an address, in the spelling of any system; any other text as it is."""
    return re.split(r"[/\\]", place.rstrip("/\\"))[-1] or place


def fraction(value: Any) -> str:
    """A fraction of the recipe, or a schedule of one: 20%, 100% to 20%."""
    if isinstance(value, Mapping):
        return f"{formats.fraction(value.get('from'))} to {formats.fraction(value.get('to'))}"
    return formats.fraction(value)


def positions(recipe: Any) -> str:
    """Which positions the loss looked at."""
    policy, share = dig(recipe, "positions", "policy"), fraction(dig(recipe, "positions", "fraction"))
    name = dig(recipe, "positions", "metric")
    if name == "random" and policy == "top_k":
        policy = "random"
    return formats.DASH if policy is None else Policy.in_words(policy, share=share, metric=metric(name))


def samples(recipe: Any) -> str:
    """Which samples were trained on."""
    if dig(recipe, "samples") is None:
        return "every sample"
    name, share = dig(recipe, "samples", "metric"), fraction(dig(recipe, "samples", "fraction"))
    if name == "random":
        return f"a random {share} of the samples"
    return f"the {share} of samples where {metric(name)} is highest on average"


def classes(recipe: Any) -> str:
    """How much of the teacher’s distribution the loss saw."""
    sampler, draws = dig(recipe, "classes", "sampler"), formats.count(dig(recipe, "classes", "draws"))
    phrase = formats.DASH if sampler is None else Sampler.in_words(sampler, draws=draws)
    given = {"server": "as a server gave them", "imported": "as they were imported"}
    for origin in (key for key in given if dig(recipe, "teacher", key)):
        others = "the others as one class" if dig(recipe, "classes", "tail") else "without the others"
        phrase += f" ({given[origin]}, {others}: a truncated teacher, which is biased)"
    return phrase


def data(recipe: Any) -> str:
    """What the student learned from. A rollout is its own answer; a completion is the data's."""
    path, share = dig(recipe, "data", "path"), dig(recipe, "on_policy", "fraction")
    source = {"demo": "the Python manual", None: formats.DASH}.get(path, model(path))
    if dig(recipe, "data", "messages_field") is not None:
        prompts, completions = f"conversations of {source}", f"the assistant’s turns in conversations of {source}"
    elif dig(recipe, "data", "prompt_field") is not None:
        prompts, completions = f"prompts of {source}", f"completions of the prompts of {source}"
    else:
        return f"text of {source}"
    if share is None:
        return completions
    if share == 1:
        return f"{prompts}, answered by the student itself"
    own = f"{formats.fraction(share)} answered by the student itself"
    return f"{prompts}, {own}, the others with the data’s own answers"


def adapters(options: Mapping[str, Any]) -> str:
    """The adapters of a recipe's ``student.lora``."""
    targets = options.get("target_modules")
    where = "every linear layer but the head" if isinstance(targets, str) else ", ".join(targets or ())
    return f"low-rank adapters (LoRA) of rank {options.get('rank')}, alpha {options.get('alpha'):g}, on {where}"


def rollouts(figures: Mapping[str, Any]) -> str:
    """The number and length of the student's answers, from a record's ``on_policy``."""
    phrase = f"{formats.counted(figures['rollouts'], 'answer')} of {formats.counted(figures['tokens'], 'token')} in all"
    if figures.get("mean_tokens") is not None:
        phrase += f", {formats.decimal(figures['mean_tokens'], 1)} on average"
    if figures.get("ended_share") is not None:
        phrase += f"; {formats.percent(figures['ended_share'])} came to an end by themselves"
    return phrase


_QUANTISED = {
    "torchao_int8": "int8 weights by torchao",
    "bitsandbytes_8bit": "8 bits by bitsandbytes",
    "bitsandbytes_4bit": "4 bits (NF4) by bitsandbytes",
}


def quantisation(name: str) -> str:
    """The weights of a teacher with this ``teacher.quantization``."""
    return _QUANTISED.get(name, name)


def student(record: Any) -> str:
    """The student's model, or the teacher’s layers that it kept."""
    kept = dig(record, "student", "pruned_from_teacher", "kept_layers")
    if kept is None:
        return model(dig(record, "student", "model"))
    layers = dig(record, "teacher", "layers")
    return f"{len(kept)} of the teacher’s {formats.count(layers)} layers" if layers else f"{len(kept)} teacher layers"


def summary(record: Any) -> str:
    """The run in two sentences."""
    recipe, steps = dig(record, "recipe"), dig(record, "train", "steps")
    data = dig(recipe, "data", "path")
    source = {"demo": " from the Python manual", None: ""}.get(data, f" from {model(data)}")
    if steps is None:
        learned = "The student has not been trained yet"
    else:
        learned = f"The student learned{source} in {formats.counted(steps, 'step')}"
    return (
        f"{learned}. Training compares it with its teacher by {criterion(recipe)} on {positions(recipe)}, "
        f"in {samples(recipe)}, against {classes(recipe)}."
    )
