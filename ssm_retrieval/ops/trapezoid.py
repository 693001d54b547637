"""Linear attention whose writes come in two parts: the recurrence of Mamba-3 (arXiv 2603.15569, section 3.1).

    h_t = a_t (h_{t-1} + late_{t-1} v_{t-1} k_{t-1}^T) + now_t v_t k_t^T         h_t: (P, N) per head
    y_t = h_t q_t                                                                a_t = exp(log_decay_t)

The trapezoidal rule takes an integral from both ends of a step: with step sizes dt and weights lam in (0, 1),
now_t = lam_t dt_t and late_{t-1} = (1 - lam_t) dt_t. lam = 1 is Euler's rule, that of Mamba-2.

Both parts of a write have the same direction, so that what the next token finds,
g_t = h_t + late_t v_t k_t^T, is linear attention with one write a token. `delta_rule` runs it one token
behind, and what a token itself writes comes on top. Nothing that is read thus depends on a later token, not
even in its rounding:

    g_t = a_t g_{t-1} + (now_t + late_t) v_t k_t^T
    y_t = a_t g_{t-1} q_t + now_t (k_t . q_t) v_t
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssm_retrieval.ops._checks import check_flags, check_positions, check_shapes, check_tensor
from ssm_retrieval.ops._route import asked, refuse_tracing, without_autocast
from ssm_retrieval.ops.delta_rule import delta_rule


def trapezoid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    now: Tensor,
    late: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    states_at: Sequence[int] | Tensor | None = None,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Any:
    """Run the recurrence above over every sequence and head.

    Floating arguments are float32, bfloat16, float16 or float64; computed in float32 (float64 if v is
    float64), also under autocast.

    Args:
        q: What is read, (batch, length, heads, N); C of the paper.
        k: Where it is written, as q; B of the paper.
        v: What is written, (batch, length, heads, P); x of the paper.
        now: Weight of a token's write at its own step, (batch, length, heads).
        late: Weight with which the next step adds it again, as now. That of the last token has no effect.
        log_decay: Logarithm of the decay, at most 0, as now.
        initial_state: h before the first token, (batch, heads, P, N).
        states_at: Positions in [0, length), any order, the same for the whole batch.
        return_last_state: Whether to return h after the last token.
        backend: As in `delta_rule`.

    Returns:
        y (batch, length, heads, P) in v's dtype; with return_last_state also the last state (batch, heads, P,
        N); with states_at also h_t (batch, positions, heads, P, N); in this order as a tuple. States are
        float32 (float64 for float64 inputs). All are differentiable any number of times.

    Raises:
        ValueError: For wrong shapes, dtypes, devices, positions or backend.
        NotImplementedError: Under torch.jit.trace.
    """
    refuse_tracing("trapezoid")
    backend = asked(backend)
    check_flags(return_last_state=return_last_state)
    check_tensor("q", q, ("batch", "length", "heads", "d_state"))
    check_tensor("k", k, ("batch", "length", "heads", "d_state"))
    check_tensor("v", v, ("batch", "length", "heads", "headdim"))
    for name, x in (("now", now), ("late", late), ("log_decay", log_decay)):
        check_tensor(name, x, ("batch", "length", "heads"))
    heads, state = tuple(q.shape[:3]), (q.shape[0], q.shape[2], v.shape[3], q.shape[3])
    check_shapes(
        q, k=(k, tuple(q.shape)), v=(v, (*heads, v.shape[3])), now=(now, heads), late=(late, heads),
        log_decay=(log_decay, heads), initial_state=(initial_state, state),
    )  # fmt: skip
    positions = None if states_at is None else check_positions(states_at, q.shape[1])
    run: Any = _reference if backend == "reference" else partial(_by_delta_rule, backend=backend)
    length = q.shape[1]
    wanted = [*(positions or []), *([length - 1] if return_last_state and length else [])]
    with without_autocast(q.device.type):
        wide = torch.promote_types(v.dtype, torch.float32)
        given = [x.to(wide) for x in (q, k, v, now.unsqueeze(-1), late.unsqueeze(-1), log_decay)]
        y, states = run(*given, initial_state, wanted)
    more = []
    if return_last_state and length:
        more.append(states[:, -1])
    elif return_last_state:
        more.append(_start(initial_state, state, y))
    if positions is not None:
        more.append(states[:, : len(positions)])
    return (y.to(v.dtype), *more) if more else y.to(v.dtype)


def _start(h: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The first state, zeros if none is given, in the dtype of `like`."""
    return like.new_zeros(shape) if h is None else h.to(like.dtype)


def _by_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    now: Tensor,
    late: Tensor,
    log_decay: Tensor,
    h: Tensor | None,
    positions: list[int],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y, and the states at `positions`; now and late are (batch, length, heads, 1)."""
    before, states = delta_rule(  # g_{t-1} q_t, and g_{t-1}
        q, _behind(k), _behind((now + late) * v), log_decay=_behind(log_decay), erase=False,
        initial_state=h, states_at=positions, backend=backend,
    )  # fmt: skip
    decay, write = log_decay.exp().unsqueeze(-1), now * v
    y = decay * before + (k * q).sum(-1, keepdim=True) * write
    states = decay[:, positions, ..., None] * states + rank_one(write[:, positions], k[:, positions])
    return y, states


def _behind(x: Tensor) -> Tensor:
    """x_{t-1} in the place of x_t, and 0 in that of x_0. x: (batch, length, ...)."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def rank_one(v: Tensor, k: Tensor) -> Tensor:
    """v k^T over the last axes, (..., P) and (..., N) -> (..., P, N), in v's dtype."""
    return v.unsqueeze(-1) * k.to(v.dtype).unsqueeze(-2)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    now: Tensor,
    late: Tensor,
    log_decay: Tensor,
    h: Tensor | None,
    positions: list[int],
) -> tuple[Tensor, Tensor]:
    """As `_by_delta_rule`, by the equations as written, on any device."""
    h = _start(h, (q.shape[0], q.shape[2], v.shape[3], q.shape[3]), v)
    none, ys, found = h.unsqueeze(1)[:, :0], [], []
    for t in range(q.shape[1]):
        if t > 0:
            h = h + rank_one(late[:, t - 1] * v[:, t - 1], k[:, t - 1])
        h = log_decay[:, t].exp()[..., None, None] * h + rank_one(now[:, t] * v[:, t], k[:, t])
        ys.append((h * q[:, t].unsqueeze(-2)).sum(-1))
        found.append(h.unsqueeze(1))
    y = torch.stack(ys, dim=1) if ys else torch.zeros_like(v)
    return y, torch.cat([none, *(found[t] for t in positions)], dim=1)
