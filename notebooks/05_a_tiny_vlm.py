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
# You will see what such a sequence looks like, find out what it is worth that the language model could talk
# *before* it could see, ask two trained models about a picture, exchange two patches behind their backs, and
# read the tables of a study with eight seeds. Training takes about a minute on one core.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from lab import OUT, begin

from analysis.vlm_plots import GUESSED, best_guess, by_patch
from ssm_retrieval.statistics import wilson
from ssm_retrieval.style import NAMES, family_colors, legend
from vlm import components, layout
from vlm.answering import Answerer, answer_prompts
from vlm.config import Run, Scenes, Stage
from vlm.configs.words import MODELS
from vlm.data.loader import batches
from vlm.data.mixture import Mixture
from vlm.demo import given
from vlm.demo.asking import ask, questions
from vlm.evaluate import answer_all
from vlm.metrics.boxes import above_half, iou
from vlm.predict import RIGHT, SAID, WRONG, draw
from vlm.prompts import parse_box
from vlm.results import right
from vlm.scenes import make_example, render, sample_scene
from vlm.scenes.patches import owners
from vlm.stages import rate

begin()
FAMILIES = ("transformer", "mamba")
PIXELS, SIDE = 96, 3  # of an image; patches along its side

# %% [markdown]
# ## A picture and its questions
#
# `vlm.scenes` draws scenes of which everything is known: six shapes, a handwritten digit and a word, each
# with its box. So every question has an exact answer, and a right answer cannot come from knowing the world.

# %%
scene = sample_scene(seed=0, split="heldout", index=3)
picture = render(scene)
TASKS = ("reading-word", "attribute", "existence", "count", "spatial", "grounding")

figure, ax = plt.subplots(figsize=(3.2, 3.2))
ax.imshow(picture)
for k in range(1, SIDE):
    ax.axhline(k * scene.size / SIDE - 0.5, color="0.7", lw=0.5)
    ax.axvline(k * scene.size / SIDE - 0.5, color="0.7", lw=0.5)
ax.set_axis_off()
plt.show()
asked = [make_example(scene, task) for task in TASKS]
rows = [dict(task=e.task, question=e.question, answer=e.answer) for e in asked]
display(pd.DataFrame(rows).set_index("task"))

# %% [markdown]
# The thin lines cut the picture into 3 x 3 patches: this is what the language model gets to read, row by row.
# The answer of *grounding* is a box: left, top, right and bottom edge as shares of the picture.
#
# ## The same question in three places
#
# The text can stand behind the picture or before it. As in notebook 01 these are different tasks for a model
# that reads from left to right: `agnostic` (nothing is known while the picture is read), `instruction-first`
# (the *kind* of question is known: what the paper calls task-aware) and `query-first` (the question itself is
# known, which the paper did not try).

# %%
text = components.text("scenes")  # a small tokenizer for scenes
sample = Scenes("grounding", 400, "heldout").build(answers=True)[3]
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
image = layout.image_ids(SIDE, text.markers)
LAYOUTS = ("agnostic", "instruction-first", "query-first")
for ax, name in zip(axes, LAYOUTS, strict=True):
    ids, labels = layout.sequence(sample.chunks, text.encode, SIDE, name, markers=text.markers)
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
# *How to read it.* One bar is one token, read from left to right. Between the picture's two markers stand the
# patches (grey), with a marker behind each row. Training asks for the answer's tokens only (yellow).
#
# ## Language first
#
# The paper's models were language models before they saw a picture. So are ours: a Transformer and a Mamba of
# half a million weights each come with the toolkit that know such scenes *in words*
# ([how they were made](../vlm/configs/words.py), and [what they answer](../docs/vlm.md#results)): where a
# picture has a patch, a scene in words says what is there, such as *a large striped green cross* and its box.
# What is left to learn is what a patch of a *picture* says.
#
# The loop below is all of training: a batch of sequences with their patches, the mean loss over examples, a
# step. It teaches four models to read the word in a picture (*What does the word say?*): both families, with
# the language model that comes along and with a new one. As in the paper, the connector learns alone first
# where there is something to connect to. All four see the same pictures in the same order.

