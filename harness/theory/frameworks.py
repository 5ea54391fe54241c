"""What a serving framework adds to the hardware's work: rows of data, found by name.

Fitted on public static batches (tests/fit_frameworks.py says on which); a framework without a row is taken as `generic`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Framework:
    """`step_s` host time of a step that no GPU work hides, `sequence_s` more for each sequence in it, `token_s` for each
    prompt token; `launch_s` of a kernel launched from the host where no graph is replayed.  `gemm`, `compute`,
    `attention`, `experts`: times the kernels' own laws.  `pool`: share of the memory taken in advance; 0: as needed.
    `stream_s` of sending a token on, which is done beside the step and
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
    eager_prefill: bool = True
    eager_decode: bool = False
    pool: float = 0.9
    chunk: int = 8192
    mixed: bool = True
    all_logits: bool = False


ROWS = {
    "generic": Framework("generic"),
    "vllm": Framework("vllm", step_s=2e-3, sequence_s=30e-6),
    "tensorrt-llm": Framework("tensorrt-llm", step_s=0.3e-3, sequence_s=2e-6, eager_prefill=False),
    "sglang": Framework("sglang", step_s=1e-3, sequence_s=10e-6),
    "lmdeploy": Framework("lmdeploy", step_s=0.5e-3, sequence_s=10e-6, eager_prefill=False),
    "deepspeed": Framework("deepspeed", step_s=3e-3, sequence_s=30e-6, eager_decode=True),
    "transformers": Framework("transformers", step_s=3e-3, launch_s=8e-6, eager_decode=True, pool=0.0, attention=2.0, all_logits=True),
    "llama.cpp": Framework("llama.cpp", step_s=0.5e-3, eager_decode=True, pool=0.0),
}
SPELLINGS = {
    "trtllm": "tensorrt-llm",
    "trt-llm": "tensorrt-llm",
    "tensorrt": "tensorrt-llm",
    "tensorrt_llm": "tensorrt-llm",
    "optimum nvidia": "tensorrt-llm",
    "turbomind": "lmdeploy",
    "llamacpp": "llama.cpp",
    "llama_cpp": "llama.cpp",
    "ctransformers": "llama.cpp",
    "mii": "deepspeed",
    "huggingface": "transformers",
    "hf": "transformers",
    "pytorch": "transformers",
    "autogptq": "transformers",
    "autoawq": "transformers",
    "exllama": "transformers",
}


def find(name: str | None) -> Framework:
    """The row whose name, or another spelling of it, stands in `name` ("TensorRT-LLM 0.9.0"); else the generic one."""
    plain = (name or "").casefold()
    for known in ROWS:
        if known in plain:
            return ROWS[known]
    return next((ROWS[to] for spelling, to in SPELLINGS.items() if spelling in plain), ROWS["generic"])
