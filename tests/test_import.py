"""Real results of three tools, imported: their figures as they printed them, ours from their stamps, nothing invented."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import command, definitions, foreign, importing, store
from harness.records import RidgelineError
from tests.conftest import one_object

DATA = Path(__file__).parent / "data" / "import"
FILES = {
    "vllm-detailed": "vllm-detailed.json",
    "vllm": "vllm.json",
    "vllm-chat": "vllm-chat.json",
    "guidellm": "guidellm.json",
    "aiperf": "aiperf",
    "vllm on vLLM": "vllm-cpu/vllm.json",
    "guidellm on vLLM": "vllm-cpu/guidellm.json",
    "aiperf on vLLM": "vllm-cpu/aiperf",
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}
NO_THEORY: dict[str, Any] = {}


def imported(tmp_path: Path, *paths: Path, name: str = "run") -> tuple[dict[str, Any], store.Run]:
    """Summary and run of an import."""
    folder = importing.write(paths, NO_THEORY, ["ridgeline", "import"], str(tmp_path / name), tmp_path)
    return command.summarise(folder), store.load(folder)


def compared(run: store.Run, tool: str) -> list[dict[str, Any]]:
    return definitions.compare(tool, run.run, run.blocks)


# --- what the tools printed ---------------------------------------------------------------------------------------

Printed = list[tuple[str, str, str, float]]  # figure, statistic, as printed, in the printed unit per second


def vllm_printed(text: str) -> Printed:
    names = {"TTFT": "ttft_s", "TPOT": "tpot_s", "ITL": "itl_s", "E2EL": "e2e_s"}
    found: Printed = [
        (names[name], "p50" if stat == "Median" else stat.lower(), value, 1e3)
        for stat, name, value in re.findall(r"(Mean|Median|P\d+) (TTFT|TPOT|ITL|E2EL) \(ms\): +([\d.]+)", text)
    ]
    for label, key in (("Output token throughput", "output_tokens_per_s"), ("Total token throughput", "total_tokens_per_s"),
                       ("Request throughput", "requests_per_s")):  # fmt: skip
        found.append((key, "", re.findall(rf"{label} \(\S+\): +([\d.]+)", text)[0], 1.0))
    return found


def guidellm_printed(text: str, streams: int) -> Printed:
    latency, rates = (re.findall(rf"\| concurrent@{streams} (.*)\|", text)[i] for i in (0, 1))
    cells = [re.findall(r"\d+\.\d+", cell)[0] for cell in latency.strip("| ").split("|")]
    layout = [("e2e_s", 1.0), ("ttft_s", 1e3), ("", 1e3), ("itl_s", 1e3), ("tpot_s", 1e3)]
    found: Printed = [
        (key, stat, cells[3 * i + j], scale)
        for i, (key, scale) in enumerate(layout)
        for j, stat in enumerate(("mean", "p50", "p95"))
        if key
    ]
    told = [cell.strip() for cell in rates.strip("| ").split("|")]
    keys = {2: "requests_per_s", 4: "output_tokens_per_s", 5: "total_tokens_per_s"}
    return found + [(key, "", told[i], 1.0) for i, key in keys.items()]


def aiperf_printed(text: str) -> Printed:
    rows = {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if len(cells := [c.strip() for c in line.strip("│┃").split("│")]) == 8
    }
    found: Printed = [
        (key, stat, rows[label][at].replace(",", ""), 1e3)
        for label, key in (("Time to First Token (ms)", "ttft_s"), ("Inter Token Latency (ms)", "itl_s"),
                           ("Request Latency (ms)", "e2e_s"))
        for at, stat in ((0, "mean"), (3, "p99"), (4, "p90"), (5, "p50"))
    ]  # fmt: skip
    rates = (
        ("Output Token Throughput (tokens/sec)", "output_tokens_per_s"),
        ("Request Throughput (requests/sec)", "requests_per_s"),
    )
    return found + [(key, "", rows[label][0].replace(",", ""), 1.0) for label, key in rates]


PRINTED: dict[str, Callable[[], list[Printed]]] = {
    "vllm-detailed": lambda: [vllm_printed((DATA / "vllm-detailed.txt").read_text())],
    "vllm": lambda: [vllm_printed((DATA / "vllm.txt").read_text())],
    "vllm-chat": lambda: [vllm_printed((DATA / "vllm-chat.txt").read_text())],
    "guidellm": lambda: [guidellm_printed((DATA / "guidellm.txt").read_text(), n) for n in (2, 4)],
    "aiperf": lambda: [aiperf_printed((DATA / "aiperf" / "printed.txt").read_text())],
    "vllm on vLLM": lambda: [vllm_printed((DATA / "vllm-cpu" / "vllm.txt").read_text())],
    "guidellm on vLLM": lambda: [guidellm_printed((DATA / "vllm-cpu" / "guidellm.txt").read_text(), 4)],
    "aiperf on vLLM": lambda: [aiperf_printed((DATA / "vllm-cpu" / "aiperf" / "printed.txt").read_text())],
}


@pytest.mark.parametrize("name", FILES)
def test_imported_figures_are_those_that_the_tool_printed(name: str, tmp_path: Path) -> None:
    summary, run = imported(tmp_path, DATA / FILES[name])
    tool = summary["points"][0]["imported"]["tool"]
    points, tables = compared(run, tool), PRINTED[name]()
    assert len(points) == len(tables)
    n = 0
    for point, printed in zip(points, tables, strict=True):
        for key, stat, text, scale in printed:
            value = point["theirs"][key][stat] if stat else point["theirs"][key]
            assert f"{value * scale:.{len(text.partition('.')[2])}f}" == text, (key, stat)
            n += 1
    assert n >= 11


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"vllm"}))
def test_their_stamps_under_their_formulas_give_their_figures_again(name: str, tmp_path: Path) -> None:
    """From requests.parquet, not from what the tool said.  guidellm takes percentiles by rank: means there."""
    summary, run = imported(tmp_path, DATA / FILES[name])
    for point in summary["points"]:
        about = point["imported"]
        assert about["detailed"] and about["differs"] == []
        mask = run.records.point == point["point"]
        again = definitions.figures(about["tool"], run.records.where(mask), "closed", point["batch_size"])
        for key in definitions.TIMES:
            if about["said"][key]:
                for stat in ("mean",) if about["tool"] == "guidellm" else ("mean", "p50", "p90", "p95", "p99"):
                    assert again[key][stat] == pytest.approx(about["said"][key][stat], rel=2e-5), (key, stat)


@pytest.mark.parametrize("name", ["vllm-detailed", "guidellm", "aiperf"])
def test_each_request_has_its_own_time_and_failures_are_counted(name: str, tmp_path: Path) -> None:
    summary, run = imported(tmp_path, DATA / FILES[name])
    records = run.records
    assert len(set(records.id.tolist())) == len(records)
    for point in summary["points"]:
        mine = records.where((records.point == point["point"]) & ~records.warmup)
        said = point["imported"]["said"]
        assert (len(mine), int((~mine.ok).sum())) == (said["requests"], said["errors"])
        assert point["errors"] == said["errors"] > 0 and set(point["error_classes"]) == {"failed_elsewhere"}
        assert all("400" in text or "Bad Request" in text for text in mine.error[~mine.ok])
        good = mine.where(mine.ok)
        assert (
            records.where(records.point == point["point"]).sent_s.min() == 0
            and (good.last_token_s <= good.end_s + 1e-6).all()
            and (good.output_tokens == 20).all()
        )
        # 50 ms and 10 ms were true, and the machine was busy
        assert 0.049 < point["ttft_s"]["mean"] < 0.09 and 0.009 < point["itl_s"]["mean"] < 0.012


def test_warm_up_of_aiperf_is_in_no_figure(tmp_path: Path) -> None:
    summary, run = imported(tmp_path, DATA / "aiperf")
    assert int(run.records.warmup.sum()) == 2
    assert summary["points"][0]["requests"] == 24


def test_a_file_without_requests_gives_what_it_says_and_no_more(tmp_path: Path) -> None:
    summary, run = imported(tmp_path, DATA / "vllm.json")
    (point,) = summary["points"]
    told = json.loads((DATA / "vllm.json").read_text())
    assert len(run.records) == 0 and not (run.folder / store.PARQUET).exists()
    assert point["ttft_s"]["p99"] == pytest.approx(told["p99_ttft_ms"] / 1e3)
    assert point["ttft_s"]["low"] is None and point["ttft_scheduled_s"]["mean"] is None
    assert (point["requests"], point["errors"], point["output_tokens"]) == (24, 2, 20)
    assert "all figures are as it printed them" in findings(point)["V024"]
    shutil.copy(DATA / "aiperf" / "profile_export_aiperf.json", tmp_path / "alone.json")
    (point,) = imported(tmp_path, tmp_path / "alone.json", name="other")[0]["points"]
    assert not point["imported"]["detailed"] and point["batch_size"] == 4
    assert point["tpot_s"]["mean"] == pytest.approx(0.00997, rel=1e-3)


def findings(point: dict[str, Any]) -> dict[str, str]:
    return {f["code"]: f["saw"] for f in point["findings"]}


def test_records_of_aiperf_alone_tell_the_batch_by_their_times_and_no_version(tmp_path: Path) -> None:
    shutil.copy(DATA / "aiperf" / "profile_export.jsonl", tmp_path / "alone.jsonl")
    summary, run = imported(tmp_path, tmp_path / "alone.jsonl")
    (point,) = summary["points"]
    assert point["batch_size"] == 4 and "version not in its file" in findings(point)["V024"]
    assert run.run["versions"] == {"aiperf": "unknown"} and point["ttft_s"]["n"] == 18
    whole = imported(tmp_path, DATA / "aiperf", name="whole")[0]["points"][0]
    assert point["ttft_s"] == whole["ttft_s"] and point["itl_s"] == whole["itl_s"]


def test_both_halves_of_aiperf_are_one_point_however_they_are_named(tmp_path: Path) -> None:
    halves = [DATA / "aiperf" / name for name in ("profile_export.jsonl", "profile_export_aiperf.json")]
    whole = imported(tmp_path, DATA / "aiperf", name="folder")[0]["points"]
    for i, paths in enumerate((halves[:1], halves[1:], halves)):
        summary, run = imported(tmp_path, *paths, name=str(i))
        assert json.dumps(summary["points"]) == json.dumps(whole)
        assert [file["name"] for file in run.run["imported"]["files"]] == [path.name for path in halves]


def test_what_lies_between_guidellms_first_and_last_token_is_missing(tmp_path: Path) -> None:
    summary, run = imported(tmp_path, DATA / "guidellm.json")
    for point, theirs in zip(summary["points"], compared(run, "guidellm"), strict=True):
        said = theirs["theirs"]
        assert point["itl_s"]["mean"] == pytest.approx(said["itl_s"]["mean"])
        assert point["itl_s"]["p99"] is None and point["chunk_gap_s"]["mean"] is None
        assert point["tpot_s"]["mean"] < 0.9 * said["tpot_s"]["mean"]  # theirs holds TTFT
        assert point["output_tokens_per_s"] == pytest.approx(said["output_tokens_per_s"])
        assert point["requests_per_s"] is not None and point["total_tokens_per_s"] is None  # theirs count what failed
        assert not {"V008", "V009"} & findings(point).keys()
        assert "ITL" in findings(point)["V024"] and "output tokens/s" in findings(point)["V024"]
    for other in ("vllm", "sglang"):  # whose figures need every event
        assert math.isnan(compared(run, other)[0]["theirs"]["itl_s"]["mean"])


def test_events_without_a_token_make_no_time_between_tokens(tmp_path: Path) -> None:
    """In a chat, vllm's stamps are also of a role chunk and a finish reason: which ones is not in the file."""
    (point,) = imported(tmp_path, DATA / "vllm-chat.json")[0]["points"]
    said = point["imported"]["said"]
    assert said["itl_s"]["mean"] < 0.97 * said["tpot_s"]["mean"]
    assert point["itl_s"]["mean"] == pytest.approx(said["tpot_s"]["mean"]) and point["itl_s"]["p50"] is None


