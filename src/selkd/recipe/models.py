"""The recipe's ``teacher`` and ``student`` parts."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from selkd.extras import is_installed, need
from selkd.recipe.part import Count, Part, PathText

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
# The names of heads and embeddings, which may share one weight; the loss reads the head's weight without an adapter.
EMBEDDINGS = ("lm_head", "embed_out", "embed_tokens", "embed_in", "wte", "word_embeddings")


def check_device(name: str) -> str:
    """The name of a device for the teacher. Raises ValueError for another name."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"expected cpu, cuda, or one of several as cuda:1, got {name!r}")
    return name


def check_server(url: str) -> str:
    """The address of a server. Raises ValueError for one that names no host, or that could hold a secret."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"expected an address such as http://host:8000/v1, got one that is none: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(f"expected an address such as http://host:8000/v1, got {url!r}")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(
            "expected an address without user, password, ? and #, as it is written into the run; a key goes into an "
            "environment variable, whose name is teacher.api_key_env"
        )
    return url


class RequestOptions(Part):
    """How a served teacher is asked. A run that is continued may have other values."""

    protocol: Literal["vllm", "openai"] = Field(
        "vllm", description="vllm: prompt_logprobs; openai: echo with logprobs, of at most some classes."
    )
    parallel: int = Field(8, ge=1, le=1024, description="How many requests are under way at a time.")
    timeout_seconds: float = Field(
        120.0, gt=0, le=86_400, allow_inf_nan=False, description="How long one attempt may take as a whole."
    )
    attempts: int = Field(
        8, ge=1, le=100, description="How often a request is made until a whole answer comes, with growing waits."
    )


class TeacherOptions(Part):
    """The large model."""

    model: PathText = Field(
        description="The large model: demo, a local folder, a .gguf file (read dequantised) or a hub id; with server "
        "or imported its name there, which identifies it."
    )
    server: Annotated[str, AfterValidator(check_server)] | None = Field(
        None, description="The address of an OpenAI-compatible server that has it, up to /completions; null: load it."
    )
    api_key_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="The name of the environment variable that holds the server's key; null: no key is sent.",
    )
    requests: RequestOptions | None = Field(None, description="How the server is asked; null without one.")
    imported: bool = Field(
        False, description="Whether its answers come from files, by selkd cache import, and it is not loaded."
    )
    dtype: Dtype = Field(
        "auto", description="The dtype of the weights; auto: bfloat16 where the device computes in it."
    )
    quantization: Literal["torchao_int8", "bitsandbytes_8bit", "bitsandbytes_4bit"] | None = Field(
        None,
        description="Quantise the layers, but not the head, when the model is loaded, on the CPU or CUDA; 4bit is NF4.",
    )
    device: Annotated[str, AfterValidator(check_device)] | None = Field(
        None, description="The teacher's device: cpu, cuda or cuda:1; null: the student's device."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> "TeacherOptions":
        if self.server is not None and self.imported:
            raise ValueError("teacher.imported: its answers come from teacher.server; leave one of the two out")
        for name in ("api_key_env", "requests"):
            if self.server is None and getattr(self, name) is not None:
                raise ValueError(f"teacher.{name}: an option of teacher.server, without effect; leave it out")
        if self.server is not None and self.requests is None:
            self._settle(requests=RequestOptions())
        return self

    @property
    def is_foreign(self) -> bool:
        """Whether its model is not here: its answers come from a server, or were imported."""
        return self.server is not None or self.imported


class PruneOptions(Part):
    """A student cut from the teacher, without the layers that have the least block influence."""

    layers: Count = Field(description="How many of the teacher's layers are kept.")


def _as_list(names: Any) -> Any:
    return [names] if isinstance(names, str) and names != "all-linear" else names


class LoraOptions(Part):
    """The low-rank adapters (LoRA, of PEFT) that are trained in place of the student's weights."""

    rank: Count = Field(16, description="LoRA rank.")
    alpha: float = Field(
        32.0,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="LoRA scale: an adapter's output is multiplied by alpha / rank.",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of an adapter's input, in training.")
    target_modules: Annotated[list[str] | Literal["all-linear"], BeforeValidator(_as_list)] = Field(
        "all-linear",
        description="The names of the layers that get an adapter; all-linear: every linear one but the head.",
    )

    @model_validator(mode="after")
    def _possible(self) -> "LoraOptions":
        if isinstance(self.target_modules, list):
            if not self.target_modules:
                raise ValueError("student.lora.target_modules: none; give names, or all-linear")
            for name in self.target_modules:
                if name.rpartition(".")[2] in EMBEDDINGS:
                    raise ValueError(
                        f"student.lora.target_modules: {name} is the head or an embedding, and the loss reads the "
                        "head's weight without its adapter; leave it out"
                    )
        if not is_installed("peft"):
            raise ValueError(f"student.lora: training adapters {need('peft')}")
        return self


class StudentOptions(Part):
    """The small model: one to load, or one to cut from the teacher's own layers."""

    model: PathText | None = Field(None, description="The small model: demo, a local folder or a hub id.")
    prune_from_teacher: PruneOptions | None = Field(
        None, description="Cut the student from the teacher, in place of model."
    )
    lora: LoraOptions | None = Field(
        None, description="Train adapters alone, kept in adapter/ and merged into student/; null: train every weight."
    )

    @model_validator(mode="after")
    def _one_source(self) -> "StudentOptions":
        if (self.model is None) == (self.prune_from_teacher is None):
            raise ValueError("give exactly one of student.model and student.prune_from_teacher")
        return self
