"""What the report reads out of summary.json, tolerantly: a broken run must still give a page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from harness import units
from harness.records import NAN

Json = Mapping[str, Any]

# Fewer samples than this and the percentile is little more than the largest value: the 95 % rank interval of a
# quantile q reaches past the last sample while n < log(0.025) / log(q), rounded up.
SAMPLES_NEEDED = {"p90": 36, "p95": 72, "p99": 368}

VERDICTS = {"valid": "✓", "suspect": "▲", "invalid": "✕"}  # word -> glyph: never colour alone
SEVERITIES = {"info": "ℹ", "suspect": "▲", "invalid": "✕"}
LIMIT_WORDS = {
    "memory_bandwidth": "memory bandwidth",
    "compute": "compute",
    "latency": "latency",
    "communication": "communication",
    "capacity": "memory capacity",
    "queue": "queueing",
    "client": "the client",
}
# No text of a run may fill the page: error messages come from servers.
LONGEST_TEXT = 2000


@dataclass(frozen=True, slots=True)
class RunView:
    """One run as the report sees it: summary.json, run.json and the end of engine.log."""

    summary: dict[str, Any]
    run: dict[str, Any]
    engine_log_tail: str = ""


@dataclass(frozen=True, slots=True)
class Shown:
    """A figure that has a chart and a prediction.  `show` makes its text; `unit` names its axis."""

    key: str
    name: str
    short: str
    show: Callable[[float | None], str]
    higher_is_better: bool = False


HEADLINES = (
    Shown("ttft_s", "Time to first token", "TTFT", units.seconds),
    Shown("itl_s", "Time between tokens", "ITL", units.seconds),
    Shown("e2e_s", "End-to-end time", "E2E", units.seconds),
    Shown("output_tokens_per_s", "Output tokens per second", "Output", lambda v: units.rate(v, "tokens"), True),
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its interval, in SI units; NaN where missing."""

    value: float = NAN
    low: float = NAN
    high: float = NAN

    @property
    def known(self) -> bool:
        return math.isfinite(self.value)


def child(data: object, *keys: str) -> Json:
    """The mapping at a path of keys; an empty one where anything on the way is missing."""
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data if isinstance(data, Mapping) else {}


def num(data: object, *keys: str) -> float:
    """The number at a path of keys, NaN where there is none (a truth value or a text is none)."""
    value = child(data, *keys[:-1]).get(keys[-1])
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else NAN


def text(data: object, *keys: str) -> str:
    """The text at a path of keys, shortened to LONGEST_TEXT characters; empty where there is none."""
    value = child(data, *keys[:-1]).get(keys[-1])
    if value is None or isinstance(value, Mapping | list):
        return ""
    return shorten(str(value))


# Half surrogates cannot be written as UTF-8, control characters are not HTML, line separators once ended scripts, and
# the marks that turn the direction of writing let a text pass for another one.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u202e\u2066-\u2069\ufffe\uffff]")


def shorten(value: str, longest: int = LONGEST_TEXT) -> str:
    """The text, printable and no longer than `longest`."""
    value = _UNPRINTABLE.sub("\ufffd", value)
    return value if len(value) <= longest else value[: longest - 1] + "…"


def items(data: object, *keys: str) -> list[Json]:
    """The mappings in the list at a path of keys."""
    value = child(data, *keys[:-1]).get(keys[-1])
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def numbers(data: object, *keys: str) -> list[float]:
    """The list of numbers at a path of keys."""
    value = child(data, *keys[:-1]).get(keys[-1])
    return [num({"v": entry}, "v") for entry in value] if isinstance(value, list) else []


def points(view: RunView) -> list[Json]:
    return items(view.summary, "points")


def verdict_of(data: Json) -> str:
    """valid, suspect or invalid; anything else counts as suspect: no stamp is not a clean bill."""
    word = data.get("verdict")
    return word if word in VERDICTS else "suspect"


def labels(runs: Sequence[RunView]) -> list[str]:
    """A name for each run, unlike all others; empty when there is only one run and nothing to tell apart."""
    if len(runs) == 1:
        return [""]
    names = [shorten(text(view.summary, "name") or f"run {k}", 40) for k, view in enumerate(runs, start=1)]
    if len(set(names)) < len(names):
        names = [f"{name} #{k}" for k, name in enumerate(names, start=1)]
    return names


MOST_POINTS = 40  # of several runs together, in charts and tables: a page stays below 2 MB, whatever it is made of
MOST_OF_FEW = 100  # of one run, or of two


def room(runs: Sequence[RunView]) -> int:
    """How many of the runs, from the first on, a page shows point by point: at least two."""
    totals = accumulate(len(points(run)) for run in runs)
    return max(min(2, len(runs)), sum(total <= MOST_POINTS for total in totals))


def thinned(run: RunView, most: int) -> RunView:
    """The run with at most so many of its points, evenly taken, the first and the last among them."""
    all_points = points(run)
    if len(all_points) <= most:
        return run
    kept = sorted({round(k * (len(all_points) - 1) / (most - 1)) for k in range(most)})
    return replace(run, summary=run.summary | {"points": [all_points[k] for k in kept]})


def named(runs: Sequence[RunView]) -> list[RunView]:
    """The runs under the names that tell them apart, so that some of them keep those."""
    told = zip(runs, labels(runs), strict=True)
    return [replace(run, summary=run.summary | {"name": name}) if name else run for run, name in told]


Key = tuple[int, float, int]  # (0 batch | 1 rate | 2 neither, its value, which of several like it): sorts as read


