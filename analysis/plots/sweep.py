"""The figures of a sweep. Each is a pair: a function that makes a tidy table from the results store, kept as
CSV, and one that draws it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis import settings
from analysis.plots.common import SHARES
from analysis.scaling import accuracy_by_position, fit_power_laws
from ssm_retrieval.statistics import bootstrap_median_time, mean_interval
from ssm_retrieval.style import CONTROLS, legend, panels
from ssm_retrieval.training.outcomes import examples_to_threshold, reachable_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THRESHOLD = 0.95
UNITS = {"examples": "training sequences", "tokens": "training tokens"}
PANEL, COLUMNS = 2.6, 3  # inches, and panels side by side
PLACE, PLACE_UNIT = "place of the target (0 = first, 1 = last)", "final held-out accuracy"
KEYS = ["variant", "setting", "model", "position"]


# --- accuracy while learning ------------------------------------------------------------------------------


def accuracy_table(evaluations: pd.DataFrame) -> pd.DataFrame:
    """Held-out accuracy at the full length during training, for every run with its family's usual state."""
    table = settings.label(evaluations)
    goal = table["kind"].eq("during") & table["length"].eq(table["seq_len"]) & table["usual_state"]
    columns = [*KEYS, "seq_len", "seed", "run", "step", "examples", "tokens", "accuracy", "chance"]
    return table.loc[goal, columns].reset_index(drop=True)


def accuracy_curves(table: pd.DataFrame) -> Figure:
    """A panel per setting and length that has runs: thin lines are runs, thick ones their mean.

    A run that stopped early keeps its last accuracy in the mean.
    """
    looks = settings.looks(table)
    pairs = table[["setting", "seq_len"]].drop_duplicates().itertuples(index=False, name=None)
    cells = sorted(pairs, key=lambda pair: (_setting_order(pair[0]), pair[1]))
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    figure, axes = panels(rows, columns, (PANEL, PANEL), sharex=True, sharey=True)
    for ax in axes.flat[len(cells) :]:
        ax.set_visible(False)
    for k, (ax, (setting, length)) in enumerate(zip(axes.flat, cells, strict=False)):
        part = table[(table["setting"] == setting) & (table["seq_len"] == length)]
        for name, cell in part.groupby("variant"):
            look = looks[str(name)]
            for _, run in cell.groupby("run"):
                ax.plot(run["examples"], run["accuracy"], lw=0.7, alpha=0.45, color=look["color"])
            mean = carried(cell, "examples").mean(axis=1)
            ax.plot(mean.index, mean, lw=2, color=look["color"], linestyle=look["linestyle"])
        _chance(ax, float(part["chance"].iloc[0]))
        ax.set(xscale="log", ylim=SHARES)
        ax.set_title(f"{setting}\nlength {length}", fontsize=9)
        _counts(ax.xaxis, subs=(1.0, 3.0))
        if k % columns == 0:
            ax.set_ylabel("held-out accuracy")
        if k + columns >= len(cells):  # nothing below
            ax.set_xlabel("training sequences")
            ax.tick_params(labelbottom=True)
    _legend(figure, looks)
    return figure


def carried(cell: pd.DataFrame, by: str) -> pd.DataFrame:
    """accuracy by `by` (index) and run (columns); between evaluations and after the last one a run keeps its
    latest accuracy, before its first one it has 0."""
    wide = cell.pivot_table(index=by, columns="run", values="accuracy", aggfunc="last")
    return wide.sort_index().ffill().fillna(0.0)


# --- what it takes to get there ---------------------------------------------------------------------------


def threshold_table(evaluations: pd.DataFrame, by: str = "examples") -> pd.DataFrame:
    """What every run had spent until 0.95, reached = False where that is only a lower bound.

    by: "examples" (training sequences) or "tokens". A length curriculum makes sequences a treacherous unit: a
    run that is stuck at short contexts sees many per step. Tokens per step are the same for all.
    """
    table = settings.label(evaluations)
    outcomes = examples_to_threshold(table[table["usual_state"]], THRESHOLD, by).assign(unit=by)
    return outcomes[[*KEYS, "seq_len", "seed", "run", "unit", "value", "lower", "reached", "accuracy"]]


