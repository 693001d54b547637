"""Writes, decays, changes of the state and horizons against loops and closed forms; averages by role."""

from __future__ import annotations

import math

import hook_models
import numpy as np
import pytest
import torch
from circuits import constant_decay, leaky_integrator, one_token_store, random_scan
from hook_models import IDS
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import probes
from probes.scan import Scan, iterate_states, record_scans
from probes.updates import (
    constant_horizon,
    decay,
    horizon,
    role_means,
    split_by_role,
    state_changes,
    write_norm,
)
from ssm_retrieval.errors import UserError
from ssm_retrieval.ops.selective_scan import selective_scan
from ssm_retrieval.ops.ssd import ssd_reference

KINDS = ("mamba", "mamba2")


def loop(scan):
    """(states (B, L, H, P, N), writes and decays of the same shape), token by token, head by head."""
    B, L, H, P, N = scan.shape
    states, writes, decays = (torch.zeros(B, L, H, P, N, dtype=scan.x.dtype) for _ in range(3))
    for b in range(B):
        for h in range(H):
            group = h * scan.Bt.shape[2] // H
            state = torch.zeros(P, N, dtype=scan.x.dtype)
            for t in range(L):
                decays[b, t, h] = torch.exp(scan.dt[b, t, h] * scan.A[h]).expand(P, N)
                writes[b, t, h] = scan.dt[b, t, h] * torch.outer(scan.x[b, t, h], scan.Bt[b, t, group])
                state = decays[b, t, h] * state + writes[b, t, h]
                states[b, t, h] = state
    return states, writes, decays


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 20_000, 2**30])
def test_equals_the_loop_whatever_the_chunks(kind, budget):
    scan = random_scan(kind, L=23)
    states, writes, decays = loop(scan)
    streamed = torch.cat([s for _, s in iterate_states(scan, budget)], dim=1)
    torch.testing.assert_close(streamed, states, rtol=1e-12, atol=1e-12)
    steps = states - torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)
    for per_head, dims in ((False, (2, 3, 4)), (True, (3, 4))):
        changes = state_changes(scan, per_head, budget)
        torch.testing.assert_close(changes.norm, states.square().sum(dims).sqrt(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(changes.update, steps.square().sum(dims).sqrt(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(write_norm(scan, per_head), writes.square().sum(dims).sqrt())
        kept = decay(scan, per_head, budget)
        torch.testing.assert_close(kept.mean, decays.mean(dims))
        torch.testing.assert_close(kept.norm, decays.square().sum(dims).sqrt())


def test_the_states_are_those_of_the_fast_scan():
    s = random_scan("mamba", B=2, L=90, heads=16, N=16, dtype=torch.float32)
    _, fast = selective_scan(
        s.x[..., 0], s.dt, s.A, s.Bt[:, :, 0], s.Ct[:, :, 0], states_at=range(90), backend="cpu"
    )
    ours = torch.cat([h for _, h in iterate_states(s)], dim=1)[..., 0, :]
    torch.testing.assert_close(ours, fast, rtol=1e-5, atol=1e-6)
    s = random_scan("mamba2", L=40)
    _, last = ssd_reference(s.x, s.dt, s.A[:, 0], s.Bt, s.Ct)
    *_, (_, states) = iterate_states(s, 10_000)
    torch.testing.assert_close(states[:, -1], last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_scan_is_kept_in_float32_or_in_float64_if_x_is(kind, dtype):
    made = random_scan(kind, L=6, dtype=torch.float32)
    parts = {
        name: getattr(made, name).to(torch.bfloat16).requires_grad_() for name in ("A", "dt", "Bt", "Ct")
    }
    scan = Scan(**parts, x=made.x.to(dtype).requires_grad_())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name in (*parts, "x"):
        kept = getattr(scan, name)
        assert kept.dtype == wide and not kept.requires_grad, name
    assert torch.equal(scan.dt, parts["dt"].to(wide))


def test_chunks_of_the_stream_belong_to_the_caller():
    scan = random_scan("mamba", L=12)
    expected = state_changes(scan).norm
    norms = []
    for _, states in iterate_states(scan, budget=4000):
        norms.append(states.flatten(2).norm(dim=-1))
        states.zero_()  # must not reach the next chunk
    torch.testing.assert_close(torch.cat(norms, 1), expected)


def test_a_million_states_are_never_held():
    scan = random_scan("mamba", B=1, L=64, heads=32, N=8)
    biggest = max(s.numel() for _, s in iterate_states(scan, budget=3 * 8 * 32 * 8 * 5))
    assert biggest == 5 * 32 * 8
    places = [at for at, _ in iterate_states(scan, budget=1)]  # one position, if that is more already
    assert places == [slice(t, t + 1) for t in range(64)]


# --- closed forms ---


def test_relative_update_of_a_leaky_integrator():
    """Constant input 1: h_t = c (1 - a^(t+1)), so that the relative update is a^t (1 - a) / (1 - a^t)."""
    tau, L = 8.0, 50
    a = math.exp(-1 / tau)
    changes = state_changes(leaky_integrator(tau, torch.ones(2, L, 1, dtype=torch.float64)))
    t = torch.arange(1, L, dtype=torch.float64)
    expected = a**t * (1 - a) / (1 - a**t)
    torch.testing.assert_close(changes.relative[:, 1:], expected.expand(2, -1), rtol=1e-10, atol=1e-12)
    assert changes.relative[:, 0].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_store_is_written_once_and_kept(kind):
    tokens = torch.tensor([[3, 1, 2, 0], [2, 2, 0, 1]])
    flag = torch.tensor([[False, True, False, False], [False, False, True, False]])
    scan = one_token_store(tokens, flag, vocab=4, kind=kind)
    torch.testing.assert_close(write_norm(scan), flag.double())
    changes = state_changes(scan)
    torch.testing.assert_close(changes.norm, flag.double().cumsum(1))
    assert changes.relative[0, 2:].tolist() == [0.0, 0.0] and changes.relative[0, :2].isnan().all()
    expected = torch.where(flag, math.exp(-1), 1.0).double()
    torch.testing.assert_close(decay(scan).mean, expected)


@given(a=st.floats(0.05, 0.97), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_horizon_of_a_constant_decay(a, dtype):
    scan = constant_decay(a, torch.ones(2, 60, 3, dtype=dtype), N=2)
    found = horizon(scan, [0, 20])
    assert found.steps.shape == found.reached.shape == (2, 2, 3, 2) and found.reached.all()
    torch.testing.assert_close(found.steps, torch.full_like(found.steps, -1 / math.log(a)), rtol=1e-6, atol=0)
    closed = constant_horizon(scan.dt.double().mean((0, 1))[:, None], scan.A.double())
    torch.testing.assert_close(found.steps[0, 0], closed, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_horizon_brackets_the_products(kind):
    """The product of whole steps is at least 1/e after floor(k) of them and below after one more."""
    scan = random_scan(kind, L=40)
    at = [0, 7, 38, 39]
    found = horizon(scan, at)
    for b, p, h, m in np.ndindex(*found.steps.shape):
        products = torch.exp(torch.cumsum(scan.dt[b, at[p] + 1 :, h] * scan.A[h, m], 0)).tolist()
        below = [k for k, product in enumerate(products, 1) if product < math.exp(-1)]
        assert bool(found.reached[b, p, h, m]) == bool(below)
        if below:
            assert math.floor(found.steps[b, p, h, m]) + 1 == below[0]
        else:
            assert found.steps[b, p, h, m] == len(products)


def test_horizon_without_decay_and_with_abrupt_decay():
    assert constant_horizon(torch.zeros(2), -torch.ones(2)).tolist() == [math.inf, math.inf]
    u = torch.ones(1, 10, 1)
    ones = torch.ones(1, 10, 1)
    for A in (0.0, -0.0):
        found = horizon(Scan.mamba(torch.full((1, 1), A), ones, ones, ones, u), [4])
        assert found.steps.item() == 5 and not found.reached.item()
    found = horizon(Scan.mamba(torch.full((1, 1), -1e30), ones, ones, ones, u), [4])
    assert 0 <= found.steps.item() < 1e-6 and found.reached.item()


# --- by role ---


def test_roles_are_averaged_within_sequences_first():
    values = torch.tensor([[1.0, 3.0, 10.0, torch.nan], [5.0, 7.0, 9.0, 20.0], [2.0, 100.0, 4.0, 30.0]])
    roles = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2], [0, 3, 0, 2]])
    table = split_by_role(values, roles, {0: "target", 1: "distractor", 2: "query"}).set_index("role")
    assert list(table.index) == ["target", "distractor", "query"]  # 3 has no name
    per_sequence = np.array([2.0, 5.0, 3.0])
    low, high = stats.t.interval(0.95, 2, per_sequence.mean(), stats.sem(per_sequence))
    row = table.loc["target"]
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((10 / 3, low, high))
    assert (row["sequences"], row["positions"]) == (3, 5)
    assert table.loc["distractor", "mean"] == 9.0 and table.loc["distractor", "positions"] == 3
    assert table.loc["query", "mean"] == 25.0


def test_roles_may_be_words_and_shared():
    table = split_by_role(np.array([[1.0, 2.0], [3.0, 2.0]]), np.array(["task", "target"]))
    assert dict(zip(table["role"], table["mean"], strict=True)) == {"target": 2.0, "task": 2.0}
    single = split_by_role(np.ones((1, 2)), [0, 0])
    assert single["mean"].item() == 1 and np.isnan(single["low"].item())
    assert split_by_role(np.full((1, 2), np.nan), [0, 0]).empty


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**31))
def test_roles_partition_the_sum(B, L, seed):
    rng = np.random.default_rng(seed)
    values, roles = rng.normal(size=(B, L)), rng.integers(0, 3, size=(B, L))
    rows = role_means(values, roles)
    assert rows["positions"].sum() == B * L
    assert (rows["value"] * rows["positions"]).sum() == pytest.approx(values.sum(), abs=1e-9)


# --- what is refused ---


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dt=torch.ones(2, 6, 3)), "dt must have shape"),
        (dict(Bt=torch.ones(2, 7, 5)), "Bt must have shape"),
        (dict(Ct=torch.ones(2, 6, 1)), "Ct must have shape"),
        (dict(A=torch.ones(4, 5)), "A must be at most 0"),
        (dict(dt=-torch.ones(2, 6, 4)), "dt at least 0"),
        (dict(u=torch.ones(2, 6)), "A must have shape|x must have dimensions"),
    ],
)
def test_scans_that_do_not_fit_are_refused(change, message):
    right = dict(A=-torch.ones(4, 5), dt=torch.ones(2, 6, 4), Bt=torch.ones(2, 6, 5), Ct=torch.ones(2, 6, 5))
    with pytest.raises(ValueError, match=message):
        Scan.mamba(**(right | dict(u=torch.ones(2, 6, 4)) | change))


