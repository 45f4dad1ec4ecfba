"""The fields of which the sections of a recipe are made, and what all sections share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from megatron_inherit.base.errors import UsageError
from megatron_inherit.base.quantities import parse_count

LARGEST = 10**15


def no_bool(value: Any) -> Any:
    """Refuses true and false where a number is needed."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _count(value: Any) -> Any:
    if not isinstance(value, str):
        return no_bool(value)
    try:
        return parse_count(value)
    except UsageError as error:
        raise ValueError(str(error)) from error


def listed(value: Any) -> Any:
    """Takes one text for a list of one."""
    return [value] if isinstance(value, str) else value


Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f]+$")]
Count = Annotated[int, BeforeValidator(_count), Field(ge=0, le=LARGEST)]
Positive = Annotated[int, BeforeValidator(_count), Field(ge=1, le=LARGEST)]
Real = Annotated[float, BeforeValidator(no_bool), Field(ge=0)]
Rate = Annotated[float, BeforeValidator(no_bool), Field(gt=0)]
Part = Annotated[float, BeforeValidator(no_bool), Field(ge=0, le=1)]
Share = Annotated[float, BeforeValidator(no_bool), Field(ge=0, lt=1)]
Logger = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class Section(BaseModel):
    """What all sections share."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)
