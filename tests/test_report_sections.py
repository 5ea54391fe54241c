"""The sections of the report: what each says of runs whose figures are known, and that missing is never nought."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import checks, detail, prices, units
from harness.metrics import METRICS
from harness.records import RidgelineError
from harness.report import capacity, corrections, decision, glossary, limits, ratio, roofline, validity, view
from harness.report.page import RunView, render
from harness.report.section import Charts
from harness.report.sections import SECTIONS
from harness.stats import Spread
from harness.theory import levers
from tests import report_samples as samples
from tests.test_report import figures, told

LOADS = "ttft_p50=1s,itl_p50=8ms"


@pytest.fixture(scope="module")
def run() -> RunView:
    """7.1, 7.8 and 10.2 ms a token at batch 1, 8 and 32."""
    return samples.recorded(slo=LOADS)


# --- the verdict --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slo", "word", "said"),
    [
        ("", "cannot tell", "no objective was stated"),
        ("itl_p50=8ms", "only with", "at most batch 8: batch 32 has ITL p50 10.2 ms, more than 8 ms"),
        ("itl_p50=20ms,ttft_p50=1s", "yes", "every load up to batch 32"),
        ("itl_p50=5ms", "no", "even batch 1 has ITL p50 7.11 ms, more than 5 ms"),
        ("itl_p50=5ms,ttft_p50=1s", "no", "even batch 1 has ITL p50"),
        ("output_tokens_per_s=2000", "only with", "batch 32: batch 8 has output tokens/s"),
        ("itl_p50@b8=7ms", "no", "even batch 8 has ITL p50 7.81 ms"),
        ("itl_p50@b8=8ms", "yes", "every load up to batch 8, the largest measured, meets ITL p50 ≤ 8 ms at b8"),
    ],
)
def test_the_answer_is_what_the_points_show(slo: str, word: str, said: str) -> None:
    found = decision.decide(samples.recorded(slo=slo))
    assert (found.word, said in found.reason) == (word, True), found.reason
    assert told(samples.recorded(slo=slo)).count(found.reason) >= 1


def test_too_few_samples_show_no_percentile() -> None:
    few = samples.recorded(count=20, trials=1, slo="ttft_p99=1s")
    found = decision.decide(few)
    assert found.word == "cannot tell"
    assert "samples cannot show it, 368 are needed" in found.reason
    # But half of them over the bound is enough to know that 99 of 100 are not under it.
    assert decision.decide(samples.recorded(count=20, trials=1, slo="ttft_p99=1ms")).word == "no"


def test_invalid_points_answer_nothing() -> None:
    run = samples.recorded(slo=LOADS)
    for point in run.summary["points"]:
        point["verdict"] = "invalid"
    assert decision.decide(run).reason.endswith("(no point is valid)")


def test_the_cost_is_price_over_throughput_and_missing_where_no_price_is_known() -> None:
    run = samples.recorded(slo=LOADS, price="3.6/h")
    chosen = decision.decide(run).chosen
    assert chosen
    rate = chosen[1]["output_tokens_per_s"]
    assert decision.usd_per_million(run, chosen[1]) == pytest.approx(3.6 / 3600 / rate * 1e6)
    bare = samples.changed(lambda s: s.update(worth={"slo": None, "limits": [], "accelerators": 1, "usd_per_h": None}))
    text = told(bare)
    assert "no price known" in text
    assert not re.search(r"\$0(?![.\d])", text)


@pytest.mark.parametrize(("text", "value"), [("1.2/h", 1.2), ("$3.6", 3.6), ("0.02/min", 1.2), (".5 $/h", 0.5)])
def test_prices_are_of_an_hour(text: str, value: float) -> None:
    assert prices.usd_per_h(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "free", "-1/h", "0/h", "1/day", "1e400"])
def test_a_price_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RidgelineError, match="expected US dollars"):
        prices.usd_per_h(text)


# --- what limits it -----------------------------------------------------------------------------------------------


def test_the_parts_and_the_rest_add_up_to_what_was_measured(run: RunView) -> None:
    for point in view.points(run):
        for key in ("itl_s", "ttft_s"):
            parts = sum(limits.terms(point, key).values())
            assert parts == pytest.approx(view.predicted(point, key).value, rel=1e-6)
            assert parts + limits.rest(point, key) == pytest.approx(view.measured(point, key).value, rel=1e-6)


def test_the_bars_have_the_length_of_the_longer_of_the_two(run: RunView) -> None:
    found = figures(render([run]))["chart-step"]
    bars = [trace for trace in found["data"] if trace["type"] == "bar"]
    for place, name in enumerate(bars[0]["y"]):
        point = next(p for k, p in view.keyed(run).items() if view.marked(k, p, full=True) == name)
        length = sum(trace["x"][place] or 0.0 for trace in bars)
        longer = max(view.measured(point, "itl_s").value, view.predicted(point, "itl_s").value)
        assert length == pytest.approx(1e3 * longer, rel=1e-4)


def test_the_lever_is_the_prediction_with_one_thing_changed(run: RunView) -> None:
    rows = {row["name"]: row for row in run.summary["levers"]}
    best = max(view.points(run), key=lambda p: p["output_tokens_per_s"])
    base = best["predicted"]["output_tokens_per_s"]["value"]
    twice = samples.recorded(sizes=(64,)).summary["points"][0]["predicted"]["output_tokens_per_s"]["value"]
    assert rows["batch 64"]["output_tokens_per_s"] == pytest.approx(twice)
    assert rows["batch 64"]["times"]["output_tokens_per_s"] == pytest.approx(twice / base)
    assert rows["TP 2"]["gpus"] == 2
    # It misses its time between tokens: the lever is the one that shortens it most.
    lever = limits.next_lever(run)
    assert lever
    others = [row for row in run.summary["levers"] if row["kind"] != "hardware"]
    assert lever["times"]["itl_s"] == min(row["times"]["itl_s"] for row in others)
    assert lever["name"] in told(run)


def test_without_an_objective_the_lever_is_for_output_per_accelerator() -> None:
    run = samples.recorded()
    lever = limits.next_lever(run)
    settings = [row for row in run.summary["levers"] if row["kind"] == "setting"]
    assert lever and lever["times"]["output_tokens_per_s"] / lever["gpus"] == max(
        row["times"]["output_tokens_per_s"] / row["gpus"] for row in settings
    )


def test_work_is_what_the_model_needs(run: RunView) -> None:
    """Llama-3.1-8B: 8.03 G parameters less the embedding's 0.525 G in 2 bytes, and 131,072 bytes of KV cache a token."""
    for point in view.points(run):
        step, prompt = (point["predicted"]["work"][name] for name in ("decode", "prefill"))
        batch, read = point["batch_size"], 2 * (8_030_261_248 - 128_256 * 4096)
        assert step["bytes"] == pytest.approx(read + batch * 425 * 131_072, rel=1e-3)
        assert step["flops"] == pytest.approx(batch * 2 * 7.505e9, rel=0.02)
        assert prompt["flops"] == pytest.approx(350 * 2 * 6.979e9, rel=0.02)


