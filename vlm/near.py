"""Soft targets for the numbers of boxes: a wrong hundredth next to the right one is hardly wrong.

Boxes are printed as hundredths of the picture's side, a token each, and to a cross-entropy all wrong tokens
are equally wrong. With a bell over the neighbours a model learns that 0.41 is close to 0.42 from both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ssm_retrieval.errors import UserError

STEPS = 101  # 0.00 .. 1.00


@dataclass(frozen=True)
class Near:
    """Targets of numbers that reach to their neighbours.

    Attributes:
        place: (V,) int64, a token's hundredths; -1 = no number.
        tokens: (101,) int64, the tokens of 0.00 .. 1.00.
        bell: (101, 101), the target of each number, rows of sum 1.
    """

    place: Tensor
    tokens: Tensor
    bell: Tensor

    @staticmethod
    def of(encode: Callable[[str], list[int]], vocabulary: int, spread: float) -> Near:
        """Make the targets of a tokenizer.

        Args:
            encode: Text -> ids.
            vocabulary: V, the number of ids.
            spread: Standard deviation of the bell, in hundredths.

        Returns:
            The targets.

        Raises:
            UserError: If the tokenizer splits such numbers.
        """
        found = [encode(f"{i / 100:.2f}") for i in range(STEPS)]
        if any(len(ids) != 1 for ids in found):
            raise UserError("box_spread needs a tokenizer with one token for each of 0.00 .. 1.00; use 0")
        tokens = torch.tensor(found).flatten()
        place = torch.full((vocabulary,), -1)
        place[tokens] = torch.arange(STEPS)
        apart = torch.arange(STEPS)[:, None] - torch.arange(STEPS)
        bell = torch.exp(-0.5 * (apart / spread) ** 2)
        return Near(place, tokens, bell / bell.sum(1, keepdim=True))

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy (N,) float32, in nats, of logits (N, V) and targets (N,) int64.

        That of a number is above 0 even where it is right: the bell's entropy.
        """
        each = F.cross_entropy(logits.float(), targets, reduction="none")
        numbers = self.place[targets] >= 0
        said = logits[numbers].float().log_softmax(-1)[:, self.tokens]
        soft = -(self.bell[self.place[targets[numbers]]] * said).sum(-1)
        return each.masked_scatter(numbers, soft)

    def to(self, device: torch.device) -> Near:
        """Return the same on a device."""
        return Near(self.place.to(device), self.tokens.to(device), self.bell.to(device))
