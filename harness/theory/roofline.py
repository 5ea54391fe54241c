"""The refined roofline: what a pass of tokens through a model takes, as named terms that add up.

A pass is a prefill (whole prompts, or a chunk of one) or a decoding step.  Its terms, for each layer and all of them:

    weights, matmul   reading the matrices, or multiplying with them: the larger of the two, by the kernels' own law
    ridge             what the smooth maximum near the ridge adds to the larger
    kv cache          reading the KV cache (decoding); it does not hide behind the matrix work of the same step
                      (scaling-book, inference chapter), so it adds
    attention         computing attention (prefill, or decoding where it takes longer than the reads)
    activations       what lies between the matrices: norms, rotary embedding, activation function, residuals
    launch            latency of the kernels, however small
    host              what the framework does between steps, for each step and each sequence in it
    ring              passing keys and values on in context parallel, where that takes longer than the attention beside it
    link latency, link volume    two all-reduces a layer in tensor parallel, one hand-over a stage in pipeline parallel

Everything takes arrays, so that a sweep is one call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from harness.records import RidgelineError
from harness.theory import kernels, precision, ring, switches
from harness.theory.dtypes import BITS, GGUF_BITS, WHOLE, dtype_named, kind_of
from harness.theory.frameworks import Framework, named, stored
from harness.theory.hardware import Hardware
from harness.theory.shape import Model

Array = npt.NDArray[np.float64]
Terms = dict[str, Array]

# term -> what binds where it is the largest.
LIMIT_OF = {
    "weights": "memory_bandwidth",
    "kv cache": "memory_bandwidth",
    "activations": "memory_bandwidth",
    "matmul": "compute",
    "attention": "compute",
    "ridge": "compute",
    "launch": "latency",
    "host": "latency",
    "link latency": "communication",
    "link volume": "communication",
    "ring": "communication",
    "waiting for memory": "capacity",
    "waiting for prefills": "queue",
    "waiting for a step": "queue",
    "waiting for a slot": "queue",
    "waiting for those beside": "queue",
    "prefills of others": "compute",
    "stream": "latency",
    "draft": "memory_bandwidth",
}

# A CPU's vector kernels are half way to the rate of its matrix kernels at one and so many tokens.  From one machine: llama.cpp
# with Q4_1 on two EPYC cores takes 9.9, 9.5, 8.9 and 5.7 ms a token at batch 1, 2, 4 and 8, beside 4.3 of a wide product.
NARROW_TOKENS = 6
SMALL_KERNELS = 6  # a layer beside its matrices and attention: two norms, rotary, cache write, activation, residual
SMALL_KERNEL_S = 1.5e-6  # each, replayed from a graph


@dataclass(frozen=True, slots=True)
class Factors:
    """Times the model's own estimate of each kind of work; 1 is uncalibrated.  `calibrate` fits them."""

    compute: float = 1.0
    bandwidth: float = 1.0
    kv: float = 1.0
    overhead: float = 1.0
    link: float = 1.0
    queue: float = 1.0
    request: float = 1.0
    narrow: float = 1.0  # of a CPU's matrix work on few tokens, on top of `compute`; see NARROW_TOKENS
    slot: float = 0.0  # an addend: slots that the server has fewer than the clients, as a share of one


@dataclass(frozen=True, slots=True)
class Draft:
    """Speculative decoding: a small model proposes `tokens` at a time, each accepted with probability `acceptance`
    given that those before it were (Leviathan et al., arXiv:2211.17192)."""

    setup: Setup
    tokens: int
    acceptance: float

    @property
    def gained(self) -> float:
        """Tokens that a pass of the large model gives, expected: (1 - a^(k+1)) / (1 - a)."""
        a, k = self.acceptance, self.tokens
        return float(k + 1) if a == 1 else (1 - a ** (k + 1)) / (1 - a)


@dataclass(frozen=True, slots=True)
class Room:
    """What an engine was told of memory: the share of each accelerator that it takes (vLLM's gpu_memory_utilization, 0.9
    by default), the most tokens of a pass (max_num_batched_tokens; 0: the framework's), or the KV cache of each
    accelerator in bytes outright (NaN: what is left)."""

    share: float = 0.9
    batched_tokens: int = 0
    kv_bytes: float = math.nan

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise RidgelineError(f"the share of the memory must be above 0 and at most 1, got {self.share:g}")
        if self.batched_tokens < 0 or self.kv_bytes <= 0:
            raise RidgelineError("the most tokens of a pass and the space of the KV cache must be above 0")


