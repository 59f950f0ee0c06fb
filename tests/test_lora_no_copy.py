"""`base+adapter` inputs of `mergekit-monosoup merge`: no merged copy, the values of peft's own merge."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import yaml
from adapters import KINDS, base_model, make_adapter
from checkpoints import build_tokenizer
from click.testing import CliRunner
from commands import forget_loaders, run
from lora_merges import exact_updates, lora_warnings, oracle_edit, recipe, write_base
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from mergekit_monosoup import host
from mergekit_monosoup.cli import main
from mergekit_monosoup.merging.adapters import adapters_opened
from mergekit_monosoup.merging.architecture import fitting_architecture
from mergekit_monosoup.merging.units import plan_units
from mergekit_monosoup.methods.merge import Merge

pytestmark = pytest.mark.usefixtures("registered", "fresh_loaders")

SPACING = {"bfloat16": 2.0**-7, "float32": 2.0**-22}


def merge(tmp_path: Path, config: dict, out: str = "out", *options: str) -> dict[str, torch.Tensor]:
    forget_loaders()
    file = tmp_path / f"{out}.yaml"
    file.write_text(yaml.safe_dump(config))
    arguments = ["merge", str(file), str(tmp_path / out), "--no-copy-tokenizer", "--quiet", *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return {k: t for f in (tmp_path / out).glob("*.safetensors") for k, t in load_file(f).items()}


def merged_by_peft(kind: str, adapter: Path, dtype: str) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = base_model(kind).to(getattr(torch, dtype))
        return peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize(
    ("kind", "dtype", "factors"),
    [
        *((k, "bfloat16", "float32") for k in KINDS if k not in ("convolutions", "embeddings")),
        *((k, "float32", "bfloat16") for k in ("plain", "lora-bias", "experts-qwen3", "saved-modules")),
    ],
)
def test_other_methods_get_the_bits_of_a_merge_by_peft(kind, dtype, factors, tmp_path):
    base = write_base(kind, tmp_path / "base", dtype)
    adapter = make_adapter(kind, tmp_path / "adapter", dtype=getattr(torch, factors))
    tensors = merge(tmp_path, {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]})
    want = merged_by_peft(kind, adapter, dtype)
    assert {n for n in tensors if not torch.equal(tensors[n], want[n])} == set()
    assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}


def test_embeddings_are_rounded_once_where_peft_rounds_the_factors_too(tmp_path):
    base = write_base("embeddings", tmp_path / "base")
    adapter = make_adapter("embeddings", tmp_path / "adapter")
    tensors = merge(tmp_path, {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]})
    by_peft = merged_by_peft("embeddings", adapter, "bfloat16")
    name = "model.embed_tokens.weight"
    w0 = base_model("embeddings").bfloat16().state_dict()[name].double()
    want = w0 + torch.from_numpy(exact_updates("embeddings", adapter)[name])
    error, theirs = (tensors[name].double() - want).abs(), (by_peft[name].double() - want).abs()
    assert (error <= SPACING["bfloat16"] / 2 * want.abs() + 1e-9).all()
    assert error.norm() <= theirs.norm()
    assert all(torch.equal(tensors[n], by_peft[n]) for n in tensors if n != name)


@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_other_methods_of_several_adapters(method, tmp_path):
    base = write_base("plain", tmp_path / "base", "float32")
    folders = [make_adapter("plain", tmp_path / f"adapter{i}", seed=i) for i in (1, 2)]
    for i, folder in enumerate(folders):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(base_model("plain"), folder).merge_and_unload()
        model.save_pretrained(tmp_path / f"whole{i}")
    parameters = {"slerp": {"t": 0.3}, "linear": {"weight": 0.5}, "ties": {"weight": 0.5, "density": 0.5}}
    named = {} if method == "linear" else {"base_model": str(base)}

    def config(models: list[str]) -> dict:
        listed = [{"model": model} for model in models]
        return {"merge_method": method, "parameters": parameters[method], "models": listed, **named}

    if method == "slerp":
        named = {"base_model": f"{base}+{folders[0]}"}
    by_factors = merge(tmp_path, config([f"{base}+{folder}" for folder in folders]), "factors")
    if method == "slerp":
        named = {"base_model": str(tmp_path / "whole0")}
    by_copies = merge(tmp_path, config([str(tmp_path / f"whole{i}") for i in range(2)]), "copies")
    assert by_factors.keys() == by_copies.keys()
    for name, want in by_copies.items():
        # Both sum the same numbers, on different numbers of inputs read at once.
        assert torch.allclose(by_factors[name], want, rtol=SPACING["float32"], atol=1e-7), name


def test_a_dtype_of_the_recipe_rounds_after_the_adapter(tmp_path):
    """As from a merged copy: weights are merged as they are stored, then rounded or widened."""
    adapter = make_adapter("plain", tmp_path / "adapter")
    for stored, wanted in (("float32", "bfloat16"), ("bfloat16", "float32")):
        base = write_base("plain", tmp_path / stored, stored)
        config = {
            "merge_method": "passthrough",
            "models": [{"model": f"{base}+{adapter}"}],
            "dtype": wanted,
        }
        tensors = merge(tmp_path, config, f"as-{wanted}")
        want = merged_by_peft("plain", adapter, stored)
        assert all(torch.equal(t, want[n].to(getattr(torch, wanted))) for n, t in tensors.items())


def test_lora_merge_dtype_is_kept_to(tmp_path):
    base = write_base("plain", tmp_path / "base", "float32")
    adapter = make_adapter("plain", tmp_path / "adapter")
    config = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}
    tensors = merge(tmp_path, config, "out", "--lora-merge-dtype", "bfloat16")
    want = merged_by_peft("plain", adapter, "bfloat16")
    assert all(torch.equal(t, want[n]) for n, t in tensors.items())


def _tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("dora", [False, True], ids=["linear", "DoRA"])
def test_nothing_is_written_but_the_result(dora, tmp_path):
    """Measured in a process of its own: its temporary folder, its caches, its home, its working folder."""
    base = write_base("plain", tmp_path / "models" / "base")
    adapter = make_adapter("plain", tmp_path / "models" / "adapter", use_dora=dora)
    places = {name: tmp_path / name for name in ("tmp", "hf", "home", "cwd")}
    for place in places.values():
        place.mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(base, f"{base}+{adapter}")))
    before = _tree(tmp_path)
    command = [sys.executable, "-m", "mergekit_monosoup", "merge", str(tmp_path / "recipe.yaml")]
    env = {"TMPDIR": str(places["tmp"]), "HF_HOME": str(places["hf"]), "HOME": str(places["home"])}
    env |= {"XDG_CACHE_HOME": str(places["home"] / "cache"), "MPLCONFIGDIR": str(tmp_path / "models")}
    done = run([*command, str(tmp_path / "out"), "--no-copy-tokenizer"], places["cwd"], env)
    written = {path for path in _tree(tmp_path) - before if not path.startswith("models/")}
    assert {path.partition(os.sep)[0] for path in written} == {"out"}, sorted(written)
    assert not any("adapter" in path or "cache" in path for path in written), sorted(written)
    weights = [path for path in written if path.endswith((".safetensors", ".bin"))]
    assert weights == ["out/model.safetensors"]
    assert "--lora-merge-cache" not in done.stdout


def test_a_merged_copy_goes_with_a_failing_run(tmp_path):
    base = write_base("plain", tmp_path / "base")
    adapter = make_adapter("plain", tmp_path / "adapter", use_dora=True)
    config = MergeConfiguration.model_validate(recipe(base, f"{base}+{adapter}"))
    folder = tmp_path / "copies"

    def run_into_trouble() -> None:
        with adapters_opened(config, MergeOptions(), folder):
            assert list(folder.glob("*/model.safetensors"))
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        run_into_trouble()
    assert not folder.exists()
    assert not any(model.lora for model in LoaderCache.loaders)


def test_the_base_is_read_once(tmp_path):
    base = write_base("plain", tmp_path / "base")
    folders = [make_adapter("plain", tmp_path / f"adapter{i}", seed=i) for i in (1, 2)]
    config = MergeConfiguration.model_validate(recipe(base, *(f"{base}+{f}" for f in folders), dtype=None))
    options = MergeOptions(quiet=True)
    with adapters_opened(config, options, tmp_path / "copies"):
        host.open_models(config.referenced_models(), options)
        arch = fitting_architecture(config, options)
        out = host.out_config(config, arch, trust_remote_code=False)
        units = plan_units(config, arch, options, out, Merge(config.base_model)).units
        assert len(units) > 20
        for unit in units:
            (task,) = host.inputs_of(unit.task)
            assert task.model == config.base_model


def test_inputs_on_another_base_than_the_recipes(tmp_path):
    base, other = write_base("plain", tmp_path / "base"), write_base("plain", tmp_path / "other")
    adapter = make_adapter("plain", tmp_path / "adapter")
    tensors = merge(tmp_path, recipe(other, f"{base}+{adapter}", parameters={"edit": False}))
    want = merged_by_peft("plain", adapter, "bfloat16")
    for name, tensor in tensors.items():
        error = (tensor.double() - want[name].double()).abs()
        assert (error <= SPACING["bfloat16"] * want[name].double().abs() + 1e-9).all(), name


def test_a_tokenizer_of_the_recipe_rearranges_adapted_embeddings(tmp_path):
    """The base's tokenizer has fewer tokens than its matrix has rows: these are cut for all inputs."""
    base = write_base("plain", tmp_path / "base")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(base)
    rows = len(tokenizer)
    options = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
    adapter = make_adapter("plain", tmp_path / "adapter", **options)
    config = recipe(base, f"{base}+{adapter}", parameters={"edit": False}, dtype="float32")
    config["tokenizer"] = {"source": "base"}
    tensors = merge(tmp_path, config)
    kept = min(rows, 96)
    stored = base_model("plain").bfloat16().state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(tensors[name]) == rows
        dw = exact_updates("plain", adapter)[name][:kept]
        error = np.abs(tensors[name][:kept].double().numpy() - stored[name][:kept].double().numpy() - dw)
        assert error.max() <= 2.0**-8


