"""Names of the scales beside float8 weights; without torch, for plans."""

from __future__ import annotations

from collections.abc import Container

# Fine-grained float8 (DeepSeek, Qwen) calls the factor an inverse; compressed-tensors, fbgemm and
# ModelOpt call it a scale. Both multiply.
SCALE_SUFFIXES = ("_scale_inv", "_scale")


def scale_name(name: str, held: Container[str]) -> str | None:
    """Return the name of the scale of a weight, or None where the checkpoint has none."""
    return next((name + suffix for suffix in SCALE_SUFFIXES if name + suffix in held), None)


def is_scale(name: str, held: Container[str]) -> bool:
    """Say whether a tensor is the scale of a weight, or of the inputs of a scaled weight."""
    for suffix in SCALE_SUFFIXES:
        if name.endswith(suffix) and name.removesuffix(suffix) in held:
            return True
    weight = name.removesuffix("input_scale") + "weight"
    return name.endswith("input_scale") and weight in held and scale_name(weight, held) is not None
