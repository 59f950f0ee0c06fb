"""`mergekit-monosoup inspect ADAPTER` on adapters of peft and on single files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import load_adapter, make_adapter, updates
from click.testing import CliRunner, Result
from oracle import monosoup_update
from safetensors.torch import save_file

from mergekit_monosoup.cli import main
from mergekit_monosoup.report.reader import read_report


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def single_file(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {"lora_unet_b.hada_w1_a": torch.ones(2, 2)}
    for module, scale in (("lora_unet_a", 1.0), ("lora_te_idle", 0.0)):
        up = torch.randn(24, 8, generator=generator) * 0.5 ** torch.arange(8) * scale
        tensors[f"{module}.lora_up.weight"] = up
        tensors[f"{module}.lora_down.weight"] = torch.randn(8, 16, generator=generator)
        tensors[f"{module}.alpha"] = torch.tensor(4.0)
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


@pytest.mark.parametrize("kind", ["plain", "experts-qwen3", "embeddings"])
def test_the_figures_are_those_of_the_spectrum(kind, tmp_path):
    source = make_adapter(kind, tmp_path / "in")
    result = run(source, "--json", tmp_path / "report.jsonl", "--energy", 0.8)
    assert result.exit_code == 0, result.output
    report = read_report(tmp_path / "report.jsonl")
    found = {r.tensor: r for r in report.records if r.k is not None}
    wanted = {
        k.removeprefix("base_model.model."): dw for k, dw in updates(load_adapter(kind, source)).items()
    }
    assert found.keys() == wanted.keys()
    for name, dw in wanted.items():
        matrices = dw.double().numpy().reshape(-1, *dw.shape[-2:])
        values = np.linalg.svd(matrices, compute_uv=False)
        record, rank = found[name], int(found[name].figures["nominal_rank"])
        for part in (2, 4, 8):
            kept = -(-rank // part)
            lost = np.sqrt((values[:, kept:] ** 2).sum() / (values**2).sum())
            assert record.figures[f"lost_at_1/{part}"] == pytest.approx(lost, abs=1e-6)
        details = [monosoup_update(m)[1] for m in matrices]
        assert record.effective_rank == pytest.approx(
            np.mean([d["effective_rank"] for d in details]), rel=1e-5
        )
        share = np.cumsum(values**2, 1) / (values**2).sum(1, keepdims=True)
        assert record.figures["rank_for_0.9"] == max((share < 0.9).sum(1)) + 1
        assert name in result.output
    assert "on average" in result.output


def test_a_single_file_with_figures_and_page(tmp_path):
    path = single_file(tmp_path)
    result = run(path, "--plot", tmp_path / "figures", "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "1 modules: rank 8" in result.output
    assert "without any update, such as lora_te_idle" in result.output
    assert "LoHa" in result.output
    assert (tmp_path / "figures" / "singular_values.png").stat().st_size > 1000
    assert "lora_unet_a" in (tmp_path / "page.html").read_text()


def test_mistakes_are_refused_in_a_sentence(tmp_path):
    path = single_file(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({}))
    for arguments, word in (
        ((tmp_path / "model",), "no adapter_config.json"),
        ((path, "--filter", "nothing"), "'nothing'"),
        ((path, "--ray", "local"), "--ray"),
        ((tmp_path / "none.safetensors",), "not a file"),
    ):
        result = run(*arguments)
        assert result.exit_code in (1, 2), arguments
        assert word in result.output, result.output
        assert isinstance(result.exception, SystemExit)
