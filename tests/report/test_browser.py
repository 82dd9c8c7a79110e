"""The page in Chromium: it draws, a click shows source and plan, it moves, zooms and collapses; nothing is loaded."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from reports import explained
from test_drawing import Decoder
from test_page import HOSTILE, hostile
from torch import nn

from fxfuse.models import CASES
from fxfuse.region import Region
from fxfuse.report import Report
from fxfuse.report.document import document
from fxfuse.report.words import duration

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
CHROMIUM = os.environ.get("FXFUSE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
READ_SCALE = "p => new DOMMatrix(getComputedStyle(document.querySelector(p + ' svg > g')).transform)"

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch_persistent_context(
            str(folder), executable_path=CHROMIUM, headless=True, args=list(FLAGS),
            viewport={"width": 1440, "height": 900},
        )  # fmt: skip
        yield opened
        opened.close()


@pytest.fixture
def open_page(context: Any, tmp_path: pathlib.Path) -> Iterator[Open]:
    """Open the page of a report; afterwards: nothing but the file was asked for, and the console is empty."""
    said: list[str] = []
    asked: list[str] = []
    opened = []

    def show(report: Report, **options: Any) -> Any:
        path = report.to_html(tmp_path / "page.html", **options)
        page = context.new_page()
        opened.append(page)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.set_default_timeout(5000)
        page.goto(path.as_uri())
        return page

    yield show
    for page in opened:
        page.close()
    assert not said
    assert all(url.startswith(("file://", "data:")) for url in asked) and len(asked) <= 2 * len(opened)


def first() -> Report:
    return explained(CASES[0].make().eval(), CASES[0].shape)


def decoder() -> Report:
    return explained(Decoder().eval(), (1, 1, 8, 8, 8))


def titles(page: Any, pane: str) -> list[str]:
    found: list[str] = page.locator(f"#{pane} .box .title").all_text_contents()
    return found


def scale(page: Any, pane: str) -> float:
    return float(page.evaluate(f"p => ({READ_SCALE})(p).a", f"#{pane}"))


def test_both_graphs_are_drawn(open_page: Open) -> None:
    report = first()
    page = open_page(report)
    account = document(report)["regions"][0]["account"]
    assert titles(page, "before") == ["input_0", "ConvTranspose3d", "MaxPool3d", "MaxPool3d", "sum", "output"]
    assert titles(page, "after") == ["input_0", "[1] up", "output"]
    assert page.locator("#model").text_content() == "MaxMaxSum"
    overview = page.locator("#panel").inner_text()
    for words in (
        "2 kernels",
        duration(account["seconds"]),
        "2.00 GB",
        "85 %",
        "conv_transpose > max_pool > max_pool > sum",
    ):
        assert words in overview, words


def test_texts_fit_into_their_boxes(open_page: Open) -> None:
    page = open_page(decoder())
    for pane in ("before", "after"):
        page.locator(f"#{pane} .collapse").uncheck() if page.locator(f"#{pane} .collapse").is_visible() else None
    sizes = page.evaluate("""() => [...document.querySelectorAll('.box')].flatMap(box => {
      const body = box.querySelector('.body').getBBox();
      return [...box.querySelectorAll('text')].map(text => {
        const own = text.getBBox();
        return [own.x - body.x, body.x + body.width - own.x - own.width, own.y - body.y,
                body.y + body.height - own.y - own.height];
      });
    })""")
    assert len(sizes) > 30
    assert min(min(room) for room in sizes) > 1.0


def test_a_click_shows_the_source_and_the_plan(open_page: Open) -> None:
    report = first()
    page = open_page(report)
    facts = document(report)["regions"][0]["account"]["parts"][0]["facts"]
    page.locator("#after .box.region").click()
    panel = page.locator("#panel")
    assert page.locator("#tab-selection").get_attribute("aria-selected") == "true"
    source = panel.locator(".source code").first.text_content()
    assert 'extern "C" __global__' in source and "wgmma" in source
    assert panel.locator(".source .k").count() > 50 and panel.locator(".source .m").first.text_content() == (
        '#include "conv_wgmma.cuh"'
    )
    rows = panel.locator("tbody tr").all_inner_texts()
    assert len(rows) == 2 and "max_pool 3x3x3 > sum" in rows[1]
    panel.locator("details", has_text="tiles, memory").first.locator("summary").click()
    assert len(facts) > 3 and all(fact["value"] in panel.inner_text() for fact in facts)
    assert panel.locator("svg.roofline circle").count() >= 2
    assert page.locator("#before .box.chosen").count() == 4 and page.locator("#after .box.chosen").count() == 1


def test_a_node_says_why_it_stays(open_page: Open) -> None:
    page = open_page(decoder())
    page.locator("#before .box", has_text="cat").click()
    panel = page.locator("#panel")
    assert "torch.cat is not in the vocabulary" in panel.inner_text()
    panel.get_by_role("button", name="up1_1").first.click()  # what it reads: of the first region
    assert panel.locator("h3 .badge").inner_text() == "1"


def test_hovering_tells_type_and_size(open_page: Open) -> None:
    page = open_page(first())
    page.locator("#before .box").nth(1).hover()
    tooltip = page.locator("#tooltip")
    assert tooltip.is_visible()
    words = tooltip.inner_text()
    assert "f32[16, 64, 63, 63, 63], 1.02 GB" in words and "weight: f32[32, 64, 5, 5, 5]" in words
    assert page.locator("#after .box.lit").count() == 1 and page.locator("#before .line.near").count() == 2
    page.mouse.move(5, 5)
    assert not tooltip.is_visible() and page.locator(".lit").count() == 0


def test_the_tooltip_does_not_cover_the_panel(open_page: Open) -> None:
    page = open_page(first())
    page.set_viewport_size({"width": 1024, "height": 700})
    box, tooltip = page.locator("#after .box").nth(1), page.locator("#tooltip")
    box.hover()
    own, panel = tooltip.bounding_box(), page.locator("aside").bounding_box()
    assert own["x"] + own["width"] <= panel["x"]
    box.click()
    assert not tooltip.is_visible() and page.locator("#panel").inner_text().startswith("1\nup")


@pytest.mark.parametrize("width", [1024, 1440])
def test_the_plan_fits_into_the_panel(open_page: Open, width: int) -> None:
    page = open_page(first())
    page.set_viewport_size({"width": width, "height": 700})
    page.locator("#after .box").nth(1).click()
    cut = page.evaluate("[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)")
    assert cut and max(cut) <= 0


def test_it_moves_and_zooms(open_page: Open) -> None:
    page = open_page(decoder())
    canvas = page.locator("#before .canvas").bounding_box()
    x, y = canvas["x"] + 20, canvas["y"] + 20
    box = page.locator("#before .box").first
    before, began = box.bounding_box(), scale(page, "before")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y + 35, steps=4)
    page.mouse.up()
    after = box.bounding_box()
    assert (after["x"] - before["x"], after["y"] - before["y"]) == (pytest.approx(60, abs=1), pytest.approx(35, abs=1))
    page.mouse.wheel(0, -300)
    page.wait_for_function(f"s => ({READ_SCALE})('#before').a > s * 1.3", arg=began)
    page.locator("#before .out").click()
    page.locator("#before .fit").click()
    for drawn in page.locator("#before .box").all():
        found = drawn.bounding_box()
        assert canvas["x"] <= found["x"] and found["x"] + found["width"] <= canvas["x"] + canvas["width"]
        assert canvas["y"] <= found["y"] and found["y"] + found["height"] <= canvas["y"] + canvas["height"]


def test_a_drag_over_a_box_is_no_click(open_page: Open) -> None:
    page = open_page(first())
    found = page.locator("#before .box").nth(2).bounding_box()
    x, y = found["x"] + found["width"] / 2, found["y"] + found["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=3)
    page.mouse.up()
    assert page.locator("#before .box.chosen").count() == 0
    page.locator("#before .box").nth(2).click()
    assert page.locator("#before .box.chosen").count() == 4


def test_what_is_not_fused_collapses(open_page: Open) -> None:
    page = open_page(decoder())
    assert "3 operators" not in titles(page, "before")
    page.locator("#before .collapse").check()
    assert titles(page, "before")[1] == "3 operators"
    assert page.locator("#before .count").inner_text() == "11 operators, 5 collapsed"
    page.locator("#before .box.group").first.click()
    assert "down.0" in page.locator("#panel").inner_text()
    page.get_by_role("button", name="show them one by one").click()
    assert not page.locator("#before .collapse").is_checked()
    assert page.locator("#before .box.chosen .title").text_content() == "Conv3d"


def test_large_graphs_begin_collapsed(open_page: Open) -> None:
    model = nn.Sequential(*(nn.Conv3d(1, 1, 1) for _ in range(60)), nn.ConvTranspose3d(1, 1, 2))
    page = open_page(explained(model, (1, 1, 4, 4, 4)))
    assert titles(page, "before") == ["input_0", "60 operators", "ConvTranspose3d", "output"]
    assert scale(page, "before") > 0.7


def test_the_keyboard_is_enough(open_page: Open) -> None:
    page = open_page(first())
    page.locator("#before .box").first.focus()
    page.keyboard.press("ArrowDown")
    assert "ConvTranspose3d" in page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.keyboard.press("Enter")
    assert page.locator("#before .box.chosen").count() == 4
    began = scale(page, "before")
    page.locator("#before .box").nth(1).focus()
    page.keyboard.press("+")
    assert scale(page, "before") > began
    page.locator("#tab-selection").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#tab-rewrites").get_attribute("aria-selected") == "true"
    assert "max_pool(max_pool(x; k1, s1, p1)" in page.locator("#panel").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours(open_page: Open, scheme: str) -> None:
    """What is written on boxes and in the panel stands out from what is behind it: 4.5 to 1."""
    page = open_page(decoder())
    page.emulate_media(color_scheme=scheme)
    page.wait_for_function("scheme => document.documentElement.dataset.theme === scheme", arg=scheme)
    page.locator("#before .collapse").check()
    ratios = page.evaluate("""() => {
      const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
      const light = colour => {
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(part => {
          part /= 255;
          return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
      };
      const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      const boxes = [...document.querySelectorAll('.box')].flatMap(box => {
        const fill = light(getComputedStyle(box.querySelector('.body')).fill);
        return [...box.querySelectorAll('text')].map(text => ratio(light(getComputedStyle(text).fill), fill));
      });
      const surface = light(getComputedStyle(document.querySelector('aside')).backgroundColor);
      const panel = [...document.querySelectorAll('#panel p, #panel h4, .tabs button, .link')];
      return [...boxes, ...panel.map(each => ratio(light(getComputedStyle(each).color), surface))];
    }""")
    assert len(ratios) > 30 and min(ratios) >= 4.5
    for wanted in ("light", "dark", scheme):  # the last: as the system asks
        page.locator("#theme").click()
        assert page.evaluate("document.documentElement.dataset.theme") == wanted


def test_nothing_to_draw(open_page: Open) -> None:
    page = open_page(Report("Decides", ["left alone: the model runs as it is"]))
    assert not page.locator("#before").is_visible()
    assert "left alone" in page.locator("#panel").inner_text()
    page.locator("#tab-code").click()
    assert "no captured graph" in page.locator("#panel").inner_text()
    page = open_page(explained(nn.Conv3d(1, 1, 1), (1, 1, 4, 4, 4)))
    assert titles(page, "after") == ["input_0", "conv3d", "output"]
    assert "nothing to fuse" in page.locator("#panel").inner_text()


def test_names_are_shown_as_they_are(open_page: Open) -> None:
    page = open_page(hostile())
    assert page.locator("#model").text_content() == HOSTILE
    page.locator("#before .box").nth(1).click()
    assert HOSTILE in page.locator("#panel").inner_text()
    assert page.locator("img").count() == 0


def test_parts_are_chosen(open_page: Open) -> None:
    whole = Report("Whole", parts={"a": first(), "b": decoder()})
    whole.regions = [r for part in whole.parts.values() for r in part.regions]
    page = open_page(whole)
    assert page.locator(".card").count() == 3 and not page.locator("#before").is_visible()
    page.locator("#part").select_option("b")
    assert page.locator("#before").is_visible() and page.locator(".card").count() == 2
    assert "cat" in titles(page, "before")


def test_sizes_that_are_not_known(open_page: Open) -> None:
    report = first()
    unknown = str(report.regions[0].region).replace("f32[16, 32, 32, 32, 32]", "f32[_, 32, 32, 32, 32]")
    report.regions[0] = dataclasses.replace(report.regions[0], region=Region.parse(unknown))
    page = open_page(report)
    page.locator(".card").click()
    assert "sizes are not known before the call" in page.locator("#panel").inner_text()
    page.locator("#tab-overview").click()
    assert page.locator(".traffic").count() == 0


def test_a_narrow_window(open_page: Open) -> None:
    page = open_page(first())
    page.set_viewport_size({"width": 420, "height": 800})
    tops = [page.locator(name).bounding_box()["y"] for name in ("#before", "#after", "aside")]
    assert tops == sorted(tops) and tops[2] > 800
    assert page.evaluate("document.documentElement.scrollWidth") <= 420


def unet() -> Report:
    nets = pytest.importorskip("monai.networks.nets", reason="needs the extra `networks`")
    sizes = {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2), "num_res_units": 2}
    return explained(nets.UNet(spatial_dims=3, in_channels=1, out_channels=2, **sizes).eval(), (2, 1, 128, 128, 128))


@pytest.mark.filterwarnings("ignore")
def test_real_network(open_page: Open) -> None:
    page = open_page(unet())
    for pane in ("before", "after"):
        page.locator(f"#{pane} .collapse").uncheck()
    overlaps = page.evaluate("""() => ['before', 'after'].flatMap(pane => {
      const boxes = [...document.querySelectorAll(`#${pane} .box`)].map(box => box.getBoundingClientRect());
      return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b =>
        a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1));
    })""")
    assert overlaps == []
    page.locator(".card").first.click()
    assert page.locator("#after .box.chosen").count() == 1


# --- the pictures of the documentation ------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*(f"report_{c.name}_light" for c in CASES), "report_unet_dark", "report_unet_light"])
def test_pictures(open_page: Open, tmp_path: pathlib.Path, name: str) -> None:
    """Made anew by ``FXFUSE_PICTURES=docs/images pytest tests/report/test_browser.py -k pictures``."""
    folder = pathlib.Path(os.environ.get("FXFUSE_PICTURES", tmp_path))
    shown, _, scheme = name.removeprefix("report_").rpartition("_")
    report = unet() if shown == "unet" else next(explained(c.make(), c.shape) for c in CASES if c.name == shown)
    page = open_page(report, registers="FXFUSE_PICTURES" in os.environ)
    page.emulate_media(color_scheme=scheme)
    page.wait_for_function("scheme => document.documentElement.dataset.theme === scheme", arg=scheme)
    if scheme == "light":
        page.locator(".card").nth(2 if "unet" in name else 0).click()
    page.mouse.move(720, 4)  # away from what it would light
    page.screenshot(path=folder / f"{name}.png")
    assert 30_000 < (folder / f"{name}.png").stat().st_size < 300_000
