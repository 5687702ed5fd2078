"""Least values of settings, declared in the annotation of their fields."""

import dataclasses
from typing import Annotated, Any, get_args, get_type_hints

from sharding.errors import UserError


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """The least value that a field may have, in `Annotated[int, AtLeast(1)]`."""

    least: float


Positive = Annotated[int, AtLeast(1)]
NonNegative = Annotated[int, AtLeast(0)]


def check_ranges(config: Any, section: str = "") -> None:
    """Raise UserError where a field of a dataclass is below its `AtLeast`; call it in `__post_init__`.

    `section` is the name of the field that holds `config` in a recipe. None is in range, where a field may be None.
    """
    for name, least in _least(type(config)).items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            where = f"{section}.{name}" if section else name
            raise UserError(f"{where} = {value} is out of range: give {least:g} or more")


def _least(config: type) -> dict[str, float]:
    """Field -> its least value."""
    found: dict[str, float] = {}
    for name, hint in get_type_hints(config, include_extras=True).items():
        parts = (hint, *get_args(hint))  # an optional one is a union of the annotated type and None
        marks = [mark for part in parts for mark in getattr(part, "__metadata__", ())]
        for mark in marks:
            if isinstance(mark, AtLeast):
                found[name] = mark.least
    return found