# %%
STEPS, ALONE = 200, 50  # steps in all; of these for the connector alone
WORDS = {"reading-word": Scenes("reading-word", 2000)}
BEGINNINGS = {"scenes": "language first", None: "from nothing"}


def plan(family, init):
    """What is trained; `vlm.train` takes a file of such runs."""
    stages = [Stage(WORDS, batch_size=32, lr=1.5e-3, steps=STEPS)]
    if init:
        alone = Stage(WORDS, batch_size=32, lr=3e-3, steps=ALONE, train="connector")
        stages = [alone, Stage(WORDS, batch_size=32, lr=1.5e-3, steps=STEPS - ALONE)]
    return Run(
        name=f"{family}-{BEGINNINGS[init]}", model=f"{family}-tiny", stages=tuple(stages), evaluation={},
        init=init, model_overrides={} if init else MODELS[f"{family}-tiny"],
        encoder="scenes-32px", image_size=PIXELS,
    )  # fmt: skip


def learn(run, features):
    """A model trained as `run` says, and its loss at every step."""
    source = WORDS["reading-word"].build(answers=True)
    model, losses = components.model(run, components.eyes_of(run, OUT).width), []
    for stage in run.stages:
        model.lm.requires_grad_(stage.train == "all")
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=stage.lr, betas=stage.betas, weight_decay=0.0)
        seen = batches(
            Mixture({"reading-word": source}), features, batch_size=stage.batch_size,
            start=len(losses), stop=len(losses) + stage.steps, seed=0,
            encode=text.encode, markers=text.markers, side=SIDE, layout=run.layout,
        )  # fmt: skip
        for step, batch in enumerate(seen):
            for group in optimizer.param_groups:
                group["lr"] = stage.lr * rate(step, stage)
            loss = model.loss(batch.input_ids, batch.features, batch.labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return model.eval(), losses


HELDOUT = 300
test = Scenes("reading-word", HELDOUT, "heldout").build(answers=False)
samples = [test[i] for i in range(HELDOUT)]
losses, rows = {}, []
for family in FAMILIES:
    for init, beginning in BEGINNINGS.items():
        run = plan(family, init)
        features = components.features(run, PIXELS, OUT)  # of the encoder, which comes along too
        for source in (WORDS["reading-word"].build(answers=True), test):
            features.fill(source, progress=False)
        model, losses[family, beginning] = learn(run, features)
        said = answer_all(model, run, features, test, samples, SIDE, "cpu")
        hits = sum(right(sample, answer) for sample, answer in zip(samples, said, strict=True))
        low, high = wilson(hits, HELDOUT)
        about = {"model": NAMES[family], "begins": beginning, "right": hits / HELDOUT}
        rows.append(about | {"low": low, "high": high, "chance": 1 / 16})
display(pd.DataFrame(rows).set_index(["model", "begins"]).style.format("{:.3f}"))

# %%
source = Scenes("reading-word", 1, "heldout").build(answers=True)
labels = layout.sequence(source[0].chunks, text.encode, SIDE, "agnostic", markers=text.markers)[1]
tokens = sum(label != layout.IGNORE for label in labels)  # of an answer
guess = np.log(16) / tokens  # the word is one of 16; the answer's other tokens are always the same

figure, ax = plt.subplots(figsize=(5.5, 3.2))
for (family, beginning), values in losses.items():
    smooth = pd.Series(values).rolling(8, min_periods=1).mean()
    style = "-" if beginning == "language first" else "--"
    label = f"{NAMES[family]}, {beginning}"
    ax.plot(range(1, STEPS + 1), smooth, style, color=family_colors()[family], label=label)
ax.axhline(guess, color="0.3", ls=":", label="a guess among 16 words")
ax.axvline(ALONE, color="0.8", lw=0.8)
ax.set(xlabel="steps of 32 pictures", ylabel="loss (nats per token)", ylim=(0, 3))
ax.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# *How to read it.* Left of the thin line the connector of the solid curves learns alone, with the language
# model frozen. The dotted line is the loss of naming any of the 16 words: to get below it a model must look
# at the picture. For reading, language buys nothing: the question is always the same, so there is nothing to
# look up, and models that begin with nothing need no more steps than the others. Where every picture is asked
# something else, [the study below](../studies/vlm_retrieval/README.md) measures what it buys.
#
# ## Ask two trained models
#
# The two models of the quick start, which learned ten tasks with 2,500 such steps, come with the toolkit as
# well. `python -m vlm.demo` opens a page to talk to them; here is the same in Python.

# %%
models = {one.run.family: one for one in map(Answerer.open, given())}
chosen = list({question.sample.task: question for question in questions(scene)}.values())
rows = []
for question in chosen:
    row = {"question": question.text, "right answer": question.example.answer.strip()}
    for family, model in models.items():
        row[NAMES[family]] = ask(model, picture, question).said.strip()
    rows.append(row)
with pd.option_context("display.max_colwidth", None):
    display(pd.DataFrame(rows).set_index("question"))

# %% [markdown]
# ## What is looked up: what a patch shows, or where it stands?
#
# Both models find most objects. Do they find them in the same way? An encoder's patch says *what* is there,
# and, because it has seen the whole picture, *where* that is. So there are two ways to answer "where is the
# red star?": find the patch that shows one and read from it where it is; or find out at which place of the
# row it stands. In every picture the two agree. We make them differ: two objects with one patch each change
# places *in the row of patches*, after the encoder has seen the picture.


# %%
PICTURES = 150
source = Scenes("grounding", PICTURES, "heldout").build(answers=False)


def swap(sample):
    """The patches of the object asked for and of another shape, and that one's box; None if not one each."""
    shown, target = source.scene(sample.image), tuple(sample.target["box"])
    patches = owners(shown, SIDE).reshape(-1)
    where = {item.box: np.flatnonzero(patches == k) for k, item in enumerate(shown.objects)}
    others = [item.box for item in shown.shapes if item.box != target and len(where[item.box]) == 1]
    if len(where[target]) != 1 or not others:
        return None
    return int(where[target][0]), int(where[others[0]][0]), others[0]


swaps = {i: found for i in range(PICTURES) if (found := swap(source[i])) is not None}
pictures = [source.picture(source[i].image) for i in swaps]


def boxes(model, change):
    """(N, 4) boxes that a model answers, as shares of the side; NaN for an answer that is none."""
    seen = torch.cat([model.features([picture]) for picture in pictures])
    if change:
        for row, (mine, other, _) in zip(seen, swaps.values(), strict=True):
            row[[mine, other]] = row[[other, mine]]
    prompts = [model.ids(source[i].chunks) for i in swaps]
    said = answer_prompts(model.model, model.run, prompts, lambda numbers: seen[numbers], "cpu")
    return np.array([parse_box(words, 1, 1) or (np.nan,) * 4 for words in said])


content = np.array([source[i].target["box"] for i in swaps]) / scene.size  # what the patch says
place = np.array([box for _, _, box in swaps.values()]) / scene.size  # where it stands now
before = {family: boxes(model, change=False) for family, model in models.items()}
after = {family: boxes(model, change=True) for family, model in models.items()}

rows = []
for family in FAMILIES:
    row = {
        "model": NAMES[family],
        "right before": above_half(iou(before[family], content)).mean(),
        "as before": above_half(iou(after[family], content)).mean(),
        "the other object's": above_half(iou(after[family], place)).mean(),
    }
    for axis, edge in enumerate(("left", "top")):
        apart = np.abs(content - place)[:, axis] > 0.15  # where the two can be told apart
        for name, wanted in (("content", content), ("place", place)):
            near = np.abs(after[family] - wanted)[apart, axis] < 0.07
            row[f"{edge} edge by {name}"] = near.mean()
    rows.append(row)
display(pd.DataFrame(rows).set_index("model").style.format("{:.2f}"))

# %%
most = np.abs(content - place)[:, :2].min(axis=1).argmax()  # the pair that is furthest apart
figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.6))
for ax, family in zip(axes, FAMILIES, strict=True):
    framed = [
        (tuple(scene.size * content[most]), RIGHT, "asked for"),
        (tuple(scene.size * place[most]), WRONG, "its patch now"),
        (tuple(scene.size * np.nan_to_num(after[family][most])), SAID, "answer"),
    ]
    ax.imshow(draw(pictures[most], framed, zoom=3))
    ax.set_axis_off()
    ax.set_title(NAMES[family], color=family_colors()[family], fontsize=9)
