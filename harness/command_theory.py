"""What `predict`, `calibrate` and `validate` do: files and names in, text or one JSON object out."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shlex
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pandas as pd

from harness import models, store, units
from harness.records import RidgelineError
from harness.report.predict_page import Part, render
from harness.theory import calibrate as fitting
from harness.theory import predict as sentences
from harness.theory import training as fsdp
from harness.theory import validate as holding
from harness.theory.calibration import Calibration, from_dict
from harness.theory.frameworks import of_run, stated
from harness.theory.hardware import Hardware, from_row
from harness.theory.memory import kv_capacity, kv_space_bytes
from harness.theory.roofline import Room
from harness.theory.sweep import Sweep, sweep

MOST = 200_000  # points of one call
MOST_SENTENCES = 1_000  # beyond so many points the JSON has values, intervals, bounds and terms, but no sentences


@dataclass(frozen=True, slots=True)
class Asked:
    """What `ridgeline predict` is asked for; lists are combined with each other."""

    model: str
    hardware: list[str]
    dtype: list[str]
    kv_dtype: str
    pp: int
    ep: int
    mode: str
    rate: list[float] | None
    framework: str | None
    prefix_share: float
    calibration: Path | None
    draft: tuple[str, int, float] | None
    batch: list[int]
    input_tokens: list[int]
    output_tokens: list[int]
    tp: list[int]
    room: Room
    predictor: str | None = None
    cp: int = 1


def room(share: float, batched_tokens: int, kv_space: str | None) -> Room:
    """What an engine is told of memory; `kv_space` with its unit."""
    return Room(share, batched_tokens, units.parse(kv_space, "bytes", "--kv-space") if kv_space else math.nan)


def predict(asked: Asked, as_json: bool, page: Path | None = None, words: Sequence[str] = ()) -> str:
    """The table, or the object with every point in full; with `page` the same as a page of the command `words`."""
    if asked.mode == "open" and asked.rate:
        asked = dataclasses.replace(asked, batch=[1])  # what is in flight follows from the rate
    points = len(asked.batch) * len(asked.input_tokens) * len(asked.output_tokens)
    if not points or not asked.tp:
        raise RidgelineError("--batch-sizes, --input-tokens, --output-tokens and --tp must each name a number")
    if points * len(asked.hardware) * len(asked.dtype) * len(asked.tp) * len(asked.rate or [0]) > MOST:
        raise RidgelineError(f"more than {MOST} combinations: ask for fewer at once")
    found = list(_sweeps(asked))
    if asked.predictor:
        found = _beside(asked, asked.predictor, found)
    if page is not None:
        store.write_text(page, render(found, asked.model, asked.mode, shlex.join(words)))
    if as_json:
        return _predict_json(found)
    return _predict_text(asked, found) + (f"\nreport: {page}" if page is not None else "")


def _sweeps(asked: Asked) -> Iterator[Part]:
    """A sweep for each hardware, dtype, tp and rate; one that cannot be says why, if others can."""
    stated(asked.framework)
    model = models.load(asked.model)
    calibration = calibration_of(asked.calibration) if asked.calibration else None
    draft = (models.load(asked.draft[0]), *asked.draft[1:]) if asked.draft else None
    batch, i, o = (np.array(x) for x in zip(*itertools.product(asked.batch, asked.input_tokens, asked.output_tokens), strict=True))  # fmt: skip
    rates: list[float | None] = [*asked.rate] if asked.rate else [None]
    rows = [row for name in asked.hardware for row in hardware_rows(name.strip())]
    for row, dtype, tp, rate in itertools.product(rows, asked.dtype, asked.tp, rates):
        try:
            found = sweep(model, row, batch=batch, input_tokens=i, output_tokens=o, dtype=dtype, kv_dtype=asked.kv_dtype,
                          tp=tp, pp=asked.pp, dp=max(1, asked.ep // tp), cp=asked.cp, mode=asked.mode, rate=rate,
                          framework=asked.framework, cached_share=asked.prefix_share, draft=draft, calibration=calibration,
                          room=asked.room)  # fmt: skip
            yield Part(row, dtype, tp, rate, found, "")
        except RidgelineError as problem:
            if len(rows) * len(asked.dtype) * len(asked.tp) == 1:
                raise
            yield Part(row, dtype, tp, rate, None, str(problem))


def _beside(asked: Asked, predictor: str, found: list[Part]) -> list[Part]:
    """The parts with another predictor's figures."""
    from harness.beside import beside

    known = [(part.sweep, part.dtype, asked.kv_dtype) for part in found if part.sweep]
    others = iter(beside(predictor, asked.model, known))
    return [dataclasses.replace(part, other=next(others)) if part.sweep else part for part in found]


