"""The delta rule, forward + backward, against the torch functions of transformers, the fastest on a CPU.

    python -m benchmarks.delta [--quick]

The peers are Qwen3-Next's `torch_chunk_gated_delta_rule` (one decay for a head) and Kimi Linear's
`chunk_kimi_delta_attention` (one for each channel of the key); flash-linear-attention needs a GPU. Of gated
linear attention and Mamba-3 there is nothing on a CPU but loops over tokens: flash-linear-attention's
`naive_recurrent_gla` and the layer of mamba3-ssm, each timed where it is installed. A whole layer of gated
DeltaNet is timed beside one of this project's Mamba-2 with as many channels and states, and a training step
of every "tiny" preset beside Mamba's.

The last lines are ratios: how many times as fast this project is, how many times less memory it needs at its
peak (memory), how much longer a layer takes than Mamba-2's, and the largest deviation of the cost per token
from its median over lengths 256 to 16,384 (linearity; 0.1 is 10 %). That is measured with freed memory kept,
as training does, and without: glibc takes fresh pages for every tensor of more than 32 MiB.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.common import Ratio, command, finish, machine, paired, parse, peak_memory, seconds, take_turns
from ssm_retrieval import models
from ssm_retrieval.ops.delta_rule import delta_rule
from ssm_retrieval.ops.memory import keep_freed_memory

HEADS, WIDTH, D_MODEL = 4, 64, 128
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
TINY = ("mamba", "mamba2", "mamba3", "deltanet", "gated-deltanet", "kda", "gla", "transformer")

Call = Callable[[], Any]


def arguments(batch: int, length: int, per_channel: bool = False) -> list[torch.Tensor]:
    """q, k, v, beta and log_decay as a layer has them: q and k of length 1, beta in (0, 1)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, length, HEADS, *shape, generator=generator)

    q, k, v = F.normalize(normal(WIDTH), dim=-1), F.normalize(normal(WIDTH), dim=-1), normal(WIDTH)
    decay = -0.1 * (normal(WIDTH) if per_channel else normal()).abs()
    return [x.requires_grad_() for x in (q, k, v, normal().sigmoid(), decay)]


def ours(batch: int, length: int, per_channel: bool = False) -> Call:
    """Forward and backward through this project's kernel."""
    q, k, v, beta, decay = inputs = arguments(batch, length, per_channel)
    return lambda: torch.autograd.grad(
        delta_rule(q * WIDTH**-0.5, k, v, beta, decay, backend="cpu").sum(), inputs
    )


def transformers(batch: int, length: int, per_channel: bool = False) -> Call:
    """The same through transformers' chunks, which scale q themselves."""
    if per_channel:
        from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention as theirs
    else:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as theirs
    q, k, v, beta, decay = inputs = arguments(batch, length, per_channel)
    rule: Any = inspect.unwrap(theirs)  # without the kernels of fla, where that is installed
    return lambda: torch.autograd.grad(rule(q, k, v, decay, beta)[0].sum(), inputs)


def gla(batch: int, length: int, theirs: bool) -> Call:
    """Gated linear attention, forward and backward, through this project's kernel or fla's loop."""
    q, k, v, _, decay = arguments(batch, length, per_channel=True)
    inputs = [q, k, v, decay]
    if theirs:
        from fla.ops.gla.naive import naive_recurrent_gla

        return lambda: torch.autograd.grad(naive_recurrent_gla(q, k, v, decay)[0].sum(), inputs)
    return lambda: torch.autograd.grad(
        delta_rule(q * WIDTH**-0.5, k, v, None, decay, erase=False, backend="cpu").sum(), inputs
    )


def port(batch: int, length: int) -> Call:
    """A layer of mamba3-ssm, of the shape of `layer`, forward and backward."""
    from mamba3_ssm import Mamba3

    mixer = Mamba3(D_MODEL, d_state=WIDTH, headdim=WIDTH)
    x = torch.randn(batch, length, D_MODEL, requires_grad=True)
    leaves = [x, *mixer.parameters()]
    return lambda: torch.autograd.grad(mixer(x).sum(), leaves, allow_unused=True)


def against_loops(shape: tuple[int, int]) -> dict[str, float]:
    """Ratios to the loops over tokens that are installed. Each is called once before it is timed once."""
    calls: dict[str, tuple[str, Call, Call]] = {}
    if importlib.util.find_spec("fla") is not None:
        calls["gla_vs_fla_loop"] = ("fla", gla(*shape, theirs=False), gla(*shape, theirs=True))
    if importlib.util.find_spec("mamba3_ssm") is not None:
        calls["mamba3_layer_vs_mamba3_ssm"] = ("mamba3-ssm", layer("mamba3", *shape), port(*shape))
    ratios = {}
    for name, (peer, mine, theirs) in calls.items():
        t = seconds({"ours": mine, "theirs": theirs}, 1)
        print(f"  {name}: ours {t['ours'] * 1e3:.1f} ms, {peer} {t['theirs'] * 1e3:.1f} ms")
        ratios[name] = t["theirs"] / t["ours"]
    return ratios


