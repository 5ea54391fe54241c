"""The model's configuration from the disk: a folder, a config.json or a GGUF file -> Model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from harness.records import RidgelineError
from harness.theory import architecture, gguf

MAX_CONFIG_BYTES = 10 * 2**20


def load(path: str | Path, name: str = "") -> architecture.Model:
    """The Model of a folder with config.json (or one .gguf file), of a config.json, or of a .gguf file.

    `name` is what reports call it; without one it is the folder's or file's name.  Raises RidgelineError where nothing
    can be read or the architecture is not covered.
    """
    path = Path(path)
    try:
        found = _file(path)
        name = name or (found.stem if found.suffix == ".gguf" else found.absolute().parent.name)
        return _gguf(found, name) if found.suffix == ".gguf" else _config(found, name)
    except OSError as error:
        raise RidgelineError(f"model configuration {path}: {error.strerror or error}; give a readable file") from error


def _file(path: Path) -> Path:
    if not path.is_dir():
        if path.suffix not in (".json", ".gguf"):
            raise RidgelineError(
                f"model configuration {path}: give a folder, a config.json or a .gguf file that exists"
            )
        return path
    if (path / "config.json").exists():
        return path / "config.json"
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} .gguf files, name one" if files else "neither config.json nor a .gguf file in it"
    raise RidgelineError(f"model configuration {path}: {found}")


def _config(path: Path, name: str) -> architecture.Model:
    with path.open("rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise RidgelineError(f"model configuration {path}: larger than {MAX_CONFIG_BYTES} bytes, so no config.json")
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RidgelineError(f"model configuration {path}: not JSON ({str(error)[:100]})") from error
    if not isinstance(config, dict):
        raise RidgelineError(f"model configuration {path}: expected a JSON object, as Hugging Face's config.json is")
    return architecture.from_config(config, name)


def _gguf(path: Path, name: str) -> architecture.Model:
    with path.open("rb") as file:
        metadata, tensors = gguf.read(file)
    return replace(architecture.from_gguf(metadata, tensors, name), name=name)
