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
# # 04 · Causal tracing: a Transformer beside a Mamba
#
# Notebook 03 showed what is *there* in a state. That something can be read off an activation does not mean
# that the model uses it. To find out what is used, one has to intervene: take an activation from one run, put
# it into another one, and see whether the answer changes. This is called activation patching or causal
# tracing (Meng et al. 2022, [arXiv 2202.05262](https://arxiv.org/abs/2202.05262)).
#
# The models are those of notebook 01, with the query last. The question: **at which token and after how many
# blocks does the place of the target stand, and what moves it from the target, where it is first known, to
# the last token, where the answer is due?** In a Transformer that must be attention. In Mamba only the state
# can carry anything from one token to a later one beyond the four tokens of the short convolution.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from lab import attention_map, begin, head_scores, say, trained

from probes.cache import recorded
from probes.contrast_pairs import contrast_pairs
from probes.heads import retrieval_score
from probes.patching import patch
from probes.retention import attention_output
from probes.scan import scan_names, scan_of
from probes.suite.attention import patterns
from probes.token_roles import target_at, token_roles
from ssm_retrieval.style import NAMES, family_colors, legend, panels

begin()
FAMILIES = ("transformer", "mamba")
runs = {family: trained(family, layout="suffix") for family in FAMILIES}
task = runs["mamba"].task
for family, run in runs.items():
    blocks, accuracy = run.model.config.n_layer, run.result["accuracy"]
    say(f"* {NAMES[family]}: {blocks} blocks, held-out accuracy {accuracy:.3f}")

# %% [markdown]
# ## Clean and corrupted runs
#
# One needs pairs of sequences that differ in as little as possible and have different answers. There are two
# kinds:
#
# * **target**: the same query, but in the corrupted sequence its symbol has changed places with another one,
#   the *partner*;
# * **query**: the same context, but another of its symbols, the partner, is asked for.
#
# Both sequences are ordinary examples of the task, so no activation is unlike what the model knows. One pair
# of each kind:

# %%
PAIRS = 64
made = {kind: contrast_pairs(task, PAIRS, kind=kind, seed=3) for kind in ("target", "query")}
for kind, pair in made.items():
    print(f"{kind}\n  clean      " + task.render(pair.clean).splitlines()[0].removeprefix("input  "))
    print("  corrupted  " + task.render(pair.corrupted).splitlines()[0].removeprefix("input  "))
    answers = task.vocabulary.decode([int(pair.answer[0]), int(pair.corrupted_answer[0])])
    print(f"  answers    {answers[0]} and {answers[1]}\n")

# %% [markdown]
# ## The measure
#
# Let `LD` be the logit of the clean answer minus that of the corrupted one, read at the last token. A patch
# carries one activation of the clean run into the corrupted run, everything behind it is computed anew, and
# its **effect** is
#
# $$\frac{LD_\text{patched} - LD_\text{corrupted}}{LD_\text{clean} - LD_\text{corrupted}} .$$
#
# 0: the patch changes nothing. 1: it turns the corrupted run's answer into the clean one's. About one half:
# it has *destroyed* the corrupted answer without bringing the clean one, so that neither is preferred. Below
# 0: it pushes further away.
#
# The measure means something only if the model answers the clean run rightly and the corrupted run with the
# other answer:

# %%
grids = {}
for family, run in runs.items():
    for kind, pair in made.items():
        grids[family, kind] = patch(run.model, pair, max_positions=40)
rows = [
    {
        "model": NAMES[family],
        "pairs differ in the": kind,
        "clean run gives the clean answer": table["accuracy_clean"].iloc[0],
        "corrupted run gives it": table["accuracy_corrupted"].iloc[0],
        "gap of logits": table["gap"].iloc[0],
    }
    for (family, kind), table in grids.items()
]
display(pd.DataFrame(rows).set_index(["model", "pairs differ in the"]).round(3))

