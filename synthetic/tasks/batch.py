"""`Batch`: what a task makes and a model is trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from synthetic.tasks.sampling import IntArray

if TYPE_CHECKING:  # torch takes seconds to import, which listing tasks for a help page can spare
    import torch


@dataclass(frozen=True, eq=False)
class Batch:
    """Token sequences of one layout and length, so without padding or mask; tensors are int64.

    Attributes:
        input_ids: [B, T] token ids.
        labels: [B, A] token ids; the logits at sequence index answer_at[j] are scored against labels[:, j].
        answer_at: [A] indices into the T axis, or [B, A] where they differ from row to row.
        target_index: [B, K] 0-based place of each query in x1..xN. The first K * answer_tokens labels are the
            answers to the queries, in order; further labels (supervise_bos) are trained but are no retrieval.
        length: N, the number of context symbols.
        chance: Accuracy of a guess that knows the possible answers and nothing else.
        answer_tokens: r, tokens per answer; an answer is right only if all of them are.
        alternatives: [B, M, r] the M answers that are equally right, in the order of their place in the
            context, if a query has several; the labels are then one of them.
        position_ids: [B, T] the position of each token, for the model; None: 0 .. T - 1.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    answer_at: torch.Tensor
    target_index: torch.Tensor
    length: int
    chance: float
    answer_tokens: int = 1
    alternatives: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None

    @classmethod
    def from_numpy(
        cls,
        input_ids: IntArray,
        labels: IntArray,
        answer_at: IntArray,
        target_index: IntArray,
        *,
        length: int,
        chance: float,
        answer_tokens: int = 1,
        alternatives: IntArray | None = None,
    ) -> Batch:
        """A batch that shares the memory of int64 arrays.

        Args:
            input_ids: [B, T].
            labels: [B, A].
            answer_at: [A] or [B, A].
            target_index: [B, K].
            length: N.
            chance: Accuracy of a guess.
            answer_tokens: r.
            alternatives: [B, M, r].

        Returns:
            The batch; its attributes say what the arguments mean.
        """
        import torch

        return cls(
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            answer_at=torch.from_numpy(answer_at),
            target_index=torch.from_numpy(target_index),
            length=length,
            chance=chance,
            answer_tokens=answer_tokens,
            alternatives=None if alternatives is None else torch.from_numpy(alternatives),
        )

    @property
    def retrieved(self) -> int:
        """How many labels, counted from the first, are answers to queries."""
        return self.target_index.shape[1] * self.answer_tokens

    def places(self) -> dict[str, torch.Tensor]:
        """`position_ids` as an argument of a model; nothing if they are 0 .. T - 1."""
        return {} if self.position_ids is None else {"position_ids": self.position_ids}

    def right(self, predicted: torch.Tensor) -> torch.Tensor:
        """[B, K] bool: which answers are right in all their tokens, given ids [B, retrieved or more]."""
        equal = predicted[:, : self.retrieved] == self.labels[:, : self.retrieved]
        return equal.unflatten(1, (-1, self.answer_tokens)).all(-1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        moved = {n: t.to(device, non_blocking=non_blocking) for n, t in self._tensors().items()}
        return replace(self, **moved)

    def split(self, parts: int) -> list[Batch]:
        """The rows in `parts` nearly equal shares, in order; the last are empty if rows are too few."""
        shared = ("answer_at",) if self.answer_at.dim() == 1 else ()
        pieces: dict[str, Any] = {
            n: t.tensor_split(parts) for n, t in self._tensors().items() if n not in shared
        }
        return [replace(self, **{n: piece[i] for n, piece in pieces.items()}) for i in range(parts)]

    def _tensors(self) -> dict[str, Any]:
        names = ("input_ids", "labels", "answer_at", "target_index", "alternatives", "position_ids")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}
