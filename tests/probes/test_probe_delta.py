"""What a delta rule writes, erases and keeps: against the layer, interventions and matrices written out."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from hook_models import IDS, B, L, build, recorded
from torch.nn import functional as F

import probes
from analysis.plots import erasure as plots
from probes.delta import DeltaScan, changes, hidden_attention, record_deltas, survival
from probes.suite import NotApplicable, Options, attention, erasure
from ssm_retrieval.errors import UserError
from ssm_retrieval.ops.delta_rule import delta_rule
from synthetic import tasks

BOTH = pytest.mark.parametrize("family", ["deltanet", "gated-deltanet", "kda"])
DECAYS = pytest.mark.parametrize("width", [1, 4])


def scan(width, length=9):
    """A recurrence with a decay for the head, or for each of 4 channels of the key."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(2, length, 3, *shape, generator=generator, dtype=torch.float64)

    k = F.normalize(drawn(4), dim=-1)
    return DeltaScan(drawn(4), k, drawn(5), drawn().sigmoid(), drawn(width).sigmoid())


def factors(found, t):
    """F_t: (B, H, N, N)."""
    k, beta = found.k[:, t], found.beta[:, t, :, None, None]
    decay = found.decay[:, t].expand(k.shape)
    return decay.unsqueeze(-1) * (torch.eye(4, dtype=k.dtype) - beta * k.unsqueeze(-1) * k.unsqueeze(-2))


@BOTH
@torch.no_grad()
def test_hidden_attention_times_the_values_is_the_layers_output(family):
    model = build(family)
    cache, _ = recorded(model)
    for layer, found in record_deltas(model, IDS).items():
        own = cache[f"blocks.{layer}.mixer.hook_y"]
        made = torch.einsum("bhti,bihp->bthp", hidden_attention(found), found.v)
        torch.testing.assert_close(made, own)
        without = torch.einsum("bhti,bihp->bthp", hidden_attention(found, erase=False), found.v)
        assert (without - own).norm() > 0.05 * own.norm()


@torch.no_grad()
def test_gated_linear_attention_erases_nothing():
    model = build("gla")
    cache, _ = recorded(model)
    for layer, found in record_deltas(model, IDS).items():
        own = cache[f"blocks.{layer}.mixer.hook_y"]
        for erase in (True, False):
            made = torch.einsum("bhti,bihp->bthp", hidden_attention(found, erase), found.v)
            torch.testing.assert_close(made, own)
        assert (changes(found).erase == 0).all()


@torch.no_grad()
def test_a_write_in_two_parts_is_followed_through_both():
    """Mamba-3: the map with its skip is the output, and norms are those of the recorded states."""
    model, at = build("mamba3"), 9
    cache, _ = recorded(model)
    for layer, found in record_deltas(model, IDS).items():
        here = f"blocks.{layer}.mixer.hook_"
        made = torch.einsum("bhti,bihp->bthp", hidden_attention(found), found.v)
        skip = model.blocks[layer].mixer.D[:, None] * found.v
        torch.testing.assert_close(made + skip, cache[here + "y"])
        got, h, a = changes(found), cache[here + "ssm_state"], cache[here + "A_bar"]
        kept = a[:, 1:, :, None, None] * h[:, :-1]
        torch.testing.assert_close(got.write[:, 1:], (h[:, 1:] - kept).flatten(2).norm(dim=2))
        torch.testing.assert_close(
            got.keep[:, 1:], kept.flatten(2).norm(dim=2) / h[:, :-1].flatten(2).norm(dim=2)
        )
        assert (got.erase == 0).all()
    name, state = "blocks.1.mixer.hook_v", "blocks.1.mixer.hook_ssm_state"
    scan = record_deltas(model, IDS, [1])[1]
    left, total = survival(scan, at), scan.beta + scan.late
    for token in (0, 4, at):
        with probes.intervene(model, {name: probes.at([token], lambda v: v + 1)}):
            changed, _ = recorded(model, state)
        moved = (changed[state] - cache[state]).flatten(3).norm(dim=-1)  # (B, L, H)
        first = scan.beta[:, token] / total[:, token]  # of the write, at its own token
        torch.testing.assert_close(left[:, token], first * moved[:, at] / moved[:, token])


@DECAYS
def test_the_map_without_erasures_is_that_of_linear_attention(width):
    found = scan(width)
    log = found.decay.log().squeeze(-1) if width == 1 else found.decay.log()
    for erase in (True, False):
        want = delta_rule(found.q, found.k, found.v, found.beta, log, erase=erase)
        got = torch.einsum("bhti,bihp->bthp", hidden_attention(found, erase), found.v)
        torch.testing.assert_close(got, want)


@BOTH
@torch.no_grad()
def test_survival_is_what_an_intervention_on_the_value_leaves(family):
    """The state at `at` changes by the share of the change that a token's value made at its own place."""
    model, at = build(family), 9
    name, state = "blocks.1.mixer.hook_v", "blocks.1.mixer.hook_ssm_state"
    left = survival(record_deltas(model, IDS, [1])[1], at)
    clean, _ = recorded(model, state)
    for token in (0, 4, at):
        with probes.intervene(model, {name: probes.at([token], lambda v: v + 1)}):
            changed, _ = recorded(model, state)
        moved = (changed[state] - clean[state]).flatten(3).norm(dim=-1)  # (B, L, H)
        torch.testing.assert_close(left[:, token], moved[:, at] / moved[:, token])


