"""The search for the capacity: against curves whose edge is algebra, queues whose tail is known, and live simulators."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import capacity, capacity_answer, edge, scenario, slo, store
from harness.capacity import Goal, Measured, Next, Reading
from harness.records import NAN, Play, Record, RidgelineError, Table, table
from harness.report import decision, search
from harness.report.view import RunView
from tests.conftest import ROOT, one_object

Run = Callable[..., "subprocess.CompletedProcess[str]"]
BOUNDS = {"ttft_p95": 0.15, "itl_p95": 0.05}


def looked_at(
    load: float, ttft_s: float, itl_s: float, served: float, e2e_s: float, verdict: str = "valid"
) -> Measured:
    """A point of a server without noise."""
    said = zip(BOUNDS.items(), (ttft_s, itl_s), strict=True)
    readings = tuple(Reading(name, bound, value, 0.999 * value, 1.001 * value) for (name, bound), value in said)
    return Measured(load, verdict, readings, served_per_s=served, ttft_s=ttft_s, e2e_s=e2e_s)


def by_decode(per_request_s: float) -> Callable[[float], Measured]:
    """ITL = 10 ms + d·B: the bound of 50 ms holds up to 40 ms / d."""

    def at(size: float) -> Measured:
        itl_s = 0.01 + per_request_s * size
        return looked_at(size, 0.05, itl_s, size / (0.05 + 149 * itl_s), 0.05 + 149 * itl_s)

    return at


def by_kv(slots: int) -> Callable[[float], Measured]:
    """`slots` sequences fit, of 3.08 s each; the others wait in turn: TTFT = 100 ms + (B - K)·3.08 s / K."""

    def at(size: float) -> Measured:
        wait_s = max(0.0, size - slots) * 3.08 / slots
        return looked_at(size, 0.1 + wait_s, 0.02, min(size, slots) / 3.08, 3.08 + wait_s)

    return at


def by_prefill(prefill_s: float) -> Callable[[float], Measured]:
    """One prompt after the other, then 3 s of decoding: TTFT = B·p - 3 s from where the prefills fill the cycle."""

    def at(size: float) -> Measured:
        ttft_s = max(prefill_s, size * prefill_s - 3)
        return looked_at(size, ttft_s, 0.02, size / (ttft_s + 3), ttft_s + 3)

    return at


CURVES = (
    [(by_decode(d), math.floor(0.04 / d)) for d in (0.03, 0.011, 0.0039, 0.003, 0.0011, 0.0007, 0.00013, 0.00003)]
    + [(by_kv(k), math.floor(k * (1 + 0.05 / 3.08))) for k in (1, 2, 3, 5, 8, 13, 20, 33, 64, 77, 100, 512, 1000, 3500)]
    + [(by_prefill(p), math.floor(3.15 / p)) for p in (0.14, 0.11, 0.045, 0.02, 0.0077, 0.003)]
)


def searched(at: Callable[[float], Measured], goal: Goal) -> tuple[str, list[Measured]]:
    points: list[Measured] = []
    while isinstance(step := capacity.decide(points, goal), Next):
        points.append(at(step.load))
    return step, points


@pytest.mark.parametrize("at", range(len(CURVES)))
def test_a_batch_size_is_found_within_5_percent_in_ten_points_whatever_limits_it(at: int) -> None:
    curve, true = CURVES[at]
    goal = Goal("closed", 8.0)
    ended, points = searched(curve, goal)
    found = capacity.edge(points, goal)
    assert len(points) <= 10 and ended == "found"
    assert abs(found.load / true - 1) <= 0.05 and found.low <= true <= found.high


@pytest.mark.parametrize("start", [1.0, 3.0, 500.0])
def test_it_does_not_matter_where_the_search_begins(start: float) -> None:
    goal = Goal("closed", start)
    ended, points = searched(by_kv(77), goal)
    assert ended == "found" and capacity.edge(points, goal).load == 78


def test_a_point_that_is_invalid_is_repeated_once_and_then_the_search_cannot_tell() -> None:
    goal, good = Goal("closed", 8.0), by_decode(0.001)

    def once(size: float) -> Measured:
        seen.append(size)
        return looked_at(size, 9, 9, 1, 9, "invalid") if len(seen) == 2 else good(size)

    seen: list[float] = []
    ended, points = searched(once, goal)
    assert seen[1] == seen[2] and ended == "found" and capacity.edge(points, goal).load == 40
    ended, points = searched(
        lambda size: looked_at(size, 1e-3, 1e-3, 1, 1, "invalid") if size > 8 else good(size), goal
    )
    assert ended == "invalid" and [p.verdict for p in points] == ["valid", "invalid", "invalid"]
    assert capacity.edge(points, goal).met == 8  # a point that is not trusted moves no end of the bracket


def test_where_no_load_meets_the_objective_the_search_says_so() -> None:
    ended, points = searched(by_decode(0.05), Goal("closed", 8.0))
    assert ended == "none" and points[-1].load == 1
    ended, points = searched(lambda rate: looked_at(rate, 1.0, 0.01, rate, 2.0), Goal("open", 1.0))
    assert ended == "none" and points[-1].load * 2.0 < 0.2


def test_a_server_that_always_meets_it_is_not_driven_without_end() -> None:
    ended, points = searched(lambda size: looked_at(size, 0.1, 0.01, size, 1.0), Goal("closed", 8.0))
    assert ended == "all" and len(points) <= 10
    assert capacity.edge(points, Goal("closed", 8.0)).high == math.inf


def test_a_server_that_sheds_load_does_not_meet_it() -> None:
    def sheds(size: float) -> Measured:
        point = looked_at(size, 0.1, 0.01, min(size, 25), 1.0)
        return Measured(size, "suspect", point.readings, failed_share=max(0.0, 1 - 25 / size), ttft_s=0.1, e2e_s=1.0)

    goal = Goal("closed", 8.0)
    ended, points = searched(sheds, goal)
    found = capacity.edge(points, goal)
    assert ended == "found" and found.load == 25 and found.limit == capacity.FAILED


def test_pooling_gives_the_nearest_sequence_that_never_falls() -> None:
    assert capacity.rising([1, 3, 2, 4], [1, 1, 1, 1]) == [1, 2.5, 2.5, 4]
    assert capacity.rising([3, 2, 1], [1, 1, 2]) == [1.75] * 3


def test_an_interval_widens_with_the_doubt_of_the_points() -> None:
    def noisy(points: list[Measured], spread: float) -> list[Measured]:
        return [Measured(p.load, p.verdict, tuple(Reading(r.metric, r.bound, r.value, r.value / spread, r.value * spread)
                for r in p.readings)) for p in points]  # fmt: skip

    goal = Goal("closed", 8.0)
    points = [by_decode(0.001)(size) for size in (8, 64, 39, 42)]
    sure, unsure = capacity.edge(noisy(points, 1.005), goal), capacity.edge(noisy(points, 1.2), goal)
    assert 39 <= sure.low <= 40 <= sure.high <= 42
    assert unsure.high - unsure.low > 2 * (sure.high - sure.low)


# --- an open loop: the tail of a queue -------------------------------------------------------------------------------


def records(due_s: Any, first_s: Any, done_s: Any, warmup: int) -> Table:
    """Requests of eight tokens each."""
    rows = []
    for i, (due, first, done) in enumerate(zip(due_s, first_s, done_s, strict=True)):
        arrivals = np.linspace(first - due, done - due, 8).astype(np.float32)
        rows.append(Record(i, 0, 0, 0, i < warmup, due, due, end_s=done, chunk_s=arrivals, chunk_tokens=np.ones(8, np.int32),
                           input_tokens=350, output_tokens=8, status=200))  # fmt: skip
    return table(rows)


def one_by_one(rate: float, service_s: float, play: Play, rng: np.random.Generator) -> Table:
    """Poisson arrivals at one server of constant service, M/D/1, then 1 s of decoding."""
    n = play.warmup + play.requests
    due_s = np.cumsum(rng.exponential(1 / rate, n))
    due_s *= n / rate / due_s[-1]
    first_s, free_s = np.empty(n), 0.0
    for i in range(n):
        first_s[i] = free_s = max(free_s, due_s[i]) + service_s
    return records(due_s, first_s, first_s + 1.0, play.warmup)


def tail_of_md1(load: float, times_service: float) -> float:
    """P(wait > t) of M/D/1, t in service times.  Erlang 1909: P(wait <= t) = (1 - load) * sum over k <= t of
    (load·(k - t))^k / k! · exp(load·(t - k)).  Its terms cancel for a long wait; there the tail is exponential (Cramér):
    (1 - load) / (load·e^θ - 1) · e^(-θt) with load·(e^θ - 1) = θ."""
    if times_service > 6:
        low, high = 1e-9, 50.0
        for _ in range(100):
            theta = (low + high) / 2
            low, high = (theta, high) if load * math.expm1(theta) < theta else (low, theta)
        return (1 - load) / (load * math.exp(low) - 1) * math.exp(-low * times_service)
    terms = [(load * (k - times_service)) ** k / math.factorial(k) * math.exp(load * (times_service - k))
             for k in range(math.floor(times_service) + 1)]  # fmt: skip
    return 1 - (1 - load) * sum(terms)


def test_the_formula_for_the_queue_agrees_with_a_queue() -> None:
    t = one_by_one(7.0, 0.1, Play(2000, 60_000), np.random.default_rng(3))
    waited = np.array(t.first_token_s - t.scheduled_s - 0.1)[2000:]
    assert float(np.mean(waited > 0.3)) == pytest.approx(tail_of_md1(0.7, 3.0), rel=0.1)
    assert tail_of_md1(0.8, 6.0) == pytest.approx(tail_of_md1(0.8, 6.0 + 1e-9), rel=0.01)


def rate_of_md1(service_s: float, bound_s: float) -> float:
    """The rate at which 5 % of the first tokens come after the bound, by bisection of the formula."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if tail_of_md1(middle, bound_s / service_s - 1) < 0.05 else (low, middle)
    return low / service_s


