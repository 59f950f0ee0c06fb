"""Every touch of mergekit's internals: read in version 0.1.5, each with a test in tests/test_host.py.

What mergekit offers in public (recipes, loaders, the planner, the executor, tokenizers) is imported where it
is used; here stands what it keeps to itself, or what would break in silence if it changed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import immutables
import torch
from huggingface_hub.errors import HfHubHTTPError
from mergekit import merge as mergekit_merge
from mergekit.architecture import ModelArchitecture
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.common import ImmutableMap, ModelPath, ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task, TaskUniverse
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardInfo
from mergekit.io.tasks import GatherTensors, LoaderCache, LoadTensor, SaveTensor
from mergekit.merge_methods import get as merge_method
from mergekit.merge_methods.base import OptionalTensorPolicy, TensorEntry, TensorGroup
from mergekit.merge_methods.dtype import promoted_dtype
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary, TokenizerInfo
from torch import Tensor

from mergekit_monosoup.errors import InputError


@dataclass(frozen=True)
class PlannedTask:
    """One tensor of the output as mergekit plans it: how it is made, and what it is stored in."""

    name: str
    task: Task[Any]
    dtype: torch.dtype | None = None
    optional: bool = False


def plan_tasks(
    config: MergeConfiguration, arch: ModelArchitecture, options: MergeOptions, out_config: Any
) -> tuple[list[PlannedTask], BuildTokenizer | None]:
    """Let mergekit plan a recipe; the recipe is brought into mergekit's normal form by this.

    Returns:
        The tensors in mergekit's order, and the task that builds a tokenizer where the recipe asks for one.
    """
    planner = MergePlanner(config, arch, options=options, out_model_config=out_config)
    planned: list[PlannedTask] = []
    tokenizer = None
    for task in planner.plan_to_disk(out_path=""):
        if isinstance(task, SaveTensor):
            planned.append(
                PlannedTask(task.tensor_name, task.tensor_task, dtype_from_name(task.dtype), task.optional)
            )
        elif isinstance(task, BuildTokenizer):
            tokenizer = task
    return planned, tokenizer


def with_parameters(task: Task[Any], **added: Any) -> Task[Any]:
    """Return a task whose merge method is handed further keyword arguments, wherever in it that is asked."""
    if not isinstance(task, ExecuteMergeMethodTask):
        inner = {
            name: with_parameters(value, **added)
            for name in type(task).model_fields
            if isinstance(value := getattr(task, name), ExecuteMergeMethodTask)
        }
        return task.model_copy(update=inner) if inner else task
    parameters = immutables.Map({**dict(task.parameters.items()), **added})
    return task.model_copy(update={"parameters": parameters})


def run_task(
    task: Task[Any],
    tokenizer: tuple[BuildTokenizer, TokenizerInfo] | None = None,
    loaded: Mapping[Task[Any], Any] | None = None,
    *,
    math_device: str | torch.device = "cpu",
    storage_device: str | torch.device = "cpu",
) -> Any:
    """Execute a task and what it depends on.

    Args:
        task: for instance a tensor of the output.
        tokenizer: the tokenizer's task with its value, where it has been built.
        loaded: further tasks with their values.
        math_device, storage_device: as mergekit's executor has them.
    """
    known = {**(loaded or {}), **({tokenizer[0]: tokenizer[1]} if tokenizer else {})}
    if task in known:
        return known[task]
    universe = TaskUniverse([task])
    cached = {h: value for t, value in known.items() if (h := universe.get_handle(t)) is not None}
    executor = Executor(
        [universe.add_task(task)],
        math_device=torch.device(math_device),
        storage_device=torch.device(storage_device),
        cached_values=cached or None,
    )
    ((_, result),) = executor.run(quiet=True)
    return result


def inputs_of(task: Task[Any]) -> list[LoadTensor]:
    """Return the tasks by which a tensor's inputs are read, each once."""
    found: dict[LoadTensor, None] = {}
    pending: list[Task[Any]] = [task]
    while pending:
        current = pending.pop()
        if isinstance(current, LoadTensor):
            found.setdefault(current)
        else:
            pending.extend(current.arguments().values())
    return list(found)


def loads_of(task: ExecuteMergeMethodTask) -> list[LoadTensor]:
    """Return the tasks that load the inputs of a merge, in its order; none if more is done to them."""
    gather = task.gather_tensors
    if not isinstance(gather, GatherTensors):
        return []
    by_model = {load.model: load for load in gather.arguments().values() if isinstance(load, LoadTensor)}
    return [by_model[model] for model in task.model_order]


