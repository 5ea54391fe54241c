"""Several runs that belong together: the variants of a scenario one after the other, or in turn; each in its own folder.

A series has a folder with scenario.yaml and one run folder a variant.  It goes on where it was cut off: what each run
folder holds already is not measured again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import journal, store
from harness.command import event_loop
from harness.plan import points_of
from harness.progress import Progress
from harness.records import RidgelineError
from harness.scenario import Scenario, dump, load, validate

SCENARIO = "scenario.yaml"


def variants_of(scenario: Scenario) -> dict[str, Scenario]:
    """Name -> the scenario of that variant alone.  Raises RidgelineError for an engine that is not valid."""
    if scenario.workload.precision or not scenario.workload.interleave:
        raise RidgelineError("variants: their trials are counted; leave workload.precision and workload.interleave out")
    found = {}
    for name, variant in scenario.variants.items():
        plain = scenario.model_dump(mode="json", by_alias=True, exclude_unset=True)
        for key in ("variants", "interleave", "report"):
            plain.pop(key, None)
        engine = plain.get("engine", {}) | variant.model_dump(exclude_unset=True)
        engine |= {"args": [*scenario.engine.args, *variant.args], "env": scenario.engine.env | variant.env}
        plain |= {"name": f"{scenario.name[: 79 - len(name)]}-{name}", "engine": engine}
        found[name] = validate(plain, f"variants.{name}")
    return found


def slices(names: Sequence[str], trials: int, interleave: bool) -> Iterator[tuple[str, int | None]]:
    """(variant, trials it has afterwards; None: all) in the order of play: one by one, or in turn as ABBA, so that a
    drift of the machine falls on all alike."""
    if not interleave:
        yield from ((name, None) for name in names)
        return
    for k in range(trials):
        yield from ((name, k + 1) for name in (names if k % 2 == 0 else names[::-1]))


def finished(folder: Path, scenario: Scenario, upto: int | None) -> bool:
    """Whether a run folder holds these trials of all points."""
    if not (folder / store.RUN).exists() or not (folder / store.JOURNAL).exists():
        return False
    have = journal.ended(store.load(folder).events)
    trials = range(min(upto or scenario.workload.trials, scenario.workload.trials))
    return {(point.index, trial) for point in points_of(scenario.workload) for trial in trials} <= have


def play(runs: Mapping[str, Scenario], root: Path, interleave: bool, progress: Progress) -> int:
    """Play what is missing of each run; returns the exit code of the worst.  A variant whose server fails does not end
    a matrix: the others are worth having."""
    worst = 0
    trials = max((run.workload.trials for run in runs.values()), default=0)
    for name, upto in slices(list(runs), trials, interleave):
        folder = root / name
        if finished(folder, runs[name], upto):
            progress.line(f"{name}: {'all' if upto is None else f'{upto} of {trials}'} trials are there already")
            continue
        progress.line(f"{name}{'' if upto is None else f', trial {upto} of {trials}'}:")
        try:
            code = _one(runs[name], folder, progress, upto, interleave)
        except RidgelineError as problem:
            if problem.code != 6 or interleave or len(runs) == 1:
                raise
            progress.line(f"{name}: {problem}")
            code = 6
        if code > 128:
            return code
        worst = max(worst, code)
    return worst


def extend(folders: Sequence[Path], more: int, progress: Progress) -> int:
    """So many more trials for each of the runs, in turn.  Raises RidgelineError if a server is not there any more."""
    runs = {}
    for folder in folders:
        scenario = load((folder / SCENARIO).read_text(encoding="utf-8"), str(folder / SCENARIO))
        longer = scenario.workload.model_copy(update={"trials": scenario.workload.trials + more})
        runs[folder] = (scenario.model_copy(update={"workload": longer}), scenario.workload.trials)
    for k in range(more):
        for folder in folders if k % 2 == 0 else folders[::-1]:
            scenario, had = runs[folder]
            if code := _one(scenario, folder, progress, had + k + 1, bool(series_of(folder))):
                return code
    return 0


def series_of(folder: Path) -> Any:
    return store.read_json(folder / store.RUN).get("series")


def _one(scenario: Scenario, folder: Path, progress: Progress, upto: int | None, interleave: bool) -> int:
    from harness import run

    begun = (folder / store.RUN).exists() and (folder / store.JOURNAL).exists()
    outcome = event_loop(
        run.play(scenario, ["ridgeline", *sys.argv[1:]], None if begun else str(folder), folder.parent, progress,
                 folder if begun else None, upto)
    )  # fmt: skip
    if interleave:
        info = store.read_json(folder / store.RUN)
        store.write_json(folder / store.RUN, info | {"series": {"interleaved": True}})
    return int(outcome.code)


def begin(scenario: Scenario, out: str | None, results: Path) -> Path:
    """The folder of a new series.  Raises RidgelineError if it holds one already."""
    if out is not None and (Path(out) / SCENARIO).exists():
        raise RidgelineError(f"--out {out}: holds runs already; take them up by --resume, or name another folder")
    root, lock = store.create(out, scenario.name, results)
    lock.close()
    (root / ".lock").unlink(missing_ok=True)
    store.write_text(root / SCENARIO, dump(scenario))
    return root