@dataclass(frozen=True, slots=True)
class Setup:
    """A model on accelerators with its dtypes settled.  `flops` and `head_flops` are of one accelerator."""

    model: Model
    hardware: Hardware
    framework: Framework
    tp: int
    pp: int
    ep: int
    dp: int  # replicas of the attention within one expert-parallel group
    dtype: str | None  # None: the weights as stored
    kv_dtype: str | None
    matmul_dtype: str
    flops: float
    head_flops: float
    gain: float  # how much faster narrower kernels might be than the rate we have
    factors: Factors
    notes: tuple[str, ...]
    gemm: kernels.Law
    head: kernels.Law
    decode: kernels.Law
    prefill: kernels.Law
    draft: Draft | None = None
    memory: Room = Room()
    cp: int = 1  # accelerators (of `tp` each) that the tokens of a sequence are spread over, with all weights in each

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def kv_copies(self) -> float:
        """Tensor parallelism beyond the number of KV heads keeps copies of them."""
        return self.tp / min(self.tp, self.model.kv_heads)

    @property
    def request_s(self) -> float:
        """From a request's arrival to its first pass."""
        fw = self.framework
        more = fw.routed_s * self.model.moe + fw.latent_s * self.model.mla
        return (fw.request_s + more) * self.factors.request

    def weights_s(self) -> float:
        """Reading the weights once at the data sheet's rate (of all accelerators)."""
        return float(self.model.read_bytes(self.dtype)) / (self.hardware.bytes_per_s * self.tp)


def setup(
    model: Model,
    hardware: Hardware,
    framework: Framework,
    *,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    dp: int = 1,
    cp: int = 1,
    factors: Factors | None = None,
) -> Setup:
    """Settle dtypes, rates and laws.  Raises RidgelineError for a split that the model or the hardware cannot have."""
    notes = [*hardware.caveats, *model.notes]
    if framework.layered:
        tp, pp = 1, tp * pp
    model = precision.as_kept(model, named(framework.name))
    weights, activations, matmul = precision.settled(model, stored(dtype, framework.name), notes)
    used, gain = precision.rate(hardware, matmul, activations, model, weights, notes)
    wide, _ = precision.rate(hardware, activations, activations, model, weights, [])
    _check_split(model, hardware, tp, pp, ep, dp, cp)
    if not kernels.measured_itself(hardware) and not hardware.measured:
        notes.append(f"no kernels of {hardware.name} were measured: the efficiencies are those of other accelerators")
    cache = None if kv_dtype in (None, "", "auto") else dtype_named(str(kv_dtype))
    decode = kernels.law(hardware, "decode", "fp8" if cache in ("fp8", "int8") else "bf16")
    if products := hardware.products.get(kind_of(weights or model.dtype)):
        # Where it was not measured, the usual share of the products' rate: vLLM 0.32 on two EPYC cores reads 16 GB/s of it, and
        # 23 of matrices.
        attending = products.kv_s_per_byte / kernels.IN_ENGINE
        if math.isnan(attending):
            attending = products.read_s_per_byte / decode.bandwidth
        decode = replace(decode, bandwidth=min(1.0, 1 / attending / hardware.bytes_per_s))
        # Of another type it was measured in its own shape, as the file has it.
        own = products if weights else hardware.products.get(model.head_dtype, products)
        gemm = kernels.of_products(hardware, products, hardware.flops[used])
        head = kernels.of_products(hardware, own, hardware.flops[wide])
        fastest = max(gemm.compute, head.compute) / kernels.IN_ENGINE
        gain = max(gain, fastest)  # a CPU with matrix units multiplies integers faster yet
    else:
        gain = max(gain, 2.0) if framework.half_sums else gain
        gemm = kernels.law(hardware, "gemm", precision.law_dtype(weights or model.dtype, used))
        head = kernels.law(hardware, "gemm", "bf16")
    built = Setup(
        model, hardware, framework, tp, pp, ep, dp, weights, cache, used,
        hardware.flops[used], hardware.flops[wide], gain, factors or Factors(), tuple(notes),
        gemm=gemm, head=head, decode=decode, prefill=kernels.law(hardware, "prefill", "bf16"), cp=cp,
    )  # fmt: skip
    ring.check(built)
    return built


