"""The recipe's ``on_policy`` part: the student answers the prompts itself, and learns at its own answers."""

from pydantic import Field

from selkd.recipe_choices import Fraction, Part


class OnPolicyOptions(Part):
    """How the student's own answers (rollouts) are drawn, and how many samples of a step they replace."""

    fraction: Fraction = Field(
        1.0, description="share of the samples that the student answers; the others keep the data's completion"
    )
    max_new_tokens: int = Field(256, ge=1, description="tokens of an answer at most")
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False, description="of the draw; 0: the most likely token")
    top_p: Fraction = Field(1.0, description="draw from the most likely classes that make up this probability")
    at_once: int | None = Field(
        None, ge=1, description="prompts that are answered together on a device; null: all of an optimiser step"
    )
    log_rollouts: int = Field(2, ge=0, description="answers that are written to rollouts.jsonl at each logged step")
