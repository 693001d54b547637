"""Where activations are swapped, and what a swap does to the residual stream behind its layer.

Three sites, named as their hook points:

    residual  blocks.l.hook_resid_pre             x_l itself; l = n_layer is what the last norm reads
    state     blocks.l.mixer.hook_ssm_state       h_t replaced, the recurrence goes on from it
    head      blocks.l.attn.hook_z                what one head gives to one position, before W_O

Every block adds to the residual stream, so a swap inside block l is known from what it adds to x_{l+1}, and
blocks up to l never run again. The recurrences are linear in their state (dt, B and C depend on the layer's
input alone), so with D_t = h'_t - h_t a replaced state adds to the outputs

    y'_s - y_s = C_s . (A_bar_s ... A_bar_{t+1} D_t)       s >= t

which is a scan that starts from D_t and writes nothing. (Of a delta rule A_bar_s is the matrix F_s of
`probes.delta`.)

Letters as in `ssm_retrieval.models.common`; c = patches side by side, T = tokens from `start` on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.models.common import Cache, Context, LanguageModel, LayerCache, widen
from ssm_retrieval.models.deltanet import DeltaNetMixer
from ssm_retrieval.models.gated_deltanet import GatedDeltaNetMixer
from ssm_retrieval.models.gla import GLAMixer
from ssm_retrieval.models.hybrid import ParallelBlock
from ssm_retrieval.models.kda import KDAMixer
from ssm_retrieval.models.linear_ssm import LinearSSMMixer
from ssm_retrieval.models.mamba import MambaMixer
from ssm_retrieval.models.mamba2 import Mamba2Mixer
from ssm_retrieval.models.swiglu_block import SwiGLUBlock
from ssm_retrieval.models.transformer import TransformerBlock
from ssm_retrieval.ops.causal_conv1d import causal_conv1d
from ssm_retrieval.ops.delta_rule import delta_rule
from ssm_retrieval.ops.linear import linear
from ssm_retrieval.ops.selective_scan import selective_scan
from ssm_retrieval.ops.ssd import ssd

SITES = ("residual", "state", "head")


def has_site(block: Any, site: str) -> bool:
    """Whether a block has states (SSM) or heads (attention) to swap; every block has a residual stream.

    A parallel block has only that: what a branch adds to it is scaled, which the shortcuts here do not do.
    """
    if isinstance(block, ParallelBlock):
        return site == "residual"
    if site == "state":
        return type(getattr(block, "mixer", None)) in STATES
    return site == "residual" or isinstance(block, TransformerBlock)


def context_of(x: Tensor) -> Context:
    """The context in which a block runs on whole, unpadded sequences x (B, L, ...)."""
    return Context(positions=torch.arange(x.shape[1], device=x.device))


def residuals(model: LanguageModel, input_ids: Tensor) -> list[Tensor]:
    """x_0 .. x_n: the residual stream (B, L, D) before each block, and before the last norm."""
    context = context_of(input_ids)
    x = model.embed(input_ids, cast(Tensor, context.positions))
    x = x.to(torch.promote_types(x.dtype, torch.float32)) if model.config.residual_in_fp32 else x
    result = [x]
    for block in model.blocks:
        result.append(block(result[-1], context))
    return result


def advance(model: LanguageModel, input_ids: Tensor, cache: Cache, stop: int) -> None:
    """Let a cache of these sequences take in the tokens before `stop`.

    Args:
        model: The model.
        input_ids: (B, L) int64.
        cache: What has been taken in so far; changed in place.
        stop: The token after the last one.
    """
    if stop > cache.length:
        nothing = torch.zeros(0, dtype=torch.int64, device=input_ids.device)
        model.hidden(input_ids[:, cache.length : stop], at=nothing, cache=cache)


def run_from(model: LanguageModel, layer: int, x: Tensor, cache: Cache | None, at: int | Tensor) -> Tensor:
    """Logits when blocks from `layer` on run on a given residual stream.

    Args:
        model: The model.
        layer: The first block that runs; n_layer: only the last norm and the head.
        x: (c, B, T, D), the residual stream x_layer.
        cache: What the unpatched sequences (B) leave before x begins. None: x begins with the first token.
        at: Index in x of the token whose logits are wanted, or (A,) or (B, A) of them.

    Returns:
        (c, B, V), of several tokens (c, B, A, V).
    """
    blocks, norm, head = model.blocks, model.norm, model.head
    c, B, T, _ = x.shape
    start = 0 if cache is None else cache.length
    context = Context(positions=torch.arange(start, start + T, device=x.device))
    rows = x.flatten(0, 1)
    for block, past in zip(blocks[layer:], _layers(model, cache)[layer:], strict=True):
        rows = block(rows, context, None if past is None else repeated(past, c))
    if isinstance(at, Tensor) and at.dim() == 2:
        wanted = rows[torch.arange(c * B, device=x.device)[:, None], at.repeat(c, 1)]
    else:
        wanted = rows[:, at]
    return head(norm(wanted)).unflatten(0, (c, B))


def _layers(model: LanguageModel, cache: Cache | None) -> list[LayerCache | None]:
    return [None] * model.config.n_layer if cache is None or cache.length == 0 else list(cache.layers)


def repeated(cache: LayerCache, c: int) -> LayerCache:
    """A layer's cache c times below each other, (c B, ...)."""
    return {name: t.expand(c, *t.shape).flatten(0, 1) for name, t in cache.items()}


