"""The kernels of mamba-ssm and causal-conv1d behind our ops against the reference on the same GPU.

    python -m benchmarks.cuda [--quick] [--presets mamba-130m mamba-2.8b] [--batch 1] [--length 1024]

First the errors: largest difference of outputs, last states and gradients, relative to the largest value, one
line each. Then for every preset, in bfloat16, a forward pass and a training step (forward, loss, backward,
AdamW): tokens/s and peak memory with the kernels and in plain PyTorch ("chunks"), one line each, and one per
ratio (above 1 where the kernels are better). What does not fit the GPU says so and is left out of the ratios.
Exit status 0; 1 if an error exceeds its limit; 2 without a GPU or if a package is missing, broken or too old.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import command, parse, seconds
from ssm_retrieval import models, ops
from ssm_retrieval.errors import UserError
from ssm_retrieval.ops.causal_conv1d import causal_conv1d
from ssm_retrieval.ops.selective_scan import selective_scan
from ssm_retrieval.ops.ssd import ssd

PRESETS = ["mamba-130m", "mamba-370m", "mamba-1.4b", "mamba-2.8b", "mamba2-130m", "mamba2-2.7b"]
NO_GPU = (
    "error: benchmarks.cuda compares kernels on a GPU, but torch.cuda.is_available() is False; run it on a "
    "machine with an NVIDIA GPU and a CUDA build of torch"
)
# Triton multiplies float32 matrices in TF32 (10 bits), which only Mamba-2's kernel does
LIMITS = {
    (op, dtype): limit
    for op, single in (("selective_scan", 1e-3), ("causal_conv1d", 1e-3), ("ssd", 1e-2))
    for dtype, limit in ((torch.float32, single), (torch.bfloat16, 5e-2))
}
Inputs = dict[str, Any]  # tensors by name


def op_inputs(op: str, dtype: torch.dtype, device: str) -> Inputs:
    """Make random arguments of an operator, on the CPU first, so that every device gets the same.

    Args:
        op: "selective_scan", "causal_conv1d" or "ssd".
        dtype: Of the arguments that may be narrow; the others are float32.
        device: Where they go.

    Returns:
        Arguments by name, leaves of the graph.
    """
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    b, L, E, N, H, P = 2, 512, 256, 16, 4, 64
    if op == "selective_scan":
        made = dict(u=normal(b, L, E), dt=normal(b, L, E), A=-normal(E, N).exp(), B=normal(b, L, N))
        made |= dict(C=normal(b, L, N), D=normal(E), z=normal(b, L, E), dt_bias=normal(E))
        single = {"A", "D", "dt_bias"}
    elif op == "causal_conv1d":
        made, single = dict(x=normal(b, L, E), weight=normal(E, 4), bias=normal(E)), set()
    else:
        made = dict(x=normal(b, L, H, P), dt=F.softplus(normal(b, L, H)), A=-normal(H).exp())
        made |= dict(B=normal(b, L, 1, 64), C=normal(b, L, 1, 64), initial_state=normal(b, H, P, 64))
        single = {"dt", "A", "initial_state"}
    cast = {name: t.to(device, torch.float32 if name in single else dtype) for name, t in made.items()}
    return {name: t.requires_grad_() for name, t in cast.items()}


def results(op: str, inputs: Inputs, backend: str) -> Inputs:
    """Run an operator forward and backward.

    Args:
        op: Its name.
        inputs: From `op_inputs`.
        backend: Which path runs.

    Returns:
        The output, the last state where there is one, and the gradient of every input, by name.
    """
    if op == "causal_conv1d":
        y, last = causal_conv1d(**inputs, activation="silu", backend=backend), None
        outputs = [y]
    elif op == "selective_scan":  # its kernel has no gradient of the last state
        y = selective_scan(**inputs, dt_softplus=True, backend=backend)
        with torch.no_grad():
            last = selective_scan(**inputs, dt_softplus=True, return_last_state=True, backend=backend)[1]
        outputs = [y]
    else:
        y, last = ssd(**inputs, return_last_state=True, backend=backend)
        outputs = [y, last]
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g).to(t) for t in outputs]
    grads = torch.autograd.grad(outputs, list(inputs.values()), weights)
    found = {"y": y.detach()} | ({} if last is None else {"last_state": last.detach()})
    return found | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def errors(op: str, dtype: torch.dtype, device: str, fast: str) -> dict[str, float]:
    """Compare a backend with the reference.

    Args:
        op: Name of an operator.
        dtype: Of its inputs.
        device: Where both run.
        fast: The backend.

    Returns:
        Largest difference of each result, over the largest value of the reference, by name.
    """
    inputs = op_inputs(op, dtype, device)
    got, want = results(op, inputs, fast), results(op, inputs, "reference")
    return {
        name: float((got[name].float() - want[name].float()).abs().max() / want[name].float().abs().max())
        for name in want
    }


def report_errors(device: str, fast: Callable[[str], str]) -> bool:
    """Print a line for each result, and return whether all are within their limits."""
    fine = True
    for (op, dtype), limit in LIMITS.items():
        for name, error in errors(op, dtype, device, fast(op)).items():
            ok = error <= limit  # False for NaN as well
            fine &= ok
            verdict = "" if ok else f"  EXCEEDS {limit:.0e}"
            print(f"error {op} {str(dtype)[6:]} {name} {error:.1e}{verdict}", flush=True)
    return fine


def work(what: str, preset: str, batch: int, length: int) -> Callable[[], Any]:
    """Build a model on the GPU and prepare one piece of work with it.

    Args:
        what: "forward" or "train_step".
        preset: Which model.
        batch: Sequences.
        length: Tokens of each.

    Returns:
        The work, which returns when the GPU is done.
    """
    model = models.build(preset, dtype=torch.bfloat16, device="cuda")
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device="cuda")
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)

    def forward() -> None:
        with torch.no_grad():
            model(ids, logits_at=torch.tensor([-1], device="cuda"))
        torch.cuda.synchronize()

    if what == "forward":
        return forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        model.loss(ids, labels=labels)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()

    return step


def measure(what: str, args: argparse.Namespace, preset: str) -> tuple[float, float] | None:
    """Time a piece of work.

    Args:
        what: "forward" or "train_step".
        args: The command's arguments.
        preset: Which model.

    Returns:
        Tokens a second and peak GiB; None if the GPU has too little memory.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        t = seconds({what: work(what, preset, args.batch, args.length)}, repeats=3)[what]
    except torch.cuda.OutOfMemoryError:
        return None
    return args.batch * args.length / t, torch.cuda.max_memory_allocated() / 2**30


