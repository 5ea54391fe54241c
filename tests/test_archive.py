"""requests.parquet: the journal's records, in blocks, and no more memory for more of them."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harness import archive, journal, store
from harness.records import SCALAR_COLUMNS, Record, joined, table
from tests.conftest import ROOT


def answer(i: int, tokens: int = 5) -> Record:
    return Record(id=i, point=0, trial=0, wave=i, warmup=False, scheduled_s=math.nan, sent_s=float(i), end_s=i + 1.0,
                  chunk_s=np.linspace(0.05, 0.5, tokens).astype(np.float32), chunk_tokens=np.ones(tokens, np.int32),
                  input_tokens=350, output_tokens=tokens, token_source="usage", status=200, finish_reason="length")  # fmt: skip


def failure(i: int) -> Record:
    return dataclasses.replace(
        answer(i, 0), error_class="http_503", error="büsy, 'later'", output_tokens=None, status=503
    )


def a_run(folder: Path, records: list[Record]) -> Path:
    folder.mkdir()
    store.write_json(folder / "run.json", {"schema": store.FORMAT, "state": "complete"})
    frames = [journal.encode(record) for record in records] + [journal.encode_event({"event": "trial_end", "point": 0})]
    (folder / "journal.bin").write_bytes(journal.MAGIC + b"".join(frames))
    return folder


def test_what_is_archived_is_what_was_journalled(tmp_path: Path) -> None:
    records = [answer(2), failure(0), answer(1, tokens=1), answer(3, tokens=0)]
    folder = a_run(tmp_path / "run", records)
    before = store.load(folder)
    store.derive(folder)
    after = store.load(folder)
    assert not before.archived and after.archived
    assert before.events == after.events == [{"event": "trial_end", "point": 0}]
    for name in (*SCALAR_COLUMNS, "chunk_s", "chunk_tokens", "start"):
        mine, theirs = getattr(after.records, name), getattr(before.records, name)
        same = np.array_equal(mine, theirs, equal_nan=True) if mine.dtype.kind == "f" else np.array_equal(mine, theirs)
        assert same and len(mine), name


def test_an_archive_that_its_journal_has_outgrown_is_left_aside(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run", [answer(0)])
    store.derive(folder)
    with (folder / "journal.bin").open("ab") as more:
        more.write(journal.encode(answer(1)))
    assert len(store.load(folder).records) == 2
    (folder / "journal.bin").unlink()  # then the archive is all there is
    assert len(store.load(folder).records) == 1


def test_blocks_read_the_columns_that_are_asked_for_and_tell_the_others_missing(tmp_path: Path) -> None:
    archive.write(tmp_path / "r", [table([answer(0), answer(1)]), table([failure(2)])])
    whole = joined(list(archive.blocks(tmp_path / "r")))
    some = joined(list(archive.blocks(tmp_path / "r", ("id", "sent_s", "last_token_s"), chunks=False)))
    assert some.sent_s.tolist() == whole.sent_s.tolist() == [0.0, 1.0, 2.0]
    assert np.array_equal(some.last_token_s, whole.last_token_s, equal_nan=True)
    assert set(some.output_tokens.tolist()) == {-1} and not len(some.chunk_s)


COST = """
import json, resource, sys
from pathlib import Path
from harness import store, tally
folder = Path(sys.argv[1])
store.derive(folder)
found = tally.Tally("closed", 4)
tally.count({0: found}, store.load(folder).blocks)
row = found.row()
print(json.dumps({"n": row["requests"], "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "pandas": "pandas" in sys.modules}))
"""


def cost(folder: Path) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", COST, str(folder)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_archiving_does_without_pandas_which_takes_longer_to_load_than_all_else(tmp_path: Path) -> None:
    assert cost(a_run(tmp_path / "run", [answer(i) for i in range(5)])) | {"peak": 0} == {
        "n": 5,
        "peak": 0,
        "pandas": False,
    }


@pytest.mark.full
def test_memory_hardly_grows_with_the_number_of_requests(tmp_path: Path) -> None:
    frame = {n: a_run(tmp_path / str(n), [answer(i, 150) for i in range(n)]) for n in (20_000, 120_000)}
    few, many = (cost(folder) for folder in frame.values())
    assert (few["n"], many["n"]) == (20_000, 120_000)
    assert many["peak"] - few["peak"] < 10 * 1024, "KiB for 100,000 requests of 150 tokens"
