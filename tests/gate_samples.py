"""Figures of runs as a baseline file holds them, made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import baseline
from harness.scenario import Workload

STEADY = (1.0, 1.002, 0.998, 1.001, 0.999)


def figures(points: Mapping[str, Mapping[str, Sequence[float | None]]], **more: Any) -> dict[str, Any]:
    """Figures of a run with these trials a point and metric."""
    mark = {"model": "m", "hardware": "h", "engine": "vllm"}
    mark |= {f"workload.{k}": v for k, v in Workload().model_dump(mode="json").items() if k not in baseline.ASIDE}
    found: dict[str, Any] = {
        "schema": 1, "name": "sample", "state": "complete", "started_at": "2026-01-01T00:00:00+00:00",
        "max_error_rate": 0.01, "interleaved": False, "fingerprint": mark, "shown": {"engine version": "1"},
        "points": {label: {"verdict": "valid", "findings": [], "requests": 100, "errors": 0, "requests_per_trial": 20,
                           "roof_tokens_per_s": None, "trials": dict(trials)} for label, trials in points.items()},
    }  # fmt: skip
    return found | more


def trials(scale: float = 1.0, spread: float = 1.0) -> dict[str, list[float]]:
    """Of the three primary metrics; `scale` > 1 is slower, `spread` widens the noise of 0.16 %."""
    luck = [1 + spread * (v - 1) for v in STEADY]
    return {
        "ttft_p50": [0.1 * scale * v for v in luck],
        "itl_p50": [0.01 * scale * v for v in luck],
        "output_tokens_per_s": [100 / scale * v for v in luck],
    }


def point(found: dict[str, Any], label: str, **changed: Any) -> dict[str, Any]:
    """The same with a point changed."""
    return found | {"points": found["points"] | {label: found["points"][label] | changed}}


def noise(mark: Mapping[str, Any], labels: Sequence[str], trial_sd: float, run_sd: float = 0.0) -> dict[str, Any]:
    row = {"trial_sd": trial_sd, "trial_df": 40.0, "run_sd": run_sd, "run_df": 9.0}
    names = ("ttft_p50", "itl_p50", "output_tokens_per_s")
    return {
        "schema": 1,
        "runs": 10,
        "fingerprint": dict(mark),
        "points": {b: dict.fromkeys(names, row) for b in labels},
    }


def save(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value))
    return str(path)
