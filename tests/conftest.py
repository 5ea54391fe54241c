"""Real servers for tests: the simulator in a process of its own, and the command as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
os.environ.pop("OPENAI_API_KEY", None)
os.environ.pop("OPENAI_BASE_URL", None)


@pytest.fixture
def simulated() -> Iterator[Callable[..., str]]:
    """start(*options) -> base URL of a simulator that lives as long as the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "harness.simulator", "--port", "0", *options],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("simulator: "), line
        return line.split()[1]

    yield start
    for process in started:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="session")
def rig() -> Iterator[str]:
    """The base URL of the rig of faults (tests/faults.py)."""
    process = subprocess.Popen([sys.executable, "-m", "tests.faults"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, cwd=ROOT)  # fmt: skip
    assert process.stdout is not None and process.stdin is not None
    yield process.stdout.readline().split()[1]
    process.stdin.close()
    process.wait(10)


@pytest.fixture
def ridgeline(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in an empty folder."""

    def call(
        *arguments: str, env: dict[str, str] | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "harness", *arguments],
            capture_output=True, text=True, timeout=timeout, cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}),
        )  # fmt: skip

    return call


def one_object(text: str) -> dict[str, Any]:
    """The one JSON object on stdout, strictly: no NaN, nothing before or after."""
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert isinstance(found, dict)
    return found
