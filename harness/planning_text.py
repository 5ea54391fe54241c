"""A plan in words: the same sentences and cells for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from harness import planning, units
from harness.planning import Advice, Objective, Plan, Span, Way
from harness.report.view import limit_word
from harness.theory.hardware import Hardware
from harness.theory.sweep import limit_of

VERDICTS = {"yes": "YES", "only with": "ONLY WITH", "cannot tell": "CANNOT TELL", "no": "NO"}
BINDINGS = {
    "memory": "memory: no further sequence's KV cache fits",
    "sequences": f"the engine's own limit of {planning.MOST_SEQUENCES:,} sequences",
    "throughput": "a larger batch gives no more tokens/s",
    "measured": "no larger batch was measured",
}


def usd(value: float | None, digits: int = 3) -> str:
    """As `units.usd`; "price unknown" where there is none."""
    return units.usd(value, digits, "price unknown")


def span_usd(span: Span) -> str:
    return units.interval(span.low, span.high, usd)


def label(name: str) -> str:
    """ "ITL p95" for itl_p95."""
    metric, _, statistic = name.partition("_")
    return f"{metric.upper()} {statistic}"


def objectives(found: Plan) -> str:
    return ", ".join(f"{label(o.name)} ≤ {units.seconds(o.bound_s)}" for o in found.objectives)


def load(found: Plan) -> str:
    asked = found.load
    rate = f", {units.rate(asked.rate, 'requests')}" if asked.rate is not None else ""
    return f"{units.count(asked.input_tokens)} tokens in, {units.count(asked.output_tokens)} out{rate}"


def what(way: Way) -> str:
    """ "2 × H100-SXM-80GB" as one buys them, with how they share the work."""
    return f"{way.gpus} × {way.hardware.name}"


def split(way: Way) -> str:
    """How the accelerators share the work; empty for one alone."""
    replicas = int(way.replicas.value) if math.isfinite(way.replicas.value) else 1
    parts = [f"{replicas} replicas"] if replicas > 1 else []
    return " of ".join([*parts, *([f"tp {way.tp}"] if way.tp > 1 else [])])


def bits(dtype: str) -> str:
    return f"16 bit ({dtype})" if dtype in ("bf16", "fp16") else dtype


def binds(way: Way) -> str:
    """What allows no larger batch, and what that is made of."""
    if way.binding in BINDINGS:
        return BINDINGS[way.binding]
    return f"{label(way.binding)}" if way.binding else ""


def limit(way: Way) -> str:
    word = limit_word(way.limit) if way.limit else binds(way)
    return word[:1].upper() + word[1:]


def limit_and_binds(way: Way) -> str:
    """ "Compute: ITL p95"; of a measured way only what stopped it, its cause is not known."""
    told = f"{limit(way)}: {binds(way)}" if way.limit else limit(way)
    return f"may meet; {told}" if way.state == "may meet" else told


def largest_term(way: Way) -> str:
    """What most of the binding time is at the first batch that breaks it: "other requests' prefills"."""
    if way.curve is None or way.binding not in way.curve.terms:
        return ""
    beyond = min(way.batch if way.state != "misses" else 0, len(way.curve.batch) - 1)
    terms = {name: float(v[beyond]) for name, v in way.curve.terms[way.binding].items()}
    kind = limit_of(terms)
    alike = {name: v for name, v in terms.items() if limit_of({name: 1.0}) == kind}
    name = max(alike, key=lambda n: alike[n]).removeprefix("prefill ").removeprefix("decode ")
    return {"prefills of others": "other requests' prompts", "matmul": "matrix work", "weights": "reading the weights",
            "kv cache": "reading the KV cache", "host": "the host"}.get(name, name)  # fmt: skip


def binding_sentence(way: Way) -> str:
    """Why no larger batch: "Compute binds: at batch 393 other requests' prompts bring ITL p95 to 50.2 ms at worst"."""
    if way.curve is None or way.binding in BINDINGS or not way.binding:
        reason = binds(way)
        return f"{limit(way)} binds: {reason}." if way.curve else (f"{reason} binds." if reason else "")
    if way.state == "misses":
        was = way.curve.time(way.binding, 0)
        return f"{limit(way)} binds: even alone {label(way.binding)} is {units.seconds(was.value, 3)}, {largest_term(way)} first of all."
    beyond = min(way.batch, len(way.curve.batch) - 1)
    was = way.curve.time(way.binding, beyond)
    worst = was.high if way.state == "meets" else was.value
    told = ", at the upper end of its interval," if way.state == "meets" else ""
    return (
        f"{limit(way)} binds: at batch {beyond + 1} {label(way.binding)} would{told} be {units.seconds(worst, 3)}, most of it "
        f"{largest_term(way)}."
    )


def verdict(found: Plan) -> str:
    """The answer in a sentence or two."""
    name, way = found.model.name, found.choice
    if way is None:
        nearest = min((w for w in found.best if w.times), key=_miss(found.objectives), default=None)
        told = f" The nearest is {what(nearest)}: {_missed(nearest, found.objectives)}." if nearest else ""
        return f"None of this hardware serves {name} within {objectives(found)}.{told}"
    cost = f"{usd(way.usd_per_million.value)} per million output tokens"
    cost = cost if way.priced else "its price is not known, so neither is the cost"
    verb = "Buy" if found.verdict != "cannot tell" else "Perhaps"
    batch = f"batch {units.count(way.batch)}"
    if found.load.rate is not None:
        batch = f"{units.number(way.in_flight, 3)} in flight each (room for {units.count(way.batch)})"
    parts = ", ".join(part for part in (split(way), way.dtype, batch) if part)
    sentence = f"{verb} {what(way)} ({parts}): {cost}"
    sentence += f", {usd(way.usd_per_month.value)} a month." if way.priced else "."
    if found.verdict == "cannot tell":
        sentence += (
            " Only the predicted values meet the objectives, not the upper ends of their intervals: measure first."
        )
    if found.verdict == "only with":
        sentence = f"In the precision asked for nothing meets {objectives(found)}. {sentence}"
    return sentence


def _miss(wanted: Sequence[Objective]) -> Any:
    return lambda way: max(way.times[o.name].value / o.bound_s for o in wanted)


def _missed(way: Way, wanted: Sequence[Objective]) -> str:
    assert way.times is not None
    over = [o for o in wanted if way.times[o.name].value > o.bound_s]
    return ", ".join(f"{label(o.name)} is {units.seconds(way.times[o.name].value, 3)}" for o in over) or "in doubt"


def lever(found: Plan) -> str:
    """What narrower weights would bring; empty where they bring nothing."""
    way = found.lever
    if way is None:
        return ""
    cost = (
        f"{usd(way.usd_per_million.value)} per million"
        if way.priced
        else f"{units.count(way.tokens_per_s.value)} tokens/s"
    )
    return (
        f"With {way.dtype} weights: {what(way)} at batch {units.count(way.batch)}, {cost}; whether the answers stay good "
        "enough is for your own tests to say."
    )


def unfit(found: Plan) -> list[str]:
    """What does not fit into one accelerator in the precisions asked for, and why."""
    return [f"{found.model.name} at {bits(way.dtype)} does not fit one {way.hardware.name}: {way.reason}."
            for way in found.ways if way.allowed and way.tp == 1 and way.state == planning.STATES[3]]  # fmt: skip


def state(found: Plan, way: Way) -> str:
    """A way's state in words, with what it would take."""
    if way.state == "misses" and way.times:
        return f"misses: {_missed(way, found.objectives)}"
    if way.state in planning.STATES[3:]:
        return f"{way.state}: {way.reason}"
    return way.state


