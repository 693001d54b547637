"""What hook points cost while no probe is at work, and what recording costs when one is.

    python -m benchmarks.hooks [--quick]

Unused: a training step (forward, loss, backward, AdamW) as it is against the same step of the same model when
`tap` gives back what it got without a look at `hook`. The two take turns in both orders, and the ratio is the
median over pairs, with its 95 % interval. Steps are short (batch 2, length 256), where any cost per call
weighs most. A call remains in both, and noise is larger than either: the time of a call of `tap`, times their
number in a step, is printed as a share of the step beside it.
Recording: a forward pass that keeps all layers' states at 64 positions against a plain one.
Ends with one machine-readable line per ratio, the largest of all models.
"""

from __future__ import annotations

import argparse
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
from benchmarks.common import machine, seconds
from ssm_retrieval import models
from ssm_retrieval.models.hooks import Hooked
from ssm_retrieval.ops.memory import keep_freed_memory

STEP, FORWARD = (2, 256), (8, 1024)  # batch, length
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


def training_step(name: str, batch: int, length: int) -> Callable[[], Any]:
    model = models.build(name, vocab_size=VOCAB)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))
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


def seconds_of_taps(name: str) -> tuple[int, float]:
    """How often a forward pass calls `tap`, and the time that takes without a probe."""
    model = models.build(name, vocab_size=VOCAB)
    x, ids, tapped = torch.zeros(1), torch.zeros(1, 2, dtype=torch.int64), list[str]()

    def count(self: Hooked, name: str, x: Tensor, mask: Tensor | None = None) -> Tensor:
        tapped.append(name)
        return x

    with tap_replaced(count):
        model(ids)
    number, names = 200_000, dict(model=model, x=x)
    once = min(timeit.repeat("model.tap('hook_embed', x)", globals=names, number=number, repeat=5)) / number
    return len(tapped), len(tapped) * once


def overhead(name: str, batch: int, length: int, repeats: int) -> tuple[float, float]:
    """Ratios to a step whose taps look at nothing: of a step as it is, and of its taps alone."""
    step = training_step(name, batch, length)

    def without() -> None:
        with tap_replaced(lambda self, name, x, mask=None: x):
            step()

    times = pairs({"with": step, "without": without}, repeats)
    tapped, spent = seconds_of_taps(name)
    taken = {key: median(t) for key, t in times.items()}
    ratio, low, high = median_interval([a / b for a, b in zip(times["with"], times["without"], strict=True)])
    print(
        f"{name}: step {1e3 * taken['with']:.2f} ms, {1e3 * taken['without']:.2f} ms if taps look at "
        f"nothing, ratio [{low:.4f}, {high:.4f}]; {tapped} taps take {1e6 * spent:.2f} us"
    )
    return ratio, spent / taken["with"]


@torch.no_grad()
def recording(name: str, batch: int, length: int, repeats: int) -> float:
    """Ratio of a forward pass that records states to one that does not."""
    model = models.build(name, vocab_size=VOCAB)
    ids = torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))
    positions = torch.linspace(0, length - 1, POSITIONS).long().tolist()

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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few repeats of small batches")
    quick = parser.parse_args().quick
    keep_freed_memory()
    print(machine())
    unused = [overhead(name, *STEP, repeats=10 if quick else 200) for name in MODELS]
    forward, repeats = ((2, 256), 5) if quick else (FORWARD, 15)
    recorded = [recording(name, *forward, repeats=repeats) for name in MODELS if name != "transformer-tiny"]
    print(f"ratio taps_of_step {max(share for _, share in unused):.6f}")
    print(f"ratio hook_overhead_unused {max(ratio for ratio, _ in unused):.4f}")
    print(f"ratio record_{POSITIONS}_states_vs_forward {max(recorded):.3f}")


if __name__ == "__main__":
    main()
