"""Service-level objectives as text: `ttft_p95=500ms,itl_p50@b8=30ms,output_tokens_per_s=100`."""

from __future__ import annotations

from dataclasses import dataclass

from harness import baseline, units
from harness.records import RidgelineError


@dataclass(frozen=True, slots=True)
class Limit:
    """A service-level objective: the metric (one of baseline.NAMES), its bound in SI units, and the point (None: all)."""

    metric: str
    bound: float
    point: str | None = None


def parse(text: str | None, flag: str = "--slo") -> tuple[Limit, ...]:
    """`ttft_p95=500ms,itl_p50@b8=30ms,output_tokens_per_s=100`; nothing of nothing.  Raises RidgelineError."""
    found = []
    for part in parts(text):
        left, value = pair(part, flag, "ttft_p95=500ms")
        name, _, point = left.partition("@")
        kind = "rate" if baseline.higher_is_better(baseline.known(name, flag)) else "time"
        bound = units.parse(value, kind, f"{flag} {name}")
        if not bound > 0:
            raise RidgelineError(f"{flag} {name}: got {value}, expected more than 0")
        found.append(Limit(name, bound, point or None))
    return tuple(found)


def upper(text: str | None, flag: str = "--slo") -> tuple[Limit, ...]:
    """Bounds that a higher load breaks: on times, for all points.  Raises RidgelineError for others, and for none."""
    found = parse(text, flag)
    if not found:
        raise RidgelineError(f"{flag}: names no objective; give one such as ttft_p95=500ms,itl_p95=50ms")
    for limit in found:
        if baseline.higher_is_better(limit.metric):
            raise RidgelineError(
                f"{flag}: {limit.metric} rises with the load; a search needs bounds on times, such as itl_p95=50ms"
            )
        if limit.point:
            raise RidgelineError(
                f"{flag}: {limit.metric}@{limit.point}: a search has no points yet; leave @{limit.point} out"
            )
    return found


def parts(text: str | None) -> list[str]:
    """What stands between the commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def pair(part: str, flag: str, example: str) -> tuple[str, str]:
    """`NAME=VALUE` in two.  Raises RidgelineError."""
    name, equals, value = part.partition("=")
    if not equals or not value.strip():
        raise RidgelineError(f"{flag}: got {part!r}, expected NAME=VALUE such as {example}")
    return name.strip(), value.strip()
