"""Kernels compiled for a GPU that is not there: Triton brings its own assembler. `python -m tests.kernels.triton.compiled 90`
prints a line of JSON for each: registers, shared memory, spills and the instructions that tell whether loads are wide and
asynchronous and products run on matrix units. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from herd.kernels.fused import PLACEMENTS
from herd.kernels.packed import KINDS
from herd.kernels.triton.attention import decode_kernel, keys_at_once, merge_kernel
from herd.kernels.triton.gate import silu_mul_kernel
from herd.kernels.triton.norm import rms_kernel
from herd.kernels.triton.place import place_kernel
from herd.kernels.triton.prefill import span_kernel, tile_of
from herd.kernels.triton.product import row_kernel, sum_kernel, tile_kernel
from herd.kernels.triton.tiles import row_tile, tile

CODES = {"plain": "bf16", "q4": "u8", "q4k": "u8", "fp8": "u8"}
SCALES = {"fp8": "fp32", "int8": "fp32"}
INSTRUCTIONS = ("cp.async.cg", "cp.async.ca", "ld.global.v4", "wgmma.mma_async", "mma.sync", "ld.local", "st.local")

Job = tuple[str, Any, dict[str, str], dict[str, Any], int, int]
"""name, kernel, types of what is given at run time, constants, warps, stages."""


def jobs(arch: int) -> Iterator[Job]:
    """Every kernel in the forms that a Llama 3.1 8B in bfloat16 takes, and all kinds of weights and placements."""
    pointers = (
        dict.fromkeys(("q", "out"), "*bf16") | dict.fromkeys(("k_scale", "v_scale"), "*fp32") | {"tables": "*i32"}
    )
    numbers = dict.fromkeys(("q_stride", "out_stride", "table_stride", "chunk"), "i32") | {"softmax_scale": "fp32"}
    for width, kv in ((128, "bf16"), (64, "bf16"), (128, "i8")):
        shared = {"HKV": 8, "GROUP": 4, "DH": width, "DH_BLOCK": width, "BLOCK_SIZE": 16, "INT8": kv == "i8"}
        cache = {"k_cache": f"*{kv}", "v_cache": f"*{kv}"}
        types = pointers | numbers | cache
        rows = {"positions": "*i64", "owners": "*i64", "partial": "*fp32", "weights": "*fp32"}
        keys = keys_at_once(width, 1 if kv == "i8" else 2)
        extra = {"GROUP_BLOCK": 16, "SPLITS": 16, "KEYS": keys, "CHUNKED": False, "OWNED": False}
        yield f"decode {width} {kv}", decode_kernel, types | rows, shared | extra, 4, 3
        m, n, warps, stages = tile_of(width, 2, hopper=arch >= 90)
        extra = {"SPANS": 16, "ROWS": m, "KEYS": n, "CHUNKED": width == 64}
        types |= {"spans": "*i64", "n_spans": "i32"}
        yield f"spans {width} {kv}", span_kernel, types, shared | extra, warps, stages
        if kv == "bf16":  # a launch makes constants of integers that are 1
            ones = {"n_spans": 1, "table_stride": 1, "chunk": 1, "SPANS": 1}
            less = {name: type_ for name, type_ in types.items() if name not in ones}
            yield f"spans {width} of one", span_kernel, less, shared | extra | ones, warps, stages
    types = {"partial": "*fp32", "weights": "*fp32", "out": "*bf16", "out_stride": "i32"}
    yield "merge", merge_kernel, types, {"H": 32, "DH": 128, "DH_BLOCK": 128, "SPLITS": 16, "SPLIT_BLOCK": 16}, 4, 3
    for placement in PLACEMENTS:
        for kv in ("bf16", "i8"):
            types = dict.fromkeys(("q", "k", "v", "out"), "*bf16") | {"k_cache": f"*{kv}", "v_cache": f"*{kv}"}
            types |= dict.fromkeys(("cos", "sin", "temper", "k_scale", "v_scale"), "*fp32") | {"slots": "*i64"}
            types |= dict.fromkeys(("q_stride", "k_stride", "v_stride", "out_stride"), "i32") | {"eps": "fp32"}
            constants = {"H": 32, "HKV": 8, "DH": 128, "DH_BLOCK": 128, "HEADS": 4}
            constants |= {"PLACEMENT": placement, "INT8": kv == "i8"}
            yield f"place {placement} {kv}", place_kernel, types, constants, 1, 3
    types = dict.fromkeys(("x", "delta", "weight", "out"), "*bf16") | {"eps": "fp32"}
    types |= dict.fromkeys(("x_stride", "delta_stride", "out_stride"), "i32")
    yield "norm", rms_kernel, types, {"D": 4096, "ADD": True, "BLOCK": 4096}, 8, 3
    types = {"gate_up": "*bf16", "out": "*bf16", "in_stride": "i32", "out_stride": "i32"}
    yield "gate", silu_mul_kernel, types, {"F": 14336, "BLOCK": 1024}, 4, 3
    for kind in KINDS:
        codes, scale = f"*{CODES.get(kind, 'i8')}", f"*{SCALES.get(kind, 'fp16')}"
        sub = "*i8" if kind == "q6k" else "*u8"
        types = {"x": "*bf16", "out": "*bf16", "codes": codes, "scale": scale, "minimum": scale, "N": "i32"}
        types |= {"sub": sub, "sub_minimum": sub}
        one = row_tile(kind, 4096, 4096)
        constants = {"K": 4096, "KIND": kind, "COLUMNS": one.columns, "ROWS": one.rows, "STAGES": one.stages}
        yield f"row {kind}", row_kernel, types, constants, one.warps, 3
        types |= {"counts": "*i64", "M": "i32", "x_stride": "i32", "out_stride": "i32"}
        for m, experts, fixed in ((8, 0, False), (8, 16, False), (64, 0, False), (300, 0, False), (1, 0, True)):
            t = tile(kind, m, 4096, 4096, 2, fixed=fixed, experts=bool(experts))
            constants = {"K": 4096, "KIND": kind, "EXPERTS": experts, "EXPERT_BLOCK": max(experts, 1), "TOGETHER": 8}
            constants |= {"TOKENS": t.tokens, "ROWS": t.rows, "COLUMNS": t.columns, "SPLITS": t.splits}
            name = f"tile {kind} {t.tokens}{' fixed' if fixed else ''}{' experts' if experts else ''}"
            yield name, tile_kernel, types, constants, t.warps, t.stages
            if kind == "plain" and m < 64:  # a launch makes constants of integers that are 1
                ones = {"M": 1, "x_stride": 1, "out_stride": 1}
                less = {name: type_ for name, type_ in types.items() if name not in ones}
                yield f"{name} of one", tile_kernel, less, constants | ones, t.warps, t.stages
    types = {"parts": "*fp32", "out": "*bf16", "M": "i32", "N": "i32", "out_stride": "i32"}
    yield "sum", sum_kernel, types, {"SPLITS": 2, "BLOCK": 1024}, 4, 3


def compiled(job: Job, arch: int) -> dict[str, Any]:
    """What the assembler says of one kernel for sm_`arch`."""
    name, kernel, types, constants, warps, stages = job
    names = kernel.arg_names
    missing = set(names) - set(types) - set(constants)
    assert not missing, (name, missing)
    signature = {n: types.get(n, "constexpr") for n in names}
    given = [(i, n) for i, n in enumerate(names) if n in types]
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in given if types[n][0] == "*" or n.endswith("_stride")}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        said = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, timeout=60)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr)
    assert found is not None, said.stdout + said.stderr
    counts = {word: n for word in INSTRUCTIONS if (n := result.asm["ptx"].count(word))}
    return {
        "name": name,
        "registers": int(found[1]),
        "spilled": int(found[2]),
        "shared": result.metadata.shared,
    } | counts


def main() -> None:
    arch = int(sys.argv[1])
    for job in jobs(arch):
        if len(sys.argv) < 3 or sys.argv[2] in job[0]:
            print(json.dumps(compiled(job, arch)), flush=True)


if __name__ == "__main__":
    main()
