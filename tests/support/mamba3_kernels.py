"""Mamba-3's own Triton kernels, run by Triton's interpreter on a CPU. In a process of its own:

    python -O tests/support/mamba3_kernels.py FOLDER

writes FOLDER/kernel.safetensors, one call of `mamba3_siso_combined` with its gradients, and FOLDER/fla, a
model of flash-linear-attention whose layers call it, with its logits and gradients in
FOLDER/fla/results.safetensors. -O, because the kernels assert that tensors are on a GPU. Three things are
replaced: PTX instructions (cos.approx and the like) by Triton's functions of the same name, the choice among
configurations, which times them on the GPU, by the first one, and bfloat16, to which the kernels round their
inputs, by float32.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
from safetensors.torch import save_file

torch.bfloat16 = torch.float32
torch.cuda.get_device_capability = lambda *_: (9, 0)
KERNELS = "mamba_ssm.ops.triton.mamba3"


@triton.jit
def cos_approx(x):
    return tl.cos(x)


@triton.jit
def sin_approx(x):
    return tl.sin(x)


@triton.jit
def sigmoid_approx(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh_approx(x):
    return 2 / (1 + tl.exp(-2 * x)) - 1


@triton.jit
def sech2_approx(x):
    return 1 - tanh_approx(x) * tanh_approx(x)


@triton.jit
def silu(x):
    return x / (1 + tl.exp(-x))


def kernels():
    """`mamba3_siso_combined` of mamba_ssm, without the compiled extensions that its package wants."""
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(Path(importlib.util.find_spec("mamba_ssm").origin).parent)]
    functions = types.ModuleType(f"{KERNELS}.utils")
    for name in ("cos_approx", "sin_approx", "sigmoid_approx", "tanh_approx", "sech2_approx", "silu"):
        setattr(functions, name, globals()[name])
    sys.modules.update({"mamba_ssm": package, functions.__name__: functions})
    for name in ("mamba3_siso_fwd", "mamba3_siso_bwd", "angle_dt"):
        for each in vars(importlib.import_module(f"{KERNELS}.{name}")).values():
            if hasattr(each, "configs"):
                each.configs = each.configs[:1]
    return importlib.import_module(f"{KERNELS}.mamba3_siso_combined").mamba3_siso_combined


def one_call(kernel, folder):
    """Random arguments, by the kernel's names, its output, and the gradients of (output * weights).sum()."""
    B, L, H, P, N, S = 2, 37, 4, 16, 16, 4
    torch.manual_seed(0)
    shapes = dict(
        Q=(B, L, 2, N), K=(B, L, 2, N), V=(B, L, H, P), Trap=(B, H, L), Q_bias=(H, N), K_bias=(H, N),
        Angles=(B, L, H, S), D=(H,), Z=(B, L, H, P),
    )  # fmt: skip
    given = {name: torch.randn(shape) for name, shape in shapes.items()}
    given |= dict(DT=torch.rand(B, H, L), ADT=-torch.rand(B, H, L))
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    y = kernel(**leaves, chunk_size=16)
    weights = torch.randn_like(y)
    grads = torch.autograd.grad((y * weights).sum(), list(leaves.values()))
    results = {f"grad.{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    kept = dict(leaves, y=y, weights=weights, **results)
    save_file({name: x.detach().contiguous() for name, x in kept.items()}, folder / "kernel.safetensors")


def one_model(folder):
    """A model of fla, its logits for `ids`, and the gradients of logits.sin().sum()."""
    import pytest
    from fla_models import make, without_kernels

    without_kernels(pytest.MonkeyPatch())
    model = make("mamba3", chunk_size=16)
    ids = torch.randint(0, 53, (2, 41), generator=torch.Generator().manual_seed(0))
    logits = model(ids, use_cache=False).logits
    logits.sin().sum().backward()
    model.save_pretrained(folder / "fla")
    grads = {name: p.grad for name, p in model.named_parameters()}
    save_file(dict(grads, ids=ids, logits=logits.detach()), folder / "fla" / "results.safetensors")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    one_call(kernels(), out)
    one_model(out)
