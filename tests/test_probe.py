"""Pages of real servers -> one vocabulary; samples -> figures; and the whole command beside a server that tells the truth."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import probe, server
from harness.senses import Watch
from harness.served import Served, listening
from tests.conftest import one_object

PAGES = {
    "vllm": """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0",model_name="m"} 4.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1",model_name="m"} 6.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="m"} 10.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 10.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 1.5
""",
    "llama.cpp": """# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 5
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 1
# TYPE llamacpp:tokens_predicted_total counter
llamacpp:tokens_predicted_total 70
""",
    "sglang": """# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m"} 5.0
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{model_name="m"} 1.0
# TYPE sglang:token_usage gauge
sglang:token_usage{model_name="m"} 0.5
# TYPE sglang:num_retracted_requests_total counter
sglang:num_retracted_requests_total{model_name="m"} 4.0
# TYPE sglang:time_to_first_token_seconds histogram
sglang:time_to_first_token_seconds_sum{model_name="m"} 1.5
sglang:time_to_first_token_seconds_bucket{le="0.1",model_name="m"} 6.0
sglang:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 10.0
sglang:time_to_first_token_seconds_count{model_name="m"} 10.0
""",
    "tgi": """# TYPE tgi_batch_current_size gauge
tgi_batch_current_size 5
# TYPE tgi_queue_size gauge
tgi_queue_size 1
# TYPE tgi_request_generated_tokens histogram
tgi_request_generated_tokens_bucket{le="+Inf"} 2
tgi_request_generated_tokens_sum 70
tgi_request_generated_tokens_count 2
""",
    "tensorrt-llm": """# TYPE trtllm_num_requests_running gauge
