"""Nothing lost, nothing hung: what happens to a run when it is stopped, killed, starved of disk, or begun badly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from harness import store
from tests import faults
from tests.conftest import ROOT, Nursery

Run = Callable[..., "subprocess.CompletedProcess[str]"]
LAW = ("--ttft-base", "10ms", "--itl-base", "1ms")
FLUSHED_S = 0.25  # records of answers older than this survive any kill


def options(url: str, *more: str) -> tuple[str, ...]:
    return ("run", "--url", url, "--input-tokens", "64", "--output-tokens", "8", "--no-report", "--out", "it", *more)


def started(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "harness", *arguments], cwd=tmp_path, text=True, start_new_session=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def wait_until(true: Callable[[], bool], what: str, limit_s: float = 30.0) -> None:
    until_s = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < until_s, what
        time.sleep(0.02)


def has_records(folder: Path) -> bool:
    path = folder / store.JOURNAL
    return path.exists() and path.stat().st_size > 5000


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    return process.returncode, said


# -- before the first request


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def full_queue() -> Iterator[str]:
    """An address that lets nobody in: its accept queue is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening, contextlib.ExitStack() as stack:
        for _ in range(4):
            knock = stack.enter_context(socket.socket())
            knock.setblocking(False)
            knock.connect_ex(listening.getsockname())
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def refused(ridgeline: Run, tmp_path: Path, code: int, said: str, *arguments: str) -> None:
    done = ridgeline(*arguments)
    assert done.returncode == code and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    assert not list(tmp_path.rglob(store.JOURNAL))


@pytest.mark.full
def test_a_silent_server_is_given_up_before_the_first_request(silent: str, ridgeline: Run, tmp_path: Path) -> None:
    refused(ridgeline, tmp_path, 6, "no answer within", "run", "--url", silent)


@pytest.mark.full
def test_an_address_that_drops_what_we_send_is_given_up(full_queue: str, ridgeline: Run, tmp_path: Path) -> None:
    refused(ridgeline, tmp_path, 6, "no connection within", "run", "--url", full_queue)


def test_a_name_that_nobody_knows_is_said(ridgeline: Run, tmp_path: Path) -> None:
    refused(ridgeline, tmp_path, 6, "does not resolve", "run", "--url", "http://no-such-host.invalid")


@pytest.mark.parametrize(("fault", "said"), [
    ("http-401", "api-key-env"), ("redirect-307", "redirect"), *(pytest.param(*one, marks=pytest.mark.full) for one in (
        ("html-200", "--url"), ("http-400-context", "fewer tokens")))])  # fmt: skip
def test_what_the_first_answer_tells_comes_with_its_remedy(
    fault: str, said: str, rig: str, ridgeline: Run, tmp_path: Path
) -> None:
    scenario = tmp_path / "s.yaml"
    scenario.write_text(f"engine: {{url: {rig}/first-{fault}}}\n")
    refused(ridgeline, tmp_path, 6, said, "run", str(scenario))


def limited(tmp_path: Path, url: str, kind: int, limit: int, *more: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "harness", *options(url, *more)], cwd=tmp_path, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60, check=False,
                          preexec_fn=lambda: resource.setrlimit(kind, (limit, limit)))  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize(("kind", "limit", "said"), [(resource.RLIMIT_NOFILE, 80, "needs? .*136 open files"),
                                                     (resource.RLIMIT_FSIZE, 50_000, "the largest file")])  # fmt: skip
def test_limits_of_this_machine_are_found_first(kind: int, limit: int, said: str, rig: str, tmp_path: Path) -> None:
    code, text = limited(tmp_path, rig + "/ok", kind, limit, "--batch-sizes", "1,72")
    assert code == 2
    assert "open files" in text if kind == resource.RLIMIT_NOFILE else said in text
    assert "Traceback" not in text and not list(tmp_path.rglob(store.JOURNAL))


