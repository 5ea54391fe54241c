"""The gate as a CI job sees it: files and run folders in, exit codes and artefacts out."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import xml.etree.ElementTree as xml
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import cli, store
from tests.conftest import ROOT, one_object
from tests.e2e.test_real_engines import LLAMA, needs_llama
from tests.gate_samples import figures, noise, point, save, trials

Run = Callable[..., "subprocess.CompletedProcess[str]"]
BASE = figures({"b1": trials(), "b4": trials()})
SHORT = ("--input-tokens", "32", "--output-tokens", "8", "--mode", "closed", "--requests", "8", "--no-report", "-q")
LAW = ("--ttft-base", "20ms", "--slots", "8")


@pytest.fixture
def ridgeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The whole command in this process and an empty folder: to start Python each time would take longer than the rest."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as here:
            here.setattr(sys, "argv", ["ridgeline", *arguments])
            for name, value in (env or {}).items():
                here.setenv(name, value)
            code = 0
            try:
                cli.main()
            except SystemExit as end:
                code = int(end.code or 0)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, said.out, said.err)

    return call


def slower(scale: float = 1.2, spread: float = 1.0) -> dict[str, Any]:
    return figures({"b1": trials(scale, spread), "b4": trials(scale, spread)})


EXITS = {
    0: (BASE, BASE, ()),
    2: (BASE, BASE, ("--slo", "ttft_p50=soon")),
    3: (BASE, slower(), ()),
    4: (BASE, slower(1.04, 30), ("--inconclusive", "fail")),
    5: (BASE, point(BASE, "b4", verdict="invalid", findings=["V002: the client's core was full"]), ()),
    6: (BASE, point(BASE, "b4", errors=50), ()),
    7: (BASE, BASE | {"fingerprint": BASE["fingerprint"] | {"model": "another"}}, ()),
}


@pytest.mark.parametrize("code", EXITS)
def test_each_exit_code_of_the_gate_is_produced(code: int, ridgeline: Run, tmp_path: Path) -> None:
    base, new, more = EXITS[code]
    files = save(tmp_path / "base.json", base), save(tmp_path / "new.json", new)
    done = ridgeline("compare", *files, "--gate", *more, "--junit", "out/junit.xml", "--md", "out/summary.md")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code in (2, 7):
        assert done.stderr.startswith("error: ") and not (tmp_path / "out").exists()
        return
    [suite] = xml.parse(tmp_path / "out/junit.xml").getroot()
    assert (int(suite.get("failures", 0)) > 0) == (code == 3)
    assert (int(suite.get("errors", 0)) > 0) == (code in (5, 6))
    assert (int(suite.get("skipped", 0)) > 0) == (code == 4)
    assert (tmp_path / "out/summary.md").read_text().startswith("### ")


def test_an_internal_error_is_1_so_that_no_gate_is_taken_for_one(tmp_path: Path) -> None:
    """A library that is broken where the command runs: not the user's input, and not a verdict."""
    (tmp_path / "yaml.py").write_text("raise ValueError('broken installation')\n")
    files = save(tmp_path / "a.json", BASE), save(tmp_path / "b.json", BASE)
    done = subprocess.run([sys.executable, "-m", "harness", "compare", *files, "--gate"], cwd=tmp_path, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 1 and "please report it" in done.stderr


def test_a_missing_baseline_is_7_unless_that_is_allowed(ridgeline: Run, tmp_path: Path) -> None:
    new = save(tmp_path / "new.json", BASE)
    done = ridgeline("compare", "baselines", new, "--gate")
    assert done.returncode == 7 and "baseline update" in done.stderr
    done = ridgeline("compare", "baselines", new, "--gate", "--allow", "baseline", "--slo", "ttft_p50=1s")
    assert done.returncode == 0, done.stderr
    (tmp_path / "baselines").mkdir()
    other = BASE | {"fingerprint": BASE["fingerprint"] | {"workload.input_tokens": 100}}
    save(tmp_path / "baselines" / "other.json", other)
    done = ridgeline("compare", "baselines", new, "--gate")
    assert done.returncode == 7 and "workload.input_tokens: 100 there, 350 in the new run" in done.stderr


def test_annotations_are_written_for_github_only(ridgeline: Run, tmp_path: Path) -> None:
    files = save(tmp_path / "base.json", BASE), save(tmp_path / "new.json", slower())
    plain = ridgeline("compare", *files, "--gate", env={"GITHUB_ACTIONS": ""})
    assert "::error" not in plain.stdout + plain.stderr
    summary = tmp_path / "step.md"
    summary.write_text("of another step\n")
    there = ridgeline("compare", *files, "--gate", "--json", "--md", str(summary),
                      env={"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary)})  # fmt: skip
    assert there.stderr.count("::error title=") == 6
    assert one_object(there.stdout)["verdict"] == "fail"
    assert summary.read_text().startswith("of another step\n### FAIL")


def test_a_stored_noise_level_sets_the_margins(ridgeline: Run, tmp_path: Path) -> None:
    level = save(tmp_path / "noise.json", noise(BASE["fingerprint"], ["b1", "b4"], 0.02))
    files = save(tmp_path / "base.json", BASE), save(tmp_path / "new.json", BASE)
    done = ridgeline("compare", *files, "--noise", level)
    assert done.returncode == 0 and "margin widened from 3 %" in done.stdout
    done = ridgeline("compare", *files, "--noise", level, "--margin", "itl=1%")
    assert done.returncode == 2 and "below what 5 trials can detect" in done.stderr
    foreign = save(tmp_path / "foreign.json", noise({"model": "another"}, ["b1"], 0.02))
    assert ridgeline("compare", *files, "--noise", foreign).returncode == 7


# --- with servers ----------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_slower_server_fails_and_the_same_one_does_not(
    simulated: Callable[..., str], ridgeline: Run, tmp_path: Path
) -> None:
    """Run, baseline, run again, gate: as a pipeline does it."""
    url, worse = simulated(*LAW, "--itl-base", "3ms"), simulated(*LAW, "--itl-base", "6ms")
    for name, where, seed in (("first", url, "1"), ("again", url, "2"), ("worse", worse, "3")):
        done = ridgeline(
            "run", "--url", where, *SHORT, "--batch-sizes", "2,4", "--trials", "4", "--seed", seed, "--out", name
        )
        assert done.returncode == 0, done.stderr
    done = ridgeline("baseline", "update", "first", "--reason", "the first one")
    assert done.returncode == 0, done.stderr
    [file] = (tmp_path / ".ridgeline/baselines").glob("*.json")
    assert file.stat().st_size < 50_000 and json.loads(file.read_text())["reason"] == "the first one"
    shown = ridgeline("baseline", "show")
    assert "the first one" in shown.stdout and "itl_p50" in shown.stdout
    same = ridgeline("compare", ".ridgeline/baselines", "again", "--gate", "--json")
    assert same.returncode == 0, same.stdout
    found = one_object(same.stdout)
    assert found["verdict"] in ("pass", "inconclusive") and {r["point"] for r in found["answers"]} == {"b2", "b4"}
    done = ridgeline("compare", ".ridgeline/baselines", "worse", "--gate", "--json")
    assert done.returncode == 3, done.stdout
    failed = {r["name"] for r in one_object(done.stdout)["answers"] if r["verdict"] == "fail"}
    assert {"b2 itl_p50", "b4 itl_p50"} <= failed and not {"b2 ttft_p50", "b4 ttft_p50"} & failed
    assert ridgeline("history", "first", "again").returncode == 0
    assert "the run was there" in ridgeline("history", "first").stdout
    [past] = (tmp_path / ".ridgeline/history").glob("*.csv")
    done = ridgeline("report", "again", "--history", str(past), "-o", "page.html")
    assert done.returncode == 0 and 'id="trend"' in (tmp_path / "page.html").read_text()
    assert ridgeline("report", "again", "--history", "nowhere.csv").returncode == 2
    again = ridgeline("baseline", "update", "again", "--reason", "anew")
    assert "replaced" in again.stdout and "the first one" in again.stdout


@pytest.mark.full
def test_two_servers_take_turns_and_the_gate_follows(
    simulated: Callable[..., str], ridgeline: Run, tmp_path: Path
) -> None:
    url, worse = simulated(*LAW, "--itl-base", "3ms"), simulated(*LAW, "--itl-base", "6ms")
    done = ridgeline("run", "--url", url, "--against", worse, "--interleave", "--gate", *SHORT, "--batch-sizes", "2",
                     "--trials", "4", "--out", "ab")  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    received: list[tuple[float, str]] = []
    for name, where in (("b", url), ("n", worse)):
        run = store.load(tmp_path / "ab" / {"b": "base", "n": "new"}[name])
        assert run.state == "complete" and len(run.records.where(~run.records.warmup)) == 32
        with urllib.request.urlopen(f"{where}/__log__") as log:
            received += [(request["received_s"], name) for request in json.load(log)["requests"]]
    turns = "".join(name for name, _ in itertools.groupby(name for _, name in sorted(received)))
    assert turns == "bnbnb"  # ABBA: each that follows itself is one group
    [suite] = xml.parse(tmp_path / "ab/junit.xml").getroot()
    body = next(c[0].text or "" for c in suite if c.get("name") == "itl_p50_ms")
    assert "in the baseline" in body and "now" in body and "allowed +3 %" in body
    assert (tmp_path / "ab/summary.md").read_text().startswith("### FAIL")


@pytest.mark.full
def test_an_inconclusive_comparison_gets_more_trials(
    simulated: Callable[..., str], ridgeline: Run, tmp_path: Path
) -> None:
    """Two trials a side, and noise that no verdict can come from: both top-ups are taken."""
    noisy = ("--jitter-cv", "0.8")
    url, other = simulated(*LAW, *noisy), simulated(*LAW, *noisy, "--seed", "1")
    more = ("--batch-sizes", "1", "--trials", "2", "--requests", "3", "--output-tokens", "4")
    for name, where in (("a", url), ("b", other)):
        done = ridgeline("run", "--url", where, *SHORT, *more, "--out", name)
        assert done.returncode == 0, done.stderr
    done = ridgeline(
        "compare", "a", "b", "--top-up", "--json", "--margin", "ttft=0.1%,itl=0.1%,output_tokens_per_s=0.1%"
    )
    found = one_object(done.stdout)
    assert found["verdict"] == "inconclusive" and (found["look"], found["looks"]) == (3, 3)
    for name in ("a", "b"):
        run = store.load(tmp_path / name)
        assert run.state == "complete" and len(set(run.records.trial.tolist())) == 6
        ids = run.records.id.tolist()
        assert len(set(ids)) == len(ids)


MATRIX = """
name: matrix
engine: {{url: "{0}"}}
workload: {{mode: closed, batch_sizes: [1, 4], input_tokens: 32, output_tokens: 8, requests: 12, trials: 2}}
variants:
  one: {{}}
  two: {{url: "{1}"}}
"""


def trials_of(folder: Path) -> dict[tuple[int, int], tuple[int, float]]:
    """(point, trial) -> how many requests, and when the first was sent."""
    t = store.load(folder).records
    keys = sorted(set(zip(t.point.tolist(), t.trial.tolist(), strict=True)))
    return {key: (int(here.sum()), float(t.sent_s[here].min())) for key in keys
            for here in [(t.point == key[0]) & (t.trial == key[1])]}  # fmt: skip


FULL = pytest.mark.full


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, marks=FULL),
        pytest.param(signal.SIGINT, marks=FULL),
        pytest.param(signal.SIGTERM, marks=FULL),
    ],
)
def test_a_matrix_cut_off_goes_on_and_repeats_no_finished_point(
    number: signal.Signals, simulated: Callable[..., str], ridgeline: Run, tmp_path: Path
) -> None:
    law = (*LAW, "--itl-base", "5ms")
    (tmp_path / "m.yaml").write_text(MATRIX.format(simulated(*law), simulated(*law)))
    process = subprocess.Popen([sys.executable, "-m", "harness", "run", "m.yaml", "--out", "m", "-q"], cwd=tmp_path,
                               env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    journal, until_s = tmp_path / "m/two/journal.bin", time.monotonic() + 60
    while not journal.exists() or sum(e["event"] == "trial_end" for e in store.load(journal.parent).events) < 1:
        assert time.monotonic() < until_s and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) == (-9 if number == signal.SIGKILL else 128 + number)
    before = {name: trials_of(tmp_path / "m" / name) for name in ("one", "two")}
    ended = {(e["point"], e["trial"]) for e in store.load(journal.parent).events
             if e["event"] == "trial_end" and not e["stopped"]}  # fmt: skip
    assert len(before["one"]) == 4 and len(ended) < 4
    done = ridgeline("run", "--resume", "m", "--json", "--report", "page.html")
    assert done.returncode == 0, done.stderr
    found = one_object(done.stdout)["runs"]
    for name in ("one", "two"):
        after = trials_of(tmp_path / "m" / name)
        assert {key: n for key, (n, _) in after.items()} == dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 1)], 13)
        kept = before[name].keys() if name == "one" else ended
        assert {key: after[key] for key in kept} == {key: before[name][key] for key in kept}
        assert [(p["batch_size"], p["requests"], p["errors"]) for p in found[name]["points"]] == [
            (1, 24, 0),
            (4, 24, 0),
        ]
        assert found[name]["state"] == "complete"
    page = (tmp_path / "page.html").read_text()
    assert "matrix-one" in page and "matrix-two" in page


