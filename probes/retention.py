"""What is left of a token in the state, and Mamba's layers as attention: exact, from linearity.

Unrolling the recurrence of `probes.scan.Scan`, token i's contribution to the state at time t is

    c(i -> t) = prod_{i < s <= t} exp(dt_s A) * dt_i x_i B_i^T        h_t = sum_{i <= t} c(i -> t)

and reading it out gives the hidden attention of Ali, Zimerman & Wolf 2024 (arXiv 2403.01590),

    alpha(t, i) = C_t prod_{i < s <= t} exp(dt_s A) dt_i B_i          y_t = sum_{i <= t} alpha(t, i) x_i

one (L, L) map for every channel of Mamba and every head of Mamba-2. Products are exponentials of sums of
dt A <= 0, taken in float64 and masked before the exponential: nothing overflows, and what underflows is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probes.scan import BUDGET, Scan, chunks, inside
from probes.updates import state_changes
from ssm_retrieval.errors import UserError

RESULT_LIMIT = 2**30  # bytes of a result, above which a function refuses and says what to ask for instead
MAP_BUDGET = 2**25  # bytes of working memory of the maps: heads that fit in a cache together are fastest
BLOCK = 32  # rows of a map computed at once; decays within a block are not factorised


@dataclass(frozen=True)
class Retention:
    """How much is left of a token at a later time, for pairs (source i, time t); 0 where t < i.

    What is written at i is x_i after the convolution, a mix of tokens i - 3 .. i (d_conv = 4), in deeper
    layers of all before. So the symbol at i is written at i .. i + 3, and `kept` is exact of the write at its
    place, not of the symbol.

    Attributes:
        kept: ||c(i -> t)|| / ||c(i -> i)||, in [0, 1]; 0 for a token that wrote nothing (dt x B = 0).
        share: ||c(i -> t)|| / ||h_t||; may exceed 1, because contributions can cancel; 0 where h_t = 0.
    """

    kept: Tensor
    share: Tensor


def source_and_time(scan: Scan, source: Any, at: Any) -> tuple[Tensor, Tensor]:
    """Positions of sources and times, broadcast to each other and to the batch.

    A number counts as a list of one position, and a list holds for every sequence: both give (B, positions).

    Args:
        scan: The layer's recurrence.
        source: Int positions i.
        at: Int positions t.

    Returns:
        Source and time, both (B, ...) int64.

    Raises:
        UserError: A position lies outside the sequence, or the leading dimension is not the batch's.
    """
    B, L = scan.x.shape[:2]
    device = scan.x.device
    i, t = torch.broadcast_tensors(*(inside(torch.as_tensor(p, device=device), L) for p in (source, at)))
    if i.dim() < 2:
        i, t = i.reshape(1, -1), t.reshape(1, -1)
    if i.shape[0] not in (1, B):
        raise UserError(f"source and at must have leading dimension {B}, the batch's, not {i.shape[0]}")
    shape = (B, *i.shape[1:])
    return i.expand(shape).long(), t.expand(shape).long()


@torch.no_grad()
def contribution_norm(
    scan: Scan, source: Any, at: Any, per_head: bool = False, budget: int = BUDGET
) -> Tensor:
    """Frobenius norm of c(i -> t) over the layer's state.

    Because c has rank one, no state is formed:

        ||c||^2 = sum_h dt_i^2 |x_i|^2 sum_n B_in^2 exp(2 A_n sum_{i < s <= t} dt_s)

    Args:
        scan: The layer's recurrence.
        source: Int positions i, see `source_and_time`.
        at: Int positions t.
        per_head: Norms of every head, with a last dimension H.
        budget: Bytes of working memory, about.

    Returns:
        Norms in the shape of `source_and_time`, 0 where t < i.
    """
    (B, _, H), M = scan.dt.shape, scan.A.shape[1]
    i, t = source_and_time(scan, source, at)
    shape = i.shape
    i, t = i.reshape(B, -1), t.reshape(B, -1)  # (B, R)
    elapsed = scan.elapsed()
    Bt = scan.Bt.square()
    power = scan.by_head(Bt.sum(-1, keepdim=True) if M == 1 else Bt)  # (B, L, H, N or 1)
    scale = scan.dt * scan.x.norm(dim=-1)  # (B, L, H)
    result = scan.x.new_empty(B, i.shape[1], *[H] * per_head)
    row = torch.arange(B, device=i.device)[:, None]
    for part in chunks(i.shape[1], 3 * B * H * M * scan.x.element_size(), budget):
        ip, tp = i[:, part], t[:, part]
        passed = (elapsed[row, tp] - elapsed[row, ip]).to(scan.x.dtype)  # (B, r, H)
        logs = (passed.unsqueeze(-1) * (2 * scan.A)).masked_fill((tp < ip)[..., None, None], -torch.inf)
        norms = (logs.exp_() * power[row, ip]).sum(-1).sqrt() * scale[row, ip]  # (B, r, H)
        result[:, part] = norms if per_head else norms.norm(dim=-1)
    return result.view(*shape, *result.shape[2:])


@torch.no_grad()
def retention(
    scan: Scan,
    source: Any,
    at: Any,
    per_head: bool = False,
    state_norm: Tensor | None = None,
    budget: int = BUDGET,
) -> Retention:
    """How much of token `source` is in the state at time `at`, relative to what it wrote and to the state.

    `source=target[:, None]` (B, 1) with `at=torch.arange(L)` gives (B, L), the fate of one token a sequence.

    Args:
        scan: The layer's recurrence.
        source: Int positions i, see `source_and_time`.
        at: Int positions t.
        per_head: For every head, with a last dimension H.
        state_norm: ||h_t|| (B, L), per head (B, L, H), if it is known, at least at `at`. None: it is
            computed.
        budget: Bytes of working memory, about.

    Returns:
        Both ratios in the shape of `source_and_time`.
    """
    i, t = source_and_time(scan, source, at)
    if state_norm is None:
        state_norm = state_changes(scan, per_head, budget).norm
    now = contribution_norm(scan, i, t, per_head, budget)
    written = contribution_norm(scan, i, i, per_head, budget)
    row = torch.arange(i.shape[0], device=i.device).view(-1, *[1] * (i.dim() - 1))
    return Retention(_ratio(now, written), _ratio(now, state_norm[row, t]))


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, torch.zeros_like(part))


# --- hidden attention ---------------------------------------------------------------------------------------


def _heads(scan: Scan, heads: Sequence[int] | Tensor | None) -> Tensor:
    count, device = scan.x.shape[2], scan.x.device
    if heads is None:
        return torch.arange(count, device=device)
    chosen = torch.as_tensor(heads, device=device)
    if chosen.dim() != 1 or (chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < count):
        raise UserError(f"heads must be a list of numbers in 0 .. {count - 1} (channels in Mamba)")
    return chosen.long()


def _refuse_above(limit: int, shape: tuple[int, ...], scan: Scan) -> None:
    size = scan.x.element_size() * torch.Size(shape).numel()
    if size > limit:
        raise UserError(
            f"a map of shape {shape} takes {size / 2**20:.0f} MiB, more than limit={limit / 2**20:.0f} MiB; "
            "name fewer heads, or use mean_attention, attention_rows or attention_output"
        )


@dataclass(frozen=True)
class _Part:
    """K heads of a scan, ready for products: A (K, N or 1), elapsed (B, K, L), keys, queries (B, K, L, N)."""

    A: Tensor
    elapsed: Tensor
    keys: Tensor
    queries: Tensor

    @classmethod
    def of(cls, scan: Scan, elapsed: Tensor, heads: Tensor) -> _Part:
        group = heads // (scan.x.shape[2] // scan.Bt.shape[2])
        dt = scan.dt[:, :, heads].transpose(1, 2)
        keys = dt.unsqueeze(-1) * scan.Bt[:, :, group].transpose(1, 2)
        return cls(
            scan.A[heads], elapsed[:, :, heads].transpose(1, 2), keys, scan.Ct[:, :, group].transpose(1, 2)
        )

    def kept(self, later: Tensor, earlier: Tensor) -> Tensor:
        """exp(A (later - earlier)) with a last dimension for A's, of broadcast elapsed times (B, K, ...)."""
        passed = (later - earlier).to(self.keys.dtype).unsqueeze(-1)
        return torch.exp(passed * self.A.view(-1, *[1] * (passed.dim() - 3), self.A.shape[1]))

    def rows(self, start: int, stop: int) -> Tensor:
        """alpha (B, K, stop - start, stop) of rows start .. stop - 1; later columns are 0.

        Inside the block decays are taken pair by pair. Before it they factorise at its edge r = start - 1,
        exp(A (e_t - e_r)) exp(A (e_r - e_i)), both at most 1: a matrix product over N instead of an
        exponential for each of (row, column, N).
        """
        q, k, e = self.queries[:, :, start:stop], self.keys[:, :, start:stop], self.elapsed[:, :, start:stop]
        future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
        # the future is given no distance before the exponential, and no weight after it
        decay = self.kept(torch.maximum(e.unsqueeze(-1), e.unsqueeze(-2)), e.unsqueeze(-2))
        if self.A.shape[1] == 1:
            near = decay.squeeze(-1) * (q @ k.transpose(-1, -2))
        else:
            near = (decay.mul_(k.unsqueeze(-3)) @ q.unsqueeze(-1)).squeeze(-1)
        near = near.masked_fill(future, 0)
        if start == 0:
            return near
        edge = self.elapsed[:, :, start - 1 : start]
        before = self.keys[:, :, :start] * self.kept(edge, self.elapsed[:, :, :start])
        far = (q * self.kept(e, edge)) @ before.transpose(-1, -2)
        return torch.cat([far, near], dim=-1)


