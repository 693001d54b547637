"""Mamba-3 against the paper's equations, its authors' kernels, fla's model and an independent port."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mamba3_equations import mamba3
from safetensors.torch import load_file
from torch.nn import functional as F

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.mamba3 import Mamba3Mixer, accumulate, rotate
from ssm_retrieval.ops.trapezoid import trapezoid

HERE = Path(__file__).parents[1] / "support"


def ours(Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z):
    """The kernel's function from our parts."""
    H = V.shape[2]
    dt, lam, decay = (x.transpose(1, 2) for x in (DT, torch.sigmoid(Trap), ADT))
    phase = accumulate(dt.unsqueeze(-1) * math.pi * torch.tanh(Angles), None)
    q, k = (
        rotate(x.repeat_interleave(H // x.shape[2], 2) + y, phase.cos(), phase.sin())
        for x, y in ((Q, Q_bias), (K, K_bias))
    )
    late = F.pad(((1 - lam) * dt)[:, 1:], (0, 0, 0, 1))
    return (trapezoid(q, k, V, lam * dt, late, decay) + D[:, None] * V) * F.silu(Z)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """What the authors' kernels make in Triton's interpreter (`tests/support/mamba3_kernels.py`)."""
    for package in ("triton", "fla", "mamba_ssm", "einops"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    folder = tmp_path_factory.mktemp("mamba3")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-O", str(HERE / "mamba3_kernels.py"), str(folder)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def close(got, want, tolerance=2e-6):
    """Equal but for a share of the largest number."""
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("rule", [ours, mamba3])
def test_equals_the_authors_kernels(official, rule):
    """Forward and backward; the equations too, so that each checks the other."""
    saved = load_file(official / "kernel.safetensors")
    names = [name.removeprefix("grad.") for name in saved if name.startswith("grad.")]
    given = {name: saved[name].requires_grad_() for name in names}
    y = rule(**given)
    close(y, saved["y"])
    grads = torch.autograd.grad((y * saved["weights"]).sum(), [given[name] for name in names])
    for name, grad in zip(names, grads, strict=True):
        close(grad, saved[f"grad.{name}"])


def test_equals_flas_model_on_the_authors_kernels(official):
    model, saved = models.load(official / "fla"), load_file(official / "fla" / "results.safetensors")
    logits = model(saved["ids"])
    close(logits, saved["logits"], 1e-5)
    logits.sin().sum().backward()
    grads = {name.replace("embedding.", "embeddings."): p.grad for name, p in model.named_parameters()}
    assert grads.keys() == saved.keys() - {"ids", "logits"}
    for name, grad in grads.items():
        close(grad, saved[name], 1e-5)


@pytest.mark.parametrize("options", [dict(ngroups=2), dict(d_state=7, rope_fraction=1.0, ssm_init="recall")])
def test_the_layer_is_the_papers_state_space_model(options):
    """In float64, from the weights, with a complex state."""
    config = models.config("mamba3", d_model=16, **(dict(headdim=8, d_state=6) | options))
    torch.manual_seed(0)
    mixer = Mamba3Mixer(config).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    hidden = torch.randn(2, 40, 16, dtype=torch.float64)
    E, N, G, H = config.d_inner, config.d_state, config.ngroups, config.n_head
    sizes = [E, E, G * N, G * N, H, H, H, config.n_angle]
    z, x, B, C, dt, A, lam, angle = (hidden @ mixer.in_proj.weight.T).split(sizes, dim=-1)
    dt, A = F.softplus(dt + mixer.dt_bias), -F.softplus(A).clamp(min=config.A_floor)

    def normed(x, weight):
        x = x.unflatten(-1, (G, N))
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * weight

    heads = dict(V=x, Z=z)
    y = mamba3(
        Q=normed(C, mixer.C_norm.weight), K=normed(B, mixer.B_norm.weight),
        **{name: each.unflatten(-1, (H, -1)) for name, each in heads.items()},
        ADT=(A * dt).transpose(1, 2), DT=dt.transpose(1, 2), Trap=lam.transpose(1, 2),
        Q_bias=mixer.C_bias.squeeze(1), K_bias=mixer.B_bias.squeeze(1),
        Angles=angle.unsqueeze(2).expand(-1, -1, H, -1), D=mixer.D,
    )  # fmt: skip
    want = y.flatten(2) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(hidden), want, rtol=1e-9, atol=1e-9)


def test_only_the_turn_between_two_tokens_counts():
    """A prefix that turns the phase but writes nothing leaves what comes after it as it was."""
    model = models.build("mamba3-tiny", vocab_size=23, d_model=16, headdim=8, d_state=6, n_layer=1).double()
    x = torch.randn(1, 30, 16, dtype=torch.float64)
    mixer = model.blocks[0].mixer
    *inputs, _ = mixer.inputs(mixer.split(x)[1], models.common.WHOLE)
    q, k, v, now, late, log_decay = inputs
    y = trapezoid(q, k, v, now, late, log_decay)
    cos, sin = (
        f(torch.full((1, 1, 1, 1), 0.7, dtype=q.dtype)).expand(1, 30, 4, 1) for f in (torch.cos, torch.sin)
    )
    torch.testing.assert_close(
        trapezoid(rotate(q, cos, sin), rotate(k, cos, sin), v, now, late, log_decay), y
    )
    cos, sin = (
        f(torch.arange(30.0, dtype=q.dtype).view(1, 30, 1, 1)).expand(1, 30, 4, 1)
        for f in (torch.cos, torch.sin)
    )
    moved = trapezoid(rotate(q, cos, sin), rotate(k, cos, sin), v, now, late, log_decay)
    assert (moved - y).abs().max() > 1e-3 * y.abs().max()


def test_phases_keep_their_digits():
    """After 100,000 turns a float32 phase is that of float64, and a long model's is that of its pieces."""
    turns = torch.rand(1, 100_000, 1, 2, generator=torch.Generator().manual_seed(0))
    exact = turns.double().cumsum(1)
    got = accumulate(turns, None).double()
    for f in (torch.sin, torch.cos):
        torch.testing.assert_close(f(got), f(exact), rtol=0, atol=1e-6)
    half = accumulate(turns[:, 50_000:], accumulate(turns[:, :50_000], None)[:, -1])
    torch.testing.assert_close(torch.sin(half), torch.sin(got[:, 50_000:]).float(), rtol=0, atol=1e-6)


def test_parts_of_the_recall_initialisation():
    """ "tied": a token asks with what it writes. "long": a write is kept for thousands of tokens."""
    hidden = torch.randn(1, 20, 16)
    for parts in ("default", "long", "tied", "long+tied"):
        torch.manual_seed(0)
        mixer = Mamba3Mixer(models.config("mamba3-tiny", d_model=16, headdim=8, d_state=6, ssm_init=parts))
        q, k, *_, log_decay, _ = mixer.inputs(mixer.split(hidden)[1], models.common.WHOLE)
        assert torch.equal(q, k) == ("tied" in parts)
        assert bool(((log_decay.exp() > 0.999) & (log_decay.exp() < 0.9995)).all()) == ("long" in parts)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(headdim=5), "headdim=5 does not divide d_inner=32"),
        (dict(headdim=8, ngroups=3), "ngroups=3 does not divide the 4 heads"),
        (dict(headdim=8, d_state=2), "rope_fraction=0.5 of d_state=2 leaves no pair of channels"),
        (dict(headdim=8, rope_fraction=1.5), "rope_fraction=1.5 is not supported; use 0 to 1"),
        (dict(headdim=8, position="rope"), "position='rope' rotates the queries and keys of attention"),
    ],
)
def test_impossible_shapes_are_one_line(options, said):
    with pytest.raises(UserError, match=said):
        models.config("mamba3", d_model=16, **options)


