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
# # 07 · How much does a state hold?
#
# A Transformer keeps every token that it has read. A state space model keeps the same number of numbers
# whether it has read two tokens or two thousand. So its state must run full at some point. Where? This
# notebook
#
# 1. counts what each architecture keeps,
# 2. writes down a law that says how many facts a state of a given size can recall,
# 3. trains two Mambas that differ in nothing but the size of their state, and holds them against the law,
# 4. looks at a study of many such models, in which all curves should collapse into one.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from lab import OUT, begin, say

import analysis
import synthetic
from analysis.capacity_law import CONSTANTS, facts_at, fit_constants, load, recall_probability
from analysis.plots.recall_law import collapse_table, draw_collapse
from ssm_retrieval import models
from ssm_retrieval.statistics import wilson
from ssm_retrieval.style import NAMES, family_colors
from synthetic import RunConfig, tasks

begin()
STUDY = Path(analysis.__file__).parents[1] / "studies" / "capacity" / "measured.csv"

# %% [markdown]
# ## 1 What is kept
#
# `models.state_size` adds up what a model carries from one token to the next: the states and the window of
# the convolution of a Mamba, the keys and values of a Transformer.

# %%
lengths = np.array([16, 64, 256, 1024, 4096])
shapes = {
    "transformer": "transformer-tiny",
    "mamba": "mamba-tiny",
    "mamba2": "mamba2-tiny",
    "hybrid": "hybrid-tiny",
}
kept = pd.DataFrame(
    {
        NAMES[name]: [models.state_size(models.config(preset), int(n)) for n in lengths]
        for name, preset in shapes.items()
    },
    index=pd.Index(lengths, name="tokens"),
)
display(kept.style.format("{:,}"))

colors = family_colors()
figure, ax = plt.subplots(figsize=(5.2, 3.2))
for name in shapes:
    ax.loglog(lengths, kept[NAMES[name]], marker="o", color=colors[name], label=NAMES[name])
ax.set(xlabel="tokens read", ylabel="numbers kept", title="What a tiny model of each family carries along")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# The Transformer's line goes up with the tokens. The hybrid's does as well, later, because one of its three
# blocks is attention. Those of the state space models are flat. That they are flat does not say that they are
# too low.
#
# ## 2 The law
#
# Suppose a model stores N_f facts as a sum: for each fact the vector of its value (D numbers) times a code of
# its key (N numbers). Asked for one key, it reads the right value, plus what the other codes have in common
# with this one, which is noise. The more facts, the more noise. Koren et al. ([arXiv
# 2609.07681](https://arxiv.org/abs/2609.07681)) put that into numbers. With V values to choose from,
#
# $$p = \Phi\left(\tfrac{1}{\sigma} - m_V\right), \qquad
#   \sigma^2 = a\,\frac{N_f}{\text{layers}\cdot N D} + \frac{1}{D},$$
#
# where $\Phi$ is the normal distribution and $m_V$ the typical largest of V standard normal numbers. Only $a$
# is free. Its published values:

# %%
for (model, kind), a in CONSTANTS.items():
    asked = "one question a sequence" if kind == "ar" else "many questions a sequence"
    say(f"* {model}, {asked}: a = {a:.3g}")

facts = np.geomspace(1, 256, 100)
V = 131  # 64 symbols, 64 positions and three others: the vocabulary of the models below
figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
for axis, D in zip(axes, (32, 64), strict=True):
    for N in (2, 4, 8, 16):
        axis.semilogx(facts, recall_probability(facts, D, N, V, a=CONSTANTS["mamba", "ar"]), label=f"N = {N}")
    axis.set(title=f"D = {D}", xlabel="facts in the context")
axes[0].set_ylabel("accuracy by the law")
axes[1].legend(fontsize=8)
plt.show()

# %% [markdown]
# Twice the states a channel move a curve to the right by a factor of two. And however few facts there are, a
# narrow model never gets all of them right: that is the term 1/D.
#
# **Before you go on:** how many symbols should a Mamba with D = 32 answer in 95 % of cases with 4 states a
# channel, and how many with 16? Read it off, then compare.

# %%
for N in (4, 16):
    say(f"* N = {N}: {float(facts_at(32, N, V, a=CONSTANTS['mamba', 'ar'])):.0f} symbols")

# %% [markdown]
# ## 3 Two Mambas
#
# The task is the toolkit's own: at which position does a symbol stand? A symbol and its position are a fact.
# Both models have one layer of width 32, learned positions, and first weights that suit recall ([what Mamba
# lacks](../studies/what_mamba_lacks/README.md) says why they need both). Contexts grow from 4 symbols as far
# as training gets, at most 64. Nothing differs but `d_state`.

# %%
WISH = dict(
    model="mamba", seq_len=64, d_model=32, layers=1, d_conv=2, position="learned", ssm_init="recall",
    curriculum=4, growth="gap", steps=600, lr=5e-3, betas=(0.9, 0.95), warmup=100, schedule="cosine",
    label_smoothing=0.1, stop_at=1.01, eval_every=150, eval_examples=128, final_eval_examples=512,
    device="cpu", precision="float32", out=str(OUT),
)  # fmt: skip
runs = {N: synthetic.train(RunConfig(d_state=N, **WISH), progress=False) for N in (4, 16)}
task = tasks.build("position", seq_len=8, num_symbols=8)
print(task.render(task.batch(1, seed=0, index=0)))

