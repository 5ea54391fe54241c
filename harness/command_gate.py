"""What the gate's verbs do: compare, baseline, noise, and runs in variants; run folders and files in, text and exit code out."""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from harness import (
    baseline,
    command,
    command_report,
    comparison,
    gate,
    gate_text,
    history,
    redaction,
    series,
    store,
    summary,
    units,
)
from harness.comparison import NO_BASELINE, Options
from harness.gate import INCONCLUSIVE, Rule
from harness.progress import Progress
from harness.records import RidgelineError
from harness.scenario import Scenario
from harness.slo import parse as parse_slo

NOISE = Path(".ridgeline/noise")
LEAST_RUNS = 3
LOOKS = 3  # with trials added by the command itself: the first and two top-ups


@dataclass(frozen=True, slots=True)
class Output:
    """Where a comparison goes besides the terminal."""

    markdown: Path | None = None
    junit: Path | None = None
    as_json: bool = False


# --- reading ---------------------------------------------------------------------------------------------------------


def figures_of(folder: Path) -> dict[str, Any]:
    """The figures of a run folder, its summary made anew from the records; or of a file that holds a run's figures."""
    if folder.is_file():
        return _checked(folder) | {"source": str(folder)}
    found = command.summarise(folder)
    run = store.load(folder)
    return dict(store.clean(baseline.figures(run.run, found, run.blocks, run.events))) | {"source": str(folder)}


def _checked(file: Path, kind: Literal["baseline", "noise level"] = "baseline") -> dict[str, Any]:
    return baseline.checked(store.read_json(file), str(file), kind)


def base_of(path: Path, new: Mapping[str, Any], allow: frozenset[str]) -> dict[str, Any] | None:
    """What to compare with: a run folder, a baseline file, or a folder of baselines, of which the one is taken that is of
    the new run's kind.  None where there is none and that is allowed.  Raises RidgelineError (code 7)."""
    if (path / store.RUN).exists():
        return figures_of(path)
    file = path / f"{baseline.key_of(new)}.json" if path.is_dir() else path
    if file.is_file():
        return _checked(file) | {"source": str(file)}
    if NO_BASELINE in allow:
        return None
    near = _nearest(path, new) if path.is_dir() else ""
    raise RidgelineError(f"{file}: no baseline here{near}; `ridgeline baseline update RUN` makes one, or let the first run "
                         f"pass by --allow {NO_BASELINE}", 7)  # fmt: skip


def _nearest(folder: Path, new: Mapping[str, Any]) -> str:
    """Why none of a folder's baselines fits: the fields in which the nearest differs."""
    found = []
    for file in sorted(folder.glob("*.json")):
        other = _checked(file)
        found.append((baseline.mismatches(other, new), file.name))
    if not found:
        return ""
    differing, name = min(found, key=lambda pair: len(pair[0]))
    return f" (the nearest, {name}, differs in {_told(differing)})"


def _told(differing: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key}: {one} there, {two} in the new run" for key, (one, two) in differing.items())


def noise_for(path: Path | None, new: Mapping[str, Any]) -> dict[str, Any] | None:
    """The stored noise level: the file named, or the one that `ridgeline noise` left here for runs of this kind."""
    file = path or NOISE / f"{baseline.key_of(new)}.json"
    if not file.is_file():
        if path:
            raise RidgelineError(f"--noise {path}: is not there; `ridgeline noise` makes it")
        return None
    found = _checked(file, "noise level")
    if differing := baseline.mismatches(found, new):
        raise RidgelineError(f"--noise {file}: measured under other conditions: {_told(differing)}", 7)
    return found


# --- compare ---------------------------------------------------------------------------------------------------------


def options_of(*, metrics: str | None = None, margin: str | None = None, slo: str | None = None, roof: str | None = None,
               alpha: str = "1%", allow: str | None = None, gated: bool = False, inconclusive: str = "warn") -> Options:  # fmt: skip
    """The options of a gate from their texts.  Raises RidgelineError."""
    level = units.parse(alpha, "fraction", "--alpha")
    if not 0 < level < 0.5:
        raise RidgelineError(f"--alpha: got {alpha}, expected a share between 0 and 50 %")
    if inconclusive not in ("warn", "fail"):
        raise RidgelineError(f"--inconclusive: got {inconclusive!r}; known: warn, fail")
    share = units.parse(roof, "fraction", "--roof") if roof else None
    if share is not None and not 0 < share <= 1:
        raise RidgelineError(f"--roof: got {roof}, expected a share up to 100 %")
    return Options(
        comparison.parse_metrics(metrics), comparison.parse_margins(margin), parse_slo(slo), share,
        Rule(level), frozenset(part.strip() for part in (allow or "").split(",") if part.strip()), gated,
        inconclusive == "fail",
    )  # fmt: skip


