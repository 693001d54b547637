"""What hook points cost while no probe is at work, and what recording costs when one is.

    python -m benchmarks.hooks [--quick]

Unused: a training step (forward, loss, backward, AdamW) is compared with the same step of the same model
when `tap` returns its argument without looking at `hook`. The two take turns in both orders; the ratio is the
median over pairs, with its 95 % interval. Steps are short (batch 2, length 256), because there a cost per
call weighs most. Both still make the call, and noise is larger than the difference. So the time of one call
of `tap`, times the number of calls in a step, is printed beside it as a share of the step.

Recording: a forward pass that keeps the states of all layers at 64 positions is compared with a plain one.

The last lines are the ratios, each the largest of all models.
"""

from __future__ import annotations

import math
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import probes
from benchmarks.common import command, finish, machine, parse, seconds
from ssm_retrieval import models
from ssm_retrieval.models.hooks import Hooked
from ssm_retrieval.ops.memory import keep_freed_memory

POSITIONS, VOCAB = 64, 2052
MODELS = ("mamba-tiny", "mamba2-tiny", "transformer-tiny")


def pairs(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Wall times of two calls that take turns, each going first in every other round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-2, repeats):
        for name in list(calls)[:: 1 if i % 2 else -1]:
            started = time.perf_counter()
            calls[name]()
            if i >= 0:
                times[name].append(time.perf_counter() - started)
    return times


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median and its 95 % interval from order statistics (normal approximation of the sign test)."""
    n, ordered = len(values), sorted(values)
    reach = math.ceil(0.98 * n**0.5)
    return median(values), ordered[max(0, n // 2 - reach)], ordered[min(n - 1, n // 2 + reach)]


# Below, `name` is a preset, `shape` the (batch, length) of its input.


def training_step(name: str, shape: tuple[int, int]) -> Callable[[], Any]:
    """A training step on random tokens (forward, loss, backward, AdamW), for others to call."""
    model = models.build(name, vocab_size=VOCAB)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(0))
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)

    def step() -> None:
        loss, _ = model.loss(ids, labels=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


@contextmanager
def tap_replaced(tap: Callable[..., Tensor]) -> Iterator[None]:
    """Another `Hooked.tap` for the time of a `with` statement."""
    own: Any = Hooked.tap
    Hooked.tap = tap  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hooked.tap = own  # type: ignore[method-assign]


def seconds_of_taps(name: str, number: int) -> tuple[int, float]:
    """How often a forward pass calls `tap`, and how long that takes without a probe."""
    model = models.build(name, vocab_size=VOCAB)
    x, ids, tapped = torch.zeros(1), torch.zeros(1, 2, dtype=torch.int64), list[str]()

    def count(self: Hooked, name: str, x: Tensor, mask: Tensor | None = None) -> Tensor:
        tapped.append(name)
        return x

    with tap_replaced(count):
        model(ids)
    names = dict(model=model, x=x)
    once = min(timeit.repeat("model.tap('hook_embed', x)", globals=names, number=number, repeat=5)) / number
    return len(tapped), len(tapped) * once


def overhead(name: str, shape: tuple[int, int], repeats: int, calls: int) -> tuple[float, float]:
    """Ratios to a step whose taps look at nothing: of the step as it is, and of its taps alone."""
    step = training_step(name, shape)

    def without() -> None:
        with tap_replaced(lambda self, name, x, mask=None: x):
            step()

    times = pairs({"with": step, "without": without}, repeats)
    tapped, spent = seconds_of_taps(name, calls)
    taken = {key: median(t) for key, t in times.items()}
    ratio, low, high = median_interval([a / b for a, b in zip(times["with"], times["without"], strict=True)])
    print(
        f"{name}: step {1e3 * taken['with']:.2f} ms, {1e3 * taken['without']:.2f} ms if taps look at "
        f"nothing, ratio [{low:.4f}, {high:.4f}]; {tapped} taps take {1e6 * spent:.2f} us"
    )
    return ratio, spent / taken["with"]


@torch.no_grad()
def recording(name: str, shape: tuple[int, int], repeats: int) -> float:
    """Ratio of a forward pass that records states to one that does not."""
    model = models.build(name, vocab_size=VOCAB)
    ids = torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(0))
    positions = torch.linspace(0, shape[1] - 1, POSITIONS).long().tolist()

    def recorded() -> None:
        with probes.record(model, "*.hook_ssm_state", positions=positions) as cache:
            model(ids)
        held.append(cache.num_bytes() / 2**20)

    held: list[float] = []
    times = seconds({"plain": lambda: model(ids), "recorded": recorded}, repeats)
    print(
        f"{name}: forward {1e3 * times['plain']:.1f} ms, with {len(positions)} states of "
        f"{model.config.n_layer} layers {1e3 * times['recorded']:.1f} ms, {held[-1]:.0f} MiB recorded"
    )
    return times["recorded"] / times["plain"]


def main() -> None:
    """Run the benchmark."""
    full = dict(step=(2, 256), steps=200, calls=200_000, forward=(8, 1024), repeats=15)  # (batch, length)
    quick = dict(step=(2, 64), steps=3, calls=2000, forward=(1, 128), repeats=1)
    sizes = parse(command(__doc__), full, quick)
    keep_freed_memory()
    print(machine())
    unused = [overhead(name, sizes.step, sizes.steps, sizes.calls) for name in MODELS]
    recorded = [recording(name, sizes.forward, sizes.repeats) for name in MODELS if "mamba" in name]
    ratios = {
        "taps_of_step": max(share for _, share in unused),
        "hook_overhead_unused": max(ratio for ratio, _ in unused),
        f"record_{POSITIONS}_states_vs_forward": max(recorded),
    }
    finish(sizes, ratios)


if __name__ == "__main__":
    main()
