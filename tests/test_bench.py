"""The benchmark's own manners: bounded in time, honest about a client that failed, all processes counted."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from harness import selftest
from tests import bench

ROOT = Path(__file__).parent.parent
CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])"
BURN = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.5: pass\nblock = bytearray(80_000_000); time.sleep(1.2)"


def python(code: str) -> bench.Call:
    return bench.Call([sys.executable, "-c", code], lambda out: {})


def test_cpu_and_memory_are_those_of_all_processes(tmp_path: Path) -> None:
    used = bench.run(python(CHILD.format(BURN)), [0], tmp_path, 60)
    assert used.cpu_s > 0.5
    assert used.peak_bytes > 80e6


@pytest.mark.full
def test_a_client_that_does_not_end_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    began_s = time.monotonic()
    sleeper = f"import time; open({str(tmp_path / 'alive')!r}, 'w').close(); time.sleep(1.5); open({str(tmp_path / 'late')!r}, 'w')"
    with pytest.raises(RuntimeError, match="not over after 1 s"):
        bench.run(python(CHILD.format(sleeper)), [0], tmp_path, 1)
    assert time.monotonic() - began_s < 20
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_a_client_that_fails_says_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such model"):
        bench.run(python("raise SystemExit('no such model')"), [0], tmp_path, 30)


@pytest.mark.full
def test_one_row_of_the_table_for_each_client_that_is_here() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.bench", "--streams", "2", "--clients", "ridgeline"], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1].split()
    assert row[:2] == ["ridgeline", "2"] and len(row) == 12, done.stdout
    assert all(re.fullmatch(r"[+-]\d+\.\d+", figure) for figure in row[3:9])
    assert float(row[9]) > 0


def stream(url: str) -> float:
    """One answer of TOKENS tokens, read to its end; returns when it was asked for, by the servers' clock."""
    body = json.dumps({"model": "simulated", "prompt": "a", "max_tokens": selftest.TOKENS, "stream": True}).encode()
    asked = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    at_s = time.perf_counter()
    with urllib.request.urlopen(asked, timeout=30) as answer:
        assert answer.read().rstrip().endswith(b"data: [DONE]")
    return at_s


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_the_server_in_c_keeps_its_law_and_tells_when_it_sent(tmp_path: Path) -> None:
    server = bench.built(tmp_path)
    assert server
    with bench.serving(server, []) as url:
        asked_s = stream(url)
        sent = selftest.truth(url)
    assert sent.ttft_s.shape == (1,) and sent.itl_s.shape == (1, selftest.TOKENS - 1)
    assert sent.ttft_s[0] >= 0.0499 and 0 <= sent.late_s < 0.02
    assert sent.itl_s.mean() == pytest.approx(0.01, rel=0.05)
    assert sent.lasted_s == pytest.approx(time.perf_counter() - asked_s, abs=0.3)


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_the_server_in_c_outlives_a_client_that_goes_and_a_reset_amid_an_answer(tmp_path: Path) -> None:
    server = bench.built(tmp_path)
    assert server
    others = set(psutil.Process().children())
    with bench.serving(server, []) as url:
        (process,) = set(psutil.Process().children()) - others
        body = b'{"max_tokens": 150}'
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 5) as going:
            going.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            assert b"200 OK" in going.recv(64)
            selftest._ask(f"{url}/__reset__", b"")
            process.suspend()  # several of its tokens are due when it goes on, and nobody reads them
            going.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                while going.recv(65536):
                    pass
        time.sleep(0.1)
        process.resume()
        stream(url)
        assert process.is_running() and len(selftest.truth(url).ttft_s) == 1


@pytest.mark.full
def test_what_a_server_reads_late_is_its_own_lateness() -> None:
    others = set(psutil.Process().children())
    with selftest.simulator([]) as url:
        (process,) = set(psutil.Process().children()) - others
        quick_s = stream(url)
        process.suspend()
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(stream, url)
            time.sleep(0.3)
            process.resume()
            asked_s = np.array([quick_s, answer.result()])
        by_its_reading, by_our_writing = selftest.truth(url), selftest.truth(url, asked_s)
    assert by_its_reading.ttft_s[1] < 0.2
    assert by_our_writing.ttft_s[1] >= 0.3
    assert by_our_writing.late_s > by_its_reading.late_s + 0.1


@pytest.mark.full
def test_a_client_that_says_too_early_or_too_late_when_it_wrote_is_found_out() -> None:
    with selftest.simulator([]) as url:
        asked_s = np.array([stream(url) for _ in range(3)])
        true, early, late = (selftest.truth(url, asked_s + by_s).ttft_s.mean() for by_s in (0, -0.02, 0.02))
    # What is reported is longer, or shorter, by 20 ms: held against a truth that is not, it is an error.
    assert early == pytest.approx(true, abs=0.015) and late == pytest.approx(true, abs=0.015)
