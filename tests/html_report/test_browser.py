"""The file in a real Chromium, without a window: it opens, asks for nothing, clicks, filters, takes keys, prints."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from architectures import build
from report_pages import HOSTILE, hostile_rules, reported

import qdq_surgery as qs
from browsers import chromium, why_none

pytest.importorskip("bokeh")
if chromium() is None:
    pytest.skip(why_none(), allow_module_level=True)

_PANEL, _FIND, _COUNT = "#panel", "#find", "#found"
_ROWS = "#cards tbody tr:not([hidden])"
#: Milliseconds that a busy machine may take for anything; nothing is slow on purpose.
_PATIENCE = 120_000
#: Of the bars, and of the line of the range, as figures.py has them.
_BARS, _RANGE = (0x3B, 0x82, 0xC4), (0xE5, 0x48, 0x4D)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    qmodel, results = reported()
    path = tmp_path_factory.mktemp("browser") / "report.html"
    qs.report(qmodel, path, **results)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def opened(browser: Any, file: Path, **options: Any) -> Iterator[Any]:
    """A page with the file; afterwards nothing has gone wrong in it, and it has asked for nothing but itself."""
    context = browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **options})
    said: list[str] = []
    asked: list[str] = []
    page = context.new_page()
    page.set_default_timeout(_PATIENCE)
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(file.as_uri(), wait_until="load")
        yield page
        assert said == []
        assert asked == [file.as_uri()]
    finally:
        context.close()


def colors(page: Any, place: str, enough: Callable[[dict[tuple[int, ...], int]], bool]) -> None:
    """Wait until the pixels of a part of the page, as it is on the screen, have ``enough`` of the colors."""
    end = time.monotonic() + _PATIENCE / 1e3
    while not enough(pixels(page, place)):
        assert time.monotonic() < end, place
        page.wait_for_timeout(50)


def pixels(page: Any, place: str) -> dict[tuple[int, ...], int]:
    """How many there are of each color."""
    from PIL import Image

    image = Image.open(io.BytesIO(page.locator(place).screenshot())).convert("RGB")
    found: dict[tuple[int, ...], int] = {}
    for count, color in image.getcolors(1 << 24) or []:
        found[color] = found.get(color, 0) + count
    return found


def near(found: dict[tuple[int, ...], int], color: tuple[int, ...]) -> int:
    """Pixels of about that color: what is drawn over a grid is blended with it."""
    return sum(
        count for each, count in found.items() if max(abs(a - b) for a, b in zip(each, color, strict=True)) <= 24
    )


def test_it_opens_and_draws_its_figures(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        page.wait_for_selector("[data-plot='costs-alone'][data-drawn]")
        page.wait_for_selector("[data-plot='outliers'][data-drawn]")
        assert page.title() == "BertModel: INT8 report"
        assert page.locator(_ROWS).count() == len(qs.quantizers(reported()[0]))
        assert page.locator("#panel").is_hidden()
        colors(page, "[data-plot='costs-alone']", lambda found: len(found) > 30)  # each cell has its own


def test_a_click_on_a_quantizer_shows_its_range_and_histogram(browser: Any, file: Path) -> None:
    qmodel, results = reported()
    name = "encoder.layer.1.output.dense._input_quantizer"
    with opened(browser, file) as page:
        page.get_by_role("button", name=name, exact=True).click()
        assert page.locator("#panel-title").inner_text() == name
        page.wait_for_selector(f"#values[data-card='{name}']")
        amax, seen = qs.quantizers(qmodel)[name].amax, results["statistics"].seen[name]
        assert amax is not None
        assert float(page.get_attribute("#values", "data-range")) == float(amax)
        assert int(page.get_attribute("#values", "data-bars")) > 10
        assert f"{seen.histogram.total:,} values" in page.locator("#caption").inner_text()
        colors(page, "#values", lambda found: near(found, _BARS) > 2_000 and near(found, _RANGE) > 100)
        facts = page.locator("#facts").inner_text()
        assert "the GEMMs are where INT8 pays" in facts
        assert "qdqbert.yaml:14" in facts


def test_a_click_on_a_line_of_a_block_shows_all_its_layers(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        page.locator("#blocks .q", has_text="matmul_q_input_quantizer").click()
        assert page.locator("#panel-title").inner_text() == "encoder.layer.0.attention.self.matmul_q_input_quantizer"
        assert page.locator("#layers button").all_inner_texts() == ["0", "1"]
        page.get_by_role("button", name="layer 1").click()
        assert page.locator("#panel-title").inner_text() == "encoder.layer.1.attention.self.matmul_q_input_quantizer"
        assert page.get_attribute("#layers button:nth-child(2)", "aria-pressed") == "true"


def test_a_weight_has_the_ranges_of_its_channels(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        page.get_by_role("button", name="encoder.layer.0.output.dense._weight_quantizer", exact=True).click()
        page.wait_for_selector("#channels[data-bars]")
        assert page.locator("#values").is_hidden()
        assert page.locator("#caption").inner_text() == "The ranges of 32 channels."
        colors(page, "#channels", lambda found: near(found, _BARS) > 500)


def test_a_cell_of_the_heat_map_is_clicked(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        place = page.locator("[data-plot='costs-alone'][data-drawn]")
        place.scroll_into_view_if_needed()
        colors(page, "[data-plot='costs-alone']", lambda found: len(found) > 30)
        box = place.bounding_box()
        for down in (0.50, 0.52):  # one of them is in no gap between two rows
            page.mouse.click(box["x"] + box["width"] * 0.45, box["y"] + box["height"] * down)
        page.wait_for_selector("#panel:not([hidden])")
        assert page.locator("#panel-title").inner_text() in qs.quantizers(reported()[0])


def test_search_and_choices_filter_blocks_and_quantizers(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        folded = page.locator("#blocks details:not([open])").count()
        page.fill(_FIND, "matmul SCORES")
        assert page.locator(_COUNT).inner_text() == "4 of 40 quantizers"
        assert page.locator(_ROWS).count() == 4
        assert page.locator("#blocks .row.put:visible").count() == 2
        assert page.locator("#blocks .row:visible").all_inner_texts()[0].count("matmul") > 0
        page.fill(_FIND, "no such word")
        assert page.locator(_ROWS).count() == 0
        assert page.locator("#blocks details:visible").count() == 0
        page.get_by_role("button", name="clear").click()
        page.get_by_text("40 quantizers", exact=True).wait_for()
        assert page.locator("#blocks details:not([open])").count() == folded
        page.select_option("#rule", "residual-add")
        assert page.locator(_ROWS).count() == 8
        page.select_option("#role", "weight")
        assert page.locator(_ROWS).count() == 0
        page.select_option("#rule", "")
        assert page.locator(_ROWS).count() == 12


def test_a_column_sorts_the_table(browser: Any, file: Path) -> None:
    costs = {cost.name: cost.alone for cost in reported()[1]["sensitivity"].of("site")}
    order = sorted(costs, key=lambda name: -costs[name])
    with opened(browser, file) as page:
        page.get_by_role("button", name="mse alone").click()
        assert page.locator(f"{_ROWS} th").first.inner_text() == order[0]
        page.get_by_role("button", name="mse alone").click()
        assert page.locator(f"{_ROWS} th").first.inner_text() == order[-1]
        page.get_by_role("button", name="quantizer", exact=True).click()
        assert page.locator(f"{_ROWS} th").first.inner_text() == min(costs)


def test_keys_are_enough(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "find"
        page.keyboard.type("add_local")
        for _ in range(200):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.classList.contains('q')"):
                break
        chosen = page.evaluate("document.activeElement.textContent.trim()")
        assert "add_local" in chosen
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "panel-title"
        assert "add_local" in page.locator("#panel-title").inner_text()
        for _ in range(3):  # close, and then the layers
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert "layer.1." in page.locator("#panel-title").inner_text()
        page.keyboard.press("Escape")
        assert page.locator(_PANEL).is_hidden()
        assert page.evaluate("document.activeElement.textContent.trim()") == chosen
        summary = page.locator("#blocks summary:visible").first
        summary.focus()
        page.keyboard.press("Enter")
        assert summary.evaluate("each => each.parentElement.open") is False


def test_every_cell_of_the_heat_map_is_reached_by_keys(browser: Any, file: Path) -> None:
    """From the tabs, Tab opens the table beside the figure; arrows go from cell to cell, Enter opens the quantizer."""
    with opened(browser, file) as page:
        page.locator(".tab").first.focus()
        for _ in range(2):
            page.keyboard.press("Tab")
        while page.evaluate("document.activeElement.tagName") != "SUMMARY":
            page.keyboard.press("Tab")  # Bokeh's own buttons
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        seen: set[str] = set()
        for key in ("ArrowRight", "ArrowDown", "ArrowLeft"):
            for _ in range(40):
                seen.add(page.evaluate(_CELL))
                page.keyboard.press(key)
        grid = page.get_by_role("grid")
        assert grid.count() == 1
        rows = grid.locator("tbody tr").count()
        assert len(seen) == rows + 2  # of two layers: the first row, then the last column, then the last row
        page.keyboard.press("Home")
        page.keyboard.press("ArrowUp")
        button = page.evaluate("document.activeElement.dataset.q")
        page.keyboard.press("Enter")
        assert page.locator("#panel-title").inner_text() == list(qs.quantizers(reported()[0]))[int(button)]
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.dataset.q") == button
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('.twin')") is None  # one stop, however many cells


#: Of the cell that has the focus, its row, column and text.
_CELL = """() => {
  const cell = document.activeElement.closest("td");
  const at = [...cell.parentElement.children].indexOf(cell);
  const head = cell.closest("table").tHead.rows[0].cells[at];
  return [cell.parentElement.cells[0].textContent, head.textContent, cell.textContent].join("|");
}"""


def test_the_table_beside_the_heat_map_is_the_heat_map(browser: Any, file: Path) -> None:
    sensitivity = reported()[1]["sensitivity"]
    with opened(browser, file) as page:
        for tab, attribute in (("in INT8 alone", "alone"), ("gain in float alone", "gain")):
            page.get_by_role("button", name=tab).click()
            page.locator(".twin:visible summary").click()
            grid = page.get_by_role("grid")
            shown = grid.evaluate(
                "each => [...each.querySelectorAll('.q')].map((cell) => [Number(cell.dataset.q), cell.textContent])"
            )
            names = list(qs.quantizers(reported()[0]))
            wanted = {cost.name: f"{getattr(cost, attribute):.3g}" for cost in sensitivity.of("site")}
            assert {names[at]: words for at, words in shown} == wanted
            layers = sorted(sensitivity.of("layer"), key=lambda cost: cost.layers)
            cells = grid.get_by_role("row", name="a whole layer").get_by_role("gridcell").all_inner_texts()
            assert cells == [f"{getattr(cost, attribute):.3g}" for cost in layers]


def test_the_bars_of_a_histogram_are_rows_too(browser: Any, file: Path) -> None:
    name = "encoder.layer.1.output.dense._input_quantizer"
    seen = reported()[1]["statistics"].seen[name]
    with opened(browser, file) as page:
        page.get_by_role("button", name=name, exact=True).click()
        page.locator("#bars summary").focus()
        page.keyboard.press("Enter")
        counts = page.locator("#bars tbody td").all_inner_texts()
        assert sum(int(count.replace(",", "")) for count in counts) == seen.histogram.total
        assert len(counts) == int(page.get_attribute("#values", "data-bars"))


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_it_is_readable_in_light_and_dark(scheme: str, dark: bool, browser: Any, file: Path) -> None:
    with opened(browser, file, color_scheme=scheme) as page:
        page.locator("#cards .q").first.click()
        page.wait_for_selector("#values[data-bars]")
        for _ in range(2):  # as the system has it, and the other way round
            for place in ("body", "#panel dd", ".absent", ".row.put .after", "#values"):
                text, ground = page.evaluate(_COLORS, place)
                assert contrast(text, ground) >= 4.5, place
                assert (luminance(ground) < 0.2) is dark, place
            page.locator("#theme").click()
            dark = not dark
            page.wait_for_selector(f"#values[data-painted='{'dark' if dark else 'light'}']")


#: The color of a text, and of what is behind it; of a figure that of its axes' labels.
_COLORS = """place => {
  const found = document.querySelector(place);
  let behind = found;
  const rgb = (text) => text.match(/[0-9.]+/g).map(Number);
  const ground = (each) => rgb(getComputedStyle(each).backgroundColor);
  while (ground(behind).length === 4 && ground(behind)[3] === 0) behind = behind.parentElement;
  let text = getComputedStyle(found).color;
  if (place === "#values") {
    const hex = Bokeh.documents.map((each) => each.roots()[0]).find((each) => each.name === "values")
      .below[0].major_label_text_color;
    text = hex.slice(1).match(/../g).map((each) => parseInt(each, 16)).join(" ");
  }
  return [rgb(text).slice(0, 3), ground(behind).slice(0, 3)];
}"""


def luminance(color: Any) -> float:
    """As WCAG 2 defines it."""
    parts = [each / 255 for each in color]
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: Any, other: Any) -> float:
    """As WCAG 2 defines it: 4.5 is asked for of texts."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_nothing_is_wider_than_a_telephone(browser: Any, file: Path) -> None:
    with opened(browser, file, viewport={"width": 400, "height": 800}) as page:
        colors(page, "[data-plot='costs-alone']", lambda found: len(found) > 30)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.locator("#blocks .q").first.click()
        assert page.locator(_PANEL).bounding_box()["height"] <= 600