def test_every_imported_point_says_whose_stamps_these_are(tmp_path: Path) -> None:
    for name, file in FILES.items():
        summary, run = imported(tmp_path, DATA / file, name=name)
        assert summary["verdict"] == "suspect"
        for point in summary["points"]:
            assert (
                point["verdict"] == "suspect"
                and f"imported from {point['imported']['name']}" in findings(point)["V024"]
            )
            assert "V025" not in findings(point)
        about = run.run["imported"]
        assert about["from"] in findings(point)["V024"] and all(len(file["sha256"]) == 64 for file in about["files"])
        assert "machine" not in run.run  # this one is not where it was measured
    assert run.run["versions"] == {"aiperf": "0.13.0"}


def test_a_password_in_the_servers_address_is_not_kept(tmp_path: Path) -> None:
    data = json.loads((DATA / "guidellm.json").read_text())
    data["config"]["spec"]["backend"] |= {"target": "http://user:hunter22@127.0.0.1:8124", "api_key": "sk-hunter22"}
    (tmp_path / "file.json").write_text(json.dumps(data))
    _, run = imported(tmp_path, tmp_path / "file.json")
    assert run.run["imported"]["url"] == "http://127.0.0.1:8124"
    assert not any(b"hunter22" in file.read_bytes() for file in run.folder.iterdir())