def test_a_place_that_cannot_be_written_is_refused(rig: str, ridgeline: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(ridgeline, tmp_path, 2, "no run folder can be made", "run", "--url", rig + "/ok", "--out", "file/it")


@pytest.mark.parametrize(
    "fault", ["reset-3", *(pytest.param(n, marks=pytest.mark.full) for n in ("http-503", "finish-abort", "ok"))]
)
def test_without_preflight_the_first_request_is_the_plans_and_fails_by_its_class(
    fault: str, rig: str, ridgeline: Run, tmp_path: Path
) -> None:
    done = ridgeline(*options(f"{rig}/first-{fault}", "--batch-sizes", "8", "--mode", "closed", "--requests", "20", "--warmup", "0",
                              "--no-preflight", "--json"))  # fmt: skip
    assert done.returncode == (6 if fault != "ok" else 0), done.stderr
    point = json.loads(done.stdout)["points"][0]
    expected = faults.BY_NAME[fault].expected
    assert point["requests"] == 20 and point["error_classes"] == ({expected: 20} if expected else {})
    assert store.load(tmp_path / "it").run["prompts"]["source"] == "none"


def test_a_run_of_a_newer_format_is_refused_by_name(rig: str, ridgeline: Run, tmp_path: Path) -> None:
    assert ridgeline(*options(rig + "/ok", "--batch-sizes", "1")).returncode == 0
    path = tmp_path / "it" / store.RUN
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99, "ridgeline": "7.1"}))
    for verb in (["report", "it"], ["run", "--resume", "it"]):
        done = ridgeline(*verb)
        assert done.returncode == 2 and "format 99, written by ridgeline 7.1" in done.stderr, done.stderr


# -- stopped


def test_a_second_signal_ends_at_once_and_the_journal_is_the_result(rig: str, tmp_path: Path, ridgeline: Run) -> None:
    process = started(tmp_path, *options(rig + "/pings-after-3", "--batch-sizes", "4"))
    wait_until(lambda: (tmp_path / "it" / store.SERVER).exists(), "it did not start")
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    began_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, said = end(process)
    assert code == 130 and "stopped at once" in said
    assert time.monotonic() - began_s < 4.0  # the grace alone is five
    assert not (tmp_path / "it" / store.PARQUET).exists()
    done = ridgeline("report", "it")
    assert done.returncode == 0 and json.loads((tmp_path / "it" / store.SUMMARY).read_text())["state"] == "interrupted"


def test_a_signal_as_the_recorder_starts_leaves_no_half_of_a_run(rig: str, ridgeline: Run, tmp_path: Path) -> None:
    process = started(tmp_path, *options(rig + "/ok", "--batch-sizes", "4"))
    wait_until((tmp_path / "it" / store.RUN).exists, "it did not start")
    process.send_signal(signal.SIGINT)
    code, said = end(process)
    assert code == 130, said
    if (tmp_path / "it").exists():  # the recorder was there already
        assert (tmp_path / "it" / "scenario.yaml").exists() and ridgeline("report", "it").returncode == 0
    else:
        assert "stopped before the first request" in said


@pytest.mark.full
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_run_that_outlasts_its_time_is_stopped_and_kept(
    workers: str, rig: str, ridgeline: Run, tmp_path: Path
) -> None:
    began_s = time.monotonic()
    done = ridgeline(*options(rig + "/hang-after-head", "--batch-sizes", "2", "--timeout", "4s", "--workers", workers))
    assert done.returncode == 6 and time.monotonic() - began_s < 20
    run = store.load(tmp_path / "it")
    assert run.state == "interrupted" and "4 s are over" in run.run["stopped"]
    assert set(run.records.error_class.tolist()) == {"cancelled"}


