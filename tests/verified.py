"""Models with a report to verify, and what `verify` says of them."""

from __future__ import annotations

import hashlib
import shutil

import torch
from checkpoints import load_tensors
from click.testing import CliRunner
from safetensors.torch import save_file

from mergekit_monosoup.cli import main
from mergekit_monosoup.merging.verify import verify_folder
from mergekit_monosoup.report.recorder import new_header
from mergekit_monosoup.report.schema import TensorRecord

NAME = "model.layers.1.mlp.up_proj.weight"


def sha256(tensor):
    return hashlib.sha256(bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())).hexdigest()


def write_report(folder, tensors, **changes):
    lines = [new_header(method="monosoup").model_dump_json()]
    for name, tensor in tensors.items():
        record = TensorRecord(
            tensor=name,
            shape=tuple(tensor.shape),
            dtype="bfloat16",
            action="kept",
            sha256=changes.get(name, sha256(tensor)),
        )
        lines.append(record.line())
    (folder / "monosoup_report.jsonl").write_text("\n".join(lines) + "\n")


def reported_model(tmp_path, family):
    """A sharded model with a report."""
    source = family("qwen3-tied", "bf16", max_shard_size="30KB").tuned[0]
    shutil.copytree(source, tmp_path / "model")
    write_report(tmp_path / "model", load_tensors(source))
    return tmp_path / "model"


def single_file(tmp_path, family):
    source = family("qwen3-tied", "bf16").tuned[0]
    shutil.copytree(source, tmp_path / "single")
    return tmp_path / "single"


def command(*arguments):
    result = CliRunner().invoke(main, ["verify", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def problems(folder):
    return verify_folder(folder).problems


def rewrite(model, change):
    tensors = load_tensors(model)
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
