"""What cannot be merged is refused with its name, and nothing is written as if it were fine."""

from __future__ import annotations

import re

import pytest
import torch
from checkpoints import copy_with_tensors, edit_config, load_tensors
from commands import (
    assert_nothing_finished,
    command_line,
    recipe,
    refuse,
    run,
    write_config,
)

from mergekit_monosoup.errors import MissingBaseError, MonoSoupError, NonFiniteError, ParameterError

pytestmark = pytest.mark.usefixtures("registered")

MATRIX = "model.layers.1.mlp.up_proj.weight"
VECTOR = "model.layers.2.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


def altered(source, folder, changes):
    """A copy of a checkpoint with some tensors replaced, or removed where None."""
    tensors = load_tensors(source) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return copy_with_tensors(source, folder, kept)


def test_no_base(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    error = refuse(tmp_path, recipe(None, models.tuned[0]))
    assert isinstance(error, MissingBaseError)
    assert "base_model" in str(error)


def test_nothing_but_the_base(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    refuse(tmp_path, recipe(models.base, models.base))


@pytest.mark.parametrize("which", ["base", "tuned"])
@pytest.mark.parametrize("name", [MATRIX, VECTOR])
def test_a_missing_tensor(tmp_path, family, which, name):
    models = family("qwen3-tied", "bf16")
    source = {"base": models.base, "tuned": models.tuned[0]}
    source[which] = altered(source[which], tmp_path / "model", {name: None})
    error = refuse(tmp_path, recipe(source["base"], source["tuned"]))
    assert name in str(error)
    assert str(source[which]) in str(error)


@pytest.mark.parametrize(
    ("name", "shape"), [(MATRIX, (72, 39)), (VECTOR, (39,)), (VECTOR, (1,)), (EMBEDDING, (90, 40))]
)
def test_shapes_that_differ(tmp_path, family, name, shape):
    models = family("qwen3-tied", "bf16")
    changed = torch.ones(shape, dtype=torch.bfloat16)
    folder = altered(models.tuned[0], tmp_path / "tuned", {name: changed})
    error = str(refuse(tmp_path, recipe(models.base, folder)))
    assert name in error
    for expected in (shape, tuple(load_tensors(models.base)[name].shape)):
        assert re.search(r"\D+".join(map(str, expected)), error), f"{expected} not in {error}"
    assert name != EMBEDDING or "tokenizer" in error


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", [MATRIX, VECTOR, EMBEDDING])
@pytest.mark.parametrize("which", ["base", "tuned"])
def test_values_that_are_not_finite(tmp_path, family, which, name, value):
    models = family("qwen3-tied", "bf16")
    source = {"base": models.base, "tuned": models.tuned[0]}
    bad = load_tensors(source[which])[name].clone()
    bad.view(-1)[7] = float(value)
    source[which] = altered(source[which], tmp_path / "model", {name: bad})
    error = refuse(tmp_path, recipe(source["base"], source["tuned"]), "--out-shard-size", "9k")
    assert isinstance(error, NonFiniteError)
    assert name in str(error)
    assert str(source[which]) in str(error)


@pytest.mark.parametrize("parameters", [{"edit": False}, {"alpha": 0}, {"mixing": "low"}], ids=str)
@pytest.mark.parametrize("name", [MATRIX, VECTOR])
def test_values_that_are_not_finite_whatever_is_done_with_them(tmp_path, family, name, parameters):
    """The same inf in both models, so that their difference is NaN and a copy would be inf."""
    models = family("qwen3-tied", "fp16")
    bad = load_tensors(models.base)[name].clone()
    bad.view(-1)[0] = float("inf")
    base = altered(models.base, tmp_path / "base", {name: bad})
    tuned = altered(models.tuned[0], tmp_path / "tuned", {name: bad})
    error = refuse(tmp_path, recipe(base, tuned, parameters=parameters))
    assert isinstance(error, NonFiniteError)
    assert name in str(error)


def test_the_model_with_the_bad_value_is_named_among_several(tmp_path, family):
    models = family("qwen3-tied", "fp32")
    bad = load_tensors(models.tuned[1])[MATRIX].clone()
    bad[0, 0] = float("nan")
    second = altered(models.tuned[1], tmp_path / "second", {MATRIX: bad})
    error = str(refuse(tmp_path, recipe(models.base, models.tuned[0], second)))
    assert MATRIX in error
    assert str(second) in error
    assert str(models.tuned[0]) not in error


def quantise(tensors):
    """Matrices as int8 with a scale per row, in the manner of bitsandbytes."""
    result = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "proj" in name:
            scale = tensor.float().abs().amax(dim=1, keepdim=True) / 127
            result[name] = (tensor.float() / scale).round().to(torch.int8)
            result[name.replace(".weight", ".SCB")] = scale[:, 0]
        else:
            result[name] = tensor
    return result


@pytest.mark.parametrize("which", ["base", "tuned", "both"])
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "undeclared"])
def test_quantised_weights(tmp_path, family, which, declared):
    models = family("qwen3-tied", "bf16")
    source = {"base": models.base, "tuned": models.tuned[0]}
    for name in ("base", "tuned"):
        if which in (name, "both"):
            tensors = quantise(load_tensors(source[name]))
            source[name] = copy_with_tensors(source[name], tmp_path / name, tensors)
            if declared:
                method = {"quant_method": "bitsandbytes", "load_in_8bit": True}
                edit_config(source[name], quantization_config=method)
    error = refuse(tmp_path, recipe(source["base"], source["tuned"]))
    assert re.search("quanti[sz]ed", str(error)), error
    assert isinstance(error, MonoSoupError)


