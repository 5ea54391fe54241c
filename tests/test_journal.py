from __future__ import annotations

import asyncio
import contextlib
import math
import random
from pathlib import Path

import numpy as np
import pytest

from harness import journal
from harness.recording import Recorder
from harness.records import NAN, Record, RidgelineError


def record(i: int) -> Record:
    n = i % 5
    return Record(
        i, 0, 0, i // 4, False, NAN if i % 2 else 1.5, 2.0 + i, end_s=3.0 + i, chunk_s=np.arange(n, dtype=np.float32) / 8,
        chunk_tokens=np.ones(n, np.int32), output_tokens=n or None, token_source="usage", status=200, error="ünï" * n,
    )  # fmt: skip


def written(n: int) -> bytes:
    parts = [journal.encode(record(i)) for i in range(n)]
    return journal.MAGIC + b"".join(parts) + journal.encode_event({"event": "trial_end", "at_s": 1.5})


def test_a_record_comes_back_as_it_was() -> None:
    reading = journal.Reading()
    for i, back in enumerate(journal.read(written(9), reading)):
        one = record(i)
        assert back.chunk_s.tolist() == one.chunk_s.tolist()
        assert math.isnan(back.scheduled_s) == math.isnan(one.scheduled_s)
        for name in (
            "id",
            "wave",
            "sent_s",
            "end_s",
            "output_tokens",
            "input_tokens",
            "token_source",
            "error",
            "warmup",
        ):
            assert getattr(back, name) == getattr(one, name), name
    assert reading.events == [{"event": "trial_end", "at_s": 1.5}]
    assert (reading.torn_bytes, reading.bad_frames) == (0, [])


def test_a_journal_cut_at_any_byte_loses_only_the_cut_record() -> None:
    data = written(12)
    ends = [len(journal.MAGIC)]
    for i in range(12):
        ends.append(ends[-1] + len(journal.encode(record(i))))
    for cut in range(len(data)):
        reading = journal.Reading()
        whole = list(journal.read(data[:cut], reading))
        assert len(whole) == sum(end <= cut for end in ends[1:]), cut
        kept = max((end for end in ends if end <= cut), default=0)
        assert reading.torn_bytes == cut - kept


def test_a_flipped_bit_costs_its_record_and_names_it() -> None:
    data = bytearray(written(6))
    at = len(journal.MAGIC) + len(journal.encode(record(0))) + 30
    data[at] ^= 4
    reading = journal.Reading()
    assert [r.id for r in journal.read(bytes(data), reading)] == [0, 2, 3, 4, 5]
    assert reading.bad_frames == [2]


@pytest.mark.parametrize("byte", range(8))
def test_damage_to_a_length_or_a_checksum_costs_its_record_alone(byte: int) -> None:
    data = bytearray(written(40))
    data[len(journal.MAGIC) + len(journal.encode(record(0))) + byte] ^= 0x41
    reading = journal.Reading()
    assert [r.id for r in journal.read(bytes(data), reading)] == [0, *range(2, 40)]
    assert reading.bad_frames == [2] and reading.torn_bytes == 0 and len(reading.events) == 1


def cut_at_every_byte(records: int, step: int) -> None:
    """`records` whole ones before the cut, none torn, none lost."""
    parts = [journal.encode(record(i)) for i in range(records)]
    data = journal.MAGIC + b"".join(parts)
    ends = np.cumsum([len(journal.MAGIC), *map(len, parts)])
    for cut in range(0, len(data) + 1, step):
        reading = journal.Reading()
        # What lies long before the cut is read the same whatever follows: only its last kilobytes are cut anew.
        whole = int(np.searchsorted(ends, cut, "right")) - 1
        skipped = max(0, whole - 3)
        piece = journal.MAGIC + data[ends[skipped] : cut] if whole >= 0 else data[:cut]
        found = [r.id for r in journal.read(piece, reading)]
        assert found == list(range(skipped, max(whole, 0))), cut
        assert reading.torn_bytes == (cut - ends[whole] if whole >= 0 else cut) and not reading.bad_frames


def test_a_journal_of_1000_records_cut_at_many_bytes() -> None:
    cut_at_every_byte(1000, 97)


@pytest.mark.full
def test_a_journal_of_1000_records_cut_at_every_byte() -> None:
    cut_at_every_byte(1000, 1)


@pytest.mark.full
def test_a_whole_journal_of_1000_records_cut_anywhere() -> None:
    data, rng = written(1000), random.Random(2)
    for cut in [rng.randrange(len(data)) for _ in range(1500)]:
        reading = journal.Reading()
        ids = [r.id for r in journal.read(data[:cut], reading)]
        assert ids == list(range(len(ids))) and not reading.bad_frames
        assert reading.torn_bytes < 2000


def test_random_damage_never_raises_anything_but_a_clear_error() -> None:
    rng = random.Random(1)
    for _ in range(300):
        data = bytearray(written(5))
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(RidgelineError):
            list(journal.read(bytes(data), journal.Reading()))


@pytest.mark.parametrize(
    ("data", "said"), [(b"PAR1....", "not a Ridgeline journal"), (b"ridgeline journal 9\n", "newer")]
)
def test_what_is_no_journal_of_ours_is_refused_by_name(data: bytes, said: str) -> None:
    with pytest.raises(RidgelineError, match=said):
        list(journal.read(data, journal.Reading()))


def test_a_recorder_that_was_killed_says_so(tmp_path: Path) -> None:
    """It cannot say so itself: without this a run whose records went nowhere ended as complete."""

    async def killed() -> str:
        recorder = await Recorder.start(tmp_path / "journal.bin", "")
        recorder.process.kill()
        await recorder.process.wait()
        return await recorder.close()

    assert "signal 9" in asyncio.run(killed())
