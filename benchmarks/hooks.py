"""What hook points cost while no probe is at work, and what recording costs when one is.

    python -m benchmarks.hooks [--quick]

Unused: a training step (forward, loss, backward, AdamW) of the package as it is against the same package with
every `if self.hook is not None:` cut out of its syntax tree as it is imported, so that the baseline is this
code and not an older one. The two take turns in both orders, and the ratio is the median over pairs, with its
95 % interval. Steps are short (batch 2, length 256), where any cost per call weighs most. Noise is still
larger than the cost: the time of the comparisons, times their number per step, is printed beside it.
Recording: a forward pass that keeps all layers' states at 64 positions against a plain one.
Ends with one machine-readable line per ratio, the largest of all models.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import math
import sys
import time
import timeit
from collections.abc import Callable
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

import probes
import ssm_retrieval
from benchmarks.common import machine, seconds
from ssm_retrieval import models
from ssm_retrieval.ops.memory import keep_freed_memory

STEP, FORWARD = (2, 256), (8, 1024)  # batch, length
POSITIONS, VOCAB = 64, 2052
MODELS = ("mamba-tiny", "mamba2-tiny", "transformer-tiny")


class _Strip(ast.NodeTransformer):
    """Replace every `if self.hook is not None: ... else: ...` by its else branch."""

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        return node if ast.unparse(node.test) != "self.hook is not None" else node.orelse or None


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:  # never the cached bytecode of the whole module
        path = self.get_filename(fullname)
        tree = _Strip().visit(ast.parse(self.get_data(path)))
        return compile(tree, path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        if found is not None and found.origin is not None and found.origin.endswith(".py"):
            found.loader = _Loader(fullname, found.origin)
        return found


def without_hooks() -> ModuleType:
    """A second copy of `ssm_retrieval.models` without hook points; it shares the operators with the first."""
    held = {name: m for name, m in sys.modules.items() if f"{name}.".startswith("ssm_retrieval.models.")}
    for name in held:
        del sys.modules[name]
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module("ssm_retrieval.models")
    finally:
        sys.meta_path.remove(finder)
        sys.modules.update(held)
        ssm_retrieval.models = models


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


def training_step(package: Any, name: str, batch: int, length: int) -> Callable[[], Any]:
    model = package.build(name, vocab_size=VOCAB)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)

    def step() -> None:
        loss, _ = model.loss(ids, labels=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def seconds_of_checks(name: str) -> tuple[int, float]:
    """How often a forward pass asks `self.hook is not None`, and the time that takes."""
    model = models.build(name, vocab_size=VOCAB)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    asked = [0]

    def ask(module: Any) -> None:
        asked[0] += 1

    hooked: set[Any] = {type(m) for m in model.modules() if hasattr(m, "hook_axes")}
    for kind in hooked:
        kind.hook = property(ask)
    try:
        model(ids)
    finally:
        for kind in hooked:
            del kind.hook
    module = next(m for m in model.modules() if type(m) in hooked)
    number = 200_000
    once = min(timeit.repeat("m.hook is not None", globals={"m": module}, number=number, repeat=5)) / number
    return asked[0], asked[0] * once


def overhead(name: str, batch: int, length: int, repeats: int) -> tuple[float, float]:
    """Ratios to a step without hook points: of a step with them, and of the comparisons alone."""
    bare = without_hooks()
    cut = type(bare.build(name).blocks[0]).forward.__code__.co_consts
    assert "hook_resid_pre" not in cut, "the baseline still has its hook points"
    calls = {
        "with": training_step(models, name, batch, length),
        "without": training_step(bare, name, batch, length),
    }
    times = pairs(calls, repeats)
    asked, spent = seconds_of_checks(name)
    step = {key: median(t) for key, t in times.items()}
    ratio, low, high = median_interval([a / b for a, b in zip(times["with"], times["without"], strict=True)])
    print(
        f"{name}: step {1e3 * step['with']:.2f} ms with hook points, {1e3 * step['without']:.2f} ms "
        f"without, ratio [{low:.4f}, {high:.4f}]; {asked} comparisons take {1e6 * spent:.2f} us"
    )
    return ratio, spent / step["without"]


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
    print(f"ratio hook_checks_of_step {max(checks for _, checks in unused):.6f}")
    print(f"ratio hook_overhead_unused {max(ratio for ratio, _ in unused):.4f}")
    print(f"ratio record_{POSITIONS}_states_vs_forward {max(recorded):.3f}")


if __name__ == "__main__":
    main()