def _parts(scan: Scan, heads: Tensor, budget: int) -> Iterator[tuple[slice, _Part]]:
    B, L, _, _, N = scan.shape
    elapsed = scan.elapsed()
    each = B * scan.x.element_size() * (5 * L * N + 3 * BLOCK * L + 2 * BLOCK * BLOCK * scan.A.shape[1])
    for part in chunks(len(heads), each, budget):
        yield part, _Part.of(scan, elapsed, heads[part])


def _row_blocks(L: int) -> Iterator[tuple[int, int]]:
    return ((start, min(L, start + BLOCK)) for start in range(0, L, BLOCK))


@torch.no_grad()
def hidden_attention(
    scan: Scan,
    heads: Sequence[int] | Tensor | None = None,
    budget: int = MAP_BUDGET,
    limit: int = RESULT_LIMIT,
) -> Tensor:
    """The maps alpha of a layer's heads (of Mamba: channels).

    Costs L^2 N multiplications and L^2 N / 64 + 32 L N exponentials per head.

    Args:
        scan: The layer's recurrence.
        heads: K numbers of heads. None: all.
        budget: Bytes of working memory beside the result, about.
        limit: Most bytes of the result.

    Returns:
        (B, K, L, L), 0 above the diagonal.

    Raises:
        UserError: The result exceeds the limit, or a head does not exist.
    """
    chosen = _heads(scan, heads)
    B, L = scan.x.shape[:2]
    _refuse_above(limit, (B, len(chosen), L, L), scan)
    alpha = scan.x.new_zeros(B, len(chosen), L, L)
    for part, piece in _parts(scan, chosen, budget):
        for start, stop in _row_blocks(L):
            alpha[:, part, start:stop, :stop] = piece.rows(start, stop)
    return alpha


