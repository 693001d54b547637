# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 02 · Learning curves and statistics
#
# Notebook 01 trained one model of each kind. Whoever repeats it with another seed gets other curves, so what
# does one know after a run? This notebook reads the results of a study that is part of this repository,
# [`studies/retrieval_cpu`](../studies/retrieval_cpu/README.md): several architectures, several lengths, three
# seeds each, every evaluation of every run. Nothing is trained here.
#
# You will see how to draw curves of few runs honestly, what to do with runs that *never got there*, how the
# cost of retrieval grows with the length of the context, and how much three seeds can prove.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from lab import begin, counts, say

import analysis
from analysis import settings
from analysis.comparisons import comparisons
from analysis.plots import sweep
from analysis.scaling import fit_power_law, fit_power_laws
from ssm_retrieval.statistics import bootstrap_median_time, kaplan_meier, summarise_seeds
from ssm_retrieval.style import legend, panels
from ssm_retrieval.training.outcomes import examples_to_threshold

begin()
STUDY = Path(analysis.__file__).parents[1] / "studies" / "retrieval_cpu"

# %% [markdown]
# ## The table
#
# `analysis.load` gives one row per evaluation. `kind` is `during` for those in training and `final` for the
# last, larger one; `purpose` tells the runs that are reported from those that only served to choose a
# learning rate, on seeds of their own. `settings.label` adds two columns that every figure uses: `variant`,
# the architecture, and `setting`, how it was trained: the query last (*suffix*) or first (*prefix*), with one
# query per training sequence or many (*dense*).

# %%
everything = analysis.load(STUDY / "results.parquet")
table = settings.label(everything[everything["purpose"] == "report"])
shown = ["variant", "setting", "seq_len", "seed", "kind", "step", "tokens", "accuracy", "chance"]
say(f"{len(table):,} evaluations of {table['run'].nunique()} runs. Four of them:")
display(table[shown].iloc[[0, 1, -2, -1]].round(3))
runs = table.drop_duplicates("run")
say("Runs by variant, setting and length:")
display(
    runs.pivot_table(index=["variant", "setting"], columns="seq_len", values="run", aggfunc="count")
    .fillna(0)
    .astype(int)
)

# %% [markdown]
# Zeros are cells that were not run, not failures. All architectures have learned positions here, and choose
# their learning rates alike; rows with other positions say so.
#
# ## Learning curves of three seeds
#
# Below, contexts of 128 symbols, query last, many queries per sequence. Horizontal: training tokens,
# logarithmic. Vertical: held-out accuracy of single queries; chance is 1 / 128. Thin lines are runs, the
# thick one their median, the band their range. A run that stopped because it had reached 0.98 keeps its last
# accuracy in both.
#
# The band is not a confidence interval of the mean, on purpose. Training either finds retrieval or does not,
# so accuracies over seeds tend to have two modes, and three seeds cannot tell one mode from two. Student's
# interval assumes one. What needs no such assumption: the range of three seeds holds the true median three
# times in four, and *k of n seeds reached 0.95* has the exact interval of Clopper and Pearson.

# %%
LENGTH, SETTING = 128, "suffix, dense queries"
FAMILIES = ["Transformer", "Mamba", "Mamba-2", "Hybrid"]
looks = settings.looks(table)
curves = sweep.accuracy_table(everything[everything["purpose"] == "report"])
curves = curves[(curves["setting"] == SETTING) & (curves["seq_len"] == LENGTH)]

figure, axes = panels(1, 4, size=(2.6, 3.0), sharex=True, sharey=True)
for ax, name in zip(axes[0], FAMILIES, strict=True):
    color, cell = looks[name]["color"], curves[curves["variant"] == name]
    wide = sweep.carried(cell, "step")
    tokens = cell.groupby("step")["tokens"].mean()
    low, middle, high = wide.min(axis=1), wide.median(axis=1), wide.max(axis=1)
    for _, run in cell.groupby("run"):
        ax.plot(run["tokens"], run["accuracy"], color=color, lw=0.8, alpha=0.7)
    ax.plot(tokens, middle, color=color, lw=2.2)
    ax.fill_between(tokens, low, high, color=color, alpha=0.15, lw=0)
    ax.axhline(1 / LENGTH, color="0.4", ls=":", lw=1)
    ax.axhline(0.95, color="0.4", ls="--", lw=1)
    ax.set(title=name, xlabel="training tokens", xscale="log", ylim=(-0.03, 1.03))
    counts(ax.xaxis)
