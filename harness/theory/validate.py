"""Predictions held against measurements that others made: a table in, the same rows with predictions and errors out.

Columns of the table: model, gpu, n_gpus, tp, pp, ep, framework, weight_dtype, kv_dtype, kind (static | concurrency | a
kind that begins with "offline": as many as the memory holds; with "burst": all sent at once), batch, isl, osl and any of
ttft_ms, tpot_ms, e2e_s, out_tps, total_tps, mem_gb (of all accelerators together; what a GB is there: `memory_units`).  A
row that cannot be predicted has empty predictions and a `reason`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from harness.records import RidgelineError
from harness.theory import catalogue, dtypes, load, memory
from harness.theory import hardware as table_of_hardware
from harness.theory.calibration import Calibration
from harness.theory.frameworks import named
from harness.theory.hardware import Hardware
from harness.theory.shape import Model
from harness.theory.sweep import Sweep, sweep

Array = npt.NDArray[np.float64]

NEEDED = ("model", "gpu", "kind", "batch", "isl", "osl")
OPTIONAL = ("n_gpus", "tp", "pp", "ep", "framework", "weight_dtype", "kv_dtype")
# column of the table -> (metric of a sweep, what a unit of the column is in SI)
METRICS = {
    "ttft_ms": ("ttft_s", 1e-3),
    "tpot_ms": ("itl_s", 1e-3),
    "e2e_s": ("e2e_s", 1.0),
    "out_tps": ("output_tokens_per_s", 1.0),
    "total_tps": ("output_tokens_per_s", 1.0),
    "mem_gb": ("mem_bytes", 1.0),  # in what `memory_units` finds
}
PROMPTS = 1000.0  # most in all that a benchmark is taken to send where it does not tell: vllm bench serve's default
MOST = 1e8  # of anything counted
GIB, GB = 2.0**30, 1e9
NO_LENGTH = 128.0  # input tokens where a table does not tell: only what hardly depends on them is predicted
Server = tuple[Any, ...]
SERVER = ("model", "gpu", "framework", "weight_dtype", "kv_dtype", "n_gpus", "tp", "pp", "ep")


@dataclass(frozen=True, slots=True)
class Case:
    """What the rows of one server have in common, resolved."""

    model: Model
    hardware: Hardware
    dtype: str | None
    kv_dtype: str | None
    tp: int
    pp: int
    dp: int
    replicas: int
    framework: str


def read(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """The table with every column there, numbers as numbers; RidgelineError names what is missing or wrong."""
    if missing := [c for c in NEEDED if c not in frame.columns]:
        known = ", ".join((*NEEDED, *OPTIONAL, *METRICS))
        raise RidgelineError(f"{where}: column {missing[0]!r} is missing; columns are {known}")
    if not any(metric in frame.columns for metric in METRICS):
        raise RidgelineError(f"{where}: holds no measurement; give one of the columns {', '.join(METRICS)}")
    frame = frame.copy()
    for column in ("batch", "isl", "osl", "n_gpus", "tp", "pp", "ep", *METRICS):
        given = frame[column] if column in frame else pd.Series(np.nan, frame.index)
        numbers = pd.to_numeric(given, errors="coerce").astype(float)
        if len(wrong := given[numbers.isna() & given.notna()]):
            raise RidgelineError(f"{where}: {column} of data row {frame.index.get_loc(wrong.index[0])} must be a number, "
                                 f"got {wrong.iloc[0]!r}")  # fmt: skip
        frame[column] = numbers
    for column in ("model", "gpu", "kind", "framework", "weight_dtype", "kv_dtype"):
        given = frame[column] if column in frame else pd.Series("", frame.index)
        frame[column] = given.fillna("").astype(str).str.strip()
    return frame


def case_of(row: dict[Hashable, Any]) -> Case:
    """The model, the hardware and the split of a row.  Raises RidgelineError, whose text is the row's reason."""
    model, gpu = catalogue.find(row["model"]), table_of_hardware.usual(row["gpu"])
    framework, dtype, cache = row["framework"], dtypes.stated(row["weight_dtype"]), dtypes.stated(row["kv_dtype"])
    narrow = (dtype or model.dtype) in ("fp8", "nvfp4", "fp4")
    if cache is None and narrow and named(framework) == "tensorrt-llm":
        cache = "fp8"  # NVIDIA's checkpoints in fp8 and fp4 quantize the cache too, and TensorRT-LLM follows them
    return Case(model, gpu, dtype, cache, *_split(row), framework)


