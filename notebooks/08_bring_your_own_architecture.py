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
# # 08 · Bring your own architecture
#
# You have a new layer, and want to know whether it retrieves. This notebook takes one from an idea to a
# comparison:
#
# 1. write a mixer and register it, in one cell,
# 2. check that it does what every language model here must do,
# 3. train it beside Mamba on the toolkit's task, on equal footing,
# 4. write a task of your own, in another cell, and ask both.
#
# In a file instead of a notebook, the same cells work for every command: `--import my_mixer` ([Your own
# models and tasks](../docs/extending.md)).

# %%
from dataclasses import dataclass
from math import lgamma

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import display
from lab import OUT, begin, say
from torch import nn

import synthetic
from ssm_retrieval import models
from ssm_retrieval.style import NAMES, family_colors
from synthetic import RunConfig, tasks
from synthetic.tasks.sampling import sample_distinct
from synthetic.vocab import Vocabulary

begin()

# %% [markdown]
# ## 1 A mixer
#
# The idea: a state that fades. Every channel keeps a running mean of what it has read, with a decay that it
# learns, and a gate decides what comes out:
#
# $$h_t = \lambda h_{t-1} + (1 - \lambda)\, v_t, \qquad y_t = W_o\,(\mathrm{SiLU}(g_t) \odot h_t).$$
#
# The decay does not depend on the input, unlike Mamba's. `models.from_mixer` puts a language model around any
# causal module (B, L, D) -> (B, L, D): embedding, blocks with norms, residuals and an MLP, head.


