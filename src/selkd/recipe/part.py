"""The base class of a recipe's parts, and Pydantic's validation errors in the user's words."""

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from selkd.errors import InputError, cut, nearest, shown
from selkd.files import possible_path

P = TypeVar("P", bound=BaseModel)
_TAGS = ("<number>", "<schedule>")  # in Pydantic's paths the branch of a choice that was read, which is no key
_logger = logging.getLogger(__name__)


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, but got {str(value).lower()}")
    return value


LARGEST_COUNT = 2**31 - 1  # of what torch and Transformers count with 32 bits
Count = Annotated[int, BeforeValidator(_no_boolean), Field(ge=1, le=LARGEST_COUNT)]
PathText = Annotated[str, AfterValidator(possible_path)]
Fraction = Annotated[float, BeforeValidator(_no_boolean), Field(gt=0, le=1)]


class Part(BaseModel):
    """A part of a recipe: unknown keys are errors, and values never change after they are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    renamed: ClassVar[Mapping[str, str]] = {}  # former name of a key, which is still read -> its name now

    @classmethod
    def with_current_names(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """Plain data of this part with each former name of a key replaced by its name; a null gives way to a value.

        Raises:
            ValueError: a key has values under both names.
        """
        current = dict(content)
        for former, name in cls.renamed.items():
            value = current.pop(former, None)
            if value is not None and current.get(name) is not None:
                raise ValueError(f"{former} is the former name of {name}, which is given too; leave {former} out")
            if former in content:
                current[name] = current.get(name) if value is None else value
        return current

    @model_validator(mode="before")
    @classmethod
    def _read_former_names(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        for former, name in cls.renamed.items():
            if given.get(former) is not None:
                _logger.warning("%s is now called %s; the former name is still read.", former, name)
        return cls.with_current_names(given)

    def _settle(self, **values: Any) -> None:
        """Set values that follow from other keys, while the part is being read."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def parse_part(part: type[P], content: Any, prefix: str = "") -> P:
    """``content`` as a checked ``part`` of a recipe; errors put ``prefix`` before its keys.

    Raises:
        InputError: names all faults, as ``explain`` puts them.
    """
    if isinstance(content, part):
        return content
    try:
        return part.model_validate(content)
    except ValidationError as error:
        raise InputError(explain(error, part, prefix)) from None


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One message for all faults of the input of ``model``, one line for each.

    A line names the key, the value, what is allowed and the nearest valid name.
    """
    lines = [_explain_one(detail, model, prefix) for detail in error.errors()]
    return "\n".join(dict.fromkeys(lines))


def _explain_one(detail: ErrorDetails, model: type[BaseModel], prefix: str) -> str:
    path = [str(step) for step in detail["loc"] if step not in _TAGS]
    key = ".".join(([prefix] if prefix else []) + path) or "recipe"
    match detail["type"]:
        case "extra_forbidden":
            names = [field.alias or name for name, field in _model_at(model, path[:-1]).model_fields.items()]
            return f"{cut(key)}: unknown key. Allowed here: {', '.join(names)}.{nearest(path[-1], names)}"
        case "missing":
            return f"{key}: required, but not given."
        case "value_error":
            message = str(detail["ctx"]["error"])
            return message if re.match(r"[a-z_]+\.[a-z]", message) or not path else f"{key}: {message}"
        case _:
            return f"{key}: {reason(detail)}"


def reason(detail: ErrorDetails) -> str:
    """Why a value is refused, as it stands behind the key: what was expected and what came."""
    value = detail["input"]
    if detail["type"] == "literal_error":
        names = [name.strip("' ") for name in detail["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return f"{shown(value)} is not known. Allowed: {', '.join(names)}.{nearest(value, names)}"
    return f"{detail['msg'][0].lower()}{detail['msg'][1:]}, but got {shown(value)}."


def _model_at(model: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """The model class that validates the part of ``model`` at ``path``."""
    for step in path:
        model = next(models_in(model.model_fields[step].annotation))
    return model


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The model classes that an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for choice in get_args(annotation):
        yield from models_in(choice)