def compare(base: Path, new: Path, options: Options, noise: Path | None, output: Output, top_up: bool = False) -> int:
    """Compare, and while it is inconclusive add trials if that was asked for; write and print; returns the exit code."""
    progress = Progress()
    if top_up:
        for folder in (base, new):
            if not (folder / store.RUN).exists():
                raise RidgelineError(f"--top-up: {folder} is no run folder; only a run can get more trials")
        options = replace(options, rule=Rule(options.rule.alpha, LOOKS))
    more = 0
    for look in range(1, options.rule.looks + 1):
        now = figures_of(new)
        known = replace(options, noise=noise_for(noise, now))
        found = comparison.compare(base_of(base, now, options.allow), now, known, look)
        if found["verdict"] != INCONCLUSIVE or look == options.rule.looks:
            break
        more = more or max(2, max(max(row["trials"]) for row in found["answers"]))
        progress.line(f"look {look} of {options.rule.looks} is inconclusive: {more} more trials a side")
        if code := series.extend([base, new], more, progress):
            return code
    write(found, output)
    return int(found["code"])


def write(found: Mapping[str, Any], output: Output) -> None:
    clean = store.clean(found)
    if output.markdown:
        _add_markdown(output.markdown, gate_text.markdown(clean))
    if output.junit:
        store.write_text(output.junit, redaction.clean(gate_text.junit(clean)))
    if os.environ.get("GITHUB_ACTIONS"):
        sys.stderr.write("".join(f"{redaction.clean(line)}\n" for line in gate_text.workflow_commands(clean)))
    print(json.dumps(clean, allow_nan=False) if output.as_json else redaction.clean(gate_text.terminal(clean)))


def _add_markdown(path: Path, text: str) -> None:
    """A job summary is shared with the job's other steps: what they wrote stays."""
    shared = os.environ.get("GITHUB_STEP_SUMMARY")
    before = path.read_text(encoding="utf-8") if shared and Path(shared) == path and path.exists() else ""
    store.write_text(path, before + redaction.clean(text))


# --- baselines -------------------------------------------------------------------------------------------------------


def update(run: Path, reason: str, folder: Path) -> str:
    """Make a run the baseline of its kind; says what that changes.  Raises RidgelineError (code 5) for a run that is not
    valid: every later run would be held against it."""
    found = figures_of(run)
    bad = [f"{label}: {'; '.join(p['findings'])}" for label, p in found["points"].items() if p["verdict"] == "invalid"]
    if found["state"] != "complete" or bad or not found["points"]:
        raise RidgelineError(f"{run}: no baseline: {'; '.join(bad) or 'the run did not end'}", 5)
    found.pop("source")
    file = folder / f"{baseline.key_of(found)}.json"
    before = _checked(file) if file.exists() else None
    text = compact({"reason": reason} | found)
    if len(text.encode()) > baseline.MOST_BYTES:
        raise RidgelineError(f"{run}: the baseline would have {len(text.encode()):,} bytes, and a reviewed file has at most "
                             f"{baseline.MOST_BYTES:,}: use fewer points or trials")  # fmt: skip
    store.write_text(file, text)
    if before is None:
        return f"{file}: written, the first of its kind"
    try:
        changed = gate_text.terminal(store.clean(comparison.compare(before, found, Options())))
    except RidgelineError as problem:
        changed = str(problem)
    return f"{changed}\n\n{file}: replaced (before: {before.get('started_at')}, {before.get('reason')})"


