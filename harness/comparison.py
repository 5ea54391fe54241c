"""Two runs' figures (see `baseline`) -> what changed, whether it may pass, and the exit code that says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness import baseline, gate, units
from harness.gate import FAIL, INCONCLUSIVE, Answer, Noise, Question, Rule
from harness.records import RidgelineError
from harness.slo import Limit, pair, parts

# Exit codes (README); a gate says the first that holds.
ENGINE, REGRESSED, INVALID, UNDECIDED, INCOMPARABLE = 6, 3, 5, 4, 7
WIDEST = 0.25  # of a default margin that gave way: beyond it that is said
NO_BASELINE = "baseline"  # among `allow`: without a baseline only limits are held


@dataclass(frozen=True, slots=True)
class Options:
    """`margins`: metric or its family (itl) -> share.  `roof`: least share of the tokens/s that physics allows.
    `allow`: fields of the fingerprint that may differ."""

    metrics: tuple[str, ...] = ()
    margins: Mapping[str, float] = field(default_factory=dict)
    slo: tuple[Limit, ...] = ()
    roof: float | None = None
    rule: Rule = field(default_factory=Rule)
    allow: frozenset[str] = frozenset()
    gated: bool = False
    undecided_fails: bool = False
    noise: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and where it comes from."""

    point: str
    metric: str
    kind: str  # change | slo | roof
    question: Question
    notes: tuple[str, ...] = ()


def parse_metrics(text: str | None) -> tuple[str, ...]:
    return tuple(baseline.known(part, "--metrics") for part in parts(text))


def parse_margins(text: str | None) -> dict[str, float]:
    """`itl=3%,ttft_p95=10%`: metric or its family -> share.  Raises RidgelineError."""
    found = {}
    for part in parts(text):
        name, value = pair(part, "--margin", "itl=3%")
        if name not in baseline.LATENCIES:
            baseline.known(name, "--margin")
        found[name] = units.parse(value, "fraction", f"--margin {name}")
        if not 0 < found[name] < 1:
            raise RidgelineError(f"--margin {name}: got {value}, expected a share between 0 and 100 %")
    return found


# --- the questions ---------------------------------------------------------------------------------------------------


def comparable(base: Mapping[str, Any], new: Mapping[str, Any], allow: frozenset[str]) -> dict[str, tuple[Any, Any]]:
    """The allowed differences.  Raises RidgelineError (code 7) naming each field that differs and may not."""
    found = baseline.mismatches(base, new)
    if barred := {key: pair for key, pair in found.items() if key not in allow}:
        told = "; ".join(
            f"{key}: {_say(one)} in the base, {_say(two)} in the new run" for key, (one, two) in barred.items()
        )
        raise RidgelineError(f"not comparable: {told}. Measure a base of the same kind, or allow the difference by "
                             f"--allow {','.join(barred)}", INCOMPARABLE)  # fmt: skip
    return found


def _say(value: Any) -> str:
    return "unknown" if value is None else str(value)


def _noise(options: Options, point: str, metric: str, runs_apart: bool) -> Noise | None:
    """The stored level of a metric; interleaved runs shared their luck, so that what runs differ by is not in them."""
    row = ((options.noise or {}).get("points", {}).get(point) or {}).get(metric)
    if not row or row["trial_sd"] is None:
        return None
    return Noise(row["trial_sd"], row["trial_df"], row["run_sd"] if runs_apart else 0.0, row["run_df"])


def _changes(base: Mapping[str, Any] | None, new: Mapping[str, Any], options: Options) -> Iterator[Asked]:
    if base is None:
        return
    apart = not (base.get("interleaved") and new.get("interleaved"))
    names = options.metrics or baseline.primary(new["fingerprint"]["workload.mode"])
    for point, name in baseline.matched(base, new, names):
        one, two = base["points"][point], new["points"][point]
        given = options.margins.get(name, options.margins.get(name.rpartition("_")[0]))
        margin = baseline.margin_of(name) if given is None else given
        doubt = baseline.tail_doubt(two, name)
        question = Question(f"{point} {name}", baseline.measured(one, name), baseline.measured(two, name), margin,
                            baseline.higher_is_better(name), _noise(options, point, name, apart))  # fmt: skip
        yield Asked(point, name, "change", question, (doubt,) if doubt else ())


