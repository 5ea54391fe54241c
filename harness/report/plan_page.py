"""A plan -> one self-contained HTML page, of the report's own pieces.  Pure: the same plan gives the same bytes."""

from __future__ import annotations

import math
from typing import Any

from harness import planning, planning_text, units
from harness.planning import Advice, Plan, Way
from harness.planning_text import label, usd
from harness.report import plan_charts, plan_tables, view
from harness.report.page import document
from harness.report.section import Block, Charts, Parts, Section

STYLES = {"yes": "valid", "only with": "suspect", "cannot tell": "suspect", "no": "invalid"}
GLOSSARY = (
    ("Batch", "Requests that one replica works on together, kept in flight. Set the engine's limit (max_num_seqs) to it."),
    ("Replica", "One copy of the model on tp accelerators that share each of its layers (tensor parallelism)."),
    ("TTFT, ITL, TPOT, E2E", "Time to the first token; between two tokens; per token averaged over an answer; to the last token."),
    ("p95", "95 of 100 requests (of ITL: of gaps between tokens) take no longer."),
    ("90 % interval", "Where nine of ten public measurements lay around such a prediction, kind by kind."),
    ("SLO", "The times that must hold. A way meets them if even the upper ends of its intervals do, and may if its values do."),
    ("What binds", "What the first larger batch would break, and what most of that time is."),
    ("Price", "US dollars for an hour of one accelerator: yours (--price), or the first in the table that somebody can rent at."),
)  # fmt: skip


def render(found: Plan, told: Advice | None, command: str) -> str:
    """The page of a plan; `command` is how to make it again."""
    title = f"Which hardware for {view.shorten(found.model.name, 80)}"
    built = [
        (Section(key, name, form, lambda _: None), content)
        for key, name, form, content in _sections(found, told, command)
    ]
    meta = [
        planning_text.load(found),
        planning_text.objectives(found),
        f"served by {found.framework}",
        "predicted, no server asked",
    ]
    meta[-1] = "predicted and measured" if plan_charts.runs(found) else meta[-1]
    if found.calibration:
        meta.append(f"calibrated on {found.calibration.cells} cells of {found.calibration.hardware}")
    return document(built, title=title, description=planning_text.verdict(found), meta=meta, forms="plan_forms.html.j2", styles=("style.css", "plan.css"),
                    source="from its theory, the tables it carries and the runs named here alone")  # fmt: skip


def _sections(found: Plan, told: Advice | None, command: str) -> list[tuple[str, str, str, Any]]:
    way = found.choice
    measure = Parts(planning_text.measure(found, told), command=planning_text.command_of(told) if told else "")
    return [
        ("verdict", "Verdict", "plan", _verdict(found, told)),
        ("limit", "What limits it", "parts", _limit(found, way)),
        ("cost", "Cost", "charts", _cost(found)),
        ("slo", "Times over the batch", "charts", _times(found)),
        ("throughput", "Throughput", "charts", _throughput(found)),
        *([("measure", "What to measure first", "parts", measure)] if told else []),
        ("ways", "Every way", "parts", Parts(planning_text.lever(found), [plan_tables.every(found)])),
        ("article", "The article's table, and what is right", "parts", _article(found)),
        ("prices", "Prices and hardware", "parts", Parts(tables=[plan_tables.prices(found)], points=_doubts(found))),
        ("method", "How this was worked out", "parts", Parts(points=_method(found))),
        ("repeat", "How to reproduce", "parts", Parts(command=command)),
        ("glossary", "Glossary", "glossary", GLOSSARY),
    ]  # fmt: skip


def _verdict(found: Plan, told: Advice | None) -> dict[str, Any]:
    word = planning_text.VERDICTS[found.verdict]
    if found.verdict == "only with" and found.choice:
        word += f" {found.choice.dtype.upper()}"
    return {
        "style": STYLES[found.verdict], "word": word, "sentence": planning_text.verdict(found),
        "tiles": _tiles(found, found.choice) if found.choice else [], "unfit": planning_text.unfit(found),
        "glance": plan_tables.glance(found), "article": plan_tables.article(),
        "prices": planning_text.prices(found),
        "lines": [line for line in (planning_text.measure(found, told), planning_text.lever(found)) if line],
    }  # fmt: skip


