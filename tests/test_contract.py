"""What every merge method of this package keeps to, whatever it computes."""

from __future__ import annotations

import pytest
import torch
from mergekit import merge_methods
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.api import merge_state_dicts
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask, TensorDictWrapper
from rounding import as_float64
from safetensors.torch import save_file

from mergekit_monosoup.errors import ConfigurationError, MissingTensorError
from mergekit_monosoup.registry import method_names, our_methods

pytestmark = pytest.mark.usefixtures("registered")

METHODS = method_names()
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = {
    "scalar": (),
    "bias": (12,),
    "empty": (0, 6),
    "linear": (10, 14),
    "row": (1, 9),
    "experts": (3, 6, 8),
    "convolution": (8, 3, 3, 3),
    "convolution3d": (4, 2, 2, 2, 2),
}
FEWEST = {"monosoup": 1, "dg_hard": 1, "model_stock_stable": 2, "sfgs": 1}


def test_every_method_is_in_the_table():
    assert set(METHODS) == set(FEWEST)


def tensors(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


def moved(base, seed, size=0.05):
    """A fine-tune; the updates of two of them have a cosine of about 1/2."""
    common, own = tensors(torch.float64, 99), tensors(torch.float64, seed)
    return {name: (w0.double() + size * (common[name] + own[name])).to(w0.dtype) for name, w0 in base.items()}


def merged(method, base, *tuned, **parameters):
    return merge_state_dicts([base, *tuned], method, base=0, parameters=parameters)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_shapes_dtypes_and_inputs_stay(method, dtype, count):
    if count < FEWEST[method]:
        pytest.skip("refused, see below")
    base = tensors(dtype)
    tuned = [moved(base, seed) for seed in range(1, count + 1)]
    before = [{name: tensor.clone() for name, tensor in model.items()} for model in (base, *tuned)]
    result = merged(method, base, *tuned)
    for name, tensor in result.items():
        assert tensor.shape == base[name].shape
        assert tensor.dtype == dtype
        assert tensor.isfinite().all()
    for model, copy in zip((base, *tuned), before, strict=True):
        assert all(torch.equal(model[name], copy[name]) for name in model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_updates_give_the_base(method, dtype):
    base = tensors(dtype)
    result = merged(method, base, *({name: t.clone() for name, t in base.items()} for _ in range(3)))
    assert all(torch.equal(result[name], base[name]) for name in base)


@pytest.mark.parametrize("method", METHODS)
def test_one_zero_update_among_others(method):
    base = tensors()
    # All of these updates is noise to dg_hard.
    parameters = {"threshold_scale": 0.3} if method == "dg_hard" else {}
    result = merged(method, base, moved(base, 1), base, moved(base, 2), **parameters)
    assert all(tensor.isfinite().all() for tensor in result.values())
    assert not torch.equal(result["linear"], base["linear"])


@pytest.mark.parametrize("method", METHODS)
def test_opposite_updates(method):
    """They cancel, in the average or by being refused; nothing is thrown past either of them."""
    base = tensors(torch.float64)
    there = moved(base, 1)
    back = {name: 2 * base[name] - tensor for name, tensor in there.items()}
    result = merged(method, base, there, back)
    # sfgs leaves out what opposes its first; the others average to nothing.
    expected = there if method == "sfgs" else base
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [2, 5])
def test_identical_checkpoints_count_as_one(method, dtype, count):
    base = tensors(dtype)
    one = moved(base, 1)
    result = merged(method, base, *([one] * count))
    expected = merged(method, base, one) if FEWEST[method] == 1 else one
    for name, tensor in result.items():
        reach = float((one[name].double() - base[name].double()).abs().max()) if base[name].numel() else 0.0
        tolerance = 5e-5 * reach + torch.finfo(dtype).eps * float(tensor.double().abs().max() if reach else 1)
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_too_few_checkpoints_are_refused_by_name(method):
    base = tensors()
    with pytest.raises(ConfigurationError, match=method):
        merged(method, base)
    if FEWEST[method] == 2:
        with pytest.raises(ConfigurationError, match="two"):
            merged(method, base, moved(base, 1))


@pytest.mark.parametrize("method", METHODS)
def test_order_of_five_checkpoints_does_not_matter_to_their_average(method):
    if method == "sfgs":
        pytest.skip("takes candidates in order, by definition")
    base = tensors()
    tuned = [moved(base, seed) for seed in range(1, 6)]
    result, other = merged(method, base, *tuned), merged(method, base, *tuned[::-1])
    for name in base:
        torch.testing.assert_close(result[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_vocabularies_of_different_size_are_refused_with_the_remedy(method):
    models = [{"embed": torch.randn(rows, 6), "w": torch.randn(5, 5)} for rows in (20, 22, 20)]
    with pytest.raises(ValueError, match=r"size mismatch for embed: \[\(20, 6\), \(22, 6\), \(20, 6\)\]"):
        merged(method, *models)


@pytest.fixture
def checkpoints(monkeypatch, tmp_path):
    """Base `b` and three fine-tunes, known to mergekit's loader cache."""
    base = {name: tensor for name, tensor in tensors().items() if tensor.numel()}
    models = {"b": base} | {f"m{seed}": moved(base, seed) for seed in (1, 2, 3)}
    loaders = {}
    for name, stored in models.items():
        (tmp_path / name).mkdir()
        save_file(stored, tmp_path / name / "model.safetensors")
        loaders[ModelReference.parse(name)] = LazyTensorLoader.from_disk(str(tmp_path / name))
    monkeypatch.setattr(LoaderCache, "loaders", loaders)
    return models


def execute(method, checkpoints, present, name="linear", optional=True):
    """Run mergekit's task for one tensor that only some of the checkpoints have."""
    references = [ModelReference.parse(key) for key in checkpoints]
    spec = merge_methods.get(method).spec
    merge_methods.get(method).validate_inputs(references, references[0], group_name="m.slices[0]")
    task = ExecuteMergeMethodTask(
        method_name=method,
        gather_tensors=TensorDictWrapper(tensors=ImmutableMap({})),
        model_order=tuple(references),
        base_model=references[0],
        output_weight=WeightInfo(name=name, optional=optional),
        parameters={p.name: p.validate(p.default) for p in spec.shared_parameters},
        input_parameters={
            reference: {p.name: p.validate(p.default) for p in spec.input_parameters}
            for reference in references
        },
    )
    given = {reference: checkpoints[str(reference)][name] for reference in references}
    return task.execute(tensors={key: value for key, value in given.items() if str(key) in present})


@pytest.mark.parametrize("method", METHODS)
class TestOptionalTensors:
    def test_in_the_base_alone(self, method, checkpoints):
        assert torch.equal(execute(method, checkpoints, ["b"]), checkpoints["b"]["linear"])

    def test_in_the_base_and_one_fine_tune(self, method, checkpoints):
        result = execute(method, checkpoints, ["b", "m1"])
        assert result.shape == checkpoints["b"]["linear"].shape
        assert result.isfinite().all()
        if method == "model_stock_stable":
            assert torch.equal(result, checkpoints["b"]["linear"])

    def test_in_the_base_and_some_fine_tunes(self, method, checkpoints):
        result = execute(method, checkpoints, ["b", "m1", "m3"])
        # All of these updates is noise to dg_hard.
        assert torch.equal(result, checkpoints["b"]["linear"]) == (method == "dg_hard")
        whole = execute(method, checkpoints, ["b", "m1", "m2", "m3"])
        largest = max(abs(as_float64(checkpoints[k]["linear"])).max() for k in checkpoints)
        for tensor in (result, whole):
            assert abs(as_float64(tensor)).max() <= 2 * largest

    def test_not_in_the_base(self, method, checkpoints):
        with pytest.raises(MissingTensorError, match="linear"):
            execute(method, checkpoints, ["m1", "m2", "m3"])


@pytest.mark.parametrize("method", our_methods(), ids=METHODS)
def test_specification_is_complete(method):
    spec = method.spec
    assert spec.reference_url.startswith("https://arxiv.org/abs/")
    assert spec.pretty_name
    for parameter in spec.parameters:
        assert not parameter.required
        assert parameter.description
