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
# # 06 · Load a published checkpoint and probe it
#
# Everything in notebooks 03 and 04 works on published models as well: `models.load` opens what is on the
# Hugging Face hub (state-spaces/mamba, EleutherAI/pythia, and whatever `transformers` saves of these
# architectures), and the hook points are the same.
#
# **What you see below depends on where it ran.** With a network, or the models in the hub's cache, the
# notebook takes `EleutherAI/pythia-160m` and `state-spaces/mamba-130m-hf`. Without, as when the committed
# outputs were made, it makes two small stand-ins: it trains them for some seconds, and `transformers` writes
# them to a folder *in the very format of the hub*, from where they are loaded as the published ones would be.
# The stand-ins are there to show the tools. They say nothing about the published models: a hundred times
# smaller, they have never seen a word, and know a single task.

# %%
import logging
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import transformers
from IPython.display import display
from lab import around, attention_map, band, begin, errorbars, head_scores, interval, say, trained

from analysis.plots.common import plain_log
from probes.cache import recorded
from probes.heads import previous_token_score, retrieval_score
from probes.linear import controlled
from probes.scan import record_scans
from probes.suite.attention import patterns
from probes.updates import constant_horizon, write_norm
from ssm_retrieval import models
from ssm_retrieval.statistics import wilson
from ssm_retrieval.style import NAMES, family_colors, legend, panels
from synthetic import tasks

begin()
logging.getLogger("transformers").setLevel(logging.ERROR)  # it says that its fast kernels are for GPUs
transformers.utils.logging.disable_progress_bar()
HUB = {"transformer": "EleutherAI/pythia-160m", "mamba": "state-spaces/mamba-130m-hf"}

# %% [markdown]
# ## A task that needs no words
#
# To probe retrieval in a model that knows nothing of our tokens, one needs a task that any language model may
# be able to do. The smallest is **induction**, which the Mamba paper takes from H3: among random symbols
# stands one special token, and it stands once more at the end. What followed it the first time?

# %%
N, SYMBOLS = 16, 16
task = tasks.build("induction", seq_len=N, num_symbols=SYMBOLS)
print(task.render(task.batch(1, seed=1, index=0)))
say(f"There are {SYMBOLS} symbols, so guessing is right with chance 1 / {SYMBOLS} = {1 / SYMBOLS:.4f}.")

# %% [markdown]
# For the probes a symbol is just a token id; in a published model's vocabulary the same ids are some words or
# bytes, and the sequence is gibberish with one repetition. A model that has learned to continue what it has
# seen will do so all the same.
#
# ## The checkpoints

# %%
STAND_INS = {"transformer": dict(position="rope", steps=400), "mamba": dict(steps=300)}


def stand_in(family):
    """A small model trained on induction, as transformers writes it: the folder."""
    options = dict(task="induction", seq_len=N, num_symbols=SYMBOLS, schedule="constant", lr=2e-3)
    own = trained(family, **options, **STAND_INS[family]).model
    folder = Path(tempfile.mkdtemp())
    opened = transformers.AutoModelForCausalLM.from_pretrained(models.save(own, folder / "ours"))
    opened.save_pretrained(folder / family)
    return folder / family


def checkpoint(family):
    """(name on the hub or folder, whether it is the published one)."""
    try:
        models.load(HUB[family])
    except ValueError:  # neither network nor cache
        return stand_in(family), False
    return HUB[family], True


sources = {family: checkpoint(family) for family in HUB}
for family, (_, published) in sources.items():
    what = f"the published {HUB[family]}" if published else f"**a small stand-in** for {HUB[family]}"
    say(f"* {NAMES[family]}: {what}")
if not sources["mamba"][1]:
    say("Files of a stand-in: " + ", ".join(sorted(path.name for path in sources["mamba"][0].iterdir())))

# %% [markdown]
# ## Is it the same function?
#
# Before probing, check that this implementation computes what the reference does. Both open the same files;
# the last column is the largest difference of their logits, relative to the largest logit. In float32
# rounding gives about 1e-6. A real difference (another norm, a rotation too many) gives 1e-2 and more.

# %%
loaded = {family: models.load(source, dtype=torch.float32) for family, (source, _) in sources.items()}
theirs = {
    family: transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for family, (source, _) in sources.items()
}
batch = task.batch(256, seed=3, index=0, split="heldout")
ids, gold, at = batch.input_ids, batch.labels[:, 0], int(batch.answer_at[0])
rows = []
for family, model in loaded.items():
    with torch.no_grad():
        ours, reference = model(ids[:32]), theirs[family](ids[:32]).logits
    rows.append(
        {
            "model": NAMES[family],
            "parameters": f"{model.num_parameters():,}",
            "blocks": model.config.n_layer,
            "width": model.config.d_model,
            "vocabulary": f"{model.config.vocab_size:,}",
            "difference": f"{(ours - reference).abs().max() / reference.abs().max():.0e}",
        }
    )
