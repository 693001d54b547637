"""Mamba: linear-time sequence modelling with selective state spaces (Gu & Dao 2023, arXiv 2312.00752).

One block, per token t (letters as in `ssm_retrieval.models.common`, R = dt_rank):

    x, z   = in_proj(norm(residual_t))                      section 3.4, figure 3
    u      = silu(conv1d(x))                                causal, depthwise, d_conv taps
    r,B,C  = x_proj(u)                                      section 3.2: B, C, dt depend on the input
    dt     = softplus(dt_proj(r))
    h_t    = exp(dt A) h_{t-1} + dt B u_t                   equation 2a, discretised by equation 4
    y_t    = C h_t + D u_t                                  equation 2b, with a skip
    out    = out_proj(y_t * silu(z))

Parameter names are those of state-spaces/mamba; `backbone.embeddings.weight`, the spelling of
`transformers`, is accepted when loading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.models.architecture import TINY, Architecture
from ssm_retrieval.models.block_memory import every_block, mamba
from ssm_retrieval.models.common import (
    Block,
    Context,
    LanguageModel,
    LayerCache,
    init_normal,
    make_norm,
    respell,
)
from ssm_retrieval.models.configuration import Config, require
from ssm_retrieval.models.hooks import STATE_NAMES, Hook, Hooked, hooked_scan, masked_hook
from ssm_retrieval.models.padding import convolve
from ssm_retrieval.ops.linear import Linear, linear
from ssm_retrieval.ops.selective_scan import selective_scan


@dataclass(frozen=True)
class MambaConfig(Config):
    """Shape of a Mamba language model; the defaults are state-spaces/mamba-130m."""

    vocab_size: int = 50280
    d_model: int = 768
    n_layer: int = 24
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0  # 0 = ceil(d_model / 16)
    dt_min: float = 0.001  # range of softplus(dt bias) at initialisation
    dt_max: float = 0.1
    norm: str = "rms"  # or "layer", which the Mamba-VL checkpoints need
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = True
    embedding_std: float = 0.02
    scan_backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_dt(self.dt_min, self.dt_max)

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """Rank of the projection to dt."""
        return self.dt_rank or math.ceil(self.d_model / 16)


def require_dt(low: float, high: float) -> None:
    require(low <= high, f"dt_min={low} is above dt_max={high}; exchange them or change one")


@dataclass(frozen=True)
class SelectiveRecurrence:
    """The arguments of one `selective_scan` as a `models.hooks.Recurrence`: states (B, E, N), y (B, L, E)."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    backend: str

    @property
    def length(self) -> int:
        return self.u.shape[1]

    def scan(self, start: int, stop: int, h: Tensor | None, at: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        if at:
            return self._run(start, stop, h, at, True)
        y, last = self._run(start, stop, h, None, True)  # CUDA's kernel returns no states
        return y, last, last.new_empty(last.shape[0], 0, *last.shape[1:])

    def output(self, h: Tensor | None, return_last_state: bool) -> Any:
        """What the `selective_scan` of these arguments returns."""
        return self._run(0, self.length, h, None, return_last_state)

    def _run(self, start: int, stop: int, h: Tensor | None, at: list[int] | None, last: bool) -> Any:
        u, dt, B, C = (x[:, start:stop] for x in (self.u, self.dt, self.B, self.C))
        z = None if self.z is None else self.z[:, start:stop]
        bias, softplus = self.dt_bias, self.dt_softplus
        return selective_scan(u, dt, self.A, B, C, self.D, z, bias, softplus, h, at, last, self.backend)

    def delta(self, dt: Tensor) -> Tensor:
        """The step sizes that the scan makes of dt (B, ..., E)."""
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = dt.to(wide) if self.dt_bias is None else dt.to(wide) + self.dt_bias.to(wide)
        return F.softplus(dt) if self.dt_softplus else dt

    def decay(self, positions: list[int]) -> Tensor:
        return torch.exp(self.delta(self.dt[:, positions]).unsqueeze(-1) * self.A)  # (B, P, E, N)

    def step(self, t: int, h: Tensor | None, decay: Tensor) -> Tensor:
        write = (self.delta(self.dt[:, t]) * self.u[:, t]).unsqueeze(-1) * self.B[:, t, None]
        return write if h is None else decay * h + write

    def read(self, t: int, h: Tensor) -> Tensor:
        y = (h * self.C[:, t, None]).sum(-1) + self.D.to(h.dtype) * self.u[:, t]
        y = y if self.z is None else y * F.silu(self.z[:, t].to(h.dtype))
        return y.to(self.u.dtype).unsqueeze(1)


class MambaMixer(Hooked, nn.Module):
    """The selective state space layer: (B, L, D) -> (B, L, D)."""

    hook_axes: ClassVar = {
        "hook_in": "B L E",
        "hook_conv": "B L E",
        "hook_dt": "B L E",
        "hook_B": "B L N",
        "hook_C": "B L N",
        "hook_A_bar": "B L E N",
        "hook_ssm_state": "B L E N",
        "hook_ssm_readout": "B L E N",
        "hook_gate": "B L E",
        "hook_y": "B L E",
    }

    def __init__(self, config: MambaConfig):
        super().__init__()
        E, N, R = config.d_inner, config.d_state, config.rank
        self.config = config
        self.in_proj = Linear(config.d_model, 2 * E, bias=False)
        self.conv1d = nn.Conv1d(E, E, config.d_conv, groups=E, padding=config.d_conv - 1)
        self.x_proj = Linear(E, R + 2 * N, bias=False)
        self.dt_proj = Linear(R, E)
        self.A_log = nn.Parameter(torch.arange(1.0, N + 1).log().repeat(E, 1))  # S4D-real, section 3.6
        self.D = nn.Parameter(torch.ones(E))
        self.out_proj = Linear(E, config.d_model, bias=False)
        self._init_dt()

    def _init_dt(self) -> None:
        """softplus(dt bias) log-uniform in [dt_min, dt_max]; inverse softplus: x + log(1 - exp(-x))."""
        low, high = math.log(self.config.dt_min), math.log(self.config.dt_max)
        dt = torch.exp(torch.rand(self.config.d_inner) * (high - low) + low).clamp(min=1e-4)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        nn.init.uniform_(self.dt_proj.weight, -(self.config.rank**-0.5), self.config.rank**-0.5)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        order: Tensor | None = None,
    ) -> Tensor:
        """hidden: (B, L, D); mask: (B, L) bool, True = real token; cache: `conv` and `ssm` states; order: of
        `ssm_retrieval.models.padding`, whose rule the two masks below follow."""
        config = self.config
        x, z = self.in_proj(hidden).chunk(2, dim=-1)  # (B, L, E) each
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        if self.hook is not None:
            x = masked_hook(self.hook, "hook_in", x, mask)
        u = convolve(x, self.conv1d, mask, order, cache)  # (B, L, E)
        if self.hook is not None:
            u = self.hook("hook_conv", u)
        dt, Bt, Ct = self.x_proj(u).split([config.rank, config.d_state, config.d_state], dim=-1)
        dt = linear(dt, self.dt_proj.weight)  # (B, L, E); the scan adds the bias and softplus
        if mask is not None:  # softplus(-1e4) = 0
            dt = dt.masked_fill(~mask.unsqueeze(-1), -1e4)
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        h, bias = None if cache is None else cache.get("ssm"), self.dt_proj.bias
        if self.hook is not None:
            Bt, Ct = self.hook("hook_B", Bt), self.hook("hook_C", Ct)
            recurrence = SelectiveRecurrence(u, dt, A, Bt, Ct, self.D, z, bias, True, config.scan_backend)
            y = run_hooked(self.hook, recurrence, h, mask, cache is not None)
        else:
            y = selective_scan(
                u,
                dt,
                A,
                Bt,
                Ct,
                D=self.D,
                z=z,
                dt_bias=bias,
                dt_softplus=True,
                initial_state=h,
                return_last_state=cache is not None,
                backend=config.scan_backend,
            )
        if cache is not None:
            y, cache["ssm"] = y
        return self.out_proj(y)

    def hook_sizes(self) -> dict[str, int]:
        return {"E": self.config.d_inner, "N": self.config.d_state}


