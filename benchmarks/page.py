"""docs/speed.md and README's table of speeds, from the results of benchmarks: `python -m benchmarks.page`.

Replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->`. `python -m benchmarks.all` writes the
results, benchmarks/results/MACHINE/NAME.json. Those of --quick are no measurements and never shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.tables import fill
from ssm_retrieval.tables import markdown
from ssm_retrieval.training import store

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
MISSING = "not measured"
Results = Mapping[str, Any]  # benchmark -> what it wrote


@dataclass(frozen=True)
class Goal:
    """A row of the table of goals.

    Attributes:
        row: What is measured, against whom.
        benchmark: Its file of results.
        ratios: Names of ratios, one for each peer; the smallest counts.
        goal: What the ratio is to reach.
        most: Whether the goal is the most that the number may be, instead of the least.
        unit: Behind the number.
    """

    row: str
    benchmark: str
    ratios: tuple[str, ...]
    goal: float
    most: bool = False
    unit: str = ""

    def reached(self, value: float) -> bool:
        """Whether a number reaches the goal."""
        return value <= self.goal if self.most else value >= self.goal


CALLS = {"prefill": "reading 1,024 tokens", "decode": "writing 128 tokens"}


def _steps(family: str, dtype: str, peers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"step_{family}_tiny_{dtype}_vs_{peer}" for peer in peers)


def _calls(call: str, model: str, *peers: str) -> tuple[str, ...]:
    return tuple(f"{call}_{model}_vs_{peer}" for peer in peers)


STEP, STATES = "training step, width 128", "states_at_64_vs_transformer_lens_eager_scan_2048"
MAMBA_PEERS, NEOX_PEERS = ("mambapy", "compiled"), ("eager", "compiled")
LARGE = {"Mamba 2.8 B": ("mamba-2.8b", 1.5, 1.0), "Pythia 2.8 B": ("pythia-2.8b", 1.0, 1.0)}
SMALL = {"Mamba 130 M": ("mamba-130m", 1.5, 1.0), "Pythia 160 M": ("pythia-160m", 1.0, 1.0)}
GOALS = (
    Goal("selective scan, forward + backward", "scan", ("scan_vs_mambapy_kept_memory",), 35),
    Goal(f"Mamba {STEP}, float32", "train_step", _steps("mamba", "float32", MAMBA_PEERS), 10),
    Goal(f"Mamba {STEP}, bfloat16", "train_step", _steps("mamba", "bf16", MAMBA_PEERS), 10),
    Goal(f"GPT-NeoX {STEP}, float32", "train_step", _steps("transformer", "float32", NEOX_PEERS), 1.15),
    Goal(f"GPT-NeoX {STEP}, bfloat16", "train_step", _steps("transformer", "bf16", NEOX_PEERS), 1.15),
    *(
        Goal(f"{title}, {words}", "inference", _calls(call, model, "transformers", "llama_cpp"), goal)
        for title, (model, *aims) in (LARGE | SMALL).items()
        for (call, words), goal in zip(CALLS.items(), aims, strict=True)
    ),
    *(
        Goal(f"{title}, 8 bits against 16, {CALLS['decode']}", "inference",
             (f"decode_{model}_8bit_vs_bfloat16",), 1.7)
        for title, (model, *_) in (LARGE | SMALL).items()
    ),
    Goal("states at 64 of 2,048 positions", "probes", (STATES,), 5),
    Goal("a grid of patches, GPT-NeoX", "probes", ("patch_grid_vs_transformer_lens_neox",), 10),
    Goal("a grid of patches, Mamba", "probes", ("patch_grid_vs_transformer_lens",), 40),
    Goal("idle share of 32 cores, backward scan", "scan", ("scan_idle_share_32_cores",), 0, True),
    Goal("first training step, kernels compiled", "start", ("first_step_compiling_seconds",), 15, True, " s"),
    Goal("`synthetic.run --help`", "start", ("help_seconds",), 0.3, True, " s"),
)  # fmt: skip


def read(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return what was measured: machine -> benchmark -> its JSON; machines in the order of their names.

    Args:
        folder: Of the results.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*/*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if not result["quick"]:
            found.setdefault(path.parent.name, {})[path.stem] = result
    return found


def number(ratio: Any, unit: str = "") -> str:
    """Return a ratio, with the range of its pairs if it has one.

    Args:
        ratio: A number, or median, low and high.
        unit: Behind it.
    """
    if isinstance(ratio, list):
        median, low, high = (f"{value:.3g}" for value in ratio)
        return f"{median}{unit} ({low} to {high})" if low != high else f"{median}{unit}"
    return f"{ratio:.3g}{unit}"


def middle(ratio: Any) -> float:
    """Return the median of a ratio, or the number itself."""
    return float(ratio[0] if isinstance(ratio, list) else ratio)


def worst(goal: Goal, results: Results) -> tuple[str, Any] | None:
    """Return name and value of a goal's smallest ratio, that to its best peer; None if there is none."""
    ratios = results.get(goal.benchmark, {}).get("ratios", {})
    there = [(name, ratios[name]) for name in goal.ratios if name in ratios]
    return min(there, key=lambda pair: middle(pair[1]), default=None)


