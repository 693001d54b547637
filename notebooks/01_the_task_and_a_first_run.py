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
# # 01 · The task and a first run
#
# Where in a picture is the red cube? A vision & language model that answers this has read the picture as a
# row of a few hundred patches and must now *retrieve*: find the patch that the question is about, and say
# where it was. *Shaking Up VLMs* (Pantazopoulos et al. 2024, [arXiv
# 2409.05395](https://arxiv.org/abs/2409.05395)) found that models built on Mamba fall behind models built on
# Transformers in exactly this, and boiled the difficulty down to a task without pictures: symbols in a row,
# and a question about one of them.
#
# In this notebook you draw that task, train a small Transformer and a small Mamba on it, and see **how fast**
# each learns and **where in the row** it answers. It trains on the CPU, for about half a minute.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from lab import N, begin, counts, say, wish
from matplotlib.patches import FancyBboxPatch

import synthetic
from probes.token_roles import ROLES, token_roles
from ssm_retrieval.style import NAMES, family_colors, legend
from synthetic import tasks
from synthetic.evaluate import evaluate, heldout

begin()

# %% [markdown]
# ## One example
#
# `N` different symbols `<s..>` stand in random order. One of them, the **target**, is repeated after a
# `<query>` marker. The model must answer with the token `<p_k>` of the place `k` (counted from 0) at which
# the target stood. `render` writes one example as two lines: what the model reads, and below it what it must
# predict there (a dot: nothing).

# %%
SHORT = 6
LAYOUTS = {"suffix": "query last", "prefix": "query first", "instruction": "task first, query last"}

example = tasks.build("position", seq_len=SHORT, layout="suffix")
print(example.render(example.batch(1, seed=4, index=0)))

# %% [markdown]
# ## Three layouts
#
# The same question can be asked in three ways. For a model that reads from left to right they are different
# tasks.
#
# * **suffix**: the query comes last. While it reads the symbols, the model does not know which one will
#   matter. The paper calls this *task-agnostic*.
# * **prefix**: the query comes first. The model can compare each symbol with it as it comes by: *task-aware*.
# * **instruction**: a generic `<task>` token comes first and the query last. The model is told what *kind* of
#   question will follow, but not the question. This is what the paper's vision-language experiment varies.

# %%
COLORS = {"target": "#d1495b", "query": "#d1495b", "distractor": "#d9dde2"}  # all other tokens: white


def draw_row(ax, layout):
    """One example of a layout as a row of boxes; an arrow leads from the target to the answer."""
    task = tasks.build("position", seq_len=SHORT, layout=layout)
    batch = task.batch(1, seed=4, index=0)
    words = task.vocabulary.decode(batch.input_ids[0].tolist())
    kinds = [ROLES[k] for k in token_roles(task, batch)[0]]
    for i, (word, kind) in enumerate(zip(words, kinds, strict=True)):
        color = COLORS.get(kind, "white")
        box = FancyBboxPatch((i - 0.42, 0), 0.84, 0.6, boxstyle="round,pad=0.03", fc=color, ec="0.35", lw=0.8)
        ax.add_patch(box)
        ink = "white" if color == COLORS["target"] else "black"
        ax.text(i, 0.3, word.strip("<>"), ha="center", va="center", color=ink, fontsize=9)
    place = 0
    for i, kind in enumerate(kinds):
        if kind in ("distractor", "target"):
            ax.text(i, -0.2, str(place), ha="center", va="top", fontsize=8, color="0.4")
            place += 1
    at, target = int(batch.answer_at[0]), kinds.index("target")
    answer = task.vocabulary.decode(batch.labels[0].tolist())[0].strip("<>")
    bend = dict(arrowstyle="->", connectionstyle="arc3,rad=-0.35", color=COLORS["target"], lw=1.4)
    ax.annotate("", xy=(at + 1.15, 0.68), xytext=(target, 0.68), arrowprops=bend)
    ax.text(
        at + 1.15, 0.3, answer, ha="center", va="center", fontsize=10, color=COLORS["target"], weight="bold"
    )
    ax.set(xlim=(-0.7, 10.3), ylim=(-0.6, 2.1))
    ax.set_title(f"{layout}: {LAYOUTS[layout]}", loc="left", fontsize=11)
    ax.set_axis_off()


