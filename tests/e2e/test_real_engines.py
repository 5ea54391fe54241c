"""The whole command against real servers: llama.cpp with a real model, vLLM with random weights."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import random_model, store
from harness.engines import launched
from harness.launch import EngineSpec
from tests.conftest import ROOT, one_object

LLAMA = Path(os.environ.get("RIDGELINE_LLAMA_PYTHON", ROOT / ".venv-llama" / "bin" / "python"))
VLLM = Path(os.environ.get("RIDGELINE_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
needs_llama = pytest.mark.skipif(not LLAMA.exists(), reason="no .venv-llama here: `make llama` makes it")
needs_vllm = pytest.mark.skipif(not VLLM.exists(), reason="no .venv-vllm here: `make vllm-engine` makes it")


@needs_llama
def test_the_command_measures_real_llama_cpp_beside_theory(ridgeline: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        f"engine: {{kind: llama.cpp, model: smollm2-135m, python: {LLAMA}, slots: 2, threads: 1}}\n"
        "workload: {batch_sizes: [1, 2], waves: 1, warmup: 0, input_tokens: 96, output_tokens: 16}\n"
        "theory: {hardware: row.json}\n"
    )
    row = {"name": "two cores", "vendor": "any", "flops": {"fp32": 2e11}, "mem_bytes": 16e9, "bytes_per_s": 4e10,
           "source": "a round number for this test", "measured": True}  # fmt: skip
    (tmp_path / "row.json").write_text(json.dumps(row))
    done = ridgeline("run", "s.yaml", "--json", "--out", "run", timeout=300)
    assert done.returncode == 0, done.stderr
    found = one_object(done.stdout)
    assert found["engine"] == "llama.cpp" and found["model"] == "smollm2-135m"
    for point in found["points"]:
        assert (point["input_tokens"], point["output_tokens"], point["errors"]) == (96, 16, 0)
        assert 0 < point["ttft_ms"]["mean"] < point["e2e_ms"]["mean"]
        assert point["predicted"]["itl_ms"] < point["itl_ms"]["mean"]
        assert point["predicted"]["limit"] in ("memory_bandwidth", "compute")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["architecture"]["params"] == 134_515_008
    assert [stage["name"] for stage in summary["start"]["stages"]] == ["process", "weights loaded", "ready"]
    assert summary["start"]["predicted_load_s"] > 0
    assert summary["points"][1]["batch_ran"]["max"] == 2
    assert "smollm2-135m" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.vllm
@needs_vllm
def test_prompts_are_exact_and_no_prefix_cache_helps_on_a_vllm_of_somebody_else(tmp_path: Path) -> None:
    """Prefix caching is on, as vLLM has it by default; the tokenizer is found from the folder that the server names."""
    model = tmp_path / "llama-134m"
    random_model.write(model, random_model.SHAPES["llama-134m"])

    async def body() -> tuple[int, bytes, bytes]:
        args = ("--load-format", "dummy", "--enforce-eager", "--enable-prefix-caching")
        spec = EngineSpec(
            "vllm", model=str(model), python=str(VLLM), context_tokens=768, ready_timeout_s=400, args=args
        )
        async with launched(spec, tmp_path, lambda text: None) as engine:
            run = [sys.executable, "-m", "harness", "run", "--url", engine.url, "--batch-sizes", "1,4", "--waves", "2",
                   "--output-tokens", "24", "--no-report", "--json", "--out", str(tmp_path / "run")]  # fmt: skip
            process = await asyncio.create_subprocess_exec(
                *run, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
            out, err = await process.communicate()
            return process.returncode or 0, out, err

    code, out, err = asyncio.run(body())
    assert code == 0, err.decode()
    found = one_object(out.decode())
    assert found["engine"] == "vllm"
    records = store.load(tmp_path / "run").records
    assert np.all(records.input_tokens == 350) and np.all(records.output_tokens == 24) and np.all(records.ok)
    assert all(f["code"] != "V007" for point in found["points"] for f in point["findings"])
    samples = store.load(tmp_path / "run").samples
    hits, queries = (max(s.get(name, 0) for s in samples) for name in ("cache_hits", "cache_queries"))
    assert queries > 350 * 10 and hits < 0.05 * queries