def run_hooked(
    hook: Hook,
    recurrence: SelectiveRecurrence,
    h: Tensor | None,
    mask: Tensor | None,
    return_last_state: bool,
) -> Any:
    """What `selective_scan` returns for these arguments, with the hooks from dt to y.

    dt and the gate are made beside the fused kernel and replace its own only where an edit changes them.
    y before the gate is not made inside it at all: for hook_y the gate is applied outside.
    """
    if hook.wants("hook_dt"):
        dt = recurrence.delta(recurrence.dt)
        new = masked_hook(hook, "hook_dt", dt, mask)
        if new is not dt:
            recurrence = replace(recurrence, dt=new, dt_bias=None, dt_softplus=False)
    gate = None
    if hook.wants("hook_gate") or hook.wants("hook_y"):
        z = cast(Tensor, recurrence.z)
        silu = F.silu(z.to(torch.promote_types(z.dtype, torch.float32)))
        gate = hook("hook_gate", silu)
        if gate is silu and not hook.wants("hook_y"):
            gate = None
        else:
            recurrence = replace(recurrence, z=None)
    last = None
    if any(hook.wants(name) for name in STATE_NAMES):
        y, last = hooked_scan(hook, recurrence, h)
    else:
        y = recurrence.output(h, return_last_state)
        if return_last_state:
            y, last = y
    if gate is not None:
        y = (hook("hook_y", y) * gate).to(y.dtype)
    return (y, last) if return_last_state else y


