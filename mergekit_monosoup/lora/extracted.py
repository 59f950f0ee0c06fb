"""Which part of a model an adapter holds in which form, and the adapter of these parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mergekit_monosoup.lora.adapter import PREFIX

Form = Literal["linear", "transposed", "convolution", "embedding", "bias", "module", "tied", "nothing"]
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class Parts:
    """The parameters of a model class, and the form in which peft can hold a change of each."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names[id(parameter)].append(name)
        self._first = {name: names[0] for names in self._names.values() for name in names}
        self._tied = {name: names for names in self._names.values() if len(names) > 1 for name in names}
        # Statistics of normalisations: part of a module that is stored whole.
        self._buffers = {name for name, _ in model.named_buffers()} & set(model.state_dict())

    def form(self, name: str) -> Form:
        """Return the form for a parameter: factors where its layer has them, else its whole module.

        A tied embedding is stored whole: peft would add its factors twice when it merges them. `nothing` is
        a parameter that no adapter can hold, such as one that a module of modules has itself.
        """
        module, _, leaf = name.rpartition(".")
        layer = self._modules.get(module)
        if layer is None or (name not in self._first and name not in self._buffers):
            return "nothing"
        if leaf == "weight" and isinstance(layer, nn.Embedding):
            return "tied" if name in self._tied else "embedding"
        if leaf == "weight" and name not in self._tied:
            if type(layer) is nn.Linear:
                return "linear"
            if isinstance(layer, Conv1D):
                return "transposed"
            if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and layer.groups == 1:
                return "convolution"
        if leaf == "bias" and isinstance(layer, (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return "bias"
        return "nothing" if any(True for _ in layer.children()) or not module else "module"

    def is_repeated(self, name: str) -> bool:
        """Say whether a parameter is another one under a second name."""
        return self._first.get(name, name) != name

    def aliases(self, name: str) -> list[str]:
        """Return all names of a parameter."""
        return self._tied.get(name, [name])

    def own(self, module: str) -> list[str]:
        """Return the names of what a module stores itself: parameters and statistics."""
        names = [leaf for leaf, _ in self._modules[module].named_parameters(recurse=False)]
        names += [leaf for leaf, _ in self._modules[module].named_buffers(recurse=False)]
        return [f"{module}.{leaf}" for leaf in names]

    def targets(self, modules: list[str]) -> list[str]:
        """Return names that mean these modules and no others: last parts of names where those will do."""
        wanted = set(modules)
        leaves = {module.rpartition(".")[2] for module in modules}
        meant = {m for m in self._modules if m.rpartition(".")[2] in leaves}
        return sorted(leaves) if meant == wanted else sorted(modules)


@dataclass
class ExtractedAdapter:
    """The tensors of an adapter by peft's names, as they come, and what its configuration must say."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    tied: bool = False
    biases: bool = False
    transposed: bool = False

    def add_factors(
        self, module: str, form: Form, left: Tensor, right: Tensor, kernel: tuple[int, ...]
    ) -> None:
        """Take dW = left right of a layer, `[rows, R]` and `[R, columns]` of its weight as it is stored.

        Args:
            module: name of the layer.
            form: how its weight lies.
            left, right: in the dtype they are stored in.
            kernel: of a convolution, else empty.
        """
        key = f"{PREFIX}{module}."
        self.ranks[module] = left.shape[1]
        if form == "embedding":
            # tokens x dimension, while peft keeps A as rank x tokens
            a, b = left.T, right.T
            self.tensors |= {
                f"{key}lora_embedding_A": a.contiguous(),
                f"{key}lora_embedding_B": b.contiguous(),
            }
            return
        a, b = (left.T, right.T) if form == "transposed" else (right, left)
        self.transposed = self.transposed or form == "transposed"
        if form == "convolution":
            a = a.reshape(len(a), -1, *kernel)
            b = b.reshape(*b.shape, *[1] * len(kernel))
        self.tensors |= {f"{key}lora_A.weight": a.contiguous(), f"{key}lora_B.weight": b.contiguous()}

    def add_whole(self, name: str, form: Form, tensor: Tensor) -> None:
        """Take a tensor that replaces the base's."""
        module, _, leaf = name.rpartition(".")
        if form == "bias":
            self.biases = True
            inner = "base_layer." if module in self.ranks else ""
            self.tensors[f"{PREFIX}{module}.{inner}{leaf}"] = tensor
            return
        if module not in self.whole:
            self.whole.append(module)
        self.tensors[f"{PREFIX}{name}"] = tensor

    def add_tied(self, names: list[str], tensor: Tensor) -> None:
        """Take a tensor that replaces one of the base under several names; peft wants it under each."""
        self.tied = True
        self.whole.append(names[0].rpartition(".")[0])
        self.tensors |= {f"{PREFIX}{name}": tensor.clone() for name in names}

    def config(self, parts: Parts, base: str, architecture: str) -> LoraConfig:
        """Return the configuration: alpha equals the rank, so that every scaling is 1.

        A server that knows one rank and one alpha for the whole adapter scales rightly, too.
        """
        rank = max(self.ranks.values(), default=1)
        others = {module: its for module, its in self.ranks.items() if its != rank}
        task = next((task for end, task in _TASKS.items() if architecture.endswith(end)), None)
        return LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=parts.targets(list(self.ranks)),
            rank_pattern=others,
            alpha_pattern=dict(others),
            modules_to_save=self.whole or None,
            bias="all" if self.biases else "none",
            fan_in_fan_out=self.transposed,
            ensure_weight_tying=self.tied,
            base_model_name_or_path=base,
            task_type=task,
            inference_mode=True,
        )

    def bytes(self) -> Mapping[str, int]:
        """Return the bytes of factors and of what is stored whole."""
        sizes = {"factors": 0, "whole": 0}
        for key, tensor in self.tensors.items():
            sizes["factors" if ".lora_" in key else "whole"] += tensor.numel() * tensor.element_size()
        return sizes


def settings_of(config: LoraConfig) -> dict[str, Any]:
    """Return a configuration as adapter_config.json has it."""
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
