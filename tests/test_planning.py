"""What to buy: the choice, the batch, the limit and the cost rebuilt from the theory; wrong questions get one clear error."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from harness import planning, planning_text
from harness.planning import Load, Plan, Point, Run, Span, Way, objective
from harness.records import RidgelineError
from harness.theory import catalogue, design, hardware, memory, roofline, tails
from harness.theory.calibration import Calibration
from harness.theory.roofline import Factors
from harness.theory.sweep import sweep

LLAMA = catalogue.find("meta-llama/Llama-3.1-8B")
NAMES = ("T4", "A10", "L4", "A100-SXM-80GB", "H100-SXM")
ROWS = [hardware.find(name) for name in NAMES]
FEW = [ROWS[1], ROWS[-1]]
SLO = (objective("ttft_p95", 0.8), objective("itl_p95", 0.05))
LOAD = Load(350, 150)


def planned(rows=ROWS, load: Load = LOAD, slo=SLO, **given) -> Plan:
    return planning.plan(LLAMA, rows, load, slo, framework="vllm", **given)


@pytest.fixture(scope="module")
def found() -> Plan:
    return planned()


def way(found: Plan, name: str, dtype: str, tp: int) -> Way:
    return next(w for w in found.ways if (w.hardware.name, w.dtype, w.tp) == (hardware.find(name).name, dtype, tp))


# --- the choice -------------------------------------------------------------------------------------------------------


def test_the_choice_is_the_cheapest_way_that_keeps_the_objectives(found):
    fits = [w for w in found.ways if w.allowed and w.state == "meets" and math.isfinite(w.hardware.usd_per_h)]
    costs = {}
    for w in fits:  # rebuilt from the sweep alone
        speed = sweep(LLAMA, w.hardware, batch=w.batch, input_tokens=350, output_tokens=150, dtype=w.dtype, tp=w.tp,
                      mode="open", framework="vllm").columns["output_tokens_per_s"].value[0]  # fmt: skip
        costs[w.hardware.name, w.tp] = w.hardware.usd_per_h * w.tp / (speed * 3600) * 1e6
    assert found.verdict == "yes"
    assert (found.choice.hardware.name, found.choice.tp) == min(costs, key=costs.get)
    assert found.choice.usd_per_million.value == pytest.approx(min(costs.values()))


def test_sixteen_bit_llama_8b_does_not_fit_a_t4(found):
    alone = way(found, "T4", "fp16", 1)
    assert alone.state == "does not fit"
    assert LLAMA.weight_bytes("fp16") > roofline.Room().share * memory.usable_bytes(hardware.find("T4"))
    assert any("does not fit one T4" in line for line in planning_text.unfit(found))
    assert way(found, "T4", "fp16", 4).state == "meets"
    assert way(found, "T4", "int4", 1).state == "meets"


def test_the_planned_batch_is_the_last_that_the_upper_ends_keep(found):
    """Nothing that keeps every objective by its upper end gives more tokens/s, and the next larger batch breaks one."""
    for w in (w for w in found.ways if w.curve and w.state == "meets"):
        kept = np.all([w.curve.times[o.name][2] <= o.bound_s for o in SLO], axis=0)
        first = len(kept) if kept.all() else int(np.argmin(kept))
        assert w.batch == 1 + int(np.argmax(w.curve.tokens_per_s[0][:first]))
        if w.binding in ("ttft_p95", "itl_p95"):
            assert w.batch == first
            bound = next(o.bound_s for o in SLO if o.name == w.binding)
            assert w.curve.time(w.binding, first).high > bound >= w.curve.time(w.binding, first - 1).high


def test_an_l4_alone_is_too_slow_because_it_reads_the_weights_once_a_token(found):
    alone = way(found, "L4", "bf16", 1)
    assert alone.state == "misses"
    assert alone.limit == "memory_bandwidth"
    assert LLAMA.read_bytes("bf16") / hardware.find("L4").bytes_per_s > 0.05


def test_hardware_without_a_price_is_never_bought_but_told_its_break_even_price(found):
    l4 = next(w for w in found.best if w.hardware.name == "L4")
    assert math.isnan(l4.usd_per_million.value)
    below = planning.break_even_usd_per_h(l4, found.choice, LOAD)
    cheap, dear = ([replace(r, usd_per_h=f * below) if r.name == "L4" else r for r in ROWS] for f in (0.98, 1.02))
    assert planned(cheap).choice.hardware.name == "L4"
    assert planned(dear).choice.hardware.name == found.choice.hardware.name


def test_narrower_weights_are_chosen_only_where_they_were_asked_for(found):
    assert found.choice.dtype == "bf16"
    assert found.lever is not None and found.lever.dtype in ("fp8", "int4")
    wider = planned(FEW, dtypes=["bf16", "fp8"])
    assert wider.choice.dtype == "fp8"
    assert wider.choice.usd_per_million.value < found.choice.usd_per_million.value


def test_only_with_a_precision_that_was_not_asked_for():
    found = planned([hardware.find("T4")], tps=[1])
    assert (found.verdict, found.choice.dtype) == ("only with", "int4")
    assert planning_text.verdict(found).startswith("In the precision asked for nothing meets")


def test_what_cannot_be_kept_is_no_and_names_the_nearest(found):
    hard = planned(FEW, slo=(objective("itl_p95", 1e-4),), tps=[1])
    assert (hard.verdict, hard.choice) == ("no", None)
    assert "The nearest is" in planning_text.verdict(hard)


def test_a_bound_between_value_and_upper_end_cannot_tell():
    rows = [hardware.find("A10")]
    alone = next(w for w in planned(rows, tps=[1]).ways if w.dtype == "bf16")
    span = alone.curve.time("itl_p95", 0)
    found = planned(rows, tps=[1], slo=(objective("itl_p95", (span.value + span.high) / 2),), dtypes=["bf16"])
    narrow = [w for w in found.ways if not w.allowed and w.state == "meets"]
    assert found.verdict == ("only with" if narrow else "cannot tell")
    bf16 = next(w for w in found.ways if w.dtype == "bf16")
    assert (bf16.state, bf16.hoped >= 1) == ("may meet", True)


# --- a rate -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1.0, 50.0, 200.0])
def test_replicas_serve_the_rate_and_no_fewer_would(rate):
    found = planned(FEW, load=Load(350, 150, rate), tps=[1, 2])
    for w in (w for w in found.ways if w.curve and w.works):
        each = w.tokens_per_s.value / 150
        assert (w.replicas.value - 1) * each < rate <= w.replicas.value * each * (1 + 1e-6)
        assert w.in_flight <= w.batch * (1 + 1e-9)
        month = w.replicas.value * w.tp * w.hardware.usd_per_h * planning.HOURS_A_MONTH
        assert w.usd_per_month.value == pytest.approx(month, nan_ok=True)
        tokens = rate * 150 * planning.HOURS_A_MONTH * 3600 / 1e6
        assert w.usd_per_million.value == pytest.approx(month / tokens, nan_ok=True)


# --- percentiles ------------------------------------------------------------------------------------------------------


def test_prompts_that_take_no_time_are_a_poisson_law():
    rate, plain = np.array([0.5, 3.0, 20.0]), np.ones(3)
    for share in (0.5, 0.9, 0.95, 0.99):
        told = tails.prompts_in_a_step(rate, plain, np.zeros(3), np.full(3, 60.0), share)
        for mean, k in zip(rate, told.astype(int), strict=True):
            chance = np.cumsum([math.exp(-mean + i * math.log(mean) - math.lgamma(i + 1)) for i in range(k + 1)])
            assert chance[k] >= share
            assert k == 0 or chance[k - 1] < share


def test_long_steps_are_followed_by_steps_with_more_prompts():
    rate, plain = np.full(3, 10.0), np.full(3, 0.05)
    found = tails.prompts_in_a_step(rate, plain, np.array([0.0, 0.05, 0.09]), np.full(3, 30.0), 0.95)
    assert found[0] < found[1] < found[2]
    assert tails.prompts_in_a_step(rate, plain, np.array([0.09] * 3), np.full(3, 2.0), 0.95).tolist() == [2.0] * 3


def played(gpu: str, batch: int, requests: int = 2500) -> tuple[np.ndarray, np.ndarray]:
    """(gaps between tokens, times to the first token) of an engine that is played event by event.

    Requests come by Poisson's law; a step takes what the theory says of those that run, and what it says that each prompt
    adds which came before it began; a request runs until it has its tokens.
    """
    grid = np.arange(1, 3 * batch + 60)
    found = sweep(
        LLAMA, hardware.find(gpu), batch=grid, input_tokens=350, output_tokens=150, mode="open", framework="vllm"
    )
    terms = found.columns["itl_s"].terms
    plain = sum(v for name, v in terms.items() if name != "prefills of others")
    each = terms["prefills of others"] / np.maximum((grid - 1) / 150, 1e-9)
    rng = np.random.default_rng(3)
    rate = found.columns["output_tokens_per_s"].value[batch - 1] / 150
    came = np.cumsum(rng.exponential(1 / rate, requests))
    ready = came + found.setup.request_s
    now, following, running, gaps, first = 0.0, 0, np.empty(0, int), [], []
    while following < requests:
        new = int(np.searchsorted(ready, now, "right")) - following
        if not new and not len(running):
            now = ready[following]
            continue
        at = max(len(running), 1) - 1
        took = (plain[at] if len(running) else 0.0) + new * each[max(at, 1)]
        now += took
        if requests // 8 < following:  # after the start
            gaps.append(np.full(len(running), took))
            first.append(now - came[following : following + new])
        running = np.append(running[running > 1] - 1, np.full(new, 149))
        following += new
    return np.concatenate(gaps), np.concatenate(first)


@pytest.mark.parametrize(
    ("gpu", "batch"), [("A10", 8), ("A10", 16), ("A100-SXM-80GB", 54), ("H100-SXM", 64), ("H100-SXM", 200)]
)
def test_percentiles_are_those_of_an_engine_played_event_by_event(gpu, batch):
    found = sweep(LLAMA, hardware.find(gpu), batch=np.arange(1, batch + 1), input_tokens=350, output_tokens=150, mode="open",
                  framework="vllm")  # fmt: skip
    gaps, first = played(gpu, batch)
    for metric, seen, tolerance in (("itl_s", gaps, 0.06), ("ttft_s", first, 0.2)):
        told = sum(v[-1] for v in tails.terms_at(found, metric, 0.95).values())
        assert told == pytest.approx(np.quantile(seen, 0.95), rel=tolerance), metric


@pytest.mark.parametrize("gpu", ["A10", "A100-SXM-80GB", "H100-SXM"])
def test_at_the_planned_batch_a_played_engine_keeps_the_objectives(found, gpu):
    alone = way(found, gpu, "bf16", 1)
    gaps, first = played(gpu, alone.batch)
    assert np.quantile(gaps, 0.95) <= 1.03 * 0.05
    assert np.quantile(first, 0.95) < 0.5


def test_the_wait_of_m_m_1_has_its_textbook_quantile():
    """P(W > t) = p exp(-(1 - p) t / s), so the mean is p s / (1 - p)."""
    load, share = np.array([0.3, 0.7, 0.95]), 0.95
    mean = load / (1 - load)
    exact = np.maximum(np.log(load / (1 - share)), 0) / (1 - load)
    assert tails.wait_factor(load, share) * mean == pytest.approx(exact)


def test_percentiles_rise_with_their_share_and_e2e_is_made_of_the_others():
    found = sweep(LLAMA, ROWS[1], batch=[1, 8, 40], input_tokens=350, output_tokens=150, mode="open", framework="vllm")
    total = {q: sum(tails.terms_at(found, "ttft_s", q).values()) for q in (0.5, 0.9, 0.95, 0.99)}
    assert np.all(np.diff(list(total.values()), axis=0) > 0)
    e2e = sum(tails.terms_at(found, "e2e_s", 0.95).values())
    assert e2e == pytest.approx(total[0.95] + 149 * found.columns["itl_s"].value)


# --- which measurement ------------------------------------------------------------------------------------------------


def test_measuring_the_planned_batch_leaves_least_doubt_of_its_time(found):
    told = planning.advice(found)
    assert told.way is found.choice
    assert told.point.doubt_after < 0.5 * told.point.doubt
    one = design.surest(found.choice.curve.found, "itl_s", found.choice.batch, [1], None)
    assert one.doubt == pytest.approx(told.point.doubt)
    assert told.point.doubt_after <= one.doubt_after + 1e-12


def test_a_calibrated_server_is_measured_where_its_calibration_says():
    cell = {"model": LLAMA.name, "kind": "static", "batch": 32, "input_tokens": 128, "output_tokens": 64, "doubt": 0.09}
    h100 = ROWS[-1]
    same = Calibration(h100.name, (LLAMA.name,), 3, Factors(), 0.03, cell)
    told = planning.advice(planned([h100], tps=[1], calibration=same))
    assert (told.point.batch, told.point.input_tokens, told.point.output_tokens, told.point.doubt) == (
        32,
        128,
        64,
        0.09,
    )
    other = replace(same, hardware="L4")
    assert planning.advice(planned([h100], tps=[1], calibration=other)).point.input_tokens == 350
    assert design.of_calibration({"batch": "many"}) is None


def test_a_calibration_moves_the_plan():
    """Reading twice as slow: fewer tokens/s at the same price."""
    h100 = ROWS[-1]
    slow = Calibration(h100.name, (LLAMA.name,), 3, Factors(bandwidth=2.0, kv=2.0, compute=1.5), 0.03)
    plain, found = (planned([h100], tps=[1], calibration=c) for c in (None, slow))
    assert found.choice.usd_per_million.value > 1.2 * plain.choice.usd_per_million.value
    assert found.choice.batch < plain.choice.batch


def test_one_of_two_ways_of_equal_cost_is_measured(found):
    """Not a third one, and it is worth much: the intervals of both overlap."""
    a10 = next(w for w in found.best if w.hardware.name == "A10")
    par = found.choice.usd_per_million.value * a10.tokens_per_s.value * 3600 / 1e6 / a10.tp
    near = planned([replace(r, usd_per_h=1.001 * par) if r.name == "A10" else r for r in ROWS])
    assert near.choice.hardware.name == found.choice.hardware.name
    told = planning.advice(near)
    assert told.way.hardware.name in ("A10", found.choice.hardware.name)
    assert told.saves > 5 * planning.WORTH


# --- measured ---------------------------------------------------------------------------------------------------------


def point(batch: float, speed: float, itl: float, verdict: str = "valid", **given) -> Point:
    return Point(batch, Span(speed, speed, speed), {"ttft_p95": Span(0.1), "itl_p95": Span(itl)}, verdict, **given)


def measured(*points: Point, unlike: str = "") -> Run:
    return Run("mine", replace(hardware.find("L4"), usd_per_h=0.1), "bf16", 1, points, unlike)


def test_a_measured_run_is_bought_where_it_is_the_cheapest():
    found = planned(
        FEW, tps=[1], runs=[measured(point(8, 900.0, 0.02), point(16, 1500.0, 0.04), point(32, 2000.0, 0.07))]
    )
    assert found.choice.run.name == "mine"
    assert (found.choice.batch, found.choice.binding) == (16, "itl_p95")
    assert found.choice.usd_per_million.value == pytest.approx(0.1 / 3600 / 1500 * 1e6)


@pytest.mark.parametrize(
    "run",
    [
        measured(point(16, 1500.0, 0.04, "suspect")),
        measured(point(16, 1500.0, 0.04, thin=("itl_p95",))),
        measured(point(16, 1500.0, 0.06)),
        measured(point(16, 1500.0, 0.04, "invalid")),
        measured(point(16, 1500.0, 0.04), unlike="another model: other"),
        measured(),
    ],
    ids=["suspect", "too few samples", "too slow", "invalid", "another model", "empty"],
)
def test_a_run_in_doubt_is_shown_but_not_bought(run):
    found = planned(FEW, tps=[1], runs=[run])
    assert found.choice.run is None
    assert [w.run for w in found.ways if w.run] == [run]


# --- what makes no sense ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ttft", "ttft_p42", "speed_p95", "output_tokens_per_s", ""])
def test_an_unknown_objective_is_refused(name):
    with pytest.raises(RidgelineError, match="unknown objective"):
        objective(name, 1.0)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_must_be_positive(bound):
    with pytest.raises(RidgelineError, match="more than 0"):
        objective("ttft_p95", bound)


def test_hardware_that_fits_nothing_is_one_error():
    big = catalogue.find("meta-llama/Llama-3.1-70B")
    with pytest.raises(RidgelineError, match="fits on none of T4"):
        planning.plan(big, [hardware.find("T4")], LOAD, SLO, tps=[1], framework="vllm")


def test_one_output_token_has_no_itl_and_still_a_plan():
    found = planned(FEW, load=Load(350, 1), tps=[1])
    assert found.choice is not None
    assert found.choice.binding != "itl_p95"
