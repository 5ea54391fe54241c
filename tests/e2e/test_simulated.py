"""The whole command against a server whose law is exactly stated."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, one_object

Run = Callable[..., "subprocess.CompletedProcess[str]"]
LAW = ("--ttft-base", "30ms", "--ttft-per-token", "0.1ms", "--itl-base", "4ms", "--itl-per-batch", "0.5ms")


def fast(url: str, *more: str) -> tuple[str, ...]:
    return ("run", "--url", url, "--output-tokens", "12", "--input-tokens", "64", "--no-report", *more)


@pytest.mark.full
def test_the_law_of_the_simulator_is_recovered(simulated: Callable[..., str], ridgeline: Run) -> None:
    """TTFT = a + b·prompt, ITL = c + d·batch: four constants from two prompt lengths and three batch sizes."""
    url = simulated(*LAW)
    points = {}
    for tokens in (100, 900):
        done = ridgeline("run", "--url", url, "--batch-sizes", "1,4,8", "--input-tokens", str(tokens), "--output-tokens",
                         "40", "--waves", "4", "--json", "--no-report")  # fmt: skip
        assert done.returncode == 0, done.stderr
        for point in one_object(done.stdout)["points"]:
            assert (point["errors"], point["input_tokens"], point["output_tokens"]) == (0, tokens, 40)
            points[tokens, point["batch_size"]] = point
    sizes = np.array([1, 4, 8])
    itl_ms = np.mean([[points[t, b]["itl_ms"]["p50"] for b in sizes] for t in (100, 900)], axis=0)
    d, c = np.polyfit(sizes, itl_ms, 1)
    ttft_ms = [np.mean([points[t, b]["ttft_ms"]["p50"] for b in sizes]) for t in (100, 900)]
    b = (ttft_ms[1] - ttft_ms[0]) / 800
    a = ttft_ms[0] - 100 * b
    assert a == pytest.approx(30, abs=1.5)
    assert b == pytest.approx(0.1, rel=0.03)
    assert c == pytest.approx(4, abs=0.3)
    assert d == pytest.approx(0.5, rel=0.1)


def test_a_closed_loop_ends_with_its_duration(simulated: Callable[..., str], ridgeline: Run) -> None:
    """Its plan has no end of its own: none is asked for more once the time is over."""
    done = ridgeline(*fast(simulated(*LAW), "--mode", "closed", "--batch-sizes", "2,4", "--duration", "0.5s", "--json"),
                     timeout=40)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(p["errors"] == 0 and p["requests"] >= p["batch_size"] for p in one_object(done.stdout)["points"])


def test_json_is_one_object_with_every_promised_figure(
    simulated: Callable[..., str], ridgeline: Run, tmp_path: Path
) -> None:
    done = ridgeline(*fast(simulated(*LAW), "--batch-sizes", "1,4", "--waves", "3", "--json"))
    assert done.returncode == 0, done.stderr
    found = one_object(done.stdout)
    assert {"run", "model", "engine", "points"} <= set(found)
    assert [(p["batch_size"], p["requests"], p["errors"]) for p in found["points"]] == [(1, 3, 0), (4, 12, 0)]
    for point in found["points"]:
        for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
            assert {"mean", "p50", "p90", "p95", "p99"} <= set(point[name])
        assert point["verdict"] in ("valid", "suspect", "invalid") and point["predicted"] is None
        assert point["output_tokens_per_s"] > 0 and point["requests_per_s"] > 0
    assert "no prediction" in json.dumps(found["findings"]) and "--hardware" in json.dumps(found["findings"])
    folder = tmp_path / found["run"]
    assert {"run.json", "summary.json", "requests.parquet", "journal.bin", "scenario.yaml"} <= {
        p.name for p in folder.iterdir()
    }


@pytest.mark.parametrize(
    ("serves", "told"),
    [
        ((), ("--model-config", str(ROOT / "scenarios" / "llama-3.1-8b.config.json"))),
        pytest.param((), ("--model-config", "Llama-3.1-8B"), marks=pytest.mark.full),
        (("--model", "meta-llama/Llama-3.1-8B-Instruct"), ()),
    ],
    ids=["by its configuration", "by a name of the catalogue", "by the name it is served under"],
)
def test_predictions_stand_beside_the_figures_when_model_and_hardware_are_named(
    simulated: Callable[..., str], ridgeline: Run, serves: tuple[str, ...], told: tuple[str, ...]
) -> None:
    done = ridgeline(*fast(simulated(*LAW, *serves), "--batch-sizes", "2", "--waves", "2", "--json",
                           "--hardware", "A100-SXM-80GB", *told))  # fmt: skip
    predicted = one_object(done.stdout)["points"][0]["predicted"]
    assert {"ttft_ms", "itl_ms", "e2e_ms", "output_tokens_per_s", "limit"} <= set(predicted)
    assert 5 < predicted["itl_ms"] < 20 and predicted["limit"] == "memory_bandwidth"


def test_a_split_that_the_model_cannot_have_is_said_and_the_figures_stand(
    simulated: Callable[..., str], ridgeline: Run, tmp_path: Path
) -> None:
    """The run is measured as any other; its theory says in one sentence why there is none, in the dry run too."""
    told = ("--batch-sizes", "2", "--hardware", "A100-SXM-80GB", "--model-config", "microsoft/phi-4")
    for tp, why in (
        ("3", "tp 3 must be at least 1 and divide the 40 heads"),
        ("4", "tp 4 must divide the 10 KV heads"),
    ):
        planned = ridgeline(*fast("127.0.0.1:9", *told, "--tp", tp, "--dry-run"))
        assert planned.returncode == 0 and planned.stdout.count(f"no prediction: {why}") == 1
    done = ridgeline(*fast(simulated(*LAW), *told, "--tp", "4", "--waves", "2", "--json"))
    found = one_object(done.stdout)
    assert done.returncode == 0 and found["points"][0]["errors"] == 0 and found["points"][0]["predicted"] is None
    said = [f for f in found["findings"] if f["saw"].startswith("no prediction")]
    assert [f["saw"] for f in said] == [
        "no prediction: tp 4 must divide the 10 KV heads of microsoft/phi-4 or be a multiple of them"
    ]
    assert ridgeline("report", found["run"], "-o", "page.html").returncode == 0
    assert "must divide the 10 KV heads" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("mode", [("--mode", "closed", "--batch-sizes", "4", "--requests", "20"),
                                  ("--rate", "40", "--arrivals", "constant", "--requests", "40")])  # fmt: skip
def test_closed_and_open_loop_keep_their_plan(
    mode: tuple[str, ...], simulated: Callable[..., str], ridgeline: Run
) -> None:
    done = ridgeline(*fast(simulated(*LAW), *mode, "--warmup", "0", "--json"))
    point = one_object(done.stdout)["points"][0]
    assert (point["requests"], point["errors"]) == (int(mode[-1]), 0)
    if mode[0] == "--mode":
        assert point["batch_ran"] is None or point["batch_ran"]["max"] <= 4


def test_the_report_of_a_run_is_rebuilt_from_its_folder(
    simulated: Callable[..., str], ridgeline: Run, tmp_path: Path
) -> None:
    found = one_object(ridgeline(*fast(simulated(*LAW), "--batch-sizes", "2", "--json")).stdout)
    done = ridgeline("report", found["run"], "-o", "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert "<h1" in page and "simulated" in page
    first = (tmp_path / "page.html").read_bytes()
    ridgeline("report", found["run"], "-o", "page.html")
    assert (tmp_path / "page.html").read_bytes() == first


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_no_server_there_is_one_line_and_code_6(ridgeline: Run, tmp_path: Path) -> None:
    done = ridgeline("run", "--url", f"127.0.0.1:{free_port()}")
    assert done.returncode == 6 and "is the server up" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert not list(tmp_path.glob("results/*"))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--model", "llama3"), 6, "no model 'llama3' there; served: simulated"),
        (("--hardware", "H1000"), 2, "hardware 'H1000' is not in the table"),
        (("--batch-sizes", "1,x"), 2, "--batch-sizes: got '1,x'"),
        (("--mode", "sideways"), 2, "workload.mode: got 'sideways'"),
        (("--api-key-env", "NO_SUCH_KEY"), 2, "NO_SUCH_KEY: this environment variable is not set"),
        (("--input-tokens", "3"), 2, "template alone has"),
        (("--tokenizer", "/nowhere"), 2, "tokenizer: /nowhere: no tokenizer.json"),
        (("--input-tokens", "100000"), 6, "context"),
    ],
)
def test_what_the_user_can_mend_is_one_line(arguments: tuple[str, ...], code: int, said: str,
                                            simulated: Callable[..., str], ridgeline: Run) -> None:  # fmt: skip
    done = ridgeline("run", "--url", simulated("--context-tokens", "4096", *LAW), *arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("row", "code", "said"),
    [
        ("{like: H100-SXM, name: ours}", 0, "predicted TTFT"),
        ("[{like: T4}, {like: A10}]", 2, "it has 2 rows"),
        ("{like: H1000}", 2, "mine.yaml"),
    ],
)
def test_a_hardware_row_of_ones_own_is_a_file(row: str, code: int, said: str, ridgeline: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(row)
    done = ridgeline("run", "--url", "127.0.0.1:9", "--dry-run", "--batch-sizes", "1", "--hardware", "mine.yaml",
                     "--model-config", "Llama-3.1-8B")  # fmt: skip
    assert done.returncode == code and said in done.stdout + done.stderr


def test_a_folder_that_holds_a_run_is_never_overwritten(simulated: Callable[..., str], ridgeline: Run) -> None:
    url = simulated(*LAW)
    assert ridgeline(*fast(url, "--batch-sizes", "1", "--out", "here")).returncode == 0
    again = ridgeline(*fast(url, "--batch-sizes", "1", "--out", "here"))
    assert again.returncode == 2 and "holds a run already" in again.stderr


def started(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "harness", *arguments], cwd=tmp_path, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)  # fmt: skip


def wait_for_records(folder: Path) -> None:
    for _ in range(200):
        if (folder / "journal.bin").exists() and (folder / "journal.bin").stat().st_size > 3000:
            return
        time.sleep(0.05)
    pytest.fail("no records came")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full)]
)
def test_a_signal_ends_the_run_with_a_partial_report(
    number: int, code: int, simulated: Callable[..., str], tmp_path: Path
) -> None:
    process = started(tmp_path, *fast(simulated(*LAW), "--batch-sizes", "2", "--waves", "500", "--out", "cut"))
    wait_for_records(tmp_path / "cut")
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == code, said
    assert "Traceback" not in said
    found = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert found["state"] == "interrupted"
    assert (tmp_path / "cut" / "requests.parquet").exists()
    (point,) = found["points"]
    assert point["planned"] == 1000 and 0 < point["requests"] == 1000 - point["not_sent"] < 1000
    told = f"1,000 requests were planned, {point['requests']} ended"
    assert told in found["findings"][0]["saw"] and told in {f["code"]: f["saw"] for f in point["findings"]}["V026"]


def test_errors_are_counted_by_class_and_set_the_exit_code(simulated: Callable[..., str], ridgeline: Run) -> None:
    url = simulated("--context-tokens", "128", *LAW)
    done = ridgeline(
        "run", "--url", url, "--input-tokens", "100", "--output-tokens", "500", "--batch-sizes", "1", "--json"
    )
    assert done.returncode == 6, done.stderr
    found = one_object(done.stdout)
    assert found["points"][0]["error_classes"] == {"context_length": 3}
    assert found["points"][0]["verdict"] == "invalid" and found["points"][0]["ttft_ms"]["mean"] is None


def test_help_and_version_are_quick_and_plain(ridgeline_anew: Run) -> None:
    for arguments in (["run", "--help"], ["--version"]):
        done = ridgeline_anew(*arguments)
        assert done.returncode == 0 and done.stdout and not done.stderr
    assert "ridgeline 0." in done.stdout
