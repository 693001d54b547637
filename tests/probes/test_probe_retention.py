"""Retention against closed forms and loops; hidden attention against brute force and the models' scans."""

from __future__ import annotations

import math

import pytest
import torch
from circuits import constant_decay, leaky_integrator, one_token_store, random_scan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from probes.retention import (
    apply_attention,
    attention_output,
    attention_pattern,
    attention_rows,
    contribution_norm,
    hidden_attention,
    mean_attention,
    normalise_rows,
    retention,
    source_and_time,
)
from probes.scan import Scan, iterate_states
from probes.updates import state_changes
from ssm_retrieval.ops.selective_scan import selective_scan
from ssm_retrieval.ops.ssd import ssd

KINDS = ("mamba", "mamba2")


def every_pair(L):
    return torch.arange(L)[None, :, None], torch.arange(L)[None, None, :]


def contributions(scan):
    """(B, source, time, H, P, N): run the recurrence on each token's write alone."""
    B, L, H, P, N = scan.shape
    result = torch.zeros(B, L, L, H, P, N, dtype=scan.x.dtype)
    for i in range(L):
        alone = torch.zeros_like(scan.x)
        alone[:, i] = scan.x[:, i]
        result[:, i] = torch.cat(
            [h for _, h in iterate_states(Scan(scan.A, scan.dt, scan.Bt, scan.Ct, alone))], dim=1
        )
    return result


# --- retention ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("budget", [1, 2**30])
def test_retention_is_that_of_the_recurrence_on_one_token(kind, per_head, budget):
    scan = random_scan(kind, L=11)
    parts = contributions(scan)
    dims = (4, 5) if per_head else (3, 4, 5)
    norms = parts.square().sum(dims).sqrt()
    source, at = every_pair(11)
    torch.testing.assert_close(contribution_norm(scan, source, at, per_head, budget), norms)
    found = retention(scan, source, at, per_head, budget=budget)
    written = norms.diagonal(dim1=1, dim2=2).movedim(-1, 1).unsqueeze(2)
    torch.testing.assert_close(found.kept, norms / written)
    whole = parts.sum(1).square().sum(tuple(d - 1 for d in dims)).sqrt()  # linearity: the sum is h_t
    torch.testing.assert_close(found.share, norms / whole[:, None])
    given_norm = retention(scan, source, at, per_head, state_norm=state_changes(scan, per_head).norm)
    torch.testing.assert_close(given_norm.share, found.share)