def cost(found: Plan, way: Way) -> tuple[str, str]:
    """(cost of a million output tokens, its interval); without a price, below which price it would be the cheapest."""
    if not way.works:
        return "–", ""
    if way.priced:
        interval = span_usd(way.usd_per_million)
        return usd(way.usd_per_million.value), f"95 %: {interval}" if way.run and interval else interval
    if found.choice and found.choice.priced and found.choice is not way:
        below = planning.break_even_usd_per_h(way, found.choice, found.load)
        return "price unknown", f"best < {usd(below, 2)}/h"
    return "price unknown", ""


def measure(found: Plan, told: Advice | None) -> str:
    """Which single measurement would make the answer surer."""
    if told is None:
        return ""
    way, point = told.way, told.point
    where = "" if way is found.choice else " (not the choice above, but the one that might yet beat it)"
    what_time = {"ttft_s": "TTFT", "itl_s": "ITL", "e2e_s": "end-to-end time"}[told.metric]
    now, then = (_doubt(v) for v in (point.doubt, point.doubt_after))
    gain = (
        f"that is worth {units.percent(told.saves, 2)} of the cost"
        if told.saves > planning.WORTH
        else "the choice itself would stay: no other hardware comes near enough"
    )
    lengths = (point.input_tokens, point.output_tokens)
    asked = (found.load.input_tokens, found.load.output_tokens)
    other = "" if lengths == asked else f" with {units.count(lengths[0])} tokens in and {units.count(lengths[1])} out"
    same = found.calibration and found.calibration.closeness(found.model, way.hardware) == "same"
    since = "as calibrated" if same else "from one server to another"
    return (
        f"Measure {way.tp} × {way.hardware.name}{where} at batch {units.count(point.batch)}{other} in {way.dtype}: {since} its "
        f"{what_time} differs by {now} (90 %), after that measurement by {then}; {gain}."
    )


