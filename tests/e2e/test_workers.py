"""More than one process, and a real local Ray: the same records, the same counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import store, workers
from harness.records import Request
from tests.conftest import one_object

LAW = ("--ttft-base", "30ms", "--itl-base", "4ms")
SHAPES = {
    "wave": (("--mode", "wave", "--batch-sizes", "5", "--waves", "3", "--warmup", "0"), 15),
    "closed": (("--mode", "closed", "--batch-sizes", "5", "--requests", "20", "--warmup", "0"), 20),
    "open": (("--rate", "60", "--requests", "30", "--warmup", "0"), 30),
}


def played(ridgeline: Callable[..., Any], url: str, *more: str) -> dict[str, Any]:
    done = ridgeline(
        "run", "--url", url, "--output-tokens", "12", "--input-tokens", "64", "--no-report", "--json", *more
    )
    assert done.returncode == 0, done.stderr
    return one_object(done.stdout)


@pytest.mark.parametrize(
    "shape", ["wave", *(pytest.param(shape, marks=pytest.mark.full) for shape in ("open", "closed"))]
)
def test_two_workers_give_the_counts_and_latencies_of_one(
    shape: str, simulated: Callable[..., str], ridgeline: Callable[..., Any], tmp_path: Path
) -> None:
    url = simulated(*LAW)
    options, count = SHAPES[shape]
    one = played(ridgeline, url, *options)
    two = played(ridgeline, url, *options, "--workers", "2")
    for found in (one, two):
        assert (found["points"][0]["requests"], found["points"][0]["errors"]) == (count, 0)
        assert "V013" not in [finding["code"] for finding in found["points"][0]["findings"]], (
            "all were in flight at once"
        )
    assert two["points"][0]["ttft_ms"]["p50"] == pytest.approx(one["points"][0]["ttft_ms"]["p50"], abs=5)
    assert two["points"][0]["itl_ms"]["p50"] == pytest.approx(one["points"][0]["itl_ms"]["p50"], abs=1)
    folder = tmp_path / two["run"]
    assert sorted(p.name for p in folder.glob("journal-*.bin")) == ["journal-0.bin", "journal-1.bin"]
    loaded = store.load(folder)
    assert sorted(loaded.records.id.tolist()) == list(range(count))
    assert json.loads((folder / "run.json").read_text())["client"]["clock_error_s"] == 0


def test_waves_of_two_workers_start_together(
    simulated: Callable[..., str], ridgeline: Callable[..., Any], tmp_path: Path
) -> None:
    found = played(ridgeline, simulated(*LAW), *SHAPES["wave"][0], "--workers", "2")
    t = store.load(tmp_path / found["run"]).records
    for wave in range(3):
        sent = t.sent_s[t.wave == wave]
        assert sent.max() - sent.min() < 0.02
        if wave:
            assert sent.min() > t.end_s[t.wave == wave - 1].max()


@pytest.mark.full
def test_the_turns_of_a_session_stay_in_order_on_one_of_two_workers(
    simulated: Callable[..., str], ridgeline: Callable[..., Any], tmp_path: Path
) -> None:
    shape = ("--mode", "closed", "--batch-sizes", "4", "--requests", "24", "--warmup", "0", "--turns", "3")
    found = played(ridgeline, simulated(*LAW), *shape, "--think-time", "20ms", "--workers", "2")
    t = store.load(tmp_path / found["run"]).records
    assert t.wave.tolist() == [0, 1, 2] * 8 and t.ok.all()
    for session in range(8):
        turns = t.where(t.id // 3 == session)
        assert (turns.sent_s[1:] - turns.end_s[:-1] >= 0.02).all()


def test_requests_are_dealt_in_the_proportion_of_the_slots() -> None:
    shards = workers.deal([Request(i, "", 1) for i in range(70)], 7, 3)
    assert [shard["slots"] for shard in shards] == [3, 2, 2]
    assert [len(shard["requests"]) for shard in shards] == [30, 20, 20]
    assert Counter(r["id"] for shard in shards for r in shard["requests"]) == Counter(range(70))


def test_a_plan_without_end_is_refused(simulated: Callable[..., str], ridgeline: Callable[..., Any]) -> None:
    done = ridgeline("run", "--url", simulated(*LAW), "--mode", "closed", "--duration", "1s", "--workers", "2")
    assert done.returncode == 2 and "cannot be dealt out" in done.stderr


def test_ray_workers_give_the_same_records(
    simulated: Callable[..., str], ridgeline: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (pip install ridgeline[ray])")
    url = simulated(*LAW)
    one = played(ridgeline, url, *SHAPES["closed"][0])
    two = played(ridgeline, url, *SHAPES["closed"][0], "--workers", "2", "--ray", "local")
    assert (two["points"][0]["requests"], two["points"][0]["errors"]) == (20, 0)
    assert two["points"][0]["ttft_ms"]["p50"] == pytest.approx(one["points"][0]["ttft_ms"]["p50"], abs=8)
    said = json.loads((tmp_path / two["run"] / "run.json").read_text())["client"]
    assert 0 < said["clock_error_s"] < 0.01
    assert sorted(store.load(tmp_path / two["run"]).records.id.tolist()) == list(range(20))
