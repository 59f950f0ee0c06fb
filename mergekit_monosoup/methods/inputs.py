"""What our methods ask of their inputs, and the updates they form from them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from mergekit.merge_methods.base import TensorEntry, TensorGroup
from torch import Tensor

from mergekit_monosoup.checkpoint.dequantised import dequantised
from mergekit_monosoup.errors import (
    ConfigurationError,
    MissingBaseError,
    MissingTensorError,
    NonFiniteError,
    ParameterError,
    QuantizedWeightError,
    ShapeMismatchError,
)
from mergekit_monosoup.spectral.storing import NEAREST, Storage, sampled_lines, survived


def validate_recipe(
    method: str, input_ids: Sequence[Hashable], base_id: Hashable | None, group_name: str | None
) -> None:
    """Refuse inputs that no update can be formed from, before a tensor is loaded.

    mergekit calls this once for the recipe (with the name of an output slice or none) and once for
    each tensor (with its name).

    Raises:
        MissingBaseError: no base model.
        MissingTensorError: the base lacks the tensor, or a slice does not list the base.
        ConfigurationError: nothing but the base.
    """
    if base_id is None:
        raise MissingBaseError(
            f"merge method {method!r} needs the checkpoint that the fine-tuning started from; "
            "add it as `base_model:`"
        )
    whole_recipe = is_whole_recipe(group_name)
    if base_id not in input_ids:
        if whole_recipe:
            raise MissingBaseError(
                f"base_model {base_id} is not among the sources of {group_name or 'the recipe'}; "
                "list it there with its layer_range"
            )
        raise MissingTensorError(
            f"tensor {group_name}: base_model {base_id} does not have it, so its update cannot be "
            "formed; use the base that the fine-tuning started from"
        )
    if all(input_id == base_id for input_id in input_ids):
        raise ConfigurationError(
            f"merge method {method!r} needs at least one fine-tuned checkpoint besides base_model"
            f"{f' for {group_name}' if group_name else ''}; add it under `models:`"
        )


def is_whole_recipe(group_name: str | None) -> bool:
    """Say whether mergekit validates the recipe (or one of its slices) and not one tensor."""
    return group_name is None or group_name.endswith("]")


@dataclass(frozen=True)
class Stored:
    """A weight as it is stored, and how much of the edit of a single checkpoint is left; None elsewhere."""

    weight: Tensor
    survival: float | None = None


@dataclass(frozen=True)
class GroupInputs:
    """The checked inputs of one output tensor.

    Tensors stay as they were stored until they are needed, but for float8, which is dequantised;
    computation is in float32, in float64 for float64. `output_dtype` is what results are returned in, and
    `storage` says how they are rounded.
    """

    group: TensorGroup
    output_dtype: torch.dtype
    storage: Storage = NEAREST

    @classmethod
    def of(cls, group: TensorGroup, storage: Storage = NEAREST) -> GroupInputs:
        """Check a group and take its base.

        Raises:
            MissingBaseError, ShapeMismatchError, QuantizedWeightError.
        """
        if group.base is None:
            raise MissingBaseError(f"{_label(group)}: no base among the inputs")
        for entry in group.entries:
            _check_storage(entry, group)
        group, dtype = dequantised(group)
        return cls(group, dtype, replace(storage, dtype=storage.dtype or dtype))

    @property
    def label(self) -> str:
        """The tensor, as messages call it."""
        return _label(self.group)

    @property
    def base(self) -> Tensor:
        """W0 in the dtype of the computation: float32, or float64 for float64."""
        return _computed(self.stored_base)

    @property
    def stored_base(self) -> Tensor:
        """W0 as it is stored."""
        if self.group.base is None:
            raise MissingBaseError(f"{self.label}: no base among the inputs")
        tensor: Tensor = self.group.base.tensor.detach()
        return tensor

    @property
    def stored_tuned(self) -> list[Tensor]:
        """The W_i as they are stored."""
        return [entry.tensor.detach() for entry in self.group.non_base]

    def require_finite(self) -> None:
        """Look through all values.

        Raises:
            NonFiniteError: names the tensor and the model that holds NaN or infinity.
        """
        for entry in self.group.entries:
            _check_values(entry, self.group)

    def shares(self, weights: Sequence[float]) -> list[float]:
        """Return w_i / sum_j w_j.

        Raises:
            ParameterError: all weights are zero.
        """
        total = sum(weights)
        if total <= 0:
            raise ParameterError(
                f"{self.label}: the weights of the fine-tuned checkpoints sum "
                "to 0; give at least one a positive `weight`"
            )
        return [weight / total for weight in weights]

    @property
    def sole_finetuned(self) -> Tensor:
        """The fine-tuned tensor as it is stored, where there is just one."""
        (tensor,) = self.stored_tuned
        return tensor.to(self.output_dtype)

    def mean_update(self, weights: Sequence[float]) -> Tensor:
        """Return dW = sum_i w_i (W_i - W0) / sum_i w_i in the dtype of the computation.

        Raises:
            ParameterError: all weights are zero.
            NonFiniteError: NaN or infinity in an input, or the difference of finite weights overflows.
        """
        self.require_finite()
        base = self.base
        dw: Tensor | None = None
        for tensor, share in zip(self.stored_tuned, self.shares(weights), strict=True):
            update = _computed(tensor) - base
            if share != 1:
                update *= share
            dw = update if dw is None else dw.add_(update)
        if dw is None:
            raise ConfigurationError(f"{self.label}: no fine-tuned input")
        if not _finite(dw):
            raise self.overflow()
        return dw

    @property
    def update_norm(self) -> float:
        """||dW||_F of the plain average of the updates."""
        return float(self.mean_update([1.0] * len(self.group.non_base)).norm())

    def overflow(self) -> NonFiniteError:
        """Return the error for finite inputs whose difference is not finite."""
        return NonFiniteError(
            f"{self.label}: the update overflows; the weights of base and "
            "fine-tuned model are too far apart to belong together"
        )

    def add_to_base(self, dw: Tensor, factor: float, exact: bool = False) -> Stored:
        """Return W0 + factor dW, rounded once to the dtype of the inputs.

        Args:
            dw: the update.
            factor: a number.
            exact: dW is not the difference of stored weights, so nothing is rounded back to one of them.
        """
        value = torch.add(self.base, dw, alpha=factor)
        rounded = self.storage.rounded(value, self.output_dtype)
        survival = None
        if len(self.group.non_base) == 1 and not exact and value.numel():
            flat = sampled_lines(value.numel(), value.numel())
            w1 = _computed(self.stored_tuned[0]).reshape(-1)[flat]
            parts = (value.reshape(-1)[flat], rounded.reshape(-1)[flat], w1)
            found, intended = survived([self.storage.survival(self.output_dtype, *parts)])
            survival = found / intended if intended else None
        return Stored(self.checked(rounded), survival)

    def checked(self, result: Tensor) -> Tensor:
        """Return a result to store, unless it left the range of its dtype, which float16 alone is short of.

        Raises:
            NonFiniteError: names tensor and remedy.
        """
        result = result.to(self.output_dtype)
        if result.dtype == torch.float16 and not _finite(result):
            raise NonFiniteError(
                f"{self.label}: the result overflows float16; set "
                "`dtype: float32` with `out_dtype: bfloat16`, or a smaller `alpha`"
            )
        return result


def _computed(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _check_storage(entry: TensorEntry, group: TensorGroup) -> None:
    tensor = entry.tensor
    if tensor.shape != group.entries[0].tensor.shape:
        raise ShapeMismatchError(
            f"{_label(group)}: shapes differ: {[tuple(e.tensor.shape) for e in group.entries]}"
        )
    if not tensor.is_floating_point():
        raise QuantizedWeightError(
            f"{_label(group)} of {_named(entry)} is stored as {tensor.dtype}; dequantise the checkpoint "
            "to float16, bfloat16 or float32 first"
        )


def _check_values(entry: TensorEntry, group: TensorGroup) -> None:
    tensor = entry.tensor
    if not _finite(tensor):
        count = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"{_label(group)} of {_named(entry)} holds NaN or infinity in {count} of "
            f"{tensor.numel()} entries; the checkpoint is damaged or its training diverged"
        )


def _label(group: TensorGroup) -> str:
    return f"tensor {group.metadata.name}" if group.metadata.name else "an unnamed tensor"


def _named(entry: TensorEntry) -> str:
    label = f"input {entry.id}" if isinstance(entry.id, int) else str(entry.id)
    return f"{label} (the base)" if entry.is_base else label
