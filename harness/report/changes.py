"""What changed from the first of several runs to the others: figures with intervals, and what is not the same beside them.

The statistics are the gate's (see `gate`): the unit is the trial, and all tests of a page are one family.  A gate looks
for harm alone; here each test is asked both ways.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness import baseline, gate, units
from harness.records import NAN
from harness.report import provenance, view
from harness.report.view import Json, Key, RunView
from harness.scenario import Workload

ALPHA = 0.05  # chance that any difference of a page is called one by chance, better and worse together
METRICS = {
    "ttft_p50": "Time to first token, median",
    "itl_p50": "Time between tokens, median",
    "e2e_p50": "End-to-end time, median",
    "output_tokens_per_s": "Output tokens per second",
}
WORDS = {"better": "↑", "worse": "↓", "same": "=", "unclear": "?", "not judged": "–"}  # never colour alone
MOST_DIFFERENCES = 60
# Fields of the fingerprint that say who answered; all others say what was asked, or how it was counted.
_WHO = {"model": "model", "hardware": "hardware", "engine": "engine", "dtype": "precision", "kv_dtype": "KV precision",
        "tp": "tensor parallelism"}  # fmt: skip
_OURS = ("--host", "--port", "--alias")  # flags that the launch of an engine chooses, otherwise each time
_PLAIN = Workload().model_dump(mode="json")  # what runs of older formats do not say


@dataclass(frozen=True, slots=True)
class Change:
    """One metric at one point, of run `run` (its place, from 1 on) against run 0.  `harm` and its 95 % interval are shares
    of the base, positive where worse; NaN where they cannot be had.  `word` is one of WORDS, `why` says more."""

    run: int
    key: Key
    metric: str
    base: float
    new: float
    harm: float
    low: float
    high: float
    margin: float
    p: float
    trials: tuple[int, int]
    word: str
    why: str = ""

    @property
    def higher_is_better(self) -> bool:
        return baseline.higher_is_better(self.metric)

    @property
    def shown(self) -> str:
        """The change as it is read, more is +: "+4.1 % [+2 %, +6.3 %]"."""
        sign = -1 if self.higher_is_better else 1
        if math.isnan(self.harm):
            return units.MISSING
        ends = sorted((sign * self.low, sign * self.high)) if math.isfinite(self.low) else []
        return signed(sign * self.harm) + (f" [{signed(ends[0])}, {signed(ends[1])}]" if ends else " (no interval)")


def signed(share: float) -> str:
    """To a tenth of a per cent."""
    share = round(share, 3)
    text = units.percent(share)
    return text if share < 0 else f"+{text}"


def figure(metric: str, value: float) -> str:
    return units.rate(value, "tokens") if baseline.higher_is_better(metric) else units.seconds(value)


# --- figures --------------------------------------------------------------------------------------------------------


def trials_of(run: RunView, key: Key, point: Json, metric: str) -> list[float]:
    """One figure a trial; without the trials the point's own figure, as of a single one."""
    label = f"b{key[1]:g}" if key[0] == 0 else f"r{key[1]:g}"
    given = view.numbers(run.summary, "figures", "points", label, "trials", metric) if not key[2] else []
    if known := [value for value in given if math.isfinite(value) and value > 0]:
        return known
    name, _, quantile = metric.rpartition("_")
    value = view.num(point, metric) if baseline.higher_is_better(metric) else view.num(point, f"{name}_s", quantile)
    return [value] if value > 0 else []


def changes(runs: Sequence[RunView]) -> list[Change]:
    """Each metric at each point that the first run and another have; in the order metric, point, run."""
    found = [view.keyed(run) for run in runs]
    rows = []
    for metric in METRICS:
        for key in found[0] if found else ():
            base = trials_of(runs[0], key, found[0][key], metric)
            for place in range(1, len(runs)):
                if key in found[place] and base:
                    new = trials_of(runs[place], key, found[place][key], metric)
                    rows.append((place, key, metric, base, new))
    answers = _asked([(metric, base, new) for _, _, metric, base, new in rows])
    return [
        _change(row, answer, _barred(runs, found, row)) for row, answer in zip(rows, answers, strict=True) if row[4]
    ]


_Row = tuple[int, Key, str, list[float], list[float]]


def _barred(runs: Sequence[RunView], found: Sequence[Mapping[Key, Json]], row: _Row) -> str:
    """Why a point is not judged; empty where it is."""
    names = [name or "the run" for name in view.labels(runs)]
    bad = [names[k] for k in (0, row[0]) if view.verdict_of(found[k][row[1]]) == "invalid"]
    return f"invalid in {' and '.join(bad)}" if bad else ""


def _asked(rows: Sequence[tuple[str, list[float], list[float]]]) -> list[tuple[gate.Answer, gate.Answer]]:
    """(harm, benefit) of each; both ways are one family."""
    rule = gate.Rule(ALPHA / 2)
    both = []
    for back in (False, True):
        questions = [
            gate.Question(metric, new if back else base, base if back else new, baseline.margin_of(metric),
                          baseline.higher_is_better(metric))
            for metric, base, new in rows
        ]  # fmt: skip
        both.append(gate.decide(questions, rule))
    return list(zip(*both, strict=True))