def test_it_prints_with_everything_that_changed_open(browser: Any, file: Path) -> None:
    with opened(browser, file, color_scheme="dark") as page:
        page.wait_for_selector("[data-plot='outliers'][data-drawn]")
        page.get_by_role("button", name="close all").click()
        page.evaluate(
            "addEventListener('beforeprint', () => { window.printed = "
            "document.querySelectorAll('#blocks .changed:not([open])').length; })"
        )
        printed = page.pdf(format="A4", print_background=True)
        assert printed.startswith(b"%PDF")
        assert printed.count(b"/Type /Page\n") >= 4
        assert page.evaluate("window.printed") == 0
        assert page.locator("#blocks .changed[open]").count() == 0  # as it was
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.locator("#filter").is_hidden()


def test_a_dark_page_prints_light_figures(browser: Any, file: Path) -> None:
    """Drawn anew before the paper, not turned round, and dark again afterwards: as by Ctrl+P, without the button."""
    light, _, _ = printed(browser, file, "light")
    dark, paper, after = printed(browser, file, "dark")
    rounding = 0.01  # of blended pixels
    assert len(light) == len(dark) >= 2
    assert max(light) < 0.2 < 0.8 < min(dark)
    assert paper == pytest.approx(light, abs=rounding)
    assert after == pytest.approx(dark, abs=rounding)