@pytest.mark.full
def test_noise_of_equal_runs_is_stored_and_used(simulated: Callable[..., str], ridgeline: Run, tmp_path: Path) -> None:
    (tmp_path / "n.yaml").write_text(MATRIX.split("variants")[0].format(simulated(*LAW, "--jitter-cv", "0.05")))
    done = ridgeline("noise", "n.yaml", "--runs", "3", "--trials", "3", "--out", "aa", "-q")
    assert done.returncode == 0, done.stderr
    [file] = (tmp_path / ".ridgeline/noise").glob("*.json")
    level = json.loads(file.read_text())
    assert level["runs"] == 3 and set(level["points"]) == {"b1", "b4"}
    row = level["points"]["b4"]["itl_p50"]
    assert 0 < row["trial_sd"] < 0.5 and row["margin"] >= 0.03 and row["detectable"] > row["margin"]
    seeds = {store.load(tmp_path / "aa" / f"run-0{i}").run["seed"] for i in (1, 2, 3)}
    assert seeds == {1, 2, 3}
    wide = ",".join(f"{name}={max(level['points'][b][name]['margin'] for b in ('b1', 'b4')) + 0.01:.4f}"
                    for name in ("ttft_p50", "itl_p50", "output_tokens_per_s"))  # fmt: skip
    if all(float(part.split("=")[1]) < 1 for part in wide.split(",")):
        done = ridgeline("compare", "aa/run-01", "aa/run-02", "--gate", "--margin", wide)
        assert done.returncode == 0, done.stdout + done.stderr
    again = ridgeline("noise", "aa/run-01", "aa/run-02", "--store", "x")
    assert again.returncode == 2 and "give 3 of the same" in again.stderr


