"""Small models of every architecture, and their recurrence written out, for the tests of hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import probes
from ssm_retrieval import models
from ssm_retrieval.models import LanguageModel

Edits = Mapping[int, Callable[[Tensor], Tensor]]

FAMILIES = {
    "transformer": ("transformer-tiny", dict(n_head=2)),
    "transformer-sequential": (
        "transformer-tiny",
        dict(n_head=2, parallel_residual=False, position="learned"),
    ),
    "mamba": ("mamba-tiny", dict(d_state=5)),
    "mamba2": ("mamba2-tiny", dict(d_state=6, ngroups=2, headdim=8, chunk_size=4)),
    "mamba3": ("mamba3-tiny", dict(d_state=6, headdim=8, ngroups=2)),
    "hybrid-mamba": ("hybrid-tiny", dict(n_head=2)),
    "hybrid-parallel": ("hybrid-tiny", dict(n_head=2, pattern="M+A A+M M")),
    "hybrid-mamba2": ("hybrid-tiny", dict(n_head=2, pattern="M2 M2 A", headdim=8)),
    "linear": ("linear-tiny", dict(n_layer=2, d_state=5)),
    "deltanet": ("deltanet-tiny", dict(d_state=6, headdim=8, d_mlp=24)),
    "gated-deltanet": ("gated-deltanet-tiny", dict(d_state=6, headdim=8, d_mlp=24)),
    "kda": ("kda-tiny", dict(d_state=6, headdim=8, d_mlp=24)),
    "gla": ("gla-tiny", dict(d_state=6, headdim=8, d_mlp=24)),
}
SSM, ATTENTION = ("mamba", "mamba2", "linear"), ("transformer", "transformer-sequential")
STATES = (*SSM, "mamba3", "gated-deltanet", "kda", "gla")  # with a decay and a state
VOCAB, B, L = 23, 2, 13
IDS = torch.randint(0, VOCAB, (B, L), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(0, VOCAB, (B, L), generator=torch.Generator().manual_seed(1))
# the one name whose use takes part of the computation out of a fused kernel
ROUNDED = "mixer.hook_y"


def build(family: str, dtype: torch.dtype = torch.float64, **more: Any) -> LanguageModel:
    """A small model with weights far from their initial symmetry.

    Args:
        family: A key of `FAMILIES`.
        dtype: Of the weights.
        **more: Fields of the config.

    Returns:
        The model, in evaluation mode.
    """
    name, options = FAMILIES[family]
    model = models.build(name, vocab_size=VOCAB, d_model=16, **{**options, **more}).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model.eval()


def recorded(
    model: LanguageModel, names: str | Sequence[str] = "*", ids: Tensor = IDS, **options: Any
) -> tuple[probes.Recording, Tensor]:
    """Record one pass.

    Args:
        model: The model.
        names: Names or patterns.
        ids: (B, L) token ids.
        **options: Of the call (attention_mask, seq_ids, cache) and of `probes.record`.

    Returns:
        Name to tensor, and the logits.
    """
    call = {k: options.pop(k) for k in ("attention_mask", "seq_ids", "cache") if k in options}
    with torch.no_grad(), probes.record(model, names, **options) as cache:
        logits = model(ids, **call)
    return cache, logits


def recurrence(
    model: Any,
    i: int,
    t: Mapping[str, Tensor],
    h0: Tensor | None = None,
    edit_state: Edits | None = None,
    edit_read: Edits | None = None,
    edit_decay: Edits | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer's recurrence token by token, from recorded tensors.

    Args:
        model: The model.
        i: Index of the layer.
        t: Name to recorded tensor: dt, B, C and u; of layers with keys q, k, v, beta and A_bar.
        h0: State before the first token. None: zero.
        edit_state: Position to a function of h_t, carried on.
        edit_read: Position to a function of h_t as it is read.
        edit_decay: Position to a function of the decay.

    Returns:
        h_t (B, L, E, N), of Mamba-2 (B, L, H, P, N), and y_t.
    """
    mixer, at = model.blocks[i].mixer, f"blocks.{i}.mixer.hook_"
    if at + "k" in t:
        D = getattr(mixer, "D", None)
        return delta_recurrence(t, at, h0, edit_state or {}, edit_read or {}, edit_decay or {}, D)
    u, dt, Bt, Ct = (t[at + name] for name in ("conv", "dt", "B", "C"))
    A, D = -mixer.A_log.exp(), mixer.D
    if u.dim() == 4:  # Mamba-2: one A, dt and D per head, one B and C per group
        Bt, Ct = (x.repeat_interleave(u.shape[2] // x.shape[2], dim=2) for x in (Bt, Ct))
    h, states, ys = 0.0 if h0 is None else h0, [], []
    for s in range(u.shape[1]):
        if u.dim() == 4:
            decay = torch.exp(torch.einsum("bh,h->bh", dt[:, s], A))
            write = torch.einsum("bh,bhp,bhn->bhpn", dt[:, s], u[:, s], Bt[:, s])
        else:
            decay = torch.exp(torch.einsum("be,en->ben", dt[:, s], A))
            write = torch.einsum("be,be,bn->ben", dt[:, s], u[:, s], Bt[:, s])
        decay = (edit_decay or {}).get(s, lambda x: x)(decay)
        h = (decay[..., None, None] if u.dim() == 4 else decay) * h + write
        h = (edit_state or {}).get(s, lambda x: x)(h)
        read = (edit_read or {}).get(s, lambda x: x)(h)
        if u.dim() == 4:
            y = torch.einsum("bhpn,bhn->bhp", read, Ct[:, s]) + D[:, None] * u[:, s]
        else:
            y = torch.einsum("ben,bn->be", read, Ct[:, s]) + D * u[:, s]
        states.append(h)
        ys.append(y)
    return torch.stack(states, 1), torch.stack(ys, 1)


def delta_recurrence(
    t: Mapping[str, Tensor],
    at: str,
    h0: Tensor | None,
    edit_state: Edits,
    edit_read: Edits,
    edit_decay: Edits,
    D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`recurrence` of a layer with keys: h <- h a (1 - beta k k^T) + beta v k^T; without beta h a + v k^T.

    Of Mamba-3 h <- (h + before v_{t-1} k_{t-1}^T) a + now v k^T.
    """
    q, k, v, a = (t[at + name] for name in ("q", "k", "v", "A_bar"))
    now, before = t.get(at + "now"), t.get(at + "before")
    erase, beta = at + "beta" in t, t.get(at + "beta", torch.ones_like(v[..., 0]))
    h = 0.0 if h0 is None else h0
    states, ys = [], []
    for s in range(q.shape[1]):
        decay = edit_decay.get(s, lambda x: x)(a[:, s])
        decay = decay[..., None, None] if a.dim() == 3 else decay.unsqueeze(-2)  # of the head, or a channel
        outer = torch.einsum("bhm,bhn->bhmn", k[:, s], k[:, s])
        keep = torch.eye(k.shape[-1], dtype=k.dtype) - erase * beta[:, s, :, None, None] * outer
        write = torch.einsum("bh,bhp,bhn->bhpn", beta[:, s], v[:, s], k[:, s])
        if now is not None and before is not None:
            write = now[:, s, :, None, None] * write
            last = torch.einsum("bhp,bhn->bhpn", v[:, s - 1], k[:, s - 1]) if s else 0.0
            write = write + decay * before[:, s, :, None, None] * last
        h = (decay * h if isinstance(h, float) else decay * h @ keep) + write
        h = edit_state.get(s, lambda x: x)(h)
        states.append(h)
        read = torch.einsum("bhpn,bhn->bhp", edit_read.get(s, lambda x: x)(h), q[:, s])
        ys.append(read if D is None else read + D[:, None] * v[:, s])
    return torch.stack(states, 1), torch.stack(ys, 1)


def halve(x):
    """Every other element halved, in place: no norm, softmax or mask is blind to that."""
    x[..., ::2] *= 0.5
    return x
