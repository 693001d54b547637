"""How many of the symbols that it has read can the model itself still find? Each one is asked for.

After n context symbols the question is put for every one of them, each time from a copy of the cache
(`probes.readout`). So the number of facts is a count, not a probe's estimate: no classifier, no training
sequences. Parts of the table, all by `shown` = n:

    facts     facts answered of those that can be asked, the symbols that occur once. `known` is without lucky
              guesses, (accuracy - chance) / (1 - chance) of what is asked, as the linear probe's capacity.
              `bits` tells the places of that many symbols, log2 n! / (n - known)!. `numbers` are those in the
              cache when the question comes. `recent` is the accuracy over the last `known` symbols: 1 if the
              model keeps the last ones and nothing else, the overall accuracy if recency plays no part
    accuracy  of all questions
    place     of the questions for `size` symbols from `place` on: one each, or the cells of a long context

After the whole context also, by `layer`, what a state answers by itself, without the rest of the model
(`probes.projection`):

    projection  accuracy of all questions
    map         of the questions for the symbols from `place` on, the share that is answered with one of the
                places from `answer` on, each of `size` symbols; what is missing to 1 are no places

A question before the context leaves no cache to copy: the model reads the whole sequence for each question.
Tasks that do not ask where a single symbol stands are asked their own questions, after the whole context.

Questions stand at the positions that training gave them (`--growth`). A model that was trained at one length
only may fail at all others; `shown` = N is what it was trained for.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import lgamma, log
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probes.projection import state_answers
from probes.readout import Readout, read_out
from probes.suite.common import (
    Options,
    Probe,
    answer_at,
    batches,
    beside,
    interval,
    rows_within,
)
from ssm_retrieval.models import state_size
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.statistics import ratio_of_means, wilson
from ssm_retrieval.tables import markdown
from synthetic.tasks import Batch, Task
from synthetic.tasks.base import Place
from synthetic.tasks.position import Position

EXAMPLES = 128  # sequences
LEAST = 8  # of them where each is asked so many questions that there are more than
QUESTIONS = 2**13  # of the whole context: each one copies the cache, which of attention is long
SINGLE = 64  # symbols up to which every place has rows of its own
ENDS = 10  # cells from each end of a longer context, which are as fine as one symbol at the very ends


def measure(model: LanguageModel, task: Task, options: Options) -> pd.DataFrame:
    """Measure a model.

    Args:
        model: The model.
        task: Its task.
        options: Sequences, seed, progress, and where short contexts lay.

    Returns:
        Rows by shown, with chance: facts that a guess among the n places gets right, or its accuracy. Layer
        is the model's depth, of projections the block that has the state.
    """
    if not isinstance(task, Position):
        return _own_questions(model, task, options)
    examples = options.examples or min(EXAMPLES, max(LEAST, QUESTIONS // task.seq_len))
    lengths = doublings(task.seq_len)
    right: dict[int, list[Tensor]] = {n: [] for n in lengths}
    once: dict[int, list[Tensor]] = {n: [] for n in lengths}
    numbers: dict[int, int] = {}
    alone: dict[int, list[Tensor]] = {}  # answers of each layer's state after the whole context
    rows = rows_within(task, 4 * model.config.d_model * (16 + 2 * model.config.n_layer))
    for batch in batches(task, examples, rows, options):
        context = shown_symbols(task, batch)
        answers: Iterator[Readout]
        if task.layout == "prefix":
            answers = (told_first(model, task, context[:, :n], options.place) for n in lengths)
        else:
            asked_for = [questions_after(task, context[:, :n], options.place) for n in lengths]
            prompts, questions, positions = zip(*asked_for, strict=True)
            answers = read_out(model, prompts, questions, positions=positions)
        for n, found in zip(lengths, answers, strict=True):
            places = task.vocabulary.first_position + torch.arange(n)
            once[n].append(occur_once(context[:, :n]))
            right[n].append((found.predicted == places) & once[n][-1])
            numbers[n] = found.numbers
        if found.cache is None:
            continue
        for i, answered in state_answers(model, found.cache, questions[-1]).items():
            alone.setdefault(i, []).append(answered - task.vocabulary.first_position)
    asked = torch.cat(once[task.seq_len]).numpy()
    rows_of = [
        _in_order(torch.cat(right[n]).numpy(), torch.cat(once[n]).numpy(), numbers[n]) for n in lengths
    ]
    rows_of += [_projected(torch.cat(parts).numpy(), asked, i) for i, parts in alone.items()]
    table = pd.DataFrame([dict(layer=model.config.n_layer) | row for rows in rows_of for row in rows])
    answer = table.get("answer", np.nan)  # without states there is no map, but every table has its columns
    return table.assign(layer=table["layer"].astype(int), answer=answer)


@torch.no_grad()
def told_first(model: LanguageModel, task: Position, context: Tensor, place: Place) -> Readout:
    """Ask for every symbol before the context, each time in a sequence of its own.

    Args:
        model: What answers.
        task: A task of layout "prefix".
        context: (B, n) 0-based symbols.
        place: Where contexts lay in training, as in `questions_after`.

    Returns:
        The answers, without a cache: it differs from question to question.
    """
    found = []
    for i in range(context.shape[1]):
        batch = task.assemble(context.numpy(), np.full((len(context), 1), i))
        batch = task.part(batch) if place == "gap" else batch
        logits = model(batch.input_ids, logits_at=batch.answer_at[:1], **batch.places())
        found.append(logits[:, 0].argmax(-1))
    return Readout(torch.stack(found, 1), state_size(model.config, answer_at(batch) + 1))


@torch.no_grad()
def _own_questions(model: LanguageModel, task: Task, options: Options) -> pd.DataFrame:
    """`facts` and `accuracy` of the questions that held-out sequences of any task ask."""
    examples = options.examples or EXAMPLES
    right, targets, lasts = [], [], []
    rows = rows_within(task, 4 * (model.config.d_model * (16 + 2 * model.config.n_layer)))
    for batch in batches(task, examples, rows, options):
        logits = model(batch.input_ids, logits_at=batch.answer_at, **batch.places())
        right.append(batch.right(logits.argmax(-1)))
        targets.append(batch.target_index)
        lasts.append(int(batch.answer_at.max()) + 1)
    found, target = torch.cat(right).numpy(), torch.cat(targets).numpy()
    numbers = state_size(model.config, max(lasts))
    table = _rows(found, np.ones_like(found), target, task.seq_len, batch.chance, numbers)
    return pd.DataFrame(table).assign(layer=model.config.n_layer, bits=np.nan, recent=np.nan, answer=np.nan)


def doublings(longest: int) -> list[int]:
    """2, 4, 8 .. up to `longest`, which is the last."""
    return [n for n in (2**i for i in range(1, longest.bit_length())) if n < longest] + [longest]


def shown_symbols(task: Position, batch: Batch) -> Tensor:
    """(B, N) the 0-based context symbols of a batch, each once, without the markers among them."""
    told = task.layout == "prefix"  # the query is the second token, and the context goes on to the answer
    ids = batch.input_ids[:, 2:] if told else batch.input_ids[:, : answer_at(batch)]
    ids = ids - task.vocabulary.first_symbol
    return ids[:, (ids[0] >= 0) & (ids[0] < task.vocabulary.num_symbols)][:, : batch.length]


def questions_after(task: Position, context: Tensor, place: Place = "first") -> tuple[Tensor, Tensor, Tensor]:
    """What the model reads, and every question that can follow.

    Args:
        task: What lays them out.
        context: (B, n) 0-based symbols.
        place: Where contexts lay in training. With "gap" the question stands where it stands behind the
            longest context, because nothing else was trained.

    Returns:
        (B, T) tokens up to the question, (B, n) questions, in the order of the context, and (T + 1,) the
        positions of the tokens and of the question.
    """
    batch = task.assemble(context.numpy(), np.zeros((len(context), 1), dtype=np.int64))
    batch = task.part(batch) if place == "gap" else batch
    end = answer_at(batch)
    positions = torch.arange(end + 1) if batch.position_ids is None else batch.position_ids[0, : end + 1]
    return batch.input_ids[:, :end], context + task.vocabulary.first_symbol, positions


def occur_once(context: Tensor) -> Tensor:
    """(B, n) bool: which symbols of contexts (B, n) stand at one place only."""
    return (context[:, :, None] == context[:, None, :]).sum(-1) == 1


# --- table --------------------------------------------------------------------------------------------------


def _rows(
    right: np.ndarray, asked: np.ndarray, target: np.ndarray, n: int, chance: float, numbers: int
) -> list[dict[str, Any]]:
    """What was answered of n symbols, facts first; right, asked (bool) and target, the places, are (B, q)."""
    each = float(asked.sum(1).mean())
    if each == 0:
        return []
    accuracy = share(right, asked)
    facts = {key: value * each for key, value in accuracy.items()}
    known = each * max(0.0, (accuracy["value"] - chance) / (1 - chance)) if chance < 1 else each
    shared: Any = dict(shown=n, n=len(right))
    more = dict(chance=each * chance, known=known, numbers=numbers)
    rows = [
        shared | facts | more | dict(part="facts", quantity="facts", asked=each),
        shared | accuracy | dict(part="accuracy", quantity="accuracy", chance=chance),
    ]
    for start, end in pairwise(cells(n)):
        here = asked & (start <= target) & (target < end)
        if here.any():
            found = share(right & here, here) | dict(place=start, size=end - start)
            rows.append(shared | found | dict(part="place", quantity="accuracy", chance=chance))
    return rows


def _in_order(right: np.ndarray, once: np.ndarray, numbers: int) -> list[dict[str, Any]]:
    """The rows of n symbols that were asked for in their order; right and once are (B, n) bool."""
    n = right.shape[1]
    rows = _rows(right, once, np.arange(n), n, 1 / n, numbers)
    for facts in rows[:1]:
        last = slice(n - round(facts["known"]), n)
        facts |= dict(bits=bits(n, facts["known"]), recent=share(right[:, last], once[:, last])["value"])
    return rows


def _projected(answered: np.ndarray, once: np.ndarray, layer: int) -> list[dict[str, Any]]:
    """What one layer's state answers by itself to (B, n) questions: its accuracy and its map."""
    n = once.shape[1]
    if not once.any():
        return []
    shared: Any = dict(layer=layer, shown=n, n=len(once))
    found = share((answered == np.arange(n)) & once, once)
    rows = [shared | found | dict(part="projection", quantity="accuracy", chance=1 / n)]
    for start, end in pairwise(cells(n)):
        given = answered[:, start:end][once[:, start:end]]
        for low, high in pairwise(cells(n)):
            value = float(((given >= low) & (given < high)).mean()) if len(given) else np.nan
            more = dict(part="map", quantity="answered", place=start, size=end - start, answer=low)
            rows.append(shared | more | dict(value=value))
    return rows


