"""Figures over time: what is appended, what is refused, and the chart in the report."""

from __future__ import annotations

from typing import Any

import pytest

from harness import history
from harness.records import RidgelineError
from harness.report import page, trend
from tests import report_samples
from tests.gate_samples import figures, point, trials


def run_at(day: int, scale: float = 1.0) -> dict[str, Any]:
    return figures({"b1": trials(scale), "b4": trials(scale)}, started_at=f"2026-01-{day:02}T00:00:00+00:00")


def three() -> str:
    text = ""
    for day, scale in ((1, 1.0), (2, 1.1), (3, 1.2)):
        text = history.appended(text, history.rows_of(run_at(day, scale)))
    return text


def test_a_history_only_grows_and_takes_a_run_once() -> None:
    text = three()
    assert history.appended(text, history.rows_of(run_at(2, 1.1))) == text
    longer = history.appended(text, history.rows_of(run_at(4)))
    assert longer.startswith(text) and len(history.parsed(longer)) == len(history.parsed(text)) * 4 // 3
    rows = [r for r in history.parsed(text) if (r["point"], r["metric"]) == ("b4", "itl_p50")]
    assert [r["mean"] for r in rows] == pytest.approx([0.01, 0.011, 0.012])
    assert all(r["low"] < r["mean"] < r["high"] for r in rows)


def test_an_invalid_point_and_a_missing_figure_are_not_in_it() -> None:
    found = point(run_at(1), "b4", verdict="invalid")
    found["points"]["b1"]["trials"]["itl_p50"] = [None] * 5
    rows = history.rows_of(found)
    assert {row["point"] for row in rows} == {"b1"} and "itl_p50" not in {row["metric"] for row in rows}


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", three().replace("0.01,", "fast,", 1)])
def test_a_file_that_is_no_history_is_refused_by_its_line(text: str) -> None:
    with pytest.raises(RidgelineError, match=r"^h\.csv:\d+: "):
        history.parsed(text, "h.csv")


def test_the_report_draws_the_change_from_the_first_run() -> None:
    view = report_samples.sample()
    plain = page.render([view])
    view.summary["history"] = history.parsed(three())
    figure = trend.draw([view])
    assert figure is not None
    line = next(trace for trace in figure["data"] if trace["name"] == "ITL p50, b4")
    assert line["y"] == pytest.approx([0, 10, 20], abs=0.01)
    shown = page.render([view])
    assert 'id="trend"' in shown and 'id="trend"' not in plain and "chart-trend" in shown
    assert shown.index("2026-01-03") < shown.index("2026-01-01")


def test_a_hostile_history_stays_text() -> None:
    view = report_samples.sample()
    rows = history.parsed(three())
    for row in rows:
        row["point"] = row["engine_version"] = "<script>alert(1)</script>"
    view.summary["history"] = rows
    assert "<script>alert" not in page.render([view])