@DECAYS
def test_changes_are_those_of_the_matrices(width):
    found = scan(width)
    got, h = changes(found), torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    for t in range(9):
        write = torch.einsum("bh,bhp,bhn->bhpn", found.beta[:, t], found.v[:, t], found.k[:, t])
        kept = h @ factors(found, t)
        erased = h * found.decay[:, t].unsqueeze(-2) - kept
        before, after = h.flatten(1).norm(dim=1), kept + write
        torch.testing.assert_close(got.write[:, t], write.flatten(1).norm(dim=1))
        torch.testing.assert_close(got.erase[:, t], erased.flatten(1).norm(dim=1))
        if t:
            torch.testing.assert_close(got.keep[:, t], kept.flatten(1).norm(dim=1) / before)
            torch.testing.assert_close(got.relative[:, t], (after - h).flatten(1).norm(dim=1) / before)
        h = after
    assert got.keep[:, 0].isnan().all() and got.relative[:, 0].isnan().all()


@DECAYS
def test_survival_is_the_product_of_the_matrices(width):
    found = scan(width)
    left = survival(found, 8)
    for token in range(9):
        row = found.k[:, token].unsqueeze(-2)
        for t in range(token + 1, 9):
            row = row @ factors(found, t)
        torch.testing.assert_close(left[:, token], row.squeeze(-2).norm(dim=-1))


def test_a_key_that_is_written_again_erases_its_first_value():
    """A symbol's write outlasts other symbols, and nothing of it is left once its own key is overwritten."""
    k = torch.eye(3)[[0, 1, 2, 0]].view(1, 4, 1, 3)
    found = DeltaScan(k, k, torch.ones(1, 4, 1, 2), torch.ones(1, 4, 1), torch.ones(1, 4, 1, 1))
    assert survival(found, 2)[0, :, 0].tolist() == [1, 1, 1]
    assert survival(found, 3)[0, :, 0].tolist() == [0, 1, 1, 1]
    assert changes(found).erase[0].tolist() == [0, 0, 0, pytest.approx(2**0.5)]


@torch.no_grad()
def test_padding_writes_nothing():
    model = build("gated-deltanet")
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, 5] = False
    cache, _ = recorded(model, attention_mask=mask)
    names = [f"blocks.0.mixer.hook_{name}" for name in ("q", "k", "v", "beta", "A_bar")]
    *parts, decay = (cache[name] for name in names)
    left = survival(DeltaScan(*parts, decay.unsqueeze(-1)), L - 1)
    assert left[0, 5].isnan().all() and left[1].isfinite().all()


def test_models_without_a_delta_rule_are_one_line():
    with pytest.raises(
        UserError, match=r"layers=\[\] must be some of the model's layers with keys and a state"
    ):
        record_deltas(build("mamba"), IDS)
    with pytest.raises(UserError, match="beta must have shape"):
        found = scan(1)
        DeltaScan(found.q, found.k, found.v, found.beta[:, 1:], found.decay)
    task = tasks.build("position", seq_len=5, num_symbols=9)
    with pytest.raises(NotApplicable, match="no layers with keys and a state"):
        erasure.measure(build("transformer"), task, Options())


@pytest.mark.parametrize("family", ["gla", "mamba3"])
def test_layers_that_erase_nothing_have_no_rows_about_it(family):
    task = tasks.build("position", seq_len=6, num_symbols=9)
    table = erasure.measure(build(family), task, Options(examples=12))
    errors = table[table["part"] == "reconstruction"]
    assert set(errors["quantity"]) == {"relative error"} and (errors["value"] < 1e-9).all()
    roles = table[table["part"] == "role"]
    assert set(roles["quantity"]) == {"write", "keep", "relative"}
    joined = pd.concat([table.assign(family=family, weights=weights) for weights in ("trained", "untrained")])
    assert f"| {family} | write | 0 |" in erasure.summary(joined)
    assert "| erase |" not in erasure.summary(joined)
    for draw in (plots.draw, plots.draw_curves, plots.draw_maps):
        assert draw(joined).axes


@BOTH
def test_table_summary_and_figures(family):
    task = tasks.build("position", seq_len=6, num_symbols=9)
    table = erasure.measure(build(family), task, Options(examples=12))
    errors = table[table["part"] == "reconstruction"].set_index(["quantity", "layer"])["value"]
    assert (errors["relative error"] < 1e-9).all()
    assert (errors["relative error without erasures"] > 0.01).all()
    roles = table[(table["part"] == "role") & (table["role"] == "target")]
    assert set(roles["quantity"]) == {"write", "erase", "keep", "relative"}
    both = [table.assign(family=family, weights=weights) for weights in ("trained", "untrained")]
    joined = pd.concat(both)
    assert f"| {family} | erase | 0 |" in erasure.summary(joined)
    for draw in (plots.draw, plots.draw_curves, plots.draw_maps):
        assert draw(joined).axes
    scores = attention.measure(build(family), task, Options(examples=4))
    assert set(scores[scores["quantity"] == "retrieval"]["layer"]) == {0, 1}