# %%
rows = []
for N, run in runs.items():
    curve = run.by_length.query("length <= @run.result['train_length']")
    rows += [
        dict(
            task="position", model="mamba", n_layer=1, d_model=32, d_state=N, seed=0, n_facts=row["length"],
            vocab_size=run.model().config.vocab_size, correct=row["correct"], count=row["count"],
            chance=row["chance"],
        )
        for _, row in curve.iterrows()
    ]  # fmt: skip
measured = pd.DataFrame(rows)
figure, ax = plt.subplots(figsize=(5.2, 3.4))
for (N, part), color in zip(measured.groupby("d_state"), ("C0", "C3"), strict=True):
    value = np.array([wilson(int(k), int(n)) for k, n in zip(part["correct"], part["count"], strict=True)])
    accuracy = part["correct"] / part["count"]
    ax.errorbar(
        part["n_facts"],
        accuracy,
        yerr=np.abs(value[:, -2:].T - accuracy.to_numpy()),
        fmt="o",
        color=color,
        capsize=2,
        label=f"N = {N}, measured",
    )
    law = recall_probability(facts, 32, N, int(part["vocab_size"].iloc[0]), a=CONSTANTS["mamba", "ar"])
    ax.plot(facts, law, color=color, lw=1, label=f"N = {N}, the law with the published a")
ax.plot(facts, 1 / facts, color="0.5", ls=":", label="chance")
ax.set(
    xscale="log",
    xlim=(2, 128),
    ylim=(-0.03, 1.05),
    xlabel="symbols in the context",
    ylabel="held-out accuracy",
)
ax.legend(fontsize=7)
plt.show()

# %%
(fit,) = fit_constants(measured, by=("task", "model")).itertuples()
say(
    f"Fitted to these {len(measured)} points: a = {fit.a:.2f}. One seed of each size, trained for 600 steps, "
    "so this is a look and not a result: the interval of a needs several seeds."
)

# %% [markdown]
# A smaller $a$ means that a model holds more than the published Mamba would, a larger one that it holds less.
# **Try:** change `steps` to 100. The model has the same room, and recalls less. The law is about models that
# have learned; a curve below it can have either reason. That is why "Mamba fails at 1,024 symbols" is no
# proof that its state is too small.
#
# ## 4 Collapse
#
# If the law is right, accuracy depends on one number, the load $N_f / (\text{layers}\cdot N D)$, and the
# curves of all shapes fall on one line, up to the term 1/D. The study
# [Capacity](../studies/capacity/README.md) trained five seeds of six shapes of each family for that. Points
# below pool seeds, bars reach from the worst to the best of them.

# %%
study = pd.read_csv(STUDY)
study = study[study["task"].eq("position") & study["model"].isin(["mamba", "mamba2"])]
draw_collapse(collapse_table(study))
plt.show()

# %%
fits = fit_constants(study, by=("task", "model"))
for fit in fits.itertuples():
    known = CONSTANTS.get((fit.model, "ar"))
    beside = f"; published: {known:.2g}" if known else ""
    say(
        f"* {NAMES[fit.model]}: a = {fit.a:.2f} [{fit.low:.2f}, {fit.high:.2f}]{beside}; "
        f"largest misfit {fit.worst:+.2f}"
    )
shape = ["task", "model", "d_model", "d_state"]
right = study["correct"] / study["count"]
filled = right.groupby([study[name] for name in shape]).transform("min") < 0.9  # else a cannot be told
cells = fit_constants(study[filled], by=shape)
spread = cells.groupby("model")["a"].agg(["min", "max"])
for model, row in spread.iterrows():
    say(f"* {NAMES[model]}, shapes that fill up, one by one: a from {row['min']:.2f} to {row['max']:.2f}")

# %% [markdown]
# So the law gets the size right, with one constant for all shapes, and not the details: if it were exact,
# every shape would give the same constant, and no point would lie far from the line.
#
# What does it say of a model as large as the paper's? Its smallest Mamba has D = 1,536 and N = 16.

# %%
picture = 576  # patches of a picture at 336 pixels
room = float(facts_at(1536, 16, 50_280, a=CONSTANTS["mamba", "ar"]))
share = float(load(picture, 1536, 16) / load(room, 1536, 16))
say(
    f"One layer of it has room for about {room:,.0f} facts; a picture of {picture} patches fills "
    f"{share:.0%} of that, if a patch is a fact."
)

# %% [markdown]
# The paper's Mambas have 48 layers and fall behind at grounding all the same. By this law that is not for
# want of room. [Claims and evidence](../docs/claims.md#4-retrieval-is-limited-by-a-state-of-fixed-size) says
# how far this can be trusted, and [notebook 08](08_bring_your_own_architecture.ipynb) puts a state of your
# own to the test.
