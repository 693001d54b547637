"""Packing: several sequences in one row, computed as if each were alone.

Every sequence gets a row of its own. Causal models ignore what stands to the right, so running them on these
rows, padded on the right, is exactly running them on each sequence: no state, convolution window or attention
crosses a boundary, and positions restart. One rule thus serves every architecture. Sequences of similar
length share a batch, so padding costs at most half of what the tokens do, however uneven the lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

PADDED = 1.5  # a batch computes at most this many times its tokens


class Packing:
    """Where each token of packed rows goes: to a batch, and to a row and a column of it.

    Args:
        seq_ids: (B, L) int. Neighbours in a row with equal ids belong to one sequence.
        one_batch: Whether to use a single batch, whatever that costs.
    """

    def __init__(self, seq_ids: Tensor, one_batch: bool = False):
        self.shape, device = seq_ids.shape, seq_ids.device
        starts = torch.ones_like(seq_ids, dtype=torch.bool)
        starts[:, 1:] = seq_ids[:, 1:] != seq_ids[:, :-1]
        sequence = starts.flatten().cumsum(0) - 1  # of each token
        token = torch.arange(sequence.numel(), device=device)
        column = token - token[starts.flatten()][sequence]
        lengths = torch.bincount(sequence).tolist()
        batch, row = ([0] * len(lengths), list(range(len(lengths)))) if one_batch else batches(lengths)
        of_token = torch.tensor(batch, device=device)[sequence]
        rows = torch.tensor(row, device=device)[sequence]
        self.members = [(of_token == b).nonzero().squeeze(1) for b in range(max(batch, default=-1) + 1)]
        self.places = [(rows[member], column[member]) for member in self.members]
        sizes = [[n for n, b in zip(lengths, batch, strict=True) if b == i] for i in range(len(self.members))]
        self.sizes = [(len(size), max(size)) for size in sizes]

    def unpack(self, x: Tensor) -> list[Tensor]:
        """The batches of x (B, L, ...): (sequences, longest, ...) each, with zeros on the right."""
        flat = x.flatten(0, 1)
        return [
            x.new_zeros(*size, *x.shape[2:]).index_put(place, flat[member])
            for size, place, member in zip(self.sizes, self.places, self.members, strict=True)
        ]

    def pack(self, batches: list[Tensor]) -> Tensor:
        """The inverse of `unpack`: (B, L, ...)."""
        flat = torch.cat([x[place] for x, place in zip(batches, self.places, strict=True)])
        return flat[torch.cat(self.members).argsort()].unflatten(0, self.shape)


def batches(lengths: list[int]) -> tuple[list[int], list[int]]:
    """A batch for each sequence, and its row there; rows keep the order of the sequences.

    Batches are filled from the longest sequence to the shortest, each up to PADDED: shorter sequences only
    add padding per token.
    """
    batch, number, rows, tokens, longest = [0] * len(lengths), -1, 0, 0, 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if number < 0 or (rows + 1) * longest > PADDED * (tokens + lengths[i]):
            number, rows, tokens, longest = number + 1, 0, 0, lengths[i]
        batch[i], rows, tokens = number, rows + 1, tokens + lengths[i]
    seen = [0] * (number + 1)
    row = []
    for b in batch:
        row.append(seen[b])
        seen[b] += 1
    return batch, row
