"""The only place where a number becomes text, and text a number: 0.0123 s is "12.3 ms", "32k" is 32000.

Values are SI (seconds, bytes, per second, fractions of one).  Texts carry at most four significant digits, except that
whole units are never rounded away (12345 is "12,345").  A missing value (None, NaN, infinite) is "not measured".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from harness.records import RidgelineError

MISSING = "not measured"

_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_SIZES = ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_FLOPS = ((1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s"), (1.0, "FLOP/s"))
_AMOUNTS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def is_missing(value: float | None) -> bool:
    """True for None, NaN and the infinities: nothing that may be printed as a figure."""
    return value is None or not math.isfinite(value)


def usd(value: float | None, digits: int = 3, missing: str = MISSING) -> str:
    """US dollars: usd(0.064) is "$0.0640", usd(1.4) "$1.40", usd(2153.5) "$2,154"."""
    if value is None or not math.isfinite(value):
        return missing
    if value < 1e-3 or value >= 1000:
        return f"${number(value, digits)}"
    return f"${value:#.{digits}g}".rstrip(".")


def number(value: float | None, digits: int = 4) -> str:
    """A bare number: number(12.3456) is "12.35", number(12345.6) is "12,346"."""
    if value is None or not math.isfinite(value):
        return MISSING
    rounded = float(f"{value:.{digits}g}")
    if abs(rounded) >= 1000:
        # 1234.5 with three digits is 1,234, not 1,230: a reader takes a trailing zero for a digit.
        return f"{value:,.0f}"
    if rounded == 0:
        return "0"
    if abs(rounded) < 1e-4:
        return f"{rounded:.{digits}g}"
    # Not "g": it writes 100 with two digits as 1e+02.
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    text = f"{rounded:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def count(value: float | None) -> str:
    """A whole number of things, exact: count(12345) is "12,345"."""
    return MISSING if value is None or not math.isfinite(value) else f"{round(value):,}"


def _scaled(value: float | None, table: tuple[tuple[float, str], ...], digits: int, suffix: str = "") -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    # Rounded before the unit is chosen, or 0.99999 s would print as "1,000 ms".
    rounded = float(f"{value:.{digits}g}")
    zero = next(unit for factor, unit in table if factor == 1.0)
    factor, unit = next(((f, u) for f, u in table if abs(rounded) >= f), table[-1]) if rounded else (1.0, zero)
    return f"{number(value / factor, digits)} {unit}{suffix}".rstrip()


def seconds(value: float | None, digits: int = 4) -> str:
    """A time: seconds(0.0123) is "12.3 ms"; from two minutes on "2 min 5 s", from two hours on "2 h 5 min"."""
    if value is None or not math.isfinite(value) or abs(value) < 120:
        return _scaled(value, _TIMES, digits)
    whole = round(abs(value))
    sign = "-" if value < 0 else ""
    if whole < 7200:
        return f"{sign}{whole // 60} min {whole % 60} s"
    minutes = round(whole / 60)
    return f"{sign}{minutes // 60:,} h {minutes % 60} min"


def size(value: float | None, digits: int = 4) -> str:
    """Bytes, in powers of ten: size(1.2e9) is "1.2 GB"."""
    return _scaled(value, _SIZES, digits)


def bandwidth(value: float | None, digits: int = 4) -> str:
    """Bytes per second: bandwidth(3.2e11) is "320 GB/s"."""
    return _scaled(value, _SIZES, digits, "" if is_missing(value) else "/s")


def flops(value: float | None, digits: int = 4) -> str:
    """FLOP per second: flops(3.12e14) is "312 TFLOP/s"."""
    return _scaled(value, _FLOPS, digits)


def amount(value: float | None, digits: int = 4) -> str:
    """A large pure number, such as parameters: amount(134.5e6) is "134.5 M"."""
    return _scaled(value, _AMOUNTS, digits)


def rate(value: float | None, things: str = "", digits: int = 4) -> str:
    """Things per second: rate(94.31, "tokens") is "94.31 tokens/s"."""
    return MISSING if is_missing(value) else f"{number(value, digits)} {things}/s"


def percent(value: float | None, digits: int = 4) -> str:
    """A fraction of one: percent(0.123) is "12.3 %"."""
    return MISSING if value is None or not math.isfinite(value) else f"{number(100 * value, digits)} %"


def ratio(value: float | None, digits: int = 3) -> str:
    """A quotient of like things: ratio(1.2) is "1.2×"."""
    return MISSING if is_missing(value) else f"{number(value, digits)}×"


def interval(low: float | None, high: float | None, show: Callable[[float | None], str] = number) -> str:
    """An interval, "12 ms – 14 ms"; empty where either end is missing."""
    return "" if is_missing(low) or is_missing(high) else f"{show(low)} – {show(high)}"


def time_scale(largest_s: float) -> tuple[float, str]:
    """(factor, unit) for an axis whose largest value is given: values in seconds times factor are in that unit."""
    if is_missing(largest_s) or largest_s >= 1 or largest_s <= 0:
        return 1.0, "s"
    return (1e3, "ms") if largest_s >= 1e-3 else (1e6, "µs")


_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "Ki": 2.0**10, "Mi": 2.0**20}
_BYTES = {"": 1.0, "B": 1.0} | {
    prefix + tail: factor
    for prefix, factor in {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.items()
    for tail in ("", "B")
}
_BINARY = {f"{prefix}i{tail}": 2.0 ** (10 * k) for k, prefix in enumerate("KMGT", start=1) for tail in ("", "B")}

# What a bare number and each suffix are worth, in SI, for each kind of quantity.
KINDS: dict[str, Mapping[str, float]] = {
    "count": _PREFIXES,
    # "m" is a minute, as in vegeta, k6 and Go; a millisecond is always "ms".
    "time": {
        "": 1.0,
        "s": 1.0,
        "ms": 1e-3,
        "us": 1e-6,
        "µs": 1e-6,
        "ns": 1e-9,
        "m": 60,
        "min": 60,
        "h": 3600,
        "d": 86400,
    },
    "bytes": _BYTES | _BINARY,
    "fraction": {"": 1.0, "%": 0.01},
    "rate": {"": 1.0, "/s": 1.0, "/min": 1 / 60, "/m": 1 / 60, "/h": 1 / 3600},
}
_QUANTITY = re.compile(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([^\d\s.]*)\s*")


def parse(text: str, kind: str, where: str = "") -> float:
    """The SI value of a text: parse("32k", "count") is 32000.0, parse("1.5ms", "time") 0.0015, parse("2%", "fraction")
    0.02.  `kind` is a key of KINDS; `where` (an option or a key) opens the message.

    Raises RidgelineError for anything else, negative and non-finite numbers included.
    """
    units = KINDS[kind]
    match = _QUANTITY.fullmatch(text)
    if match and match[2] in units:
        value = float(match[1]) * units[match[2]]
        if math.isfinite(value):
            return value
    place = f"{where}: " if where else ""
    known = ", ".join(unit for unit in units if unit)
    raise RidgelineError(f"{place}got {text!r}, expected a {kind}: a number, with or without one of {known}")
