"""Reports: what is recorded is true, complete, and can be read, sorted, filtered and compared."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import yaml
from checkpoints import copy_with_tensors, load_tensors
from click.testing import CliRunner
from commands import ROOT, recipe, succeed, write_config
from test_plan import merged

from mergekit_monosoup.cli import main
from mergekit_monosoup.errors import InputError, ParameterError
from mergekit_monosoup.report.measure import tensor_record
from mergekit_monosoup.report.reader import FILE_NAME, read_report
from mergekit_monosoup.report.recorder import Recorder, new_header
from mergekit_monosoup.report.schema import InputModel, ReportHeader, SpectrumCurve, TensorRecord
from mergekit_monosoup.report.table import condition, sorted_records

pytestmark = pytest.mark.usefixtures("registered", "fresh_loaders")

MATRIX = "model.layers.1.mlp.up_proj.weight"


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_records_are_true(tmp_path, family):
    """Every figure of every record against the float64 reference."""
    models = family("qwen3-tied", "bf16")
    out = merged(tmp_path, recipe(models.base, *models.tuned, parameters={"energy": 0.8}))
    base, *tuned = (load_tensors(folder) for folder in models.folders)
    report = read_report(out)
    assert {r.tensor for r in report.records} == set(base)
    for record in report.records:
        w0 = base[record.tensor].double().numpy()
        dw = np.mean([t[record.tensor].double().numpy() - w0 for t in tuned], axis=0)
        assert record.update_norm == pytest.approx(np.linalg.norm(dw), rel=1e-4)
        assert record.relative_update == pytest.approx(np.linalg.norm(dw) / np.linalg.norm(w0), rel=1e-4)
        assert record.seconds is not None
        assert record.seconds >= 0
        if w0.ndim < 2:
            assert (record.action, record.reason) == ("averaged", "not a matrix")
            assert record.lambda_high is None
            continue
        s = np.linalg.svd(dw, compute_uv=False)
        k = int(record.k)
        energies = s**2 / np.sum(s**2)
        assert record.action == "edited"
        assert record.parameters == {"energy": 0.8}
        assert record.r == min(w0.shape)
        assert k == int(np.searchsorted(np.cumsum(energies), 0.8)) + 1
        low = np.sqrt(energies[k:].sum())
        rho = (s[k] / s[0]) ** 2
        p = s / s.sum()
        assert record.effective_rank == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-3)
        assert record.p_k == pytest.approx(energies[:k].sum(), rel=1e-4)
        assert record.cos_alpha == pytest.approx(low, rel=1e-3)
        assert record.rho == pytest.approx(rho, rel=1e-3)
        curve = record.spectrum
        assert (curve.index[0], curve.index[-1]) == (1, record.r)
        picked = np.array(curve.index) - 1
        assert curve.value == pytest.approx((s / s[0])[picked], rel=1e-3, abs=1e-4)
        assert curve.energy == pytest.approx(np.cumsum(energies)[picked], rel=1e-4)
        assert record.lambda_low == pytest.approx(rho + (1 - rho) * low, rel=1e-3)
        assert record.lambda_high == pytest.approx(1 - record.lambda_low)


def test_header(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    config = recipe(models.base, models.tuned[0])
    out = merged(tmp_path, config, "--random-seed", "7")
    header = read_report(out).header
    assert header.method == "monosoup"
    # A report goes to the public with its model: folders by their names, no path.
    assert str(tmp_path.parent) not in (out / "monosoup_report.jsonl").read_text()
    named = {**config, "base_model": "base", "models": [{"model": "tuned1"}]}
    assert yaml.safe_load(header.configuration) == named
    assert (header.seed, header.device) == (7, "cpu")
    assert {"python", "torch", "mergekit", "mergekit-monosoup"} <= set(header.versions)
    assert [(m.model, m.role) for m in header.inputs] == [
        ("base", "base"),
        ("tuned1", "finetuned"),
    ]
    for model, folder in zip(header.inputs, (models.base, models.tuned[0]), strict=True):
        content = (folder / "model.safetensors").read_bytes()
        entry = model.files["model.safetensors"]
        assert (entry.size, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_stock_command_writes_the_file_that_the_recipe_names(tmp_path, family):
    from mergekit_monosoup.registry import stock

    models = family("qwen3-tied", "bf16")
    file = tmp_path / "deep" / "report.jsonl"
    config = recipe(models.base, models.tuned[0], parameters={"report": str(file)})
    succeed("mergekit-yaml", write_config(tmp_path, config), tmp_path / "out")
    # Readable at any time; the hashes of the inputs come at the end.
    assert len(read_report(file).records) == 35
    stock().close()
    report = read_report(file)
    assert len(report.records) == 35
    assert all(entry.sha256 for model in report.header.inputs for entry in model.files.values())
    assert not (tmp_path / "out" / FILE_NAME).exists()


def test_copied_tensors_are_recorded(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    head = {"lm_head.weight": load_tensors(models.base)["model.embed_tokens.weight"].clone()}
    config = recipe(models.base, models.tuned[0])
    base = copy_with_tensors(models.base, tmp_path / "base", load_tensors(models.base) | head)
    out = merged(tmp_path, config | {"base_model": str(base)})
    assert {r.tensor for r in read_report(out).records} == set(load_tensors(out))


def test_skips_have_reasons(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    parameters = {
        "edit": [{"filter": "embed", "value": False}, {"value": True}],
        "min_relative_update": [{"filter": "q_proj", "value": 0.9}, {"value": 0}],
    }
    out = merged(tmp_path, recipe(models.base, models.tuned[0], parameters=parameters))
    reasons = {r.tensor: (r.action, r.reason) for r in read_report(out).records}
    assert reasons["model.embed_tokens.weight"] == ("kept", "edit: false")
    assert reasons["model.layers.0.self_attn.q_proj.weight"] == ("kept", "relative update below 0.9")
    assert reasons[MATRIX] == ("edited", "")
    same = merged(tmp_path / "same", recipe(models.base, copy_of(models.base, tmp_path / "copy")))
    record = next(r for r in read_report(same).records if r.tensor == MATRIX)
    assert (record.reason, record.lambda_high, record.rounding_share) == ("zero update", None, None)


def copy_of(source, folder):
    return copy_with_tensors(source, folder, load_tensors(source))


def test_threads_do_not_lose_records(tmp_path):
    """As under --multi-gpu, where methods run in several threads."""
    path = tmp_path / "r.jsonl"
    with Recorder(new_header(method="monosoup"), path) as recorder, ThreadPoolExecutor(16) as pool:
        records = [
            TensorRecord(tensor=f"t{i}", shape=(2, 2), dtype="float32", action="edited") for i in range(2000)
        ]
        list(pool.map(recorder.add, records))
    assert {r.tensor for r in read_report(path).records} == {f"t{i}" for i in range(2000)}


def test_a_failed_merge_leaves_a_readable_report(tmp_path):
    path = tmp_path / "r.jsonl"

    def failing():
        with Recorder(new_header(method="monosoup"), path) as recorder:
            recorder.add(TensorRecord(tensor="a", shape=(1,), dtype="float32", action="kept"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert len(read_report(path).records) == 1


def test_recording_is_cheap():
    """Well under a hundredth of the edit of the same tensor."""
    from mergekit_monosoup.spectral.edit import edit_weight

    base = torch.randn(1024, 3072).bfloat16()
    tuned = (base.float() + 1e-3 * torch.randn(1024, 3072)).bfloat16()

    def fastest(work):
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
        return min(times)

    _, edit = edit_weight(base, [tuned])
    merge = fastest(lambda: edit_weight(base, [tuned]))
    record = fastest(lambda: tensor_record("w", base, [tuned], action="edited", edit=edit).line())
    # The bound on a quiet machine is 0.01; tests share theirs.
    assert record < 0.05 * merge


def test_command_sorts_filters_and_compares(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    one = merged(tmp_path / "a", recipe(models.base, models.tuned[0]))
    two = merged(tmp_path / "b", recipe(models.base, models.tuned[0], parameters={"energy": 0.5}))
    result = run("report", one, "--sort", "lambda_high", "--filter", "mlp", "--filter", "k>1", "--limit", 3)
    assert result.exit_code == 0, result.output
    rows = result.output.splitlines()[1:4]
    values = [float(re.findall(r"0\.\d{4}", row)[2]) for row in rows]
    assert values == sorted(values)
    assert all(".mlp." in row for row in rows)
    line = json.loads(run("report", one, "--filter", MATRIX, "--json").output)
    assert {"tensor", "k", "lambda_low", "lambda_high"} <= set(line)
    compared = run("report", one, two, "--by", "k").output
    assert MATRIX in compared
    assert compared.strip().endswith("22 tensors differ")
    assert run("report", one, one).output.strip().endswith("0 tensors differ")


@pytest.mark.parametrize(
    "arguments",
    [["--sort", "lamda"], ["--columns", "foo"], ["--filter", "x<1"], ["--filter", "k<b"]],
)
def test_wrong_requests_are_named(tmp_path, arguments):
    path = tmp_path / "r.jsonl"
    with Recorder(new_header(method="monosoup"), path) as recorder:
        recorder.add(TensorRecord(tensor="a", shape=(1,), dtype="float32", action="kept", k=1))
    result = run("report", path, *arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "empty"),
        ("{", "line 1"),
        ('{"kind":"header"}', "schema version"),
        ('{"kind":"header","schema_version":"99"}', "99"),
        ('{"kind":"header","schema_version":"1","created":"x","versions":{}}\n{"tensor":1}', "line 2"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, text, named):
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(str(path))) as raised:
        read_report(path)
    assert named in str(raised.value)
    assert run("report", path).exit_code == 1
    assert run("report", tmp_path / "none").exit_code == 1


def test_schema_is_documented():
    """docs/report.md names every field of the schema."""
    text = (ROOT / "docs" / "report.md").read_text()
    for model in (ReportHeader, InputModel, TensorRecord, SpectrumCurve):
        for name in model.model_fields:
            assert f"`{name}`" in text, f"docs/report.md does not describe {model.__name__}.{name}"


def test_verbose_logs_a_line_a_tensor(tmp_path, family, caplog):
    models = family("qwen3-tied", "bf16")
    with caplog.at_level(logging.INFO, "mergekit_monosoup"):
        merged(tmp_path, recipe(models.base, models.tuned[0]))
    lines = [
        record.message for record in caplog.records if record.name == "mergekit_monosoup.merging.progress"
    ]
    assert len(lines) == 35
    assert any(re.match(rf"{MATRIX}: edited: k \d+, r 40, lambda_high", line) for line in lines)


def test_sorting_knows_numbers_in_names():
    records = [TensorRecord(tensor=f"l.{i}.w", shape=(), dtype="f", action="kept") for i in (10, 9, 1)]
    assert [r.tensor for r in sorted_records(records, "tensor")] == ["l.1.w", "l.9.w", "l.10.w"]
    with pytest.raises(ParameterError):
        sorted_records(records, "nothing")
    assert condition("action=kept")(records[0])
