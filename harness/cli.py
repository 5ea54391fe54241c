"""Parse, call, print: each verb is a few lines.  Results go to stdout, all else to stderr."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from harness import __version__, redaction
from harness.cli_capacity import app as capacity_app
from harness.cli_gate import app as gate_app
from harness.cli_plan import app as plan_app
from harness.records import RidgelineError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="Measures what an LLM server really does, and holds it against what theory predicts.")  # fmt: skip
config_app = typer.Typer(no_args_is_help=True, help="Scenario files: a schema for editors, and one to start from.")
app.add_typer(config_app, name="config")
app.add_typer(gate_app)
app.add_typer(capacity_app)
app.add_typer(plan_app)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"ridgeline {__version__}")
        raise typer.Exit()


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]
          = False) -> None:  # fmt: skip
    pass


def _list(text: str | None, kind: type[int] | type[float], flag: str) -> list[Any] | None:
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise RidgelineError(f"{flag}: got {text!r}; give numbers separated by commas, such as 1,2,4,8") from None


@app.command()
def run(
    scenario: Annotated[
        Path | None, typer.Argument(help="A scenario file; without one, the options say it all.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Base URL of the server (or OPENAI_BASE_URL).")] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask for; default: the first in /v1/models.")] = None,
    batch_sizes: Annotated[str | None, typer.Option(help="Requests at once, one point each: 1,2,4,8.")] = None,
    input_tokens: Annotated[
        str | None,
        typer.Option(help="Tokens of each prompt, by the server's count: 350, 100:500, lognormal:350:100 or a file."),
    ] = None,
    output_tokens: Annotated[str | None, typer.Option(help="Tokens of each answer: as above.")] = None,
    mode: Annotated[str | None, typer.Option(help="wave, closed or open.")] = None,
    rate: Annotated[
        str | None,
        typer.Option(help="Requests per second (open), one point each; a ramp 1:10:60s; steps 5@30s,10@30s."),
    ] = None,
    trace: Annotated[str | None, typer.Option(help="A .csv or .jsonl file of requests to replay (open).")] = None,
    trace_speed: Annotated[float | None, typer.Option(help="2: the trace in half its time.")] = None,
    arrivals: Annotated[str | None, typer.Option(help="constant, poisson or gamma.")] = None,
    burstiness: Annotated[float | None, typer.Option(help="Shape of gamma arrivals.")] = None,
    waves: Annotated[int | None, typer.Option(help="Waves per trial (wave).")] = None,
    requests: Annotated[int | None, typer.Option(help="Requests per trial.")] = None,
    duration: Annotated[str | None, typer.Option(help="No request starts later than this: 30s, 5min.")] = None,
    trials: Annotated[int | None, typer.Option(help="Repeats of each point.")] = None,
    precision: Annotated[str | None, typer.Option(help="Repeat trials until intervals are within this: 2%.")] = None,
    max_time: Annotated[str | None, typer.Option(help="Bound on a point's time with --precision: 10min.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Requests before the measured ones.")] = None,
    api: Annotated[str | None, typer.Option(help="completions or chat.")] = None,
    transport: Annotated[
        str | None, typer.Option(help="wire, or openai: the official client, as an application sees it.")
    ] = None,
    shared_prefix: Annotated[float | None, typer.Option(help="Share of each prompt that all have in common.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A .jsonl file of prompts.")] = None,
    turns: Annotated[int | None, typer.Option(help="Requests in a session.")] = None,
    think_time: Annotated[str | None, typer.Option(help="Between the turns of a session: 2s.")] = None,
    same_prompt: Annotated[bool, typer.Option("--same-prompt", help="One prompt for all requests.")] = False,
    seed: Annotated[int | None, typer.Option(help="Prompts, schedule and order follow from it.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Row to predict for, or `machine` for this one.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer.json, or its folder.")] = None,
    model_config: Annotated[str | None, typer.Option(help="config.json, its folder, or a GGUF file.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision of the weights.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Precision of the KV cache.")] = None,
    tp: Annotated[int | None, typer.Option(help="Accelerators that share each layer.")] = None,
    calibration: Annotated[str | None, typer.Option(help="A file of `ridgeline calibrate` to predict with.")] = None,
    slo: Annotated[str | None, typer.Option(help="What must be met: ttft_p95=500ms,itl_p95=50ms.")] = None,
    price: Annotated[str | None, typer.Option(help="US dollars for an hour of one accelerator: 1.2/h.")] = None,
    workers: Annotated[str | None, typer.Option(help="Processes to shard the load over; auto: one a core.")] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster to shard over; local starts one.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the key.")] = None,
    api_key_file: Annotated[str | None, typer.Option(help="File that holds the key, instead of a variable.")] = None,
    timeout: Annotated[str | None, typer.Option(help="Stop the whole run after this: 10min.")] = None,
    connect_timeout: Annotated[str | None, typer.Option(help="For a connection to open: 10s.")] = None,
    first_token_timeout: Annotated[str | None, typer.Option(help="For the first text of an answer: 300s.")] = None,
    idle_timeout: Annotated[str | None, typer.Option(help="Between two reads of an answer: 60s.")] = None,
    request_timeout: Annotated[str | None, typer.Option(help="For one request: 900s.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Take up a run that did not end: finished points are kept, the rest is measured."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Base URL of a second server, to be measured beside the first.")
    ] = None,
    interleave: Annotated[
        bool, typer.Option("--interleave", help="Trials of both servers, or of all variants, in turn: ABBA.")
    ] = False,
    gate: Annotated[bool, typer.Option("--gate", help="Hold the second variant against the first: `compare`.")] = False,
    margin: Annotated[str | None, typer.Option(help="Of the gate: itl=3%,ttft=5%.")] = None,
    noise: Annotated[Path | None, typer.Option(help="Of the gate: what `ridgeline noise` wrote.")] = None,
    max_error_rate: Annotated[float | None, typer.Option(help="Share of failures that ends with exit code 6.")] = None,
    no_preflight: Annotated[
        bool, typer.Option("--no-preflight", help="Ask nothing before the first request; name the model by --model.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 5 if any point is invalid.")] = False,
    out: Annotated[str | None, typer.Option(help="Run folder; default: results/NAME-TIME.")] = None,
    report_path: Annotated[str | None, typer.Option("--report", help="Where the report goes.")] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what theory predicts; send nothing.")
    ] = False,
) -> None:
    """Measure a server, and hold it against theory."""
    from harness import command, units
    from harness.arrivals import parse as arrivals_of
    from harness.lengths import parse

    seconds = units.parse(duration, "time", "--duration") if duration is not None else None
    flags: dict[str, Any] = {
        "engine": {"url": url},
        "model": model,
        "tokenizer": tokenizer,
        "api_key_env": api_key_env, "api_key_file": api_key_file,
        "slo": slo, "price": price,
        "report": report_path,
        "workload": {
            "batch_sizes": _list(batch_sizes, int, "--batch-sizes"), **arrivals_of(rate or ""),
            "input_tokens": parse(input_tokens, "--input-tokens") if input_tokens else None,
            "output_tokens": parse(output_tokens, "--output-tokens") if output_tokens else None,
            "mode": mode or ("open" if rate or trace else None), "trace": trace, "trace_speed": trace_speed,
            "shared_prefix": shared_prefix, "prompts": prompts, "turns": turns, "think_time_s": think_time,
            "arrivals": arrivals, "burstiness": burstiness, "waves": waves, "requests": requests, "duration_s": seconds,
            "trials": trials, "precision": precision, "max_time_s": max_time, "warmup": warmup, "api": api, "transport": transport, "same_prompt": same_prompt or None, "seed": seed},
        "theory": {"hardware": hardware, "model_config": model_config, "dtype": dtype, "kv_dtype": kv_dtype, "tp": tp,
                   "calibration": calibration},
        "client": {"workers": int(workers) if workers and workers.isdigit() else workers, "ray": ray,
                   "preflight": False if no_preflight else None},
        "limits": {"max_error_rate": max_error_rate, "run_s": timeout, "connect_s": connect_timeout,
                   "first_token_s": first_token_timeout, "idle_s": idle_timeout, "total_s": request_timeout},
        "interleave": interleave or None,
        "variants": {"base": {"args": []}, "new": {"url": against}} if against else None,
    }  # fmt: skip
    planned = command.resumed(resume, scenario, flags) if resume else command.planned(scenario, flags)
    if dry_run:
        typer.echo(command.plan_text(planned))
        return
    if planned.variants:
        from harness import command_gate

        wanted = command_gate.options_of(margin=margin, gated=True) if gate else None
        raise typer.Exit(
            command_gate.run(planned, out=out, resume=resume, quiet=quiet, as_json=as_json, with_report=not no_report,
                             strict=strict, gated=wanted, noise=noise)
        )  # fmt: skip
    if interleave or gate:
        raise RidgelineError(
            "--interleave and --gate: need two servers; give --against URL, or a scenario with variants"
        )
    raise typer.Exit(
        command.run(
            planned, out=out, strict=strict, as_json=as_json, quiet=quiet, with_report=not no_report, resume=resume
        )
    )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The file; default: report.html in the first folder, or stdout for md and json."
        ),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="html; md: for a pull request or an issue; json: for machines.")
    ] = "html",
    hardware: Annotated[str | None, typer.Option(help="Predict for this row instead of the run's own.")] = None,
    model_config: Annotated[str | None, typer.Option(help="Model configuration, instead of the run's own.")] = None,
    calibration: Annotated[str | None, typer.Option(help="A file of `ridgeline calibrate` to predict with.")] = None,
    definitions: Annotated[
        str | None, typer.Option(help="Show the figures under another tool's formulas too: `ridgeline definitions`.")
    ] = None,
    history: Annotated[Path | None, typer.Option(help="Show how figures went: a file of `ridgeline history`.")] = None,
    slo: Annotated[str | None, typer.Option(help="What must be met, instead of the run's own.")] = None,
    price: Annotated[str | None, typer.Option(help="US dollars for an hour of one accelerator: 1.2/h.")] = None,
) -> None:
    """Write the report of one run, or of several held against the first; rebuilt from the records on disk."""
    from harness import command_report

    typer.echo(
        command_report.report(runs, out, hardware, model_config, definitions, calibration, history, slo, price, form)
    )


@app.command("import")
def import_(
    files: Annotated[
        list[Path], typer.Argument(help="Results of vllm bench serve, guidellm or aiperf: one run's points.")
    ],
    out: Annotated[str | None, typer.Option(help="Run folder; default: results/NAME-TIME.")] = None,
    report_path: Annotated[Path | None, typer.Option("--report", help="Where the report goes.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Row to predict for, or `machine` for this one.")] = None,
    model_config: Annotated[str | None, typer.Option(help="config.json, its folder, or a GGUF file.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision of the weights.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Precision of the KV cache.")] = None,
    tp: Annotated[int | None, typer.Option(help="Accelerators that share each layer.")] = None,
) -> None:
    """Make a run and a report of what another tool measured: theory beside its figures."""
    from harness import command

    theory = {"hardware": hardware, "model_config": model_config, "dtype": dtype, "kv_dtype": kv_dtype, "tp": tp}
    typer.echo(command.import_files(files, out, theory, report_path))


@app.command()
def verify(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Recompute the summary of a run from its records, and say whether the stored one is the same."""
    from harness import command

    typer.echo(command.verify(run))


