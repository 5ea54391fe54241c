"""The verb `plan`: parse, call, print, as in `cli`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="A name of the catalogue, a config.json, its folder, or a GGUF file.")],
    hardware: Annotated[str, typer.Option(help="Rows of `ridgeline hardware` or files of rows, with commas between.")],
    slo: Annotated[
        str, typer.Option(help="What must hold: ttft, itl, tpot or e2e with _mean, _p50, _p90, _p95 or _p99.")
    ] = "ttft_p95=500ms,itl_p95=50ms",
    rate: Annotated[
        float | None, typer.Option(help="Requests per second in all; default: as many as one replica can.")
    ] = None,
    input_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 350,
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 150,
    dtype: Annotated[
        str, typer.Option(help="Precisions you would serve in: bf16,fp8,int4; default: as published.")
    ] = "auto",
    kv_dtype: Annotated[str, typer.Option(help="Precision of the KV cache.")] = "auto",
    tp: Annotated[str, typer.Option(help="Accelerators that may share each layer.")] = "1,2,4,8",
    framework: Annotated[str, typer.Option(help="vllm, sglang, tensorrt-llm …")] = "vllm",
    calibration: Annotated[Path | None, typer.Option(help="A file of `ridgeline calibrate`.")] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(help="What an hour of one costs, in US dollars: H100-SXM=2.5/h (/min, /d, /month)."),
    ] = None,
    run: Annotated[
        list[Path] | None, typer.Option(help="A run folder to stand beside the predictions; may be given again.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; default: reports/plan-MODEL.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Which hardware to buy for a load, how many, at which batch and cost, with no server: a page, a table, or JSON."""
    from harness import command_plan

    dtypes = None if dtype == "auto" else [d.strip() for d in dtype.split(",")]
    asked = command_plan.Asked(model, hardware.split(","), slo, rate, input_tokens, output_tokens, dtypes, kv_dtype,
                               command_plan.whole(tp, "--tp"), framework, calibration, price or [], run or [], out)  # fmt: skip
    typer.echo(command_plan.plan(asked, as_json, ["ridgeline", *sys.argv[1:]]))