def test_a_file_that_was_edited_contradicts_itself(tmp_path: Path) -> None:
    data = json.loads((DATA / "vllm-detailed.json").read_text())
    data["mean_ttft_ms"] *= 0.5
    (tmp_path / "edited.json").write_text(json.dumps(data))
    (point,) = imported(tmp_path, tmp_path / "edited.json")[0]["points"]
    assert "TTFT" in findings(point)["V025"] and "ITL" not in findings(point)["V025"]


def test_files_of_one_tool_are_the_points_of_one_run(tmp_path: Path) -> None:
    summary, run = imported(tmp_path, DATA / "vllm-detailed.json", DATA / "vllm.json", DATA / "vllm.json")
    assert [(p["point"], p["batch_size"], p["imported"]["detailed"]) for p in summary["points"]] == [
        (0, 2, False),
        (1, 4, True),
    ]
    assert run.run["scenario"]["workload"]["batch_sizes"] == [2, 4]
    lines = tmp_path / "appended.json"  # as --append-result writes them
    lines.write_text("".join((DATA / name).read_text() for name in ("vllm.json", "vllm-detailed.json")))
    assert [p["batch_size"] for p in imported(tmp_path, lines, name="lines")[0]["points"]] == [2, 4]


def test_an_open_loop_is_a_rate(tmp_path: Path) -> None:
    data = json.loads((DATA / "vllm-detailed.json").read_text()) | {"request_rate": 7.5}
    (tmp_path / "open.json").write_text(json.dumps(data))
    (point,) = imported(tmp_path, tmp_path / "open.json")[0]["points"]
    assert (point["batch_size"], point["rate"]) == (None, 7.5)
    with pytest.raises(RidgelineError, match="kinds of load"):
        imported(tmp_path, tmp_path / "open.json", DATA / "vllm.json", name="mixed")


