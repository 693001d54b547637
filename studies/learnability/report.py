"""The tables of docs/learnability.md from the results: `python -m studies.learnability.report`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis.tables import by_seed, fill

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "learnability.md"


def grid_table(results: pd.DataFrame) -> str:
    """Markdown, a line per variant and diet: the longest length that each seed learned and where it ended.

    results: the columns of grid.csv. Accuracies are on held-out sequences with one query.
    """
    lines = [
        "| model | diet | longest length learned, by seed | where training ended: length (accuracy) "
        "| accuracy at 256, by seed | median seconds |",
        "|---|---|---|---|---|---|",
    ]
    for (variant, diet), rows in results.groupby(["variant", "diet"], sort=False):
        rows = rows.sort_values("seed")
        learned = ", ".join(str(n) if n else "–" for n in rows.longest_learned)
        ended = ", ".join(
            f"{n} ({a:.2f})" for n, a in zip(rows.train_length, rows.accuracy_at_train_length, strict=True)
        )
        lines.append(
            f"| {variant} | {diet} | {learned} | {ended} | {by_seed(rows.accuracy_at_256)} "
            f"| {rows.seconds.median():.0f} |"
        )
    return "\n".join(lines)


def tuning_table(results: pd.DataFrame) -> str:
    """Markdown, a line per variant: what each learning rate reached within the steps."""
    rates = sorted(set(results.lr))
    lines = ["| model | " + " | ".join(f"lr {lr:g}" for lr in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for variant, rows in results.groupby("variant", sort=False):
        rows = rows.sort_values("lr")
        columns = (rows.longest_learned, rows.train_length, rows.accuracy_at_train_length, rows.steps)
        cells = (
            f"up to {learned or '–'}, ended at {length} ({accuracy:.2f}), {steps} steps"
            for learned, length, accuracy, steps in zip(*columns, strict=True)
        )
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES = {"grid": grid_table, "tuning": tuning_table}


def main() -> None:
    """Replace what stands between the markers `<!-- grid -->` and `<!-- /grid -->`, and so for tuning."""
    made = {name: table(pd.read_csv(HERE / f"{name}.csv")) for name, table in TABLES.items()}
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