axes[0, 0].set_ylabel(f"held-out accuracy at length {LENGTH}")
legend(
    figure,
    {
        "a run": dict(color="0.3", lw=0.8), "median of 3 seeds": dict(color="0.3", lw=2.2),
        "0.95": dict(color="0.4", ls="--"), "chance": dict(color="0.4", ls=":"),
    },
)  # fmt: skip
plt.show()

# %%
final = table[(table["kind"] == "final") & (table["setting"] == SETTING) & (table["seq_len"] == LENGTH)]
rows = []
for name in FAMILIES:
    values = final[final["variant"] == name].sort_values("seed")["accuracy"]
    seeds = summarise_seeds(values, values >= 0.95)
    learned = f"{seeds.reached} of {seeds.n} [{seeds.share_low:.2f}, {seeds.share_high:.2f}]"
    rows.append([name, ", ".join(f"{v:.3f}" for v in values), learned])
display(
    pd.DataFrame(rows, columns=["final accuracy", "by seed", "at 0.95 (95 %)"]).set_index("final accuracy")
)

# %% [markdown]
# *What is seen.* A run jumps to the top or stays far from it. Mamba-2 learns this length in every seed, Mamba
# in two, the Transformer and the hybrid in one. Is Mamba-2 better, then? Look how far the interval of 1 of 3
# reaches into that of 3 of 3: three seeds cannot tell. And the mean accuracy of the Transformer, somewhere in
# the middle, is that of no run at all. What differs as well is *when*. So another question is: how much
# training does it take to reach 0.95?
#
# ## Runs that never got there
#
# The cost of a run is what it has spent when its held-out accuracy first reaches 0.95, for the moment counted
# in training steps, because every run of the study had the same budget of those: 1,000. A run that ends
# before it gets there is not a missing value. It says: *more than this*. Statistics calls it
# **right-censored**, like a patient who leaves a study alive, and two things one is tempted to do are wrong:
#
# * leaving such runs out makes the hard cases look cheap, because only their luckiest seeds are counted;
# * taking their budget for their cost does the same, only less.
#
# The Kaplan-Meier curve does neither: it is the share of runs that *still need more* after so many steps, and
# a censored run counts as long as it was observed. Its median is the first point at or below one half, or
# infinite if the curve never falls that far.

# %%
here = table[(table["setting"] == SETTING) & (table["seq_len"] == LENGTH)]
cells = examples_to_threshold(here, threshold=0.95, by="step")

figure, ax = plt.subplots(figsize=(6.4, 3.6))
for shift, name in enumerate(FAMILIES):
    cell = cells[cells["variant"] == name]
    curve = kaplan_meier(cell["value"], cell["reached"])
    x = np.concatenate([[0], curve["time"]])
    y = np.concatenate([[1.0], curve["survival"]]) + 0.015 * (shift - 1.5)  # else they hide each other
    x = x + 8 * shift
    ax.step(x, y, where="post", color=looks[name]["color"], lw=2, label=name)
    lost = cell[~cell["reached"]]
    ax.plot(
        lost["value"] + 8 * shift, [y[-1]] * len(lost), "^", ms=8, mfc="white", color=looks[name]["color"]
    )
ax.axhline(0.5, color="0.4", ls="--", lw=1)
ax.set(ylim=(-0.06, 1.1), xlabel="training steps", ylabel="share of runs that\nstill need more")
ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
plt.show()

# %%
rows = []
for name in FAMILIES:
    cell = cells[cells["variant"] == name]
    got = cell[cell["reached"]]["value"]
    median, low, high = bootstrap_median_time(cell["value"], cell["reached"])
    rows.append(
        {
            "steps to 0.95": name,
            "reached": f"{len(got)} of {len(cell)}",
            "mean of those (wrong)": f"{got.mean():,.0f}",
            "mean with budgets (wrong)": f"{cell['value'].mean():,.0f}",
            "median": f"{median:,.0f}",
            "its range": f"{low:,.0f} .. {high:,.0f}",
        }
    )
display(pd.DataFrame(rows).set_index("steps to 0.95"))

