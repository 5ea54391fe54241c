"""Another predictor's figures beside ours: the real package where it is installed, one sentence where it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
from typer.testing import CliRunner

from harness import cli

installed = pytest.mark.skipif(find_spec("aiconfigurator") is None, reason="aiconfigurator is not installed")
ASK = ["predict", "--output-tokens", "16", "--predictor", "aiconfigurator"]


def asked(*options: str) -> str:
    result = CliRunner().invoke(cli.app, [*ASK, *options])
    assert result.exit_code == 0, result.output
    return result.output


@installed
def test_its_figures_stand_beside_ours(tmp_path):
    page = tmp_path / "page.html"
    options = ["--model", "Llama-2-7B", "--hardware", "H100-SXM", "--batch-sizes", "1,8", "--framework", "vllm"]
    found = json.loads(asked(*options, "--json", "--report", str(page)))["predictions"][0]
    assert found["other"]["name"].startswith("aiconfigurator 0.")
    assert "vllm" in found["other"]["name"]
    for point in found["points"]:
        for metric in ("ttft_s", "itl_s", "output_tokens_per_s"):
            assert 1 / 3 < point["other"][metric] / point[metric]["value"] < 3, "the same units, the same model"
    assert found["points"][1]["other"]["output_tokens_per_s"] > found["points"][0]["other"]["output_tokens_per_s"]
    text = page.read_text()
    assert "Beside another predictor" in text
    assert found["other"]["name"] in text
    assert "aiconfigurator: TTFT, ITL, tokens/s" in asked(*options)


@installed
@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--model", "Llama-2-7B", "--hardware", "A10"], "aiconfigurator has no measurements of A10"),
        (["--model", "gpt2", "--hardware", "H100-SXM"], "aiconfigurator has no model of the architecture 'gpt2'"),
        (["--model", "Llama-2-7B", "--hardware", "H100-SXM", "--rate", "1"], "aiconfigurator has no open load"),
        (
            ["--model", "Llama-2-7B", "--hardware", "A100-SXM-80GB", "--dtype", "fp8"],
            "aiconfigurator: missing system flops",
        ),
        (["--model", "Llama-2-7B", "--hardware", "H100-SXM", "--framework", "llama.cpp"], "no figures for llama.cpp"),
    ],
)
def test_what_it_does_not_know_has_a_reason_and_no_figure(options, why):
    output = asked(*options, "--batch-sizes", "1", "--json")
    (found,) = json.loads(output)["predictions"]
    assert why in found["other"]["reason"]
    assert set(found["points"][0]["other"].values()) == {None}
    assert found["points"][0]["ttft_s"]["value"] > 0, "ours stands"
    assert why in asked(*options, "--batch-sizes", "1")


def test_where_it_is_absent_one_sentence_says_so():
    code = "import sys; sys.modules['aiconfigurator'] = None; from harness.cli import main; main()"  # Python's way to have none
    options = ["--model", "Llama-2-7B", "--hardware", "H100-SXM"]
    done = subprocess.run([sys.executable, "-c", code, *ASK, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "pip install 'ridgeline[aiconfigurator]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_another_name_is_refused():
    result = CliRunner().invoke(cli.app, [*ASK[:-1], "oracle", "--model", "Llama-2-7B", "--hardware", "H100-SXM"])
    assert "--predictor must be aiconfigurator" in str(result.exception or result.output)
