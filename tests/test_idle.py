"""How long idle threads of BLAS spin: said in time, left to the user, and believed."""

from __future__ import annotations

import pytest
from environments import OPT_OUT, ROOT, dependency_folders
from stand_ins import script

from mergekit_monosoup.spectral.idle import VARIABLE, threads_sleep

SHOW = f"import os; print(os.environ.get({VARIABLE!r}))"
ROOM = "import mergekit_monosoup.spectral.edit\n"


@pytest.fixture
def scientific(environment):
    """The environment with the hook, and everything that the package needs."""
    environment.see(*dependency_folders())
    return environment


def test_it_is_said_before_scipy_is_loaded_and_not_afterwards(scientific):
    assert scientific.output(*script(ROOM + SHOW)) == "19"
    assert scientific.output(*script("import scipy.linalg\n" + ROOM + SHOW)) == "None"


def test_the_user_has_said_what_to_do(scientific):
    assert scientific.output(*script(ROOM + SHOW), **{VARIABLE: "26"}) == "26"


def test_the_hook_says_it_when_mergekit_is_imported(stand_in):
    """In time for mergekit, which brings scipy with transformers; other programs are left alone."""
    assert stand_in.output(*script("import mergekit\n" + SHOW)) == "19"
    assert stand_in.output(*script("import json\n" + SHOW)) == "None"
    assert stand_in.output(*script("import mergekit\n" + SHOW), **{OPT_OUT: "0"}) == "None"
    code = f"import mergekit, sys\n{SHOW}\nprint('numpy' in sys.modules, 'scipy' in sys.modules)"
    assert stand_in.output(*script(code)).split() == ["19", "False", "False"]


def test_a_damaged_package_does_not_stop_mergekit(stand_in):
    (stand_in.site / "mergekit_monosoup" / "spectral" / "idle.py").write_text(
        "raise RuntimeError('broken')\n"
    )
    assert stand_in.output(*script("import mergekit\n" + SHOW)) == "None"


@pytest.mark.parametrize(("exponent", "sleep"), [("10", True), ("30", False), ("", False), ("soon", False)])
def test_the_variable_says_what_threads_do(monkeypatch, exponent, sleep):
    """Whatever the machine is busy with."""
    monkeypatch.setenv(VARIABLE, exponent)
    assert threads_sleep() is sleep


def test_benchmarks_import_the_package_before_scipy():
    """Otherwise they would measure what a merge does not do."""
    for name in ("spectral", "floor", "growth", "memory", "projector"):
        text = (ROOT / "benchmarks" / f"{name}.py").read_text("utf-8")
        if "from scipy" in text:
            assert text.index("from cases import") < text.index("from scipy")
