"""YAML text -> values, and the line of each key.  Safe types only; no aliases, no key twice, nothing nested without end."""

from __future__ import annotations

import re
from typing import Any

import yaml

from harness.records import RidgelineError

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
Lines = dict[tuple[Any, ...], int]  # path of a key, such as ("workload", "batch_sizes", 0) -> its line, from 1


class _Refused(yaml.MarkedYAMLError):
    """What is YAML, and not taken."""


class _SafeLoader(yaml.SafeLoader):
    """Refuses, where it stands, what a few lines of text can blow up."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for gigabytes
            raise self._refused("aliases (*name) are not allowed; write the value out")
        if self.depth > MAX_DEPTH:
            raise self._refused("nested too deeply")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _refused(self, why: str) -> _Refused:
        return _Refused(problem=why, problem_mark=self.peek_event().start_mark)  # type: ignore[no-untyped-call]


def read(text: str, where: str) -> tuple[dict[str, Any], Lines]:
    """(values, lines).  Raises RidgelineError (code 2): `where:line: key: what is wrong`."""
    if len(text) > MAX_BYTES:
        raise RidgelineError(f"{where}:1: (top): {len(text):,} characters; a scenario has at most {MAX_BYTES:,}")
    node = None
    try:
        node = yaml.compose(text, Loader=_SafeLoader)
        if node is None:
            raise RidgelineError(
                f"{where}:1: (top): the file is empty; `ridgeline config init` writes one to start from"
            )
        lines = _lines(node, where)
        values = yaml.SafeLoader("").construct_document(node)
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None) or getattr(problem, "context_mark", None)
        line = mark.line + 1 if mark else 1
        said = getattr(problem, "problem", None) or str(problem).split("\n")[0]
        kind = "" if isinstance(problem, _Refused) else "not valid YAML: "
        raise RidgelineError(f"{where}:{line}: {_key_near(text, line)}: {kind}{said}") from None
    except RecursionError:
        raise RidgelineError(f"{where}:1: (top): not valid YAML: nested too deeply") from None
    except (ValueError, OverflowError) as problem:  # an impossible date, a number of a thousand digits
        line, key = _unreadable(node)
        raise RidgelineError(f"{where}:{line}: {key}: cannot be read: {str(problem)[:200]}") from None
    if not isinstance(values, dict):
        raise RidgelineError(f"{where}:1: (top): expected keys and values at the top, got {type(values).__name__}")
    return values, lines


_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # as YAML counts lines
_KEY = re.compile(r"^[\s?{,-]*([^\s:#{\[,'\"][^:#{\[,'\"]*?)\s*:(?=\s|$)")


def _key_near(text: str, line: int) -> str:
    """The last key that stands at this line (from 1) or above it."""
    for above in reversed(_BREAK.split(text)[:line]):
        if found := _KEY.match(above):
            return found[1][:80]
    return "(top)"


def _unreadable(node: Any, path: tuple[Any, ...] = ()) -> tuple[int, str]:
    """(line, key) of the first value that YAML's own types cannot hold."""
    pairs = [((*path, getattr(key, "value", "?")), value) for key, value in node.value] if isinstance(
        node, yaml.MappingNode) else [((*path, i), value) for i, value in enumerate(node.value)] if isinstance(
        node, yaml.SequenceNode) else []  # fmt: skip
    for at, value in pairs:
        try:
            yaml.SafeLoader("").construct_object(value, deep=True)
        except (ValueError, OverflowError):
            return _unreadable(value, at)
        except yaml.YAMLError:
            continue
    return node.start_mark.line + 1, dotted(path)


def _lines(node: Any, where: str, path: tuple[Any, ...] = ()) -> Lines:
    """The line of each key.  A key that stands twice is an error: YAML would silently take the last."""
    found = {path: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            at = (*path, getattr(key, "value", None) if isinstance(key, yaml.ScalarNode) else None)
            if at in found:
                raise RidgelineError(f"{where}:{key.start_mark.line + 1}: {dotted(at)}: stands twice")
            found |= _lines(value, where, at)
            found[at] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            found |= _lines(value, where, (*path, i))
    return found


def dotted(path: tuple[Any, ...]) -> str:
    """("workload", "batch_sizes", 0) -> "workload.batch_sizes[0]"."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f"{'.' if text else ''}{step}"
    return text or "(top)"
