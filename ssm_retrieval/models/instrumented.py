"""What a forward pass does while a probe is active: the quantities that the fast path never makes.

Four functions replace a fused operator, with its arguments and results, and `attention` follows one. Each
asks the hook (`ssm_retrieval.models.hooks`) what it wants:

    selective_scan   Mamba, linear SSM: hook_dt, hook_gate, hook_y and the three state names
    ssd              Mamba-2: the three state names
    delta_rule       DeltaNet and its kin: the three state names
    trapezoid        Mamba-3: the three state names
    attention        Transformer: hook_attn_scores, hook_pattern

What nobody edits comes from the fast path, bit for bit; what is only recorded is computed beside it, at the
recorded positions. `hooked_scan` runs a `recurrences.Recurrence` and exposes its states.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssm_retrieval.models.hooks import Hook
from ssm_retrieval.models.padding import attention_mask
from ssm_retrieval.models.recurrences import (
    DeltaRecurrence,
    DualRecurrence,
    Recurrence,
    SelectiveRecurrence,
    TrapezoidRecurrence,
)
from ssm_retrieval.ops.delta_rule import delta_rule as fused_delta_rule
from ssm_retrieval.ops.ssd import ssd as fused_ssd
from ssm_retrieval.ops.trapezoid import trapezoid as fused_trapezoid

STATE_NAMES = ("hook_A_bar", "hook_ssm_state", "hook_ssm_readout")


def selective_scan(hook: Hook, mask: Tensor | None, *arguments: Any, **options: Any) -> Any:
    """`ops.selective_scan.selective_scan` with the hooks between dt and y.

    dt and the gate are computed beside the kernel and replace the kernel's own only where an edit changes
    them. The kernel never has y before the gate, so for hook_y the gate is applied outside.

    Args:
        hook: The active probes.
        mask: (B, L) bool, True = real token; an edited dt is 0 at the others.
        *arguments: Those of the operator.
        **options: Those of the operator, `initial_state` and `return_last_state` among them.

    Returns:
        As the operator.
    """
    h, last_wanted = options.pop("initial_state"), options.pop("return_last_state")
    recurrence = SelectiveRecurrence(*arguments, **options)
    if hook.wants("hook_dt"):
        dt = recurrence.delta(recurrence.dt)
        new = hook("hook_dt", dt)
        if new is not dt:
            new = new if mask is None else new * mask.unsqueeze(-1)
            recurrence = replace(recurrence, dt=new, dt_bias=None, dt_softplus=False)
    gate, z = None, recurrence.z
    if z is not None and (hook.wants("hook_gate") or hook.wants("hook_y")):
        silu = F.silu(z.to(torch.promote_types(z.dtype, torch.float32)))
        gate = hook("hook_gate", silu)
        if gate is silu and not hook.wants("hook_y"):
            gate = None
        else:
            recurrence = replace(recurrence, z=None)
    if any(hook.wants(name) for name in STATE_NAMES):
        y, last = hooked_scan(hook, recurrence, h)
    elif last_wanted:
        y, last = recurrence.output(h, True)
    else:
        y = recurrence.output(h, False)
    if gate is not None:
        y = (hook("hook_y", y) * gate).to(y.dtype)
    return (y, last) if last_wanted else y


def ssd(hook: Hook, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> Any:
    """`ops.ssd.ssd` with the three state names.

    Args:
        hook: The active probes.
        x: (B, L, H, P), as in the operator.
        dt: (B, L, H).
        A: (H,).
        B: (B, L, G, N).
        C: As B.
        **options: Those of the operator, `initial_state` and `return_last_state` among them.

    Returns:
        As the operator.
    """
    return _hooked(hook, fused_ssd, DualRecurrence, x, dt, A, B, C, **options)


def delta_rule(hook: Hook, *arguments: Any, **options: Any) -> Any:
    """`ops.delta_rule.delta_rule` with the three state names.

    Args:
        hook: The active probes.
        *arguments: Those of the operator: q, k, v, beta, log_decay.
        **options: Those of the operator, `initial_state` and `return_last_state` among them.

    Returns:
        As the operator.
    """
    return _hooked(hook, fused_delta_rule, DeltaRecurrence, *arguments, **options)


def trapezoid(hook: Hook, *arguments: Any, **options: Any) -> Any:
    """`ops.trapezoid.trapezoid` with the three state names.

    Args:
        hook: The active probes.
        *arguments: Those of the operator: q, k, v, now, late, log_decay.
        **options: Those of the operator, `initial_state` and `return_last_state` among them.

    Returns:
        As the operator.
    """
    return _hooked(hook, fused_trapezoid, TrapezoidRecurrence, *arguments, **options)


def _hooked(hook: Hook, operator: Any, recurrence: Any, *arguments: Any, **options: Any) -> Any:
    """An operator, or its recurrence if a probe wants the states."""
    if not any(hook.wants(name) for name in STATE_NAMES):
        return operator(*arguments, **options)
    h, last_wanted = options.pop("initial_state"), options.pop("return_last_state")
    y, last = hooked_scan(hook, recurrence(*arguments, **options), h)
    return (y, last) if last_wanted else y


def attention(
    hook: Hook, y: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, window: int = 0
) -> Tensor:
    """The output of the fused kernel, or of an edited pattern.

    Scores are scaled, and -inf where masked, as in TransformerLens. What is only recorded is computed for the
    recorded queries alone.

    Args:
        hook: The active probes.
        y: (B, H, L, P), the fused kernel's output.
        q: (B, H, L, P).
        k: (B, H, S, P).
        v: As k.
        key_mask: (B, S) bool, True = real token.
        window: How many real tokens a query may attend to; 0 = all.

    Returns:
        (B, H, L, P); y itself if nothing changed.
    """
    L, S = q.shape[2], k.shape[2]
    names = ("hook_attn_scores", "hook_pattern")
    edited = any(hook.edits(name) for name in names)
    rows = list(range(L)) if edited else sorted({t for name in names for t in hook.records(name)})
    if not rows:
        return y
    allowed = attention_mask(L, key_mask, S, q.device, window)[:, :, rows]
    plain = (q[:, :, rows] @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    scores = hook.edit("hook_attn_scores", plain, rows)
    hook.record("hook_attn_scores", scores, rows)
    weights = scores.softmax(dim=-1)
    pattern = hook.edit("hook_pattern", weights, rows)
    hook.record("hook_pattern", pattern, rows)
    return y if scores is plain and pattern is weights else pattern.to(q.dtype) @ v


def hooked_scan(hook: Hook, recurrence: Recurrence, h: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run a recurrence with the three names of `STATE_NAMES`.

    hook_A_bar edits the decay of a step. hook_ssm_state edits h_t, from which the recurrence continues.
    hook_ssm_readout edits the h_t that C_t reads, and nothing after it. An edit sees (B, 1, ...), one
    position after the other. The fast path runs over the whole sequence first; if no edit changes anything,
    its output stands, bit for bit. From the first change on, it runs between the edited positions.

    Args:
        hook: The active probes.
        recurrence: The recurrence.
        h: The state before the first token, (B, *state); None is zeros.

    Returns:
        y (B, L, *out) and the last state.
    """
    L = recurrence.length
    decays = _edited_decays(hook, recurrence)
    stops = sorted({*decays, *hook.edits("hook_ssm_state"), *hook.edits("hook_ssm_readout")})
    records = sorted({*hook.records("hook_ssm_state"), *hook.records("hook_ssm_readout")})
    if not stops:
        y, last, seen = recurrence.scan(0, L, h, records)
        _record(hook, seen, seen, records)
        return y, last
    begin, pieces = 0, []
    states: dict[int, Tensor] = {}  # h_t as it is kept, and below as it is read, where it is recorded
    reads: dict[int, Tensor] = {}
    if not decays:
        y, last, seen = recurrence.scan(0, L, h, records + stops)
        states.update(zip(records, seen.unbind(1), strict=False))
        reads.update(states)
        for t, h_t in zip(stops, seen[:, len(records) :].unbind(1), strict=True):
            state, read = _edited(hook, h_t, t)
            if state is not h_t or read is not h_t:
                pieces, begin, h = [y[:, :t], recurrence.read(t, read)], t + 1, state
                states[t], reads[t] = state, read
                break
        else:
            _record_each(hook, states, reads, records)
            return y, last
        del seen
    wanted = set(records)
    for t in [*(stop for stop in stops if stop >= begin), L]:
        if t > begin:
            inside = [r for r in records if begin <= r < t]
            y, h, seen = recurrence.scan(begin, t, h, [r - begin for r in inside])
            pieces.append(y)
            states.update(zip(inside, seen.unbind(1), strict=True))
            reads.update(zip(inside, seen.unbind(1), strict=True))
        if t < L:
            decay = decays[t] if t in decays else recurrence.decay([t])[:, 0]
            state, read = _edited(hook, recurrence.step(t, h, decay), t)
            pieces.append(recurrence.read(t, read))
            begin, h = t + 1, state
            if t in wanted:
                states[t], reads[t] = state, read
    _record_each(hook, states, reads, records)
    assert h is not None
    return torch.cat(pieces, dim=1), h


