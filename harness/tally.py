"""Blocks of a point's records -> its figures and what its checks look at, in memory that does not grow with the run.

Two passes: `place` learns when requests were sent and ended, from which the windows of throughput follow; `add` counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness import metrics, stats
from harness.metrics import METRICS
from harness.records import NAN, RATES, Floats, Ints, Table
from harness.stats import Spread

# What the first pass reads of a request.
PLACE = ("point", "trial", "wave", "warmup", "sent_s", "scheduled_s", "last_token_s", "end_s", "error_class")
COUNTED = ("input_tokens", "output_tokens", "cached_tokens")
GAPS = ("itl", "chunk_gap")
BURST_SPAN = 0.05  # nine tenths of the tokens within this share of the request's whole time

Blocks = Callable[[tuple[str, ...] | None, bool], Iterable[Table]]  # (columns or None for all, with chunks) -> blocks


@dataclass(slots=True)
class Mean:
    n: int = 0
    total: float = 0.0

    def add(self, values: Floats | Ints) -> None:
        known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
        self.n, self.total = self.n + len(known), self.total + float(known.sum(dtype=np.float64))

    @property
    def value(self) -> float:
        return self.total / self.n if self.n else NAN


@dataclass(slots=True)
class Same:
    """The value all requests share, else their mean; None when the server told none (-1)."""

    low: int | None = None
    high: int | None = None
    mean: Mean = field(default_factory=Mean)

    def add(self, values: Ints) -> None:
        known = values[values >= 0]
        if len(known):
            low, high = int(known.min()), int(known.max())
            self.low = low if self.low is None else min(self.low, low)
            self.high = high if self.high is None else max(self.high, high)
            self.mean.add(known)

    @property
    def value(self) -> float | int | None:
        return self.low if self.low == self.high else self.mean.value


@dataclass(slots=True)
class Lengths:
    """Lengths that came against those asked for: how many are known, how many differ, and by how much."""

    known: int = 0
    wrong: int = 0
    asked: Same = field(default_factory=Same)
    came: list[int] = field(default_factory=list)  # least and most of the wrong ones
    over: list[int] = field(default_factory=list)  # least and most that they were longer

    def add(self, came: Ints, asked: Ints) -> None:
        known = (came >= 0) & (asked >= 0)
        wrong = known & (came != asked)
        self.known, self.wrong = self.known + int(known.sum()), self.wrong + int(wrong.sum())
        self.asked.add(asked[known])
        if wrong.any():
            self.came = _ends(self.came, came[wrong])
            self.over = _ends(self.over, (came - asked)[wrong])


def _ends(so_far: list[int], values: Ints) -> list[int]:
    both = [*so_far, int(values.min()), int(values.max())]
    return [min(both), max(both)]


class Trial:
    """One trial's good requests."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.times: list[tuple[Floats, Floats, Ints]] = []  # begun, last token, wave
        self.windows: metrics.Windows | None = None
        self.edges: Floats = np.empty((0, 2))  # the same as an array
        self.means = {metric.name: Mean() for metric in METRICS}
        self.inside: Counter[str] = Counter()

    def place(self, t: Table) -> None:
        due = self.mode == "open"
        begun_s = np.where(np.isnan(t.scheduled_s), t.sent_s, t.scheduled_s) if due else t.sent_s
        last_s = np.where(np.isnan(t.last_token_s), t.sent_s, t.last_token_s)
        self.times.append((begun_s, last_s, t.wave.astype(np.int32) if self.mode == "wave" else t.wave[:0]))

    def settle(self, slots: int) -> Floats:
        if self.windows is None:
            begun_s, last_s, wave = (np.concatenate(part) for part in zip(*self.times, strict=True))
            self.windows, self.times = metrics.steady_window(begun_s, last_s, wave, self.mode, slots), []
            self.edges = np.array(self.windows).reshape(-1, 2)
        return self.edges

    def rates(self) -> dict[str, float]:
        """Tokens and requests per second inside the windows."""
        length_s = sum(end - start for start, end in self.windows or ())
        n = self.inside
        if length_s <= 0:
            return dict.fromkeys(RATES, NAN)
        return {
            "output_tokens_per_s": n["output_tokens"] / length_s,
            "total_tokens_per_s": (n["output_tokens"] + n["input_tokens"]) / length_s if n["input_tokens"] else NAN,
            "requests_per_s": n["requests"] / length_s,
        }


