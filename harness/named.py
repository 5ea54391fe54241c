"""What a scenario names must be there: its files, and addresses that are some.  Without a look at any server."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from harness.records import RidgelineError
from harness.scenario import Scenario
from harness.wire import parse_url


def check(scenario: Scenario) -> None:
    """Raises RidgelineError (code 2) with the key, and what is wrong."""
    workload = scenario.workload
    for key in ("prompts", "trace"):
        _file(getattr(workload, key), scenario.at("workload", key))
    for key in ("input_tokens", "output_tokens"):
        _file(getattr(getattr(workload, key), "file", None), scenario.at("workload", key, "file"))
    if scenario.theory.calibration:
        _calibration(scenario.theory.calibration, scenario.at("theory", "calibration"))
    if scenario.theory.hardware not in (None, "machine"):
        _hardware(scenario.theory.hardware, scenario.at("theory", "hardware"))
    if scenario.engine.kind == "url" and not scenario.engine.url:
        _address(os.environ.get("OPENAI_BASE_URL"), "OPENAI_BASE_URL")
    _address(scenario.engine.url, scenario.at("engine", "url"))
    for name, variant in scenario.variants.items():
        _address(variant.url, scenario.at("variants", name, "url"))


def _file(name: str | None, where: str) -> None:
    if name is None:
        return
    try:
        path = Path(name)
        if path.is_dir():
            raise IsADirectoryError(0, "is a folder")
        if stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its other end
            path.open("rb").close()
    except (OSError, ValueError) as problem:
        said = getattr(problem, "strerror", None) or problem
        raise RidgelineError(f"{where}: {name}: cannot be read: {said}; name a file that is there") from None


def _calibration(name: str, where: str) -> None:
    """A calibration is first needed when all has been measured: too late to be told that it is none."""
    from harness.command_theory import calibration_of

    try:
        calibration_of(Path(name))
    except RidgelineError as problem:
        raise RidgelineError(f"{where}: {problem}") from None


def _hardware(name: str, where: str) -> None:
    from harness import models

    try:
        models.hardware_row(name)
    except RidgelineError as problem:
        raise RidgelineError(f"{where}: {problem}") from None


def _address(url: str | None, where: str) -> None:
    try:
        parse_url(url or "localhost")
    except RidgelineError as problem:
        raise RidgelineError(f"{where}: {str(problem).removeprefix('--url: ')}") from None
