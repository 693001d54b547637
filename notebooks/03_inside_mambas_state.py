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
# # 03 · Inside Mamba's state
#
# A Transformer keeps all it has read. Mamba keeps a **state**: per layer, `E` channels of `N` numbers each,
# which every token decays a little and adds something to,
#
# $$h_t = \exp(\Delta_t A)\, h_{t-1} + \Delta_t\, u_t B_t, \qquad y_t = C_t\, h_t .$$
#
# The step size $\Delta_t$, what is written ($u_t B_t$) and how it is read ($C_t$) all depend on the token:
# that is the "selective" in selective state space. Large $\Delta_t$: forget more, write more. Small
# $\Delta_t$: let the token pass.
#
# The paper has two hypotheses about why Mamba retrieves badly. One is that with the query *last* the state
# must be updated before it is known what will be asked, so it can only treat all symbols alike. Here you look
# at that directly: two small Mambas of the same shape, one trained with the query last (the one of notebook
# 01) and one with the query first. What do their states do at the symbol that matters?

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from lab import N, around, band, begin, interval, say, trained
from matplotlib.colors import LogNorm

import probes
from analysis.plots.common import plain_log
from probes.cache import recorded
from probes.linear import decode_curve
from probes.retention import retention
from probes.scan import iterate_states, record_scans
from probes.token_roles import ROLES, is_context, role, target_at, token_roles
from probes.updates import write_norm
from ssm_retrieval.style import family_colors, legend, panels

begin()
COLOR = family_colors()["mamba"]
TITLES = {"suffix": "query last", "prefix": "query first"}
runs = {layout: trained("mamba", layout=layout) for layout in TITLES}
untrained = {layout: run.untrained() for layout, run in runs.items()}
LAYERS = range(runs["suffix"].model.config.n_layer)

# %%
columns = ["tokens", "accuracy", "ci_low", "ci_high", "chance"]
rows = {TITLES[layout]: [run.result[column] for column in columns] for layout, run in runs.items()}
display(pd.DataFrame.from_dict(rows, orient="index", columns=columns).round(3))
mixer = runs["suffix"].model.backbone.layers[0].mixer.config
say(
    f"Both have {len(LAYERS)} layers with a state of {mixer.d_inner} channels x {mixer.d_state} numbers = "
    f"{mixer.d_inner * mixer.d_state:,} numbers each, at {N} symbols of context. As a control there is a "
    "third model throughout: the same architecture with the weights it had *before* training."
)

# %% [markdown]
# With the query first Mamba needs fewer tokens and gets further; so it does in every seed of the study of
# notebook 02, with positions. Room cannot be what the other one lacks: thousands of numbers could hold a
# dozen symbols and places many times over.
#
# ## Recording a state
#
# Every model here has named *hook points*. `probes.record` stores what passes them; the computation itself
# does not change. Below: the state of layer 0 after every token of one sequence. As a check that the equation
# above is really what runs, the state is computed a second time from the recorded $\Delta$, $B$ and $u$,
# token by token.

# %%
example = {layout: run.task.batch(1, seed=7, index=0, split="heldout") for layout, run in runs.items()}
print(runs["suffix"].task.render(example["suffix"]), "\n")
print(runs["prefix"].task.render(example["prefix"]))

model, ids = runs["suffix"].model, example["suffix"].input_ids
names = ["blocks.0.mixer.hook_ssm_state", "blocks.0.mixer.hook_dt"]
with torch.no_grad(), probes.record(model, names) as cache:
    model(ids)
state, dt = (cache[name] for name in names)
again = torch.cat([h for _, h in iterate_states(record_scans(model, ids)[0])], dim=1).view_as(state)
error = float((again - state).abs().max() / state.abs().max())
say(
    f"Recorded state: {tuple(state.shape)} = (sequences, tokens, channels, states per channel). Step sizes: "
    f"{tuple(dt.shape)}, one per token and channel, from {dt.min():.2g} to {dt.max():.2g}. The recurrence by "
    f"hand gives the same states up to {error:.0e} of the largest entry: rounding."
)