def hardware_rows(name: str) -> list[Hardware]:
    """Rows of this name, of a file of the user's rows, or the one of this machine."""
    if name != "machine":
        return models.hardware(name)
    from harness import machine
    from harness.progress import Progress

    return [from_row(machine.row(None, Progress().line))]


def training(model: str, hardware: list[str], as_json: bool, link: str | None, **asked: Any) -> str:
    """Sentences, or the object, of a training step of the model on each hardware."""
    shape = models.load(model)
    rate = units.parse(link.removesuffix("/s"), "bytes", "--link") if link else math.nan
    rows = [row for name in hardware for row in hardware_rows(name.strip())]
    found = {row.name: fsdp.step(shape, row, link_bytes_per_s=rate, **asked) for row in rows}
    if as_json:
        return orjson.dumps({"schema": 1, "model": shape.name, **asked,
                             "training": {name: dataclasses.asdict(step) for name, step in found.items()}}).decode()  # fmt: skip
    lines = [
        f"{shape.name}, Adam, 16-bit weights, {asked['gpus']} × {asked['batch']} sequences of {asked['context']} tokens"
    ]
    if asked["gpus"] > 8 and not link:
        lines.append("as if one machine had them all; give --link, the rate of the slowest link between them")
    low, high = (units.percent(share, 2) for share in fsdp.REACHED)
    lines.append(f"an upper estimate of the speed: eight public runs reached {low} to {high} of it")
    for name, one in found.items():
        lines += ["", f"{name}: {units.rate(one.tokens_per_s, 'tokens', 3)}", *one.because]
    return "\n".join(lines)


def _predict_json(found: list[Part]) -> str:
    explained = sum(len(part.sweep) for part in found if part.sweep) <= MOST_SENTENCES
    parts = []
    for part in found:
        head: dict[str, Any] = {"hardware": part.hardware.name, "dtype": part.dtype, "tp": part.tp, "rate": part.rate}
        head |= {"cp": part.sweep.setup.cp} if part.sweep and part.sweep.setup.cp > 1 else {}
        if part.sweep is None:
            parts.append(head | {"reason": part.reason, "points": []})
            continue
        points = list(_explained(part, part.sweep) if explained else _brief(part.sweep))
        if part.other:
            head["other"] = {"name": part.other.name, "reason": part.other.reason}
            theirs = {key: getattr(part.other, key).tolist() for key in ("ttft_s", "itl_s", "output_tokens_per_s")}
            points = [p | {"other": {key: v[at] for key, v in theirs.items()}} for at, p in enumerate(points)]
        tokens, block = kv_capacity(part.sweep.setup)
        head |= {"kv_cache": {"bytes": kv_space_bytes(part.sweep.setup), "tokens": tokens, "block_tokens": block}}
        parts.append(head | {"model": part.sweep.setup.model.name, "mode": part.sweep.mode, "points": points})
    return orjson.dumps({"schema": 1, "predictions": parts}).decode()  # NaN becomes null


