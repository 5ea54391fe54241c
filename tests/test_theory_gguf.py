"""GGUF headers: real ones are read exactly, cut and hostile ones are refused in one sentence."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import command, models
from harness.records import RidgelineError
from harness.theory import catalogue, gguf
from harness.theory.architecture import from_config, from_gguf
from harness.theory.hardware import find
from harness.theory.predict import predict

U32, STRING, ARRAY = 4, 8, 9
F32, Q4_1, Q6_K = 0, 3, 14


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, value: object) -> bytes:
    if isinstance(value, str):
        return text(key) + struct.pack("<I", STRING) + text(value)
    if isinstance(value, list):
        body = b"".join(text(v) if isinstance(v, str) else struct.pack("<I", v) for v in value)
        return text(key) + struct.pack("<IIQ", ARRAY, STRING if isinstance(value[0], str) else U32, len(value)) + body
    return text(key) + struct.pack("<II", U32, value)


def header(metadata: dict, tensors: list, version: int = 3) -> bytes:
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    out += b"".join(entry(key, value) for key, value in metadata.items())
    for name, shape, kind in tensors:
        out += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        out += struct.pack("<IQ", kind, 0)
    return out


def smollm2(layers: int = 30) -> tuple[dict, list]:
    """The header of SmolLM2-135M-Instruct.Q4_1.gguf in its essentials."""
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.embedding_length": 576,
        "llama.feed_forward_length": 1536,
        "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": 3,
        "llama.context_length": 8192,
        "tokenizer.ggml.tokens": [f"token {i}" for i in range(5000)],
        "tokenizer.ggml.token_type": [1] * 5000,
    }
    tensors = [("token_embd.weight", (576, 49152), Q4_1), ("output_norm.weight", (576,), F32)]
    for i in range(layers):
        shapes = {
            "attn_norm": (576,),
            "attn_q": (576, 576),
            "attn_k": (576, 192),
            "attn_v": (576, 192),
            "attn_output": (576, 576),
            "ffn_norm": (576,),
            "ffn_gate": (576, 1536),
            "ffn_up": (576, 1536),
            "ffn_down": (1536, 576),
        }
        tensors += [(f"blk.{i}.{n}.weight", s, F32 if len(s) == 1 else Q4_1) for n, s in shapes.items()]
    return metadata, tensors


def read(data: bytes):
    return gguf.read(io.BytesIO(data))


def test_parameters_and_bytes_are_those_of_the_tensors():
    model = from_gguf(*read(header(*smollm2())))
    assert model.params == 134_515_008
    norms = model.params_by_part["norms"]
    assert model.weight_bytes() == (134_515_008 - norms) / 32 * 20 + norms * 4
    assert model.read_bytes() == model.weight_bytes(), "tied: the embedding is the lm_head"
    assert (model.dtype, model.layers, model.kv_bytes_per_token()) == ("q4_1", 30, 2 * 2 * 30 * 3 * 64)


def test_long_arrays_are_passed_over_and_short_ones_kept():
    metadata, _ = read(header({"long": ["x"] * 5000, "short": [1, 2, 3]}, []))
    assert metadata == {"long": gguf.Elided(5000), "short": [1, 2, 3]}


def test_a_block_is_counted_whole():
    assert gguf.tensor_bytes((33,), Q4_1) == 40
    assert gguf.tensor_bytes((256, 2), Q6_K) == 420


def test_an_untied_output_is_the_lm_head_and_rope_constants_are_no_parameters():
    metadata, tensors = smollm2(2)
    tensors += [("output.weight", (576, 49152), Q6_K), ("rope_freqs.weight", (32,), F32)]
    model = from_gguf(metadata, tensors)
    assert not model.tied and model.head_dtype == "q6_k"
    assert model.params_by_part["lm_head"] == 576 * 49152
    assert model.bytes_by_part()["lm_head"] == 576 * 49152 // 256 * 210
    assert model.read_bytes() == model.weight_bytes() - model.bytes_by_part()["embedding"]


def test_heads_may_differ_by_layer():
    metadata, tensors = smollm2(3)
    metadata["llama.attention.head_count_kv"] = [3, 1, 3]
    model = from_gguf(metadata, tensors)
    assert [(g.count, g.kv_heads) for g in model.groups] == [(2, 3), (1, 1)]


def as_gguf(config: dict, arch: str, metadata: dict, layer: list[dict], tied: bool) -> tuple[dict, list]:
    """A header with these tensors of each layer; the configuration gives what every file has."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    named = {
        "block_count": len(layer),
        "embedding_length": hidden,
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
    }
    tensors = [("token_embd.weight", (hidden, vocab), F32), ("output_norm.weight", (hidden,), F32)]
    tensors += [] if tied else [("output.weight", (hidden, vocab), F32)]
    for i, shapes in enumerate(layer):
        tensors += [(f"blk.{i}.{name}", shape, F32) for name, shape in shapes.items()]
    return {"general.architecture": arch, **{f"{arch}.{k}": v for k, v in (named | metadata).items()}}, tensors


