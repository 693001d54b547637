"""Replacing named tensors, and gradients through them: against the recurrence written out."""

from __future__ import annotations

import pytest
import torch
from hook_models import (
    IDS,
    OTHER,
    ROUNDED,
    STATES,
    B,
    L,
    build,
    halve,
    recorded,
    recurrence,
)
from torch.nn import functional as F

import probes
from probes.hooks import absolute
from probes.names import local_name
from ssm_retrieval.ops.ssd import ssd

# --- what changes and what does not ------------------------------------------------------------------


@torch.no_grad()
def test_recording_and_identities_change_nothing(family):
    """Bit for bit in float32, for every name: recording, the identity, and patching a run with itself."""
    model = build(family, torch.float32)
    want = model(IDS)
    torch.testing.assert_close(recorded(model)[1], want, rtol=1e-5, atol=1e-5)
    for name in model.hook_names():
        cache, logits = recorded(model, name)
        outputs = [logits]
        for change in (lambda x: x, cache[name], probes.at([2, -1], lambda x: x.mul_(2).div_(2))):
            with probes.intervene(model, {name: change}):
                outputs.append(model(IDS))
        for output in outputs:
            if local_name(name) == ROUNDED and "mamba2" not in family:
                torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(output, want), name


@torch.no_grad()
def test_every_edit_changes_the_output(model):
    """In place or not; and a second probe inside sees the edited values."""
    want = model(IDS)
    for name in model.hook_names():
        with (
            probes.intervene(model, {name: halve}),
            probes.record(model, name) as inside,
        ):
            got = model(IDS)
        with (
            probes.record(model, name) as outside,
            probes.intervene(model, {name: lambda x: halve(x.clone())}),
        ):
            again = model(IDS)
        assert not torch.allclose(got, want), name
        torch.testing.assert_close(got, again)
        torch.testing.assert_close(inside[name], outside[name])
    assert torch.equal(model(IDS), want)


@torch.no_grad()
def test_patching_every_position_of_a_layer_gives_the_other_run(model):
    other, logits = recorded(model, "*hook_resid_post", ids=OTHER)
    name = "blocks.1.hook_resid_post"
    with probes.intervene(model, {name: other[name]}):
        assert torch.equal(model(IDS), logits)
    parts = [probes.at([t], other[name][:, [t]]) for t in range(L)]
    with probes.intervene(model, {name: parts}):
        assert torch.equal(model(IDS), logits)


@torch.no_grad()
def test_edits_reach_their_positions_and_later_ones_only(model):
    want = model(IDS)
    for name in model.hook_names():
        with probes.intervene(model, {name: probes.at([6], lambda x: halve(x.clone()))}):
            got = model(IDS)
        torch.testing.assert_close(got[:, :6], want[:, :6])
        assert not torch.allclose(got[:, 6], want[:, 6]), name


@torch.no_grad()
def test_the_outermost_edit_is_made_first_and_the_last_one_leaves_nothing(model):
    name, plain = "blocks.1.hook_resid_post", model(IDS)
    more, double = (lambda x: x + torch.arange(16)), (lambda x: 2 * x)
    both = {}
    for order, changes in ((0, [more, double]), (1, [double, more])):
        with probes.intervene(model, {name: changes}):
            both[order] = model(IDS)
        with probes.intervene(model, {name: changes[0]}):
            with probes.record(model, name) as cache, probes.intervene(model, {name: changes[1]}):
                assert torch.equal(model(IDS), both[order])
            clean = recorded(model, name)[0][name]  # the inner one has ended, the outer one has not
            torch.testing.assert_close(cache[name], changes[1](clean))
    assert not torch.allclose(both[0], both[1])
    assert torch.equal(model(IDS), plain)
    assert all(getattr(module, "hook", None) is None for module in model.modules())


def test_positions_of_edits():
    assert probes.at(3, halve).positions == (3,) and probes.at(-1, halve).positions == (-1,)
    assert probes.at(torch.tensor([2, 0]), halve).positions == (2, 0)
    assert absolute([-13, 12, 0, -1], 13, "x") == [0, 12, 0, 12]
    for wrong in (13, -14):
        with pytest.raises(ValueError, match=f"^x: position {wrong} does not exist in a call of 13 tokens$"):
            absolute([0, wrong, 99], 13, "x")