def with_dtype(task: ExecuteMergeMethodTask, dtype: str) -> ExecuteMergeMethodTask:
    """Return a task that loads its inputs in a dtype whatever the recipe says."""
    gather = task.gather_tensors
    forced = {m: w.model_copy(update={"force_dtype": dtype}) for m, w in gather.weight_info.items()}
    changed = gather.model_copy(update={"weight_info": ImmutableMap(data=forced)})
    return task.model_copy(update={"gather_tensors": changed})


def vocabulary_axis(task: ExecuteMergeMethodTask) -> int:
    """Return the axis of tokens of a merged tensor, -1 where it has none."""
    axis: int | None = task.output_weight.vocabulary_axis
    return -1 if axis is None else axis


def stored_name(task: LoadTensor) -> str | None:
    """Return under which name a checkpoint has what a task loads; None where it is absent or made of more."""
    name: str | None = task._resolve_name(LoaderCache().get(task.model))
    return name


class Shapes:
    """What the tensors of the output will look like, from the headers of the inputs alone."""

    def __init__(
        self,
        headers: Mapping[ModelReference, Mapping[str, tuple[tuple[int, ...], torch.dtype]]],
        tokenizer: TokenizerInfo | None,
    ) -> None:
        """Take the shape and dtype of every stored tensor, and the tokenizer of the output."""
        self._headers = headers
        self._tokenizer = tokenizer

    def of(self, task: Task[Any]) -> Tensor | None:
        """Return a tensor on the meta device as the task will return it; None where it returns none."""
        value = self._value(task)
        return value if isinstance(value, Tensor) else None

    def _value(self, task: Task[Any]) -> Any:
        if isinstance(task, LoadTensor):
            return self._loaded(task)
        if isinstance(task, ExecuteMergeMethodTask):
            return self._merged(task)
        if isinstance(task, PermutedVocabulary):
            return self._permuted(task)
        arguments = {name: self._value(below) for name, below in task.arguments().items()}
        return task.execute(**arguments)

    def _loaded(self, task: LoadTensor) -> Tensor | None:
        held = self._headers[task.model]
        name = stored_name(task)
        if name is not None:
            found: Tensor | None = _meta(held[name])
        else:
            kind = task.model.config(trust_remote_code=LoaderCache().trust_remote_code).model_type
            sources = {key: (lambda key=key: _meta(held[key])) for key in held}
            targets = (task.tensor, *(task.aliases or ()))
            converted = (convert_checkpoint_tensors(kind, sources, target) for target in targets)
            found = next((tensor for tensor in converted if tensor is not None), None)
        dtype = dtype_from_name(task.dtype)
        return found if found is None or dtype is None else found.to(dtype)

    def _permuted(self, task: PermutedVocabulary) -> dict[ModelReference, Tensor]:
        tensors = self._value(task.gather_tensors)
        if not tensors or self._tokenizer is None:
            return {}
        size = len(self._tokenizer.tokenizer.get_vocab())
        multiple = task.pad_to_multiple_of or 1
        size = -(-size // multiple) * multiple
        dtype = promoted_dtype(TensorGroup(tuple(TensorEntry(m, t) for m, t in tensors.items())))
        axis = task.vocabulary_axis
        return {
            model: torch.empty((*t.shape[:axis], size, *t.shape[axis + 1 :]), dtype=dtype, device="meta")
            for model, t in tensors.items()
        }

    def _merged(self, task: ExecuteMergeMethodTask) -> Tensor | None:
        tensors: dict[ModelReference, Tensor] = self._value(task.gather_tensors)
        present = [model for model in task.model_order if tensors.get(model) is not None]
        if not present:
            return None
        spec = merge_method(task.method_name).spec
        if (
            task.output_weight.optional
            and len(present) < min(len(task.model_order), spec.contract.min_inputs)
            and spec.optional_tensor_policy == OptionalTensorPolicy.BASE_OR_SKIP
            and present != [task.base_model]
        ):
            return None
        group = TensorGroup(tuple(TensorEntry(model, tensors[model]) for model in present))
        return tensors[present[0]].to(promoted_dtype(group))


def _meta(header: tuple[tuple[int, ...], torch.dtype]) -> Tensor:
    return torch.empty(header[0], dtype=header[1], device="meta")


def out_config(config: MergeConfiguration, arch: ModelArchitecture, trust_remote_code: bool) -> Any:
    """Return the configuration of the output as mergekit derives it from the base's."""
    return mergekit_merge._model_out_config(config, arch, trust_remote_code=trust_remote_code)


@contextmanager
def plain_configurations(model_types: Iterable[object]) -> Iterator[None]:
    """Have transformers read configurations of types that only a model's own code knows, without that code.

    Args:
        model_types: as configurations name them; what transformers knows itself stays as it is.
    """
    from transformers import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    added = [
        name for name in dict.fromkeys(model_types) if isinstance(name, str) and name not in CONFIG_MAPPING
    ]
    for name in added:
        CONFIG_MAPPING.register(name, type("PlainConfig", (PretrainedConfig,), {"model_type": name}))
    try:
        yield
    finally:
        for name in added:
            CONFIG_MAPPING._extra_content.pop(name, None)


def local_reference(folder: str) -> ModelReference:
    """Return a reference to a folder, whatever its name: mergekit would read a `+` or `@` in it."""
    return ModelReference(model=ModelPath.model_construct(path=folder, revision=None))


def save_tokenizer(config: MergeConfiguration, tokenizer: TokenizerInfo, folder: str) -> None:
    """Write the tokenizer that a recipe asks for, with the recipe's chat template."""
    mergekit_merge._set_chat_template(tokenizer.tokenizer, config)
    tokenizer.tokenizer.save_pretrained(folder)


def chat_template(config: MergeConfiguration) -> str | None:
    """Return the text of a recipe's `chat_template:`: its own, one of mergekit's, or the inputs' own."""
    holder = SimpleNamespace(chat_template=None)
    mergekit_merge._set_chat_template(holder, config)
    text: str | None = holder.chat_template
    return text


def raw_loader(path: str) -> Any:
    """Return the loader by which `mergekit-pytorch` reads a file; its cache is one of its own."""
    from mergekit.scripts import merge_raw_pytorch

    # Under `python -m` the running command is another module than the importable one.
    running = getattr(sys.modules.get("__main__"), "SimpleLoaderCache", None)
    return (running or merge_raw_pytorch.SimpleLoaderCache)().get(path)


def open_models(models: Iterable[ModelReference], options: MergeOptions) -> None:
    """Have mergekit download and open checkpoints, so that their values can be looked at before the work.

    Args:
        models: what to open; mergekit keeps the options of its loaders by thread, so none is of use too.
        options: mergekit's own.

    Raises:
        InputError: a model cannot be downloaded.
    """
    LoaderCache().setup(options=options)
    for model in models:
        _open(model)


def _open(model: ModelReference) -> None:
    try:
        LoaderCache().get(model)
    except (HfHubHTTPError, ConnectionError) as error:
        raise InputError(
            f"model {model} could not be downloaded ({error}); run the same command again: what has "
            "arrived is not fetched again"
        ) from error


def folder_of(model: ModelReference) -> str:
    """Return where the files of a checkpoint lie that mergekit has opened."""
    return str(LoaderCache().get(model).index.base_path)


class RenamedTensors(LazyTensorLoader):
    """A loader that knows the tensors of another by names of its own."""

    def __init__(self, stored: LazyTensorLoader, names: Mapping[str, str]) -> None:
        """Take a loader, and its names by the new ones."""
        paths = {name: stored.index.tensor_paths[old] for name, old in names.items()}
        shards = [
            ShardInfo(shard.filename, [name for name in names if paths[name] == shard.filename])
            for shard in stored.index.shards
        ]
        super().__init__(
            dataclasses.replace(stored.index, tensor_paths=paths, shards=shards), stored.lazy_unpickle
        )
        self.stored, self.names = stored, dict(names)

    def get_tensor(
        self,
        key: str,
        device: str = "cpu",
        aliases: list[str] | None = None,
        raise_on_missing: bool = True,
    ) -> Tensor | None:
        """Return one tensor."""
        others = [self.names.get(alias, alias) for alias in aliases or ()]
        tensor: Tensor | None = self.stored.get_tensor(
            self.names.get(key, key), device, others or None, raise_on_missing
        )
        return tensor

    def flush(self) -> None:
        """Let go of the open file."""
        self.stored.flush()


def rename_tensors(model: ModelReference, names: Mapping[str, str]) -> None:
    """Have mergekit know the tensors of an opened checkpoint by other names.

    Args:
        model: the checkpoint.
        names: the names in its files by the new ones; empty for those in its files.
    """
    stored = stored_loader(model)
    LoaderCache.loaders[model] = RenamedTensors(stored, names) if names else stored


def stored_loader(model: ModelReference) -> LazyTensorLoader:
    """Return the loader of a checkpoint under the names in its files."""
    loader = LoaderCache().get(model)
    return loader.stored if isinstance(loader, RenamedTensors) else loader


def loader_of(model: ModelReference) -> Any | None:
    """Return the loader of a checkpoint that mergekit has opened, None where it has not."""
    return LoaderCache.loaders.get(model)