def linearity(lengths: tuple[int, ...], batch: int, repeats: int, reach: int) -> float:
    """Prints the cost per token of each length; the largest deviation from their median."""
    cost = {}
    for n in lengths:
        once = seconds({"": ours(batch, n)}, repeats * max(1, reach // n))[""]
        cost[n] = once / (batch * n * HEADS) * 1e9
        print(f"  {n:6} {once * 1e3:9.1f} ms {cost[n]:8.1f} ns")
    middle = sorted(cost.values())[len(cost) // 2]
    return max(abs(c / middle - 1) for c in cost.values())


def layer(name: str, batch: int, length: int) -> Call:
    """Forward and backward through a whole layer of this project with 4 heads of 64 channels and states."""
    model = models.build(f"{name}-tiny", d_model=D_MODEL, n_layer=1, headdim=WIDTH, d_state=WIDTH)
    mixer: Any = model.blocks[0].mixer
    x = torch.randn(batch, length, D_MODEL, requires_grad=True)
    leaves = [x, *mixer.parameters()]
    return lambda: torch.autograd.grad(mixer(x).sum(), leaves)


def step(name: str, batch: int, length: int) -> Call:
    """A training step of a preset: forward, loss, backward, AdamW."""
    model = models.build(f"{name}-tiny")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (batch, length))

    def call() -> None:
        optimizer.zero_grad()
        model.loss(ids, labels=ids)[0].backward()
        optimizer.step()

    return call


def main() -> None:
    """Run the benchmark."""
    full = dict(batch=8, length=1024, repeats=9, lengths=LENGTHS, reach=4096)
    quick = dict(batch=1, length=128, repeats=1, lengths=(64, 128), reach=1)
    sizes = parse(command(__doc__), full, quick)
    shape = (sizes.batch, sizes.length)
    print(machine())
    heads = f"{HEADS} heads of {WIDTH} x {WIDTH}"
    print(f"forward + backward, batch {shape[0]}, length {shape[1]}, {heads}, float32")
    ratios: dict[str, float | Ratio] = {}
    for per_channel, rule in ((False, "gated_delta"), (True, "kimi_delta")):
        calls = {"ours": ours(*shape, per_channel), "transformers": transformers(*shape, per_channel)}
        t = take_turns(calls, sizes.repeats)
        memory = {f.__name__: peak_memory(f, (1, 64, per_channel), (*shape, per_channel))
                  for f in (ours, transformers)}  # fmt: skip
        for name in t:
            took = f"{median(t[name]) * 1e3:9.1f} ms {memory[name]:7.0f} MiB above the inputs"
            print(f"  {rule:11} {name:12} {took}")
        ratios[f"{rule}_vs_transformers"] = paired(t["transformers"], t["ours"])
        ratios[f"{rule}_memory_vs_transformers"] = memory["transformers"] / memory["ours"]
    layers = seconds({n: layer(n, *shape) for n in ("gated-deltanet", "deltanet", "mamba2")}, sizes.repeats)
    print(f"whole layer, width {D_MODEL}: " + ", ".join(f"{n} {t * 1e3:.1f} ms" for n, t in layers.items()))
    ratios["gated_deltanet_layer_over_mamba2"] = layers["gated-deltanet"] / layers["mamba2"]
    steps = seconds({name: step(name, *shape) for name in TINY}, sizes.repeats)
    print("training step of the tiny presets")
    for name, each in steps.items():
        parameters = models.build(f"{name}-tiny", device="meta").num_parameters(embeddings=False)
        print(
            f"  {name:15} {parameters / 1e3:5.0f} k {each * 1e3:9.1f} ms {each / steps['mamba']:6.2f} x Mamba"
        )

    print("loops over tokens")
    ratios |= against_loops(shape)
    scaling = (sizes.lengths, shape[0], sizes.repeats, sizes.reach)
    words = f"scaling with length, batch {shape[0]}: ns per token and head, forward + backward"
    print(f"{words}; freed memory returned")
    ratios["delta_linearity_deviation_freed_memory_returned"] = linearity(*scaling)
    keep_freed_memory()
    print(f"{words}; freed memory kept")
    ratios["delta_linearity_deviation"] = linearity(*scaling)
    finish(sizes, ratios)


if __name__ == "__main__":
    main()
