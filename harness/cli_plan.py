"""The verb `plan`: parse, call, print, as in `cli`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def plan(
    scenario: Annotated[
        Path | None, typer.Argument(help="A scenario that says what no option does: model, lengths, slo, price …")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A name of the catalogue, a config.json, its folder, or a GGUF file.")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="Rows of `ridgeline hardware` or files of rows, with commas between.")
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(
            help="ttft, itl, tpot or e2e with _mean, _p50, _p90, _p95 or _p99 [default: ttft_p95=500ms,itl_p95=50ms]"
        ),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second in all; default: as many as one replica can.")
    ] = None,
    input_tokens: Annotated[int | None, typer.Option(help="Tokens of a prompt [default: 350]")] = None,
    output_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer [default: 150]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Precisions you would serve in: bf16,fp8,int4; default: as published.")
    ] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Precision of the KV cache.")] = None,
    tp: Annotated[str | None, typer.Option(help="Accelerators that may share each layer [default: 1,2,4,8]")] = None,
    framework: Annotated[str | None, typer.Option(help="vllm, sglang, tensorrt-llm … [default: vllm]")] = None,
    calibration: Annotated[Path | None, typer.Option(help="A file of `ridgeline calibrate`.")] = None,
    price: Annotated[
        list[str] | None, typer.Option(help="US dollars for an hour of one: H100-SXM=2.5/h; may be given again.")
    ] = None,
    run: Annotated[
        list[Path] | None, typer.Option(help="A run folder to stand beside the predictions; may be given again.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; default: reports/plan-MODEL.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Which hardware to buy for a load, how many, at which batch and cost, with no server: a page, a table, or JSON."""
    from harness import command_plan

    given = {
        "model": model, "hardware": hardware.split(",") if hardware else None, "slo": slo, "rate": rate,
        "input_tokens": input_tokens, "output_tokens": output_tokens, "kv_dtype": kv_dtype, "framework": framework,
        "dtype": [d.strip() for d in dtype.split(",")] if dtype else None, "calibration": calibration,
        "tp": command_plan.whole(tp, "--tp") if tp is not None else None, "prices": price, "runs": run, "out": out,
    }  # fmt: skip
    typer.echo(command_plan.plan(command_plan.asked_of(scenario, given), as_json, ["ridgeline", *sys.argv[1:]]))
