"""Every fault of the rig ends in its documented class, with exact counts, no hang, and little memory."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

from harness import dialects, endings, journal, recorder
from harness.loadgen import Player, Timers
from harness.recording import Recorder
from harness.records import Record, Request
from harness.wire import Exchange, Target, clock
from tests.conftest import ROOT
from tests.faults import BY_NAME, CANARY, FAULTS, PROMPT_TOKENS, TOKENS, Fault

REQUESTS, IN_FLIGHT = 20, 8
SHORT = Timers(connect_s=5.0, first_token_s=0.6, idle_s=0.6, total_s=1.5)  # for silence
LONG = Timers(
    connect_s=5.0, first_token_s=10.0, idle_s=10.0, total_s=20.0
)  # for floods, on a machine that is not quiet
MIXED = Timers(connect_s=5.0, first_token_s=2.0, idle_s=2.0, total_s=4.0)
STALLED = ("http-500-stall", "bad-chunk")  # known to be failures, yet nothing more comes


def timers_of(name: str) -> Timers:
    if name == "mixed":
        return MIXED
    silent = BY_NAME[name].expected.startswith("timeout") or name in STALLED
    return SHORT if silent else LONG


MEMORY = 64 * 2**20
SEEN_ALONE = (
    "cancelled",
    "client_error",
    "client_files",
    "client_ports",
    "connect",
    "connect_timeout",
    "failed_elsewhere",
    "tls",
)

# One or two of each kind for every run of the tests; all of them with the long ones.
SOME = ("ok", "bytewise", "crlf-split", "no-done", "usage-astronomic", "error-null", "role-gap", "four-tokens-an-event", "one-piece",
        "hostile-text", "reset-first", "reset-3", "eof-3", "no-finish", "half-event", "hang-after-head", "stall-3", "byte-drip-after-3",
        "endless", "endless-line", "gzip-bomb", "ssh", "bad-chunk", "http-503", "http-400-context", "redirect-307", "html-200",
        "empty-body", "no-length-and-a-body-later", "empty-data", "no-tokens", "error-vllm", "error-event-text", "error-echoes-key", "finish-abort", "bad-utf-8", "gzip-lie")  # fmt: skip


@dataclass
class Played:
    """What came of some faults: records by point, how long each took, and memory."""

    names: list[str]
    records: dict[int, list[Record]] = field(default_factory=dict)
    took_s: list[float] = field(default_factory=list)
    lag_s: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    grown_bytes: int = 0
    recorder_bytes: int = 0
    journal: bytes = b""


def resident(pid: int | str, what: str = "VmRSS") -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


class Watch(threading.Thread):
    """The largest resident memory of this process while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.base = self.peak = resident("self")
        self.over = threading.Event()

    def take(self) -> int:
        peak, self.peak = self.peak, 0
        return peak

    def run(self) -> None:
        while not self.over.wait(0.01):
            self.peak = max(self.peak, resident("self"))


Choose = Callable[[int], str]


def _player(
    target: Target, address: Any, writer: Recorder, choose: Choose, point: int, t0_s: float, timers: Timers
) -> Player:
    def encode(request: Request) -> bytes:
        path, body = dialects.encode("completions", "m", "hi", TOKENS)
        return target.request_bytes(f"/{choose(request.id)}{path}", body)

    def sink(exchange: Exchange) -> None:
        writer.put(recorder.pack_exchange(exchange, point, 0, t0_s, player.start_s))

    player = Player(target, address, None, timers, encode, sink, writer.room)
    return player


async def _play_all(url: str, plan: Sequence[tuple[Choose, int]], path: Path, played: Played) -> None:
    port = int(url.rpartition(":")[2])
    target = Target("http", "127.0.0.1", port, "", (("Authorization", f"Bearer {CANARY}"),))
    address = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
    writer = await Recorder.start(path, CANARY)
    t0_s = clock()
    watch = None
    for point, (choose, count) in enumerate(plan):
        if watch is None and point:  # the base is what it takes to play healthy answers
            watch = Watch()
            watch.start()
            recorder_base = resident(writer.process.pid)

        player = _player(target, address, writer, choose, point, t0_s, timers_of(played.names[point]))
        requests = [Request(i, "hi", TOKENS, input_tokens=PROMPT_TOKENS) for i in range(count)]
        start_s = time.monotonic()
        senses = await asyncio.wait_for(player.play(iter(requests), IN_FLIGHT), 120)
        if watch:
            played.peak_bytes.append(watch.take())
        played.took_s.append(time.monotonic() - start_s)
        played.lag_s.append(senses.lag["lag_max_s"] or 0.0)
        player.close()
    assert watch is not None
    watch.over.set()
    played.grown_bytes = max(played.peak_bytes) - watch.base
    played.recorder_bytes = resident(writer.process.pid, "VmHWM") - recorder_base
    assert await writer.close() == ""