# %% [markdown]
# ## Step sizes over a sequence
#
# For the same context in both layouts: how large is the step at every token? Each cell is the mean of
# $\Delta_t$ over the channels of one layer. Brighter: the token makes the layer forget more and write more.
# The scale is logarithmic and the same in both panels; the target and the query are red.
#
# If a model treats all symbols alike, context symbols have one shade per row, whatever the question. If it
# picks the target out, its column stands out.

# %%
figure, axes = plt.subplots(2, 1, figsize=(7.2, 4.8))
maps = {}
for layout, run in runs.items():
    names = [f"blocks.{i}.mixer.hook_dt" for i in LAYERS]
    cache = recorded(run.model, example[layout].input_ids, names)
    maps[layout] = np.stack([cache[name][0].mean(-1).numpy() for name in names])
low, high = min(m.min() for m in maps.values()), max(m.max() for m in maps.values())
for ax, (layout, values) in zip(axes, maps.items(), strict=True):
    image = ax.imshow(values, norm=LogNorm(low, high), cmap="viridis", aspect="auto")
    task, batch = runs[layout].task, example[layout]
    words = [word.strip("<>") for word in task.vocabulary.decode(batch.input_ids[0].tolist())]
    ax.set_xticks(range(len(words)), words)
    for label, kind in zip(ax.get_xticklabels(), token_roles(task, batch)[0], strict=True):
        if ROLES[kind] in ("target", "query"):
            label.set(color="#d1495b", weight="bold")
    ax.set_yticks(list(LAYERS))
    ax.set(title=TITLES[layout], ylabel="layer")
    ax.grid(False)
axes[1].set_xlabel("token")
bar = figure.colorbar(image, ax=axes, label="step size, mean over channels")
plain_log(bar.ax.yaxis)
plt.show()

# %% [markdown]
# One sequence can mislead: a symbol may have a large step for its own sake, or for its place.
#
# ## Is the target treated differently?
#
# For every context symbol take a quantity, and divide it by its (geometric) mean over *distractors at the
# same position in other sequences*. A ratio of 1 says: treated as any symbol there. Then line the sequences
# up at the target: horizontal is the number of tokens after the target (0 = the target itself, negative =
# before it), vertical the ratio, logarithmic, averaged over sequences, with a 95 % band. Rows are three
# quantities, columns the layers:
#
# * **step size**, the mean of $\Delta_t$ over channels;
# * **write**, the norm of what the token adds to the state, $\lVert \Delta_t u_t B_t \rVert$;
# * **left at the answer**, the norm of what is still there of that write when the answer is due, after all
#   later decays. This is exact, not an estimate: the state is linear in what is written, so that each token's
#   contribution can be followed.
#
# Expectation: with the query last, every ratio *must* be 1 around the target, because nothing there can
# depend on a query that comes later. A measurement that found anything else would be broken. With the query
# first it is an open question, and the paper's hypothesis 1 says that there the model can do better.

# %%
EXAMPLES = 512
QUANTITIES = ("step size", "write", "left at the answer")
OFFSETS = range(-4, 6)


def measured(model, task):
    """Roles (B, L) of held-out sequences, and by layer and quantity (B, L) values, `kept` among them."""
    batch = task.batch(EXAMPLES, seed=11, index=0, split="heldout")
    everywhere, answer = torch.arange(batch.input_ids.shape[1]), batch.input_ids.shape[1] - 1
    values = []
    for scan in record_scans(model, batch.input_ids).values():
        write, kept = write_norm(scan), retention(scan, everywhere, answer).kept
        named = {"step size": scan.dt.mean(-1), "write": write, "left at the answer": write * kept}
        values.append(named | {"kept": kept})
    return token_roles(task, batch), values


def around_target(values, kinds):
    """Ratios to distractors at the same position, by tokens after the target, with 95 % intervals."""
    return around(values, target_at(kinds), kinds == role("distractor"), is_context(kinds), OFFSETS)