def test_where_the_port_on_pypi_differs():
    """`mamba3-ssm` 0.2.1 is another function in three places; with these three changed it is ours.

    It adds the earlier end of a step without its decay and with at most half of the weight,
    (1 - lam' / 2) now and lam' / 2 before, does not bound the turns by tanh, and takes a constant
    A = +A_floor, because it bounds softplus(A) from above before it changes the sign.
    """
    port = pytest.importorskip("mamba3_ssm", reason="needs mamba3-ssm")
    config = models.config("mamba3", d_model=16, headdim=8, d_state=8)
    torch.manual_seed(0)
    theirs = port.Mamba3(16, d_state=8, headdim=8)
    x = torch.randn(2, 20, 16)
    mixer = Mamba3Mixer(config)
    mixer.load_state_dict(theirs.state_dict())
    assert (mixer(x) - theirs(x)).abs().max() > 1e-3  # as it stands
    z, rest = mixer.split(x)
    _, B, C, dt, _, trap, angle = rest.split(mixer.sizes[1:], dim=-1)
    v = rest.split(mixer.sizes[1:], dim=-1)[0].unflatten(-1, (4, -1))
    dt, half = F.softplus(dt + mixer.dt_bias), torch.sigmoid(trap) / 2
    phase = accumulate(dt.unsqueeze(-1) * angle.unsqueeze(2), None)
    cos, sin = phase.cos(), phase.sin()
    q, k = (
        rotate(mixer.by_head(each, norm, bias), cos, sin)
        for each, norm, bias in ((C, mixer.C_norm, mixer.C_bias), (B, mixer.B_norm, mixer.B_bias))
    )
    log_decay = 1e-4 * dt
    late = F.pad((half * dt * torch.exp(-log_decay))[:, 1:], (0, 0, 0, 1))  # the decay taken off again
    y = trapezoid(q, k, v, (1 - half) * dt, late, log_decay, backend="reference")
    torch.testing.assert_close(mixer.output(mixer.skip(y, v), z), theirs(x), rtol=1e-4, atol=1e-5)
