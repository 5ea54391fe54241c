from __future__ import annotations

import json
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
        ("workload: {rates: [1]}", "workload.rates: belongs to mode open"),
        ("workload: {batch_sizes: [2, 2]}", "batch_sizes: holds a value twice"),
        ("workload: {waves: 2, requests: 3}", "waves and requests: give one of them"),
        ("limits: {idle_s: soon}", "limits.idle_s: got 'soon', expected a time"),
        ("limits: {idle_s: .nan}", "limits.idle_s: got nan"),
        ("name: ../../x", "name: got '../../x'"),
        ("name: a\nname: b", "f.yaml:2: name: stands twice"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("name: !!python/object/apply:os.system ['true']", "f.yaml:1: not valid YAML"),
        ("name: [", "f.yaml:1: not valid YAML"),
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
                          "limits", "report"}  # fmt: skip
    assert scenario.load(scenario.commented()) == scenario.Scenario()


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
_KEYS = st.sampled_from([*scenario.Scenario.model_fields, *scenario.Workload.model_fields, "x"]) | st.text(max_size=6)


def _mutations(count: int) -> None:
    @settings(max_examples=count, deadline=None)
    @given(st.dictionaries(_KEYS, _VALUES | st.dictionaries(_KEYS, _VALUES, max_size=3), max_size=4))
    def check(values: dict[str, object]) -> None:
        try:
            scenario.load(json.dumps(values), "f.yaml")
        except RidgelineError as problem:
            assert str(problem).startswith("f.yaml:")

    check()


def test_a_mutated_scenario_gives_a_clear_error_and_never_a_traceback() -> None:
    _mutations(300)


@pytest.mark.full
def test_ten_thousand_mutated_scenarios() -> None:
    _mutations(10_000)