found = {
    (layout, weights): measured(model, runs[layout].task)
    for layout in TITLES
    for weights, model in (("trained", runs[layout].model), ("untrained", untrained[layout]))
}
ratios = {
    (*key, layer, quantity): around_target(values[layer][quantity], kinds)
    for key, (kinds, values) in found.items()
    for layer in LAYERS
    for quantity in QUANTITIES
}

# %%
LOOKS = {
    ("prefix", "trained"): dict(color=COLOR, ls="-", lw=2.0, marker="o", ms=3.5),
    ("suffix", "trained"): dict(color=COLOR, ls="--", lw=2.2),
    ("prefix", "untrained"): dict(color="0.2", ls=":", lw=1.2),
}
figure, axes = panels(3, len(LAYERS), size=(2.1, 1.9), sharex=True, sharey=True)
for i, quantity in enumerate(QUANTITIES):
    for layer in LAYERS:
        ax = axes[i, layer]
        for key, look in LOOKS.items():
            band(ax, OFFSETS, ratios[(*key, layer, quantity)], **look)
        ax.axvline(0, color="0.4", ls="-", lw=0.8)
        ax.set_yscale("log")
        if i == 0:
            ax.set_title(f"layer {layer}")
    axes[i, 0].set_ylabel(f"{quantity} /\ndistractors there")
for ax in axes[-1]:
    ax.set_xlabel("tokens after target")
    ax.set_xticks(range(-4, 6, 2))
plain_log(axes[0, 0].yaxis)
names = {key: f"{TITLES[key[0]]}{', untrained' if key[1] == 'untrained' else ''}" for key in LOOKS}
legend(figure, {names[key]: look for key, look in LOOKS.items()}, width=2.0)
plt.show()

# %%
rows = []
for layer in LAYERS:
    row = {"layer": layer}
    for layout in TITLES:
        each = ratios[layout, "trained", layer, "write"]
        behind = {offset: each[OFFSETS.index(offset)] for offset in range(4)}
        peak = max(behind, key=lambda offset: behind[offset][0])
        for name, at in (("target", 0), ("largest", peak)):
            place = f"at +{at}: " if name == "largest" else ""
            row[f"{TITLES[layout]}, {name}"] = place + interval(behind[at])
    rows.append(row)
say(
    "The **write** over that of distractors at the same position, with 95 % intervals: of the target, and of "
    "whichever of the target and the three tokens behind it has the largest ratio."
)
display(pd.DataFrame(rows).set_index("layer"))

off = max(abs(np.log(ratios["suffix", "trained", i, q][:, 0])).max() for i in LAYERS for q in QUANTITIES)
peaks = {layer: ratios["prefix", "trained", layer, "left at the answer"][:, 0] for layer in LAYERS}
strongest = max(peaks, key=lambda layer: peaks[layer].max())
say(
    f"With the query last no ratio in the figure is further from 1 than a factor of {np.exp(off):.2f}. With "
    f"the query first, what stands out most at the answer is the token {OFFSETS[peaks[strongest].argmax()]} "
    f"behind the target, in layer {strongest}: {peaks[strongest].max():.0f} times as much is left of it "
    "as of a distractor there."
)

# %% [markdown]
# *What to look for.* Dashed lines (query last) lie on 1 everywhere, up to noise: that checks the measurement.
# Dotted ones are weights before training, with the query first: the target is then the second occurrence of a
# symbol, but nothing has learned to notice. What the solid lines do beyond those is **learned selectivity**:
# with the query first, the model treats some token at or behind the target unlike any other.
#
# Which token? Look at *where* the solid peaks stand. The convolution before each recurrence reads the last
# four tokens, so a layer can act on a match one to three tokens later. At the target alone (offset 0) one
# would miss most of it: the table has both.
#
# One model of one seed. The study [`why_mamba_lags`](../studies/why_mamba_lags/README.md) has three seeds of
# models with two layers and positions, at 64 symbols, measured at the target itself: with the query first the
# second layer writes it at least 77 times as strongly as a distractor, in every seed. Where and how strongly
# a model marks the match differs from model to model; what to trust is that it does.
#
# ## What is left of each symbol
#
# Hypothesis 2 is about forgetting: the state is compressed, so old symbols may be gone. For every symbol of
# the context: what share of its write is still in the state when the answer is due? Horizontal: its place (0
# = read first). Vertical: that share, logarithmic; 1 means that nothing has decayed. A panel per layer, the
# query last above and first below.