def _edited_decays(hook: Hook, recurrence: Recurrence) -> dict[int, Tensor]:
    """A_bar (B, ...) at the positions where an edit changes it; records A_bar with the edits in it."""
    changed = {}
    for t in hook.edits("hook_A_bar"):
        decay = recurrence.decay([t])
        new = hook.edit("hook_A_bar", decay, [t])
        if new is not decay:
            changed[t] = new[:, 0]
    records = hook.records("hook_A_bar")
    if records:
        decay = recurrence.decay(records)
        replaced = [t for t in records if t in changed]
        if replaced:
            index = torch.tensor([records.index(t) for t in replaced], device=decay.device)
            decay = decay.index_copy(1, index, torch.stack([changed[t] for t in replaced], dim=1))
        hook.record("hook_A_bar", decay, records)
    return changed


def _edited(hook: Hook, h: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """h_t (B, *state) as it is kept and as C_t reads it; h itself where nothing changed."""
    state, x = h, h.unsqueeze(1)
    new = hook.edit("hook_ssm_state", x, [t])
    if new is not x:
        state, x = new[:, 0], new
    read = hook.edit("hook_ssm_readout", x, [t])
    return state, state if read is x else read[:, 0]


def _record(hook: Hook, states: Tensor, reads: Tensor, records: list[int]) -> None:
    if records:
        hook.record("hook_ssm_state", states, records)
        hook.record("hook_ssm_readout", reads, records)


def _record_each(hook: Hook, states: dict[int, Tensor], reads: dict[int, Tensor], records: list[int]) -> None:
    if records:
        kept, read = (torch.stack([x[t] for t in records], dim=1) for x in (states, reads))
        _record(hook, kept, read, records)
