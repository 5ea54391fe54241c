"""`ridgeline plan` and `predict --report` as a user runs them, and their pages in a real browser."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import command_plan, planning, planning_text
from harness.records import RidgelineError
from harness.report import plan_page, predict_page
from harness.theory import catalogue, hardware, ledger
from harness.theory.sweep import sweep
from tests import report_samples as samples
from tests.conftest import one_object

LLAMA = ("--model", "meta-llama/Llama-3.1-8B")
FIVE = (*LLAMA, "--hardware", "T4,A10,L4,A100-SXM-80GB,H100-SXM")
MODEL = catalogue.find(LLAMA[1])
CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
Call = Callable[..., Any]


def plan_of(model=MODEL, names=("T4", "A10", "L4", "A100-SXM-80GB", "H100-SXM"), rows=None, **given) -> planning.Plan:
    rows = rows or [hardware.find(name) for name in names]
    slo = command_plan.objectives_of("ttft_p95=800ms,itl_p95=50ms")
    return planning.plan(model, rows, planning.Load(350, 150), slo, framework="vllm", **given)


def page_of(found: planning.Plan) -> str:
    return plan_page.render(found, planning.advice(found), "ridgeline plan …")


def words(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_table_the_object_and_the_page_tell_the_same(ridgeline: Call, tmp_path: Path) -> None:
    text = ridgeline("plan", *FIVE, "--out", "page.html")
    assert text.returncode == 0, text.stderr
    told = one_object(ridgeline("plan", *FIVE, "--json", "--out", "again.html").stdout)
    assert (tmp_path / "page.html").read_bytes() != b""
    choice = told["choice"]
    cost = planning_text.usd(choice["usd_per_million_output_tokens"]["value"])
    page = words((tmp_path / "page.html").read_text("utf-8"))
    for part in (
        f"Buy {choice['gpus']} × {choice['hardware']}",
        f"batch {choice['batch']}",
        cost,
        *told["does_not_fit"],
    ):
        assert part in text.stdout
        assert part in page
    limit = planning_text.limit_word(choice["limit"])
    assert f"{limit[:1].upper()}{limit[1:]} binds" in text.stdout
    assert any("does not fit one T4" in line for line in told["does_not_fit"])
    assert told["measure_next"]["hardware"] == choice["hardware"]
    assert {way["hardware"] for way in told["ways"]} >= {"T4", "A10", "L4", "A100-SXM-80GB", "H100-SXM-80GB"}
    assert next(w for w in told["ways"] if w["hardware"] == "L4")["usd_per_million_output_tokens"]["value"] is None


def test_without_out_the_page_is_named_after_the_model(ridgeline: Call, tmp_path: Path) -> None:
    assert ridgeline("plan", *LLAMA, "--hardware", "H100-SXM").returncode == 0
    assert (tmp_path / "reports" / "plan-Llama-3.1-8B.html").exists()


def test_a_given_price_wins(ridgeline: Call) -> None:
    told = one_object(ridgeline("plan", *FIVE, "--price", "L4=0.01/h,H100-SXM=5/h", "--json").stdout)
    assert told["choice"]["hardware"] == "L4"
    h100 = next(w for w in told["ways"] if w["hardware"] == "H100-SXM-80GB")
    assert (h100["usd_per_h"], h100["price_source"]) == (5.0, "given with --price")


ASKED = command_plan.Asked(LLAMA[1], ["H100-SXM"], "ttft_p95=500ms", None, 350, 150, None, "auto", [1], "vllm", None, [], [],
                           None)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"slo": "speed_p95=1s"}, "unknown objective 'speed_p95'"),
        ({"slo": "ttft_p95=500mb"}, "expected a time"),
        ({"slo": "ttft_p95"}, "expected NAME=VALUE"),
        ({"slo": ""}, "at least one objective"),
        ({"prices": ["B200=1/h"]}, "'B200' is none of the hardware asked for: H100-SXM-80GB"),
        ({"prices": ["H100-SXM=cheap"]}, "expected US dollars"),
        ({"prices": ["H100-SXM=2/parsec"]}, "such as 1.2/h"),
        ({"prices": ["H100-SXM=0/h"]}, "expected US dollars"),
        ({"rate": -1.0}, "more than 0"),
        ({"hardware": ["Z9"]}, "not in the table"),
        ({"dtype": ["fp7"]}, "fp7"),
        ({"kv_dtype": "fp7"}, "fp7"),
        ({"input_tokens": 0}, "input_tokens must be from 1"),
        ({"runs": [Path("nowhere")]}, "nowhere"),
        ({"calibration": Path("none.json")}, "none.json"),
        ({"tp": [7]}, "tp 7 must"),
        ({"model": "meta-llama/Llama-3.1-405B"}, "fits on none of H100-SXM-80GB"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RidgelineError) as refused:
        command_plan.found_of(replace(ASKED, **given))
    assert said in str(refused.value)
    assert refused.value.code == 2


@pytest.mark.parametrize(
    ("options", "said"), [(("--tp", "0,x"), "--tp: got '0,x'"), (("--slo", "x_p95=1s"), "'x_p95'")]
)
def test_an_error_is_one_line(ridgeline: Call, options: tuple[str, ...], said: str) -> None:
    done = ridgeline("plan", *LLAMA, "--hardware", "H100-SXM", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.strip().splitlines()) == 1
    assert said in done.stderr


def test_prices_go_by_any_name_of_the_hardware() -> None:
    rows = [hardware.find("T4"), hardware.find("H100-SXM")]
    assert command_plan.prices_of(["Tesla T4=0.02/min,H100-SXM=$2"], rows) == {
        "T4": pytest.approx(1.2),
        rows[1].name: 2.0,
    }


def test_a_scenario_says_what_no_option_does(tmp_path: Path) -> None:
    file = tmp_path / "buy.yaml"
    file.write_text("slo: itl_p50=20ms\nprice: 2/h\nworkload: {mode: open, rates: [3], input_tokens: 500}\n"
                    f"theory: {{hardware: L4, model_config: {LLAMA[1]}, dtype: fp8}}\n")  # fmt: skip
    found = command_plan.found_of(command_plan.asked_of(file, {"dtype": None, "output_tokens": 80}))
    assert found.load == planning.Load(500, 80, 3.0)
    assert [o.name for o in found.objectives] == ["itl_p50"]
    assert {(w.hardware.name, w.hardware.usd_per_h) for w in found.ways} == {("L4", 2.0)}
    assert {w.dtype for w in found.ways if w.allowed} == {"fp8"}


def test_a_question_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(RidgelineError, match="--model: missing"):
        command_plan.asked_of(None, {"hardware": ["T4"]})


@pytest.mark.full
def test_a_measured_run_stands_beside_the_predictions(ridgeline: Call, simulated: Call, tmp_path: Path) -> None:
    url = simulated("--ttft-base", "20ms", "--itl-base", "1ms", "--slots", "8")
    run = ridgeline("run", "--url", url, "--batch-sizes", "2", "--waves", "1", "--input-tokens", "40", "--output-tokens", "20",
                    "--model-config", LLAMA[1], "--hardware", "L4", "--out", "mine")  # fmt: skip
    assert run.returncode == 0, run.stderr
    lengths = ("--input-tokens", "40", "--output-tokens", "20")
    done = ridgeline(
        "plan", *LLAMA, "--hardware", "H100-SXM", *lengths, "--run", "mine", "--json", "--out", "page.html"
    )
    assert done.returncode == 0, done.stderr
    way = next(w for w in one_object(done.stdout)["ways"] if w["measured"])
    assert (way["measured"], way["hardware"], way["batch"], way["usd_per_h"]) == ("mine", "L4", 2, None)
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "mine (measured)" in page
    other = one_object(ridgeline("plan", *LLAMA, "--hardware", "H100-SXM", "--run", "mine", "--json").stdout)
    assert next(w for w in other["ways"] if w["measured"])["reason"].startswith("other lengths")


def test_predict_writes_its_page_too(ridgeline: Call, tmp_path: Path) -> None:
    options = ("predict", *LLAMA, "--hardware", "T4,H100-SXM", "--batch-sizes", "1,8", "--report", "page.html")
    done = ridgeline(*options, "--json")
    told = one_object(done.stdout)
    first = (tmp_path / "page.html").read_bytes()
    page = words(first.decode())
    itl = next(p for p in told["predictions"] if p["hardware"].startswith("H100"))["points"][1]["itl_s"]
    assert f"{itl['value'] * 1e3:.4g} ms" in page
    assert itl["because"] in page
    assert "does not fit" in page
    ridgeline(*options, "--json")
    assert (tmp_path / "page.html").read_bytes() == first


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_same_plan_gives_the_same_bytes() -> None:
    assert page_of(plan_of()) == page_of(plan_of())


def test_the_articles_table_stands_with_its_corrections() -> None:
    page = page_of(plan_of(names=("H100-SXM",)))
    table = words(page.split('id="table-article"')[1].split("</table>")[0])
    rows = {row.claim: row for row in ledger.ledger() if row.article == "003"}
    for gpu, printed in (("T4", "6.98 s"), ("A10", "3.49 s"), ("A100-SXM-80GB", "0.92 s")):
        assert f"{printed} → {rows[f'350 in and 150 out on {gpu}'].corrected:.2f} s" in table
    assert "~10× → 1.44×" in table
    assert "~7.5× → 6.77×" in table


def test_every_verdict_has_a_page() -> None:
    slow = command_plan.objectives_of("itl_p95=0.1ms")
    t4 = [hardware.find("T4")]
    load = planning.Load(350, 150)
    found = {
        "no": planning.plan(MODEL, t4, load, slow, framework="vllm"),
        "only with": plan_of(rows=t4, tps=[1]),
        "yes": plan_of(names=("L4",)),  # a price is not known
    }
    for verdict, plan in found.items():
        assert plan.verdict == verdict
        page = page_of(plan)
        assert planning_text.VERDICTS[verdict] in page
        assert planning_text.verdict(plan) in words(page)
        assert "nan" not in words(page.split("</style>")[1].split('<script type="application/json"')[0]).split()


def hostile(text: str = samples.HOSTILE) -> planning.Plan:
    row = replace(hardware.find("H100-SXM"), name=text, source=text, notes=f"disputed: {text}", price_source=text)
    span = planning.Span(1000.0, 900.0, 1100.0)
    point = planning.Point(4, span, {"ttft_p95": planning.Span(0.1), "itl_p95": planning.Span(0.02)}, "valid")
    run = planning.Run(text, row, text, 1, (point,), text)
    model = replace(MODEL, name=text)
    shown = command_plan._shown(row)
    return plan_of(replace(model, name=text.replace("\x00", "").replace("\ud800", "")), rows=[shown],
                   runs=[replace(run, hardware=shown, name=shown.name, dtype=shown.name, unlike=shown.name)])  # fmt: skip


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu", "--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """show(page, width, **context options) -> (the page opened from disk with the network off, what it said, asked)."""
    contexts = []

    def opener(text: str, width: int = 1280, height: int = 800, **options: Any) -> tuple[Any, list[str], list[str]]:
        file = tmp_path / "page.html"
        file.write_text(text, "utf-8", newline="\n")
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_offline(True)
        said: list[str] = []
        asked: list[str] = []
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        if options.get("java_script_enabled", True):
            page.wait_for_selector(".chart:not([data-drawn])", state="detached", timeout=20_000)
        return page, said, [url for url in asked if url != file.as_uri() and not url.startswith(("data:", "blob:"))]

    yield opener
    for context in contexts:
        context.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_first_screen_answers(show: Any, scheme: str) -> None:
    """Hardware, batch, cost, limit, what does not fit and the article's table lie within 1280 × 800."""
    found = plan_of()
    page, said, asked = show(page_of(found), color_scheme=scheme)
    assert (said, asked) == ([], [])
    way = found.choice
    for text in (
        planning_text.what(way),
        str(way.batch),
        planning_text.usd(way.usd_per_million.value),
        planning_text.limit(way),
    ):
        tile = page.locator(".plan dd b", has_text=re.compile(f"^{re.escape(text)}$"))
        spot = tile.bounding_box()
        assert spot["y"] + spot["height"] < 800, text
    for inside in ("#verdict .notice", "#table-glance", "#table-article"):
        spot = page.locator(inside).first.bounding_box()
        assert spot["y"] + spot["height"] < 800, inside
        assert spot["x"] + spot["width"] <= 1280, inside
    assert "does not fit one T4" in page.locator("#verdict .notice").first.inner_text()
    scroll = page.locator("#verdict .scroll").first
    assert scroll.evaluate("box => box.scrollWidth <= box.clientWidth"), "the first table is cut"


