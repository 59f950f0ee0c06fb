"""`mergekit-monosoup lora` on adapters that peft wrote, read back by peft."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from adapters import KINDS, base_model, load_adapter, make_adapter, updates
from click.testing import CliRunner, Result
from oracle import monosoup_update
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_monosoup.cli import main

FACTOR_KINDS = [k for k in KINDS if k not in ("saved-modules", "trained-biases")]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["lora", *map(str, arguments)])


def edit(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def oracle_edit(dw: torch.Tensor, **options: object) -> np.ndarray:
    """The oracle's edit; three axes are a stack of experts, except in the one Conv1d there is."""
    array = dw.double().numpy()
    if array.ndim == 3 and array.shape != (16, 12, 3):
        return np.stack([monosoup_update(m, **options)[0] for m in array])
    flat = array.reshape(array.shape[0], -1)
    return monosoup_update(flat, **options)[0].reshape(array.shape)


def compare(got: dict[str, torch.Tensor], want: dict[str, np.ndarray], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        error = np.abs(got[name].double().numpy() - array).max()
        assert error <= tolerance * np.abs(array).max(), name


@pytest.mark.parametrize("kind", FACTOR_KINDS)
@pytest.mark.parametrize("options", [{}, {"energy": 0.8}], ids=["automatic", "threshold"])
def test_every_linear_kind_equals_the_oracle(kind, options, tmp_path):
    source = make_adapter(kind, tmp_path / "in")
    edit(source, tmp_path / "out", *[part for k, v in options.items() for part in (f"--{k}", v)])
    before, after = updates(load_adapter(kind, source)), updates(load_adapter(kind, tmp_path / "out"))
    assert len(before) >= 3
    compare(after, {n: oracle_edit(dw, **options) for n, dw in before.items()}, 1e-5)


@pytest.mark.parametrize("kind", ["plain", "embeddings", "experts-qwen3", "conv1d-gpt2"])
def test_the_file_has_the_same_form(kind, tmp_path):
    source = make_adapter(kind, tmp_path / "in", dtype=torch.bfloat16)
    edit(source, tmp_path / "out")
    config, edited_config = (
        json.loads((f / "adapter_config.json").read_text()) for f in (source, tmp_path / "out")
    )
    assert config == edited_config
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {
        k: (v.shape, v.dtype) for k, v in after.items()
    }
    for key in before:
        if "lora_A" in key or "lora_embedding_A" in key:
            assert torch.equal(before[key], after[key])
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["mergekit_monosoup"])["adapters"] == [str(source)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "monosoup_edit.json",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_rounded_once(dtype, tmp_path):
    source = make_adapter("plain", tmp_path / "in", dtype=dtype)
    edit(source, tmp_path / "out")
    keys = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key in keys:
        if "lora_B" not in key:
            continue
        b, a = keys[key].double(), keys[key.replace("lora_B", "lora_A")].double()
        want, _ = monosoup_update((b @ a).numpy())
        got = (after[key].double() @ a).numpy()
        # One rounding of B: half a spacing of each entry, summed over the rank.
        bound = torch.finfo(dtype).eps / 2 * (after[key].double().abs() @ a.abs()).numpy()
        assert (np.abs(got - want) <= bound * 1.01 + 1e-7).all()


def test_the_adapted_model_is_base_plus_edited_update(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    edit(source, tmp_path / "out", "--alpha", 0.5)
    before = updates(load_adapter("plain", source))
    merged = load_adapter("plain", tmp_path / "out").merge_and_unload().state_dict()
    base = base_model("plain").state_dict()
    touched = set()
    for name, dw in before.items():
        key = name.removeprefix("base_model.model.") + ".weight"
        want = base[key].double().numpy() + 0.5 * oracle_edit(dw)
        assert np.abs(merged[key].double().numpy() - want).max() <= 1e-5 * np.abs(want).max()
        touched.add(key)
    assert all(torch.equal(merged[key], base[key]) for key in base.keys() - touched)


@pytest.mark.parametrize("mixing", ["high", "low", "uniform", "decay", "alignment"])
def test_ablations(mixing, tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    edit(source, tmp_path / "out", "--mixing", mixing)
    before, after = updates(load_adapter("plain", source)), updates(load_adapter("plain", tmp_path / "out"))
    for name, dw in before.items():
        want = oracle_edit(dw, mixing=mixing)
        error = np.abs(after[name].double().numpy() - want).max()
        assert error <= 1e-5 * float(dw.abs().max()), name


def truncated(array: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(array, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


@pytest.mark.parametrize("kind", ["plain", "rslora", "rank-pattern", "experts-qwen3", "embeddings"])
def test_a_smaller_rank(kind, tmp_path):
    source = make_adapter(kind, tmp_path / "in")
    edit(source, tmp_path / "out", "--rank", 2)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["rank_pattern"] == {}
    before, after = updates(load_adapter(kind, source)), updates(load_adapter(kind, tmp_path / "out"))
    compare(after, {n: truncated(oracle_edit(dw), 2) for n, dw in before.items()}, 1e-5)
    report = json.loads((tmp_path / "out" / "monosoup_edit.json").read_text())
    for module in report["modules"]:
        name = "base_model.model." + module["module"]
        want = oracle_edit(before[name])
        error = np.linalg.norm(after[name].numpy() - want) / np.linalg.norm(want)
        assert module["truncation_error"] == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize("kind", ["plain", "rslora", "experts-qwen3", "alpha-pattern", "convolutions"])
@pytest.mark.parametrize("rank", ["auto", "0.9"])
def test_a_rank_for_each_module(kind, rank, tmp_path):
    source = make_adapter(kind, tmp_path / "in")
    edit(source, tmp_path / "out", "--rank", rank)
    before, after = updates(load_adapter(kind, source)), updates(load_adapter(kind, tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "monosoup_edit.json").read_text())
    ranks = {f"base_model.model.{m['module']}": m["rank"] for m in report["modules"]}
    errors = []
    for name, dw in before.items():
        want = oracle_edit(dw).reshape(*((-1,) if dw.ndim != 3 or kind == "convolutions" else dw.shape))
        if want.ndim == 1:
            want = want.reshape(dw.shape[0], -1)
        got = after[name].double().numpy().reshape(want.shape)
        expected = truncated(want, ranks[name])
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(want).max(), name
        errors.append(np.linalg.norm(got - want) / np.linalg.norm(want))
    if rank == "0.9":
        assert max(errors) <= math.sqrt(0.1) + 1e-6


def test_several_adapters_are_averaged_first(tmp_path):
    one = make_adapter("plain", tmp_path / "one", seed=1)
    two = make_adapter(
        "plain", tmp_path / "two", seed=2, r=3, lora_alpha=9, target_modules=["q_proj", "k_proj"]
    )
    edit(one, two, tmp_path / "out")
    first, second = updates(load_adapter("plain", one)), updates(load_adapter("plain", two))
    zero = dict.fromkeys(first.keys() | second.keys(), 0.0)
    means = {n: (first.get(n, 0.0) + second.get(n, 0.0)) / 2 for n in zero}
    loaded = load_adapter("plain", tmp_path / "out")
    compare(updates(loaded), {n: oracle_edit(dw) for n, dw in means.items()}, 1e-5)
    edit(one, two, tmp_path / "small", "--rank", 3)
    small = updates(load_adapter("plain", tmp_path / "small"))
    compare(small, {n: truncated(oracle_edit(dw), 3) for n, dw in means.items()}, 1e-5)


def test_stacks_of_experts_are_averaged_too(tmp_path):
    paths = [make_adapter("experts-qwen3", tmp_path / str(i), seed=i) for i in (1, 2, 3)]
    edit(*paths, tmp_path / "out")
    before = [updates(load_adapter("experts-qwen3", p)) for p in paths]
    means = {n: sum(b[n] for b in before) / 3 for n in before[0]}
    compare(
        updates(load_adapter("experts-qwen3", tmp_path / "out")),
        {n: oracle_edit(dw) for n, dw in means.items()},
        1e-5,
    )


def test_whole_tensors_without_base_are_kept_with_a_warning(tmp_path):
    source = make_adapter("saved-modules", tmp_path / "in")
    result = edit(source, tmp_path / "out")
    assert "lm_head.weight is stored whole" in result.output
    assert "--base" in result.output
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name in ("lm_head.weight", "model.norm.weight"):
        assert torch.equal(before[f"base_model.model.{name}"], after[f"base_model.model.{name}"])


def test_whole_tensors_are_edited_against_the_base(tmp_path):
    source = make_adapter("saved-modules", tmp_path / "in")
    base_model("saved-modules").save_pretrained(tmp_path / "base")
    result = edit(source, tmp_path / "out", "--base", tmp_path / "base", "--alpha", 0.5)
    assert "Warning" not in result.output
    before = load_file(source / "adapter_model.safetensors")
    merged = load_adapter("saved-modules", tmp_path / "out").merge_and_unload().state_dict()
    base = base_model("saved-modules").state_dict()
    for name in ("lm_head.weight", "model.norm.weight"):
        dw = (before[f"base_model.model.{name}"] - base[name]).double().numpy()
        want = base[name].double().numpy() + 0.5 * (monosoup_update(dw)[0] if dw.ndim == 2 else dw)
        assert np.abs(merged[name].double().numpy() - want).max() <= 1e-5 * np.abs(want).max()


def test_trained_biases_follow_alpha(tmp_path):
    source = make_adapter("trained-biases", tmp_path / "in")
    base_model("trained-biases").save_pretrained(tmp_path / "base")
    edit(source, tmp_path / "out", "--base", tmp_path / "base", "--alpha", 0.25)
    tuned = load_adapter("trained-biases", source).merge_and_unload().state_dict()
    merged = load_adapter("trained-biases", tmp_path / "out").merge_and_unload().state_dict()
    base = base_model("trained-biases").state_dict()
    names = [n for n in base if n.endswith(".bias")]
    assert names
    for name in names:
        assert not torch.equal(tuned[name], base[name])
        torch.testing.assert_close(merged[name], base[name] + 0.25 * (tuned[name] - base[name]))


def test_lora_bias_follows_alpha(tmp_path):
    source = make_adapter("lora-bias", tmp_path / "in")
    edit(source, tmp_path / "out", "--alpha", 0.25)
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    names = [n for n in before if n.endswith("lora_B.bias")]
    assert names
    for name in names:
        torch.testing.assert_close(after[name], 0.25 * before[name])


def test_embeddings_saved_along_are_kept(tmp_path):
    source = tmp_path / "in"
    adapted = load_adapter("embeddings", make_adapter("embeddings", tmp_path / "first"))
    adapted.save_pretrained(source, save_embedding_layers=True)
    assert any("base_layer" in k for k in load_file(source / "adapter_model.safetensors"))
    edit(source, tmp_path / "out")
    before = updates(load_adapter("embeddings", source))
    after = updates(load_adapter("embeddings", tmp_path / "out"))
    compare(after, {n: oracle_edit(dw) for n, dw in before.items()}, 1e-5)


def test_tokenizer_files_come_along(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    (source / "tokenizer_config.json").write_text("{}")
    (source / "optimizer.pt").write_text("not this")
    edit(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    assert not (tmp_path / "out" / "optimizer.pt").exists()


def test_bin_files_are_read_without_objects(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    tensors = load_file(source / "adapter_model.safetensors")
    (source / "adapter_model.safetensors").unlink()
    torch.save(tensors, source / "adapter_model.bin")
    edit(source, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran-code"),))


def _refused(source: Path, out: Path, *words: str, arguments: tuple[object, ...] = ()) -> None:
    result = run(source, out, *arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    for word in words:
        assert word in result.output
    assert not out.exists()
    assert not [p for p in out.parent.iterdir() if p.name.startswith(".")]


def test_pickled_objects_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = make_adapter("plain", tmp_path / "in")
    (source / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x.lora_A.weight": _Evil()}, source / "adapter_model.bin")
    _refused(source, tmp_path / "out", "adapter_model.bin", "plain tensors")
    assert not (tmp_path / "ran-code").exists()


def _tamper(source: Path, change) -> None:
    tensors = load_file(source / "adapter_model.safetensors")
    change(tensors, next(k for k in tensors if "lora_A" in k))
    save_file(tensors, source / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, k: t.pop(k), ("lora_B", "no lora_A")),
        (lambda t, k: t[k].fill_(math.nan), ("lora_A", "NaN")),
        (lambda t, k: t.__setitem__(k, torch.zeros(5, t[k].shape[1])), ("do not multiply",)),
        (lambda t, k: t.__setitem__(k[len("base_model.model.") :], t.pop(k)), ("base_model.model.",)),
        (
            lambda t, k: t.__setitem__(k.replace("lora_A.weight", "lora_magnitude_vector"), torch.ones(3)),
            ("lora_magnitude_vector", "merge"),
        ),
    ],
    ids=["missing factor", "NaN", "shapes", "foreign names", "DoRA's magnitudes"],
)
def test_damaged_adapters_are_refused(change, words, tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    _tamper(source, change)
    _refused(source, tmp_path / "out", *words)


def test_rank_of_the_configuration_must_be_that_of_the_factors(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    _refused(source, tmp_path / "out", "rank 4", "says 5")


def test_truncated_file_is_refused(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    file = source / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    _refused(source, tmp_path / "out", "adapter_model.safetensors is damaged")


def test_missing_files_are_named(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    (source / "adapter_model.safetensors").unlink()
    _refused(source, tmp_path / "out", "neither adapter_model.safetensors")
    (source / "adapter_config.json").unlink()
    _refused(source, tmp_path / "out", "no adapter_config.json")
    _refused(tmp_path / "nowhere", tmp_path / "out", "not a folder")


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (peft.LoHaConfig(target_modules=["q_proj"]), "LOHA"),
        (peft.VeraConfig(target_modules=["q_proj"]), "VERA"),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), "ADALORA"),
        (peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
        (peft.LoraConfig(target_modules=["q_proj"], use_dora=True), "use_dora"),
        (peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[1]), "alora_invocation_tokens"),
        (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "pissa"),
        (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"), "olora"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_linear_is_refused(config, word, tmp_path):
    adapted = peft.get_peft_model(base_model("plain"), config)
    adapted.save_pretrained(tmp_path / "in")
    _refused(tmp_path / "in", tmp_path / "out", word)


def test_unknown_types_are_refused(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA_2030"}))
    _refused(source, tmp_path / "out", "LORA_2030", "upgrade peft")


def test_adapters_of_different_bases_are_refused(tmp_path):
    llama, gpt2 = make_adapter("plain", tmp_path / "a"), make_adapter("conv1d-gpt2", tmp_path / "b")

    result = run(llama, gpt2, tmp_path / "out")
    assert result.exit_code == 1
    assert "no module in common" in result.output
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(tmp_path):
    source = make_adapter("conv1d-gpt2", tmp_path / "in")
    base_model("plain").save_pretrained(tmp_path / "base")
    _refused(source, tmp_path / "out", "c_attn", "base", arguments=("--base", tmp_path / "base"))


def test_ambiguous_ranks_are_refused(tmp_path):
    source = make_adapter(
        "experts-qwen3",
        tmp_path / "in",
        rank_pattern={r".*gate_up_proj": 8},
        alpha_pattern={r".*down_proj": 3},
    )
    config = json.loads((source / "adapter_config.json").read_text())
    config["rank_pattern"] = {}
    (source / "adapter_config.json").write_text(json.dumps(config))
    _refused(source, tmp_path / "out", "rank_pattern", "target_parameters")


def test_larger_rank_is_refused(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    _refused(source, tmp_path / "out", "rank 9 is larger", arguments=("--rank", 9))


@pytest.mark.parametrize(
    "arguments", [("--energy", 0), ("--energy", 1.5), ("--alpha", -1), ("--rank", 0), ("--rank", 1.5)]
)
def test_wrong_options_are_refused(arguments, tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    _refused(source, tmp_path / "out", "must be", arguments=arguments)


def test_output_is_not_replaced_unasked(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    out = tmp_path / "out"
    shutil.copytree(source, out)
    before = (out / "adapter_model.safetensors").read_bytes()
    result = run(source, out)
    assert result.exit_code == 1
    assert "--overwrite" in result.output
    assert (out / "adapter_model.safetensors").read_bytes() == before
    edit(source, out, "--overwrite")
    assert (out / "adapter_model.safetensors").read_bytes() != before


def test_adapters_of_the_hub_are_found_in_its_cache(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--adapter"
    make_adapter("plain", repository / "snapshots" / commit)
    for name in ("main", "v2"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for source in ("someone/adapter", "someone/adapter@v2"):
        edit(source, tmp_path / source.replace("/", "-"))
    report = json.loads((tmp_path / "someone-adapter@v2" / "monosoup_edit.json").read_text())
    assert report["adapters"] == ["someone/adapter@v2"]
    _refused(Path("someone/other"), tmp_path / "out", "someone/other", "neither a local folder")


def test_summary_and_quiet(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    result = edit(source, tmp_path / "out", "--rank", 2)
    for word in ("9 modules", "effective rank", "lambda_high", "error of the smaller rank", "Wrote"):
        assert word in result.output
    assert edit(source, tmp_path / "again", "--quiet").output == ""


def test_an_adapter_that_changes_nothing(tmp_path):
    peft.get_peft_model(base_model("plain"), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "in"
    )
    result = edit(tmp_path / "in", tmp_path / "out", "--rank", "auto")
    assert "3 modules, 3 of them without any update" in result.output
    assert not any(dw.any() for dw in updates(load_adapter("plain", tmp_path / "out")).values())


def test_trained_tokens_are_kept_with_a_warning(tmp_path):
    source = make_adapter("plain", tmp_path / "in", trainable_token_indices={"embed_tokens": [1, 5]})
    result = edit(source, tmp_path / "out")
    assert "trainable_tokens_delta is stored whole" in result.output
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    (key,) = [k for k in before if "trainable_tokens" in k]
    assert torch.equal(before[key], after[key])


def test_whole_tensors_of_some_adapters_need_the_base(tmp_path):
    one = make_adapter("saved-modules", tmp_path / "one", seed=1)
    two = make_adapter("plain", tmp_path / "two", seed=2)
    result = run(one, two, tmp_path / "out")
    assert result.exit_code == 1
    assert "some of the adapters only; give --base" in result.output
    assert not (tmp_path / "out").exists()
    base_model("plain").save_pretrained(tmp_path / "base")
    edit(one, two, tmp_path / "out", "--base", tmp_path / "base")
    base, name = base_model("plain").state_dict(), "lm_head.weight"
    saved = load_file(one / "adapter_model.safetensors")[f"base_model.model.{name}"]
    want = base[name].double().numpy() + oracle_edit((saved - base[name]) / 2)
    merged = load_adapter("plain", tmp_path / "out").merge_and_unload().state_dict()
    assert np.abs(merged[name].double().numpy() - want).max() <= 1e-5 * np.abs(want).max()