def _explained(part: Part, found: Sweep) -> Iterator[dict[str, Any]]:
    """Every point in full, with US dollars for a million output tokens where an hour has a price."""
    for at in range(len(found)):
        point = sentences.point(found, at)
        speed = point.output_tokens_per_s.value
        cost = part.hardware.usd_per_h * found.setup.gpus / 3600 / speed * 1e6 if speed else math.nan
        shape = {"batch": point.batch, "input_tokens": point.input_tokens, "output_tokens": point.output_tokens}
        yield shape | point.as_dict() | {"usd_per_million_output_tokens": cost}


def _brief(found: Sweep) -> Iterator[dict[str, Any]]:
    """Values, intervals, bounds and terms, without sentences."""
    shape = {"batch": found.batch, "input_tokens": found.input_tokens, "output_tokens": found.output_tokens,
             "largest_batch": found.largest, "fits": found.fits}  # fmt: skip
    lists = {name: values.tolist() for name, values in shape.items()}
    metrics = {}
    for name, column in found.columns.items():
        numbers = (column.value, column.low, column.high, column.bound)
        terms = [np.broadcast_to(v, column.value.shape).tolist() for v in column.terms.values()]
        metrics[name] = ([n.tolist() for n in numbers], list(column.terms), list(zip(*terms, strict=True)))
    for at in range(len(found)):
        point: dict[str, Any] = {name: values[at] for name, values in lists.items()}
        point["limit"] = found.limit("e2e_s", at)
        for name, ((value, low, high, bound), terms, amounts) in metrics.items():
            point[name] = {"value": value[at], "low": low[at], "high": high[at], "bound": bound[at],
                           "terms": dict(zip(terms, amounts[at], strict=True))}  # fmt: skip
        yield point


def _predict_text(asked: Asked, found: list[Part]) -> str:
    lines = [f"{'hardware':<18} {'dtype':>5} {'tp':>2} {'batch':>5} {'in':>6} {'out':>6} {'TTFT':>9} {'ITL':>9} {'E2E':>9} "
             f"{'tokens/s':>9} {'90 % of ITL':>19}  limit"]  # fmt: skip
    if asked.predictor:
        lines[0] += f"  {asked.predictor}: TTFT, ITL, tokens/s"
    notes: dict[str, None] = {}
    capacity: dict[str, str] = {}
    for part in found:
        head = f"{part.hardware.name:<18} {part.dtype:>5} {part.tp:>2}"
        if part.sweep is None:
            lines.append(f"{head} {part.reason}")
            continue
        notes |= dict.fromkeys(part.sweep.setup.notes)
        if part.other and part.other.reason:
            notes[f"{part.hardware.name}: {part.other.reason}"] = None
        lines += [f"{head} {_line(part, at)}" for at in range(len(part.sweep))]
        tokens, block = kv_capacity(part.sweep.setup)
        capacity[f"{part.hardware.name} {part.dtype} tp {part.tp}"] = f"{tokens:,} tokens (blocks of {block})"
    lines += ["", *(f"KV cache of {name}: {held}" for name, held in capacity.items())]
    calibrated = f", calibrated by {asked.calibration}" if asked.calibration else ""
    spread = f", cp {asked.cp}" if asked.cp > 1 else ""
    framework = next((p.sweep.setup.framework.name for p in found if p.sweep), "generic")
    lines += ["", f"{asked.model}, {asked.mode}{spread}, framework {framework}{calibrated}; --json says why of each"]
    return "\n".join(lines + [f"note: {note}" for note in notes])


