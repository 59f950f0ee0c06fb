"""The start-up hook, in fresh processes: what it never breaks."""

from __future__ import annotations

import os
import shutil

import pytest
import yaml
from environments import OPT_OUT, dependency_folders
from stand_ins import only_line

DAMAGE = {
    "package missing": lambda package: shutil.rmtree(package),
    "syntax error in the package": lambda package: (package / "__init__.py").write_text("def (\n"),
    "syntax error in the hook": lambda package: (package / "autoload.py").write_text("def (\n"),
    "hook missing": lambda package: (package / "autoload.py").unlink(),
    "hook without install": lambda package: (package / "autoload.py").write_text(""),
    "import error over several lines": lambda package: (package / "__init__.py").write_text(
        "raise ImportError('one\\ntwo')\n"
    ),
    "install raises": lambda package: (package / "autoload.py").write_text(
        "def install(): raise RuntimeError('no')\n"
    ),
}


class TestBrokenAtStartup:
    @pytest.mark.parametrize("damage", DAMAGE)
    @pytest.mark.parametrize("switches", [(), ("-W", "error"), ("-I",)], ids=["plain", "-W error", "-I"])
    def test_python_works_and_says_once_what_to_do(self, environment, damage, switches):
        DAMAGE[damage](environment.site / "mergekit_monosoup")
        done = environment.run(*switches, "-c", "print('works')")
        assert (done.returncode, done.stdout.strip()) == (0, "works")
        line = only_line(done.stderr)
        assert "Reinstall mergekit-monosoup" in line
        assert "delete mergekit_monosoup.pth" in line

    @pytest.mark.skipif(os.name == "nt", reason="closes a file descriptor by a shell")
    def test_standard_error_is_closed(self, environment):
        DAMAGE["package missing"](environment.site / "mergekit_monosoup")
        code = f"import os; print(os.system('{environment.python} -c \"print(1)\" 2>&-'))"
        assert environment.output("-S", "-c", code).split() == ["1", "0"]

    def test_interrupt_is_not_swallowed(self, environment):
        (environment.site / "mergekit_monosoup" / "__init__.py").write_text("raise KeyboardInterrupt\n")
        done = environment.run("-c", "print('works')")
        assert done.returncode != 0
        assert done.stdout == ""

    @pytest.mark.slow
    def test_stock_command_merges_by_another_method(self, environment, family, tmp_path):
        (environment.site / "mergekit_monosoup" / "registry.py").write_text("def (\n")
        environment.see(*dependency_folders())
        base, tuned = family().base, family().tuned[0]
        config = tmp_path / "config.yml"
        models = [{"model": str(m), "parameters": {"weight": 0.5}} for m in (base, tuned)]
        config.write_text(yaml.safe_dump({"merge_method": "linear", "models": models, "dtype": "float32"}))
        out = tmp_path / "out"
        done = environment.run("-m", "mergekit.scripts.run_yaml", config, out, "--no-write-model-card")
        assert done.returncode == 0, done.stderr
        assert (out / "model.safetensors").exists()
        assert done.stderr.count("mergekit-monosoup: ") == 1


FAILURES = {
    "changed mergekit": "from mergekit.merge_methods import gone",
    "missing dependency": "import a_module_that_is_not_there",
    "broken file": "def (",
    "error on registering": "def register(): raise RuntimeError('one\\ntwo')",
    "error without a text": "class E(Exception):\n def __str__(self): raise E\ndef register(): raise E",
}


class TestBrokenRegistration:
    @pytest.mark.parametrize("failure", FAILURES)
    @pytest.mark.parametrize("switches", [(), ("-W", "error"), ("-I",)], ids=["plain", "-W error", "-I"])
    def test_mergekit_goes_on_with_one_warning(self, stand_in, failure, switches):
        (stand_in.site / "mergekit_monosoup" / "registry.py").write_text(FAILURES[failure])
        code = "import mergekit.merge_methods as m, mergekit.merge_methods.base; print(*m.events)"
        done = stand_in.run(*switches, "-c", code)
        assert (done.returncode, done.stdout.strip()) == (0, "started finished")
        line = only_line(done.stderr)
        assert "mergekit-monosoup doctor" in line
        assert "upgrade" in line
        assert f"{OPT_OUT}=0" in line

    def test_no_standard_error(self, stand_in):
        (stand_in.site / "mergekit_monosoup" / "registry.py").write_text("def (")
        code = "import sys; sys.stderr = None; import mergekit.merge_methods as m; print(*m.events)"
        assert stand_in.output("-c", code) == "started finished"

    def test_interrupt_is_not_swallowed(self, stand_in):
        (stand_in.site / "mergekit_monosoup" / "registry.py").write_text("raise KeyboardInterrupt")
        done = stand_in.run("-c", "import mergekit.merge_methods")
        assert done.returncode != 0
        assert "KeyboardInterrupt" in done.stderr
