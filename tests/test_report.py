"""The report without a browser: what it says, and that it is inert, small and the same each time."""

from __future__ import annotations

import base64
import copy
import hashlib
import html.parser
import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harness.report import provenance, tables, view
from harness.report.charts import CHARTS, PALETTE
from harness.report.page import PLOTLY_SHA256, PLOTLY_VERSION, RunView, plotly_source, render, verdict
from tests import report_samples as samples

GOLDEN = Path(__file__).parent / "golden" / "report.html"
VARIANTS = {
    "sample": [samples.sample()],
    "two runs": [samples.sample(), samples.batches(3)],
    "six runs": [samples.sample()] * 6,
    "open loop": [samples.open_loop()],
    "open and closed": [samples.open_loop(), samples.sample()],
    "no hardware": [samples.without_theory(architecture=False)],
    "no theory beside theory": [samples.without_theory(), samples.sample()],
    "one batch": [samples.batches(1)],
    "twelve batches": [samples.batches(12)],
    "nothing measured": [samples.empty()],
    "nothing beside something": [samples.empty(), samples.sample()],
    "an empty summary": [RunView({}, {})],
    "no runs": [],
}


class Page(html.parser.HTMLParser):
    """The elements of a page, its text and its data."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.words.append(data)


def told(*runs: RunView) -> str:
    return Page(render(runs)).text


def figures(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data = json.loads(found[1])
    drawn: dict[str, Any] = data["figures"]
    for trace in (trace for figure in drawn.values() for trace in figure["data"] if "hovertext" in trace):
        trace["hovertext"] = data["texts"][trace["hovertext"]]
    return drawn


def strings(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        return [s for entry in (value.values() if isinstance(value, dict) else value) for s in strings(entry)]
    return [value] if isinstance(value, str) else []


def without_plotly(page: str) -> str:
    return re.sub(r'(id="plotly">)[^<]*', r"\1…", page)


# --- form ---------------------------------------------------------------------------------------------------------


def test_the_page_is_the_golden_one() -> None:
    """RIDGELINE_GOLDEN=write remakes it; read the difference before committing it."""
    page = without_plotly(render([samples.sample()]))
    if os.environ.get("RIDGELINE_GOLDEN") == "write":
        GOLDEN.write_text(page, "utf-8", newline="\n")
    assert page == GOLDEN.read_text("utf-8")


@pytest.mark.parametrize("name", VARIANTS)
def test_any_run_gives_a_page_that_is_whole_offline_and_small(name: str) -> None:
    page = render(VARIANTS[name])
    parsed = Page(page)
    assert parsed.tags["h1"] == parsed.tags["main"] == parsed.tags["title"] == 1
    assert len(page.encode()) < (1_000_000 if len(VARIANTS[name]) < 5 else 2_000_000)
    loads = [a for a in parsed.attributes if a[1] in ("src", "srcset", "href", "action", "data", "poster")]
    assert {value[0] for _, _, value in loads} <= {"#", "d"}  # anchors and the empty icon
    assert not re.search(r"\burl\(|@import", page)
    ids = [value for _, attribute, value in parsed.attributes if attribute == "id"]
    assert len(ids) == len(set(ids))
    named = [value for _, attribute, value in parsed.attributes if attribute in ("aria-describedby", "aria-labelledby")]
    assert set(named) <= set(ids)


def test_the_same_runs_give_the_same_bytes_and_are_left_alone() -> None:
    runs = [samples.sample(), samples.batches(2)]
    before = copy.deepcopy(runs)
    assert render(runs) == render(copy.deepcopy(runs))
    assert runs == before


def test_the_data_does_not_grow_past_its_budget() -> None:
    page = render([samples.batches(12)] * 3)
    assert len(json.dumps(figures(page))) < 400_000
    assert len(page.encode()) < 2_000_000


@pytest.mark.parametrize("runs", [[samples.batches(12)] * 30, [samples.batches(3)] * 60, [samples.batches(90)] * 3,
                                  [samples.batches(160)]],
                         ids=["30 of 12 points", "60 of 3", "3 of 90", "1 of 160"])  # fmt: skip
def test_any_number_of_runs_stays_below_the_limit_and_says_what_is_left_out(runs: list[RunView]) -> None:
    page = render(runs)
    assert len(page.encode()) < 2_000_000
    if len(runs) == 1:
        assert "60 of the points are in no chart or table here" in page
        return
    room = view.room(runs)
    assert 2 <= room < len(runs) and f"the first {room} of {len(runs)} runs" in page
    for name in view.labels(runs)[1:]:
        assert f"{name} against {view.labels(runs)[0]}" in page


@pytest.mark.full
def test_a_flood_of_text_is_cut() -> None:
    def flood(summary: dict[str, Any]) -> None:
        long = "x" * 1_000_000
        point = summary["points"][0]
        point["errors"], point["error_classes"] = 500, {f"{k} {long[:5000]}": 1 for k in range(500)}
        point["findings"] = [{"code": "V", "severity": "info", "saw": long, "why": "w", "do": "d"}] * 5000
        summary["verdict_sentence"] = summary["model"] = long

    view = samples.changed(flood)
    assert len(render([RunView(view.summary, view.run, "y" * 5_000_000)]).encode()) < 2_000_000


# --- plotly -------------------------------------------------------------------------------------------------------


def test_the_vendored_plotly_is_the_published_one_of_the_version_that_plotly_py_has() -> None:
    import plotly
    from plotly.offline import get_plotlyjs_version

    source = plotly_source()
    assert hashlib.sha256(source).hexdigest() == PLOTLY_SHA256
    assert f"plotly.js (basic - minified) v{PLOTLY_VERSION}".encode() in source[:200]
    # A newer plotly.py within the same major version only knows more options than we use.
    assert get_plotlyjs_version().split(".")[0] == PLOTLY_VERSION.split(".")[0]
    if plotly.__version__ == "7.1.0":
        assert get_plotlyjs_version() == PLOTLY_VERSION


def test_the_page_carries_the_licence_of_what_it_carries() -> None:
    text = told(samples.sample())
    assert "MIT License" in text
    assert "Plotly Technologies Inc." in text
    assert "MIT License" not in told(samples.empty())  # no chart, no plotly


def test_the_policy_names_the_scripts_of_the_page_and_nothing_else() -> None:
    page = render([samples.sample()])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    own = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(s).digest()).decode() for s in (own[0].encode(), plotly_source())]
    rules = html.unescape(policy[1])
    assert len(own) == 1
    assert f"script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}';" in rules
    assert rules.startswith("default-src 'none'; ")
    assert "connect-src 'none'" in rules
    assert "unsafe-eval" not in rules
    assert not [name for _, name, _ in Page(page).attributes if name.startswith("on")]


@pytest.mark.parametrize("name", VARIANTS)
def test_figures_are_plain_and_name_only_colours_that_have_a_dark_twin(name: str) -> None:
    for figure in figures(render(VARIANTS[name])).values():
        assert "template" not in figure["layout"]
        assert '"bdata"' not in json.dumps(figure)
        colours = {s for s in strings(figure) if re.fullmatch(r"#[0-9a-fA-F]{6}", s)}
        assert colours <= {light for light, _ in PALETTE.values()}


def _luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("mode", [0, 1])
def test_texts_and_marks_stand_out_from_the_paper(mode: int) -> None:
    def contrast(one: str, other: str) -> float:
        high, low = sorted((_luminance(PALETTE[one][mode]), _luminance(PALETTE[other][mode])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for text in ("ink", "muted", "valid", "suspect", "invalid", "measured"):
        assert min(contrast(text, "paper"), contrast(text, "panel")) >= 4.5, text
    for ground in ("memory", "compute", "nofit"):
        assert contrast("muted", ground) >= 4.5, ground
    for mark in ("second", "third", "fourth", "predicted"):
        assert contrast(mark, "paper") >= 3, mark
    assert len({light for light, _ in PALETTE.values()}) == len(PALETTE)  # the swap to dark must be one to one


# --- hostile text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [samples.HOSTILE, samples.HOSTILE_LINK])
def test_hostile_text_adds_no_element_and_no_attribute(text: str) -> None:
    good, bad = Page(render([samples.sample()])), Page(render([samples.hostile(text)]))
    page = render([samples.hostile(text)])
    assert bad.tags["script"] == good.tags["script"]
    assert set(bad.tags) <= set(good.tags)
    assert not bad.tags["img"]
    assert not [a for a in bad.attributes if a[1].startswith("on")]
    assert all(value.startswith(("#", "data:,")) for _, name, value in bad.attributes if name == "href")
    assert not set(page) & set("\u2028\u2029\x00\u202e")
    page.encode("utf-8")


def test_plotly_gets_no_tag_but_its_line_break() -> None:
    for figure in figures(render([samples.hostile(), samples.hostile(samples.HOSTILE_LINK)])).values():
        for text in strings(figure):
            assert not re.search(r"<(?!br>)", text)


@pytest.mark.parametrize(
    ("data", "gone"),
    [
        ({"headers": {"Authorization": "Bearer hunter2"}}, "hunter2"),
        ({"api_key": "hunter2"}, "hunter2"),
        ({"HF_TOKEN": "hunter2"}, "hunter2"),
        ({"url": "http://user:hunter2@host:8000/v1?key=hunter2"}, "hunter2"),
        ({"args": ["--api-key", "hunter2", "--hf-token=hunter2"]}, "hunter2"),
    ],
)
def test_secrets_are_left_out(data: dict[str, Any], gone: str) -> None:
    run = samples.sample()
    command = ["ridgeline", "run", *(data.get("args") or ())]
    page = render([RunView(run.summary, run.run | {"scenario": data, "engine": data, "command": command})])
    assert gone not in page
    assert "[removed]" in page


def test_what_only_sounds_like_a_secret_stays() -> None:
    kept = {"input_tokens": 350, "kv_bytes_per_token": 23040, "api_key_env": "MY_KEY", "tokenizer": "folder"}
    assert provenance.redacted(kept) == kept
    assert provenance.redacted({"url": "http://127.0.0.1:8000/v1"}) == {"url": "http://127.0.0.1:8000/v1"}


# --- what it says -------------------------------------------------------------------------------------------------


def test_the_verdict_is_the_summarys_own_sentence() -> None:
    run = samples.sample()
    assert verdict(run.summary) == run.summary["verdict_sentence"]
    assert run.summary["verdict_sentence"] in told(run)
    assert verdict({}) == "This run has no verdict."


@pytest.mark.parametrize(
    ("state", "stamp"), [("interrupted", "stopped before its end"), ("incomplete", "is incomplete")]
)
def test_a_run_that_did_not_end_is_stamped(state: str, stamp: str) -> None:
    text = told(samples.changed(lambda s: s.update(state=state)))
    assert state in text
    assert stamp in text
    assert stamp not in told(samples.sample())


def test_the_best_point_is_a_valid_one_and_the_faster_suspect_is_told() -> None:
    found = view.best(samples.sample(), "output_tokens_per_s", highest=True)
    assert found and found[1]["batch_size"] == 2
    assert "Passed over: batch 8 with 153.7 tokens/s, ▲ suspect" in told(samples.sample())


def test_an_invalid_point_is_a_headline_only_with_its_stamp() -> None:
    def all_invalid(summary: dict[str, Any]) -> None:
        for point in summary["points"]:
            point["verdict"] = "invalid"

    page = render([samples.changed(all_invalid)])
    panels = re.findall(r'<div class="panel">.*?</h3>', page, re.DOTALL)
    assert len(panels) == 2
    assert all("badge invalid" in panel for panel in panels)
    head = re.search(r'id="table-figures".*?</thead>', page, re.DOTALL)
    assert head and head[0].count("✕ invalid") == 4
    for name, figure in figures(page).items():
        drawn = strings(figure)
        if name not in ("chart-levers", "chart-cost"):  # of predictions, and of one point that its finding names
            assert "x" in drawn if name == "chart-plane" else any("✕" in text for text in drawn), name
    assert "✕, a million output tokens" in page or "✕ each dollar an hour" in page


def test_a_point_without_a_verdict_counts_as_suspect() -> None:
    assert view.verdict_of({}) == view.verdict_of({"verdict": "perfect"}) == "suspect"


def test_percentiles_of_too_few_samples_are_greyed_and_say_so() -> None:
    page = render([samples.sample()])
    assert re.search(r'<td class="thin" title="n too small: 12 of 36">611\.1 ms †</td>', page)
    assert "† n too small" in page
    assert "Needed: p90 36, p95 72, p99 368" in page

    def many(summary: dict[str, Any]) -> None:
        for point in summary["points"]:
            for key in ("ttft_s", "tpot_s", "e2e_s"):
                point[key]["n"] = 368

    assert "n too small" not in render([samples.changed(many)])


@pytest.mark.parametrize("name", ["p90", "p95", "p99"])
def test_the_samples_needed_are_those_that_bound_the_percentile(name: str) -> None:
    """With n samples the largest lies below the quantile q with probability q^n; 2.5 % is one side of 95 %."""
    assert math.ceil(math.log(0.025) / math.log(int(name[1:]) / 100)) == view.SAMPLES_NEEDED[name]


def test_errors_stand_beside_the_figures_by_class() -> None:
    page = render([samples.batches(4)])
    assert page.count("2 of 96 failed (connection reset 1, timeout 1)") >= 6

    def only_failing(summary: dict[str, Any]) -> None:
        summary["points"] = summary["points"][3:]

    panel = re.search(r'<div class="panel">.*?</h3>', render([samples.changed(only_failing)]), re.DOTALL)
    assert panel and "2 of 96 failed" in panel[0]


def test_missing_is_told_and_never_zero() -> None:
    def lose(summary: dict[str, Any]) -> None:
        for point in summary["points"]:
            point["ttft_s"] = None
            point["itl_s"]["mean"] = math.nan
            point["output_tokens_per_s"] = None
            point["input_tokens"] = None

    page = render([samples.changed(lose)])
    text = Page(page).text
    assert "not measured" in text
    assert not re.search(r"\b(nan|None|null|NaN)\b", text)
    measured = [t for t in figures(page)["chart-itl_s"]["data"] if t.get("name") == "Measured"]
    assert not measured


@pytest.mark.parametrize(
    ("run", "said", "unsaid"),
    [
        (samples.without_theory(architecture=False), "--hardware NAME", "--model-config"),
        (samples.without_theory(hardware=False), "--model-config PATH", "--hardware NAME"),
        (
            samples.without_theory(hardware=False, architecture=False),
            "validity findings below say why",
            "--hardware NAME",
        ),
    ],
)
def test_without_a_prediction_the_flag_that_would_help_is_named(run: RunView, said: str, unsaid: str) -> None:
    text = told(run)
    assert "There is no prediction" in text
    assert said in text
    assert unsaid not in text
    assert "There is no prediction:" not in told(samples.sample())


def test_a_rate_stands_where_there_is_no_batch_size() -> None:
    page = render([samples.open_loop()])
    assert "rate 0.5/s" in page
    assert figures(page)["chart-ttft_s"]["layout"]["xaxis"]["ticktext"] == ["0.5/s", "1/s", "1.5/s", "2/s"]
    marks = next(t for t in figures(page)["chart-plane"]["data"] if t["name"] == "Measured")
    assert len(marks["x"]) == 3  # the first point's batch is not known: it is not in the plane


def test_several_runs_line_up_by_batch_size() -> None:
    slow = samples.changed(lambda s: s.update(name="other"))
    page = render([samples.sample(), slow])
    head = re.search(r'id="table-figures".*?</thead>', page, re.DOTALL)
    assert head and head[0].count('colspan="2"') == 4
    bars = [t["name"] for t in figures(page)["chart-ttft_s"]["data"] if t["type"] == "bar"]
    assert bars == [
        f"{kind}, {name}" for name in ("quickstart (sample data)", "other") for kind in ("Predicted", "Measured")
    ]
    assert view.labels([slow, slow]) == ["other #1", "other #2"]


def test_measured_points_stand_at_the_batch_that_really_ran() -> None:
    plane = CHARTS["chart-plane"].draw([samples.sample()])
    assert plane
    marks = next(t for t in plane["data"] if t["name"] == "Measured")
    assert marks["x"] == [1.0, 1.97, 3.9, 7.7]


@pytest.mark.parametrize(
    ("ridge", "largest", "parts"),
    [
        (6.3, 682, ["memory-bound", "compute-bound", "does not fit"]),
        (1e6, 682, ["memory-bound", "does not fit"]),
        (0.5, 682, ["compute-bound", "does not fit"]),
        (6.3, 3, ["memory-bound", "does not fit"]),
        (6.3, None, ["memory-bound", "compute-bound"]),
        (6.3, 10**9, ["memory-bound", "compute-bound"]),
        (6.3, 0, ["does not fit"]),
        (None, None, []),
    ],
)
def test_the_plane_shows_the_parts_that_exist(ridge: float | None, largest: int | None, parts: list[str]) -> None:
    run = samples.changed(lambda s: s["plane"].update(ridge_batch=ridge, largest_batch=largest))
    figure = CHARTS["chart-plane"].draw([run])
    assert figure
    texts = [re.sub(r"<br>", "", note["text"]) for note in figure["layout"].get("annotations", [])]
    assert [text.partition(":")[0] for text in texts if not text.startswith("ridge")] == parts
    assert any(text.startswith("ridge") for text in texts) == ("memory-bound" in parts and "compute-bound" in parts)


def test_the_roof_between_two_batches_is_straight_on_logarithmic_axes() -> None:
    plane = {"batch": [1, 4], "roof_tokens_per_s": [100.0, 400.0]}
    assert view.roof_at(plane, 2) == pytest.approx(200)
    assert view.roof_at(plane, 4) == 400
    assert math.isnan(view.roof_at(plane, 5))
    assert math.isnan(view.roof_at({}, 1))


def test_load_time_stands_beside_weight_bytes_over_disk_bandwidth() -> None:
    assert tables.load_sentence(samples.sample()) == (
        "Reading the weights from disk should take 353.7 ms (145 MB at 410 MB/s); it took 530 ms, 1.5× that."
    )
    assert [stage.took for stage in tables.stages(samples.sample())] == ["90 ms", "530 ms", "320 ms"]


def test_findings_come_worst_first_and_the_same_advice_once() -> None:
    found = tables.findings([samples.sample()])
    assert [(f.severity, f.code, [where for where, _ in f.saw]) for f in found] == [
        ("suspect", "V003", ["batch 4", "batch 8"]),
        ("suspect", "V010", ["batch 8"]),
        ("info", "V020", ["whole run"]),
    ]


def test_the_command_can_be_pasted() -> None:
    run = samples.sample()
    page = render([RunView(run.summary, run.run | {"command": ["ridgeline", "run", "--out", "a dir/it's"]})])
    assert """ridgeline run --out &#39;a dir/it&#39;&#34;&#39;&#34;&#39;s&#39;""" in page


def test_every_chart_has_a_table_and_tells_how_to_read_it() -> None:
    page = render([samples.sample()])
    parsed = Page(page)
    assert parsed.tags["figure"] == parsed.tags["figcaption"] == len(figures(page)) > len(CHARTS)
    for chart in CHARTS.values():
        assert chart.read in parsed.text
    assert parsed.tags["table"] == parsed.tags["caption"] == parsed.tags["thead"]
