"""Has a server become worse?  Figures of trials in; pass, fail or inconclusive out, with a known rate of false alarms.

The trial is the unit: requests of one trial share its luck, so a test over requests finds differences that are none.
All is done on logarithms, and signed so that a positive effect is a harm, whichever way the metric is good.

    fail          Holm's p <= alpha / looks, and the effect seen >= the margin
    pass          the 95 % interval of the effect lies below the margin
    inconclusive  neither

Tests: Welch 1947 (means of unequal variances), Satterthwaite 1946 (its degrees of freedom), Holm 1979 (a family of
tests), Schuirmann 1987 (an interval against a margin).  `alpha` is of a whole pipeline: all tests, all looks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt

from harness.records import NAN

Reals = npt.NDArray[np.float64]

PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
TAIL = 0.025  # of the interval shown, at each side
CAUGHT = 0.8  # the minimum detectable effect is caught so often
SURE = 0.8  # and is that of a noise which is larger than the true one in so many cases
GRAIN = 1e-12  # of a logarithm
PERMUTED = 8  # trials a side up to which all regroupings are counted
MOST_TRIALS = 200
REPEATS = 4000  # simulated comparisons; the power is then known within 0.013


@dataclass(frozen=True, slots=True)
class Rule:
    """`alpha`: chance of a false alarm in a pipeline; `looks`: how often the question may be asked, trials added between."""

    alpha: float = 0.01
    looks: int = 1


@dataclass(frozen=True, slots=True)
class Noise:
    """A known level: standard deviation of the log between runs on top of that between trials, and from how many runs."""

    trial_sd: float
    trial_df: float
    run_sd: float = 0.0
    run_df: float = 0.0


@dataclass(frozen=True, slots=True)
class Question:
    """One test of the family.  `base` are the trials to compare with, or one number: a limit.  `margin` is a share of the
    base (0.05: five per cent worse is a regression; for a limit 0)."""

    name: str
    base: Sequence[float] | float
    new: Sequence[float]
    margin: float
    higher_is_better: bool = False
    noise: Noise | None = None


@dataclass(slots=True)
class Answer:
    """Effects are shares of the base, positive where worse: `effect` 0.1 is 10 % slower, or 10 % fewer per second.

    `low` and `high` are the 95 % interval, NaN where it cannot be had; `sd` that of the log between trials, pooled.
    """

    name: str
    verdict: str
    base: float
    new: float
    effect: float
    low: float
    high: float
    margin: float
    p: float
    p_holm: float
    p_permutation: float
    sd: float
    df: float
    trials: tuple[int, int]
    detectable: float = NAN
    more_trials: int | None = None
    notes: list[str] = field(default_factory=list)


# --- Student's t -----------------------------------------------------------------------------------------------------

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(96)
_lgamma = np.vectorize(math.lgamma, otypes=[float])


def t_tail(t: float | Reals, df: float | Reals) -> Reals:
    """P(T > t) for t >= 0 and 1 <= df; beyond 1e5 degrees of freedom as for 1e5."""
    df = np.asarray(np.minimum(df, 1e5), float)
    return _tail_of(np.asarray(np.arctan(np.asarray(t, float) / np.sqrt(df))), df, _scale(df))


def _scale(df: Reals) -> Reals:
    return np.asarray(np.exp(_lgamma((df + 1) / 2) - _lgamma(df / 2)) / math.sqrt(math.pi))


def _tail_of(angle: Reals, df: Reals, scale: Reals) -> Reals:
    """With t = sqrt(df) tan(angle) the density is proportional to cos(angle)^(df-1): smooth, so that Gauss and Legendre's
    quadrature is within 3e-6 for 1 <= df <= 1e5, and within 1e-10 up to 1e3."""
    half = (np.pi / 2 - angle) / 2
    at = angle[..., None] + half[..., None] * (1 + _NODES)
    return np.asarray(half * scale * np.sum(_WEIGHTS * np.cos(at) ** (df[..., None] - 1), axis=-1))


def t_point(tail: float, df: float | Reals) -> Reals:
    """The t that is exceeded with probability `tail` < 0.5, by bisection over the angle."""
    df = np.asarray(np.minimum(df, 1e5), float)
    low, high, scale = np.zeros(df.shape), np.full(df.shape, np.pi / 2), _scale(df)
    for _ in range(48):
        middle = (low + high) / 2
        above = _tail_of(middle, df, scale) > tail
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.asarray(np.tan((low + high) / 2) * np.sqrt(df))


_GRID = np.geomspace(1.0, 1e4, 160)


@cache
def _tabled(tail: float) -> Reals:
    return t_point(tail, _GRID)


def _t_near(tail: float, df: Reals) -> Reals:
    """t_point by a table, for simulations: within 0.1 % from two degrees of freedom on."""
    return np.asarray(np.exp(np.interp(np.log(df), np.log(_GRID), np.log(_tabled(tail)))))


def upper_sd(sd: float, df: float) -> float:
    """What a standard deviation may be at most, with confidence SURE, when `sd` was seen on `df` degrees of
    freedom (chi-squared by Wilson and Hilferty 1931)."""
    z = float(t_point(1 - SURE, 1e5))
    chi2 = df * (1 - 2 / (9 * df) - z * math.sqrt(2 / (9 * df))) ** 3
    return sd * math.sqrt(df / max(chi2, 1e-3))


# --- one test --------------------------------------------------------------------------------------------------------


def _logs(values: Sequence[float], higher_is_better: bool) -> Reals:
    """Logs of what was measured, signed so that more is worse."""
    known = np.array([v for v in values if v is not None and math.isfinite(v) and v > 0], float)
    return np.asarray(-np.log(known) if higher_is_better else np.log(known))


def _harm(share: float, higher_is_better: bool) -> float:
    """A share as a log: 5 % slower is log(1.05), 5 % fewer per second is -log(0.95)."""
    return -math.log1p(-share) if higher_is_better else math.log1p(share)


def _share(harm: float, higher_is_better: bool) -> float:
    return -math.expm1(-harm) if higher_is_better else math.expm1(harm)


def _grained(log: float) -> float:
    """Less than logs are rounded to is nothing: the mean of equal ones may differ from them in the last place."""
    return 0.0 if abs(log) < GRAIN else log


def _spread(terms: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(standard error, degrees of freedom) of a sum of independent estimated variances, (variance, df) each."""
    total = sum(variance for variance, _ in terms)
    below = sum(variance**2 / df for variance, df in terms if df > 0)
    return math.sqrt(total), total**2 / below if below else math.inf


