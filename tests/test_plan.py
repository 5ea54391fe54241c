"""Arrivals, prompts and plans: what will be sent, and when."""

from __future__ import annotations

import asyncio
import itertools
from typing import get_args

import numpy as np
import pytest

from harness import plan as planning
from harness import prompts, scenario, sweep, tokens
from harness.arrivals import Pattern, offsets_s
from harness.lengths import Asks
from harness.records import Request, RidgelineError


@pytest.mark.parametrize("name", get_args(Pattern))
@pytest.mark.parametrize(("rate", "burstiness"), [(5.0, 1.0), (200.0, 0.5), (20.0, 4.0)])
def test_arrivals_keep_their_name(name: Pattern, rate: float, burstiness: float) -> None:
    due = offsets_s(name, np.random.default_rng(3), rate, 40_000, burstiness)
    gaps = np.diff(due)
    assert np.all(gaps >= 0)
    assert len(due) / due[-1] == pytest.approx(rate, rel=0.02)
    expected = {"constant": 0.0, "poisson": 1.0, "gamma": 1 / np.sqrt(burstiness)}[name]
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(expected, rel=0.05, abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("name", "burstiness", "cv"), [("poisson", 1.0, 1.0), ("gamma", 0.25, 2.0), ("gamma", 4.0, 0.5)]
)
def test_a_short_run_keeps_the_name_too_and_its_gaps_come_in_no_order(
    name: Pattern, burstiness: float, cv: float, seed: int
) -> None:
    """400 independent gaps would miss the rate by 5 % and more; an order would show as correlation of neighbours."""
    gaps = np.diff(offsets_s(name, np.random.default_rng(seed), 50.0, 400, burstiness), prepend=0.0)
    assert np.mean(gaps) == pytest.approx(1 / 50, rel=1e-9)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(cv, rel=0.05)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 4 / 400**0.5


def test_all_of_many_arrivals_are_drawn_within_bounds() -> None:
    due_s = offsets_s("gamma", np.random.default_rng(0), 1.0, 3_000_000, 0.5)
    assert len(due_s) == 3_000_000 and due_s[-1] == pytest.approx(3e6)
    assert offsets_s("poisson", np.random.default_rng(0), 2.0, 1, 1.0) == pytest.approx([0.5])


async def by_words(text: str) -> int:
    """A tokenizer of 4 characters a token, words apart, and one BOS: awkward enough that lengths must be searched."""
    return 1 + sum(-(-len(word) // 4) for word in text.split())


@pytest.mark.parametrize("wanted", [40, 64, 350, 1000, 4096])
def test_a_prompt_has_exactly_the_tokens_asked_for(wanted: int) -> None:
    before = prompts.OPENING + prompts.head(7)
    text = asyncio.run(prompts.fit(by_words, before, 11, wanted, prompts.Pace()))
    assert asyncio.run(by_words(text)) == wanted
    assert text.startswith(prompts.OPENING) and text.endswith(prompts.CLOSING)


def test_a_prompt_shorter_than_its_template_is_refused_with_the_number() -> None:
    with pytest.raises(RidgelineError, match="template alone has"):
        asyncio.run(prompts.fit(by_words, prompts.OPENING, 0, 5, prompts.Pace()))


def test_heads_are_all_different() -> None:
    assert len({prompts.head(i) for i in range(5000)}) == 5000


def of_length(n: int, length: int) -> Asks:
    return Asks(np.full(n, length), np.ones(n, int), np.full(n, -1), alike=True)


@pytest.mark.parametrize("source", ["tokenizer", "usage"])
@pytest.mark.parametrize("template", [0, 23])
def test_prompts_have_the_servers_count_whatever_its_template_adds(source: str, template: int) -> None:
    async def ask(text: str, n: int) -> int:
        return await by_words(text) + template

    built = asyncio.run(tokens.build(tokens.Counter(source, by_words), ask, of_length(40, 350), 60, 1, lambda n: None))
    counts = {asyncio.run(ask(built.at(i), 1)) for i in range(60)}
    assert counts == {350}
    assert built.proven and built.offset == (template if source == "tokenizer" else 0)
    assert len({built.at(i) for i in range(60)}) == 60


def test_without_usage_and_tokenizer_the_length_is_not_claimed() -> None:
    async def ask(text: str, n: int) -> None:
        return None

    built = asyncio.run(tokens.build(tokens.Counter("usage", by_words), ask, of_length(5, 350), 5, 1, lambda n: None))
    assert (built.source, built.proven) == ("none", False)


@pytest.mark.parametrize("source", ["usage", "tokenizer", "server"])
def test_a_usage_that_follows_no_prompt_stops_nothing_and_proves_nothing(source: str) -> None:
    async def ask(text: str, n: int) -> int:
        return 7

    built = asyncio.run(tokens.build(tokens.Counter(source, by_words), ask, of_length(5, 350), 5, 1, lambda n: None))
    assert not built.proven and built.offset == 0
    if source != "usage":
        assert {asyncio.run(by_words(built.at(i))) for i in range(5)} == {350}


def test_a_server_that_counts_is_not_asked_for_every_prompt_of_a_long_run() -> None:
    asked = 0

    async def count(text: str) -> int:
        nonlocal asked
        asked += 1
        return await by_words(text)

    built = asyncio.run(
        tokens.build(tokens.Counter("server", count), by_words_of, of_length(2000, 350), 2000, 1, lambda n: None)
    )
    texts = {built.at(i) for i in range(2000)}
    assert asked < 400 and len(texts) == 2000
    assert {asyncio.run(by_words(text)) for text in texts} == {350}


async def by_words_of(text: str, n: int) -> int:
    return await by_words(text)


def made(**values: object) -> scenario.Workload:
    return scenario.Workload.model_validate(values)


def plan(work: scenario.Workload, trial: int = 0) -> list[Request]:
    pool = tokens.Prompts([f"p{i}" for i in range(tokens.POOL)], "tokenizer", "", 0, True)
    return list(planning.trial_requests(work, planning.points_of(work)[0], trial, pool, itertools.count()))


def test_a_wave_plan_is_whole_waves_with_the_warm_up_first() -> None:
    requests = plan(made(batch_sizes=[4], waves=3, warmup=1))
    assert [r.wave for r in requests] == [w for w in range(4) for _ in range(4)]
    assert [r.warmup for r in requests] == [True] * 4 + [False] * 12
    assert all(r.scheduled_s is None for r in requests)


def test_an_open_plan_follows_the_seed() -> None:
    work = made(mode="open", rates=[50], requests=200, warmup=0)
    first, again = [r.scheduled_s for r in plan(work)], [r.scheduled_s for r in plan(work)]
    assert first == again
    assert first != [r.scheduled_s for r in plan(work, trial=1)]
    assert first != [r.scheduled_s for r in plan(made(mode="open", rates=[50], requests=200, warmup=0, seed=2))]


def test_points_are_shuffled_only_over_several_trials() -> None:
    one = list(sweep.schedule(made(batch_sizes=[1, 2, 4, 8, 16])))
    assert [point.batch_size for _, point in one] == [1, 2, 4, 8, 16]
    many = list(sweep.schedule(made(batch_sizes=[1, 2, 4, 8, 16], trials=4)))
    orders = {tuple(p.batch_size for t, p in many if t == trial) for trial in range(4)}
    assert len(orders) > 1 and all(sorted(o) == [1, 2, 4, 8, 16] for o in orders)  # type: ignore[type-var]
