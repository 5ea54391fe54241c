"""The instrument's own error and ceiling, measured against the simulator on this machine.

The simulator logs when it really sent, on the client's clock, so error = client - sent, and the side that saturated is
known: what passes between the client's writing and the simulator's reading is the simulator's.  The result is kept beside
the machine's row and goes into every run's provenance.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness import __version__, machine, metrics, store
from harness.progress import Progress
from harness.records import NAN, Floats, RidgelineError
from harness.scenario import Scenario, validate

STREAMS = (16, 64, 256, 512)
TTFT_MS, ITL_MS, TOKENS, REQUESTS_PER_STREAM = 50, 10, 150, 4
TRUE_WITHIN_S = 0.0005  # mean TTFT off by more than this is no longer true
QUICK_S = 0.0002  # a request that nothing holds up is read so soon after it was written
LATE_S = 0.002  # a server that sends later than this by its own law (mean) was the side that saturated


@dataclasses.dataclass(frozen=True, slots=True)
class Rung:
    """One number of streams.  Errors are what the client reported minus what the server really sent, in seconds."""

    streams: int
    tokens_per_s: float
    ttft_error_mean_s: float
    ttft_error_p50_s: float
    ttft_error_p99_s: float
    itl_error_mean_s: float
    itl_error_p99_s: float
    server_ttft_mean_s: float
    server_late_s: float
    cpu_per_token_s: float  # the stamping process while it played
    lag_p99_s: float
    requests: int
    errors: int

    @property
    def saturated(self) -> str:
        """The side that could not follow: "", "client", "server" (whose bursts then tell nothing of the client)."""
        if abs(self.ttft_error_mean_s) <= TRUE_WITHIN_S and not self.errors:
            return ""
        return "server" if self.server_late_s > LATE_S else "client"


def simulator(cores: Sequence[int]) -> contextlib.AbstractContextManager[str]:
    """The base URL of a simulator of the stated law, kept to `cores` where the system can."""
    law = ["--ttft-base", f"{TTFT_MS}ms", "--itl-base", f"{ITL_MS}ms"]
    return started([sys.executable, "-m", "harness.simulator", "--port", "0", *law], cores)


@contextlib.contextmanager
def started(command: Sequence[str], cores: Sequence[int]) -> Iterator[str]:
    """The base URL of a server that says "NAME: URL" when it serves; it ends with the block."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, cores)
        assert process.stdout is not None
        name, _, url = process.stdout.readline().partition(": ")
        if not url:
            raise RidgelineError(f"selftest: {name.strip() or command[0]}: the server did not start", 6)
        yield url.split()[0]
    finally:
        process.terminate()
        process.wait(10)


def split_cores() -> tuple[list[int], list[int]]:
    """(the client's, the simulator's) cores: apart where there are two, the simulator's the last."""
    cores = machine.core_ids()
    return (cores[:-1], cores[-1:]) if len(cores) > 1 else (cores, cores)


def scenario(url: str, streams: int) -> Scenario:
    return validate({
        "name": f"selftest-{streams}", "engine": {"kind": "url", "url": url},
        "workload": {"mode": "closed", "batch_sizes": [streams], "input_tokens": 64, "output_tokens": TOKENS,
                     "requests": streams * REQUESTS_PER_STREAM, "warmup": 0}}, "selftest")  # fmt: skip


def measure(streams: Sequence[int], play: Callable[[Any], Any], progress: Progress) -> list[Rung]:
    """One rung for each number of streams.  `play` runs a coroutine to its end (the event loop that runs use)."""
    from harness import run

    ours, theirs = split_cores()
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    found = []
    folder = Path(tempfile.mkdtemp(prefix="ridgeline-selftest-"))
    try:
        if before:
            os.sched_setaffinity(0, ours)
        with simulator(theirs) as url:
            for n in streams:
                progress.tick(f"selftest: {n} streams")
                _ask(f"{url}/__reset__", b"")
                work: Awaitable[Any] = run.play(
                    scenario(url, n), ["ridgeline", "selftest"], str(folder / str(n)), folder, Progress(True)
                )
                play(work)
                found.append(_rung(n, store.load(folder / str(n)), url))
                progress.line(line_of(found[-1]))
    finally:
        if before:
            os.sched_setaffinity(0, before)
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _ask(url: str, body: bytes | None = None) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data=body), timeout=60) as response:
        return bytes(response.read())


class Truth(NamedTuple):
    """What a server really sent, of n whole answers of TOKENS tokens, in seconds."""

    ttft_s: Floats  # [n]
    itl_s: Floats  # [n, TOKENS - 1]
    late_s: float  # mean of all events, against the law
    lasted_s: float  # from the first request to the last token