def _unshared(model: Model, tp: int) -> str:
    """Why `tp` accelerators cannot share the model's layers; empty where they can.

    vLLM and SGLang give each accelerator whole heads, and whole KV heads or copies of one; their model code asserts it.
    """
    if tp < 1 or any(g.heads % tp for g in model.groups):
        return f"tp {tp} must be at least 1 and divide the {model.groups[0].heads} heads of {model.name}"
    odd = next((g.kv_heads for g in model.groups if max(tp, g.kv_heads) % min(tp, g.kv_heads)), 0)
    return f"tp {tp} must divide the {odd} KV heads of {model.name} or be a multiple of them" if odd else ""


def _check_split(model: Model, hardware: Hardware, tp: int, pp: int, ep: int, dp: int, cp: int) -> None:
    if why := _unshared(model, tp):
        raise RidgelineError(why)
    if not 1 <= pp <= model.layers:
        raise RidgelineError(f"pp {pp} must be from 1 to the {model.layers} layers of {model.name}")
    experts = max(g.experts for g in model.groups)
    if ep < 1 or (ep > 1 and (not experts or experts % ep)):
        raise RidgelineError(f"ep {ep} must be 1 or divide the {experts} experts of {model.name}")
    if dp < 1 or (dp > 1 and not experts):
        raise RidgelineError(f"dp {dp} must be at least 1, and 1 for {model.name}, which has no experts to share")
    if (gpus := tp * pp * dp * cp) > 1 and math.isnan(hardware.link_for(gpus)):
        raise RidgelineError(
            f"hardware {hardware.name}: no link or PCIe rate is known, so tp and pp must be 1, got {tp} and {pp}"
        )


@dataclass(frozen=True, slots=True)
class Pass:
    """Seconds by term, arrays alike; `terms` add up to the time, `hidden` overlaps with it.  `bound`: no pass of this
    kind is faster: all reads at full bandwidth and all operations at full rate in full overlap, top-k experts only, no
    communication."""

    terms: Terms
    hidden: Terms
    bound: Array

    @property
    def total(self) -> Array:
        return np.asarray(sum(self.terms.values()))

    def scaled_terms(self, factor: Array | float) -> Pass:
        """Another time, the same bound."""
        terms, hidden = ({k: v * factor for k, v in d.items()} for d in (self.terms, self.hidden))
        return Pass(terms, hidden, self.bound)


def decode_step(s: Setup, batch: Array, first: Array, last: Array) -> Pass:
    """The mean step of `batch` sequences while their contexts grow from `first` to `last` tokens: the time of one token,
    also where a draft makes a pass give several."""
    if s.draft is None:
        return _decode_pass(s, batch, first, last, 1)
    done = _decode_pass(s, batch, first, last, s.draft.tokens + 1)
    drafting = s.draft.tokens * _decode_pass(s.draft.setup, batch, first, last, 1).total
    terms = {name: v / s.draft.gained for name, v in (done.terms | {"draft": drafting}).items()}
    return Pass(terms, {k: v / s.draft.gained for k, v in done.hidden.items()}, done.bound / (s.draft.tokens + 1))


