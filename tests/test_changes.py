"""Several runs held against the first: what is called better or worse, what is not judged, and what is told beside it."""

from __future__ import annotations

from typing import Any

import pytest

from harness.report import changes, compare_section
from harness.report.changes import Change
from harness.report.view import RunView
from tests import gate_samples, report_samples

LABELS = ("b1", "b4")


def run(scales: dict[str, float] | None = None, spread: float = 1.0, name: str = "a", **mark: Any) -> RunView:
    """A run of five trials at batch 1 and 4; `scales` > 1 are slower."""
    trials = {label: gate_samples.trials((scales or {}).get(label, 1.0), spread) for label in LABELS}
    figures = gate_samples.figures(trials)
    figures["fingerprint"] |= mark
    points = [{"batch_size": int(label[1:]), "rate": None, "verdict": "valid"} for label in LABELS]
    return RunView({"name": name, "state": "complete", "points": points, "figures": figures}, {})


def words(*runs: RunView) -> dict[tuple[str, float], str]:
    return {(c.metric, c.key[1]): c.word for c in changes.changes(runs)}


def one(found: list[Change], metric: str, batch: float) -> Change:
    return next(c for c in found if (c.metric, c.key[1]) == (metric, batch))


def test_what_is_slower_is_worse_and_what_is_faster_is_better() -> None:
    found = words(run(), run({"b1": 1.2, "b4": 1 / 1.2}))
    for metric in ("ttft_p50", "itl_p50", "output_tokens_per_s"):
        assert (found[metric, 1], found[metric, 4]) == ("worse", "better")


def test_the_first_and_the_other_swapped_swap_the_words() -> None:
    fast, slow = run(), run({"b1": 1.1, "b4": 1.3})
    there, back = words(fast, slow), words(slow, fast)
    assert set(there.values()) == {"worse"} and set(back.values()) == {"better"}


def test_a_change_within_the_band_is_none_and_noise_is_not_judged_away() -> None:
    assert set(words(run(), run({"b1": 1.01, "b4": 0.99})).values()) == {"same"}
    assert set(words(run(spread=60), run({"b1": 1.05, "b4": 0.97}, spread=60)).values()) == {"unclear"}


@pytest.mark.parametrize("metric", ["ttft_p50", "output_tokens_per_s"])
def test_a_change_reads_as_more_and_its_harm_as_worse(metric: str) -> None:
    found = one(changes.changes([run(), run({"b1": 1.25})]), metric, 1)
    higher = metric == "output_tokens_per_s"
    assert found.harm == pytest.approx(0.2 if higher else 0.25, abs=0.001)
    assert found.low < found.harm < found.high
    assert found.shown.startswith("-20 % [-20.2 %, -19.8 %" if higher else "+25 % [+24.7 %, +25.3 %")


def test_an_invalid_point_is_shown_and_not_judged() -> None:
    other = run({"b1": 1.5})
    other.summary["points"][0]["verdict"] = "invalid"
    found = one(changes.changes([run(), other]), "itl_p50", 1)
    assert (found.word, found.why) == ("not judged", "invalid in a #2")
    assert found.harm == pytest.approx(0.5, abs=0.01)


def test_without_trials_the_figures_stand_there_unjudged() -> None:
    runs = [report_samples.sample(), report_samples.batches(4)]
    found = changes.changes(runs)
    assert len(found) == 16 and {c.word for c in found} == {"not judged"}
    assert one(found, "itl_p50", 1).base == pytest.approx(runs[0].summary["points"][0]["itl_s"]["p50"])


def test_all_tests_of_a_page_are_one_family() -> None:
    """The same change, on its own sure enough, is one of many when forty runs are compared."""
    near = run({"b1": 1.055, "b4": 1.0}, spread=11, name="near")
    alone = one(changes.changes([run(spread=11), near]), "itl_p50", 1)
    among = one(changes.changes([run(spread=11), near, *[run(spread=11)] * 40]), "itl_p50", 1)
    assert alone.p < among.p and (alone.word, among.word) == ("worse", "unclear")


def test_what_cannot_be_compared_is_told_and_compared_nonetheless() -> None:
    other = run({"b1": 1.2}, name="b", engine="sglang", **{"workload.input_tokens": 100})
    other.summary["points"][1]["batch_size"] = 8
    other.summary["state"] = "interrupted"
    said = " ".join(changes.caveats([run(), other]))
    assert "b is not comparable with a: they differ in input tokens (350, 100)" in said
    assert "b differs from a in engine (vllm, sglang)" in said
    assert "Measured in a and not in b: batch 4." in said and "Measured in b and not in a: batch 8." in said
    assert "Not complete: b." in said
    assert words(run(), other) == dict.fromkeys(
        [(m, 1.0) for m in ("ttft_p50", "itl_p50", "output_tokens_per_s")], "worse"
    )
    assert changes.caveats([run(), run(name="b")]) == []


def test_flags_and_versions_that_differ_are_listed_and_secrets_are_not() -> None:
    def started(args: list[str], version: str) -> RunView:
        engine = {"args": args, "env": {"HF_TOKEN": "hunter2", "A": version}}
        return RunView(
            {"name": version}, {"scenario": {"engine": engine}, "engine": {"kind": "vllm", "version": version}}
        )

    runs = [started(["--max-num-seqs", "4", "--api-key", "hunter2", "--port=1"], "1"),
            started(["--max-num-seqs=8", "--enforce-eager", "--seed", "-1", "--api-key", "hunter3"], "2")]  # fmt: skip
    found = dict(changes.differences(runs))
    assert found == {"engine version": ["1", "2"], "flag --max-num-seqs": ["4", "8"], "flag --enforce-eager": ["", "on"],
                     "flag --seed": ["", "-1"], "environment A": ["1", "2"]}  # fmt: skip


def test_the_section_is_there_for_several_runs_alone() -> None:
    assert compare_section.section([run()]) is None and compare_section.section([]) is None
    found = compare_section.section([run(name="a"), run({"b1": 1.2}, name="b"), run(name="c")])
    assert found is not None and len(found.blocks) == 3
    assert found.sentences[0].startswith("b against a, 6 figures: 3 worse, 3 same; the largest: ")
    assert found.sentences[0].endswith(" p50 at batch 1 +20 % [+19.7 %, +20.3 %].")
    assert found.sentences[1:] == ["c against a, 6 figures: 6 same."]
    for block in found.blocks:
        assert block.figure is not None
        marks = [trace for trace in block.figure["data"] if trace["mode"] == "markers"]
        assert [len(trace["x"]) for trace in marks] == [2, 2]
        assert marks[0]["x"][0] > 15 and "triangle-right" in marks[0]["marker"]["symbol"]
        assert len(block.table.body) == 4
