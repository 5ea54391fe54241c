"""A configuration read key by key; each miss names the key and the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.records import RidgelineError

MOST = 100_000_000  # no width, length or vocabulary is larger


class Config:
    """The values of a config.json or of a GGUF header, by key."""

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self.values, self.name = values, name
        family = values.get("model_type")
        self.family = family if isinstance(family, str) else ""

    def error(self, message: str) -> RidgelineError:
        return RidgelineError(f"model configuration {self.name}: {message}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def count(self, *keys: str, default: int | None = None) -> int:
        """The first of these keys that is set: a whole number from 1 to MOST."""
        for key in keys:
            if (value := self.values.get(key)) is not None:
                if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
                    raise self.error(f"{key} must be a whole number from 1 to {MOST}, got {value!r}")
                return value
        if default is None:
            raise self.error(f"{keys[0]} is missing")
        return default

    def size(self, *keys: str, default: int = 0) -> int:
        """As `count`, but 0 is a value too: of layers, shared experts or a window there may be none."""
        found = next((self.values[key] for key in keys if self.values.get(key) is not None), default)
        return 0 if found == 0 and not isinstance(found, bool) else self.count(*keys, default=default)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        return default if value is None else bool(value)
