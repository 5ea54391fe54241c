"""Load shapes: rates that change, traces, lengths that differ, shared prefixes, prompts from files, sessions."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from harness import archive, command, journal, lengths, plan, prompts, store, tokens, trace
from harness.arrivals import Pattern, expected, offsets_s, parse, rescaled
from harness.lengths import Asks
from harness.records import Record, Request, RidgelineError, Table, joined, table
from harness.scenario import Workload
from tests.conftest import one_object

Run = Callable[..., "subprocess.CompletedProcess[str]"]
RAMP = [(2000.0, 1.0, 39.0)]
STEPS = [(400.0, 10.0, 10.0), (10.0, 800.0, 800.0), (800.0, 35.0, 35.0)]


def cumulative(at_s: Any, stretches: list[tuple[float, float, float]]) -> Any:
    """Requests due until `at_s`, by numerical integration: what `rescaled` inverts in closed form."""
    began_s = np.concatenate([[0], np.cumsum([for_s for for_s, _, _ in stretches])])
    grid = np.linspace(0, began_s[-1], 200_001)
    rate = np.zeros(len(grid))
    for begin, (for_s, start, end) in zip(began_s, stretches, strict=False):
        rate = np.where(grid >= begin, start + (end - start) * (grid - begin) / for_s, rate)
    total = np.concatenate([[0], np.cumsum((rate[1:] + rate[:-1]) / 2 * np.diff(grid))])
    return np.interp(at_s, grid, total)


@pytest.mark.parametrize("stretches", [RAMP, STEPS], ids=["ramp", "steps"])
@pytest.mark.parametrize("name", get_args(Pattern))
def test_arrivals_keep_their_name_under_a_rate_that_changes(
    name: Pattern, stretches: list[tuple[float, float, float]]
) -> None:
    n = int(0.99 * expected(stretches))
    due_s = rescaled(offsets_s(name, np.random.default_rng(5), 1.0, n, 0.5), stretches)
    assert np.all(np.diff(due_s) >= 0)
    gaps = np.diff(cumulative(due_s, stretches))
    assert np.mean(gaps) == pytest.approx(1, rel=0.02)
    cv = {"constant": 0.0, "poisson": 1.0, "gamma": 2**0.5}[name]
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(cv, rel=0.05, abs=0.02)


def test_a_ramp_from_nothing_begins_at_once_and_its_last_rate_stays() -> None:
    due_s = rescaled(np.arange(200.0), [(10.0, 0.0, 10.0)])
    assert due_s[0] == 0 and due_s[50] == pytest.approx(10)
    assert np.diff(due_s[50:]) == pytest.approx(0.1)
    assert rescaled(np.arange(5.0), [(10.0, 2.0, 2.0)]) == pytest.approx(np.arange(5) / 2)


def test_a_rate_is_written_as_numbers_a_ramp_or_steps() -> None:
    assert parse("1,2.5")["rates"] == [1, 2.5]
    assert parse("1:10:1min")["rate_ramp"] == {"start": 1, "end": 10, "over_s": 60}
    assert parse("5@30s,10@500ms")["rate_steps"] == [{"rate": 5, "for_s": 30}, {"rate": 10, "for_s": 0.5}]
    with pytest.raises(RidgelineError, match="steps 5@30s"):
        parse("1:2")


@pytest.mark.parametrize(
    ("length", "mean", "std"),
    [({"uniform": [100, 500]}, 300, 401 / 12**0.5), ({"normal": {"mean": 350, "std": 50}}, 350, 50),
     ({"lognormal": {"mean": 350, "std": 200}}, 350, 200), (350, 350, 0)],
)  # fmt: skip
def test_lengths_have_the_mean_and_spread_asked_for(length: Any, mean: float, std: float) -> None:
    drawn = lengths.draw(length, np.random.default_rng(1), 50_000)
    assert drawn.min() >= 1 and drawn.dtype.kind == "i"
    assert np.mean(drawn) == pytest.approx(mean, rel=0.02)
    assert np.std(drawn) == pytest.approx(std, rel=0.05)
    assert lengths.typical(length) == mean
    assert lengths.longest(length) >= np.quantile(drawn, 0.999)


def test_lengths_stay_within_min_and_max() -> None:
    drawn = lengths.draw({"normal": {"mean": 50, "std": 50, "min": 20, "max": 60}}, np.random.default_rng(1), 1000)
    assert (drawn.min(), drawn.max()) == (20, 60)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("350", 350),
        ("100:500", {"uniform": [100, 500]}),
        ("normal:9:2", {"normal": {"mean": 9, "std": 2}}),
        ("a.csv", {"file": "a.csv"}),
    ],
)
def test_a_length_is_written_as_a_number_a_distribution_or_a_file(text: str, found: Any) -> None:
    assert lengths.parse(text, "--input-tokens") == found
    with pytest.raises(RidgelineError, match="lognormal:MEAN:STD"):
        lengths.parse(text + ":x", "--input-tokens")


def made(**values: object) -> Workload:
    return Workload.model_validate(values)


def planned(work: Workload, trial: int = 0) -> list[Request]:
    asks, texts = plan.asks_of(work)
    pool = tokens.Prompts(
        texts or [f"p{i}" for i in range(len(asks))], "given" if texts else "tokenizer", "", 0, True, asks=asks
    )
    return list(plan.trial_requests(work, plan.points_of(work)[0], trial, pool, itertools.count()))


SHAPES: dict[str, dict[str, object]] = {
    "ramp": {"mode": "open", "rate_ramp": {"start": 5, "end": 20, "over_s": 4}},
    "steps": {"mode": "open", "rate_steps": [{"rate": 5, "for_s": 4}, {"rate": 20, "for_s": 1}]},
    "lengths": {"input_tokens": {"uniform": [64, 900]}, "output_tokens": {"lognormal": {"mean": 40, "std": 30}}},
    "sessions": {"mode": "closed", "turns": 3, "input_tokens": {"uniform": [64, 90]}, "requests": 40},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_follows_from_the_seed(shape: str) -> None:
    assert planned(made(**SHAPES[shape])) == planned(made(**SHAPES[shape]))
    assert planned(made(**SHAPES[shape])) != planned(made(**SHAPES[shape], seed=2)) or shape == "ramp"


def test_a_ramp_asks_as_many_as_its_rates_add_up_to() -> None:
    (point,) = plan.points_of(made(**SHAPES["ramp"]))
    assert point.rate == 12.5 and plan.counts_of(made(**SHAPES["ramp"]), point) == (1, 50)
    assert point.label == "5 to 20 requests/s over 4 s"


def test_trials_and_points_ask_the_same_lengths() -> None:
    work = made(**SHAPES["lengths"], batch_sizes=[2, 4], waves=4)
    first, again = (
        [(r.input_tokens, r.output_tokens) for r in planned(work, trial) if not r.warmup] for trial in (0, 1)
    )
    assert first == again and len(set(first)) > 3


def test_each_turn_of_a_session_asks_for_all_before_it_and_its_own() -> None:
    turns = planned(
        made(mode="closed", batch_sizes=[2], turns=3, input_tokens=100, output_tokens=20, requests=5, warmup=0)
    )
    assert [r.input_tokens for r in turns] == [100, 220, 340, 100, 220]
    assert [r.after for r in turns] == [None, 0, 1, None, 3]
    assert [r.wave for r in turns] == [0, 1, 2, 0, 1]


async def by_words(text: str) -> int:
    """A tokenizer of 4 characters a token, words apart, and one BOS."""
    return 1 + sum(-(-len(word) // 4) for word in text.split())


def built(asks: Asks, counted: list[int], n: int = 500, **options: Any) -> tokens.Prompts:
    async def count(text: str) -> int:
        counted[0] += 1
        return await by_words(text)

    async def ask(text: str, n: int) -> int:
        return await by_words(text) + 7

    return asyncio.run(tokens.build(tokens.Counter("server", count), ask, asks, n, 1, lambda n: None, **options))


def asked(values: Any) -> Asks:
    found = np.asarray(values)
    return Asks(found, np.ones(len(found), int), np.full(len(found), -1))


def test_many_lengths_are_exact_and_quickly_found() -> None:
    asks, counted = asked(np.random.default_rng(2).integers(12, 4000, 300)), [0]
    found = built(asks, counted)
    counts = [asyncio.run(by_words(found.at(1000 + i, i))) + 7 for i in range(300)]
    assert counts == asks.input_tokens.tolist()
    assert counted[0] < 300 * 10
    assert len({found.at(1000 + i, i)[:120] for i in range(300)}) == 300


def test_more_rows_than_are_fitted_one_by_one_share_texts_of_their_length() -> None:
    asks, counted = asked(np.arange(5000) % 40 + 60), [0]
    found = built(asks, counted, 5000)
    assert len(found.texts) == 40
    assert {asyncio.run(by_words(found.at(i, i))) + 7 - (i % 40 + 60) for i in range(0, 5000, 7)} == {0}
    assert len({found.at(i, i) for i in range(5000)}) == 5000


def common(texts: list[str]) -> int:
    return next(i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_a_shared_prefix_is_the_share_asked_for(share: float) -> None:
    found = built(Asks(np.full(20, 800), np.ones(20, int), np.full(20, -1), alike=True), [0], shared=share)
    texts = [found.at(i) for i in range(40)]
    assert {asyncio.run(by_words(text)) + 7 for text in texts} == {800}
    assert asyncio.run(by_words(texts[0][: common(texts)])) == pytest.approx(share * 800, abs=12)


def test_a_turn_begins_with_the_whole_turn_before() -> None:
    inputs, outputs, after = lengths.in_turns(np.full(12, 90), np.full(12, 30), 4)
    found = built(Asks(inputs, outputs, after), [0])
    for number in (0, 4, 48):  # the first, the second, and one that has another session's text under its own head
        session = [found.at(number + turn, (number + turn) % 12) for turn in range(4)]
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(session))
        assert [asyncio.run(by_words(text)) + 7 for text in session] == [90, 210, 330, 450]
    assert len({found.at(n, n % 12) for n in range(60)}) == 60


def test_a_trace_is_read_from_csv_and_jsonl_alike(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("timestamp_ms, input_length, output_length\r\n2500,80,5\r\n1000,70,4\r\n\r\n")
    lines = [
        {"timestamp": 2.5, "input_tokens": 80, "output_tokens": 5},
        {"timestamp": 1, "input_tokens": 70, "output_tokens": 4},
    ]
    (tmp_path / "t.jsonl").write_text("\ufeff" + "\r\n".join(map(json.dumps, lines)))
    for name in ("t.csv", "t.jsonl"):
        asks = trace.read(str(tmp_path / name))
        assert asks.due_s is not None and asks.due_s.tolist() == [0, 1.5]
        assert (asks.input_tokens.tolist(), asks.output_tokens.tolist()) == ([70, 80], [4, 5])


def test_a_traces_sessions_go_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("timestamp,input_tokens,output_tokens,session\n0,70,4,a\n1,80,4,b\n2,90,4,a\n")
    requests = planned(made(mode="open", trace=str(tmp_path / "t.csv"), trace_speed=2, warmup=0))
    assert [(r.scheduled_s, r.after) for r in requests] == [(0, None), (0.5, None), (1, 0)]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.csv", "timestamp,input_tokens,output_tokens\n0,5,5\n1,x,5\n", "t.csv:3: input_tokens: got 'x'"),
        (
            "t.csv",
            "timestamp,input_tokens\n0,5\n",
            "t.csv:2: no output_tokens or output_length; there: timestamp, input_tokens",
        ),
        ("t.csv", "timestamp,input_tokens,output_tokens\n0,5,0\n", "t.csv:2: output_tokens: got '0'"),
        ("t.csv", "timestamp,input_tokens,output_tokens\nnan,5,1\n", "t.csv:2: timestamp: got 'nan'"),
        ("t.csv", "", "t.csv: holds no row"),
        ("t.jsonl", '{"timestamp": 0}\n', "t.jsonl:1: no input_tokens"),
        ("t.jsonl", "\n[1]\n", "t.jsonl:2: expected an object"),
        ("t.jsonl", '{"a": 1}\n{', "t.jsonl:1: no timestamp"),
        ("t.jsonl", "{", "t.jsonl:1: not valid JSON"),
        ("none.csv", None, "none.csv: cannot be read"),
    ],
)
def test_an_error_in_a_trace_names_the_line(name: str, text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(RidgelineError) as problem:
        trace.read(str(tmp_path / name))
    assert said in str(problem.value)


def test_prompts_of_a_file_are_taken_in_order_and_round_again(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    chat = {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "three"}]}
    path.write_text("\ufeff" + "\r\n".join(map(json.dumps, [{"prompt": "one"}, {"text": "two"}, chat])))
    requests = planned(made(mode="closed", batch_sizes=[2], requests=5, warmup=0, prompts=str(path)))
    assert [r.prompt for r in requests] == ["one", "two", "three", "one", "two"]
    assert {r.input_tokens for r in requests} == {None}
    path.write_text('{"prompt": "one"}\n{"question": "two"}\n')
    with pytest.raises(RidgelineError, match=r"p\.jsonl:2: no prompt, text or messages"):
        planned(made(prompts=str(path)))


def test_lengths_of_a_file_come_in_pairs(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    path.write_text("input_tokens,output_tokens\n" + "".join(f"{n},{2 * n}\n" for n in range(50, 90)))
    requests = planned(
        made(batch_sizes=[8], waves=9, input_tokens={"file": str(path)}, output_tokens={"file": str(path)})
    )
    assert all(r.output_tokens == 2 * (r.input_tokens or 0) for r in requests)
    assert len({r.input_tokens for r in requests}) > 10


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"turns": 2}, "turns: belongs to mode closed or open"),
        ({"mode": "closed", "turns": 2, "prompts": "p.jsonl"}, "prompts: cannot go with turns"),
        ({"mode": "open", "rates": [1], "trace": "t.csv"}, "rates: a trace has its own times"),
        ({"mode": "closed", "trace": "t.csv"}, "trace: belongs to mode open"),
        ({"mode": "open"}, "rates: mode open needs"),
        ({"prompts": "p.jsonl", "same_prompt": True}, "same_prompt: cannot go with prompts"),
    ],
)
def test_shapes_that_contradict_each_other_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(**values)


def test_records_of_older_runs_still_read(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    record = Record(0, 0, 0, 0, False, 0.0, 0.0, input_tokens=5, asked_input_tokens=5, asked_output_tokens=9)
    archive.write(tmp_path / "r.parquet", [table([record])])
    assert joined(list(archive.blocks(tmp_path / "r.parquet"))).asked_output_tokens.tolist() == [9]
    old = pq.read_table(tmp_path / "r.parquet").drop_columns(["asked_input_tokens", "asked_output_tokens"])
    pq.write_table(old, tmp_path / "r.parquet")
    assert joined(list(archive.blocks(tmp_path / "r.parquet"))).asked_input_tokens.tolist() == [-1]
    frame = journal.encode(record).replace(b',"asked_input_tokens":5,"asked_output_tokens":9', b"")
    length = int.from_bytes(frame[9:13], "little") - len(b',"asked_input_tokens":5,"asked_output_tokens":9')
    payload = frame[8:9] + length.to_bytes(4, "little") + frame[13:]
    assert journal.decode_record(payload).asked_input_tokens is None


def measured(ridgeline: Run, tmp_path: Path, url: str, *options: str) -> tuple[dict[str, Any], Table]:
    done = ridgeline("run", "--url", url, "--no-report", "--json", "--warmup", "0", "--out", "r", *options)
    assert done.returncode == 0, done.stderr
    return one_object(done.stdout)["points"][0], store.load(tmp_path / "r").records


QUICK = ("--ttft-base", "4ms", "--itl-base", "1ms")


def assert_exact(point: dict[str, Any], records: Table) -> None:
    assert point["errors"] == 0
    assert records.input_tokens.tolist() == records.asked_input_tokens.tolist()
    assert records.output_tokens.tolist() == records.asked_output_tokens.tolist()
    assert not {"V004", "V005"} & {finding["code"] for finding in point["findings"]}


def test_a_distribution_is_asked_and_measured_exactly(
    simulated: Callable[..., str], ridgeline: Run, tmp_path: Path
) -> None:
    point, records = measured(ridgeline, tmp_path, simulated(*QUICK), "--input-tokens", "lognormal:200:150",
                              "--output-tokens", "4:20", "--batch-sizes", "8", "--waves", "5", "--api", "chat")  # fmt: skip
    assert_exact(point, records)
    assert len(set(records.input_tokens.tolist())) > 20 and point["requests"] == 40


def test_a_trace_is_replayed_at_its_times_and_lengths(
    simulated: Callable[..., str], ridgeline: Run, tmp_path: Path
) -> None:
    rows = [(0.1 * i, 60 + 9 * i, 3 + i) for i in range(12)]
    (tmp_path / "t.csv").write_text(
        "timestamp,input_length,output_length\n" + "".join(f"{t},{a},{b}\n" for t, a, b in rows)
    )
    point, records = measured(ridgeline, tmp_path, simulated(*QUICK), "--trace", "t.csv", "--trace-speed", "2")
    assert_exact(point, records)
    assert records.input_tokens.tolist() == [a for _, a, _ in rows]
    assert np.diff(records.scheduled_s) == pytest.approx(0.05)
    assert np.all(records.sent_s >= records.scheduled_s - 0.002)
    assert point["label"] == "trace t.csv"


def test_a_length_that_the_server_counts_differently_is_told(
    simulated: Callable[..., str], ridgeline: Run, tmp_path: Path
) -> None:
    point, _ = measured(ridgeline, tmp_path, simulated(*QUICK, "--early-eos-after", "6", "--ignore-eos", "ignored"),
                        "--output-tokens", "4:20", "--input-tokens", "64", "--batch-sizes", "8", "--waves", "3")  # fmt: skip
    (finding,) = (finding for finding in point["findings"] if finding["code"] == "V005")
    assert "other than each was asked for (by -14 to -" in finding["saw"]


def test_a_shared_prefix_is_hit_in_the_cache_and_said(
    simulated: Callable[..., str], ridgeline: Run, tmp_path: Path
) -> None:
    point, records = measured(ridgeline, tmp_path, simulated(*QUICK, "--prefix-cache"), "--shared-prefix", "0.5",
                              "--input-tokens", "400", "--output-tokens", "4", "--batch-sizes", "4", "--waves", "4")  # fmt: skip
    assert_exact(point, records)
    assert np.mean(records.cached_tokens[4:]) == pytest.approx(200, abs=24)
    assert {f["severity"] for f in point["findings"] if f["code"] == "V007"} == {"info"}


@pytest.mark.parametrize(
    "mode", [("--mode", "closed", "--batch-sizes", "3"), pytest.param(("--rate", "15"), marks=pytest.mark.full)]
)
def test_a_session_keeps_its_order_and_its_think_time(
    mode: tuple[str, ...], simulated: Callable[..., str], ridgeline: Run, tmp_path: Path
) -> None:
    point, t = measured(ridgeline, tmp_path, simulated(*QUICK, "--prefix-cache"), *mode, "--turns", "3", "--think-time", "40ms",
                        "--input-tokens", "64", "--output-tokens", "8", "--requests", "24")  # fmt: skip
    assert_exact(point, t)
    assert point["requests"] == 24 and t.wave.tolist() == [0, 1, 2] * 8
    follows = t.wave > 0
    assert np.all((t.sent_s[1:] - t.end_s[:-1])[follows[1:]] >= 0.039)
    assert np.all(t.cached_tokens[follows] >= 48)
    if mode[0] == "--mode":
        running = [np.sum((t.sent_s <= at) & (t.end_s > at)) for at in t.sent_s]
        assert max(running) <= 3
    else:
        assert not np.any(np.isnan(t.scheduled_s))


def test_steps_of_a_rate_are_one_point(simulated: Callable[..., str], ridgeline: Run, tmp_path: Path) -> None:
    point, t = measured(ridgeline, tmp_path, simulated(*QUICK), "--rate", "10@1s,60@500ms", "--arrivals", "constant",
                        "--input-tokens", "64", "--output-tokens", "4")  # fmt: skip
    since_s = t.scheduled_s - t.scheduled_s[0]
    assert (np.sum(since_s < 0.999), np.sum(since_s >= 0.999)) == (10, 30)
    assert point["label"] == "10, 60 requests/s in steps"


def test_a_flag_replaces_the_distribution_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("workload:\n  input_tokens: {normal: {mean: 90, std: 3}}\n")
    work = command.planned(path, {"workload": {"input_tokens": {"uniform": [1, 2]}}}).workload
    assert work.model_dump(exclude_none=True)["input_tokens"] == {"uniform": (1, 2)}
    assert "1 to 2 tokens in" in command.plan_text(
        command.planned(path, {"workload": {"input_tokens": {"uniform": [1, 2]}}})
    )


def test_heads_stand_for_each_other_even_in_an_odd_vocabulary() -> None:
    """Here "able" is one token and "field" five: heads of unequal words must not be exchanged."""

    async def count(text: str) -> int:
        return 1 + sum(5 if word.strip(".").lower() in prompts.HEADS[3::4] else 1 for word in text.split())

    async def ask(text: str, n: int) -> int:
        return await count(text)

    asks = asked(np.arange(30) + 80)
    found = asyncio.run(tokens.build(tokens.Counter("server", count), ask, asks, 3000, 1, lambda n: None))
    assert {asyncio.run(count(found.at(i, i))) - (80 + i % 30) for i in range(3000)} == {0}
    assert len({found.at(i, i) for i in range(3000)}) == 3000


def test_a_device_without_end_is_refused_and_not_read(ridgeline: Callable[..., Any]) -> None:
    with pytest.raises(RidgelineError, match="not a file"):
        trace.read_prompts("/dev/zero", 10)
    done = ridgeline("run", "/dev/zero", "--dry-run")
    assert done.returncode == 2 and "a scenario has at most" in done.stderr
