"""`mergekit-monosoup doctor` in environments that lack something, always in real processes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from environments import OPT_OUT, PACKAGE, Environment, dependency_folders, link_all

from mergekit_monosoup.cli import diagnosis, installation

CALL = ("-c", "from mergekit_monosoup.cli import main; main()", "doctor")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="builds environments from symbolic links")


@pytest.fixture
def environment(tmp_path):
    """An environment into which the package is installed by hand, and nothing else."""
    made = Environment(tmp_path / "environment")
    made.add_hook()
    made.add_package()
    return made


def diagnose(environment: Environment, *switches: str, **variables: str) -> dict:
    """Run the doctor; its JSON report, with the problems of each route as `reasons`."""
    done = environment.run(*switches, *CALL, "--json", **variables)
    assert "Traceback" not in done.stderr
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    assert report["ok"] is all(route["ok"] for route in report["routes"])
    report["reasons"] = {r["name"]: [p["reason"] for p in r["problems"]] for r in report["routes"]}
    assert all(p["remedy"] for r in report["routes"] for p in r["problems"])
    return report


def distribution(folder: Path, name: str, version: str) -> None:
    """Metadata as pip leaves them."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_mergekit_not_installed(environment, tmp_path):
    environment.see(link_all(tmp_path / "links", dependency_folders(), but=("mergekit",)))
    report = diagnose(environment)
    assert set(map(tuple, report["reasons"].values())) == {("mergekit is not installed",)}
    assert report["versions"]["mergekit"] is None
    assert installation.MERGEKIT_REQUIREMENT in report["routes"][0]["problems"][0]["remedy"]


@pytest.mark.parametrize("version", ["0.1.4", "0.2.0", "1.0"])
def test_mergekit_outside_the_range(environment, tmp_path, version):
    environment.see(link_all(tmp_path / "links", dependency_folders(), but=("mergekit",)))
    distribution(environment.site, "mergekit", version)
    (environment.site / "mergekit" / "merge_methods").mkdir(parents=True)
    (environment.site / "mergekit" / "merge_methods" / "__init__.py").write_text("REGISTRY = {}\n")
    report = diagnose(environment)
    for reasons in report["reasons"].values():
        assert len(reasons) == 1
        assert f"mergekit {version} is installed" in reasons[0]
        assert installation.MERGEKIT_REQUIREMENT in reasons[0]


def test_torch_missing(environment, tmp_path):
    environment.see(link_all(tmp_path / "links", dependency_folders(), but=("torch", "functorch")))
    report = diagnose(environment)
    assert set(map(tuple, report["reasons"].values())) == {("torch is not installed",)}
    assert report["versions"]["torch"] is None


def test_hook_is_broken(environment, tmp_path):
    """The text form as well: every problem is told with its reason and its remedy."""
    environment.see(link_all(tmp_path / "links", dependency_folders(), but=("torch", "functorch")))
    (environment.site / "mergekit_monosoup.pth").write_text(
        (environment.site / "mergekit_monosoup.pth").read_text().replace("import install", "import gone")
    )
    done = environment.run(*CALL)
    assert done.returncode == 1
    assert done.stdout.count("FAILS") == 3
    assert "had no effect: ImportError: cannot import name 'gone'" in done.stdout
    assert done.stdout.count("why: ") == done.stdout.count("remedy: ") == 4


@pytest.mark.slow
def test_only_the_stock_commands_fail(environment, tmp_path):
    """The package on PYTHONPATH as after `pip install --target`, the opt-out, a foreign mergekit-yaml."""
    environment.see(*dependency_folders())
    target = tmp_path / "target"
    target.mkdir()
    for entry in environment.site.glob("mergekit_monosoup*"):
        entry.rename(target / entry.name)
    foreign = Environment(tmp_path / "foreign")
    command = foreign.bin / "mergekit-yaml"
    command.write_text(f"#!{foreign.python}\n")
    command.chmod(0o755)
    path = os.pathsep.join((str(foreign.bin), str(environment.bin)))
    report = diagnose(environment, PYTHONPATH=str(target), PATH=path, **{OPT_OUT: "off"})
    stock, *others = report["reasons"].values()
    assert others == [[], []]
    no_site, opted_out, other_python = stock
    assert f"lies in {target}, which is no site directory" in no_site
    assert f"{OPT_OUT}=off is set" in opted_out
    assert f"({command}) belongs to another Python, {foreign.python}" in other_python


