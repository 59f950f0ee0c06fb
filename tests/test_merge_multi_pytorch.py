"""`mergekit-multi` and `mergekit-pytorch` with MonoSoup, and the in-memory calls of mergekit."""

from __future__ import annotations

import re

import numpy as np
import oracle
import pytest
import torch
import yaml
from checkpoints import load_tensors, structured_update
from commands import assert_nothing_finished, command_line, invoke, recipe, run, succeed, write_config
from expectations import assert_merged
from rounding import as_float64
from safetensors.torch import load_file, save_file

from mergekit_monosoup.errors import MissingBaseError, NonFiniteError, ParameterError

pytestmark = pytest.mark.usefixtures("registered")


def stages(models):
    """Two edits, and a third merge that averages and edits their results."""
    return [
        {**recipe(models.base, models.tuned[0]), "name": "first"},
        {**recipe(models.base, models.tuned[1], parameters={"energy": 0.8}), "name": "second"},
        recipe(models.base, "first", "second", parameters={"mixing": "uniform", "alpha": 0.5}),
    ]


def assert_stages(models, intermediate, out):
    base = load_tensors(models.base)
    first, second = (load_tensors(intermediate / name) for name in ("first", "second"))
    assert_merged(first, base, [load_tensors(models.tuned[0])])
    assert_merged(second, base, [load_tensors(models.tuned[1])], {"energy": 0.8})
    assert_merged(load_tensors(out), base, [first, second], {"mixing": "uniform", "alpha": 0.5})


def test_multi(tmp_path, family):
    models = family("qwen3-tied", "fp32")
    file = write_config(tmp_path, *stages(models))
    intermediate, out = tmp_path / "intermediate", tmp_path / "out"
    succeed("mergekit-multi", file, "-I", intermediate, "--out-path", out)
    assert_stages(models, intermediate, out)


@pytest.mark.slow
def test_multi_in_a_real_process(tmp_path, family):
    models = family("llama", "bf16")
    file = write_config(tmp_path, *stages(models))
    # Absolute: mergekit's card step takes `intermediate/first` for a repository of the Hub.
    intermediate, out = tmp_path / "intermediate", tmp_path / "out"
    command = [*command_line("mergekit-multi"), file.name]
    command += ["-I", str(intermediate), "--out-path", str(out)]
    run(command, tmp_path)
    assert_stages(models, intermediate, out)


SHAPES = {
    "features.0.weight": (12, 6, 3, 3),
    "features.0.bias": (12,),
    "experts.gate_up_proj": (4, 20, 12),
    "head.weight": (10, 30),
    "head.bias": (10,),
    "wide.weight": (8, 64),
    "scale": (),
}


def random_tensors(seed, dtype=torch.float32, base=None, relative=1e-2):
    """Tensors of a small network that transformers has no architecture for."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in SHAPES.items():
        if base is None:
            value = torch.randn(shape, generator=generator)
        else:
            w0 = base[name].float()
            value = w0 + relative * w0.norm() * structured_update(torch.Size(shape), generator)
        result[name] = value.to(dtype)
    return result


def write_raw(folder, *models, suffix="safetensors"):
    """One file a model, the base first; returns the paths."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"model{index}.{suffix}" for index in range(len(models))]
    for file, tensors in zip(files, models, strict=True):
        if suffix == "safetensors":
            save_file(tensors, file)
        else:
            torch.save(tensors, file)
    return files


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pytorch(tmp_path, dtype, suffix):
    base = random_tensors(0, dtype)
    tuned = random_tensors(1, dtype, base)
    files = write_raw(tmp_path / "in", base, tuned, suffix=suffix)
    out = tmp_path / "out"
    succeed("mergekit-pytorch", write_config(tmp_path, recipe(*files)), out)
    assert_merged(load_file(out / "model.safetensors"), base, [tuned])


def test_pytorch_average_with_weights_filters_and_out_dtype(tmp_path):
    base = random_tensors(0)
    tuned = [random_tensors(seed, base=base) for seed in (1, 2, 3)]
    files = write_raw(tmp_path / "in", base, *tuned)
    config = recipe(
        *files,
        out_dtype="bfloat16",
        parameters={
            "energy": [{"filter": "experts", "value": 0.6}],
            "alpha": 0.75,
            "edit": [{"filter": "head", "value": False}],
        },
    )
    for model, weight in zip(config["models"], (1, 2, 5), strict=True):
        model["parameters"] = {"weight": weight}
    out = tmp_path / "out"
    succeed("mergekit-pytorch", write_config(tmp_path, config), out)

    def settings(name):
        return {
            "weights": [1, 2, 5],
            "alpha": 0.75,
            "energy": 0.6 if "experts" in name else None,
            "edit": "head" not in name,
        }

    merged = load_file(out / "model.safetensors")
    assert_merged(merged, base, tuned, settings, out_dtype=torch.bfloat16)


@pytest.mark.slow
def test_pytorch_in_a_real_process(tmp_path):
    base = random_tensors(0, torch.bfloat16)
    tuned = random_tensors(1, torch.bfloat16, base)
    files = write_raw(tmp_path, base, tuned)
    file = tmp_path / "raw.yml"
    file.write_text(yaml.safe_dump(recipe(*(f.name for f in files))))
    run([*command_line("mergekit-pytorch"), file.name, "out"], tmp_path)
    assert_merged(load_file(tmp_path / "out" / "model.safetensors"), base, [tuned])


