"""What is patched together: one token by its role, or a window of tokens without one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from probes.contrast_pairs import Pairs
from probes.token_roles import ROLES, role
from ssm_retrieval.errors import UserError


@dataclass(frozen=True, eq=False)
class Cell:
    """Tokens that one patch replaces together.

    Attributes:
        role: Of `probes.token_roles`, or "partner" (the symbol that the corrupted sequence asks for), "last"
            (the token at which the answer is read, if it has no other name), "target+partner" (both at once)
            or "everything".
        low: First of the tokens low .. high - 1 that it covers; None if they differ between sequences.
        high: Token after the last; None likewise.
        where: (B, L) bool, the tokens patched in each sequence; a row without any leaves its sequence out.
    """

    role: str
    low: int | None
    high: int | None
    where: Tensor


def _span(where: Tensor) -> tuple[int | None, int | None]:
    """(low, high) of a mask (B, L) whose rows are equal, else Nones."""
    if not bool((where == where[0]).all()):
        return None, None
    places = where[0].nonzero().flatten()
    return int(places[0]), int(places[-1]) + 1


def everything(pairs: Pairs) -> Cell:
    """All tokens up to the answer."""
    where = torch.ones_like(pairs.roles[:, : pairs.answer_at + 1], dtype=torch.bool)
    return Cell("everything", 0, where.shape[1], where)


def target_and_partner(pairs: Pairs) -> Cell:
    """The target and its partner in one patch, which restores what they carry together.

    This is not the sum of what each restores alone, because the effects of two patches interact.
    """
    roles = pairs.roles[:, : pairs.answer_at + 1]
    places = torch.arange(roles.shape[1], device=roles.device)
    where = (roles == role("target")) | (places == pairs.partner[..., None]).any(1)
    return Cell("target+partner", *_span(where), where)


def patch_cells(pairs: Pairs, max_positions: int = 64) -> list[Cell]:
    """Every token up to the answer, by roles and windows.

    Tokens with a role of their own are patched exactly, wherever they stand: the target, its partner, the
    markers, the query, the last token. Row separators are one cell, and so are the two places of a symbol
    whose context is read twice. Distractors are patched one position at a
    time if the sequence has up to `max_positions` tokens, else in windows of equal size (the last may be
    shorter); a window leaves out the tokens of other roles in it.

    Args:
        pairs: The pairs to patch.
        max_positions: About how many cells to make.

    Returns:
        The cells: roles first, then distractors from left to right.

    Raises:
        UserError: `max_positions` is below 1.
    """
    if max_positions < 1:
        raise UserError(f"max_positions {max_positions} must be at least 1")
    L = pairs.answer_at + 1
    roles = pairs.roles[:, :L]
    places = torch.arange(L, device=roles.device)
    partner = (places == pairs.partner[..., None]).any(1)
    exact = [(name, roles == role(name)) for name in ROLES if name != "distractor"]
    exact.insert(1, ("partner", partner))
    if bool((roles[:, -1] != role("query")).any()):
        exact.append(("last", (places == L - 1).expand_as(roles)))
    found = [Cell(name, *_span(where), where) for name, where in exact if bool(where.any())]
    context = (roles == role("distractor")) | (roles == role("target"))
    ordinary = (roles == role("distractor")) & ~partner & (places < L - 1)
    begin, end = (int(context.any(0).nonzero()[i]) for i in (0, -1))
    size = 1 if max_positions >= L else -(-(end + 1 - begin) // max(1, max_positions - len(found)))
    for low in range(begin, end + 1, size):
        high = min(low + size, end + 1)
        where = ordinary & (places >= low) & (places < high)
        if bool(where.any()):
            found.append(Cell("distractor", low, high, where))
    return found


def chunks(where: Tensor, budget: int) -> Iterator[tuple[list[int], int]]:
    """Cells that run in one call, in the order of their first token: so few of its tokens are unaffected.

    Args:
        where: (C, B, L) bool, the tokens of C cells; cells without any are left out.
        budget: Most tokens of one sequence in a chunk, summed over its cells; a single cell may exceed it.

    Yields:
        The numbers of the cells, and the token from which they run.
    """
    L = where.shape[2]
    places = torch.arange(L, device=where.device)
    first = torch.where(where, places, L).amin((1, 2)).tolist()
    order = sorted((i for i in range(len(first)) if first[i] < L), key=lambda i: first[i])
    while order:
        start = first[order[0]]
        c = max(1, budget // (L - start))
        yield order[:c], start
        order = order[c:]