def peer(name: str) -> str:
    """Return whom a ratio compares with, from its name; "" if nobody."""
    known = {"transformer lens": "transformer-lens", "llama cpp": "llama.cpp", "eager": "transformers",
             "compiled": "transformers, compiled", "bfloat16": ""}  # fmt: skip
    said = name.partition("_vs_")[2].replace("_", " ").removesuffix(" kept memory")
    return next((words for key, words in known.items() if said.startswith(key)), said)


def goals(results: Results) -> str:
    """Return the table of goals of one machine."""
    rows = []
    for goal in GOALS:
        found = worst(goal, results)
        wanted = f"{'≤' if goal.most else '≥'} {goal.goal:g}{goal.unit}"
        if found is None:
            rows.append([goal.row, wanted, MISSING, "", ""])
        else:
            name, value = found
            reached = "yes" if goal.reached(middle(value)) else "**no**"
            rows.append([goal.row, wanted, number(value, goal.unit), peer(name), reached])
    return markdown(["what", "goal", "measured", "best peer", "reached"], rows)


def every(results: Results) -> str:
    """Return all ratios of one machine."""
    rows = [
        [name, f"`{ratio}`", number(value)]
        for name, result in results.items()
        for ratio, value in result["ratios"].items()
    ]
    return markdown(["benchmark", "ratio", "number (range of pairs)"], rows)


def growth(results: Results) -> str:
    """Return what a training step costs by length, batch and width, of one machine; "" if not measured."""
    found = results.get("train_step", {}).get("facts", {}).get("growth", {})
    rows = [
        [title, f"{row['microseconds_per_token']:.1f}", f"{row['peak_mib'] / 1024:.2f}"]
        for title, row in found.items()
    ]
    return markdown(["training step", "microseconds a token", "peak, GiB"], rows) if rows else MISSING + "."


def machine(results: Results) -> str:
    """Return the line that says where numbers come from."""
    about = next(iter(results.values()))["machine"]
    versions = {"torch": about["packages"]["torch"], **about["peers"]}
    commits = sorted({(result["machine"]["commit"] or "?")[:8] for result in results.values()})
    days = sorted({result["machine"]["day"] for result in results.values()})
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{about['processor']}, {about['vectors']}, {about['threads']} threads; {software}; "
        f"commit {', '.join(commits)}; {', '.join(days)}."
    )


def sections(found: Mapping[str, Results]) -> Iterator[str]:
    """Yield Markdown for every machine."""
    for name, results in found.items():
        yield f"## {name}\n\n{machine(results)}\n\n### Goals\n\n{goals(results)}"
        yield f"### Cost of a training step by shape\n\n{growth(results)}"
        yield f"### All ratios\n\n{every(results)}"


def short(found: Mapping[str, Results]) -> str:
    """Return README's table: how many times as fast as the best peer, a column for each machine."""
    rows = []
    for goal in (goal for goal in GOALS if not goal.most):
        each = [worst(goal, results) for results in found.values()]
        if any(each):
            rows.append([goal.row, *(MISSING if one is None else _cell(*one) for one in each)])
    heads = [next(iter(results.values()))["machine"] for results in found.values()]
    return markdown(["times as fast as the best peer", *(_head(about) for about in heads)], rows)


def _cell(name: str, value: Any) -> str:
    """A ratio in bold if it is below 1, and whom it compares with."""
    text = f"**{number(value)}**" if middle(value) < 1 else number(value)
    return f"{text} {peer(name)}".rstrip()


def _head(about: Mapping[str, Any]) -> str:
    return f"{about['processor']}, {about['vectors']}, {about['threads']} threads"


def filled(text: str, found: Mapping[str, Results]) -> str:
    """Return README or docs/speed.md with its part made anew.

    Args:
        text: One of the two.
        found: From `read`.
    """
    made = {"speed": short(found), "results": "\n\n".join(sections(found)) or f"{MISSING.capitalize()}."}
    return fill(text, {name: table for name, table in made.items() if f"<!-- {name} -->" in text})


def main() -> None:
    """Write both pages."""
    found = read()
    for path in (ROOT / "README.md", ROOT / "docs" / "speed.md"):
        store.write_bytes(path, filled(path.read_text(encoding="utf-8"), found).encode())


if __name__ == "__main__":
    main()
