"""The benchmark's own manners: bounded in time, honest about a client that failed, all processes counted."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