def find_rate(seed: int, service_s: float, bound_s: float, max_time_s: float) -> tuple[capacity.Edge, int]:
    rng, goal = np.random.default_rng(seed), Goal("open", 1.0, max_time_s=max_time_s)
    limits = slo.upper(f"ttft_p95={bound_s}s")
    points: list[Measured] = []
    left_s = max_time_s
    while isinstance(step := capacity.decide(points, goal), Next) and left_s > 0:
        play = capacity.plan(step, points, goal, limits, left_s)
        t = one_by_one(step.load, service_s, play, rng)
        said = edge.objective(t, limits, "open")
        row = {"objective": said, "rate": step.load, "verdict": "valid", "errors": 0, "requests": len(t),
               "ttft_s": {"mean": float(np.mean(t.first_token_s - t.scheduled_s))},
               "e2e_s": {"mean": float(np.mean(t.last_token_s - t.scheduled_s))}, "play": {"full": play.full}}  # fmt: skip
        points.append(capacity_answer.measured(row, "open"))
        left_s -= float(np.max(t.last_token_s))
    return capacity.edge(points, goal), len(points)


@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(1, 26), marks=pytest.mark.full)], ids=["few", "many"])
def test_the_rate_of_a_queue_of_known_tail_is_found(seeds: range) -> None:
    true = rate_of_md1(0.02, 0.1)
    found = [find_rate(seed, 0.02, 0.1, 900.0) for seed in seeds]
    assert all(n <= 10 for _, n in found)
    errors = np.array([at.load / true - 1 for at, _ in found])
    assert np.mean(np.abs(errors) <= 0.05) >= 0.9 and np.max(np.abs(errors)) <= 0.1
    assert np.mean([at.low <= true <= at.high for at, _ in found]) >= 0.7