class MambaBlock(Hooked, nn.Module):
    """Norm -> mixer -> add. (state-spaces/mamba fuses this as add -> norm -> mixer; same function.)"""

    hook_axes: ClassVar = {
        "hook_resid_pre": "B L D",
        "hook_mixer_out": "B L D",
        "hook_resid_post": "B L D",
    }

    def __init__(self, config: Any, mixer: type[nn.Module] = MambaMixer):
        super().__init__()
        self.norm = make_norm(config.norm, config.d_model, config.norm_eps)
        self.mixer = mixer(config)

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        if self.hook is not None:
            x = self.hook("hook_resid_pre", x)
        out = self.mixer(self.norm(x), context.mask, cache, context.order)
        if self.hook is not None:
            out = self.hook("hook_mixer_out", out)
        x = x + out
        if self.hook is not None:
            x = self.hook("hook_resid_post", x)
        return x

    def hook_sizes(self) -> dict[str, int]:
        return {"D": cast(Any, self.mixer).config.d_model}

    def hook_children(self) -> dict[str, Hooked]:
        return {"mixer.": cast(Hooked, self.mixer)}


class MambaBackbone(nn.Module):
    def __init__(self, config: Any, mixer: type[nn.Module], dtype: torch.dtype | None = None):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model).to(dtype)
        blocks = (MambaBlock(config, mixer) for _ in range(config.n_layer))
        self.layers = nn.ModuleList(rescale_out_proj(block, config.n_layer).to(dtype) for block in blocks)
        self.norm_f = make_norm(config.norm, config.d_model, config.norm_eps).to(dtype)


class MambaForCausalLM(LanguageModel):
    """Mamba language model with a tied head (state_dict of state-spaces/mamba-*)."""

    mixer: type[nn.Module] = MambaMixer

    def __init__(self, config: Any, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.backbone = MambaBackbone(config, self.mixer, dtype)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False).to(dtype)
        init_normal(self.backbone.embedding.weight, std=config.embedding_std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        self.register_load_state_dict_pre_hook(respell)

    def accept_hub_spellings(self, named: dict[str, Any], prefix: str = "") -> None:
        """`transformers` says `embeddings`; both it and the originals may leave a tied head out."""
        ours = prefix + "backbone.embedding.weight"
        theirs = prefix + "backbone.embeddings.weight"
        if theirs in named:
            named[ours] = named.pop(theirs)
        if self.config.tie_word_embeddings and ours in named:
            named.setdefault(prefix + "lm_head.weight", named[ours])

    def parts(self) -> tuple[nn.Embedding, list[Block], nn.Module, nn.Linear]:
        backbone = self.backbone
        return backbone.embedding, cast(list[Block], list(backbone.layers)), backbone.norm_f, self.lm_head


def rescale_out_proj(block: nn.Module, n_layer: int) -> nn.Module:
    """Divide out_proj by sqrt(number of residual layers), as GPT-2 and state-spaces/mamba do."""
    with torch.no_grad():
        cast(Any, block).mixer.out_proj.weight.div_(math.sqrt(n_layer))
    return block


def state_size(config: MambaConfig, seq_len: int) -> int:
    """h and the convolution's window, whatever seq_len is."""
    return config.n_layer * config.d_inner * (config.d_state + config.d_conv - 1)


ARCHITECTURE = Architecture(
    name="mamba",
    label="Mamba",
    color="#de8f05",
    marker="M",
    config=MambaConfig,
    model=MambaForCausalLM,
    presets={
        "tiny": dict(TINY, n_layer=4),
        "130m": dict(d_model=768, n_layer=24),
        "150m": dict(d_model=1024, n_layer=24),
        "370m": dict(d_model=1024, n_layer=48),
        "790m": dict(d_model=1536, n_layer=48),
        "1.4b": dict(d_model=2048, n_layer=48),
        "2.8b": dict(d_model=2560, n_layer=64),
    },
    state_size=state_size,
    memory=every_block(mamba),
    hub="mamba",
)
