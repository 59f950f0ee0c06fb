"""Sentence-transformers: the modules come along, and those with weights of their own are merged in place."""

from __future__ import annotations

import json
import shutil

import numpy as np
import oracle
import pytest
import torch
from beside import our_command, our_merge, read_json, write_embedder, write_files
from checkpoints import load_tensors
from commands import recipe, write_config
from safetensors.torch import load_file, save_file

from mergekit_monosoup.merging.verify import verify_folder
from mergekit_monosoup.report.reader import read_report

pytestmark = pytest.mark.usefixtures("registered", "one_thread")

DENSE = "2_Dense/model.safetensors"
SENTENCES = ["the answer", "is in one tin", "no one"]


@pytest.fixture(scope="module")
def embedders(tmp_path_factory):
    return write_embedder(tmp_path_factory.mktemp("embedders"))


@pytest.fixture
def pair(tmp_path, embedders):
    return tuple(shutil.copytree(folder, tmp_path / folder.name) for folder in embedders)


def embeddings(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(SENTENCES, show_progress_bar=False)


def test_a_whole_model(tmp_path, pair):
    base, tuned = pair
    out = our_merge(tmp_path, recipe(base, tuned))
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "3_Normalize/config.json"):
        assert (out / name).read_bytes() == (tuned / name).read_bytes()
    w0, w1 = (load_file(folder / DENSE)["linear.weight"].double().numpy() for folder in pair)
    expected = oracle.monosoup_weight(w0, [w1])
    merged = load_file(out / DENSE)
    np.testing.assert_allclose(merged["linear.weight"].numpy(), expected, rtol=0, atol=1e-6)
    assert torch.equal(merged["linear.bias"], load_file(tuned / DENSE)["linear.bias"])
    # Between the two, and much nearer to the fine-tuned model than the base is.
    before, after, edited = (embeddings(folder) for folder in (base, tuned, out))
    assert edited.shape == (3, 24)
    assert 0 < np.abs(edited - after).max() < 0.5 * np.abs(before - after).max()
    records = {r.tensor: r for r in read_report(out).records}
    assert records["2_Dense/linear.weight"].action == "edited"
    assert records["2_Dense/linear.bias"].action == "kept"
    assert not verify_folder(out).problems
    assert "library_name: sentence-transformers" in (out / "README.md").read_text()


def test_without_an_edit_it_is_the_fine_tuned_model(tmp_path, pair):
    base, tuned = pair
    out = our_merge(tmp_path, recipe(base, tuned, parameters={"edit": False}))
    np.testing.assert_array_equal(embeddings(out), embeddings(tuned))


def test_parameters_hold_for_modules_too(tmp_path, pair):
    base, tuned = pair
    parameters = {"alpha": [{"filter": "2_Dense", "value": 0.0}, {"value": 1.0}]}
    out = our_merge(tmp_path, recipe(base, tuned, parameters=parameters, dtype="float16"))
    merged = load_file(out / DENSE)
    assert {t.dtype for t in merged.values()} == {torch.float16}
    for name, tensor in load_file(base / DENSE).items():
        assert torch.equal(merged[name], tensor.half())


def test_weights_of_several_models(tmp_path, pair):
    base, tuned = pair
    other = shutil.copytree(tuned, tmp_path / "other")
    tensors = load_file(tuned / DENSE)
    save_file({name: 2 * t for name, t in tensors.items()}, other / DENSE)
    models = [
        {"model": str(tuned), "parameters": {"weight": 3}},
        {"model": str(other), "parameters": {"weight": 1}},
    ]
    config = recipe(base, models=models, parameters={"edit": False})
    merged = load_file(our_merge(tmp_path, config) / DENSE)
    for name, tensor in tensors.items():
        torch.testing.assert_close(merged[name], 1.25 * tensor)


