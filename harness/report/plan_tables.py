"""A plan -> tables of text."""

from __future__ import annotations

import math

from harness import planning, planning_text, units
from harness.planning import Plan, Way
from harness.planning_text import label, usd
from harness.report import plan_charts, view
from harness.report.tables import Cell, Row, Table, column, figure, heading
from harness.theory import catalogue, hardware, seeds
from harness.theory import ledger as book
from harness.theory.sweep import sweep

ARTICLE = "Baseten's article (seed 003): Llama 2 7B, 350 in, 150 out, one request at a time"
SPEED_UP = {"T4": "–", "A10": "~2×", "A100-SXM-80GB": "~7.5×"}  # as the article prints them, against its T4
COST = {"T4": "–", "A10": "~2×", "A100-SXM-80GB": "~10×"}
UTILISATION = (0.25, 0.5, 0.75, 1.0)


def _state(way: Way) -> Cell:
    style = {"meets": "valid", "may meet": "suspect"}.get(way.state, "invalid")
    glyph = {"valid": "✓", "suspect": "▲", "invalid": "✕"}[style]
    return Cell(f"{glyph} {way.state}", style=style)


def _alone(found: Plan, way: Way) -> Cell:
    """What one accelerator alone does in the same precision."""
    same = (
        w for w in found.ways if w.hardware is way.hardware and w.tp == 1 and w.dtype == way.dtype and w.run is None
    )
    alone = next(same, None)
    if alone is None:
        return Cell("–")
    return Cell(alone.state, style="" if alone.works else "invalid", title=alone.reason)


def _times(found: Plan, way: Way, brief: bool) -> Row:
    if way.times is None:
        return [Cell("–") for _ in found.objectives]
    spans = [way.times[o.name] for o in found.objectives]
    return [Cell(units.seconds(s.value, 3), "" if brief else units.interval(s.low, s.high, _s3)) for s in spans]


def _s3(value: float | None) -> str:
    return units.seconds(value, 3)


def _row(found: Plan, way: Way, brief: bool) -> Row:
    value, interval = planning_text.cost(found, way)
    name = planning_text.what(way) + (f" measured: {way.run.name}" if way.run else "")
    bought = way is found.choice and found.verdict != "cannot tell"
    name += " ◀ buy" if brief and bought else ""
    weights = way.dtype if brief and way.gpus == way.tp else view.joined(way.dtype, planning_text.split(way))
    row = [heading(name), Cell(weights), *([_alone(found, way)] if brief else [_state(way)])]
    if way.times is None:
        return [*row, Cell(way.reason, style="wrap left", span=5 + len(found.objectives))]
    speed, works = way.tokens_per_s, way.works
    told = planning_text.limit_and_binds(way) if works else planning_text.state(found, way)
    return [*row, Cell(units.count(way.batch)), *_times(found, way, brief),
            Cell(units.count(speed.value), "" if brief else units.interval(speed.low, speed.high, units.count)),
            Cell(value, style="" if way.priced else "missing"), Cell(interval), Cell(told, style="left" if works else "left invalid")]  # fmt: skip


def _head(found: Plan, brief: bool) -> Row:
    return [column("Hardware"), column("Weights"), column("One alone") if brief else column("SLO"), column("Batch"),
            *(column(f"{label(o.name)}") for o in found.objectives), column("Tokens/s"), column("$/M output"),
            column("90 %"), column("What binds", style="left")]  # fmt: skip


def glance(found: Plan) -> Table:
    """The best way of each hardware, and what was measured."""
    ways = [*found.best, *plan_charts.runs(found)]
    caption = "The best way with each hardware at the batch planned for it; predicted unless it says measured"
    return Table("table-glance", caption, [_head(found, True)], [_row(found, way, True) for way in ways])


def every(found: Plan) -> Table:
    """Every way that was looked at."""
    order = sorted(found.ways, key=lambda w: (w.hardware.name, not w.allowed, w.dtype, w.tp))
    return Table("table-ways", "Every precision and split that was looked at, with 90 % intervals", [_head(found, False)],
                 [_row(found, w, False) for w in order])  # fmt: skip


def costs(found: Plan) -> Table:
    """What a million tokens cost over how busy the accelerators are."""
    head = [column("Way"), column("Price of an hour"), *(column(f"{units.percent(u)} busy") for u in UTILISATION),
            column("Input and output", small="per million, busy"), column("A month"), column("Price's source", style="left")]  # fmt: skip
    body = []
    for way in sorted(cost_ways(found), key=lambda w: w.usd_per_million.value):
        both = found.load.output_tokens / (found.load.input_tokens + found.load.output_tokens)
        cells = [Cell(usd(planning.at_utilisation(way, u))) for u in UTILISATION]
        body.append([heading(plan_charts.label_of(way), planning_text.span_usd(way.usd_per_million)),
                     Cell(usd(way.hardware.usd_per_h * way.tp)), *cells,
                     Cell(usd(planning.at_utilisation(way, 1.0) * both)), Cell(usd(way.usd_per_month.value)),
                     Cell(planning_text.price(way.hardware), style="wrap left")])  # fmt: skip
    return Table("table-costs", "US dollars per million output tokens, by how busy the accelerators are", [head], body)