@torch.no_grad()
def attention_rows(
    scan: Scan,
    at: Any,
    heads: Sequence[int] | Tensor | None = None,
    budget: int = MAP_BUDGET,
    limit: int = RESULT_LIMIT,
) -> Tensor:
    """Rows t of `hidden_attention`: what some positions read from every token.

    Args:
        scan: The layer's recurrence.
        at: (positions,) ints, the same in all sequences, or (B, positions).
        heads: K numbers of heads. None: all.
        budget: Bytes of working memory beside the result, about.
        limit: Most bytes of the result.

    Returns:
        (B, K, positions, L), 0 for tokens after the position.

    Raises:
        UserError: The result exceeds the limit, or a head or position does not exist.
    """
    chosen = _heads(scan, heads)
    _, t = source_and_time(scan, 0, at)
    (B, L), R = scan.x.shape[:2], t.shape[1]
    _refuse_above(limit, (B, len(chosen), R, L), scan)
    alpha = scan.x.new_empty(B, len(chosen), R, L)
    row, column = torch.arange(B, device=t.device), torch.arange(L, device=t.device)
    for part, piece in _parts(scan, chosen, budget):
        for r in range(R):
            now = piece.elapsed[row, :, t[:, r]].unsqueeze(-1)  # (B, K, 1)
            decay = piece.kept(torch.maximum(now, piece.elapsed), piece.elapsed)  # (B, K, L, N or 1)
            read = piece.queries[row, :, t[:, r]].unsqueeze(-1)  # (B, K, N, 1)
            values = ((decay * piece.keys) @ read).squeeze(-1)
            alpha[:, part, r] = values.masked_fill((column > t[:, r, None])[:, None], 0)
    return alpha


