"""Real servers for tests: the simulator in a process of its own, and the command as a user runs it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
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


# To start Python and import everything takes longer than most tests: this has done so, and forks for each command line.
NURSERY = """
import json, os, sys
from harness import cli, client, command, command_gate, command_theory, doctor, engines, importing, run, sweep
import harness.report.page, pyarrow.parquet
for line in sys.stdin:
    told = json.loads(line)
    pid = os.fork()
    if not pid:
        break
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
os.setsid()
os.chdir(told["cwd"])
os.environ.clear()
os.environ.update(told["env"])
for number, name in enumerate(told["streams"]):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
sys.argv = ["ridgeline", *told["arguments"]]
cli.main()
"""


class Nursery:
    """Runs one command line at a time, each in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                                        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip

    def start(self, arguments: Sequence[str], cwd: Path, env: dict[str, str] | None = None,
              streams: tuple[str, str] = (os.devnull, os.devnull)) -> int:  # fmt: skip
        """The process id of a command whose stdout and stderr go to two files."""
        told = {"arguments": arguments, "cwd": str(cwd), "streams": [os.devnull, *streams],
                "env": os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})}  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(told).encode() + b"\n")
        return self._number(60)

    def wait(self, timeout_s: float = 120) -> int:
        """Its exit code, or the negative number of the signal that ended it."""
        return self._number(timeout_s)

    def _number(self, timeout_s: float) -> int:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout_s)[0]:
            raise TimeoutError
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def ridgeline(nursery: Nursery, tmp_path: Path,
              tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:  # fmt: skip
    """Run the command in an empty folder."""
    said = tmp_path_factory.mktemp("said")

    def call(
        *arguments: str, env: dict[str, str] | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        paths = said / "out", said / "err"
        for path in paths:
            path.write_bytes(b"")
        pid = nursery.start(arguments, tmp_path, env, (str(paths[0]), str(paths[1])))
        try:
            code = nursery.wait(timeout)
        except TimeoutError:
            os.killpg(pid, signal.SIGKILL)
            nursery.wait()
            raise AssertionError(f"{arguments}: not over within {timeout} s: {paths[1].read_text()}") from None
        out, err = (path.read_text(errors="replace") for path in paths)
        return subprocess.CompletedProcess(arguments, code, out, err)

    return call


@pytest.fixture
def ridgeline_anew(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same in a Python of its own, where what is imported must see the environment (or is what is tested)."""

    def call(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "harness", *arguments], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                              env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}), check=False)  # fmt: skip

    return call


def one_object(text: str) -> dict[str, Any]:
    """The one JSON object on stdout, strictly: no NaN, nothing before or after."""
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert isinstance(found, dict)
    return found
