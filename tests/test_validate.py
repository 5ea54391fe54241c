"""Predictions held against measurements, and calibrated on a few of them."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.records import RidgelineError
from harness.theory import calibrate, calibration, hardware, validate
from harness.theory.fit import least_squares
from harness.theory.roofline import Factors

TABLE = Path(__file__).parent / "data" / "measurements.csv"
MEASURED = validate.read(pd.read_csv(TABLE), "the table")
STATIC = MEASURED[MEASURED.kind == "static"]


def row(**given) -> pd.DataFrame:
    whole = {"model": "meta-llama/Meta-Llama-3-8B", "gpu": "H100-SXM-80GB", "kind": "static", "batch": 4, "isl": 256,
             "osl": 64, "ttft_ms": 20.0} | given  # fmt: skip
    return validate.read(pd.DataFrame([whole]), "the row")


def score(found: pd.DataFrame, **where) -> dict:
    scores = validate.scores(found)
    for column, value in where.items():
        scores = scores[scores[column] == value]
    assert len(scores) == 1
    return scores.iloc[0].to_dict()


# --- predictions ------------------------------------------------------------------------------------------------------


def test_public_measurements_are_predicted_within_the_floors():
    """theory.md: 18 % for static batches on one GPU, 20 % (TPOT) and 50 % (TTFT) under load."""
    found = validate.predictions(MEASURED)
    assert (found.reason == "").all()
    assert score(found, kind="static", gpus="all", model="all", metric="e2e_s")["mape"] < 18
    assert score(found, kind="load", gpus="all", model="all", metric="tpot_ms")["mape"] < 20
    assert score(found, kind="load", gpus="all", model="all", metric="ttft_ms")["mape"] < 50
    assert found.index.equals(MEASURED.index)


def test_each_prediction_lies_in_its_interval_and_within_its_bound():
    found = validate.predictions(MEASURED)
    for metric in ("ttft_ms", "tpot_ms", "e2e_s", "out_tps", "mem_gb"):
        value, low, high, bound = (
            found[c] for c in (f"pred_{metric}", f"pred_{metric}_low", f"pred_{metric}_high", f"bound_{metric}")
        )
        assert ((low <= value) & (value <= high)).all()
        assert ((value <= bound) if metric == "out_tps" else (value >= bound * 0.999)).all()


def test_tokens_of_all_requests_make_the_throughput():
    found = validate.predictions(STATIC)
    assert (found.pred_out_tps * found.pred_e2e_s / (found.batch * found.osl)).between(0.9, 1.1).all()
    assert np.allclose(found.pred_total_tps / found.pred_out_tps, (found.isl + found.osl) / found.osl)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"model": "nobody/unheard-of-9B"}, "unheard-of"),
        ({"gpu": "TurboChip-9000"}, "TurboChip-9000"),
        ({"osl": None}, "osl is missing"),
        ({"batch": None}, "batch is missing"),
        ({"gpu": "T4"}, "does not fit"),
        ({"weight_dtype": "fp5"}, "fp5"),
        ({"tp": 3}, "heads"),
        ({"isl": 1e12}, "must be from 0"),
    ],
)
def test_what_cannot_be_predicted_has_empty_cells_and_a_reason(given, reason):
    found = validate.predictions(row(**given)).iloc[0]
    assert reason in found.reason
    assert math.isnan(found.pred_ttft_ms)
    assert math.isnan(found.pred_out_tps)
    assert math.isnan(found.pred_mem_gb)


def test_one_bad_row_spoils_no_other():
    several = pd.concat([row(gpu="TurboChip-9000"), row(osl=1e15), row(batch=0), row()], ignore_index=True)
    found = validate.predictions(several)
    assert found.pred_ttft_ms.notna().tolist() == [False, False, False, True]
    assert (found.reason != "").tolist() == [True, True, True, False]


def test_without_input_tokens_only_what_hardly_depends_on_them_is_told():
    found = validate.predictions(row(isl=None, tpot_ms=8.0)).iloc[0]
    assert math.isnan(found.pred_ttft_ms)
    assert found.pred_tpot_ms > 0
    assert "isl is missing" in found.reason


@pytest.mark.parametrize("name", ["H100", "h100_sxm", "NVIDIA H100 80GB HBM3", "H100-SXM"])
def test_usual_names_of_a_gpu_are_understood(name):
    assert validate.case_of(row(gpu=name).iloc[0].to_dict()).hardware.name == "H100-SXM-80GB"


@pytest.mark.parametrize(
    ("given", "split"),
    [
        ({}, (1, 1, 1, 1)),
        ({"n_gpus": 8}, (8, 1, 1, 1)),
        ({"n_gpus": 8, "pp": 2}, (4, 2, 1, 1)),
        ({"n_gpus": 8, "tp": 4, "pp": 1}, (4, 1, 1, 2)),
        ({"n_gpus": 64, "tp": 64, "ep": 8}, (8, 1, 1, 1)),
        ({"n_gpus": 8, "tp": 1, "ep": 8}, (1, 1, 8, 1)),
        ({"n_gpus": 4, "tp": 4, "ep": 2}, (4, 1, 1, 1)),
    ],
)
def test_columns_tell_how_the_gpus_are_split(given, split):
    case = validate.case_of(row(model="Qwen/Qwen3-30B-A3B", **given).iloc[0].to_dict())
    assert (case.tp, case.pp, case.dp, case.replicas) == split


def test_as_much_as_the_memory_holds_needs_no_batch():
    found = validate.predictions(row(kind="offline max throughput", batch=None, out_tps=9000.0)).iloc[0]
    assert found.pred_out_tps > 1000


def test_a_measurement_faster_than_physics_is_counted():
    found = validate.predictions(row(ttft_ms=0.01))
    assert score(found, kind="static", gpus="one", model="dense", metric="ttft_ms")["faster_than_physics"] == 1
    assert (
        score(validate.predictions(row()), kind="static", gpus="one", model="dense", metric="ttft_ms")[
            "faster_than_physics"
        ]
        == 0
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"drop": "gpu"}, "'gpu' is missing"),
        ({"drop": "ttft_ms"}, "no measurement"),
        ({"batch": "many"}, "batch of data row 0 must be a number"),
    ],
)
def test_a_wrong_table_is_named(change, named):
    frame = pd.DataFrame([{"model": "m", "gpu": "g", "kind": "static", "batch": 1, "isl": 1, "osl": 1, "ttft_ms": 1.0}])
    frame = frame.drop(columns=change.pop("drop", [])).assign(**change)
    with pytest.raises(RidgelineError, match=named):
        validate.read(frame, "x.csv")


# --- fitting ----------------------------------------------------------------------------------------------------------


def test_least_squares_finds_a_curve_through_outliers():
    rng = np.random.default_rng(0)
    x = np.linspace(1, 10, 60)
    y = 3.0 * x**0.7 * np.exp(rng.normal(0, 0.01, 60))
    y[::10] *= 5
    found = least_squares(lambda p: np.log(np.exp(p[0]) * x ** p[1] / y), np.array([0.0, 1.0]), robust=0.05)
    assert np.exp(found[0]) == pytest.approx(3.0, rel=0.03)
    assert found[1] == pytest.approx(0.7, abs=0.02)


def test_least_squares_stays_within_its_limits():
    found = least_squares(lambda p: p - np.array([5.0, -5.0]), np.zeros(2), low=-1.0, high=2.0)
    assert found.tolist() == [2.0, -1.0]


def made_by(factors: Factors, kind: str = "static", **given) -> pd.DataFrame:
    """Cells of a server that is exactly what the model says, with these factors."""
    cells = pd.DataFrame(
        [{"batch": b, "isl": i, "osl": o} for b in (1, 8, 64) for i, o in ((128, 128), (2000, 50), (500, 1000))]
    )
    cells = cells.assign(model="meta-llama/Meta-Llama-3-8B", gpu="H100-SXM-80GB", kind=kind, tpot_ms=1.0, **given)
    cells = validate.read(cells, "made")
    law = calibration.Calibration("H100-SXM-80GB", ("meta-llama/Meta-Llama-3-8B",), 0, factors, 0.0)
    found = validate.predictions(cells, lambda _: law)
    return cells.assign(ttft_ms=found.pred_ttft_ms, tpot_ms=found.pred_tpot_ms)


def test_the_factors_of_a_made_server_are_found():
    truth = Factors(compute=1.3, bandwidth=1.1, kv=1.5, overhead=1.6)
    found = calibrate.calibrate(made_by(truth), "made")
    for name in ("compute", "bandwidth", "kv", "overhead"):
        assert getattr(found.factors, name) == pytest.approx(getattr(truth, name), rel=0.08), name
    assert found.spread < 0.01
    assert (found.factors.link, found.factors.queue) == (1.0, 1.0), "one GPU in static batches tells nothing of these"


def test_a_server_one_slot_short_is_found():
    found = calibrate.calibrate(made_by(Factors(slot=1.0), kind="concurrency"), "made")
    assert found.factors.slot == pytest.approx(1.0, abs=0.2)


def test_factors_that_no_cell_tells_of_stay_near_one():
    one = made_by(Factors(bandwidth=1.2)).iloc[:1]
    found = calibrate.calibrate(one, "one cell")
    assert 0.7 < found.factors.kv < 1.4
    assert found.factors.bandwidth > 1.01


def test_calibration_on_ten_cells_halves_the_error_on_the_others():
    part = STATIC[STATIC.model == "meta-llama/Meta-Llama-3-8B"]
    cells = calibrate.chosen(part)
    assert len(cells) == 10
    rest = part.drop(cells.index)
    fitted = calibrate.calibrate(cells, "cells")
    plain, better = (
        score(validate.predictions(rest, c), kind="static", gpus="one", model="dense", metric="e2e_s")["mape"]
        for c in (None, lambda _: fitted)
    )
    assert better < 7, "theory.md's floor on one GPU"
    assert better < plain


def test_it_carries_over_to_another_model_and_wider_to_other_hardware():
    fitted = calibrate.calibrate(STATIC[STATIC.model == "meta-llama/Llama-2-7b-hf"], "cells")
    other = STATIC[STATIC.model == "meta-llama/Meta-Llama-3-8B"]
    found = validate.predictions(other, lambda _: fitted)
    assert score(found, kind="static", gpus="one", model="dense", metric="e2e_s")["mape"] < 9, "theory.md's floor"
    here, there = hardware.find("H100-SXM-80GB"), hardware.find("A100-SXM-80GB")
    own, another = (validate.case_of(rows.iloc[0].to_dict()).model for rows in (STATIC, other))
    assert fitted.factors_for(own, here) == fitted.factors
    assert fitted.factors_for(another, here).bandwidth == fitted.factors.bandwidth, "the silicon's"
    carried = fitted.factors_for(own, there)
    assert carried.overhead == fitted.factors.overhead, "the software's"
    assert abs(math.log(carried.bandwidth)) == pytest.approx(abs(math.log(fitted.factors.bandwidth)) / 2)


def test_the_next_cell_is_one_that_was_not_measured():
    cells = made_by(Factors())
    cell = calibrate.calibrate(cells, "made").next_cell
    asked = {(r.batch, r.isl, r.osl) for r in cells.itertuples()}
    assert (cell["batch"], cell["input_tokens"], cell["output_tokens"]) not in asked
    assert cell["doubt"] > 0


def test_a_calibration_survives_its_file():
    fitted = calibrate.calibrate(STATIC.iloc[:10], "cells")
    assert calibration.from_dict(json.loads(json.dumps(fitted.as_dict())), "x") == fitted


@pytest.mark.parametrize(
    ("change", "named"),
    [({"factors": {"speed": 1}}, "factors"), ({"factors": {"kv": -1}}, "kv"), ({"hardware": 3}, "hardware"), ({"ridgeline_calibration": 2}, "no calibration")],
)  # fmt: skip
def test_a_wrong_calibration_is_named(change, named):
    data = calibrate.calibrate(STATIC.iloc[:3], "cells").as_dict() | change
    with pytest.raises(RidgelineError, match=named):
        calibration.from_dict(data, "file")


def test_cells_of_several_gpus_are_no_server():
    mixed = pd.concat([row(), row(gpu="A100-SXM-80GB")], ignore_index=True)
    with pytest.raises(RidgelineError, match="several kinds"):
        calibrate.calibrate(mixed, "mixed")


# --- the commands -----------------------------------------------------------------------------------------------------


def test_validate_writes_each_prediction_beside_its_row(ridgeline, tmp_path):
    zipped = tmp_path / "table.csv.gz"
    zipped.write_bytes(gzip.compress(TABLE.read_bytes()))
    done = ridgeline("validate", str(zipped), "--out", "preds.csv", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["rows"] == said["predicted"] == len(MEASURED)
    written = pd.read_csv(tmp_path / "preds.csv")
    assert len(written) == len(MEASURED)
    for metric in ("ttft_ms", "tpot_ms", "e2e_s", "out_tps", "mem_gb"):
        assert written[f"pred_{metric}"].between(written[f"pred_{metric}_low"], written[f"pred_{metric}_high"]).all()


@pytest.mark.parametrize("cells", ["10", "isl=128,kind=static", "FILE"])
def test_validate_calibrates_first(ridgeline, tmp_path, cells):
    (tmp_path / "cells.csv").write_text(STATIC.iloc[::5].to_csv(index=False))
    done = ridgeline("validate", str(TABLE), "--calibrate-on", cells.replace("FILE", "cells.csv"), "--json")
    assert done.returncode == 0, done.stderr
    groups = json.loads(done.stdout)["groups"]
    static = next(g for g in groups if (g["kind"], g["gpus"], g["metric"]) == ("static", "one", "e2e_s"))
    assert static["mape"] < 9
    assert static["n"] == {"10": 21, "FILE": 41}.get(cells, static["n"])


def test_calibrate_writes_what_predict_uses(ridgeline, tmp_path):
    (tmp_path / "cells.csv").write_text(STATIC.iloc[:10].to_csv(index=False))
    done = ridgeline("calibrate", "cells.csv", "-o", "mine.json")
    assert done.returncode == 0, done.stderr
    assert "measure next: batch" in done.stdout
    ask = ("predict", "--model", "meta-llama/Meta-Llama-3-8B", "--hardware", "H100-SXM", "--batch-sizes", "8", "--json")
    plain, mine = (json.loads(ridgeline(*ask, *more).stdout) for more in ((), ("--calibration", "mine.json")))
    a, b = (said["predictions"][0]["points"][0]["itl_s"] for said in (plain, mine))
    assert a["value"] != b["value"]
    assert (b["high"] - b["low"]) / b["value"] < (a["high"] - a["low"]) / a["value"], "measured cells make it surer"


def test_predict_says_what_does_not_fit(ridgeline):
    done = ridgeline("predict", "--model", "meta-llama/Llama-3.1-8B", "--hardware", "T4,A10,A100-SXM-80GB,H100-SXM",
                     "--batch-sizes", "1,8,32", "--input-tokens", "350", "--output-tokens", "150")  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("does not fit" in line for line in lines) == 3
    assert sum(line.startswith(("A10", "H100")) for line in lines) == 9


def test_predict_tells_all_in_json(ridgeline):
    done = ridgeline("predict", "--model", "mistralai/Mixtral-8x7B-v0.1", "--hardware", "H100-SXM", "--tp", "2,3", "--dtype",
                     "bf16,fp8", "--mode", "closed", "--batch-sizes", "4", "--json")  # fmt: skip
    parts = json.loads(done.stdout)["predictions"]
    assert [bool(p.get("reason")) for p in parts] == [False, True, False, True], "3 does not divide the heads"
    found = parts[0]["points"][0]
    assert set(found["itl_s"]) == {"value", "low", "high", "bound", "limit", "terms", "because"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("predict", "--model", "nobody/none", "--hardware", "T4"), "nobody/none"),
        (("predict", "--model", "meta-llama/Llama-3.1-8B", "--hardware", "T9"), "T9"),
        (("predict", "--model", "meta-llama/Llama-3.1-8B", "--hardware", "H100-SXM", "--batch-sizes", "0"), "batch"),
        (
            ("predict", "--model", "meta-llama/Llama-3.1-8B", "--hardware", "H100-SXM", "--calibration", "none.json"),
            "none.json",
        ),
        (("validate", "none.csv"), "none.csv"),
        (("validate", str(TABLE), "--calibrate-on", "colour=red"), "colour"),
        (("calibrate", "none.csv", "-o", "x.json"), "none.csv"),
    ],
)
def test_what_makes_no_sense_is_one_line(ridgeline, arguments, named):
    done = ridgeline(*arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_another_models_calibration_is_less_sure():
    fitted = calibrate.calibrate(STATIC[STATIC.model == "meta-llama/Llama-2-7b-hf"].iloc[:10], "cells")
    case = validate.case_of(STATIC.iloc[0].to_dict())
    other = hardware.find("A100-SXM-80GB")
    assert [fitted.closeness(replace(case.model, name=n), h) for n, h in (
        (case.model.name, case.hardware), ("another", case.hardware), (case.model.name, other))] == ["same", "model", "hardware"]  # fmt: skip
    assert asdict(fitted.factors_for(case.model, other)) != asdict(fitted.factors)


@pytest.mark.full
def test_a_run_is_calibrated_on_and_reported_with_it(ridgeline, simulated, tmp_path):
    """A simulated server: TTFT = 40 ms + 0.1 ms a token, ITL = 12 ms + 0.5 ms a sequence."""
    url = simulated("--ttft-base", "40ms", "--ttft-per-token", "0.1ms", "--itl-base", "12ms", "--itl-per-batch", "0.5ms",
                    "--slots", "8")  # fmt: skip
    ask = ("--url", url, "--model-config", "meta-llama/Llama-3.1-8B", "--hardware", "H100-SXM", "--input-tokens", "100",
           "--output-tokens", "20", "--waves", "1", "--warmup", "1", "--quiet", "--json")  # fmt: skip
    first = ridgeline("run", *ask, "--batch-sizes", "1,2,4", "--out", "first")
    assert first.returncode == 0, first.stderr
    done = ridgeline("calibrate", "first", "--batch-sizes", "1,2", "-o", "mine.json")
    assert done.returncode == 0, done.stderr
    assert calibration.from_dict(json.loads((tmp_path / "mine.json").read_text()), "x").cells == 2
    again = ridgeline("run", *ask, "--batch-sizes", "4", "--calibration", "mine.json", "--out", "second")
    assert again.returncode == 0, again.stderr
    (plain,), (told,) = (
        [p["predicted"] for p in json.loads(done.stdout)["points"]]
        for done in (ridgeline("run", *ask, "--batch-sizes", "4", "--out", "third"), again)
    )
    off = [abs(math.log(p["ratio"]["itl"])) for p in (plain, told)]
    assert off[1] < 0.5 * off[0], "batch sizes 1 and 2 tell of 4"
    none = ridgeline("calibrate", "first", "--batch-sizes", "64", "-o", "none.json")
    assert none.returncode == 2 and "no valid point" in none.stderr
    page = ridgeline("report", "second", "-o", "page.html", "--calibration", "mine.json")
    assert page.returncode == 0, page.stderr
    # The machine of a run is not the one that makes the report: its row stays, unless another is asked for.
    kept = json.loads((tmp_path / "second" / "run.json").read_text())
    kept["theory"]["hardware"] |= {"name": "where it ran", "measured": True}
    (tmp_path / "second" / "run.json").write_text(json.dumps(kept))
    for options, name in ((("--calibration", "mine.json"), "where it ran"), (("--hardware", "L4"), "L4")):
        assert ridgeline("report", "second", "-o", "page.html", *options).returncode == 0
        theory = json.loads((tmp_path / "second" / "run.json").read_text())["theory"]
        assert theory["hardware"]["name"] == name and theory["calibration"]["cells"] == 2
    known = (tmp_path / "second" / "run.json").read_text()
    for option in ("--hardware", "--model-config"):
        typo = ridgeline("report", "second", "-o", "page.html", option, "Nope-1")
        assert typo.returncode == 2 and "'Nope-1' is not in" in typo.stderr and len(typo.stderr.splitlines()) == 1
        assert (tmp_path / "second" / "run.json").read_text() == known
    # A run that was cut off before theory saw it is not predicted for whatever machine reports it.
    there = json.loads(known)
    there["scenario"]["theory"]["hardware"] = "machine"
    there["machine"]["cpu"] = "another CPU"
    del there["theory"]
    (tmp_path / "second" / "run.json").write_text(json.dumps(there))
    elsewhere = ridgeline("report", "second", "-o", "page.html")
    inputs = json.loads((tmp_path / "second" / "run.json").read_text())["theory"]
    assert elsewhere.returncode == 0 and inputs["hardware"] is None and inputs["model"]
    assert "another machine (another CPU)" in inputs["missing"][0]["saw"]
    early = ridgeline("run", "--url", url, "--hardware", "Nope-1", "--out", "unmade")
    assert early.returncode == 2 and "'Nope-1' is not in" in early.stderr and not (tmp_path / "unmade").exists()