@pytest.mark.slow
def test_started_without_site(environment):
    environment.see(*dependency_folders())
    folders = os.pathsep.join(map(str, (environment.site, *dependency_folders())))
    report = diagnose(environment, "-S", PYTHONPATH=folders)
    assert report["reasons"]["stock"] == ["Python was started with -S and runs no start-up files"]
    assert report["reasons"]["command"] == report["reasons"]["python"] == []


@pytest.mark.slow
def test_source_folder_without_start_up_file(environment):
    environment.see(*dependency_folders())
    for entry in environment.site.glob("mergekit_monosoup.*"):
        entry.unlink()
    report = diagnose(environment)
    assert "no site directory" in report["reasons"]["stock"][0]
    assert report["reasons"]["command"] == report["reasons"]["python"] == []


@pytest.mark.slow
def test_name_taken_by_another_package(environment):
    environment.see(*dependency_folders())
    registry = environment.site / "mergekit_monosoup" / "registry.py"
    registry.write_text(
        registry.read_text("utf-8").replace(
            "    from mergekit import merge_methods\n",
            (
                "    from mergekit import merge_methods\n"
                "    from copy import copy\n"
                "    import dataclasses\n"
                "    other = copy(merge_methods.get('linear'))\n"
                "    try:\n"
                "        other.spec = dataclasses.replace(other.spec, name='monosoup')\n"
                "        merge_methods.register(other)\n"
                "    except ValueError:\n"
                "        pass\n"
            ),
            1,
        )
    )
    report = diagnose(environment)
    for reasons in report["reasons"].values():
        assert len(reasons) == 1
        assert "'monosoup' is already registered by" in reasons[0]


def test_leftover_start_up_files(environment, monkeypatch):
    monkeypatch.setattr(installation.site, "getsitepackages", lambda: [str(environment.site)])
    monkeypatch.setattr(installation.site, "ENABLE_USER_SITE", False)
    leftover = f"installed beside the start-up files in {environment.site}"
    assert any(leftover in note for note in diagnosis.notes())
    distribution(environment.site, "mergekit_monosoup", "0.1.0")
    assert not any(leftover in note for note in diagnosis.notes())


def test_duplicate_start_up_files(environment, tmp_path, monkeypatch):
    second = Environment(tmp_path / "second")
    second.add_hook()
    folders = [str(environment.site), str(second.site)]
    monkeypatch.setattr(installation.site, "getsitepackages", lambda: folders)
    assert any("several site directories" in note for note in diagnosis.notes())


class TestWhoseCommand:
    @pytest.mark.parametrize(
        "head",
        [
            "#!{python}\n",
            "#! {python}\n",
            "#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n",
            "#!/bin/sh\n'''exec' {python} \"$0\" \"$@\"\n' '''\n",
        ],
    )
    def test_interpreter_named_by_a_script(self, tmp_path, head):
        script = tmp_path / "mergekit-yaml"
        script.write_text(head.format(python=sys.executable) + "import sys\n")
        assert installation.interpreter_of(str(script)) == sys.executable

    @pytest.mark.parametrize("head", ["#!/usr/bin/env bash\n", "#!/bin/sh\nexec x\n", "MZ\x90", ""])
    def test_no_interpreter(self, tmp_path, head):
        script = tmp_path / "mergekit-yaml"
        script.write_text(head)
        assert installation.interpreter_of(str(script)) is None

    def test_env_looks_on_path(self, tmp_path, monkeypatch):
        script = tmp_path / "mergekit-yaml"
        script.write_text("#!/usr/bin/env python3\n")
        interpreter = tmp_path / "python3"
        interpreter.touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert installation.interpreter_of(str(script)) == str(interpreter)

    def test_names_of_one_installation(self, environment, tmp_path):
        other = Environment(tmp_path / "other")
        names = [environment.bin / name for name in ("python", "python3")]
        assert len({installation.installation_of(str(name)) for name in names}) == 1
        assert installation.installation_of(str(other.python)) != installation.installation_of(str(names[0]))


def test_no_interpreter_to_start(monkeypatch):
    for executable in ("", None, str(PACKAGE / "there-is-none")):
        monkeypatch.setattr(diagnosis.sys, "executable", executable)
        with diagnosis.fresh_interpreter() as probe:
            assert probe is None
            assert "no fresh interpreter" in diagnosis.startup_problems(probe)[0].reason
