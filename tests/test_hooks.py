"""Recording and replacing named tensors: against equations written out here, and transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import models
import probes
from models.hooks import points
from models.mamba2 import ssd
from probes.names import local_name

FAMILIES = {
    "transformer": ("transformer-tiny", dict(n_head=2)),
    "transformer-sequential": (
        "transformer-tiny",
        dict(n_head=2, parallel_residual=False, position="learned"),
    ),
    "mamba": ("mamba-tiny", dict(d_state=5)),
    "mamba2": ("mamba2-tiny", dict(d_state=6, ngroups=2, headdim=8, chunk_size=4)),
    "hybrid-mamba": ("hybrid-tiny", dict(n_head=2)),
    "hybrid-mamba2": ("hybrid-tiny", dict(n_head=2, ssm="mamba2", headdim=8)),
}
SSM, ATTENTION = ("mamba", "mamba2"), ("transformer", "transformer-sequential")
VOCAB, B, L = 23, 2, 13
IDS = torch.randint(0, VOCAB, (B, L), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(0, VOCAB, (B, L), generator=torch.Generator().manual_seed(1))
# the one name whose use takes part of the computation out of a fused kernel
ROUNDED = "mixer.hook_y"


def build(family, dtype=torch.float64, **more):
    """A small model with weights far from their initial symmetry."""
    name, options = FAMILIES[family]
    model = models.build(name, vocab_size=VOCAB, d_model=16, **{**options, **more}).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model.eval()


def recorded(model, names="*", ids=IDS, **options):
    """Name -> tensor of one pass, and its logits."""
    call = {k: options.pop(k) for k in ("attention_mask", "seq_ids", "cache") if k in options}
    with torch.no_grad(), probes.record(model, names, **options) as cache:
        logits = model(ids, **call)
    return cache, logits


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return build(family)


def recurrence(model, i, t, h0=None, edit_state=None, edit_read=None, edit_decay=None):
    """h_t and y_t of layer i, token by token, from the recorded dt, B, C and u in t (name -> tensor).

    Edits map a position to a function. Mamba: h (B, E, N). Mamba-2: h (B, H, P, N).
    """
    mixer, at = model.backbone.layers[i].mixer, f"blocks.{i}.mixer.hook_"
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


# --- names and shapes --------------------------------------------------------------------------------


def test_every_name_has_the_documented_axes(model, family):
    cache, _ = recorded(model)
    assert list(cache) == model.hook_names()
    for name, point in points(model).items():
        axes, *other = probes.NAMES[local_name(name)][0].split("; Mamba-2 ")
        if other and "mamba2" in family:
            axes = other[0]
        assert " ".join(point.axes) == axes, name
        sizes = dict(B=B, L=L, S=L) | point.sizes
        assert tuple(cache[name].shape) == tuple(sizes[a] for a in point.axes), name


def test_every_documented_name_exists_in_some_model():
    assert {local_name(n) for f in FAMILIES for n in build(f).hook_names()} == set(probes.NAMES)


def test_names_in_the_order_of_the_forward_pass(family, model):
    names = model.hook_names()
    assert names[0] == "hook_embed" and names[-1] == "ln_final.hook_normalized"
    blocks = [n.removeprefix("blocks.0.") for n in names if n.startswith("blocks.0.")]
    if family in ATTENTION:
        outputs = [n for n in blocks if n.endswith("_out")]
        assert outputs == ["hook_attn_out", "hook_mlp_out"]
        assert (
            blocks.index("attn.hook_pattern") < blocks.index("hook_attn_out") < blocks.index("mlp.hook_pre")
        )
    else:
        assert blocks.index("mixer.hook_in") < blocks.index("mixer.hook_y") < blocks.index("hook_mixer_out")
    assert blocks[0] == "hook_resid_pre" and blocks[-1] == "hook_resid_post"


def test_hybrid_has_the_names_of_the_block_that_stands_there():
    names = build("hybrid-mamba").hook_names()
    kinds = [f"blocks.{i}.attn.hook_pattern" in names for i in range(3)]
    assert kinds == [False, False, True]
    assert [f"blocks.{i}.mixer.hook_ssm_state" in names for i in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    "names, options, said",
    [
        (["blocks.0.mixer.hook_ssm_stat"], {}, "no hook .*did you mean blocks.0.mixer.hook_ssm_state"),
        ("*.hook_pattern", {}, r"no hook '\*.hook_pattern'"),
        ("blocks.9.*", {}, "no hook 'blocks.9"),
        ("*", dict(layers=[4]), r"layers=\[4\] has 4, but the model has 4 layers"),
        ("blocks.0.*", dict(layers=[1]), "means no hook"),
        ("*.hook_conv", dict(channels=[32]), "hook_conv has channels 0 to 31, not 32"),
        ("*", dict(grad=True, folder="x"), "cannot be combined with folder="),
        ("*", dict(folder=Path(__file__).parent), "is not an empty folder"),
        ("*", dict(positions=[]), "records nothing"),
    ],
)
def test_bad_requests_give_one_line(names, options, said):
    with pytest.raises(ValueError, match=said) as caught, probes.record(build("mamba"), names, **options):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, said",
    [
        (probes.at(13, torch.zeros(())), "intervene on blocks.0.hook_resid_pre: position 13 does not exist"),
        (lambda x: None, "returned NoneType, not a tensor"),
        (lambda x: x[:, :, :3], r"gives shape \(2, 13, 3\) where \(2, 13, 16\) is needed"),
    ],
)
def test_bad_changes_give_one_line(change, said):
    model = build("mamba")
    with pytest.raises(ValueError, match=said), probes.intervene(model, {"blocks.0.hook_resid_pre": change}):
        model(IDS)
    assert all(getattr(m, "hook", None) is None for m in model.modules())
    with pytest.raises(ValueError, match="is a int; give a function or a tensor"):
        probes.intervene(model, {"hook_embed": 3}).__enter__()
    with pytest.raises(ValueError, match="name each once"):
        probes.at([1, 1], change)


# --- what is recorded --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SSM)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_states_decay_and_output_equal_the_recurrence(name, padded):
    model = build(name)
    mask = torch.ones(B, L, dtype=torch.bool)
    if padded:
        mask[0, :3] = mask[1, -4:] = False
    cache, _ = recorded(model, attention_mask=mask)
    some, _ = recorded(model, "*hook_ssm_*", attention_mask=mask, positions=[7, 0, -1, 6])
    for i in range(model.config.n_layer):
        at = f"blocks.{i}.mixer.hook_"
        states, ys = recurrence(model, i, cache)
        torch.testing.assert_close(cache[at + "ssm_state"], states)
        torch.testing.assert_close(cache[at + "ssm_readout"], states)
        torch.testing.assert_close(some[at + "ssm_state"], states[:, [7, 0, 12, 6]])
        torch.testing.assert_close(cache[at + "y"], ys)
        A, dt = -model.backbone.layers[i].mixer.A_log.exp(), cache[at + "dt"]
        torch.testing.assert_close(cache[at + "A_bar"], (dt * A if A.dim() == 1 else dt[..., None] * A).exp())
        assert (dt[~mask] == 0).all()


@pytest.mark.parametrize("name", SSM)
@torch.no_grad()
def test_mixer_parts_give_its_output(name):
    """From the layer's input to its output, through the recorded parts."""
    model = build(name)
    cache, _ = recorded(model)
    block, at = model.backbone.layers[1], "blocks.1.mixer.hook_"
    mixer = block.mixer
    projected = mixer.in_proj(block.norm(cache["blocks.1.hook_resid_pre"]))
    taps = mixer.conv1d(cache[at + "in"].transpose(1, 2))[..., :L].transpose(1, 2)
    if name == "mamba":
        x, z = projected.chunk(2, dim=-1)
        torch.testing.assert_close(cache[at + "in"], x)
        torch.testing.assert_close(cache[at + "conv"], F.silu(taps))
        r, Bt, Ct = mixer.x_proj(cache[at + "conv"]).split([1, 5, 5], dim=-1)
        torch.testing.assert_close(cache[at + "dt"], F.softplus(mixer.dt_proj(r)))
        out = mixer.out_proj(cache[at + "y"] * cache[at + "gate"])
    else:
        z, x, dt = projected.split([32, 32 + 24, 4], dim=-1)
        torch.testing.assert_close(cache[at + "in"], x)
        u, Bt, Ct = F.silu(taps).split([32, 12, 12], dim=-1)
        torch.testing.assert_close(cache[at + "conv"].flatten(2), u)
        torch.testing.assert_close(cache[at + "dt"], F.softplus(dt + mixer.dt_bias))
        gated = (cache[at + "y"] * cache[at + "gate"]).flatten(2).unflatten(2, (2, 16))
        normed = gated / (gated.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt()
        out = mixer.out_proj(normed.flatten(2) * mixer.norm.weight)
    torch.testing.assert_close(cache[at + "gate"].flatten(2), F.silu(z))
    torch.testing.assert_close(cache[at + "B"].flatten(2), Bt)
    torch.testing.assert_close(cache[at + "C"].flatten(2), Ct)
    torch.testing.assert_close(cache["blocks.1.hook_mixer_out"], out)


@pytest.mark.parametrize("name", ATTENTION)
@torch.no_grad()
def test_attention_parts(name):
    model = build(name)
    cache, _ = recorded(model)
    at, block = "blocks.1.attn.hook_", model.gpt_neox.layers[1]
    pattern, scores = cache[at + "pattern"], cache[at + "attn_scores"]
    torch.testing.assert_close(pattern.sum(-1), torch.ones(B, 2, L).double())
    torch.testing.assert_close(pattern, scores.softmax(-1))
    assert (pattern.triu(1) == 0).all() and (scores.isneginf() == torch.ones(L, L).triu(1).bool()).all()
    q, k = (cache.get(at + f"rot_{n}", cache[at + n]) for n in "qk")
    dots = torch.einsum("blhp,bshp->bhls", q, k) / 8**0.5
    torch.testing.assert_close(scores.tril(), dots.tril())
    torch.testing.assert_close(cache[at + "z"], torch.einsum("bhls,bshp->blhp", pattern, cache[at + "v"]))
    out = block.attention.dense(cache[at + "z"].flatten(2))
    torch.testing.assert_close(cache["blocks.1.hook_attn_out"], out)
    torch.testing.assert_close(cache["blocks.1.mlp.hook_post"], F.gelu(cache["blocks.1.mlp.hook_pre"]))
    some, _ = recorded(model, "*attn.hook_*", positions=[5, -1])
    torch.testing.assert_close(some[at + "pattern"], pattern[:, :, [5, 12]])
    assert some[at + "k"].shape == (B, 2, 2, 8)


@torch.no_grad()
def test_residual_stream_is_a_sum(model):
    cache, logits = recorded(model)
    pieces = ("hook_mixer_out", "hook_attn_out", "hook_mlp_out")
    for i in range(model.config.n_layer):
        at = f"blocks.{i}."
        added = sum(cache[at + p] for p in pieces if at + p in cache)
        torch.testing.assert_close(cache[at + "hook_resid_post"], cache[at + "hook_resid_pre"] + added)
        after = f"blocks.{i + 1}.hook_resid_pre" if i + 1 < model.config.n_layer else None
        assert after is None or torch.equal(cache[after], cache[at + "hook_resid_post"])
        if at + "hook_resid_mid" in cache:
            mid = cache[at + "hook_resid_pre"] + cache[at + "hook_attn_out"]
            torch.testing.assert_close(cache[at + "hook_resid_mid"], mid)
    assert torch.equal(cache["hook_embed"], cache["blocks.0.hook_resid_pre"])
    assert torch.equal(model.parts()[3](cache["ln_final.hook_normalized"]), logits)


def halve(x):
    """Every other element halved, in place: no norm, softmax or mask is blind to that."""
    x[..., ::2] *= 0.5
    return x


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


STATE_EDITS = [(3,), (0, 4, 5, 12), tuple(range(L))]


@pytest.mark.parametrize("name", SSM)
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


@pytest.mark.parametrize("name", SSM)
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
    torch.testing.assert_close(model.parts()[3](rows[0, 0]), plain[0, 0])
    torch.testing.assert_close(loss, F.cross_entropy(model(IDS).flatten(0, 1), OTHER.flatten()))


# --- gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SSM)
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


# --- what a recording holds --------------------------------------------------------------------------


@torch.no_grad()
def test_layers_channels_positions_and_calls(model):
    whole, _ = recorded(model)
    with probes.record(model, "*", layers=[0, -1], positions=[3, -2], channels=[1, 0]) as cache:
        model(IDS[:1])
        model(IDS[1:])
    last = model.config.n_layer - 1
    assert {
        n for n in model.hook_names() if not n.startswith("blocks.") or int(n.split(".")[1]) in (0, last)
    } == set(cache)
    for name, point in points(model).items():
        if name not in cache:
            continue
        want = whole[name].index_select(point.axes.index("L"), torch.tensor([3, L - 2]))
        for axis, letter in enumerate(point.axes):
            if letter in "DEHMJ":
                want = want.index_select(axis, torch.tensor([1, 0]))
        torch.testing.assert_close(cache[name], want)
        assert [len(x) for x in cache.calls(name)] == [1, 1]
    assert cache.num_bytes() == sum(cache[n].numel() * 8 for n in cache)


@torch.no_grad()
def test_calls_of_different_lengths():
    model = build("mamba")
    with probes.record(model, "hook_embed") as cache:
        with pytest.raises(KeyError, match="no forward pass"):
            cache["hook_embed"]
        model(IDS)
        model(IDS[:, :4])
    assert [x.shape[1] for x in cache.calls("hook_embed")] == [L, 4]
    with pytest.raises(ValueError, match=r"differs in shape between calls .*use cache.calls\(name\)"):
        cache["hook_embed"]


@torch.no_grad()
def test_budget_refuses_before_computing_or_streams(model, tmp_path):
    whole, _ = recorded(model)
    again = torch.cat([IDS, OTHER])
    with probes.record(model, "*", budget=whole.num_bytes()) as cache:
        model(IDS)  # just fits
        with pytest.raises(ValueError, match=r"recording needs .* GiB for this call .*positions=.*budget="):
            model(IDS)
    assert cache.num_bytes() == whole.num_bytes()
    largest = max(whole[n].numel() * 8 for n in whole)
    with probes.record(model, "*", budget=largest, folder=tmp_path / "states") as cache:
        assert torch.equal(model(IDS), model(IDS)) and cache.num_bytes() == 0
    for name in whole:
        assert torch.equal(cache[name], torch.cat([whole[name]] * 2))
    assert len(list((tmp_path / "states" / "00001").glob("*.safetensors"))) == len(whole)
    assert not list((tmp_path / "states").rglob("*.part"))
    with pytest.raises(ValueError, match=r"alone needs .*choose positions= or raise budget="):
        recorded(model, ids=again, budget=largest, folder=tmp_path / "more")


@torch.no_grad()
def test_recordings_keep_no_larger_tensor_alive():
    for options in ({}, dict(positions=[1]), dict(channels=[1])):
        cache, _ = recorded(build("mamba"), "*.mixer.*", **options)
        assert all(x.untyped_storage().nbytes() == x.numel() * 8 for x in cache.values())


# --- models of the hub -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mamba", "mamba2", "neox"])
@torch.no_grad()
def test_hub_models_once_loaded(name):
    """Hidden states, patterns and the last SSM state that transformers reports for the same weights."""
    pytest.importorskip("transformers")
    from test_peers import IDS, LAYERS, PAIRS, VOCAB, WIDTH

    preset, make = PAIRS[name]
    torch.manual_seed(0)
    theirs, options = make()
    ours = models.build(preset, vocab_size=VOCAB, d_model=WIDTH, n_layer=LAYERS, **options)
    ours.load_state_dict(theirs.state_dict())
    if name == "neox":
        theirs.set_attn_implementation("eager")
    more = dict(output_attentions=True) if name == "neox" else dict(use_cache=True)
    result = theirs.eval()(IDS, output_hidden_states=True, **more)
    cache, _ = recorded(ours, ids=IDS)
    # the library lists what goes into each NeoX block, and what comes out of each Mamba block
    side = "pre" if name == "neox" else "post"
    got = [cache[f"blocks.{i}.hook_resid_{side}"] for i in range(LAYERS)] + [
        cache["ln_final.hook_normalized"]
    ]
    torch.testing.assert_close(got, [*result.hidden_states], rtol=1e-4, atol=1e-5)
    for i in range(LAYERS):
        if name == "neox":
            pattern = cache[f"blocks.{i}.attn.hook_pattern"]
            torch.testing.assert_close(pattern, result.attentions[i], rtol=1e-4, atol=1e-5)
        else:
            state = cache[f"blocks.{i}.mixer.hook_ssm_state"][:, -1]
            (theirs_last,) = result.cache_params.layers[i].recurrent_states.values()
            torch.testing.assert_close(state, theirs_last.view_as(state), rtol=1e-4, atol=1e-5)
