"""Tables and figure of this study, from probed runs of studies/retrieval-cpu:

    python studies/why-mamba-lags/contrasts.py RUNS PROBES

RUNS is the folder of that sweep, PROBES one with the output of
`python -m probes.run RUNS/<id> --out PROBES/<id>` for each probed run. Writes results.csv beside this file
(one row per run, layer and quantity), the figure, and replaces what stands between `<!-- NAME -->` and
`<!-- /NAME -->` in README.md. Without arguments it starts from results.csv.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics import mean_interval
from analysis.style import NAMES, family_colors, theme
from analysis.tables import fill
from synthetic import store

HERE = Path(__file__).parent
QUANTITIES = {  # name: (title of the panel, value that means "no difference")
    "write": "written by the target\n/ by a distractor",
    "kept": "kept of what the target wrote\n/ of what distractors wrote",
    "share": "target's part of the state\n/ a distractor's, at the answer",
}
SETTINGS = {"suffix": "query last", "prefix": "query first"}
STYLES = {"suffix": dict(linestyle="--", marker="s", mfc="white"), "prefix": dict(linestyle="-", marker="o")}


def collect(runs: Path, probes: Path) -> pd.DataFrame:
    """One row per run, weights, layer and quantity; only single-query runs and those of length 32."""
    rows: list[dict[str, Any]] = []
    for folder in sorted(path.parent for path in probes.glob("*/summary.md")):
        saved = store.read_json(runs / folder.name / "config.json")
        plan = saved["plans"][0]
        result = store.read_json(runs / folder.name / plan["family"] / "result.json")
        fixed = dict(
            run=folder.name,
            model=plan["family"],
            layout=plan["task_options"]["layout"],
            queries="single" if plan["queries"] == 1 else "dense",
            seq_len=plan["seq_len"],
            seed=plan["seed"],
            accuracy=result["accuracy"],
        )
        rows += [{**fixed, **row} for row in measured(folder)]
    return pd.DataFrame(rows)


def measured(folder: Path) -> list[dict[str, Any]]:
    """weights, layer, quantity, value of one probed run."""
    rows: list[Any] = []
    if (folder / "updates.csv").exists():
        table = pd.read_csv(folder / "updates.csv")
        table = table[(table["part"] == "contrast") & (table["quantity"] == "write")]
        rows += table[["weights", "layer", "quantity", "value"]].to_dict("records")
    if (folder / "retention.csv").exists():
        table = pd.read_csv(folder / "retention.csv")
        table = table[table["part"] == "contrast"]
        rows += table[["weights", "layer", "quantity", "value"]].to_dict("records")
    for name, part, quantity in (
        ("lens", "accuracy", "lens"),
        ("linear", "capacity", "tokens"),
        ("linear", "answer", "answer"),
    ):
        if (folder / f"{name}.csv").exists():
            table = pd.read_csv(folder / f"{name}.csv")
            table = table[table["part"] == part]
            if "site" in table:
                table = table[table["site"] == "state"]
            rows += table[["weights", "layer", "value"]].assign(quantity=quantity).to_dict("records")
    return rows


def ratio_interval(values: pd.Series) -> tuple[float, float, float]:
    """Geometric mean of ratios over seeds with Student's 95 % interval of the logarithm."""
    mean, low, high = mean_interval(np.log(values))
    return float(np.exp(mean)), float(np.exp(low)), float(np.exp(high))


def contrasts(table: pd.DataFrame) -> str:
    """Markdown: target over distractor, query last against first, by layer."""
    part = table[
        (table["queries"] == "single") & (table["seq_len"] == 16) & table["quantity"].isin(QUANTITIES)
    ]
    lines = [
        "| model | quantity | layer | query last | query first | query first, untrained |",
        "|---|---|---|---|---|---|",
    ]
    for (model, quantity, layer), cell in part.groupby(["model", "quantity", "layer"]):
        found = []
        for layout, weights in (("suffix", "trained"), ("prefix", "trained"), ("prefix", "untrained")):
            values = cell.loc[(cell["layout"] == layout) & (cell["weights"] == weights), "value"]
            found.append("–" if values.empty else "{:.2f} [{:.2f}, {:.2f}]".format(*ratio_interval(values)))
        head = f"| {NAMES[str(model)]} | {quantity} | {int(float(str(layer)))} | "
        lines.append(head + " | ".join(found) + " |")
    return "\n".join(lines)