def test_arrivals_that_outrun_completions_are_seen_and_the_rate_completed_is_told() -> None:
    rng = np.random.default_rng(1)
    over, served = edge.backlog(one_by_one(12.0, 0.1, Play(10, 300), rng))
    assert over and served == pytest.approx(10, rel=0.07)
    for seed in range(20):  # a queue that holds is not taken for one that grows
        assert not edge.backlog(one_by_one(8.0, 0.1, Play(50, 600), np.random.default_rng(seed)))[0]


def test_an_interval_of_a_quantile_knows_that_neighbours_depend_on_each_other() -> None:
    """Of a slow wave and of the same values shuffled, the wave's quantile is the less sure."""
    values = np.repeat(np.random.default_rng(2).lognormal(0, 0.5, 36), 100)
    wave = edge.quantile(np.array_split(values, edge.SECTIONS), 0.95, True)
    mixed = edge.quantile(np.array_split(np.random.default_rng(2).permutation(values), edge.SECTIONS), 0.95, True)
    assert wave[0] == mixed[0] and wave[2] / wave[1] > 1.5 * mixed[2] / mixed[1]


def test_the_jackknife_covers_a_quantile_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(5), 0
    for _ in range(200):
        _, low, high = edge.quantile(np.array_split(rng.exponential(1.0, 1200), edge.SECTIONS), 0.95, True)
        hits += low <= -math.log(0.05) <= high
    assert 0.9 <= hits / 200 <= 1.0


