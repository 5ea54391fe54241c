"""The pipelines that are shipped, step by step in a repository of their own, as far as that goes without their services."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

CI = ROOT / "scenarios" / "ci"
SCENARIO = """
name: ci-gate
engine: {{url: "{0}"}}
workload: {{mode: closed, batch_sizes: [1, 4], input_tokens: 24, output_tokens: 8, requests: 8, trials: 4}}
"""


def steps_of(name: str) -> list[dict[str, Any]]:
    """[{run, if}] of a pipeline; the steps that install from a registry are left out."""
    read = yaml.safe_load((CI / name).read_text())
    if name == "gitlab-ci.yml":
        job = read["serving"]
        after = [{"run": line.replace(".ridgeline-venv/bin/", ""), "if": "always()"} for line in job["after_script"]]
        return [{"run": line} for line in job["script"]] + after
    return [step for step in read["jobs"]["gate"]["steps"] if "run" in step and step["name"] != "Install"]


def git(repository: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.invalid", *arguments], cwd=repository, check=True,
                   capture_output=True)  # fmt: skip


def play(steps: Sequence[dict[str, Any]], repository: Path, event: str) -> list[tuple[str, int]]:
    """Each step that is due in a shell that stops at the first failure, as both services run them."""
    tool = repository / ".bin"
    tool.mkdir(exist_ok=True)
    (tool / "ridgeline").write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m harness "$@"\n')
    (tool / "ridgeline").chmod(0o755)
    env = os.environ | {"PATH": f"{tool}:{os.environ['PATH']}", "SCENARIO": "ci-gate.yaml", "GITHUB_ACTIONS": "true",
                        "GITHUB_STEP_SUMMARY": str(repository / "step.md"), "CI_DEFAULT_BRANCH": "main",
                        "CI_COMMIT_TITLE": "a change", "REASON": "first"}  # fmt: skip
    done: list[tuple[str, int]] = []
    for step in steps:
        when = step.get("if", "success()")
        due = f"== '{event}'" in when or ("!= '" in when and f"!= '{event}'" not in when)
        if when == "always()" or (all(code == 0 for _, code in done) and (when == "success()" or due)):
            said = subprocess.run(["bash", "-eo", "pipefail", "-c", step["run"]], cwd=repository, env=env, capture_output=True,
                                  text=True, timeout=120, check=False)  # fmt: skip
            assert "Traceback" not in said.stderr and "Usage:" not in said.stderr, said.stderr
            done.append((step["run"], said.returncode))
    return done


@pytest.mark.full
@pytest.mark.parametrize("name", ["github-actions.yml", "gitlab-ci.yml"])
def test_a_pipeline_makes_its_baseline_passes_and_fails_a_slower_server(
    name: str, simulated: Callable[..., str], tmp_path: Path
) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    git(origin, "init", "-q", "-b", "main")
    (origin / "ci-gate.yaml").write_text(SCENARIO.format(simulated("--itl-base", "3ms")))
    git(origin, "add", ".")
    git(origin, "commit", "-qm", "first")
    git(tmp_path, "clone", "-q", "origin", "first")
    first = play(steps_of(name), tmp_path / "first", "workflow_dispatch")
    assert [code for run, code in first if "compare" in run] == ([7] if "gitlab" in name else [])
    baselines = origin / ".ridgeline" / "baselines"
    baselines.mkdir(parents=True)
    [made] = (tmp_path / "first/out/baselines").glob("*.json")
    (baselines / made.name).write_text(made.read_text())
    git(origin, "add", ".")
    git(origin, "commit", "-qm", "baseline")
    for branch, itl, code in (("same", "3ms", 0), ("slower", "6ms", 3)):
        git(tmp_path, "clone", "-q", "origin", branch)
        (tmp_path / branch / "ci-gate.yaml").write_text(SCENARIO.format(simulated("--itl-base", itl)))
        done = play(steps_of(name), tmp_path / branch, "pull_request")
        assert [found for run, found in done if "compare" in run] == [code], done
        [suite] = xml.parse(tmp_path / branch / "out/junit.xml").getroot()
        assert (int(suite.get("failures", 0)) > 0) == (code == 3)
        assert (tmp_path / branch / "out/summary.md").read_text().startswith("### FAIL" if code else "### ")
        assert (tmp_path / branch / "out/run/report.html").exists()
        if "github" in name:
            assert (tmp_path / branch / "step.md").read_text().startswith("### ")


@pytest.mark.parametrize("name", ["github-actions.yml", "gitlab-ci.yml"])
def test_a_pipeline_keeps_to_the_rules_of_a_shared_gpu(name: str) -> None:
    text = (CI / name).read_text()
    read = yaml.safe_load(text)
    if name == "gitlab-ci.yml":
        job = read["serving"]
        assert job["resource_group"] and job["artifacts"]["when"] == "always" and job["artifacts"]["reports"]["junit"]
        assert "SOURCE_PROJECT_PATH == $CI_PROJECT_PATH" in job["rules"][0]["if"]
    else:
        job = read["jobs"]["gate"]
        assert read["concurrency"]["group"] and read["concurrency"]["cancel-in-progress"] is False
        assert read["permissions"] == {"contents": "read"} and "head.repo.full_name == github.repository" in job["if"]
        # What a stranger may write never stands in a script itself.
        assert not any("${{" in step["run"] for step in job["steps"] if "run" in step)
    assert text.count("ridgeline doctor") == 2