def scaling_table(evaluations: pd.DataFrame) -> pd.DataFrame:
    """Power laws of the context length behind the fitted lines, by unit, variant and setting."""
    tables = [threshold_table(evaluations, unit) for unit in UNITS]
    return fit_power_laws(pd.concat(tables), by=("unit", "variant", "setting"))


def cost_vs_length(table: pd.DataFrame) -> Figure:
    """log-log: filled points reached 0.95, hollow triangles had not when they ended; fitted power laws.

    The line below a point goes down to the evaluation before, since the cost lies between the two.
    """
    looks = settings.looks(table)
    laws = fit_power_laws(table, by=("variant", "setting")).set_index(["variant", "setting"])
    columns = sorted(table["setting"].unique(), key=_setting_order)
    figure, axes = panels(1, len(columns), sharex=True, sharey=True, size=(3.6, 3.8))
    for ax, setting in zip(axes[0], columns, strict=True):
        part = table[table["setting"] == setting]
        texts = []
        for k, name in enumerate(n for n in looks if n in set(part["variant"])):
            cell, look = part[part["variant"] == name], looks[name]
            shift = 1.03 ** (k - 2)  # side by side where they have the same length
            _runs(ax, cell, look, shift)
            law = laws.loc[(name, setting)]
            if np.isfinite(law["exponent"]):
                ends = np.array([cell["seq_len"].min(), cell["seq_len"].max()], dtype=float)
                fit = law["prefactor"] * ends ** law["exponent"]
                ax.plot(ends, fit, color=look["color"], linestyle=look["linestyle"], lw=1.5)
                low, high = law["exponent_low"], law["exponent_high"]
                texts.append(f"{name}: {law['exponent']:.2f} [{low:.2f}, {high:.2f}]")
        ax.set(xscale="log", yscale="log", title=setting, xlabel="context length")
        _powers_of_two(ax.xaxis, table["seq_len"])
        _counts(ax.yaxis)
        if texts:
            box = dict(facecolor="white", alpha=0.85, edgecolor="none", pad=1.5)
            words = "exponent [95 % CI]\n" + "\n".join(texts)
            ax.text(0.98, 0.02, words, transform=ax.transAxes, fontsize=7, ha="right", va="bottom", bbox=box)
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(low / (high / low) ** 0.35, high)  # room for the exponents below the points
    axes[0, 0].set_ylabel(f"{UNITS[table['unit'].iloc[0]]} to {THRESHOLD}")
    _legend(figure, looks, extra=[("not reached by the run's end", dict(marker="^", mfc="none", ls=""))])
    return figure


def _runs(ax: Axes, cell: pd.DataFrame, look: dict[str, Any], shift: float) -> None:
    got, lost = cell[cell["reached"]], cell[~cell["reached"]]
    style = dict(color=look["color"], linestyle="", markersize=5, alpha=0.75)
    ax.plot(got["seq_len"] * shift, got["value"], marker=look["marker"], **style)
    known = got[got["lower"] > 0]  # else there was no evaluation before, and a log axis has no 0
    ax.vlines(known["seq_len"] * shift, known["lower"], known["value"], color=look["color"], lw=1, alpha=0.75)
    ax.plot(lost["seq_len"] * shift, lost["value"], marker="^", mfc="none", **style)


# --- state size -------------------------------------------------------------------------------------------


def state_table(evaluations: pd.DataFrame) -> pd.DataFrame:
    """Longest context learned and tokens to 0.95 of every run in cells where the state size varies."""
    table = settings.label(evaluations)
    table = table[table["d_state"].notna()]
    if table.empty:
        return table
    reach = reachable_length(table, THRESHOLD)[["run", "model", "value"]]
    outcomes = examples_to_threshold(table, THRESHOLD, "tokens")
    outcomes = outcomes.merge(reach.rename(columns={"value": "longest"}), on=["run", "model"])
    cell = ["variant", "setting", "seq_len"]
    outcomes = outcomes[outcomes.groupby(cell)["d_state"].transform("nunique") > 1]
    columns = [*KEYS, "seq_len", "d_state", "seed", "run", "longest", "lower", "value", "reached", "accuracy"]
    return outcomes[columns].reset_index(drop=True)


