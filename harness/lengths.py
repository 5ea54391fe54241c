"""How long prompts and answers are to be: a number or a distribution -> the lengths that each request asks for.

A distribution is written as in a scenario: {uniform: [min, max]}, {normal: {mean, std, min?, max?}}, {lognormal: …} or
{file: FILE}.  Mean and std are those of the lengths themselves, in tokens; what min and max cut off lies at the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness.records import Floats, Ints, RidgelineError

Length = int | Mapping[str, Any]
ROWS = 4096  # lengths drawn; a longer trial goes through them again


@dataclass(frozen=True, slots=True)
class Asks:
    """What the requests of a trial ask for: request i is row i modulo the number of rows.

    `input_tokens` is -1 where `texts` gives the prompt, whatever its length.  `after` is the row of the request that
    must have ended (-1: none).  `due_s` are a trace's own times, in seconds since its first.
    """

    input_tokens: Ints
    output_tokens: Ints
    after: Ints
    texts: Sequence[str] = ()
    due_s: Floats | None = None
    alike: bool = field(default=False)  # rows differ in nothing but their prompt: taken by the number in the run

    def __len__(self) -> int:
        return len(self.output_tokens)

    def roots(self) -> Ints:
        """The row of each session's first turn (its own, where there is no session)."""
        found = np.arange(len(self))
        for row, before in enumerate(self.after):
            if before >= 0:
                found[row] = found[before]
        return found


def uniform(rng: np.random.Generator, n: int, bounds: Sequence[int]) -> Floats:
    """Every whole number from min to max, both included."""
    return rng.integers(bounds[0], bounds[1] + 1, n).astype(float)


def normal(rng: np.random.Generator, n: int, shape: Mapping[str, Any]) -> Floats:
    return _bounded(rng.normal(shape["mean"], shape["std"], n), shape)


def lognormal(rng: np.random.Generator, n: int, shape: Mapping[str, Any]) -> Floats:
    """The logarithm's variance is ln(1 + (std/mean)²), so that mean and std are those of the lengths."""
    variance = math.log1p((shape["std"] / shape["mean"]) ** 2)
    return _bounded(rng.lognormal(math.log(shape["mean"]) - variance / 2, math.sqrt(variance), n), shape)


def _bounded(values: Floats, shape: Mapping[str, Any]) -> Floats:
    return np.clip(values, shape.get("min") or 1, shape.get("max") or np.inf)


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int, Any], Floats]] = {
    "uniform": uniform,
    "normal": normal,
    "lognormal": lognormal,
}


def kind_of(length: Length) -> tuple[str, Any]:
    """("fixed" or the distribution's name, what it is given)."""
    if not isinstance(length, Mapping):
        return "fixed", length
    return next((name, value) for name, value in length.items() if value is not None)


def draw(
    length: Length, rng: np.random.Generator, n: int, listed: Ints | None = None, rows: Ints | None = None
) -> Ints:
    """`n` lengths of at least one token.  A file's lengths are `listed`; `rows` picks from them, so that the input and
    the output of a request come from one row."""
    name, shape = kind_of(length)
    if name == "fixed":
        return np.full(n, shape, np.int64)
    if name == "file":
        assert listed is not None and rows is not None
        return np.asarray(listed[rows % len(listed)], np.int64)
    return np.maximum(1, np.rint(DISTRIBUTIONS[name](rng, n, shape))).astype(np.int64)


def in_turns(inputs: Ints, outputs: Ints, turns: int) -> tuple[Ints, Ints, Ints]:
    """(input, output, after) of sessions of `turns` requests, one after the other.

    A turn's own length is that of what it adds: its prompt is all prompts and answers before it, and its own part.
    """
    n = len(inputs) // turns * turns
    new, out = inputs[:n].reshape(-1, turns), outputs[:n].reshape(-1, turns)
    whole = np.cumsum(new, 1) + np.cumsum(out, 1) - out
    rows = np.arange(n)
    return whole.ravel(), out.ravel(), np.where(rows % turns, rows - 1, -1)


def typical(length: Length) -> int | None:
    """The mean length; None where only a file knows."""
    name, shape = kind_of(length)
    if name == "fixed":
        return int(shape)
    if name == "uniform":
        return int(sum(shape) / 2)
    return None if name == "file" else round(float(shape["mean"]))


def longest(length: Length) -> int | None:
    """The longest that can come, or for an open tail, one in 30,000 is longer; None where only a file knows."""
    name, shape = kind_of(length)
    if name in ("fixed", "file"):
        return int(shape) if name == "fixed" else None
    if name == "uniform":
        return int(shape[1])
    if shape.get("max"):
        return int(shape["max"])
    if name == "normal":
        return int(shape["mean"] + 4 * shape["std"])
    variance = math.log1p((shape["std"] / shape["mean"]) ** 2)
    return int(shape["mean"] * math.exp(4 * math.sqrt(variance) - variance / 2))


def say(length: Length) -> str:
    """For people: 350, "100 to 500", "lognormal 350 ± 100"."""
    name, shape = kind_of(length)
    if name == "uniform":
        return f"{shape[0]} to {shape[1]}"
    if name in ("normal", "lognormal"):
        return f"{name} {shape['mean']:g} ± {shape['std']:g}"
    return f"as in {shape}" if name == "file" else str(shape)


def parse(text: str, flag: str) -> Length:
    """An option's value: 350, 100:500 (uniform), normal:350:100, lognormal:350:100 (mean, std), or a file."""
    if text.endswith((".csv", ".jsonl")):
        return {"file": text}
    name, *parts = text.split(":") if text[:1].isalpha() else ["uniform", *text.split(":")]
    try:
        if name == "uniform" and len(parts) == 1:
            return int(parts[0])
        if name == "uniform" and len(parts) == 2:
            return {name: [int(part) for part in parts]}
        if name in ("normal", "lognormal") and len(parts) == 2:
            return {name: {"mean": float(parts[0]), "std": float(parts[1])}}
    except ValueError:
        pass
    raise RidgelineError(
        f"{flag}: got {text!r}; give a number (350), MIN:MAX, normal:MEAN:STD, lognormal:MEAN:STD, or a .csv or .jsonl file"
    )
