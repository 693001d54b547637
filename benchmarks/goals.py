"""What the benchmarks are to reach, and whether they did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Results = Mapping[str, Any]  # benchmark -> what it wrote


@dataclass(frozen=True)
class Goal:
    """A row of the table of goals.

    Attributes:
        row: What is measured.
        benchmark: Its file of results.
        numbers: Names from `numbers`, one for each peer; the one furthest from the goal counts.
        goal: What that number is to reach.
        most: Whether the goal is the most that the number may be, instead of the least.
        unit: Behind the number.
        short: Whether README has the row.
    """

    row: str
    benchmark: str
    numbers: tuple[str, ...]
    goal: float
    most: bool = False
    unit: str = ""
    short: bool = False


class Outcome(NamedTuple):
    """What a row came to.

    Attributes:
        name: Of the number that counts.
        value: A number, or median, low and high.
        missing: Peers that were not measured.
        left_out: Peers that failed when they were.
    """

    name: str
    value: Any
    missing: tuple[str, ...]
    left_out: tuple[str, ...]


CALLS = {"prefill": "reading 1,024 tokens", "decode": "writing 128 tokens"}
LARGE = {"Mamba 2.8 B": ("mamba-2.8b", 1.5, 1.0), "Pythia 2.8 B": ("pythia-2.8b", 1.0, 1.0)}
SMALL = {"Mamba 130 M": ("mamba-130m", 1.5, 1.0), "Pythia 160 M": ("pythia-160m", 1.0, 1.0)}
FAMILIES = {"Mamba": "mamba", "Mamba-2": "mamba2", "GPT-NeoX": "transformer"}
LONG = "1 x 16384, width 128"
STATES = "states_at_64_vs_transformer_lens_eager_scan_1024"


def _step(title: str, dtype: str, peers: tuple[str, ...], goal: float) -> Goal:
    short = {"float32": "float32", "bfloat16": "bf16"}[dtype]
    names = tuple(f"step_{FAMILIES[title]}_tiny_{short}_vs_{peer}" for peer in peers)
    return Goal(f"{title} training step, width 128, {dtype}", "train_step", names, goal, short=True)


def _inference(title: str, model: str, peers: tuple[str, ...], aims: tuple[float, ...]) -> list[Goal]:
    return [
        Goal(
            f"{title}, {words}", "inference", tuple(f"{call}_{model}_vs_{peer}" for peer in peers), aim,
            short=True,
        )
        for (call, words), aim in zip(CALLS.items(), aims, strict=True)
    ]  # fmt: skip


def _in_8_bits(title: str, model: str) -> list[Goal]:
    name = f"{title}, 8 bits instead of 16"
    speed = Goal(f"{name}, {CALLS['decode']}", "inference", (f"decode_{model}_8bit_vs_bfloat16",), 1.7)
    loss = Goal(f"{name}, more perplexity", "inference", (f"perplexity_{model}",), 1, most=True, unit=" %")
    return [speed, loss]


GOALS = (
    Goal("selective scan, forward + backward", "scan", ("scan_vs_mambapy_kept_memory",), 35, short=True),
    _step("Mamba", "float32", ("mambapy", "compiled"), 10),
    _step("Mamba", "bfloat16", ("mambapy", "compiled"), 10),
    _step("GPT-NeoX", "float32", ("eager", "compiled"), 1.15),
    _step("GPT-NeoX", "bfloat16", ("eager", "compiled"), 1.15),
    *(g for title, (model, *aims) in LARGE.items()
      for g in _inference(title, model, ("transformers", "llama_cpp"), tuple(aims))),
    *(g for title, (model, *aims) in SMALL.items()
      for g in _inference(title, model, ("transformers", "compiled", "llama_cpp"), tuple(aims))),
    *(g for title, (model, *_) in (LARGE | SMALL).items() for g in _in_8_bits(title, model)),
    Goal("states at 64 of 1,024 positions", "probes", (STATES,), 5),
    Goal("a grid of patches, GPT-NeoX", "probes", ("patch_grid_vs_transformer_lens_neox",), 10),
    Goal("a grid of patches, Mamba", "probes", ("patch_grid_vs_transformer_lens",), 40),
    Goal("idle share of 32 cores, backward scan", "scan", ("scan_idle_share_32_cores",), 0, most=True),
    *(Goal(f"{title} training step on 16,384 tokens, peak memory", "train_step", (f"gib {family} {LONG}",), 8,
           most=True, unit=" GiB") for title, family in FAMILIES.items()),
    Goal("first training step, kernels compiled", "start", ("first_step_compiling_seconds",), 15, most=True,
         unit=" s"),
    Goal("`synthetic.run --help`", "start", ("help_seconds",), 0.3, most=True, unit=" s"),
)  # fmt: skip


def numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ratios of a benchmark, and what follows from its facts.

    That is by how many per cent 8 bits raise the perplexity of tokens that the model draws in 16 bits
    ("perplexity_MODEL"; its logarithm is the KL divergence), and the peaks of training steps ("gib SHAPE").
    """
    facts = result.get("facts", {})
    end = "_8bit_vs_bfloat16"
    drawn = {
        f"perplexity_{name.removesuffix(end)}": 100 * math.expm1(row["kl"])
        for name, row in facts.items()
        if name.endswith(end)
    }
    peaks: dict[str, float] = {}
    for title, row in facts.get("growth", {}).items():
        name = f"gib {title.partition(', threads')[0]}"
        peaks[name] = max(peaks.get(name, 0.0), row["peak_mib"] / 1024)
    return result["ratios"] | drawn | peaks


def middle(ratio: Any) -> float:
    """Return the median of a ratio, or the number itself."""
    return float(ratio[0] if isinstance(ratio, list) else ratio)


def peer(name: str) -> str:
    """Return whom a ratio compares with, from its name; "" if nobody, or ourselves."""
    known = {"transformer_lens": "transformer-lens", "llama_cpp": "llama.cpp", "eager": "transformers",
             "compiled": "transformers, compiled", "bfloat16": ""}  # fmt: skip
    said = name.partition("_vs_")[2].removesuffix("_kept_memory")
    return next((words for key, words in known.items() if said.startswith(key)), said.replace("_", " "))


def outcome(goal: Goal, results: Results) -> Outcome | None:
    """Return what a row came to against its best peer; None if there is no number.

    Args:
        goal: The row.
        results: Of one machine.
    """
    result = results.get(goal.benchmark, {"ratios": {}})
    known, failed = numbers(result), tuple(result.get("left_out", {}))
    there = [(name, known[name]) for name in goal.numbers if name in known]
    if not there:
        return None
    name, value = (max if goal.most else min)(there, key=lambda pair: middle(pair[1]))
    others = [other for other in goal.numbers if other not in known]
    left_out = tuple(peer(other) for other in others if other.endswith(failed))
    missing = tuple(peer(other) for other in others if not other.endswith(failed))
    return Outcome(name, value, missing, left_out)


def verdict(goal: Goal, found: Outcome) -> str:
    """Return "yes", "**no**", or "open" where a peer that was not measured may be better."""
    value = middle(found.value)
    if not (value <= goal.goal if goal.most else value >= goal.goal):
        return "**no**"
    return "open" if found.missing else "yes"
