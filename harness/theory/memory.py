"""What fits: weights, KV cache, activations and runtime against the memory there is, per accelerator and together."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from harness.theory.dtypes import BITS
from harness.theory.hardware import Hardware
from harness.theory.roofline import Setup

Array = npt.NDArray[np.float64]
CONTEXT_BYTES = 0.35e9  # CUDA context and workspaces of a process: 0.3 to 0.5 GB, of which torch counts a part
GIB_PER_GB = 2**30 / 1e9
# A data sheet's GB are GiB of memory chips, of which a driver keeps about 1 %: nvidia-smi shows 81559 MiB for an H100 of
# 80 GB, 143771 for an H200 of 141 GB.  Of the GDDR6 of these, error correction takes a sixteenth: 23028 MiB for an A10.
INLINE_ECC = ("T4", "A10", "A10G", "A40", "L4", "L40", "L40S")
SEQUENCES = 256  # most sequences in a step by the engines' defaults: their logits are kept in space reserved beforehand

# Of each logit while vLLM's trial pass sorts them for sampling, of as many sequences as its server takes on large cards: in 32
# bit, once more, and their places.  Its logs of gpt-oss-120b and Qwen3-235B on H100s have 7 to 9 GiB beside weights and cache.
SORTED_BYTES = 18


def usable_bytes(hardware: Hardware) -> float:
    """Bytes that the driver of one accelerator has to give."""
    if hardware.measured:
        return hardware.mem_bytes
    return hardware.mem_bytes * GIB_PER_GB * (15 / 16 if hardware.name in INLINE_ECC else 0.99)


def activation_bytes(s: Setup, tokens: Array | float, heads: Array | float) -> Array:
    """Peak beside weights and cache, on one accelerator, in a pass of `tokens` of which `heads` go through the lm_head.

    The residual stream, the layer's input and its output, the widest layer's projections (gate, up and their product),
    16 bit; logits in 16 and in 32 bit.
    """
    model = s.model
    wide = max(g.ffn_matmul + g.experts_per_token * g.expert_matmul for g in model.groups) / model.hidden / s.tp
    layer = tokens * 2.0 * (3 * model.hidden + wide)
    return np.asarray(layer + heads * model.vocab * 6.0 / s.tp)


def padding_bytes(s: Setup) -> float:
    """What engines add to 4 bit experts, whose rows they fill up to a multiple of 256 for their kernels (vLLM's mxfp4.py,
    Apache-2.0): of gpt-oss-120b, whose weights take 60.7 GiB, it logs 64.4 (Triton) and 66.0 (Marlin)."""
    if BITS.get(s.dtype or s.model.dtype, 16.0) >= 8:
        return 0.0
    return s.model.bytes_by_part(s.dtype)["experts"] * (math.ceil(s.model.hidden / 256) * 256 / s.model.hidden - 1)


def kv_space_bytes(s: Setup, *, sampling: bool = True) -> float:
    """Bytes left for KV cache on all accelerators together: what was told, or of the engine's share what weights, the
    largest pass and the runtime leave, as vLLM finds it by a trial pass when it starts."""
    if not math.isnan(s.memory.kv_bytes):
        return s.memory.kv_bytes * s.gpus
    share = s.memory.share if s.framework.pool else 1.0  # without a pool it takes what it needs
    taken = usable_bytes(s.hardware) * s.gpus * share - s.model.weight_bytes(s.dtype) - padding_bytes(s)
    if s.hardware.measured:
        return taken
    passing = float(activation_bytes(s, s.memory.batched_tokens or s.framework.chunk, SEQUENCES)) + CONTEXT_BYTES
    if sampling and SEQUENCES < s.framework.sequences < math.inf:
        passing += s.framework.sequences * s.model.vocab * SORTED_BYTES
    if not s.memory.batched_tokens:  # where it would not fit, an engine is told to do less at a time
        passing = min(passing, 0.1 * usable_bytes(s.hardware))
    return taken - passing * s.gpus


def kv_capacity(s: Setup) -> tuple[int, int]:
    """(tokens that the cache holds, tokens of a block), in whole blocks, as vLLM logs them when it starts: blocks of 16
    on accelerators, of 128 on CPUs.  Of layers with a window it keeps the whole context (as without its hybrid cache)."""
    block = 128 if s.hardware.cpu else 16
    each = block * s.model.kv_bytes_per_token(s.kv_dtype) * s.kv_copies
    return max(0, math.floor(kv_space_bytes(s) / each)) * block, block


def largest_batch(s: Setup, context: Array) -> Array:
    """Whole sequences of `context` tokens whose KV cache fits beside the weights; 0: not one.  Where that is tight an engine
    is told to sample fewer at a time."""
    each = s.model.kv_bytes(context, s.kv_dtype) * s.kv_copies
    return np.maximum(0.0, np.floor(kv_space_bytes(s, sampling=False) / each))


def peak_terms(s: Setup, batch: Array, tokens: Array, output: Array) -> dict[str, Array]:
    """Peak memory in use of all accelerators together, by part.

    An engine that takes its share in advance (vLLM and its like) shows that share whatever it serves; others need
    weights, the cache of the batch, activations and the runtime's own.
    """
    same = np.ones_like(batch)
    terms = {"weights": s.model.weight_bytes(s.dtype) * same, "runtime": CONTEXT_BYTES * s.gpus * same}
    if s.framework.pool:
        whole = usable_bytes(s.hardware) * s.gpus
        cache_only = terms["weights"] if s.framework.pool_of == "cache" else 0.0
        taken = np.minimum(whole * s.framework.pool + cache_only, 0.98 * whole)
        return terms | {"reserved": np.maximum(taken - terms["weights"], 0.0)}
    logits = batch * tokens if s.framework.all_logits else batch
    terms["kv cache"] = batch * s.model.kv_bytes(tokens + output, s.kv_dtype) * s.kv_copies * s.framework.cache_copies
    return terms | {"activations": s.gpus * activation_bytes(s, batch * tokens, logits)}


def peak_bytes(s: Setup, batch: Array, tokens: Array, output: Array) -> Array:
    """The sum of `peak_terms`."""
    return np.asarray(sum(peak_terms(s, batch, tokens, output).values()))
