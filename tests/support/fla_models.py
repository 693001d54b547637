"""Models of flash-linear-attention on a CPU: its own layers, with its reference functions for its kernels."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("fla.models", reason="needs flash-linear-attention and triton, which it imports")

import mamba3_equations
from fla import models as fla_models
from fla.layers import delta_net, gated_deltanet, gla, kda, mamba3
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution, mlp
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.kda.gate import naive_kda_gate
from fla.ops.kda.naive import naive_recurrent_kda
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# fla replaces classes of transformers, Mamba's among them, for the whole process: give them back
for name in [name for name in CONFIG_MAPPING._extra_content if name in CONFIG_MAPPING._mapping]:
    del CONFIG_MAPPING._extra_content[name]

UNFUSED = dict(fuse_norm=False, fuse_swiglu=False, fuse_cross_entropy=False)
PLAIN = dict(UNFUSED, num_hidden_layers=2, vocab_size=53)
CONFIGS = {
    "deltanet": lambda **more: fla_models.DeltaNetConfig(hidden_size=32, num_heads=2, **PLAIN, **more),
    "gated-deltanet": lambda **more: fla_models.GatedDeltaNetConfig(
        hidden_size=32, num_heads=3, head_dim=8, **PLAIN, **more
    ),
    "kda": lambda **more: fla_models.KDAConfig(hidden_size=32, num_heads=3, head_dim=8, **PLAIN, **more),
    "gla": lambda **more: fla_models.GLAConfig(hidden_size=32, num_heads=2, **PLAIN, **more),
    "mamba3": lambda **more: fla_models.Mamba3Config(
        hidden_size=32,
        head_dim=16,
        state_size=16,
        **{k: v for k, v in PLAIN.items() if k != "fuse_swiglu"},
        **more,
    ),
}
KINDS = {
    "deltanet": fla_models.DeltaNetForCausalLM,
    "gated-deltanet": fla_models.GatedDeltaNetForCausalLM,
    "kda": fla_models.KDAForCausalLM,
    "gla": fla_models.GLAForCausalLM,
    "mamba3": fla_models.Mamba3ForCausalLM,
}


def unit(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def convolved(x, weight, activation):
    taps = weight.shape[-1]
    y = F.conv1d(F.pad(x.transpose(1, 2), (taps - 1, 0)), weight.view(-1, 1, taps), groups=len(weight))
    return (F.silu(y) if activation else y).transpose(1, 2)


def gated(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval=False, **_):
    """What `chunk_gated_delta_rule` makes of its arguments in the layer, then fla's own reference."""
    g = -A_log.float().exp() * F.softplus(g.float() + dt_bias)
    beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    return naive_recurrent_gated_delta_rule(unit(q), unit(k), v, beta, g)


def plain(q, k, v, beta, **_):
    q, k, v, beta = (x.transpose(1, 2) for x in (unit(q), unit(k), v, beta))
    return delta_rule_recurrence(q, k, v, beta)[0].transpose(1, 2), None


def by_channel(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval=False, **_):
    """As `gated`, for Kimi delta attention."""
    beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    return naive_recurrent_kda(unit(q), unit(k), v, naive_kda_gate(g, A_log, dt_bias), beta)


def fading(q, k, v, gk=None, g=None, **_):
    return naive_recurrent_gla(q, k, v, g if gk is None else gk)


def normed(self, x, residual=None, prenorm=False):
    """RMSNorm; `prenorm` also returns the stream to which the next layer adds."""
    x = x if residual is None else x + residual
    y = F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
    return (y, x) if prenorm else y


def opened(self, x, g, *_):
    return normed(self, x) * (g.sigmoid() if self.activation == "sigmoid" else F.silu(g))


def on_any_device(self, hidden_states, **_):
    return self.cuda_kernels_forward(hidden_states)[0], None, None


def without_kernels(patch: pytest.MonkeyPatch) -> None:
    """Replace what needs a GPU by what fla, or torch, computes on any device."""
    for name in ("chunk", "fused_recurrent"):
        patch.setattr(gated_deltanet, f"{name}_gated_delta_rule", gated)
        patch.setattr(delta_net, f"{name}_delta_rule", plain)
        patch.setattr(kda, f"{name}_kda", by_channel)
        patch.setattr(gla, f"{name}_gla", fading)
    patch.setattr(
        gated_deltanet,
        "causal_conv1d",
        lambda x, weight, activation, **_: (convolved(x, weight, activation), None),
    )
    patch.setattr(
        ShortConvolution, "forward", lambda self, x, **_: (convolved(x, self.weight, self.activation), None)
    )
    if mamba3.mamba3_siso_combined is None:  # mamba_ssm's kernel; there where an interpreter runs it
        patch.setattr(mamba3, "mamba3_siso_combined", mamba3_equations.mamba3)
    patch.setattr(mamba3.Mamba3, "forward", on_any_device)
    patch.setattr(mamba3.RMSNormGated, "forward", normed)
    patch.setitem(gla.ACT2FN, "swish", F.silu)
    patch.setattr(RMSNorm, "forward", normed)
    patch.setattr(FusedRMSNormGated, "forward", opened)
    patch.setattr(mlp, "swiglu", lambda gate, y: F.silu(gate) * y)


def make(family: str, **options):
    """A model of fla whose weights are away from special values, in evaluation mode."""
    config = CONFIGS[family](**options)
    torch.manual_seed(0)
    model = KINDS[family](config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()