def tokens(table: pd.DataFrame) -> str:
    """Markdown: expected number of context symbols that the best layer's state gives up to a linear probe."""
    part = table[table["quantity"] == "tokens"]
    best = part.groupby(["model", "layout", "queries", "seq_len", "weights", "seed", "run"])["value"].max()
    accuracy = table.drop_duplicates("run").set_index("run")["accuracy"]
    lines = [
        "| model | layout, queries | length | final accuracy, by seed | symbols decodable | untrained |",
        "|---|---|---|---|---|---|",
    ]
    frame = best.reset_index()
    for (model, layout, queries, length), cell in frame.groupby(["model", "layout", "queries", "seq_len"]):
        found = []
        for weights in ("trained", "untrained"):
            values = cell.loc[cell["weights"] == weights, "value"]
            found.append("{:.1f} [{:.1f}, {:.1f}]".format(*mean_interval(values)))
        scores = ", ".join(f"{accuracy[run]:.2f}" for run in cell.sort_values("seed")["run"].unique())
        setting = f"{SETTINGS[str(layout)]}, {queries}"
        lines.append(f"| {NAMES[str(model)]} | {setting} | {length} | {scores} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def draw(table: pd.DataFrame) -> Any:
    """Target over distractor by layer: a row per SSM family, a panel per quantity, seeds as points."""
    import matplotlib.pyplot as plt

    part = table[(table["queries"] == "single") & (table["seq_len"] == 16) & (table["weights"] == "trained")]
    part = part[part["quantity"].isin(QUANTITIES)]
    models = [m for m in ("mamba", "mamba2") if m in set(part["model"])]
    shape = (3.3 * len(QUANTITIES), 2.6 * len(models) + 0.5)
    figure, axes = plt.subplots(
        len(models),
        len(QUANTITIES),
        figsize=shape,
        squeeze=False,
        sharex=True,
        sharey="col",
        layout="constrained",
    )
    for i, model in enumerate(models):
        row = axes[i]
        for ax, (quantity, title) in zip(row, QUANTITIES.items(), strict=True):
            for layout, style in STYLES.items():
                cell = part[
                    (part["model"] == model) & (part["layout"] == layout) & (part["quantity"] == quantity)
                ]
                color = family_colors()[model]
                ax.plot(cell["layer"], cell["value"], ".", color=color, alpha=0.5)
                mean = np.exp(np.log(cell["value"]).groupby(cell["layer"]).mean())
                ax.plot(mean.index, mean, color=color, label=SETTINGS[layout], **style)
            ax.axhline(1, color="0.4", linestyle=":", lw=1)
            ax.set(yscale="log", xticks=sorted(part["layer"].unique()))
            if i == 0:
                ax.set_title(title, fontsize=9)
            if i == len(models) - 1:
                ax.set_xlabel("layer")
        row[0].set_ylabel(f"{NAMES[model]}\nratio (log)")
        row[0].legend(fontsize=8)
    return figure


def filled(text: str) -> str:
    """README with its tables made anew from results.csv."""
    table = pd.read_csv(HERE / "results.csv")
    return fill(text, {"contrasts": contrasts(table), "tokens": tokens(table)})


def main(arguments: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    if arguments:
        table = collect(Path(arguments[0]), Path(arguments[1]))
        store.write_bytes(HERE / "results.csv", table.to_csv(index=False, float_format="%.6g").encode())
    table = pd.read_csv(HERE / "results.csv")
    with theme():
        figure = draw(table)
        for kind, more in (("png", dict(dpi=150)), ("pdf", dict(metadata={"CreationDate": None}))):
            content = io.BytesIO()
            figure.savefig(content, format=kind, **more)
            store.write_bytes(HERE / f"contrast.{kind}", content.getvalue())
    text = filled((HERE / "README.md").read_text(encoding="utf-8"))
    store.write_bytes(HERE / "README.md", text.encode())


if __name__ == "__main__":
    main(sys.argv[1:])