def truth(url: str, asked_s: Floats | None = None) -> Truth:
    """By the log of the server at `url`, since its last reset; empty where no answer was whole.

    A server may read a burst of requests late.  Where it is known when they were written (`asked_s` [n] on the server's
    clock, in the order of their first tokens), the first tokens count from there, and the delay is the server's.  But what
    was read before the client says that it was written counts from when it was read, and a delay that even the quickest
    request had is the client's, who said too early that it was written.
    """
    sent = [r for r in json.loads(_ask(f"{url}/__log__"))["requests"] if len(r["sent_s"]) == TOKENS]
    sent.sort(key=lambda r: r["sent_s"][0])
    times_s = np.array([r["sent_s"] for r in sent]).reshape(-1, TOKENS)
    received_s = np.array([r["received_s"] for r in sent])
    late_s = float(np.mean([r["late_s"] for r in sent])) if sent else NAN
    began_s = received_s
    if sent and asked_s is not None and len(asked_s) == len(sent):
        on_the_way_s = np.sort(received_s) - np.sort(asked_s)
        said_early_s = max(0.0, float(on_the_way_s.min()) - QUICK_S)
        began_s = asked_s + np.minimum(on_the_way_s, 0).mean() + said_early_s
        late_s += float(np.maximum(on_the_way_s, 0).mean()) - said_early_s
    return Truth(
        ttft_s=times_s[:, 0] - began_s,
        itl_s=np.diff(times_s),
        late_s=late_s,
        lasted_s=float(times_s[:, -1].max() - received_s.min()) if sent else NAN,
    )


def _rung(streams: int, run: store.Run, url: str) -> Rung:
    good = run.records.where(run.records.ok)
    true = truth(url, good.sent_s[np.argsort(good.first_token_s)] + run.run["t0_monotonic_s"])
    if not len(good) or not len(true.ttft_s):
        raise RidgelineError(f"selftest: no whole answer at {streams} streams", 6)
    ttft, itl = metrics.ttft_s(good), metrics.chunk_gap_s(good)
    senses = next(e["senses"] for e in run.events if e.get("event") == "trial_end")
    tokens = int(good.output_tokens.sum())
    return Rung(
        streams=streams,
        tokens_per_s=tokens / (senses["ended_s"] - senses["started_s"]),
        ttft_error_mean_s=float(ttft.mean() - true.ttft_s.mean()),
        ttft_error_p50_s=_apart(ttft, true.ttft_s, 0.5),
        ttft_error_p99_s=_apart(ttft, true.ttft_s, 0.99),
        itl_error_mean_s=float(itl.mean() - true.itl_s.mean()),
        itl_error_p99_s=_apart(itl, true.itl_s, 0.99),
        server_ttft_mean_s=float(true.ttft_s.mean()),
        server_late_s=true.late_s,
        cpu_per_token_s=senses["cpu_share"] * (senses["ended_s"] - senses["started_s"]) / tokens,
        lag_p99_s=senses["lag_p99_s"] if senses["lag_p99_s"] is not None else NAN,
        requests=len(run.records),
        errors=int((~run.records.ok).sum()),
    )


def _apart(ours: Floats, theirs: Floats, q: float) -> float:
    return float(np.quantile(ours, q) - np.quantile(theirs, q))


def ceiling(rungs: Sequence[Rung]) -> dict[str, Any]:
    """The most streams and tokens/s at which this client was still true; None where no rung was."""
    true = [r for r in rungs if not r.saturated]
    best = max(true, key=lambda r: r.streams, default=None)
    return {
        "ridgeline": __version__,
        "measured_at_s": time.time(),
        "cpu": machine.cpu_model(),
        "cores": machine.usable_cores(),
        "streams": best.streams if best else None,
        "tokens_per_s": best.tokens_per_s if best else None,
        "ttft_error_mean_s": best.ttft_error_mean_s if best else None,
        "stopped_by": next((r.saturated for r in rungs if r.saturated), "the largest that was tried"),
        "rungs": [dataclasses.asdict(r) for r in rungs],
    }


def line_of(r: Rung) -> str:
    ms, us = 1e3, 1e6
    return (f"{r.streams:>5} streams {r.tokens_per_s:>8,.0f} tokens/s   TTFT error {r.ttft_error_mean_s * ms:+7.3f} ms mean "
            f"{r.ttft_error_p99_s * ms:+7.3f} p99   ITL error {r.itl_error_mean_s * ms:+7.4f} mean "
            f"{r.itl_error_p99_s * ms:+7.3f} p99   {r.cpu_per_token_s * us:5.1f} us CPU/token   "
            f"{('limit: ' + r.saturated) if r.saturated else 'true'}")  # fmt: skip


def store_path() -> Path:
    return machine.store_path().with_name("selftest.json")


def keep(result: dict[str, Any]) -> None:
    """A cache that cannot be written is no reason to fail."""
    with contextlib.suppress(RidgelineError):
        store.write_json(store_path(), result)


def kept() -> dict[str, Any] | None:
    """The last selftest of this machine with this version, without its rungs; None if there is none."""
    try:
        found = json.loads(store_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and found.get("ridgeline") == __version__ and found.get("cpu") == machine.cpu_model()
    return (
        {k: v for k, v in found.items() if k != "rungs"}
        if same and found.get("cores") == machine.usable_cores()
        else None
    )