def test_a_soup_takes_one_decision_for_all(tmp_path, pair):
    """Of the modules the same checkpoints make the average as of the rest."""
    base, tuned = pair
    same = shutil.copytree(tuned, tmp_path / "same")
    apart = shutil.copytree(base, tmp_path / "apart")
    tensors = {
        n: 2 * b - t
        for (n, b), t in zip(
            sorted(load_tensors(base).items()),
            (t for _, t in sorted(load_tensors(tuned).items())),
            strict=True,
        )
    }
    save_file(tensors, apart / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(tuned / DENSE, apart / DENSE)
    save_file({n: 2 * t for n, t in load_file(tuned / DENSE).items()}, same / DENSE)
    out = our_merge(tmp_path, recipe(base, tuned, same, apart, merge_method="sfgs"))
    assert "took 2 of 3" in (out / "README.md").read_text()
    for name, tensor in load_file(tuned / DENSE).items():
        torch.testing.assert_close(load_file(out / DENSE)[name], 1.5 * tensor)


def test_other_peoples_methods(tmp_path, pair):
    base, tuned = pair
    models = [{"model": str(m), "parameters": {"weight": w}} for m, w in ((tuned, 0.25), (base, 0.75))]
    out = our_merge(tmp_path, {"merge_method": "linear", "models": models})
    merged, w0, w1 = (load_file(folder / DENSE) for folder in (out, base, tuned))
    for name in w0:
        torch.testing.assert_close(merged[name], 0.25 * w1[name] + 0.75 * w0[name])


def test_a_module_that_the_base_lacks(tmp_path, pair, caplog):
    base, tuned = pair
    planned = our_command("plan", write_config(tmp_path, recipe(base, tuned))).output
    assert "module 2_Dense keeps" not in planned
    shutil.rmtree(base / "2_Dense")
    write_files(base, {"modules.json": json.dumps(read_json(base / "modules.json")[:2])})
    out = our_merge(tmp_path, recipe(base, tuned))
    assert (load_file(out / DENSE)["linear.weight"] == load_file(tuned / DENSE)["linear.weight"]).all()
    record = next(r for r in read_report(out).records if r.tensor == "2_Dense/linear.weight")
    assert (record.action, record.reason) == ("kept", "the base does not have it")
    assert caplog.text.count("module 2_Dense keeps the weights") == 1
    assert not verify_folder(out).problems
    assert embeddings(out).shape == (3, 24)


def test_pickled_modules(tmp_path, pair):
    """Older models have `pytorch_model.bin` there."""
    base, tuned = pair
    expected = load_file(our_merge(tmp_path / "a", recipe(base, tuned)) / DENSE)
    for folder in pair:
        torch.save(load_file(folder / DENSE), folder / "2_Dense" / "pytorch_model.bin")
        (folder / DENSE).unlink()
    out = our_merge(tmp_path / "b", recipe(base, tuned))
    merged = load_file(out / DENSE)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert not (out / "2_Dense" / "pytorch_model.bin").exists()


def test_a_pickle_with_code_is_not_run(tmp_path, pair):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "code-ran"), "w"))

    base, tuned = pair
    (tuned / DENSE).unlink()
    torch.save({"linear.weight": Hostile()}, tuned / "2_Dense" / "pytorch_model.bin")
    config = write_config(tmp_path, recipe(base, tuned))
    for command in (["merge", config, tmp_path / "out", "--quiet"], ["plan", config]):
        result = our_command(*command)
        assert result.exit_code == 1
        assert "2_Dense/pytorch_model.bin is a pickle that would run code" in result.output
        assert "Traceback" not in result.output
    assert not (tmp_path / "code-ran").exists()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_module_is_refused_before_anything_is_merged(which, file, tmp_path, pair, monkeypatch):
    dense = pair[which] / "2_Dense"
    raw = (dense / "model.safetensors").read_bytes()
    (dense / "model.safetensors").unlink()
    (dense / file).write_bytes(raw[: len(raw) // 2])
    monkeypatch.setattr("mergekit_monosoup.merging.run.WorkFolder", None)
    config = write_config(tmp_path, recipe(*pair))
    for command in (["merge", config, tmp_path / "out", "--quiet"], ["plan", config]):
        result = our_command(*command)
        assert result.exit_code == 1
        assert f"{pair[which].name}/2_Dense/{file}" in result.output
    assert not list(tmp_path.glob("out*"))


def test_the_plan_says_what_happens_to_modules(tmp_path, pair):
    base, tuned = pair
    parameters = {"alpha": [{"filter": "2_Dense.linear", "value": 0.5}, {"value": 1.0}]}
    config = recipe(base, tuned, parameters=parameters)
    planned = json.loads(our_command("plan", write_config(tmp_path, config), "--json").output)
    assert planned["ok"]
    assert not planned["problems"]
    told = {t["tensor"]: (t["action"], tuple(t["shape"]), t["dtype"]) for t in planned["tensors"]}
    out = our_merge(tmp_path, config)
    assert told == {r.tensor: (r.action, r.shape, r.dtype) for r in read_report(out).records}
    assert told["2_Dense/linear.weight"] == ("edited", (24, 32), "float32")
