"""One exception tree: whatever a user can cause is a `MonoSoupError` that names its remedy.

None of these derives from `ValueError`: mergekit binds parameters and builds its tasks inside
pydantic validators, which wrap `ValueError` into a multi-line report but let others pass as they are.
"""

from __future__ import annotations


class MonoSoupError(Exception):
    """Root of all errors that this package raises on purpose."""


class ConfigurationError(MonoSoupError):
    """The recipe asks for something that cannot be done."""


class ParameterError(ConfigurationError):
    """A parameter of a merge method is of the wrong type or out of its range."""


class MissingBaseError(ConfigurationError):
    """The method needs `base_model`, and there is none."""


class InputError(MonoSoupError):
    """An input checkpoint cannot be used as it is."""


class MissingTensorError(InputError):
    """A tensor is in one input checkpoint and not in another that must have it."""


class ShapeMismatchError(InputError):
    """The same tensor has different shapes in the input checkpoints."""


class NonFiniteError(InputError):
    """An input tensor, or the update formed from it, holds NaN or infinity."""


class QuantizedWeightError(InputError):
    """A weight is stored as integers; its update has no meaning before dequantisation."""


class RegistrationError(MonoSoupError):
    """mergekit's registry cannot take our methods."""


class AdapterError(InputError):
    """A LoRA adapter is damaged, incomplete or of another base model."""


class UnsupportedAdapterError(AdapterError):
    """An adapter is not a sum of low-rank products, so there are no factors to edit."""


class OutputError(MonoSoupError):
    """The result cannot be written, or is not what was planned."""


class InterruptedMerge(MonoSoupError):
    """The user has stopped a merge."""
