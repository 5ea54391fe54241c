"""Numbers to text and back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import units
from harness.records import RidgelineError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123, "12.3 ms"),
        (0.99999, "1 s"),  # not "1,000 ms": rounded before the unit is chosen
        (0.000999999, "1 ms"),
        (0.00000012, "120 ns"),
        (1e-12, "0.001 ns"),
        (0.0, "0 s"),
        (-0.002, "-2 ms"),
        (59.994, "59.99 s"),
        (125.4, "2 min 5 s"),
        (7500.0, "2 h 5 min"),
        (None, "not measured"),
        (math.nan, "not measured"),
        (math.inf, "not measured"),
    ],
)
def test_seconds_take_the_unit_a_person_would(value: float | None, text: str) -> None:
    assert units.seconds(value) == text


@pytest.mark.parametrize(
    ("got", "text"),
    [
        (units.number(12345.6), "12,346"),
        (units.number(999.96), "1,000"),
        (units.number(100.0, 2), "100"),  # not 1e+02
        (units.number(1234.5, 3), "1,234"),
        (units.number(0.1), "0.1"),
        (units.number(-0.0), "0"),
        (units.number(0.0000123456), "1.235e-05"),
        (units.count(12345), "12,345"),
        (units.count(None), "not measured"),
        (units.size(1.2e9), "1.2 GB"),
        (units.size(12), "12 B"),
        (units.size(0), "0 B"),
        (units.size(999_999), "1 MB"),
        (units.bandwidth(3.2e11), "320 GB/s"),
        (units.bandwidth(None), "not measured"),
        (units.flops(3.12e14), "312 TFLOP/s"),
        (units.amount(134.5e6), "134.5 M"),
        (units.amount(7), "7"),
        (units.rate(94.312, "tokens"), "94.31 tokens/s"),
        (units.rate(math.nan, "tokens"), "not measured"),
        (units.percent(0.123), "12.3 %"),
        (units.percent(1), "100 %"),
        (units.ratio(1.2345), "1.23×"),
        (units.interval(0.01, 0.02, units.seconds), "10 ms – 20 ms"),
        (units.interval(0.01, math.nan, units.seconds), ""),
        (units.time_scale(0.2), (1e3, "ms")),
        (units.time_scale(2.0), (1.0, "s")),
        (units.time_scale(math.nan), (1.0, "s")),
    ],
)
def test_each_kind_of_number_has_one_text(got: object, text: object) -> None:
    assert got == text


@given(st.floats(min_value=1e-9, max_value=119))
def test_a_printed_time_reads_back_within_four_digits(value: float) -> None:
    assert units.parse(units.seconds(value), "time") == pytest.approx(value, rel=5.1e-4)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("32k", "count", 32_000),
        ("32Ki", "count", 32_768),
        ("7B", "count", 7e9),
        ("1.5ms", "time", 0.0015),
        ("2 min", "time", 120),
        ("5m", "time", 300),
        ("3", "time", 3),
        ("1e-3s", "time", 0.001),
        ("2%", "fraction", 0.02),
        ("0.5", "fraction", 0.5),
        ("16GiB", "bytes", 17_179_869_184),
        ("1.2 GB", "bytes", 1.2e9),
        ("60/min", "rate", 1),
    ],
)
def test_a_text_becomes_its_si_value(text: str, kind: str, value: float) -> None:
    assert units.parse(text, kind) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", ["", "fast", "-1s", "nan", "inf", "1,5s", "1.2.3", "1e999", "5 parsecs", "1 0"])
def test_anything_else_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(RidgelineError, match=r"^--duration: got .*expected a time.*ms") as caught:
        units.parse(text, "time", "--duration")
    assert caught.value.code == 2