def keyed(view: RunView) -> dict[Key, Json]:
    """The points of a run by what was asked of them, so that several runs line up."""
    found: dict[Key, Json] = {}
    for place, point in enumerate(points(view)):
        batch, rate = num(point, "batch_size"), num(point, "rate")
        kind, value = (0, batch) if math.isfinite(batch) else (1, rate) if math.isfinite(rate) else (2, float(place))
        twin = 0
        while (kind, value, twin) in found:
            twin += 1
        found[kind, value, twin] = point
    return dict(sorted(found.items()))


def rows(runs: Sequence[RunView]) -> list[tuple[int, str, Key, Json]]:
    """(place of the run, its name, key, point) of every point of every run."""
    named = enumerate(zip(labels(runs), runs, strict=True))
    return [(k, name, key, point) for k, (name, run) in named for key, point in keyed(run).items()]


def chosen(runs: Sequence[RunView]) -> list[tuple[int, str, Key, Json]]:
    """As `rows`, but of several runs only the best point of each; named with the run and the point's sign."""
    found = rows(runs)
    if len(runs) > 1:
        tops = [best(run, "output_tokens_per_s", highest=True) for run in runs]
        found = [row for row in found if (top := tops[row[0]]) and top[0] == row[2]]
    return [(k, joined(name, marked(key, point, full=True)), key, point) for k, name, key, point in found]


def joined(*parts: str) -> str:
    """What is not empty of these, with commas between."""
    return ", ".join(filter(None, parts))


def all_keys(runs: Sequence[RunView]) -> list[Key]:
    return sorted({key for view in runs for key in keyed(view)})


def key_label(key: Key, full: bool = False) -> str:
    """ "4" or "2/s" for an axis; "batch 4" or "rate 2/s" in a sentence."""
    kind, value, twin = key
    again = f" ({twin + 1})" if twin else ""
    if kind == 0:
        return ("batch " if full else "") + units.number(value) + again
    if kind == 1:
        return ("rate " if full else "") + units.number(value) + "/s" + again
    return f"point {units.count(value)}"


def marked(key: Key, point: Json, full: bool = False) -> str:
    """The label of a point, with its sign where it is not valid: "batch 4 ▲"."""
    word = verdict_of(point)
    return key_label(key, full) + ("" if word == "valid" else f" {VERDICTS[word]}")


def load_word(runs: Sequence[RunView]) -> str:
    """What the points of these runs vary: the heading of their column and the title of their axis."""
    kinds = {key[0] for key in all_keys(runs)}
    modes = {text(view.summary, "workload", "mode") for view in runs}
    if kinds == {1}:
        return "Requests per second asked"
    if kinds - {0}:
        return "Batch size or rate"
    return "Requests in flight" if modes == {"closed"} else "Batch size"


def measured(point: Json, key: str) -> Estimate:
    """The mean over trials and its 95 % interval, of one of HEADLINES or of another time."""
    if key.endswith("per_s"):
        return Estimate(num(point, key), num(point, key + "_low"), num(point, key + "_high"))
    return Estimate(num(point, key, "mean"), num(point, key, "low"), num(point, key, "high"))


def predicted(point: Json, key: str) -> Estimate:
    entry = child(point, "predicted", key)
    return Estimate(num(entry, "value"), num(entry, "low"), num(entry, "high"))


def seed_value(point: Json, key: str) -> float:
    """What the articles' arithmetic gives, before any correction."""
    return num(point, "predicted", "seed", key)


def quotient(point: Json, key: str) -> float:
    """Measured / predicted, as stored, or else from the two."""
    stored = num(point, "predicted", "ratio", key)
    if math.isfinite(stored):
        return stored
    below = predicted(point, key).value
    return measured(point, key).value / below if below > 0 else NAN


def batch_of(point: Json) -> float:
    """The batch the server really ran, where known, or else the one asked for; NaN for a bare rate."""
    ran = num(point, "batch_ran", "mean")
    return ran if math.isfinite(ran) else num(point, "batch_size")


def roof_at(plane: Json, batch: float) -> float:
    """The predicted roof at a batch, tokens/s: straight lines between the plane's points, on logarithmic axes.
    NaN outside of them."""
    pairs = zip(numbers(plane, "batch"), numbers(plane, "roof_tokens_per_s"), strict=False)
    known = sorted((b, r) for b, r in pairs if b > 0 and r > 0)
    for (b0, r0), (b1, r1) in pairwise(known):
        if b0 <= batch <= b1 and b1 > b0:
            part = math.log(batch / b0) / math.log(b1 / b0)
            return float(r0 * (r1 / r0) ** part)
    return next((r for b, r in known if b == batch), NAN)


def limit_word(word: str) -> str:
    return LIMIT_WORDS.get(word, shorten(word.replace("_", " "), 40))


def failures(point: Json) -> str:
    """ "2 of 96 failed (timeout 1, …)", or empty without errors."""
    errors, requests = num(point, "errors"), num(point, "requests")
    if not errors > 0:
        return ""
    classes = [
        (shorten(str(name), 60), num(child(point, "error_classes"), name)) for name in child(point, "error_classes")
    ]
    classes.sort(key=lambda pair: (-pair[1] if math.isfinite(pair[1]) else 0.0, pair[0]))
    named = ", ".join(f"{name} {units.count(n)}" for name, n in classes[:6]) + (", …" if len(classes) > 6 else "")
    return f"{units.count(errors)} of {units.count(requests)} failed" + (f" ({named})" if named else "")


def best(view: RunView, key: str, highest: bool) -> tuple[Key, Json] | None:
    """The best point of a run by one figure: among the valid points, or else the suspect, or else the invalid ones."""
    known = [(k, p) for k, p in keyed(view).items() if measured(p, key).known]
    for word in VERDICTS:
        of_word = [(k, p) for k, p in known if verdict_of(p) == word]
        if of_word:
            pick = max if highest else min
            return pick(of_word, key=lambda pair: measured(pair[1], key).value)
    return None