def _doubt(spread: float) -> str:
    """90 % of a logarithm's spread, in words."""
    most = math.expm1(1.645 * spread)
    if most < 1:
        return f"±{units.percent(most, 2)}"
    return f"up to {units.ratio(1 + most, 2)} either way" if most < 9 else "more than 10× either way"


def command_of(told: Advice) -> str:
    """How to make that measurement and use it."""
    way, asked = told.way, told.point
    return (
        f"ridgeline run --url http://SERVER:8000 --hardware {way.hardware.name} --mode closed --batch-sizes "
        f"{told.point.batch} --input-tokens {asked.input_tokens} --output-tokens {asked.output_tokens}\n"
        "ridgeline calibrate results/RUN -o mine.json    # then: ridgeline plan … --calibration mine.json"
    )


def prices(found: Plan) -> str:
    """What an hour costs, in a line."""
    rows = {way.hardware.name: way.hardware for way in found.ways}
    known = [f"{name} {usd(row.usd_per_h)}" for name, row in rows.items() if math.isfinite(row.usd_per_h)]
    unknown = [
        f"{name} not known (--price {name}=…/h)" for name, row in rows.items() if not math.isfinite(row.usd_per_h)
    ]
    return f"Price of an hour of one: {', '.join([*known, *unknown])}. Sources and dates below."


def price(row: Hardware) -> str:
    source = row.price_source
    if source.endswith(", unknown"):
        source = source.removesuffix("unknown") + "date unknown"
    return source or ("given" if math.isfinite(row.usd_per_h) else "none known: give --price")


def text(found: Plan, told: Advice | None, page: str) -> str:
    """What the terminal shows."""
    names = [o.name for o in found.objectives]
    head = f"{'hardware':<22} {'weights':>7} {'batch':>6} " + "".join(f"{label(n):>10} " for n in names)
    head += f"{'tokens/s':>9} {'$/M output':>11} {'90 %':>17} {'$/month':>9}  "
    lines = [f"{found.model.name}, {load(found)}; {objectives(found)}", f"{VERDICTS[found.verdict]}: {verdict(found)}"]
    lines += [binding_sentence(found.choice)] if found.choice else []
    lines += ["", head + "binds"]
    lines += [_line(found, way) for way in (*found.best, *(w for w in found.ways if w.run))]
    lines += ["", *unfit(found), *filter(None, [lever(found), measure(found, told)])]
    return "\n".join([*lines, f"report: {page}"])


def _line(found: Plan, way: Way) -> str:
    name = f"{way.tp} × {way.hardware.name}" + (" measured" if way.run else "")
    if way.times is None:
        return f"{name:<22} {way.dtype:>7} {state(found, way)}"
    value, interval = cost(found, way)
    times = "".join(f"{units.seconds(way.times[o.name].value, 3):>10} " for o in found.objectives)
    month = usd(way.usd_per_month.value) if way.priced and way.works else "–"
    told = limit_and_binds(way) if way.works else state(found, way)
    return (
        f"{name:<22} {way.dtype:>7} {way.batch:>6} {times}{units.number(way.tokens_per_s.value, 3):>9} {value:>11} "
        f"{interval.replace('$', ''):>17} {month:>9}  {told}"
    )
