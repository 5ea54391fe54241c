"""Which runs may be compared, what is asked of them, and the exit code that says so."""

from __future__ import annotations

import xml.etree.ElementTree as xml
from typing import Any

import pytest

from harness import baseline, comparison, gate_text, store
from harness.comparison import Options, parse_margins, parse_metrics
from harness.gate import Rule
from harness.records import RidgelineError
from harness.slo import parse as parse_slo
from tests.gate_samples import figures, noise, point, trials

BASE = figures({"b1": trials(), "b4": trials()})


def gated(base: dict[str, Any] | None, new: dict[str, Any], **more: Any) -> dict[str, Any]:
    return dict(store.clean(comparison.compare(base, new, Options(gated=True, **more))))


def both(scale: float = 1.0, spread: float = 1.0) -> dict[str, Any]:
    return figures({"b1": trials(scale, spread), "b4": trials(scale, spread)})


CASES = {
    "the same": (BASE, {}, 0, "pass"),
    "slower": (both(1.2), {}, 3, "fail"),
    "faster": (both(0.8), {}, 0, "pass"),
    "slower by less than matters": (both(1.01), {}, 0, "pass"),
    "lost in noise": (both(1.04, 30), {}, 0, "inconclusive"),
    "lost in noise, and that may not be": (both(1.04, 30), {"undecided_fails": True}, 4, "inconclusive"),
    "a point is invalid": (point(BASE, "b4", verdict="invalid", findings=["V002: core full"]), {}, 5, "invalid"),
    "the run did not end": (BASE | {"state": "interrupted"}, {}, 5, "invalid"),
    "requests failed": (point(BASE, "b4", errors=50), {}, 6, "invalid"),
    "one point is invalid, the other slower": (
        point(both(1.2), "b4", verdict="invalid", findings=["V002: core full"]), {}, 3, "fail"),
    "an objective is missed": (BASE, {"slo": parse_slo("ttft_p50=50ms")}, 3, "fail"),
    "an objective is met": (BASE, {"slo": parse_slo("ttft_p50@b4=200ms,output_tokens_per_s=50")}, 0, "pass"),
    "below the roof's share": (point(BASE, "b4", roof_tokens_per_s=1000.0), {"roof": 0.6}, 3, "fail"),
    "above the roof's share": (point(BASE, "b4", roof_tokens_per_s=150.0), {"roof": 0.6}, 0, "pass"),
    "within a margin of one's own": (both(1.2), {"margins": parse_margins("ttft=30%,itl=30%,output_tokens_per_s=30%")},
                                     0, "pass"),
    "another metric": (both(1.2), {"metrics": parse_metrics("itl_p50")}, 3, "fail"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_gate_says_by_its_code_what_it_found(name: str) -> None:
    new, more, code, verdict = CASES[name]
    found = gated(BASE, new, **more)
    assert (found["code"], found["verdict"]) == (code, verdict), found["why"]
    plain = comparison.compare(BASE, new, Options(**more))
    assert plain["code"] == 0 and plain["verdict"] == verdict


def test_runs_of_two_kinds_are_refused_by_the_field() -> None:
    for key in ("model", "hardware", "engine", "workload.mode", "workload.input_tokens", "workload.shared_prefix"):
        other = BASE | {"fingerprint": BASE["fingerprint"] | {key: "other"}}
        with pytest.raises(RidgelineError, match=key) as told:
            gated(BASE, other)
        assert told.value.code == 7
        assert gated(BASE, other, allow=frozenset({key}))["differs"][key] == [BASE["fingerprint"][key], "other"]


def test_the_engines_version_may_differ_and_is_told() -> None:
    found = gated(BASE, BASE | {"shown": {"engine version": "2"}})
    assert found["code"] == 0 and found["differs"] == {"engine version": ["1", "2"]}


@pytest.mark.parametrize("new", [figures({"b8": trials()}), figures({"b1": {"e2e_p50": [1.0, 1.0]}}), figures({}),
                                 figures({"b1": {"itl_p50": [None, None]}})])  # fmt: skip
def test_nothing_in_common_is_an_error_and_never_a_pass(new: dict[str, Any]) -> None:
    with pytest.raises(RidgelineError, match="nothing to compare") as told:
        gated(BASE, new)
    assert told.value.code == 7


def test_without_a_baseline_only_limits_are_held() -> None:
    with pytest.raises(RidgelineError, match="nothing to compare"):
        gated(None, BASE)
    assert gated(None, BASE, slo=parse_slo("ttft_p50=1s"))["code"] == 0
    with pytest.raises(RidgelineError, match="no prediction"):
        gated(None, BASE, roof=0.6)


def test_points_of_one_run_only_are_told() -> None:
    assert gated(BASE, figures({"b1": trials(), "b8": trials()}))["unmatched"] == ["b4 (base only)", "b8 (new only)"]


def test_the_family_is_all_that_is_tested_in_the_pipeline() -> None:
    """The more is asked, the more sure each must be."""
    slightly = figures({"b1": trials(1.06, 8), "b4": trials(1.0, 8)})
    few = gated(BASE, slightly, metrics=("itl_p50",))
    many = gated(BASE, slightly, slo=parse_slo("ttft_p50=1s,itl_p50=1s,output_tokens_per_s=1"))
    row = next(r for r in few["answers"] if r["name"] == "b1 itl_p50")
    same = next(r for r in many["answers"] if r["name"] == "b1 itl_p50" and r["kind"] == "change")
    assert row["p"] == same["p"] and same["p_holm"] > row["p_holm"] and same["detectable"] > row["detectable"]


def test_a_margin_below_the_noise_is_refused_and_a_default_one_gives_way() -> None:
    level = noise(BASE["fingerprint"], ["b1", "b4"], 0.02)
    with pytest.raises(RidgelineError, match="below what 5 trials can detect") as told:
        gated(BASE, BASE, noise=level, margins=parse_margins("itl=1%"))
    assert told.value.code == 2
    found = gated(BASE, BASE, noise=level)
    assert all(row["margin"] > 0.05 and any("widened" in note for note in row["notes"]) for row in found["answers"])
    loud = gated(BASE, BASE, noise=noise(BASE["fingerprint"], ["b1", "b4"], 0.2))
    assert loud["code"] == 0 and all(any("sleeps" in note for note in row["notes"]) for row in loud["answers"])
    broken = gated(
        BASE, figures({"b1": trials(), "b4": trials(6.0)}), noise=noise(BASE["fingerprint"], ["b1", "b4"], 0.2)
    )
    assert broken["code"] == 3  # what is many times worse is seen even so


def test_runs_that_took_turns_are_free_of_what_runs_differ_by() -> None:
    level = noise(BASE["fingerprint"], ["b1", "b4"], 0.002, run_sd=0.02)
    apart = gated(BASE, BASE, noise=level)
    turns = gated(BASE | {"interleaved": True}, BASE | {"interleaved": True}, noise=level)
    for one, two in zip(apart["answers"], turns["answers"], strict=True):
        assert one["detectable"] > 2 * two["detectable"]


@pytest.mark.parametrize(
    ("parse", "text", "said"),
    [
        (parse_slo, "ttft_p42=1s", "unknown metric 'ttft_p42'"),
        (parse_slo, "ttft_p50", "expected NAME=VALUE"),
        (parse_slo, "ttft_p50=soon", "expected a time"),
        (parse_slo, "ttft_p50=0s", "more than 0"),
        (parse_margins, "itl=300%", "between 0 and 100 %"),
        (parse_margins, "speed=3%", "unknown metric 'speed'"),
        (parse_metrics, "itl", "unknown metric 'itl'"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_read_is_told(parse: Any, text: str, said: str) -> None:
    with pytest.raises(RidgelineError, match=said) as told:
        parse(text)
    assert told.value.code == 2


@pytest.mark.parametrize(
    "text",
    [
        [], {}, {"schema": 2}, {"schema": 1}, BASE | {"points": [1]}, BASE | {"fingerprint": None},
        BASE | {"points": {"b1": {"verdict": "fine"}}},
    ],
)  # fmt: skip
def test_a_file_that_is_no_baseline_is_refused_by_name(text: Any) -> None:
    with pytest.raises(RidgelineError, match=r"^f\.json: ") as told:
        baseline.checked(text, "f.json")
    assert told.value.code == 7


# --- what is written -------------------------------------------------------------------------------------------------


def test_a_junit_failure_states_both_figures_in_its_body() -> None:
    found = gated(BASE, both(1.2), slo=parse_slo("itl_p50=1s"))
    root = xml.fromstring(gate_text.junit(found).split("\n", 1)[1])
    [suite] = root
    cases = suite.findall("testcase")
    assert suite.get("tests") == str(len(cases)) == "8" and suite.get("failures") == "6"
    assert len({(case.get("classname"), case.get("name")) for case in cases}) == len(cases)
    said = next(c for c in cases if (c.get("classname"), c.get("name")) == ("serving.b4", "itl_p50_ms"))[0].text
    assert said is not None and "10 ms in the baseline" in said and "12 ms now" in said


def test_junit_skips_what_is_inconclusive_and_errs_on_what_is_invalid() -> None:
    lost = point(both(1.04, 30), "b4", verdict="invalid", findings=["V002: \x01<core> & full"])
    [suite] = xml.fromstring(gate_text.junit(gated(BASE, lost)).split("\n", 1)[1])
    assert int(suite.get("skipped", 0)) > 0 and suite.get("errors") == "1" and suite.get("failures") == "0"


def test_the_summary_stays_below_60_kb_and_shows_failures_first() -> None:
    found = gated(BASE, figures({"b1": trials(), "b4": trials(1.2)}))
    passed = [row for row in found["answers"] if row["verdict"] == "pass"]
    found["answers"] = [row | {"point": f"b{i}"} for i in range(400) for row in passed] + found["answers"]
    text = gate_text.markdown(found)
    assert len(text.encode()) < 60_000 and "more lines do not fit" in text
    rows = [line for line in text.splitlines() if line.startswith("| b")]
    assert all("b4 " in line and "**fail**" in line for line in rows[:3])


def test_workflow_commands_are_one_for_each_failure_and_escaped() -> None:
    lines = gate_text.workflow_commands(gated(BASE, both(1.2)))
    assert len(lines) == 6
    assert all(line.startswith("::error title=b") and "%25" in line and "\n" not in line for line in lines)
    assert gate_text.workflow_commands(gated(BASE, BASE)) == []
    assert gate_text.workflow_commands(gated(BASE, both(1.04, 30)))[0].startswith("::warning ")


def test_the_number_of_looks_is_told() -> None:
    found = comparison.compare(BASE, BASE, Options(rule=Rule(0.01, 3)), look=2)
    assert "look 2 of 3" in gate_text.terminal(store.clean(found))
