"""A page does not grow with its run: a million requests make a small one, in little memory."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import archive, store
from harness.records import Table
from tests import report_samples as samples

# The process's own account of its memory: ru_maxrss, of itself or of children, would tell of what the tests take, too.
CALL = """
import re, sys
from harness.cli import main
sys.argv = ["ridgeline", "report", sys.argv[1]]
try:
    main()
finally:
    print("MB", int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


def tables(n: int, size: int = 64) -> Iterator[Table]:
    """Requests of 150 stamps each, in waves of `size`: the same 2048 again and again, later each time."""
    block = samples.law(0, size, 0, 2048, 7e-3, 1e-4)
    span_s = float(block.end_s.max()) + 0.1
    moving = ("sent_s", "first_token_s", "last_token_s", "end_s")
    for k in range(math.ceil(n / 2048)):
        later = {name: getattr(block, name) + k * span_s for name in moving}
        yield dataclasses.replace(block, id=block.id + 2048 * k, wave=block.wave + 2048 // size * k, **later)


@pytest.mark.parametrize("n", [20_000, pytest.param(1_000_000, marks=pytest.mark.full)])
def test_many_requests_make_a_small_page_in_little_memory(n: int, tmp_path: Path) -> None:
    """How long it takes is for a quiet machine to say: `time ridgeline report RUN`."""
    run = samples.recorded(sizes=(64,), trials=1, count=64).run
    inputs = {"calibration": None, "model": None, "hardware": None, "missing": []}
    store.write_json(tmp_path / store.RUN, run | {"schema": 1, "ridgeline": "0", "state": "complete", "theory": inputs})
    archive.write(tmp_path / store.PARQUET, tables(n))
    done = subprocess.run(
        [sys.executable, "-c", CALL, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    told = re.search(r"^MB (\d+)$", done.stdout, re.MULTILINE)
    assert told and int(told[1]) < 1000, done.stdout
    page = (tmp_path / "report.html").read_text("utf-8")
    assert len(page.encode()) < 1_000_000
    assert store.read_json(tmp_path / store.SUMMARY)["points"][0]["requests"] == 2048 * math.ceil(n / 2048)