def _limits(new: Mapping[str, Any], options: Options) -> Iterator[Asked]:
    for limit in options.slo:
        points = [label for label in new["points"] if limit.point in (None, label)]
        if not points:
            raise RidgelineError(f"--slo {limit.metric}@{limit.point}: no such point; the run has "
                                 f"{', '.join(new['points']) or 'none'}")  # fmt: skip
        for point in points:
            trials = baseline.measured(new["points"][point], limit.metric)
            doubt = baseline.tail_doubt(new["points"][point], limit.metric)
            yield Asked(point, limit.metric, "slo", Question(f"{point} {limit.metric} slo", limit.bound, trials, 0.0,
                        baseline.higher_is_better(limit.metric), _noise(options, point, limit.metric, True)),
                        (doubt,) if doubt else ())  # fmt: skip
    if options.roof is None:
        return
    for point, row in new["points"].items():
        if row["roof_tokens_per_s"]:
            name = "output_tokens_per_s"
            yield Asked(point, name, "roof", Question(f"{point} {name} roof", options.roof * row["roof_tokens_per_s"],
                        baseline.measured(row, name), 0.0, True, _noise(options, point, name, True)))  # fmt: skip


def _asked(base: Mapping[str, Any] | None, new: Mapping[str, Any], options: Options) -> list[Asked]:
    """The family.  Raises RidgelineError (code 7) where nothing would be tested: that must never pass."""
    changes = list(_changes(base, new, options))
    if base is not None and not changes:
        raise RidgelineError("nothing to compare: no point and metric was measured in both runs (base: "
                             f"{_points(base)}; new: {_points(new)}); run the same batch sizes or rates", INCOMPARABLE)  # fmt: skip
    limits = list(_limits(new, options))
    if options.roof is not None and not any(asked.kind == "roof" for asked in limits):
        raise RidgelineError("--roof: the run has no prediction to hold it against; give its scenario theory.hardware and "
                             "theory.model_config", INCOMPARABLE)  # fmt: skip
    if not changes and not limits:
        raise RidgelineError("nothing to compare: no baseline, and neither --slo nor --roof", INCOMPARABLE)
    return changes + limits


def _points(found: Mapping[str, Any]) -> str:
    return ", ".join(found["points"]) or "no points"


# --- the comparison --------------------------------------------------------------------------------------------------


def compare(base: Mapping[str, Any] | None, new: Mapping[str, Any], options: Options, look: int = 1) -> dict[str, Any]:
    """What changed, as a JSON object: `verdict`, `code` (exit code), `answers`, what differs, what is invalid.

    Raises RidgelineError: code 7 for what cannot be compared, 2 for a margin below what can be detected."""
    allowed = comparable(base, new, options.allow) if base is not None else {}
    family = _asked(base, new, options)
    invalid = _invalid(base, new)
    bad = {row["point"] for row in invalid}
    tested = [asked for asked in family if asked.point not in bad and "" not in bad]
    tested = [_widened(asked, len(tested), options) for asked in tested]
    answers = gate.decide([asked.question for asked in tested], options.rule)
    for asked, answer in zip(tested, answers, strict=True):
        _complete(asked, answer, len(tested), options.rule)
    verdict = gate.verdict(answers) if answers else INCONCLUSIVE
    failing = failed_share(new)
    code, why = _code(verdict, invalid, failing, new["max_error_rate"], answers, options)
    if code in (INVALID, ENGINE):
        verdict = "invalid"
    return {
        "verdict": verdict,
        "code": code if options.gated else 0,
        "why": why,
        "alpha": options.rule.alpha,
        "looks": options.rule.looks,
        "look": look,
        "tests": len(tested),
        "answers": [_row(asked, answer) for asked, answer in zip(tested, answers, strict=True)],
        "invalid": invalid,
        "unmatched": _unmatched(base, new),
        "differs": _differs(base, new) | {key: list(pair) for key, pair in allowed.items()},
        "error_rate": failing,
        "base": _about(base) if base is not None else None,
        "new": _about(new),
    }


def _about(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: found.get(key) for key in ("name", "started_at", "state", "source")}


