"""Geometry of position tokens in trained models: are neighbouring positions neighbours in space?

The follow-up (Retrievit, arXiv 2603.02874) reports that SSMs learn position tokens in order and Transformers
do not, from PCA and cosine maps of embedding rows; its script takes rows of symbols for positions unless the
length is 100, and interpolates them. Here the rows are the vocabulary's own position tokens, none is made up,
and three tables are told apart: where answers are read out, where position tokens enter, and the learned
positions of attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.settings import label, looks, variants
from ssm_retrieval.errors import UserError
from ssm_retrieval.training.store import WEIGHTS
from ssm_retrieval.training.tables import load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 32  # positions of a cosine map, evenly spaced; all of them enter the statistics
SHUFFLES = 200
TABLES = {
    "readout": "output rows of <p_k>",
    "input": "input rows of <p_k>",
    "learned": "learned positions",
}


def cosines(rows: np.ndarray) -> np.ndarray:
    """Cosine similarity of rows [N, d] after their mean is taken away, [N, N].

    Without centring, a direction that all rows share would make every pair similar.
    """
    centred = rows - rows.mean(axis=0)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.where(norms > 0, norms, 1.0)
    return unit @ unit.T


def principal(rows: np.ndarray, components: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """PCA of rows [N, d] by singular values: coordinates [N, components], shares of variance."""
    centred = rows - rows.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    share = s**2 / max(float((s**2).sum()), np.finfo(float).tiny)
    return u[:, :components] * s[:components], share[:components]


def locality(cosine: np.ndarray) -> float:
    """Spearman correlation of cosine similarity with closeness `-|i - j|` over all pairs i < j.

    Args:
        cosine: [N, N], of N positions in their order.

    Returns:
        A number in [-1, 1]; about 0 if the positions have no order.

    Raises:
        UserError: There are fewer than 3 positions.
    """
    if len(cosine) < 3:
        raise UserError(f"{len(cosine)} positions have no order to speak of; give at least 3")
    i, j = np.triu_indices(len(cosine), 1)
    return float(stats.spearmanr(cosine[i, j], i - j).statistic)


def shuffled_locality(cosine: np.ndarray, shuffles: int = SHUFFLES, seed: int = 0) -> tuple[float, float]:
    """95 % range of `locality` if the positions' names are shuffled: what no order looks like.

    Args:
        cosine: [N, N].
        shuffles: How often.
        seed: Of the shuffles.

    Returns:
        The lower and the upper end.
    """
    # shuffling moves the ranks of cosines about without changing them, so they are made once
    n = len(cosine)
    i, j = np.triu_indices(n, 1)
    ranks, closeness = (_standardised(stats.rankdata(values)) for values in (cosine[i, j], i - j))
    square = np.zeros((n, n))
    square[i, j] = square[j, i] = ranks
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(shuffles):
        order = rng.permutation(n)
        values.append(float((square[np.ix_(order, order)][i, j] * closeness).mean()))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _standardised(values: np.ndarray) -> np.ndarray:
    spread = values.std()
    return (values - values.mean()) / (spread if spread > 0 else 1.0)


def position_rows(folder: Path) -> dict[str, np.ndarray]:
    """Rows of position tokens in a trained model.

    Args:
        folder: The run's, runs/<id>.

    Returns:
        Name of one of `TABLES` -> rows [N, d]. "input" is there only if it is not the readout itself (tied
        embeddings). "learned" has the rows of the places where a context's symbols stand.

    Raises:
        UserError: The task has no position tokens.
    """
    from ssm_retrieval.training import store
    from synthetic import records, tasks

    plan = records.config(folder)["plan"]
    task = tasks.build(plan["task"], **plan["task_options"])
    vocabulary = task.vocabulary
    if not vocabulary.num_positions:
        raise UserError(f"task {plan['task']} of {folder} has no position tokens")
    n, first = plan["seq_len"], vocabulary.first_position
    model = store.load_model(folder)
    embedding, head = model.embedding, model.head
    found = {"readout": head.weight[first : first + n]}
    if head.weight is not embedding.weight:
        found["input"] = embedding.weight[first : first + n]
    for name, table in model.named_parameters():
        if "embed_pos" in name:
            found["learned"] = table[context_places(task)]
    return {name: rows.detach().float().numpy() for name, rows in found.items()}


def context_places(task: Any) -> list[int]:
    """Places of the N symbols of a full context in an input with one query, read from an example."""
    rng = np.random.default_rng(0)
    context, target = task.draw(rng, 1, task.seq_len, 1)
    ids = task.assemble(context, target).input_ids[0].tolist()
    symbols = (context[0] + task.vocabulary.first_symbol).tolist()
    query = symbols[int(target[0, 0])]
    if ids.index(query) < ids.index(task.vocabulary.bos):  # asked before the context
        ids[ids.index(query)] = -1
    return [ids.index(symbol) for symbol in symbols]


def measure(runs: str | Path, task: str = "position") -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Measure the position tokens of finished models.

    Models are those of their family's usual state size, at the longest length, 8 or more, that every seed
    learned to 0.95.

    Args:
        runs: Folder of runs.
        task: Whose runs.

    Returns:
        Three tables. Summary, a row per run and table: locality, its range for shuffled names, variance of
        two PCA components. Map: cosines of `SHOWN` positions. Points: PCA coordinates. The latter two are of
        the first seed. All are empty if no model is left.
    """
    table = load(runs)
    table = label(table[(table["purpose"] == "report") & (table["task"] == task)])
    final = table[(table["kind"] == "final") & table["usual_state"]]
    final = final[
        (final["layout"] == "suffix") & (final["setting"].str.contains("dense")) & (final["seq_len"] >= 8)
    ]
    learned = final.groupby(["variant", "seq_len"])["accuracy"].transform("min") >= 0.95
    final = final[learned]
    final = final[final["seq_len"] == final.groupby("variant")["seq_len"].transform("max")]
    summary: list[dict[str, Any]] = []
    maps, points = [], []
    for row in final.sort_values(["variant", "seed"]).to_dict("records"):
        folder = Path(runs) / row["run"]
        if not (folder / WEIGHTS).exists():
            continue
        keys = {k: row[k] for k in ("variant", "model", "position", "seq_len", "seed", "run")}
        for name, rows in position_rows(folder).items():
            cosine, (where, share) = cosines(rows), principal(rows)
            low, high = shuffled_locality(cosine)
            summary.append(
                keys
                | dict(
                    table=name,
                    locality=locality(cosine),
                    shuffled_low=low,
                    shuffled_high=high,
                    variance_2d=float(share.sum()),
                )
            )
            if row["seed"] == final.loc[final["variant"] == row["variant"], "seed"].min():
                shown = np.unique(np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).round().astype(int))
                i, j = (part.ravel() for part in np.meshgrid(shown, shown, indexing="ij"))
                maps.append(pd.DataFrame(keys | dict(table=name, i=i, j=j, cosine=cosine[i, j].round(4))))
                at = dict(table=name, target=shown, x=where[shown, 0].round(4), y=where[shown, 1].round(4))
                points.append(pd.DataFrame(keys | at))
    empty = pd.DataFrame()
    return pd.DataFrame(summary), pd.concat(maps) if maps else empty, pd.concat(points) if points else empty


