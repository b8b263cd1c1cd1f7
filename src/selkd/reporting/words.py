"""What a run did, in plain English: the words that the page and the model card share."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from selkd.plugins import Criterion, Metric, Policy, Sampler
from selkd.reporting import formats
from selkd.reporting.formats import dig

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def metric(name: str | None) -> str:
    """A metric in words; a user's own metric keeps its name."""
    return formats.DASH if name is None else Metric.in_words(name)


def metric_unit(name: str | None) -> str:
    """A metric's unit; an empty string where it has none or is a user's own."""
    entry = None if name is None else Metric.known().get(name)
    return "" if entry is None else entry.unit


def criterion(recipe: Any) -> str:
    name = dig(recipe, "criterion", "name")
    return formats.DASH if name is None else Criterion.in_words(name)


def model(name: str | None) -> str:
    """A model's name without its owner or the folders before it."""
    if name is None:
        return formats.DASH
    return PurePath(DEMO_MODEL if name == "demo" else name).name or name


def fraction(value: Any) -> str:
    """A fraction of the recipe, or a schedule of one: 20%, 100% to 20%."""
    if isinstance(value, Mapping):
        return f"{formats.fraction(value.get('from'))} to {formats.fraction(value.get('to'))}"
    return formats.fraction(value)


def positions(recipe: Any) -> str:
    """Which positions the loss looked at, as a noun phrase."""
    policy, share = dig(recipe, "positions", "policy"), fraction(dig(recipe, "positions", "fraction"))
    name = dig(recipe, "positions", "metric")
    if name == "random" and policy == "top_k":
        policy = "random"
    return formats.DASH if policy is None else Policy.in_words(policy, share=share, metric=metric(name))


def samples(recipe: Any) -> str:
    """Which samples were trained on, as a noun phrase."""
    if dig(recipe, "samples") is None:
        return "every sample"
    name, share = dig(recipe, "samples", "metric"), fraction(dig(recipe, "samples", "fraction"))
    if name == "random":
        return f"a random {share} of the samples"
    return f"the {share} of samples where {metric(name)} is highest on average"


def classes(recipe: Any) -> str:
    """How much of the teacher’s distribution the loss saw, as a noun phrase."""
    sampler, draws = dig(recipe, "classes", "sampler"), formats.count(dig(recipe, "classes", "draws"))
    return formats.DASH if sampler is None else Sampler.in_words(sampler, draws=draws)


def data(recipe: Any) -> str:
    """What was learned from, as a noun phrase. A rollout is the student's answer; a completion is the data's."""
    path, share = dig(recipe, "data", "path"), dig(recipe, "on_policy", "fraction")
    source = {"demo": "the Python manual", None: formats.DASH}.get(path, model(path))
    if dig(recipe, "data", "messages_field") is not None:
        asked, told = f"conversations of {source}", f"the assistant’s turns in conversations of {source}"
    elif dig(recipe, "data", "prompt_field") is not None:
        asked, told = f"prompts of {source}", f"completions of the prompts of {source}"
    else:
        return f"text of {source}"
    if share is None:
        return told
    if share == 1:
        return f"{asked}, answered by the student itself"
    return f"{asked}, {formats.fraction(share)} answered by the student itself, the others with the data’s own answers"


def adapters(options: Mapping[str, Any]) -> str:
    """A recipe's ``student.lora``, as a noun phrase."""
    targets = options.get("target_modules")
    where = "every linear layer but the head" if isinstance(targets, str) else ", ".join(targets or ())
    return f"low-rank adapters (LoRA) of rank {options.get('rank')}, alpha {options.get('alpha'):g}, on {where}"


def rollouts(figures: Mapping[str, Any]) -> str:
    """What a record's ``on_policy`` tells of the student's answers, as a sentence's beginning."""
    told = f"{formats.count(figures['rollouts'])} answers of {formats.count(figures['tokens'])} tokens in all"
    if figures.get("mean_tokens") is not None:
        told += f", {formats.decimal(figures['mean_tokens'], 1)} on average"
    if figures.get("ended_share") is not None:
        told += f"; {formats.percent(figures['ended_share'])} came to an end by themselves"
    return told


_QUANTISED = {
    "torchao_int8": "int8 weights by torchao",
    "bitsandbytes_8bit": "8 bits by bitsandbytes",
    "bitsandbytes_4bit": "4 bits (NF4) by bitsandbytes",
}


def quantisation(name: str) -> str:
    """A recipe's ``teacher.quantization``: what its layers were in."""
    return _QUANTISED.get(name, name)


def student(record: Any) -> str:
    """Where the student comes from: its model's name, or the teacher’s layers that it kept."""
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
        learned = f"The student learned{source} in {formats.count(steps)} step{'' if steps == 1 else 's'}"
    return (
        f"{learned}. Training compares it with its teacher by {criterion(recipe)} on {positions(recipe)}, "
        f"in {samples(recipe)}, against {classes(recipe)}."
    )
