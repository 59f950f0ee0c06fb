"""Inputs that cannot be meant: copies of the base, adapters that no split changes; and columns by heading."""

from __future__ import annotations

import logging

import pytest
import yaml
from adapters import make_adapter
from checkpoints import copy_with_tensors, load_tensors
from click.testing import CliRunner
from commands import forget_loaders, recipe

from mergekit_monosoup.cli import main
from mergekit_monosoup.errors import ConfigurationError, ParameterError
from mergekit_monosoup.planning.models import parse_reference
from mergekit_monosoup.report.reader import read_report
from mergekit_monosoup.report.schema import TensorRecord
from mergekit_monosoup.report.table import records_table, remark, sorted_records, summary

pytestmark = pytest.mark.usefixtures("registered")


def record(name="a", reason="", **known):
    return TensorRecord(tensor=name, shape=(4, 4), dtype="float32", action="edited", reason=reason, **known)


def test_a_copy_of_the_base_is_not_counted_as_edited(tmp_path, family, caplog):
    base = family("qwen3-tied", "bf16").base
    copy = copy_with_tensors(base, tmp_path / "copy", load_tensors(base))
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe(base, copy)))
    forget_loaders()
    with caplog.at_level(logging.WARNING):
        result = CliRunner().invoke(main, ["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out")])
    forget_loaders()
    assert result.exit_code == 0, result.output
    said = summary(read_report(tmp_path / "out").records)
    assert "22 without update" in said
    assert "edited" not in said
    assert "22 without update" in (tmp_path / "out" / "README.md").read_text()
    assert any("nothing was edited" in message for message in caplog.messages)
    assert "nothing was edited" in CliRunner().invoke(main, ["report", str(tmp_path / "out")]).output


def test_a_split_that_keeps_everything_is_named():
    unchanged = record(k=4, r=48, lambda_high=1.0, lambda_low=0.0, cos_alpha=0.0)
    assert "energy: 0.8" in str(remark([unchanged, record("b", "zero update")]))
    assert remark([unchanged, record("b", k=2, r=4, lambda_high=0.9, cos_alpha=0.1)]) is None
    assert "every update is zero" in str(remark([record("c", "zero update")]))
    assert remark([]) is None


def test_an_adapter_that_stays_as_it_is(tmp_path):
    """A flat spectrum: the effective rank is all of it."""
    from safetensors.torch import load_file, save_file
    from torch import linalg, randn

    adapter = make_adapter("plain", tmp_path / "in")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        flat = linalg.qr(randn(max(tensor.shape), min(tensor.shape)))[0]
        tensors[name] = (flat if tensor.shape[0] > tensor.shape[1] else flat.T).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    result = CliRunner().invoke(main, ["lora", str(adapter), str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "--energy 0.8" in result.output
    lower = CliRunner().invoke(main, ["lora", str(adapter), str(tmp_path / "lower"), "--energy", "0.5"])
    assert "--energy 0.8" not in lower.output


@pytest.mark.parametrize(
    ("address", "known"),
    [
        ("https://huggingface.co/user/name", "user/name"),
        ("http://www.huggingface.co/user/name/", "user/name"),
        ("https://huggingface.co/user/name/tree/v1.0", "user/name@v1.0"),
        ("https://huggingface.co/user/name/blob/abc/config.json", "user/name@abc"),
        ("https://huggingface.co/user/name?library=transformers", "user/name"),
        ("https://hf.co/user/name#readme", "user/name"),
        ("hf://user/name", "user/name"),
        ("https://example.com/x", "user/name"),
    ],
)
def test_addresses(address, known):
    with pytest.raises(ConfigurationError) as caught:
        parse_reference(address)
    assert known in str(caught.value).partition("write the id")[2]


def test_columns_by_field_or_heading():
    records = [
        record("b", k=2, r=4, lambda_high=0.5, relative_update=0.1),
        record("a", k=3, r=4, lambda_high=0.9),
    ]
    for names in (("lambda_high", "relative_update"), ("l_high", "rel"), ("tensor", "l_high", "rel")):
        heading = records_table(records, names).splitlines()[0]
        assert heading.split() == ["tensor", "l_high", "rel"]
    assert [r.tensor for r in sorted_records(records, "l_high")] == ["b", "a"]
    with pytest.raises(ParameterError, match="headings"):
        records_table(records, ("nonsense",))
