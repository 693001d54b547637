"""A training step (forward, loss, backward, AdamW) against transformers and mambapy with the same weights.

    python -m benchmarks.train_step [--quick] [--families mamba transformer] [--sizes tiny 130m] [--pairs 5]

Peers are transformers' models, eager and under torch.compile: Mamba with `use_mambapy=True` (mambapy's
parallel scan, its fastest eager path on a CPU) and compiled with its associative scan, Mamba-2, and GPT-NeoX
with sdpa. Weights, batch, dtype, optimiser and the next-token loss at every position are the same; ours keeps
no logits in memory (`LanguageModel.loss`), theirs is computed by the library. Losses are compared first.

Each side has a process of its own; sides take turns (benchmarks.turns). Both keep freed memory
(`ops.memory.keep_freed_memory`), which `synthetic.run` does and which helps the peers more, because they
allocate more; "_default_memory" is with glibc's default. Then what a step costs by length, batch, width and
threads. The last lines are ratios: how many times as fast this project is, or how many times smaller its peak
("memory"). gated DeltaNet, of which transformers has no model alone, is in benchmarks.delta.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.common import Ratio, command, finish, machine, parse
from benchmarks.peers import library
from benchmarks.turns import Calls, Failed, Process, Side, race
from ssm_retrieval import models

# Size -> what differs from the preset, batch, length.
SIZES: dict[str, tuple[dict[str, Any], int, int]] = {
    "tiny": (dict(vocab_size=2052, d_model=128, n_layer=2), 8, 1024),
    "130m": ({}, 1, 1024),
}
PRESETS = {"mamba": "mamba-130m", "mamba2": "mamba2-130m", "transformer": "pythia-160m"}
HEADS = {"tiny": {"transformer": dict(n_head=4)}}  # of a smaller width
PEERS = ("mambapy", "eager", "compiled")
# One thing changes, the others are those of the first: batch, length, width.
GROWTH = {
    "length": [(1, n, 128) for n in (256, 1024, 4096, 16384, 65536)],
    "batch": [(n, 1024, 128) for n in (1, 4, 16, 64)],
    "width": [(1, 1024, n) for n in (64, 256, 1024, 2560)],
}


def model_of(family: str, size: str) -> models.LanguageModel:
    """One of our models, seed 0."""
    options = SIZES[size][0] | HEADS.get(size, {}).get(family, {})
    return models.build(PRESETS[family], **options)


def step_of(
    model: torch.nn.Module, loss_of: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, bf16: bool
) -> Calls:
    """The calls "loss", which changes nothing, and "step"."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return loss_of(ids)

    def step() -> float:
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return float(value.detach())

    return {"loss": lambda: float(loss().detach()), "step": step}


def tokens(vocab_size: int, batch: int, length: int) -> torch.Tensor:
    """(B, L) int64, random tokens."""
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def ours(family: str, size: str, bf16: bool) -> Calls:
    """A step of this project."""
    _, batch, length = SIZES[size]
    return our_step(model_of(family, size), batch, length, bf16)


def our_step(model: models.LanguageModel, batch: int, length: int, bf16: bool) -> Calls:
    """A step of a model of this project."""

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return model.loss(ids, labels=F.pad(ids[:, 1:], (0, 1), value=-100))[0]

    return step_of(model, loss, tokens(model.config.vocab_size, batch, length), bf16)


def theirs(family: str, size: str, bf16: bool, peer: str) -> Calls:
    """A step of transformers; peer: one of PEERS."""
    model = model_of(family, size)
    made = library(model, use_cache=False, **({"use_mambapy": True} if peer == "mambapy" else {}))
    forward: Any = torch.compile(made) if peer == "compiled" else made
    _, batch, length = SIZES[size]
    ids = tokens(model.config.vocab_size, batch, length)
    return step_of(made, lambda ids: forward(ids, labels=ids).loss, ids, bf16)