def test_a_float8_base_is_read_with_its_scales(tmp_path):
    base = write_base("plain", tmp_path / "base")
    adapter = make_adapter("plain", tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    values = {n: t.float() for n, t in tensors.items()}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        scale = tensors[name].float().abs().max() / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
        values[name] = tensors[name].float() * scale
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    merged = merge(tmp_path, recipe(base, f"{base}+{adapter}"))
    changes = exact_updates("plain", adapter)
    assert merged.keys() == values.keys()
    for name, tensor in merged.items():
        want = values[name].double().numpy()
        want = want + oracle_edit(changes[name]) if name in changes else want
        assert (np.abs(tensor.double().numpy() - want) <= 2.0**-8 * np.abs(want) + 1e-6).all(), name
    plain = {
        "merge_method": "linear",
        "models": [{"model": f"{base}+{adapter}"}],
        "parameters": {"weight": 1},
    }
    for name, tensor in merge(tmp_path, plain, "linear").items():
        want = values[name].double().numpy() + changes.get(name, 0.0)
        assert (np.abs(tensor.double().numpy() - want) <= 2.0**-7 * np.abs(want) + 1e-3).all(), name


def test_averages_agree_with_the_mean_of_the_materialised_updates(tmp_path):
    """rslora beside plain scaling, ranks of all kinds, tensors that only some of the adapters touch."""
    base = write_base("plain", tmp_path / "base", "float32")
    options = (
        {"r": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        {"r": 7, "lora_alpha": 5, "target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 2}},
        {"r": 24, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    )
    folders = [make_adapter("plain", tmp_path / f"adapter{i}", seed=i, **o) for i, o in enumerate(options)]
    tensors = merge(tmp_path, recipe(base, *(f"{base}+{f}" for f in folders), dtype="float32"))
    updates = [exact_updates("plain", folder) for folder in folders]
    stored = base_model("plain").state_dict()
    touched = set().union(*updates)
    assert touched
    for name, tensor in tensors.items():
        w0 = stored[name].double().numpy()
        if name not in touched:
            assert torch.equal(tensor, stored[name])
            continue
        want = w0 + oracle_edit(sum(update.get(name, 0.0) for update in updates) / len(updates))
        assert np.abs(tensor.double().numpy() - want).max() <= 1e-6 * np.abs(want).max(), name


def test_an_adapter_trained_on_a_quantised_copy_is_no_stranger(tmp_path, caplog):
    base = write_base("plain", tmp_path / "base")
    adapter = make_adapter("plain", tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "unsloth/tiny-llama-unsloth-bnb-4bit"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with caplog.at_level("INFO"):
        tensors = merge(tmp_path, recipe(base, f"{base}+{adapter}"))
    (note,) = [r.getMessage() for r in caplog.records if "quantised copy" in r.getMessage()]
    assert "tiny-llama-unsloth-bnb-4bit" in note
    assert lora_warnings(caplog) == []
    assert not torch.equal(
        tensors["model.layers.0.self_attn.q_proj.weight"],
        base_model("plain").bfloat16().state_dict()["model.layers.0.self_attn.q_proj.weight"],
    )


def test_plan_and_merge_agree_on_adapters(tmp_path):
    base = write_base("plain", tmp_path / "base")
    for number, options in enumerate(({}, {"use_dora": True})):
        adapter = make_adapter("plain", tmp_path / f"adapter{number}", **options)
        file = tmp_path / f"recipe{number}.yaml"
        file.write_text(yaml.safe_dump(recipe(base, f"{base}+{adapter}")))
        result = CliRunner().invoke(main, ["plan", str(file)])
        assert result.exit_code == 0, result.output
        assert "--lora-merge-cache" not in result.output
        assert ("not linear" in result.output) == bool(options)


def test_inspect_takes_the_update_from_the_factors(tmp_path):
    base = write_base("plain", tmp_path / "base")
    adapter = make_adapter("plain", tmp_path / "adapter", scale=0.01)
    out = tmp_path / "inspect.json"
    result = CliRunner().invoke(main, ["inspect", str(base), f"{base}+{adapter}", "--json", str(out)])
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in out.read_text().splitlines()]
    found = {r["tensor"]: r for r in records if "tensor" in r}
    name = "model.layers.0.self_attn.q_proj.weight"
    dw = exact_updates("plain", adapter)[name]
    assert abs(found[name]["update_norm"] - np.linalg.norm(dw)) <= 1e-5 * np.linalg.norm(dw)
    # Of the merge, rounding included, it would be that of noise: some 30.
    assert found[name]["effective_rank"] < 4
    inputs = next(r for r in records if "inputs" in r)["inputs"]
    assert "adapter_model.safetensors" in inputs[1]["files"]