def geometry(summary: pd.DataFrame, maps: pd.DataFrame, points: pd.DataFrame) -> Figure:
    """Draw the geometry of position tokens; the arguments are the tables of `measure`.

    Args:
        summary: Locality of every run, drawn below.
        maps: Cosines, a map per variant and table.
        points: PCA coordinates, coloured by position.

    Returns:
        The figure: a column per variant and table.
    """
    import matplotlib.pyplot as plt
    import seaborn

    cells = [
        (variant, table)
        for variant in variants(maps)
        for table in TABLES
        if ((maps["variant"] == variant) & (maps["table"] == table)).any()
    ]
    figure = plt.figure(figsize=(2.5 * len(cells) + 0.8, 8.2), layout="constrained")
    grid = figure.add_gridspec(3, len(cells), height_ratios=(1, 1, 1.1))
    for column, (variant, table) in enumerate(cells):
        part = maps[(maps["variant"] == variant) & (maps["table"] == table)]
        wide = part.pivot_table(index="i", columns="j", values="cosine")
        top, middle = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
        seaborn.heatmap(
            wide, ax=top, vmin=-1, vmax=1, cmap="vlag", cbar=column == len(cells) - 1, square=True,
            xticklabels=max(1, len(wide) // 4), yticklabels=max(1, len(wide) // 4),
            cbar_kws=dict(label="cosine"),
        )  # fmt: skip
        length = int(part["seq_len"].iloc[0])
        top.set_title(f"{variant}\n{TABLES[table]}\nlength {length}", fontsize=8)
        top.set(xlabel="position", ylabel="position" if column == 0 else "")
        dots = points[(points["variant"] == variant) & (points["table"] == table)]
        middle.plot(dots["x"], dots["y"], color="0.8", lw=0.7, zorder=0)
        middle.scatter(dots["x"], dots["y"], c=dots["target"], cmap="viridis", s=14)
        middle.set(xlabel="PC 1", ylabel="PC 2" if column == 0 else "", xticks=[], yticks=[])
    bottom = figure.add_subplot(grid[2, :])
    _localities(bottom, summary, cells)
    return figure


def _localities(ax: Any, summary: pd.DataFrame, cells: list[tuple[str, str]]) -> None:
    look = looks(summary)
    for x, (variant, table) in enumerate(cells):
        part = summary[(summary["variant"] == variant) & (summary["table"] == table)]
        ax.bar(
            x, part["shuffled_high"].max() - part["shuffled_low"].min(), bottom=part["shuffled_low"].min(),
            width=0.7, color="0.85", label="95 % range for shuffled positions" if x == 0 else None,
        )  # fmt: skip
        ax.plot([x] * len(part), part["locality"], look[variant]["marker"], color=look[variant]["color"])
    ax.axhline(0, color="0.4", lw=1)
    ax.set_xticks(range(len(cells)), [f"{v}\n{TABLES[t]}" for v, t in cells], fontsize=8)
    ax.set(ylabel="locality (Spearman of\ncosine with closeness)", ylim=(-0.4, 1.03))
    ax.legend(loc="upper right", frameon=True, fontsize=8)
