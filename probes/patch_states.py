"""The states of one block of each kind: what they are, and what a change of one adds to the block's output.

Every recurrence is linear in its state (dt, B and C depend on the layer's input alone), so with
D_t = h'_t - h_t a replaced state adds to the outputs

    y'_s - y_s = C_s . (A_bar_s ... A_bar_{t+1} D_t)       s >= t

which is a scan that starts from D_t and writes nothing. (Of a delta rule A_bar_s is the matrix F_s of
`probes.delta`.)

Letters as in `ssm_retrieval.models.common`; c = patches side by side, T = tokens from `start` on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.models.common import Context, widen
from ssm_retrieval.models.deltanet import DeltaNetMixer
from ssm_retrieval.models.gated_deltanet import GatedDeltaNetMixer
from ssm_retrieval.models.gla import GLAMixer
from ssm_retrieval.models.kda import KDAMixer
from ssm_retrieval.models.linear_ssm import LinearSSMMixer
from ssm_retrieval.models.mamba import MambaMixer
from ssm_retrieval.models.mamba2 import Mamba2Mixer
from ssm_retrieval.models.mamba3 import Mamba3Mixer
from ssm_retrieval.models.swiglu_block import SwiGLUBlock
from ssm_retrieval.models.transformer import TransformerBlock
from ssm_retrieval.ops.causal_conv1d import causal_conv1d
from ssm_retrieval.ops.delta_rule import delta_rule
from ssm_retrieval.ops.linear import linear
from ssm_retrieval.ops.selective_scan import selective_scan
from ssm_retrieval.ops.ssd import ssd
from ssm_retrieval.ops.trapezoid import trapezoid


def context_of(x: Tensor) -> Context:
    """The context in which a block runs on whole, unpadded sequences x (B, L, ...)."""
    return Context(positions=torch.arange(x.shape[1], device=x.device))


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


class BlockState:
    """One block running on x (B, L, D): its states, and what a change of one adds to its output."""

    def states(self, positions: list[int]) -> Tensor:
        """States h_t after each of P positions, (B, P, *state)."""
        raise NotImplementedError

    def added(self, delta: Tensor, at: Tensor, start: int) -> Tensor:
        """What replacing h_t by h_t + delta adds to the block's output.

        Args:
            delta: (c, B, *state).
            at: (c, B) int64, the positions t.
            start: The token from which the result begins, at most the smallest t.

        Returns:
            (c, B, T, D), 0 before t.
        """
        raise NotImplementedError


class MambaState(BlockState):
    """Of a Mamba block; states are (E, N)."""

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
        stop = max(positions) + 1
        arguments = (t[:, :stop] for t in (self.u, self.dt, self.B, self.C))
        return self._scan(*arguments, states_at=positions)[-1]

    def added(self, delta: Tensor, at: Tensor, start: int) -> Tensor:
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


class Mamba2State(BlockState):
    """Of a Mamba-2 block; states are (H, P, N)."""

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
        found: dict[int, Tensor] = {}
        done, h = 0, None
        for stop in sorted(set(positions)):
            u, dt, B, C = (t[:, done : stop + 1] for t in (self.u, self.dt, self.B, self.C))
            size = self.mixer.config.chunk_size
            _, h = ssd(u, dt, self.A, B, C, initial_state=h, chunk_size=size, return_last_state=True)
            found[stop], done = h, stop + 1
        return torch.stack([found[t] for t in positions], dim=1)

    def added(self, delta: Tensor, at: Tensor, start: int) -> Tensor:
        C = self.C.repeat_interleave(self.u.shape[2] // self.C.shape[2], dim=2)  # (B, L, H, N)
        y = fading(delta, at, start, C, self.log_decay)
        before, z = self.y[:, start:], self.z[:, start:]
        gate = F.silu(widen(z))
        change = self.mixer.norm(before + y.flatten(-2), gate) - self.mixer.norm(before, gate)
        return self.mixer.out_proj(change)


class LinearState(BlockState):
    """Of a block of a linear SSM, which never forgets; states are (E, N)."""

    def __init__(self, block: Any, x: Tensor):
        self.mixer: LinearSSMMixer = block.mixer
        with captured(ssm=self.mixer.x_proj) as seen:
            block(x, context_of(x))
        self.u = seen["ssm_in"]  # (B, L, E)
        self.B, self.C = seen["ssm_out"].chunk(2, dim=-1)

    def states(self, positions: list[int]) -> Tensor:
        stop = max(positions) + 1
        u, B, C = (t[:, :stop] for t in (self.u, self.B, self.C))
        A = u.new_zeros(u.shape[-1], B.shape[-1])
        return selective_scan(u, torch.ones_like(u), A, B, C, states_at=positions)[-1]

    def added(self, delta: Tensor, at: Tensor, start: int) -> Tensor:
        early = torch.arange(start, self.u.shape[1], device=at.device) < at[..., None]
        y = torch.einsum("btn,cben->cbte", self.C[:, start:].to(delta.dtype), delta)
        return self.mixer.out_proj(y.masked_fill(early[..., None], 0).to(self.u.dtype))


class DeltaState(BlockState):
    """Of a block with a delta rule or linear attention; states are (H, P, N).

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
        stop = max(positions) + 1
        inputs: Any = (None if t is None else t[:, :stop] for t in self.inputs)
        return delta_rule(*inputs, erase=self.mixer.erase, states_at=positions)[-1]

    def added(self, delta: Tensor, at: Tensor, start: int) -> Tensor:
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


