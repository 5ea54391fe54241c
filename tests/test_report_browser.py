"""The report in a real browser: it draws, stays silent, fits a phone and paper, and executes no text of a run."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from harness import command, command_report
from harness.report.charts import CHARTS
from harness.report.page import RunView, render
from harness.report.sections import SECTIONS
from tests import report_samples as samples

pytestmark = pytest.mark.browser

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--no-first-run", "--no-sandbox"]  # fmt: skip

# Every section but those of several runs and of a history.
RECORDED = samples.recorded(slo="ttft_p50=1s,itl_p50=8ms", price="3/h")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@dataclass
class Opened:
    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def drawn(self) -> int:
        self.page.wait_for_selector(".chart:not([data-drawn])", state="detached", timeout=20_000)
        return int(self.page.locator(".chart .main-svg:first-child").count())


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """show(runs, width, **context options) -> the page, opened from disk with the network off."""
    contexts = []

    def opener(runs: list[RunView], width: int = 1280, height: int = 800, **options: Any) -> Opened:
        file = tmp_path / "report.html"
        file.write_text(render(runs), "utf-8", newline="\n")
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_offline(True)
        opened = Opened(context.new_page())
        opened.page.on("console", lambda message: opened.said.append(f"{message.type}: {message.text}"))
        opened.page.on("pageerror", lambda error: opened.said.append(str(error)))
        opened.page.on("dialog", lambda dialog: (opened.said.append("dialog"), dialog.dismiss()))
        opened.page.on("request", lambda request: opened.asked.append(request.url))
        opened.page.goto(file.as_uri())
        opened.asked = [url for url in opened.asked if url != file.as_uri() and not url.startswith(("data:", "blob:"))]
        return opened

    yield opener
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_charts_are_drawn_in_silence(show: Any, scheme: str) -> None:
    opened = show([RECORDED], color_scheme=scheme)
    there = opened.page.evaluate("[...document.querySelectorAll('main > section')].map((section) => section.id)")
    others = {"compare", "trend", "search"}  # of several runs, of a history, of a search for the capacity
    assert there == [section.id for section in SECTIONS if section.id not in others]
    assert opened.drawn() == opened.page.locator(".chart").count() >= len(CHARTS)
    assert (opened.said, opened.asked) == ([], [])
    text = "rgb(27, 31, 36)" if scheme == "light" else "rgb(231, 233, 236)"
    assert opened.page.evaluate("getComputedStyle(document.body).color") == text
    assert opened.page.evaluate("getComputedStyle(document.querySelector('.legendtext')).fill") == text


@pytest.mark.parametrize(
    "runs",
    [pytest.param([samples.whole()], marks=pytest.mark.full), pytest.param([samples.sample(), samples.batches(12)], marks=pytest.mark.full), pytest.param([samples.open_loop()], marks=pytest.mark.full),
     pytest.param([samples.empty()], marks=pytest.mark.full), [samples.hostile()]],
    ids=["sample", "two runs", "open loop", "empty", "hostile"],
)  # fmt: skip
def test_a_phone_scrolls_no_page_sideways(show: Any, runs: list[RunView]) -> None:
    opened = show(runs, width=360, height=740)
    opened.drawn()
    for fold in opened.page.locator("details").all():
        fold.evaluate("fold => { fold.open = true; }")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert opened.said == []


@pytest.mark.full
@pytest.mark.parametrize("text", [samples.HOSTILE, samples.HOSTILE_LINK], ids=["markup", "link"])
@pytest.mark.parametrize("bypass", [True, False], ids=["by escaping alone", "with the policy"])
def test_hostile_text_executes_nothing(show: Any, text: str, bypass: bool) -> None:
    opened = show([samples.hostile(text), samples.hostile(text)], bypass_csp=bypass)
    inert(opened)


@pytest.mark.full
def test_each_text_of_the_corpus_in_each_field_executes_nothing(show: Any) -> None:
    """As many runs as texts, each with the texts one place further: a comparison of them all, by escaping alone."""
    inert(show([samples.corpus(first, samples.whole()) for first in range(len(samples.CORPUS))], bypass_csp=True))


@pytest.mark.full
def test_a_corpus_of_texts_executes_nothing(show: Any) -> None:
    inert(show([samples.corpus(0, samples.whole())], bypass_csp=True))


@pytest.mark.full
def test_a_hostile_run_on_disk_executes_nothing(
    show: Any, simulated: Callable[..., str], ridgeline: Callable[..., Any], tmp_path: Path
) -> None:
    url = simulated("--ttft-base", "5ms", "--itl-base", "1ms", "--slots", "4")
    for name in ("one", "two"):
        done = ridgeline("run", "--url", url, "--batch-sizes", "1,4", "--waves", "1", "--trials", "3", "--input-tokens", "64",
                         "--output-tokens", "8", "--hardware", "H100-SXM", "--model-config", "Llama-3.1-8B", "--out", name)  # fmt: skip
        assert done.returncode == 0, done.stderr
        samples.poison_folder(tmp_path / name)
    folders = [tmp_path / "one", tmp_path / "two"]
    runs = command_report.views(folders, [command.summarise(folder) for folder in folders])
    said = json.dumps([[run.summary, run.run] for run in runs])
    assert all(json.dumps(text)[1:40].rstrip("\\") in said for text in samples.CORPUS[2:9])
    assert sum(point["errors"] for point in runs[0].summary["points"]) > 3
    inert(show(runs, bypass_csp=True))


def inert(opened: Opened) -> None:
    """Every chart is drawn, every fold and tooltip was open, and nothing came of it."""
    page = opened.page
    assert opened.drawn() == page.locator(".chart").count() >= len(CHARTS)
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    for box in page.locator(".chart .plot-container").all():  # tooltips hold texts of the run too
        box.scroll_into_view_if_needed()
        spot = box.bounding_box()
        for part in (0.15, 0.3, 0.5, 0.75):
            page.mouse.move(spot["x"] + part * spot["width"], spot["y"] + 0.75 * spot["height"])
    page.wait_for_timeout(200)
    assert page.evaluate("typeof window.pwned") == "undefined"
    foreign = (
        "img, iframe, object, base, form, input, [http-equiv=refresh], [onerror], [onclick], a[href*=javascript], svg a"
    )
    assert page.locator(foreign).count() == 0
    assert (opened.said, opened.asked) == ([], [])


def test_a_tooltip_tells_the_point(show: Any) -> None:
    opened = show([samples.sample()])
    opened.drawn()
    bar = opened.page.locator("#chart-ttft_s .barlayer .trace:nth-child(2) .point path").last
    bar.scroll_into_view_if_needed()
    spot = bar.bounding_box()  # plotly listens above the bars: the mouse goes there by coordinates
    opened.page.mouse.move(spot["x"] + spot["width"] / 2, spot["y"] + spot["height"] / 2)
    opened.page.wait_for_selector("#chart-ttft_s .hoverlayer .hovertext")
    told = opened.page.locator("#chart-ttft_s .hoverlayer").text_content()
    for part in (
        "batch 8",
        "measured 4.522 s",
        "measured / predicted 1.26×",
        "94 samples",
        "▲ suspect",
        "2 of 96 failed",
    ):
        assert part in told


@pytest.mark.full
def test_the_toggle_changes_page_and_charts(show: Any) -> None:
    opened = show([samples.sample()], color_scheme="light")
    opened.drawn()
    ink = "getComputedStyle(document.querySelector('.legendtext')).fill"
    before = opened.page.evaluate(ink)
    opened.page.get_by_role("button", name="Switch between light and dark").click()
    assert opened.page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert opened.page.evaluate(ink) != before
    opened.page.get_by_role("button", name="Switch between light and dark").click()
    assert opened.page.evaluate(ink) == before
    assert opened.said == []


def test_without_javascript_the_verdict_and_the_tables_are_there(show: Any) -> None:
    opened = show([samples.sample()], java_script_enabled=False)
    page = opened.page
    assert page.locator("noscript").inner_text().startswith("The charts need JavaScript")
    assert page.locator(".sentence").is_visible()
    assert page.locator("#table-ttft_s").is_visible()
    assert page.locator("#table-figures").is_visible()
    assert not page.locator("#chart-ttft_s").is_visible()
    assert not page.locator("#theme").is_visible()


def test_a_browser_that_cannot_unpack_the_charts_says_so(show: Any) -> None:
    opened = show([samples.empty()])
    opened.page.add_init_script("delete window.DecompressionStream")
    opened.page.goto(Path(opened.page.url.removeprefix("file://")).with_name("report.html").as_uri())
    file = Path(opened.page.url.removeprefix("file://"))
    file.write_text(render([samples.sample()]), "utf-8")
    opened.page.reload()
    assert opened.page.get_by_text("could not unpack the charts").is_visible()
    assert opened.page.locator("#table-ttft_s").is_visible()


def test_paper_gets_every_section_chart_and_table_in_light(show: Any, tmp_path: Path) -> None:
    opened = show([samples.sample()], color_scheme="dark")
    page = opened.page
    page.wait_for_selector("#chart-ttft_s[data-drawn]")
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert page.locator(".chart[data-drawn]").count() == page.locator(".chart").count() >= len(CHARTS)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('.legendtext')).fill") == "rgb(27, 31, 36)"
    assert page.locator(".chart .main-svg").first.get_attribute("width") == "660"
    assert page.locator("#theme").is_hidden()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0
    assert opened.said == []


@pytest.mark.full
@pytest.mark.parametrize(
    "runs", [[samples.whole()], [samples.whole(), samples.batches(3)]], ids=["one run", "two runs"]
)
def test_the_printed_pages_show_every_section_and_table(show: Any, tmp_path: Path, runs: list[RunView]) -> None:
    pypdf = pytest.importorskip("pypdf", reason="pypdf is not installed")
    opened = show(runs, color_scheme="dark")
    page = opened.page
    there = page.locator("h2, h3, caption").all_text_contents()
    opened.page.pdf(path=tmp_path / "report.pdf", format="A4")
    said = words(" ".join(sheet.extract_text() for sheet in pypdf.PdfReader(tmp_path / "report.pdf").pages))
    missing = [text for text in there if words(text) not in said]
    assert not missing and len(there) > 15
    for id, title in [(section.id, section.title) for section in SECTIONS]:
        assert words(title) in said or page.locator(f"#{id}").count() == 0
    assert words(runs[0].summary["verdict_sentence"]) in said
    assert opened.said == []


def words(text: str) -> str:
    """Without spaces and ligatures, which a PDF sets as it likes."""
    return "".join(unicodedata.normalize("NFKC", text).split())


TWO = [samples.whole(), samples.whole(2e-4)]


@pytest.mark.full
@pytest.mark.parametrize(
    ("runs", "scheme", "width"),
    [
        ([samples.whole()], "light", 1280), (TWO, "dark", 360), ([samples.whole()], "dark", 1280), (TWO, "light", 1280),
        ([samples.sample()], "light", 360), ([samples.hostile()], "light", 1280), ([samples.empty()], "dark", 1280),
    ],
)  # fmt: skip
def test_axe_finds_no_serious_violation(show: Any, runs: list[RunView], scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    opened = show(runs, width=width, color_scheme=scheme)
    opened.drawn()
    opened.page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    found = axe.Axe().run(opened.page).response
    assert len(found["passes"]) > 20
    grave = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert not grave, [(v["id"], v["help"], [node["html"][:200] for node in v["nodes"][:3]]) for v in grave]


@pytest.mark.full
def test_every_part_is_reached_by_keyboard_and_shows_it(show: Any) -> None:
    opened = show([samples.whole(), samples.batches(3)])
    opened.drawn()
    page = opened.page
    reached = []
    for _ in range(400):
        page.keyboard.press("Tab")
        name, seen = page.evaluate(
            "(() => { const e = document.activeElement; e.dataset.reached = 'yes'; const s = getComputedStyle(e);"
            " return [e.className || e.tagName, s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 1]; })()"
        )
        if name == "BODY":
            break
        reached.append(name)
        assert seen, name
    assert reached[0] == "skip" and {"BUTTON", "A", "SUMMARY", "scroll", "command"} <= set(reached)
    assert page.evaluate(
        "document.querySelectorAll(':is(summary, nav a, button, [tabindex]):not([data-reached])').length"
    ) == page.evaluate("document.querySelectorAll('details:not([open]) [tabindex]').length")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.url.endswith("#verdict")
    fold = page.locator("figure details.fold").first
    fold.locator("summary").focus()
    page.keyboard.press("Space")
    assert fold.get_attribute("open") is not None
    page.locator("#theme").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") in ("dark", "light")
    assert opened.said == []
