"""docs/models.md says what the tests of the families have shown, and what the code does."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from models_table import PAGE, page

from mergekit_monosoup import edit_module, edit_state_dict
from mergekit_monosoup.spectral.matrix import Layout, ViewKind, choose_view

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_table_is_up_to_date():
    text = PAGE.read_text("utf-8")
    assert page(text) == text, "run python tests/models_table.py"


def test_the_views_of_the_page_are_those_of_the_code():
    rows = re.findall(r"^\| `([\w.]+)` \| \[(.*?)\] \| (\w+) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 10
    for name, shape, kind in rows:
        assert choose_view(tuple(int(n) for n in shape.split(",")), name).kind == kind, name
    assert {kind for _, _, kind in rows} == set(get_args(ViewKind))


def test_the_options_of_the_page_exist():
    text = PAGE.read_text("utf-8")
    assert all(f"`{layout}`" in text for layout in get_args(Layout))
    for function in (edit_state_dict, edit_module):
        assert function.__name__ in text


def test_the_python_examples_run(tmp_path):
    """Each example of the page, with small models in the place of files."""
    import torch
    from recorded import fine_tuned, state_dict
    from safetensors.torch import save_file

    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert examples
    base = state_dict("timm_resnet")
    for name in ("merged", "finetuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({"head.weight": torch.ones(2, 2)}, tmp_path / name / "model.safetensors")
    for example in examples:
        names = {
            "base": dict(base),
            "finetuned": fine_tuned(base),
            "base_model": torch.nn.Linear(8, 8),
            "model": torch.nn.Linear(8, 8),
            "merged_folder": tmp_path / "merged",
            "finetuned_folder": tmp_path / "finetuned",
        }
        exec(compile(example, str(PAGE), "exec"), names)