def test_a_lever_that_cannot_be_had_is_not_named() -> None:
    names = {row["name"] for row in samples.recorded(hardware="A10").summary["levers"]}
    assert "fp8 weights" not in names  # the A10 has no fp8
    assert "int8 weights" in names
    assert "A10" not in names
    assert levers.LEAST > 0


# --- roofline, capacity, cost -------------------------------------------------------------------------------------


def test_no_phase_is_above_the_roof_unless_it_beats_physics(run: RunView) -> None:
    roof = roofline.roof_of(run)
    assert roof and roof.peak == pytest.approx(989.4e12)
    found = list(roofline.phases([run]))
    assert [(phase.name, phase.point["batch_size"]) for phase in found] == [
        ("decode", 1), ("prefill", 1), ("decode", 8), ("decode", 32)]  # fmt: skip
    for phase in found:
        assert phase.achieved == pytest.approx(phase.flops / phase.seconds)
        assert phase.achieved < roof.at(phase.intensity)


def test_goodput_counts_the_requests_that_met_every_objective(run: RunView) -> None:
    kept = run.summary["detail"]["points"]
    assert [kept[str(k)]["attained"]["requests"] for k in range(3)] == [288] * 3
    # One in fifty failed; at batch 32 a token takes 10.2 ms, more than 8.
    assert [kept[str(k)]["attained"]["met"] for k in range(3)] == [288 - 3, 288 - 3, 0]
    assert "Most goodput is" in told(run)
    assert "Goodput is not measured" in told(samples.recorded())


def test_the_frontier_has_only_points_that_none_beats_in_both() -> None:
    rows: list[capacity.User] = [
        ((0, k, 0), {}, x, y) for k, (x, y) in enumerate([(10, 1), (8, 5), (7, 4), (3, 9), (3, 8)])
    ]
    assert [key[1] for key, *_ in capacity.frontier(rows)] == [0, 1, 3]


def test_cost_over_price_and_utilisation(run: RunView) -> None:
    block = capacity.cost([samples.recorded(price="3.6/h")]).blocks[0]
    line = next(row for row in block.table.body if row[0].text == "$3.60")
    busy = [float(cell.text.lstrip("$")) for cell in line[1:]]
    assert busy[0] / busy[3] == pytest.approx(4, rel=0.02)
    assert "no price is known" in capacity.cost([samples.recorded(hardware=None)]).blocks[0].finding.lower()


