"""Result files of other tools -> a run folder of ours: `ridgeline import FILE...`."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from harness import __version__, archive, definitions, foreign, redaction, store
from harness.foreign import Load
from harness.records import RidgelineError, Table, table
from harness.scenario import Scenario, dump, validate

SAME = 1e-3  # relative: stamps are kept to some 0.1 us, and a gap is a difference of two


def write(paths: Sequence[Path], options: dict[str, Any], command: list[str], out: str | None, results: Path) -> Path:
    """The run folder made of `paths`: one point for each benchmark in them.  `options` lie over the scenario (model
    configuration, hardware).  Raises RidgelineError naming the file that is not a result, or does not belong to the others."""
    found: list[Load] = []
    files: list[dict[str, Any]] = []
    for path in paths:
        read, used = _read(path)
        found += read
        files += [{"name": file.name, "bytes": file.stat().st_size, "sha256": _sha256(file)} for file in used if
                  _sha256(file) not in {known["sha256"] for known in files}]  # fmt: skip
    loads = _one_run(found, paths)
    scenario = _scenario(loads, options)
    folder, lock = store.create(out, scenario.name, results)
    try:
        points, tables, first_id = [], [], 0
        for index, load in enumerate(loads):
            t = table(foreign.placed(load, index, first_id))
            first_id += len(t)
            points.append({"batch_size": load.batch_size, "rate": load.rate, "imported": _imported(load, t)})
            tables.append(t)
        if first_id:
            archive.write(folder / store.PARQUET, [t for t in tables if len(t)])
        store.write_text(folder / "scenario.yaml", dump(scenario))
        store.write_json(folder / store.RUN, redaction.scrubbed(_provenance(loads, points, files, scenario, command)))
    except OSError as problem:
        raise RidgelineError(f"{folder}: cannot be written: {problem.strerror}") from None
    finally:
        lock.close()
        (folder / ".lock").unlink(missing_ok=True)
    return folder


def _read(path: Path) -> tuple[list[Load], list[Path]]:
    """The loads of a file, and the files they were read from: aiperf's summary and its records lie side by side."""
    if path.is_dir():
        inside = [
            file for name in ("profile_export_aiperf.json", "profile_export.jsonl") if (file := path / name).is_file()
        ]
        if not inside:
            raise RidgelineError(
                f"{path}: a folder without aiperf's profile_export_aiperf.json or profile_export.jsonl; give a file"
            )
        return _read(inside[0])
    text = _text(path)
    found = foreign.loads(text, str(path))
    if not found or found[0].tool != "aiperf":
        return found, [path]
    beside = next((file for file in _beside(path) if file.is_file() and file != path), None)
    if beside is None:
        return found, [path]
    mine, other = foreign.parsed(text, str(path)), foreign.parsed(_text(beside), str(beside))
    summary, lines = (other[0], mine) if found[0].records else (mine[0], other)
    try:
        joined = foreign.aiperf(summary, lines)
    except (KeyError, TypeError, ValueError, AttributeError):
        return found, [path]  # a neighbour of another kind
    measured = sum(not record.warmup for record in joined.records)
    return ([joined], sorted([path, beside])) if measured == joined.said["requests"] else (found, [path])