OUT_OF_RANGE = [
    ("energy", 0),
    ("energy", -0.1),
    ("energy", 1.5),
    ("energy", float("nan")),
    ("energy", "most"),
    ("alpha", -0.5),
    ("alpha", float("inf")),
    ("alpha", float("nan")),
    ("alpha", "all"),
    ("mixing", "monosup"),
    ("mixing", 2),
    ("edit", "perhaps"),
    ("min_relative_update", -1e-3),
    ("min_relative_update", float("nan")),
]
RANGES = {
    "energy": r"0.*1",
    "alpha": r"0",
    "mixing": r"monosoup.*decay.*alignment.*uniform.*high.*low",
    "edit": r"(?i)true.*false",
    "min_relative_update": r"0",
}


def of_nothing_but_nan(source, folder):
    """A checkpoint that would be refused for its values as soon as one tensor was looked at."""
    tensors = {name: torch.full_like(t, float("nan")) for name, t in load_tensors(source).items()}
    return copy_with_tensors(source, folder, tensors)


@pytest.mark.parametrize(("parameter", "value"), OUT_OF_RANGE)
@pytest.mark.parametrize("form", ["global", "filter", "gradient"])
def test_values_out_of_range(tmp_path, family, parameter, value, form):
    """Refused before any tensor is loaded: a look at one would be another error."""
    models = family("qwen3-tied", "bf16")
    base, tuned = (
        of_nothing_but_nan(folder, tmp_path / name)
        for name, folder in (("base", models.base), ("tuned", models.tuned[0]))
    )
    good = {"mixing": "monosoup", "edit": True}.get(parameter, 1.0)
    setting = {
        "global": value,
        "filter": [{"filter": "layers.2.mlp", "value": value}, {"value": good}],
        "gradient": [good, value],
    }[form]
    error = refuse(tmp_path, recipe(base, tuned, parameters={parameter: setting}))
    assert isinstance(error, ParameterError), repr(error)
    text = str(error)
    assert parameter in text
    assert str(value) in text
    assert re.search(RANGES[parameter], text.replace(str(value), "", 1)), text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "heavy"])
def test_weights_out_of_range(tmp_path, family, value):
    models = family("qwen3-tied", "bf16")
    base, *tuned = (
        of_nothing_but_nan(folder, tmp_path / str(index)) for index, folder in enumerate(models.folders)
    )
    config = recipe(base, *tuned)
    config["models"][1]["parameters"] = {"weight": value}
    error = refuse(tmp_path, config)
    assert isinstance(error, ParameterError), repr(error)
    assert "weight" in str(error)
    assert str(value) in str(error)


def test_weights_that_sum_to_zero(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    error = refuse(tmp_path, recipe(models.base, *models.tuned, parameters={"weight": 0}))
    assert isinstance(error, ParameterError), repr(error)
    assert "weight" in str(error)


@pytest.mark.slow
def test_a_real_process_fails_and_says_why(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    bad = load_tensors(models.tuned[0])[MATRIX].clone()
    bad[3, 4] = float("nan")
    tuned = altered(models.tuned[0], tmp_path / "tuned", {MATRIX: bad})
    file = write_config(tmp_path, recipe(models.base, tuned))
    out = tmp_path / "out"
    done = run(
        [*command_line("mergekit-yaml"), str(file), str(out), "--out-shard-size", "9k"],
        tmp_path,
        check=False,
    )
    assert done.returncode != 0
    assert "NonFiniteError" in done.stdout
    assert MATRIX in done.stdout
    assert_nothing_finished(out)