# %%
class GatedAverage(nn.Module):
    """Exponential moving averages of the values, one decay a channel, with a gate at the output."""

    def __init__(self, d_model):
        super().__init__()
        self.project = nn.Linear(d_model, 2 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.horizon = nn.Parameter(torch.linspace(0, 5, d_model))  # log of the tokens until 1/e is left

    def forward(self, x):
        value, gate = self.project(x).chunk(2, dim=-1)
        steps = torch.arange(x.shape[1], device=x.device)
        ago = (steps[:, None] - steps).clamp(min=0)  # (L, L)
        rate = torch.exp(-self.horizon)
        kernel = (
            torch.exp(-rate[:, None, None] * ago).tril() * -torch.expm1(-rate)[:, None, None]
        )  # (D, L, L)
        state = torch.einsum("dts,bsd->btd", kernel, value)
        return self.out(F.silu(gate) * state)


models.register(
    models.from_mixer(
        "gated-average", GatedAverage, label="Gated average", presets={"tiny": dict(d_model=64, n_layer=2)},
        positions=("learned", "none"),
    )
)  # fmt: skip
model = models.build("gated-average-tiny", vocab_size=140)
say(
    f"A model with {model.num_parameters():,} weights. The sum over all pairs of tokens is short to write, "
    "and slow for long sequences."
)

# %% [markdown]
# ## 2 Is it a language model?
#
# Three properties that every architecture here has, checked instead of believed: no token sees a later one;
# padding on the left changes nothing; generating token by token gives what a forward pass gives.

# %%
ids = torch.randint(0, 140, (2, 24), generator=torch.Generator().manual_seed(0))
model.eval()
with torch.no_grad():
    before = model(ids)
    changed = ids.clone()
    changed[:, 16:] = 7
    causal = (model(changed)[:, :16] - before[:, :16]).abs().max()
    cache = model.init_cache()
    steps = torch.cat([model(ids[:, i : i + 1], cache=cache) for i in range(24)], dim=1)
    padded = model(F.pad(ids, (4, 0)), attention_mask=F.pad(torch.ones_like(ids), (4, 0)))[:, 4:]
scale = before.abs().max()
checks = {
    "a later token changes earlier logits by": causal,
    "token by token, logits differ by": (steps - before).abs().max(),
    "with padding on the left, logits differ by": (padded - before).abs().max(),
}
display(
    pd.DataFrame(
        {"largest, of the largest logit": {name: f"{float(x / scale):.1e}" for name, x in checks.items()}}
    )
)
assert all(x < 1e-4 * scale for x in checks.values())

# %% [markdown]
# ## 3 Does it retrieve?
#
# At which of 16 positions does a symbol stand? Both models have the same width and depth, the same learned
# positions, the same data in the same order, and each the better of two learning rates, chosen on validation
# sequences with a seed that is not reported. Mamba begins as the toolkit has it, with first weights made for
# recall.

# %%
COMMON = dict(
    seq_len=16, d_model=64, layers=2, position="learned", steps=300, eval_every=50, eval_examples=256,
    final_eval_examples=512, batch_tokens=1024, device="cpu", precision="float32", out=str(OUT),
)  # fmt: skip
FAMILIES, RATES = ("gated-average", "mamba"), (2e-3, 6e-3)


def train(family, lr, seed, **more):
    return synthetic.train(RunConfig(model=family, lr=lr, seed=seed, **COMMON | more), progress=False)


def curve(run):
    """Validation accuracy at the full length, as training goes on; shorter contexts are evaluated as well."""
    return run.metrics[run.metrics["length"] == run.plan.seq_len]


rates = {f: max(RATES, key=lambda lr: curve(train(f, lr, seed=100))["accuracy"].max()) for f in FAMILIES}
runs = {f: [train(f, rates[f], seed) for seed in (0, 1)] for f in FAMILIES}
figure = synthetic.compare([found[0] for found in runs.values()])
display(figure)
plt.close(figure)


# %%
def shown(runs, chance):
    return pd.DataFrame(
        {
            NAMES[family]: {
                "learning rate": rates[family],
                "held-out accuracy, by seed": ", ".join(f"{run.result['accuracy']:.3f}" for run in found),
                "chance": f"{chance:.3f}",
            }
            for family, found in runs.items()
        }
    ).T


display(shown(runs, 1 / 16))

# %% [markdown]
# Two seeds a family and 300 steps: enough to see whether something happens, too few for a claim. Note what
# the new layer lacks. A place in the context is found by its *content*; an average with a fixed decay mixes
# all that it has read, and nothing in it compares a symbol with the one that is asked for. What the MLP makes
# of such a mixture has to do.
#
# ## 4 A task of your own
#
# Perhaps this is the wrong question for such a layer. A running mean knows well *how often* something stood
# there lately. So here is another task: which of two symbols occurred more often? It is a frozen dataclass;
# `draw` makes contexts, `assemble` the tokens and labels.


# %%
@tasks.register
@dataclass(frozen=True, kw_only=True)
class Majority(tasks.Task):
    """A context of two symbols, drawn anew for each sequence: which of them stands there more often?"""

    name = "majority"
    version = 1
    help = "the more frequent of two symbols"

    num_symbols: int = 16  # V

    @property
    def vocabulary(self):
        return Vocabulary(self.num_symbols, num_positions=0, first_id=self.first_id)

    @property
    def shortest(self):
        return 3

    def max_length(self, queries=1):
        return self.seq_len + 1

    def draw(self, rng, rows, length, queries):
        """Contexts (rows, N) of symbols 0 .. V-1; where the more frequent one stands last (rows, 1)."""
        pair = sample_distinct(rng, rows, 2, self.num_symbols)
        context = np.take_along_axis(pair, rng.integers(0, 2, (rows, length)), axis=1)
        first = context == context[:, :1]
        more = np.where((2 * first.sum(1, keepdims=True) > length), first, ~first)
        return context, length - 1 - more[:, ::-1].argmax(1, keepdims=True)

    def assemble(self, context, target):
        """x1 .. xN <query>: the logits there are to give the symbol."""
        rows, n = context.shape
        symbols = context + self.vocabulary.first_symbol
        ids = np.concatenate([symbols, np.full((rows, 1), self.vocabulary.query)], axis=1)
        labels = np.take_along_axis(symbols, target, axis=1)
        return tasks.Batch.from_numpy(ids, labels, np.array([n]), target, length=n, chance=0.5)

    def log_contexts(self, length):
        """log of how many contexts there are."""
        return lgamma(self.num_symbols + 1) - lgamma(self.num_symbols - 1) + length * np.log(2)


task = tasks.build("majority", seq_len=15)
print(task.render(task.batch(2, seed=0, index=0)))

# %% [markdown]
# The best guess without counting takes one of the two symbols that are there: 0.5. Taking the last symbol is
# a better one, because the more frequent symbol is the more likely to stand there.

# %%
batch = task.batch(4096, seed=0, index=0, split="heldout")
last = float((batch.input_ids[:, -2] == batch.labels[:, 0]).double().mean())
own = dict(task="majority", seq_len=15, num_symbols=16, curriculum=0, steps=200)
counted = {f: [train(f, rates[f], seed, **own) for seed in (0, 1)] for f in FAMILIES}
say(f"Always the last symbol: {last:.3f}.")
display(shown(counted, 0.5))

# %%
colors = {"gated-average": "C2", "mamba": family_colors()["mamba"]}
figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
for axis, found, title in zip(
    axes, (runs, counted), ("where does it stand?", "which is more frequent?"), strict=True
):
    for family, of_family in found.items():
        for run in of_family:
            axis.plot("step", "accuracy", data=curve(run), color=colors[family], label=NAMES[family])
    axis.set(title=title, xlabel="step", ylim=(-0.03, 1.03))
axes[0].axhline(1 / 16, color="0.5", ls=":")
axes[1].axhline(last, color="0.5", ls=":")
axes[0].set_ylabel("validation accuracy")
handles, labels = axes[0].get_legend_handles_labels()
axes[1].legend(handles[::2], labels[::2], fontsize=8)
plt.show()

# %% [markdown]
# Dotted lines are what a model gets without looking at all (left), or with the last symbol alone (right). A
# task of your own makes the difference between "this layer is bad" and "this layer is bad at that".
#
# **Try:**
#
# * give the mixer a decay that depends on the input, `torch.sigmoid(self.forget(x))`, and a loop over time in
#   `forward`,
# * put it into a hybrid: `models.from_pattern("averaged", "gated-average A", label="Averages and
#   attention")`,
# * `python -m probes.run` and `python -m analysis.report` on its runs: they leave out what such a model does
#   not have.