def state_size(table: pd.DataFrame) -> Figure:
    """Left: the longest context learned against the state size, right: tokens to 0.95 at full length."""
    looks = settings.looks(table)
    cells = list(table.groupby(["setting", "seq_len"]))
    figure, axes = panels(len(cells), 2, sharex=True, size=(3.8, 3.0))
    for row, ((setting, seq_len), part) in zip(axes, cells, strict=True):
        for k, (name, cell) in enumerate(part.groupby("variant")):
            look, shift = looks[str(name)], 1.04 ** (k - 0.5)
            states = cell.groupby("d_state")
            mean = states["longest"].apply(lambda v: mean_interval(v)[0])
            row[0].plot(mean.index, mean.clip(lower=1), color=look["color"], linestyle=look["linestyle"])
            row[0].plot(
                cell["d_state"] * shift,
                cell["longest"].clip(lower=1),
                look["marker"],
                color=look["color"],
                alpha=0.7,
            )
            _runs(row[1], cell.assign(seq_len=cell["d_state"]), look, shift)
            median = states.apply(lambda c: bootstrap_median_time(c["value"], c["reached"], resamples=10)[0])
            row[1].plot(median.index, median, color=look["color"], linestyle=look["linestyle"])
        row[0].axhline(seq_len, color="0.4", linestyle="--", lw=1)
        row[0].set(
            xscale="log", yscale="log", ylabel="longest length learned", title=f"{setting}, length {seq_len}"
        )
        row[1].set(
            xscale="log",
            yscale="log",
            ylabel=f"training tokens to {THRESHOLD}",
            title="cost of the full length",
        )
        _counts(row[1].yaxis)
        for ax in row:
            _powers_of_two(ax.xaxis, table["d_state"])
        _powers_of_two(row[0].yaxis, [*table["longest"].clip(lower=1), seq_len])
    for ax in axes[-1]:
        ax.set_xlabel("states per channel (d_state)")
    _legend(
        figure,
        looks,
        extra=[
            ("the goal of the run", dict(color="0.4", ls="--")),
            ("not reached by the run's end", dict(marker="^", mfc="none", ls="")),
        ],
    )
    return figure


# --- where in the context ---------------------------------------------------------------------------------


def heat_table(targets: pd.DataFrame) -> pd.DataFrame:
    """Right answers by part of the context and step, over seeds, at each variant's longest length."""
    table = _longest(settings.label(targets))
    table = table[table["kind"].eq("during") & table["length"].eq(table["seq_len"])]
    keys = [*KEYS, "seq_len", "target_low", "target_high", "step"]
    whole = []
    groups: Any = table.groupby(keys[:-1], dropna=False)
    for key, cell in groups:
        wide = cell.pivot_table(index="step", columns="run", values=["correct", "count"], aggfunc="sum")
        wide = wide.reindex(sorted(table.loc[table["variant"] == key[0], "step"].unique())).ffill()
        sums = wide.T.groupby(level=0).sum().T.reset_index()
        for name, value in zip(keys[:-1], key, strict=True):
            sums[name] = value
        whole.append(sums)
    if not whole:
        return table
    found = pd.concat(whole, ignore_index=True)
    found["accuracy"] = found["correct"] / found["count"]
    return found[[*keys, "correct", "count", "accuracy"]]