figure.suptitle("".join(chunk.text for chunk in source[list(swaps)[most]].chunks).strip(), fontsize=8)
plt.show()

# %% [markdown]
# *How to read it.* Green is the box of the object that is asked for, red the one whose patch it has changed
# places with, blue the answer. An answer by content is the green box, one by place the red one; the table has
# the shares of boxes and of single edges. A model that goes by place for one edge and by content for the
# other answers a box that belongs to no object. Attention asks *which patch is a red star*, and reads the
# rest from it; a state has mixed what a patch shows with where it came in. Which edge Mamba takes from where
# differs between trained models. The study has eight seeds of each, and of a hybrid, which stands between.
#
# ## Eight seeds
#
# The study [`studies/vlm_retrieval`](../studies/vlm_retrieval/README.md) trains both families on questions
# that look something up, with the text in different places. These models began with language models that knew
# scenes in words with the question before and behind them. The study's table is in the repository:

# %%
study = by_patch(pd.read_parquet("../studies/vlm_retrieval/results.parquet"))
study = study[(study["patch"] == PIXELS // SIDE) & (study["init"] == "scenes-any-order")]
tasks = list(dict.fromkeys(study["task"]))

figure, axes = plt.subplots(1, len(LAYOUTS), figsize=(8.6, 3.8), sharey=True)
for ax, where in zip(axes, LAYOUTS, strict=True):
    for k, task in enumerate(tasks):
        part = study[(study["task"] == task) & (study["layout"] == where)]
        ax.plot([best_guess(part)] * 2, [k - 0.4, k + 0.4], color="0.3", ls=":")
        for shift, family in ((-0.15, "transformer"), (0.15, "mamba")):
            values, color = part.loc[part["family"] == family, "value"], family_colors()[family]
            ax.plot(values, [k + shift] * len(values), "|", ms=7, mew=1.5, color=color)
            ax.plot(values.mean(), k + shift, "o", ms=5, color=color)
    ax.set_title(where, fontsize=9)
    ax.set(xlim=(0, 1.02), xlabel="right answers")
axes[0].set_yticks(range(len(tasks)), tasks, fontsize=8)
axes[0].invert_yaxis()
looks = {NAMES[family]: dict(marker="o", ls="", color=family_colors()[family]) for family in FAMILIES}
legend(figure, looks | {GUESSED: dict(ls=":", color="0.3")}, width=2.4)
figure.suptitle("measured: studies/vlm_retrieval", fontsize=8)
plt.show()

# %% [markdown]
# *How to read it.* Strokes are seeds, dots their means. Dotted is what a guess gets that does not see the
# picture, or sees it and ignores which object is asked for. "Combination" means colours with shapes that no
# training picture shows, and no scene in words.
#
# * **Finding.** The Transformer finds somewhat more of what it knows and names more attributes, but for the
#   seeds that lost their lookups on the way to pictures.
# * **New combinations.** Mamba finds a red star as well if it has never seen one. The Transformer hardly does
#   better than any box that may be asked for. This is so wherever the text stands.
# * **The question before the picture** changes little for either: no difference in boxes is resolved.
#
# ## Try it
#
# * `Scenes("locate", 2000)` instead of `"reading-word"`: now the question differs from picture to picture,
#   and the answer must look up *where*. How many steps does that take, from language and from nothing?
# * `ALONE = 0`: is the connector's own stage worth its steps?
# * Exchange patches with the question before the picture: `python -m vlm.train` with `layout="query-first"`.
# * The whole quick start: `python -m vlm.train vlm/configs/cpu_tiny.py`.
