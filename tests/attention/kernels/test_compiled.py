"""The kernels compile for GPUs, whether one is here or not: the interpreter is less strict than the compiler."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux)")

SCRIPT = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparsight.attention.kernels import decode, sums

POINTERS = {name: "*fp32" for name in ("maxima", "normalisers", "least", "sums", "outputs", "totals", "weights")}
POINTERS |= {"visible": "*u8", "survivors": "*i32", "positions": "*i32", "starts": "*i64", "lengths": "*i64"}

# Triton takes arguments that are 1 for constants.
ONES = dict.fromkeys(("queries", "group", "query_head", "query_step", "split_blocks"), 1)

def compile(kernel, dtype, constants, capability):
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    states = {sums: ("query", "key"), decode: ("query", "keys", "values", "output")}[sys.modules[kernel.__module__]]
    types = {**POINTERS, "scaling": "fp32"} | dict.fromkeys(states, "*" + dtype) | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    # What the smallest of these GPUs lets a program share: 99 KiB.
    assert compiled.metadata.shared <= 99 * 1024, (kernel, constants, compiled.metadata.shared)

def sizes(size, block):
    blocks = dict.fromkeys(("ROWS", "KEYS", "SLOTS"), block)
    return {"SIZE": size, "VALUE_SIZE": size, "GROUP": 16, "SPLITS": 512, "BLOCK": 16, **blocks}

for kernel in (sums._normalise, sums._sum_columns, decode._attend_split, decode._combine, decode._received):
    compile(kernel, "bf16", {**sizes(128, 64), "MASKED": False}, 90)
    compile(kernel, "fp16", {**sizes(16, 64), "MASKED": False, **ONES}, 80)
    compile(kernel, "fp32", {**sizes(256, 32), "MASKED": True}, 86)
print("compiled")
"""


def test_every_kernel_compiles_for_gpus(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "compiled\n", done.stderr
