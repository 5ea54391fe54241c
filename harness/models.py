"""What a name or a path stands for: a model's configuration or a row of hardware, from the disk or from the catalogues."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.records import RidgelineError
from harness.theory import architecture, catalogue, gguf
from harness.theory.hardware import Hardware, find, from_yaml

MAX_CONFIG_BYTES = 10 * 2**20


def load(path: str | Path, name: str = "") -> architecture.Model:
    """The Model of a folder with config.json (or one .gguf file), of a config.json, of a .gguf file, or of this name.

    What is no path on the disk is looked up in the catalogue.  `name` is what reports call it; without one it is the
    folder's or file's name.  Raises RidgelineError where nothing can be read or the architecture is not covered.
    """
    asked, path = str(path), Path(path)
    try:
        if path.suffix not in (".json", ".gguf") and not path.exists():
            return replace(model := catalogue.find(asked), name=name or model.name)
        found = _file(path)
        name = name or (found.stem if found.suffix == ".gguf" else found.absolute().parent.name)
        return _gguf(found, name) if found.suffix == ".gguf" else _config(found, name)
    except OSError as error:
        raise RidgelineError(f"model configuration {path}: {error.strerror or error}; give a readable file") from error


def config_of(path: str | Path) -> dict[str, Any]:
    """The configuration that `load` reads, as a config.json would have it.  Raises RidgelineError, also for a GGUF file."""
    asked, path = str(path), Path(path)
    if path.suffix not in (".json", ".gguf") and not path.exists():
        return catalogue.config_of(asked)
    found = _file(path)
    if found.suffix == ".gguf":
        raise RidgelineError(f"model {asked}: a GGUF file has no config.json")
    return _json(found)


def hardware(name: str) -> list[Hardware]:
    """The row of this name, or the rows of a .yaml file (JSON is YAML too).

    Raises RidgelineError for an unknown name, an unreadable file or a wrong row.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        return [find(name)]
    try:
        return from_yaml(path.read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError) as error:
        raise RidgelineError(f"hardware file {name}: {getattr(error, 'strerror', None) or error}") from error


def hardware_row(name: str) -> Hardware:
    """The one row of this name or file, which a run is held against.  Raises RidgelineError as `hardware` does."""
    rows = hardware(name)
    if len(rows) != 1:
        raise RidgelineError(f"hardware file {name}: it has {len(rows)} rows, and one is needed here")
    return rows[0]


def _file(path: Path) -> Path:
    if not path.is_dir():
        if path.suffix not in (".json", ".gguf"):
            raise RidgelineError(f"model configuration {path}: give a folder, a config.json or a .gguf file")
        return path
    if (path / "config.json").exists():
        return path / "config.json"
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} .gguf files, name one" if files else "neither config.json nor a .gguf file in it"
    raise RidgelineError(f"model configuration {path}: {found}")


def _config(path: Path, name: str) -> architecture.Model:
    config = _json(path)
    beside = path.with_name("hf_quant_config.json")  # where NVIDIA's ModelOpt says how it quantized the weights
    if "quantization_config" not in config and beside.exists():
        stated = _json(beside).get("quantization")
        if isinstance(stated, dict):
            config["quantization_config"] = {"quant_method": "modelopt", **stated}
    return architecture.from_config(config, name)


def _json(path: Path) -> dict[str, Any]:
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
    return config


def _gguf(path: Path, name: str) -> architecture.Model:
    with path.open("rb") as file:
        metadata, tensors = gguf.read(file)
    return replace(architecture.from_gguf(metadata, tensors, name), name=name)