def cost_ways(found: Plan) -> list[Way]:
    """The best way of each hardware and precision that works and has a price, and what was measured."""
    kinds = dict.fromkeys((w.hardware.name, w.dtype) for w in found.ways if w.run is None)
    best = [
        planning.pick([w for w in found.ways if w.run is None and (w.hardware.name, w.dtype) == kind]) for kind in kinds
    ]
    return [w for w in (*best, *plan_charts.runs(found)) if w and w.works and w.priced]


def over_batch(found: Plan, name: str) -> Table:
    """A percentile at some batches, a column for each line of the chart."""
    ways = plan_charts.lines(found)
    most = max((len(w.curve.batch) for w in ways if w.curve), default=1)
    batches = sorted({2**k for k in range(11) if 2**k <= most} | {w.batch for w in ways})
    body = [[heading(units.count(b)), *(_at(w, name, b) for w in ways)] for b in batches]
    return Table(f"table-{name}", f"{label(name)} over the batch in flight, with 90 % intervals",
                 [[column("Batch"), *(column(plan_charts.name_of(w)) for w in ways)]], body)  # fmt: skip


def _at(way: Way, name: str, batch: int) -> Cell:
    if way.curve is None or batch > len(way.curve.batch):
        return Cell(
            "does not fit" if way.curve and len(way.curve.batch) < planning.MOST_SEQUENCES else "–", style="missing"
        )
    span = way.curve.time(name, batch - 1)
    return figure(units.seconds(span.value, 3), units.interval(span.low, span.high, _s3))


def speeds(found: Plan, name: str, caption: str) -> Table:
    """Tokens per second of an accelerator and of a user at some batches."""
    head = [
        column("Way"),
        column("Batch"),
        column("Output tokens/s", small="per accelerator"),
        column("Tokens/s of a user", small="1 / ITL"),
    ]
    body = []
    for way in plan_charts.lines(found):
        assert way.curve is not None
        for k in sorted({2**n - 1 for n in range(11) if 2**n <= len(way.curve.batch)} | {way.batch - 1}):
            span, itl = way.curve.at(k).times(1 / way.tp), float(way.curve.found.columns["itl_s"].value[k])
            body.append([heading(plan_charts.name_of(way)), Cell(f"{k + 1}" + (" planned" if k + 1 == way.batch else "")),
                         Cell(units.number(span.value, 3), units.interval(span.low, span.high, lambda v: units.number(v, 3))),
                         figure(units.number(1 / itl, 3) if itl > 0 else units.MISSING)])  # fmt: skip
    for way in plan_charts.runs(found):
        assert way.run is not None
        body += [[heading(f"{way.run.name} (measured)"), Cell(units.number(p.batch, 3)),
                  Cell(units.number(p.tokens_per_s.value / way.tp, 3), p.verdict), Cell("–")] for p in way.run.points]  # fmt: skip
    return Table(name, caption, [head], body)


def terms(found: Plan, way: Way) -> list[Table]:
    """What each objective's time is made of at the planned batch."""
    if way.curve is None:
        return []
    made = []
    for o in found.objectives:
        at = {name: float(v[way.batch - 1]) for name, v in way.curve.terms[o.name].items()}
        whole = sum(at.values())
        if not whole > 0:
            continue
        rows = [[heading(name), Cell(units.seconds(v, 3)), Cell(units.percent(v / whole, 2))]
                for name, v in sorted(at.items(), key=lambda pair: -pair[1]) if v > 0]  # fmt: skip
        rows.append(
            [heading("together"), Cell(units.seconds(whole, 3)), Cell(f"of {units.seconds(o.bound_s)} allowed")]
        )
        caption = f"{label(o.name)} of {plan_charts.name_of(way)} at batch {units.count(way.batch)}"
        made.append(Table(f"table-terms-{o.name}", caption, [[column("Term"), column("Time"), column("Share")]], rows))
    return made


# --- the article ------------------------------------------------------------------------------------------------------


