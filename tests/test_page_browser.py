"""The page of a merge in a real browser: it sorts, filters, shows, prints, and works without a mouse."""

from __future__ import annotations

import os

import pytest
from browsers import Opened, chromium
from pages import HOSTILE, front, full_page, header, records

from mergekit_monosoup.report.page.content import Page, merge_page
from mergekit_monosoup.report.page.render import write_page
from mergekit_monosoup.report.page.tensors import Table

MATRIX = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    write_page(full_page(), file)
    return file


@pytest.fixture
def opened(browser, file):
    opened = Opened(browser, file)
    yield opened.page
    opened.close()


def shown(page):
    return page.locator("#table tbody tr:not([hidden]) th").all_inner_texts()


def column(page, heading):
    heads = page.locator("#table thead th").all_inner_texts()
    number = [head.strip(" ▲▼") for head in heads].index(heading)
    return [row.split("\t")[number] for row in page.locator("#table tbody").inner_text().splitlines()]


def test_sorts(opened):
    heading = opened.locator("#table thead th", has_text="λ_high")
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert opened.locator("#table [aria-sort]").count() == 1
    values = column(opened, "λ_high")
    numbers = [float(value) for value in values if value]
    assert numbers == sorted(numbers, reverse=True)
    # Without a value: at the end, whatever the order.
    assert values[len(numbers) :] == [""] * 4
    heading.locator("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    values = column(opened, "λ_high")
    assert [float(value) for value in values[: len(numbers)]] == sorted(numbers)
    assert values[len(numbers) :] == [""] * 4
    opened.locator("#table thead button").first.press("Space")
    names = column(opened, "tensor")
    assert names.index("model.layers.0.mlp.up_proj.weight") < names.index(MATRIX)


def test_filters(opened):
    every = len(shown(opened))
    opened.get_by_label("Name contains").fill("UP_PROJ")
    assert len(shown(opened)) == 4
    assert opened.get_by_role("status").inner_text() == f"4 of {every} tensors"
    opened.get_by_label("Show").select_option("rounding share above a third")
    assert shown(opened) == [MATRIX]
    opened.get_by_role("button", name="Reset").click()
    assert opened.get_by_role("status").get_by_text("21 tensors", exact=True).inner_text()
    assert len(shown(opened)) == every == 21
    # What is worth a look leads to its tensors.
    finding = opened.locator(".findings li", has_text="k = r")
    finding.get_by_role("link", name="Show these tensors").press("Enter")
    assert shown(opened) == ["model.layers.2.mlp.up_proj.weight"]


def test_shows_a_spectrum(opened):
    said = opened.locator("#spectrum-said")
    # At first, where fine-tuning has changed most.
    assert said.inner_text().startswith("model.layers.3.")
    opened.get_by_label("Spectrum of").select_option(MATRIX)
    assert said.inner_text().startswith(f"{MATRIX}: split: k = 32 of r = 64, P_k = 0.9")
    assert "R = 0.8: k = 16" in said.inner_text()
    chart = opened.get_by_role("img", name=f"Singular values of {MATRIX}")
    assert chart.locator("g.mark-line path").first.get_attribute("d").count("L") > 10
    assert chart.locator("g.mark-rule line").count() == 2
    assert opened.get_by_role("img", name=f"Energy kept against rank in {MATRIX}").is_visible()
    opened.locator("#spectra summary").click()
    assert opened.locator("#spectrum-table tbody tr").count() == 48
    opened.locator("#table tr", has_text="model.embed_tokens.weight").click()
    assert said.inner_text().startswith("model.embed_tokens.weight")
    cell = opened.locator("#map-chart g.clickable rect").nth(5)
    cell.hover()
    cell.click()
    assert said.inner_text().startswith("model.layers.")


def test_the_map(opened):
    cells = opened.locator("#map-chart g.clickable rect")
    assert cells.count() == 17
    before = cells.nth(1).get_attribute("fill")
    opened.get_by_role("radio", name="λ_high").focus()
    opened.keyboard.press("ArrowRight")
    assert opened.get_by_role("radio", name="relative update").is_checked()
    assert cells.nth(1).get_attribute("fill") != before
    assert "‖ΔW‖" in opened.locator("#metric-title").inner_text()
    opened.locator("#where summary").click()
    heads = opened.locator("#map-table thead th").all_inner_texts()
    assert heads == ["module", *(f"layer {i}" for i in range(4)), "outside the layers"]
    row = opened.locator("#map-table tbody tr", has_text="mlp.up_proj").inner_text().split("\t")
    assert row == ["mlp.up_proj", "0.01", "0.02", "0.03", "0.04", ""]


def test_the_search(opened):
    chart = opened.locator("#front-chart")
    assert chart.get_by_text("chosen").is_visible()
    assert chart.get_by_role("img", name="Trials by id and ood").is_visible()
    chosen = opened.locator("#front-table tr", has_text="chosen").inner_text().split("\t")
    assert chosen == ["split: energy <0.8>", "chosen, front", "1.25", "1.26", "1.4"]


def test_without_a_mouse(opened):
    """Each control is reached by the tab key, none holds it, and the first leads past the navigation."""
    reached = []
    for _ in range(200):
        opened.keyboard.press("Tab")
        reached.append(opened.evaluate("document.activeElement.id || document.activeElement.innerText"))
        if reached[-1].startswith("merge_method"):
            break
    assert reached[0] == "Skip to the content"
    assert {"spectrum-of", "search", "group", "Reset", "λ_high", "Show these tensors"} <= {
        text.strip() for text in reached
    }
    assert "merge_method: monosoup" in reached[-1]
    opened.keyboard.press("Home")
    opened.locator(".skip").focus()
    opened.keyboard.press("Enter")
    assert opened.evaluate("document.activeElement.id") == "main"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_is_read_by_all(browser, file, scheme):
    """axe: names, roles, headings, contrast; with all that can be folded unfolded."""
    from axe_playwright_python.sync_playwright import Axe

    opened = Opened(browser, file, color_scheme=scheme)
    opened.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = Axe().run(opened.page)
    assert found.violations_count == 0, found.generate_report()
    paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is (scheme == "light")
    _keep(opened.page, f"page-{scheme}.png")
    opened.close()


def test_prints(browser, file):
    opened = Opened(browser, file, color_scheme="dark")
    opened.page.emulate_media(media="print")
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not opened.page.get_by_role("button", name="Reset").is_visible()
    # The whole table, not what its window shows.
    assert opened.page.evaluate(
        "[...document.querySelectorAll('.scroll.tall')].every(e => e.scrollHeight <= e.clientHeight + 1)"
    )
    assert opened.page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    opened.close()


def test_names_of_strangers_do_nothing(browser, tmp_path):
    write_page(full_page(HOSTILE), tmp_path / "page.html")
    opened = Opened(browser, tmp_path / "page.html")
    assert set(HOSTILE) <= {name.replace("\n", "\u2028") for name in shown(opened.page)}
    for name in HOSTILE:
        opened.page.get_by_label("Spectrum of").select_option(index=0)
        opened.page.locator("#table tbody th").get_by_text(name, exact=True).click()
        assert opened.page.locator("#spectrum-said").inner_text().startswith(name.partition("\u2028")[0])
    assert opened.page.locator("img").count() == 0
    opened.close()


def test_without_scripts_the_figures_are_there(browser, file):
    opened = Opened(browser, file, java_script_enabled=False)
    assert opened.page.get_by_text("need JavaScript").is_visible()
    assert opened.page.locator("#table tbody tr").count() == 21
    opened.close()


@pytest.mark.parametrize("content", ["kept", "search", "align"])
def test_other_pages_open(browser, tmp_path, content):
    kept = [r for r in records() if r.action == "kept"]
    table = Table([], [], [], [], 0)
    values = [[1.0, -0.3, None], [-0.3, 1.0, 0.9], [None, 0.9, 1.0]]
    names = ["one", "two", "a third with a longer name"]
    data = {"averages": {"names": names, "values": values}, "cosines": {"one, two": [0.1, 0.1, -0.4]}}
    page = {
        "kept": lambda: merge_page(header(), kept, "kept"),
        "search": lambda: merge_page(header(), (), "search", front()),
        "align": lambda: Page("3 fine-tunes", "", ["Compared."], [], table, data=data),
    }[content]()
    write_page(page, tmp_path / "page.html")
    opened = Opened(browser, tmp_path / "page.html")
    assert opened.page.get_by_role("img").count() == {"kept": 0, "search": 1, "align": 2}[content]
    _keep(opened.page, f"{content}.png")
    opened.close()


def _keep(page, name):
    """Keep a picture for people to look at, where they ask for it."""
    folder = os.environ.get("MONOSOUP_SCREENSHOTS")
    if folder:
        page.screenshot(path=os.path.join(folder, name), full_page=True)