def _change(row: _Row, asked: tuple[gate.Answer, gate.Answer], barred: str) -> Change:
    place, key, metric, _, _ = row
    harm, benefit = asked
    margin = harm.margin
    if barred:
        word, why = "not judged", barred
    elif not math.isfinite(harm.low):
        word, why = "not judged", "one trial has no interval"
    elif harm.verdict == gate.FAIL:
        word, why = "worse", ""
    elif benefit.verdict == gate.FAIL and harm.effect <= -margin:
        word, why = "better", ""
    elif -margin < harm.low and harm.high < margin:
        word, why = "same", ""
    else:
        word, why = "unclear", "more trials would tell"
    p = min((a.p_holm for a in asked if math.isfinite(a.p_holm)), default=NAN)
    return Change(place, key, metric, harm.base, harm.new, harm.effect, harm.low, harm.high, margin, p, harm.trials, word, why)  # fmt: skip


# --- what is not the same -------------------------------------------------------------------------------------------


def caveats(runs: Sequence[RunView]) -> list[str]:
    """What keeps the runs from being compared like with like; nothing is refused for it."""
    names, said = view.labels(runs), []
    marks = [view.child(run.summary, "figures", "fingerprint") for run in runs]
    for name, mark in zip(names[1:], marks[1:], strict=True):
        other = [key for key in sorted(marks[0].keys() | mark.keys()) if marks[0].get(key) != mark.get(key)] if mark and marks[0] else []  # fmt: skip
        who = [f"{_WHO[key]} ({_told(marks[0].get(key))}, {_told(mark.get(key))})" for key in other if key in _WHO]
        asked = [f"{key.removeprefix('workload.').replace('_', ' ')} ({_told(marks[0].get(key))}, {_told(mark.get(key))})"
                 for key in other if key not in _WHO]  # fmt: skip
        if asked:
            said.append(f"{name} is not comparable with {names[0]}: they differ in {_listed(asked)}, so their figures "
                        "answer different questions.")  # fmt: skip
        if who:
            said.append(
                f"{name} differs from {names[0]} in {_listed(who)}: a change below is that of all this together."
            )
    said += _unmatched(runs, names)
    unfinished = [name for run, name in zip(runs, names, strict=True) if view.text(run.summary, "state") != "complete"]
    if unfinished:
        said.append(f"Not complete: {_listed(unfinished)}.")
    return said


def _unmatched(runs: Sequence[RunView], names: Sequence[str]) -> list[str]:
    found, said = [view.keyed(run) for run in runs], []
    for name, points in zip(names[1:], found[1:], strict=True):
        only = [(names[0], found[0].keys() - points.keys()), (name, points.keys() - found[0].keys())]
        said += [f"Measured in {which} and not in {name if which == names[0] else names[0]}: "
                 f"{_listed([view.key_label(key, full=True) for key in sorted(keys)])}." for which, keys in only if keys]  # fmt: skip
    return said


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:12]) + (f" and {len(words) - 12} more" if len(words) > 12 else "")


def _told(value: Any) -> str:
    return "none" if value is None else view.shorten(str(value), 80)


def differences(runs: Sequence[RunView]) -> list[tuple[str, list[str]]]:
    """(field, its value in each run; "" where it has none) of all that is not the same in every run."""
    sheets = [_sheet(run) for run in runs]
    fields = list(dict.fromkeys(field for sheet in sheets for field in sheet))
    rows = [(field, [sheet.get(field, "") for sheet in sheets]) for field in fields]
    return [(field, values) for field, values in rows if len(set(values)) > 1]


def _sheet(run: RunView) -> dict[str, str]:
    """Everything that may be a cause, flat and without secrets; the likely ones first."""
    engine, scenario, machine = (view.child(run.run, key) for key in ("engine", "scenario", "machine"))
    asked = view.child(scenario, "engine")
    args = next((found for found in (asked.get("args"), engine.get("args")) if isinstance(found, list) and found), [])
    rows: dict[str, Any] = {
        "model": run.summary.get("model"), "engine": engine.get("kind"), "engine version": engine.get("version"),
        "hardware": view.text(run.summary, "hardware", "name"),
    }  # fmt: skip
    if not engine.get("launched"):  # a launched one has another port each time
        rows["server"] = provenance.redacted(engine.get("url"))
    words = flags([str(word) for word in args])
    rows |= {f"flag {flag}": value for flag, value in words.items() if flag not in _OURS}
    rows |= {f"environment {key}": value for key, value in provenance.flat(provenance.redacted(asked.get("env")))}
    for word, data in (("load", {**_PLAIN, **view.child(scenario, "workload")}), ("theory", scenario.get("theory")), ("machine", machine),
                       ("package", engine.get("packages")), ("version", run.run.get("versions"))):  # fmt: skip
        rows |= {f"{word} {key}": value for key, value in provenance.flat(provenance.redacted(data))}
    rows |= {key: run.run.get(key) for key in ("seed", "ridgeline", "python")} | {"started": run.run.get("started_at")}
    shown = {field: view.text({"v": value}, "v") for field, value in rows.items()}
    return {view.shorten(field, 120): view.shorten(text, 200) for field, text in shown.items() if text}


def flags(args: Sequence[str]) -> dict[str, str]:
    """A command line as flag -> value ("on" for a switch), without secrets."""
    words, found = provenance.redacted(list(args)), {}
    for place, word in enumerate(words):
        if not _is_flag(word):
            continue
        flag, equals, value = word.partition("=")
        after = words[place + 1] if place + 1 < len(words) else "-"
        found[flag] = value if equals else "on" if _is_flag(after) else shlex.join([after])
    return found


def _is_flag(word: str) -> bool:
    """-1 is a value."""
    return word.startswith("-") and not word[1:2].isdigit()
