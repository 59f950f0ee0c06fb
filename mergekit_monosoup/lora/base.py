"""Tensors of an adapter's base model, read one at a time."""

from __future__ import annotations

from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache, LoadTensor
from torch import Tensor

from mergekit_monosoup.errors import AdapterError
from mergekit_monosoup.lora.adapter import Adapter, parameter_names, plain_name


class BaseModel:
    """Look up tensors of a checkpoint by the names of the model's own modules."""

    def __init__(self, source: str) -> None:
        self._model = ModelReference.parse(source)
        if self._model.lora is not None:
            raise AdapterError(f"base {source} carries an adapter itself; name the plain base model")
        self._names = set(LoaderCache().get(self._model).index.tensor_paths)
        self._type = getattr(self._model.config(), "model_type", None)

    def __call__(self, name: str) -> Tensor | None:
        """Return the tensor, or None where the base has none of that name."""
        tensor: Tensor | None = LoadTensor(model=self._model, tensor=name, optional=True).execute()
        return tensor

    def check(self, adapter: Adapter) -> None:
        """Refuse an adapter whose modules are not those of this base.

        Raises:
            AdapterError: names a module that the base does not have.
        """
        for module in adapter.modules:
            name = plain_name(module.module)
            tensors = [f"{name}.weight", *parameter_names(adapter.config, name, anywhere=True)]
            if not any(can_convert_checkpoint_keys(self._type, self._names, t) for t in tensors):
                raise AdapterError(
                    f"adapter {adapter.source} adapts {name}, but base {self._model} has no tensor "
                    f"{tensors[0]}; is it the base that the adapter was trained on?"
                )