def _tile(name: str, value: str, *small: str) -> dict[str, Any]:
    return {"name": name, "value": value, "small": [line for line in small if line]}


def _tiles(found: Plan, way: Way) -> list[dict[str, Any]]:
    """The four figures of the first screen: hardware, batch, cost, limit."""
    cost = way.usd_per_million
    verb = "Hardware to buy" if found.verdict != "cannot tell" else "Hardware, perhaps"
    flight = (
        f"{units.number(way.in_flight, 3)} in flight at {units.rate(found.load.rate, 'requests')}"
        if found.load.rate
        else ""
    )
    hoped = f"up to {units.count(way.hoped)} if the predicted values hold" if way.hoped > way.batch else ""
    speed = way.tokens_per_s
    return [
        _tile(verb, planning_text.what(way), view.joined(f"{way.dtype} weights", planning_text.split(way)),
              f"{usd(way.hardware.usd_per_h)} an hour each" if way.priced else "price unknown"),
        _tile("Batch", units.count(way.batch), flight, hoped,
              f"{units.count(speed.value)} output tokens/s a replica ({units.interval(speed.low, speed.high, units.count)})"),
        _tile("Cost per million output tokens", usd(cost.value), f"90 % interval {planning_text.span_usd(cost)}" if way.priced else "",
              f"{usd(way.usd_per_month.value)} a month" if way.priced else ""),
        _tile("Binding limit", planning_text.limit(way), planning_text.binding_sentence(way).partition(" binds: ")[2]),
    ]  # fmt: skip


def _limit(found: Plan, way: Way | None) -> Parts:
    shown = way or next((w for w in found.best if w.curve), None)
    if shown is None:
        return Parts("Nothing was predicted.")
    points = []
    for o in found.objectives if shown.curve else ():
        assert shown.curve
        terms = {name: float(v[shown.batch - 1]) for name, v in shown.curve.terms[o.name].items()}
        top = sorted(((name, v) for name, v in terms.items() if v > 0), key=lambda pair: -pair[1])
        whole = sum(v for _, v in top)
        if top and math.isfinite(whole):
            named = " + ".join(f"{name} {units.seconds(v, 3)}" for name, v in top[:4])
            rest = whole - sum(v for _, v in top[:4])
            others = f" + others {units.seconds(rest, 3)}" if rest > 1e-9 * whole else ""
            points.append(f"{label(o.name)} {units.seconds(whole, 3)} = {named}{others}.")
    return Parts(planning_text.binding_sentence(shown), plan_tables.terms(found, shown), points)


def _cost(found: Plan) -> Charts:
    ways = plan_tables.cost_ways(found)
    cheapest = min(ways, key=lambda w: w.usd_per_million.value, default=None)
    finding = (f"Least for {plan_charts.label_of(cheapest)}: {usd(cheapest.usd_per_million.value)} per million output tokens."
               if cheapest else "No way that meets the objectives has a price.")  # fmt: skip
    unknown = [w.hardware.name for w in found.best if not w.priced]
    notices = [f"No price is known of {', '.join(unknown)}: give it with --price {unknown[0]}=…/h."] if unknown else []
    read = ("Hatched: predicted; solid: measured; whiskers: 90 % intervals. Each bar is the best split of that hardware in "
            "that precision, kept busy. What quantized weights do to the quality of answers is not in it.")  # fmt: skip
    block = Block("chart-costs", "Cost of a million output tokens", finding, read, plan_tables.costs(found),
                  plan_charts.costs(found, ways), missing="Without a price there is no cost.")  # fmt: skip
    return Charts([block], tall=True, notices=notices)


_MARKS = "Dashed: predicted, with an open mark at the planned batch. Solid with filled marks: measured. "


