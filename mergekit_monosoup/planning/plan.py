"""A plan: everything that can be known of a merge before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.checkpoint.naming import with_common_names
from mergekit_monosoup.checkpoint.output import free_bytes
from mergekit_monosoup.errors import AdapterError, InputError, UnsupportedAdapterError
from mergekit_monosoup.planning.catalogue import Method, read_methods
from mergekit_monosoup.planning.companions import check_files_from
from mergekit_monosoup.planning.estimate import Estimate, calibrate, estimate
from mergekit_monosoup.planning.inputs import check_inputs, check_output
from mergekit_monosoup.planning.layout import in_order, plan_tensors
from mergekit_monosoup.planning.lineage import check_lineage
from mergekit_monosoup.planning.models import parse_reference, read_models
from mergekit_monosoup.planning.modules import plan_modules
from mergekit_monosoup.planning.planned import PlannedTensor
from mergekit_monosoup.planning.problems import Problems, nearest, short
from mergekit_monosoup.planning.recipe import Recipe, check_shape, read_recipe
from mergekit_monosoup.planning.settings import check_filters, check_parameters


@dataclass(frozen=True)
class PlanOptions:
    """What the command line says beside the recipe."""

    out: Path | None = None
    overwrite: bool = False
    allow_crimes: bool = False
    truncate_embeddings: bool = False
    resume: bool = False
    """What an interrupted merge has left may lie beside the output folder."""
    force_base: bool = False
    """Merge although values and cards say that the base is none."""
    files_from: str | None = None
    """Model whose files go beside the weights; absent: the first fine-tuned one."""
    costs: bool = True
    """Whether to calibrate and estimate."""


@dataclass(frozen=True)
class Plan:
    """What the merge will do, what stands in its way, and what it costs."""

    problems: Problems
    method: Method | None
    models: Mapping[str, Checkpoint]
    tensors: Sequence[PlannedTensor]
    estimate: Estimate | None
    free_bytes: float

    @property
    def output_bytes(self) -> float:
        """Size of the output's weights."""
        return sum(tensor.write_bytes for tensor in self.tensors)


def make_plan(text: str, options: PlanOptions | None = None) -> Plan:
    """Plan a recipe.

    Args:
        text: the recipe's YAML.
        options: of the command line.

    Raises:
        ConfigurationError: the recipe is not a YAML mapping.
    """
    options = options or PlanOptions()
    problems = Problems()
    recipe = read_recipe(text, problems)
    check_shape(recipe, problems)
    methods = read_methods(str(recipe.data.get("merge_method")))
    method = _method(recipe, methods, problems)
    if method is not None:
        check_parameters(recipe, method, methods, problems)
    models: dict[str, Checkpoint] = {}
    tensors: list[PlannedTensor] = []
    # Without a sound recipe, further findings would only be its echoes.
    if not problems.errors and method is not None:
        models = read_models(recipe, problems)
        if not problems.errors:
            check_inputs(recipe, method, models, problems)
        if not problems.errors:
            models = _with_common_names(recipe, models, options, problems)
        if not problems.errors:
            check_lineage(recipe, method, models, problems, force=options.force_base)
            tensors = plan_tensors(
                recipe,
                method,
                models,
                problems,
                allow_crimes=options.allow_crimes,
                truncate_embeddings=options.truncate_embeddings,
            )
            if options.files_from is not None:
                shapes = {tensor.tensor: tensor.shape for tensor in tensors}
                check_files_from(options.files_from, recipe, shapes, problems)
            if tensors and not problems.errors:
                tensors += plan_modules(recipe, method, models, problems)
            check_filters(recipe, [_as_filtered(tensor.tensor) for tensor in tensors], problems)
    _check_adapters(models, problems)
    where = options.out or Path.cwd()
    free = free_bytes(where)
    if options.out is not None:
        needed = sum(tensor.write_bytes for tensor in tensors)
        check_output(
            options.out, needed, models, problems, overwrite=options.overwrite, resume=options.resume
        )
    cost = estimate(tensors, calibrate()) if tensors and options.costs else None
    return Plan(problems, method, models, tensors, cost, free)


def _as_filtered(tensor: str) -> str:
    """Return what filters see of a name: of a module's tensor a point behind its folder."""
    return ".".join(tensor.rsplit("/", 1))


def _method(recipe: Recipe, methods: Mapping[str, Method], problems: Problems) -> Method | None:
    name = recipe.data.get("merge_method")
    if not isinstance(name, str):
        return None
    method = methods.get(name)
    if method is None:
        problems.error(
            f"unknown merge method {short(name)}{nearest(name, methods)}", recipe.line("merge_method")
        )
    return method


def _with_common_names(
    recipe: Recipe, models: Mapping[str, Checkpoint], options: PlanOptions, problems: Problems
) -> dict[str, Checkpoint]:
    if options.allow_crimes:
        return dict(models)
    ordered = in_order(recipe, models)
    value = recipe.data.get("base_model")
    base = models[str(parse_reference(value))] if value is not None else None
    try:
        renamed, notes = with_common_names(ordered, base)
    except InputError as error:
        problems.error(str(error))
        return dict(models)
    for note in notes:
        problems.warning(note)
    by_name = {model.checkpoint.name: model.checkpoint for model in renamed}
    return {name: by_name[name] for name in models}


def _check_adapters(models: Mapping[str, Checkpoint], problems: Problems) -> None:
    """Warn of local adapters that are not read beside their base but merged by peft first."""
    for name, checkpoint in models.items():
        folder = Path(checkpoint.adapter or "")
        if checkpoint.adapter is None or not folder.is_dir():
            continue
        # Not before an adapter is met: it brings peft.
        from mergekit_monosoup.lora.adapter import read_config
        from mergekit_monosoup.lora.variants import refuse_nonlinear

        try:
            refuse_nonlinear(read_config(str(folder), folder), str(folder))
        except UnsupportedAdapterError:
            problems.warning(
                f"the adapter of {name} is not linear LoRA: peft merges it into a copy of the whole base, "
                "which is removed in the end"
            )
        except AdapterError:
            # Said where its header is read.
            continue