# --- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [("output_tokens_per_s=5", "rises with the load"), ("ttft_p95@b8=1s", "leave @b8 out"), (" ", "no objective"),
     ("ttft_p42=1s", "unknown metric"), ("ttft_p95=soon", "expected a time")],
)  # fmt: skip
def test_an_objective_that_no_search_could_hold_is_refused(asked: str, said: str) -> None:
    with pytest.raises(RidgelineError, match=said):
        slo.upper(asked)


@pytest.mark.parametrize(
    ("text", "said"),
    [("workload: {mode: wave}", "needs closed"), ("workload: {mode: closed, trials: 3}", "workload.trials: cannot go"),
     ("workload: {mode: closed, requests: 30}", "workload.requests: cannot go"),
     ("workload: {mode: closed}\nclient: {workers: 2}", "client.workers: cannot go")],
)  # fmt: skip
def test_a_scenario_with_a_search_leaves_the_points_to_it(text: str, said: str) -> None:
    with pytest.raises(RidgelineError, match=said):
        scenario.load(f"slo: ttft_p95=1s\ncapacity: {{}}\n{text}\n")


# --- on the wire -----------------------------------------------------------------------------------------------------


def held(found: subprocess.CompletedProcess[str], true: float, url: str) -> None:
    """The answer is within 5 %, if the simulator kept its law; where the machine was too busy for the search to trust a
    point, it says so and gives no wrong answer."""
    said = one_object(found.stdout)["capacity"]
    assert len(said["points"]) <= 10
    if said["ended"] == "invalid":
        assert found.returncode == 5 and said["points"][-1]["holds"] is said["points"][-2]["holds"] is None
        pytest.skip(f"this machine is too busy: {said['sentence']}")
    with urllib.request.urlopen(f"{url}/__log__?events=0") as answer:
        kept = json.load(answer)["summary"]
    if kept["late_mean_s"] > 0.02 * min(r["bound"] for r in said["points"][0]["readings"]):
        pytest.skip(
            f"this machine is too busy: the simulator was late by {1000 * kept['late_mean_s']:.1f} ms on average"
        )
    assert found.returncode == 0, found.stderr
    assert abs(said["load"] / true - 1) <= 0.05, said["sentence"]
    assert said["low"] <= true + 0.5 and true <= said["high"]


