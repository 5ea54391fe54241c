"""The seeds' arithmetic, exactly as the articles give it, so that a reader can check the page they read.

[000] LLM Inference Essentials (S. Skvortsov, Nebius): loading, the throughput-batch plane, peak throughput, H100.
[001] How LLM Inference Works (A. Bhayani): "about 1 MB of cache a token, 4 GB at 4k, comparable to the model itself".
[002] LLM Inference Arithmetics (L. Baggi): three times the compute to train, Gemma 2B, prompt-heavy tasks.
[003] A guide to LLM inference and performance (V. Shenoy, P. Kiely, Baseten): Llama 2 7B on T4, A10 and A100.
[004] Inference optimization 101 (DigitalOcean): the critical ratio of memory time and compute time.
[SB] How to Scale Your Model, jax-ml/scaling-book (inference chapter): step time from KV reads and weights.
Seconds, bytes, FLOP/s and US dollars throughout.  Where an article is wrong, the docstring says how.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from harness.records import RidgelineError


@dataclass(frozen=True, slots=True)
class SeedGpu:
    """A GPU as an article states it; never used for a prediction (that takes a row of hardware.csv)."""

    flops: float
    bytes_per_s: float
    mem_bytes: float
    usd_per_min: float


# [003], with its own figures: its T4 has 300 GB/s, while clock times bus width gives 320.
GPUS: dict[str, SeedGpu] = {
    "T4": SeedGpu(65e12, 300e9, 16e9, 0.01052),
    "A10": SeedGpu(125e12, 600e9, 24e9, 0.02012),
    "A100-SXM-80GB": SeedGpu(312e12, 2039e9, 80e9, 0.10240),
}
LLAMA_2_7B_PARAMS = 7e9  # [003] counts 7.0 billion; the model has 6,738,415,616
PROMPT_TOKENS, COMPLETION_TOKENS = 350, 150  # [003], the standard prompt

# [000] takes the figures with 2:4 sparsity for the peak; dense weights reach half of them.
H100_BYTES_PER_S = 3350e9
H100_FLOPS = {
    "SXM, sparse (the seed)": 1979e12,
    "SXM, dense": 989.4e12,
    "NVL, sparse (the seed)": 1671e12,
    "NVL, dense": 835.5e12,
}


def ops_to_byte(flops: float, bytes_per_s: float) -> float:
    """[003] Operations the hardware can do while it moves one byte: 208.3 on an A10."""
    return flops / bytes_per_s


def attention_intensity(context: int, head_dim: int) -> float:
    """[003] Operations per byte of one head's unfused attention over N x N scores in 16 bit: 62.4 for N 4096, d 128.

    (4 N² d + 3 N²) / (8 N² + 8 N d).  The arithmetic is right, but it is that of the prefill; the article concludes
    from it on decoding, whose intensity is `decode_attention_intensity`.
    """
    n, d = context, head_dim
    return (4 * n * n * d + 3 * n * n) / (8 * n * n + 8 * n * d)


def decode_attention_intensity(heads: int, kv_heads: int) -> float:
    """Operations per byte of decoding against a 16-bit KV cache: the query heads that share a KV head.

    Each cached key and value pair of 2·d elements (4·d bytes) enters 4·d operations for each query head of its group.
    """
    return heads / kv_heads


def flash_attention_intensity(context: int, head_dim: int, causal: bool = False) -> float:
    """Operations per byte of fused prefill attention, which keeps the scores on the chip: (4 N² d + 3 N²) / 8 N d.

    About 2,060 for N 4096, d 128, half of it with a causal mask: prefill is compute-bound.
    """
    n, d = context, head_dim
    return (4 * n * n * d + 3 * n * n) / (8 * n * d) / (2 if causal else 1)


def time_per_token_s(weight_bytes: float, bytes_per_s: float) -> float:
    """[003] Seconds to generate a token at batch 1: the weights are read once."""
    return weight_bytes / bytes_per_s


def prefill_s(params: float, tokens: float, flops: float) -> float:
    """[003] Seconds to read a prompt: 2 operations for each parameter and token."""
    return 2 * params * tokens / flops


def generation_s(
    prefill_s: float, time_per_token_s: float, output_tokens: int, first_from_prefill: bool = True
) -> float:
    """[003] Seconds of a whole request: the prefill and then a step for each token.

    The prefill already yields the first token, so n tokens take n - 1 steps; the article counts n
    (`first_from_prefill=False`).
    """
    return prefill_s + (output_tokens - first_from_prefill) * time_per_token_s


def kv_bytes_per_token(layers: int, kv_width: int, bytes_per_element: float = 2) -> float:
    """[003] Bytes of KV cache for one token: 2 (key, value) · bytes · layers · width.

    The article takes d_model for the width, right for MHA; with GQA it is KV heads · head_dim.
    """
    return 2 * bytes_per_element * layers * kv_width


def spare_bytes(mem_bytes: float, weight_bytes: float) -> float:
    """[003] Memory left beside the weights: 24 GB - 14 GB = 10 GB on an A10."""
    return mem_bytes - weight_bytes


def kv_tokens(spare_bytes: float, kv_bytes_per_token: float) -> int:
    """[003] Tokens that fit into the spare memory: 10 GB hold 19,073 of Llama 2 7B (the article: 19,230)."""
    return max(0, int(spare_bytes // kv_bytes_per_token))


def batch_that_fits(kv_tokens: int, context: int) -> int:
    """[003] Sequences of this length in so many tokens: 4 of 4,096 tokens on an A10."""
    return kv_tokens // context


def critical_batch(flops: float, bytes_per_s: float, bytes_per_param: float = 2) -> float:
    """[000, 004] Batch at which computing takes as long as reading the weights; below it decoding is memory-bound.

    P · bytes / BW = 2 · P · B / FLOPS, so B = FLOPS · bytes / (2 · BW): 295 on an H100 SXM in 16 bit.  With the sparse
    peak that [000] quotes it would be 591.
    """
    return flops * bytes_per_param / (2 * bytes_per_s)


def peak_throughput(params: float, flops: float) -> float:
    """[000] Tokens per second in the compute-bound region, which no batch size raises: FLOPS / 2 P."""
    return flops / (2 * params)


def throughput(params: float, batch: float, flops: float, bytes_per_s: float, bytes_per_param: float = 2) -> float:
    """[000] The throughput-batch plane, tokens per second: rises in proportion to the batch, then stays at the peak."""
    return min(batch / time_per_token_s(params * bytes_per_param, bytes_per_s), peak_throughput(params, flops))


def request_usd(seconds: float, usd_per_min: float) -> float:
    """[003] Cost of a request that has the GPU for itself."""
    return seconds / 60 * usd_per_min


def usd_per_million_tokens(usd_per_h: float, tokens_per_s: float) -> float:
    """[000] What a million tokens cost on hardware that is kept busy."""
    return usd_per_h / 3600 / tokens_per_s * 1e6


class TokenUsd(NamedTuple):
    """US dollars for a million tokens read, and for a million written."""

    input: float
    output: float

    def request(self, input_tokens: float, output_tokens: float) -> float:
        """What one request costs: by one's own arithmetic, or by an API's price list."""
        return (self.input * input_tokens + self.output * output_tokens) / 1e6


def token_usd(
    params: float, batch: float, flops: float, bytes_per_s: float, usd_per_h: float, bytes_per_param: float = 2
) -> TokenUsd:
    """[000] An input token costs its share of a pass, an output token a share of a step of `batch`.

    Their ratio is critical batch / batch while decoding is memory-bound: 208 on an A10 alone, 3 (as APIs charge) at 69.
    """
    output_per_s = throughput(params, batch, flops, bytes_per_s, bytes_per_param)
    return TokenUsd(
        usd_per_million_tokens(usd_per_h, peak_throughput(params, flops)),
        usd_per_million_tokens(usd_per_h, output_per_s),
    )


def break_even_share(usd_per_h: float, requests_per_s: float, api_usd_per_request: float) -> float:
    """[002] The share of its capacity (`requests_per_s`) at which one's own hardware costs what an API does.

    Above 1 it never pays, however busy.
    """
    return usd_per_h / 3600 / (requests_per_s * api_usd_per_request)


def load_s(weight_bytes: float, disk_bytes_per_s: float) -> float:
    """[000] Seconds to load the weights from the disk, its second stage: bytes over bandwidth."""
    return weight_bytes / disk_bytes_per_s


def training_flops(params: float, tokens: float) -> float:
    """[002] Training takes three times the compute of a forward pass, one forward and two backward: 6 P a token."""
    return 3 * 2 * params * tokens


class TrainingMemory(NamedTuple):
    """Bytes by part; activations come on top and depend on batch and length."""

    weights: float
    gradients: float
    optimizer: float


def training_bytes(params: float, bytes_per_param: float = 2) -> TrainingMemory:
    """[002] Memory to train with Adam: the weights, as many gradients, and "two additional copies of the weights"."""
    return TrainingMemory(params * bytes_per_param, params * bytes_per_param, 2 * params * bytes_per_param)


def mixed_precision_bytes(params: float) -> TrainingMemory:
    """What training with Adam really keeps, 16 bytes a parameter (ZeRO, arXiv:1910.02054, section 3.1).

    16-bit weights and gradients as [002] has them, but the optimizer works in 32 bit: two moments and a master copy.
    """
    return TrainingMemory(2 * params, 2 * params, 12 * params)


def activation_bytes(batch: float, context: float, hidden: float, layers: float, heads: float = 0) -> float:
    """[002] "At training time, we need all activations": s·b·h·(34 + 5·a·s/h) bytes a layer in 16 bit.

    Korthikanti et al., arXiv:2205.05198, equation 2, for a layer with a plain FFN of width 4·h.  Without `heads` the
    N x N scores are not kept but computed again, as FlashAttention does.
    """
    return layers * context * batch * (34 * hidden + 5 * heads * context)


def inference_activation_bytes(tokens: float, width: float, bytes_per_element: float = 2) -> float:
    """[002] "We only need to store the largest activation": that of `tokens` tokens at the widest place of a layer."""
    return tokens * width * bytes_per_element


def recompute_s(
    params: float, input_tokens: int, output_tokens: int, flops: float, bytes_per_s: float, bytes_per_param: float = 2
) -> float:
    """[001, 003] Seconds of a request without a KV cache: every token passes the whole sequence through the model.

    The i-th of n passes has input + i tokens and takes the longer of reading the weights and computing.
    """
    weights_s = time_per_token_s(params * bytes_per_param, bytes_per_s)
    return sum(max(weights_s, prefill_s(params, input_tokens + i, flops)) for i in range(output_tokens))


def cached_s(
    params: float, input_tokens: int, output_tokens: int, flops: float, bytes_per_s: float, bytes_per_param: float = 2
) -> float:
    """The same request with a cache: a prefill, no faster than the weights can be read, and n - 1 steps."""
    weights_s = time_per_token_s(params * bytes_per_param, bytes_per_s)
    return generation_s(max(weights_s, prefill_s(params, input_tokens, flops)), weights_s, output_tokens)


# --- where a KV cache lies (PagedAttention, arXiv:2309.06180, which [001] and [004] name) -----------------------------

BLOCK = 16  # tokens of a block, vLLM's default


def paged_slots(lengths: Sequence[int], block: int = BLOCK) -> int:
    """Token slots that sequences of these lengths hold in blocks: each is rounded up to a whole block."""
    if block < 1:
        raise RidgelineError(f"block must be at least 1 token, got {block}")
    return sum(math.ceil(n / block) * block for n in lengths)


def contiguous_slots(lengths: Sequence[int], reserved: int) -> int:
    """Token slots they hold where each reserves the longest sequence that may come."""
    if any(n > reserved for n in lengths):
        raise RidgelineError(f"a sequence of {max(lengths)} tokens does not fit into {reserved} reserved")
    return len(lengths) * reserved


def wasted_share(lengths: Sequence[int], slots: int) -> float:
    """The share of the held slots that holds nothing; NaN where none are held."""
    return 1 - sum(lengths) / slots if slots else math.nan


def decode_step_s(
    weight_bytes: float,
    kv_bytes: float,
    bytes_per_s: float,
    params: float = 0.0,
    batch: float = 1,
    flops: float = float("inf"),
) -> float:
    """[SB] Seconds of one decoding step: KV reads plus the longer of reading the weights and multiplying by them.

    `kv_bytes` is that of the whole batch.  KV reads do not hide behind the matrix work of the same step: max(weights +
    KV, matmul) is a lower bound only.
    """
    if batch <= 0:
        raise RidgelineError(f"batch must be positive, got {batch}")
    return kv_bytes / bytes_per_s + max(weight_bytes / bytes_per_s, 2 * params * batch / flops)
