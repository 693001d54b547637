"""The selective scan, forward + backward, against mambapy's parallel scan and transformers' mixer.

    python -m benchmarks.scan [--quick]

One machine-readable line per ratio at the end: how many times faster this project is (time), how many times
less memory it needs at its peak (memory), and the largest deviation of the cost per token from its median
over lengths 256 to 16,384 (linearity, 0.1 = 10 %).

PyTorch on Linux gives large freed blocks back to the kernel and pays for fresh pages at the next allocation.
The headline ratio is taken in a process like that; "_kept_memory" is measured after
`ssm_retrieval.ops.memory.keep_freed_memory()`, which helps the peer more, as it allocates more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import machine, peak_memory, seconds
from ssm_retrieval.ops.memory import keep_freed_memory
from ssm_retrieval.ops.selective_scan import selective_scan

BATCH, LENGTH, D_INNER, D_STATE = 8, 1024, 256, 16
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)


def arguments(batch: int, length: int, d_inner: int = D_INNER, d_state: int = D_STATE) -> list[torch.Tensor]:
    """u, dt, A, B, C, D as a trained Mamba block has them: steps positive, A negative."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    u, dt = normal(batch, length, d_inner), torch.nn.functional.softplus(normal(batch, length, d_inner) - 3)
    A = -torch.arange(1.0, d_state + 1).repeat(d_inner, 1)
    rest = normal(batch, length, d_state), normal(batch, length, d_state), torch.ones(d_inner)
    return [t.requires_grad_() for t in (u, dt, A, *rest)]


def ours(batch: int, length: int) -> Callable[[], Any]:
    inputs = arguments(batch, length)
    scan: Any = selective_scan
    return lambda: torch.autograd.grad(scan(*inputs, backend="cpu").sum(), inputs)


def mambapy(batch: int, length: int) -> Callable[[], Any]:
    """mambapy's own selective scan: the discretisation, its parallel scan (pscan), the output."""
    from mambapy.mamba import MambaBlock

    inputs = arguments(batch, length)
    scan: Any = MambaBlock.selective_scan
    return lambda: torch.autograd.grad(scan(None, *inputs).sum(), inputs)


def _mixer_step(mixer: torch.nn.Module, batch: int, length: int) -> Callable[[], Any]:
    x = torch.randn(batch, length, D_INNER // 2, requires_grad=True)
    leaves = [x, *mixer.parameters()]
    return lambda: torch.autograd.grad(mixer(x).sum(), leaves)


def our_mixer(batch: int, length: int) -> Callable[[], Any]:
    from ssm_retrieval import models
    from ssm_retrieval.models.mamba import MambaMixer

    return _mixer_step(MambaMixer(models.config("mamba-tiny")), batch, length)


def library_mixer(batch: int, length: int) -> Callable[[], Any]:
    """transformers' Mamba layer with its default path on a CPU, a loop over time."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    return _mixer_step(MambaMixer(MambaConfig(hidden_size=D_INNER // 2), layer_idx=0), batch, length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and lengths up to 2,048")
    quick = parser.parse_args().quick
    repeats, lengths = (3, LENGTHS[:4]) if quick else (9, LENGTHS)
    print(machine())
    shape, ratios = (BATCH, LENGTH), {}
    print(
        f"forward + backward, batch {BATCH}, length {LENGTH}, d_inner {D_INNER}, d_state {D_STATE}, float32"
    )
    for allocator, suffix in (("default", ""), ("kept", "_kept_memory")):
        if suffix:
            keep_freed_memory()
        t = seconds({"ours": ours(*shape), "mambapy": mambapy(*shape)}, repeats=3 if quick else 9)
        ratios[f"scan_vs_mambapy{suffix}"] = t["mambapy"] / t["ours"]
        both = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in t.items())
        print(f"  allocator {allocator}: {both}")
    m = seconds({"ours": our_mixer(*shape), "transformers": library_mixer(*shape)}, repeats=1 if quick else 3)
    print(f"whole Mamba layer, hidden {D_INNER // 2}")
    print(f"  ours           {m['ours'] * 1e3:9.1f} ms")
    print(f"  transformers   {m['transformers'] * 1e3:9.1f} ms")

    memory = {f.__name__: peak_memory(f, (1, 64), shape) for f in (ours, mambapy)}
    print("peak memory above the inputs: " + ", ".join(f"{k} {v:.0f} MiB" for k, v in memory.items()))

    print(f"scaling with length, batch {BATCH}: ns per token and channel, forward + backward")
    cost = {}
    for n in lengths:  # one after the other: in turns the long ones would empty the caches of the short ones
        time = seconds({"": ours(BATCH, n)}, repeats * max(1, 4096 // n), warmup=5)[""]
        cost[n] = time / (BATCH * n * D_INNER) * 1e9
        print(f"  {n:6} {time * 1e3:9.1f} ms {cost[n]:8.2f} ns")
    middle = sorted(cost.values())[len(cost) // 2]
    worst = max(abs(c / middle - 1) for c in cost.values())

    ratios["scan_memory_vs_mambapy"] = memory["mambapy"] / memory["ours"]
    ratios["mixer_vs_transformers"] = m["transformers"] / m["ours"]
    ratios["scan_linearity_deviation"] = worst
    for name, ratio in ratios.items():
        print(f"ratio {name} {ratio:.3g}")


if __name__ == "__main__":
    main()