def test_where_an_objective_is_met_is_told_by_the_load_only_where_the_load_parts_it() -> None:
    one, two, three = (0, 1.0, 0), (0, 2.0, 0), (0, 4.0, 0)
    assert capacity._where([one, two], [three]) == "met up to batch 2 and missed from batch 4 on"
    assert capacity._where([one, three], [two]) == "met at batch 1, batch 4 and missed at batch 2"
    assert capacity._where([], []) == "not shown by the samples"


def test_the_ratio_stands_beside_the_tolerance_that_the_prediction_states(run: RunView) -> None:
    block = ratio.block([run])
    assert block and block.figure
    bars = [trace for trace in block.figure["data"] if trace["mode"] == "lines"]
    assert len(bars) == 4 * len(view.points(run))
    theory = view.points(run)[0]["predicted"]["ttft_s"]
    assert bars[0]["y"] == pytest.approx([theory["low"] / theory["value"], theory["high"] / theory["value"]], rel=1e-5)
    held = [ratio.inside(p, shown) for p in view.points(run) for shown in view.HEADLINES]
    assert block.finding.startswith(f"{sum(map(bool, held))} of {len(held)} lie within")
    assert ratio.block([samples.without_theory()]) is None


def test_the_ledger_quotes_the_articles_beside_the_correction(run: RunView) -> None:
    tables = corrections.section([run])
    assert tables
    rows = {row[0].text: row for row in tables["tables"][0].body[1:4]}
    seed = view.points(run)[1]["predicted"]["seed"]["ttft_s"]
    assert seed == pytest.approx(
        2 * 8_030_261_248 * 350 * 8 / 989.4e12
    )  # 2 x parameters x prompt tokens x batch / peak
    assert rows[view.marked((0, 8.0, 0), view.points(run)[1], full=True)][1].text == units.seconds(seed)
    assert corrections.section([samples.without_theory()]) is None


def test_every_check_has_a_row_and_every_finding_its_sign() -> None:
    source = (Path(checks.__file__)).read_text("utf-8")
    assert set(validity.ASKED) == set(re.findall(r'Finding\("(V\d+)"', source))
    table = validity.checks_table([samples.sample()])
    assert table
    signs = {row[0].small: [cell.text for cell in row[1:]] for row in table.body}
    assert signs["V003"] == ["✓", "✓", "▲ suspect", "▲ suspect"]
    assert signs["V012"] == ["✓"] * 4


def test_every_metric_is_in_the_glossary() -> None:
    words = [word for word, _ in glossary.section([])]
    assert words[: len(METRICS)] == [glossary.NAMES[metric.name] for metric in METRICS]
    assert len(set(words)) == len(words)


# --- distributions, time, trials ----------------------------------------------------------------------------------


def test_a_distribution_ends_at_its_largest_sample_and_is_small() -> None:
    values = Spread()
    values.add(np.arange(1, 1_000_001) / 1000)
    found = detail._spread(values)
    assert found["value"][-1] == 1000
    assert found["value"] == sorted(found["value"])
    assert len(found["q"]) == detail.STEPS
    low, high = found["rank"]["p95"]
    assert low < 950 < high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.95 * 0.05 / 1e6) * 1000, rel=0.05)


def test_the_time_line_holds_all_tokens_and_all_time_in_flight(run: RunView) -> None:
    line = run.summary["detail"]["timeline"]
    tokens = sum(line["output_tokens_per_s"]) * line["step_s"]
    good = sum(p["requests"] - p["errors"] for p in view.points(run))
    assert tokens == pytest.approx(150 * good, rel=1e-3)
    took = sum((p["requests"] - p["errors"]) * p["e2e_s"]["mean"] + 0.3 * p["errors"] for p in view.points(run))
    assert sum(line["in_flight"]) * line["step_s"] == pytest.approx(took, rel=1e-3)
    assert sum(line["errors"]) == sum(p["errors"] for p in view.points(run))
    assert len(line["stretches"]) == 9


def test_the_sample_is_small_and_keeps_the_slowest() -> None:
    found = samples.recorded(count=2000, trials=1, sizes=(8,)).summary["detail"]["sample"]
    assert found["of"] == 2000
    assert len(found["id"]) <= detail.ROWS + detail.SLOWEST
    took = {i: last - sent for i, sent, last in zip(found["id"], found["sent_s"], found["last_token_s"], strict=True)}
    assert len(found["slowest"]) == detail.SLOWEST
    rest = max(v for i, v in took.items() if i not in found["slowest"])
    assert min(took[i] for i in found["slowest"]) >= rest - 1e-6


