"""Context parallelism: the tokens of each sequence spread over accelerators that hold all weights (or a tensor-parallel share).

Prefill is Ring Attention (Liu et al., arXiv:2310.01889): each accelerator has a block of the sequence, attends with its
queries to one block of keys and values at a time, and passes that on to its neighbour meanwhile.  With a causal mask the
blocks are dealt out in pairs from both ends, so that all have as much to do (Brandon et al., Striped Attention,
arXiv:2311.09431, and its successors).  Decoding keeps the cache where it is: queries go to all blocks, and the partial
results come back with the sums that they are weighted by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from harness.records import RidgelineError
from harness.theory import kernels

if TYPE_CHECKING:
    from harness.theory.roofline import Setup

Array = npt.NDArray[np.float64]


def check(s: Setup) -> None:
    """RidgelineError for a split that is not modelled or that the hardware cannot have."""
    if s.cp < 1 or (s.cp > 1 and (s.pp > 1 or s.dp > 1 or s.framework.layered)):
        raise RidgelineError(f"cp {s.cp} must be at least 1, and beyond 1 it goes with tp alone, not with pp or ep")


def exchange(s: Setup, prompts: Array, tokens: Array, past: Array | float, attention_s: Array) -> tuple[Array, Array]:
    """Seconds of a prefill's ring: (what is longer than the attention beside it, what hides behind that).

    cp - 1 times in each layer an accelerator sends a block's keys and values, 16 bit; the last block's attention has
    nothing to send beside it.
    """
    law, rate = kernels.link(s.hardware, 2), s.hardware.link_for(s.gpus)
    block = prompts * s.model.kv_bytes(np.asarray((tokens + past) / s.cp), "fp16") * s.kv_copies / s.tp
    hop = s.model.layers * (law.latency_s + s.framework.link_s) + block / rate / law.bandwidth
    sending = s.factors.link * (s.cp - 1) * hop
    beside = attention_s * (s.cp - 1) / s.cp
    return np.maximum(sending - beside, 0.0), np.minimum(sending, beside)


def gather(s: Setup, batch: Array) -> tuple[Array, Array]:
    """Seconds of (latency, volume) of a decoding step: in each layer the queries to all accelerators, and each one's partial
    results back, both of the width of the query heads, 16 and 32 bit."""
    law, rate = kernels.link(s.hardware, s.cp), s.hardware.link_for(s.gpus)
    width = sum(g.count * g.heads * (2 * g.head_dim + 4 * (g.value_dim or g.head_dim)) for g in s.model.groups)
    latency = 2 * s.model.layers * (law.latency_s + s.framework.link_s) * np.ones_like(batch)
    volume = (s.cp - 1) / s.cp * batch * width / s.tp / rate / law.bandwidth
    return latency * s.factors.link, volume * s.factors.link
