"""Literal evidence -> findings.  Each check is seen to speak and to hold its tongue."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from harness import checks
from harness.checks import Evidence, run_checks, verdict
from harness.records import Finding, Record, Table, table
from harness.tally import Tally, of_table
from tests.conftest import ROOT

QUIET = {"started_s": 0.0, "ended_s": 10.0, "cpu_share": 0.10, "wait_share": 0.03, "wait_max_s": 0.004, "lag_p99_s": 0.0004,
         "lag_max_s": 0.003, "held": [[5.0, 0.003]], "held_least_s": 0.0002, "usual_s": 0.0001, "max_in_flight": 4, "gc_max_s": 0.0, "wall_step_s": 0.0, "suspended_s": 0.0,
         "machine_cpu_share": 0.3, "steal_share": 0.0}  # fmt: skip
BESIDE = {"server_ttft_s": 0.050, "client_ttft_s": 0.0505, "server_itl_s": 0.010, "client_itl_s": 0.010, "preemptions": 0.0,
          "gpu_throttled": [], "gpu_sm_hz": [1.90e9, 1.98e9], "throttled_s": 0.0, "cache_share": 0.0,
          "batch_ran": {"mean": 4, "max": 4, "n": 9}}  # fmt: skip

IMPORTED = {"name": "guidellm 0.8.1", "detailed": True, "stamps": "first and last token", "taken": [], "differs": []}


def answers(n: int = 400, trials: int = 1, **changed: Any) -> Table:
    """Answers of 20 tokens: the first after 50 ms, then one each 10 ms."""
    said: dict[str, Any] = {"input_tokens": 350, "output_tokens": 20, "token_source": "usage", "status": 200,
                            "chunk_s": (0.05 + 0.01 * np.arange(20)).astype(np.float32),
                            "chunk_tokens": np.ones(20, np.int32)}  # fmt: skip
    return table([Record(i, 0, i % trials, i // 4, False, float("nan"), 0.1 * i, end_s=0.1 * i + 0.3, **said | changed)
                  for i in range(n)])  # fmt: skip


def found(records: Table | None = None, row: dict[str, Any] | None = None, same_prompt: bool = False,
          predicted: dict[str, Any] | None = None, **senses: Any) -> dict[str, Finding]:  # fmt: skip
    records = answers() if records is None else records
    felt = QUIET | senses
    tally = Tally("wave", 4, 350, 20, dict.fromkeys(np.unique(records.trial).tolist(), felt))
    tally.place(records)
    tally.add(records)
    figures = tally.row() | {"batch_size": 4} | BESIDE | (row or {})
    evidence = Evidence(figures, tally, "wave", [felt], [], predicted, same_prompt)
    return {finding.code: finding for finding in run_checks(evidence)}


def test_a_quiet_run_of_many_requests_is_valid_and_says_nothing() -> None:
    assert found() == {}
    assert verdict([]) == "valid"


FIRST_TOKENS = [[0.1 * i + 0.0505, 0.0065] for i in range(400)]  # a tick was read as late, just after each
BURST = (0.5 + 1e-4 * np.arange(20)).astype(np.float32)
BOUND = {name: {"bound": 0.2} for name in ("ttft_s", "itl_s", "e2e_s")}
SPEAK: list[tuple[str, str, str, dict[str, Any]]] = [
    ("V001", "suspect", "a lag of 3 ms beside an ITL of 10", {"lag_p99_s": 0.003}),
    ("V001", "suspect", "a stop of 6 ms as 5 of 400 first tokens came: p99", {"held": FIRST_TOKENS[:5]}),
    ("V001", "suspect", "stops of 5 ms as every 20th came: the mean", {"held": [[at_s, 0.005] for at_s, _ in FIRST_TOKENS[::20]]}),
    ("V001", "invalid", "a lag of 60 ms", {"lag_p99_s": 0.060}),
    ("V002", "suspect", "85 % of a core", {"cpu_share": 0.85}),
    ("V002", "invalid", "96 % of a core", {"cpu_share": 0.96}),
    ("V002", "invalid", "85 % of a core, and reads late", {"cpu_share": 0.85, "lag_p99_s": 0.006}),
    ("V002", "invalid", "a core that runs the loop or keeps it waiting, all the time", {"cpu_share": 0.6, "wait_share": 0.38}),
    ("V003", "suspect", "some failed", {"records": table([
        *(Record(i, 0, 0, 0, False, 0.0, 0.0, output_tokens=20, input_tokens=350, chunk_s=np.ones(2, np.float32),
                 chunk_tokens=np.ones(2, np.int32)) for i in range(9)),
        Record(9, 0, 0, 0, False, 0.0, 0.0, error_class="http_500", error="boom")])}),
    ("V003", "invalid", "nothing ended", {"records": answers().where(np.zeros(400, bool))}),
    ("V004", "suspect", "longer prompts than asked", {"records": answers(input_tokens=360)}),
    ("V005", "suspect", "shorter answers than asked", {"records": answers(output_tokens=17)}),
    ("V006", "suspect", "no usage", {"records": answers(input_tokens=None, token_source="chunks")}),
    ("V007", "suspect", "cache hits by the server's counters", {"row": {"cache_share": 0.4}}),
    ("V007", "suspect", "cache hits by usage", {"records": answers(cached_tokens=336)}),
    ("V007", "info", "cache hits that were asked for", {"row": {"cache_share": 0.9}, "same_prompt": True}),
    ("V008", "invalid", "answers in one burst", {"records": answers(chunk_s=BURST)}),
    ("V009", "info", "four tokens an arrival", {"records": answers(chunk_s=BURST[:5] * np.arange(1, 6, dtype=np.float32),
                                                                   chunk_tokens=np.full(5, 4, np.int32))}),
    ("V010", "info", "few requests", {"records": answers(8)}),
    ("V011", "suspect", "trials that differ", {"records": table([
        Record(i, 0, i % 3, 0, False, 0.0, 0.0, output_tokens=20, input_tokens=350,
               chunk_s=((1 + 0.2 * (i % 3)) * np.linspace(0.05, 0.24, 20)).astype(np.float32),
               chunk_tokens=np.ones(20, np.int32)) for i in range(400)])}),
    ("V012", "suspect", "faster than the bound", {"predicted": BOUND}),
    ("V013", "suspect", "half the batch ran", {"row": {"batch_ran": {"mean": 2, "max": 2, "n": 9}}}),
    ("V013", "suspect", "half the batch was in flight", {"max_in_flight": 2}),
    ("V014", "suspect", "sent late", {"records": table([
        Record(i, 0, 0, 0, False, 0.1 * i, 0.1 * i + 0.02, output_tokens=20, input_tokens=350,
               chunk_s=np.linspace(0.05, 0.24, 20).astype(np.float32), chunk_tokens=np.ones(20, np.int32))
        for i in range(400)])}),
    ("V015", "suspect", "all cores busy", {"machine_cpu_share": 0.99}),
    ("V015", "suspect", "a hypervisor that takes its share", {"steal_share": 0.05}),
    ("V015", "suspect", "a server that waits for its core", {"row": {"server_ran_s": 2.0, "server_waited_s": 0.21}}),
    ("V016", "suspect", "a busy neighbour on the client's core, 1 stream", {"cpu_share": 0.011, "wait_share": 0.057}),
    ("V016", "suspect", "the same, 8 streams", {"cpu_share": 0.025, "wait_share": 0.030}),
    ("V016", "suspect", "the same, 64 streams", {"cpu_share": 0.099, "wait_share": 0.1014}),
    ("V017", "suspect", "a queue before the server's clock", {"row": {"client_ttft_s": 0.080}}),
    ("V018", "suspect", "preemptions", {"row": {"preemptions": 3.0}}),
    ("V019", "suspect", "a hot GPU", {"row": {"gpu_throttled": ["thermal (hardware)"]}}),
    ("V019", "info", "a GPU at its power cap", {"row": {"gpu_throttled": ["power cap"]}}),
    ("V019", "info", "a clock that moved under load", {"row": {"gpu_sm_hz": [1.2e9, 1.98e9]}}),
    ("V020", "suspect", "a CPU quota", {"row": {"throttled_s": 0.2}}),
    ("V021", "invalid", "a machine that slept", {"suspended_s": 4.0}),
    ("V021", "invalid", "a client that was stopped", {"lag_max_s": 2.5}),
    ("V021", "info", "a wall clock set back", {"wall_step_s": -3600.0}),
    ("V022", "suspect", "a pause of the collector", {"gc_max_s": 0.05}),
    ("V023", "suspect", "answers that came compressed", {"records": answers(notes="compressed")}),
    ("V023", "info", "streams without [DONE]", {"records": answers(notes="no_done")}),
    ("V024", "suspect", "stamps of another tool", {"row": {"imported": IMPORTED}}),
    ("V026", "info", "a run that was stopped", {"row": {"planned": 500, "not_sent": 100}}),
    ("V025", "suspect", "a file that was edited",
     {"row": {"imported": IMPORTED | {"differs": [{"figure": "ttft_s", "said": 0.03, "stamps": 0.05}]}}}),
]  # fmt: skip


@pytest.mark.parametrize(("code", "severity", "case", "evidence"), SPEAK, ids=[f"{c}: {w}" for c, _, w, _ in SPEAK])
def test_a_check_speaks(code: str, severity: str, case: str, evidence: dict[str, Any]) -> None:
    finding = found(**evidence)[code]
    assert finding.severity == severity
    assert finding.saw and finding.why and finding.do


@pytest.mark.parametrize(("code", "evidence"), [
    ("V001", {"lag_p99_s": 0.0005}),
    ("V001", {"lag_p99_s": 0.0011, "max_in_flight": 512}),
    ("V001", {"held": FIRST_TOKENS[:3]}),
    ("V001", {"held": [[at_s + 0.02, 0.0065] for at_s, _ in FIRST_TOKENS]}),
    ("V001", {"records": None, "held": [], "usual_s": None}),
    ("V015", {"row": {"server_ran_s": 2.0, "server_waited_s": 0.19}}),
    ("V015", {"row": {"server_ran_s": 0.1, "server_waited_s": 0.09}}),
    ("V015", {"row": {"server_ran_s": None, "server_waited_s": None}}),
    ("V016", {"cpu_share": 0.024, "wait_share": 0.0153}),
    ("V016", {"cpu_share": 0.096, "wait_share": 0.0433}),
    ("V016", {"cpu_share": 0.002, "wait_share": 0.004}),
    ("V016", {"wait_share": None}),
    ("V017", {"row": {"client_ttft_s": 0.055, "client_itl_s": 0.0115}}),
    ("V017", {"row": {"server_ttft_s": None, "server_itl_s": None}}),
    ("V020", {"row": {"throttled_s": None}}),
    ("V021", {"lag_max_s": 0.4, "wall_step_s": 0.3}),
    ("V026", {"row": {"planned": 400, "not_sent": 0}}),
    ("V026", {"row": {"planned": None, "not_sent": None}}),
], ids=str)  # fmt: skip
def test_a_check_holds_its_tongue(code: str, evidence: dict[str, Any]) -> None:
    assert code not in found(**evidence)


def test_what_a_slow_server_makes_small_is_let_pass() -> None:
    """0.4 ms of a TTFT of 50 ms is said; of 2 s with an ITL of 60 ms, neither that nor a lag of 5 ms."""
    slow = answers(chunk_s=(2 + 0.06 * np.arange(20)).astype(np.float32))
    held = {"usual_s": 0.0004, "lag_p99_s": 0.003}
    assert "V001" in found(answers(), **held | {"lag_p99_s": 0.0001})
    assert "V001" not in found(slow, **held)
    assert "V001" in found(slow, **held | {"lag_p99_s": 0.004})


def test_tokens_that_the_server_made_one_by_one_and_that_came_in_bursts_are_named_so() -> None:
    finding = found(row={"client_ttft_s": 0.24, "client_itl_s": 0.0001})["V017"]
    assert "burst" in finding.why and "TTFT" in finding.saw and "ITL" in finding.saw


def test_the_gravest_finding_comes_first_and_gives_the_verdict() -> None:
    records = answers(8)
    row = of_table(records, "wave", 4).row() | {"batch_size": 4} | BESIDE
    findings = run_checks(
        Evidence(
            row, of_table(records, "wave", 4, 350, 20), "wave", [QUIET | {"cpu_share": 0.99, "machine_cpu_share": 0.95}]
        )
    )
    assert [f.severity for f in findings] == ["invalid", "suspect", "info"]
    assert verdict(findings) == "invalid"


def test_absent_senses_are_said_to_be_absent() -> None:
    assert checks.absent_senses({"metrics": "vllm", "gpu": "NVIDIA H100"}) == []
    (finding,) = checks.absent_senses({"metrics": None, "gpu": "absent: no NVML"})
    assert (
        finding.severity == "info" and "no NVML" in finding.saw and "energy" in finding.why and "queue" in finding.why
    )


def test_the_readme_lists_every_code_and_no_other() -> None:
    source = "".join((ROOT / "harness" / name).read_text() for name in ("checks.py", "summary.py"))
    codes = set(re.findall(r'"([VR]\d{3})"', source))
    section = (ROOT / "README.md").read_text().split("## Findings")[1].split("\n## ")[0]
    assert set(re.findall(r"[VR]\d{3}", section)) == codes
    assert {code for code, *_ in SPEAK} == {code for code in codes if code.startswith("V")}