def test_trials_stand_as_dots_around_their_mean(run: RunView) -> None:
    found = figures(render([run]))["chart-trials-itl_s"]
    dots = [trace for trace in found["data"] if trace["mode"] == "markers"]
    assert [len(trace["x"]) for trace in dots] == [3, 3, 3]
    assert dots[0]["y"] == pytest.approx([-0.1, 0.0, 0.1], abs=0.01)
    assert "needs at least two trials" in told(samples.recorded(trials=1))


# --- all together -------------------------------------------------------------------------------------------------


def test_every_section_has_an_anchor_in_the_order_of_a_decision(run: RunView) -> None:
    page = render([run])
    order = re.findall(r'<section id="([a-z]+)"', page)
    wanted = [section.id for section in SECTIONS if section.id in order]
    assert order == wanted
    assert order[:8] == ["verdict", "limits", "versus", "plane", "roofline", "capacity", "pareto", "cost"]
    assert set(re.findall(r'href="#([a-z]+)"', page)) >= set(order)


@pytest.mark.parametrize("section", [s for s in SECTIONS if s.form == "charts"], ids=lambda s: s.id)
def test_every_chart_has_a_finding_a_table_and_says_how_to_read_it(section: Any, run: RunView) -> None:
    for runs in ([run], [run, samples.recorded(sizes=(4, 8))], [samples.sample()], [samples.open_loop()]):
        found = section.build(runs)
        if found is None:
            continue
        assert isinstance(found, Charts)
        assert found.blocks or found.otherwise
        for block in found.blocks:
            assert block.finding.endswith((".", ")"))
            assert not re.search(r"\bnan\b|None|–\.", block.finding), block.finding
            assert len(block.read) > 60
            assert block.table.body


def test_what_was_not_measured_is_said_and_not_drawn_as_nought() -> None:
    """A run of an older version has neither details nor objectives."""
    text = told(samples.sample())
    for said in (
        "not measured (this run's records hold no single requests",
        "Stability is not measured",
        "no price known",
        "no objective was stated",
    ):
        assert said in text, said
    assert not re.search(r"\b(nan|None|null|NaN)\b", text)


def test_a_run_of_many_points_stays_within_the_budget() -> None:
    big = samples.recorded(count=400, trials=3, sizes=(1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256), slo=LOADS)
    page = render([big])
    assert len(json.dumps(figures(page))) < 300_000
    assert len(page.encode()) < 1_050_000
    assert page == render([big])


def test_the_time_line_does_not_depend_on_how_the_records_are_cut() -> None:
    rng = np.random.default_rng(1)
    edges, begun = np.linspace(0, 10, 41), rng.uniform(0, 9, 500)
    ended, weight = begun + rng.uniform(0, 1, 500), rng.uniform(0, 5, 500)
    whole = detail._elapsed(edges, begun, ended, weight)
    parts = sum(detail._elapsed(edges, begun[k::7], ended[k::7], weight[k::7]) for k in range(7))
    assert parts == pytest.approx(whole)
    direct = [(weight * (np.minimum(ended, edge) - np.minimum(begun, edge))).sum() for edge in edges]
    assert whole == pytest.approx(direct)


# --- on the command line ------------------------------------------------------------------------------------------


@pytest.mark.full
def test_an_objective_and_a_price_given_with_the_report_stay_with_the_run(
    simulated: Callable[..., str], ridgeline: Callable[..., Any], tmp_path: Path
) -> None:
    url = simulated("--ttft-base", "5ms", "--itl-base", "2ms", "--slots", "4")
    done = ridgeline("run", "--url", url, "--batch-sizes", "1,2", "--requests", "20", "--trials", "2", "--input-tokens", "32", "--output-tokens", "8",
                     "--slo", "itl_p50=1s", "--hardware", "H100-SXM", "--model-config", "Llama-3.1-8B", "--out", "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["worth"]["slo"] == "itl_p50=1s"
    done = ridgeline("report", "run", "--slo", "itl_p50=1ms,ttft_p50=1s", "--price", "3.6/h", "-o", "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert "ITL p50 ≤ 1 ms and TTFT p50 ≤ 1 s" in page and "$3.60/h (as given)" in page
    verified = ridgeline("verify", "run")  # from the journal, where the report was made from the columns
    assert verified.returncode == 0, verified.stderr
    wrong = ridgeline("report", "run", "--slo", "speed=1")
    assert wrong.returncode == 2 and "speed" in wrong.stderr and "Traceback" not in wrong.stderr
