"""The table of docs/learnability.md from results.csv: `python -m studies.learnability.report`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "learnability.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def table(results: pd.DataFrame) -> str:
    """Markdown: per variant and diet the longest length learned by each seed and the held-out accuracy.

    results: the columns of results.csv. Accuracy is the mean over seeds with the range of the seeds.
    """
    lines = [
        "| model | diet | longest length learned, by seed | where training ended: length (accuracy) "
        "| accuracy at 256, mean [min, max] | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for (variant, diet), rows in results.groupby(["variant", "diet"], sort=False):
        rows = rows.sort_values("seed")
        learned = ", ".join(str(n) if n else "–" for n in rows.longest_learned)
        ended = ", ".join(
            f"{n} ({a:.2f})" for n, a in zip(rows.train_length, rows.accuracy_at_train_length, strict=True)
        )
        a = rows.accuracy_at_256
        lines.append(
            f"| {variant} | {diet} | {learned} | {ended} | {a.mean():.3f} [{a.min():.3f}, {a.max():.3f}] "
            f"| {rows.seconds.mean():.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    made = table(pd.read_csv(HERE / "results.csv"))
    DOCUMENT.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