@pytest.mark.full
@pytest.mark.browser
def test_a_phone_scrolls_no_page_sideways_and_all_is_drawn(show: Any) -> None:
    parts = [
        predict_page.Part(
            hardware.find(name),
            "bf16",
            1,
            None,
            sweep(MODEL, hardware.find(name), batch=[1, 8, 32], input_tokens=350, output_tokens=150),
        )
        for name in ("A10", "H100-SXM")
    ]
    pages = (page_of(plan_of()), predict_page.render(parts, MODEL.name, "wave", "ridgeline predict …"))
    for text, charts in zip(pages, (5, 4), strict=True):
        page, said, asked = show(text, width=360, height=740)
        assert page.locator(".chart .main-svg:first-child").count() == charts
        for fold in page.locator("details").all():
            fold.evaluate("fold => { fold.open = true; }")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert (said, asked) == ([], [])
        assert len(text.encode()) < 1_000_000
        axe = pytest.importorskip(
            "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
        )
        assert not [
            v["id"] for v in axe.Axe().run(page).response["violations"] if v["impact"] in ("serious", "critical")
        ]


@pytest.mark.browser
@pytest.mark.parametrize("bypass", [False, True], ids=["with the policy", "by escaping alone"])
def test_hostile_names_execute_nothing(show: Any, bypass: bool) -> None:
    page, said, asked = show(page_of(hostile()), bypass_csp=bypass)
    for box in page.locator(".chart .plot-container").all():
        box.scroll_into_view_if_needed()
        spot = box.bounding_box()
        for part in (0.2, 0.5, 0.8):
            page.mouse.move(spot["x"] + part * spot["width"], spot["y"] + 0.5 * spot["height"])
    assert page.evaluate("typeof window.pwned") == "undefined"
    assert page.locator("img, iframe, [onerror], a[href*=javascript], svg a").count() == 0
    assert (said, asked) == ([], [])


@pytest.mark.browser
def test_without_javascript_the_answer_and_the_tables_are_there(show: Any) -> None:
    page, _, _ = show(page_of(plan_of(names=("T4", "H100-SXM"))), java_script_enabled=False)
    assert page.locator(".sentence").is_visible()
    assert page.locator("#table-ways").is_visible()
    assert page.locator("#table-itl_p95").is_visible()