# %%
figure, axes = panels(2, len(LAYERS), size=(2.1, 2.1), sharex=True, sharey=True)
for i, layout in enumerate(TITLES):
    kinds, values = found[layout, "trained"]
    plain = found[layout, "untrained"][1]
    context = is_context(kinds[0])
    for layer in LAYERS:
        ax, kept = axes[i, layer], values[layer]["kept"][:, context]
        target = kinds[:, context] == role("target")
        mean = {who: (kept * mask).sum(0) / mask.sum(0) for who, mask in (("t", target), ("d", ~target))}
        ax.plot(mean["d"], color="0.25", ls="--", lw=1.4)
        ax.plot(mean["t"], color=COLOR, lw=2)
        ax.plot(plain[layer]["kept"][:, context].mean(0), color="0.6", ls=":", lw=1.4)
        ax.set_yscale("log")
        if i == 0:
            ax.set_title(f"layer {layer}")
    axes[i, 0].set_ylabel(f"{TITLES[layout]}\nshare that is left")
for ax in axes[1]:
    ax.set_xlabel("place of the symbol")
    ax.set_xticks(range(0, N, 4))
plain_log(axes[0, 0].yaxis)
looks = {"target": dict(color=COLOR, lw=2), "distractors": dict(color="0.25", ls="--")}
legend(figure, looks | {"untrained weights": dict(color="0.6", ls=":", lw=1.4)})
plt.show()

# %% [markdown]
# Steady forgetting is a straight line that falls towards the left; the untrained weights are near that. Where
# a trained curve lies above such a line at the left end, the layer protects the first symbols; where it is
# low in the middle, those are what it gives up. With the query first, what a target itself wrote is often
# kept *worse* (solid) than what others wrote (dashed): the large step behind it that writes the mark also
# erases.
#
# A share of a tenth is not "gone": what is left of a write says as much as the write, if nothing else lies on
# top of it. So the next question is not how much is left but what can be *read* from it.
#
# ## What can be read off the state?
#
# A **linear probe** is trained to say, from the state at the moment the answer is due, *which symbol stood at
# place k*. If it can, a linear map of the state has the information. There are 12 symbols, so chance is 1 /
# 12. The usual trap is that a probe with thousands of inputs can learn a lot by itself, so two controls come
# along:
#
# * **untrained weights**: what a random state already gives away;
# * **shuffled labels**: the same probe on labels dealt to sequences at random, which must end at chance.
#   `decode_curve` does it; accuracies are on sequences that neither the fit nor the choice of the penalty has
#   seen. There are fewer of them than inputs, so what the probe finds is a lower bound of what is there.
#
# Also drawn, for the query last: how often the *model* is right about each place, as in notebook 01.

# %%
SEQUENCES = 800


def readable(model, task):
    """decode_curve at every layer: accuracy of the identity of each place's symbol, from the last state."""
    batch = task.batch(SEQUENCES, seed=23, index=0, split="heldout")
    ids, at = batch.input_ids, batch.input_ids.shape[1] - 1
    places = is_context(token_roles(task, batch)[0]).nonzero().flatten()
    names = [f"blocks.{i}.mixer.hook_ssm_state" for i in LAYERS]
    cache = recorded(model, ids, names, positions=[at])
    tables = []
    for layer, name in enumerate(names):
        curve = decode_curve(cache[name].flatten(2), [at], ids, at - places)
        tables.append(curve.assign(layer=layer, place=range(N)))
    return pd.concat(tables)


read = {
    (layout, weights): readable(model, runs[layout].task)
    for layout in TITLES
    for weights, model in (("trained", runs[layout].model), ("untrained", untrained[layout]))
}