trtllm_num_requests_running{engine_type="trtllm",model_name="m"} 5.0
# TYPE trtllm_num_requests_waiting gauge
trtllm_num_requests_waiting{engine_type="trtllm",model_name="m"} 1.0
# TYPE trtllm_kv_cache_utilization gauge
trtllm_kv_cache_utilization{engine_type="trtllm",model_name="m"} 0.5
# TYPE trtllm_time_to_first_token_seconds histogram
trtllm_time_to_first_token_seconds_bucket{engine_type="trtllm",le="+Inf",model_name="m"} 10.0
trtllm_time_to_first_token_seconds_count{engine_type="trtllm",model_name="m"} 10.0
trtllm_time_to_first_token_seconds_sum{engine_type="trtllm",model_name="m"} 1.5
""",
}
TOLD = {
    "running": 5,
    "waiting": 1,
    "kv_use": 0.5,
    "preemptions": 4,
    "ttft_sum_s": 1.5,
    "ttft_count": 10,
    "generation_tokens": 70,
}
TELLS = {"vllm": 6, "llama.cpp": 3, "sglang": 6, "tgi": 3, "tensorrt-llm": 5}


@pytest.mark.parametrize("kind", PAGES)
def test_each_server_speaks_our_vocabulary_and_what_it_does_not_tell_is_absent(kind: str) -> None:
    values = server.read_metrics(PAGES[kind])
    assert server.senses([values | {"at_s": 0.0}])["metrics"] == kind
    names = values.pop("names")
    assert set(names) == set(values) and len(values) == TELLS[kind]
    assert values == {name: TOLD[name] for name in values}


@pytest.mark.parametrize("text", ["", "<html>", '{"iter": 1}', "# TYPE x counter\nx_total 1\n"])
def test_other_pages_tell_nothing(text: str) -> None:
    assert server.read_metrics(text) == {}


def test_a_page_cut_short_tells_what_it_holds() -> None:
    assert server.read_metrics(PAGES["vllm"][:300])["running"] == 5


def counter(at_s: float, value: float) -> dict[str, float]:
    return {"at_s": at_s, "preemptions": value}


def test_a_counter_rises_within_the_spans_alone() -> None:
    samples = [counter(0, 10), counter(1.9, 12), counter(4.1, 17), counter(6, 99), counter(8, 100), counter(10.2, 103)]
    assert server.rise(samples, [(2, 4)], "preemptions") == 5
    assert server.rise(samples, [(2, 4), (8.5, 10)], "preemptions") == 8
    assert server.rise(samples, [(2, 4)], "cache_hits") is None
    assert server.rise([counter(1, 5), counter(5, 0)], [(2, 4)], "preemptions") is None  # the server started anew


def gpu(at_s: float, **values: float) -> dict[str, object]:
    return {"at_s": at_s, "gpu": {"0": values, "1": values}}


def test_joules_come_from_the_energy_counter_or_from_the_power() -> None:
    counted = [gpu(0, energy_j=100, power_w=1), gpu(10, energy_j=1100, power_w=1)]
    figures = server.point_figures(counted, [(0, 10)], 500)
    assert (figures["gpu_energy_j"], figures["gpu_power_w"], figures["joules_per_output_token"]) == (2000, 200, 4)
    figures = server.point_figures([gpu(1, power_w=150), gpu(2, power_w=250)], [(0, 10)], 0)
    assert (figures["gpu_energy_j"], figures["gpu_power_w"], figures["joules_per_output_token"]) == (4000, 400, None)
    assert server.point_figures([{"at_s": 1.0}], [(0, 10)], 500)["gpu_energy_j"] is None


def test_throttling_and_clocks_count_under_load_only() -> None:
    samples = [gpu(1, sm_hz=2.1e8, use=0.0, reasons=0x01), gpu(2, sm_hz=1.9e9, use=0.9, reasons=0x04),
               gpu(3, sm_hz=1.5e9, use=0.9, reasons=0x60)]  # fmt: skip
    figures = server.point_figures(samples, [(0, 10)], 500)
    assert figures["gpu_sm_hz"] == [1.5e9, 1.9e9]
    assert figures["gpu_throttled"] == ["power cap", "thermal (hardware)", "thermal (software)"]


@pytest.mark.parametrize(("version", "line", "stat"), [
    ("v2", "0::/a/b\n", "usage_usec 9\nnr_throttled 2\nthrottled_usec 1500000\n"),
    ("v1", "4:memory:/x\n3:cpu:/a/b\n0::/\n", "nr_periods 4\nnr_throttled 2\nthrottled_time 1500000000\n"),
])  # fmt: skip
def test_throttling_by_a_quota_is_read_from_the_group_or_the_one_above(
    version: str, line: str, stat: str, tmp_path: Path
) -> None:
    group = tmp_path / ("" if version == "v2" else "cpu") / "a"
    (group / "b").mkdir(parents=True)
    (group / "cpu.stat").write_text(stat)
    (tmp_path / "self").write_text(line)
    assert probe.throttled_s(tmp_path, tmp_path / "self") == pytest.approx(1.5)
    assert probe.throttled_s(tmp_path / "none", tmp_path / "self") is None


def test_without_nvml_the_gpus_are_said_to_be_absent() -> None:
    assert probe.Gpus(False).about.startswith("absent: the server is on another machine")
    gpus = probe.Gpus(True)
    assert gpus.handles or gpus.about.startswith("absent: ")


def test_the_watch_knows_when_it_did_not_run() -> None:
    watch = Watch()
    os.sched_yield()
    noticed = watch.stop()
    assert noticed["wait_share"] is None or 0 <= noticed["wait_share"] <= 1.5
    assert noticed["wall_step_s"] == 0 and noticed["suspended_s"] < 0.5


LAW = ("--ttft-base", "30ms", "--itl-base", "4ms", "--itl-per-batch", "0.5ms")


def test_the_servers_own_figures_stand_beside_ours(simulated: Callable[..., str], ridgeline: Callable[..., object],
                                                   tmp_path: Path) -> None:  # fmt: skip
    url = simulated(*LAW)
    (pid,) = listening(int(url.rpartition(":")[2]))
    assert "harness.simulator" in Path(f"/proc/{pid}/cmdline").read_text()
    done = ridgeline("run", "--url", url, "--batch-sizes", "1,4", "--input-tokens", "64", "--output-tokens", "60",
                     "--waves", "3", "--json", "--no-report")  # fmt: skip
    said = one_object(done.stdout)  # type: ignore[attr-defined]
    for point in said["points"]:
        size = point["batch_size"]
        assert point["server_ttft_ms"] == pytest.approx(30, abs=5)
        assert point["server_itl_ms"] == pytest.approx(4 + 0.5 * size, abs=0.5)
        assert point["batch_ran"]["max"] == size
        assert (point["preemptions"], point["waiting_max"]) == (0, 0)
        assert 0 < point["server_ran_s"] < point["requests"] * point["e2e_ms"]["mean"] / 1e3 / size + 1
        assert point["server_waited_s"] >= 0
        assert point["joules_per_output_token"] is None or point["joules_per_output_token"] > 0
    run = json.loads((tmp_path / said["run"] / "run.json").read_text())
    assert run["senses"]["metrics"] == "vllm" and run["senses"]["host"] == "psutil"
    if str(run["senses"]["gpu"]).startswith("absent"):
        assert any(f["code"] == "R006" and "GPU" in f["saw"] for f in said["findings"])


@pytest.mark.parametrize("same", [True, False])
def test_cache_hits_are_flagged_where_there_are_any(same: bool, simulated: Callable[..., str],
                                                    ridgeline: Callable[..., object]) -> None:  # fmt: skip
    done = ridgeline("run", "--url", simulated(*LAW, "--prefix-cache"), "--batch-sizes", "2", "--input-tokens", "64",
                     "--output-tokens", "8", "--waves", "3", "--json", "--no-report", *(["--same-prompt"] if same else []))  # fmt: skip
    (point,) = one_object(done.stdout)["points"]  # type: ignore[attr-defined]
    assert (point["cache_share"] > 0.5) == same
    assert [f["severity"] for f in point["findings"] if f["code"] == "V007"] == (["info"] if same else [])


def test_of_a_server_in_our_own_process_or_none_nothing_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as here:
        port = here.getsockname()[1]
        assert listening(port) == set()
    assert listening(port) == set()
    assert Served(set()).read() == {}
    assert Served({2**22 + 1}).read() == {}  # no process has it: beyond the kernel's largest


def test_a_thread_that_computes_has_run_since_the_first_reading() -> None:
    served = Served({os.getpid()})
    assert served.read() == {"ran_s": 0.0, "waited_s": 0.0}
    until_s = time.process_time() + 0.05
    while time.process_time() < until_s:
        pass
    assert 0.04 < served.read()["ran_s"] < 1.0