def _decode_pass(s: Setup, batch: Array, first: Array, last: Array, width: int) -> Pass:
    """A pass of `width` new tokens of each of `batch` sequences.

    In pipeline parallel the batch is split over the stages, and a token takes the time of all of them.
    """
    model = s.model
    stages = 1.0 if s.framework.layered else np.minimum(batch, s.pp)
    whole, batch = batch, np.maximum(1.0, batch / stages / s.dp)
    kv = batch * model.mean_kv_read_bytes(first, last, s.kv_dtype) / s.cp
    flops = width * batch * model.mean_attention_flops(first, last) / s.cp
    narrow = s.kv_dtype or ("fp8" if (s.dtype or model.dtype) not in WHOLE else None)
    kv_least = batch / s.cp * model.mean_kv_read_bytes(first, last, narrow)
    group = max(g.heads / g.kv_heads for g in model.groups) if not model.mla else 1.0
    slower = s.framework.attention * group**s.framework.grouped * s.factors.kv * switches.unsplit(s, batch)
    if s.framework.copied:  # read and written for torch.cat, read for copies, written and read for each query head
        slower *= 3 + 2 * group if group > 1 else 3
    reads = kv * s.kv_copies / (s.hardware.bytes_per_s * s.tp) / s.decode.bandwidth * slower
    computing = flops / (s.head_flops * s.tp) / (0.5 if model.mla else 0.3) * s.factors.compute
    if not model.mla:  # whole tiles of query rows
        peak = s.hardware.flops.get("fp8", s.head_flops) if s.kv_dtype == "fp8" else s.head_flops
        tiles = flops * np.maximum(s.framework.attention_rows / (width * group), 1.0) / (peak * s.tp)
        computing = np.maximum(computing, tiles / s.prefill.compute * s.factors.compute)
    done = _matrices(s, width * batch, width * batch)
    shorter, longer = np.minimum(reads, computing), np.where(reads >= computing, reads, computing)
    done.terms["kv cache"] = np.where(reads >= computing, longer, 0.0)
    done.terms["attention"] = np.where(reads >= computing, 0.0, longer)
    done.hidden["attention"] = np.where(reads >= computing, shorter, 0.0)
    _overheads(s, done.terms, width * batch, model.layers * s.decode.latency_s, eager=s.framework.eager_decode)
    if s.cp > 1:
        latency, volume = ring.gather(s, width * batch)
        done.terms["link latency"] = done.terms["link latency"] + latency
        done.terms["link volume"] = done.terms["link volume"] + volume
    done.terms["host"] = s.factors.overhead * (s.framework.step_s + s.framework.sequence_s * whole)
    bound = np.maximum(
        (model.read_bytes(s.dtype) / s.dp + kv_least) / (s.hardware.bytes_per_s * s.tp),
        _work(s, width * batch, width * batch, flops) / s.gain,
    )
    return Pass(done.terms, done.hidden, bound)


def prefill_pass(s: Setup, prompts: Array, tokens: Array, past: Array | float = 0.0) -> Pass:
    """`prompts` prompts of `tokens` each, in one batch, with `past` tokens of each already in the cache."""
    model, prompts, past = s.model, np.maximum(1.0, prompts / s.dp), np.asarray(past, dtype=np.float64)
    total = prompts * tokens / s.cp
    flops = prompts * model.prefill_attention_flops(tokens, past) / s.cp
    law = s.prefill
    done = _matrices(s, total, total if s.framework.all_logits else prompts)
    moved = 2.0 * total * sum(2 * g.count * g.head_dim * (g.heads + g.kv_heads) for g in model.groups)
    done.terms["attention"] = (
        s.factors.compute
        * s.framework.attention
        * (
            flops / (s.head_flops * s.tp) / law.compute * (1 + law.half_length / (tokens + past))
            + moved / (s.hardware.bytes_per_s * s.tp) / law.bandwidth
        )
    )
    if s.cp > 1:
        done.terms["ring"], done.hidden["ring"] = ring.exchange(s, prompts, tokens, past, done.terms["attention"])
    _overheads(s, done.terms, total, model.layers * law.latency_s, eager=s.framework.eager_prefill)
    done.terms["host"] = s.factors.overhead * (s.framework.step_s + s.framework.sequence_s * prompts)
    bound = np.maximum(
        model.read_bytes(s.dtype) / (s.hardware.bytes_per_s * s.gpus), _work(s, total, prompts, flops) / s.gain / s.dp
    )
    return Pass(done.terms, done.hidden, bound)


def _work(s: Setup, tokens: Array, heads: Array, attention_flops: Array) -> Array:
    """Seconds of all operations at full rate."""
    layers = tokens * s.model.matmul_flops_per_token / (s.flops * s.tp)
    return np.asarray(layers + (heads * s.model.head_flops_per_token + attention_flops) / (s.head_flops * s.tp))


