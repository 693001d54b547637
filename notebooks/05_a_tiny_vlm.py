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
# # 05 · A tiny VLM
#
# Notebooks 01 to 04 had symbols in a row. Here the row is a picture. You build a **vision & language model**:
# a frozen vision encoder turns an image into a row of patches, a small network (the *connector*) turns each
# patch into a vector as wide as a word's, and a language model reads patches and words as one sequence. That
# is all there is to Mamba-VL and Pythia-VL; the two differ in the language model alone.
#
# You will see what such a sequence looks like, teach a Transformer and a Mamba of half a million weights to
# **read one word** in a picture, look at *where* each looks for it, and find in the tables of a longer study
# what they learn beyond reading. Training takes about two minutes on one core.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from lab import begin, say
from torch.nn import functional as F

from analysis.vlm_plots import GUESSED, best_guess
from ssm_retrieval import models
from ssm_retrieval.statistics import mean_interval, wilson
from ssm_retrieval.style import NAMES, family_colors, legend
from vlm import components, layout
from vlm.config import Run, Scenes, Stage
from vlm.data.loader import batches
from vlm.data.mixture import Mixture
from vlm.evaluate import answer_all
from vlm.information_flow import layer_flows, patch_places
from vlm.model import VLM
from vlm.results import right
from vlm.scenes import make_example, render, sample_scene
from vlm.scenes.encoder import QUESTIONS, STEPS, annotation
from vlm.stages import rate

begin()
FAMILIES = ("transformer", "mamba")
SIDE = 8  # patches along a side of the image

# %% [markdown]
# ## A picture and its questions
#
# `vlm.scenes` draws scenes of which everything is known: six shapes, a handwritten digit and a word, each
# with its box. So every question has an exact answer, and a right answer cannot come from knowing the world.

# %%
scene = sample_scene(seed=0, split="heldout", index=3)
TASKS = ("reading-word", "attribute", "existence", "count", "spatial", "grounding")

figure, ax = plt.subplots(figsize=(3.2, 3.2))
ax.imshow(render(scene))
for k in range(1, SIDE):
    ax.axhline(k * scene.size / SIDE - 0.5, color="0.7", lw=0.5)
    ax.axvline(k * scene.size / SIDE - 0.5, color="0.7", lw=0.5)
ax.set_axis_off()
plt.show()
asked = [make_example(scene, task) for task in TASKS]
rows = [dict(task=e.task, question=e.question, answer=e.answer) for e in asked]
display(pd.DataFrame(rows).set_index("task"))

# %% [markdown]
# The thin lines cut the picture into 8 x 8 patches: this is what the language model gets to read, row by row.
# The answer of *grounding* is a box: left, top, right and bottom edge as shares of the picture.
#
# ## The same question in three places
#
# The text can stand behind the picture or before it. As in notebook 01 these are different tasks for a model
# that reads from left to right: `agnostic` (nothing is known while the picture is read), `instruction-first`
# (the *kind* of question is known: what the paper calls task-aware) and `query-first` (the question itself is
# known, which the paper did not try).

# %%
words = components.text("scenes")  # a small tokenizer for scenes
source = Scenes("reading-word", 400, "heldout").build(answers=True)
sample = source[3]
KINDS = ("patch of the picture", "marker of the picture", "question", "answer")
SHADES = ("#b8c4d6", "#3d4f6b", "#d1495b", "#edae49")


def kinds(ids, labels, image):
    """What each token of a sequence is, as a number into KINDS; image: ids of an image's tokens."""
    start = next(i for i, token in enumerate(ids) if token < 0) - 1
    inside = range(start, start + len(image))
    return [
        0 if token < 0 else 1 if i in inside else 3 if label != layout.IGNORE else 2
        for i, (token, label) in enumerate(zip(ids, labels, strict=True))
    ]