figure, axes = plt.subplots(3, 1, figsize=(7.5, 6.0))
for ax, layout in zip(axes, LAYOUTS, strict=True):
    draw_row(ax, layout)
plt.show()

# %% [markdown]
# *How to read it.* A row is one sequence, read from left to right. Red: the target among the context symbols
# and the query that repeats it. Grey: the other context symbols, called distractors. White: markers. Below
# each context symbol stands its place; the arrow ends at the answer, the place of the target. Compare where
# the two red boxes stand: in `suffix` and `instruction` the target has passed before the model learns that it
# is the target.
#
# ## Chance
#
# Every number on this page means something only beside the rate of a guess. There are `N` places, all equally
# likely, so a model that knows the task and has retrieved nothing is right with probability `1 / N`.
#
# ## Two models, one task
#
# A Transformer with 2 blocks and a Mamba with 4, each with about half a million parameters, learn from
# sequences of `N = 12` symbols. That is short enough for a small Mamba to make progress within half a minute.
# Retrieval is hard to discover by chance, so training starts with short contexts and doubles their length
# whenever the accuracy on training sequences passes 0.95 (a *curriculum*; `docs/learnability.md` shows that
# no architecture learns the task in minutes without one). Accuracy is always measured at the full length, on
# *held-out* sequences, whose contexts never occur in training.
#
# What should you expect? Attention keeps every symbol that it has read and can compare the query with all of
# them in one lookup. Mamba has read the row into a state of fixed size before it sees the query; whatever it
# did not store in a form that it can find again is gone. Neither is impossible for a model of this size: the
# state of one Mamba layer has thousands of numbers. The question is what training finds, and how soon.
#
# `synthetic.train` trains the model that a `RunConfig` describes, or finds it if it was trained before. It
# gives the same numbers as `python -m synthetic.run`. `wish`, in `lab.py`, makes the config of a model that
# trains within half a minute.

# %%
runs = {family: synthetic.train(wish(family, layout="suffix")) for family in ("transformer", "mamba")}

table = pd.DataFrame(
    {
        "parameters": f"{run.result['parameters']:,}",
        "peak learning rate": f"{run.plan.lr:g}",
        "steps (budget)": f"{run.result['step']} ({run.plan.steps})",
        "training sequences": f"{run.result['examples']:,}",
        "training tokens": f"{run.result['tokens']:,}",
        f"accuracy at {N}": f"{run.result['accuracy']:.3f}",
        "95 % interval": f"[{run.result['ci_low']:.3f}, {run.result['ci_high']:.3f}]",
        "longest length learned": run.result["longest_length"],
    }
    for run in runs.values()
)
table.index = [NAMES[family] for family in runs]
display(table.T)
say(
    f"Held-out sequences behind each accuracy: {runs['mamba'].result['count']:,}; chance: 1 / {N} = "
    f"{1 / N:.3f}; training began at length {runs['mamba'].plan.curriculum}. The interval is Wilson's: what "
    "this many answers leave open about the accuracy of *this* trained model. It says nothing about another "
    "seed."
)

# %% [markdown]
# A run stops as soon as its held-out accuracy reaches 0.98, or when its budget of steps is used up. (The
# learning rates were chosen for each architecture on other seeds.)
#
# ## How fast: learning curves
#
# Horizontal: training tokens read so far, on a logarithmic scale. They are not steps or sequences, because
# under the curriculum a step at a short length has many more sequences than one at the full length, but about
# as many tokens. Vertical, above: held-out accuracy at the full length. Below: the context length in
# training. `synthetic.compare(runs.values())` draws both in one line of code; here you see how.

# %%
figure, (top, bottom) = plt.subplots(
    2, 1, figsize=(6.5, 5.2), sharex=True, gridspec_kw=dict(height_ratios=[3, 1.4])
)
looks = {}
for family, run in runs.items():
    look = dict(color=family_colors()[family], lw=2)
    looks[NAMES[family]] = look
    full = run.metrics[run.metrics["length"] == N]
    top.plot(full["tokens"], full["accuracy"], marker="o", ms=4, **look)
    top.fill_between(full["tokens"], full["ci_low"], full["ci_high"], color=look["color"], alpha=0.15, lw=0)
    bottom.step(full["tokens"], full["train_length"], where="post", **look)
