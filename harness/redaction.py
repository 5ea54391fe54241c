"""Secrets of this process, and what is printed or kept without them."""

from __future__ import annotations

import logging
from typing import Any

from harness.endings import plain, redacted

_SECRETS: set[str] = set()
LEAST_CHARS = 6  # shorter ones are words like "none" or "EMPTY", and no secrets
PRINTED_CHARS = 100_000


def guard(secret: str) -> None:
    """From now on this text leaves the process only in requests."""
    if len(secret) >= LEAST_CHARS:
        _SECRETS.add(secret)


def guarded() -> tuple[str, ...]:
    return tuple(sorted(_SECRETS, key=len, reverse=True))


def clean(text: str, limit: int = PRINTED_CHARS) -> str:
    """Text for a terminal or a log: no guarded secret, no control character but tab and line feed."""
    return redacted(plain(text, limit=limit), *guarded())


def scrubbed(value: Any) -> Any:
    """Data for a file: every string in it (keys too) cleaned."""
    if isinstance(value, dict):
        return {clean(str(key)): scrubbed(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(inner) for inner in value]
    return clean(value) if isinstance(value, str) else value


class Formatter(logging.Formatter):
    """For log lines of libraries, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return clean(super().format(record))


def quiet_logs() -> None:
    """Whatever a library logs goes to stderr without secrets."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
