"""The page of a merge as a file: whole, small, the same each time, and silent about its author's machine."""

from __future__ import annotations

import hashlib
import json
import re
from importlib import resources

import pytest
from click.testing import CliRunner
from commands import forget_loaders, our_command, recipe
from pages import HOSTILE, full_page, header, record, records
from soups import write_relatives

from mergekit_monosoup.cli import main
from mergekit_monosoup.report.page.advice import findings
from mergekit_monosoup.report.page.content import merge_page
from mergekit_monosoup.report.page.public import public_name, without_paths
from mergekit_monosoup.report.page.render import PAGE_NAME, page_html

pytestmark = pytest.mark.usefixtures("registered", "fresh_loaders")
LARGEST = 5_000_000
# Of a model of 70 billion parameters.
LLAMA = {
    "embed_tokens": (128256, 8192),
    "self_attn.q_proj": (8192, 8192),
    "self_attn.k_proj": (1024, 8192),
    "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (28672, 8192),
    "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
    "input_layernorm": (8192,),
}


def command(*arguments, code=0):
    forget_loaders()
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    forget_loaders()
    assert result.exit_code == code, result.output
    return result.output


def data(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html)[1])


@pytest.fixture(scope="module")
def merged(family, tmp_path_factory):
    models = family("qwen3-tied", "bf16")
    folder = tmp_path_factory.mktemp("page")
    result = our_command(folder, recipe(models.base, models.tuned[0]), "--quiet")
    assert result.exit_code == 0, result.output
    return models, folder / "out"


def test_a_merge_writes_it_beside_the_card(merged, tmp_path):
    _, out = merged
    html = (out / PAGE_NAME).read_text("utf-8")
    assert f"`{PAGE_NAME}`" in (out / "README.md").read_text("utf-8")
    # `report` makes the same page of the same report, from any folder.
    command("report", out, "--html", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text("utf-8") == html
    assert str(out.parent) not in html
    assert str(out.parent.parent) not in html
    held = data(html)
    assert len(held["values"]) == html.count('<th scope="row">') == 35
    assert {"lambda_high", "relative_update", "rounding_share", "edit_survival"} <= set(held["map"])
    cells = {(c["module"], c["layer"]) for c in held["map"]["lambda_high"]["cells"]}
    assert {("mlp.up_proj", 0), ("self_attn.q_proj", 1), ("embed_tokens", None)} <= cells


def test_without_a_report_there_is_none(merged, tmp_path):
    models, _ = merged
    result = our_command(tmp_path, recipe(models.base, models.tuned[0]), "--quiet", "--no-report")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out" / PAGE_NAME).exists()


def test_inspect(merged, tmp_path):
    models, _ = merged
    file = tmp_path / "page.html"
    output = command("inspect", models.base, models.tuned[0], "--energy", 0.8, "--html", file, "--quiet")
    assert f"Wrote {file}" in output
    html = file.read_text("utf-8")
    assert str(models.base.parent) not in html
    assert "nothing was merged" in html
    spectrum = data(html)["spectra"]["model.layers.1.mlp.up_proj.weight"]
    assert len(spectrum["i"]) == len(spectrum["s"]) == len(spectrum["e"]) <= 64
    assert spectrum["s"][0] == spectrum["e"][-1] == 1
    assert [split["name"] for split in spectrum["splits"]] == ["split", "R = 0.8"]


def test_align(family, tmp_path):
    base = family("qwen3-tied", "bf16").base
    tuned = write_relatives(tmp_path, base, (0.9, -0.8, 0.7))
    file = tmp_path / "page.html"
    output = command("align", base, *tuned, "--html", file, "--json")
    found = json.loads(output)
    html = file.read_text("utf-8")
    assert str(tmp_path) not in html
    held = data(html)
    shown = [value for row in held["averages"]["values"] for value in row]
    exact = [value for row in found["average_cosines"] for value in row]
    assert shown == pytest.approx(exact, abs=1e-4)
    assert len(held["cosines"]) == 3
    assert len(held["values"]) == len(found["tensors"])


def test_several_checkpoints(family, tmp_path):
    models = family("qwen3-tied", "bf16")
    command("inspect", models.base, *models.tuned, "--html", tmp_path / "page.html", "--quiet")
    (cosines,) = data((tmp_path / "page.html").read_text("utf-8"))["cosines"].values()
    assert len(cosines) == 35


def test_it_is_small_for_a_large_model():
    found = records(80, LLAMA, points=96)
    assert len(found) == 721
    page = merge_page(header(), found, "large")
    assert len(page.data["spectra"]) > 600
    assert len(page_html(page).encode()) < LARGEST


def test_it_is_bounded_for_any_model():
    experts = {f"mlp.experts.{i}.up_proj": (64, 64) for i in range(100)}
    found = records(40, experts, points=24)
    html = page_html(merge_page(header(), found, "experts"))
    assert len(html.encode()) < LARGEST
    assert "Of 4,001 tensors, the 3,000 with the largest updates are listed" in html
    # One cell for all experts of a layer.
    assert len(data(html)["map"]["lambda_high"]["cells"]) == 41


def test_the_same_report_gives_the_same_page():
    assert page_html(full_page()) == page_html(full_page())


def test_names_of_strangers_stay_names():
    html = page_html(full_page(HOSTILE))
    # The scripts are ours, and all of them are named by their hashes.
    named = re.search("script-src ([^;]*);", html)[1].split()
    assert all(source.startswith("'sha256-") for source in named)
    assert html.count("<script") == html.count("</script>") == len(named) + 1
    assert "<img" not in html
    assert "<b>" not in html
    assert "{{ 7 * 7 }}" in html
    assert set(HOSTILE) <= {row[0] for row in data(html)["values"]}
    assert set(HOSTILE) <= set(data(html)["spectra"])


def test_what_draws_is_what_its_authors_publish():
    folder = resources.files("mergekit_monosoup.report.page").joinpath("vendor")
    listed = re.findall(
        r"^\| `(\S+)` .* `(\w{64})` \|$", folder.joinpath("README.md").read_text(), re.MULTILINE
    )
    assert len(listed) == 2
    html = page_html(full_page())
    for name, digest in listed:
        content = folder.joinpath(name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
        assert content.decode().strip() in html
    assert html.count("Permission to use, copy, modify") == 2


def test_nobody_is_named():
    html = page_html(full_page())
    assert "jane" not in html
    assert "base-1b" in html
    kept = record("x", (4,), 0).model_copy(update={"reason": "not in /home/jane.doe/models/other/m.bin"})
    html = page_html(merge_page(header(), [kept], "x"))
    assert "jane" not in html
    assert "not in m.bin" in html


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("org/model", "org/model"),
        ("model", "model"),
        ("/home/jane/my-model/", "my-model"),
        ("./my-model", "my-model"),
        ("~/models/my-model", "my-model"),
        (r"C:\Users\jane\my-model", "my-model"),
        ("org/base+/home/jane/adapter", "org/base+adapter"),
        ("/c/hub/models--org--name/snapshots/0123456789abcdef", "org/name"),
    ],
)
def test_public_names(model, shown):
    assert public_name(model) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("edit: false", "edit: false"),
        ("||dW|| / ||W0|| below 1/3", "||dW|| / ||W0|| below 1/3"),
        ("model: org/name, ../up/there", "model: org/name, there"),
        ("base_model: '/home/jane/x'  # mine", "base_model: 'x'  # mine"),
        ("see https://arxiv.org/abs/2602.09689", "see https://arxiv.org/abs/2602.09689"),
    ],
)
def test_texts_without_paths(text, shown):
    assert without_paths(text) == shown


