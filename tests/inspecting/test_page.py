"""The page in a browser, as a person with a mouse or a keyboard meets it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser_testing import CHROMIUM, Browser

from ept.inspecting.page import page, write_page
from ept.inspecting.summary import Inspection, inspect_adapter
from ept.saved import read_adapter


@pytest.fixture(scope="module")
def inspection(adapter: SimpleNamespace) -> Inspection:
    return inspect_adapter(read_adapter(adapter.folder))


def test_names_are_escaped_and_nothing_is_loaded(inspection: Inspection) -> None:
    text = page(inspection)
    assert text.count("<script") == text.count("</script>") == 2
    assert "<b>delta" not in text
    for loader in ("http:", "https:", "@import", "url(", "src=", "<link"):
        assert loader not in text
    assert "default-src 'none'" in text


@pytest.fixture(scope="module")
def browser(inspection: Inspection, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def file(inspection: Inspection, tmp_path: Path) -> Path:
    return write_page(tmp_path / "page.html", inspection)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_its_window_and_can_be_read(browser: Browser, file: Path, width: int, dark: bool) -> None:
    browser.open(file, width=width, height=900, dark=dark)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "the page itself must not scroll sideways"
    assert browser.run("document.querySelectorAll('#gate-grid tbody tr').length") == 14
    # Every text against the colours behind it, as WCAG counts contrast.
    worst = browser.run(
        """(() => {
          const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
          const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
            .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
          const behind = (node) => {
            const layers = [];
            for (let at = node; at; at = at.parentElement)
              layers.unshift(numbers(getComputedStyle(at).backgroundColor));
            return layers.reduce((under, over) => {
              const alpha = over.length > 3 ? over[3] : 1;
              return under.map((c, i) => c * (1 - alpha) + over[i] * alpha);
            }, [255, 255, 255]);
          };
          const found = [...document.querySelectorAll("p, dt, dd, th, td, caption, a, legend, label, output, h1, h2")]
            .filter((node) => node.textContent.trim() && node.getClientRects().length)
            .map((node) => {
              const [a, b] = [light(numbers(getComputedStyle(node).color)), light(behind(node))];
              return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.outerHTML.slice(0, 120)];
            });
          return found.reduce((one, other) => (one[0] < other[0] ? one : other));
        })()"""
    )
    assert worst[0] >= 4.5, worst
    assert browser.screenshot(file.parent / "shot.png").stat().st_size > 10_000
    assert browser.problems == []
    assert set(browser.requests) <= {file.as_uri()} | {url for url in browser.requests if url.startswith("file:")}
    assert browser.run("document.title").startswith("EPT adapter"), "no name was taken for a script"


def test_filter_and_sorting_by_keyboard(browser: Browser, file: Path, inspection: Inspection) -> None:
    browser.open(file, width=1280, height=900)
    browser.run("document.getElementById('filter').focus()")
    browser.type("Q_PROJ")
    assert browser.run("document.getElementById('shown').textContent") == "2 of 14"
    visible = "[...document.querySelectorAll('.sortable tbody tr')].filter(row => !row.hidden)"
    assert browser.run(f"{visible}.map(row => row.cells[0].textContent)") == [
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    ]
    browser.run("document.getElementById('filter').value = ''")
    browser.press("Tab")  # past the filter: the first heading
    browser.press("Tab")
    assert browser.run("document.activeElement.textContent") == "numbers"
    counts = sorted(layer.parameters for layer in inspection.layers)
    shown = (
        "[...document.querySelectorAll('.sortable tbody tr')].map(r => Number(r.cells[1].textContent.replace(',','')))"
    )
    for order in (counts, counts[::-1]):
        browser.press("Enter")
        assert browser.run(shown) == order
    assert browser.run("document.querySelector('th[aria-sort]').ariaSort") == "descending"
    assert browser.problems == []


def test_gates_by_mouse_and_arrow_keys(browser: Browser, file: Path, inspection: Inspection) -> None:
    browser.open(file, width=1280, height=900)
    reading = "document.getElementById('gate-grid-reading').textContent"
    browser.move_to("#gate-grid td[data-row='3'][data-column='2']")
    layer = inspection.layers[3]
    said = browser.run(reading)
    assert said.startswith(f"{layer.name}, expert 3 (kernel size 3): weight {layer.gates[0][2]:.4f}")
    assert f"effective rank {layer.experts[2].effective_rank}" in said
    browser.run("document.querySelector('#gate-grid td[tabindex=\"0\"]').focus()")
    browser.press("ArrowDown")
    browser.press("ArrowRight")
    below = inspection.layers[1]
    assert browser.run(reading).startswith(f"{below.name}, expert 2 (kernel size 2): weight {below.gates[0][1]:.4f}")
    assert browser.run("document.querySelectorAll('#gate-grid td[tabindex=\"0\"]').length") == 1
    browser.run("document.querySelectorAll('input[name=task]')[1].click()")
    assert browser.run("document.querySelector('#gate-grid caption').textContent").endswith(inspection.tasks[1])
    shown = browser.run(
        "[...document.querySelectorAll('#gate-grid tbody tr')].map(r => [...r.cells].slice(1).map(c => c.textContent))"
    )
    expected = [[f"{w:.2f}" if w > 0 else "·" for w in layer.gates[1]] for layer in inspection.layers]
    assert shown == expected
    browser.run("document.querySelectorAll('input[name=measure]')[2].click()")
    first = browser.run('document.querySelector(\'#rank-grid td[data-row="0"][data-column="0"]\').textContent')
    assert first == str(inspection.layers[0].updates[0].rank)
    assert browser.problems == []
