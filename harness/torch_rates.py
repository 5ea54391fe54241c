"""What torch's own matrix kernels reach on this machine's cores: run by an engine's interpreter, needs torch alone.

python torch_rates.py DTYPE THREADS BUDGET_S prints {"torch": version, "flops_per_s": wide products, "bytes_per_s": what
products with a single row read of their matrices}, or nothing where torch is not there or sees a GPU.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

ROWS, INNER, OUTER = 1024, 2048, 5632  # as wide as a prefill; matrices as large as a layer's
SET_BYTES = 512 * 2**20  # far beyond the caches


def best_s(work: Callable[[], Any], budget_s: float) -> float:
    """The third best time of `work`: others slow it down and nothing speeds it up, but a clock may slip."""
    took: list[float] = []
    until_s = time.perf_counter() + budget_s
    while len(took) < 4 or time.perf_counter() < until_s:
        start_s = time.perf_counter()
        work()
        took.append(time.perf_counter() - start_s)
    return sorted(took)[2]


def main(dtype: str, threads: int, budget_s: float) -> None:
    try:
        import torch
    except ImportError:
        return
    if torch.cuda.is_available():
        return
    torch.set_num_threads(threads)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    linear, one = torch.nn.functional.linear, torch.empty(OUTER, INNER).uniform_(-1, 1).to(kind)
    matrix_bytes = one.numel() * one.element_size()
    matrices = [one.clone() for _ in range(-(-SET_BYTES // matrix_bytes))]
    wide, narrow = (torch.ones(rows, INNER).to(kind) for rows in (ROWS, 1))
    with torch.inference_mode():
        wide_s = best_s(lambda: linear(wide, one), budget_s / 2)
        narrow_s = best_s(lambda: [linear(narrow, matrix) for matrix in matrices], budget_s / 2)
    print(json.dumps({"torch": torch.__version__, "flops_per_s": 2.0 * ROWS * one.numel() / wide_s,
                      "bytes_per_s": matrix_bytes * len(matrices) / narrow_s}))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
