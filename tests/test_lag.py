"""The instrument's account of its own lateness, on a real loop and a real timer."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest

from harness import lag
from harness.lag import HELD_KEPT, HELD_S, PERIOD_S, Lag
from harness.metrics import held_up_s


def noticed(stops_s: list[float], apart_s: float = 0.05, exact: bool = True) -> dict[str, Any]:
    """What is noticed of a loop that stands still for so long, again and again."""

    async def play() -> dict[str, Any]:
        sense = Lag()
        assert (sense.fd >= 0) == exact
        for stop_s in stops_s:
            await asyncio.sleep(apart_s)
            time.sleep(stop_s)
        await asyncio.sleep(apart_s)
        sense.stop()
        return sense.as_dict()

    return asyncio.run(play())


@pytest.mark.skipif(lag._timer(time.perf_counter() + 1) < 0, reason="a system without timerfd")
def test_a_loop_that_stood_still_was_late_by_as_much() -> None:
    said = noticed([0.030, 0.080])
    shorter_s, longer_s = sorted(late_s for _, late_s in said["held"])[
        -2:
    ]  # a tick falls due within PERIOD_S of a stop's begin
    assert 0.080 - PERIOD_S <= longer_s <= said["lag_max_s"] + 1e-6 and shorter_s >= 0.030 - PERIOD_S
    # a third of all moments lay in one stop or the other, so the last hundredth in the longer one
    assert 0.030 < said["lag_p99_s"] <= said["lag_max_s"] + lag.BIN_S
    assert all(late_s >= HELD_S for _, late_s in said["held"]) and said["held_least_s"] == HELD_S


def test_the_longest_waits_are_kept_and_no_other_was_longer_than_is_said() -> None:
    async def play() -> dict[str, Any]:
        sense = Lag()
        sense.stop()
        for i in range(10 * HELD_KEPT):
            sense.note(float(i), 0.001 + 1e-6 * ((i * 7919) % (10 * HELD_KEPT)))
        return sense.as_dict()

    said = asyncio.run(play())
    late_s = sorted(0.001 + 1e-6 * k for k in range(10 * HELD_KEPT))
    kept = sorted(late for _, late in said["held"])
    assert 0 < len(kept) <= HELD_KEPT and kept == pytest.approx(late_s[-len(kept) :])
    assert said["held_least_s"] == pytest.approx(late_s[-len(kept) - 1])
    assert said["lag_max_s"] == pytest.approx(late_s[-1])
    assert said["lag_p99_s"] == pytest.approx(late_s[int(0.99 * len(late_s))], abs=2 * lag.BIN_S)


def test_stamps_beside_a_late_tick_may_be_as_late_and_others_not() -> None:
    stamps_s = np.array([2.0, 1.0, 1.004, 0.998, 0.9, 1.0065])
    found = held_up_s(stamps_s, [[1.0, 0.003], [1.002, 0.005], [3.0, 0.5]], 0.0001)
    assert found == pytest.approx(np.array([0.0001, 0.003, 0.003, 0.001, 0.0001, 0.0005]))
    assert held_up_s(np.empty(0), [[1.0, 0.003]], 0.0002).tolist() == []
    assert held_up_s(stamps_s, [], 0.0004).tolist() == [0.0004] * 6


def test_nan_stamps_are_left_alone() -> None:
    found = held_up_s(np.array([np.nan, 1.0]), [[1.0, 0.003]], 0.0002)
    assert found.tolist() == [0.0002, 0.003]


@pytest.mark.skipif(lag._timer(time.perf_counter() + 1) < 0, reason="a system without timerfd")
def test_a_loop_with_little_to_do_is_usually_late_by_a_wake_up() -> None:
    said = noticed([0.0, 0.0, 0.020])
    assert 0 < said["usual_s"] <= said["held_least_s"]


def test_what_the_sending_of_a_wave_holds_up_is_no_tokens_wait_but_may_be_a_first_ones() -> None:
    async def play() -> dict[str, Any]:
        sense = Lag()
        sense.stop()
        sense.released_s = 1.0
        sense.note(1.005, 0.008)  # due before the release was over
        for i in range(2, 200):
            sense.note(float(i), 0.0005)
        return sense.as_dict()

    said = asyncio.run(play())
    assert said["lag_p99_s"] < 0.001 and said["lag_max_s"] == 0.008
    assert said["held"][0] == [1.005, 0.008]