STATE_EDITS = [(3,), (0, 4, 5, 12), tuple(range(L))]


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("where", STATE_EDITS)
@torch.no_grad()
def test_state_edits_go_on_and_readout_edits_do_not(name, where):
    model = build(name)
    clean, _ = recorded(model)
    at = "blocks.1.mixer.hook_"
    noise = torch.randn(clean[at + "ssm_state"].shape, generator=torch.Generator().manual_seed(2)).double()
    decays = torch.rand(clean[at + "A_bar"].shape, generator=torch.Generator().manual_seed(3)).double()
    double = {t: lambda h: 2 * h for t in where}
    replaced = {t: lambda h, t=t: noise[:, t] for t in where}
    slower = {t: lambda a, t=t: decays[:, t] for t in where}
    cases = [
        ({"ssm_state": lambda x: 2 * x}, dict(edit_state=double)),
        ({"ssm_readout": lambda x: 2 * x}, dict(edit_read=double)),
        ({"ssm_state": noise[:, list(where)]}, dict(edit_state=replaced)),
        ({"ssm_readout": noise[:, list(where)]}, dict(edit_read=replaced)),
        ({"A_bar": decays[:, list(where)]}, dict(edit_decay=slower)),
        (
            {"A_bar": decays[:, list(where)], "ssm_state": lambda x: 2 * x, "ssm_readout": lambda x: x + 1},
            dict(edit_decay=slower, edit_state=double, edit_read={t: lambda h: h + 1 for t in where}),
        ),
    ]
    for changes, edits in cases:
        order = list(where)[::-1] if callable(next(iter(changes.values()))) else where
        edited = {at + key: probes.at(order, change) for key, change in changes.items()}
        if "A_bar" in changes:
            edited = {at + key: probes.at(where, change) for key, change in changes.items()}
        with probes.intervene(model, edited):
            got, _ = recorded(model)
        states, ys = recurrence(model, 1, clean, **edits)
        torch.testing.assert_close(got[at + "ssm_state"], states)
        torch.testing.assert_close(got[at + "y"], ys)
        with probes.intervene(model, edited):  # without hook_y the gate stays in the scan
            _, logits = recorded(model, at + "ssm_state", positions=[5, 3])
        with probes.intervene(model, {at + "y": ys}):
            torch.testing.assert_close(logits, model(IDS))


@pytest.mark.parametrize("name", STATES)
@torch.no_grad()
def test_state_edits_in_pieces_with_a_cache(name):
    """A pass that starts from cached states, padded on the left, and edits inside the second piece."""
    model, key = build(name), "blocks.0.mixer.hook_ssm_state"
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, :4] = False
    with probes.intervene(model, {key: probes.at([8], lambda h: -h)}):
        want = model(IDS, attention_mask=mask)
    cache = model.init_cache()
    pieces = [model(IDS[:, :5], attention_mask=mask[:, :5], cache=cache)]
    with probes.intervene(model, {key: probes.at([3], lambda h: -h)}), probes.record(model, key) as second:
        pieces.append(model(IDS[:, 5:10], cache=cache))
    pieces += [model.step(IDS[:, t], cache)[:, None] for t in range(10, L)]
    got = torch.cat(pieces, 1)
    torch.testing.assert_close(got[mask], want[mask])
    assert second[key].shape[:2] == (B, 5)


@torch.no_grad()
def test_attention_probes_with_masks_and_caches():
    model, name = build("transformer"), "blocks.1.attn.hook_pattern"
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, :4] = False
    whole, _ = recorded(model, name, attention_mask=mask)
    assert (whole[name][0, :, 4:, :4] == 0).all()
    first, second = {name: probes.at([8], lambda p: p.flip(-1))}, {name: probes.at([2], lambda p: p.flip(-1))}
    cache = model.init_cache()
    model(IDS[:, :6], attention_mask=mask[:, :6], cache=cache)
    rest, _ = recorded(model, name, ids=IDS[:, 6:], cache=cache)
    torch.testing.assert_close(rest[name], whole[name][:, :, 6:])
    with probes.intervene(model, first):
        want = model(IDS[:, :9], attention_mask=mask[:, :9])[:, 8]
    cache = model.init_cache()
    model(IDS[:, :6], attention_mask=mask[:, :6], cache=cache)
    with probes.intervene(model, second):
        torch.testing.assert_close(model(IDS[:, 6:9], cache=cache)[:, 2], want)


@torch.no_grad()
def test_edits_at_padding_reach_no_real_token(model):
    """All positions shifted by one: as in the sequence alone. (States and patterns are edited as told.)"""
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, :4] = mask[1, 9:] = False
    for name in model.hook_names():
        if name.endswith(("hook_ssm_state", "hook_pattern")):
            continue
        with probes.intervene(model, {name: lambda x: x + 1}):
            got = model(IDS, attention_mask=mask)
            alone = [model(IDS[row, mask[row]][None])[0] for row in range(B)]
        torch.testing.assert_close(got[mask], torch.cat(alone), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, "autocast"])
