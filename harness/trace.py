"""Files that say what to send: traces of past requests, pairs of lengths, prompts.  CSV or JSONL -> Asks, or texts.

Read line by line; a BOM, CRLF and blank lines do no harm.  Every error names the file and the line.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from harness.lengths import Asks
from harness.records import Ints, RidgelineError

INPUT = ("input_tokens", "input_length")
OUTPUT = ("output_tokens", "output_length")
FIELD_BYTES = 16 * 2**20
Row = tuple[str, Mapping[str, Any]]  # "FILE:LINE", and what stands there


def rows(path: str) -> Iterator[Row]:
    """Each row of a .csv with a header, or of a file with one JSON object a line.  Raises RidgelineError."""
    line = 0
    try:
        if not Path(path).is_file() and Path(path).exists() and not path.startswith("/dev/fd/"):
            raise RidgelineError(f"{path}: not a file; a device or a pipe may have no end: save its rows first")
        with open(path, encoding="utf-8-sig", newline="" if path.endswith(".csv") else None) as file:
            if path.endswith(".csv"):
                csv.field_size_limit(FIELD_BYTES)
                table = csv.DictReader(file, skipinitialspace=True)
                table.fieldnames = [name.strip() for name in table.fieldnames or []]
                for values in table:
                    line = table.line_num
                    yield f"{path}:{line}", values
                return
            for line, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                values = orjson.loads(text)
                if not isinstance(values, dict):
                    raise RidgelineError(f"{path}:{line}: expected an object ({{…}}), got {text.strip()[:60]!r}")
                yield f"{path}:{line}", values
    except OSError as problem:
        raise RidgelineError(f"{path}: cannot be read: {problem.strerror}") from None
    except orjson.JSONDecodeError as problem:
        raise RidgelineError(
            f"{path}:{line}: not valid JSON: {problem.msg}; one object a line, or a file named .csv"
        ) from None
    except csv.Error as problem:
        raise RidgelineError(f"{path}:{line + 1}: not valid CSV: {problem}") from None
    except UnicodeDecodeError:
        raise RidgelineError(f"{path}:{line + 1}: not UTF-8; save the file as UTF-8") from None


def _number(row: Row, names: tuple[str, ...], least: float, whole: bool = True) -> float:
    where, values = row
    name = next((name for name in names if values.get(name) not in (None, "")), None)
    if name is None:
        raise RidgelineError(f"{where}: no {' or '.join(names)}; there: {', '.join(map(str, values)) or 'nothing'}")
    try:
        found = float(values[name])
    except (TypeError, ValueError):
        found = math.nan
    if not (math.isfinite(found) and found >= least) or (whole and found != int(found)):
        kind = "a whole number" if whole else "a number"
        raise RidgelineError(f"{where}: {name}: got {values[name]!r}, expected {kind} of at least {least:g}")
    return found


@lru_cache(4)
def pairs(path: str) -> tuple[Ints, Ints]:
    """(input, output) lengths in tokens.  Raises RidgelineError."""
    found = [(_number(row, INPUT, 1), _number(row, OUTPUT, 1)) for row in rows(path)]
    if not found:
        raise RidgelineError(f"{path}: holds no row; give one with {INPUT[0]} and {OUTPUT[0]}")
    both = np.array(found, np.int64)
    return both[:, 0], both[:, 1]


@lru_cache(4)
def read(path: str) -> Asks:
    """A trace: timestamp (s) or timestamp_ms, input_tokens or input_length, output_tokens or output_length; optional are
    prompt (then in every row), session and turn.  In the order of time, from 0 on.  Raises RidgelineError."""
    due_s, inputs, outputs, sessions, turns = [], [], [], [], []
    texts: list[str] = []
    for row in rows(path):
        where, values = row
        in_ms = values.get("timestamp") in (None, "") and values.get("timestamp_ms") not in (None, "")
        due_s.append(_number(row, ("timestamp_ms",), 0, False) / 1e3 if in_ms else _number(row, ("timestamp", "timestamp_ms"), 0, False))  # fmt: skip
        prompt = values.get("prompt") or None
        if due_s[1:] and (prompt is None) == bool(texts):
            raise RidgelineError(f"{where}: prompt: stands in some rows only; give it in every row, or in none")
        if prompt is not None:
            texts.append(str(prompt))
        inputs.append(-1 if prompt is not None else int(_number(row, INPUT, 1)))
        outputs.append(int(_number(row, OUTPUT, 1)))
        sessions.append(values.get("session") if values.get("session") not in (None, "") else None)
        turns.append(_number(row, ("turn",), 0) if values.get("turn") not in (None, "") else 0)
    if not due_s:
        raise RidgelineError(f"{path}: holds no row; give timestamp, {INPUT[0]} and {OUTPUT[0]}")
    order = sorted(range(len(due_s)), key=lambda i: (due_s[i], turns[i]))
    last: dict[Any, int] = {}
    after = np.full(len(order), -1)
    for place, i in enumerate(order):
        if sessions[i] is not None:
            after[place] = last.get(sessions[i], -1)
            last[sessions[i]] = place
    return Asks(
        np.array(inputs)[order], np.array(outputs)[order], after,
        [texts[i] for i in order] if texts else (), np.array(due_s)[order] - min(due_s),
    )  # fmt: skip


def read_prompts(path: str, n: int) -> list[str]:
    """The first `n` prompts of a JSONL file: prompt, text, or the user's messages in messages.  Raises RidgelineError."""
    found = [_prompt(row) for row in itertools.islice(rows(path), n)]
    if not found:
        raise RidgelineError(f"{path}: holds no prompt; give one object a line, with prompt, text or messages")
    return found


def _prompt(row: Row) -> str:
    where, values = row
    said = next((values[key] for key in ("prompt", "text") if values.get(key)), None)
    if said is None and isinstance(messages := values.get("messages"), list):
        spoken = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
        said = "\n\n".join(text for text in spoken if isinstance(text, str)) or None
    if not isinstance(said, str):
        raise RidgelineError(
            f"{where}: no prompt, text or messages with a user's content; there: {', '.join(values) or 'nothing'}"
        )
    return said


def name_of(path: str) -> str:
    return Path(path).name