class TrapezoidState(BlockState):
    """Of a Mamba-3 block; states are (H, P, N)."""

    def __init__(self, block: Any, x: Tensor):
        self.mixer: Mamba3Mixer = block.mixer
        self.z, rest = self.mixer.split(block.norm(x))
        *self.inputs, _ = self.mixer.inputs(rest, context_of(x))
        self.q, _, self.v, _, _, decay = self.inputs
        self.log_decay = decay.double().cumsum(1)  # double: differences of long sums

    def states(self, positions: list[int]) -> Tensor:
        stop = max(positions) + 1
        return trapezoid(*(t[:, :stop] for t in self.inputs), states_at=positions)[-1]

    def added(self, delta: Tensor, at: Tensor, start: int) -> Tensor:
        y = fading(delta, at, start, self.q, self.log_decay)
        return self.mixer.output(y.to(self.v.dtype), self.z[:, start:])


def fading(delta: Tensor, at: Tensor, start: int, q: Tensor, log_decay: Tensor) -> Tensor:
    """What is read of a change of a state that fades at one rate for each head, and of nothing else.

    Args:
        delta: (c, B, H, P, N), the change of h_t.
        at: (c, B) int64, the positions t.
        start: The token from which the result begins, at most the smallest t.
        q: (B, L, H, N), what each token reads with.
        log_decay: (B, L, H) float64, logarithms of the decays, summed from the first token on.

    Returns:
        (c, B, T, H, P), 0 before t.
    """
    H = q.shape[2]
    time = torch.arange(start, q.shape[1], device=at.device)
    total = log_decay.gather(1, at.t()[..., None].expand(-1, -1, H)).transpose(0, 1)  # (c, B, H)
    decay = (log_decay[:, start:] - total[:, :, None]).to(delta.dtype)  # (c, B, T, H)
    decay = decay.masked_fill((time < at[..., None])[..., None], -torch.inf).exp()
    y = torch.einsum("bthn,cbhpn->cbthp", q[:, start:].to(delta.dtype), delta)
    return y * decay[..., None]


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


STATES: dict[type[nn.Module], Callable[[Any, Tensor], BlockState]] = {
    MambaMixer: MambaState,
    Mamba2Mixer: Mamba2State,
    LinearSSMMixer: LinearState,
    DeltaNetMixer: DeltaState,
    GatedDeltaNetMixer: DeltaState,
    KDAMixer: DeltaState,
    GLAMixer: DeltaState,
    Mamba3Mixer: TrapezoidState,
}


def ssm_state(block: Any, x: Tensor) -> BlockState:
    """The states of a block, by the class that `STATES` has for its mixer."""
    return STATES[type(block.mixer)](block, x)


def _rows(t: Tensor, c: int) -> Tensor:
    """(B, ...) -> (c * B, ...)."""
    return t.expand(c, *t.shape).flatten(0, 1)
