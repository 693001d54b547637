"""What a run shows: a live bar, a table, a curve in the terminal."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ssm_retrieval.registry import ARCHITECTURES
from ssm_retrieval.style import NAMES
from ssm_retrieval.training import display
from synthetic.config import Plan


class Display(display.Display):
    """Listens to `synthetic.trainer.train`; where there is no bar, it prints a line per evaluation."""

    def __init__(self, plan: Plan, console: Console):
        super().__init__(NAMES[plan.family], console, plan.steps or plan.budget, left="left at most")
        self.plan, self.latest, self.done, self.numbers = plan, "-", 0, ""

    def __call__(self, event: str, row: dict[str, Any]) -> None:
        """Show a row of the trainer: of a "step", or of an "evaluation"."""
        if event == "step":
            self.done = row["step"] if self.plan.steps is not None else row["examples"]
            self.numbers = f"loss {row['loss']:.3f}  training at {row['length']:>4}: {row['accuracy']:.2f}"
        elif row["length"] == self.plan.seq_len:
            self.latest = f"{row['accuracy']:.3f}"
            self.line(
                f"{NAMES[row['model']]:<12} step {row['step']:>6}  {row['seconds']:>7.1f} s  "
                f"trained at length {row['train_length']:>5}  loss {row['train_loss']:.3f}  "
                f"validation accuracy at {row['length']}: {row['accuracy']:.3f}"
            )
        numbers = f"{self.numbers}  validation at {self.plan.seq_len}: {self.latest}"
        self.show(self.done, numbers, at_once=event == "evaluation")


def summary(results: list[dict[str, Any]]) -> Table:
    """One line per model: size, cost, accuracy with its 95 % interval, longest length with 0.95."""
    length, count, chance = (results[0][key] for key in ("length", "count", "chance"))
    table = Table(
        title=f"Single-query accuracy at length {length} ({count} held-out, chance {chance:.4f})",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("model", no_wrap=True)
    for name in ("size", "steps", "tokens", "seconds", "accuracy [95 % CI]", "0.95 up to"):
        table.add_column(Text(name), justify="right", no_wrap=True)
    for r in results:
        table.add_row(
            NAMES[r["model"]],
            f"{r['parameters'] / 1e6:.2f} M",
            f"{r['step']:,}",
            f"{r['tokens'] / 1e6:.1f} M",
            f"{r['seconds']:.0f}",
            Text(f"{r['accuracy']:.3f} [{r['ci_low']:.3f}, {r['ci_high']:.3f}]"),
            str(r.get("recalled_length") or "-"),
        )
    return table


def by_length(scores: pd.DataFrame) -> Table:
    """One line per model: accuracy on held-out sequences of every context length.

    Args:
        scores: Rows of by_length.jsonl of all runs.

    Returns:
        A table to print.
    """
    lengths = sorted(scores["length"].unique())
    table = Table(title="Accuracy by context length", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for length in lengths:
        table.add_column(str(length), justify="right", no_wrap=True)
    for family, rows in scores.groupby("model", sort=False):
        at = dict(zip(rows["length"], rows["accuracy"], strict=True))
        table.add_row(NAMES[str(family)], *(f"{at[n]:.2f}" if n in at else "-" for n in lengths))
    return table


def terminal_curve(metrics: pd.DataFrame, width: int = 80, height: int = 16) -> str:
    """Accuracy at the full length against tokens, as text.

    Args:
        metrics: Evaluations, a row each, of one or several runs.
        width: Width in characters.
        height: Height in lines.

    Returns:
        Lines without colours.
    """
    import plotext

    full = metrics[metrics["length"] == metrics["length"].max()].sort_values("tokens")
    plotext.clear_figure()
    plotext.plotsize(width, height)
    for family, rows in full.groupby("model", sort=False):
        x, y = (rows["tokens"] / 1e6).tolist(), rows["accuracy"].tolist()
        plotext.plot(x, y, label=NAMES[str(family)], marker=ARCHITECTURES[str(family)].marker)
    plotext.ylim(0, 1)
    plotext.title(f"validation accuracy at length {int(full['length'].iloc[0])}")
    plotext.xlabel("training tokens (millions)")
    return str(plotext.uncolorize(plotext.build()))


def cells(evaluations: pd.DataFrame) -> Table:
    """One line per cell of a sweep: its seeds, how many got there, their accuracies, the cost of 0.95.

    Shares have Clopper and Pearson's 95 % interval. A mean accuracy has the range of its seeds, which is no
    interval of the mean. The median cost lies between two evaluations.

    Args:
        evaluations: Rows of the results store (`training.tables.load`).

    Returns:
        A table to print.
    """
    from ssm_retrieval.training.outcomes import summarise
    from synthetic.results import cell_of

    keys = cell_of(evaluations)
    rows = summarise(evaluations, by=keys)
    # what only tells families apart, as the depth of a preset, goes without saying
    differs = rows.groupby("model")[[name for name in keys if name != "model"]].nunique(dropna=False) > 1
    varying = ["model", *differs.columns[differs.any()]]
    table = Table(title="Held-out accuracy over seeds", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in varying:
        table.add_column(name.replace("_", " "), no_wrap=True)
    for name in ("at 0.95 [95 %]", "accuracy (range)", "examples to 0.95", "learned up to"):
        table.add_column(Text(name), justify="right", no_wrap=True)
    for _, row in rows.iterrows():
        table.add_row(
            *(Text(_word(row[name])) for name in varying),
            Text(_reached(row)),
            Text(f"{row['accuracy']:.3f}{_range(row)}"),
            _examples(row),
            f"{row['reachable_length']:g}",
        )
    return table


def _word(value: Any) -> str:
    return "-" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)


def _reached(row: Any) -> str:
    """How many runs got there, and the interval of the share that does."""
    return f"{row['reached']}/{row['runs']} [{row['reached_low']:.2f}, {row['reached_high']:.2f}]"


def _range(row: Any) -> str:
    """Lowest and highest seed; nothing for a single one."""
    return "" if row["seeds"] == 1 else f" ({row['accuracy_min']:.3f}-{row['accuracy_max']:.3f})"


def _examples(row: Any) -> str:
    """Between which evaluations the median lies, or what it is above."""
    after, by = row["examples_after"], row["examples"]
    return f"> {after:,.0f}" if by == float("inf") else f"{after:,.0f}-{by:,.0f}"