class Tally:
    """One point's records, warm-up left out of all but the means that the server has it in too."""

    def __init__(self, mode: str, slots: int, asked_input: int | None = None, asked_output: int | None = None,
                 felt: Mapping[int, Mapping[str, Any]] | None = None) -> None:  # fmt: skip
        self.mode, self.slots = mode, slots
        self.felt = felt or {}  # the client's senses of each trial
        self.asked = {
            "input_tokens": asked_input,
            "output_tokens": asked_output,
        }  # for records that do not tell their own
        self.requests = 0
        self.error_classes: Counter[str] = Counter()
        self.example = ""  # the first error's text
        self.trials: dict[int, Trial] = {}
        self.all_trials: set[int] = set()
        self.sources: set[str] = set()
        self.counted = {name: Same() for name in COUNTED}
        self.arrivals = self.tokens = 0
        self.spreads = {metric.name: Spread() for metric in METRICS}
        self.one_each = True  # every arrival so far held one token: ITL and the chunk gap are one
        self.lengths = {"input_tokens": Lengths(), "output_tokens": Lengths()}
        self.long_answers = self.bursts = 0
        self.late = Spread()  # s, how late requests were sent
        self.held_up = Spread()  # s, how late first tokens were read at most
        self.with_warmup = {"ttft": Mean(), "itl": Mean()}
        self.tokens_with_warmup = 0.0
        self.notes: Counter[str] = Counter()

    def place(self, t: Table) -> None:
        t = t.where(t.ok & ~t.warmup)
        for k in np.unique(t.trial).tolist():
            self.trials.setdefault(k, Trial(self.mode)).place(t.where(t.trial == k))

    def add(self, t: Table) -> None:
        good = t.where(t.ok)
        self.tokens_with_warmup += float(good.output_tokens[good.output_tokens > 0].sum())
        if good.warmup.any():
            warm = good.where(good.warmup)
            self.with_warmup["ttft"].add(metrics.ttft_s(warm))
            self.with_warmup["itl"].add(metrics.itl_s(warm))
        t = t.where(~t.warmup)
        self.requests += len(t)
        self.all_trials.update(np.unique(t.trial).tolist())
        bad = t.error_class[~t.ok]
        self.error_classes.update(str(name) for name in bad)
        self.example = self.example or next((str(text) for text in t.error[~t.ok] if text), "")
        self.notes.update(note for said in t.notes if said for note in said.split())
        late_s = t.sent_s - t.scheduled_s
        self.late.add(late_s)
        self._add_good(t.where(t.ok))

    def _add_good(self, good: Table) -> None:
        if not len(good):
            return
        self.sources.update(good.token_source.tolist())
        for name, counted in self.counted.items():
            counted.add(getattr(good, name))
        for name, lengths in self.lengths.items():
            asked = getattr(good, f"asked_{name}")
            otherwise = self.asked[name]
            lengths.add(getattr(good, name), np.where(asked < 0, -1 if otherwise is None else otherwise, asked))
        self.arrivals += len(good.chunk_s)
        self.tokens += int(good.output_tokens[good.output_tokens > 0].sum())
        self._add_bursts(good)
        for k in np.unique(good.trial).tolist():
            self._add_trial(self.trials[k], good.where(good.trial == k))

    def _add_trial(self, trial: Trial, t: Table) -> None:
        trial.inside.update(metrics.tokens_inside(t, trial.settle(self.slots)))
        if (felt := self.felt.get(int(t.trial[0]), {})).get("usual_s") is not None:
            self.held_up.add(metrics.held_up_s(t.first_token_s, felt["held"], felt["usual_s"]))
        one_each = metrics.one_token_each(t)
        if self.one_each and not one_each:
            self.spreads["chunk_gap"], self.one_each = self.spreads["itl"].copy(), False
        gaps = metrics.chunk_gap_s(t) if one_each else None
        for metric in METRICS:
            values = metric.compute(t) if gaps is None or metric.name not in GAPS else gaps
            trial.means[metric.name].add(values)
            if not (self.one_each and metric.name == "chunk_gap"):
                self.spreads[metric.name].add(values)

    def _add_bursts(self, good: Table) -> None:
        """Answers whose tokens nearly all came at once."""
        counts = np.diff(good.start)
        rows = np.flatnonzero((good.output_tokens > 8) & (counts > 0))
        at, last = good.start[:-1][rows], counts[rows] - 1
        span = good.chunk_s[at + (0.95 * last).astype(int)] - good.chunk_s[at + (0.05 * last).astype(int)]
        self.long_answers += len(rows)
        self.bursts += int((span < BURST_SPAN * good.chunk_s[at + last]).sum())

    def mean_with_warmup(self, name: str) -> float | None:
        warm, spread = self.with_warmup[name], self.spreads[name]
        n = warm.n + spread.n
        return (warm.total + spread.total) / n if n else None

    def e2e_by_trial_s(self) -> list[float]:
        return [trial.means["e2e"].value for _, trial in sorted(self.trials.items())]

    def row(self) -> dict[str, Any]:
        """All figures of the point (failures counted apart)."""
        row: dict[str, Any] = {
            "requests": self.requests,
            "errors": sum(self.error_classes.values()),
            "error_classes": dict(sorted(self.error_classes.items())),
            "trials": len(self.all_trials),
            "input_tokens": self.counted["input_tokens"].value,
            "output_tokens": self.counted["output_tokens"].value,
            "token_source": sorted(self.sources),
            "cached_tokens": self.counted["cached_tokens"].value,
            "arrivals_per_token": self.arrivals / self.tokens if self.tokens else NAN,
        }
        trials = [trial for _, trial in sorted(self.trials.items())]
        for metric in METRICS:
            spread = self.spreads["itl" if self.one_each and metric.name == "chunk_gap" else metric.name]
            row[f"{metric.name}_s"] = metrics.distribution(spread, [trial.means[metric.name].value for trial in trials])
        rates = [trial.rates() for trial in trials]
        for name in RATES:
            row[name] = stats.mean(np.array([rate[name] for rate in rates]))
        low, high = stats.interval([rate["output_tokens_per_s"] for rate in rates])
        return row | {"output_tokens_per_s_low": low, "output_tokens_per_s_high": high}


def count(tallies: dict[int, Tally], blocks: Blocks, first: Callable[[Table], None] = lambda t: None) -> None:
    """Both passes over a run's blocks, for the points that `tallies` name; `first` sees all blocks of the first."""
    for only, chunks, what in ((PLACE, False, Tally.place), (None, True, Tally.add)):
        for t in blocks(only, chunks):
            for point in np.unique(t.point).tolist():
                if point in tallies:
                    what(tallies[point], t.where(t.point == point))
            if not chunks:
                first(t)


def of_table(t: Table, mode: str, slots: int, asked_input: int | None = None, asked_output: int | None = None) -> Tally:
    """The tally of one point's records that are all in memory."""
    found = Tally(mode, slots, asked_input, asked_output)
    found.place(t)
    found.add(t)
    return found
