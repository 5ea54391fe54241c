"""What an accelerator costs, as text and in US dollars."""

from __future__ import annotations

import math
import re

from harness.records import RidgelineError

_PRICE = re.compile(r"\s*\$?\s*((?:\d+\.?\d*|\.\d+))\s*(?:\$|USD|usd)?\s*(?:/\s*(h|hr|hour|min|s))?\s*")
_HOUR = {"": 1.0, "h": 1.0, "hr": 1.0, "hour": 1.0, "min": 60.0, "s": 3600.0}


def usd_per_h(text: str, where: str = "--price") -> float:
    """US dollars an hour: "1.2/h", "$1.2/h", "0.02/min", or a bare number (an hour).  Raises RidgelineError."""
    match = _PRICE.fullmatch(text)
    value = float(match[1]) * _HOUR[match[2] or ""] if match else math.nan
    if not (math.isfinite(value) and value > 0):
        raise RidgelineError(
            f"{where}: got {text!r}, expected US dollars for an hour of one accelerator, such as 1.2/h"
        )
    return value


def per_million(usd_per_h: float, accelerators: int, tokens_per_s: float) -> float:
    """US dollars for a million tokens at this rate of all accelerators together, all of them busy; NaN without a rate."""
    return usd_per_h * accelerators / 3600 / tokens_per_s * 1e6 if tokens_per_s > 0 else math.nan
