"""A GPU's hardware row, measured: copies and matrix products through torch or cupy, where one is installed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from harness.machine import MIB, best_rate
from harness.records import RidgelineError


class Arrays(NamedTuple):
    """What measuring needs of an array library on one device."""

    device: str
    mem_bytes: float
    library: str
    dtypes: tuple[str, ...]
    make: Callable[[int, str], Any]  # n x n random numbers of a dtype
    product: Callable[[Any, Any, Any], Any]  # left, right, where to
    copy: Callable[[Any, Any], Any]  # where to, from
    wait: Callable[[], Any]  # until the device is done


def row(budget_s: float = 12.0) -> dict[str, Any]:
    """The row of the first GPU.  Raises RidgelineError where neither library finds one."""
    for found in (_torch(), _cupy()):
        if found:
            return measure(found, budget_s)
    raise RidgelineError(
        "no GPU found through torch or cupy: install one of them in this environment, or name a row of `ridgeline hardware`"
    )


def measure(a: Arrays, budget_s: float, n: int = 8192, set_bytes: int = 1024 * MIB) -> dict[str, Any]:
    """Its row in SI units: the best copy of `set_bytes` (each byte is read and written), n x n products by dtype."""
    share_s = budget_s / (1 + len(a.dtypes))
    width = int((set_bytes / 4) ** 0.5)
    source, target = a.make(width, "fp32"), a.make(width, "fp32")

    def copied() -> float:
        a.copy(target, source)
        a.wait()
        return 2.0 * 4 * width**2

    def multiplied(left: Any, right: Any, out: Any) -> float:
        a.product(left, right, out)
        a.wait()
        return 2.0 * n**3

    bytes_per_s = best_rate([copied], share_s)
    flops = {
        dtype: best_rate([functools.partial(multiplied, *(a.make(n, dtype) for _ in range(3)))], share_s)
        for dtype in a.dtypes
    }
    return {
        "name": a.device,
        "vendor": a.device.split()[0],
        "flops": flops,
        "mem_bytes": a.mem_bytes,
        "bytes_per_s": bytes_per_s,
        "source": "measured by `ridgeline machine --gpu`",
        "notes": f"measured with {a.library}: products of {n} x {n}, copies of {set_bytes / 1e6:.0f} MB; no link measured",
        "measured": True,
    }


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _torch() -> Arrays | None:
    torch = _library("torch")
    if not torch or not torch.cuda.is_available():
        return None
    torch.backends.cuda.matmul.allow_tf32 = False  # or fp32 would be measured as tf32
    gpu = torch.cuda.get_device_properties(0)
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return Arrays(
        device=gpu.name,
        mem_bytes=float(gpu.total_memory),
        library=f"torch {torch.__version__}",
        dtypes=tuple(dtypes),
        make=lambda n, dtype: torch.randn((n, n), device="cuda:0").to(dtypes[dtype]),
        product=lambda left, right, out: torch.matmul(left, right, out=out),
        copy=lambda target, source: target.copy_(source),
        wait=torch.cuda.synchronize,
    )


def _cupy() -> Arrays | None:
    cupy = _library("cupy")
    try:
        if not cupy or not cupy.cuda.runtime.getDeviceCount():
            return None
    except cupy.cuda.runtime.CUDARuntimeError:
        return None
    gpu = cupy.cuda.runtime.getDeviceProperties(0)
    dtypes = {"fp32": cupy.float32, "fp16": cupy.float16}
    return Arrays(
        device=gpu["name"].decode(),
        mem_bytes=float(gpu["totalGlobalMem"]),
        library=f"cupy {cupy.__version__}",
        dtypes=tuple(dtypes),
        make=lambda n, dtype: cupy.random.random((n, n), dtype=cupy.float32).astype(dtypes[dtype]),
        product=lambda left, right, out: cupy.matmul(left, right, out=out),
        copy=lambda target, source: cupy.copyto(target, source),
        wait=cupy.cuda.Device(0).synchronize,
    )
