"""The base check, `inspect`, the figures, the model card and the progress of our commands."""

from __future__ import annotations

import json
import logging
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from checkpoints import build_model, copy_as_bin, copy_with_tensors, fine_tune, load_tensors, write_checkpoint
from click.testing import CliRunner
from commands import forget_loaders, recipe, succeed, write_config
from huggingface_hub import ModelCard
from test_plan import merged, planned

from mergekit_monosoup.cli import main
from mergekit_monosoup.merging.progress import progress
from mergekit_monosoup.report.figures import Place, by_change, change, place
from mergekit_monosoup.report.reader import read_report
from mergekit_monosoup.report.schema import TensorRecord
from mergekit_monosoup.spectral.analysis import analyse_update
from mergekit_monosoup.spectral.edit import edit_update

pytestmark = pytest.mark.usefixtures("registered", "fresh_loaders")

MATRIX = "model.layers.1.mlp.up_proj.weight"
WORDS = "may not be the base"


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A model of the same shapes from another training."""
    folder = tmp_path_factory.mktemp("stranger") / "model"
    return write_checkpoint(folder, build_model("qwen3-tied", seed=99), torch.bfloat16)


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


class TestBase:
    def test_stock_command_warns_once(self, tmp_path, family, stranger, caplog):
        tuned = family("qwen3-tied", "bf16").tuned[0]
        with caplog.at_level(logging.WARNING):
            succeed("mergekit-yaml", write_config(tmp_path, recipe(stranger, tuned)), tmp_path / "out")
        warned = [record.message for record in caplog.records if WORDS in record.message]
        assert len(warned) == 1
        assert str(stranger) in warned[0]
        assert str(tuned) in warned[0]
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            succeed("mergekit-yaml", write_config(tmp_path, recipe(stranger, tuned)), tmp_path / "out2")
        assert sum(WORDS in record.message for record in caplog.records) == 1

    def test_our_merge_refuses_unless_forced(self, tmp_path, family, stranger):
        tuned = family("qwen3-tied", "bf16").tuned[0]
        file = write_config(tmp_path, recipe(stranger, tuned))
        result = run("merge", file, tmp_path / "out")
        assert result.exit_code == 1
        assert WORDS in result.output
        assert "--force-base" in result.output
        assert not (tmp_path / "out").exists()
        forget_loaders()
        pickled = copy_as_bin(stranger, tmp_path / "pickled")
        other = write_config(tmp_path, recipe(pickled, tuned))
        assert WORDS in run("merge", other, tmp_path / "out").output
        forget_loaders()
        forced = run("merge", file, tmp_path / "out", "--force-base")
        assert forced.exit_code == 0, forced.output

    def test_plan_refuses_as_well(self, tmp_path, family, stranger):
        tuned = family("qwen3-tied", "bf16").tuned[0]
        file = write_config(tmp_path, recipe(stranger, tuned))
        result = run("plan", file)
        assert result.exit_code == 1
        assert WORDS in result.output
        forced = run("plan", file, "--force-base")
        assert forced.exit_code == 0
        assert WORDS not in forced.output

    @pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
    def test_a_true_base_passes(self, family, dtype):
        models = family("qwen3-untied", dtype)
        assert not planned(recipe(models.base, *models.tuned)).problems.found

    @pytest.mark.parametrize(("size", "suspicious"), [(0.05, False), (0.3, False), (0.8, False)])
    def test_large_updates_are_still_updates(self, tmp_path, size, suspicious):
        """Continued pre-training moves weights far, but not away from where they were."""
        base = build_model("qwen3-tied")
        folders = [
            write_checkpoint(tmp_path / "base", base, torch.bfloat16),
            write_checkpoint(tmp_path / "tuned", fine_tune(base, 3, relative=size), torch.bfloat16),
        ]
        assert bool(planned(recipe(*folders)).problems.errors) == suspicious


class TestInspect:
    def test_figures_are_those_of_the_merge(self, tmp_path, family):
        """The same numbers as the report of the merge, without a model being written."""
        models = family("qwen3-tied", "bf16")
        out = merged(tmp_path, recipe(models.base, *models.tuned))
        forget_loaders()
        file = tmp_path / "inspect.jsonl"
        result = run("inspect", *models.folders, "--json", file, "--energy", 0.8)
        assert result.exit_code == 0, result.output
        assert "l_high R=0.8" in result.output
        merge = {record.tensor: record for record in read_report(out).records}
        inspected = read_report(file)
        assert inspected.header.method == "inspect"
        assert len(inspected.header.inputs) == 3
        assert {r.tensor for r in inspected.records} == set(merge)
        for record in inspected.records:
            other = merge[record.tensor]
            assert (record.action, record.k, record.r) == (other.action, other.k, other.r)
            for name in ("lambda_high", "cos_alpha", "update_norm", "relative_update", "rounding_share"):
                expected = getattr(other, name)
                assert getattr(record, name) == (expected and pytest.approx(expected, rel=1e-3))

    def test_sweep_and_spectrum(self, tmp_path, family):
        models = family("qwen3-tied", "fp32")
        file = tmp_path / "inspect.jsonl"
        arguments = ["--energy", 0.5, "--energy", 0.9, "--filter", MATRIX, "--json", file]
        assert run("inspect", *models.folders[:2], *arguments).exit_code == 0
        (record,) = read_report(file).records
        base, tuned = (load_tensors(folder)[MATRIX].double().numpy() for folder in models.folders[:2])
        s = np.linalg.svd(tuned - base, compute_uv=False)
        kept = np.cumsum(s**2) / np.sum(s**2)
        for energy in (0.5, 0.9):
            k = int(np.searchsorted(kept, energy)) + 1
            assert record.sweep[f"{energy:g}"]["k"] == k
            assert record.sweep[f"{energy:g}"]["p_k"] == pytest.approx(kept[k - 1], rel=1e-4)
        for i, value, energy in zip(
            record.spectrum.index, record.spectrum.value, record.spectrum.energy, strict=True
        ):
            assert value == pytest.approx(s[i - 1] / s[0], rel=1e-3)
            assert energy == pytest.approx(kept[i - 1], rel=1e-4)

    def test_cosines_between_checkpoints(self, tmp_path, family):
        models = family("qwen3-tied", "fp32")
        file = tmp_path / "inspect.jsonl"
        assert run("inspect", *models.folders, "--filter", MATRIX, "--json", file, "--quiet").exit_code == 0
        (record,) = read_report(file).records
        w0, w1, w2 = (load_tensors(folder)[MATRIX].double().flatten() for folder in models.folders)
        expected = torch.nn.functional.cosine_similarity(w1 - w0, w2 - w0, dim=0)
        assert record.cosines == {"tuned1 / tuned2": pytest.approx(float(expected), abs=1e-6)}

    @pytest.mark.parametrize("shape", [(30, 20), (3, 12, 8), (6, 4, 3, 3)])
    @pytest.mark.parametrize("energy", [None, 0.6])
    def test_analysis_is_that_of_the_edit(self, shape, energy):
        dw = 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
        found = analyse_update(dw, [energy] if energy else [])
        record = found.fixed[energy] if energy else found.record
        _, expected = edit_update(dw, energy=energy)
        assert [m.k for m in record.matrices] == [m.k for m in expected.matrices]
        assert record.lambda_high == pytest.approx(expected.lambda_high, rel=1e-4)

    def test_wrong_inputs(self, tmp_path, family, stranger):
        models = family("qwen3-tied", "bf16")
        tensors = load_tensors(models.tuned[0]) | {MATRIX: torch.zeros(72, 39)}
        reshaped = copy_with_tensors(models.tuned[0], tmp_path / "reshaped", tensors)
        for arguments in (
            ["inspect", models.base, tmp_path / "none"],
            ["inspect", models.base, models.tuned[0], "--filter", "no such tensor"],
            ["inspect", models.base, reshaped],
        ):
            result = run(*arguments)
            assert result.exit_code == 1, result.output
            assert isinstance(result.exception, SystemExit), result.exception
        assert WORDS in run("inspect", stranger, models.tuned[0], "--quiet").output
        assert run("inspect", models.base, models.tuned[0], "--energy", 2).exit_code == 2


class TestFigures:
    def test_plots_from_records_alone(self, tmp_path, family):
        pytest.importorskip("matplotlib", reason="needs the extra `plot`")
        from matplotlib.image import imread

        from mergekit_monosoup.report.plots import write_plots

        models = family("qwen3-tied", "bf16")
        file = tmp_path / "inspect.jsonl"
        assert run("inspect", *models.folders, "--json", file, "--quiet").exit_code == 0
        written = write_plots(read_report(file).records, tmp_path / "plots")
        names = ["singular_values", "energy_by_rank", "coefficients", "relative_update", "cosines"]
        assert [path.stem for path in written] == names
        for path in written:
            picture = imread(path)[..., :3]
            assert picture.shape[1] > 1000
            # Something dark on white, over most of the picture's width.
            dark = (picture.mean(axis=2) < 0.7).any(axis=0)
            assert dark.mean() > 0.5
        assert write_plots([], tmp_path / "none") == []
        assert not (tmp_path / "none").exists()

    def test_places(self):
        assert place("model.layers.12.mlp.up_proj.weight") == Place(12, "mlp.up_proj", "model.layers")
        assert place("layers.12.mlp.experts.3.up_proj.weight") == Place(12, "mlp.experts.up_proj", "layers")
        # Two attentions of one block, and two stacks of blocks, are told apart.
        t5 = "decoder.block.1.layer.{}.{}.q.weight"
        own, cross = (place(t5.format(i, n)) for i, n in enumerate(("SelfAttention", "EncDecAttention")))
        assert (own.layer, own.stack) == (cross.layer, cross.stack) == (1, "decoder.block")
        assert own.module != cross.module
        assert (place("lm_head.weight").layer, place("lm_head.weight").module) == (None, "lm_head")
        assert place("h.3.attn.c_attn.weight").layer == 3

    def test_change_is_the_distance_to_the_update(self):
        dw = torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        edited, edit = edit_update(dw, energy=0.7)
        record = TensorRecord(
            tensor="w",
            shape=(40, 30),
            dtype="float64",
            action="edited",
            cos_alpha=edit.cos_alpha,
            lambda_high=edit.lambda_high,
            lambda_low=edit.lambda_low,
        )
        assert change(record) == pytest.approx(float((edited - dw).norm() / dw.norm()))
        assert by_change([record])[0][1] is record


class TestCard:
    def test_section_and_metadata(self, tmp_path, family):
        models = family("qwen3-tied", "bf16")
        out = merged(tmp_path, recipe(models.base, models.tuned[0]))
        card = ModelCard.load(out / "README.md")
        data = card.data.to_dict()
        assert data["base_model_relation"] == "merge"
        assert {"mergekit", "merge", "monosoup"} <= set(data["tags"])
        assert data["library_name"] == "transformers"
        assert "2602.09689" in card.text
        rows = re.findall(r"^\| (strong|weak) \| `(.+?)` \|", card.text, re.M)
        assert [kind for kind, _ in rows] == ["strong"] * 5 + ["weak"] * 5
        assert "merge_method: monosoup" in card.text
        assert re.search(r"^Versions: python .*torch ", card.text, re.M)
        for path in re.findall(r"!\[.*?\]\((.+?)\)", card.text):
            assert (out / path).is_file()

    def test_hub_models_are_named_as_bases(self, tmp_path):
        from mergekit_monosoup.merging.card import write_card

        config = recipe("org/base", "org/tuned")
        write_card(yaml.safe_dump(config), tmp_path, "name")
        data = ModelCard.load(tmp_path / "README.md").data.to_dict()
        assert set(data["base_model"]) == {"org/base", "org/tuned"}

    def test_other_methods_get_no_section(self, tmp_path, family):
        models = family("qwen3-tied", "bf16")
        config = {
            "merge_method": "linear",
            "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in models.tuned],
        }
        out = merged(tmp_path, config)
        assert "What was done" not in (out / "README.md").read_text()
        assert not (out / "monosoup_report.jsonl").exists()


class TestProgress:
    def bars(self, monkeypatch, capsys, terminal, quiet):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        with progress(100, "Merging", quiet=quiet) as bar:
            bar.advance("model.norm.weight", 100)
        return capsys.readouterr().err

    def test_a_bar_on_a_terminal(self, monkeypatch, capsys):
        shown = self.bars(monkeypatch, capsys, terminal=True, quiet=False)
        assert "model.norm.weight" in shown
        assert "parameters/s" in shown
        assert "100%" in shown

    @pytest.mark.parametrize(("terminal", "quiet"), [(False, False), (True, True)])
    def test_silence_elsewhere(self, monkeypatch, capsys, terminal, quiet):
        assert self.bars(monkeypatch, capsys, terminal, quiet) == ""

    def test_merge_draws_nothing_into_files(self, tmp_path, family, capfd):
        models = family("qwen3-tied", "bf16")
        capfd.readouterr()
        merged(tmp_path, recipe(models.base, models.tuned[0]))
        captured = capfd.readouterr()
        assert "it/s" not in captured.err
        assert "%|" not in captured.err

    def test_json_output_is_json_alone(self, tmp_path, family):
        models = family("qwen3-tied", "bf16")
        result = run("plan", write_config(tmp_path, recipe(*models.folders[:2])), "--json")
        json.loads(result.stdout)