@pytest.mark.full
def test_a_server_that_fails_does_not_end_a_matrix(
    simulated: Callable[..., str], ridgeline: Run, tmp_path: Path
) -> None:
    (tmp_path / "m.yaml").write_text(
        MATRIX.format("http://127.0.0.1:9", simulated(*LAW)).replace("trials: 2", "trials: 1")
    )
    done = ridgeline("run", "m.yaml", "--out", "m", "--json", "--no-report")
    assert done.returncode == 6 and "one: http://127.0.0.1:9: not reachable" in done.stderr
    assert list(one_object(done.stdout)["runs"]) == ["two"]
    assert ridgeline("run", "m.yaml", "--out", "m").returncode == 2  # it holds runs already


def test_turns_and_gates_need_two_servers(ridgeline: Run) -> None:
    for flag in ("--interleave", "--gate"):
        done = ridgeline("run", "--url", "127.0.0.1:9", flag)
        assert done.returncode == 2 and "--against" in done.stderr


@pytest.mark.full
@needs_llama
def test_two_sets_of_flags_of_a_real_engine_take_turns(ridgeline: Run, tmp_path: Path) -> None:
    """llama.cpp with two slots and with one, started anew for each trial: what each ran at once tells that it got its flags."""
    (tmp_path / "s.yaml").write_text(
        f"engine: {{kind: llama.cpp, model: smollm2-135m, python: {LLAMA}, slots: 2}}\n"
        "workload: {mode: closed, batch_sizes: [2], requests: 6, trials: 2, warmup: 1, input_tokens: 64, output_tokens: 48}\n"
        "variants: {two: {}, one: {args: [--parallel, '1']}}\n"
        "interleave: true\n"
    )
    done = ridgeline("run", "s.yaml", "--out", "ab", "--no-report")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("starting llama.cpp") == 4
    for name in ("two", "one"):
        run = store.load(tmp_path / "ab" / name)
        assert run.run["series"] == {"interleaved": True} and run.run["engine"]["launched"]
        assert len(run.records.where(~run.records.warmup)) == 12
    found = one_object(ridgeline("compare", "ab/two", "ab/one", "--json").stdout)
    assert found["differs"]["engine flags"] == [None, "--parallel 1"]
    ran = [
        json.loads((tmp_path / "ab" / name / "summary.json").read_text())["points"][0]["batch_ran"]
        for name in ("two", "one")
    ]
    assert [row["max"] for row in ran] == [2, 1]