@settings(deadline=None, max_examples=30)
@given(a=st.floats(0.05, 0.9999), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_constant_decay_keeps_a_to_the_lag(a, dtype):
    L = 30
    u = torch.randn(2, L, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    source, at = every_pair(L)
    lag = (at - source).double()
    expected = torch.where(lag >= 0, a**lag, 0.0).expand(2, -1, -1)
    kept = retention(constant_decay(a, u, N=2), source, at).kept.double()
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-6)
    alpha = hidden_attention(constant_decay(a, u)).double()
    torch.testing.assert_close(
        alpha, expected.transpose(1, 2)[:, None].expand(-1, 3, -1, -1), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_store_keeps_its_token_and_nothing_else(kind):
    L = 12
    tokens = torch.randint(0, 5, (4, L), generator=torch.Generator().manual_seed(1))
    target = torch.tensor([0, 3, 7, 11])
    scan = one_token_store(tokens, torch.arange(L) == target[:, None], vocab=5, kind=kind)
    found = retention(scan, *every_pair(L))
    for b, i in enumerate(target.tolist()):
        stored = torch.zeros(L, L, dtype=torch.float64)
        stored[i, i:] = 1
        torch.testing.assert_close(found.kept[b], stored, rtol=0, atol=0)
        torch.testing.assert_close(found.share[b], stored, rtol=0, atol=0)


def test_share_of_a_leaky_integrator():
    """Constant input: the share of token i at t is a^(t-i) (1 - a) / (1 - a^(t+1)); shares add up to 1."""
    tau, L = 5.0, 25
    a = math.exp(-1 / tau)
    share = retention(leaky_integrator(tau, torch.ones(1, L, 1, dtype=torch.float64)), *every_pair(L)).share[
        0
    ]
    t, i = torch.arange(L, dtype=torch.float64)[None], torch.arange(L, dtype=torch.float64)[:, None]
    expected = torch.where(t >= i, a ** (t - i) * (1 - a) / (1 - a ** (t + 1)), 0.0)
    torch.testing.assert_close(share, expected)
    torch.testing.assert_close(share.sum(0), torch.ones(L, dtype=torch.float64))


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
    times=st.lists(st.integers(0, 19), min_size=3, max_size=3),
)
def test_retention_lies_in_0_1_falls_and_multiplies(kind, seed, times):
    """Alone in its head, r(i -> t) = r(i -> s) r(s -> t) for i <= s <= t; in a whole layer it only falls."""
    i, s, t = sorted(times)
    scan = random_scan(kind, L=20, seed=seed)
    kept = retention(scan, i, torch.arange(20)).kept
    assert ((kept >= 0) & (kept <= 1)).all() and (kept[:, i:].diff(dim=1) <= 1e-12).all()
    assert (kept[:, i] == 1).all() and (kept[:, :i] == 0).all()
    scalar = random_scan(kind, L=20, heads=2, N=1, seed=seed)  # one decay per head
    r = retention(scalar, [i, s, i], [s, t, t], per_head=True).kept
    torch.testing.assert_close(r[:, 0] * r[:, 1], r[:, 2], rtol=1e-10, atol=1e-12)


def test_positions_may_be_shared_or_per_sequence():
    scan = random_scan("mamba", B=3, L=8)
    target = torch.tensor([1, 4, 6])
    curve = retention(scan, target[:, None], torch.arange(8)).kept
    assert curve.shape == (3, 8)
    for b, i in enumerate(target.tolist()):
        torch.testing.assert_close(curve[b], retention(scan, i, torch.arange(8)).kept[b])
    assert retention(scan, 2, 5).kept.shape == (3, 1)
    torch.testing.assert_close(retention(scan, 2, 5).kept, retention(scan, [2, 2], [4, 5]).kept[:, 1:])
    with pytest.raises(ValueError, match="leading dimension 3"):
        source_and_time(scan, torch.zeros(2, 1, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match=r"0 \.\. 7"):
        retention(scan, 0, 8)


def test_long_and_steep_scans_neither_overflow_nor_lose_digits():
    L = 2000
    u = torch.ones(1, L, 1)
    ones = torch.ones(1, L, 1)
    steep = Scan.mamba(torch.full((1, 1), -1e4), ones, ones, ones, u)
    assert retention(steep, 5, torch.arange(L)).kept.nonzero().tolist() == [[0, 5]]
    assert hidden_attention(steep).isfinite().all()
    slow = Scan.mamba(-ones[0, :1], torch.full_like(u, 1.0), ones, ones, u)
    kept = retention(slow, L - 3, L - 1).kept.item()
    assert kept == pytest.approx(math.exp(-2), rel=1e-6)


# --- hidden attention ---


def brute_force_map(scan):
    """alpha(t, i) = C_t prod_{i < s <= t} exp(dt_s A) dt_i B_i, by loops over every index."""
    B, L, H = scan.dt.shape
    alpha = torch.zeros(B, H, L, L, dtype=scan.x.dtype)
    for b in range(B):
        for h in range(H):
            g = h * scan.Bt.shape[2] // H
            for i in range(L):
                carried = scan.dt[b, i, h] * scan.Bt[b, i, g]
                for t in range(i, L):
                    if t > i:
                        carried = carried * torch.exp(scan.dt[b, t, h] * scan.A[h])
                    alpha[b, h, t, i] = scan.Ct[b, t, g] @ carried
    return alpha


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_is_the_brute_force_one(kind):
    scan = random_scan(kind, B=1, L=70)  # more than two blocks
    expected = brute_force_map(scan)
    for budget in (1, 2**30):
        torch.testing.assert_close(hidden_attention(scan, budget=budget), expected)
        torch.testing.assert_close(mean_attention(scan, budget=budget), expected.abs().mean(1))
    for chosen in ([3, 1], [2], [1, 1]):
        torch.testing.assert_close(hidden_attention(scan, chosen), expected[:, chosen])
    chosen = [3, 1]
    torch.testing.assert_close(mean_attention(scan, chosen), expected[:, chosen].abs().mean(1))
    at = [69, 0, 33]
    torch.testing.assert_close(attention_rows(scan, at), expected[:, :, at])
    torch.testing.assert_close(
        attention_rows(scan, torch.tensor([[7]]), chosen), expected[:, chosen][:, :, [7]]
    )


def test_rows_may_differ_between_sequences():
    scan = random_scan("mamba2", B=3, L=40)
    whole, at = hidden_attention(scan), torch.tensor([[5], [39], [0]])
    rows = attention_rows(scan, at, budget=1)
    for b, t in enumerate(at[:, 0].tolist()):
        torch.testing.assert_close(rows[b, :, 0], whole[b, :, t])


@pytest.mark.parametrize("L", [1, 31, 32, 33, 300])
def test_map_times_input_is_mambas_scan(L):
    """Relative error below 1e-5 in float32, skip D included."""
    s = random_scan("mamba", L=L, heads=12, N=16, dtype=torch.float32, seed=L)
    D = torch.randn(12, generator=torch.Generator().manual_seed(3))
    y = selective_scan(s.x[..., 0], s.dt, s.A, s.Bt[:, :, 0], s.Ct[:, :, 0], D=D)
    for ours in (apply_attention(hidden_attention(s), s.x, D), attention_output(s, D)):
        assert (ours[..., 0] - y).norm() < 1e-5 * y.norm()
        assert (ours[..., 0] - y).abs().max() < 1e-5 * y.abs().max()


@pytest.mark.parametrize("L", [1, 64, 300])
@pytest.mark.parametrize("groups", [1, 2])
def test_map_times_input_is_mamba_2s_scan(L, groups):
    s = random_scan("mamba2", L=L, groups=groups, N=16, P=8, dtype=torch.float32, seed=L)
    y = ssd(s.x, s.dt, s.A[:, 0], s.Bt, s.Ct)
    for ours in (apply_attention(hidden_attention(s), s.x), attention_output(s)):
        assert (ours - y).norm() < 1e-5 * y.norm()
        assert (ours - y).abs().max() < 1e-5 * y.abs().max()
    chosen = [2, 0]
    torch.testing.assert_close(
        apply_attention(hidden_attention(s, chosen), s.x[:, :, chosen]), y[:, :, chosen], rtol=1e-4, atol=1e-5
    )


def test_padding_neither_writes_nor_decays():
    scan = random_scan("mamba", L=40)
    dt = scan.dt.clone()
    dt[:, 10:20] = 0
    padded = Scan(scan.A, dt, scan.Bt, scan.Ct, scan.x)
    short = Scan(scan.A, *(torch.cat([f[:, :10], f[:, 20:]], 1) for f in (dt, scan.Bt, scan.Ct, scan.x)))
    kept = [*range(10), *range(20, 40)]
    torch.testing.assert_close(hidden_attention(padded)[:, :, kept][..., kept], hidden_attention(short))
    assert (hidden_attention(padded)[..., 10:20] == 0).all()


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return made


@pytest.mark.parametrize("work", [hidden_attention, attention_output, mean_attention])
def test_maps_are_made_within_the_budget(work):
    """Blocks of 32 x 32 decays of N states for 64 heads: 8 MiB at once."""
    scan = random_scan("mamba", B=1, L=32, heads=64, N=16)
    with Largest() as bounded:
        work(scan, budget=2**20)
    with Largest() as free:
        work(scan, budget=2**30)
    assert bounded.bytes <= 2**20 and free.bytes >= 2**23


def test_everything_is_made_where_the_scan_is():
    """What a function makes without naming a device would be on another one here, and not fit."""
    scan, asked = random_scan("mamba", L=40), (torch.tensor([[1, 4], [3, 2]]), torch.arange(38, 40))

    def results():
        return (
            *vars(retention(scan, *asked)).values(),
            retention(scan, 1, [5, 7]).kept,
            hidden_attention(scan),
            hidden_attention(scan, [1, 2]),
            attention_rows(scan, [4, 2], [3]),
            attention_output(scan),
            mean_attention(scan),
        )

    wanted = results()
    with torch.device("meta"):
        found = results()
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.device == scan.x.device
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("kind, N", [("mamba", 5), ("mamba", 1), ("mamba2", 5)])
def test_an_attention_pattern_is_written_out(kind, N):
    """Channels of Mamba as one head, whatever the number of their states; heads of Mamba-2 apart."""
    scan = random_scan(kind, L=40, N=N)
    whole, (B, L, H, _, _) = attention_pattern(scan), scan.shape
    alpha = hidden_attention(scan).abs()
    wanted = alpha.mean(1, keepdim=True) if kind == "mamba" else alpha
    assert wanted.shape == (B, 1 if kind == "mamba" else H, L, L)
    torch.testing.assert_close(whole, wanted / wanted.sum(-1, keepdim=True))
    torch.testing.assert_close(attention_pattern(scan, [3, 39]), whole[:, :, [3, 39]])


def test_row_sums_and_refusals():
    weights = normalise_rows(torch.tensor([[0.0, 0.0], [1.0, 3.0]]))
    assert weights.tolist() == [[0.0, 0.0], [0.25, 0.75]]
    scan = random_scan("mamba", L=50)
    rows = normalise_rows(mean_attention(scan)).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    with pytest.raises(ValueError, match="fewer heads"):
        hidden_attention(scan, limit=1000)
    with pytest.raises(ValueError, match=r"0 \.\. 3"):
        hidden_attention(scan, [4])
    with pytest.raises(ValueError, match="nothing to average"):
        mean_attention(scan, [])