def _times(found: Plan) -> Charts:
    blocks = []
    for o in found.objectives:
        kept = ", ".join(f"{w.hardware.name} to batch {units.count(w.batch)}" for w in found.best if w.works)
        finding = f"Kept with the upper ends of the intervals: {kept}." if kept else "No way keeps it."
        read = (_MARKS + "The dotted line is the objective. Percentiles jump where one more prompt of another request falls into "
                "the step of the percentile; beyond its last batch a line's KV cache does not fit.")  # fmt: skip
        blocks.append(Block(f"chart-{o.name}", f"{label(o.name)} over the batch", finding, read,
                            plan_tables.over_batch(found, o.name), plan_charts.over_batch(found, o)))  # fmt: skip
    return Charts(blocks, tall=True, otherwise="Nothing fits.")


def _throughput(found: Plan) -> Charts:
    best = max((w for w in found.best if w.curve), key=lambda w: w.tokens_per_s.value / w.tp, default=None)
    finding = (f"{best.hardware.name} gives most: {units.count(best.tokens_per_s.value / best.tp)} output tokens/s from each "
               f"accelerator at batch {units.count(best.batch)}." if best else "Nothing fits.")  # fmt: skip
    read = _MARKS + "Where a line bends, arithmetic begins to bind; where it ends, memory does."
    user = (_MARKS + "Up and to the right is better: more tokens from the hardware, and faster for each user. Each line runs from "
            "batch 1 (right) to the largest.")  # fmt: skip
    return Charts([
        Block("chart-speed", "Throughput over the batch", finding, read,
              plan_tables.speeds(found, "table-speed", "Output tokens/s at some batches"), plan_charts.speed(found)),
        Block("chart-pareto", "What the hardware gives against what a user sees", "Every step to the left buys throughput with each user's speed.",
              user, plan_tables.speeds(found, "table-pareto", "The same points, as the user sees them"), plan_charts.pareto(found)),
    ], tall=True)  # fmt: skip


def _article(found: Plan) -> Parts:
    lead = ("The table that this project grew from, its claims one by one, and the same table for what was asked here. Times in "
            "the article follow from 46, 23 and 6 ms per token, cut from 46.7, 23.3 and 6.87.")  # fmt: skip
    return Parts(lead, [plan_tables.ledger(), plan_tables.same_for(found)])


def _doubts(found: Plan) -> list[str]:
    """What the rows and the model say of themselves, once each."""
    notes = [note for w in found.ways if w.curve and w.allowed for note in w.curve.found.setup.notes]
    return list(dict.fromkeys(notes))


def _method(found: Plan) -> list[str]:
    return [
        "Each way is a hardware, a precision of the weights and a split (tp); each is predicted at every batch from 1 to the "
        f"largest whose KV cache fits (at most {planning.MOST_SEQUENCES:,}), with that many requests kept in flight.",
        "The planned batch gives the most tokens/s among those at which even the upper ends of the 90 % intervals meet every "
        "objective: about nine of ten public measurements lay within such intervals.",
        "A percentile of ITL is a decoding step lengthened by as many prompts of other requests as fall into it (a Markov chain of "
        "Poisson arrivals); that of TTFT adds a step that already runs and the queue of prompts. Their shape was held against a "
        "simulation event by event; their intervals are those of the means, as no public table has percentiles.",
        f"Costs are of hardware kept busy at the planned batch; a month has {planning.HOURS_A_MONTH:.0f} hours. With a rate they are "
        "of the replicas that it takes, busy or not. Power, network, people and spare replicas are not in them.",
        "fp8 is offered where the hardware has such matrix units; int4 is weight-only (as GPTQ and AWQ have it) and multiplied in "
        "16 bit. Neither is chosen unless asked for with --dtype: what it does to the answers is not predicted.",
        f"Serving overheads are those of {found.framework}, prices as their source states them; see the section above for doubts.",
    ]  # fmt: skip
