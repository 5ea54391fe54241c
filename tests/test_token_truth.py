"""What a stream says is counted right, or flagged: the whole command against servers that speak in odd ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import store
from tests.conftest import one_object

TOKENS = 41


@pytest.fixture
def measured(simulated: Callable[..., str], ridgeline: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """measure(simulator's options, run's options) -> the one point, and the records."""

    def measure(server: str, options: str = "") -> tuple[dict[str, Any], Any]:
        url = simulated("--ttft-base", "50ms", "--itl-base", "10ms", "--slots", "0", *server.split())
        done = ridgeline("run", "--url", url, "--batch-sizes", "2", "--waves", "2", "--input-tokens", "64", "--output-tokens",
                         str(TOKENS), "--out", "run", "--no-report", "--json", *options.split())  # fmt: skip
        assert done.returncode == 0, done.stderr
        (point,) = one_object(done.stdout)["points"]
        t = store.load(tmp_path / "run").records
        return point, t.where(~t.warmup)

    return measure


def codes(point: dict[str, Any]) -> dict[str, str]:
    return {finding["code"]: finding["severity"] for finding in point["findings"]}


@pytest.mark.parametrize("usage", [pytest.param("end", marks=pytest.mark.full), "continuous"])
def test_four_tokens_an_event_are_counted_as_four(usage: str, measured: Callable[..., Any]) -> None:
    point, t = measured(f"--tokens-per-event 4 --usage {usage}")
    assert (point["errors"], point["output_tokens"], point["input_tokens"], point["token_source"]) == (
        0,
        TOKENS,
        64,
        ["usage"],
    )
    assert np.diff(t.start).tolist() == [11] * 4  # one token, then ten events of four
    assert point["tpot_ms"]["p50"] == pytest.approx(10, rel=0.02)
    assert point["chunk_gap_ms"]["p50"] == pytest.approx(40, rel=0.02)
    assert point["arrivals_per_token"] == pytest.approx(11 / TOKENS)
    assert codes(point)["V009"] == "info"
    if usage == "continuous":
        assert t.chunk_tokens.tolist() == [1, *[4] * 10] * 4
        assert point["itl_ms"]["p50"] == pytest.approx(10, rel=0.02)


def test_a_stream_delivered_in_one_piece_is_invalid_and_shows_no_pace(measured: Callable[..., Any]) -> None:
    point, t = measured("--one-piece")
    assert (point["errors"], point["output_tokens"]) == (0, TOKENS)
    assert codes(point)["V008"] == "invalid" and point["verdict"] == "invalid"
    assert len(set(t.chunk_s[t.start[0] : t.start[1]].tolist())) == 1
    assert not point["tpot_ms"]["mean"]


def test_without_usage_events_are_counted_and_the_point_says_so(measured: Callable[..., Any]) -> None:
    point, t = measured("--usage none", "--api chat")
    assert (point["output_tokens"], point["token_source"], point["input_tokens"]) == (TOKENS, ["chunks"], None)
    assert all(t.input_tokens == -1)
    assert codes(point)["V006"] == "suspect" and "V005" not in codes(point)


def test_without_usage_bundled_tokens_show_as_a_wrong_length(measured: Callable[..., Any]) -> None:
    point, _ = measured("--usage none --tokens-per-event 4")
    assert (point["output_tokens"], point["token_source"]) == (11, ["chunks"])
    assert {"V005": "suspect", "V006": "suspect"}.items() <= codes(point).items()


@pytest.mark.parametrize("role", ["first", pytest.param("early", marks=pytest.mark.full)])
def test_a_role_chunk_is_no_token_whenever_it_comes(role: str, measured: Callable[..., Any]) -> None:
    point, t = measured(f"--role-chunk {role}", "--api chat")
    assert (point["errors"], point["output_tokens"]) == (0, TOKENS)
    assert np.diff(t.start).tolist() == [TOKENS] * 4
    assert all(t.chunk_s[t.start[:-1]] > 0.04)  # the law says 50 ms; the role came at 1
    early = t.first_event_s < 0.04
    assert all(early) if role == "early" else not any(early)
    assert t.last_event_s == pytest.approx(t.chunk_s[t.start[1:] - 1], abs=1e-5)


def test_a_stream_that_ends_without_done_is_whole_if_it_said_why_it_ended(measured: Callable[..., Any]) -> None:
    point, t = measured("--no-done")
    assert (point["errors"], point["output_tokens"]) == (0, TOKENS)
    assert set(t.finish_reason.tolist()) == {"length"}
    assert np.diff(t.start).tolist() == [TOKENS] * 4
