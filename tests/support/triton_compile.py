"""Compile the Triton kernels of the scan and the convolution for GPUs that need not be there.

    TRITON_INTERPRET=0 python tests/support/triton_compile.py

prints a line for each: kernel, target, type, and for NVIDIA's the shuffles between threads in its PTX. The
interpreter runs Python; this is where types, shapes and what a GPU's compiler cannot do are found.
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import triton.language as tl
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

OPS = Path(__file__).parents[2] / "ssm_retrieval" / "ops"
TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
TYPES = {"bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
# what has the type of the model's activations
ROWS = ["u", "dt", "B", "C", "z", "gy", "y", "du", "ddt", "dz", "x", "before", "dx", "dbefore"]


def kernels(name):
    """The functions of a file that a wrapper launches. By path, because the package would import torch."""
    spec = importlib.util.spec_from_file_location(name, OPS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {key: each for key, each in vars(module).items() if hasattr(each, "arg_names") and key[0] != "_"}


def compiled(kernel, target, dtype):
    """The kernel for one target, with every option on and tiles as on that GPU."""
    wide = dtype if dtype == "float64" else "float32"
    names = kernel.arg_names
    constants = dict(N=16, K=4, BT=16, BE=64 if target == "gfx942" else 32, WIDE=getattr(tl, wide))
    flags = (name for name in names if name.startswith("HAS_") or name in ("SOFTPLUS", "SILU", "REVERSE"))
    constants |= dict.fromkeys(flags, True)

    def kind(name):
        if name in constants:
            return "constexpr"
        if name in ("L", "E", "P", "tiles") or name.endswith(("_b", "_t")):
            return "i32"
        if name == "slots":
            return "*i32"
        return "*" + TYPES[dtype if name in ROWS else wide]

    signature = {name: kind(name) for name in names}
    values = {(names.index(name),): value for name, value in constants.items() if name in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in names if signature[n].startswith("*")}
    source = ASTSource(kernel, signature, values, aligned)
    return compile_kernel(source, target=TARGETS[target], options={"num_warps": 1})


if __name__ == "__main__":
    found = kernels("_scan_triton_kernels") | kernels("_conv_triton_kernels")
    for target, dtype in itertools.product(TARGETS, ("bfloat16", "float64")):
        for name, kernel in found.items():
            made = compiled(kernel, target, dtype).asm
            print(name, target, dtype, made["ptx"].count("shfl.sync") if "ptx" in made else "-", flush=True)