def position_step(table: pd.DataFrame) -> Figure:
    """Heat maps, part of the context x step: a panel per variant and setting, mean over seeds."""
    import seaborn

    cells: list[Any] = list(table.groupby(["setting", "variant", "seq_len"]))
    cells.sort(key=lambda c: (_setting_order(c[0][0]), settings.variants(table).index(c[0][1])))
    columns = min(4, len(cells))
    figure, axes = panels(-(-len(cells) // columns), columns, size=(3.0, 2.4))
    for ax, ((setting, name, seq_len), cell) in zip(axes.flat, cells, strict=False):
        wide = cell.pivot_table(index="target_low", columns="step", values="accuracy")
        ticks = max(1, len(wide.columns) // 4)
        seaborn.heatmap(
            wide, ax=ax, vmin=0, vmax=1, cmap="viridis", cbar=False,
            xticklabels=ticks, yticklabels=max(1, len(wide) // 4),
        )  # fmt: skip
        ax.invert_yaxis()
        ax.tick_params(axis="x", rotation=0)
        ax.set_title(f"{name}, {seq_len}\n{setting}", fontsize=9)
        ax.set(xlabel="step", ylabel="target position")
    for ax in axes.flat[len(cells) :]:
        ax.set_axis_off()
    mappable = axes.flat[0].collections[0]
    figure.colorbar(mappable, ax=axes, label="held-out accuracy (mean over seeds)", shrink=0.7)
    return figure


def position_table(targets: pd.DataFrame) -> pd.DataFrame:
    """Final accuracy by part of the context with Wilson intervals, at each variant's longest length."""
    table = _longest(settings.label(targets))
    table = table[table["kind"].eq("final")].assign(position=lambda t: t["target_low"])
    if table.empty:
        return table
    by = ["variant", "setting", "model", "seq_len"]
    found = accuracy_by_position(table, by=by)
    first = settings.label(targets).drop_duplicates("variant").set_index("variant")["position"]
    return found.assign(position=found["variant"].map(first))


def by_position(table: pd.DataFrame) -> Figure:
    """Accuracy against where the target stood (0 = first, 1 = last), a panel per setting."""
    looks = settings.looks(table)
    columns = sorted(table["setting"].unique(), key=_setting_order)
    most = table.groupby("setting")["variant"].nunique().max()
    figure, axes = panels(1, len(columns), sharey=True, size=(3.4, 2.8 + 0.14 * most))
    for ax, setting in zip(axes[0], columns, strict=True):
        lengths = []
        for name, cell in table[table["setting"] == setting].groupby(["variant", "seq_len"]):
            look = looks[str(name[0])]
            bars = [cell["accuracy"] - cell["ci_low"], cell["ci_high"] - cell["accuracy"]]
            ax.errorbar(cell["relative"], cell["accuracy"], yerr=bars, capsize=2, lw=1.5, ms=4, **look)
            lengths.append(f"{name[0]}: {name[1]}")
            ax.axhline(cell["chance"].mean(), **CONTROLS["chance"])
        words = "context length\n" + "\n".join(lengths)  # below the panel: curves may be anywhere in it
        place = dict(xycoords="axes fraction", textcoords="offset points", xytext=(0, -38))
        ax.annotate(words, (1, 0), fontsize=7, ha="right", va="top", **place)
        ax.set(title=setting, xlabel=PLACE, xlim=(0, 1), ylim=SHARES)
    axes[0, 0].set_ylabel(PLACE_UNIT)
    _legend(figure, looks, [("chance", {**CONTROLS["chance"], "marker": ""})])
    return figure


def _longest(table: pd.DataFrame) -> pd.DataFrame:
    table = table[table["usual_state"]]
    longest = table.groupby(["variant", "setting"])["seq_len"].transform("max")
    return table[table["seq_len"] == longest]


# --- shared ---------------------------------------------------------------------------------------------


def _setting_order(setting: str) -> tuple[bool, bool, str]:
    return "dense" not in setting, "suffix" not in setting, setting


def _legend(figure: Figure, looks: dict[str, dict[str, Any]], extra: list[Any] | None = None) -> None:
    """That of the variants, with further entries in grey."""
    more = {name: {"color": "0.3", **look} for name, look in extra or []}
    legend(figure, looks | more, width=2.2, handlelength=3)


def _chance(ax: Axes, chance: float) -> None:
    ax.axhline(chance, **CONTROLS["chance"])
    ax.text(0.02, chance + 0.02, "chance", transform=ax.get_yaxis_transform(), fontsize=7, color="0.4")


def _powers_of_two(axis: Any, values: Any) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ticks = sorted({float(v) for v in values})
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    if len(ticks) == 1:  # points side by side around it would be all of the axis
        getattr(axis.axes, f"set_{axis.axis_name}lim")(ticks[0] / 1.5, ticks[0] * 1.5)


def _counts(axis: Any, subs: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """Ticks of a log axis at `subs` times powers of ten, written as 20k or 1M."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    def words(value: float, _: int) -> str:
        for size, unit in ((1e6, "M"), (1e3, "k")):
            if value >= size:
                return f"{value / size:g}{unit}"
        return f"{value:g}"

    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(words))
