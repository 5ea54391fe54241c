"""What can be known before the first request: this machine's limits, the disk, the address.  Each failure with its remedy."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import shutil
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from harness import lengths, tokens, units
from harness.plan import prompts_needed
from harness.progress import Progress
from harness.records import RidgelineError
from harness.scenario import Scenario, Workload
from harness.wire import Target, Wire, connect, resolve

LOOK_UP_S = 2.0
CONNECT_S = 2.5
PAGES_S = 5.0  # for all that needs no model: look-up, connection, TLS, and the server's pages
PATIENCE_S = 2.0  # then it is said what is waited for
FILES_SPARE = 64  # beside connections: pipes, journals, libraries
RECORD_BYTES = 800  # of a record without its arrivals, in journal and parquet together
ARRIVAL_BYTES = 12
SPARE_BYTES = 8 * 2**20  # summary, report, the server's own metrics
PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def here(scenario: Scenario, folder: Path) -> None:
    """This machine's side.  Raises RidgelineError (code 2) with what is needed and what there is."""
    if scenario.tokenizer and not tokens.tokenizer_file(scenario.tokenizer):
        raise RidgelineError(f"{scenario.at('tokenizer')}: {scenario.tokenizer}: no tokenizer.json there; give its path or "
                             "its folder")  # fmt: skip
    most = in_flight(scenario.workload)
    asked = scenario.at("workload", "max_in_flight" if scenario.workload.mode == "open" else "batch_sizes")
    _descriptors(most, asked)
    _ports(most, asked)
    _disk(folder, bytes_of(scenario.workload))


def in_flight(workload: Workload) -> int:
    """The most requests at once, as far as the plan tells."""
    return workload.max_in_flight if workload.mode == "open" else max(workload.batch_sizes)


def bytes_of(workload: Workload) -> int:
    """About how much the records of a run take."""
    longest = lengths.longest(workload.model_dump()["output_tokens"]) or 1000
    return SPARE_BYTES + (prompts_needed(workload) or 0) * (RECORD_BYTES + ARRIVAL_BYTES * longest)


def _descriptors(most: int, asked: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = most + FILES_SPARE
    if hard != resource.RLIM_INFINITY and hard < need:
        raise RidgelineError(f"{asked}: {most} requests at once need {need} open files, and this shell allows {hard}; raise "
                             "`ulimit -Hn`, or ask for fewer at once")  # fmt: skip
    if soft < need:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


def _ports(most: int, asked: str) -> None:
    try:
        low, high = map(int, PORTS.read_text().split())
    except (OSError, ValueError):
        return  # not Linux: the system will say
    if most > high - low + 1:
        raise RidgelineError(f"{asked}: {most} requests at once need as many local ports, and this machine has {high - low + 1} "
                             "(net.ipv4.ip_local_port_range); widen the range, or ask for fewer at once")  # fmt: skip


def _disk(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if free < need or 0 <= largest < need:
        why = "is free there" if free < need else "is the largest file that this shell allows (ulimit -f)"
        raise RidgelineError(f"{folder}: the records may take {units.size(need)}, and {units.size(min(free, largest) if largest >= 0 else free)} {why}; "
                             "name another place by --out, or plan fewer requests")  # fmt: skip


async def address_of(target: Target, tls: ssl.SSLContext | None) -> tuple[Any, ...]:
    """The server's address, looked up and connected to once, TLS included.  Raises RidgelineError (code 6)."""
    try:
        address = await asyncio.wait_for(resolve(target), LOOK_UP_S)
    except TimeoutError:
        raise RidgelineError(f"{target.url}: host {target.host!r} was not resolved within {LOOK_UP_S:g} s; "
                             "look at this machine's DNS, or give an address", 6) from None  # fmt: skip
    wire = Wire(lambda *_: None, lambda _: None)
    try:
        await connect(target, address, tls, wire, CONNECT_S)
    except ssl.SSLError as problem:
        raise RidgelineError(f"{target.url}: TLS failed: {problem.reason or problem}; use the name in the server's "
                             "certificate, and name an authority of your own by SSL_CERT_FILE", 6) from None  # fmt: skip
    except TimeoutError:
        raise RidgelineError(f"{target.url}: no connection within {CONNECT_S:g} s; is host and port right, and does no "
                             "firewall drop what we send?", 6) from None  # fmt: skip
    except OSError as problem:
        raise RidgelineError(f"{target.url}: not reachable ({problem.strerror or problem}); is the server up, and are "
                             "host and port right?", 6) from None  # fmt: skip
    wire.close()
    return address


@contextlib.asynccontextmanager
async def within(target: Target, limit_s: float = PAGES_S) -> AsyncIterator[None]:
    """What needs no model has PAGES_S in all.  Raises RidgelineError (code 6)."""
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError:
        raise RidgelineError(f"{target.url}: connection and first pages took longer than {limit_s:g} s; is the server up "
                             "and not overloaded? A server this slow is not to be measured: --no-preflight asks it all "
                             "the same", 6) from None  # fmt: skip


@contextlib.asynccontextmanager
async def waiting(progress: Progress, what: str, limit_s: float) -> AsyncIterator[None]:
    """Says what is waited for, once it takes a while, and then for how long already."""

    async def tell() -> None:
        await asyncio.sleep(PATIENCE_S)
        progress.line(f"waiting for {what}; for at most {limit_s:g} s (limits.preflight_s)")
        start_s = time.monotonic() - PATIENCE_S
        while True:
            progress.tick(f"waiting for {what}: {time.monotonic() - start_s:.0f} of {limit_s:g} s")
            await asyncio.sleep(0.5)

    teller = asyncio.ensure_future(tell())
    try:
        yield
    finally:
        teller.cancel()