def play_all(url: str, names: Sequence[str], path: Path) -> Played:
    """Each fault by itself after a healthy point, then all of them mixed."""
    played = Played(["ok", *names, "mixed"])
    plan: list[tuple[Choose, int]] = [(lambda _, name=name: name, REQUESTS) for name in played.names[:-1]]  # type: ignore[misc]
    plan.append((lambda i: names[i * 7 % len(names)] if len(names) % 7 else names[i], len(names)))
    uvloop.run(_play_all(url, plan, path, played))
    played.journal = path.read_bytes()
    reading = journal.Reading()
    for record in journal.read(played.journal, reading):
        played.records.setdefault(record.point, []).append(record)
    assert (reading.torn_bytes, reading.bad_frames) == (0, [])
    return played


@pytest.fixture(scope="module")
def some(rig: str, tmp_path_factory: pytest.TempPathFactory) -> Played:
    return play_all(rig, SOME, tmp_path_factory.mktemp("some") / "journal.bin")


@pytest.fixture(scope="module")
def everything(rig: str, tmp_path_factory: pytest.TempPathFactory) -> Played:
    return play_all(rig, [fault.name for fault in FAULTS], tmp_path_factory.mktemp("all") / "journal.bin")


def is_as_documented(fault: Fault, record: Record, timers: Timers) -> None:
    assert record.error_class == fault.expected, record.error
    assert endings.name_of(record.error_class) in endings.ENDINGS
    if fault.tokens != -1:  # how many come before an endless stream is cut is the network's affair
        assert record.output_tokens == fault.tokens
        assert record.token_source == "none" if fault.tokens is None else record.token_source in ("usage", "chunks")
    assert [note for note in record.notes.split() if note != "resent"] == fault.notes.split()
    assert len(record.error) <= endings.MESSAGE_CHARS and not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", record.error)
    assert record.error or not record.error_class
    assert record.end_s >= record.sent_s and record.end_s - record.sent_s < timers.total_s + 1.0


def each_is_as_documented(played: Played, name: str) -> None:
    point = 1 + played.names[1:].index(name)
    records = played.records[point]
    assert sorted(record.id for record in records) == list(range(REQUESTS))
    for record in records:
        is_as_documented(BY_NAME[name], record, timers_of(played.names[record.point]))
    assert played.took_s[point] < -(-REQUESTS // IN_FLIGHT) * timers_of(name).total_s + 1.0
    assert played.lag_s[point] < 3.0


@pytest.mark.parametrize("name", SOME)
def test_a_fault_ends_in_its_documented_class(some: Played, name: str) -> None:
    each_is_as_documented(some, name)


@pytest.mark.full
@pytest.mark.parametrize("name", [fault.name for fault in FAULTS])
def test_every_fault_ends_in_its_documented_class(everything: Played, name: str) -> None:
    each_is_as_documented(everything, name)


def mixed_are_as_documented(played: Played) -> None:
    names = played.names[1:-1]
    records = played.records[len(played.names) - 1]
    assert len(records) == len(names)
    for record in records:
        name = names[record.id * 7 % len(names)] if len(names) % 7 else names[record.id]
        is_as_documented(BY_NAME[name], record, timers_of(played.names[record.point]))


def test_all_mixed_end_likewise(some: Played) -> None:
    mixed_are_as_documented(some)


@pytest.mark.full
def test_all_of_them_mixed_end_likewise(everything: Played) -> None:
    mixed_are_as_documented(everything)


@pytest.mark.parametrize("which", ["some", pytest.param("everything", marks=pytest.mark.full)])
def test_memory_stays_within_64_mib_of_its_base(which: str, request: pytest.FixtureRequest) -> None:
    played: Played = request.getfixturevalue(which)
    print(f"client +{played.grown_bytes / 2**20:.1f} MiB, recorder +{played.recorder_bytes / 2**20:.1f} MiB")
    assert played.grown_bytes < MEMORY and played.recorder_bytes < MEMORY


@pytest.mark.parametrize("which", ["some", pytest.param("everything", marks=pytest.mark.full)])
def test_an_echoed_key_is_in_no_record(which: str, request: pytest.FixtureRequest) -> None:
    played: Played = request.getfixturevalue(which)
    assert CANARY.lower().encode() not in played.journal.lower()
    assert b"[redacted]" in played.journal


def test_the_rig_holds_a_fault_for_every_class() -> None:
    played = {endings.name_of(fault.expected) for fault in FAULTS}
    assert played | set(SEEN_ALONE) == set(endings.ENDINGS)
    assert {BY_NAME[name].expected for name in SOME if not BY_NAME[name].expected.startswith("http")} >= {
        name for name in played if name != "http_STATUS"
    }


def test_the_page_of_endings_is_the_codes_own_table() -> None:
    """Row by row: what the page says of a class is what the code says."""
    page = (ROOT / "harness" / "docs" / "endings.md").read_text(encoding="utf-8")
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|")) for line in page.splitlines() if line[:2] == "| "
    ]
    classes = {row[0].replace("(empty)", ""): row[1:] for row in rows if len(row) == 3 and row[0] != "class"}
    notes = {row[0]: row[1] for row in rows if len(row) == 2 and row[0] != "note"}
    assert classes == endings.ENDINGS
    assert notes == endings.NOTES
