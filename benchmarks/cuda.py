"""The CUDA kernels of mamba-ssm and causal-conv1d against the reference, on a GPU.

    python -m benchmarks.cuda [--quick]

First the largest difference of outputs and gradients between backend="cuda" and backend="reference" in
float32, relative to the largest number. Then tokens/s and peak memory of Mamba with these kernels, with the
reference scan, and of GPT-NeoX, forward and training step in bfloat16, for presets up to 2.8 B as far as
they fit. Ends with a line per ratio; exit status 2 where there is no GPU or no kernels.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import models
from models.ops.causal_conv1d import causal_conv1d
from models.ops.selective_scan import selective_scan

BATCH, LENGTH = 8, 1024
PRESETS = ("130m", "370m", "790m", "1.4b", "2.8b")
Operation = Callable[..., Tensor]


def operations() -> Iterator[tuple[str, Operation, list[Tensor]]]:
    """Name, operation taking a backend, and its arguments, at Mamba-130m's width."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).cuda().requires_grad_()

    E, N = 1536, 16
    A = -torch.arange(1.0, N + 1).repeat(E, 1).cuda().requires_grad_()
    rest = [normal(2, LENGTH, N), normal(2, LENGTH, N), normal(E), normal(2, LENGTH, E), normal(E)]

    def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor,
             backend: str) -> Tensor:  # fmt: skip
        return selective_scan(u, dt, A, B, C, D, z=z, dt_bias=bias, dt_softplus=True, backend=backend)

    yield "scan", scan, [normal(2, LENGTH, E), normal(2, LENGTH, E), A, *rest]

    def conv(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return causal_conv1d(x, weight, bias, activation="silu", backend=backend)

    yield "conv", conv, [normal(2, LENGTH, E), normal(E, 4), normal(E)]


def deviation(operation: Operation, arguments: list[Tensor]) -> float:
    """Largest difference of output and gradients between the backends, relative to the largest number."""
    found = []
    for backend in ("cuda", "reference"):
        y = operation(*arguments, backend=backend)
        weights = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
        found.append([y.detach(), *torch.autograd.grad((y * weights).sum(), arguments)])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))


def speed(name: str, train: bool, repeats: int, **overrides: Any) -> tuple[float, float]:
    """Tokens/s and peak GiB of a forward pass, or of a step of AdamW, under bfloat16 autocast."""
    model = models.build(name, device="cuda", **overrides)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) if train else None
    ids = torch.randint(0, model.config.vocab_size, (BATCH, LENGTH), device="cuda")

    def call() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16), torch.set_grad_enabled(train):
            if optimizer is None:
                model(ids, logits_at=torch.tensor([LENGTH - 1], device="cuda"))
                return
            loss, _ = model.loss(ids, labels=ids.roll(-1, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    call()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    took = (time.perf_counter() - started) / repeats
    return BATCH * LENGTH / took, torch.cuda.max_memory_allocated() / 2**30


def compare(preset: str, train: bool, repeats: int) -> dict[str, float]:
    """Ratios of one preset; what does not fit is said and left out."""
    what = "train" if train else "forward"
    sides: dict[str, tuple[str, dict[str, Any]]] = {
        "kernels": (f"mamba-{preset}", dict(scan_backend="cuda")),
        "reference": (f"mamba-{preset}", dict(scan_backend="reference")),
        "neox": (f"transformer-{preset}", {}),
    }
    found: dict[str, tuple[float, float]] = {}
    for side, (name, overrides) in sides.items():
        try:
            found[side] = speed(name, train, 1 if side == "reference" else repeats, **overrides)
            print(f"  {name} {what}, {side}: {found[side][0]:.0f} tokens/s, {found[side][1]:.2f} GiB")
        except torch.cuda.OutOfMemoryError:
            print(f"  {name} {what}, {side}: does not fit into this GPU")
        torch.cuda.empty_cache()
    ratios = {}
    for other in ("reference", "neox"):
        if "kernels" in found and other in found:
            (fast, small), (slow, large) = found["kernels"], found[other]
            ratios[f"cuda_mamba_{what}_{preset}_vs_{other}"] = fast / slow
            ratios[f"cuda_mamba_{what}_memory_{preset}_vs_{other}"] = large / small
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the smallest preset, fewer repeats")
    quick = parser.parse_args().quick
    if not torch.cuda.is_available():
        print(
            "error: benchmarks.cuda needs a CUDA GPU and a CUDA build of torch; there is none here",
            file=sys.stderr,
        )
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {BATCH}, length {LENGTH}")
    ratios = {}
    try:
        for name, operation, arguments in operations():
            ratios[f"cuda_{name}_deviation"] = deviation(operation, arguments)
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for preset in PRESETS[:1] if quick else PRESETS:
        for train in (False, True):
            ratios |= compare(preset, train, 2 if quick else 10)
    for name, ratio in ratios.items():
        print(f"ratio {name} {ratio:.3g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
