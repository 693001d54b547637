"""The tables of docs/learnability.md from the results: `python -m studies.learnability.report`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from scipy import stats

from analysis.tables import fill

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "learnability.md"


def grid_table(results: pd.DataFrame) -> str:
    """Markdown, a line per variant and diet: the longest length that each seed learned and where it ended.

    results: the columns of grid.csv. Accuracies are on held-out sequences with one query; at 256 the mean
    over seeds with its 95 % t-interval, cut to [0, 1].
    """
    lines = [
        "| model | diet | longest length learned, by seed | where training ended: length (accuracy) "
        "| accuracy at 256, mean [95 % CI] | median seconds |",
        "|---|---|---|---|---|---|",
    ]
    for (variant, diet), rows in results.groupby(["variant", "diet"], sort=False):
        rows = rows.sort_values("seed")
        learned = ", ".join(str(n) if n else "–" for n in rows.longest_learned)
        ended = ", ".join(
            f"{n} ({a:.2f})" for n, a in zip(rows.train_length, rows.accuracy_at_train_length, strict=True)
        )
        mean, low, high = interval(rows.accuracy_at_256)
        lines.append(
            f"| {variant} | {diet} | {learned} | {ended} | {mean:.3f} [{low:.3f}, {high:.3f}] "
            f"| {rows.seconds.median():.0f} |"
        )
    return "\n".join(lines)


def interval(values: pd.Series) -> tuple[float, float, float]:
    """Mean and 95 % t-interval over seeds of an accuracy; the interval is the whole range for one seed."""
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return mean, 0.0, 1.0
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5)
    return mean, max(0.0, mean - half), min(1.0, mean + half)


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
