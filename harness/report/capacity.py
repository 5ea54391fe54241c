"""Capacity under the objectives, throughput against speed for each user, and what a million tokens costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness import units
from harness.prices import per_million
from harness.records import NAN
from harness.report import charts, decision, view
from harness.report.section import Block, Charts
from harness.report.tables import Cell, Table, column, figure, heading, plain, run_cell, run_column, stamp
from harness.report.view import HEADLINES, SAMPLES_NEEDED, Json, Key, RunView, Shown

QUANTILES = (("p50", "dot"), ("p95", "dash"), ("p99", "solid"))
READ = (
    "Each line is a percentile of all requests (ITL: of all gaps between tokens) at each load asked: dotted the median, dashed "
    "p95, solid p99. The level line of long dashes is the objective. Percentiles that so few samples cannot show are left out of the lines, and marked † in the table."
)
READ_GOODPUT = (
    "Solid: requests per second that were answered. Dashed: goodput, those of them that met every objective that one "
    "request can meet (TTFT, mean time between its tokens, end to end). Where the two part, more load only makes late answers."
)
READ_PARETO = (
    "Each point is one load: to the right each user gets tokens faster (one over the mean ITL), upwards the hardware gives "
    "more in all. The steps join the measured loads that no other beats in both; nothing between points was measured. "
    "Hollow points are predictions."
)
READ_COST = (
    "What a million output tokens costs if the accelerators are busy only a share of the time they are paid for: price by "
    "the hour, over throughput at this load, over utilisation. Input tokens are not charged apart: their time is in it."
)
SHARES = (0.25, 0.5, 0.75, 1.0)


def section(runs: Sequence[RunView]) -> Charts:
    """Latency over load with the objectives, and goodput."""
    if not any(view.points(run) for run in runs):
        return Charts([], otherwise="No point was measured.")
    blocks = [_latency(runs, shown) for shown in HEADLINES[:2]]
    return Charts([*blocks, _goodput(runs)], legend=charts.legend(runs), marks="long red dashes: objectives")


def _loads(runs: Sequence[RunView], keys: Sequence[Key]) -> Json:
    """The axis of the loads; those of a single run with the sign of a point that is not valid."""
    marked = [view.marked(key, point) for _, _, key, point in view.rows(runs)]
    labels = marked if len(runs) == 1 else [view.key_label(key) for key in keys]
    return charts.axis(view.load_word(runs), tickvals=list(range(len(keys))), ticktext=labels, zeroline=False)


def _bound(run: RunView, key: str) -> list[tuple[str, float]]:
    """(which percentile, bound) of the objectives for one time."""
    limits = [(view.text(x, "metric"), view.num(x, "bound")) for x in view.items(run.summary, "worth", "limits")]
    return [(metric.rpartition("_")[2], bound) for metric, bound in limits if _is_of(metric, key)]


def _is_of(metric: str, key: str) -> bool:
    """Whether an objective is one for this time."""
    family = key.removesuffix("_s")
    return metric.rpartition("_")[0] in (family, f"{family}_scheduled")


def _known(point: Json, key: str, name: str) -> float:
    return view.num(point, key, name) if view.num(point, key, "n") >= SAMPLES_NEEDED.get(name, 1) else NAN


def _latency(runs: Sequence[RunView], shown: Shown) -> Block:
    keys, names = view.all_keys(runs), view.labels(runs)
    known = (_known(p, shown.key, name) for *_, p in view.rows(runs) for name, _ in QUANTILES)
    largest = max((v for v in known if math.isfinite(v)), default=NAN)
    factor, unit = units.time_scale(largest)
    data: list[Json] = []
    for k, run in enumerate(runs):
        found = view.keyed(run)
        for name, dash in QUANTILES:
            rows = [(keys.index(key), key, p) for key, p in found.items() if math.isfinite(_known(p, shown.key, name))]
            if rows:
                hover = [charts.tooltip([view.joined(names[k], view.marked(key, p, full=True)),
                                         f"{shown.short} {name} {shown.show(view.num(p, shown.key, name))}",
                                         f"{units.count(view.num(p, shown.key, 'n'))} samples"]) for _, key, p in rows]  # fmt: skip
                ink = charts.run_colour(k)
                data.append({"type": "scatter", "mode": "lines+markers", "name": charts.inert(view.joined(name, names[k])),
                             "x": [x for x, _, _ in rows], "y": [factor * view.num(p, shown.key, name) for _, _, p in rows],
                             "line": {"color": ink, "dash": dash, "width": 1.7}, "marker": {"color": ink, "size": 7},
                             "hoverinfo": "text", "hovertext": hover})  # fmt: skip
    bounds = list(dict.fromkeys(pair for run in runs for pair in _bound(run, shown.key)))
    data += [{"type": "scatter", "mode": "lines", "name": charts.inert(f"objective {which} {shown.show(bound)}"), "x": [-0.3, len(keys) - 0.7],
              "y": [factor * bound] * 2, "line": {"width": 1.8, "dash": "longdash", "color": charts.colour("invalid")}, "hoverinfo": "name"}
             for which, bound in bounds if data]  # fmt: skip
    up = charts.axis(f"{shown.short}, {unit}", rangemode="tozero")
    if bounds and math.isfinite(largest):
        up = {**up, "range": [0, 1.12 * factor * max(largest, min(bound for _, bound in bounds))]}
    drawn = (
        charts.figure_of(data, {"xaxis": _loads(runs, keys), "yaxis": up, "showlegend": len(runs) == 1})
        if data
        else None
    )
    return Block(f"chart-slo-{shown.key}", f"{shown.name} over load", _latency_finding(runs, shown), READ,
                 _latency_table(runs, shown), drawn, missing="Nothing to draw: no percentile has the samples it needs.")  # fmt: skip


def _latency_finding(runs: Sequence[RunView], shown: Shown) -> str:
    said = []
    for run, name in zip(runs, view.labels(runs), strict=True):
        for which, bound in _bound(run, shown.key):
            rows = [(key, _known(point, shown.key, which)) for key, point in view.keyed(run).items()]
            good, missed = [key for key, v in rows if v <= bound], [key for key, v in rows if v > bound]
            text = f"{shown.short} {which} ≤ {shown.show(bound)} is {_where(good, missed)}"
            said.append((f"{name}: " if name else "") + text + ".")
    if said:
        return " ".join(said)
    rows = [(key, view.num(point, shown.key, "p50")) for *_, key, point in view.rows(runs)]
    rows = [row for row in rows if math.isfinite(row[1])]
    if not rows:
        return "Not measured."
    low, high = rows[0], rows[-1]
    return (f"No objective is stated for it; its median goes from {shown.show(low[1])} at {view.key_label(low[0], full=True)} to "
            f"{shown.show(high[1])} at {view.key_label(high[0], full=True)}.")  # fmt: skip


def _where(good: Sequence[Key], missed: Sequence[Key]) -> str:
    """At which loads it is met and missed: by the load where that parts them, else one by one."""
    if not good and not missed:
        return "not shown by the samples"
    if not missed:
        return f"met at every load, up to {view.key_label(good[-1], full=True)}"
    if not good:
        return f"missed at every load, from {view.key_label(missed[0], full=True)} on"
    if good[-1] < missed[0]:
        last, first = view.key_label(good[-1], full=True), view.key_label(missed[0], full=True)
        return f"met up to {last} and missed from {first} on"
    return f"met at {_listed(good)} and missed at {_listed(missed)}"


def _listed(keys: Sequence[Key]) -> str:
    return ", ".join(view.key_label(key, full=True) for key in keys[:6]) + (", …" if len(keys) > 6 else "")


def _latency_table(runs: Sequence[RunView], shown: Shown) -> Table:
    head = [*run_column(runs), column(view.load_word(runs)), *(column(name) for name, _ in QUANTILES), column("samples (n)"),
            column("Objective", style="left"), column("Validity")]  # fmt: skip
    body = []
    for run, name in zip(runs, view.labels(runs), strict=True):
        for row in decision.held(run):
            checks = [c for c in row.checks if _is_of(c.metric, shown.key)]
            told = [f"{decision.metric_name(c.metric)}: {c.status}" + (f" ({c.why})" if c.why else "") for c in checks]
            cells = [_quantile(row.point, shown, which) for which, _ in QUANTILES]
            samples, objective = units.count(view.num(row.point, shown.key, "n")), "; ".join(told) or "none stated"
            body.append([*run_cell(name), heading(view.key_label(row.key)), *cells, Cell(samples), Cell(objective, style="left wrap"),
                         stamp(view.verdict_of(row.point))])  # fmt: skip
    return Table(f"table-slo-{shown.key}", f"{shown.name} at each load, held against the objective", [head], body)


def _quantile(point: Json, shown: Shown, which: str) -> Cell:
    value, known = view.num(point, shown.key, which), math.isfinite(_known(point, shown.key, which))
    return (
        figure(shown.show(value)) if known or not math.isfinite(value) else Cell(f"{shown.show(value)} †", style="thin")
    )


def _attained(run: RunView, point: Json) -> float:
    number = view.num(point, "point")
    row = view.child(run.summary, "detail", "points", str(int(number)) if math.isfinite(number) else "", "attained")
    return view.num(row, "met") / n if (n := view.num(row, "requests")) > 0 else NAN


def _goodput(runs: Sequence[RunView]) -> Block:
    keys, names = view.all_keys(runs), view.labels(runs)
    data, body, said, many = [], [], [], len(runs) > 1
    for k, run in enumerate(runs):
        rows = [(key, p, view.num(p, "requests_per_s"), _attained(run, p)) for key, p in view.keyed(run).items()]
        answered, good = [r for _, _, r, _ in rows], [r * a for _, _, r, a in rows]
        for title, dash, values in (("Answered", "solid", answered), ("Goodput", "dash", good)):
            if any(math.isfinite(v) for v in values):
                hover = [charts.tooltip([names[k], view.key_label(key, full=True), f"{title.lower()} {units.rate(v, 'requests')}",
                                         f"{units.percent(a, 3)} met the objectives" if math.isfinite(a) else ""])
                         for (key, _, _, a), v in zip(rows, values, strict=True)]  # fmt: skip
                data.append({"type": "scatter", "mode": "lines+markers", "name": charts.inert(view.joined(title, names[k])),
                             "x": [keys.index(key) for key, *_ in rows], "y": values, "hoverinfo": "text", "hovertext": hover,
                             "line": {"color": charts.run_colour(k), "dash": dash, "width": 1.8}, "marker": {"color": charts.run_colour(k), "size": 7}})  # fmt: skip
        for key, point, rate, share in rows:
            body.append([*run_cell(names[k]), heading(view.key_label(key)), figure(units.rate(rate, "requests")),
                         figure(units.rate(rate * share, "requests")), plain(units.percent(share, 3)), stamp(view.verdict_of(point))])  # fmt: skip
        known = [(rate * share, key, share) for key, _, rate, share in rows if math.isfinite(rate * share)]
        if known:
            top = max(known)
            said.append((f"{names[k]}: most" if many else "Most") + f" goodput is {units.rate(top[0], 'requests', 3)}, at {view.key_label(top[1], full=True)}, "
                        f"where {units.percent(top[2], 3)} of the requests met the objectives.")  # fmt: skip
    finding = " ".join(said) or "Goodput is not measured (no objective that a single request can meet is stated)."
    head = [
        *run_column(runs),
        *map(column, (view.load_word(runs), "Answered", "Goodput", "Met the objectives", "Validity")),
    ]
    table = Table("table-goodput", "Requests answered, and those that met the objectives", [head], body)
    up = charts.axis("requests/s", rangemode="tozero")
    drawn = charts.figure_of(data, {"xaxis": _loads(runs, keys), "yaxis": up, "showlegend": not many}) if data else None
    return Block("chart-goodput", "Goodput over load", finding, READ_GOODPUT, table, drawn)


# --- throughput against speed for each user -----------------------------------------------------------------------

User = tuple[Key, Json, float, float]  # point, tokens/s for each user, tokens/s for each accelerator


def _users(run: RunView, theory: bool = False) -> list[User]:
    _, gpus, _ = decision.price(run)
    pick = view.predicted if theory else view.measured
    rows = [(key, p, 1 / step if (step := pick(p, "itl_s").value) > 0 else NAN, pick(p, "output_tokens_per_s").value / gpus)
            for key, p in view.keyed(run).items()]  # fmt: skip
    return [row for row in rows if math.isfinite(row[2]) and math.isfinite(row[3])]


def frontier(rows: Sequence[User]) -> list[User]:
    """The points that no other beats in both, the quickest for a user first."""
    kept: list[User] = []
    for row in sorted(rows, key=lambda row: (-row[2], -row[3])):
        if not kept or row[3] > kept[-1][3]:
            kept.append(row)
    return kept


def pareto(runs: Sequence[RunView]) -> Charts:
    names = view.labels(runs)
    found = [(k, row) for k, run in enumerate(runs) for row in _users(run)]
    if not found:
        needed = "the time between tokens and the output of at least one point"
        return Charts([], otherwise=f"Not measured: it needs {needed}.")
    data: list[Json] = []
    for k, run in enumerate(runs):
        data += _pareto_traces(run, names[k], charts.run_colour(k))
    head = [*run_column(runs), *map(column, ("Point", "Tokens/s for each user", "Tokens/s per accelerator", "1 M output tokens",
                                             "On the frontier", "Validity"))]  # fmt: skip
    body = []
    for k, row in found:
        edge = any(row[0] == other[0] for other in frontier(_users(runs[k])))
        cost = decision.usd_per_million(runs[k], row[1])
        body.append([*run_cell(names[k]), heading(view.key_label(row[0], full=True)), Cell(units.number(row[2])), Cell(units.number(row[3])),
                     figure(units.usd(cost), missing="no price known"), Cell("yes" if edge else "no"), stamp(view.verdict_of(row[1]))])  # fmt: skip
    fast, much = max((r for _, r in found), key=lambda r: r[2]), max((r for _, r in found), key=lambda r: r[3])
    if fast[0] == much[0]:
        finding = f"{view.key_label(fast[0], full=True).capitalize()} is best for the user and for the hardware alike."
    else:
        finding = (f"From {view.key_label(fast[0], full=True)} to {view.key_label(much[0], full=True)} each user's speed falls from {units.number(fast[2], 3)} to "
                   f"{units.number(much[2], 3)} tokens/s, and each accelerator's output rises from {units.number(fast[3], 3)} to {units.number(much[3], 3)}.")  # fmt: skip
    drawn = charts.figure_of(data, {"xaxis": charts.axis("tokens/s for each user", rangemode="tozero"), "yaxis": charts.axis("output tokens/s per accelerator", rangemode="tozero"),
                                    "showlegend": True, "legend": charts.below()})  # fmt: skip
    table = Table("table-pareto", "Speed for each user and output of each accelerator", [head], body)
    return Charts([Block("chart-pareto", "Throughput against speed", finding, READ_PARETO, table, drawn)], tall=True)


def _pareto_traces(run: RunView, name: str, ink: str) -> list[Json]:
    suffix = f", {name}" if name else ""
    data: list[Json] = []
    edge = frontier(_users(run))
    if len(edge) > 1:
        data.append({"type": "scatter", "mode": "lines", "name": charts.inert("Frontier" + suffix), "x": [r[2] for r in edge], "y": [r[3] for r in edge],
                     "line": {"color": ink, "width": 1.4, "shape": "vh"}, "hoverinfo": "skip"})  # fmt: skip
    for title, theory in (("Predicted", True), ("Measured", False)):
        rows = _users(run, theory)
        hover = [charts.tooltip([view.joined(title, name, view.key_label(key, full=True)), f"{units.rate(x, 'tokens')} for each user",
                                 f"{units.rate(y, 'tokens')} per accelerator"]) for key, _, x, y in rows]  # fmt: skip
        mark = {"size": 10, "color": charts.colour("paper") if theory else ink, "line": {"width": 1.6 if theory else 1.2, "color": ink if theory else charts.colour("paper")},
                "symbol": ["circle" if theory else charts.SYMBOLS[view.verdict_of(p)] for _, p, _, _ in rows]}  # fmt: skip
        if rows:
            data.append({"type": "scatter", "mode": "markers" if theory else "markers+text", "name": charts.inert(title + suffix), "x": [r[2] for r in rows],
                         "y": [r[3] for r in rows], "text": [] if theory else [view.marked(r[0], r[1]) for r in rows], "textposition": "top right",
                         "textfont": {"size": 11, "color": charts.colour("muted")}, "hoverinfo": "text", "hovertext": hover, "marker": mark, "cliponaxis": False})  # fmt: skip
    return data


# --- cost ---------------------------------------------------------------------------------------------------------


def cost(runs: Sequence[RunView]) -> Charts:
    blocks = [block for k, run in enumerate(runs) if (block := _cost(run, k, view.labels(runs)[k]))]
    return Charts(blocks, otherwise="Not known: no point with output was measured.")


def _cost(run: RunView, place: int, name: str) -> Block | None:
    found = decision.decide(run).chosen
    if found is None or not view.num(found[1], "output_tokens_per_s") > 0:
        return None
    usd_per_h, gpus, source = decision.price(run)
    key, point = found
    rate, total = view.num(point, "output_tokens_per_s"), view.num(point, "total_tokens_per_s")
    known = math.isfinite(usd_per_h)
    prices = [usd_per_h * factor for factor in (0.5, 0.75, 1, 1.5, 2)] if known else [0.5, 1, 2, 4, 8]
    at = view.marked(key, point, full=True)
    if known:
        busy, half = (per_million(usd_per_h, gpus, rate * share) for share in (1.0, 0.5))
        finding = f"At {units.usd(usd_per_h)} an hour ({view.shorten(source, 80)}) and {at}, a million output tokens costs {units.usd(busy)} if always busy and {units.usd(half)} if busy half of the time"
        either = f"; a million tokens of either kind {units.usd(per_million(usd_per_h, gpus, total))}"
        finding += (either if total > 0 else "") + "."
    else:
        finding = f"{decision.NO_PRICE[:1].upper()}{decision.NO_PRICE[1:]}. At {at} each dollar an hour makes {units.usd(per_million(1.0, gpus, rate))} for a million output tokens, if always busy."
    suffix = f"-{place}" if place else ""
    xs = [0.1 + 0.05 * k for k in range(19)]
    data = []
    for k, price in enumerate(prices):
        own = known and price == usd_per_h
        ink = charts.colour("measured" if own else "predicted")
        data.append({"type": "scatter", "mode": "lines", "name": f"{units.usd(price)}/h", "x": [100 * x for x in xs], "y": [per_million(price, gpus, rate * x) for x in xs],
                     "line": {"color": ink, "width": 2.6 if own else 1.4, "dash": "solid" if own else ("dot", "dash", "dashdot", "longdash", "longdashdot")[k]},
                     **charts.template(f"{units.usd(price)}/h, busy %{{x:.0f}} % of the time", "$%{y:.3~g} for a million output tokens")})  # fmt: skip
    head = [column("Price, an hour"), *(column(f"busy {units.percent(share)}") for share in SHARES)]
    body = [[heading(units.usd(price), "as known" if known and price == usd_per_h else ""), *(Cell(units.usd(per_million(price, gpus, rate * share))) for share in SHARES)]
            for price in prices]  # fmt: skip
    notes = [
        f"Price × {gpus} accelerator{'' if gpus == 1 else 's'} / 3600 s / ({units.rate(rate, 'tokens')} × share of the time busy) × 1,000,000."
    ]
    table = Table(f"table-cost{suffix}", f"US dollars for a million output tokens at {at}", [head], body, notes)
    up = charts.axis("$ for 1 M output tokens", rangemode="tozero")
    drawn = charts.figure_of(data, {"xaxis": charts.axis("share of the time busy, %"), "yaxis": up, "showlegend": True})
    title = "Cost of a million output tokens" + (f", {name}" if name else "")
    return Block(f"chart-cost{suffix}", title, finding, READ_COST, table, drawn)