def _matrices(s: Setup, tokens: Array, heads: Array) -> Pass:
    """`tokens` through the layers' matrices, `heads` of them through the lm_head."""
    model, parts = s.model, s.model.bytes_by_part(s.dtype)
    rate = s.hardware.bytes_per_s * s.tp
    routed = sum(g.count * g.experts_per_token * g.expert_matmul for g in model.groups) * 2.0
    dense = model.matmul_flops_per_token - routed
    slower, slower_head = _narrow(s, tokens), _narrow(s, heads)
    layers, unpacking = switches.widened(
        s, parts["attention"] + parts["ffn"] + parts["router"] + parts["norms"], tokens
    )
    rows, head_rows = np.maximum(tokens, s.gemm.tile), np.maximum(heads, s.head.tile)
    head = model.vocab * model.hidden * _head_bytes(s)
    # The law, the bytes of the matrices, the operations, their peak, and the rows that each matrix is multiplied with.
    jobs: list[tuple[kernels.Law, Array | float, Array, float, Array]] = [
        (s.gemm, layers, dense * rows * slower, s.flops, tokens),
        (s.head, head, model.head_flops_per_token * head_rows * slower_head, s.head_flops, heads),
    ]
    if routed:
        # All replicas' tokens meet the experts, which are spread over all of them.
        read = model.experts_read(tokens * s.dp)
        grouping = _grouping(s)
        share = routed / 2 / sum(g.count * g.experts * g.expert_matmul for g in model.groups)
        each = tokens * s.dp * share / read  # rows of an expert's own product
        experts, more = switches.widened(
            s, parts["experts"] * read / s.dp * (s.framework.experts_read or grouping), each
        )
        unpacking, fw = unpacking + more, s.framework
        moved, worked = (x ** (fw.experts_lose - 1.0) for x in (fw.gemm, fw.compute))  # by the engine's own kernels
        jobs.append((s.gemm, experts * moved, routed * tokens * slower * grouping * worked, s.flops, each))
    zero = np.zeros_like(tokens, dtype=np.float64)
    terms: Terms = {"weights": zero + unpacking, "matmul": zero, "ridge": zero}
    hidden: Terms = {"weights": zero, "matmul": zero}
    for law, size, flops, peak, met in jobs:
        reads = size / rate / law.bandwidth * s.factors.bandwidth * s.framework.gemm + zero
        works = flops / (peak * s.tp) / law.compute * s.factors.compute * s.framework.compute
        larger = np.maximum(reads, works)
        if law.products:
            more = size * law.products.excess_s_per_byte(met) / s.tp * s.framework.compute
            both = larger + more * s.factors.compute * s.factors.narrow
        else:
            least = 0.0 if law is s.head else flops * switches.by_cores(s, met)
            both, works = np.maximum(kernels.smooth_max(reads, works, law.sharpness), least), np.maximum(works, least)
            larger = np.maximum(reads, works)
        reading = reads >= works
        terms["weights"] = terms["weights"] + np.where(reading, reads, 0.0)
        terms["matmul"] = terms["matmul"] + np.where(reading, 0.0, works)
        terms["ridge"] = terms["ridge"] + both - larger
        hidden["weights"] = hidden["weights"] + np.where(reading, 0.0, reads)
        hidden["matmul"] = hidden["matmul"] + np.where(reading, works, 0.0)
    return Pass(terms, hidden, zero)


def _grouping(s: Setup) -> float:
    """How much longer the experts' grouped products take than one of their size: as the framework says where an expert is
    no wider than the model, less where it is (Mixtral's are as wide as a dense model's FFN and run like one)."""
    wide = max(g.expert_matmul for g in s.model.groups) / (3.0 * s.model.hidden**2)
    return 1.0 + (s.framework.experts - 1.0) * min(1.0, 1.0 / wide) ** 2


def _narrow(s: Setup, tokens: Array) -> Array | float:
    """How much longer a CPU's matrix work on few tokens takes than its share of that on many, where it was not measured."""
    if not s.hardware.cpu or s.gemm.products:
        return 1.0
    return 1.0 + (s.factors.narrow - 1.0) / (1.0 + ((tokens - 1.0) / NARROW_TOKENS) ** 2)


