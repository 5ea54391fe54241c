"""Plays a search: after each point its figures are made from what is on disk, and `capacity` says what comes next."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from harness import capacity, capacity_answer, slo, summary, units
from harness.capacity import Goal, Measured, Next
from harness.plan import Point
from harness.preflight import FILES_SPARE
from harness.records import RidgelineError
from harness.scenario import Scenario
from harness.session import Session
from harness.sweep import written
from harness.theory.calibration import from_dict
from harness.theory.frameworks import of_run
from harness.theory.hardware import from_row
from harness.theory.predict import predict


class Search:
    """What `run.play` asks for the next point of a scenario with `capacity`."""

    def __init__(self, scenario: Scenario) -> None:
        asked, load = scenario.capacity, scenario.workload
        assert asked is not None
        self.limits = slo.upper(scenario.slo)
        self.guess = asked.start is None
        start = asked.start or (1.0 if load.mode == "open" else 8.0)
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        most = math.inf if files == resource.RLIM_INFINITY else float(files - FILES_SPARE)
        self.goal = Goal(load.mode, start, asked.max_points, asked.max_time_s, scenario.limits.max_error_rate, most)
        self.points: list[Measured] = []
        self.spent_s = 0.0
        self.began_s = time.monotonic()

    async def __call__(self, session: Session, last: Point | None) -> Point | None:
        if last is not None:
            await self._look(session, last)
        elif self.guess:
            self.goal = self._informed(session)
        if session.stopped_by or session.stopped_why:
            return None
        step = capacity.decide(self.points, self.goal)
        left_s = self.goal.max_time_s - self.spent_s - (time.monotonic() - self.began_s)
        if isinstance(step, Next) and left_s <= 0 and self.points:
            step = "time"
        if isinstance(step, str):
            session.info["capacity"] = {"ended": step}
            return None
        play = capacity.plan(step, self.points, self.goal, self.limits, left_s)
        whole = self.goal.whole
        return Point(len(session.info["points"]), int(step.load) if whole else None, None if whole else float(f"{step.load:.4g}"),
                     play=play)  # fmt: skip

    async def _look(self, session: Session, last: Point) -> None:
        """Make figures of what has been measured since the last look: one point, or all of a run that was taken up."""
        found = await written(session, last, 0)
        run = session.info | {"no_prediction": []}
        new = range(len(self.points), len(session.info["points"]))
        seen = summary.build(run, "complete", found.blocks, found.events, found.samples, [], None, None, new)
        rows = {row["point"]: row for row in seen["points"]}
        for index in new:
            load = session.info["points"][index]["rate" if self.goal.mode == "open" else "batch_size"]
            known = index in rows
            point = capacity_answer.measured(rows[index], self.goal.mode) if known else Measured(load, "invalid", ())
            self.points.append(point)
            session.progress.line(self._told(index, point, rows.get(index)))

    def _told(self, index: int, point: Measured, row: Mapping[str, Any] | None) -> str:
        said = [f"{r.metric} {units.seconds(r.value, 3)} of {units.seconds(r.bound, 3)}" for r in point.readings]
        word = {True: "met", False: "missed", None: "not to be trusted"}[capacity_answer.holds(point, self.goal)]
        why = (
            [f["saw"] for f in row["findings"] if f["severity"] == "invalid"] if row else ["no measured request ended"]
        )
        over = ["arrivals outrun completions"] * point.saturated
        return (f"point {index + 1} of at most {self.goal.max_points}: {capacity_answer.load_text(point.load, self.goal.mode)}: "
                f"{word}; {', '.join(said + over + (why if not point.usable else []))}")  # fmt: skip

    def _informed(self, session: Session) -> Goal:
        """Begin where theory has the edge, if it knows model and hardware."""
        from harness.command import engine_of, model_from, theory_inputs

        scenario = session.scenario
        theory = scenario.theory.model_dump(by_alias=True)
        engine = engine_of(session.info)
        if not theory["hardware"] and not engine.get("launched"):
            return self.goal
        inputs = theory_inputs(theory, engine, session.progress)
        if not inputs["model"] or not inputs["hardware"]:
            return self.goal
        model, row = model_from(inputs["model"]), from_row(inputs["hardware"])
        calibrated = from_dict(inputs["calibration"], "run.json") if inputs["calibration"] else None
        found, framework = self.goal.start, of_run(theory, engine)
        for load in np.geomspace(1, 1024, 21) if self.goal.whole else np.geomspace(0.125, 128, 21):
            if not self._predicted(scenario, model, row, calibrated, float(load), framework):
                break
            found = math.floor(load) if self.goal.whole else float(load)
        return replace(self.goal, start=found)

    def _predicted(
        self, scenario: Scenario, model: Any, row: Any, calibrated: Any, load: float, framework: Any
    ) -> bool:
        """Whether the mean that theory predicts meets each objective."""
        from harness.lengths import typical

        theory, work = scenario.theory, scenario.workload
        sizes = [typical(length) for length in work.model_dump(include={"input_tokens", "output_tokens"}).values()]
        if None in sizes:
            return False
        open_loop = self.goal.mode == "open"
        try:
            said = predict(model, row, batch=1 if open_loop else math.floor(load), input_tokens=round(sizes[0] or 0),
                           output_tokens=round(sizes[1] or 0), dtype=theory.dtype, kv_dtype=theory.kv_dtype, tp=theory.tp,
                           pp=theory.pp, mode=self.goal.mode, rate=load if open_loop else None,
                           framework=framework, calibration=calibrated)  # fmt: skip
        except RidgelineError:
            return False
        means = {"ttft": said.ttft_s.value, "ttft_scheduled": said.ttft_s.value, "itl": said.itl_s.value, "tpot": said.itl_s.value,
                 "e2e": said.e2e_s.value}  # fmt: skip
        return said.fits and all(means[limit.metric.rpartition("_")[0]] <= limit.bound for limit in self.limits)
