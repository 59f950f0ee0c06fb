"""The merge methods and their parameters, known without importing mergekit.

`catalogue.json` is written from mergekit's registry by `catalogue_source.py`, and the tests compare the
two. Where a method is not in it, or mergekit is of another release, the registry itself is asked.
"""

from __future__ import annotations

import json
import math
from importlib import resources
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter, ValidationError

from mergekit_monosoup.planning.problems import short
from mergekit_monosoup.report.versions import installed_version

_KINDS: dict[str, TypeAdapter[Any]] = {
    "number": TypeAdapter(float),
    "integer": TypeAdapter(int),
    "boolean": TypeAdapter(bool),
    "string": TypeAdapter(str),
}


class Parameter(BaseModel, frozen=True, extra="forbid"):
    """A parameter of a merge method: where it may stand and which values it takes."""

    name: str
    scope: Literal["shared", "input", "non_base"]
    required: bool
    kind: str
    allowed: str
    choices: tuple[str, ...] = ()
    lower: float | None = None
    lower_open: bool = False
    upper: float | None = None
    upper_open: bool = False
    finite: bool = False

    def refuse(self, value: Any) -> str | None:
        """Return why one scalar is not a value of this parameter, None where it is."""
        message = f"parameter {self.name!r} is {short(value)}; it must be {self.allowed}"
        if self.choices:
            return None if value in self.choices else message
        # pydantic reads true as 1.0; our methods refuse it, and `finite` marks theirs.
        if isinstance(value, bool) and self.finite:
            return message
        try:
            parsed = _KINDS[self.kind].validate_python(value)
        except ValidationError:
            return message
        if self.kind in ("number", "integer"):
            if self.finite and not math.isfinite(parsed):
                return message
            if self.lower is not None and (parsed < self.lower or (self.lower_open and parsed == self.lower)):
                return message
            if self.upper is not None and (parsed > self.upper or (self.upper_open and parsed == self.upper)):
                return message
        return None


class Method(BaseModel, frozen=True, extra="forbid"):
    """A merge method: what it asks of its inputs and which parameters it has."""

    name: str
    ours: bool
    base: Literal["optional", "required", "forbidden", "ignored"]
    min_inputs: int
    max_inputs: int | None
    min_non_base: int | None
    max_non_base: int | None
    parameters: dict[str, Parameter]


def parse_catalogue(data: dict[str, Any]) -> dict[str, Method]:
    """Build the methods from what `catalogue_source.described` returns."""
    methods = {}
    for name, entry in data["methods"].items():
        parameters = {key: {"name": key, **spec} for key, spec in entry["parameters"].items()}
        methods[name] = Method.model_validate({**entry, "name": name, "parameters": parameters})
    return methods


def read_methods(name: str) -> dict[str, Method]:
    """Return all methods by name, as the catalogue has them or, where `name` is not in it, the registry."""
    data = json.loads(resources.files(__package__).joinpath("catalogue.json").read_text("utf-8"))
    if data["mergekit"] == installed_version("mergekit"):
        methods = parse_catalogue(data)
        if name in methods:
            return methods
    from mergekit_monosoup.planning.catalogue_source import described

    return parse_catalogue(described())
