"""Spellings of dtypes and accelerators as tables of measurements have them, and what is refused."""

from __future__ import annotations

import pandas as pd
import pytest

from harness.records import RidgelineError
from harness.theory import catalogue, dtypes, frameworks, hardware, validate


@pytest.mark.parametrize(
    ("names", "ours"),
    [
        ("float16 torch.float16 half FP16 f16 q0f16", "fp16"),
        ("bfloat16 BF16 bf16/fp16 16bit", "bf16"),
        ("fp8_e4m3 float8_e4m3fn e5m2 fp8-dynamic w8a8_fp8 fp8_w8a8 FP8_BLOCK mxfp8", "fp8"),
        ("INT8 w8a8 W8A8_int8 int8_w8a8 smoothquant", "int8"),
        ("w8a16 GPTQ-Int8 bnb_int8 llm.int8 int8_wo eetq 8-bit", "w8a16"),
        ("w4a16 AWQ AWQ-INT4 int4_awq gptq GPTQ-Int4 gptq-4bit 4bit uint4 q4f16_1 gptq_marlin", "int4"),
        ("NF4 bnb_nf4 bnb-4bit bitsandbytes", "nf4"),
        ("mxfp4 MXFP4 fp4", "fp4"),
        ("nvfp4 NVFP4 w4a4", "nvfp4"),
        ("Q4_K_M q4_k_m gguf_q4_k_m Q4 ud-q4_k_xl", "q4_k_m"),
        ("Q8_0 q8_0 Q8", "q8_0"),
        ("fp32 float32 tf32", "fp32"),
    ],
)
def test_spellings_of_a_dtype(names, ours):
    assert {name: dtypes.dtype_named(name) for name in names.split()} == dict.fromkeys(names.split(), ours)


@pytest.mark.parametrize("name", ["", "fp", "int", "q9_z", "fast", "qq4_0", "w99a99", "bf1"])
def test_a_dtype_that_is_none_is_refused(name):
    with pytest.raises(RidgelineError, match="is not known; use one of fp32"):
        dtypes.dtype_named(name)


def test_what_a_table_leaves_open_is_no_dtype():
    assert [dtypes.stated(name) for name in (None, "", "?", "auto", "NaN", "none")] == [None] * 6


@pytest.mark.parametrize(
    ("names", "row"),
    [
        ("V100-SXM2-16GB|v100-16gb", "V100-SXM2-16GB"),
        ("Tesla V100-PCIE-16GB", "V100-PCIe-16GB"),
        ("8xH100|H100x8|8x H100 SXM|DGX H100|H100-SXM-80GB (700W)|h100_sxm|H100 x8", "H100-SXM-80GB"),
        ("A100-SXM-80GB @330W|a100_sxm|nvidia-a100-80gb|4xA100|A100 80 GB|A100-80G|A100 80G", "A100-SXM-80GB"),
        ("RTX4090|4090|GeForce RTX 4090|RTX 4090 24G|GTX 4090", "RTX-4090"),
        ("A10G|NVIDIA A10G 24GB", "A10G"),
        ("MI250X x8|8x MI250X", "MI250X"),
        ("MI300Xx8|AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GB10 (DGX Spark)|DGX Spark", "GB10"),
        ("GH200", "GH200-96GB"),
        ("gb200_sxm|GB200 NVL72", "GB200"),
        ("A800|A800-80GB", "A800-SXM-80GB"),
        ("Apple M2 Max|M2 Max", "Apple-M2-Max-38c"),
    ],
)
def test_accelerators_as_tables_name_them(names, row):
    assert {name: hardware.usual(name).name for name in names.split("|")} == dict.fromkeys(names.split("|"), row)


@pytest.mark.parametrize("name", ["RTX 4090 Laptop", "A1000", "H1000", "L4S", "x8", "(700W)"])
def test_another_accelerator_is_not_taken_for_a_known_one(name):
    with pytest.raises(RidgelineError, match="is not in the table"):
        hardware.usual(name)


@pytest.mark.parametrize(
    ("name", "dtype", "bits"),
    [("Qwen2.5-72B-Instruct-GPTQ-Int8", "int8", 8.19), ("Llama-3.1-8B-Instruct-AWQ-INT4", "int4", 4.16),
     ("Meta-Llama-3.1-8B-Instruct-bnb-4bit", "int4", 4.5), ("Meta-Llama-3-8B-Instruct.Q4_K_M.gguf", "q4_k_m", 4.89),
     ("vicuna-7b-v1.5-awq-gemm", "int4", 4.16), ("Yi-6B-Chat-4bits", "int4", 4.16), ("Llama-3.1-8B-FP4-v2", "nvfp4", 4.5),
     ("Mistral-7B-Instruct-AWQ-v0.2", "int4", 4.16), ("Llama 3.1 8B (MXFP4)", "fp4", 4.25), ("Llama 3.1 8B (FP8)", "fp8", 8)],
)  # fmt: skip
def test_a_name_tells_how_the_weights_are_stored(name, dtype, bits):
    model = catalogue.find(name)
    assert model.dtype == dtype
    assert model.bytes_by_part()["ffn"] * 8 / model.params_by_part["ffn"] == pytest.approx(bits, abs=0.01)


