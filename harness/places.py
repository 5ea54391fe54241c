"""Where each key of a scenario stands, and what is wrong with it in a sentence."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any, get_args

from harness.yaml_lines import Lines, dotted

TAGS = ("(number)", "(distribution)")


@dataclass(frozen=True, slots=True)
class Places:
    """Where each key of a scenario stands.  No part of its value: two scenarios are equal wherever they were written."""

    where: str = field(default="scenario", compare=False)
    lines: Lines = field(default_factory=dict, compare=False)
    options: frozenset[tuple[Any, ...]] = field(default=frozenset(), compare=False)  # keys that an option has set

    def line_of(self, path: tuple[Any, ...]) -> str:
        """`FILE:LINE` of the innermost key of the path that the file has, or what else has set it."""
        if any(path[: len(key)] == key for key in self.options):
            return "the options"
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.where}:{self.lines[path]}" if path in self.lines else self.where


def explain(error: Any, places: Places, model: Any) -> str:
    """pydantic's error of a `model` -> `WHERE: key: what is wrong, what is allowed`."""
    path = tuple(step for step in error["loc"] if step not in TAGS)
    key, value = dotted(path), error.get("input")
    said = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        said = _unknown_key(path, model)
    elif error["type"] == "value_error":
        if isinstance(value, dict) and ": " in said:  # a rule over several keys names the one to mend
            name, _, said = said.partition(": ")
            path = (*path, *name.split("."))
            key = dotted(path)
    else:
        said = f"got {_short(value)}; {said[:1].lower()}{said[1:]}"
    return f"{places.line_of(path)}: {key}: {said}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _kinds(annotation: Any) -> list[Any]:
    """The types inside a union, an Annotated or a list; else the type itself."""
    inner = get_args(annotation)
    return [kind for part in inner for kind in _kinds(part)] if inner else [annotation]


def _unknown_key(path: tuple[Any, ...], part: Any) -> str:
    for step in path[:-1]:
        info = part.model_fields.get(step) if hasattr(part, "model_fields") else None
        part = info.annotation if info else None
        part = next((kind for kind in _kinds(part) if hasattr(kind, "model_fields")), None)
    allowed = sorted(f.alias or n for n, f in part.model_fields.items()) if hasattr(part, "model_fields") else []
    near = difflib.get_close_matches(str(path[-1]), allowed, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown key; {hint}known: {', '.join(allowed)}"
