"""Clean and corrupted sequences that differ in as little as possible and ask for different answers.

Causal tracing (Meng et al. 2022, arXiv 2202.05262; Zhang & Nanda 2023, arXiv 2309.16042) carries activations
from one into the other. Both sequences are ordinary examples of the task, so no activation is out of
distribution, unlike after corruption with noise. Contexts are held out from training, those of corrupted
sequences as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from probes.token_roles import role, token_roles
from ssm_retrieval.errors import UserError
from synthetic.tasks import Batch, Task, sampling
from synthetic.tasks.position import Position
from synthetic.tasks.sampling import IntArray

KINDS = ("query", "target")
MAX_ROUNDS = 100  # of draws, for contexts that are still held out with two symbols swapped


@dataclass(frozen=True, eq=False)
class Pairs:
    """B pairs, one query each; the two batches have equal shapes and ask at the same place.

    answer, corrupted_answer: (B,) int64 token ids; never equal.
    changed: (B, C) int64, the sequence indices in which they differ, increasing; C = 1 (kind "query") or 2.
    roles: (B, L) int64, roles of the clean tokens (`probes.token_roles`).
    partner: (B,) int64, sequence index of the context symbol that the corrupted sequence asks for.
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
        """Sequence index at which the answer is read, the last one."""
        return int(self.clean.answer_at[0])

    def __len__(self) -> int:
        return len(self.answer)


def contrast_pairs(
    task: Task, examples: int, length: int | None = None, kind: str = "query", seed: int = 0
) -> Pairs:
    """`examples` pairs of contexts with `length` symbols (None: the task's longest).

    kind "query": the same context, another of its symbols is asked for.
    kind "target": the same query, but its symbol has changed places with another context symbol.
    The other symbol occurs once in its context and is uniform over those that the task's own draw of two
    queries could ask for. supervise_bos is left out: nothing it adds stands before the answer.
    A function of its arguments only. Raises UserError, in one line, for tasks without roles, for contexts
    without two symbols to ask for, and where hardly any context stays held out after the swap.
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
        partner=(token_roles(task, corrupted) == role("target")).int().argmax(1),
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