def printed(browser: Any, file: Path, scheme: str) -> list[list[float]]:
    """How light figures are before a page is printed, while, and afterwards."""
    with opened(browser, file, color_scheme=scheme) as page:
        page.locator("#cards .q").first.click()
        page.wait_for_selector("#values[data-bars]")
        page.wait_for_selector("[data-plot='outliers'][data-drawn]")
        page.wait_for_selector("[data-plot='costs-alone'][data-drawn]")
        colors(page, "[data-plot='costs-alone']", lambda found: len(found) > 30)
        before = page.evaluate(_LIGHTNESS)
        page.evaluate(f"addEventListener('beforeprint', () => {{ window.printed = ({_LIGHTNESS})(); }})")
        page.pdf(format="A4", print_background=True)
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        return [before, page.evaluate("window.printed"), page.evaluate(_LIGHTNESS)]


#: Of each figure on the screen, how light its letters are, from 0 to 1: the mean of what is nearly black or white.
_LIGHTNESS = """() => [...document.querySelectorAll(".plot:not([hidden])")].flatMap((plot) => {
  const under = (each) => [each, ...(each.shadowRoot ? inside(each.shadowRoot) : [])];
  const inside = (node) => [...node.querySelectorAll("*")].flatMap(under);
  const canvas = inside(plot).find((each) => each.tagName === "CANVAS");
  if (!canvas || !canvas.width) return [];
  const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  const { data } = context.getImageData(0, 0, copy.width, copy.height);
  let [sum, count] = [0, 0];
  for (let at = 0; at < data.length; at += 4) {
    const [red, green, blue, alpha] = data.slice(at, at + 4);
    const light = (red + green + blue) / 765;
    const gray = Math.max(red, green, blue) - Math.min(red, green, blue) < 24;
    if (alpha < 250 || !gray || Math.abs(light - 0.5) < 0.3) continue;
    sum += light;
    count += 1;
  }
  return count > 50 ? [sum / count] : [];
})"""