def _beside(path: Path) -> list[Path]:
    """Where aiperf would have put the other half: profile_export.jsonl and profile_export_aiperf.json, or PREFIX.jsonl and .json."""
    stem = path.stem.removesuffix("_aiperf")
    names = [f"{stem}.jsonl"] if path.suffix == ".json" else [f"{stem}_aiperf.json", f"{stem}.json"]
    return [path.with_name(name) for name in names]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise RidgelineError(
            f"{path}: cannot be read: {getattr(problem, 'strerror', None) or 'not UTF-8 text'}"
        ) from None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _one_run(loads: Sequence[Load], paths: Sequence[Path]) -> list[Load]:
    """The loads in the order of a report.  Raises RidgelineError if they are not of one tool, one model, one kind of load."""
    where = ", ".join(str(path) for path in paths)
    if not loads:
        raise RidgelineError(f"{where}: holds no benchmark")
    for what, values in (("tools", {load.name for load in loads}), ("models", {load.model for load in loads}),
                         ("kinds of load (at a rate, and so many at once)", {load.rate is None for load in loads})):  # fmt: skip
        if len(values) > 1:
            said = "" if True in values else f" ({', '.join(sorted(map(str, values)))})"
            raise RidgelineError(f"{where}: results of several {what}{said}: a run is of one; import them apart, and give "
                                 "`ridgeline report` both folders")  # fmt: skip
    once = {(load.load, load.started_at, repr(load.said)): load for load in loads}  # both halves of one were named
    return sorted(once.values(), key=lambda load: (load.batch_size or 0, load.rate or 0.0))


def _scenario(loads: Sequence[Load], options: dict[str, Any]) -> Scenario:
    first = loads[0]
    workload: dict[str, Any] = {"api": first.api, "warmup": 0}
    if first.rate is None:
        workload |= {"mode": "closed", "batch_sizes": sorted({load.batch_size or 1 for load in loads})}
    else:
        workload |= {"mode": "open", "rates": sorted({load.rate or 0.0 for load in loads})}
    for key in ("input_tokens", "output_tokens"):
        workload[key] = max(1, round(_mean_length(first, key) or 1))
    values = {"name": f"{foreign.NAMES[first.tool].replace(' ', '-')}-import", "model": first.model, "workload": workload,
              "description": f"Imported: {first.name}"}  # fmt: skip
    return validate(values | options, "the imported files")


def _mean_length(load: Load, key: str) -> float | None:
    told: list[int] = [n for record in load.records if (n := getattr(record, key))]
    if told:
        return sum(told) / len(told)
    good = load.said.get("requests", 0) - load.said.get("errors", 0)
    total = float(load.said.get(key, math.nan))
    return total / good if good and total == total else None


def _imported(load: Load, t: Table) -> dict[str, Any]:
    """What stands beside a point: where it comes from, what the tool said, and how far its own stamps bear that out."""
    return {"tool": load.tool, "name": load.name, "stamps": load.stamps, "detailed": bool(len(t)), "said": load.said,
            "differs": _differs(load, t)}  # fmt: skip


def _differs(load: Load, t: Table) -> list[dict[str, Any]]:
    """The means that the tool printed and its own stamps do not give under its own formulas."""
    if not len(t) or not load.said:
        return []
    again = definitions.figures(load.tool, t, "closed" if load.rate is None else "open", load.batch_size or 0)
    pairs = [
        (key, load.said[key]["mean"], again[key]["mean"])
        for key in definitions.TIMES
        if load.said.get(key) and again[key]
    ]
    good = t.where(t.ok & ~t.warmup)
    pairs += [("output_tokens", load.said["output_tokens"], float(np.maximum(good.output_tokens, 0).sum()))]
    return [
        {"figure": key, "said": said, "stamps": ours}
        for key, said, ours in pairs
        if abs(said - ours) > SAME * abs(said)
    ]


def _provenance(loads: Sequence[Load], points: list[dict[str, Any]], files: list[dict[str, Any]], scenario: Scenario,
                command: list[str]) -> dict[str, Any]:  # fmt: skip
    first = loads[0]
    return {
        "schema": store.FORMAT,
        "ridgeline": __version__,
        "state": "complete",
        "started_at": first.started_at,
        "command": command,
        "scenario": scenario.model_dump(mode="json", by_alias=True),
        "points": points,
        "model": first.model,
        "imported": {
            "from": first.name,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": files,
            "url": re.sub("//[^/]*@", "//", first.url or ""),
        },
        "versions": {foreign.NAMES[first.tool]: first.version or "unknown"},
    }
