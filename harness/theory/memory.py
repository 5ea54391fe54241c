"""What fits: weights, KV cache, activations and runtime against the memory there is, per accelerator and together."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from harness.theory.dtypes import BITS
from harness.theory.frameworks import named
from harness.theory.hardware import Hardware
from harness.theory.roofline import Setup

Array = npt.NDArray[np.float64]
CONTEXT_BYTES = 0.35e9  # CUDA context and workspaces of a process: 0.3 to 0.5 GB
# What nvidia-smi shows beside what a process allocates: its context with all kernels loaded, and the driver's own.  1.47 GB in
# optimum-benchmark's full reports of Llama-2-7B on an A100 (max_memory_used less max_memory_reserved, the same at each batch).
PROCESS_BYTES = 1.4e9
COUNTED_BYTES = 0.05e9  # of these what torch allocates itself and counts: the workspaces of cuBLAS
OF_FREE = ("tensorrt-llm", "optimum-nvidia")  # whose share (free_gpu_memory_fraction) is of what the weights leave free
# Whose published peaks are what torch counts of its own allocations (max_memory_allocated, max_memory_reserved): the scripts
# of optimum-benchmark and of QwenLM/Qwen2.5, gpt-fast's generate.py.  Others print what the driver says (nvidia-smi).
TORCH_COUNTED = ("transformers", "autoawq", "lightning", "gpt-fast", "deepspeed")
# A process also holds blocks that torch's allocator keeps for later: with PROCESS_BYTES 1.7 to 3.3 GB in the rows of
# optimum-benchmark (A100, 2023) that give the process's peak.  Which of the two a table gives it rarely says.
HELD_BYTES = 1.6e9
# Whose published peaks begin with loading: AutoAWQ joins the matrices of query, key and value, which are there twice until
# then (fuse_layers; its benchmark never resets the peak).  These families have them in one already.
JOINED_ON_LOADING, JOINED = ("autoawq",), ("mpt", "falcon", "bloom", "gpt_neox", "phi3", "chatglm")
# Whose cache is made for the longest context that the model is for (ExLlamaV2Cache's max_seq_len).
WHOLE_CONTEXT = ("exllama", "exllamav2")
# FasterTransformer's context, MPI and NCCL included, from its GPT 1.3B on an A100; its 6.7B, not fitted, has the same.
CONTEXTS = {"fastertransformer": 2.9e9}
# Buffers of 16 bit that are there for every prompt token of the batch from first to last, in widths of the residual stream.
# FasterTransformer keeps all those of a layer beside each other: 17, each a fifth larger in batch and in length than asked for
# (ParallelGptContextDecoder.cc, isValidBatchSize and isValidSeqLen, Apache-2.0).
KEPT = {"fastertransformer": 17 * 1.2 * 1.2}
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
    taken = usable_bytes(s.hardware) * s.gpus * share - s.model.weight_bytes(s.dtype) * s.cp - padding_bytes(s)
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


def _pass_bytes(s: Setup, sequences: Array, tokens: Array | float, heads: Array | float) -> Array:
    """Peak beside weights and cache, on one accelerator, while `tokens` of each of `sequences` run through in one pass, of
    which `heads` go through the lm_head: the largest of what a layer's FFN, its attention matrix and the logits need, since
    none is there with another.

    A layer: residual, input, output and the normed input; gate, up and their product (so measured within 1 % for six Qwen2.5
    of 0.5B to 72B in transformers 4.46, QwenLM/Qwen2.5's table, isl 14336 to 30720).  Of routed experts one runs at a time.
    """
    model = s.model
    wide = max(max(g.ffn_matmul, g.expert_matmul) for g in model.groups) / model.hidden / s.tp
    layer = sequences * tokens * 2.0 * (4 * model.hidden + wide)
    scores = s.framework.score_bytes * sequences * max(g.heads for g in model.groups) / s.tp * np.square(tokens)
    logits = heads * model.vocab * 6.0 / s.tp + sequences * tokens * 4.0 * model.hidden
    return np.asarray(np.maximum(np.maximum(layer, scores), logits))


def _as_needed(s: Setup, batch: Array, tokens: Array, output: Array) -> dict[str, Array]:
    """Cache and activations of an engine that takes what it needs: at the end of the prefill or at the end of decoding,
    whichever is more.  Only a cache that grows by concatenation is smaller at first."""
    each = batch * s.kv_copies
    full = each * s.model.kv_bytes(tokens + output, s.kv_dtype) * s.framework.cache_copies
    if named(s.framework.name) in WHOLE_CONTEXT:  # windows too
        full = each * np.maximum(tokens + output, s.model.max_context) * s.model.kv_bytes_per_token(s.kv_dtype)
    first = each * s.model.kv_bytes(tokens, s.kv_dtype) if s.framework.copied else full
    prefill = s.gpus * _pass_bytes(s, batch, tokens, batch * tokens if s.framework.all_logits else batch)
    decode = s.gpus * _pass_bytes(s, batch, 1.0, batch)
    joining = _joined_bytes(s) if named(s.framework.name) in JOINED_ON_LOADING else 0.0
    decode = np.maximum(decode, joining - full)
    early = first + prefill > full + decode
    kept = batch * tokens * s.model.hidden * 2.0 * KEPT.get(named(s.framework.name), 0.0)
    return {"kv cache": np.where(early, first, full), "activations": np.where(early, prefill, decode) + kept}


def _process_bytes(hardware: Hardware) -> float:
    return PROCESS_BYTES if hardware.vendor in ("NVIDIA", "AMD") and not hardware.cpu else CONTEXT_BYTES


def _joined_bytes(s: Setup) -> float:
    """Bytes of the matrices of queries, keys and values, as stored: what joining them holds twice."""
    if s.model.family in JOINED:
        return 0.0
    share = 1 - sum(g.count * g.heads * (g.value_dim or g.head_dim) for g in s.model.groups) * s.model.hidden / sum(
        g.count * g.attention_matmul for g in s.model.groups
    )
    return share * s.model.bytes_by_part(s.dtype)["attention"]


def scratch_bytes(s: Setup) -> float:
    """What kernels keep for themselves on one accelerator: exllamav2's in transformers hold the widest matrix in 16 bit and
    its outputs for `scratch_tokens` tokens in 32 (QuantLinear.scratch_space_fixed of AutoGPTQ, MIT)."""
    if not s.framework.scratch_tokens:
        return 0.0
    width = max(g.ffn_matmul for g in s.model.groups) / 3 / s.model.hidden
    return float(width * (2.0 * s.model.hidden + 4.0 * s.framework.scratch_tokens))


def peak_terms(s: Setup, batch: Array, tokens: Array, output: Array) -> dict[str, Array]:
    """Peak memory in use of all accelerators together, by part, as the driver counts it.

    An engine that takes its share in advance (vLLM and its like) shows that share whatever it serves; others need
    weights, the cache of the batch, activations and the runtime's own.
    """
    same = np.ones_like(batch)
    name = named(s.framework.name)
    runtime = CONTEXTS.get(name, _process_bytes(s.hardware)) + scratch_bytes(s)
    terms = {"weights": s.model.weight_bytes(s.dtype) * s.cp * same, "runtime": runtime * s.gpus * same}
    whole = usable_bytes(s.hardware) * s.gpus
    if name in OF_FREE:
        left = np.maximum(whole - terms["weights"] - terms["runtime"], 0.0)
        return terms | {"reserved": (s.framework.pool or 0.9) * left}
    if s.framework.pool:
        terms["runtime"] = CONTEXT_BYTES * s.gpus * same  # the share is of all that is in use
        cache_only = terms["weights"] if s.framework.pool_of == "cache" else 0.0
        taken = np.minimum(whole * s.framework.pool + cache_only, 0.98 * whole)
        return terms | {"reserved": np.maximum(taken - terms["weights"], 0.0)}
    return terms | _as_needed(s, batch, tokens, output)


def interval(s: Setup, value: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """The 90 % interval of a peak, given that of engines in general: with torch it reaches from what torch counts to what a
    process holds."""
    if named(s.framework.name) not in TORCH_COUNTED or s.framework.pool:
        return low, high
    return (value - uncounted_bytes(s)) * 0.93, value * 1.03 + HELD_BYTES * s.gpus


def uncounted_bytes(s: Setup) -> float:
    """Of `peak_terms` what published figures of this framework leave out, since torch counts only what it allocates."""
    counts = named(s.framework.name) in TORCH_COUNTED and not s.framework.pool
    return (_process_bytes(s.hardware) - COUNTED_BYTES) * s.gpus if counts else 0.0


def peak_bytes(s: Setup, batch: Array, tokens: Array, output: Array) -> Array:
    """The sum of `peak_terms`."""
    return np.asarray(sum(peak_terms(s, batch, tokens, output).values()))