# %% [markdown]
# ## Where does the answer stand? Patching the residual stream
#
# The residual stream is what blocks read from and add to: one vector per token and block. Row `n` of a map
# below is the stream after `n` blocks (0 = the embeddings), columns are tokens: first those with a role of
# their own, then, right of the line, distractors by their position in the sequence. Red: the patch brings the
# clean answer. White: nothing happens. Columns of *target* and *partner* collect tokens that stand elsewhere
# in every pair.
#
# Expectation, for pairs that differ in the target: after 0 blocks the information is in two tokens, target
# and partner, so each of them should restore part of the answer. After the last block, only the last token
# can matter, because the answer is read there. The interesting part is what is in between.

# %%
ORDER = ("bos", "target", "partner", "query_marker", "query")


def draw_map(ax, table, site, control=""):
    """Effects of one site: a row per block or head, a column per role, of distractors per position."""
    part = table[(table["site"] == site) & (table["control"] == control)].copy()
    part["row"] = [f"{r.layer}" if pd.isna(r.head) else f"{r.layer}.{r.head}" for r in part.itertuples()]
    named = part["role"].isin(ORDER)
    part["column"] = np.where(
        named, part["role"].str.replace("query_marker", "marker"), part["low"].astype(str)
    )
    named_columns = [name.replace("query_marker", "marker") for name in ORDER]
    columns = named_columns + sorted(set(part.loc[~named, "column"]), key=int)
    wide = part.pivot(index="row", columns="column", values="effect")[columns]
    image = ax.imshow(wide, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto", interpolation="nearest")
    ax.set_xticks(range(len(columns)), columns, rotation=90)
    ax.set_yticks(range(len(wide)), wide.index)
    ax.axvline(len(ORDER) - 0.5, color="0.3", lw=1)
    ax.grid(False)
    return image


def shown(figure, axes, image, unit="effect of the patch"):
    """A colour bar for all panels, and the figure."""
    figure.colorbar(image, ax=axes, shrink=0.7, aspect=30, label=unit)
    plt.show()


figure, axes = panels(2, 2, size=(4.0, 2.5))
for i, kind in enumerate(made):
    for j, family in enumerate(FAMILIES):
        image = draw_map(axes[i, j], grids[family, kind], "residual")
        axes[i, j].set_title(f"{NAMES[family]}; pairs differ in the {kind}", fontsize=9)
    axes[i, 0].set_ylabel("blocks so far")
shown(figure, axes, image)

# %%
rows = []
for family in FAMILIES:
    table = grids[family, "target"]
    stream = table[(table["site"] == "residual") & (table["control"] == "")]
    for layer in sorted(stream["layer"].unique()):
        at = stream[stream["layer"] == layer].set_index("role")
        both = at.loc["target", "effect"] + at.loc["partner", "effect"]
        last = at.loc["query"]
        rows.append(
            {
                "model": NAMES[family],
                "blocks so far": layer,
                "target and partner, sum": f"{both:.2f}",
                "last token": f"{last['effect']:.2f} [{last['effect_low']:.2f}, {last['effect_high']:.2f}]",
            }
        )
say("Pairs that differ in the target: what the patch of a token restores, with its 95 % interval over pairs.")
display(pd.DataFrame(rows).set_index(["model", "blocks so far"]))

# %% [markdown]
# *What to look for.* The block in which the effect leaves the two context symbols and arrives at the last
# token is the block that **retrieves**. In the maps below ("pairs differ in the query") all effect is at the
# last token from the start: that is where the two sequences differ, and it says that the query never has to
# travel.
#
# ## What carries it? Patching heads and states
#
# Now patch *inside* the blocks. For the Transformer: the output of one attention head at one token (row
# `block.head`). For Mamba: the whole state of one layer after one token, from which its recurrence goes on. A
# state holds all that came before, so for Mamba a column says "the memory as it was after this token", not
# "what this token contributed".

# %%
figure, axes = panels(2, 2, size=(4.0, 2.5))
for i, kind in enumerate(made):
    for j, (family, site) in enumerate((("transformer", "head"), ("mamba", "state"))):
        image = draw_map(axes[i, j], grids[family, kind], site)
        axes[i, j].set_title(f"{NAMES[family]}, {site}; pairs differ in the {kind}", fontsize=9)
    axes[i, 0].set_ylabel("block.head")
    axes[i, 1].set_ylabel("block")
shown(figure, axes, image)

# %%
for family, site, unit in (("transformer", "head", "head"), ("mamba", "state", "state of block")):
    for kind in made:
        table = grids[family, kind]
        part = table[(table["site"] == site) & (table["control"] == "") & (table["effect"].notna())]
        top = part.loc[part["effect"].idxmax()]
        name = f"{top['layer']}" if pd.isna(top["head"]) else f"{top['layer']}.{top['head']}"
        say(
            f"* {NAMES[family]}, pairs that differ in the {kind}: the strongest is {unit} {name} at the "
            f"{top['role'].replace('_', ' ')}, effect {top['effect']:.2f} "
            f"[{top['effect_low']:.2f}, {top['effect_high']:.2f}]."
        )

# %% [markdown]
# Compare the two right-hand maps. If pairs differ in the **target**, the clean state knows another place for
# the queried symbol, and patching it should matter the more the later in the sequence it is done: the state
# after the last token holds everything. If they differ only in the **query**, the context has been the same
# up to the last token, and so has the state: patching it changes nothing. What differs there is how it is
# *read*. So the memory of Mamba and the question put to it can be told apart, as keys and queries of
# attention can.
#
# ## Controls
#
# A map of effects is only as good as its controls. `patch` makes three:
#
# * **self**: the corrupted run's own activation put back. Must be 0 exactly.
# * **everything**: all tokens of a block at once. Must be 1.
# * **unrelated**: an activation of another pair's clean run, scaled to the same norm. It knows nothing of
#   this pair's answer, so it may destroy (about one half), but should not restore. A red cell counts only as
#   far as it exceeds this.

# %%
rows = []
for (family, kind), table in grids.items():
    for site, part in table.groupby("site"):
        row = {"model": NAMES[family], "pairs differ in the": kind, "site": site}
        patches = part[(part["control"] == "") & (part["role"] != "everything")]
        row["patches, largest"] = f"{patches['effect'].max():.3f}"
        for control in ("unrelated", "self", "everything"):
            values = part.loc[part["control"] == control, "effect"].abs()
            name = control if control == "everything" else f"{control}, largest"
            row[name] = f"{values.max():.3f}" if len(values) else "–"
        rows.append(row)
display(pd.DataFrame(rows).set_index(["model", "pairs differ in the", "site"]))

# %% [markdown]
# ## Attention, beside hidden attention
#
# Patching says *which* head or state matters. What does it do? An attention head has a map: how much each
# token (row) takes from each earlier one (column). Mamba has such a map, too. Unrolling the recurrence, the
# output at token $t$ is $y_t = \sum_{i \le t} \alpha(t, i)\, u_i$ with
#
# $$\alpha(t, i) = C_t \prod_{i < s \le t} \exp(\Delta_s A)\; \Delta_i B_i ,$$
#
# the **hidden attention** of Ali, Zimerman and Wolf 2024 ([arXiv
# 2403.01590](https://arxiv.org/abs/2403.01590)): one map for each channel. It is not an approximation, as the
# next cell checks.

# %%
batch = task.batch(PAIRS, seed=5, index=0, split="heldout")
errors = {}
for layer in range(runs["mamba"].model.config.n_layer):
    cache = recorded(runs["mamba"].model, batch.input_ids[:8], scan_names([layer], "mixer.hook_y"))
    block = runs["mamba"].model.blocks[layer]
    y = attention_output(scan_of(runs["mamba"].model, cache, layer), D=block.mixer.D.detach()).squeeze(-1)
    wanted = cache[f"blocks.{layer}.mixer.hook_y"]
    errors[layer] = float((y - wanted).norm() / wanted.norm())
say(
    "Maps times inputs, against what the layers computed: relative error "
    + ", ".join(f"{error:.0e}" for error in errors.values())
    + " in layers 0 to 3, which is rounding."
)

# %% [markdown]
# Below, one sequence. Each map has a token per row and column; a row's cells add up to 1, and the scale is
# logarithmic. For the Transformer: the two heads of each block that look most from the last token at the
# target. For Mamba: the mean over channels of $|\alpha|$, rows normalised in the same way; signs are lost and
# channels are many, so it says where a layer *can* be reading, not what for. The red triangle marks the
# target's column; the row that matters for the answer is the lowest one.

# %%
at = int(batch.answer_at[0])
target = target_at(token_roles(task, batch))
found = {family: patterns(run.model, batch.input_ids) for family, run in runs.items()}
scores = {
    family: {layer: retrieval_score(pattern, at, target) for layer, pattern in maps.items()}
    for family, maps in found.items()
}
figure, axes = panels(2, 4, size=(2.3, 2.3), sharex=True, sharey=True)
picked = []
for layer, score in scores["transformer"].items():
    best = score.value.mean(0).argsort(descending=True)[:2].tolist()
    picked += [("transformer", layer, head, f"block {layer}, head {head}") for head in best]
picked += [("mamba", layer, 0, f"block {layer}") for layer in found["mamba"]]
for ax, (family, layer, head, title) in zip(axes.flat, picked, strict=True):
    title = f"{NAMES[family]}\n{title}"
    image = attention_map(ax, found[family][layer][0, head], int(target[0]), title, family_colors()[family])
for ax in axes[-1]:
    ax.set_xlabel("token read")
for ax in axes[:, 0]:
    ax.set_ylabel("reading token")
shown(figure, axes, image, "share of the row")

# %% [markdown]
# ## How much of the last token's attention is on the target?
#
# The **retrieval score** of a head is the share of the last token's attention that falls on the target,
# averaged over sequences, with a 95 % interval. The dash is what attention spread evenly over all tokens
# would give: one over their number. Hollow: the same architecture before training.

# %%
before = {
    family: {
        layer: retrieval_score(pattern, at, target)
        for layer, pattern in patterns(run.untrained(), batch.input_ids).items()
    }
    for family, run in runs.items()
}
figure, axes = panels(1, 2, size=(3.8, 3.0), sharey=True)
best = {}
for ax, family in zip(axes[0], FAMILIES, strict=True):
    best[family] = head_scores(ax, scores[family], before[family], family_colors()[family])
    ax.set_title(NAMES[family])
    ax.set_xlabel("block.head" if family == "transformer" else "block (mean over channels)")
axes[0, 0].set_ylabel("retrieval score")
legend(
    figure,
    {
        "trained": dict(color="0.3", marker="o", ls=""),
        "before training": dict(color="0.3", marker="o", mfc="none", ls=""),
        "even attention": dict(color="0.3", marker="_", ms=14, mew=1.5, ls=""),
    },
)
plt.show()

# %%
for family, (layer, head, score, baseline) in best.items():
    label = f"{layer}.{head}" if family == "transformer" else f"{layer}"
    say(
        f"* {NAMES[family]}: the best is {label} with {score:.2f}, {score / baseline:.1f} times even "
        f"attention ({baseline:.2f})."
    )

# %% [markdown]
# *What is seen.* Compare the head with the highest score to the one that patching found. And compare the two
# panels: a head of attention can put nearly all its weight on one token that its query has chosen. Mamba's
# map has no such freedom. Its weight on token $i$ is fixed by what was written and by decays that are *the
# same for all questions*; only $C_t$ depends on the last token. So its answer is a difference of many
# channels, which a mean over channels hardly shows, although patching proved that the state carries it. A map
# of attention is a description, a patch is an experiment; where they disagree, believe the experiment.
#
# ## What was seen, and what not
#
# * Both models retrieve in one block, and do not use the later ones for it: see in which row of the residual
#   maps the effect moves.
# * In the Transformer one head does it; in Mamba it is the state of a layer, the later its time the more of
#   the answer it has.
# * What differs in the query alone leaves no trace in Mamba's state before the last token: memory and
#   question are separate.
# * This is one small model of each kind, on one task, asked last. The study
#   [`why_mamba_lags`](../studies/why_mamba_lags/README.md) has three seeds of more models, also with the
#   query first, where the answer crosses over late.
#
# **Try it.** Trace the models with the query *first* (`trained("mamba", layout="prefix")`). Patch only
# `sites=["state"]` with a finer selection of layers. Switch one head off for good with
# `probes.ablation.knock_out`: is the head that attends the one that is needed?
