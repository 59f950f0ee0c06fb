"""What `plan` knows of methods without importing them is what they are."""

from __future__ import annotations

import json
from pathlib import Path


def test_catalogue_is_that_of_the_registry(registered):
    """`python -m mergekit_monosoup.planning.catalogue_source` has been run since the last change."""
    from mergekit_monosoup.planning import catalogue_source

    stored = Path(catalogue_source.__file__).with_name("catalogue.json")
    assert json.loads(stored.read_text()) == json.loads(json.dumps(catalogue_source.described()))


PROBES = [-1, -1e-9, 0, 1e-9, 0.5, 1, 1.0000001, 2, 1e9, float("nan"), float("inf"), True, False, "1e-3"]
PROBES += ["true", "x", "", "monosoup", "decay", "mean_angle", [], {}]


def test_catalogue_judges_values_as_the_methods_do(registered):
    from pydantic import ValidationError

    from mergekit_monosoup.errors import ParameterError
    from mergekit_monosoup.planning.catalogue import read_methods
    from mergekit_monosoup.registry import our_methods

    for method in our_methods():
        known = read_methods(method.spec.name).get(method.spec.name)
        for spec in method.spec.parameters:
            if spec.name.startswith("_"):
                continue
            for value in PROBES:
                try:
                    spec.validate(value)
                    good = True
                except (ParameterError, ValidationError):
                    good = False
                message = known.parameters[spec.name].refuse(value)
                assert (message is None) == good, f"{spec.name}: {value!r}: {message}"