@contextmanager
def captured(**modules: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep the last argument and result of modules, as `name_in` and `name_out`, while the statement runs."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[f"{name}_in"], found[f"{name}_out"] = inputs[0], output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class MambaState:
    """One Mamba block running on x (B, L, D): its states, and what a change of one adds to its output."""

    def __init__(self, block: Any, x: Tensor):
        self.mixer: MambaMixer = block.mixer
        config = self.mixer.config
        with captured(input=self.mixer.in_proj, ssm=self.mixer.x_proj) as seen:
            block(x, context_of(x))
        self.z = seen["input_out"].chunk(2, dim=-1)[1]  # (B, L, E)
        self.u = seen["ssm_in"]
        dt, self.B, self.C = seen["ssm_out"].split([config.rank, config.d_state, config.d_state], dim=-1)
        self.dt = linear(dt, self.mixer.dt_proj.weight)  # (B, L, E), before bias and softplus
        self.A = -torch.exp(self.mixer.A_log.to(torch.promote_types(self.mixer.A_log.dtype, torch.float32)))

    def _scan(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, **options: Any) -> Any:
        options |= dict(dt_bias=self.mixer.dt_proj.bias, dt_softplus=True)
        return selective_scan(u, dt, self.A, B, C, **options)

    def states(self, positions: list[int]) -> Tensor:
        """States h_t after each of P positions, (B, P, E, N)."""
        stop = max(positions) + 1
        arguments = (t[:, :stop] for t in (self.u, self.dt, self.B, self.C))
        return self._scan(*arguments, states_at=positions)[-1]

    def added(self, delta: Tensor, at: Tensor, start: int) -> Tensor:
        """What replacing h_t by h_t + delta adds to the block's output.

        Args:
            delta: (c, B, E, N).
            at: (c, B) int64, the positions t.
            start: The token from which the result begins, at most the smallest t.

        Returns:
            (c, B, T, D), 0 before t.
        """
        c = len(delta)
        time = torch.arange(start, self.u.shape[1], device=at.device)
        early = (time < at[..., None]).flatten(0, 1)[..., None]  # (c * B, T, 1)
        frozen = (time <= at[..., None]).flatten(0, 1)[..., None]  # h_t has decayed by A_bar_t already
        dt, B, C, z = (_rows(t[:, start:], c) for t in (self.dt, self.B, self.C, self.z))
        y = self._scan(  # softplus(-1e4) = 0: such a step is the identity on the state
            torch.zeros_like(dt),
            dt.masked_fill(frozen, -1e4),
            B,
            C,
            initial_state=delta.flatten(0, 1),
        )
        y = y.masked_fill(early, 0) * F.silu(z)
        return self.mixer.out_proj(y).unflatten(0, (c, -1))


class Mamba2State:
    """As `MambaState`, for a Mamba-2 block; states are (H, P, N)."""

    def __init__(self, block: Any, x: Tensor):
        self.mixer: Mamba2Mixer = block.mixer
        config = self.mixer.config
        E, H, G, N = config.d_inner, config.n_head, config.ngroups, config.d_state
        with captured(input=self.mixer.in_proj, norm=self.mixer.norm) as seen:
            block(x, context_of(x))
        self.y = seen["norm_in"]  # (B, L, E), what the gated norm reads
        self.z, xBC, dt = seen["input_out"].split([E, E + 2 * G * N, H], dim=-1)
        conv = self.mixer.conv1d
        xBC = causal_conv1d(xBC, conv.weight.squeeze(1), conv.bias, activation="silu")
        u, B, C = xBC.split([E, G * N, G * N], dim=-1)
        wide = torch.promote_types(x.dtype, torch.float32)
        self.u, self.B, self.C = u.unflatten(-1, (H, -1)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
        self.dt = F.softplus(dt.to(wide) + self.mixer.dt_bias)  # (B, L, H)
        self.A = -torch.exp(self.mixer.A_log.to(wide))
        self.log_decay = (self.dt * self.A).double().cumsum(1)  # double: differences of long sums

    def states(self, positions: list[int]) -> Tensor:
        """States h_t after each of T positions, (B, T, H, P, N)."""
        found: dict[int, Tensor] = {}
        done, h = 0, None
        for stop in sorted(set(positions)):
            u, dt, B, C = (t[:, done : stop + 1] for t in (self.u, self.dt, self.B, self.C))
            size = self.mixer.config.chunk_size
            _, h = ssd(u, dt, self.A, B, C, initial_state=h, chunk_size=size, return_last_state=True)
            found[stop], done = h, stop + 1
        return torch.stack([found[t] for t in positions], dim=1)

    def added(self, delta: Tensor, at: Tensor, start: int) -> Tensor:
        """What replacing h_t by h_t + delta adds to the block's output.

        Args:
            delta: (c, B, H, P, N).
            at: (c, B) int64, the positions t.
            start: The token from which the result begins, at most the smallest t.

        Returns:
            (c, B, T, D), 0 before t.
        """
        H, G = self.u.shape[2], self.C.shape[2]
        time = torch.arange(start, self.u.shape[1], device=at.device)
        total = self.log_decay.gather(1, at.t()[..., None].expand(-1, -1, H)).transpose(0, 1)  # (c, B, H)
        decay = (self.log_decay[:, start:] - total[:, :, None]).to(delta.dtype)  # (c, B, T, H)
        decay = decay.masked_fill((time < at[..., None])[..., None], -torch.inf).exp()
        C = self.C[:, start:].repeat_interleave(H // G, dim=2)  # (B, T, H, N)
        y = torch.einsum("bthn,cbhpn->cbthp", C, delta) * decay[..., None]
        before, z = self.y[:, start:], self.z[:, start:]
        gate = F.silu(widen(z))
        change = self.mixer.norm(before + y.flatten(-2), gate) - self.mixer.norm(before, gate)
        return self.mixer.out_proj(change)


class LinearState:
    """As `MambaState`, for a block of a linear SSM, which never forgets; states are (E, N)."""

    def __init__(self, block: Any, x: Tensor):
        self.mixer: LinearSSMMixer = block.mixer
        with captured(ssm=self.mixer.x_proj) as seen:
            block(x, context_of(x))
        self.u = seen["ssm_in"]  # (B, L, E)
        self.B, self.C = seen["ssm_out"].chunk(2, dim=-1)

    def states(self, positions: list[int]) -> Tensor:
        """States h_t after each of P positions, (B, P, E, N)."""
        stop = max(positions) + 1
        u, B, C = (t[:, :stop] for t in (self.u, self.B, self.C))
        A = u.new_zeros(u.shape[-1], B.shape[-1])
        return selective_scan(u, torch.ones_like(u), A, B, C, states_at=positions)[-1]

    def added(self, delta: Tensor, at: Tensor, start: int) -> Tensor:
        """What replacing h_t by h_t + delta adds to the block's output.

        Args:
            delta: (c, B, E, N).
            at: (c, B) int64, the positions t.
            start: The token from which the result begins, at most the smallest t.

        Returns:
            (c, B, T, D), 0 before t.
        """
        early = torch.arange(start, self.u.shape[1], device=at.device) < at[..., None]
        y = torch.einsum("btn,cben->cbte", self.C[:, start:].to(delta.dtype), delta)
        return self.mixer.out_proj(y.masked_fill(early[..., None], 0).to(self.u.dtype))


class DeltaState:
    """As `MambaState`, for a block with a delta rule or linear attention; states are (H, P, N).

    What stands in the state decides what is erased of it, and the recurrence stays linear: a change of the
    state goes on as a state does into which nothing is written.
    """

    def __init__(self, block: Any, x: Tensor):
        self.block, self.mixer = block, block.mixer
        self.hidden = block.norm(x)
        self.inputs = self.mixer.inputs(self.hidden, context_of(x))
        self.y = delta_rule(*self.inputs, erase=self.mixer.erase)  # (B, L, H, P)
        self.middle = x + self.mixer.output(self.y, self.hidden)

    def states(self, positions: list[int]) -> Tensor:
        """States h_t after each of T positions, (B, T, H, P, N)."""
        stop = max(positions) + 1
        inputs: Any = (None if t is None else t[:, :stop] for t in self.inputs)
        return delta_rule(*inputs, erase=self.mixer.erase, states_at=positions)[-1]

    def added(self, delta: Tensor, at: Tensor, start: int) -> Tensor:
        """What replacing h_t by h_t + delta adds to the block's output.

        Args:
            delta: (c, B, H, P, N).
            at: (c, B) int64, the positions t.
            start: The token from which the result begins, at most the smallest t.

        Returns:
            (c, B, T, D), 0 before t.
        """
        c = len(delta)
        time = torch.arange(start, self.y.shape[1], device=at.device)
        early = (time < at[..., None]).flatten(0, 1)[..., None]  # (c * B, T, 1)
        frozen = (time <= at[..., None]).flatten(0, 1)[..., None]  # h_t has been through its token already
        q, k, v, beta, decay = (None if t is None else _rows(t[:, start:], c) for t in self.inputs)
        assert q is not None and k is not None and v is not None
        beta = None if beta is None else beta.masked_fill(frozen, 0)
        if decay is not None:
            decay = decay.masked_fill(frozen if decay.dim() == 3 else frozen.unsqueeze(-1), 0)
        y = delta_rule(
            q, k, torch.zeros_like(v), beta, decay, erase=self.mixer.erase, initial_state=delta.flatten(0, 1)
        )
        y = y.masked_fill(early[..., None], 0).unflatten(0, (c, -1))
        before, hidden = self.y[:, start:], self.hidden[:, start:]
        change = self.mixer.output(before + y, hidden) - self.mixer.output(before, hidden)
        return through_mlp(self.block, change, self.middle[:, start:])


def through_mlp(block: Any, change: Tensor, middle: Tensor) -> Tensor:
    """What a change of a mixer's output adds to its block's output, where an MLP may read the sum of both.

    Args:
        block: The block.
        change: (..., L, D).
        middle: (B, L, D), the residual stream that the MLP reads without the change.

    Returns:
        (..., L, D); the change itself if no MLP reads what the mixer adds.
    """
    norm: nn.Module
    if isinstance(block, SwiGLUBlock):
        norm = block.mlp_norm
    elif isinstance(block, TransformerBlock) and not block.parallel_residual:
        norm = block.post_attention_layernorm
    else:
        return change
    return change + block.mlp(norm(middle + change)) - block.mlp(norm(middle))


STATES: dict[type[nn.Module], Any] = {
    MambaMixer: MambaState,
    Mamba2Mixer: Mamba2State,
    LinearSSMMixer: LinearState,
    DeltaNetMixer: DeltaState,
    GatedDeltaNetMixer: DeltaState,
    KDAMixer: DeltaState,
    GLAMixer: DeltaState,
}


def ssm_state(block: Any, x: Tensor) -> Any:
    """The states of a block, by the class that `STATES` has for its mixer."""
    return STATES[type(block.mixer)](block, x)


class Heads:
    """One attention block running on x (B, L, D): its heads' outputs, and what a change of one adds."""

    def __init__(self, block: TransformerBlock, x: Tensor):
        self.block = block
        self.dense = block.attention.dense
        with captured(dense=self.dense) as seen:
            block(x, context_of(x))
        self.z = seen["dense_in"].unflatten(-1, (block.attention.config.n_head, -1))  # (B, L, H, P)
        self.middle = x + seen["dense_out"]

    def added(self, delta: Tensor, head: int, start: int) -> Tensor:
        """What adding delta to the output of one head adds to the block's output.

        Args:
            delta: (c, B, T, P).
            head: Number of the head.
            start: The token from which delta begins.

        Returns:
            (c, B, T, D).
        """
        width = delta.shape[-1]
        weight = self.dense.weight[:, head * width : (head + 1) * width].contiguous()  # else oneDNN is slow
        return through_mlp(self.block, linear(delta, weight), self.middle[:, start:])


def _rows(t: Tensor, c: int) -> Tensor:
    """(B, ...) -> (c * B, ...)."""
    return t.expand(c, *t.shape).flatten(0, 1)