top.axhline(1 / N, color="0.4", ls=":", lw=1)
top.text(
    0.99, 1 / N - 0.07, "chance", transform=top.get_yaxis_transform(), ha="right", fontsize=8, color="0.4"
)
top.set(ylabel=f"held-out accuracy\nat length {N}", ylim=(-0.03, 1.03), xscale="log")
bottom.set(xlabel="training tokens", ylabel="length\nin training")
bottom.set_yscale("log", base=2)
lengths = sorted(set(runs["mamba"].metrics["train_length"]) | {N})
bottom.set_yticks(lengths, [str(n) for n in lengths])
bottom.yaxis.minorticks_off()
counts(bottom.xaxis)
legend(figure, looks)
plt.show()

# %%
first = {f: r.metrics[(r.metrics["length"] == N) & (r.metrics["accuracy"] >= 0.95)] for f, r in runs.items()}
for family, passed in first.items():
    if len(passed):
        when = f"first reaches 0.95 after {passed['tokens'].iloc[0]:,} tokens"
    else:
        when = f"has not reached 0.95 after {runs[family].result['tokens']:,} tokens, where its budget ends"
    say(f"* {NAMES[family]} {when}; it ends at {runs[family].result['accuracy']:.3f}.")

# %% [markdown]
# The shaded bands are intervals for one model at one moment, from 128 held-out answers each. One curve may
# lie *below* another only by the luck of a seed; notebook 02 has three seeds of every model and the
# statistics to say what they show. Nor does a model that has not learned the task yet prove that it cannot:
# with more steps Mamba goes on learning (try it).
#
# The lower panel shows that both models climb through the short lengths, so both *learn the task*. They part
# ways when the context grows.
#
# ## Where in the row
#
# An accuracy of one half can mean that every place is found half of the time, or that half of the places are
# always found. For a model with a fixed state the difference matters: is it the oldest symbols that are lost,
# the latest, or those in between?

# %%
figure, ax = plt.subplots(figsize=(6.5, 3.4))
for shift, (family, run) in zip((-0.12, 0.12), runs.items(), strict=True):
    place = run.by_position
    bars = [place["rate"] - place["ci_low"], place["ci_high"] - place["rate"]]
    ax.errorbar(
        place["position"] + shift, place["rate"], yerr=bars, fmt="o-", ms=4, lw=1.5, capsize=2,
        color=family_colors()[family], label=NAMES[family],
    )  # fmt: skip
ax.axhline(1 / N, color="0.4", ls=":", lw=1, label="chance")
ax.set(xlabel="place of the target (0 = read first)", ylabel="held-out accuracy", ylim=(-0.03, 1.03))
ax.set_xticks(range(N))
ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
plt.show()

# %%
rate = runs["mamba"].by_position.set_index("position")["rate"]
thirds = dict(zip(("first", "middle", "last"), np.array_split(rate.to_numpy(), 3), strict=True))
parts = ", ".join(f"{part.mean():.2f} over the {name} {len(part)} places" for name, part in thirds.items())
say(
    "*What is seen.* Points are accuracies for one place each, of about "
    f"{runs['mamba'].by_position['count'].mean():.0f} answers, and bars their 95 % Wilson intervals. Mamba's "
    f"accuracy is {parts}; its best place is {rate.idxmax()} ({rate.max():.2f}), its worst {rate.idxmin()} "
    f"({rate.min():.2f}). The Transformer's worst place "
    f"has {runs['transformer'].by_position['rate'].min():.2f}."
)

# %% [markdown]
# If Mamba simply forgot, its accuracy would fall with age: lowest on the left, at the symbols read first, and
# highest on the right. Compare that expectation with the figure. The study
# [`why_mamba_lags`](../studies/why_mamba_lags/README.md) looks into states of models that learn 64 symbols,
# from which nothing is lost on the way; notebook 03 looks into the state of this very model.
#
# ## How it errs
#
# One more look at the same answers. Each row of the map below is a true place, each column an answer, and a
# cell's shade is the share of that row's answers. A model that is always right has a bright diagonal and
# nothing else. A model that guesses evenly has rows of one shade; a model with a favourite guess has bright
# columns. If it has only a *blurred* idea of the place, its errors lie close to the diagonal.


