"""Parameter types that refuse a wrong value by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, get_args

from pydantic import ValidationError, WrapValidator
from pydantic_core.core_schema import ValidatorFunctionWrapHandler


def checked(base: Any, name: str, allowed: str, accept: Callable[[Any], bool]) -> Any:
    """Return a type that pydantic validates as `base` and that refuses values outside its range.

    Args:
        base: the plain type, for instance `float`.
        name: the parameter, as the recipe spells it.
        allowed: the range in words, for the message.
        accept: whether a value of the plain type lies in the range.

    Raises (on validation):
        ParameterError: names parameter, value and range.
    """
    from mergekit_monosoup.errors import ParameterError

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            parsed = handler(value)
        except ValidationError:
            parsed, good = None, False
        else:
            # pydantic reads true as 1.0; in a recipe it is a slip.
            good = (isinstance(parsed, bool) or not isinstance(value, bool)) and accept(parsed)
        if not good:
            raise ParameterError(f"parameter {name!r} is {value!r}; it must be {allowed}")
        return parsed

    return Annotated[base, WrapValidator(check)]


def number(name: str, allowed: str, accept: Callable[[float], bool]) -> Any:
    """Return the type of a finite number in a range."""
    return checked(float, name, allowed, lambda x: math.isfinite(x) and accept(x))


def optional_number(name: str, allowed: str, accept: Callable[[float], bool]) -> Any:
    """Return the type of a finite number in a range, or None where the parameter is absent."""
    return checked(float | None, name, allowed, lambda x: x is None or (math.isfinite(x) and accept(x)))


def choice(name: str, literal: Any) -> Any:
    """Return the type of a `Literal` that lists its choices when it refuses."""
    return checked(literal, name, "one of " + ", ".join(get_args(literal)), lambda _: True)


def flag(name: str) -> Any:
    """Return the type of a switch."""
    return checked(bool, name, "true or false", lambda _: True)


def optional_choice(name: str, literal: Any) -> Any:
    """Return the type of a `Literal`, or None where the parameter is absent."""
    return checked(literal | None, name, "one of " + ", ".join(get_args(literal)), lambda _: True)


def whole_number(name: str, allowed: str, accept: Callable[[int], bool]) -> Any:
    """Return the type of an integer in a range."""
    return checked(int, name, allowed, accept)
