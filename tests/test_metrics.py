"""Figures whose answer is algebra."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import metrics, stats
from harness.records import Record, table
from harness.tally import Tally, count, of_table


def steady(
    id: int, sent_s: float, ttft_s: float, gap_s: float, tokens: int, per_event: int = 1, **more: object
) -> Record:
    """An answer of `tokens` tokens, `per_event` in each event, events `gap_s` apart."""
    events = math.ceil(tokens / per_event)
    chunk_s = np.array([ttft_s + i * gap_s for i in range(events)], np.float32)
    values: dict[str, object] = {"point": 0, "trial": 0, "wave": 0, "warmup": False, "scheduled_s": math.nan} | more
    return Record(id=id, sent_s=sent_s, end_s=sent_s + float(chunk_s[-1]), chunk_s=chunk_s,
                  chunk_tokens=np.ones(events, np.int32), input_tokens=350, output_tokens=tokens,
                  token_source="usage", status=200, **values)  # type: ignore[arg-type]  # fmt: skip


def test_one_token_each_10_ms_after_50_ms() -> None:
    row = of_table(table([steady(i, i, 0.05, 0.01, 150) for i in range(4)]), "wave", 4).row()
    assert row["ttft_s"]["p99"] == pytest.approx(0.05, abs=1e-6)
    assert row["itl_s"]["mean"] == pytest.approx(0.01, abs=1e-6)
    assert row["tpot_s"]["p50"] == pytest.approx(0.01, abs=1e-6)
    assert row["e2e_s"]["mean"] == pytest.approx(0.05 + 1.49, abs=1e-6)
    assert (row["requests"], row["errors"], row["input_tokens"], row["output_tokens"]) == (4, 0, 350, 150)


def test_four_tokens_an_event_are_four_tokens_and_one_gap() -> None:
    row = of_table(table([steady(0, 0.0, 0.05, 0.04, 152, per_event=4)]), "wave", 1).row()
    assert row["chunk_gap_s"]["mean"] == pytest.approx(0.04, abs=1e-6)
    assert row["itl_s"]["mean"] == pytest.approx(0.01, abs=1e-6)
    assert row["tpot_s"]["mean"] == pytest.approx(37 * 0.04 / 151, rel=1e-5)


def test_a_failed_request_is_counted_and_enters_no_latency() -> None:
    bad = steady(1, 0.0, 9.0, 9.0, 3, error_class="truncated")
    row = of_table(table([steady(0, 0.0, 0.05, 0.01, 10), bad]), "wave", 2).row()
    assert (row["requests"], row["errors"], row["error_classes"]) == (2, 1, {"truncated": 1})
    assert row["ttft_s"]["mean"] == pytest.approx(0.05, abs=1e-6)


def test_warm_up_is_in_no_figure() -> None:
    row = of_table(table([steady(0, 0, 9.0, 1.0, 5, warmup=True), steady(1, 9, 0.1, 0.1, 5)]), "wave", 1).row()
    assert row["requests"] == 1
    assert row["ttft_s"]["mean"] == pytest.approx(0.1, abs=1e-6)


def test_what_did_not_happen_is_missing_and_never_zero() -> None:
    nothing = Record(0, 0, 0, 0, False, math.nan, 0.0, error_class="connect")
    row = of_table(table([nothing]), "wave", 1).row()
    assert math.isnan(row["ttft_s"]["mean"]) and math.isnan(row["output_tokens_per_s"])
    assert row["input_tokens"] is None


def test_one_arrival_tells_no_pace() -> None:
    row = of_table(table([steady(0, 0.0, 1.5, 0.0, 150, per_event=150)]), "wave", 1).row()
    assert math.isnan(row["tpot_s"]["mean"]) and math.isnan(row["itl_s"]["mean"])


def test_throughput_of_waves_leaves_out_the_time_between_them() -> None:
    rows = [steady(w * 2 + i, w * 100.0, 0.5, 0.5, 10, wave=w) for w in range(3) for i in range(2)]
    row = of_table(table(rows), "wave", 2).row()
    assert row["output_tokens_per_s"] == pytest.approx(2 * 10 / 5.0, rel=1e-4)
    assert row["requests_per_s"] == pytest.approx(2 / 5.0, rel=1e-4)
    assert row["total_tokens_per_s"] == pytest.approx(2 * 360 / 5.0, rel=1e-4)


def test_throughput_of_a_closed_loop_is_that_of_its_full_time() -> None:
    # Two slots, each answering ten requests of one second back to back: 10 tokens a second each, whatever the edges.
    rows = [steady(i * 2 + s, i + s * 0.5, 0.1, 0.1, 10) for i in range(10) for s in range(2)]
    row = of_table(table(rows), "closed", 2).row()
    assert row["output_tokens_per_s"] == pytest.approx(20.0, rel=0.02)


def test_throughput_of_an_open_loop_leaves_out_its_ramp() -> None:
    """Ten requests a second of 20 tokens, each 2 s long: 200 tokens/s once 20 are in flight."""
    rows = [steady(i, i / 10, 0.1, 0.1, 20, scheduled_s=i / 10) for i in range(100)]
    row = of_table(table(rows), "open", 0).row()
    assert row["output_tokens_per_s"] == pytest.approx(200, rel=0.02)
    assert row["requests_per_s"] == pytest.approx(10, rel=0.02)
    few = of_table(table(rows[:5]), "open", 0).row()  # over before the first has ended: all of it counts
    assert few["output_tokens_per_s"] == pytest.approx(10 / 0.4)


def test_scheduled_ttft_owns_the_lateness_of_sending() -> None:
    row = of_table(table([steady(0, 5.2, 0.05, 0.01, 9, scheduled_s=5.0)]), "open", 0).row()
    assert row["ttft_scheduled_s"]["mean"] == pytest.approx(0.25, abs=1e-6)
    assert row["ttft_s"]["mean"] == pytest.approx(0.05, abs=1e-6)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5), st.floats(0.001, 1)), min_size=1, max_size=12))
def test_gaps_per_token_always_add_up_to_the_answers_length(shape: list[tuple[int, int, float]]) -> None:
    rows = [steady(i, 0.0, 0.1, gap, tokens * per, per_event=per) for i, (tokens, per, gap) in enumerate(shape)]
    t = table(rows)
    total = float(np.sum(metrics.chunk_gap_s(t)))
    assert total == pytest.approx(sum((tokens - 1) * gap for tokens, _, gap in shape), rel=1e-3, abs=1e-4)
    assert float(np.sum(metrics.itl_s(t))) == pytest.approx(total, rel=1e-3, abs=1e-4)


def test_the_interval_over_trials_is_students() -> None:
    low, high = stats.interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)))
    assert all(math.isnan(x) for x in stats.interval([1.0, 2.0]))


def test_every_metric_is_documented_and_named_once() -> None:
    names = [metric.name for metric in metrics.METRICS]
    assert len(set(names)) == len(names)
    assert all(m.meaning and m.unit == "s" and m.better == "lower" for m in metrics.METRICS)


@given(st.lists(st.floats(1e-6, 1000.0), min_size=1, max_size=400), st.integers(0, 2**32 - 1))
def test_a_spread_too_large_to_keep_is_within_a_fortieth_of_a_percent(values: list[float], seed: int) -> None:
    kept, binned = stats.Spread(), stats.Spread()
    binned.EXACT = 0  # bins from the first value on
    shuffled = np.random.default_rng(seed).permutation(np.array(values, np.float32))
    for part in np.array_split(shuffled, 3):
        kept.add(part)
        binned.add(part)
    assert binned.counts is not None or not values
    assert kept.mean == pytest.approx(binned.mean, rel=1e-12) and kept.n == binned.n == len(values)
    ranked = np.sort(shuffled)
    for q in (0.0, 0.5, 0.99, 1.0):
        lower, upper = ranked[math.floor(q * (len(values) - 1))], ranked[math.ceil(q * (len(values) - 1))]
        assert lower * (1 - 2.6e-4) <= binned.quantiles(q)[0] <= upper * (1 + 2.6e-4)
        assert lower * (1 - 1e-6) <= kept.quantiles(q)[0] <= upper * (1 + 1e-6)


@settings(deadline=None)
@given(st.integers(1, 40), st.sampled_from(["wave", "closed", "open"]), st.integers(1, 4), st.randoms())
def test_a_point_cut_into_blocks_gives_the_figures_of_the_whole(n: int, mode: str, per_event: int, luck: Any) -> None:
    rows = [steady(i, i // 2 + luck.random(), 0.05 + luck.random(), 0.01, 12, per_event=luck.choice([1, per_event]),
                   scheduled_s=float(i // 2), wave=i // 2, trial=i % 3 if mode == "closed" else 0, warmup=i == 7)
            for i in range(n)]  # fmt: skip
    whole = of_table(table(rows), mode, 2).row()
    size = luck.randint(1, n)
    cut = Tally(mode, 2)
    count({0: cut}, lambda only, chunks: (table(rows[i : i + size]) for i in range(0, n, size)))
    for name, value in cut.row().items():
        if isinstance(value, dict) and name.endswith("_s"):
            for key, figure in value.items():
                assert figure == pytest.approx(whole[name][key], rel=1e-6, nan_ok=True), (name, key)
        elif isinstance(value, float):
            assert value == pytest.approx(whole[name], rel=1e-6, nan_ok=True), name
        else:
            assert value == whole[name], name
