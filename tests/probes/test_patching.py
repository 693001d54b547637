"""Patches against interventions in a full forward pass, circuits whose effects are known, and identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from patching_task import TASK
from scipy import stats

import probes
from probes import ablation, patch_effects, patch_sites, patch_states, patching
from probes.contrast_pairs import KINDS, contrast_pairs
from probes.patch_cells import patch_cells, target_and_partner
from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from synthetic import tasks

FAMILIES = {
    "transformer": dict(n_layer=3, n_head=4, rotary_pct=0.5),
    "sequential-transformer": dict(n_layer=3, n_head=4, parallel_residual=False, position="learned"),
    "mamba": dict(n_layer=3, d_state=5),
    "mamba2": dict(n_layer=3, d_state=6, headdim=8, ngroups=2, chunk_size=4),
    "hybrid": dict(n_layer=4, pattern="M2 A", n_head=4, rotary_pct=0.5, headdim=16),
    "linear": dict(n_layer=3, d_state=5),
    "deltanet": dict(n_layer=3, d_state=6, headdim=8, d_mlp=24),
    "gated-deltanet": dict(n_layer=3, d_state=6, headdim=8, d_mlp=24),
    "kda": dict(n_layer=3, d_state=6, headdim=8, d_mlp=24),
    "gla": dict(n_layer=3, d_state=6, headdim=8, d_mlp=24),
    "mamba3": dict(n_layer=3, d_state=6, headdim=8, rope_fraction=1.0),
}


def tiny(family: str, **changes):
    """A random model, float64, whose weights are large enough that every patch has an effect."""
    name = f"{family.removeprefix('sequential-')}-tiny"
    options = (
        dict(d_model=16, vocab_size=TASK.vocab_size, tie_word_embeddings=False) | FAMILIES[family] | changes
    )
    model = models.build(name, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model.eval()


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny(request.param)


# --- patches against a full forward pass --------------------------------------------------------------------


def recorded(model, ids, names):
    with torch.no_grad(), probes.record(model, names) as cache:
        model(ids)
    return cache


@torch.no_grad()
def naive(model, made, key, where, source):
    """Logit differences (B,) of the corrupted run, whole, with an intervention by name."""
    ids = {"clean": made.clean.input_ids, "other": made.clean.input_ids.roll(1, 0)}
    n = model.config.n_layer
    names = {"residual": "hook_resid_pre", "state": "mixer.hook_ssm_state", "head": "attn.hook_z"}
    name = f"blocks.{min(key.layer, n - 1)}.{names[key.site]}"
    if key.layer == n:
        name = f"blocks.{n - 1}.hook_resid_post"
    x = recorded(model, ids["clean"], [name])[name]
    if source == "unrelated":
        new = recorded(model, ids["other"], [name])[name]
        axes = (2, 3) if key.site == "state" and x.dim() == 4 else (2, 3, 4) if key.site == "state" else (-1,)
        x = new * x.pow(2).sum(axes, keepdim=True).sqrt() / new.pow(2).sum(axes, keepdim=True).sqrt()
    L = x.shape[1]
    if key.site == "state":  # at the last token of the cell
        places = torch.arange(L)
        last = torch.where(where, places, -1).amax(1)

        def replaced(t):
            mine = (last == t).view(-1, *(1,) * (x.dim() - 1))
            return probes.at(t, lambda h: torch.where(mine, x[:, t : t + 1], h))

        change = [replaced(t) for t in range(L)]
    else:
        mask = where.view(*where.shape, *(1,) * (x.dim() - 2))
        if key.head is not None:
            mask = mask & (torch.arange(x.shape[2]) == key.head)[:, None]
        change = lambda now: torch.where(mask, x, now)  # noqa: E731
    with probes.intervene(model, {name: change}):
        logits = model(made.corrupted.input_ids)[:, made.answer_at]
    rows = torch.arange(len(made))
    return logits[rows, made.answer] - logits[rows, made.corrupted_answer], logits.argmax(-1) == made.answer


@pytest.mark.parametrize("layout, kind", [("suffix", "target"), ("prefix", "query")])
def test_every_patch_equals_an_intervention_in_a_full_pass(model, layout, kind):
    made = contrast_pairs(tasks.build("position", seq_len=8, num_symbols=24, layout=layout), 5, 6, kind)
    traced = patching.trace(model, made, patch_cells(made))
    checked = set()
    for i, key in enumerate(traced.keys):
        cell = traced.cells[key.cell]
        if key.control not in ("", "unrelated") or (key.cell + key.layer + (key.head or 0)) % 3:
            continue  # every third one
        want, right = naive(model, made, key, cell.where, key.control)
        known = cell.where.any(1)
        torch.testing.assert_close(traced.difference[i][known], want[known], rtol=1e-9, atol=1e-10)
        assert torch.equal(traced.right[i], right & known)
        assert traced.difference[i][~known].isnan().all()
        checked.add((key.site, key.layer, key.control))
    has_states = any("hook_ssm_state" in name for name in model.hook_names())
    has_heads = "attention" in str(model)
    expected = {"residual"} | ({"state"} if has_states else set()) | ({"head"} if has_heads else set())
    assert {site for site, _, _ in checked} == expected
    assert {layer for site, layer, _ in checked if site == "residual"} == set(range(model.config.n_layer + 1))


@torch.no_grad()
@pytest.mark.parametrize("wide", [True, False])
def test_residuals_have_the_precision_of_the_stream(wide):
    model = models.build("mamba-tiny", vocab_size=20, n_layer=2, dtype=torch.bfloat16, residual_in_fp32=wide)
    ids = torch.arange(12).view(2, 6)
    found = patch_sites.residuals(model, ids)
    with probes.record(model, "blocks.*.hook_resid_pre") as cache:
        model(ids)
    assert {x.dtype for x in found} == {torch.float32 if wide else torch.bfloat16}
    for i, x in enumerate(found[:-1]):
        assert torch.equal(x, cache[f"blocks.{i}.hook_resid_pre"])


@torch.no_grad()
def test_residual_patch_equals_a_torch_hook(model):
    made = contrast_pairs(TASK, 4, 7, "target")
    traced = patching.trace(model, made, patch_cells(made), ["residual"], controls=False)
    rows = torch.arange(4)
    plain = [model(run.input_ids)[:, -1] for run in (made.clean, made.corrupted)]
    clean, corrupted = (x[rows, made.answer] - x[rows, made.corrupted_answer] for x in plain)
    table = traced.table()
    assert table["gap"].to_numpy() == pytest.approx((clean - corrupted).mean().item())
    for name, x in zip(("clean", "corrupted"), plain, strict=True):
        assert (table[f"accuracy_{name}"] == (x.argmax(-1) == made.answer).double().mean().item()).all()
    for i, key in list(enumerate(traced.keys))[::5]:
        if key.layer == model.config.n_layer:
            continue
        block, where = model.blocks[key.layer], traced.cells[key.cell].where
        seen = []
        handle = block.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        model(made.clean.input_ids)
        handle.remove()

        def swap(_, inputs, where=where, seen=seen):
            return torch.where(where[..., None], seen[0], inputs[0]), *inputs[1:]

        handle = block.register_forward_pre_hook(swap)
        logits = model(made.corrupted.input_ids)[:, -1]
        handle.remove()
        want = logits[rows, made.answer] - logits[rows, made.corrupted_answer]
        known = where.any(1)
        torch.testing.assert_close(traced.difference[i][known], want[known], rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_sites_make_everything_where_the_model_is(model):
    """What a function makes without naming a device would be on another one here, and not fit."""
    made = contrast_pairs(TASK, 3, 8)
    ids, at = made.clean.input_ids, torch.tensor([[1, 4, 9], [3, 3, 3]])

    def results():
        x = patch_sites.residuals(model, ids)
        cache = model.init_cache()
        patch_sites.advance(model, ids, cache, 3)
        found = [*x, patch_sites.run_from(model, 1, x[1][None], None, made.answer_at)]
        found.append(patch_sites.run_from(model, 1, x[1][None, :, 3:], cache, made.answer_at - 3))
        for i, block in enumerate(model.blocks):
            if patch_sites.has_site(block, "head"):
                heads = patch_sites.Heads(block, x[i])
                found.append(heads.added(heads.z[None, :, 2:, 0], 1, 2))
            else:
                state = patch_states.ssm_state(block, x[i])
                h = state.states([4, 1])
                found += [h, state.added(h.transpose(0, 1), at, 1)]
        return found

    wanted = results()
    with torch.device("meta"):
        found = results()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    whole, rest = wanted[model.config.n_layer + 1 :][:2]
    torch.testing.assert_close(whole, rest)


# --- identities and controls --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_self_patch_changes_no_bit_and_everything_is_the_clean_run(family):
    """In float32, where roundings would show."""
    model, made = tiny(family).float(), contrast_pairs(TASK, 6, 8, "target")
    traced = patching.trace(model, made, patch_cells(made))
    seen = set()
    for i, key in enumerate(traced.keys):
        if key.control == "self":
            assert torch.equal(traced.difference[i], traced.corrupted), key
        elif key.control == "everything":
            assert torch.equal(traced.difference[i], traced.clean), key
        seen.add((key.site, key.control))
    assert {("residual", "self"), ("residual", "everything")} < seen
    table = traced.table()
    assert (table.query("control == 'self'")["effect"] == 0).all()
    assert (table.query("control == 'everything'")["effect"] - 1).abs().max() < 1e-12
    unrelated = table.query("control == 'unrelated' and layer == 1 and role == 'target'")
    assert (unrelated["effect"] != 0).all() and len(unrelated)


def test_memory_decides_nothing_but_memory(model):
    made = contrast_pairs(TASK, 40, 8, "target")
    wide, narrow = (patching.trace(model, made, patch_cells(made), memory_mb=m) for m in (512, 1))
    torch.testing.assert_close(wide.difference, narrow.difference, rtol=1e-9, atol=1e-10, equal_nan=True)
    assert torch.equal(wide.right, narrow.right) and wide.keys == narrow.keys
    torch.testing.assert_close(wide.clean, narrow.clean)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_state_behind_all_changes_carries_everything(family):
    """One layer, kind "target": behind the changed tokens, out of the convolution's sight of them, the runs
    differ in their states only, so the clean state makes the clean run; before them, nothing differs."""
    model, made = tiny(family, n_layer=1), contrast_pairs(TASK, 60, 8, "target")
    width = model.config.d_conv
    traced = patching.trace(model, made, patch_cells(made), ["state"], controls=False)
    effects, behind, before = traced.effects(), 0, 0
    for i, key in enumerate(traced.keys):
        cell = traced.cells[key.cell]
        last = torch.where(cell.where, torch.arange(cell.where.shape[1]), -1).amax(1)
        late = (last >= made.changed[:, 1] + width) & cell.where.any(1)
        early = (last < made.changed[:, 0]) & cell.where.any(1)
        torch.testing.assert_close(effects[i][late], torch.ones(int(late.sum())).double(), rtol=0, atol=1e-6)
        assert (effects[i][early] == 0).all()
        behind, before = behind + int(late.sum()), before + int(early.sum())
    assert behind > 30 and before > 30


# --- a circuit whose effects are known ----------------------------------------------------------------------


def copying_transformer(task, length):
    """One layer; head 0 attends to tokens equal to the one it stands on and copies their position's answer.

    Residual stream: one-hot token, one-hot position, answers. Every embedding has the same norm.
    """
    V, L, n = task.vocab_size, task.max_length(), length
    half = max(V, L)
    model = models.build(
        "transformer-tiny", vocab_size=V, d_model=2 * half, n_layer=1, n_head=2, position="learned",
        norm="rms", max_position_embeddings=L, tie_word_embeddings=False, d_mlp=4, dtype=torch.float64,
    )  # fmt: skip
    token, place, answer = 0, V, V + L
    assert answer + n <= 2 * half
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.zero_() if "norm" not in name else p
        neox = model.gpt_neox
        neox.embed_in.weight[:, token : token + V] = torch.eye(V)
        neox.embed_pos.weight[:, place : place + L] = torch.eye(L)
        attention = neox.layers[0].attention
        q, k, v = attention.query_key_value.weight[: 3 * half].split(half)
        q[:V, token : token + V] = k[:V, token : token + V] = 100 * torch.eye(V)
        v[:n, place + 1 : place + 1 + n] = torch.eye(n)  # the context begins behind <bos>
        attention.dense.weight[answer : answer + n, :n] = torch.eye(n)
        first = task.vocabulary.first_position
        model.embed_out.weight[first : first + n, answer : answer + n] = torch.eye(n)
    return model.eval()


def test_effects_in_a_head_that_copies():
    task = tasks.build("position", seq_len=8, num_symbols=24)
    model = copying_transformer(task, 8)
    for kind in KINDS:
        made = contrast_pairs(task, 30, 8, kind)
        table = patching.patch(model, made)
        assert (table["accuracy_clean"] == 1).all() and (table["accuracy_corrupted"] == 0).all()
        plain = table.query("control == ''")

        def effects(site, layer, head=None, plain=plain):
            rows = plain[(plain.site == site) & (plain.layer == layer)]
            rows = rows if head is None else rows[rows["head"] == head]
            return {r.role: r for r in rows.itertuples() if abs(r.effect) > 1e-6}

        if kind == "query":
            assert effects("residual", 0).keys() == {"query"}
        else:  # after one of two symbols the query finds both places, or none: between the two answers
            found = effects("residual", 0)
            assert found.keys() == {"target", "partner"}
            assert all(abs(r.effect - 0.5) < 1e-6 and abs(r.effect_each - 0.5) < 1e-6 for r in found.values())
        for found in (effects("residual", 1), effects("head", 0, 0)):
            assert found.keys() == {"query"}
            row = found["query"]
            assert abs(row.effect - 1) < 1e-6 and row.effect_high - row.effect_low < 1e-6
            assert row.accuracy == 1 and row.n == 30
        assert effects("head", 0, 1) == {}
    out = ablation.knock_out(model, made.clean, replacement="zero").set_index(["control", "number"])
    assert out.loc[("", 0), "drop"] == 1 and out.loc[("", 1), "drop"] == 0
    assert (out["accuracy_intact"] == 1).all()


# --- knocking out -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("replacement", ablation.REPLACEMENTS)
def test_knock_out_equals_a_torch_hook(model, replacement):
    task = tasks.build("position", seq_len=8, num_symbols=24)
    batch = task.batch(50, seed=0, index=0, queries=3)
    batch.labels[:] = model(batch.input_ids, logits_at=batch.answer_at).argmax(-1)  # all right when intact
    table = ablation.knock_out(model, batch, replacement=replacement, rows=16)
    assert (table["accuracy_intact"] == 1).all()
    for row in table[table["control"] == ""].iloc[::3].itertuples():
        block = model.blocks[row.layer]
        projection = block.attention.dense if row.kind == "head" else block.mixer.out_proj

        def without(_, inputs, row=row):
            x = inputs[0].clone()
            part = x[..., row.low : row.high]
            x[..., row.low : row.high] = 0 if replacement == "zero" else part.mean(0)
            return (x,)

        handle = projection.register_forward_pre_hook(without)
        right = batch.right(model(batch.input_ids, logits_at=batch.answer_at).argmax(-1))
        handle.remove()
        assert row.accuracy == float(right.double().mean())
        assert row.drop == pytest.approx(1 - row.accuracy)
        assert row.drop_low <= row.drop <= row.drop_high
    assert sorted(table.query("control == 'random'")["layer"]) == list(range(model.config.n_layer))
    assert table["drop"].max() > 0


@pytest.mark.parametrize("family", ["transformer", "mamba"])
def test_target_and_partner_together_are_all_that_differs(family):
    """Kind "target": before the first block they are the whole difference; kind "query": none of it."""
    model = tiny(family)
    for kind, effect in (("target", 1), ("query", 0)):
        made = contrast_pairs(TASK, 12, 8, kind)
        traced = patching.trace(model, made, [target_and_partner(made)], ["residual"], layers=[0, 2])
        table = traced.table().query("control == ''").set_index("layer")
        assert table.loc[0, "effect"] == pytest.approx(effect, abs=1e-9)
        assert traced.cells[0].where.sum(1).tolist() == [2] * 12
    apart = patching.trace(
        model, contrast_pairs(TASK, 12, 8, "target"), patch_cells(made), ["residual"], layers=[2]
    )
    alone = apart.table().query("control == '' and role in ['target', 'partner']")["effect"].sum()
    made = contrast_pairs(TASK, 12, 8, "target")
    joint = patching.trace(model, made, [target_and_partner(made)], ["residual"], layers=[2]).table()
    assert abs(alone - joint["effect"].iloc[0]) > 1e-3  # effects of two patches do not add up


def test_one_pair_has_no_unrelated_run():
    """Rolled by one it would be its own control, with the effect of the patch itself."""
    model, one = tiny("mamba"), contrast_pairs(TASK, 1, 8)
    with pytest.raises(UserError, match="needs two pairs; give more, or controls=False"):
        patching.patch(model, one, ["residual"])
    assert (patching.patch(model, one, ["residual"], controls=False)["control"] == "").all()


def test_refusals_are_one_line():
    model, made = tiny("mamba"), contrast_pairs(TASK, 2, 8)
    with pytest.raises(ValueError, match="unknown site 'heads'"):
        patching.patch(model, made, ["heads"])
    with pytest.raises(ValueError, match="n_layer = 3"):
        patching.patch(model, made, layers=[4])
    with pytest.raises(ValueError, match="unknown replacement"):
        ablation.knock_out(model, made.clean, replacement="noise")
    with pytest.raises(ValueError, match="groups 5 must divide the 32 channels"):
        ablation.parts(model, 0, groups=5)


def test_an_effect_is_the_share_of_the_gap_that_patches_restore():
    """By hand: gaps 1, 2, 3, of which 1, 0, 2 are restored; an example without a patch is left out."""
    corrupted = torch.tensor([5.0, -1.0, 2.0, 7.0])
    clean = corrupted + torch.tensor([1.0, 2.0, 3.0, 100.0])
    patched = corrupted + torch.tensor([1.0, 0.0, 2.0, torch.nan])
    value, low, high = patch_effects.effect(patched, clean, corrupted)
    assert value == pytest.approx(3 / 6)
    half = stats.t.ppf(0.975, 2) * np.std([0.5 / 2, -1 / 2, 0.5 / 2], ddof=1) / 3**0.5
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))
    assert np.isnan(patch_effects.effect(corrupted, corrupted, corrupted)).all()  # there is no gap
    assert np.isnan(patch_effects.effect(patched, corrupted + 1e-7, corrupted)).all()


def test_parts_of_a_layer_are_its_heads_or_equal_groups_of_channels():
    mamba2 = models.build("mamba2-tiny", vocab_size=20, d_model=64, headdim=32, n_layer=1)  # 128 channels
    assert [(p.kind, p.low, p.high) for p in ablation.parts(mamba2, 0)] == [
        ("channels", i, i + 32) for i in (0, 32, 64, 96)
    ]
    mamba = models.build("mamba-tiny", vocab_size=20, d_model=64, n_layer=1)
    assert [(p.low, p.high) for p in ablation.parts(mamba, 0)] == [(i, i + 8) for i in range(0, 128, 8)]
