"""The pure core stays pure: numbers in, numbers out."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

HARNESS = Path(__file__).parent.parent / "harness"
PURE = [
    "records",
    "units",
    "scenario",
    "yaml_lines",
    "places",
    "arrivals",
    "lengths",
    "prompts",
    "dialects",
    "eventstream",
    "endings",
    "metrics",
    "stats",
    "tally",
    "checks",
    "summary",
    "detail",
    "prices",
    "slo",
    "journal",
    "server",
    "definitions",
    "foreign",
    "gate",
    "baseline",
    "comparison",
    "edge",
    "capacity",
    "capacity_answer",
    "gate_text",
    "markdown",
    "history",
    "planning",
    "planning_text",
]
FORBIDDEN = {"asyncio", "socket", "subprocess", "os", "aiohttp", "uvloop", "time", "signal", "threading", "httptools"}
FILES = (
    [HARNESS / f"{name}.py" for name in PURE]
    + sorted((HARNESS / "theory").glob("*.py"))
    + sorted((HARNESS / "report").glob("*.py"))
)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_pure_module_touches_nothing_outside(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & FORBIDDEN


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_pure_core_imports_no_shell(path: Path) -> None:
    shell = {p.stem for p in HARNESS.glob("*.py")} - set(PURE) - {"__init__"}
    ours = {name.removeprefix("harness.").split(".")[0] for name in imports(path) if name.startswith("harness.")}
    assert not ours & shell


def test_records_imports_nothing_of_ours() -> None:
    assert not any(name.startswith("harness") for name in imports(HARNESS / "records.py"))
