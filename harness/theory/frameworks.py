"""What a serving framework adds to the hardware's work: rows of data, found by name.

Fitted on public static batches (tests/fit_frameworks.py says on which); a framework without a row is taken as `generic`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Framework:
    """`step_s` host time of a step that no GPU work hides, `sequence_s` more for each sequence in it, `token_s` for each
    prompt token; `launch_s` of a kernel launched from the host where no graph is replayed.  `gemm`, `compute`,
    `attention`, `experts`: times the kernels' own laws.  `pool`: share of the memory taken in advance, for all or for the "cache" alone; 0: as
    needed.
    `request_s` from a request's arrival to its first pass;
    `expert_layer_s` more for a layer with experts: routing, permuting, gathering.  `stream_s` of sending a token on, which is done beside the step and
    bounds it where many stream.  Its decode attention takes group size ^ `grouped` longer
    than the reads (kernels that read a KV head for several of its query heads), and `serial_s` for each position of a
    context where it does not split one sequence over the GPU.  `chunk`: most
    prompt tokens of a pass.  `mixed`: prefills run in the same passes as decoding steps.
    `all_logits`: the prefill computes those of every prompt token."""

    name: str
    step_s: float = 1e-3
    sequence_s: float = 10e-6
    token_s: float = 0.0
    launch_s: float = 5e-6
    link_s: float = 0.0
    stream_s: float = 0.0
    gemm: float = 1.0
    compute: float = 1.0
    attention: float = 1.0
    grouped: float = 0.0
    serial_s: float = 0.0
    experts: float = 1.0
    expert_layer_s: float = 0.0
    request_s: float = 0.0
    eager_prefill: bool = True
    eager_decode: bool = False
    pool: float = 0.9
    pool_of: str = "all"
    chunk: int = 8192
    mixed: bool = True
    all_logits: bool = False


ROWS = {
    "generic": Framework("generic", 0.6e-3, 10e-6, grouped=0.1, stream_s=50e-6, experts=1.4, expert_layer_s=30e-6,
                         request_s=20e-3),
    "vllm": Framework("vllm", 0.65e-3, 10e-6, link_s=1e-6, stream_s=50e-6, grouped=0.1, experts=1.9,
                      expert_layer_s=25e-6, request_s=15e-3),
    "sglang": Framework("sglang", 0.6e-3, 10e-6, link_s=1e-6, stream_s=50e-6, grouped=0.1, experts=1.2,
                        expert_layer_s=30e-6, request_s=0.2, mixed=False),
    "tensorrt-llm": Framework("tensorrt-llm", 0.54e-3, 10e-6, link_s=1e-6, stream_s=56e-6, gemm=0.97, attention=0.87,
                              grouped=0.09, experts=1.35, expert_layer_s=50e-6, request_s=0.12, eager_prefill=False),
    "lmdeploy": Framework("lmdeploy", 0.5e-3, 10e-6, eager_prefill=False, pool=0.8, pool_of="cache"),
    "deepspeed": Framework("deepspeed", 4.8e-3, 20e-6, link_s=8e-6, grouped=0.3),
    "transformers": Framework("transformers", 3e-3, launch_s=8e-6, attention=2.0, eager_decode=True, pool=0.0,
                              all_logits=True),
    "llama.cpp": Framework("llama.cpp", 0.5e-3, eager_decode=True, pool=0.0),
}  # fmt: skip
# Engines as static batches of 2023 and 2024 ran on them; what is served today is faster by its scheduler alone.
OFFLINE = {
    "vllm": Framework("vllm (2024)", 1.75e-3, 72e-6, link_s=8.3e-6, grouped=0.34),
    "tensorrt-llm": Framework("tensorrt-llm (2024)", 0.92e-3, 16e-6, link_s=8.3e-6, grouped=0.4, eager_prefill=False),
}
SPELLINGS = {
    "trtllm": "tensorrt-llm",
    "trt-llm": "tensorrt-llm",
    "tensorrt": "tensorrt-llm",
    "optimum nvidia": "tensorrt-llm",
    "turbomind": "lmdeploy",
    "llamacpp": "llama.cpp",
    "llama_cpp": "llama.cpp",
    "ctransformers": "llama.cpp",
    "mii": "deepspeed",
    "huggingface": "transformers",
    "hf": "transformers",
    "pytorch lightning": "transformers",
    "autogptq": "transformers",
    "autoawq": "transformers",
    "exllama": "transformers",
}


def find(name: str | None, *, offline: bool = False) -> Framework:
    """The row whose name, or another spelling of it, stands in `name` ("TensorRT-LLM 0.9.0"); else the generic one."""
    plain = (name or "").casefold()
    known = next((known for known in ROWS if known in plain), None)
    known = known or next((to for spelling, to in SPELLINGS.items() if spelling in plain), "generic")
    return OFFLINE[known] if offline and known in OFFLINE else ROWS[known]
