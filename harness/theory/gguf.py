"""The header of a GGUF file: metadata and the list of tensors, never their data.

Format: ggml/docs/gguf.md of ggml-org/ggml, versions 2 and 3, little-endian.  The reader trusts nothing: each length is
held against a bound before it is believed, so a cut or hostile file ends in a RidgelineError.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from harness.records import RidgelineError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 64 * 2**20  # vocabularies of 256k tokens with their merges take about 15 MB
MAX_ENTRIES = 100_000
MAX_STRING_BYTES = 16 * 2**20
MAX_TENSOR_VALUES = 2**50
KEPT_ITEMS = 4096  # longer arrays (the vocabulary) are passed over


class GgmlType(NamedTuple):
    """A way to store numbers: blocks of so many values in so many bytes."""

    name: str
    block: int
    block_bytes: int


# ggml_type -> its block, from GGML_QUANT_SIZES in gguf-py/gguf/constants.py of ggml-org/llama.cpp (MIT).
GGML_TYPES: dict[int, GgmlType] = {
    0: GgmlType("F32", 1, 4),
    1: GgmlType("F16", 1, 2),
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    9: GgmlType("Q8_1", 32, 40),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    15: GgmlType("Q8_K", 256, 292),
    16: GgmlType("IQ2_XXS", 256, 66),
    17: GgmlType("IQ2_XS", 256, 74),
    18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50),
    20: GgmlType("IQ4_NL", 32, 18),
    21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82),
    23: GgmlType("IQ4_XS", 256, 136),
    24: GgmlType("I8", 1, 1),
    25: GgmlType("I16", 1, 2),
    26: GgmlType("I32", 1, 4),
    27: GgmlType("I64", 1, 8),
    28: GgmlType("F64", 1, 8),
    29: GgmlType("IQ1_M", 256, 56),
    30: GgmlType("BF16", 1, 2),
    34: GgmlType("TQ1_0", 256, 54),
    35: GgmlType("TQ2_0", 256, 66),
    39: GgmlType("MXFP4", 32, 17),
    40: GgmlType("NVFP4", 64, 36),
}


def number_of(dtype: str) -> int | None:
    """The GGML type that a model's dtype names ("q4_1", "fp16"), None where it is no such type."""
    name = {"fp32": "F32", "fp16": "F16", "fp4": "MXFP4"}.get(dtype, dtype.upper())
    return next((number for number, kind in GGML_TYPES.items() if kind.name.upper() == name), None)


# Metadata value type -> how struct reads it; strings and arrays are apart.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Elided:
    """An array too long to keep; only its length is known."""

    length: int


class _Reader:
    """Reads a stream forward and counts what is left of the bound."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.left = stream, MAX_HEADER_BYTES

    def room(self, n: int, what: str) -> None:
        if n > self.left:
            raise RidgelineError(f"GGUF: the header is larger than {MAX_HEADER_BYTES} bytes at {what}; no model file?")

    def take(self, n: int, what: str) -> bytes:
        self.room(n, what)
        self.left -= n
        data = self.stream.read(n)
        if len(data) != n:
            raise RidgelineError(f"GGUF: the file ends inside {what}; download it again")
        return data

    def skip(self, n: int, what: str) -> None:
        self.room(n, what)
        while n > 0:
            n -= len(self.take(min(n, 2**20), what))

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def length(self, limit: int, what: str) -> int:
        n = int(self.number("Q", what))
        if n > limit:
            raise RidgelineError(f"GGUF: {what} is {n}, more than {limit}; the file is damaged or no model")
        return n

    def string(self, what: str) -> str:
        return self.take(self.length(MAX_STRING_BYTES, f"the length of {what}"), what).decode("utf-8", "replace")

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in SCALARS:
            raise RidgelineError(f"GGUF: {what} has the unknown value type {kind}; the file is damaged or too new")
        return self.number(SCALARS[kind], what)

    def array(self, what: str) -> Any:
        kind = self.number("I", what)
        if kind != STRING and kind not in SCALARS:  # llama.cpp knows no arrays of arrays either
            raise RidgelineError(f"GGUF: {what} is an array of the unknown type {kind}; the file is damaged or too new")
        n = self.length(MAX_HEADER_BYTES, f"the length of {what}")
        if n <= KEPT_ITEMS:
            return [self.value(kind, what) for _ in range(n)]
        if kind in SCALARS:
            self.skip(n * struct.calcsize(f"<{SCALARS[kind]}"), what)
        else:
            for _ in range(n):
                self.skip(self.length(MAX_STRING_BYTES, f"the length of {what}"), what)
        return Elided(n)

    def tensor(self, index: int) -> tuple[str, tuple[int, ...], int]:
        what = f"tensor {index}"
        name = self.string(f"the name of {what}")
        dimensions = self.number("I", what)
        if dimensions > 8:
            raise RidgelineError(f"GGUF: {what} has {dimensions} dimensions; the file is damaged")
        shape = tuple(self.length(MAX_TENSOR_VALUES, f"a dimension of {what}") for _ in range(dimensions))
        kind = self.number("I", what)
        self.number("Q", what)  # where its data begins: not our concern
        if kind not in GGML_TYPES:
            raise RidgelineError(f"GGUF: tensor {name!r} has the unknown type {kind}; the file is damaged or too new")
        if math.prod(shape) > MAX_TENSOR_VALUES:
            raise RidgelineError(f"GGUF: tensor {name!r} has more than {MAX_TENSOR_VALUES} values; the file is damaged")
        return name, shape, kind


def read(stream: BinaryIO) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int]]]:
    """(metadata, tensors as (name, shape with the fastest dimension first, ggml_type)) from a stream at its beginning.

    Arrays of more than 4,096 items are `Elided`.  Raises RidgelineError for anything that is not a sound header.
    """
    r = _Reader(stream)
    if r.take(4, "the magic number") != MAGIC:
        raise RidgelineError("GGUF: the file does not begin with GGUF; give a .gguf file or a folder with config.json")
    version = r.number("I", "the version")
    if version not in VERSIONS:
        raise RidgelineError(
            f"GGUF: version {version} is not one of {VERSIONS}; convert the file with a newer llama.cpp"
        )
    tensor_count = r.length(MAX_ENTRIES, "the number of tensors")
    entries = r.length(MAX_ENTRIES, "the number of metadata entries")
    metadata: dict[str, Any] = {}
    for index in range(entries):
        key = r.string(f"the key of metadata entry {index}")
        metadata[key] = r.value(r.number("I", key), f"metadata {key!r}")
    return metadata, [r.tensor(i) for i in range(tensor_count)]


def tensor_bytes(shape: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor's data: whole blocks of its type."""
    block = GGML_TYPES[kind]
    return -(-math.prod(shape) // block.block) * block.block_bytes