@torch.no_grad()
def test_low_precision(family, dtype):
    """Every name can be recorded and edited, and identities are exact there too."""
    model = build(family, torch.float32 if dtype == "autocast" else dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
        want = model(IDS)
        for name in model.hook_names():
            with probes.intervene(model, {name: probes.at([3, 8], lambda x: x)}):
                got = model(IDS)
            if local_name(name) != ROUNDED:
                assert torch.equal(got, want), name
            with (
                probes.intervene(model, {name: probes.at([3, 8], halve)}),
                probes.record(model, name) as cache,
            ):
                got = model(IDS)
            assert got.dtype == torch.bfloat16 and got.isfinite().all() and len(cache[name]) == B
            assert not torch.equal(got, want), name


@torch.no_grad()
def test_recordings_do_not_change_with_the_callers_tensor():
    model = build("transformer")
    embeds = model.embed(IDS, torch.arange(L))
    with probes.record(model, "hook_embed") as cache:
        model(inputs_embeds=embeds)
    before = embeds.clone()
    embeds.zero_()
    assert torch.equal(cache["hook_embed"], before)


@torch.no_grad()
def test_loss_packing_and_chosen_logits_under_probes(model):
    seq_ids = torch.tensor([0] * 5 + [1] * 8).expand(B, L)
    at = torch.tensor([4, 12])
    plain = model(IDS, seq_ids=seq_ids, logits_at=at)
    with probes.record(model, ["hook_embed", "ln_final.hook_normalized"], positions=[4]) as cache:
        assert torch.equal(model(IDS, seq_ids=seq_ids, logits_at=at), plain)
        loss, _ = model.loss(IDS, labels=OTHER)
    rows, calls = cache.calls("ln_final.hook_normalized")
    assert rows.shape == (4, 1, 16) and calls.shape == (2, 1, 16)
    torch.testing.assert_close(model.head(rows[0, 0]), plain[0, 0])
    torch.testing.assert_close(loss, F.cross_entropy(model(IDS).flatten(0, 1), OTHER.flatten()))


# --- gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATES)
def test_gradients_of_states_on_the_fast_path(name):
    """With respect to the embeddings, against autograd through the recurrence written out."""
    model, at = build(name), "blocks.1.mixer.hook_"
    embeds = model.embed(IDS, torch.arange(L)).detach().requires_grad_()
    with probes.record(model, at + "*", grad=True) as cache:
        model(inputs_embeds=embeds)
    with probes.record(model, at + "ssm_state", positions=[4, 9], grad=True) as some:
        model(inputs_embeds=embeds)
    states, _ = recurrence(model, 1, cache)
    weight = torch.randn(states[:, [4, 9]].shape, generator=torch.Generator().manual_seed(4)).double()
    want, got = (
        torch.autograd.grad((x * weight).sum(), embeds, retain_graph=True)[0]
        for x in (states[:, [4, 9]], some[at + "ssm_state"])
    )
    torch.testing.assert_close(got, want)
    assert not recorded(model, at + "ssm_state")[0][at + "ssm_state"].requires_grad


def test_gradient_with_respect_to_a_tensor_inside(model):
    """An edit that adds nothing still carries a gradient: the derivative of the output along every name."""
    loss = model(IDS).square().sum()
    for name in model.hook_names():
        cache, _ = recorded(model, name, positions=[5])
        zero = torch.zeros_like(cache[name]).requires_grad_()
        for add in (lambda x, z=zero: x + z, lambda x, z=zero: x.add_(z)):
            with probes.intervene(model, {name: probes.at([5], add)}):
                out = model(IDS).square().sum()
            torch.testing.assert_close(out, loss)
            (slope,) = torch.autograd.grad(out, zero)
            step = 1e-6 * torch.randn(zero.shape, generator=torch.Generator().manual_seed(5)).double()
            ends = []
            for sign in (1, -1):
                with (
                    torch.no_grad(),
                    probes.intervene(model, {name: probes.at([5], lambda x, by=sign * step: x + by)}),
                ):
                    ends.append(model(IDS).square().sum())
            torch.testing.assert_close((slope * step).sum() * 2, ends[0] - ends[1], rtol=1e-4, atol=1e-9)


def test_ssd_states_at_equal_the_recurrence_with_gradients():
    torch.manual_seed(0)
    x, dt = torch.randn(2, 11, 4, 3).double(), torch.rand(2, 11, 4).double()
    A, Bt, Ct = -torch.rand(4).double(), torch.randn(2, 11, 2, 5).double(), torch.randn(2, 11, 2, 5).double()
    h0 = torch.randn(2, 4, 3, 5).double()
    leaves = [t.requires_grad_() for t in (x, dt, A, Bt, h0)]
    h, slow = h0, []
    for t in range(11):
        write = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], Bt[:, t].repeat_interleave(2, dim=1))
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + write
        slow.append(h)
    at = [9, 0, 3, 9, 4, 10]
    _, last, states = ssd(x, dt, A, Bt, Ct, h0, chunk_size=4, return_last_state=True, states_at=at)
    want = torch.stack(slow, 1)[:, at]
    torch.testing.assert_close((last, states), (h, want))
    weight = torch.randn_like(want)
    torch.testing.assert_close(*(torch.autograd.grad((s * weight).sum(), leaves) for s in (states, want)))
    assert ssd(x, dt, A, Bt, Ct, states_at=[])[1].shape == (2, 0, 4, 3, 5)
    assert ssd(x[:, :0], dt[:, :0], A, Bt[:, :0], Ct[:, :0], states_at=[])[1].shape == (2, 0, 4, 3, 5)