def both(id: str) -> tuple[dict, object]:
    entry = next(e for e in catalogue.entries() if e.id == id)
    return entry.config, from_config({k: v for k, v in entry.config.items() if k != "quantization_config"})


def test_experts_in_a_gguf_are_those_of_the_configuration():
    config, model = both("openai/gpt-oss-20b")
    h, f, e, q, kv = 2880, 2880, 32, 4096, 512
    layer = {"attn_norm.weight": (h,), "post_attention_norm.weight": (h,), "attn_sinks.weight": (64,)}
    for name, n in (("q", q), ("k", kv), ("v", kv)):
        layer |= {f"attn_{name}.weight": (h, n), f"attn_{name}.bias": (n,)}
    layer |= {"attn_output.weight": (q, h), "attn_output.bias": (h,)}
    layer |= {"ffn_gate_inp.weight": (h, e), "ffn_gate_inp.bias": (e,)}
    layer |= {f"ffn_{n}_exps.{end}": (*shape, e) for n in ("gate", "up") for end, shape in
              {"weight": (h, f), "bias": (f,)}.items()} | {"ffn_down_exps.weight": (f, h, e), "ffn_down_exps.bias": (h, e)}  # fmt: skip
    metadata = {"expert_count": e, "expert_used_count": 4, "attention.sliding_window": 128, "attention.key_length": 64}
    found = from_gguf(*as_gguf(config, "gpt-oss", metadata, [layer] * 24, tied=False))
    assert found.params_by_part == model.params_by_part
    assert found.active_params == model.active_params
    assert found.matmul_flops_per_token == model.matmul_flops_per_token
    assert found.kv_bytes(1000.0) == model.kv_bytes(1000.0)
    share = found.bytes_by_part()["experts"]
    assert found.weight_bytes() - found.read_bytes() == pytest.approx(
        share * 28 / 32 + found.bytes_by_part()["embedding"]
    )


@pytest.mark.parametrize("split", [False, True], ids=["older files", "newer files"])
def test_latent_attention_in_a_gguf_is_that_of_the_configuration(split):
    config, model = both("deepseek-ai/DeepSeek-V2-Lite")
    h, heads, rank, rope, nope, value, e, f = 2048, 16, 512, 64, 128, 128, 64, 1408
    attention = {
        "attn_norm.weight": (h,),
        "ffn_norm.weight": (h,),
        "attn_q.weight": (h, heads * (nope + rope)),
        "attn_kv_a_mqa.weight": (h, rank + rope),
        "attn_kv_a_norm.weight": (rank,),
        "attn_output.weight": (heads * value, h),
    }
    if split:
        attention |= {"attn_k_b.weight": (nope, rank, heads), "attn_v_b.weight": (rank, value, heads)}
        widths = {"key_length": rank + rope, "value_length": rank, "key_length_mla": 192, "value_length_mla": 128}
    else:
        attention |= {"attn_kv_b.weight": (rank, heads * (nope + value))}
        widths = {"key_length": nope + rope, "value_length": value}
    dense = {"ffn_gate.weight": (h, 10944), "ffn_up.weight": (h, 10944), "ffn_down.weight": (10944, h)}
    routed = {"ffn_gate_inp.weight": (h, e)}
    routed |= {f"ffn_{n}_exps.weight": (h, f, e) for n in ("gate", "up", "down")}
    routed |= {f"ffn_{n}_shexp.weight": (h, 2 * f) for n in ("gate", "up", "down")}
    metadata = {f"attention.{k}": v for k, v in widths.items()} | {
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": rope,
        "expert_count": e,
        "expert_used_count": 6,
    }
    layers = [attention | dense] + [attention | routed] * 26
    found = from_gguf(*as_gguf(config, "deepseek2", metadata, layers, tied=False))
    assert found.params_by_part == model.params_by_part
    assert found.groups == model.groups


