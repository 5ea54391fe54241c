"""Another predictor's figures beside ours: aiconfigurator (Apache-2.0, NVIDIA), which interpolates tables of measured kernels.

It is an extra (`pip install 'ridgeline[aiconfigurator]'`, 850 MB with its tables) and asked in this process, offline: of a model
it gets the same configuration that ours was read from.  What it does not know stays without a figure, with its reason.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from harness.models import config_of
from harness.records import RidgelineError
from harness.report.predict_page import Other
from harness.theory.frameworks import named
from harness.theory.sweep import Sweep

PREDICTORS = ("aiconfigurator",)
MOST = 500  # points of one call: each takes it 0.1 to 1 s
SYSTEMS = {
    "A30": "a30", "A100-SXM-80GB": "a100_sxm", "A100-PCIe-80GB": "a100_pcie", "L4": "l4", "L40S": "l40s",
    "H100-SXM-80GB": "h100_sxm", "H100-PCIe-80GB": "h100_pcie", "H200-SXM": "h200_sxm", "B200-SXM": "b200_sxm",
    "B300-SXM": "b300_sxm", "GB200": "gb200", "GB300": "gb300", "Arc-Pro-B60": "b60",
    "RTX-PRO-6000-Blackwell-Server": "rtx_pro_6000_server",
}  # fmt: skip
BACKENDS = {"vllm": "vllm", "generic": "vllm", "sglang": "sglang", "tensorrt-llm": "trtllm"}
MODES = {"wave": "static", "static": "static", "closed": "agg"}
# Its names of precisions; "auto" is as the configuration says.
WEIGHTS = {"auto": None, "bf16": "bfloat16", "fp16": "bfloat16", "fp8": "fp8", "int8": "int8_wo", "w8a16": "int8_wo",
           "int4": "int4_wo", "nvfp4": "nvfp4"}  # fmt: skip
CACHES = {"auto": None, "bf16": "bfloat16", "fp16": "bfloat16", "fp8": "fp8", "int8": "int8"}
# What a configuration without "architectures" (those of the catalogue) stands for.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
                 "mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
                 "deepseek_v3": "DeepseekV3ForCausalLM", "gpt_oss": "GptOssForCausalLM",
                 "minimax_m2": "MiniMaxM2ForCausalLM", "mimo": "MiMoForCausalLM"}  # fmt: skip
Ask = Callable[..., Any]


def beside(predictor: str, model: str, sweeps: list[tuple[Sweep, str, str]]) -> list[Other]:
    """Its figures for each (sweep, dtype, kv_dtype) of the model asked for as `model` (a path or a name).

    Raises RidgelineError where the package is absent, the name is no predictor's, or more than MOST points are asked for.
    """
    if predictor not in PREDICTORS:
        raise RidgelineError(f"--predictor must be {' or '.join(PREDICTORS)}, got {predictor!r}")
    if sum(len(found) for found, _, _ in sweeps) > MOST:
        raise RidgelineError(f"--predictor {predictor} takes its time: ask for at most {MOST} points at once")
    try:
        ask = _api()
    except ImportError as problem:
        raise RidgelineError(f"--predictor aiconfigurator needs that package ({problem}): "
                             "pip install 'ridgeline[aiconfigurator]'") from problem  # fmt: skip
    label = f"aiconfigurator {metadata.version('aiconfigurator')}"
    try:
        config = _config(model)
    except RidgelineError as problem:
        return [_none(len(found), label, str(problem)) for found, _, _ in sweeps]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_bytes(orjson.dumps(config))
        return [_points(ask, label, folder, *row) for row in sweeps]


def _api() -> Ask:
    with _quiet():  # each call of 0.12 announces that the package is to be renamed
        from aiconfigurator.cli.api import cli_estimate
    return cli_estimate  # type: ignore[no-any-return]


def _config(model: str) -> dict[str, Any]:
    """The configuration with the key by which aiconfigurator tells architectures apart."""
    config = config_of(model)
    kind = str(config.get("model_type", ""))
    if not config.get("architectures"):
        if kind not in ARCHITECTURES:
            raise RidgelineError(f"aiconfigurator has no model of the architecture {kind!r}")
        config = config | {"architectures": [ARCHITECTURES[kind]]}
    return config


def _none(points: int, label: str, reason: str) -> Other:
    nothing = np.full(points, np.nan)
    return Other(label, nothing, nothing, nothing, reason)


def _points(ask: Ask, label: str, folder: str, found: Sweep, dtype: str, kv_dtype: str) -> Other:
    s = found.setup
    backend = BACKENDS.get(named(s.framework.name))
    lacks = next((f"aiconfigurator has no {what}" for known, what in (
        (s.hardware.name in SYSTEMS, f"measurements of {s.hardware.name}"), (backend, f"figures for {s.framework.name}"),
        (found.mode in MODES, f"{found.mode} load"), (dtype in WEIGHTS, f"weights in {dtype}"),
        (kv_dtype in CACHES, f"KV cache in {kv_dtype}"), (s.draft is None, "such draft model"),
        (s.cp == 1, "context parallelism")) if not known), "")  # fmt: skip
    if lacks:
        return _none(len(found), label, lacks)
    spread = s.dp > 1  # the experts over all, the attention in data parallel
    experts = {"moe_ep_size": s.tp * s.dp if spread else 1, "moe_tp_size": 1 if spread else s.tp} if s.model.moe else {}
    fixed = {"mode": MODES[found.mode], "backend_name": backend, "tp_size": s.tp, "pp_size": s.pp,
             "attention_dp_size": s.dp, "gemm_quant_mode": WEIGHTS[dtype], "kvcache_quant_mode": CACHES[kv_dtype],
             "moe_quant_mode": WEIGHTS[dtype] if s.model.moe else None, **experts}  # fmt: skip
    values, reason, version = np.full((3, len(found)), np.nan), "", ""
    for at in range(len(found)):
        if not found.fits[at]:
            continue
        shape = {"batch_size": max(1, round(found.batch[at] / s.dp)), "isl": int(found.input_tokens[at]),
                 "osl": int(found.output_tokens[at])}  # fmt: skip
        try:
            with _quiet():
                got = ask(folder, SYSTEMS[s.hardware.name], **fixed, **shape)
        except KeyboardInterrupt:
            raise
        except BaseException as problem:  # its compiled engine panics outside of Exception
            said = " ".join(str(problem).replace(folder, s.model.name).split())
            reason = reason or f"aiconfigurator: {said[:160]}"
            continue
        values[:, at] = got.ttft / 1e3, got.tpot / 1e3, got.tokens_per_second
        version = f", {got.backend_name} {got.backend_version}"
    values[values <= 0] = np.nan  # it says 0 where there is no such time, as with one output token
    return Other(label + version, values[0], values[1], values[2], reason)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without its log lines and warnings: what matters of them is in its error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
