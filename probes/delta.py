"""The delta rule of one layer as tensors: what every token writes, erases and keeps, and what is read of it.

    u_t = beta_t (v_t - a_t h_{t-1} k_t)          h_t = a_t h_{t-1} + u_t k_t^T          y_t = h_t q_t

which is the same as multiplying the state by a matrix and adding a write (arXiv 2406.06484, equation 3):

    h_t = h_{t-1} F_t + W_t         F_t = a_t (1 - beta_t k_t k_t^T)         W_t = beta_t v_t k_t^T

h_{t-1} a_t beta_t k_t k_t^T is what token t erases, and h_{t-1} F_t what it keeps. Since h is linear in the
values, y_t = sum_{i <= t} M[t, i] v_i with the hidden attention M[t, i] = beta_i k_i^T F_{i+1} ... F_t q_t. A
map that leaves the erasures out, beta_i (k_i . q_t) a_{i+1} ... a_t, is that of gated linear attention, and
not what the layer computes.

Mamba-3 is linear attention too, but a write comes in two parts (`ops.trapezoid`): beta_t now, and late_t when
the next token begins, h_t = a_t (h_{t-1} + late_{t-1} v_{t-1} k_{t-1}^T) + beta_t v_t k_t^T.

    deltas = record_deltas(model, input_ids)      # layer -> DeltaScan
    survival(deltas[0], at=63)                    # (B, 64, H): what is left of each write
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from probes.cache import Recording, recorded
from probes.scan import layers_with
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.ops.trapezoid import rank_one

NAMES = ("q", "k", "v", "beta", "A_bar", "now", "before")  # of which no layer has all


@dataclass(frozen=True)
class DeltaScan:
    """One layer's recurrence. All tensors are kept without gradients as float32, or float64 if v is.

    Attributes:
        q: (B, L, H, N) read vectors.
        k: (B, L, H, N) write vectors.
        v: (B, L, H, P) values.
        beta: (B, L, H) strengths, 0 at padding.
        decay: (B, L, H, N or 1), 1 where nothing decays.
        erase: Whether a write takes away what its key holds. Without, it is gated linear attention.
        late: (B, L, H) strengths with which a write is added again when the next token begins. None: 0.

    Raises:
        UserError: Shapes do not fit.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    decay: Tensor
    erase: bool = True
    late: Tensor | None = None

    def __post_init__(self) -> None:
        dtype = torch.promote_types(self.v.dtype, torch.float32)
        for field in fields(self):
            if isinstance(x := getattr(self, field.name), Tensor):
                object.__setattr__(self, field.name, x.detach().to(dtype))
        if self.v.dim() != 4 or self.k.dim() != 4:
            given = f"{tuple(self.v.shape)} and {tuple(self.k.shape)}"
            raise UserError(f"v must have dimensions (B, L, H, P) and k (B, L, H, N), not shapes {given}")
        heads, n = tuple(self.v.shape[:3]), self.k.shape[-1]
        shapes = dict(q=(*heads, n), k=(*heads, n), beta=heads)
        shapes |= {} if self.late is None else dict(late=heads)
        shapes["decay"] = (*heads, self.decay.shape[-1] if self.decay.shape[-1:] == (1,) else n)
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise UserError(f"{name} must have shape {shape}, not {tuple(getattr(self, name).shape)}")

    def sequence(self, b: int) -> DeltaScan:
        """The recurrence of sequence b, as a batch of one."""
        mine = ((f.name, getattr(self, f.name)) for f in fields(self))
        tensors: dict[str, Any] = {name: x[b : b + 1] for name, x in mine if isinstance(x, Tensor)}
        return replace(self, **tensors)

    def forget(self, t: int, rows: Tensor, erase: bool = True) -> Tensor:
        """rows F_t, for rows (B, H, R, N) of a state or of a product of states' factors.

        Args:
            t: The token.
            rows: What stands on the left.
            erase: Whether F_t has its second factor.

        Returns:
            (B, H, R, N).
        """
        rows = rows * self.decay[:, t].unsqueeze(-2)
        if not (erase and self.erase):
            return rows
        k = self.k[:, t].unsqueeze(-2)  # (B, H, 1, N)
        return rows - self.beta[:, t, :, None, None] * (rows * k).sum(-1, keepdim=True) * k


@dataclass(frozen=True)
class Changes:
    """What each token does to the state, in Frobenius norms over the heads, (B, L) each.

    Attributes:
        write: Of the write, |beta v k^T|; of Mamba-3 together with the second part of the write before it.
        erase: Of what is erased, |h_{t-1} a beta k k^T|.
        keep: Of what is kept, |h_{t-1} F_t|, over that of the state before; NaN while that is empty.
        relative: Of the whole change, |h_t - h_{t-1}|, likewise over that of the state before.
    """

    write: Tensor
    erase: Tensor
    keep: Tensor
    relative: Tensor