@app.command()
def definitions(
    run: Annotated[Path | None, typer.Argument(help="A run folder; without one, the page that explains.")] = None,
    name: Annotated[str, typer.Option("--as", help="vllm, guidellm, aiperf, sglang or ridgeline.")] = "vllm",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Recompute a stored run under another tool's formulas, or explain why numbers differ."""
    from harness import command_report

    typer.echo(command_report.definitions(run, name, as_json))


@app.command()
def machine(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the row to this file too.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again, whatever was stored.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the row as JSON.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Measure the first GPU, through torch or cupy.")] = False,
    python: Annotated[
        str | None,
        typer.Option(
            help="Measure the matrix products of the engine in this interpreter too: vLLM's, torch's or llama.cpp's."
        ),
    ] = None,
) -> None:
    """Measure this machine's memory bandwidth and matrix FLOPS: its row for predictions."""
    from harness import command

    typer.echo(command.machine(out, fresh, as_json, gpu, python))


@app.command()
def predict(
    model: Annotated[str, typer.Option(help="A name of the catalogue, a config.json, its folder, or a GGUF file.")],
    hardware: Annotated[str, typer.Option(help="Rows of `ridgeline hardware`, or `machine`, with commas between.")],
    batch_sizes: Annotated[str, typer.Option(help="Requests at once: 1,8,32.")] = "1,2,4,8,16,32,64,128",
    input_tokens: Annotated[str, typer.Option(help="Tokens of each prompt: 350, or several.")] = "350",
    output_tokens: Annotated[str, typer.Option(help="Tokens of each answer: 150, or several.")] = "150",
    dtype: Annotated[
        str, typer.Option(help="Precisions of the weights: bf16,fp8,int4; default: as published.")
    ] = "auto",
    kv_dtype: Annotated[str, typer.Option(help="Precision of the KV cache.")] = "auto",
    tp: Annotated[str, typer.Option(help="Accelerators that share each layer: 1,2,4.")] = "1",
    pp: Annotated[int, typer.Option(help="Stages of a pipeline.")] = 1,
    ep: Annotated[
        int,
        typer.Option(
            help="Accelerators that the experts are spread over; beyond tp, the attention is in data parallel."
        ),
    ] = 1,
    cp: Annotated[int, typer.Option(help="Accelerators that the tokens of each sequence are spread over.")] = 1,
    mode: Annotated[str, typer.Option(help="wave, closed or open.")] = "wave",
    rate: Annotated[str | None, typer.Option(help="Requests per second (open): 1,2,5.")] = None,
    framework: Annotated[str | None, typer.Option(help="vllm, sglang, tensorrt-llm, llama.cpp, transformers …")] = None,
    prefix_share: Annotated[float, typer.Option(help="Share of each prompt that a prefix cache holds.")] = 0.0,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of the memory that the engine takes.")] = 0.9,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Most tokens of a pass; 0: the framework's.")] = 0,
    kv_space: Annotated[str | None, typer.Option(help="Space for the KV cache of each accelerator: 4GiB.")] = None,
    draft_model: Annotated[str | None, typer.Option(help="A model that speculates.")] = None,
    draft_tokens: Annotated[int, typer.Option(help="Tokens that it proposes at a time.")] = 3,
    acceptance: Annotated[float, typer.Option(help="Share of its tokens that are accepted.")] = 0.7,
    calibration: Annotated[Path | None, typer.Option(help="A file of `ridgeline calibrate`.")] = None,
    predictor: Annotated[str | None, typer.Option(help="Another's figures beside: aiconfigurator, an extra.")] = None,
    page: Annotated[Path | None, typer.Option("--report", help="Write it as a page, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict before any server is started or hardware bought: a row for each combination."""
    from harness import command_theory as theory

    counts = {"batch": batch_sizes, "input_tokens": input_tokens, "output_tokens": output_tokens, "tp": tp}
    numbers = {name: _list(text, int, f"--{name.replace('_', '-')}") or [] for name, text in counts.items()}
    room = theory.room(gpu_memory_utilization, max_num_batched_tokens, kv_space)
    asked = theory.Asked(model, hardware.split(","), dtype.split(","), kv_dtype, pp, ep, mode if rate is None else "open",
                         _list(rate, float, "--rate"), framework, prefix_share, calibration,
                         (draft_model, draft_tokens, acceptance) if draft_model else None, **numbers, room=room,
                         predictor=predictor, cp=cp)  # fmt: skip
    typer.echo(theory.predict(asked, as_json, page, ["ridgeline", *sys.argv[1:]]))


@app.command()
def training(
    model: Annotated[str, typer.Option(help="A name of the catalogue, a config.json, its folder, or a GGUF file.")],
    hardware: Annotated[str, typer.Option(help="Rows of `ridgeline hardware`, with commas between.")],
    gpus: Annotated[int, typer.Option(help="Accelerators that share all parameters (FSDP).")] = 8,
    batch: Annotated[int, typer.Option(help="Sequences of a step on each of them.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens of each.")] = 4096,
    recompute: Annotated[bool, typer.Option(help="Run each layer's forward pass again rather than keep it.")] = True,
    link: Annotated[
        str | None, typer.Option(help="Rate of the link, per direction: 50GB/s; default: a machine's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Memory and time of a training step, parameters sharded over the accelerators (FSDP)."""
    from harness import command_theory as theory

    typer.echo(theory.training(model, hardware.split(","), as_json, link, gpus=gpus, batch=batch, context=context,
                               recompute=recompute))  # fmt: skip


@app.command()
def calibrate(
    source: Annotated[Path, typer.Argument(help="A run folder, or a table (CSV) of measured cells.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The calibration, for --calibration.")],
    batch_sizes: Annotated[str | None, typer.Option(help="Fit to the cells of these only: 1,2.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the calibration as JSON.")] = False,
) -> None:
    """Fit a handful of efficiency factors to at most ten measured cells, and name the next cell to measure."""
    from harness import command_theory as theory

    typer.echo(theory.calibrate(source, out, _list(batch_sizes, int, "--batch-sizes"), as_json))


@app.command()
def validate(
    table: Annotated[Path, typer.Argument(help="Measurements that others made (.csv or .csv.gz).")],
    calibrate_on: Annotated[
        str | None,
        typer.Option(help="Cells to calibrate on first: a table, COLUMN=VALUE,... or so many of each server."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write each prediction beside its row (CSV).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Hold predictions against a table of measurements: errors by group, interval coverage, rows faster than physics."""
    from harness import command_theory as theory

    typer.echo(theory.validate(table, calibrate_on, out, as_json))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def simulate(context: typer.Context) -> None:
    """Serve a simulated model with an exactly stated law (TTFT = a + b·prompt, ITL = c + d·batch)."""
    from harness import simulator

    raise typer.Exit(simulator.main(context.args) or 0)


@app.command()
def selftest(
    streams: Annotated[str, typer.Option(help="Numbers of streams to try.")] = "16,64,256,512",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure the instrument itself: its error and its ceiling on this machine, against the simulator."""
    from harness import command

    typer.echo(command.selftest(_list(streams, int, "--streams") or [], as_json))


@app.command()
def hardware(name: Annotated[str | None, typer.Argument(help="One row in full.")] = None) -> None:
    """List the hardware table, or one row with its sources."""
    from harness import command

    typer.echo(command.hardware(name))


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a scenario."""
    from harness import scenario

    typer.echo(scenario.schema())


@config_app.command("init")
def config_init(path: Annotated[Path | None, typer.Argument(help="File to write; default: stdout.")] = None) -> None:
    """Write a commented scenario with every key."""
    from harness import scenario, store

    if path is None:
        typer.echo(scenario.commented(), nl=False)
        return
    if path.exists():
        raise RidgelineError(f"{path}: is there already; name another file")
    store.write_text(path, scenario.commented())


@config_app.command("validate")
def config_validate(path: Annotated[Path, typer.Argument(help="A scenario file.")]) -> None:
    """Say whether a scenario is valid."""
    from harness import command

    command.planned(path, {})
    typer.echo(f"{path}: valid")


def _have_streams() -> None:
    """A closed standard stream would lend its number to the next file or socket; one that cannot spell a character says
    something else instead."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="replace")


def main() -> None:
    """The command.  Errors that the user can mend are one line; exit codes are those of the README."""
    _have_streams()
    redaction.quiet_logs()
    # Imports make many objects that stay: to look them over again and again costs a tenth of the start.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)  # nor does what is left need looking over once more at the exit
    try:
        app()
    except RidgelineError as problem:
        if os.environ.get("RIDGELINE_DEBUG"):
            sys.stderr.write(redaction.clean(traceback.format_exc()))
        sys.stderr.write(f"error: {redaction.clean(str(problem))}\n")
        raise SystemExit(problem.code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except SystemExit as leaving:  # typer ends with 1 where nobody reads on, and marks the streams
        if leaving.code == 1 and "Pacify" in type(sys.stdout).__name__:
            raise SystemExit(0) from None
        raise
    except Exception as problem:
        if isinstance(problem, OSError) and problem.errno in NO_ROOM:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or it would be tried once more at the exit
            where = problem.filename or "the output"
            sys.stderr.write(f"error: {where} cannot be written: {problem.strerror}\n")
            raise SystemExit(2) from None
        sys.stderr.write(redaction.clean(traceback.format_exc()) + "This is our mistake: please report it.\n")
        raise SystemExit(1) from None
