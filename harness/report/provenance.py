"""What was run and how to run it again, without secrets: a report is sent to others."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from harness import units
from harness.report import decision, view
from harness.report.view import RunView


def section(runs: Sequence[RunView]) -> list[dict[str, Any]]:
    return [_repeat(run, name) for run, name in zip(runs, view.labels(runs), strict=True)]


def _repeat(run: RunView, name: str) -> dict[str, Any]:
    command = run.run.get("command")
    words = redacted([str(word) for word in command]) if isinstance(command, list) else []
    scenario = redacted(view.child(run.run, "scenario"))
    facts = [
        ("Ridgeline", view.text(run.run, "ridgeline")),
        ("Started", view.text(run.run, "started_at")),
        ("State", view.text(run.summary, "state")),
        ("Seed", view.text(run.run, "seed")),
        ("Python", view.text(run.run, "python")),
        ("Objective", view.text(run.summary, "worth", "slo")),
        ("Price", _price(run)),
    ]
    groups = [
        (title, flat(redacted(view.child(data, key))))
        for title, data, key in (
            ("Imported", run.run, "imported"),
            ("Engine", run.run, "engine"),
            ("Machine", run.run, "machine"),
            ("Hardware row", run.summary, "hardware"),
            ("Model", run.summary, "architecture"),
            ("Versions", run.run, "versions"),
        )
    ]
    return {
        "name": name,
        "command": shlex.join(view.shorten(word) for word in words),
        "facts": [(key, value) for key, value in facts if value],
        "groups": [(title, rows) for title, rows in groups if rows],
        "scenario": view.shorten(_pretty(scenario), 20_000) if scenario else "",
        "log": _tail(run.engine_log_tail),
    }


def _price(run: RunView) -> str:
    """What an hour was taken to cost, and where that is from."""
    price, many, source = decision.price(run)
    return f"{units.usd(price)} an hour for each of {many} ({source})" if math.isfinite(price) else ""


def _pretty(value: Any, indent: str = "") -> str:
    """JSON for people: lists of plain values on one line."""
    if isinstance(value, Mapping) and value:
        inner = ",\n".join(
            f"{indent}  {json.dumps(k, ensure_ascii=False)}: {_pretty(v, indent + '  ')}" for k, v in value.items()
        )
        return f"{{\n{inner}\n{indent}}}"
    return json.dumps(value, ensure_ascii=False)


def _tail(log: str, longest: int = 12_000) -> str:
    clean = "\n".join(view.shorten(line, 500) for line in log.splitlines()[-120:])
    return clean if len(clean) <= longest else "…" + clean[-longest:]


_SECRET = ("api_key", "apikey", "authorization", "password", "secret", "token", "credential")


def _is_secret(name: str) -> bool:
    """Whether a key names a secret: "hf_token" and "--api-key" do, "input_tokens" and "api_key_env" do not."""
    low = name.lower().lstrip("-").replace("-", "_")
    return any(low == word or low.endswith("_" + word) for word in _SECRET) and not low.endswith("per_token")


def _clean_url(value: str) -> str:
    """A URL without user, password and query; any other text as it is."""
    if "://" not in value:
        return value
    try:
        parts = urlsplit(value)
    except ValueError:
        return value
    if not (parts.username or parts.password or parts.query):
        return value
    return urlunsplit(
        (parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "[removed]" if parts.query else "", "")
    )


def redacted(value: Any, key: str = "") -> Any:
    """The same data without secrets: a report is sent to others."""
    if _is_secret(key) and not isinstance(value, int | float | None):
        return "[removed]"
    if isinstance(value, Mapping):
        return {str(k): redacted(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return _redacted_words(list(value))
    return view.shorten(_clean_url(value)) if isinstance(value, str) else value


def _redacted_words(words: list[Any]) -> list[Any]:
    """A list, perhaps a command line: the word after --api-key goes, and so does the value of --api-key=VALUE."""
    clean: list[Any] = []
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        flag, _, given = word.partition("=") if isinstance(word, str) else ("", "", "")
        if isinstance(before, str) and before.startswith("-") and _is_secret(before) and "=" not in before:
            clean.append("[removed]")
        elif given and _is_secret(flag):
            clean.append(f"{flag}=[removed]")
        else:
            clean.append(redacted(word))
    return clean


def flat(data: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested data as rows of (dotted key, text), at most 200."""
    rows: list[tuple[str, str]] = []
    for key, value in data.items() if isinstance(data, Mapping) else ():
        name = f"{prefix}{view.shorten(str(key), 80)}"
        if isinstance(value, Mapping):
            rows += flat(value, name + ".")
        elif value is not None and value != "" and value != []:
            rows.append((name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows[:200]