def test_experts_that_do_not_divide_are_refused():
    metadata, tensors = smollm2(2)
    experts = [("blk.0.ffn_up_exps.weight", (576, 100, 3), F32), ("blk.1.ffn_up_exps.weight", (576, 100, 3), F32)]
    with pytest.raises(RidgelineError, match="expert_count 0"):
        from_gguf(metadata, tensors + experts)
    with pytest.raises(RidgelineError, match="expert_count 7"):
        from_gguf(metadata | {"llama.expert_count": 7, "llama.expert_used_count": 2}, tensors + experts)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"general.architecture": "mamba"}, "mamba"),
        ({"general.architecture": 7}, "architecture"),
        ({"llama.expert_count": 2, "llama.expert_used_count": 4}, "expert_used_count"),
        ({"llama.block_count": 4}, "block_count"),
        ({"llama.embedding_length": 577}, "embedding_length"),
        ({"llama.attention.head_count": "nine"}, "head_count"),
        ({"split.count": 2}, "split"),
    ],
)
def test_a_header_that_is_not_covered_or_contradicts_itself_is_refused(change, named):
    metadata, tensors = smollm2(2)
    with pytest.raises(RidgelineError, match=named):
        from_gguf(metadata | change, tensors)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "ends inside"),
        (b"GGML" + bytes(100), "does not begin"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "number of tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "number of metadata"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "length of the key"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<I", 99), "value type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1), "array"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", ARRAY, U32, 2**40), "length"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", ARRAY, 10, 2**25), "larger"),
        (header({}, [("t", (2**40, 2**40), F32)]), "values"),
        (header({}, [("t", (1,), 1234)]), "type 1234"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("t") + struct.pack("<I", 2**31), "dimensions"),
    ],
)
def test_a_hostile_header_is_refused_before_it_is_believed(data, named):
    with pytest.raises(RidgelineError, match=named):
        read(data)


WHOLE = header(*smollm2(2))


@settings(deadline=None)  # a busy machine is no bug
@given(st.integers(0, len(WHOLE) - 1))
def test_a_cut_file_is_refused(length):
    with pytest.raises(RidgelineError):
        read(WHOLE[:length])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_file_is_read_or_refused_in_one_sentence(changes):
    data = bytearray(WHOLE)
    for position, value in changes:
        data[position] = value
    try:
        from_gguf(*read(bytes(data)))
    except RidgelineError as error:
        assert str(error)


def test_a_gguf_is_loaded_from_the_disk_by_itself_or_in_its_folder(tmp_path):
    file = tmp_path / "smollm2.Q4_1.gguf"
    file.write_bytes(WHOLE)
    assert models.load(file).name == models.load(tmp_path).name == "smollm2.Q4_1"
    (tmp_path / "other.gguf").write_bytes(WHOLE)
    with pytest.raises(RidgelineError, match="name one"):
        models.load(tmp_path)


@pytest.mark.skipif("RIDGELINE_TEST_GGUF" not in os.environ, reason="RIDGELINE_TEST_GGUF names no SmolLM2-135M file")
def test_the_real_file_of_the_quickstart_is_read():
    path = os.environ["RIDGELINE_TEST_GGUF"]
    model = models.load(path)
    assert model.params == 134_515_008
    assert 0 < os.path.getsize(path) - model.weight_bytes() < 5e6, "the rest is the header with its vocabulary"


def test_a_model_stored_before_there_were_experts_still_predicts():
    """run.json of the first weeks names fewer parts of the stored bytes, and fewer figures of a layer."""
    model = from_gguf(*read(header(*smollm2())))
    data = dataclasses.asdict(model)
    data["stored_bytes"] = {k: v for k, v in data["stored_bytes"].items() if k not in ("router", "experts", "other")}
    again = command.model_from(json.loads(json.dumps(data)))
    asked = {"batch": 2, "input_tokens": 350, "output_tokens": 150}
    row = find("H100-SXM-80GB")
    assert predict(again, row, **asked).itl_s == predict(model, row, **asked).itl_s
