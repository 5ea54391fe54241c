"""The gate's verbs: parse, call, print, as in `cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()
baseline_app = typer.Typer(
    no_args_is_help=True, help="Figures to hold later runs against: small files, reviewed like code."
)
app.add_typer(baseline_app, name="baseline")


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(help="A run folder, a baseline file, or a folder of baselines.")],
    new: Annotated[Path, typer.Argument(help="A run folder.")],
    gate: Annotated[
        bool, typer.Option("--gate", help="Exit by the verdict: 3 failed, 5 invalid, 6 requests failed.")
    ] = False,
    metrics: Annotated[
        str | None, typer.Option(help="What is tested: ttft_p50,itl_p50,output_tokens_per_s (the default).")
    ] = None,
    margin: Annotated[str | None, typer.Option(help="Changes that do not matter: itl=3%,ttft_p50=5%.")] = None,
    slo: Annotated[str | None, typer.Option(help="Bounds to hold: ttft_p95=500ms,itl_p50@b8=30ms.")] = None,
    roof: Annotated[str | None, typer.Option(help="Least share of the tokens/s that physics allows: 60%.")] = None,
    alpha: Annotated[str, typer.Option(help="Chance of a false alarm, all tests together.")] = "1%",
    allow: Annotated[
        str | None, typer.Option(help="Fields that may differ (model,hardware,…); baseline: there may be none.")
    ] = None,
    noise: Annotated[
        Path | None, typer.Option(help="What `ridgeline noise` wrote; default: .ridgeline/noise, if it is there.")
    ] = None,
    top_up: Annotated[
        bool, typer.Option("--top-up", help="While inconclusive, measure more trials of both runs, at most twice.")
    ] = False,
    inconclusive: Annotated[str, typer.Option(help="warn, or fail: exit 4.")] = "warn",
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML here.")] = None,
    md: Annotated[Path | None, typer.Option(help="Write Markdown here, such as $GITHUB_STEP_SUMMARY.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Hold a run against another, trial by trial: what changed, how sure that is, and whether it may pass."""
    from harness import command_gate

    wanted = command_gate.options_of(metrics=metrics, margin=margin, slo=slo, roof=roof, alpha=alpha, allow=allow,
                                     gated=gate, inconclusive=inconclusive)  # fmt: skip
    output = command_gate.Output(md, junit, as_json)
    raise typer.Exit(command_gate.compare(base, new, wanted, noise, output, top_up))


@app.command()
def noise(
    targets: Annotated[list[Path], typer.Argument(help="Runs of the same, or one scenario to play again and again.")],
    url: Annotated[str | None, typer.Option(help="Base URL of the server that the scenario asks.")] = None,
    runs: Annotated[int, typer.Option(help="How often a scenario is played.")] = 10,
    trials: Annotated[int | None, typer.Option(help="Trials of each run.")] = None,
    metrics: Annotated[str | None, typer.Option(help="What the gate will test; as in `compare`.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the runs; one that holds some goes on.")] = None,
    store_in: Annotated[Path, typer.Option("--store", help="Where the noise level goes.")] = Path(".ridgeline/noise"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the noise level as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure how much equal runs differ, and so what a gate can detect: `compare` then uses it."""
    from harness import command, command_gate

    alone = len(targets) == 1 and not targets[0].is_dir()
    scenario = command.planned(targets[0], {"engine": {"url": url}, "workload": {"trials": trials}}) if alone else None
    runs_there = [] if scenario else targets
    typer.echo(command_gate.noise(runs_there, scenario, runs, out, store_in, metrics, as_json, quiet))


@baseline_app.command("update")
def baseline_update(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    reason: Annotated[str, typer.Option(help="Why the figures may change; kept in the file.")],
    folder: Annotated[Path, typer.Option("--dir", help="Where baselines lie.")] = Path(".ridgeline/baselines"),
) -> None:
    """Make a run the baseline of its kind (model, hardware, workload): a small file, to be committed."""
    from harness import command_gate

    typer.echo(command_gate.update(run, reason, folder))


@baseline_app.command("show")
def baseline_show(
    path: Annotated[Path, typer.Argument(help="A baseline, or a folder of them.")] = Path(".ridgeline/baselines"),
) -> None:
    """Print a baseline, or all there are."""
    from harness import command_gate

    typer.echo(command_gate.show(path))


@app.command()
def history(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    folder: Annotated[Path, typer.Option("--dir", help="Where histories lie.")] = Path(".ridgeline/history"),
) -> None:
    """Append runs to the history of their kind, a CSV file; `report --history FILE` shows it."""
    from harness import command_gate

    typer.echo(command_gate.remember(runs, folder))


@app.command()
def doctor(
    scenario: Annotated[Path | None, typer.Argument(help="The scenario that is to be run.")] = None,
    url: Annotated[str | None, typer.Option(help="Base URL of the server.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look whether machine, GPU and server are fit to be measured: before a run, and after it.  Exit 6 if not."""
    from harness import command_gate

    raise typer.Exit(command_gate.doctor(scenario, url, as_json))
