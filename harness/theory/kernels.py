"""How much of the data sheet a kernel reaches, by its size: laws with few parameters instead of one efficiency.

`efficiency.csv` holds them by hardware (derived by tests/derive_efficiency.py from measured kernels; its head says whose
and how).  A law is latency plus the smooth maximum of moving bytes and computing, so small kernels are slow and the
ridge is round:

    t = latency + ((bytes_s / bandwidth)^s + (compute_s / compute)^s)^(1/s)

with bytes_s and compute_s the times at the data sheet's full rates.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.records import NAN
from harness.theory.hardware import Hardware, Products, find

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Law:
    """The parameters of one kernel on one kind of hardware.  Shares are of the data sheet's rates; NaN: not used."""

    latency_s: float
    bandwidth: float
    compute: float = NAN
    sharpness: float = NAN
    half_length: float = NAN  # prefill attention: tokens at which it reaches half of `compute`
    tile: float = 1.0  # rows that a matrix kernel computes at least, where the fit tells them from reading
    products: Products | None = None  # what was measured of an engine's own, instead of latency and sharpness


# A CPU's row is measured by the same kind of loop, so that it is near what a kernel reaches.
MEASURED = {"gemm": Law(2e-6, 0.9, 0.8, 2.0), "decode": Law(2e-6, 0.7), "prefill": Law(2e-6, 0.7, 0.4, NAN, 1.0)}
# Products measured in a loop of their own are quicker than in an engine, whose other threads take turns on the cores: of five
# runs on two EPYC cores (vLLM, llama.cpp) those with nothing taken off were predicted 0.6 to 1.1 times as long as measured: the
# middle of a machine that itself is up to 1.7 times slower at times.
IN_ENGINE = 0.85
# What another dtype's kernel is most like.
ALIKE = {"fp32": "bf16", "tf32": "bf16", "fp16": "bf16", "nvfp4": "fp4"}


@cache
def _table() -> dict[tuple[str, str, str], list[tuple[str, str, Law]]]:
    """(kernel, dtype, number of GPUs) -> [(prefix of a hardware name, row measured, law)], the generic ones last."""
    text = resources.files("harness.theory").joinpath("efficiency.csv").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    table: dict[tuple[str, str, str], list[tuple[str, str, Law]]] = {}
    for row in csv.DictReader(lines):
        shares: dict[str, Any] = {
            c: float(row[c] or "nan") for c in ("bandwidth", "compute", "sharpness", "half_length")
        }
        law = Law(float(row["latency_us"]) * 1e-6, **shares, tile=float(row["tile"] or 1))
        for prefix in row["hardware"].split(";"):
            table.setdefault((row["kernel"], row["dtype"], row["gpus"]), []).append((prefix, row["reference"], law))
    return table


def measured_itself(hardware: Hardware) -> bool:
    """Whether the kernels of this hardware, or of its family, are in the tables."""
    rows = _table()["gemm", "bf16", ""]
    return any(hardware.name.startswith(prefix) for prefix, reference, _ in rows if reference)


@cache
def _named(name: str, measured: bool, bytes_per_s: float, kernel: str, dtype: str) -> Law:
    dtype = ALIKE.get(dtype, dtype)
    rows = _table().get((kernel, dtype, "")) or _table()[kernel, "bf16", ""]
    for prefix, reference, law in rows:
        if prefix.startswith("*") or not name.startswith(prefix) or name.removeprefix(prefix)[:1].isalnum():
            continue  # A10 is no A100
        if reference:
            # What is lost beside the memory itself (1/share - 1) is the chip's and does not shrink with slower memory.
            lost = (1 / law.bandwidth - 1) * bytes_per_s / find(reference).bytes_per_s
            return replace(law, bandwidth=1 / (1 + lost))
        return law
    if measured:
        return MEASURED[kernel]
    return next(law for prefix, _, law in rows if prefix.startswith("*"))


def law(hardware: Hardware, kernel: str, dtype: str) -> Law:
    """The law of `kernel` ("gemm", "decode", "prefill") for a dtype; of hardware like it where there is none."""
    return _named(hardware.name, hardware.measured, hardware.bytes_per_s, kernel, dtype)


def of_products(hardware: Hardware, measured: Products, flops_per_s: float) -> Law:
    """The law of matrix products that were measured, with `flops_per_s` as the data sheet's rate; none reads faster than the
    memory, though a loop over few matrices may seem to."""
    least = 1 / hardware.bytes_per_s
    own = replace(measured, s_per_byte=tuple(max(least, s / IN_ENGINE) for s in measured.s_per_byte))
    bandwidth = 1 / own.read_s_per_byte / hardware.bytes_per_s
    compute = 2 / own.entry_bytes / own.wide_s_per_byte / flops_per_s
    return Law(0.0, bandwidth, compute, products=own)


@cache
def _link(name: str, pcie: bool, gpus: int) -> Law:
    size = "2" if gpus <= 2 else "4" if gpus <= 4 else "8"
    rows = _table()["all_reduce", "", size]
    own = [law for prefix, _, law in rows if not prefix.startswith("*") and name.startswith(prefix)]
    return own[0] if own else next(law for prefix, _, law in rows if prefix == ("* PCIe" if pcie else "* link"))


def link(hardware: Hardware, gpus: int) -> Law:
    """The law of an all-reduce between `gpus` accelerators of one machine; `bandwidth` is the share of the link."""
    pcie = hardware.link_for(gpus) == hardware.pcie_bytes_per_s
    return _link(hardware.name, pcie, gpus)


def smooth_max(a: Array, b: Array, sharpness: float) -> Array:
    """(a^s + b^s)^(1/s): near the larger, above it where they are alike."""
    largest = np.maximum(np.maximum(a, b), 1e-300)
    return np.asarray(largest * ((a / largest) ** sharpness + (b / largest) ** sharpness) ** (1 / sharpness))