@pytest.mark.full
def test_a_search_that_was_stopped_says_what_it_knows_and_goes_on_and_its_run_is_an_ordinary_one(
    simulated: Callable[..., str], ridgeline: Run, tmp_path: Path
) -> None:
    # Three sequences of 46 tokens fit, 160 ms each; of four, each waits 53 ms.
    url = simulated("--ttft-base", "60ms", "--itl-base", "20ms", "--kv-tokens", "140")
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", "find-capacity", "--url", url, "--slo", "ttft_p50=90ms", "--start", "2", "--max-time",
         "12s", "--input-tokens", "40", "--output-tokens", "6", "--out", "run"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert any("point 1 of at most 10" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "it was stopped" in out and "next: ridgeline run --resume run" in out and "batch size 2" in out
    found = ridgeline("run", "--resume", "run", "--json")
    said = one_object(found.stdout)["capacity"]
    assert said["points"][0]["load"] == 2
    assert ridgeline("verify", "run").returncode == 0
    assert said["sentence"] in ridgeline("report", "run").stdout
    again = ridgeline("run", "--resume", "run")
    assert again.returncode == 2 and "nothing is left to do" in again.stderr
    held(found, 3, url)


@pytest.mark.full
@pytest.mark.parametrize(
    ("server", "asked", "true"),
    [
        # One request at a time of 50 ms: B of them are answered after B times that.
        (("--ttft-base", "40ms", "--ttft-per-token", "0.2ms", "--slots", "1"),
         ("--slo", "ttft_p95=2.125s", "--input-tokens", "50", "--output-tokens", "1"), 42),
        # ITL = 40 ms + 4 ms · B, and 180 ms are allowed.
        (("--ttft-base", "200ms", "--itl-base", "40ms", "--itl-per-batch", "4ms"),
         ("--slo", "ttft_p95=1s,itl_p90=182ms", "--input-tokens", "60", "--output-tokens", "10"), 35),
        # 24 sequences of 80 tokens fit, of 3.15 s each; with B more than those, B · 131 ms are waited.
        (("--ttft-base", "300ms", "--itl-base", "150ms", "--kv-tokens", "1950"),
         ("--slo", "ttft_p95=400ms,itl_p90=250ms", "--input-tokens", "60", "--output-tokens", "20"), 24),
    ],
    ids=["prefill", "decode", "kv"],
)  # fmt: skip
def test_the_capacity_of_a_live_server_is_found_whatever_limits_it(
    simulated: Callable[..., str], ridgeline: Run, server: tuple[str, ...], asked: tuple[str, ...], true: float
) -> None:
    url = simulated(*server)
    held(ridgeline("find-capacity", "--url", url, *asked, "--max-time", "120s", "--json", timeout=400), true, url)


@pytest.mark.full
def test_the_rate_of_a_live_server_is_found_where_arrivals_outrun_it(
    simulated: Callable[..., str], ridgeline: Run
) -> None:
    """M/D/1 of 20 ms: the tail passes 1 s just below 50/s."""
    url = simulated("--ttft-base", "10ms", "--ttft-per-token", "0.2ms", "--slots", "1")
    found = ridgeline("find-capacity", "--mode", "open", "--url", url, "--slo", "ttft_p95=1s", "--input-tokens", "50",
                      "--output-tokens", "1", "--max-time", "240s", "--json", timeout=600)  # fmt: skip
    held(found, rate_of_md1(0.02, 1.0), url)


# --- in the report ---------------------------------------------------------------------------------------------------


def test_the_report_shows_the_points_of_a_search_and_where_the_edge_is() -> None:
    rows: list[dict[str, Any]] = []
    goal = Goal("closed", 8.0)
    ended, points = searched(by_decode(0.001), goal)
    for i, p in enumerate(points):
        said = [
            {"metric": r.metric, "bound": r.bound, "value": r.value, "low": r.low, "high": r.high, "n": 100}
            for r in p.readings
        ]
        rows.append({"point": i, "batch_size": int(p.load), "rate": None, "verdict": "valid", "errors": 0, "requests": 100,
                     "requests_per_s": p.served_per_s, "ttft_s": {"mean": p.ttft_s}, "e2e_s": {"mean": p.e2e_s}, "play": {"full": True},
                     "objective": {"readings": said, "saturated": False, "served_per_s": NAN}})  # fmt: skip
    found = capacity_answer.answer(rows, rows, range(len(rows)), "ttft_p95=150ms,itl_p95=50ms", goal, ended)
    assert found["sentence"] == ("ttft_p95 ≤ 150 ms and itl_p95 ≤ 50 ms hold up to batch size 40 (95 % interval 39 – 41); "
                                 "beyond, itl_p95 is missed first.")  # fmt: skip
    summary = {"name": "x", "capacity": store.clean(found), "points": []}
    charts = search.section([RunView(summary, {}, "")])
    assert charts is not None
    (block,) = charts.blocks
    assert block.finding == found["sentence"] and len(block.table.body) == len(rows)
    assert block.figure is not None and len(block.figure["data"]) == 2
    words = [row[2].text for row in block.table.body]
    assert words[0] == "met" and words[1] == "missed" and "39 – 41" in block.table.notes[0]
    assert search.section([RunView({"name": "x", "points": []}, {}, "")]) is None


@pytest.mark.parametrize(
    ("ended", "code", "said"),
    [("found", 0, "hold up to batch size 8 at least"), ("invalid", 5, "Cannot tell up to which load"), ("stopped", 0, "at least")],
)  # fmt: skip
def test_the_exit_code_and_the_sentence_follow_from_how_the_search_ended(ended: str, code: int, said: str) -> None:
    reading = {"metric": "itl_p95", "bound": 0.05, "value": 0.02, "low": 0.019, "high": 0.021, "n": 100}
    row = {"point": 0, "batch_size": 8, "rate": None, "verdict": "valid", "errors": 0, "requests": 100, "requests_per_s": 1.0,
           "ttft_s": {"mean": 0.1}, "e2e_s": {"mean": 1.0}, "play": {"full": True},
           "objective": {"readings": [reading], "saturated": False, "served_per_s": None}}  # fmt: skip
    found = capacity_answer.answer([row], [row], [0], "itl_p95=50ms", Goal("closed", 8.0), ended)
    assert said in found["sentence"] and capacity_answer.code(found) == code == capacity_answer.code(store.clean(found))
    bad = row | {
        "objective": {"readings": [reading | {"value": 0.08}], "saturated": False, "served_per_s": None},
        "batch_size": 1,
    }
    none = capacity_answer.answer([bad], [bad], [0], "itl_p95=50ms", Goal("closed", 8.0), "none")
    assert (
        none["sentence"] == "No load meets itl_p95 ≤ 50 ms: itl_p95 is 80 ms at batch size 1."
        and capacity_answer.code(none) == 3
    )


def test_a_rate_whose_arrivals_outran_completions_meets_nothing_however_short_the_look() -> None:
    times = {"p95": 0.1, "p50": 0.1, "n": 100}
    points = [{"rate": rate, "batch_size": None, "verdict": "valid", "ttft_s": times, "requests_per_s": min(rate, 50),
               "objective": {"saturated": rate > 50}} for rate in (16.0, 64.0)]  # fmt: skip
    worth = {"limits": [{"metric": "ttft_p95", "bound": 1.0, "point": None}]}
    said = decision.decide(RunView({"points": points, "worth": worth}, {}, ""))
    assert (
        said.word == decision.ONLY
        and "at most rate 16/s" in said.sentence
        and "more arrivals than completions" in said.sentence
    )