def _widened(asked: Asked, family: int, options: Options) -> Asked:
    """A default margin gives way to the noise; one that was asked for and cannot be held is refused."""
    question = asked.question
    if asked.kind != "change" or not question.noise or isinstance(question.base, int | float):
        return asked
    trials = min(len(question.base), len(question.new))
    least = gate.least_margin(question.noise, trials, family, options.rule, question.higher_is_better)
    if question.margin >= least:
        return asked
    given = asked.metric in options.margins or asked.metric.rpartition("_")[0] in options.margins
    if given:
        wanted = f"--margin {asked.metric}: {units.percent(question.margin, 3)} at {asked.point}"
        raise RidgelineError(f"{wanted} is below what {trials} trials can detect at the stored noise ({units.percent(least, 3)}); "
                             "give a larger one, more trials, or a noise level of more runs")  # fmt: skip
    wider = dataclasses.replace(question, margin=least)
    note = f"margin widened from {units.percent(question.margin, 3)} to what this noise lets be detected"
    if least > WIDEST:
        note += ": a gate that sleeps; more trials, longer ones or a quieter machine would wake it"
    return dataclasses.replace(asked, question=wider, notes=(*asked.notes, note))


def _complete(asked: Asked, answer: Answer, family: int, rule: Rule) -> None:
    """The minimum detectable effect, and what would end the doubt."""
    question = asked.question
    answer.notes += asked.notes
    if answer.sd == answer.sd:
        noise = gate.expected_noise(answer, question.noise)
        answer.detectable = gate.detectable(
            noise, answer.trials, answer.margin, family, rule, question.higher_is_better
        )
    if answer.verdict == INCONCLUSIVE:
        run_sd = question.noise.run_sd if question.noise else 0.0
        answer.more_trials = gate.trials_needed(answer, question.higher_is_better, run_sd)


def _row(asked: Asked, answer: Answer) -> dict[str, Any]:
    up = asked.question.higher_is_better
    change = [-answer.effect, -answer.high, -answer.low] if up else [answer.effect, answer.low, answer.high]
    return {"point": asked.point, "metric": asked.metric, "kind": asked.kind, "higher_is_better": up,
            "change": change[0], "change_low": change[1], "change_high": change[2]} | dataclasses.asdict(answer)  # fmt: skip


def _invalid(base: Mapping[str, Any] | None, new: Mapping[str, Any]) -> list[dict[str, str]]:
    """Points whose figures do not describe the server, in either run; point "" is the whole run."""
    found = []
    for side, run in (("base", base), ("new", new)):
        if run is None:
            continue
        if run["state"] != "complete":
            found.append(
                {"point": "", "side": side, "why": f"the run is {run['state']}: `ridgeline run --resume` ends it"}
            )
        for label, point in run["points"].items():
            if point["verdict"] == "invalid":
                found.append({"point": label, "side": side, "why": "; ".join(point["findings"]) or "invalid"})
    return found


def failed_share(found: Mapping[str, Any]) -> float:
    requests = sum(point["requests"] for point in found["points"].values())
    return sum(point["errors"] for point in found["points"].values()) / requests if requests else 1.0


def _code(verdict: str, invalid: Sequence[Any], failing: float, most: float, answers: Sequence[Answer],
          options: Options) -> tuple[int, str]:  # fmt: skip
    """(exit code, why), worst first: a server that sheds load looks fast, and what is proven stays proven."""
    if failing > most:
        return ENGINE, f"{units.percent(failing, 3)} of the new run's requests failed (limit {units.percent(most, 3)})"
    if verdict == FAIL:
        worse = [answer.name for answer in answers if answer.verdict == FAIL]
        return REGRESSED, f"{len(worse)} of {len(answers)} tests failed: {', '.join(worse[:8])}"
    if invalid:
        return INVALID, "the measurement is not valid: " + "; ".join(
            f"{row['side']} {row['point']}: {row['why']}".replace(" :", ":") for row in invalid[:4]
        )
    if verdict == INCONCLUSIVE:
        open_ones = [answer.name for answer in answers if answer.verdict == INCONCLUSIVE]
        return UNDECIDED if options.undecided_fails else 0, (
            f"{len(open_ones)} of {len(answers)} tests are inconclusive: {', '.join(open_ones[:8])}"
        )
    return 0, f"{len(answers)} tests passed"


def _unmatched(base: Mapping[str, Any] | None, new: Mapping[str, Any]) -> list[str]:
    """Points of one run only: nothing is said of them."""
    if base is None:
        return []
    return [f"{label} (base only)" for label in base["points"] if label not in new["points"]] + [
        f"{label} (new only)" for label in new["points"] if label not in base["points"]
    ]


def _differs(base: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, list[Any]]:
    one, two = (base or {}).get("shown", {}), new["shown"]
    return {key: [one.get(key), two.get(key)] for key in two if base is not None and one.get(key) != two.get(key)}
