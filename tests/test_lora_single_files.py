"""`mergekit-monosoup lora` on single files that diffusers wrote, read back by diffusers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from lora_edits import compare, edit, truncated
from oracle import monosoup_update
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("diffusers")
from image_loras import MODELS, loaded, write, write_kohya


def edited(dw: torch.Tensor, **options: object) -> np.ndarray:
    """The oracle's edit of one matrix, or of a convolution `[out, in, k...]`."""
    flat = dw.double().numpy().reshape(dw.shape[0], -1)
    return monosoup_update(flat, **options)[0].reshape(dw.shape)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file of each kind: name -> (pipeline, path)."""
    folder = tmp_path_factory.mktemp("image-loras")
    made = {name: (name, write(name, folder / name)) for name in MODELS}
    made["old"] = ("sd15", write("sd15", folder / "old", old=True))
    made["settings"] = ("flux", write("flux", folder / "settings", settings=True, alpha=9))
    made["kohya"] = ("sd15", write_kohya(folder / "kohya"))
    return made


@pytest.mark.parametrize("kind", [*MODELS, "old", "settings", "kohya"])
def test_every_format_equals_the_oracle_and_loads_back(kind, files, tmp_path):
    name, path = files[kind]
    out = tmp_path / "out.safetensors"
    edit(path, out)
    before, after = loaded(name, path), loaded(name, out)
    assert len(before) >= 4
    assert any(float(dw.abs().max()) > 0 for dw in before.values())
    compare(after, {key: edited(dw) for key, dw in before.items()}, 1e-5)
    old, new = load_file(path), load_file(out)
    assert [(k, t.shape, t.dtype) for k, t in old.items()] == [(k, t.shape, t.dtype) for k, t in new.items()]
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed == {k for k in old if k.endswith((".lora_B.weight", "up.weight"))}


@pytest.mark.parametrize("kind", ["sd15", "settings", "kohya"])
@pytest.mark.parametrize("rank", [2, 0.9, "auto"])
def test_a_smaller_rank_keeps_the_scaling(kind, rank, files, tmp_path):
    name, path = files[kind]
    out = tmp_path / "out.safetensors"
    edit(path, out, "--rank", rank, "--alpha", 0.5)
    before, after = loaded(name, path), loaded(name, out)
    for key, dw in before.items():
        want = 0.5 * edited(dw)
        flat = want.reshape(len(want), -1)
        values = np.linalg.svd(flat, compute_uv=False)
        share = np.cumsum(values**2) / (values**2).sum()
        k = {2: 2, 0.9: int((share < 0.9).sum()) + 1}.get(rank) or int(
            monosoup_update(dw.double().numpy().reshape(len(dw), -1))[1]["k"]
        )
        near = truncated(flat, k).reshape(want.shape)
        assert np.abs(after[key].double().numpy() - near).max() <= 1e-5 * np.abs(near).max(), key


def test_files_are_averaged_with_their_own_alphas(tmp_path):
    paths = [write_kohya(tmp_path / str(i), alpha=alpha, seed=i) for i, alpha in enumerate((3.0, 12.0))]
    edit(*paths, tmp_path / "mean.safetensors", "--energy", 0.8)
    first, second = (loaded("sd15", path) for path in paths)
    want = {key: edited((first[key].double() + second[key].double()) / 2, energy=0.8) for key in first}
    compare(loaded("sd15", tmp_path / "mean.safetensors"), want, 1e-5)


def test_the_header_says_where_the_file_is_from(files, tmp_path):
    _, path = files["kohya"]
    edit(path, tmp_path / "out.safetensors", "--rank", 3, "--energy", 0.9)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "3"
    assert "sshs_model_hash" not in metadata
    assert metadata["monosoup.source.sshs_model_hash"] == "ab" * 32
    assert json.loads(metadata["monosoup.inputs"]) == ["kohya.safetensors"]
    assert json.loads(metadata["monosoup.options"])["energy"] == 0.9