def _line(part: Part, at: int) -> str:
    s = part.sweep
    assert s is not None
    in_flight = s.running[at] if part.rate else s.batch[at]
    shape = f"{in_flight:>5.0f} {s.input_tokens[at]:>6.0f} {s.output_tokens[at]:>6.0f}"
    if not s.fits[at]:
        return f"{shape} {sentences.point(s, at).e2e_s.because}"
    value = {name: float(column.value[at]) for name, column in s.columns.items()}
    times = " ".join(f"{_time(value[name]):>9}" for name in ("ttft_s", "itl_s", "e2e_s"))
    itl = s.columns["itl_s"]
    span = units.interval(float(itl.low[at]), float(itl.high[at]), lambda v: units.seconds(v, 3))
    limit = s.limit("e2e_s", at).replace("_", " ")
    if part.rate:
        limit = f"{limit}; {units.number(part.rate, 3)} requests/s"
    more = f"; fits {s.largest[at]:.0f}" if s.batch[at] > s.running[at] and s.mode != "open" else ""
    line = f"{shape} {times} {units.number(value['output_tokens_per_s'], 3):>9} {span:>19}  {limit}{more}"
    if part.other is None:
        return line
    theirs = [_time(float(part.other.ttft_s[at])), _time(float(part.other.itl_s[at]))]
    speed = float(part.other.output_tokens_per_s[at])
    return f"{line:<118} {theirs[0]:>9} {theirs[1]:>9} {units.number(speed, 3) if speed == speed else '-':>9}"


def _time(value_s: float) -> str:
    return "unbounded" if value_s == float("inf") else "-" if value_s != value_s else units.seconds(value_s, 3)


def calibration_of(path: Path) -> Calibration:
    """The calibration in a file; RidgelineError where there is none."""
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, UnicodeDecodeError) as problem:
        raise RidgelineError(f"calibration {path}: {getattr(problem, 'strerror', None) or problem}") from None
    except (ValueError, RecursionError) as problem:
        raise RidgelineError(f"calibration {path}: not JSON ({str(problem)[:100]})") from None


def calibrate(source: Path, out: Path, only: Sequence[int] | None, as_json: bool) -> str:
    """Fit, to the cells of `only` these batch sizes where given, write the file, and say what was found."""
    if source.is_dir():
        found = _of_run(source, only)
    else:
        rows = _table(source)
        found = fitting.calibrate(rows[rows.batch.isin(only)] if only else rows, str(source))
    store.write_json(out, found.as_dict())
    if as_json:
        return json.dumps(store.clean(found.as_dict()), allow_nan=False)
    factors = {k: v for k, v in dataclasses.asdict(found.factors).items() if v != (0.0 if k == "slot" else 1.0)}
    lines = [
        f"{found.cells} cells of {', '.join(found.models)} on {found.hardware}; left unexplained: {units.percent(found.spread, 2)}"
    ]
    lines += [
        f"  {name:<10} {'of a slot ' if name == 'slot' else '× '}{units.number(value, 3)}"
        for name, value in factors.items()
    ]
    if cell := found.next_cell:
        lines.append(f"measure next: batch {cell['batch']}, {cell['input_tokens']} tokens in, {cell['output_tokens']} out "
                     f"(its time is known to {units.percent(cell['doubt'], 2)} only)")  # fmt: skip
    return "\n".join([*lines, f"calibration: {out}"])


def _of_run(folder: Path, only: Sequence[int] | None) -> Calibration:
    from harness import command

    found = command.summarise(folder)
    run = store.info(folder)
    inputs, theory = run["theory"], run["scenario"]["theory"]
    if not inputs.get("model") or not inputs.get("hardware"):
        missing = (
            inputs["missing"][0] if inputs.get("missing") else {"saw": "no model", "do": "name both in the scenario"}
        )
        raise RidgelineError(f"{folder}: {missing['saw']}; {missing['do']}")
    engine = run.get("engine") or {}
    framework = of_run(theory, engine) or ""
    case = holding.Case(command.model_from(inputs["model"]), from_row(inputs["hardware"]), theory["dtype"],
                        theory["kv_dtype"], theory["tp"], theory.get("pp", 1), 1, 1, framework)  # fmt: skip
    rows, mode = fitting.of_points(found["points"]), found["workload"]["mode"]
    rows = rows[rows.batch.isin(only)] if only else rows
    return fitting.calibrate_cells(case, "wave" if mode == "wave" else "concurrency", rows, str(folder))


