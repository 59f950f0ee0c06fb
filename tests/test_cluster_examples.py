"""The files of examples/cluster: they parse, name real options, and their page is what the model says."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys

import click
import pytest
import yaml
from commands import ROOT

from mergekit_monosoup.cli import main

FOLDER = ROOT / "examples" / "cluster"
PAGE = (ROOT / "docs" / "scale.md").read_text("utf-8")
SCRIPTS = [FOLDER / "slurm.sbatch", FOLDER / "by-hand.sh"]
MANIFESTS = {"kuberay-job.yaml": "RayJob", "kuberay-cluster.yaml": "RayCluster"}


CALL = re.compile(
    r"(?<![\w.-])(ray|mergekit-monosoup)\"? (start|stop|get-auth-token|symmetric-run|merge|inspect)\b"
)


def commands(text):
    """The commands in a text that are ours or Ray's, as words; comments count, continued lines are joined."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        found = list(CALL.finditer(line)) if "`" not in line else []
        ends = [*(call.start() for call in found[1:]), len(line)]
        for call, end in zip(found, ends, strict=False):
            words = shlex.split(re.sub(r'["()]', " ", line[call.end() : end]).split("||")[0], comments=True)
            yield call[1], call[2], words


def parsed(program, name, words):
    """What click makes of a command, without running it."""
    if program == "ray":
        pytest.importorskip("ray")
        group = importlib.import_module("ray.scripts.scripts").cli
    else:
        group = main
    command = group.get_command(click.Context(group), name)
    context = click.Context(command, info_name=name)
    return command.make_parser(context).parse_args(list(words))[0]


def everywhere():
    for file in sorted(FOLDER.iterdir()):
        yield from ((file.name, *command) for command in commands(file.read_text("utf-8")))
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL):
        yield from (("scale.md", *command) for command in commands(block))


@pytest.mark.parametrize(("file", "program", "name", "words"), list(everywhere()))
def test_options_are_those_of_the_commands(file, program, name, words):
    if name == "symmetric-run":
        # All but the first two goes to `ray start`.
        taken = parsed(program, name, words[:4])
        assert taken["address"]
        assert taken["min_nodes"]
        assert words[-1] == "--"
        name, words = "start", words[4:-1]
    options = parsed(program, name, words)
    if program == "mergekit-monosoup":
        assert options["ray"]


def test_every_file_names_the_command():
    named = {file for file, program, *_ in everywhere() if program == "mergekit-monosoup"}
    assert named == {file.name for file in FOLDER.iterdir()} - {"Dockerfile"} | {"scale.md"}
    for file in FOLDER.iterdir():
        assert f"(../examples/cluster/{file.name})" in PAGE


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_shell(script):
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(("name", "kind"), MANIFESTS.items())
def test_manifests(name, kind):
    manifest = yaml.safe_load((FOLDER / name).read_text("utf-8"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    image = (FOLDER / "Dockerfile").read_text("utf-8")
    assert f"ray=={spec['rayVersion']}" in image
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert groups[0]["rayStartParams"]["num-cpus"] == "0"
    for group in groups:
        for option, value in group["rayStartParams"].items():
            parsed("ray", "start", [f"--{option}", value])
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"].endswith(spec["rayVersion"])
        (mount,) = container["volumeMounts"]
        (volume,) = group["template"]["spec"]["volumes"]
        assert mount["name"] == volume["name"]
        assert mount["mountPath"] == "/models"


def test_the_tables_of_the_page_are_the_models(monkeypatch):
    """If this fails, run `python benchmarks/scale_model.py`."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    try:
        model = importlib.import_module("scale_model")
        assert PAGE.split(model.BEGIN)[1].split(model.END)[0].strip() == model.page()
    finally:
        for name in ("scale_model", "results", "common"):
            sys.modules.pop(name, None)