def test_a_sample_of_the_requests_is_not_taken_for_all(tmp_path: Path) -> None:
    data = json.loads((DATA / "guidellm.json").read_text())
    del data["benchmarks"][0]["requests"]["successful"][3:]
    (tmp_path / "sample.json").write_text(json.dumps(data))
    points = imported(tmp_path, tmp_path / "sample.json")[0]["points"]
    assert [p["imported"]["detailed"] for p in points] == [False, True]
    assert points[0]["requests"] == 12 and points[0]["ttft_s"]["mean"] == pytest.approx(0.0536, abs=1e-4)


def test_zeros_that_a_tool_writes_for_nothing_are_missing(tmp_path: Path) -> None:
    data = json.loads((DATA / "vllm.json").read_text())
    data |= {key: 0.0 for key in data if re.match(r"(mean|median|p\d+|std)_itl_ms", key)}  # answers of one token
    (tmp_path / "short.json").write_text(json.dumps(data))
    (point,) = imported(tmp_path, tmp_path / "short.json")[0]["points"]
    assert point["imported"]["said"]["itl_s"]["mean"] is None and point["chunk_gap_s"]["mean"] is None
    data = json.loads((DATA / "guidellm.json").read_text())
    for spread in ("time_to_first_token_ms", "inter_token_latency_ms"):  # no answer streamed
        empty = data["benchmarks"][0]["metrics"][spread]["successful"]
        empty |= {"mean": 0.0, "count": 0, "percentiles": dict.fromkeys(empty["percentiles"], 0.0)}
    (load, _) = foreign.loads(json.dumps(data), "file")
    assert math.isnan(load.said["ttft_s"]["p50"]) and load.said["e2e_s"]["p50"] > 0.2


