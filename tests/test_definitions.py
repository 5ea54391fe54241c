"""One run under the formulas of five tools: figures whose answer is algebra, and the verb that shows them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest

from harness import archive, definitions, journal
from harness.records import Record, Table, joined, table
from harness.tally import of_table
from tests.conftest import one_object

TTFT, GAP, TOKENS = 0.05, 0.01, 150
PAGE = (Path(__file__).parent.parent / "harness" / "docs" / "definitions.md").read_text()


def answer(id: int = 0, sent_s: float = 0.0, tokens: int = TOKENS, ttft_s: float = TTFT, per_event: int = 1, tail_s: float = 0.002,
           role_s: float | None = None, finish_s: float = 0.0, **more: Any) -> Record:  # fmt: skip
    """`tokens` tokens a GAP apart, `per_event` in each event; a role chunk at `role_s`, an empty finishing chunk `finish_s`
    after the last token, the end of the response `tail_s` after it."""
    chunk_s = ttft_s + GAP * per_event * np.arange(math.ceil(tokens / per_event))
    last_s = float(chunk_s[-1])
    values: dict[str, Any] = {"point": 0, "trial": 0, "wave": 0, "warmup": False, "scheduled_s": math.nan, "input_tokens": 350,
              "output_tokens": tokens, "asked_output_tokens": tokens, "token_source": "usage", "status": 200}  # fmt: skip
    return Record(id=id, sent_s=sent_s, end_s=sent_s + last_s + tail_s, chunk_s=chunk_s.astype(np.float32),
                  chunk_tokens=np.ones(len(chunk_s), np.int32), first_event_s=ttft_s if role_s is None else role_s,
                  choice_events=len(chunk_s) + (role_s is not None) + (finish_s > 0), last_event_s=last_s + finish_s, **values | more)  # fmt: skip


def means(name: str, *records: Record, mode: str = "wave", slots: int = 1) -> dict[str, Any]:
    found = definitions.figures(name, table(list(records)), mode, slots)
    return {key: value["mean"] if isinstance(value, dict) else value for key, value in found.items()}


def test_ours_are_the_summarys() -> None:
    t = table([answer(i, i * 2.0, wave=i) for i in range(3)])
    summary = of_table(t, "wave", 1).row()
    ours = definitions.figures("ridgeline", t, "wave", 1)
    assert set(ours) == {*definitions.TIMES, *definitions.RATES}
    for key, value in ours.items():
        assert json.dumps(value) == json.dumps(summary[key]), key


@pytest.mark.parametrize("name", definitions.TOOLS)
def test_without_role_chunk_or_bundles_all_tools_agree_on_ttft_itl_and_nearly_on_e2e(name: str) -> None:
    row = means(name, answer())
    assert row["ttft_s"] == pytest.approx(TTFT, abs=1e-6)
    assert row["itl_s"] == pytest.approx(GAP, abs=1e-6)
    assert row["e2e_s"] == pytest.approx(TTFT + 149 * GAP, abs=0.0021)


def test_vllm_counts_a_role_chunk_and_an_empty_last_one_as_tokens() -> None:
    row = means("vllm", answer(role_s=0.001, finish_s=0.004))
    assert row["ttft_s"] == pytest.approx(0.001)
    assert row["e2e_s"] == pytest.approx(TTFT + 149 * GAP + 0.004)
    assert row["tpot_s"] == pytest.approx((0.049 + 149 * GAP + 0.004) / 149)
    assert row["itl_s"] == pytest.approx((0.049 + 149 * GAP + 0.004) / 151)
    assert means("ridgeline", answer(role_s=0.001, finish_s=0.004))["ttft_s"] == pytest.approx(TTFT, abs=1e-6)


def test_vllm_has_a_gap_of_nothing_where_the_role_chunk_came_with_the_first_token() -> None:
    assert means("vllm", answer(role_s=TTFT))["itl_s"] == pytest.approx(149 * GAP / 150, rel=1e-5)


def test_guidellms_tpot_has_the_first_token_and_its_means_weigh_by_tokens() -> None:
    row = means("guidellm", answer())
    assert row["tpot_s"] == pytest.approx((TTFT + 149 * GAP) / 150, rel=1e-5)
    assert row["e2e_s"] == pytest.approx(TTFT + 149 * GAP + 0.002, rel=1e-5)
    long, short = answer(0, tokens=101), answer(1, tokens=2, ttft_s=0.2)
    assert means("guidellm", long, short)["tpot_s"] == pytest.approx((TTFT + 100 * GAP + 0.2 + GAP) / 103, rel=1e-5)


def test_aiperf_has_no_tpot_and_an_itl_for_each_request() -> None:
    row = definitions.figures("aiperf", table([answer(0), answer(1, per_event=4, tokens=152)]), "wave", 1)
    assert row["tpot_s"] is None
    assert row["itl_s"]["n"] == 2
    assert row["itl_s"]["mean"] == pytest.approx((GAP + 37 * 4 * GAP / 151) / 2, rel=1e-5)


def test_sglang_counts_the_tokens_it_asked_for_and_time_up_to_the_end() -> None:
    row = means("sglang", answer(tokens=100, asked_output_tokens=150, tail_s=0.02))
    assert row["e2e_s"] == pytest.approx(TTFT + 99 * GAP + 0.02, rel=1e-5)
    assert row["tpot_s"] == pytest.approx((99 * GAP + 0.02) / 149, rel=1e-4)
    assert row["output_tokens_per_s"] == pytest.approx(150 / (TTFT + 99 * GAP + 0.02), rel=1e-5)


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_events_of_several_tokens_are_one_gap_to_vllm_and_sglang(name: str) -> None:
    row = means(name, answer(per_event=4, tokens=152))
    assert row["itl_s"] == pytest.approx(4 * GAP, rel=1e-4)
    assert means("ridgeline", answer(per_event=4, tokens=152))["itl_s"] == pytest.approx(GAP, rel=0.03)


@pytest.mark.parametrize("name", ["vllm", "guidellm", "aiperf", "sglang"])
def test_others_divide_by_all_of_the_time_and_each_trial_is_one_run(name: str) -> None:
    records = [answer(2 * k + i, 100.0 * k + 10.0 * i, wave=i, trial=k) for k in range(2) for i in range(2)]
    row = means(name, *records)
    assert row["output_tokens_per_s"] == pytest.approx(300 / (10 + TTFT + 149 * GAP), rel=2e-3)
    assert row["requests_per_s"] == pytest.approx(2 / (10 + TTFT + 149 * GAP), rel=2e-3)
    assert means("ridgeline", *records)["output_tokens_per_s"] == pytest.approx(150 / (TTFT + 149 * GAP), rel=1e-3)


@pytest.mark.parametrize("name", definitions.TOOLS)
def test_warm_up_and_failures_are_in_no_latency_and_nothing_measured_is_missing(name: str) -> None:
    bad = answer(1, ttft_s=9.0, error_class="truncated")
    assert means(name, answer(0), answer(2, ttft_s=7.0, warmup=True), bad)["ttft_s"] == pytest.approx(TTFT, abs=1e-6)
    nothing = means(name, bad)
    assert all(value is None or math.isnan(value) or value == 0 for value in nothing.values()), nothing


def test_what_was_not_stamped_is_missing_and_never_guessed() -> None:
    row = means("vllm", _without_events(answer()))
    assert all(math.isnan(row[key]) for key in definitions.TIMES)
    assert row["output_tokens_per_s"] > 0


def _without_events(record: Record) -> Record:
    record.first_event_s = record.last_event_s = math.nan
    return record


def test_files_from_before_these_stamps_still_read(tmp_path: Path) -> None:
    payload = journal.encode(answer())[8:]
    length = int.from_bytes(payload[1:5], "little")
    header = {k: v for k, v in orjson.loads(payload[5 : 5 + length]).items() if k not in archive.LATER}
    older = orjson.dumps(header)
    back = journal.decode_record(b"R" + len(older).to_bytes(4, "little") + older + payload[5 + length :])
    assert math.isnan(back.tls_s) and math.isnan(back.first_event_s) and back.choice_events is None and back.end_s > 0

    archive.write(tmp_path / "new", [table([answer()])])
    pq.write_table(pq.read_table(tmp_path / "new").drop_columns(list(archive.LATER)), tmp_path / "old")
    assert joined(list(archive.blocks(tmp_path / "new"))).first_event_s[0] == pytest.approx(TTFT)
    old = joined(list(archive.blocks(tmp_path / "old")))
    assert isinstance(old, Table) and math.isnan(old.last_event_s[0]) and old.choice_events[0] == -1


@pytest.mark.full
def test_a_stored_run_is_shown_under_each_tools_formulas(
    simulated: Callable[..., str], ridgeline: Callable[..., Any], tmp_path: Path
) -> None:
    url = simulated("--ttft-base", "40ms", "--itl-base", "4ms", "--role-chunk", "early")
    done = ridgeline("run", "--url", url, "--api", "chat", "--batch-sizes", "2", "--waves", "2", "--output-tokens", "20", "--input-tokens",
                     "64", "--out", "run", "--no-report")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {}
    for name in definitions.TOOLS:
        said = one_object(ridgeline("definitions", "run", "--as", name, "--json").stdout)
        assert said["definitions"] == name and said["version"] in PAGE + "this one"
        (point,) = said["points"]
        assert point["batch_size"] == 2
        found[name] = point["theirs"]
        assert point["ours"]["ttft_ms"]["mean"] > 39
    assert found["ridgeline"] == point["ours"]
    assert found["vllm"]["ttft_ms"]["mean"] < 20 < found["guidellm"]["ttft_ms"]["mean"]  # the role chunk came at once
    assert found["guidellm"]["tpot_ms"]["mean"] > 1.2 * found["ridgeline"]["tpot_ms"]["mean"]
    assert "tpot_ms" not in found["aiperf"] or found["aiperf"]["tpot_ms"] is None

    shown = ridgeline("definitions", "run", "--as", "vllm").stdout
    assert "batch size 2" in shown and "TTFT mean" in shown and "difference" in shown
    page = ridgeline("report", "run", "--definitions", "guidellm", "-o", "page.html")
    assert page.returncode == 0, page.stderr
    assert "as guidellm 0.8.1 reckons" in (tmp_path / "page.html").read_text()
    refused = ridgeline("definitions", "run", "--as", "wrk")
    assert refused.returncode == 2 and "guidellm" in refused.stderr


def test_without_a_run_the_verb_prints_the_page(ridgeline: Callable[..., Any]) -> None:
    assert ridgeline("definitions").stdout.strip() == PAGE.strip()


def test_the_page_speaks_of_every_tool_and_figure() -> None:
    for name, tool in definitions.TOOLS.items():
        assert name in PAGE.lower() and (name == "ridgeline" or tool.version in PAGE), name
    for label in ("TTFT", "ITL", "TPOT", "E2E", "Throughput"):
        assert f"| {label} |" in PAGE