def compact(value: Any) -> str:
    """JSON for review: a line for each list of numbers."""
    text = json.dumps(store.clean(value), indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[\s+((?:[-+\deE.,\s]|null)+?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text) + "\n"


def show(path: Path) -> str:
    """A baseline, or all of a folder, as text."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise RidgelineError(f"{path}: no baseline here; `ridgeline baseline update RUN` makes one", 7)
    return "\n\n".join(_shown(file) for file in files)


def _shown(file: Path) -> str:
    found = _checked(file)
    names = baseline.primary(found["fingerprint"]["workload.mode"])
    lines = [f"{file}: {found['name']}, {found.get('started_at')}: {found.get('reason', 'no reason given')}"]
    lines += [f"  {key}: {value}" for key, value in found["shown"].items() if value is not None]
    for label, point in found["points"].items():
        for name in names:
            values = baseline.measured(point, name)
            if values:
                mean = statistics.fmean(values)
                cv = statistics.stdev(values) / mean if len(values) > 1 else None
                lines.append(f"  {label:>8} {name:<22} {gate_text.figure({'metric': name}, mean):>14}  {len(values)} trials, "
                             f"CV {units.percent(cv, 2)}")  # fmt: skip
    return "\n".join(lines)


def remember(runs: Sequence[Path], folder: Path) -> str:
    """Append runs to the history of their kind; says which files."""
    told = []
    for run in runs:
        found = figures_of(run)
        file = folder / f"{baseline.key_of(found)}.csv"
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        after = history.appended(before, history.rows_of(found))
        store.write_text(file, after)
        told.append(
            f"{file}: {len(history.parsed(after, str(file)))} lines{'' if after != before else ' (the run was there)'}"
        )
    return "\n".join(told)


def past(file: Path) -> list[dict[str, Any]]:
    """A history, for the report.  Raises RidgelineError."""
    try:
        return history.parsed(file.read_text(encoding="utf-8"), str(file))
    except OSError as problem:
        raise RidgelineError(
            f"--history {file}: cannot be read: {problem.strerror}; `ridgeline history` makes it"
        ) from None


# --- noise -----------------------------------------------------------------------------------------------------------


def noise(targets: Sequence[Path], scenario: Scenario | None, runs: int, out: Path | None, store_in: Path, metrics: str | None,
          as_json: bool, quiet: bool) -> str:  # fmt: skip
    """A/A: the same again and again, what differs is noise.  `targets` are runs that were measured already, or `scenario`
    is played so often, each time with prompts of its own; stores the level and says what it lets be detected."""
    folders = list(targets)
    if scenario is not None:
        if runs < LEAST_RUNS:
            raise RidgelineError(f"--runs: got {runs}; give {LEAST_RUNS}, better ten")
        root = out or series.begin(scenario, None, command.RESULTS)
        played = {f"run-{i + 1:02}": _seeded(scenario, i) for i in range(runs)}
        if code := series.play(played, root, False, Progress(quiet)):
            raise RidgelineError(f"{root}: the A/A runs did not end", code)
        folders = [root / name for name in played]
    found = [figures_of(folder) for folder in folders]
    if len(found) < LEAST_RUNS:
        raise RidgelineError(f"noise: got {len(found)} runs; give {LEAST_RUNS} of the same, better ten")
    for other in found[1:]:
        comparison.comparable(found[0], other, frozenset())
    names = comparison.parse_metrics(metrics) or baseline.primary(found[0]["fingerprint"]["workload.mode"])
    level = _level(found, names)
    file = store_in / f"{baseline.key_of(level)}.json"
    store.write_text(file, compact(level))
    return compact(level).rstrip() if as_json else _noise_text(level, names, file)


def _seeded(scenario: Scenario, i: int) -> Scenario:
    """The same with other prompts: a server's prefix cache remembers those of the run before."""
    workload = scenario.workload.model_copy(update={"seed": scenario.workload.seed + i})
    return scenario.model_copy(update={"workload": workload, "report": None})


def _level(found: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    points: dict[str, dict[str, Any]] = {}
    labels = [label for label in found[0]["points"] if all(label in one["points"] for one in found)]
    for label in labels:
        for name in baseline.NAMES:
            runs = [baseline.measured(one["points"][label], name) for one in found]
            if all(runs):
                points.setdefault(label, {})[name] = _noise_row(runs, name, len(labels) * len(names), name in names)
    return {"schema": baseline.FORMAT, "name": found[0]["name"], "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "runs": len(found), "invalid": sorted({f"{label}: {why}" for one in found for label, p in one["points"].items() for why in p["findings"]}),
            "fingerprint": found[0]["fingerprint"], "shown": found[0]["shown"], "points": points}  # fmt: skip


def _noise_row(runs: Sequence[Sequence[float]], name: str, family: int, reckoned: bool) -> dict[str, Any]:
    level, trials = gate.noise_of(runs), min(len(run) for run in runs)
    row = {"mean": sum(map(sum, runs)) / sum(map(len, runs)), "trials": trials, "trial_sd": level.trial_sd,
           "trial_df": level.trial_df, "run_sd": level.run_sd, "run_df": level.run_df}  # fmt: skip
    if not reckoned or not level.trial_sd >= 0:
        return row
    up, rule = baseline.higher_is_better(name), Rule()
    margin = max(baseline.margin_of(name), gate.least_margin(level, trials, family, rule, up))
    least = gate.detectable(gate.upper(level), (trials, trials), margin, family, rule, up)
    return row | {"margin": margin, "detectable": least}


def _noise_text(level: Mapping[str, Any], names: Sequence[str], file: Path) -> str:
    lines = [f"noise of {level['runs']} equal runs of {level['name']}", "",
             f"{'point':>8} {'metric':<22} {'mean':>14} {'CV trials':>10} {'CV runs':>10} {'margin':>8} {'MDE':>8}"]  # fmt: skip
    for label, rows in level["points"].items():
        for name in names:
            if row := rows.get(name):
                shown = [units.percent(row.get(key), 3) for key in ("trial_sd", "run_sd", "margin", "detectable")]
                lines.append(f"{label:>8} {name:<22} {gate_text.figure({'metric': name}, row['mean']):>14} {shown[0]:>10} {shown[1]:>10} "
                             f"{shown[2]:>8} {shown[3]:>8}")  # fmt: skip
    lines += ["", "margin: the least that a gate of as many trials may be given, or the default if that is larger; MDE: the",
              "smallest true change that such a gate would fail in 80 % of cases", *(f"invalid: {why}" for why in level["invalid"]),
              f"noise level: {file}"]  # fmt: skip
    return "\n".join(lines)


# --- runs in variants ------------------------------------------------------------------------------------------------


def run(scenario: Scenario, *, out: str | None, resume: Path | None, quiet: bool, as_json: bool, with_report: bool,
        strict: bool, gated: Options | None, noise: Path | None) -> int:  # fmt: skip
    """Play the variants of a scenario, one after the other or in turn; one report of all; with `gated` the first two are
    held against each other, with more trials while that is inconclusive."""
    progress = Progress(quiet)
    runs = series.variants_of(scenario)
    if gated and len(runs) != 2:
        raise RidgelineError(f"--gate: needs two variants (the base first), and the scenario has {len(runs)}")
    root = resume or series.begin(scenario, out, command.RESULTS)
    code = series.play(runs, root, scenario.interleave, progress)
    folders = [root / name for name in runs if (root / name / store.JOURNAL).exists()]
    found = [command.summarise(folder, progress) for folder in folders]
    page = Path(scenario.report) if scenario.report else root / "report.html"
    if with_report and found:
        command_report.write_report(folders, found, page)
    if not as_json:
        for folder, one in zip(folders, found, strict=True):
            print(redaction.clean(f"{folder.name}: {command.text_of(one, folder, None)}\n"))
        print(f"report: {page}" if with_report else f"runs: {root}")
    code = code or max((command.exit_code(one, scenario, strict) for one in found), default=6)
    if gated and not code:
        output = Output(root / "summary.md", root / "junit.xml", as_json)
        return compare(folders[0], folders[1], gated, noise, output, top_up=True)
    if as_json:
        shown = {folder.name: summary.public(one, str(folder)) for folder, one in zip(folders, found, strict=True)}
        print(json.dumps(store.clean({"runs": shown}), allow_nan=False))
    return code


# --- doctor ----------------------------------------------------------------------------------------------------------


def doctor(path: Path | None, url: str | None, as_json: bool) -> int:
    """Print what was seen; returns the exit code."""
    from harness import doctor as this

    checks = this.look(command.planned(path, {"engine": {"url": url}}), command.RESULTS)
    print(redaction.clean(json.dumps(this.as_dict(checks)) if as_json else this.text(checks)))
    return 6 if this.failed(checks) else 0