def test_what_is_odd_is_said():
    said = {finding.group: finding.text for finding in findings(records())}
    assert "1 of 21 tensors" in said["rounding"]
    assert "k = r" in said["whole"]
    foreign = [record(f"model.layers.{i}.w.weight", layer=i, relative_update=1.4) for i in range(3)]
    assert "may be the wrong one" in findings(foreign)[0].text
    lossy = [record("w.weight", edit_survival=0.5)]
    assert "stochastic" in findings(lossy)[0].text
    assert "stochastic" in findings(lossy, ahead=True)[0].text
    assert findings([record("w.weight")]) == []
    kept = record("w.weight", action="kept", reason="edit: false")
    assert "edit: false" in findings([kept])[0].text
    assert findings([kept.model_copy(update={"action": "averaged", "figures": {"ratio": 0.9}})]) == []


def test_alpha_is_said():
    def said(*alphas):
        held = [record(f"w{i}.weight", parameters={"alpha": a} if a else {}) for i, a in enumerate(alphas)]
        return " ".join(merge_page(header(), held, "x").sentences)

    assert "α" not in said(None)
    assert "α = 0.5." in said(0.5, 0.5)
    assert "α = 0.3 to 0.7." in said(0.7, None, 0.3)


def test_a_search_of_another_method_has_a_page(tmp_path):
    trial = {"name": "Wise-FT 0.5", "scores": {"id": 1.0}, "wise_ft": 0.5}
    file = tmp_path / "tune.json"
    file.write_text(json.dumps({"scores": [{"name": "id"}], "trials": [trial], "chosen": 0}))
    command("report", tmp_path, "--html", tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text("utf-8")
    assert "Wise-FT 0.5 (id 1)" in html
    for content in ("[]", "{", json.dumps({"scores": [{"name": "id"}], "trials": [trial], "chosen": 7})):
        file.write_text(content)
        assert str(file) in command("report", tmp_path, "--html", tmp_path / "page.html", code=1)


def test_mistakes(merged, tmp_path):
    _, out = merged
    missing = tmp_path / "none" / "page.html"
    assert f"{missing} cannot be written" in command("report", out, "--html", missing, code=1)
    assert "does not exist" in command("report", tmp_path, "--html", tmp_path / "page.html", code=1)
    assert "leave out OTHER" in command("report", out, out, "--html", tmp_path / "page.html", code=2)
    assert not list(tmp_path.iterdir())