def report_models(args: argparse.Namespace) -> None:
    """Print speed and memory of every preset with the kernels and without, and their ratios."""
    for preset in args.presets:
        for what in ("forward", "train_step"):
            found = {"kernels": measure(what, args, preset)}
            with ops.backend("chunks"):
                found["chunks"] = measure(what, args, preset)
            for name, numbers in found.items():
                said = f"{numbers[0]:.0f} tokens/s {numbers[1]:.2f} GiB" if numbers else "out of memory"
                print(f"{what} {preset} {name} {said}", flush=True)
            fast, slow = found.values()
            if fast and slow:
                print(f"ratio {what}_{preset}_kernels_vs_chunks {fast[0] / slow[0]:.2f}")
                print(f"ratio memory_{what}_{preset}_kernels_vs_chunks {slow[1] / fast[1]:.2f}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, and return its exit status."""
    parser = command(__doc__)
    parser.add_argument("--presets", nargs="+", help="models (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, help="tokens of each (default: %(default)s)")
    full = dict(presets=PRESETS, batch=1, length=1024)
    args = parse(parser, full, quick=dict(presets=["mamba-130m", "mamba2-130m"], length=128), argv=argv)
    try:
        for preset in args.presets:
            models.config(preset)
        if not torch.cuda.is_available():
            print(NO_GPU, file=sys.stderr)
            return 2
        print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
        fine = report_errors("cuda", lambda op: "cuda")
        report_models(args)
    except (ImportError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
