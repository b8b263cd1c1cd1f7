"""The memory of an optimiser's state, by the optimiser's name in Transformers."""

from selkd.needs.architecture import Architecture
from selkd.training.arguments import DistillArguments

# How many numbers an optimiser keeps for each parameter, by how its name begins. Adafactor keeps one a row and column.
_STATES = {
    "adamw": 2,
    "adafactor": 0,
    "sgd": 0,
    "lion": 1,
    "rmsprop": 1,
    "adagrad": 1,
    "ademamix": 3,
    "stable_adamw": 2,
    "schedule_free_sgd": 1,
    "schedule_free": 2,
}
# Bits of a number -> how many numbers share one float32 scale in bitsandbytes and torchao.
_SHARING = {8: 256, 4: 128}


def optimiser_bytes(arguments: DistillArguments, student: Architecture) -> tuple[int, str | None]:
    """Count the bytes of the whole state, with a note if the optimiser is not in the table.

    Numbers are float32 unless the name says 8 or 4 bits. Then several share a scale; and Transformers keeps the
    embedding's state in float32 for bitsandbytes' optimisers of 8 bits.
    """
    name = str(getattr(arguments.optim, "value", arguments.optim))
    states = next((n for prefix, n in _STATES.items() if name.removeprefix("paged_").startswith(prefix)), None)
    note = None if states is not None else f"optimiser: {name} is taken for Adam, two float32 numbers a parameter"
    states = 2 if states is None else states
    if name in ("sgd", "rmsprop") and "momentum" in (arguments.optim_args or ""):
        states += 1
    bits = next((bits for bits in _SHARING if f"{bits}bit" in name), None)
    if bits is None:
        return 4 * states * student.parameters, note
    in_float32 = 0 if "torch" in name or bits != 8 else student.vocab_size * student.hidden_size
    narrow = states * (bits / 8 + 4 / _SHARING[bits]) * (student.parameters - in_float32)
    return round(narrow) + 4 * states * in_float32, note
