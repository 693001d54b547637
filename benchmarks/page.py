"""docs/speed.md and README's table of speeds, from the results of benchmarks: `python -m benchmarks.page`.

Replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->`. `python -m benchmarks.all` writes the
results, benchmarks/results/MACHINE/NAME.json. Those of --quick are no measurements and never shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from analysis.tables import fill
from benchmarks.common import RESULTS, ROOT
from benchmarks.goals import CALLS, GOALS, Outcome, Results, middle, outcome, peer, verdict
from ssm_retrieval.tables import markdown
from ssm_retrieval.training import store

MISSING = "not measured"


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


def digits(value: float) -> str:
    """Return a number with three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def number(ratio: Any, unit: str = "") -> str:
    """Return a ratio, with the range of its pairs if it has one.

    Args:
        ratio: A number, or median, low and high.
        unit: Behind it.
    """
    if not isinstance(ratio, list):
        return digits(ratio) + unit
    center, low, high = (digits(value) for value in ratio)
    return f"{center}{unit} ({low} to {high})" if low != high else center + unit


def against(found: Outcome) -> str:
    """Return the best peer of a row, and the others that it has no number of."""
    why = [f"{name} {MISSING}" for name in found.missing] + [f"{name} failed" for name in found.left_out]
    return peer(found.name) + (f" ({'; '.join(why)})" if why else "")


# --- tables of one machine --------------------------------------------------------------------------------


def goals(results: Results) -> str:
    """Return the table of goals."""
    rows = []
    for goal in GOALS:
        found = outcome(goal, results)
        wanted = f"{'≤' if goal.most else '≥'} {goal.goal:g}{goal.unit}"
        if found is None:
            rows.append([goal.row, wanted, MISSING, "", ""])
        else:
            measured = number(found.value, goal.unit)
            rows.append([goal.row, wanted, measured, against(found), verdict(goal, found)])
    return markdown(["what", "goal", "measured", "best peer", "reached"], rows)


def speeds(results: Results) -> str:
    """Return tokens a second, memory and distance of the logits of every side of benchmarks.inference."""
    rows = []
    for name, fact in results.get("inference", {}).get("facts", {}).items():
        for side, calls in fact["seconds"].items():
            rates = [digits(fact["work"][call] / median(calls[call])) for call in CALLS]
            peak = f"{fact['peak_mib'][side] / 1024:.2f}"
            rows.append([f"`{name}`", side, *rates, peak, f"{fact['kl']:.1e}"])
    head = ["comparison", "side", "reading, tokens/s", "writing, tokens/s", "peak, GiB", "KL of the sides"]
    return markdown(head, rows) if rows else MISSING.capitalize() + "."


def growth(results: Results) -> str:
    """Return what a training step costs by length, batch, width and threads."""
    found = results.get("train_step", {}).get("facts", {}).get("growth", {})
    rows = [
        [title, f"{row['microseconds_per_token']:.1f}", f"{row['peak_mib'] / 1024:.2f}"]
        for title, row in sorted(found.items(), key=lambda pair: _shape(pair[0]))
    ]
    head = ["training step", "microseconds a token", "peak, GiB"]
    return markdown(head, rows) if rows else MISSING.capitalize() + "."


def _shape(title: str) -> list[Any]:
    """The order of a shape, such as "mamba 1 x 256, width 128, threads 2": by family, then by the numbers."""
    return [title.partition(" ")[0], *map(int, re.findall(r"\d+", title.partition(" ")[2]))]


def shares(results: Results) -> str:
    """Return how near operators come to what the machine can do at most."""
    found = results.get("limits")
    if found is None:
        return MISSING.capitalize() + "."
    rate = {name: digits(value / 1e9) for name, value in found["rates"].items()}
    text = (
        f"Products {rate['float32']} GFLOP/s in float32 and {rate['bfloat16']} in bfloat16; "
        f"copies {rate['copy']} GB/s, reading {rate['read']} GB/s; {rate['exp']} billion exponentials/s."
    )
    rows = [
        [name, f"{1e3 * row['seconds']:.2f}", f"{1e3 * row['floor']:.2f}", row["by"],
         f"{row['floor'] / row['seconds']:.0%}"]
        for name, row in found["facts"].items()
    ]  # fmt: skip
    head = ["operator", "time, ms", "floor, ms", "bound by", "share"]
    return f"{text}\n\n{markdown(head, rows)}"


def every(results: Results) -> str:
    """Return all ratios."""
    rows = [
        [name, f"`{ratio}`", number(value)]
        for name, result in results.items()
        for ratio, value in result["ratios"].items()
    ]
    return markdown(["benchmark", "ratio", "number (range of pairs)"], rows)


def origins(results: Results) -> str:
    """Return when, at which commit and with what each benchmark ran."""
    rows = []
    for name, result in results.items():
        about = result["machine"]
        versions = {"torch": about["packages"]["torch"], **about["peers"]}
        software = ", ".join(f"{package} {version}" for package, version in versions.items())
        options = ", ".join(f"{key} {value}" for key, value in result.get("given", {}).items())
        commit = about["commit"] or "?"
        rows.append([name, about["day"], commit[:8] + "+" * commit.endswith("+"), software, options])
    return markdown(["benchmark", "day", "commit", "with", "options"], rows)


# --- pages ------------------------------------------------------------------------------------------------


def heading(results: Results) -> str:
    """Return a machine's name."""
    about = next(iter(results.values()))["machine"]
    return f"{about['processor']}, {about['vectors']}, {about['threads']} threads"


TABLES = {
    "Goals": goals,
    "Reading and writing": speeds,
    "Cost of a training step by shape": growth,
    "Share of what the machine can do": shares,
    "All ratios": every,
    "Versions": origins,
}


def sections(found: Mapping[str, Results]) -> Iterator[str]:
    """Yield Markdown for every machine."""
    for results in found.values():
        yield f"## {heading(results)}"
        for title, table in TABLES.items():
            yield f"### {title}\n\n{table(results)}"


def short(found: Mapping[str, Results]) -> str:
    """Return README's table: how many times as fast as the best peer, a column for each machine."""
    rows = []
    for goal in (goal for goal in GOALS if goal.short):
        each = [outcome(goal, results) for results in found.values()]
        if any(each):
            rows.append([goal.row, *(MISSING if one is None else _cell(one) for one in each)])
    if not rows:
        return MISSING.capitalize() + "."
    return markdown(["times as fast as the best peer", *map(heading, found.values())], rows)


def _cell(found: Outcome) -> str:
    """A ratio, in bold if it is below 1, and whom it compares with."""
    text = number(found.value)
    return f"{f'**{text}**' if middle(found.value) < 1 else text} {against(found)}".rstrip()


def filled(text: str, found: Mapping[str, Results]) -> str:
    """Return README or docs/speed.md with its part made anew.

    Args:
        text: One of the two.
        found: From `read`.
    """
    made = {"speed": short(found), "results": "\n\n".join(sections(found)) or MISSING.capitalize() + "."}
    return fill(text, {name: table for name, table in made.items() if f"<!-- {name} -->" in text})


def main() -> None:
    """Write those pages that change."""
    found = read()
    for path in (ROOT / "README.md", ROOT / "docs" / "speed.md"):
        text = path.read_text(encoding="utf-8")
        if (made := filled(text, found)) != text:
            store.write_bytes(path, made.encode())


if __name__ == "__main__":
    main()