# %% [markdown]
# *How to read the figure.* Each curve starts at 1, where all three runs still need more, and steps down by a
# third when one gets there; curves are moved apart a little so that none hides another. A hollow triangle is
# a run that ended without getting there: there the curve stops, at a height that says how many are left.
# Dashed: one half, where the median is read off. *And the table:* the bootstrap interval of a median of three
# runs is simply their range, and the range of three runs contains the true median with probability 3/4 only
# (each run lies below it with probability 1/2, so all three miss it on one side with probability 2/8). `inf`
# is a number here: at least one run never got there, so the upper end is unknown.
#
# ## How the cost grows with the length
#
# Now in training tokens, which compare fairly between lengths.
#
# Each point below is a run: filled if it reached 0.95 (at the tokens it took), a hollow triangle if it had
# not when it ended (there is no telling how far above the triangle the truth lies). Both axes are
# logarithmic, so a power law, `tokens = c * length^b`, is a straight line of slope `b`. The lines are such
# fits, by maximum likelihood with the censored runs as "more than this" (Tobin's model), with a 95 % interval
# of the exponent.
#
# What would one expect? If every symbol of the context took the same effort to learn, the cost would grow in
# proportion: `b = 1`. A lookup that, once found, works at any length would give a `b` near 0.

# %%
outcomes = sweep.threshold_table(everything[everything["purpose"] == "report"], "tokens")
dense = outcomes[outcomes["setting"] == SETTING]
sweep.cost_vs_length(dense)
plt.show()

# %%
laws = fit_power_laws(dense, by=("variant",)).set_index("variant")
say("Exponents with their 95 % intervals, and the runs behind them:")
display(
    pd.DataFrame(
        {
            "exponent b": laws["exponent"].round(2),
            "95 % interval": [
                f"{a:.2f} .. {b:.2f}"
                for a, b in zip(laws["exponent_low"], laws["exponent_high"], strict=True)
            ],
            "runs at 0.95": [f"{a} of {b}" for a, b in zip(laws["n_reached"], laws["n"], strict=True)],
            "lengths": dense.groupby("variant")["seq_len"].agg(lambda n: ", ".join(map(str, sorted(set(n))))),
        }
    )
)

attention, ssm = laws.loc[["Transformer", "Hybrid"]], laws.loc[["Mamba", "Mamba-2"]]
apart = attention["exponent_high"].max() < ssm["exponent_low"].min()
say(
    "The largest upper end among the Transformer and the hybrid is "
    f"{attention['exponent_high'].max():.2f}, the smallest lower end among the SSMs "
    f"{ssm['exponent_low'].min():.2f}: the intervals **{'do not ' if apart else ''}overlap**. "
    f"The SSMs' own intervals reach from {ssm['exponent_low'].min():.2f} to {ssm['exponent_high'].max():.2f}."
)

# %% [markdown]
# *What is seen.* Up to 128 symbols the costs of attention and of SSMs cannot be told apart. Where all nine
# runs got there, as of Mamba-2, three lengths make a narrow interval, well below 1: longer contexts cost less
# than in proportion. Of the Transformer six got there, and its interval is so wide that it contains nearly
# everything. Without learned positions too few runs got anywhere for a line (`nan`).
#
# ### What would have happened without censoring?

# %%
rows = []
for name in ("Transformer", "Hybrid", "Mamba"):
    cell = dense[dense["variant"] == name]
    everyone = np.ones(len(cell), bool)
    got = cell[cell["reached"]]
    fits = {
        "censored (right)": fit_power_law(cell["seq_len"], cell["value"], cell["reached"]),
        "only those that got there": fit_power_law(got["seq_len"], got["value"], got["reached"]),
        "budgets taken for costs": fit_power_law(cell["seq_len"], cell["value"], everyone),
    }
    rows.append(
        {"variant": name}
        | {how: f"{f.exponent:.2f} [{f.exponent_low:.2f}, {f.exponent_high:.2f}]" for how, f in fits.items()}
    )
display(pd.DataFrame(rows).set_index("variant"))

# %% [markdown]
# Both shortcuts make an exponent smaller if it is the longest length that some runs did not reach: their cost
# is dropped, or declared to be exactly what was paid. Where a run failed at the shortest length, as one
# Transformer did at 16, they may do the opposite. In either case intervals become too narrow, and the numbers
# look tidier than what was seen.
#
# ## Query first or last: a paired comparison
#
# In notebook 01 you saw that a sequence with the query first (*prefix*) is another task for a model that
# reads from left to right. The study trains both, with one query per sequence, so that whoever is told first
# has only one thing to keep in mind. The same seed gives both runs the same initial weights, so runs come in
# **pairs**, and pairs are compared within themselves: what a seed adds to both drops out.
#
# A line below joins the two runs of one seed; a hollow triangle is a run that had not reached 0.95 when it
# ended.