def _table(path: Path) -> pd.DataFrame:
    try:
        return holding.read(pd.read_csv(path), str(path))
    except OSError as problem:
        raise RidgelineError(f"{path}: cannot be read: {problem.strerror or problem}") from None
    except (ValueError, EOFError) as problem:  # pandas' own errors are ValueErrors
        raise RidgelineError(f"{path}: not a CSV table: {str(problem).splitlines()[0][:200]}") from None


def validate(table: Path, calibrate_on: str | None, out: Path | None, as_json: bool) -> str:
    """Predict each row, write them, and score by group."""
    rows = _table(table)
    cells = _cells(rows, calibrate_on) if calibrate_on else None
    if cells is not None:
        rows = rows.drop(rows.index.intersection(cells.index)) if cells.attrs["own"] else rows
    found = holding.predictions(rows, fitting.Calibrations(cells).of if cells is not None else None)
    if out is not None:
        found.to_csv(out, index=False)
    scores = holding.scores(found)
    shown = found[[f"pred_{m}" for m in holding.METRICS]].notna().any(axis=1)
    reasons = found.reason[(found.reason != "") & ~shown].value_counts()
    if as_json:
        said = {"rows": len(found), "predicted": int(shown.sum()), "groups": scores.to_dict("records"),
                "reasons": {str(k): int(v) for k, v in reasons.items()}}  # fmt: skip
        return json.dumps(store.clean(said), allow_nan=False)
    return _validate_text(found, int(shown.sum()), scores, reasons)


def _cells(rows: pd.DataFrame, wanted: str) -> pd.DataFrame:
    """The rows to calibrate on; `attrs["own"]` says whether they are rows of the table itself."""
    if wanted.isdigit() and int(wanted) > 0:
        each = [fitting.chosen(part, int(wanted)) for _, part in holding.servers(rows)]
        cells = pd.concat(each) if each else rows
    elif "=" in wanted and not Path(wanted).exists():
        keep = np.ones(len(rows), bool)
        for condition in wanted.split(","):
            column, _, value = condition.partition("=")
            if column not in rows.columns:
                raise RidgelineError(
                    f"--calibrate-on: no column {column!r}; columns are {', '.join(map(str, rows.columns))}"
                )
            keep &= np.array([_same(v, value) for v in rows[column]])
        cells = rows[keep]
    else:
        cells = _table(Path(wanted))
        cells.attrs["own"] = False
        return cells
    if cells.empty:
        raise RidgelineError(f"--calibrate-on {wanted}: no row of the table matches")
    cells.attrs["own"] = True
    return cells


def _same(value: Hashable, wanted: str) -> bool:
    try:
        return float(value) == float(wanted)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return str(value).casefold() == wanted.casefold()


def _validate_text(found: pd.DataFrame, shown: int, scores: pd.DataFrame, reasons: pd.Series[int]) -> str:
    lines = [f"{shown} of {len(found)} rows predicted", "",
             f"{'kind':<8} {'model':<6} {'gpus':<8} {'metric':<10} {'n':>5} {'MAPE':>7} {'median':>7} {'bias':>7} {'covered':>8} "
             f"{'width':>7} {'faster than physics':>20}"]  # fmt: skip
    for row in scores.to_dict("records"):
        lines.append(f"{row['kind']:<8} {row['model']:<6} {row['gpus']:<8} {row['metric']:<10} {row['n']:>5} {row['mape']:>6.1f}% "
                     f"{row['median']:>6.1f}% {row['bias']:>+6.1f}% {row['coverage']:>7.1f}% {row['width']:>6.1f}% "
                     f"{row['faster_than_physics']:>20}")  # fmt: skip
    if len(reasons):
        lines += ["", "not predicted:", *(f"  {n:>5}  {reason}" for reason, n in reasons.items())]
    return "\n".join(lines)