def test_what_strangers_wrote_does_not_run(browser: Any, tmp_path: Path) -> None:
    model = build("bert", "BertModel", num_hidden_layers=1)
    qmodel = qs.convert(model, str(hostile_rules(tmp_path)))
    file = tmp_path / "hostile.html"
    qs.report(qmodel, file, diff=qs.diff(model, qmodel), title=HOSTILE, times={HOSTILE: 1.0})
    with opened(browser, file) as page:
        assert page.locator("h1").inner_text() == HOSTILE
        page.locator("#cards .q").first.click()
        assert HOSTILE in page.locator("#facts").inner_text()
        assert page.evaluate("window.ran") is None
        assert page.locator("img").count() == 0


def test_a_script_that_is_not_the_page_s_own_does_not_run(browser: Any, file: Path, tmp_path: Path) -> None:
    """The second lock: whatever got into the page, the browser would not run it."""
    changed = tmp_path / "changed.html"
    text = file.read_text(encoding="utf-8")
    changed.write_text(text.replace("<main", "<script>window.ran = 1</script><main", 1), encoding="utf-8")
    context = browser.new_context()
    page = context.new_page()
    page.goto(changed.as_uri())
    assert page.evaluate("window.ran") is None
    assert page.evaluate("typeof Bokeh") == "object"
    context.close()