figure, axes = plt.subplots(3, 1, figsize=(7.5, 2.6), sharex=True)
image = layout.image_ids(SIDE, words.markers)
LAYOUTS = ("agnostic", "instruction-first", "query-first")
for ax, name in zip(axes, LAYOUTS, strict=True):
    ids, labels = layout.sequence(sample.chunks, words.encode, SIDE, name, markers=words.markers)
    for i, kind in enumerate(kinds(ids, labels, image)):
        ax.bar(i, 1, width=1.0, color=SHADES[kind], lw=0)
    ax.set_yticks([])
    ax.set_title(name, loc="left", fontsize=9)
    ax.grid(False)
axes[-1].set_xlabel("place in the sequence")
handles = [plt.Rectangle((0, 0), 1, 1, color=shade) for shade in SHADES]
figure.legend(handles, KINDS, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
plt.show()
print("".join(chunk.text for chunk in sample.chunks))

# %% [markdown]
# *How to read it.* One bar is one token, read from left to right. Between the picture's two markers stand 64
# patches (grey), with a marker behind each row. Training asks for the answer's tokens only (yellow).
#
# ## Eyes
#
# `python -m vlm.train` trains a small encoder for scenes first, which takes two minutes. Here we give the
# models **perfect eyes** instead: a patch tells what covers it (kind, shape or digit or word, colour, size,
# texture) and the box of that object. With such eyes nothing remains to be *seen*; what remains is to find,
# among 64 patches, the one that matters. That is the paper's question.


# %%
class PerfectEyes:
    """Features of scenes' patches from their annotation: what is asked of an encoder, in ones and zeros."""

    def __init__(self):
        self.known = {}

    def patches(self, split, index):
        """(64, F) of one scene."""
        if (split, index) not in self.known:
            labels, boxes = annotation(sample_scene(0, split, index), SIDE)
            told = [F.one_hot(torch.tensor(labels[q]) + 1, n + 1)[:, 1:] for q, n in QUESTIONS.items()]
            edges = F.one_hot((torch.tensor(boxes) * 100).round().long(), STEPS).flatten(1)
            edges = edges * (torch.tensor(labels["kind"]) > 0)[:, None]
            self.known[split, index] = torch.cat([*told, edges], 1).to(torch.bool)
        return self.known[split, index]

    def get(self, source, images):
        """(B, 64, F), what `vlm.data.loader.batches` asks of any encoder."""
        return torch.stack([self.patches(source.split, int(i)) for i in images]).float() * 4


eyes = PerfectEyes()
say(f"Each of the 64 patches is told in {eyes.patches('heldout', 3).shape[1]} numbers.")

# %% [markdown]
# ## Two models learn to read
#
# The loop below is all of training: a batch of sequences with their patches, the mean loss over examples, a
# step. Both models get the same pictures in the same order. The question is always the same (*What does the
# word say?*), so there is little to understand: find the patches that show a word, say which of 16 it is.

# %%
STEPS_EACH = 200
WORDS = {"reading-word": Scenes("reading-word", 4000)}
STAGE = Stage(data=WORDS, batch_size=32, lr=2e-3, steps=STEPS_EACH)
SIZES = {"transformer": dict(n_head=2, init_std=0.06), "mamba": {}}


def learn(family, place="agnostic"):
    """A model trained to read, and its loss at every step."""
    lm = models.build(f"{family}-tiny", vocab_size=len(words), seed=0, **SIZES[family])
    torch.manual_seed(0)
    model = VLM(lm, features=eyes.patches("train", 0).shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=STAGE.lr, betas=(0.9, 0.95))
    read = Mixture({name: words.build(answers=True) for name, words in STAGE.data.items()})
    losses = []
    for batch in batches(
        read, eyes, batch_size=STAGE.batch_size, start=0, stop=STEPS_EACH, seed=0,
        encode=words.encode, markers=words.markers, side=SIDE, layout=place,
    ):  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = STAGE.lr * rate(len(losses), STAGE)
        loss = model.loss(batch.input_ids, batch.features, batch.labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


found = {family: learn(family) for family in FAMILIES}

# %%
tokens = sum(label != layout.IGNORE for label in labels)  # of an answer
guess = np.log(16) / tokens  # the word is one of 16; the answer's other tokens are always the same

figure, ax = plt.subplots(figsize=(5.5, 3.2))
for family, (_, losses) in found.items():
    smooth = pd.Series(losses).rolling(8, min_periods=1).mean()
    ax.plot(range(1, STEPS_EACH + 1), smooth, color=family_colors()[family], label=NAMES[family])
ax.axhline(guess, color="0.3", ls=":", label="a guess among 16 words")
ax.set(xlabel="steps of 32 pictures", ylabel="loss (nats per token)", ylim=(0, 2))
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# *How to read it.* Both soon know what an answer looks like and reach the dotted line: the loss of naming any
# of the 16 words. To get below it a model must look at the picture.

# %%
HELDOUT = 300
test = Scenes("reading-word", HELDOUT, "heldout").build(answers=False)
samples = [test[i] for i in range(HELDOUT)]
rows = []
for family, (model, _) in found.items():
    run = Run(family, f"{family}-tiny", (STAGE,), WORDS, layout="agnostic", precision="no")
    said = answer_all(model, run, eyes, test, samples, SIDE, "cpu")
    hits = sum(right(sample, answer) for sample, answer in zip(samples, said, strict=True))
    low, high = wilson(hits, HELDOUT)
    rows.append({"model": NAMES[family], "right": hits / HELDOUT, "low": low, "high": high, "chance": 1 / 16})
display(pd.DataFrame(rows).set_index("model").style.format("{:.3f}"))

# %% [markdown]
# ## Where do they look?
#
# `vlm.information_flow.layer_flows` tells how much an answer reads from each patch: of a Transformer its
# attention (the mean over heads), of Mamba the **hidden attention** of notebook 03, the weight of each token
# in the output of an SSM. Below is what the position that must name the word reads, in the layer of each
# model that reads the word most, for three held-out pictures.


# %%
def glances(family, index):
    """layer -> (8, 8) what the answer's position reads from the patches, summing to 1 over the picture."""
    model = found[family][0]
    ids, labels = layout.sequence(source[index].chunks, words.encode, SIDE, "agnostic", markers=words.markers)
    ids = torch.tensor([ids])
    first = next(i for i, label in enumerate(labels) if label != layout.IGNORE) - 1
    flows = layer_flows(model, ids, eyes.get(source, [str(index)]), at=[first])
    assert patch_places(ids).shape[1] == SIDE**2
    maps = {layer: flow.attention.mean(2)[0, 0].view(SIDE, SIDE) for layer, flow in flows.items()}
    return {layer: (seen / seen.sum()).numpy() for layer, seen in maps.items()}


def on_word(index, seen):
    """Share of a map that lies on the patches that show the scene's word."""
    labels, _ = annotation(sample_scene(0, "heldout", index), SIDE)
    return float(seen[labels["kind"].reshape(SIDE, SIDE) == 3].sum())


SEEN = range(60)  # scenes
shares = {
    family: pd.DataFrame(
        [{layer: on_word(i, seen) for layer, seen in glances(family, i).items()} for i in SEEN]
    )
    for family in FAMILIES
}
covered = np.mean([on_word(i, np.full((SIDE, SIDE), 1 / SIDE**2)) for i in SEEN])
best = {family: int(shares[family].mean().idxmax()) for family in FAMILIES}

figure, axes = plt.subplots(len(FAMILIES), 3, figsize=(6.6, 4.6))
for line, family in zip(axes, FAMILIES, strict=True):
    for ax, index in zip(line, SEEN, strict=False):
        shown = sample_scene(0, "heldout", index)
        edge = (-0.5, shown.size - 0.5, shown.size - 0.5, -0.5)
        ax.imshow(render(shown))
        ax.imshow(glances(family, index)[best[family]], extent=edge, cmap="magma", alpha=0.65, vmin=0)
        (word,) = (item for item in shown.objects if item.kind == "word")
        x0, y0, x1, y1 = word.box
        frame = (x0 - 1, y0 - 1), x1 - x0 + 1, y1 - y0 + 1
        ax.add_patch(plt.Rectangle(*frame, fill=False, ec="white", lw=1.5))
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
    line[0].set_ylabel(f"{NAMES[family]}, layer {best[family]}", fontsize=9)
figure.suptitle("what the answer reads (bright), and the word (white frame)", fontsize=9)
plt.show()
looked = {family: mean_interval(shares[family][best[family]], bounds=(0, 1)) for family in FAMILIES}
say(
    f"The word covers {covered:.3f} of the patches on average. "
    + " ".join(
        f"Of what the answer of the {NAMES[family]} model reads from the picture, {mean:.2f} "
        f"[{low:.2f}, {high:.2f}] lies on it."
        for family, (mean, low, high) in looked.items()
    )
    + f" (Means over {len(SEEN)} pictures, 95 % intervals.)"
)

# %% [markdown]
# ## With more training, and real eyes
#
# What you have seen is one seed and a hundred steps. The study
# [`studies/vlm_cpu`](../studies/vlm_cpu/README.md) trains both families on everything that `vlm.scenes` asks,
# with an encoder that reads pixels, three seeds each. Its table is in the repository:

# %%
study = pd.read_parquet("../studies/vlm_cpu/results.parquet")
main = study[study["metric"].isin(["accuracy", "iou@0.5"]) & (study["image_size"] == 64)]
tasks = list(dict.fromkeys(main["task"]))

figure, axes = plt.subplots(1, 3, figsize=(8.6, 3.8), sharey=True)
for ax, place in zip(axes, LAYOUTS, strict=True):
    for k, task in enumerate(tasks):
        part = main[(main["task"] == task) & (main["layout"] == place)]
        ax.plot([best_guess(part)] * 2, [k - 0.4, k + 0.4], color="0.3", ls=":")
        for shift, family in ((-0.15, "transformer"), (0.15, "mamba")):
            values, color = part.loc[part["family"] == family, "value"], family_colors()[family]
            ax.plot(values, [k + shift] * len(values), "|", ms=7, mew=1.5, color=color)
            ax.plot(values.mean(), k + shift, "o", ms=5, color=color)
    ax.set_title(place, fontsize=9)
    ax.set(xlim=(0, 1), xlabel="right answers")
axes[0].set_yticks(range(len(tasks)), tasks, fontsize=8)
axes[0].invert_yaxis()
looks = {NAMES[family]: dict(marker="o", ls="", color=family_colors()[family]) for family in FAMILIES}
legend(figure, looks | {GUESSED: dict(ls=":", color="0.3")}, width=2.4)
figure.suptitle("measured: studies/vlm_cpu, 64 px", fontsize=8)
plt.show()

# %% [markdown]
# *How to read it.* Strokes are seeds, dots their means. Dotted is what a guess gets that does not see the
# picture, or sees it and ignores which object is asked for: of an attribute it says the commonest value, of
# boxes that of any shape (of new combinations, any that may be asked for). Four things to see:
#
# * **Attributes** are below that guess in every run, and questions of yes or no near chance.
# * **Grounding** is where the two differ most, and where seeds do: two Transformers find about half of the
#   objects, the third never began to; every Mamba finds about a quarter.
# * **The question before the picture** makes Mamba a little better at it in every seed and the Transformer
#   worse. What the states do then is in the study, with `vlm.information_flow` as above.
# * **Captions**, which are not in this figure, say nothing of the two: one caption for all pictures scores
#   higher than every model.
#
# ## Try it
#
# * `learn("mamba", "query-first")`: does the question help when it is always the same? (Why should it not?)
# * `Scenes("attribute", 4000)` instead of `"reading-word"`: now the question differs from picture to picture,
#   and the answer must look up *where* before it can say *what*. How many steps does that take?
# * The whole of it with an encoder that reads pixels: `python -m vlm.train vlm/configs/cpu_tiny.py`.