def test_mxfp4_in_the_name_of_gpt_oss_says_what_its_configuration_does():
    own = catalogue.find("openai/gpt-oss-120b").stored_bytes
    assert all(catalogue.find(name).stored_bytes == own for name in ("gpt-oss-120b-MXFP4", "gptoss-120b-MXFP4"))
    assert catalogue.find("gpt-j-6b-MXFP4").dtype == "fp4"


def test_a_gguf_of_llama_3_1_has_the_published_size():
    """Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf has 4.92 GB, Q8_0 8.54, on the Hugging Face hub."""
    model = catalogue.find("Llama-3.1-8B")
    assert model.weight_bytes("q4_k_m") / 1e9 == pytest.approx(4.92, rel=0.01)
    assert model.weight_bytes("q8_0") / 1e9 == pytest.approx(8.54, rel=0.01)


ROW = {
    "model": "Llama-3.1-8B",
    "gpu": "RTX-4090",
    "kind": "static",
    "batch": 1,
    "isl": 128,
    "osl": 128,
    "tpot_ms": 10.0,
}


def test_every_dtype_is_predicted_and_fewer_bits_are_faster():
    rows = [ROW | {"weight_dtype": d, "framework": "llama.cpp"} for d in ("fp16", "Q8_0", "Q4_K_M", "iq2_xs", "?")]
    found = validate.predictions(validate.read(pd.DataFrame(rows), "rows"))
    assert list(found.reason) == [""] * 5
    assert found.pred_tpot_ms.iloc[:4].is_monotonic_decreasing
    assert found.pred_tpot_ms.iloc[4] == pytest.approx(found.pred_tpot_ms.iloc[0], rel=0.02)


def test_an_unknown_dtype_gets_a_reason_and_empty_cells():
    rows = [ROW | {"weight_dtype": "q9_z"}, ROW | {"kv_dtype": "q9_z"}, ROW | {"gpu": "RTX 4090 Laptop"}]
    found = validate.predictions(validate.read(pd.DataFrame(rows), "rows"))
    assert found.pred_tpot_ms.isna().all() and found.pred_e2e_s_high.isna().all()
    assert all("'q9_z' is not known" in text for text in found.reason[:2])
    assert "not in the table" in found.reason[2]


def test_a_release_tells_what_a_framework_does():
    h100 = hardware.find("H100-SXM")
    old, new = (frameworks.find(f"vLLM {release}", h100, offline=True).step_s for release in ("0.6.3", "0.11.0"))
    assert old > new == frameworks.find("vllm", h100).step_s
    assert frameworks.find("transformers 4.36", h100).all_logits
    assert not frameworks.find("transformers 4.46+flash-attn2", h100).all_logits
    assert frameworks.release("llama.cpp (May 2024)") is None


def test_a_framework_that_is_not_known_is_refused_with_those_that_are():
    assert [frameworks.stated(n) for n in ("vLLM 0.11", "generic", "", None)] == ["vLLM 0.11", "generic", "", None]
    with pytest.raises(RidgelineError, match=r"framework 'vlm' is not known; use one of .*sglang.*vllm"):
        frameworks.stated("vlm")


def test_what_a_framework_runs_on_is_not_taken_for_it():
    named = {name: frameworks.named(name) for name in ("transformers GPTQ exllamav2", "ctransformers", "NIM 1.8.0 (TensorRT-LLM)",
             "TGI AWQ", "Triton+FasterTransformer", "torchao/gpt-fast", "unheard of", "HF transformers", "llamafile", "sarathi-serve", "DeepSpeed-FastGen", "vllm-habana", "optimum-habana")}  # fmt: skip
    assert list(named.values()) == ["transformers", "llama.cpp", "tensorrt-llm", "vllm", "fastertransformer", "gpt-fast",
                                    "generic", "transformers", "llama.cpp", "vllm", "deepspeed", "vllm", "compiled"]  # fmt: skip


def test_an_engines_arguments_are_part_of_its_name():
    command = ["/opt/eager/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "x", "--enforce-eager"]
    assert frameworks.of_engine("vllm", command) == "vllm --enforce-eager"
    assert frameworks.of_engine("vllm", command[:-1]) == "vllm" and frameworks.of_engine(None, command) is None
    for other in ("--no-enforce-eager", "--disable-cuda-graph-padding", "--model=mine-eager"):
        assert frameworks.of_engine("sglang", [other]) == "sglang"
    cores = hardware.find("EPYC-9654")
    assert frameworks.find("vllm --enforce-eager", cores) == frameworks.find("vllm", cores), "which launches nothing"