def cells(n: int) -> list[int]:
    """Edges of the cells of n places, 0 .. n: one place each, or of a long context dense at both ends."""
    if n <= SINGLE:
        return list(range(n + 1))
    near = np.geomspace(1, n // 2, ENDS).round().astype(int)
    return [0, *np.unique([near, n - near]).tolist(), n]


def share(right: np.ndarray, asked: np.ndarray) -> dict[str, float]:
    """The share of questions that were answered, with its interval.

    Answers of one sequence depend on each other, so Student's interval is over sequences. It has no width
    where all sequences are alike. So the interval is never narrower than Wilson's of as many questions.

    Args:
        right: (B, q) bool.
        asked: (B, q) bool.

    Returns:
        Value, low and high; nan if nothing was asked.
    """
    if not asked.any():
        return dict(value=np.nan, low=np.nan, high=np.nan)
    value, low, high = ratio_of_means(right.sum(1), asked.sum(1))
    least, most = wilson(int(right.sum()), int(asked.sum()))
    return dict(value=value, low=max(0.0, np.fmin(low, least)), high=min(1.0, np.fmax(high, most)))


def bits(n: int, known: float) -> float:
    """log2 of the number of ways to put `known` symbols at different ones of n places."""
    return (lgamma(n + 1) - lgamma(n - known + 1)) / log(2)


def summary(table: pd.DataFrame) -> str:
    """Facts by symbols shown, beside untrained weights and chance, as Markdown."""
    words = (
        "After `shown` context symbols the model is asked where each of them stands, every time from a "
        "copy of its cache. Facts: how many it answers, with a 95 % interval over sequences. Untrained: "
        "the same with weights as initialised. Chance: how many a guess among the places gets right. "
        "Known: facts without lucky guesses, as the capacity of the linear probe. Recent: accuracy over "
        "the last `known` symbols; 1 says that the model keeps these and no others. Bits: what it takes to "
        "tell that many places. Numbers: how many the cache holds when the question comes. A model that "
        "was trained at one length only may fail at all others. If the query comes first, every question has "
        "a sequence of its own. Other tasks ask their own questions, after the whole context."
    )
    keys = ["family", "shown"]
    facts = table[table["part"] == "facts"].sort_values(keys)
    untrained = facts[facts["weights"] == "untrained"].set_index(keys)["value"]
    rows = []
    for row in facts[facts["weights"] == "trained"].to_dict("records"):
        more = [
            f"{value:.4g}" for value in (untrained[row["family"], row["shown"]], row["chance"], row["known"])
        ]
        more += [f"{row['recent']:.3g}" if round(row["known"]) and not np.isnan(row["recent"]) else ""]
        more += ["" if np.isnan(row["bits"]) else f"{row['bits']:,.0f}", f"{row['numbers']:,.0f}"]
        rows.append([row["family"], f"{row['shown']:.0f}", interval(row, digits=4), *more])
    text = f"{words}\n\n" + markdown(
        [*keys, "facts", "untrained", "chance", "known", "recent", "bits", "numbers"], rows
    )
    alone = table[table["part"] == "projection"]
    if alone.empty:
        return text
    said = (
        "What each layer's state answers by itself after the whole context: read with the C of the question, "
        "then the layer's gate and output projection, the last norm and the head, without the residual "
        "stream and the other layers. Accuracy over all symbols that can be asked:"
    )
    return f"{text}\n\n{said}\n\n{beside(alone, ['family', 'layer'])}"


PROBE = Probe(
    "How many symbols can the model still find when it is asked for each?",
    measure,
    summary,
    version=3,
    columns=("shown", "asked", "place", "size", "chance", "known", "bits", "numbers", "recent", "answer"),
)
