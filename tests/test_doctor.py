"""The doctor: rows of nvidia-smi in its documented form, a real server, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import doctor, machine
from harness.scenario import validate
from tests.conftest import ROOT

# In the form that nvidia-smi --query-gpu=… --format=csv,noheader,nounits has by its manual; figures made up.
CARD = "0, NVIDIA H100 80GB HBM3, 550.54.15, {sm}, 1980, {reasons}, {heat}, 120.5, {use}, 500, 81559\n"
OK: dict[str, Any] = {"sm": 1980, "reasons": "0x0000000000000000", "heat": 35, "use": 0}


def states(card: dict[str, Any], apps: str = "") -> dict[str, str]:
    checks = doctor.gpu_checks(
        machine.smi_rows(CARD.format(**OK | card), doctor.GPU_COLUMNS), machine.smi_rows(apps, doctor.APP_COLUMNS)
    )
    return {check.name: check.state for check in checks}


@pytest.mark.parametrize(
    ("card", "state"),
    [
        ({}, "ok"),
        ({"sm": 210, "reasons": "0x0000000000000001"}, "ok"),  # idle
        ({"reasons": "0x0000000000000004"}, "warn"),  # power cap
        ({"reasons": "0x0000000000000060"}, "warn"),  # thermal, both kinds
        ({"sm": 600, "use": 98}, "warn"),
        ({"heat": 88}, "warn"),
        ({"sm": "[N/A]", "reasons": "[N/A]", "heat": "[N/A]", "use": "[N/A]"}, "ok"),  # a card that tells nothing
    ],
)
def test_a_slowed_card_is_told(card: dict[str, Any], state: str) -> None:
    assert states(card) == {"gpu": "ok", "clocks 0": state, "gpu users": "ok"}


def test_a_gpu_that_somebody_uses_is_not_fit() -> None:
    assert states({}, "4711, /usr/bin/python3, 70000\n")["gpu users"] == "fail"


def test_no_card_is_absent_and_not_a_failure() -> None:
    assert [check.state for check in doctor.gpu_checks([], [])] == ["absent"]


def checks_of(**values: Any) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.look(validate(values, "test"), Path("results"))}


def test_a_server_that_answers_is_named_and_one_that_does_not_fails(simulated: Callable[..., str]) -> None:
    url = simulated()
    found = checks_of(engine={"url": url})
    assert found["engine"].state == "ok" and "simulated at" in found["engine"].saw
    assert not doctor.failed(list(found.values()))
    gone = checks_of(engine={"url": "http://127.0.0.1:9"})
    assert gone["engine"].state == "fail" and "is the server up" in gone["engine"].saw
    assert doctor.as_dict(list(gone.values()))["fit"] is False


def test_what_is_missing_fails_with_its_remedy() -> None:
    found = checks_of(tokenizer="nowhere", engine={"kind": "vllm", "model": "m", "python": "nowhere/python"})
    assert found["tokenizer"].state == found["engine"].state == "fail"
    assert "make" in found["engine"].saw and found["tokenizer"].do
    here = checks_of(
        tokenizer=str(ROOT / "pyproject.toml"), workload={"batch_sizes": [65536], "requests": 100_000_000 // 100}
    )
    assert here["limits"].state == "fail"


def test_the_command_exits_6_where_a_run_would_fail(ridgeline: Any) -> None:
    done = ridgeline("doctor", "--url", "127.0.0.1:9", "--json")
    assert done.returncode == 6 and json.loads(done.stdout)["fit"] is False and "Traceback" not in done.stderr
