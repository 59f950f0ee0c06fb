"""Score a model by a Python function, in this process."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_monosoup.errors import ConfigurationError, InputError, ParameterError
from mergekit_monosoup.search.evaluation import Measured

PREFIX = "python:"


class InMemory:
    """What scores a loaded model, so that a candidate need not be written."""

    text: str
    option: str
    per_item: bool
    #: what the score itself says of its direction, where it does
    lower_is_better: bool | None = None

    def digest(self) -> str:
        """Return a digest of what the score depends on besides the model."""
        raise NotImplementedError

    def measure_loaded(self, loaded: Loaded) -> Measured:
        """Return the score of a model as it is now."""
        raise NotImplementedError

    def measure(self, folder: Path) -> Measured:
        """Return the score of the checkpoint in a folder."""
        return self.measure_loaded(Loaded(folder))


class FunctionEvaluation(InMemory):
    """A function of a loaded model and its tokenizer that returns the score, or those of items."""

    def __init__(self, text: str, option: str, per_item: bool = False) -> None:
        """Import the function; modules in the current folder are found.

        Args:
            text: `python:package.module:function`.
            option: that gave it, for messages.
            per_item: whether it returns a score an item.

        Raises:
            ParameterError: it is of another form, or there is no such function.
        """
        self.text, self.option, self.per_item = text, option, per_item
        module, colon, name = text.removeprefix(PREFIX).partition(":")
        if not colon or not module or not name:
            raise ParameterError(f"{option}{text} is not of the form python:package.module:function")
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.insert(0, here)
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ParameterError(f"{option}{text} cannot be imported: {error}") from error
        if not callable(found):
            raise ParameterError(f"{option}{text} is no function")
        self.arguments = [text]
        self._function: Callable[[Any, Any], Any] = found

    def digest(self) -> str:
        """Return a digest of the function's name and of the file that defines it."""
        try:
            source = Path(inspect.getfile(self._function)).read_bytes()
        except (TypeError, OSError):
            source = b""
        how = b"per item" if self.per_item else b""
        return hashlib.sha256(how + self.arguments[0].encode() + b"\n" + source).hexdigest()

    def measure_loaded(self, loaded: Loaded) -> Measured:
        """Return the score of a model as it is now.

        Raises:
            InputError: it is not a finite number, or not a sequence of them where each item has its own.
        """
        with torch.inference_mode():
            found = self._function(loaded.model, loaded.tokenizer)
        if self.per_item:
            try:
                items = [float(item) for item in found]
            except (TypeError, ValueError):
                items = []
            return Measured.of_items(items, self.arguments[0])
        try:
            value = float(found)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{self.arguments[0]} must return a finite number, not {found!r}")
        return Measured(value)


class Loaded:
    """A model of transformers with its tokenizer, whose weights can be exchanged."""

    def __init__(self, folder: Path) -> None:
        """Load both; without a tokenizer, it is None.

        Raises:
            ConfigurationError: transformers does not know the model's class.
        """
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        names = getattr(config, "architectures", None) or ["AutoModel"]
        kind = getattr(transformers, names[0], None)
        if kind is None:
            raise ConfigurationError(f"transformers has no class {names[0]}; score {folder} by a command")
        self.model = kind.from_pretrained(folder, dtype="auto").eval()
        self.tokenizer: Any = None
        with suppress(OSError, ValueError):
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._weights: dict[str, Tensor] = self.model.state_dict()

    @torch.no_grad()
    def put(self, name: str, tensor: Tensor) -> None:
        """Exchange one tensor.

        Raises:
            ConfigurationError: the loaded model has none of this name and shape.
        """
        place = self._weights.get(name)
        if place is None or place.shape != tensor.shape:
            raise ConfigurationError(
                f"tensor {name} has another name or shape once the model is loaded; score it by a command"
            )
        place.copy_(tensor)