@pytest.mark.full
def test_an_interrupted_sweep_goes_on_and_repeats_nothing(
    simulated: Callable[..., str], ridgeline: Run, tmp_path: Path
) -> None:
    url = simulated(*LAW)
    plan = ("--batch-sizes", "1,2,4", "--trials", "2", "--mode", "closed", "--requests", "20")
    process = started(tmp_path, *options(url, *plan))
    wait_until(lambda: (tmp_path / "it" / store.JOURNAL).exists()
               and b'"trial_end"' in (tmp_path / "it" / store.JOURNAL).read_bytes(), "no trial ended")  # fmt: skip
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    end(process)
    time.sleep(0.5)
    before = store.load(tmp_path / "it")
    ended = {(e["point"], e["trial"]) for e in before.events if e["event"] == "trial_end"}
    kept = {
        int(i)
        for i, p, t in zip(before.records.id, before.records.point, before.records.trial, strict=True)
        if (p, t) in ended
    }
    with open(tmp_path / "it" / store.JOURNAL, "ab") as journal:
        journal.write(b"\x77\x00\x00\x00half a frame")
    assert 1 <= len(ended) < 6
    done = ridgeline("run", "--resume", "it", "--no-report")
    assert done.returncode == 0, done.stderr
    after = store.load(tmp_path / "it")
    assert after.state == "complete" and not after.notes
    assert {(e["point"], e["trial"]) for e in after.events if e["event"] == "trial_end"} == {
        (p, t) for p in range(3) for t in range(2)
    }
    assert kept <= set(after.records.id.tolist()) and len(set(after.records.id.tolist())) == len(after.records)
    for point in range(3):
        for trial in range(2):
            of = (after.records.point == point) & (after.records.trial == trial) & ~after.records.warmup
            assert of.sum() == 20
    assert ridgeline("verify", "it").returncode == 0
    again = ridgeline("run", "--resume", "it")
    assert again.returncode == 2 and "is complete" in again.stderr


def test_resuming_takes_no_other_plan(ridgeline: Run, tmp_path: Path) -> None:
    done = ridgeline("run", "--resume", "nowhere")
    assert done.returncode == 2 and "nowhere" in done.stderr
    done = ridgeline("run", "--resume", "nowhere", "--batch-sizes", "3")
    assert done.returncode == 2 and "leave the other options out" in done.stderr


def test_two_runs_cannot_share_a_folder(rig: str, ridgeline: Run, tmp_path: Path) -> None:
    process = started(tmp_path, *options(rig + "/ok", "--batch-sizes", "1", "--requests", "99999", "--mode", "closed"))
    wait_until(lambda: (tmp_path / "it" / ".lock").exists(), "no lock came")
    second = ridgeline(*options(rig + "/ok", "--batch-sizes", "1"))
    wait_until(lambda: has_records(tmp_path / "it"), "no records came")
    third = ridgeline("run", "--resume", "it")
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 143
    assert second.returncode == third.returncode == 2
    assert f"another run is writing here (process {process.pid})" in third.stderr


def test_a_summary_that_its_records_do_not_give_is_found(rig: str, ridgeline: Run, tmp_path: Path) -> None:
    assert ridgeline(*options(rig + "/ok", "--batch-sizes", "2")).returncode == 0
    done = ridgeline("verify", "it")
    assert done.returncode == 0 and "is what they give" in done.stdout
    path = tmp_path / "it" / store.SUMMARY
    summary = json.loads(path.read_text())
    summary["points"][0]["ttft_s"]["mean"] *= 0.5
    path.write_text(json.dumps(summary))
    done = ridgeline("verify", "it")
    assert done.returncode == 2 and "points[0].ttft_s.mean" in done.stderr


def test_a_full_disk_ends_the_run_with_one_error_and_keeps_what_was_written(
    rig: str, ridgeline: Run, tmp_path: Path
) -> None:
    process = started(tmp_path, *options(rig + "/ok", "--batch-sizes", "4", "--mode", "closed", "--requests", "99999"))
    wait_until(lambda: has_records(tmp_path / "it"), "no records came")
    writer = next(p for p in psutil.Process(process.pid).children(True) if "harness.recorder" in p.cmdline())
    size = (tmp_path / "it" / store.JOURNAL).stat().st_size + 20_000
    resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (size, size))
    code, said = end(process)
    assert code == 2 and said.count("error: ") == 1 and "could not be written: File too large" in said
    found = store.load(tmp_path / "it")
    assert len(found.records) > 10 and all(found.records.ok) and found.state == "incomplete"
    assert ridgeline("report", "it").returncode == 0


