"""The recurrence of one SSM layer as tensors, and how it is recorded.

`Scan` holds one layer in one form for both families, with H heads of width P. Mamba (arXiv 2312.00752) is a
layer of H = d_inner heads of width P = 1 with a decay for each of N states; Mamba-2 (arXiv 2405.21060) has
one decay per head. In both

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        h_t: (H, P, N), h_{-1} = 0
    y_t = h_t C_t

and dt_t x_t B_t^T, of rank one in each head, is called the write of token t. From a model:

    scans = record_scans(model, input_ids)            # layer -> Scan
    write_norm(scans[0])                              # (B, L), `probes.updates`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from probes.cache import Recording, recorded
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.common import LanguageModel

BUDGET = 128 * 2**20  # bytes of working memory, for the functions that pass through states
SCAN_NAMES = ("mixer.hook_conv", "mixer.hook_dt", "mixer.hook_B", "mixer.hook_C")


@dataclass(frozen=True)
class Scan:
    """One layer's recurrence, after softplus and convolution, in one form for both families.

    `mamba` and `mamba2` make it. All tensors are kept without gradients as float32, or float64 if x is.

    Attributes:
        A: (H, N), or (H, 1) where all states of a head decay alike; at most 0.
        dt: (B, L, H) step sizes, at least 0, and 0 at padding.
        Bt: (B, L, G, N) write vectors; group g serves the heads g H/G .. (g+1) H/G - 1.
        Ct: (B, L, G, N) read vectors.
        x: (B, L, H, P), the input u of the scan.

    Raises:
        UserError: Shapes or signs do not fit.
    """

    A: Tensor
    dt: Tensor
    Bt: Tensor
    Ct: Tensor
    x: Tensor

    @classmethod
    def mamba(cls, A: Tensor, dt: Tensor, Bt: Tensor, Ct: Tensor, u: Tensor) -> Scan:
        """The recurrence of a Mamba layer, whose E channels are its heads.

        Args:
            A: (E, N).
            dt: (B, L, E).
            Bt: (B, L, N).
            Ct: (B, L, N).
            u: (B, L, E).

        Returns:
            The recurrence with H = E, P = G = 1.
        """
        return cls(A, dt, Bt.unsqueeze(-2), Ct.unsqueeze(-2), u.unsqueeze(-1))

    @classmethod
    def mamba2(cls, A: Tensor, dt: Tensor, Bt: Tensor, Ct: Tensor, x: Tensor) -> Scan:
        """The recurrence of a Mamba-2 layer.

        Args:
            A: (H,).
            dt: (B, L, H).
            Bt: (B, L, G, N).
            Ct: (B, L, G, N).
            x: (B, L, H, P).

        Returns:
            The recurrence, with A as (H, 1).
        """
        return cls(A.unsqueeze(-1), dt, Bt, Ct, x)

    def __post_init__(self) -> None:
        dtype = torch.promote_types(self.x.dtype, torch.float32)
        for field in fields(self):
            object.__setattr__(self, field.name, getattr(self, field.name).detach().to(dtype))
        if self.x.dim() != 4 or self.Bt.dim() != 4:
            raise UserError(
                f"x must have dimensions (B, L, H, P) and Bt (B, L, G, N), not shapes {tuple(self.x.shape)} "
                f"and {tuple(self.Bt.shape)}; use Scan.mamba or Scan.mamba2"
            )
        b, length, heads, _ = self.x.shape
        groups, n = self.Bt.shape[2:]
        shapes = dict(dt=(b, length, heads), Bt=(b, length, groups, n), Ct=(b, length, groups, n))
        shapes["A"] = (heads, self.A.shape[-1] if self.A.shape[-1:] == (1,) else n)
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise UserError(f"{name} must have shape {shape}, not {tuple(getattr(self, name).shape)}")
        if heads % groups:
            raise UserError(f"{groups} groups of Bt do not divide the {heads} heads")
        if (self.A > 0).any() or (self.dt < 0).any():
            raise UserError("A must be at most 0 and dt at least 0: give -exp(A_log) and dt after softplus")

    def sequence(self, b: int) -> Scan:
        """The recurrence of sequence b, as a batch of one."""
        at = slice(b, b + 1)
        return Scan(self.A, self.dt[at], self.Bt[at], self.Ct[at], self.x[at])

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, L, H, P, N)."""
        return (*self.x.shape, self.Bt.shape[-1])

    def by_head(self, shared: Tensor) -> Tensor:
        """Write or read vectors (B, L, G, N) by head, (B, L, H, N). A view where there is one group."""
        heads, groups = self.x.shape[2], shared.shape[2]
        if groups == 1:
            return shared.expand(-1, -1, heads, -1)
        return shared.repeat_interleave(heads // groups, dim=2)

    def elapsed(self) -> Tensor:
        """Elapsed time e_t = sum_{s <= t} dt_s, (B, L, H) float64.

        With it, prod_{i < s <= t} exp(dt_s A) = exp(A (e_t - e_i)). Float64, because differences of late sums
        would lose the digits that float32 has.
        """
        return self.dt.double().cumsum(1)


def chunks(length: int, bytes_each: int, budget: int) -> Iterator[slice]:
    """Slices that cover `range(length)`.

    Args:
        length: Of the range.
        bytes_each: Bytes of working memory for each element.
        budget: Bytes a slice may take; it has at least one element all the same.

    Yields:
        The slices, in order.
    """
    step = max(1, budget // max(bytes_each, 1))
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))