def _split(row: dict[Hashable, Any]) -> tuple[int, int, int, int]:
    """(tp, pp, replicas of the attention, replicas of the server) from n_gpus, tp, pp and ep."""

    def count(name: str) -> int:
        return 0 if math.isnan(row[name]) else int(row[name])

    pp, ep = max(1, count("pp")), max(1, count("ep"))
    gpus = count("n_gpus") or max(1, count("tp")) * pp
    tp = count("tp") or max(1, gpus // pp)
    if ep > 2 and tp == ep * ep:  # some tables give tp times ep
        tp, gpus = ep, ep * pp
    if ep > tp:  # attention in data parallel, the experts over all
        return tp, pp, ep // tp, max(1, gpus // (ep * pp))
    return tp, pp, 1, max(1, gpus // (tp * pp))


def servers(frame: pd.DataFrame) -> Iterator[tuple[dict[Hashable, Any], pd.DataFrame]]:
    """(what the rows have in common, the rows) for each server and kind."""
    for key, rows in frame.groupby([*SERVER, "kind"], dropna=False, sort=False):
        yield dict(zip((*SERVER, "kind"), key, strict=True)), rows


Calibrate = Callable[[dict[Hashable, Any]], Calibration | None]


def memory_units(frame: pd.DataFrame) -> pd.Series[float]:
    """Bytes of a GB of mem_gb for each row: 2**30 as nvidia-smi, vLLM, LMDeploy, llama.cpp and AutoAWQ count, 1e9 as other
    scripts around torch do mostly (optimum-benchmark, gpt-fast).

    Some rows tell: those that with 1e9 show less than the bytes of a model's 16-bit weights alone, and those that with 2**30
    show more than the accelerators have.  Their source (columns dataset or source_repo; without one, the framework) counts
    as they do, unless they are of two minds.
    """
    names = frame.framework.map(named)
    units = pd.Series(np.where(names.isin(memory.TORCH_COUNTED) & names.ne("autoawq"), GB, GIB), frame.index)
    source = next((c for c in ("dataset", "source_repo") if c in frame), "framework")
    told: dict[object, set[float]] = {}
    for common, rows in servers(frame[frame.mem_gb.gt(0)]):
        try:
            case = case_of(common)
        except RidgelineError:
            continue  # said when it is predicted
        whole = case.hardware.mem_bytes * case.tp * case.pp * case.dp * case.replicas * memory.GIB_PER_GB
        least = case.model.weight_bytes(case.dtype) if (case.dtype or case.model.dtype) in dtypes.WHOLE else 0.0
        for key, value in zip(rows[source], rows.mem_gb, strict=True):
            if value * GB < least <= value * GIB and case.replicas == 1:
                told.setdefault(key, set()).add(GIB)
            elif value * GB <= whole < value * GIB:
                told.setdefault(key, set()).add(GB)
    decided = frame[source].map({key: next(iter(said)) for key, said in told.items() if len(said) == 1})
    return decided.fillna(units).astype(float)


def predictions(frame: pd.DataFrame, calibrate: Calibrate | None = None) -> pd.DataFrame:
    """The rows with pred_*, pred_*_low, pred_*_high, bound_* of each metric and `reason`; the order stays.

    `calibrate` maps what a server's rows have in common to the calibration to use, or None.
    """
    names = [f"{prefix}{m}{suffix}" for m in METRICS for prefix, suffix in
             (("pred_", ""), ("pred_", "_low"), ("pred_", "_high"), ("bound_", ""))]  # fmt: skip
    out = frame.join(pd.DataFrame(np.nan, index=frame.index, columns=names))
    out["reason"] = ""
    units = memory_units(frame)
    for common, rows in servers(frame):
        try:
            case = case_of(common)
            _fill(out, case, common["kind"], rows, calibrate(common) if calibrate else None)
            memory_columns = [c for c in names if c.endswith(("mem_gb", "mem_gb_low", "mem_gb_high"))]
            out.loc[rows.index, memory_columns] = out.loc[rows.index, memory_columns].div(units[rows.index], axis=0)
        except RidgelineError as problem:
            out.loc[rows.index, "reason"] = str(problem)
    return out


def _fill(out: pd.DataFrame, case: Case, kind: str, rows: pd.DataFrame, calibration: Calibration | None) -> None:
    known = rows.osl.gt(0) & (rows.batch.gt(0) | kind.startswith("offline"))
    for column in ("batch", "osl"):
        if column == "osl" or not kind.startswith("offline"):
            out.loc[rows.index[~(rows[column] > 0)], "reason"] = f"{column} is missing"
    absurd = (rows[["batch", "isl", "osl"]] > MOST).any(axis=1) | (rows.isl < 0)
    out.loc[rows.index[absurd], "reason"] = f"batch, isl and osl must be from 0 to {MOST:g}"
    rows = rows[known & ~absurd]
    if not len(rows):
        return
    found = swept(case, kind, rows, calibration)
    kept = _whole_run(kind, found)
    per_request = ((rows.isl + rows.osl) / rows.osl).to_numpy()
    for column, (metric, unit) in METRICS.items():
        got = found.columns[metric]
        scale = {
            "out_tps": case.replicas * kept,
            "total_tps": case.replicas * kept * per_request,
            "mem_gb": case.replicas,
        }.get(column, 1)
        needs_length = column in ("ttft_ms", "e2e_s", "total_tps")
        value = got.value - memory.uncounted_bytes(found.setup) if column == "mem_gb" else got.value
        shown = rows.isl.notna().to_numpy() if needs_length else np.ones(len(rows), bool)
        for name, values in (
            (f"pred_{column}", value),
            (f"pred_{column}_low", got.low),
            (f"pred_{column}_high", got.high),
            (f"bound_{column}", got.bound),
        ):
            out.loc[rows.index, name] = np.where(
                shown & found.fits & np.isfinite(values), values / unit * scale, np.nan
            )
    out.loc[rows.index[~found.fits], "reason"] = (
        f"{case.model.name} does not fit {case.tp * case.pp * case.dp} × {case.hardware.name}"
    )
    unknown = rows.index[rows.isl.isna().to_numpy() & found.fits]
    out.loc[unknown, "reason"] = "isl is missing: only what hardly depends on it is predicted"


def _waves(kind: str, batch: Array) -> Array:
    """How many requests each client of a benchmark sends."""
    if kind.startswith("offline"):
        return np.full(len(batch), np.inf)
    return np.ones(len(batch)) if kind.startswith("burst") else np.clip(PROMPTS / batch, 1.0, load.WAVES)


def _whole_run(kind: str, found: Sweep) -> Array:
    """Tables give tokens over the whole run, at whose end fewer and fewer are in flight: the share of the rate in between
    that is left where answers differ in length, half a round of those that run at once being lost."""
    if kind in ("static", "wave"):
        return np.ones(len(found))
    rounds = _waves(kind, found.batch) * found.batch / found.running
    return np.asarray(1 - 0.5 * (1 - 1 / found.running) / np.maximum(rounds, 1.0))


def swept(case: Case, kind: str, rows: pd.DataFrame, calibration: Calibration | None) -> Sweep:
    """The sweep over rows of one server and kind."""
    lengths = {
        "input_tokens": rows.isl.fillna(NO_LENGTH).clip(lower=1).to_numpy(),
        "output_tokens": rows.osl.to_numpy(),
    }
    batch = np.maximum(1.0, np.ceil(rows.batch.to_numpy() / case.replicas))
    mode = kind if kind in ("static", "wave") else "closed"
    split = {"tp": case.tp, "pp": case.pp, "dp": case.dp, "dtype": case.dtype, "kv_dtype": case.kv_dtype}
    if kind.startswith("offline"):
        batch, lengths = np.full(len(rows), 1e8), lengths
    return sweep(case.model, case.hardware, batch=batch, mode=mode, framework=case.framework, waves=_waves(kind, batch),
                 calibration=calibration, **lengths, **split)  # type: ignore[arg-type]  # fmt: skip


def scores(out: pd.DataFrame) -> pd.DataFrame:
    """A row for each group and metric: n, MAPE, median error, bias, coverage and width of the interval in percent, and
    how many measurements beat the strict bound.

    Groups: kind, dense or MoE, and number of accelerators (one, several); `all` stands for any.
    """
    known = out[out[[f"pred_{m}" for m in METRICS]].notna().any(axis=1)]
    moe = known.model.map({name: catalogue.find(name).moe for name in known.model.unique()})
    kind = np.where(
        known.kind.eq("static"), "static", np.where(known.kind.str.startswith("offline"), "offline", "load")
    )
    devices = np.where(known.n_gpus.fillna(1) > 1, "several", "one")
    rows = []
    for group in sorted({("all",) * 3, *((k, "all", "all") for k in kind), *zip(kind, np.where(moe, "moe", "dense"), ["all"] * len(known), strict=True),
                         *zip(kind, np.where(moe, "moe", "dense"), devices, strict=True)}):  # fmt: skip
        here = np.ones(len(known), bool)
        for value, column in zip(group, (kind, np.where(moe, "moe", "dense"), devices), strict=True):
            here &= (column == value) | (value == "all")
        for metric in METRICS:
            if score := _score(known[here], metric):
                rows.append({"kind": group[0], "model": group[1], "gpus": group[2], "metric": metric, **score})
    return pd.DataFrame(rows)


def _score(rows: pd.DataFrame, metric: str) -> dict[str, float]:
    rows = rows[rows[metric].gt(0) & rows[f"pred_{metric}"].notna()]
    if not len(rows):
        return {}
    was, said = rows[metric], rows[f"pred_{metric}"]
    low, high, bound = (rows[name] for name in (f"pred_{metric}_low", f"pred_{metric}_high", f"bound_{metric}"))
    error = (said / was - 1).abs()
    beats = was > bound * 1.001 if metric.endswith("tps") else was < bound * 0.999
    return {
        "n": len(rows),
        "mape": 100 * float(error.mean()),
        "median": 100 * float(error.median()),
        "bias": 100 * (float(np.exp(np.log(said / was).median())) - 1),
        "coverage": 100 * float(((was >= low) & (was <= high)).mean()),
        "width": 100 * float(((high - low) / said).median()),
        "faster_than_physics": int(beats.sum()) if metric != "mem_gb" else 0,
    }