# %%
ORDERS = ["suffix, single query", "prefix, single query"]
single = outcomes[outcomes["setting"].isin(ORDERS)]
PAIRED = [name for name in FAMILIES if name in set(single["variant"])]
figure, axes = panels(1, len(PAIRED), size=(2.4, 3.2), sharey=True)
for ax, name in zip(axes[0], PAIRED, strict=True):
    color, mine = looks[name]["color"], single[single["variant"] == name]
    for k, (_, pair) in enumerate(mine.groupby("seed")):
        pair = pair.set_index("setting").loc[ORDERS]
        x = np.arange(2) + 0.05 * (k - 1)
        ax.plot(x, pair["value"], color=color, lw=1.2)
        for place, (_, run) in zip(x, pair.iterrows(), strict=True):
            marker = dict(marker="o", mfc=color) if run["reached"] else dict(marker="^", mfc="white")
            ax.plot(place, run["value"], color=color, ms=7, **marker)
    ax.set(title=name, yscale="log", xlim=(-0.4, 1.4))
    ax.set_xticks([0, 1], ["query\nlast", "query\nfirst"])
    ax.grid(axis="x", visible=False)
axes[0, 0].set_ylabel("training tokens to 0.95")
counts(axes[0, 0].yaxis)
legend(
    figure,
    {
        "reached 0.95": dict(color="0.3", marker="o", ls=""),
        "ended without": dict(color="0.3", marker="^", mfc="white", ls=""),
    },
)
plt.show()

# %% [markdown]
# The table is a **sign test**. Under the hypothesis that the order of query and context makes no difference,
# each pair is a fair coin: who got there with less? With `n` decided pairs the most extreme outcome, all the
# same way, has a two-sided probability of `2 / 2^n`. With three pairs that is 0.25: **no result of three
# pairs can be significant by itself.** The column `p_smallest` says so before anyone looks at `p`. `p_holm`
# corrects for testing several architectures.

# %%
tests = comparisons(single)
tests = tests[tests["kind"] == "layout"].set_index("within")
say(f"`a` is {tests['a'].iloc[0]} (query first), `b` is {tests['b'].iloc[0]} (query last).")
display(tests[["n", "a_first", "b_first", "unknown", "p", "p_holm", "p_smallest"]].round(3))

ssm = tests.loc[[name for name in tests.index if name.startswith("Mamba")]]
rest = tests.drop(ssm.index)
say(
    f"Query first was faster in {ssm['a_first'].sum()} of {ssm['n'].sum()} pairs of the two SSMs, and in "
    f"{rest['a_first'].sum()} of {rest['n'].sum()} pairs of the Transformer."
)

# %% [markdown]
# *What is seen.* Mamba gains from knowing the query first in every pair. Mamba-2 and the Transformer gain in
# one pair of three. No row is significant, and cannot be: a coin shows the same side three times in a row
# once in four trials, and three architectures were tried. What speaks for Mamba's row is outside the test:
# with the query last no seed reached 0.95 at all.
#
# ## How many seeds would it take?

# %%
rows = [
    {"pairs, all the same way": n, "smallest possible p": min(1.0, 2 / 2**n)} for n in (2, 3, 4, 5, 6, 8, 10)
]
display(pd.DataFrame(rows).set_index("pairs, all the same way").round(4))
enough = next(row["pairs, all the same way"] for row in rows if row["smallest possible p"] < 0.05)
many = len(PAIRED)
corrected = next(n for n in range(2, 20) if many * 2 / 2**n < 0.05)
say(
    f"A single comparison can come below 0.05 from {enough} pairs on. Corrected for {many} comparisons, as "
    f"above (Holm multiplies the smallest p by {many}), it takes {corrected}."
)

# %% [markdown]
# ## What to take home
#
# * Draw runs, not only means: a mean of runs that learned and runs that did not is the accuracy of none.
# * A run that failed within its budget is an observation. Keep it, as censored.
# * Say what your design can show *before* the test: three pairs cannot reach 0.05.
# * "State space models lag at short contexts" is not supported here, with positions for all: if anything,
#   they fail in fewer seeds. Nor is "they are better". And no statement about large models is.
#
# **Try it.** Put `by="examples"` in place of tokens (`sweep.threshold_table(..., "examples")`) and see how
# the length curriculum makes training *sequences* a treacherous unit. All figures of the study come from
# `python -m analysis.figures studies/retrieval_cpu/results.parquet`.
