"""Searches on a small pair, with scores that are real commands."""

from __future__ import annotations

import json
import sys

import torch
from checkpoints import load_tensors
from click.testing import CliRunner
from commands import forget_loaders, recipe, write_config
from safetensors.torch import save_file

from mergekit_monosoup.cli import main

# Distance to a target that lies between the two checkpoints, and noise on it that is the same for the same
# model; notes every call. With a file `stop`, the process that asks is killed in the middle.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file
folder, target = sys.argv[1:]
# No argument: the content of files that are named is a part of what a score is.
log = Path(__file__).with_name("calls.txt")
with open(log, "a") as file:
    print(Path(target).stem, Path(folder).name, file=file)
stop = log.with_name("stop")
if stop.exists() and len(open(log).readlines()) >= int(stop.read_text()):
    os.kill(os.getppid(), signal.SIGKILL)
weights, aim = load_file(folder + "/model.safetensors"), load_file(target)
total = sum(float(((weights[n].astype(np.float64) - aim[n]) ** 2).sum()) for n in aim)
size = sum(float((aim[n].astype(np.float64) ** 2).sum()) for n in aim)
print("distance:", 1e3 * (total / size) ** 0.5)
"""
GRID = ["Wise-FT 0.3", "Wise-FT 0.5", "Wise-FT 0.7", "Wise-FT 0.9"]


def pair_of(family):
    """Base and fine-tuned checkpoint."""
    found = family("qwen3-tied", "fp32")
    return found.base, found.tuned[0]


def write_task(tmp_path, models):
    """The recipe's file, the options of both scores, and the file that lists their calls."""
    base, tuned = (load_tensors(folder) for folder in models)
    generator = torch.Generator().manual_seed(3)
    script, log = tmp_path / "score.py", tmp_path / "calls.txt"
    script.write_text(SCRIPT)
    options = []
    for name, share in (("id", 0.9), ("ood", 0.4)):
        aim = {
            n: w0 + share * (tuned[n] - w0) + 1e-4 * torch.randn(w0.shape, generator=generator)
            for n, w0 in base.items()
        }
        save_file(aim, tmp_path / f"{name}.safetensors")
        command = f"{sys.executable} {script} {{model}} {tmp_path / name}.safetensors"
        options += ["--score", f"{name}={command}"]
    return write_config(tmp_path, recipe(*models)), [*options, "--lower-is-better"], log


def tune(file, out, *options, code=0):
    forget_loaders()
    result = CliRunner().invoke(main, ["tune", *map(str, (file, out, *options))])
    forget_loaders()
    assert result.exit_code == code, result.output
    return result.output


def calls(log):
    return log.read_text().splitlines() if log.exists() else []


def found(out):
    return json.loads((out / "tune.json").read_text())