@torch.no_grad()
def changes(scan: DeltaScan) -> Changes:
    """Run the recurrence and measure every token; one state exists at a time.

    Args:
        scan: The layer's recurrence.

    Returns:
        The four norms.
    """
    B, L, H, P = scan.v.shape
    h = scan.v.new_zeros(B, H, P, scan.k.shape[-1])
    rows = []
    for t in range(L):
        faded = scan.forget(t, h, erase=False)
        kept = scan.forget(t, h)
        write = rank_one(scan.beta[:, t, :, None] * scan.v[:, t], scan.k[:, t])
        if t > 0 and scan.late is not None:
            again = rank_one(scan.late[:, t - 1, :, None] * scan.v[:, t - 1], scan.k[:, t - 1])
            write = write + scan.forget(t, again)
        after = kept + write
        before = _norm(h)
        before = torch.where(before > 0, before, torch.nan)
        rows.append((_norm(write), _norm(faded - kept), _norm(kept) / before, _norm(after - h) / before))
        h = after
    return Changes(*(torch.stack(column, dim=1) for column in zip(*rows, strict=True)))


def _norm(h: Tensor) -> Tensor:
    return h.flatten(1).norm(dim=1)


@torch.no_grad()
def survival(scan: DeltaScan, at: int) -> Tensor:
    """What is left of each token's write in the state after token `at`, as a share of the write.

    Args:
        scan: The layer's recurrence.
        at: The token.

    Returns:
        (B, at + 1, H): |k_i^T F_{i+1} ... F_at| / |k_i|, at most 1 for beta in (0, 2) and keys of length 1.
        A write in two parts counts as one, beta_i + late_i, of which the last token has written beta_i only.
        NaN where nothing is written, as at padding.
    """
    late = torch.zeros_like(scan.beta) if scan.late is None else scan.late
    k, first, later = (x[:, : at + 1].transpose(1, 2) for x in (scan.k, scan.beta, late))
    total = first + later  # (B, H, i)
    rows = k * (first / total).unsqueeze(-1)  # (B, H, i, N)
    for t in range(1, at + 1):
        rows[:, :, t - 1] += k[:, :, t - 1] * (later / total)[:, :, t - 1, None]
        rows[:, :, :t] = scan.forget(t, rows[:, :, :t])
    left = (rows.norm(dim=-1) / k.norm(dim=-1)).masked_fill(total == 0, torch.nan)
    return left.transpose(1, 2)


@torch.no_grad()
def hidden_attention(scan: DeltaScan, erase: bool = True) -> Tensor:
    """The map that gives y = map @ v, exactly.

    Args:
        scan: The layer's recurrence.
        erase: Whether to count what later writes erase. Without, it is a map of another layer.

    Returns:
        (B, H, L, L); row t has the weights of the values up to t.
    """
    B, L, H, _ = scan.v.shape
    weights = scan.v.new_zeros(B, H, L, L)
    rows = scan.k.new_zeros(B, H, L, scan.k.shape[-1])
    for t in range(L):
        if t > 0 and scan.late is not None:
            rows[:, :, t - 1] += scan.late[:, t - 1, :, None] * scan.k[:, t - 1]
        rows[:, :, :t] = scan.forget(t, rows[:, :, :t], erase)
        rows[:, :, t] = scan.beta[:, t, :, None] * scan.k[:, t]
        weights[:, :, t, : t + 1] = (rows[:, :, : t + 1] * scan.q[:, t].unsqueeze(-2)).sum(-1)
    return weights


def delta_layers(model: LanguageModel) -> list[int]:
    """Indices of the blocks that write values under keys into a state: delta rules and linear attention."""
    return layers_with(model, "mixer.hook_k")


def record_deltas(
    model: LanguageModel, input_ids: Tensor, layers: Sequence[int] | None = None
) -> dict[int, DeltaScan]:
    """The recurrences of a model's layers with a delta rule, or linear attention, in one forward pass.

    Args:
        model: Any model of the library.
        input_ids: (B, L) int64.
        layers: Indices of such blocks. None: all.

    Returns:
        Layer to its recurrence, in the model's precision.

    Raises:
        UserError: The model has no such layers, or a layer is none.
    """
    known = delta_layers(model)
    wanted = known if layers is None else list(layers)
    if not wanted or any(i not in known for i in wanted):
        raise UserError(f"layers={wanted} must be some of the model's layers with keys and a state, {known}")
    cache = recorded(model, input_ids, delta_names(model, wanted))
    return {i: delta_of(model, cache, i) for i in wanted}


def delta_names(model: LanguageModel, layers: Sequence[int]) -> list[str]:
    """The hook points that `delta_of` needs of some layers.

    Args:
        model: The model.
        layers: Indices of blocks with keys and a state.

    Returns:
        Their names, for `probes.cache.recorded`.
    """
    there = set(model.hook_names())
    names = [f"blocks.{i}.mixer.hook_{name}" for i in layers for name in NAMES]
    return [name for name in names if name in there]


def delta_of(model: LanguageModel, cache: Recording, layer: int) -> DeltaScan:
    """The recurrence of one layer from a recording of `delta_names`.

    Args:
        model: The model that was recorded.
        cache: The recording.
        layer: Index of a block with keys and a state.

    Returns:
        The recurrence, in the recording's precision.
    """
    q, k, v, beta, decay, now, before = (cache.get(f"blocks.{layer}.mixer.hook_{name}") for name in NAMES)
    assert q is not None and k is not None and v is not None
    ones = v.new_ones(v.shape[:3])
    strength = next((x for x in (beta, now) if x is not None), ones)
    decay = ones if decay is None else decay
    decay = decay.unsqueeze(-1) if decay.dim() == 3 else decay
    late = None if before is None else F.pad(before[:, 1:], (0, 0, 0, 1))
    block: Any = model.blocks[layer]
    return DeltaScan(q, k, v, strength, decay, block.mixer.erase, late)
