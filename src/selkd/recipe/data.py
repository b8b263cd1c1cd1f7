"""The recipe's ``data`` part: where the text is, what its rows hold, and how they become samples."""

from typing import Any, Literal

from pydantic import Field, model_validator

from selkd.recipe.fields import first_row_fields, found_fields, names_no_field
from selkd.recipe.part import LARGEST_COUNT, Part, PathText

CHAT = "chat"


class SourceOptions(Part):
    """Where the text is."""

    path: PathText = Field(
        description="The text: demo, a .txt, .jsonl or .parquet file, a folder of them, or a hub data set's id."
    )
    name: str | None = Field(None, description="The configuration of a hub data set.")
    split: str = Field("train", description="The split of a hub data set.")


class RowOptions(Part):
    """What a row holds, and how rows become samples.

    A row is a text (``text_field``), a prompt with its completion (``prompt_field``, ``completion_field``) or a
    conversation (``messages_field``). Where no field is named, text, messages, conversations, or prompt with completion
    is found in the first row of local text.
    """

    text_field: str | None = Field(
        None, description="The field or column that holds a text; text, if no field is given or found in the first row."
    )
    prompt_field: str | None = Field(None, description="The field that holds a prompt, in place of text_field.")
    completion_field: str | None = Field(
        None, description="The field that holds the prompt's completion; null: prompts alone, for on_policy."
    )
    messages_field: str | None = Field(
        None,
        description="The field that holds a conversation, in place of text_field: messages with role and content, or "
        "ShareGPT's with from and value.",
    )
    template: str | None = Field(
        None,
        description="How a prompt and its completion become one text: chat (the tokenizer's chat template), or a text "
        "with {prompt} and, last, {completion}; null: the completion follows the prompt. Conversations take chat.",
    )
    loss_on: Literal["completions", "all"] | None = Field(
        None,
        description="What is learned of prompts and conversations. completions, the default: the completion, or the "
        "assistant's turns; all: the prompt, too.",
    )
    max_length: int = Field(512, ge=2, le=LARGEST_COUNT, description="How many tokens a sample has at most.")
    packing: bool = Field(True, description="Fill each sample with several documents, isolated from each other.")

    @model_validator(mode="after")
    def _one_shape(self) -> "RowOptions":
        shapes = [name for name in ("text_field", "prompt_field", "messages_field") if getattr(self, name) is not None]
        if len(shapes) > 1:
            raise ValueError(f"data.{shapes[1]}: a row has one shape, and data.{shapes[0]} is given too; leave one out")
        if self.completion_field is not None and self.prompt_field is None:
            raise ValueError("data.completion_field: a completion follows a prompt; give data.prompt_field")
        if not shapes:
            self._settle(text_field="text")
        if self.text_field is not None:
            for key in ("template", "loss_on"):
                if getattr(self, key) is not None:
                    raise ValueError(f"data.{key}: without effect on texts; give data.prompt_field or messages_field")
            return self
        if self.messages_field is not None:
            if self.template not in (None, CHAT):
                raise ValueError("data.template: conversations take the tokenizer's chat template; leave it out")
            self._settle(template=CHAT)
        elif self.template not in (None, CHAT):
            self._require_places(str(self.template))
        if self.loss_on == "all" and self.prompt_field is not None and self.completion_field is None:
            raise ValueError("data.loss_on: all makes a text of a prompt alone; give it as data.text_field")
        if self.loss_on is None:
            self._settle(loss_on="completions")
        return self

    @staticmethod
    def _require_places(template: str) -> None:
        before = template.partition("{prompt}")[0]
        if template.count("{prompt}") != 1 or template.count("{completion}") != 1 or "{completion}" in before:
            raise ValueError(
                f"data.template: expected {CHAT}, or a text with {{prompt}} once and then {{completion}} once, but got "
                f"{template!r}"
            )

    @property
    def has_prompts(self) -> bool:
        """Whether rows are prompts or conversations, which ask for an answer."""
        return self.text_field is None

    @property
    def is_prompt_only(self) -> bool:
        return self.prompt_field is not None and self.completion_field is None


class DataOptions(RowOptions, SourceOptions):
    """The text: where it is, how its rows become samples, and how much of it is trained on."""

    tokens: int | None = Field(
        None, ge=2, lt=2**63, description="How many tokens are trained on at most; null: all there are."
    )
    held_out_fraction: float = Field(
        0.02, ge=0, lt=1, description="The share of the documents that is kept from training."
    )
    held_out_tokens: int = Field(
        16384,
        ge=2,
        lt=2**63,
        description="How many tokens the held-out split has at most; by default at least one sample.",
    )
    streaming: bool | None = Field(None, description="Stream a hub data set; null: where `tokens` is given.")

    @model_validator(mode="before")
    @classmethod
    def _find_fields(cls, given: Any) -> Any:
        """Look at the first row of local text where no field is named."""
        if not isinstance(given, dict) or not isinstance(given.get("path"), str) or not names_no_field(given):
            return given
        row = None if given["path"] == "demo" else first_row_fields(given["path"])
        return given if row is None else {**given, **found_fields(*row)}

    @model_validator(mode="after")
    def _room_for_a_sample(self) -> "DataOptions":
        if "held_out_tokens" not in self.model_fields_set:
            self._settle(held_out_tokens=max(self.held_out_tokens, self.max_length))
        held_out_tokens = self.held_out_tokens if self.held_out_fraction > 0 else None
        for key, budget in (("data.tokens", self.tokens), ("data.held_out_tokens", held_out_tokens)):
            if budget is not None and budget < self.max_length:
                raise ValueError(
                    f"{key}: {budget} tokens are fewer than one sample of data.max_length = {self.max_length}; raise "
                    f"{key} or lower data.max_length."
                )
        return self