def apply_attention(alpha: Tensor, x: Tensor, D: Tensor | None = None) -> Tensor:
    """The output of the scan from its maps, y = alpha x + D x.

    Args:
        alpha: (B, K, L, L).
        x: (B, L, K, P), `scan.x` or its chosen heads; of Mamba P = 1.
        D: (K,), the skip. None: without it.

    Returns:
        y, (B, L, K, P).
    """
    y = torch.einsum("bkts,bskp->btkp", alpha, x)
    return y if D is None else y + D[:, None] * x


@torch.no_grad()
def attention_output(scan: Scan, D: Tensor | None = None, budget: int = MAP_BUDGET) -> Tensor:
    """Every head's map times its input, without keeping a map; equals the layer's own scan.

    Args:
        scan: The layer's recurrence.
        D: (H,), the skip. None: without it.
        budget: Bytes of working memory, about.

    Returns:
        y, (B, L, H, P).
    """
    B, L, H, P, _ = scan.shape
    y = scan.x.new_empty(B, L, H, P)
    for part, piece in _parts(scan, _heads(scan, None), budget):
        for start, stop in _row_blocks(L):
            y[:, start:stop, part] = apply_attention(piece.rows(start, stop), scan.x[:, :stop, part])
    return y if D is None else y + D[:, None] * scan.x


@torch.no_grad()
def mean_attention(
    scan: Scan, heads: Sequence[int] | Tensor | None = None, budget: int = MAP_BUDGET
) -> Tensor:
    """The mean of |alpha| over heads (of Mamba: channels), computed block by block.

    Args:
        scan: The layer's recurrence.
        heads: Numbers of the heads. None: all.
        budget: Bytes of working memory, about.

    Returns:
        (B, L, L), 0 above the diagonal.

    Raises:
        UserError: `heads` is empty, or a head does not exist.
    """
    chosen = _heads(scan, heads)
    if not len(chosen):
        raise UserError("heads is empty; there is nothing to average")
    B, L = scan.x.shape[:2]
    total = scan.x.new_zeros(B, L, L)
    for _, piece in _parts(scan, chosen, budget):
        for start, stop in _row_blocks(L):
            total[:, start:stop, :stop] += piece.rows(start, stop).abs_().sum(1)
    return total / len(chosen)


@torch.no_grad()
def attention_pattern(scan: Scan, at: Any = None) -> Tensor:
    """Hidden attention in the form of an attention pattern: |alpha| with rows that sum to 1.

    The heads of Mamba-2 have a map each. The channels of Mamba are very many, so their mean stands for one
    head; it is taken before the rows are normalised.

    Args:
        scan: The layer's recurrence.
        at: Positions of the rows, as in `attention_rows`. None: all.

    Returns:
        (B, H, positions, L), of Mamba with H = 1, for `probes.heads`.
    """
    channels = scan.x.shape[3] == 1
    if at is not None:
        rows = attention_rows(scan, at).abs()
        return normalise_rows(rows.mean(1, keepdim=True) if channels else rows)
    return normalise_rows(mean_attention(scan).unsqueeze(1) if channels else hidden_attention(scan).abs())


def normalise_rows(weights: Tensor) -> Tensor:
    """Weights (..., L, S) >= 0, such as `mean_attention`, with rows that sum to 1; rows of zeros stay."""
    return _ratio(weights, weights.sum(-1, keepdim=True).expand_as(weights))