@pytest.mark.full
@pytest.mark.parametrize(("how", "env", "code"), [
    (">&-", {}, 0), ("2>&-", {}, 0), ("<&- >/dev/full", {}, 2),
    ("", {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "TERM": "dumb", "COLUMNS": "40"}, 0), ("| head -c 9", {}, 0)])  # fmt: skip
def test_odd_terminals_cost_no_run(how: str, env: dict[str, str], code: int, rig: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "harness", *options(rig + "/ok", "--batch-sizes", "2", "--no-preflight")]
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {shlex.join(words)} {how}"], cwd=tmp_path, text=True, timeout=60,
                          capture_output=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)} | env)  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert len(store.load(tmp_path / "it").records) == 8


# -- killed


@pytest.mark.full
def test_no_worker_goes_on_without_the_one_that_hired_it(rig: str, tmp_path: Path) -> None:
    process = started(tmp_path, *options(rig + "/drip", "--batch-sizes", "4", "--mode", "closed", "--requests", "9999", "--workers", "2",
                                         "--no-preflight"))  # fmt: skip
    wait_until(lambda: all(path.exists() and path.stat().st_size > 2000 for path in (
        tmp_path / "it" / "journal-0.bin", tmp_path / "it" / "journal-1.bin")), "no records came")  # fmt: skip
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=20)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert len(family) >= 5 and not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert len(store.load(tmp_path / "it").records) > 4


class Answering:
    """A server in this process that tells when each of its answers was out."""

    def __init__(self) -> None:
        self.out_s: list[float] = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self.handle, "127.0.0.1", 0), self.loop).result(
            10
        )
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")), 0
                )
                body = await reader.readexactly(length)
                what = faults.answer_to(head.split(b" ")[1].decode(), body, 0)
                if isinstance(what, faults.Fault):
                    await asyncio.sleep(0.004)
                writer.write(faults.OK if isinstance(what, faults.Fault) else what)
                await writer.drain()
                if isinstance(what, faults.Fault):
                    self.out_s.append(time.monotonic())


def kill_often(times: int, nursery: Nursery, tmp_path: Path) -> None:
    server, rng = Answering(), random.Random(4)
    for i in range(times):
        server.out_s.clear()
        out = f"run{i}"
        pid = nursery.start(("run", "--url", server.url + "/ok", "--input-tokens", "64", "--output-tokens", "8", "--batch-sizes", "4", "--mode",
                             "closed", "--requests", "99999", "--warmup", "0", "--out", out, "-q", "--no-report", "--no-preflight"), tmp_path)  # fmt: skip
        wait_until(lambda: len(server.out_s) > 3, "no answer was given")
        time.sleep(rng.uniform(0.0, 0.6))
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        if i % 2:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)
        killed_s = time.monotonic()
        assert nursery.wait() == -signal.SIGKILL
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        found = store.load(tmp_path / out)
        answered = sum(at_s < killed_s - FLUSHED_S for at_s in list(server.out_s))
        assert len(found.records) >= answered, (i, len(found.records), answered)
        assert all(found.records.ok) and not any("checksum" in note for note in found.notes)
        ids = found.records.id.tolist()
        assert len(set(ids)) == len(ids)
        nursery.start(("report", out), tmp_path)
        assert nursery.wait() == 0
        assert (tmp_path / out / "report.html").stat().st_size > 10_000


@pytest.mark.full
def test_kill_9_at_any_instant_loses_a_quarter_of_a_second_at_most(nursery: Nursery, tmp_path: Path) -> None:
    kill_often(2, nursery, tmp_path)


@pytest.mark.full
def test_kill_9_at_200_instants_loses_a_quarter_of_a_second_at_most(nursery: Nursery, tmp_path: Path) -> None:
    kill_often(200, nursery, tmp_path)
