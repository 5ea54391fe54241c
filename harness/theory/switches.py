"""Where engines change from one kernel to another as a batch grows: steps that are in their code, not in our law.

Narrow weights: up to `widen_above` tokens a kernel multiplies them as it unpacks them; with more they are written out in 16
bit for the library's product.  Decode attention: with few sequences and heads vLLM's paged attention splits each sequence
among thread blocks, with many it does not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from harness.theory.dtypes import BITS

if TYPE_CHECKING:
    from harness.theory.roofline import Setup

Array = npt.NDArray[np.float64]

# Unpacking a 4-bit weight takes no less on a large GPU, however fast its memory: from bitsandbytes' benchmarks (MIT, nf4, the
# difference of Llama-3.1-70B and Qwen2.5-32B on an H100).
UNPACK_S = 2.4e-12
# Sequences times heads of an accelerator above which paged attention is not split (vllm/attention/ops/paged_attn.py of 2024,
# Apache-2.0: use_v1).
SPLIT_ROWS = 512


def wide(s: Setup, tokens: Array) -> Array:
    """Share of products of `tokens` each (experts': on average) that have more than `widen_above`."""
    return np.clip(tokens - s.framework.widen_above, 0.0, 1.0)


def widened(s: Setup, size: Array | float, tokens: Array) -> tuple[Array | float, Array | float]:
    """(bytes of weights that the products read, seconds of writing them out in 16 bit before)."""
    bits = BITS.get(s.dtype or s.model.dtype, 16.0)
    if bits >= 16 or math.isinf(s.framework.widen_above):
        return size, 0.0
    entries, share = size * 8 / bits, wide(s, tokens)
    moving = (size + 2 * entries) / s.hardware.bytes_per_s / s.gemm.bandwidth
    unpacking = np.maximum(moving, entries * UNPACK_S) / s.tp * s.factors.bandwidth
    return size + share * (2 * entries - size), share * unpacking


def by_cores(s: Setup, tokens: Array) -> Array | float:
    """Least seconds a FLOP in a kernel that unpacks as it multiplies, without the matrix units: `cores` of the fp32 rate."""
    if BITS.get(s.dtype or s.model.dtype, 16.0) >= 16 or not s.framework.cores:
        return 0.0
    rate = s.framework.cores * s.hardware.flops.get("fp32", s.flops) * s.tp
    return (1 - wide(s, tokens)) * s.factors.compute / rate


def unsplit(s: Setup, batch: Array) -> Array:
    """How many times as long decode attention takes where sequences are no longer split."""
    rows = batch * max(g.heads for g in s.model.groups) / s.tp
    return np.where(rows > SPLIT_ROWS, s.framework.unsplit, 1.0)
