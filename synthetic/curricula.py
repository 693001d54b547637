"""How training goes on from short contexts to long ones (`--growth`), and the batch of every step.

    prefix   contexts of n symbols at the first n positions
    gap      the same, but queries stand at the positions that they have behind seq_len symbols
    window   contexts of n symbols at a random place of seq_len positions, so that every position and every
             answer is trained from the first step; only learned positions can tell a model where that is
    filled   the same, with `<bos>` at all other positions: every batch has the full length
    mixed    as prefix, but every other batch, by chance, has one of the lengths that were passed: queries
             stand behind long and short contexts, and what was learned is not forgotten

n begins at `curriculum` and doubles whenever the running training accuracy at n passes `PASS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from synthetic.identity import Plan
from synthetic.tasks import Batch, Task
from synthetic.tasks.base import Place

if TYPE_CHECKING:
    from synthetic.trainer import Progress

# Whoever changes one of these raises identity.TRAINING_VERSION.
PASS = 0.95  # training accuracy at which the context length doubles
REPEATS = 0.5  # share of the batches of "mixed" whose length was passed before
MIN_ROWS = 8  # sequences per batch, however long: fewer make a noisy gradient


def lengths(plan: Plan) -> list[int]:
    """All context lengths of a training, in order; the last is seq_len."""
    found = [plan.curriculum or plan.seq_len]
    while found[-1] < plan.seq_len:
        found.append(min(2 * found[-1], plan.seq_len))
    return found


def place(plan: Plan, length: int | None) -> Place:
    """Where contexts of `length` symbols lie in training and in evaluations of it; None: of full length."""
    whole = length is None or length >= plan.seq_len
    return "first" if whole or plan.growth in ("prefix", "mixed") else cast(Place, plan.growth)


def short_place(growth: str) -> Place:
    """Where evaluations during training and probes put contexts shorter than seq_len.

    What a window or a filled context is in training, they put at the first positions.
    """
    return "gap" if growth == "gap" else "first"


def next_length(plan: Plan, now: Progress) -> int:
    """The context length of the next batch: `now.length`, or with "mixed" one that was passed."""
    passed = [length for length in lengths(plan) if length < now.length]
    if plan.growth != "mixed" or not passed:
        return now.length
    rng = np.random.default_rng((plan.seed, now.step))
    return int(rng.choice(passed)) if rng.random() < REPEATS else now.length


def next_batch(task: Task, plan: Plan, now: Progress) -> Batch:
    """The training batch of the next step: the same for every model at the same length.

    Args:
        task: What is trained on.
        plan: Says how many rows and queries, and the growth.
        now: The step, and the context length in training.

    Returns:
        The batch, on the CPU.
    """
    at = next_length(plan, now)
    rows, queries, length = batch_shape(task, plan, at)
    where = place(plan, length)
    return task.batch(rows, seed=plan.seed, index=now.step, queries=queries, length=length, place=where)


def batch_shape(task: Task, plan: Plan, at: int) -> tuple[int, int, int | None]:
    """The size of training batches.

    Args:
        task: What is trained on.
        plan: Says how many tokens and queries.
        at: Context length in training.

    Returns:
        Rows, queries, and the length to ask the task for.
    """
    # at full length the task draws its own: shorter ones, too, if it has a min_seq_len
    length = at if at < plan.seq_len else None
    queries = min(plan.queries, task.max_queries(length))
    tokens = task.max_length(queries)
    if plan.growth != "filled":
        tokens += at - task.seq_len
    return plan.batch_size or max(MIN_ROWS, plan.batch_tokens // tokens), queries, length


def advance(plan: Plan, now: Progress) -> None:
    """Double the context once the running training accuracy passes."""
    if now.length < plan.seq_len and now.accuracy > PASS:
        now.length = min(2 * now.length, plan.seq_len)
        now.accuracy = 0.0


def longest_passed(plan: Plan, now: Progress) -> int:
    """The longest context whose training accuracy passed; 0 if none did."""
    if now.accuracy > PASS or now.stopped:
        return now.length
    return max((length for length in lengths(plan) if length < now.length), default=0)