def test_positions_and_shapes_that_do_not_fit_are_refused():
    scan = random_scan("mamba", L=6)
    with pytest.raises(ValueError, match=r"0 \.\. 5"):
        horizon(scan, [6])
    with pytest.raises(ValueError, match="integers"):
        horizon(scan, [0.5])
    with pytest.raises(ValueError, match="list of positions"):
        horizon(scan, [[1]])
    with pytest.raises(ValueError, match="groups"):
        Scan.mamba2(
            -torch.ones(3), torch.ones(1, 2, 3), *[torch.ones(1, 2, 2, 4)] * 2, torch.ones(1, 2, 3, 1)
        )
    with pytest.raises(ValueError, match="roles like it"):
        split_by_role(np.ones((2, 3)), np.ones((3, 2)))


@pytest.mark.parametrize("family", ["mamba", "mamba2", "hybrid-mamba", "hybrid-mamba2"])
@torch.no_grad()
def test_recorded_scans_are_the_layers_own(family):
    """States by the recurrence as written equal those of the model, from token ids and from embeddings."""
    model = hook_models.build(family)
    scans = record_scans(model, IDS)
    ssm = [i for i, block in enumerate(model.blocks) if hasattr(block, "mixer")]
    assert list(scans) == ssm
    with probes.record(model, "*.hook_ssm_state") as cache:
        model(IDS)
    for layer, scan in scans.items():
        states = torch.cat([h for _, h in iterate_states(scan)], 1)
        theirs = cache[f"blocks.{layer}.mixer.hook_ssm_state"].view_as(states)
        torch.testing.assert_close(states, theirs, rtol=1e-4, atol=1e-6)
        for b in range(len(IDS)):
            one = torch.cat([h for _, h in iterate_states(scan.sequence(b))], 1)
            torch.testing.assert_close(one, states[b : b + 1])
    embedded = record_scans(model, layers=ssm[1:], inputs_embeds=model.embedding(IDS))
    assert list(embedded) == ssm[1:]
    torch.testing.assert_close(embedded[ssm[1]].dt, scans[ssm[1]].dt)


def test_scans_of_layers_without_a_recurrence_are_refused():
    with pytest.raises(UserError, match=r"layers=\[0, 2\] must be some of the model's SSM layers, \[0, 1\]"):
        record_scans(hook_models.build("hybrid-mamba"), IDS, [0, 2])
    with pytest.raises(UserError, match=r"layers=\[\] must be some"):
        record_scans(hook_models.build("transformer"), IDS)
