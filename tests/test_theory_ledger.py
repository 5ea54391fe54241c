"""The ledger: every claim has its two values, a reason and a source, and the values are the known answers."""

from __future__ import annotations

import math

import pytest

from harness.theory.ledger import ARTICLES, VERDICTS, ledger

ROWS = ledger()


def row(beginning: str):
    exact = [r for r in ROWS if r.claim == beginning]
    found = exact or [r for r in ROWS if r.claim.startswith(beginning)]
    assert len(found) == 1, beginning
    return found[0]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.article}-{r.claim[:40]}")
def test_every_row_says_what_and_why_and_where_from(row):
    assert row.article in ARTICLES
    assert row.verdict in VERDICTS
    assert row.claim and row.why and row.source and row.unit
    assert math.isfinite(row.corrected)
    if row.verdict == "holds" and "closer" not in row.claim:
        assert row.corrected == pytest.approx(row.seed, rel=0.02)
    if row.verdict in ("corrected", "wrong") and not math.isnan(row.seed):
        assert row.corrected != pytest.approx(row.seed, rel=0.005)


def test_every_article_is_judged():
    assert {r.article for r in ROWS} == set(ARTICLES)
    assert len({(r.article, r.claim) for r in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("claim", "seed", "corrected"),
    [
        ("ops:byte of an A10", 208.3, 208.3),
        ("arithmetic intensity", 62.4, 1),
        ("peak FLOP/s of an H100 NVL", 1671e12, 835.5e12),
        ("peak FLOP/s of an H100 SXM", 1979e12, 989.4e12),
        ("critical batch of an H100 SXM", 591, 295),
        ("350 in and 150 out on T4", 6.98, 7.03),
        ("350 in and 150 out on A10", 3.49, 3.52),
        ("350 in and 150 out on A100", 0.92, 1.039),
        ("cost of that request on T4", 0.00122, 0.00124),
        ("cost of that request on A10", 0.00117, 0.00119),
        ("cost of that request on A100", 0.00157, 0.00178),
        ("a request on an A100 costs", 10, 1.44),
        ("tokens that fit beside it", 19_230, 19_073),
        ("KV cache of LLaMA-2-13B", 1e6, 819_200),
        ("the same for 4,000 tokens", 4e9, 3.3e9),
        ("parameters of Gemma 2B", 3e9, 2.506e9),
        ("step of a 30B int8 model", 18.3e-3, 20.9e-3),
    ],
)
def test_the_values_are_the_known_answers(claim, seed, corrected):
    found = row(claim)
    assert found.seed == pytest.approx(seed, rel=0.005)
    assert found.corrected == pytest.approx(corrected, rel=0.01)


def test_up_to_twice_as_long_holds_for_some_engines_only():
    found = row("reality takes")
    assert found.verdict == "depends"
    assert found.corrected == pytest.approx(2.0, abs=0.1), "the median is twice, so half of them take longer"
    assert "TensorRT-LLM 1.5" in found.why and "llama.cpp 5.1" in found.why


def test_five_times_from_caching_is_no_constant():
    found = row("1,000 tokens without")
    assert found.seed == 5
    assert found.corrected == pytest.approx(3.3, abs=0.1)


def test_int8_alone_halves_nothing():
    found = row("FP16 to INT8")
    assert found.corrected < 1, "the median pair got slower"
    assert "of 10 measured pairs 9 got slower" in found.why.replace("Of", "of")
    assert "2 more" in found.why, "pairs faster than physics are left out"
