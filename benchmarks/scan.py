"""The selective scan, forward + backward, against mambapy's parallel scan and transformers' mixer.

    python -m benchmarks.scan [--quick]

The last lines are ratios: how many times as fast this project is, how many times less memory it needs at its
peak (memory), and the largest deviation of the cost per token from its median over lengths 256 to 16,384
(linearity; 0.1 is 10 %). "scan_idle_share_N_cores" is counted, not timed: the share of N cores that goes
unused in the backward pass of one sequence of width 2,560, because its tasks do not divide by N.

PyTorch on Linux returns large freed blocks to the kernel and pays for fresh pages at the next allocation. So
does this benchmark, except for "_kept_memory", which is measured after
`ssm_retrieval.ops.memory.keep_freed_memory()`; that helps the peer more, because it allocates more.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.common import Ratio, command, finish, machine, paired, parse, peak_memory, seconds, take_turns
from ssm_retrieval.ops import LANES, scan_group
from ssm_retrieval.ops.memory import keep_freed_memory
from ssm_retrieval.ops.selective_scan import selective_scan

D_INNER, D_STATE = 256, 16
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)


def arguments(batch: int, length: int) -> list[torch.Tensor]:
    """u, dt, A, B, C, D as a trained Mamba block has them: steps positive, A negative."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    u, dt = normal(batch, length, D_INNER), torch.nn.functional.softplus(normal(batch, length, D_INNER) - 3)
    A = -torch.arange(1.0, D_STATE + 1).repeat(D_INNER, 1)
    rest = normal(batch, length, D_STATE), normal(batch, length, D_STATE), torch.ones(D_INNER)
    return [t.requires_grad_() for t in (u, dt, A, *rest)]


def ours(batch: int, length: int) -> Callable[[], Any]:
    """Forward and backward through this project's scan."""
    inputs = arguments(batch, length)
    scan: Any = selective_scan
    return lambda: torch.autograd.grad(scan(*inputs, backend="cpu").sum(), inputs)


def mambapy(batch: int, length: int) -> Callable[[], Any]:
    """The same through mambapy's: the discretisation, its parallel scan (pscan), the output."""
    from mambapy.mamba import MambaBlock

    inputs = arguments(batch, length)
    scan: Any = MambaBlock.selective_scan
    return lambda: torch.autograd.grad(scan(None, *inputs).sum(), inputs)


def _mixer_step(mixer: torch.nn.Module, batch: int, length: int) -> Callable[[], Any]:
    x = torch.randn(batch, length, D_INNER // 2, requires_grad=True)
    leaves = [x, *mixer.parameters()]
    return lambda: torch.autograd.grad(mixer(x).sum(), leaves)


def our_mixer(batch: int, length: int) -> Callable[[], Any]:
    """Forward and backward through a whole Mamba layer of this project."""
    from ssm_retrieval import models
    from ssm_retrieval.models.mamba import MambaMixer

    return _mixer_step(MambaMixer(models.config("mamba-tiny")), batch, length)


def library_mixer(batch: int, length: int) -> Callable[[], Any]:
    """The same through transformers' layer, by its default path on a CPU, a loop over time."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    return _mixer_step(MambaMixer(MambaConfig(hidden_size=D_INNER // 2), layer_idx=0), batch, length)


def idle_share(cores: int, batch: int, d_inner: int) -> float:
    """Return the share of the cores' time that no task of the scan's backward pass fills.

    Args:
        cores: Cores, each of which takes one task after another.
        batch: Sequences.
        d_inner: Channels.
    """
    blocks = -(-d_inner // LANES)
    tasks = batch * -(-blocks // scan_group(batch, blocks))
    return 1 - tasks / (cores * -(-tasks // cores))


def main() -> None:
    """Run the benchmark."""
    full = dict(batch=8, length=1024, repeats=9, layers=3, lengths=LENGTHS, reach=4096, warmup=5)
    quick = dict(batch=2, length=512, repeats=1, layers=1, lengths=(64, 128, 256), reach=1, warmup=1)
    sizes = parse(command(__doc__), full, quick)
    print(machine())
    batch, length = shape = (sizes.batch, sizes.length)
    ratios: dict[str, float | Ratio] = {}
    print(
        f"forward + backward, batch {batch}, length {length}, d_inner {D_INNER}, d_state {D_STATE}, float32"
    )
    for allocator, suffix in (("default", ""), ("kept", "_kept_memory")):
        if suffix:
            keep_freed_memory()
        t = take_turns({"ours": ours(*shape), "mambapy": mambapy(*shape)}, sizes.repeats)
        ratios[f"scan_vs_mambapy{suffix}"] = paired(t["mambapy"], t["ours"])
        both = ", ".join(f"{name} {median(took) * 1e3:.1f} ms" for name, took in t.items())
        print(f"  allocator {allocator}: {both}")
    m = take_turns({"ours": our_mixer(*shape), "transformers": library_mixer(*shape)}, sizes.layers)
    print(f"whole Mamba layer, hidden {D_INNER // 2}")
    print(f"  ours           {median(m['ours']) * 1e3:9.1f} ms")
    print(f"  transformers   {median(m['transformers']) * 1e3:9.1f} ms")

    memory = {f.__name__: peak_memory(f, (1, 64), shape) for f in (ours, mambapy)}
    print("peak memory above the inputs: " + ", ".join(f"{k} {v:.0f} MiB" for k, v in memory.items()))

    print(f"scaling with length, batch {batch}: ns per token and channel, forward + backward")
    cost = {}
    for n in sizes.lengths:  # not in turns, where the long ones would empty the caches of the short ones
        time = seconds({"": ours(batch, n)}, sizes.repeats * max(1, sizes.reach // n), sizes.warmup)[""]
        cost[n] = time / (batch * n * D_INNER) * 1e9
        print(f"  {n:6} {time * 1e3:9.1f} ms {cost[n]:8.2f} ns")
    middle = sorted(cost.values())[len(cost) // 2]
    worst = max(abs(c / middle - 1) for c in cost.values())

    ratios["scan_memory_vs_mambapy"] = memory["mambapy"] / memory["ours"]
    ratios["mixer_vs_transformers"] = paired(m["transformers"], m["ours"])
    ratios["scan_linearity_deviation"] = worst
    for cores in (16, 32):
        ratios[f"scan_idle_share_{cores}_cores"] = idle_share(cores, 1, 2 * 2560)
    finish(sizes, ratios)


if __name__ == "__main__":
    main()