def test_pytorch_copies_integer_buffers_on_which_all_agree(tmp_path):
    buffer = {"position_ids": torch.arange(16)}
    base = random_tensors(0)
    tuned = random_tensors(1, base=base)
    files = write_raw(tmp_path / "in", base | buffer, tuned | buffer)
    out = tmp_path / "out"
    succeed("mergekit-pytorch", write_config(tmp_path, recipe(*files)), out)
    merged = load_file(out / "model.safetensors")
    assert torch.equal(merged.pop("position_ids"), buffer["position_ids"])
    assert_merged(merged, base, [tuned])


@pytest.mark.parametrize("which", ["base", "tuned", "both"])
def test_pytorch_refuses_int8_matrices(tmp_path, which):
    base = random_tensors(0)
    tuned = random_tensors(1, base=base)
    name = "head.weight"
    for key, tensors in (("base", base), ("tuned", tuned)):
        if which in (key, "both"):
            tensors[name] = (tensors[name] * 30).clamp(-127, 127).to(torch.int8)
    tuned[name][0, 0] += 1
    files = write_raw(tmp_path / "in", base, tuned)
    out = tmp_path / "out"
    error = invoke("mergekit-pytorch", write_config(tmp_path, recipe(*files)), out).exception
    assert error is not None
    assert_nothing_finished(out)
    assert name in str(error)
    assert re.search(r"quanti[sz]ed|int8", str(error)), error


def refused(tmp_path, files, **keys):
    out = tmp_path / "out"
    config = write_config(tmp_path, recipe(*files, **keys))
    error = invoke("mergekit-pytorch", config, out).exception
    assert error is not None
    assert not isinstance(error, SystemExit)
    assert_nothing_finished(out)
    return error


def test_pytorch_refusals(tmp_path):
    base = random_tensors(0)
    tuned = random_tensors(1, base=base)
    files = write_raw(tmp_path / "in", base, tuned)
    assert isinstance(refused(tmp_path, [None, *files]), MissingBaseError)
    error = refused(tmp_path, files, parameters={"energy": 1.5})
    assert isinstance(error, ParameterError)
    assert all(word in str(error) for word in ("energy", "1.5"))


def test_pytorch_names_the_file_of_a_bad_value(tmp_path):
    base = random_tensors(0)
    tuned = random_tensors(1, base=base)
    tuned["features.0.weight"][3, 2, 1, 0] = float("inf")
    files = write_raw(tmp_path / "in", base, tuned)
    error = refused(tmp_path, files)
    assert isinstance(error, NonFiniteError)
    assert "features.0.weight" in str(error)
    assert "model1.safetensors" in str(error)


@pytest.mark.parametrize("option", [(), ("--tensor-union",)], ids=["strict", "union"])
def test_pytorch_base_without_the_tensor(tmp_path, option):
    base = random_tensors(0)
    tuned = random_tensors(1, base=base)
    del base["wide.weight"]
    files = write_raw(tmp_path / "in", base, tuned)
    out = tmp_path / "out"
    config = write_config(tmp_path, recipe(*files))
    error = invoke("mergekit-pytorch", config, out, *option).exception
    assert error is not None
    assert_nothing_finished(out)
    if option:
        assert "wide.weight" in str(error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 7), (3, 50), (50, 3), (1, 9), (9, 1), (1, 1), (4, 6, 5)])
def test_merge_tensors(shape, dtype):
    from mergekit.merge_methods import merge_tensors

    w0 = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    w1 = (w0 + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    name = "mlp.experts.gate_up_proj" if len(shape) == 3 else "weight"
    merged = merge_tensors([w0, w1], "monosoup", base_index=0, name=name)
    if dtype == torch.float64:
        exact = oracle.monosoup_weight(w0.numpy(), [w1.numpy()])
        assert np.abs(merged.numpy() - exact).max() <= 1e-12 * np.abs((w1 - w0).numpy()).max()
    else:
        assert_merged({"w": merged}, {"w": w0}, [{"w": w1}])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), ()])
def test_tensors_without_a_spectrum_keep_the_fine_tuned_value(shape):
    from mergekit.merge_methods import merge_tensors

    w0, w1 = torch.zeros(shape), torch.ones(shape)
    assert torch.equal(merge_tensors([w0, w1], "monosoup", base_index=0), w1)


def test_inputs_are_left_as_they_were():
    from mergekit.merge_methods import merge_state_dicts

    base = random_tensors(0)
    tuned = [random_tensors(seed, base=base) for seed in (1, 2)]
    before = [{k: t.clone() for k, t in tensors.items()} for tensors in (base, *tuned)]
    merged = merge_state_dicts([base, *tuned], "monosoup", base=0)
    assert_merged(merged, base, tuned)
    for tensors, copies in zip((base, *tuned), before, strict=True):
        assert all(torch.equal(tensors[name], copies[name]) for name in copies)


def test_modules_in_memory():
    """mergekit takes modules too, and passes their parameters on as they are: with gradients."""
    from mergekit.merge_methods import merge_state_dicts

    def module(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(12, 7))

    base, tuned = module(0), module(1)
    merged = merge_state_dicts([base, tuned], "monosoup", base=0)
    detached = {name: tensor.detach() for name, tensor in merged.items()}
    assert_merged(detached, base.state_dict(), [tuned.state_dict()])


def test_strides_do_not_matter():
    from mergekit.merge_methods import merge_tensors

    base = random_tensors(0)["wide.weight"]
    tuned = random_tensors(1, base=random_tensors(0))["wide.weight"]
    expected = merge_tensors([base, tuned], "monosoup", base_index=0)
    strided = merge_tensors([base.t().contiguous().t(), tuned.t().contiguous().t()], "monosoup", base_index=0)
    scale = as_float64(tuned - base)
    assert np.abs(as_float64(strided - expected)).max() <= 1e-6 * np.abs(scale).max()