# %%
shades = [plt.get_cmap("viridis_r")(0.15 + 0.8 * layer / (len(LAYERS) - 1)) for layer in LAYERS]
figure, axes = panels(1, 2, size=(3.9, 3.4), sharey=True)
for ax, layout in zip(axes[0], TITLES, strict=True):
    curves = read[layout, "trained"]
    for layer, part in curves.groupby("layer"):
        ax.plot(part["place"], part["accuracy"], color=shades[layer], lw=1.8, marker=".")
    best = read[layout, "untrained"].groupby("place")["accuracy"].max()
    ax.plot(best, color="0.6", lw=1.2, ls="-.")
    ax.plot(curves.groupby("place")["shuffled"].mean(), color="0.2", lw=1.2, ls="--")
    ax.axhline(curves["chance"].iloc[0], color="0.4", ls=":", lw=1)
    if layout == "suffix":
        positions = runs[layout].positions
        ax.plot(positions["position"], positions["rate"], color=COLOR, lw=0, marker="x", ms=7, mew=2)
    ax.set(title=TITLES[layout], xlabel="place of the symbol (0 = read first)", ylim=(-0.03, 1.05))
    ax.set_xticks(range(N))
axes[0, 0].set_ylabel("test accuracy")
looks = {f"layer {i}": dict(color=shades[i], marker=".") for i in LAYERS}
looks |= {
    "untrained, best layer": dict(color="0.6", ls="-."), "shuffled labels": dict(color="0.2", ls="--"),
    "chance": dict(color="0.4", ls=":"),
    "the model's own answers": dict(color=COLOR, marker="x", ls="", mew=2),
}  # fmt: skip
legend(figure, looks, width=1.9)
plt.show()

# %%
rows = []
for (layout, weights), curves in read.items():
    layer = curves.groupby("layer")["accuracy"].mean().idxmax()
    one = curves[curves["layer"] == layer]
    chance = one["chance"].iloc[0]
    accuracy, shuffled = one["accuracy"], one["shuffled"].mean()
    count = ((accuracy - chance) / (1 - chance)).sum()
    rows.append((TITLES[layout], weights, layer, accuracy.mean(), shuffled, chance, count))
names = ["query", "weights", "best layer", "accuracy, mean over places", "shuffled labels", "chance"]
summary = pd.DataFrame(rows, columns=[*names, f"symbols readable, of {N}"]).set_index(["query", "weights"])
display(summary.round(3))

# %% [markdown]
# "Symbols readable" adds up, over the places, how far the accuracy lies above chance, so that guessing counts
# nothing. The comparison that counts is with the *untrained* weights.

# %% [markdown]
# With the query *last* every symbol may be asked for, so a good state holds as many as possible; with the
# query *first* it may throw the rest away. Where the model is right more often (crosses) than a linear map
# can read, the information has a form that the probe is too simple for: it gives a *lower bound* of what a
# state holds.
#
# ## What was seen, and what not
#
# * With the query last the state is written before it is known what will be asked, and nothing distinguishes
#   the target. That is a matter of logic, and the measurement agrees.
# * With the query first the same architecture *can learn* to mark the match when it comes by, and needs less
#   training.
# * The symbols that a linear reader finds in the state, told last, are those at the two ends; the model's own
#   mistakes lie where it finds least, in the middle.
# * All of this is from one pair of models, twelve symbols and half a million parameters. For seeds, lengths
#   and sizes see the study; for your own runs, `python -m probes.run runs/<id>` measures this and more, and
#   `python -m analysis.figures runs/<id>` draws it.
#
# **Try it.** Which symbols do the states of `d_state=4` keep? Where does the *first* layer's step size come
# from: replace the context by one repeated symbol and record again. Edit a state: `probes.intervene(model,
# {"blocks.0.mixer.hook_ssm_state": probes.at(5, lambda h: 0 * h)})` makes the model forget all it had read by
# token 5. Does it still find symbols that come later?