@torch.no_grad()
def iterate_states(scan: Scan, budget: int = BUDGET) -> Iterator[tuple[slice, Tensor]]:
    """The states h_t in order, by the recurrence as written; never all L at once.

    Args:
        scan: The layer's recurrence.
        budget: Bytes of working memory, about; a single position may take more.

    Yields:
        Positions as a slice, and their states (B, positions, H, P, N).
    """
    B, L, H, P, N = scan.shape
    h = scan.x.new_zeros(B, H, P, N)
    for at in chunks(L, 3 * h.numel() * h.element_size(), budget):
        dt = scan.dt[:, at].unsqueeze(-1)  # (B, q, H, 1)
        decay = torch.exp(dt * scan.A).unsqueeze(-2)  # (B, q, H, 1, N or 1)
        Bt = scan.by_head(scan.Bt[:, at])
        states = (dt * scan.x[:, at]).unsqueeze(-1) * Bt.unsqueeze(-2)  # the writes, until the next lines
        for t in range(states.shape[1]):
            states[:, t].addcmul_(decay[:, t], h)
            h = states[:, t]
        h = h.clone()  # the caller may change the chunk, and drop it
        yield at, states


def inside(positions: Tensor, length: int) -> Tensor:
    """Refuse positions that are not integers in 0 .. length - 1.

    Args:
        positions: Any shape.
        length: Of the sequence.

    Returns:
        The positions, unchanged.

    Raises:
        UserError: They are not integers, or one lies outside the sequence.
    """
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise UserError(f"positions must be integers, not {positions.dtype}")
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < length:
        raise UserError(
            f"positions must lie in 0 .. {length - 1}, but run from {int(positions.min())} to "
            f"{int(positions.max())}"
        )
    return positions


def layers_with(model: LanguageModel, local: str) -> list[int]:
    """Indices of the blocks that have a hook of this local name, such as "mixer.hook_dt"."""
    names = set(model.hook_names())
    return [i for i in range(model.config.n_layer) if f"blocks.{i}.{local}" in names]


def scan_names(layers: Sequence[int], *more: str) -> list[str]:
    """Names to record for `scan_of`.

    Args:
        layers: Indices of SSM blocks.
        *more: Further local names to record of each.

    Returns:
        Full names.
    """
    return [f"blocks.{i}.{name}" for i in layers for name in (*SCAN_NAMES, *more)]


def record_scans(
    model: LanguageModel,
    input_ids: Tensor | None = None,
    layers: Sequence[int] | None = None,
    *,
    inputs_embeds: Tensor | None = None,
) -> dict[int, Scan]:
    """The recurrences of a model's SSM layers in one forward pass.

    Args:
        model: Any model of the library.
        input_ids: (B, L) int64. None: `inputs_embeds` is given.
        layers: Indices of SSM blocks. None: all.
        inputs_embeds: (B, L, D), instead of token ids.

    Returns:
        Layer to its recurrence.

    Raises:
        UserError: The model has no SSM layers, or a layer is none.
    """
    known = layers_with(model, "mixer.hook_dt")
    wanted = known if layers is None else list(layers)
    wrong = [i for i in wanted if i not in known]
    if wrong or not wanted:
        raise UserError(f"layers={wanted} must be some of the model's SSM layers, {known}")
    cache = recorded(model, input_ids, scan_names(wanted), inputs_embeds=inputs_embeds)
    return {layer: scan_of(model, cache, layer) for layer in wanted}


def scan_of(model: LanguageModel, cache: Recording, layer: int) -> Scan:
    """The recurrence of one layer from a recording of `scan_names`.

    Args:
        model: The model that was recorded.
        cache: The recording.
        layer: Index of an SSM block.

    Returns:
        The recurrence, in the recording's precision.
    """
    x, dt, Bt, Ct = (cache[f"blocks.{layer}.{name}"] for name in SCAN_NAMES)
    block: Any = model.blocks[layer]
    A = -torch.exp(block.mixer.A_log.detach().float())
    return Scan.mamba2(A, dt, Bt, Ct, x) if Bt.dim() == 4 else Scan.mamba(A, dt, Bt, Ct, x)
