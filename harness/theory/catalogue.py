"""Models by name: shapes of published models, as data, so that a prediction needs no file.

`models.jsonl` has a row a model.  `config` is its config.json on the Hugging Face hub, reduced to the keys that the
shape follows from.  `params` is its published count: the elements of its safetensors files as the hub's API tells them
(gathered from the list in llmfit 1.1.17, MIT licence), of the repository in `source`, which is another of the same
shape where the model's own has no such files; null where no file is told of: then `stated` is the rounded number that
its makers give in `source`, if any.  Files hold more than parameters at times: `not_parameters` says how many elements
those are, and what.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from harness.records import NAN, RidgelineError
from harness.theory.architecture import from_config
from harness.theory.dtypes import BITS, dtype_named
from harness.theory.shape import Model


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the catalogue; `names` are its id and others it goes by."""

    id: str
    names: tuple[str, ...]
    params: int | None
    stated: float  # parameters as the makers round them, where `params` is None; NaN: not found
    source: str
    not_parameters: int
    what_else: str
    other: int  # parameters that its configuration does not tell of: a vision tower
    note: str
    config: dict[str, Any]

    def model(self, name: str = "", quantization: dict[str, Any] | None = None) -> Model:
        """Its Model, called `name`; `quantization` stands for the quantization_config of its own."""
        gguf = (quantization or {}).get("gguf")
        own = {"quantization_config": quantization} if quantization and not gguf else {}
        model = from_config(self.config | own, name or self.id)
        if gguf:
            model = replace(model, dtype=gguf, stored_bytes=model.bytes_by_part(gguf), compute_dtype="fp16",
                            matmul_dtype="fp16")  # fmt: skip
        notes = (*model.notes, f"{self.id}: {self.note}") if self.note else model.notes
        stored = model.stored_bytes | {"other": model.stored_bytes["other"] + self.other * BITS["bf16"] / 8}
        return replace(model, other=model.other + self.other, stored_bytes=stored, notes=notes)


@cache
def entries() -> tuple[Entry, ...]:
    """Every row, in its order."""
    text = resources.files("harness.theory").joinpath("models.jsonl").read_text("utf-8")
    return tuple(_entry(json.loads(line)) for line in text.splitlines())


def _entry(row: dict[str, Any]) -> Entry:
    count, what = row.get("not_parameters", (0, ""))
    names = (row["id"], *row.get("also", ()))
    note = row.get("note", "")
    stated = row.get("stated", NAN)
    return Entry(
        row["id"], names, row["params"], stated, row["source"], count, what, row.get("other", 0), note, row["config"]
    )


# Words of a name that change what a model was taught, or who gave it, not its shape.
SAME_SHAPE = {
    "meta", "hf", "instruct", "chat", "it", "pt", "base", "thinking", "think", "preview", "dynamic", "v", "bf", "fp",
    "kv", "quantized", "gguf", "ggml",
}  # fmt: skip
# Words that say how its weights were quantized -> the quantization_config that they stand for.
_INT8 = {"weights": {"num_bits": 8, "type": "int"}, "input_activations": {"num_bits": 8}}
QUANTIZED: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8"},
    "gptq[-_ ]?(?:int)?8(?:[-_ ]?bit)?": {"quant_method": "gptq", "bits": 8},
    "awq(?:[-_ ]?(?:int)?4(?:[-_ ]?bits?)?|[-_ ]gem[mv])?": {"quant_method": "awq", "bits": 4},
    "gptq(?:[-_ ]?(?:int)?4(?:[-_ ]?bits?)?)?": {"quant_method": "gptq", "bits": 4},
    "(?:bnb|nf4)(?:[-_ ]?4[-_ ]?bits?)?": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "(?:w8a16|int8)": {"quant_method": "gptq", "bits": 8},
    "(?:int4|4[-_ ]?bits?)": {"quant_method": "awq", "bits": 4},
    "w4a16": {"quant_method": "gptq", "bits": 4},
    "w8a8": {"quant_method": "compressed-tensors", "config_groups": {"group_0": _INT8}},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "fp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "mxfp4": {"quant_method": "modelopt", "quant_algo": "MXFP4"},
}