def _regrouped(base: Reals, new: Reals) -> float:
    """Exact one-sided p by permutation: the share of regroupings whose difference is at least the one seen."""
    if not 1 < len(base) <= PERMUTED or not 1 < len(new) <= PERMUTED:
        return NAN
    both = np.concatenate([base, new])
    groups = np.array(list(itertools.combinations(range(len(both)), len(new))))
    sums = both[groups].sum(axis=1)
    return float(np.mean(sums >= new.sum() - 1e-12))


def _ask(question: Question) -> Answer:
    """Effect, interval and p of one test; the verdict is given with the family's."""
    up = question.higher_is_better
    new = _logs(question.new, up)
    limit = isinstance(question.base, int | float)
    base = _logs([float(question.base)] if isinstance(question.base, int | float) else question.base, up)
    counts = (0 if limit else len(base), len(new))
    margin = _harm(question.margin, up)
    found = Answer(
        question.name, INCONCLUSIVE, NAN, NAN, NAN, NAN, NAN, question.margin, NAN, NAN, NAN, NAN, NAN, counts
    )
    if not len(base) or not len(new):
        found.notes.append("not measured")
        return found
    sign = -1 if up else 1
    found.base, found.new = math.exp(sign * base.mean()), math.exp(sign * new.mean())
    effect = _grained(float(new.mean() - base.mean()))
    found.effect = _share(effect, up)
    if len(new) < 2 or (not limit and len(base) < 2):
        found.notes.append("one trial has no interval: give at least two, better five")
        return found
    groups = [new] if limit else [base, new]
    terms = [(float(g.var(ddof=1)) / len(g), len(g) - 1.0) for g in groups]
    pooled = sum(float(g.var(ddof=1)) * (len(g) - 1) for g in groups) / sum(len(g) - 1 for g in groups)
    if question.noise and question.noise.run_sd > 0:
        terms.append((len(groups) * question.noise.run_sd**2, question.noise.run_df))
    error, df = _spread(terms)
    error = _grained(error)
    found.sd, found.df = math.sqrt(pooled), df
    half = float(t_point(TAIL, df)) * error if error else 0.0
    found.low, found.high = _share(effect - half, up), _share(effect + half, up)
    if error:
        tail = float(t_tail(abs(effect) / error, df))
        found.p = tail if effect >= 0 else 1 - tail
    else:
        found.p = 0.0 if effect > 0 else 1.0
    found.p_permutation = NAN if limit else _regrouped(base, new)
    found.verdict = PASS if effect + half < margin else INCONCLUSIVE
    return found


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p values; a missing one counts as a member of the family and stays missing."""
    order = sorted(range(len(ps)), key=lambda i: math.inf if math.isnan(ps[i]) else ps[i])
    adjusted, so_far = [NAN] * len(ps), 0.0
    for rank, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = NAN if math.isnan(ps[i]) else so_far
    return adjusted


def decide(questions: Sequence[Question], rule: Rule) -> list[Answer]:
    """The answers to a family of questions, at one look of `rule.looks`."""
    answers = [_ask(question) for question in questions]
    for answer, p in zip(answers, holm([answer.p for answer in answers]), strict=True):
        answer.p_holm = p
        if p <= rule.alpha / rule.looks and answer.effect >= answer.margin and answer.effect > 0:
            answer.verdict = FAIL
    return answers


def verdict(answers: Sequence[Answer]) -> str:
    """Of the whole: fails if one fails, passes if all pass."""
    found = {answer.verdict for answer in answers}
    return FAIL if FAIL in found else PASS if found == {PASS} else INCONCLUSIVE


# --- what the rule can see -------------------------------------------------------------------------------------------


def detectable(noise: Noise, trials: tuple[int, int], margin: float, family: int, rule: Rule,
               higher_is_better: bool = False, seed: int = 1) -> float:  # fmt: skip
    """The minimum detectable effect of the whole rule: the smallest true harm to one of `family` metrics to which it says
    fail in 80 % of cases, as a share.  By simulation: margin, Holm's first step, all looks (each adds as many trials as
    there were at first), and noise between trials and runs.  `trials` (base, new); 0 for base: a limit.  Infinite where
    there is no interval."""
    if min(n for n in trials if n) < 2 or not trials[1]:
        return math.inf
    enough, barred = _edges(noise, trials, _harm(margin, higher_is_better), rule.alpha / rule.looks / family,
                            rule.looks, np.random.default_rng(seed))  # fmt: skip
    low, high = 0.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        # An earlier look that passed ends it.
        caught = (middle >= enough) & ~np.logical_or.accumulate(np.pad(middle < barred, ((1, 0), (0, 0)))[:-1], axis=0)
        low, high = (low, middle) if np.mean(caught.any(axis=0)) >= CAUGHT else (middle, high)
    return _share(high, higher_is_better) if high < 19 else math.inf


def _edges(noise: Noise, trials: tuple[int, int], margin: float, alpha: float, looks: int,
           rng: np.random.Generator) -> tuple[Reals, Reals]:  # fmt: skip
    """For each look and simulated comparison: the true effect from which it fails, and below which it passes."""
    sides = [n for n in trials if n]
    drawn = [rng.normal(0, noise.trial_sd, (REPEATS, n * looks)) for n in sides]
    luck = rng.normal(0, noise.run_sd or 0.0, (REPEATS, len(sides)))
    enough, barred = np.empty((looks, REPEATS)), np.empty((looks, REPEATS))
    for look in range(looks):
        seen = [values[:, : n * (look + 1)] for values, n in zip(drawn, sides, strict=True)]
        means = [values.mean(axis=1) + luck[:, i] for i, values in enumerate(seen)]
        by_chance = means[-1] - (means[0] if len(means) > 1 else 0.0)
        terms = [(values.var(axis=1, ddof=1) / values.shape[1], values.shape[1] - 1.0) for values in seen]
        if noise.run_sd:
            terms.append((np.full(REPEATS, len(sides) * noise.run_sd**2), noise.run_df))
        total = np.maximum(np.sum([variance for variance, _ in terms], axis=0), 1e-300)
        df = total**2 / np.maximum(np.sum([variance**2 / df for variance, df in terms], axis=0), 1e-300)
        error, df = np.sqrt(total), np.clip(df, 1.0, 1e4)
        enough[look] = np.maximum(_t_near(alpha, df) * error, margin) - by_chance
        barred[look] = margin - _t_near(TAIL, df) * error - by_chance
    return enough, barred


def upper(noise: Noise) -> Noise:
    """Each deviation at its upper bound."""
    run_sd = upper_sd(noise.run_sd, noise.run_df) if noise.run_sd else 0.0
    return Noise(upper_sd(noise.trial_sd, noise.trial_df), noise.trial_df, run_sd, noise.run_df)


def expected_noise(answer: Answer, known: Noise | None) -> Noise:
    """The noise to reckon with: the known level, else what these trials show; each at its upper bound."""
    if known:
        return upper(known)
    df = float(max(1, sum(max(0, n - 1) for n in answer.trials)))
    return Noise(upper_sd(answer.sd, df), df) if answer.sd > 0 else Noise(0.0, df)


def trials_needed(answer: Answer, higher_is_better: bool, run_sd: float) -> int | None:
    """Trials a side after which an effect such as was seen would be told from the margin, at the noise seen; None where
    more than 200 would be needed, or there is no noise to go by."""
    if not answer.sd > 0 or math.isnan(answer.effect):
        return None
    apart = abs(_harm(answer.effect, higher_is_better) - _harm(answer.margin, higher_is_better))
    sides = 2 if answer.trials[0] else 1
    n = np.arange(max(2, max(answer.trials) + 1), MOST_TRIALS + 1, dtype=np.float64)
    half = _t_near(TAIL, sides * (n - 1.0)) * np.sqrt(sides * (answer.sd**2 / n + run_sd**2))
    enough = n[half < apart]
    return int(enough[0]) if len(enough) else None


def noise_of(runs: Sequence[Sequence[float]]) -> Noise:
    """The noise of A/A runs, each its trials' figures: between trials, and what runs differ by on top of it.

    One-way analysis of variance with random effects; NaN where fewer than two runs or trials were had."""
    logs = [_logs(run, False) for run in runs]
    logs = [run for run in logs if len(run)]
    df = float(sum(len(run) - 1 for run in logs))
    if len(logs) < 2 or df < 1:
        return Noise(NAN, df, NAN, max(0.0, len(logs) - 1.0))
    trial = sum(float(run.var(ddof=1)) * (len(run) - 1) for run in logs if len(run) > 1) / df
    size = len(logs) / sum(1 / len(run) for run in logs)
    between = float(np.var([run.mean() for run in logs], ddof=1)) - trial / size
    return Noise(math.sqrt(trial), df, math.sqrt(max(0.0, between)), len(logs) - 1.0)


def least_margin(noise: Noise, trials: int, family: int, rule: Rule, higher_is_better: bool = False) -> float:
    """The smallest margin that a gate may be given: an effect of this size is told from none, margin or not, in 80 % of
    cases.  Below it a gate would be silent, or pass nothing."""
    return detectable(upper(noise), (trials, trials), 0.0, family, rule, higher_is_better)
