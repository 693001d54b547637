"""Clean and corrupted sequences that differ in as little as possible and ask for different answers.

Causal tracing (Meng et al. 2022, arXiv 2202.05262; Zhang & Nanda 2023, arXiv 2309.16042) carries activations
from one into the other. Both sequences are ordinary examples of the task, so activations stay in
distribution, which they do not after corruption with noise. All contexts, corrupted ones included, are held
out from training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from probes.token_roles import targets_at, token_roles
from ssm_retrieval.errors import UserError
from synthetic.tasks import Batch, Task, sampling
from synthetic.tasks.position import Position
from synthetic.tasks.sampling import IntArray

KINDS = ("query", "target")
MAX_ROUNDS = 100  # of draws, for contexts that are still held out with two symbols swapped


@dataclass(frozen=True, eq=False)
class Pairs:
    """B pairs of one query each. Their two batches have equal shapes and ask at the same place.

    Attributes:
        kind: "query" or "target", see `contrast_pairs`.
        clean: The clean sequences, input_ids (B, L).
        corrupted: The corrupted sequences, of the same shape.
        answer: (B,) int64 token ids, the clean sequences' answers.
        corrupted_answer: (B,) int64 token ids of the corrupted sequences; never equal to `answer`.
        changed: (B, C) int64, the positions at which the two differ, increasing; C is 1 (kind "query") or 2,
            and 4 if the context comes twice.
        roles: (B, L) int64, roles of the clean tokens (`probes.token_roles`).
        partner: (B, R) int64, positions of the context symbol that the corrupted sequence asks for; R is how
            often the context is read, 1 or 2.
    """

    kind: str
    clean: Batch
    corrupted: Batch
    answer: Tensor
    corrupted_answer: Tensor
    changed: Tensor
    roles: Tensor
    partner: Tensor

    @property
    def answer_at(self) -> int:
        """The position at which the answer is read, the last one."""
        return int(self.clean.answer_at[0])

    def __len__(self) -> int:
        return len(self.answer)


def contrast_pairs(
    task: Task, examples: int, length: int | None = None, kind: str = "query", seed: int = 0
) -> Pairs:
    """Draw pairs of held-out sequences; a pure function of its arguments.

    Kind "query" keeps the context and asks for another of its symbols. Kind "target" keeps the query, but its
    symbol changes places with another one. This other symbol occurs once in its context and is drawn
    uniformly from those that the task could ask for beside the first. What `supervise_bos` appends is left
    out: it comes after the answer.

    Args:
        task: A task whose tokens have roles: position, position-varlen or grid.
        examples: Pairs, B.
        length: Context symbols. None: the task's longest context.
        kind: "query" or "target".
        seed: Of the held-out stream that contexts are drawn from.

    Returns:
        The pairs.

    Raises:
        UserError: The kind or `examples` is invalid, the task has no roles or fewer than two symbols to ask
            for, or hardly any context stays held out after the swap.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r} of pairs; valid: {', '.join(KINDS)}")
    if examples < 1:
        raise UserError(f"examples {examples} must be at least 1")
    if not isinstance(task, Position):
        raise UserError(f"pairs are not defined for task {task.name}: use position, position-varlen or grid")
    task = replace(task, supervise_bos=False)
    length = task.lengths()[1] if length is None else length
    task.check(length, 2)
    rng = sampling.stream(seed, "heldout", 0)
    context, target = _draw(task, rng, examples, length, swap=kind == "target")
    clean = task.assemble(context, target[:, :1])
    other = _swapped(context, target) if kind == "target" else context
    corrupted = task.assemble(other, target[:, 1:])
    differs = clean.input_ids != corrupted.input_ids
    return Pairs(
        kind=kind,
        clean=clean,
        corrupted=corrupted,
        answer=clean.labels[:, 0],
        corrupted_answer=corrupted.labels[:, 0],
        changed=differs.nonzero()[:, 1].view(examples, -1),
        roles=token_roles(task, clean),
        partner=targets_at(token_roles(task, corrupted)),
    )


def _draw(
    task: Task, rng: np.random.Generator, rows: int, length: int, swap: bool
) -> tuple[IntArray, IntArray]:
    """Held-out contexts (rows, length), two targets each; with `swap` held out also after the swap."""
    contexts, targets, have = [], [], 0
    for _ in range(MAX_ROUNDS):  # of the swapped contexts as many are held out, unless there are very few
        wanted = round((rows - have) / (sampling.SHARES["heldout"] if swap else 1))
        context, target = sampling.draw_split(
            lambda n: task.draw(rng, n, length, 2),
            wanted,
            "heldout",
            row_cells=max(length, task.vocabulary.num_symbols),
        )
        if swap:
            keep = sampling.is_heldout(_swapped(context, target))
            context, target = context[keep], target[keep]
        contexts.append(context)
        targets.append(target)
        have += len(context)
        if have >= rows:
            return np.concatenate(contexts)[:rows], np.concatenate(targets)[:rows]
    raise UserError(
        f"hardly any context of length {length} with num_symbols {task.vocabulary.num_symbols} is held out "
        "together with its swapped one: use kind 'query', more symbols or a longer context"
    )


def _swapped(context: IntArray, target: IntArray) -> IntArray:
    """Contexts (rows, N) in which the symbols at the two places target (rows, 2) have changed places."""
    result = context.copy()
    np.put_along_axis(result, target, np.take_along_axis(context, target[:, ::-1], axis=1), axis=1)
    return result
