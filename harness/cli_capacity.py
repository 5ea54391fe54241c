"""The search's verb: parse, call, as in `cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()


@app.command("find-capacity")
def find_capacity(
    scenario: Annotated[
        Path | None, typer.Argument(help="A scenario file to take the server and the lengths from.")
    ] = None,
    slo: Annotated[
        str | None, typer.Option(help="Bounds on times that are to hold: ttft_p95=500ms,itl_p95=50ms.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Base URL of the server (or OPENAI_BASE_URL).")] = None,
    mode: Annotated[
        str | None, typer.Option(help="closed: the highest batch size; open: the highest rate (Poisson).")
    ] = None,
    max_points: Annotated[int | None, typer.Option(help="Points that are measured at most; default 10.")] = None,
    max_time: Annotated[str | None, typer.Option(help="Time that is measured at most; default 15min.")] = None,
    start: Annotated[float | None, typer.Option(help="Where to begin; default: theory's edge, else 8 or 1/s.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask for; default: the first in /v1/models.")] = None,
    input_tokens: Annotated[str | None, typer.Option(help="Tokens of each prompt, as in `run`; default 350.")] = None,
    output_tokens: Annotated[str | None, typer.Option(help="Tokens of each answer, as in `run`; default 150.")] = None,
    arrivals: Annotated[str | None, typer.Option(help="constant, poisson or gamma (open).")] = None,
    api: Annotated[str | None, typer.Option(help="completions or chat.")] = None,
    seed: Annotated[int | None, typer.Option(help="Prompts and arrivals follow from it.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer.json, or its folder.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Row to predict for, or `machine` for this one.")] = None,
    model_config: Annotated[str | None, typer.Option(help="config.json, its folder, or a GGUF file.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision of the weights.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Precision of the KV cache.")] = None,
    tp: Annotated[int | None, typer.Option(help="Accelerators that share each layer.")] = None,
    calibration: Annotated[str | None, typer.Option(help="A file of `ridgeline calibrate` to predict with.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the key.")] = None,
    api_key_file: Annotated[str | None, typer.Option(help="File that holds the key, instead of a variable.")] = None,
    max_error_rate: Annotated[
        float | None, typer.Option(help="Share of failures above which a load is missed.")
    ] = None,
    timeout: Annotated[str | None, typer.Option(help="Stop everything after this: 30min.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Take up a search that did not end.")] = None,
    out: Annotated[str | None, typer.Option(help="Run folder; default: results/NAME-TIME.")] = None,
    report_path: Annotated[str | None, typer.Option("--report", help="Where the report goes.")] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Find the highest batch size or rate at which a live server still meets an objective.

    Grows the load until a bound is missed, then closes in on the edge, in few points and a bounded time.  An invalid
    point is never trusted: it is measured once more, then the search says that it cannot tell.
    """
    from harness import command
    from harness.lengths import parse

    wanted = {"max_points": max_points, "max_time_s": max_time, "start": start}
    flags: dict[str, Any] = {
        "engine": {"url": url}, "model": model, "tokenizer": tokenizer, "api_key_env": api_key_env,
        "api_key_file": api_key_file, "report": report_path,
        "workload": {
            "mode": mode,
            "input_tokens": parse(input_tokens, "--input-tokens") if input_tokens else None,
            "output_tokens": parse(output_tokens, "--output-tokens") if output_tokens else None,
            "arrivals": arrivals, "api": api, "seed": seed},
        "theory": {"hardware": hardware, "model_config": model_config, "dtype": dtype, "kv_dtype": kv_dtype, "tp": tp,
                   "calibration": calibration},
        "limits": {"max_error_rate": max_error_rate, "run_s": timeout},
        "capacity": wanted, "slo": slo,
    }  # fmt: skip
    planned = command.resumed(resume, scenario, flags) if resume else command.searching(scenario, flags)
    raise typer.Exit(
        command.run(
            planned, out=out, strict=False, as_json=as_json, quiet=quiet, with_report=not no_report, resume=resume
        )
    )
