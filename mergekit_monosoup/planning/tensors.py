"""What will happen to each tensor of the output, from headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_monosoup.checkpoint.headers import Checkpoint, StoredTensor, bytes_per_entry
from mergekit_monosoup.checkpoint.layout import Weight
from mergekit_monosoup.checkpoint.naming import gradient_positions, weight_names
from mergekit_monosoup.checkpoint.storage import promoted_dtype, wide_tensors
from mergekit_monosoup.checkpoint.vocabulary import rows_kept
from mergekit_monosoup.errors import ParameterError
from mergekit_monosoup.planning.architecture import Architecture
from mergekit_monosoup.planning.catalogue import Method
from mergekit_monosoup.planning.planned import OutputSlice, PlannedTensor, Source
from mergekit_monosoup.planning.problems import Problems
from mergekit_monosoup.planning.recipe import Recipe
from mergekit_monosoup.planning.rows import PlannedRows, merged_shape
from mergekit_monosoup.planning.settings import resolve, split_rule
from mergekit_monosoup.spectral.matrix import MatrixView, choose_view


class TensorPlanner:
    """Walk through the output as mergekit's planner does and decide each tensor's fate."""

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        architecture: Architecture | None,
        problems: Problems,
        truncate_embeddings: bool = False,
        models: Sequence[Checkpoint] = (),
    ) -> None:
        self.recipe = recipe
        self.method = method
        self.architecture = architecture
        self.problems = problems
        self.truncate_embeddings = truncate_embeddings
        self.rows = PlannedRows(recipe.data, models, problems, truncate=truncate_embeddings)
        self.wide = wide_tensors(models[0].tensors.values()) if models and method.ours else frozenset()
        self.planned: list[PlannedTensor] = []
        self.asked: dict[str, list[Weight]] = {}
        self.lacking = False
        self.some_lack = False
        """Whether a checkpoint lacks an optional tensor that another has."""
        self._by_class: dict[str, Mapping[str, str]] = {}
        self.misshapen = ""
        self._used: dict[str, set[str]] = {}

    def plan_module(
        self, name: str, slices: Sequence[OutputSlice], parameters: Mapping[str, Any] | None
    ) -> None:
        """Plan the tensors of one module, in mergekit's order."""
        if self.architecture is None or not slices:
            return
        module = self.architecture.modules[name]
        top = self.recipe.data.get("parameters")
        for weights, part in self._ends(module, slices[0], before=True):
            self._plan(weights, part, [part.parameters, parameters, top], 0.0)
        index = 0
        for part in slices:
            count = part.sources[0].end - part.sources[0].first
            for offset in range(count):
                t = offset / (count - 1) if count > 1 else 1.0
                out = module.layer(index, part.sources[0].checkpoint)
                per_source = [module.layer(s.first + offset, s.checkpoint) for s in part.sources]
                for position, weight in enumerate(out):
                    group = [(weight, [layer[position] for layer in per_source])]
                    self._plan(group[0], part, [part.parameters, parameters, top], t)
                index += 1
        for weights, part in self._ends(module, slices[-1], before=False):
            self._plan(weights, part, [part.parameters, parameters, top], 0.0)

    @staticmethod
    def _ends(
        module: Any, part: OutputSlice, *, before: bool
    ) -> Iterator[tuple[tuple[Weight, list[Weight]], OutputSlice]]:
        make = module.before if before else module.after
        for weight in make(part.sources[0].checkpoint):
            yield (weight, [weight] * len(part.sources)), part

    def plan_names(
        self,
        part: OutputSlice,
        weights: Sequence[Weight],
    ) -> None:
        """Plan by the names in the headers.

        Args:
            part: the whole model.
            weights: what the output has.
        """
        top = self.recipe.data.get("parameters")
        positions = gradient_positions([weight.name for weight in weights])
        for weight in weights:
            inputs = [weight] * len(part.sources)
            self._plan((weight, inputs), part, [part.parameters, top], positions[weight.name])

    def lost(self, checkpoint: Checkpoint) -> list[str]:
        """Return the tensors of a checkpoint that nothing has been planned with."""
        used = self._used.get(checkpoint.name)
        return sorted(set(weight_names(checkpoint)) - used) if used else []

    @property
    def vocabulary_axes(self) -> dict[str, int | None]:
        """The vocabulary axes of the weights so far, by name."""
        return {w.name: w.vocabulary_axis for weights in self.asked.values() for w in weights}

    def _plan(
        self,
        weights: tuple[Weight, list[Weight]],
        part: OutputSlice,
        blocks: list[Mapping[str, Any] | None],
        t: float,
    ) -> None:
        out, inputs = weights
        found: list[tuple[Source, StoredTensor]] = []
        missing: list[Source] = []
        tied_only = True
        for source, weight in zip(part.sources, inputs, strict=True):
            self.asked.setdefault(source.checkpoint.name, []).append(weight)
            stored = self._find(source.checkpoint, weight)
            if stored is None:
                missing.append(source)
            else:
                found.append((source, stored))
                tied_only = tied_only and stored.name in weight.tied_names
        if out.optional and (not found or tied_only):
            return
        self.some_lack = self.some_lack or bool(missing)
        if self.method.ours and self._is_left_out(out, inputs, found, missing, part):
            for source, stored in found:
                self._used.setdefault(source.checkpoint.name, set()).add(stored.name)
            if any(stored.name == out.name for _, stored in found):
                self.problems.warning(f"{out.name} left out: the fine-tuned model ties it to its embedding")
            return
        if missing and not self._may_miss(out, missing, found, part):
            return
        for source, stored in found:
            self._used.setdefault(source.checkpoint.name, set()).add(stored.name)
        shape = self._shape(out, found, part)
        if shape is None:
            return
        self._add(out, found, part, blocks, t, shape)

    @staticmethod
    def _is_left_out(
        out: Weight,
        inputs: list[Weight],
        found: list[tuple[Source, StoredTensor]],
        missing: list[Source],
        part: OutputSlice,
    ) -> bool:
        """Say whether the first fine-tuned model, whose layout the output has, is without the tensor."""
        first = next((i for i, s in enumerate(part.sources) if s.checkpoint is not part.base), None)
        if first is None or not found:
            return False
        if part.sources[first] in missing:
            return out.optional and all(source.checkpoint is not part.base for source, _ in found)
        stored = next(tensor for source, tensor in found if source is part.sources[first])
        return stored.name in inputs[first].tied_names

    def _find(self, checkpoint: Checkpoint, weight: Weight) -> StoredTensor | None:
        for name in (weight.name, *weight.aliases, *weight.tied_names):
            if name in checkpoint.tensors:
                return checkpoint.tensors[name]
        # Not for what may be absent: nearly every plan asks for some such tensor.
        if weight.optional or not checkpoint.tensors:
            return None
        stored = self._renamed(checkpoint).get(weight.name)
        return checkpoint.tensors[stored] if stored is not None else None

    def _renamed(self, checkpoint: Checkpoint) -> Mapping[str, str]:
        """Return the stored names by those that transformers gives them as it loads the checkpoint."""
        if checkpoint.name not in self._by_class:
            # Slow to import, and only a checkpoint that lacks a tensor leads here.
            from mergekit_monosoup.checkpoint.coverage import canonical_names

            kind = checkpoint.config.get("model_type")
            self._by_class[checkpoint.name] = canonical_names(checkpoint.tensors, kind)
        return self._by_class[checkpoint.name]

    def _may_miss(
        self,
        out: Weight,
        missing: list[Source],
        found: list[tuple[Source, StoredTensor]],
        part: OutputSlice,
    ) -> bool:
        """Say whether the tensor can be made although some models lack it; note the error if not."""
        lacking = missing[0].checkpoint
        if not lacking.shapes_known:
            return bool(found)
        if out.optional and (part.base is not None or not self.method.ours):
            return bool(found)
        if not out.optional and _converted(lacking, out):
            message = f"converted as {lacking.name} is loaded, so shapes are not checked"
            self.problems.about(out.name, message, severity="warning")
            return bool(found)
        self.lacking = True
        role = " (the base)" if lacking is part.base else ""
        self.problems.about(
            out.name, f"missing in {lacking.name}{role}; use checkpoints of the same architecture", part.line
        )
        return False

    @staticmethod
    def _layout(found: list[tuple[Source, StoredTensor]], part: OutputSlice) -> StoredTensor:
        """Return the tensor whose rows the output has: that of the first fine-tuned model."""
        return next((t for s, t in found if s.checkpoint is not part.base), found[0][1])

    def _shape(
        self, out: Weight, found: list[tuple[Source, StoredTensor]], part: OutputSlice
    ) -> tuple[int, ...] | None:
        shapes = {stored.shape for _, stored in found}
        first = found[0][1].shape
        if len(shapes) == 1:
            return first
        axis = out.vocabulary_axis
        listed = ", ".join(f"{source.checkpoint.name} {list(stored.shape)}" for source, stored in found)
        rest = {shape[:axis] + shape[axis + 1 :] for shape in shapes} if axis is not None else shapes
        if axis is None or len(rest) > 1:
            # Those of the first stand for all.
            self.misshapen = self.misshapen or listed
            message = f"different shapes ({self.misshapen}); use checkpoints of the same architecture"
            self.problems.about(out.name, message, part.line)
            return None
        if self.truncate_embeddings:
            return min(shapes, key=lambda shape: shape[axis])
        data = self.recipe.data
        if self.rows.by_row:
            return self._layout(found, part).shape
        based = [stored.shape for source, stored in found if source.checkpoint is part.base]
        source_of = data.get("tokenizer") or {}
        wanted = source_of.get("source") if isinstance(source_of, dict) else data.get("tokenizer_source")
        return based[0] if based and wanted == "base" else max(shapes, key=lambda shape: shape[axis])

    def _add(
        self,
        out: Weight,
        found: list[tuple[Source, StoredTensor]],
        part: OutputSlice,
        blocks: list[Mapping[str, Any] | None],
        t: float,
        shape: tuple[int, ...],
    ) -> None:
        data = self.recipe.data
        dtypes = {stored.dtype for _, stored in found}
        forced = out.force_dtype or ("float32" if self._layout(found, part).name in self.wide else None)
        loaded = forced or data.get("dtype")
        dtype = str(forced or data.get("out_dtype") or loaded or promoted_dtype(dtypes))
        dtype = dtype.removeprefix("torch.")
        action, why = self._action(out, found, part, blocks, t, shape)
        rows = self.rows.shared(out.vocabulary_axis, found)
        if rows is not None and rows.kept:
            why = "; ".join(filter(None, (why, rows_kept(rows.kept))))
        merged = merged_shape(shape, out.vocabulary_axis, rows)
        if action == "copied" and not all(s.is_floating for _, s in found):
            dtype = found[0][1].dtype
        view = self._view(out.name, merged, blocks, t) if action == "edited" else None
        read = sum(s.size * bytes_per_entry(s.dtype) for _, s in found)
        self.planned.append(
            PlannedTensor(
                tensor=out.name,
                action=action,
                shape=shape,
                dtype=dtype,
                view=_written_view(view),
                why=why,
                matrices=view.shape if view is not None else None,
                read_bytes=read,
                write_bytes=math.prod(shape) * bytes_per_entry(dtype),
                inputs=len(found),
            )
        )

    def _action(
        self,
        out: Weight,
        found: list[tuple[Source, StoredTensor]],
        part: OutputSlice,
        blocks: list[Mapping[str, Any] | None],
        t: float,
        shape: tuple[int, ...],
    ) -> tuple[str, str]:
        if not all(stored.is_floating for _, stored in found):
            return "copied", "not floating-point; must be equal in all models"
        tuned = [source for source, _ in found if source.checkpoint is not part.base]
        if not tuned:
            return "copied", "only the base has it"
        if self.method.ours and out.optional and len(tuned) == len(found):
            return "kept", "the base does not have it"
        if not self.method.ours:
            return ("kept", "one input") if len(found) == 1 else ("averaged", f"by {self.method.name}")
        rest = "averaged" if len(tuned) > 1 else "kept"
        if "edit" not in self.method.parameters:
            return rest, f"by {self.method.name}"
        view = self._view(out.name, shape, blocks, t)
        if not view.decomposes:
            return rest, "not a matrix"
        if _is_false(resolve("edit", blocks, out.name, t)):
            return rest, "edit: false"
        fewest = resolve("min_entries", blocks, out.name, t) or 0
        if math.prod(view.shape[1:]) < float(fewest):
            return rest, f"fewer than {fewest} entries"
        threshold = resolve("min_relative_update", blocks, out.name, t)
        why = f"unless its relative update is below {threshold:g}" if _is_positive(threshold) else ""
        try:
            rule = split_rule(self.method, blocks, out.name, t).title
        except ParameterError as error:
            self.problems.error(str(error), self.recipe.line("parameters", "split"))
            return "edited", ""
        where = ""
        if all(source.checkpoint.adapter for source in tuned):
            if not any(_touches(source, stored) for source, stored in found if source in tuned):
                return rest, "no adapter touches it"
            where = "where the adapter touches it" if any(s.checkpoint.touched is None for s in tuned) else ""
        return "edited", "; ".join(filter(None, (rule, where, why)))

    def _view(
        self, name: str, shape: tuple[int, ...], blocks: list[Mapping[str, Any] | None], t: float
    ) -> MatrixView:
        return choose_view(shape, name, resolve("matrix", blocks, name, t) or "auto")


def _touches(source: Source, stored: StoredTensor) -> bool:
    touched = source.checkpoint.touched
    return touched is None or stored.name in touched


def _is_false(value: Any) -> bool:
    return value is not None and str(value).lower() in ("false", "0", "no", "off", "n", "f", "0.0")


def _is_positive(value: Any) -> bool:
    try:
        return value is not None and float(value) > 0
    except ValueError:
        return False


def _written_view(view: MatrixView | None) -> str:
    if view is None:
        return ""
    count, rows, columns = view.shape
    if view.kind == "stack":
        return f"{count} of {rows}x{columns}"
    return f"{rows}x{columns}" if view.kind == "matrix" else f"{rows}x{columns} ({view.kind})"


def _converted(checkpoint: Checkpoint, weight: Weight) -> bool:
    """Ask transformers whether it makes a tensor out of others as it loads the checkpoint."""
    # Slow to import, and only a checkpoint that lacks a tensor leads here.
    from mergekit.architecture.conversion import can_convert_checkpoint_keys

    model_type = checkpoint.config.get("model_type")
    return bool(can_convert_checkpoint_keys(model_type, set(checkpoint.tensors), weight.name))
