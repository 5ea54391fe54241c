"""Derives harness/theory/efficiency.csv from tables of measured kernels: python -m tests.derive_efficiency FOLDER.

FOLDER holds kernels_gemm.csv.gz, kernels_attention.csv.gz and kernels_comm.csv.gz: kernel timings of aiconfigurator
(ai-dynamo/aiconfigurator, PyPI aiconfigurator-core 0.12.0, Apache-2.0).  The tables are not shipped; the handful of
parameters fitted here are.  Each kernel is a law with few parameters, fitted to the logarithm of the time (soft L1):

gemm         t = latency + ((bytes / (bandwidth · rate))^s + (operations / (compute · peak))^s)^(1/s)
decode       t = latency + KV bytes / (bandwidth · rate)                                attention of one token
prefill      t = latency + bytes / (bandwidth · rate) + operations · (1 + half_length / n) / (compute · peak)
all_reduce   t = latency + 2 (n - 1) / n · bytes / (bandwidth · link)

`reference` is the GPU that was measured: others of its kind with another bandwidth reach another share of it.
The rows "*" are the medians over the GPUs, for hardware that has no table of its own.  A table that fits in the second
level cache measures the cache: matrices and caches below its size are left out (but for the shortest, which give the
latency).
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from harness.theory import hardware
from harness.theory.fit import least_squares

# table's name -> (row of the hardware table, prefixes of the rows that take these curves, bytes of L2 cache)
SYSTEMS = {
    "a100_sxm": ("A100-SXM-80GB", "A100;A800;A30", 40e6),
    "h100_sxm": ("H100-SXM-80GB", "H100;GH200;H800", 50e6),
    "h200_sxm": ("H200-SXM", "H200", 50e6),
    "l40s": ("L40S", "L40S;L40;L4;L20;RTX-4090;RTX-4080;RTX-4070-Ti;RTX-6000-Ada;RTX-5000-Ada;RTX-4000-Ada", 96e6),
    "b200_sxm": ("B200-SXM", "B200;GB200;B300;GB300", 126e6),
    "rtx_pro_6000_server": ("RTX-PRO-6000-Blackwell-Server", "RTX-PRO-6000;RTX-5090;RTX-5080", 128e6),
    "b60": ("Arc-Pro-B60", "Arc-Pro-B60", 18e6),
}
# table's dtype -> (ours, dtype of the peak, bytes of a weight, of an activation).  Block-scaled fp8 of vLLM on these
# versions falls back to Triton kernels several times slower, which says nothing of the hardware: left out.
GEMM_DTYPES = {
    "bfloat16": ("bf16", "bf16", 2.0, 2.0),
    "fp8": ("fp8", "fp8", 1.0, 1.0),
    "fp8_block": ("fp8_block", "fp8", 1.0, 1.0),
    "nvfp4": ("fp4", "fp4", 0.5625, 0.5625),
    "sq": ("int8", "int8", 1.0, 1.0),
    "int8_wo": ("int8_weights", "bf16", 1.0, 2.0),
    "int4_wo": ("int4", "bf16", 0.53, 2.0),
}
# Over PCIe an all-reduce is as fast as the host's switches (0.06, 0.35 and 0.67 of the link on three machines of eight; NVIDIA's
# pages of TensorRT-LLM imply 0.6 and more of an L40S's): a matter of the machine and not of the GPU, so these make the generic
# row, and the first two have none of their own.
NO_OWN = ("L40S", "RTX")
PCIE = (*NO_OWN, "Arc")
# Shares of the dense peak that others measured, for hardware without tables: maximum achievable matmul FLOPS of
# stas00/ml-engineering (MI300X 668 of 1307 TFLOPS, Gaudi2 419 of 432), and 43 % of 125 TFLOPS on an A10 (karpathy/llm.c
# pull request 621).  What is not stated is as of "*".
#
# H20 (148 TFLOPS beside 4 TB/s): kernels that compute tiles of 64 rows, as wgmma and Triton's default for blockwise fp8 do, are
# bound by computing at any batch up to 64: 5,120 x 51,200 in fp8 takes 142 us with 16 and with 64 rows, 267 with 128
# (alibaba/InferSim@7505de9b:bench_data/gemm/h20/data.csv, DeepGEMM, to 70 rows of which the fp8 law is fitted); on an H20-3e the
# kernel tuned for it reads 157 MB for one token in 78 us (sgl-project/sglang pull request 39306).  16 bit computes and reads
# twice as long: the same tile, the latency and bandwidth of an H200.  Kernels of narrow weights (Marlin) have tiles of 16.
# Prefill: bench_data/mha of InferSim (0.59 of the peak at 1,024 tokens, 0.88 at 32,768).
H20 = [("gemm", "bf16", 4.64, 0.8629, 0.9156, 2.786, "", 64, 0), ("gemm", "fp8", 3.673, 0.97, 0.9156, 1.823, "", 64, 70),
       ("gemm", "fp8_block", 3.673, 0.97, 0.9156, 1.823, "", 64, 70), ("gemm", "int4", 15, 0.8216, 0.8356, 1, "", 16, 0),
       ("gemm", "int8_weights", 15, 0.792, 0.7286, 1.092, "", 16, 0), ("prefill", "bf16", 13.41, 0.412, 0.88, "", 350, "", 5)]  # fmt: skip
STATED = {"MI300X;MI325X;MI350X;MI355X": 0.51, "Gaudi2": 0.87, "A10": 0.5}
COLUMNS = ("hardware", "reference", "kernel", "dtype", "gpus", "latency_us", "bandwidth", "compute", "sharpness", "half_length",
           "tile", "error", "rows")  # fmt: skip


def main(folder: Path, out: Path) -> None:
    rows = [*_gemm(folder), *_decode(folder), *_prefill(folder), *_all_reduce(folder)]
    rows += _generic(rows)
    common = next(r for r in rows if r["hardware"] == "*" and r["kernel"] == "gemm" and r["dtype"] == "bf16")
    rows += [common | {"hardware": name, "compute": share, "rows": 0} for name, share in STATED.items()]
    rows = [r for r in rows if r["kernel"] != "all_reduce" or not r["hardware"].startswith(NO_OWN)]
    links = [r for r in rows if r["kernel"] == "all_reduce" and r["hardware"] == "H200"]
    rows += [r | {"hardware": "H20", "rows": 0} for r in links]
    rows += [_row("H20", "H20", kernel, dtype, "", *law, "", n) for kernel, dtype, *law, n in H20]
    with out.open("w", newline="") as file:
        file.write(
            "# Laws of measured kernels, derived by tests/derive_efficiency.py from ai-dynamo/aiconfigurator's tables "
            "(PyPI aiconfigurator-core 0.12.0; Apache-2.0; Copyright NVIDIA CORPORATION & AFFILIATES).\n"
            "# Shares are of the data sheet's bandwidth, dense peak or link; error is the median of |fit / measured - 1|.\n"
        )
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def _fit(law, measured, start, low, high):
    """(parameters, median relative error) of law(parameters) -> seconds, all in logarithms."""
    x = least_squares(
        lambda x: np.log(law(np.exp(x)) / measured), np.log(start), low=np.log(low), high=np.log(high), robust=0.1
    )
    return np.exp(x), float(np.median(np.abs(law(np.exp(x)) / measured - 1)))


def _gemm(folder):
    table = pd.read_csv(folder / "kernels_gemm.csv.gz")
    for (system, dtype), g in table.groupby(["system", "gemm_dtype"]):
        name, prefixes, cache = SYSTEMS[system]
        gpu = hardware.find(name)
        ours, peak, wide, active = GEMM_DTYPES[dtype]
        if peak not in gpu.flops or (dtype == "fp8_block" and system not in ("h100_sxm", "h200_sxm", "b200_sxm")):
            continue
        if dtype == "fp8_block":
            g = g[g.framework != "VLLM"]
        g = g[(g.n * g.k * wide > cache / 2) & (g.m <= 16384)]
        m, n, k = (g[c].to_numpy(float) for c in "mnk")
        reads = (n * k * wide + m * k * active + 2 * m * n) / gpu.bytes_per_s
        work = 2 * m * n * k / gpu.flops[peak]

        def law(x, reads=reads, work=work):
            return x[0] * 1e-6 + ((reads / x[1]) ** x[3] + (work / x[2]) ** x[3]) ** (1 / x[3])

        x, error = _fit(law, g.latency_ms.to_numpy() / 1e3, [4, 0.8, 0.7, 2], [2, 0.3, 0.2, 1.0], [15, 0.97, 1.0, 6])
        yield _row(prefixes, name, "gemm", ours, "", x[0], x[1], x[2], x[3], "", "", error, len(g))


def _attention(folder, table):
    data = pd.read_csv(folder / "kernels_attention.csv.gz")
    data = data[data.table == table]
    return data.groupby(["system", "kv_cache_dtype"])


def _decode(folder):
    for (system, dtype), g in _attention(folder, "generation_attention_perf"):
        name, prefixes, cache = SYSTEMS[system]
        gpu = hardware.find(name)
        context = g.isl + g.step
        wide = 1 if dtype == "fp8" else 2
        size = 2.0 * g.batch_size * context * g.num_key_value_heads * g.head_dim * wide
        keep = (context >= 128) & ((size > cache) | (size < 2e6)) & (g.batch_size <= 512)
        g, context, size = g[keep], context[keep], size[keep]
        reads = (size / gpu.bytes_per_s).to_numpy()

        def law(x, reads=reads):
            return x[0] * 1e-6 + reads / x[1]

        x, error = _fit(law, g.latency_ms.to_numpy() / 1e3, [10, 0.8], [2, 0.3], [60, 0.97])
        yield _row(prefixes, name, "decode", _kv(dtype), "", x[0], x[1], "", "", "", "", error, len(g))


def _prefill(folder):
    for (system, dtype), g in _attention(folder, "context_attention_perf"):
        name, prefixes, _ = SYSTEMS[system]
        gpu = hardware.find(name)
        g = g[(g.isl >= 64) & (g.attn_dtype == "bfloat16")]
        n, b = g.isl.to_numpy(float), g.batch_size.to_numpy(float)
        heads, kv = g.num_heads.to_numpy(float), g.num_key_value_heads.to_numpy(float)
        d = g.head_dim.to_numpy(float)
        work = 2 * b * heads * d * n * (n + 1) / gpu.flops["bf16"]
        reads = b * n * d * 4 * (heads + kv) / gpu.bytes_per_s

        def law(x, work=work, reads=reads, n=n):
            return x[0] * 1e-6 + reads / x[1] + work * (1 + x[3] / n) / x[2]

        x, error = _fit(
            law, g.latency_ms.to_numpy() / 1e3, [10, 0.6, 0.6, 300], [2, 0.2, 0.1, 1], [60, 0.97, 1.0, 4000]
        )
        yield _row(prefixes, name, "prefill", _kv(dtype), "", x[0], x[1], x[2], "", x[3], "", error, len(g))


def _kv(dtype):
    return "fp8" if dtype == "fp8" else "bf16"


def _all_reduce(folder):
    table = pd.read_csv(folder / "kernels_comm.csv.gz")
    custom = table.kernel_source.str.contains("graph|TRTLLM|eager") & (table.table == "custom_allreduce_perf")
    eager = table.kernel_source.str.contains("eager")
    table = table[custom & (~eager | (table.system == "b60"))]
    for (system, gpus), g in table.groupby(["system", "num_gpus"]):
        name, prefixes, _ = SYSTEMS[system]
        gpu = hardware.find(name)
        g = g[g.message_size.between(2048, 2**27)]
        volume = 2 * (gpus - 1) / gpus * 2 * g.message_size.to_numpy(float) / gpu.link_for(gpus)

        def law(x, volume=volume):
            return x[0] * 1e-6 + volume / x[1]

        x, error = _fit(law, g.latency.to_numpy() / 1e3, [6, 0.6], [1, 0.02], [100, 1.0])
        yield _row(prefixes, name, "all_reduce", "", int(gpus), x[0], x[1], "", "", "", "", error, len(g))


def _row(*values):
    return dict(zip(COLUMNS, values, strict=True))


def _generic(rows):
    """Medians over the GPUs.  All-reduce: apart for links (NVLink and its like) and PCIe."""
    groups: dict[tuple[str, str, str, object], list[dict]] = {}
    for r in rows:
        name = "*"
        if r["kernel"] == "all_reduce":
            name = "* PCIe" if r["hardware"].startswith(PCIE) else "* link"
        groups.setdefault((name, r["kernel"], r["dtype"], r["gpus"]), []).append(r)
    for (name, kernel, dtype, gpus), group in groups.items():
        middle = {
            c: float(np.median([r[c] for r in group])) if group[0][c] != "" else ""
            for c in ("latency_us", "bandwidth", "compute", "sharpness", "half_length")
        }
        yield {"hardware": name, "reference": "", "kernel": kernel, "dtype": dtype, "gpus": gpus, **middle, "tile": "", "error": "",
               "rows": sum(r["rows"] for r in group)}  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent.parent / "harness" / "theory" / "efficiency.csv")