def _head_bytes(s: Setup) -> float:
    """Bytes of an entry of the lm_head: 16 bit but where it is stored otherwise."""
    if s.dtype is not None:
        return BITS[s.dtype] / 8 if s.dtype == "fp32" or s.dtype in GGUF_BITS else 2.0
    part = "embedding" if s.model.tied else "lm_head"
    entries = s.model.params_by_part[part]
    return s.model.stored_bytes[part] / entries if entries else 2.0


def _overheads(s: Setup, terms: Terms, tokens: Array, attention_latency_s: float, *, eager: bool) -> None:
    """Adds activations, launch and link to the terms of a pass of `tokens`."""
    model, fw = s.model, s.framework
    width = sum(g.count * (8 * model.hidden + 3 * g.token_matmul / model.hidden / 3 / s.tp) for g in model.groups)
    terms["activations"] = tokens * 2.0 * width / s.hardware.bytes_per_s / s.head.bandwidth * s.factors.bandwidth
    terms["activations"] = terms["activations"] * fw.elementwise
    gemms = sum(g.count * (6 if g.experts else 4) for g in model.groups) + 1
    small = sum(g.count * (SMALL_KERNELS + (4 if g.experts else 0)) for g in model.groups)
    # The tables' narrow products quantize the activations in a kernel of its own, which engines fuse with the norm before:
    # the latency is that of 16 bit.
    graph = gemms * min(s.gemm.latency_s, s.head.latency_s) + attention_latency_s + small * SMALL_KERNEL_S
    if s.gemm.products:
        graph = s.gemm.products.call_s * fw.calls * (gemms + small + model.layers)
    graph += sum(g.count for g in model.groups if g.experts) * fw.expert_layer_s
    terms["launch"] = s.factors.overhead * graph * np.ones_like(tokens)
    if eager:  # without graphs the host launches each kernel, which counts where it takes longer than the work
        launched = s.factors.overhead * (gemms + small + model.layers) * fw.launch_s
        terms["launch"] = terms["launch"] + np.maximum(launched - sum(terms.values()), 0.0)
    latency, volume = np.zeros_like(tokens), np.zeros_like(tokens)
    if s.tp > 1:
        law, rate = kernels.link(s.hardware, s.tp), s.hardware.link_for(s.tp)
        calls = 2 * model.layers
        latency = latency + calls * (law.latency_s + fw.link_s)
        volume = volume + calls * 2 * (s.tp - 1) / s.tp * tokens * model.hidden * 2 / rate / law.bandwidth
    if s.dp > 1:  # each layer with experts sends every token's activations to theirs and takes the results back
        law, rate = kernels.link(s.hardware, s.dp), s.hardware.link_for(s.dp)
        layers = sum(g.count for g in model.groups if g.experts)
        copies = min(s.dp - 1, max(g.experts_per_token for g in model.groups))
        latency = latency + 2 * layers * (law.latency_s + fw.link_s)
        volume = volume + layers * copies * tokens * model.hidden * 3 / rate / law.bandwidth
    if s.pp > 1:
        law, rate = kernels.link(s.hardware, 2), s.hardware.link_for(s.gpus)
        latency = latency + (s.pp - 1) * 2 * (law.latency_s + fw.link_s)
        volume = volume + (s.pp - 1) * tokens * model.hidden * 2 / rate / law.bandwidth
    if s.gpus > 1:
        terms["link latency"], terms["link volume"] = latency * s.factors.link, volume * s.factors.link


def with_draft(s: Setup, draft: Model, tokens: int, acceptance: float) -> Setup:
    """The setup with a draft model on the same accelerators.  Raises RidgelineError for values that make no sense."""
    if not 1 <= tokens <= 64 or not 0 <= acceptance <= 1:
        raise RidgelineError(f"a draft proposes 1 to 64 tokens, accepted with 0 to 1; got {tokens} and {acceptance:g}")
    widest = max(n for n in range(1, s.tp + 1) if not s.tp % n and not _unshared(draft, n))
    small = setup(draft, s.hardware, s.framework, tp=widest, factors=s.factors)
    return replace(s, draft=Draft(small, tokens, acceptance))
