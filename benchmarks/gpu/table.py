"""The Markdown of docs/gpu.md from the JSON of `benchmarks.cuda`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


def markdown(found: dict[str, Any]) -> str:
    """The tables: where it ran, the operators, the models.

    Args:
        found: What the JSON holds.

    Returns:
        Markdown, without a line break at its end.
    """
    here = found["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in sorted(here["packages"].items()) if version)
    said = f"{here['device']}, driver {here['driver'] or 'unknown'}; {packages}. A copy moves "
    said += f"{found['bandwidth'] / 1e9:,.0f} GB/s."
    verdict = f"**{len(found['exceeded'])} errors exceed their limits.**" if found["exceeded"] else ""
    sizes = f"Operators forward and backward in bfloat16, over the memory floor's time. {verdict}".strip()
    return "\n\n".join([said, sizes, operators(found), "Models in bfloat16:", presets(found)])


def operators(found: dict[str, Any]) -> str:
    """A row for each preset, operator and size, a column for each route."""
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in found["operators"]:
        key = row["preset"], row["operator"], f"{row['batch']} x {row['length']:,}"
        cells = rows.setdefault(key, {"floor": f"{1e3 * row['floor_seconds']['both']:.3f}"})
        cells[row["route"]] = f"{1e3 * row['seconds']['both']:.3f}" if "seconds" in row else "-"
        if "errors" in row:
            cells[row["route"]] += f" ({max(map(share, row['errors'].values())):.2f})"
    routes = found["routes"]
    head = [
        "preset",
        "operator",
        "batch x length",
        "floor, ms",
        *(f"{r}, ms (error / limit)" for r in routes),
    ]
    body = (
        [*key, cells["floor"], *(cells.get(route, "-") for route in routes)] for key, cells in rows.items()
    )
    return _table(head, body)


def share(result: dict[str, float | None]) -> float:
    """A result's error over its limit; infinite for NaN, which JSON holds as null."""
    error, limit = result["error"], result["limit"]
    if error is None or limit is None:
        return math.inf
    return error / limit if limit else math.inf * error if error else 0.0


def presets(found: dict[str, Any]) -> str:
    """A row for each preset and route."""
    head = ["preset", "route", "training, tokens/s", "peak, GiB", "floor / time", "decoding, tokens/s",
            "floor / time"]  # fmt: skip
    body = []
    for row in found["models"]:
        cells = [row["preset"], row["route"]]
        for part in ("training", "decoding"):
            numbers = row[part]
            if "why" in numbers:
                cells += [numbers["why"] if len(numbers["why"]) < 40 else "-"]
                cells += ["-"] * (2 if part == "training" else 1)
                continue
            floor = numbers["floor_bytes"] / found["bandwidth"]
            peak = [_gib(numbers["peak_bytes"])] if part == "training" else []
            cells += [f"{numbers['tokens_per_second']:,.0f}", *peak, f"{floor / numbers['seconds']:.2f}"]
        body.append(cells)
    return _table(head, body)


def _gib(number: int | None) -> str:
    return "-" if number is None else f"{number / 2**30:.2f}"


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
