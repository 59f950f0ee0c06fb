"""Read the catalogue of methods from mergekit's registry.

`python -m mergekit_monosoup.planning.catalogue_source` rewrites `catalogue.json`; run it after a change
of a method's parameters.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mergekit_monosoup.errors import ParameterError
from mergekit_monosoup.report.versions import installed_version

_INTERVAL = re.compile(r"([\[(])\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*([\])])")
_BOUND = re.compile(r"(>=|<=|>|<)\s*(-?[\d.]+)")
_WORDS = {
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "string": "a text",
}
# Nothing accepts it: a method's refusal then says in words what it does accept.
_IMPOSSIBLE = {"no": "value"}


def described() -> dict[str, Any]:
    """Return all registered methods, ours among them, as plain data."""
    from mergekit import merge_methods

    from mergekit_monosoup.registry import register

    ours = register()
    methods = {
        method.spec.name: _method(method, method.spec.name in ours)
        for method in sorted(merge_methods.registered_methods(), key=lambda m: m.spec.name)
    }
    return {"mergekit": installed_version("mergekit"), "methods": methods}


def _method(method: Any, ours: bool) -> dict[str, Any]:
    spec = method.spec
    contract = spec.contract
    return {
        "ours": ours,
        "base": contract.base.value,
        "min_inputs": contract.min_inputs,
        "max_inputs": contract.max_inputs,
        # A contract holds for single tensors as well, of which fewer models may do.
        "min_non_base": getattr(method, "fewest_finetuned", contract.min_non_base),
        "max_non_base": contract.max_non_base,
        "parameters": {p.name: _parameter(p) for p in spec.parameters if p.name[0] != "_"},
    }


def _parameter(spec: Any) -> dict[str, Any]:
    schema = TypeAdapter(spec.value_type).json_schema()
    branches = [b for b in schema.get("anyOf", [schema]) if b.get("type") != "null"]
    branch = _resolved(branches[0], schema)
    kind = branch.get("type", "string")
    described: dict[str, Any] = {"scope": spec.scope.value, "required": spec.required, "kind": kind}
    if "enum" in branch:
        described["choices"] = list(branch["enum"])
    allowed = _allowed(spec)
    if allowed is None:
        listed = ", ".join(map(str, described.get("choices", ())))
        return described | {"allowed": f"one of {listed}" if listed else _WORDS[kind]}
    return described | {"allowed": allowed} | (_bounds(allowed) if kind in ("number", "integer") else {})


def _resolved(branch: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    reference = branch.get("$ref")
    return schema["$defs"][reference.rsplit("/", 1)[1]] if reference else branch


def _allowed(spec: Any) -> str | None:
    """Return the words in which one of our parameters states its range."""
    try:
        spec.validate(_IMPOSSIBLE)
    except ParameterError as error:
        return str(error).split("it must be ", 1)[1]
    except ValueError:
        return None
    return None


def _bounds(allowed: str) -> dict[str, Any]:
    bounds: dict[str, Any] = {"finite": True}
    if match := _INTERVAL.search(allowed):
        left, low, high, right = match.groups()
        bounds |= {"lower": float(low), "upper": float(high)}
        bounds |= {"lower_open": left == "(", "upper_open": right == ")"}
    for sign, value in _BOUND.findall(allowed):
        side = "lower" if sign[0] == ">" else "upper"
        bounds |= {side: float(value), f"{side}_open": len(sign) == 1}
    return bounds


def main() -> None:
    """Rewrite the catalogue beside this file."""
    text = json.dumps(described(), indent=1) + "\n"
    Path(__file__).with_name("catalogue.json").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