def test_gaps_of_bundled_tokens_are_not_times_between_tokens() -> None:
    said = {"itl_s": {"mean": 0.04, "p99": 0.05}, "tpot_s": {"mean": 0.01, "p99": 0.012}, "ttft_s": {}, "e2e_s": {}}
    found = foreign.comparable("vllm", said)
    assert found["itl_s"] == {"mean": 0.01, "n": 0} and found["chunk_gap_s"] == said["itl_s"]
    assert foreign.comparable("vllm", said | {"tpot_s": {"mean": 0.0399}})["itl_s"] == said["itl_s"]


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_makes_a_run_with_theory_and_a_report(ridgeline: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    done = ridgeline(
        "import", str(DATA / "guidellm.json"), "--out", "run", "--hardware", "L4", "--model-config", "config.json"
    )
    assert done.returncode == 0, done.stderr
    assert "batch 2" in done.stdout and "V003" in done.stdout and "report: run/report.html" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for point in summary["points"]:
        assert point["predicted"]["ratio"]["itl_s"] == pytest.approx(
            point["itl_s"]["mean"] / point["predicted"]["itl_s"]["value"]
        )
    page = (tmp_path / "run" / "report.html").read_text()
    assert "as guidellm 0.8.1 said" in page and "As that tool printed them" in page and "V024" in page
    again = ridgeline("report", "run", "--definitions", "aiperf", "-o", "page.html")
    assert again.returncode == 0 and "as aiperf 0.13.0 reckons" in (tmp_path / "page.html").read_text()
    said = one_object(ridgeline("definitions", "run", "--as", "guidellm", "--json").stdout)
    assert said["points"][0]["theirs"]["ttft_ms"]["mean"] == pytest.approx(53.6, abs=0.05)
    assert ridgeline("verify", "run").returncode == 0
    assert "holds a run already" in ridgeline("import", str(DATA / "vllm.json"), "--out", "run").stderr


WRONG = {
    "empty": ("", "is empty"),
    "text": ("TTFT 50 ms\n", "neither JSON nor JSON lines"),
    "cut": ((DATA / "vllm.json").read_text()[:500], "neither JSON"),
    "other": ('{"mean_ttft_ms": 5}', "no result of vllm bench serve"),
    "list": ("[1, 2]", "no result of"),
    "deep": ("[" * 100_000, "neither JSON"),
    "number": ("7", "no result of"),
    "old-guidellm": ('{"metadata": {}, "benchmarks": [{"type_": "x"}]}', "lacks 'config'"),
    "no-benchmark": ('{"metadata": {}, "benchmarks": [], "config": {"spec": {"backend": {}}}}', "holds no benchmark"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_result_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(WRONG[name][0])
    with pytest.raises(RidgelineError, match=re.escape(WRONG[name][1])) as refused:
        imported(tmp_path, path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_missing_files_and_mixed_tools_are_refused(tmp_path: Path) -> None:
    for paths, said in (((tmp_path / "none.json",), "No such file"), ((tmp_path,), "folder without aiperf"),
                        ((DATA / "vllm.json", DATA / "guidellm.json"), "several tools")):  # fmt: skip
        with pytest.raises(RidgelineError, match=said):
            imported(tmp_path, *paths)


@pytest.mark.parametrize("name", ["vllm-detailed.json", "guidellm.json", "aiperf/profile_export.jsonl"])
@pytest.mark.parametrize("junk", [None, "x", -1, [], {}, True])
@pytest.mark.parametrize("most", [4, pytest.param(60, marks=pytest.mark.full)])
def test_a_value_of_another_kind_is_refused_or_missing_but_never_a_traceback(
    name: str, junk: Any, most: int, tmp_path: Path
) -> None:
    """One key of the file after the other is replaced, at every depth down to a request."""
    text = (DATA / name).read_text()
    value = json.loads(text.splitlines()[3] if name.endswith("jsonl") else text)
    places = list(paths_of(value))
    for path in places[:: max(1, len(places) // most)]:
        broken = json.loads(json.dumps(value))
        inner = broken
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = junk
        file = tmp_path / "broken.json"
        file.write_text(json.dumps(broken))
        try:
            imported(tmp_path, file, name="run")
        except RidgelineError as problem:
            assert "broken.json" in str(problem) or "imported files" in str(problem)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def paths_of(value: Any, depth: int = 6) -> Any:
    if depth and isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(min(len(value), 2)):
            yield (key,)
            yield from ((key, *rest) for rest in paths_of(value[key], depth - 1))