# %%
def confusion(run):
    """(N, N) shares: how often each place (columns) is answered when the target stands at a place (rows)."""
    counts, model = np.zeros((N, N + 1)), run.model()
    first = run.task.vocabulary.first_position
    for batch in heldout(run.task, 2048, N):
        with torch.no_grad():
            answer = model(batch.input_ids, logits_at=batch.answer_at)[:, 0].argmax(-1) - first
        inside = (answer >= 0) & (answer < N)  # else it is no place at all
        np.add.at(
            counts, (batch.target_index[:, 0].numpy(), answer.where(inside, torch.tensor(N)).numpy()), 1
        )
    return counts[:, :N] / counts.sum(1, keepdims=True)


maps = {family: confusion(run) for family, run in runs.items()}
figure, axes = plt.subplots(1, 2, figsize=(8.6, 4.0), sharey=True)
for ax, (family, shares) in zip(axes, maps.items(), strict=True):
    image = ax.imshow(shares, vmin=0, vmax=1, cmap="viridis")
    ax.set(title=NAMES[family], xlabel="answered place")
    ax.set_xticks(range(N))
    ax.set_yticks(range(N))
    ax.grid(False)
axes[0].set_ylabel("true place of the target")
figure.colorbar(image, ax=axes, label="share of the row's answers", shrink=0.85)
plt.show()

# %%
places = np.arange(N)
wrong = maps["mamba"] * (1 - np.eye(N))
gap = np.abs(places[:, None] - places[None])
near = (wrong * (gap == 1)).sum() / wrong.sum()
mean_gap = (wrong * gap).sum() / wrong.sum()
favourite = wrong.sum(0).argmax()
others = 1 - np.eye(N)
say(
    f"Of Mamba's wrong answers {near:.0%} name a direct neighbour, and they are {mean_gap:.1f} places off "
    f"on average. Drawn at random among the other places they would be {(gap == 1).sum() / others.sum():.0%} "
    f"and {(gap * others).sum() / others.sum():.1f}. The commonest wrong answer is place {favourite}, with "
    f"{wrong[:, favourite].sum() / wrong.sum():.0%} of them; evenly spread it would have {1 / N:.0%}."
)

# %% [markdown]
# ## Shorter contexts
#
# The curriculum took both models through shorter contexts before the full length. What can they do there now?
# Chance is one over the length, so a shorter context is easier by that alone: compare with the last column.

# %%
rows = []
for length in (4, 8, N):
    row = {"length": length}
    for family, run in runs.items():
        found = evaluate(
            run.model(), run.task, examples=512, length=length, device="cpu", precision="float32"
        )
        row[NAMES[family]] = round(found.accuracy, 3)
    rows.append(row | {"chance": round(found.chance, 3)})
display(pd.DataFrame(rows).set_index("length"))

# %% [markdown]
# If a model is worse at a short length than at the full one, it did learn the short one: it passed it on its
# way (see the lower panel of the learning curves). Training on longer contexts has since overwritten what it
# knew. So what it has learned is not *places*, but places in a context of this length.
#
# ## What this run shows, and what it does not
#
# With one seed, one size and one budget you have seen that both architectures learn to retrieve from short
# contexts and that the Transformer gets to 12 with fewer tokens. It is an example, not evidence, and not on
# equal footing: the Transformer has learned positions, Mamba has none. Three seeds of four architectures, all
# with positions, are in [`studies/retrieval_cpu`](../studies/retrieval_cpu/README.md), which the next
# notebook reads.
#
# **Try it.** Change `layout` to `"prefix"` and train again: which model gains, which loses? In `lab.py`,
# beside this notebook, give Mamba twice the steps, or a larger state (`d_state=64`). From the command line
# such a run is
#
# ```bash
# python -m synthetic.run --seq-len 12 --queries 1 --layout prefix --model mamba --steps 1200
# ```
