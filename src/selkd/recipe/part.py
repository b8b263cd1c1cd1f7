"""What every part of a recipe is: keys that are checked, values that never change after reading."""

import logging
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from selkd.errors import InputError
from selkd.recipe.errors import explain

P = TypeVar("P", bound=BaseModel)
_logger = logging.getLogger(__name__)


def _no_boolean(given: Any) -> Any:
    if isinstance(given, bool):
        raise ValueError(f"expected a number, but got {str(given).lower()}")
    return given


Fraction = Annotated[float, BeforeValidator(_no_boolean), Field(gt=0, le=1)]


class Part(BaseModel):
    """A part of a recipe: unknown keys are errors, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    renamed: ClassVar[Mapping[str, str]] = {}  # a key's former name, under which it is still read -> its name

    @model_validator(mode="before")
    @classmethod
    def _read_former_names(cls, given: Any) -> Any:
        for former, name in cls.renamed.items():
            if isinstance(given, dict) and former in given:
                if name in given:
                    raise ValueError(f"{former} is the former name of {name}, which is given too; leave {former} out")
                given = {name if key == former else key: value for key, value in given.items()}
                if given[name] is not None:
                    _logger.warning("%s is now called %s; the former name is still read.", former, name)
        return given

    def _settle(self, **values: Any) -> None:
        """Set what a choice decides, while the part is still being read."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def parse_part(part: type[P], given: Any, prefix: str = "") -> P:
    """``given`` as a checked ``part`` of a recipe.

    Raises:
        InputError: names each faulty key, what was given, what is allowed and the nearest valid name.
    """
    if isinstance(given, part):
        return given
    try:
        return part.model_validate(given)
    except ValidationError as error:
        raise InputError(explain(error, part, prefix)) from None
