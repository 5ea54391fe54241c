from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import scenario
from harness.records import RidgelineError

ROOT = Path(__file__).parent.parent
SCENARIOS = sorted((ROOT / "scenarios").glob("*.yaml"))


def test_the_project_ships_its_scenarios() -> None:
    names = {path.stem for path in SCENARIOS}
    assert names >= {"quickstart", "vllm-cpu", "standard", "any-endpoint", "open-loop", "ci-gate", "before-purchase"}


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_each_scenario_loads_and_comes_back_from_its_own_dump(path: Path) -> None:
    one = scenario.load(path.read_text(), path.name)
    assert one.name == path.stem and one.description
    assert scenario.load(scenario.dump(one)) == one


def test_the_standard_is_350_in_150_out_at_batch_1_to_256() -> None:
    work = scenario.load((ROOT / "scenarios/standard.yaml").read_text()).workload
    assert (work.input_tokens, work.output_tokens) == (350, 150)
    assert work.batch_sizes == [2**i for i in range(9)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("conccurency: 3", "f.yaml:1: conccurency: unknown key"),
        (
            "name: a\nworkload:\n  batch_size: [1]",
            "f.yaml:3: workload.batch_size: unknown key; did you mean 'batch_sizes'?",
        ),
        ("workload:\n  batch_sizes: [1, -8]", "f.yaml:2: workload.batch_sizes[1]: got -8"),
        ("workload:\n  batch_sizes: []", "f.yaml:2: workload.batch_sizes: got []"),
        ("workload: {output_tokens: 0}", "f.yaml:1: workload.output_tokens: got 0"),
        ("workload:\n  mode: open", "f.yaml:1: workload.rates: mode open needs at least one rate"),
        ("name: a\nworkload:\n  mode: closed\n  waves: 2", "f.yaml:4: workload.waves: belongs to mode wave"),
        ("capacity: {max_points: 5}\nworkload:\n  mode: wave", "f.yaml:3: workload.mode: a search needs closed"),
        ("workload: {rates: [1]}", "workload.rates: belongs to mode open"),
        ("workload: {batch_sizes: [2, 2]}", "batch_sizes: holds a value twice"),
        ("workload: {waves: 2, requests: 3}", "waves and requests: give one of them"),
        ("limits: {idle_s: soon}", "limits.idle_s: got 'soon', expected a time"),
        ("workload: {duration_s: 1e300}", "f.yaml:1: workload.duration_s: got"),
        ("limits: {idle_s: .nan}", "limits.idle_s: got nan"),
        ("variants: {a: {arg: []}}", "f.yaml:1: variants.a.arg: unknown key"),
        ("variants: {../a: {}}", "variants.../a"),
        ("name: ../../x", "name: got '../../x'"),
        ("name: a\nname: b", "f.yaml:2: name: stands twice"),
        ("a: &x [1]\nb: *x", "f.yaml:2: b: aliases (*name) are not allowed"),
        ("a: &x\n  - *x", "f.yaml:2: a: aliases"),
        ("a: 1\nb:\n  c: *nowhere", "f.yaml:3: c: aliases"),
        ("a: &x 1\nb:\n  <<: *x", "f.yaml:3: <<: aliases"),
        ("a:\n  b: {<<: 3}", "f.yaml:2: b: not valid YAML: expected a mapping"),
        ("a:\n" + "".join(f"{' ' * i}- \n" for i in range(60)), "nested too deeply"),
        ("name: !!python/object/apply:os.system ['true']", "f.yaml:1: name: not valid YAML"),
        ("name: [", "f.yaml:1: name: not valid YAML"),
        ("- 1", "expected keys and values"),
        ("", "the file is empty"),
    ],
)
def test_an_error_says_where_what_and_what_is_allowed(text: str, said: str) -> None:
    with pytest.raises(RidgelineError) as problem:
        scenario.load(text, "f.yaml")
    assert said in str(problem.value)
    assert problem.value.code == 2


def test_times_may_be_written_with_their_unit() -> None:
    assert scenario.load("limits: {idle_s: 500ms, total_s: 2min}").limits.idle_s == 0.5


def test_the_schema_knows_every_key_and_the_commented_scenario_is_valid() -> None:
    known = json.loads(scenario.schema())["properties"]
    assert set(known) == {"name", "description", "engine", "model", "tokenizer", "api_key_env", "api_key_file", "workload", "client", "theory",
                          "limits", "capacity", "report", "variants", "interleave", "slo", "price"}  # fmt: skip
    assert scenario.load(scenario.commented()) == scenario.Scenario()


KEYS = [
    *scenario.Scenario.model_fields,
    *scenario.Workload.model_fields,
    *scenario.Limits.model_fields,
    *scenario.Engine.model_fields,
    *scenario.Capacity.model_fields,
]
_ODD = ["null", "-1", "0", "1e999", ".nan", ".inf", "9" * 5000, "2026-13-45", "no", "0o17", "1_000", "''", "[]", "{}", "[[]]", "{a: {b: []}}",
        "!!python/object/apply:os.system ['true']", "!!binary x", "*alias", "&anchor x", "<<: x", "'\u2028'", "\x1b[2J", "\0", "\ud800",
        "{" * 60, "- " * 60, "? [1]\n: x", "%YAML 9.9", "--- x", "...", "\t", "|", "'unclosed", "@", "`", "2:3:4", "true", "1.5ms", "10 parsecs"]  # fmt: skip
_LINES = st.one_of(
    st.builds(lambda pad, key, value: f"{' ' * pad}{key}: {value}", st.integers(0, 4), st.sampled_from(KEYS) | st.text(max_size=6),
              st.sampled_from(_ODD) | st.text(max_size=20)),
    st.text(max_size=30), st.sampled_from(_ODD),
)  # fmt: skip
_CHANGES = st.lists(st.tuples(st.integers(0, 60), st.sampled_from(["insert", "replace", "drop", "value", "byte", "indent"]), _LINES,
                              st.sampled_from(_ODD)), min_size=1, max_size=4)  # fmt: skip


def changed(text: str, changes: list[tuple[int, str, str, str]]) -> str:
    lines = text.split("\n")
    for at, how, line, value in changes:
        i = at % max(1, len(lines))
        old = lines[i] if lines else ""
        key, colon, _ = old.partition(":")
        new = {"insert": [old, line], "replace": [line], "drop": [], "value": [f"{key}{colon} {value}"], "byte": [old[: at % 7] + value + old[at % 7 :]],
               "indent": [" " * (at % 5) + old]}[how]  # fmt: skip
        lines[i : i + 1] = new
    return "\n".join(lines)


def _mutations(count: int) -> None:
    """Our own scenario files with lines changed: valid, or one error that names a line of the file and a key."""

    @settings(max_examples=count, deadline=None)
    @given(st.sampled_from(SCENARIOS), _CHANGES)
    def check(path: Path, changes: list[tuple[int, str, str, str]]) -> None:
        text = changed(path.read_text(), changes)
        try:
            scenario.load(text, "f.yaml")
        except RidgelineError as problem:
            found = re.match(r"f\.yaml:(\d+): ([^:]*\S[^:]*|\S.*?): \S", str(problem), re.DOTALL)
            assert found, str(problem)
            assert (
                1
                <= int(found[1])
                <= text.count("\n") + text.count("\u2028") + text.count("\x85") + text.count("\r") + 2
            )
            assert problem.code == 2

    check()


def test_a_mutated_scenario_gives_a_clear_error_and_never_a_traceback() -> None:
    _mutations(300)


@pytest.mark.full
def test_ten_thousand_mutated_scenarios() -> None:
    _mutations(10_000)