display(pd.DataFrame(rows).set_index("model"))

# %% [markdown]
# And back: what `models.save` writes, `transformers` opens.

# %%
for family, model in loaded.items():
    folder = models.save(model, Path(tempfile.mkdtemp()) / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    wanted = theirs[family].state_dict()
    same = sum(torch.equal(again[name], tensor) for name, tensor in wanted.items())
    say(f"* {NAMES[family]}: {same} of {len(wanted)} tensors came back bit for bit.")

# %% [markdown]
# ## Can it do the task, and how far?
#
# Accuracy of the likeliest symbol at the last token, with 95 % Wilson intervals, at contexts from 8 to 256
# symbols (the stand-ins were trained on contexts of up to 16). Besides, as a control, the same architecture
# **with random weights**. Chance is dotted. If a model is at chance there is no retrieval to be explained,
# and what the probes below show is what *nothing learned* looks like.

# %%
LENGTHS = (8, 16, 32, 64, 128, 256)
blank = {family: models.from_config(model.config, seed=0).eval() for family, model in loaded.items()}
first = task.vocabulary.first_symbol


def accuracy(model, length):
    """(share, low, high) of right answers among the symbols, over 256 held-out contexts of a length."""
    long = task.at(length).batch(256, seed=4, index=0, split="heldout", length=length)
    with torch.no_grad():
        logits = model(long.input_ids, logits_at=long.answer_at)[:, 0, first : first + SYMBOLS]
    right = int((logits.argmax(-1) + first == long.labels[:, 0]).sum())
    return right / 256, *wilson(right, 256)


figure, axes = panels(1, 2, size=(3.6, 3.0), sharey=True)
found = {}
for ax, family in zip(axes[0], loaded, strict=True):
    for name, model in (("random", blank[family]), ("loaded", loaded[family])):
        found[family, name] = each = np.array([accuracy(model, n) for n in LENGTHS])
        color, marker = (family_colors()[family], "o") if name == "loaded" else ("0.55", "s")
        errorbars(ax, LENGTHS, each, color=color, marker=marker)
    ax.axhline(1 / SYMBOLS, color="0.4", ls=":", lw=1)
    ax.set_xscale("log", base=2)
    ax.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
    ax.set(title=NAMES[family], xlabel="symbols in the context", ylim=(-0.03, 1.05))
axes[0, 0].set_ylabel("accuracy")
looks = {"loaded": dict(color="0.2", marker="o"), "random weights": dict(color="0.55", marker="s")}
legend(figure, looks | {"chance": dict(color="0.4", ls=":")})
plt.show()
for family in loaded:
    shown = ", ".join(f"{n}: {found[family, 'loaded'][i, 0]:.2f}" for i, n in enumerate(LENGTHS))
    say(f"* {NAMES[family]}, loaded; accuracy by length: {shown}")

# %% [markdown]
# What to expect of *trained* models beyond the length they were trained at: a Transformer with rotary
# positions meets distances that it has never seen. A state space model has no positions; on this very task
# the Mamba paper reports generalisation to lengths a thousand times those of training. How far the curves of
# a stand-in bear that out, you can read off; it was trained for some seconds, so a fall says little.
#
# ## Which heads retrieve?
#
# The answer stands one token behind the first special token. A head that finds it attends, from the last
# token, to that place: the **retrieval score** is the share of the last token's attention there. To know that
# the token is *behind* a special one, an earlier block usually has a head that attends to the **previous
# token**, and together they are called an induction circuit (Olsson et al. 2022, [arXiv
# 2209.11895](https://arxiv.org/abs/2209.11895)). Scores are means over sequences with 95 % intervals; the
# dash is even attention over the visible tokens; hollow are random weights. For Mamba the same is asked of
# its hidden attention (notebook 04), averaged over channels.

# %%
behind = batch.target_index[:, 0] + 1  # the answer's place: the context begins at token 0
SCORES = {
    "retrieval": lambda pattern: retrieval_score(pattern, at, behind),
    "previous token": previous_token_score,
}
maps = {(f, name): patterns(m[f], ids) for name, m in (("loaded", loaded), ("random", blank)) for f in loaded}
figure, axes = panels(2, 2, size=(3.7, 2.3), sharey=True)
best = {}
for j, family in enumerate(loaded):
    for i, (quantity, score) in enumerate(SCORES.items()):
        own, plain = (
            {layer: score(pattern) for layer, pattern in maps[family, name].items()}
            for name in ("loaded", "random")
        )
        best[family, quantity] = head_scores(axes[i, j], own, plain, family_colors()[family])
        axes[i, 0].set_ylabel(f"{quantity}\nscore")
    axes[0, j].set_title(NAMES[family])
    axes[1, j].set_xlabel("block.head" if family == "transformer" else "block (mean over channels)")
plt.show()
for (family, quantity), (layer, head, value, baseline) in best.items():
    which = f"head {head} of block {layer}" if family == "transformer" else f"block {layer}"
    say(f"* {NAMES[family]}, {quantity}: highest is {which} with {value:.2f}; even attention {baseline:.2f}.")

# %% [markdown]
# If the Transformer answers rightly although *no single head* has a high retrieval score, several may share
# the work, or it does it in another way than the textbook's; a score can only find what it is a score of.
# Notebook 04 has the experiment that decides.
#
# The maps of the blocks with the highest retrieval score, for one sequence. The triangle marks the column of
# the answer; the lowest row is the one that matters.

# %%
figure, axes = panels(1, 2, size=(3.6, 3.2), sharey=True)
for ax, family in zip(axes[0], loaded, strict=True):
    layer, head = best[family, "retrieval"][:2]
    which = f"block {layer}, head {head}" if family == "transformer" else f"block {layer}, mean over channels"
    title, pattern = f"{NAMES[family]}\n{which}", maps[family, "loaded"][layer][0, head]
    image = attention_map(ax, pattern, int(behind[0]), title, family_colors()[family])
    ax.set_xlabel("token read")
axes[0, 0].set_ylabel("reading token")
figure.colorbar(image, ax=axes, shrink=0.8, label="share of the row")
plt.show()

# %% [markdown]
# ## What does Mamba write?
#
# In this task it is known *while reading* which symbol will matter: the one behind the special token. A
# selective model should write that one and let the others pass. Below: the norm of each token's write to the
# state, divided by that of ordinary tokens at the same position (as in notebook 03), by tokens after the
# special one. 0 is the special token, 1 the symbol to be remembered. Solid: loaded, dotted: random weights.
# The band is the 95 % interval over sequences.

# %%
OFFSETS = range(-3, 6)
context = torch.arange(ids.shape[1]) < at  # without the last token
special = batch.target_index[:, 0]
ordinary = context & (ids != task.vocabulary.query) & (torch.arange(ids.shape[1]) != behind[:, None])


def writes(model, layers):
    """Layer -> (offsets, 3): writes around the special token over ordinary ones; the symbol behind it too."""
    ratios = {}
    for layer, scan in record_scans(model, ids, layers).items():
        write = write_norm(scan)
        each = around(write, special, ordinary, context, OFFSETS)
        each[OFFSETS.index(1)] = around(write, behind, ordinary, context, range(1))[0]
        ratios[layer] = each
    return ratios


total = loaded["mamba"].config.n_layer
layers = sorted({0, total // 3, 2 * total // 3, total - 1})
ratios = {name: writes(m["mamba"], layers) for name, m in (("loaded", loaded), ("random", blank))}
figure, axes = panels(1, len(layers), size=(2.1, 2.4), sharey=True)
color = family_colors()["mamba"]
for ax, layer in zip(axes[0], layers, strict=True):
    for name, look in (
        ("loaded", dict(color=color, lw=2, marker="o", ms=3.5)),
        ("random", dict(color="0.4", ls=":")),
    ):
        band(ax, OFFSETS, ratios[name][layer], **look)
    ax.axvline(0, color="0.4", lw=0.8)
    ax.set(title=f"block {layer}", yscale="log", xlabel="tokens after\nthe special one")
    ax.set_xticks(range(-2, 6, 2))
axes[0, 0].set_ylabel("write /\nordinary tokens there")
plain_log(axes[0, 0].yaxis)
legend(figure, {"loaded": dict(color=color, marker="o"), "random weights": dict(color="0.4", ls=":")})
plt.show()
rows = []
for layer in layers:
    each = ratios["loaded"][layer][:, 0]
    peak = int(each.argmax())
    symbol, control = (ratios[name][layer][OFFSETS.index(1)] for name in ("loaded", "random"))
    rows.append(
        {
            "block": layer,
            "symbol to be remembered": interval(symbol),
            "the same, random weights": interval(control),
            "largest": f"{each[peak]:.2f} at {OFFSETS[peak]:+d}",
        }
    )
display(pd.DataFrame(rows).set_index("block"))

# %% [markdown]
# Compare with the dotted lines before believing in selectivity. Random weights, too, may write a special
# token more or less than others, simply because it has another embedding; at the tokens *behind* it they see
# it through the convolution.
#
# ## Is the answer in the state?
#
# Record the state of every block after the last context symbol, *before* the special token is read the second
# time, and ask a linear probe for the answer, with the controls of notebook 03: random weights and shuffled
# labels. The last symbol alone is no help: it tells nothing about the answer.

# %%
SEQUENCES = 400
many = task.batch(SEQUENCES, seed=9, index=0, split="heldout")


def readable(model):
    """Test accuracy of the answer from each block's state: a table with controls, one row per block."""
    names = [f"blocks.{layer}.mixer.hook_ssm_state" for layer in layers]
    cache = recorded(model, many.input_ids, names, positions=[at - 1])
    labels = many.labels - first
    tables = [controlled(cache[name].flatten(1), labels, SYMBOLS) for name in names]
    return pd.concat(tables).assign(block=layers)


states = {"loaded": readable(loaded["mamba"]), "random weights": readable(blank["mamba"])}
figure, ax = plt.subplots(figsize=(5.6, 3.2))
for shift, (name, table) in zip((-0.06, 0.06), states.items(), strict=True):
    look = dict(color=color, marker="o") if name == "loaded" else dict(color="0.55", marker="s")
    errorbars(ax, np.arange(len(layers)) + shift, table[["accuracy", "low", "high"]], label=name, **look)
ax.plot(range(len(layers)), states["loaded"]["shuffled"], color="0.2", ls="--", label="shuffled labels")
ax.axhline(1 / SYMBOLS, color="0.4", ls=":", lw=1, label="chance")
ax.set_xticks(range(len(layers)), layers)
ax.set(xlabel="block", ylabel="test accuracy of the answer", ylim=(-0.03, 1.05))
ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
plt.show()
top = states["loaded"].sort_values("accuracy").iloc[-1]
say(
    f"Best from block {top['block']:.0f}: {interval(top[['accuracy', 'low', 'high']])} of "
    f"{top['count']:.0f} sequences that the probe has not seen; random weights reach "
    f"{states['random weights']['accuracy'].max():.2f} at best, chance is {1 / SYMBOLS:.2f}."
)

# %% [markdown]
# ## How long does a write last?
#
# State `n` of a channel decays by $\exp(\Delta A_n)$ a token, so a write is down to 1/e after $-1 / (\Delta
# A_n)$ tokens, its *horizon*. Curves: the share of a block's state entries with a horizon of at most so many
# tokens, from each channel's mean step size on these sequences. Dashed is what Mamba's *initialisation* is
# made to give, $A_n = -1, \dots, -N$ and step sizes spread evenly in their logarithm between 0.001 and 0.1:
# random weights have memories of many lengths by design, so a spread is no sign of learning. A distance from
# the dashed curve is.

# %%
model = loaded["mamba"]
scans = record_scans(model, ids, layers)
figure, ax = plt.subplots(figsize=(5.8, 3.5))
shades = plt.get_cmap("viridis_r")(np.linspace(0.15, 0.95, len(layers)))
medians = {}
for (layer, scan), shade in zip(scans.items(), shades, strict=True):
    steps = constant_horizon(scan.dt.mean((0, 1))[:, None], scan.A).flatten().sort().values
    medians[layer] = float(steps.median())
    ax.plot(steps, np.linspace(0, 1, len(steps)), color=shade, lw=1.8, label=f"block {layer}")
drawn = np.exp(np.random.default_rng(0).uniform(np.log(1e-3), np.log(0.1), (4000, 1)))
rule = np.sort((1 / (drawn * np.arange(1, model.config.d_state + 1))).ravel())
ax.plot(rule, np.linspace(0, 1, len(rule)), color="0.2", ls="--", lw=1.4, label="initialisation's rule")
ax.set(xscale="log", xlabel="horizon (tokens)", ylabel="share of the state's entries", xlim=(0.1, 2000))
plain_log(ax.xaxis)
ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
plt.show()
say(
    "Median horizon in tokens: "
    + ", ".join(f"block {layer} {value:.1f}" for layer, value in medians.items())
    + f"; by the rule {np.median(rule):.1f}."
)

# %% [markdown]
# ## On with it
#
# * On a machine with a network run this notebook again: the same cells then speak about 130 to 160 million
#   parameters that have read the Pile. Write down beforehand what you expect.
# * `python -m synthetic.run --model mamba --init state-spaces/mamba-130m --seq-len 64` trains a published
#   model on the retrieval task, and `python -m probes.run runs/<id>` makes every probe of this project for
#   the result.
# * Larger checkpoints load in half precision: `models.load(name, dtype=torch.bfloat16)`.
#   [`docs/checkpoints.md`](../docs/checkpoints.md) lists what is understood,
#   [`docs/probes.md`](../docs/probes.md) what can be recorded and changed.