def article() -> Table:
    """The seed's table of time, price and speed-up per GPU, with what is right and what the refined model says."""
    rows = {row.claim: row for row in book.ledger() if row.article == "003"}
    times = {gpu: rows[f"350 in and 150 out on {gpu}"] for gpu in seeds.GPUS}
    costs = {gpu: rows[f"cost of that request on {gpu}"].corrected for gpu in seeds.GPUS}
    body = []
    for gpu, row in seeds.GPUS.items():
        low, value, high = _refined(gpu)
        body.append([
            heading(gpu),
            Cell(f"{times[gpu].seed:.2f} s → {times[gpu].corrected:.2f} s"),
            Cell(f"{value:.2f} s ({low:.2f} – {high:.2f})" if value > 0 else "does not fit at 90 % of memory"),
            Cell(f"${row.usd_per_min:.5f}/min"),
            _was(SPEED_UP[gpu], units.ratio(times["T4"].corrected / times[gpu].corrected)),
            _was(COST[gpu], units.ratio(costs[gpu] / costs["T4"])),
            Cell(f"${units.number(costs[gpu], 3)}"),
        ])  # fmt: skip
    head = [column("GPU"), column("Inference time"), column("Refined model (90 %)"), column("List price"),
            column("Speed-up vs T4"), column("Cost vs T4"), column("A request costs")]  # fmt: skip
    return Table("table-article", f"{ARTICLE}. Its figure → the corrected one", [head], body)


def _was(seed: str, corrected: str) -> Cell:
    return Cell(corrected if seed == "–" else f"{seed} → {corrected}")


def _refined(gpu: str) -> tuple[float, float, float]:
    found = sweep(catalogue.find("Llama-2-7b-hf"), hardware.find(gpu), batch=1, input_tokens=seeds.PROMPT_TOKENS,
                  output_tokens=seeds.COMPLETION_TOKENS, mode="wave")  # fmt: skip
    column = found.columns["e2e_s"]
    return float(column.low[0]), float(column.value[0]), float(column.high[0])


def same_for(found: Plan) -> Table:
    """The article's table for the model and hardware asked for: one request at a time, its arithmetic and ours."""
    head = [column("Hardware"), column("Article's arithmetic"), column("Refined model", small="90 % interval"),
            column("Price of an hour"), column("Speed-up", small="refined, vs the first"), column("A request", small="refined, alone")]  # fmt: skip
    body, first = [], math.nan
    for way in found.best:
        row, tp = way.hardware, way.tp
        if way.curve is None:
            body.append([heading(f"{tp} × {row.name}"), Cell(way.reason, style="wrap left", span=5)])
            continue
        s, e2e = way.curve.found.setup, way.curve.found.columns["e2e_s"]
        value, low, high = (float(v[0]) for v in (e2e.value, e2e.low, e2e.high))
        first = value if math.isnan(first) else first
        plain = seeds.generation_s(
            seeds.prefill_s(found.model.params, found.load.input_tokens, s.flops * tp),
            seeds.time_per_token_s(found.model.weight_bytes(s.dtype), row.bytes_per_s * tp), found.load.output_tokens)  # fmt: skip
        body.append([heading(f"{tp} × {row.name}", way.dtype), Cell(units.seconds(plain, 3)),
                     Cell(units.seconds(value, 3), units.interval(low, high, _s3)),
                     Cell(usd(row.usd_per_h * tp)), Cell(units.ratio(first / value)),
                     Cell(usd(seeds.request_usd(value, row.usd_per_h * tp / 60)))])  # fmt: skip
    return Table("table-same", f"The same table for {found.model.name}, {planning_text.load(found)}: one request at a time",
                 [head], body)  # fmt: skip


def _amount(value: float, unit: str) -> str:
    show = {"s": units.seconds, "B": units.size, "FLOP/s": units.flops, "x": units.ratio}.get(unit)
    if math.isnan(value):
        return "–"
    return show(value) if show else f"{units.number(value)} {unit}"


def ledger() -> Table:
    """What the articles say and what is right."""
    body = [[Cell(row.claim, style="wrap left", scope="row"), Cell(_amount(row.seed, row.unit)),
             Cell(_amount(row.corrected, row.unit)), Cell(row.verdict), Cell(row.why, style="wrap left")]
            for row in book.ledger() if row.article == "003"]  # fmt: skip
    head = [column("Claim", style="left"), column("Article"), column("Corrected"), column("Verdict"),
            column("Why", style="left")]  # fmt: skip
    return Table("table-ledger", "Ledger of that article: its values, the corrected ones, and why", [head], body)


def prices(found: Plan) -> Table:
    """Rows of hardware with their source, all known prices and what is doubtful."""
    body = []
    rows = dict.fromkeys([*(w.hardware.name for w in found.best), *(w.hardware.name for w in plan_charts.runs(found))])
    for name in rows:
        row = next(w.hardware for w in found.ways if w.hardware.name == name)
        others = "; ".join(f"{usd(p.usd_per_h)}/h {p.kind}, {p.source}, {p.date}" for p in hardware.prices(name))
        body.append([heading(name, units.size(row.mem_bytes)), Cell(usd(row.usd_per_h), planning_text.price(row), "wrap"),
                     Cell(others or "none", style="wrap left"), Cell(row.source or "–", "; ".join(row.caveats), "wrap left")])  # fmt: skip
    head = [column("Hardware"), column("An hour", small="as taken here"), column("Prices with a source", style="left"),
            column("Row's source and doubts", style="left")]  # fmt: skip
    return Table("table-prices", "Hardware and prices", [head], body)
