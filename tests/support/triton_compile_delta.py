"""Compile the Triton kernels of the delta rule, SSD and the cross-entropy for GPUs that need not be there.

    TRITON_INTERPRET=0 python tests/support/triton_compile_delta.py [sm_80 | gfx942]

prints a line for each kernel with its blocks and the bytes of shared memory that a program takes, of which a
GPU has 64 KiB at least. The interpreter runs Python; this is where types, shapes and what a GPU's compiler
cannot do are found. The operators themselves choose blocks and arguments, for tensors on a CPU; only the
launch is replaced, by a compilation that ends with LLVM's code.
"""

from __future__ import annotations

import itertools
import sys

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ssm_retrieval.ops import _cross_entropy_triton, _delta_triton

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}


class Stop(Exception):
    """Raised instead of making machine code, with the shared memory."""


class Absent:
    """What Triton asks of a GPU's driver to compile for it."""

    def __init__(self, target):
        self.get_current_target = lambda: target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def until_llvm(*given):
    """A hook of Triton's compiler: leaves out the stages after LLVM's. Without arguments: its name."""
    if not given:
        return "until LLVM", "until LLVM"
    stages = given[1]

    def stop(module, metadata):
        raise Stop(metadata["shared"])

    stages["ptx" if "ptx" in stages else "amdgcn"] = stop


class Compiled:
    """In the place of a kernel: launching it compiles and prints."""

    def __init__(self, kernel, said):
        self.kernel, self.arg_names, self.said = kernel, kernel.arg_names, said

    def __getitem__(self, grid):
        def launch(*args, **options):
            blocks = {name: options[name] for name in ("Q", "PB", "NB", "WIDTH") if name in options}
            try:
                self.kernel.warmup(*args, **options, grid=grid)
            except Stop as stop:
                print(self.kernel.fn.__name__, self.said, blocks, stop, flush=True)

        return launch


def delta(channel, erase, dtype, N, P=64, L=128, H=4):
    """Forward and backward with states at a position."""
    said = f"{'channel' if channel else 'head'} {'erase' if erase else 'shared'} {dtype} N={N}"
    q, k = (torch.zeros(1, L, H if erase else 1, N, dtype=dtype) for _ in range(2))
    v, beta = torch.zeros(1, L, H, P, dtype=dtype), torch.zeros(1, L, H)
    log = torch.zeros(1, L, H, N) if channel else beta
    run, state = _delta_triton._Call.run, torch.zeros(1, H, P, N)
    _delta_triton._Call.run = lambda call, kernel, *rest, **blocks: run(
        call, Compiled(kernel, said), *rest, **blocks
    )
    try:
        _delta_triton._forward(q, k, v, beta, log, state, erase, [5], True)
        _delta_triton._backward(q, k, v, beta, log, state, erase, [5], v, state, state.unsqueeze(1))
    finally:
        _delta_triton._Call.run = run


def cross_entropy(dtype, V=50280):
    kernel = _cross_entropy_triton.softmax_rows
    _cross_entropy_triton.softmax_rows = Compiled(kernel, str(dtype))
    try:
        logits, labels = torch.zeros(2, V, dtype=dtype), torch.zeros(2, dtype=torch.int64)
        _cross_entropy_triton.triton_rows(logits, labels, torch.ones(()), -100, True)
    finally:
        _cross_entropy_triton.softmax_rows = kernel


if __name__ == "__main__":
    driver.set_active(Absent(TARGETS[sys.argv[1] if len(sys.argv) > 1 else "sm_80"]))
    knobs.runtime.add_stages_inspection_hook = until_llvm
    for dtype in (torch.bfloat16, torch.float32):
        cross_entropy(dtype)
        for channel, erase, N in itertools.product((False, True), (False, True), (64, 128, 256)):
            delta(channel, erase, dtype, N)