def growing(family: str, batch: int, length: int, width: int) -> Calls:
    """A step of this project in bfloat16 at another shape."""
    shape: dict[str, Any] = dict(vocab_size=2052, d_model=width, n_layer=2)
    if family == "transformer":
        shape |= dict(n_head=max(1, width // 64), max_position_embeddings=length)
    model = models.build(PRESETS[family], **shape)
    return our_step(model, batch, length, bf16=True)


def peers_of(family: str) -> tuple[str, ...]:
    """The peers that a family has; Mamba's eager path without mambapy is a loop over time."""
    return ("mambapy", "compiled") if family == "mamba" else ("eager", "compiled")


def comparisons(sizes: Any) -> Iterator[tuple[str, str, str, bool, str, bool]]:
    """Yield the end of a ratio's name, family, size, bf16, peer, and whether freed memory is kept."""
    for family in sizes.families:
        for size in sizes.sizes:
            for bf16 in (False, True):
                for peer in peers_of(family):
                    for kept in (True, False) if size == "tiny" else (True,):
                        name = f"{family}_{size}_{'bf16' if bf16 else 'float32'}_vs_{peer}"
                        yield name + ("" if kept else "_default_memory"), family, size, bf16, peer, kept


def growth(families: Any, pairs: int, threads: int, table: Any) -> dict[str, dict[str, float]]:
    """Print and return microseconds per token by what grows: "family batch x length x width, threads"."""
    found: dict[str, dict[str, float]] = {}
    for what, shapes in table.items():
        print(f"microseconds per token of a step in bfloat16, by {what}")
        for family in families:
            for batch, length, width in shapes:
                for count in (1, 2) if (what, length) == ("length", 1024) and threads > 1 else (threads,):
                    shape = {"batch": batch, "length": length, "width": width}
                    side = Side("ours", growing, {"family": family, **shape})
                    with Process(side, count, kept=True) as process:
                        took = sorted(process.call("step")[0] for _ in range(1 + pairs))[pairs // 2]
                        peak = process.peak()
                    cost = took / batch / length * 1e6
                    title = f"{family} {batch} x {length}, width {width}, threads {count}"
                    print(f"  {title:50} {cost:9.2f}  peak {peak / 1024:.2f} GiB", flush=True)
                    found[title] = {"microseconds_per_token": cost, "peak_mib": peak}
    return found


def main() -> None:
    """Run the benchmark."""
    parser = command(__doc__)
    parser.add_argument("--families", nargs="+", choices=list(PRESETS))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES))
    parser.add_argument("--pairs", type=int, help="turns of each side")
    full = dict(families=list(PRESETS), sizes=list(SIZES), pairs=5, growth=GROWTH)
    short = {"length": [(1, 64, 64)], "batch": [], "width": []}
    quick = dict(families=["mamba"], sizes=["tiny"], pairs=1, growth=short)
    sizes, threads = parse(parser, full, quick), torch.get_num_threads()
    print(machine())
    ratios: dict[str, float | Ratio] = {}
    facts: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, family, size, bf16, peer, kept in comparisons(sizes):
        shape = {"family": family, "size": size, "bf16": bf16}
        sides = (Side("ours", ours, shape), Side(peer, theirs, {**shape, "peer": peer}))
        try:
            raced = race(sides, ("step",), sizes.pairs, threads=threads, kept=kept, checked=("loss",))
        except Failed as error:
            left_out[name] = error.reason()
            print(f"{name}: left out, {left_out[name]}", flush=True)
            continue
        ratios[f"step_{name}"] = raced.ratio("step", "ours", peer)
        if kept:
            ratios[f"memory_{name}"] = raced.peak_mib[peer] / raced.peak_mib["ours"]
        losses = [raced.answers[side.name]["loss"] for side in sides]
        took = ", ".join(
            f"{who} {1e3 * sorted(calls['step'])[sizes.pairs // 2]:.1f} ms"
            for who, calls in raced.seconds.items()
        )
        print(f"{name}: {took}; losses {losses[0]:.5f} and {losses[1]:.5f}", flush=True)
        facts[name] = {"seconds": raced.seconds, "peak_mib": raced.peak_mib, "losses": losses}
    facts["growth"] = growth(sizes.families, sizes.pairs, threads, sizes.growth)
    finish(sizes, ratios, facts=facts, left_out=left_out)


if __name__ == "__main__":
    main()
