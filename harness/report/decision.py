"""Is this hardware right for this load?  A run's points held against its objectives, and what they cost.

All from the summary: the page, the Markdown and report.json say the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from harness import units
from harness.prices import per_million
from harness.records import NAN, RATES
from harness.report import view
from harness.report.view import Json, Key, RunView

YES, NO, ONLY, CANNOT = "yes", "no", "only with", "cannot tell"
GLYPHS = {YES: "✓", NO: "✕", ONLY: "◐", CANNOT: "?"}
MEETS, MISSES, UNSURE = "meets", "misses", "unsure"
NO_SLO = "no objective was stated; give one by --slo ttft_p95=500ms,itl_p95=50ms, or as `slo` in the scenario"
NO_PRICE = "no price is known for this hardware; give --price 1.2/h, or `price` in the scenario"
OVER = "more arrivals than completions: its latencies grow for as long as one looks"


@dataclass(frozen=True, slots=True)
class Check:
    """One objective at one point: the value in SI units, NaN where it was not measured."""

    metric: str
    bound: float
    value: float
    status: str
    why: str = ""

    @property
    def text(self) -> str:
        """ "TTFT p95 612 ms, more than 500 ms"."""
        name = metric_name(self.metric)
        if self.status == UNSURE:
            return f"{name}: {self.why}"
        if self.why:
            return self.why
        worse = "less" if self.metric in RATES else "more"
        said = f"{worse} than" if self.status == MISSES else "within"
        digits = next((d for d in (3, 4, 5) if show(self.metric, self.value, d) != show(self.metric, self.bound, d)), 6)
        return f"{name} {show(self.metric, self.value, digits)}, {said} {show(self.metric, self.bound, digits)}"


@dataclass(frozen=True, slots=True)
class Held:
    """A point and how it stands to the objectives."""

    key: Key
    point: Json
    checks: tuple[Check, ...]
    status: str


@dataclass(frozen=True, slots=True)
class Decision:
    """`word` is the answer; `reason` the rest of its sentence; `chosen` the point whose figures stand on the card: the
    largest load that meets the objectives, or else the one with most output."""

    word: str
    reason: str
    chosen: tuple[Key, Json] | None
    meets: bool
    held: tuple[Held, ...]

    @property
    def sentence(self) -> str:
        """ "Only with at most batch 16: …"."""
        return self.word[:1].upper() + self.word[1:] + (" " if self.word == ONLY else ": ") + self.reason + "."


def metric_name(metric: str) -> str:
    """ "TTFT p95" of ttft_p95."""
    if metric in RATES:
        return metric.removesuffix("_per_s").replace("_", " ") + "/s"
    family, _, which = metric.rpartition("_")
    return f"{family.upper().replace('_SCHEDULED', ' as scheduled')} {which}"


def show(metric: str, value: float, digits: int = 3) -> str:
    return units.number(value, digits) if metric in RATES else units.seconds(value, digits)


def objective(run: RunView) -> str:
    """ "TTFT p95 ≤ 500 ms and ITL p95 ≤ 50 ms"; empty where none is stated."""
    parts = []
    for limit in view.items(run.summary, "worth", "limits"):
        metric, at = view.text(limit, "metric"), view.text(limit, "point")
        sign = "≥" if metric in RATES else "≤"
        parts.append(
            f"{metric_name(metric)} {sign} {show(metric, view.num(limit, 'bound'))}" + (f" at {at}" if at else "")
        )
    return ", ".join(parts[:-1]) + (" and " if parts[:-1] else "") + parts[-1] if parts else ""


def _label(point: Json) -> str:
    """As the objectives name a point (see baseline.label_of): b8, r2.5."""
    batch, rate = view.num(point, "batch_size"), view.num(point, "rate")
    if view.text(point, "label"):
        return view.text(point, "label")
    return f"b{batch:g}" if math.isfinite(batch) else f"r{rate:g}"


def _check(point: Json, metric: str, bound: float) -> Check:
    if metric in RATES:
        value = view.num(point, metric)
        if not math.isfinite(value):
            return Check(metric, bound, value, UNSURE, "not measured")
        return Check(metric, bound, value, MEETS if value >= bound else MISSES)
    family, _, which = metric.rpartition("_")
    value, n = view.num(point, f"{family}_s", which), view.num(point, f"{family}_s", "n")
    needed = view.SAMPLES_NEEDED.get(which, 1)
    if not math.isfinite(value):
        return Check(metric, bound, value, UNSURE, "not measured")
    if not n >= needed and not view.num(point, f"{family}_s", "p50") > bound:
        return Check(metric, bound, value, UNSURE, f"{units.count(n)} samples cannot show it, {needed} are needed")
    return Check(metric, bound, value, MEETS if value <= bound else MISSES)


def held(run: RunView) -> list[Held]:
    """Each point against the objectives, the smallest load first; an invalid point shows nothing."""
    limits = [
        (view.text(x, "metric"), view.num(x, "bound"), view.text(x, "point"))
        for x in view.items(run.summary, "worth", "limits")
    ]
    found = []
    for key, point in view.keyed(run).items():
        checks = tuple(_check(point, metric, bound) for metric, bound, at in limits if at in ("", _label(point)))
        if view.child(point, "objective").get("saturated") is True:  # latencies of a backlog that only grows
            checks += (Check("requests_per_s", NAN, view.num(point, "requests_per_s"), MISSES, OVER),)
        judged = view.verdict_of(point) != "invalid" and checks
        status = next(s for s in (MISSES, UNSURE, MEETS) if s in {c.status for c in checks}) if judged else UNSURE
        found.append(Held(key, point, checks, status))
    return found


def decide(run: RunView) -> Decision:
    """The answer, with its reason."""
    rows, goal = held(run), objective(run)
    most = view.best(run, "output_tokens_per_s", highest=True)
    if not goal:
        return Decision(CANNOT, NO_SLO, most, False, tuple(rows))
    judged = [row for row in rows if row.checks]
    good = [row for row in judged if row.status == MEETS]
    if good:
        return _met(judged, good, goal, tuple(rows))
    if judged and judged[0].status == MISSES:
        return Decision(NO, f"even {_has(judged[0])}", most, False, tuple(rows))
    if not judged:
        return Decision(CANNOT, f"nothing was measured to hold against {goal}", most, False, tuple(rows))
    why = "; ".join(dict.fromkeys(check.text for row in judged for check in row.checks if check.status == UNSURE))
    if all(view.verdict_of(row.point) == "invalid" for row in judged):
        why = "no point is valid"
    return Decision(CANNOT, f"no load was shown to meet {goal} ({why or 'see the findings'})", most, False, tuple(rows))


def _met(judged: list[Held], good: list[Held], goal: str, rows: tuple[Held, ...]) -> Decision:
    """At least one load meets the objectives."""
    top, least = good[-1], good[0]
    where, chosen = view.key_label(top.key, full=True), (top.key, top.point)
    below = [row for row in judged if row.status == MISSES and row.key < least.key]
    beyond = [row for row in judged if row.status == MISSES and row.key > least.key]
    if not below and not beyond:
        more = "the largest measured" if top is judged[-1] else "the largest that could be judged"
        return Decision(YES, f"every load up to {where}, {more}, meets {goal}", chosen, True, rows)
    span = where if least is top else f"{view.key_label(least.key, full=True)} to {where}"
    what = span if below else f"at most {where}"
    return Decision(ONLY, f"{what}: {_has(beyond[0] if beyond else below[-1])}", chosen, True, rows)


def _has(row: Held) -> str:
    """ "batch 32 has ITL p50 10.2 ms, more than 8 ms"."""
    why = "; ".join(check.text for check in row.checks if check.status == MISSES)
    return f"{view.key_label(row.key, full=True)} has {why}"


# --- what it costs, and how much of the roof it reaches -----------------------------------------------------------


def price(run: RunView) -> tuple[float, int, str]:
    """(US dollars for an hour of one accelerator, accelerators, where the price is from); NaN where none is known."""
    worth = view.child(run.summary, "worth")
    many = view.num(worth, "accelerators")
    return view.num(worth, "usd_per_h"), int(many) if many >= 1 else 1, view.text(worth, "price_source")


def usd_per_million(run: RunView, point: Json, key: str = "output_tokens_per_s") -> float:
    """US dollars for a million tokens at this point, busy all the time; NaN without a price."""
    usd_per_h, many, _ = price(run)
    return per_million(usd_per_h, many, view.num(point, key))


def roof_share(run: RunView, point: Json) -> float:
    """Output tokens/s as a share of what physics allows at this point (its strict bound, else the plane's roof)."""
    was = view.num(point, "output_tokens_per_s")
    bound = view.num(point, "predicted", "output_tokens_per_s", "bound")
    roof = bound if bound > 0 else view.roof_at(view.child(run.summary, "plane"), view.batch_of(point))
    return was / roof if roof > 0 else NAN
