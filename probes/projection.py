"""What a state would answer by itself: its projection onto pairs of the vocabulary, asked and answered token.

The output of a state space layer is linear in its state. If token q comes next, the layer reads from the
state h

    y_q = (A_bar_q h) C_q

beside what q itself writes and its skip D. Through the layer's gate and output projection, the model's last
norm and its head this becomes a row of logits

    head(norm(out_proj(gate_q y_q)))

which leaves out every other path: the residual stream, MLPs, other layers, the question itself. In a layer
with a delta rule the question erases before it reads, so y_q = (h F_q) q (`probes.delta`). In Mamba-3
h has both parts of the last write, although the second comes with the question's token. The rows of all
questions are the projection of "On the Recall Scaling Laws in Mamba" (arXiv 2609.07681, figure 3). C_q is
what the layer computes after what it has read, so the convolution's window counts.

In a linear SSM of one block nothing else reads the state: there the projection is the model's own logits less
those that the question gives to itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probes.cache import record
from probes.patch_sites import has_site
from probes.readout import BUDGET, WIDE, fork
from probes.scan import layers_with
from ssm_retrieval.models.common import Cache, LanguageModel
from ssm_retrieval.ops.trapezoid import rank_one

READ = ("hook_C", "hook_q", "hook_k", "hook_beta", "hook_before", "hook_A_bar", "hook_gate")


def state_blocks(model: LanguageModel) -> list[int]:
    """Indices of the blocks whose state can be projected; blocks with branches in parallel are none."""
    return [i for i in layers_with(model, "mixer.hook_ssm_state") if has_site(model.blocks[i], "state")]


@torch.no_grad()
def project(model: LanguageModel, cache: Cache, tokens: Tensor) -> dict[int, Tensor]:
    """What each state would answer by itself to one token that comes next.

    Args:
        model: The model.
        cache: What it remembers of R sequences; left as it is.
        tokens: (R,) int64, the question to each.

    Returns:
        Block to its logits, (R, V).
    """
    blocks = state_blocks(model)
    there = set(model.hook_names())
    names = [f"blocks.{i}.mixer.{name}" for i in blocks for name in READ]
    with record(model, [name for name in names if name in there]) as seen:
        model.step(tokens, fork(cache, torch.arange(len(tokens), device=tokens.device)))
    found = {}
    for i in blocks:
        read = {name: seen[at][:, 0] for name in READ if (at := f"blocks.{i}.mixer.{name}") in there}
        block: Any = model.blocks[i]
        layer = cache.layers[i]
        h = layer["ssm"]
        if (before := read.pop("hook_before", None)) is not None:  # the second part of the last write
            h = h + rank_one(before.unsqueeze(-1) * layer["last_v"], layer["last_k"])
        output = _delta_output if "hook_q" in read else _output
        found[i] = model.head(model.norm(output(block.mixer, h, **read)))
    return found


def _output(
    mixer: Any, h: Tensor, *, hook_C: Tensor, hook_A_bar: Tensor, hook_gate: Tensor | None = None
) -> Tensor:
    """(R, D): what the mixer would put out if it read nothing but h, (R, E, N) or of Mamba-2 (R, H, P, N)."""
    if h.dim() == 4:
        C = hook_C.repeat_interleave(h.shape[1] // hook_C.shape[1], dim=1)  # groups to heads
        y = torch.einsum("rhpn,rhn,rh->rhp", h, C.to(h.dtype), hook_A_bar.to(h.dtype))
        assert hook_gate is not None
        y = mixer.norm(y.flatten(1), hook_gate.flatten(1))
    else:
        y = torch.einsum("ren,rn,ren->re", h, hook_C.to(h.dtype), hook_A_bar.to(h.dtype))
        y = y if hook_gate is None else y * hook_gate
    return mixer.out_proj(y.to(mixer.out_proj.weight.dtype))


def _delta_output(
    mixer: Any,
    h: Tensor,
    *,
    hook_q: Tensor,
    hook_k: Tensor,
    hook_beta: Tensor | None = None,
    hook_A_bar: Tensor | None = None,
    hook_gate: Tensor | None = None,
) -> Tensor:
    """(R, D): the same with a delta rule, whose question erases of h (R, H, P, N) what its key holds."""
    if hook_A_bar is not None:
        decay = hook_A_bar[..., None, None] if hook_A_bar.dim() == 2 else hook_A_bar.unsqueeze(-2)
        h = h * decay.to(h.dtype)
    if hook_beta is not None:
        k = hook_k.unsqueeze(-2).to(h.dtype)
        h = h - hook_beta[..., None, None].to(h.dtype) * (h * k).sum(-1, keepdim=True) * k
    y = torch.einsum("rhpn,rhn->rhp", h, hook_q.to(h.dtype))
    y = mixer.o_norm(y) if hasattr(mixer, "o_norm") else y  # Mamba-3 has none
    y = y if hook_gate is None else y * hook_gate
    return mixer.out_proj(y.flatten(1).to(mixer.out_proj.weight.dtype))


@torch.no_grad()
def state_answers(
    model: LanguageModel, cache: Cache, questions: Tensor, budget: int = BUDGET
) -> dict[int, Tensor]:
    """The likeliest answer of each state by itself to questions of one token, none of which sees another.

    Args:
        model: The model.
        cache: What it remembers of B sequences; left as it is.
        questions: (B, Q) int64.
        budget: Bytes that may be used at once, about.

    Returns:
        Block to (B, Q) int64.
    """
    B, Q = questions.shape
    config, blocks = model.config, state_blocks(model)
    if not blocks:
        return {}
    logits = (len(blocks) + 2) * config.vocab_size
    each = 4 * (4 * cache.num_elements() // B + logits + WIDE * config.d_model)
    size = max(1, budget // each)
    owner = torch.arange(B, device=questions.device).repeat_interleave(Q)
    found: dict[int, list[Tensor]] = {i: [] for i in blocks}
    for tokens, rows in zip(questions.flatten().split(size), owner.split(size), strict=True):
        for i, answer in project(model, fork(cache, rows), tokens).items():
            found[i].append(answer.argmax(-1))
    return {i: torch.cat(parts).view(B, Q) for i, parts in found.items()}