def _words(name: str) -> tuple[str, ...]:
    """The name without its owner, cut where letters and digits, or separators, meet: "Llama-3.1-8B" is llama 3.1 8 b."""
    plain = re.sub(r"(?<=\d)_(?=\d)", ".", name.strip().rsplit("/", 1)[-1].casefold())
    return tuple(re.findall(r"\d+(?:\.\d+)*|[^\W\d_]+", plain))


def _shape_words(words: tuple[str, ...]) -> tuple[str, ...]:
    """Words that tell shapes apart: neither SAME_SHAPE nor a release's date (2407) or precision (16)."""
    kept = [w for w in words if w not in SAME_SHAPE and not re.fullmatch(r"[01]\d{3}|2[0-9]{3}|16", w)]
    return tuple(kept)


_GGUF = re.compile(r"(?:[-_ .](?:ud|gguf))?[-_ .](i?q[1-8]_[a-z0-9_]+)(?:\.gguf)?$", re.IGNORECASE)


def _without_quantization(name: str) -> tuple[str, dict[str, Any] | None]:
    name = re.sub(r"[()\[\]]", " ", name).strip()
    if found := _GGUF.search(name):
        return name[: found.start()], {"gguf": dtype_named(found[1])}
    for word, config in QUANTIZED.items():
        if found := re.search(rf"[-_ .]{word}(?:[-_]v\d(?![.\d]))?(?![a-z0-9])", name, re.IGNORECASE):
            return name[: found.start()] + name[found.end() :], config
    return name, None


@cache
def _by_words() -> tuple[dict[tuple[str, ...], Entry], dict[tuple[str, ...], list[Entry]]]:
    exact = {_words(name): entry for entry in reversed(entries()) for name in entry.names}
    loose: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries():
        for words in dict.fromkeys(_shape_words(_words(name)) for name in entry.names):
            loose.setdefault(words, []).append(entry)
    return exact, loose


@cache
def find(name: str) -> Model:
    """The Model of this name: a hub id or a near variant ("Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct").

    Owner, case, separators and words such as -Instruct, -hf or -chat do not matter; -FP8, -AWQ, -GPTQ, -NVFP4 and the like
    say how the weights are stored.  Raises RidgelineError for an unknown name (with the nearest ones) and an ambiguous one.
    """
    entry, quantization = _entry_of(name)
    return entry.model(name, quantization)


def config_of(name: str) -> dict[str, Any]:
    """The config.json that `find` reads, reduced as the rows are.  Raises RidgelineError as it does."""
    entry, quantization = _entry_of(name)
    return entry.config | ({"quantization_config": quantization} if quantization else {})


def _entry_of(name: str) -> tuple[Entry, dict[str, Any] | None]:
    plain, quantization = _without_quantization(name)
    exact, loose = _by_words()
    if re.search(r"\d_\d", plain) and _words(plain) not in exact:  # llama_v3_8b is no version 3.8
        plain = plain if _shape_words(_words(plain)) in loose else plain.replace("_", "-")
    near = loose.get(_shape_words(_words(plain)), [])
    alike = near[0] if len({json.dumps(e.config, sort_keys=True) for e in near}) == 1 else None
    if entry := exact.get(_words(plain), alike):
        own = entry.config.get("quantization_config", {}).get("quant_method")
        # gpt-oss' own configuration says which parts are in MXFP4.
        return entry, None if quantization == QUANTIZED["mxfp4"] and own == "mxfp4" else quantization
    if near:
        raise RidgelineError(f"model {name!r} is ambiguous: name one of {', '.join(e.id for e in near)}")
    names = {" ".join(_shape_words(_words(n))): n for e in reversed(entries()) for n in reversed(e.names)}
    close = difflib.get_close_matches(" ".join(_shape_words(_words(plain))), list(names), n=5, cutoff=0.5)
    nearest = f"the nearest are {', '.join(names[c] for c in close)}" if close else "and none is near"
    raise RidgelineError(
        f"model {name!r} is not in the catalogue; {nearest}; for another give its config.json or a GGUF file"
    )
