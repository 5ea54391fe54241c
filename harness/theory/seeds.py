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
