"""Samples the server's /metrics, this machine and its GPUs beside the run, in a process of its own: parsing would hold up
the loop that stamps.

`python -m harness.probe URL FILE [--here]` writes one JSON line per sample until its standard input closes; a byte there
asks for a sample at once.  GPUs are read only where the server is `--here`: another machine's are not ours to see.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from harness.background import give_way
from harness.served import Served, listening
from harness.server import read_metrics

PERIOD_S = 0.5
PATHS = ("/metrics", "/prometheus/metrics")
PAGE_BYTES = 4_000_000
TRIES = 5  # readings without a known name, then the server is asked no more


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the headers hold the key."""

    def redirect_request(self, *_: Any) -> None:
        return None


def sample(url: str, headers: dict[str, str], timeout_s: float = 2.0) -> dict[str, Any]:
    """One reading of a metrics page.  Raises OSError or ValueError when there is none, or it takes too long."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay())
    until_s, page = time.monotonic() + timeout_s, b""
    with opener.open(urllib.request.Request(url, headers=headers), timeout=timeout_s) as response:
        while (data := response.read1(65536)) and len(page) < PAGE_BYTES:
            page += data
            if time.monotonic() > until_s:
                raise TimeoutError
    return read_metrics(page.decode("utf-8", "replace"))


class Server:
    """The metrics page of a server, wherever it lies; asked no more when nothing known was found."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        self.url, self.headers = url, headers
        self.paths, self.failures = list(PATHS), 0

    def read(self) -> dict[str, Any]:
        if self.failures >= TRIES:
            return {}
        for path in self.paths:
            with contextlib.suppress(OSError, ValueError):
                if values := sample(self.url + path, self.headers):
                    self.paths, self.failures = [path], 0
                    return values
        self.failures += 1
        return {}


def throttled_s(root: Path = Path("/sys/fs/cgroup"), self_file: Path = Path("/proc/self/cgroup")) -> float | None:
    """Seconds for which this process's control group and those above it were kept off the CPU by their quota."""
    found = None
    with contextlib.suppress(OSError, ValueError):
        for line in self_file.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            names = controllers.split(",")
            if controllers and "cpu" not in names:
                continue
            group = root / controllers / path.lstrip("/")
            for folder in (group, *group.parents):
                stat = _numbers(folder / "cpu.stat")
                if (value := stat.get("throttled_usec", stat.get("throttled_time", 0) / 1e3)) is not None and stat:
                    found = max(found or 0.0, value / 1e6)
                if folder == root:
                    break
    return found


def _numbers(path: Path) -> dict[str, float]:
    with contextlib.suppress(OSError, ValueError):
        return {name: float(value) for name, value in (line.split() for line in path.read_text().splitlines())}
    return {}


def host() -> dict[str, float | None]:
    import psutil

    memory = psutil.virtual_memory()
    return {"cpu_share": psutil.cpu_percent(None) / 100, "memory_share": memory.percent / 100,
            "memory_bytes": memory.total - memory.available, "throttled_s": throttled_s()}  # fmt: skip


class Gpus:
    """All GPUs of this machine, by NVML.  `about` names them, or says why there are none."""

    def __init__(self, wanted: bool) -> None:
        self.nvml: Any = None
        self.handles: list[Any] = []
        if not wanted:
            self.about = "absent: the server is on another machine (engine.same_machine says otherwise)"
            return
        try:
            import pynvml
        except ImportError:
            self.about = "absent: nvidia-ml-py is not installed (pip install 'ridgeline[gpu]')"
            return
        try:
            pynvml.nvmlInit()
            self.handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            self.about = (
                ", ".join(_text(pynvml.nvmlDeviceGetName(handle)) for handle in self.handles) or "absent: no GPU"
            )
        except pynvml.NVMLError as problem:
            self.about = f"absent: no NVML ({problem})"
        self.nvml = pynvml

    def read(self) -> dict[str, dict[str, float]]:
        return {str(i): self._one(handle) for i, handle in enumerate(self.handles)}

    def _one(self, handle: Any) -> dict[str, float]:
        n = self.nvml
        reasons = (
            getattr(n, "nvmlDeviceGetCurrentClocksEventReasons", None) or n.nvmlDeviceGetCurrentClocksThrottleReasons
        )
        readings: dict[str, Callable[[], Any]] = {
            "power_w": lambda: n.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "energy_j": lambda: n.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
            "use": lambda: n.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            "memory_bytes": lambda: n.nvmlDeviceGetMemoryInfo(handle).used,
            "sm_hz": lambda: n.nvmlDeviceGetClockInfo(handle, n.NVML_CLOCK_SM) * 1e6,
            "temperature_c": lambda: n.nvmlDeviceGetTemperature(handle, n.NVML_TEMPERATURE_GPU),
            "reasons": lambda: reasons(handle),
        }
        found = {}
        for name, read in readings.items():
            with contextlib.suppress(n.NVMLError):  # each card lacks some
                found[name] = read()
        return found


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def main(url: str, path: str, here: bool = False) -> int:
    key = os.environ.get("RIDGELINE_KEY", "")
    give_way()
    server, gpus = Server(url, {"Authorization": f"Bearer {key}"} if key else {}), Gpus(here)
    parts = urlsplit(url)
    served = Served(listening(parts.port or (443 if parts.scheme == "https" else 80)) if here else set())
    about: dict[str, Any] = {"about_gpu": gpus.about}
    with open(path, "a", encoding="utf-8") as out:
        while True:
            start_s = time.perf_counter()
            values = (
                server.read()
                | {"host": host(), "served": served.read()}
                | about
                | ({"gpu": found} if (found := gpus.read()) else {})
            )
            out.write(json.dumps({"at_s": start_s, "took_s": time.perf_counter() - start_s} | values) + "\n")
            out.flush()
            if about:
                print("ready", flush=True)
            about = {}
            wait_s = max(0.0, PERIOD_S - (time.perf_counter() - start_s))
            if select.select([0], [], [], wait_s)[0] and not os.read(0, 4096):
                return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2], "--here" in sys.argv[3:]))
