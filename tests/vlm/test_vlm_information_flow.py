"""Flow from patches to answers: against transformers, loops over the recurrence, and heads set by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from circuits import random_scan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import probes
from probes.scan import Scan, iterate_states
from ssm_retrieval import models
from vlm import prompts
from vlm.config import Run, Scenes, Stage
from vlm.information_flow import (
    COLUMNS,
    answer_places,
    group_weights,
    layer_flows,
    patch_places,
    patches_of,
    scan_flow,
    target_ratios,
    target_table,
    targets,
)
from vlm.information_flow import __main__ as command
from vlm.layout import readings, sequence
from vlm.model import VLM
from vlm.scenes import sample_scene
from vlm.scenes.patches import coverage

WIDTH, SIDE = 6, 3


def vlm(name="transformer-tiny", **more) -> VLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VLM(models.build(name, **dict(vocab_size=300, d_model=32, n_layer=1) | more), WIDTH).eval()


def prompt(question="the red star", layout="agnostic") -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids (1, L) of bytes with an image of 3 x 3 patches, and its features."""
    chunks = prompts.grounding([(question, None)], 9, 9)
    encode = lambda text: list(text.encode())  # noqa: E731
    ids, _ = sequence(chunks, encode, SIDE, layout, markers=(256, 257))
    features = torch.randn(1, SIDE**2, WIDTH, generator=torch.Generator().manual_seed(1))
    return torch.tensor([ids]), features


def test_attention_is_that_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = vlm(n_layer=2, n_head=4, tie_word_embeddings=False, init_std=0.3)
    peer = transformers.GPTNeoXModel(
        transformers.GPTNeoXConfig(
            vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    body = {k: v for k, v in model.lm.state_dict().items() if k.startswith("gpt_neox.")}
    peer.load_state_dict({k.removeprefix("gpt_neox."): v for k, v in body.items()})
    ids, features = prompt()
    with torch.no_grad():
        theirs = peer(inputs_embeds=model.embed(ids, features), output_attentions=True).attentions
    at = [ids.shape[1] - 3, ids.shape[1] - 1]
    flows = layer_flows(model, ids, features, at)
    where = [i for i, token in enumerate(ids[0].tolist()) if token < 0]
    for layer, flow in flows.items():
        expected = theirs[layer][:, :, at][..., where].transpose(1, 2)  # (1, A, H, P)
        torch.testing.assert_close(flow.attention, expected, rtol=1e-4, atol=1e-6)
        assert flow.write is flow.kept is flow.share is None


@pytest.mark.parametrize("layout", prompts.LAYOUTS)
def test_a_head_that_attends_to_one_patch_is_measured_so(layout):
    model, (ids, features) = vlm(n_head=2), prompt(layout=layout)
    places = patch_places(ids)[0].tolist()
    assert [ids[0, i].item() for i in places] == [-200] * SIDE**2 * readings(layout)
    last = ids.shape[1] - 1
    for patch, place in enumerate(places):

        def only(scores, place=place):
            scores[:, 1, -1] = -torch.inf
            scores[:, 1, -1, place] = 0
            return scores

        with probes.intervene(model.lm, {"blocks.0.attn.hook_attn_scores": only}):
            (flow,) = layer_flows(model, ids, features, [last]).values()
        seen = flow.attention[0, 0, 1]
        assert seen.tolist() == np.eye(len(places))[patch].tolist()
        assert 0 < flow.attention[0, 0, 0].sum() < 1  # the other head attends to text as well


@pytest.mark.parametrize("name", ["transformer-tiny", "mamba-tiny", "mamba2-tiny", "hybrid-tiny"])
def test_attention_sums_to_one_where_everything_is_a_patch(name):
    small = {"headdim": 16} if "2" in name else {"n_head": 2} if name[0] in "th" else {}
    model = vlm(name, n_layer=3, **small)
    ids, features = torch.full((2, 9), -200), torch.randn(2, 9, WIDTH)
    flows = layer_flows(model, ids, features, [4, 8])
    assert sorted(flows) == [0, 1, 2]
    for flow in flows.values():
        assert (flow.attention >= 0).all() and (flow.attention[:, 0, :, 5:] == 0).all()
        torch.testing.assert_close(flow.attention.sum(-1), torch.ones(flow.attention.shape[:3]))
    kinds = {flow.write is None for flow in flows.values()}
    assert kinds == {"t": {True}, "m": {False}, "h": {True, False}}[name[0]]


def loops(scan, at):
    """alpha (B, A, H, L), write (B, L), kept and share (B, A, L), by running every token's write alone."""
    B, L, H, P, N = scan.shape
    Bt, Ct = scan.by_head(scan.Bt), scan.by_head(scan.Ct)
    decay = torch.exp(scan.dt[..., None] * scan.A)[..., None, :].expand(B, L, H, 1, N)  # of one token each
    full = torch.zeros(B, L, H, P, N, dtype=scan.x.dtype)  # what is left of each token
    unit = torch.zeros(B, L, H, N, dtype=scan.x.dtype)  # the same for an input of 1
    alpha, kept, share = [], {}, {}
    write = torch.zeros(B, L, dtype=scan.x.dtype)
    for t in range(L):
        full, unit = full * decay[:, t, None], unit * decay[:, t, None, :, 0]
        full[:, t] = torch.einsum("bh,bhp,bhn->bhpn", scan.dt[:, t], scan.x[:, t], Bt[:, t])
        unit[:, t] = scan.dt[:, t, :, None] * Bt[:, t]
        write[:, t] = full[:, t].flatten(1).norm(dim=1)
        if t in at:
            left = full.flatten(2).norm(dim=2)
            kept[t] = left / torch.where(write > 0, write, 1)
            share[t] = left / full.sum(1).flatten(1).norm(dim=1, keepdim=True)
            alpha.append(torch.einsum("bhn,blhn->bhl", Ct[:, t], unit))
    return torch.stack(alpha, 1), write, *(torch.stack([x[t] for t in at], 1) for x in (kept, share))


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_what_ssm_layers_read_write_and_keep_is_what_loops_give(kind):
    scan, at = random_scan(kind, L=24), [17, 23]
    places = torch.tensor([[3, 4, 5, 9, 20], [0, 4, 6, 9, 22]])
    alpha, write, kept, share = loops(scan, at)
    states = torch.cat([h for _, h in iterate_states(scan)], dim=1)
    norm = states[:, at].flatten(2).norm(dim=2)
    flow = scan_flow(scan, norm, places, at)
    rows = alpha.abs() if kind == "mamba2" else alpha.abs().mean(2, keepdim=True)
    rows = rows / rows.sum(-1, keepdim=True)
    for b in range(2):
        for found, expected in (
            (flow.attention[b], rows[b][..., places[b]]),
            (flow.write[b], write[b, places[b]]),
            (flow.kept[b], kept[b][:, places[b]]),
            (flow.share[b], share[b][:, places[b]]),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert (flow.kept[:, 0, 4] == 0).all()  # patches after the position that reads


def test_a_mamba_layer_of_a_vlm_is_measured_with_its_own_recurrence():
    """dt, B, C and u from the layer's modules by PyTorch's hooks, and the recurrence token by token."""
    model, (ids, features) = vlm("mamba-tiny"), prompt(layout="query-first")
    mixer, seen = model.lm.blocks[0].mixer, {}
    handle = mixer.x_proj.register_forward_hook(lambda _, x, y: seen.update(u=x[0], out=y))
    with torch.no_grad():
        model(ids, features)
    handle.remove()
    c = mixer.config
    low, Bt, Ct = seen["out"].split([c.rank, c.d_state, c.d_state], dim=-1)
    dt = F.softplus(F.linear(low, mixer.dt_proj.weight, mixer.dt_proj.bias))
    A = -torch.exp(mixer.A_log)
    at = [ids.shape[1] - 4, ids.shape[1] - 1]
    scan = Scan.mamba(A, dt, Bt, Ct, seen["u"])
    alpha, write, kept, share = loops(scan, at)
    rows = alpha.abs().mean(2, keepdim=True)
    rows = rows / rows.sum(-1, keepdim=True)
    (flow,) = layer_flows(model, ids, features, at).values()
    where = [i for i, token in enumerate(ids[0].tolist()) if token < 0]
    for found, expected in (
        (flow.attention, rows[..., where]),
        (flow.write, write[:, where]),
        (flow.kept, kept[..., where]),
        (flow.share, share[..., where]),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_an_image_that_stands_twice_has_no_single_place_for_a_patch(tmp_path):
    stage = Stage({"boxes": Scenes("grounding", 2)}, steps=1, batch_size=1, lr=1e-3)
    wanted = Run("twice", "mamba-tiny", stages=(stage,), evaluation={}, layout="two-pass")
    with pytest.raises(ValueError, match="reads the image twice"):
        target_table(wanted, tmp_path, examples=2)


def test_only_a_question_before_the_image_changes_what_is_written():
    model = vlm("mamba-tiny", n_layer=2)  # the first layer's convolution reaches no question
    for layout, same in (("agnostic", True), ("instruction-first", True), ("query-first", False)):
        writes = []
        for question in ("the red star", "the big ball"):
            ids, features = prompt(question, layout)
            writes.append(layer_flows(model, ids, features, [ids.shape[1] - 1])[1].write)
        assert torch.allclose(*writes, rtol=1e-6) is same, layout


# --- target and distractors ---------------------------------------------------------------------------------


def test_answer_places_predict_the_supervised_tokens():
    assert answer_places([-100, -100, 5, 6, -100, 7]) == [1, 2, 4]


def test_patches_of_a_box():
    assert patches_of((0, 0, 6, 2), 12, 4).nonzero()[0].tolist() == [0, 1]  # two thirds of two
    assert patches_of((0, 0, 6, 3), 12, 2).nonzero()[0].tolist() == [0]  # covers half: its only one
    assert patches_of((5, 6, 7, 7), 12, 3).nonzero()[0].tolist() == [4]  # a tenth of one patch


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.integers(1, 12))
def test_coverage_adds_up_to_the_area_of_the_box(corners, side):
    x0, x1 = sorted(corners[:2])
    y0, y1 = sorted(corners[2:])
    cover = coverage((x0, y0, x1, y1), side)
    assert cover.min() >= 0 and cover.max() <= 1 + 1e-9
    assert cover.sum() / side**2 == pytest.approx((x1 - x0) * (y1 - y0), abs=1e-9)


def test_averages_find_the_target_the_other_shapes_and_nothing_else():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")
    side = 32  # patches of 4 pixels: every object has some to itself
    for index in range(20):
        scene = sample_scene(0, "heldout", index)
        target = scene.shapes[index % len(scene.shapes)]
        owner = np.full((side, side), -1.0)  # by the patch's centre
        for k, item in enumerate(scene.objects):
            x0, y0, x1, y1 = (-(-(value - 2) // 4) for value in item.box)
            owner[y0:y1, x0:x1] = k
        means = group_weights(scene, target.box, side)
        places = [scene.objects.index(item) for item in scene.shapes]
        number = scene.objects.index(target)
        assert means["target"] @ owner.reshape(-1) == pytest.approx(number, abs=0.35)
        others = np.mean([k for k in places if k != number])
        assert means["distractor"] @ owner.reshape(-1) == pytest.approx(others, abs=0.35)
        assert means["background"] @ owner.reshape(-1) == pytest.approx(-1, abs=0.2)
        for weights in means.values():
            assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
        assert not (means["target"] * means["distractor"]).any()


def test_relative_values_leave_out_the_place_and_keep_the_target():
    """Patch p holds 10^p; whatever is asked for holds three times that."""
    rng = np.random.default_rng(0)
    asked = np.tile(np.arange(4), 25)
    values = 10.0 ** np.tile(np.arange(4), (100, 1))
    values[np.arange(100), asked] *= 3
    eye = np.eye(4)
    means = [dict(target=eye[t], distractor=(1 - eye[t]) / 3, background=eye[rng.integers(4)]) for t in asked]
    rows = pd.DataFrame(list(targets._groups(values, means)))
    table = rows.assign(layer=0, quantity="write")
    (found,) = target_ratios(table, by=("layer", "quantity")).to_dict("records")
    assert found["ratio"] == pytest.approx(3) and found["low"] == pytest.approx(3)
    assert found["raw"] == pytest.approx(3) and found["raw_low"] < 2  # the place makes the interval wide
    assert found["examples"] == 100
    assert rows["target"].tolist() == (3 * 10.0**asked).tolist()


# --- of runs ------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    for name in ("tokenizers", "sklearn", "accelerate"):
        pytest.importorskip(name, reason=f"{name} is not installed; .ci/run installs it")
    import vlm_runs

    vlm_runs.save_encoder(tmp_path)
    return [
        vlm_runs.save(vlm_runs.run("transformer-tiny", layout="query-first"), tmp_path),
        vlm_runs.save(vlm_runs.run("mamba-tiny"), tmp_path),
    ]


def test_the_command_writes_what_each_layer_does_with_targets_and_distractors(folders, tmp_path, capsys):
    path = tmp_path / "tables" / "flow.parquet"
    assert command.main([*map(str, folders), "--out", str(path), "--examples", "20"]) == 0
    table = pd.read_parquet(path)
    assert list(table.columns) == list(COLUMNS) and not table.isna().any(axis=None)
    seen = {tuple(row) for row in table[["family", "layout", "layer", "quantity", "at"]].to_numpy()}
    expected = {
        ("transformer", "query-first", i, "attention", at) for i in (0, 1) for at in ("first", "answer")
    }
    expected |= {
        ("mamba", "agnostic", i, name, at)
        for i in (0, 1)
        for name in ("attention", "kept", "share")
        for at in ("first", "answer")
    } | {("mamba", "agnostic", i, "write", "patch") for i in (0, 1)}
    assert seen == expected
    assert (table.groupby(["run", "layer", "quantity", "at"])["example"].apply(list).map(len) == 20).all()
    printed = capsys.readouterr().out
    assert "mamba-tiny" in printed and str(path) in printed


def test_a_row_of_the_table_is_the_mean_over_its_patches(folders):
    from vlm import answering, components
    from vlm.config import Scenes
    from vlm.folders import saved_run

    run, out = saved_run(folders[1])
    row = target_table(run, out, 4).query("quantity == 'write' and layer == 1 and example == 3").iloc[0]
    source = Scenes("grounding", 4, "heldout").build(answers=False)
    eyes, text = components.eyes("scenes", 32, out), components.text("scenes")
    ids, _ = sequence(source[3].chunks, text.encode, 4, run.layout, markers=text.markers)
    features = eyes([source.picture("3")])
    flow = layer_flows(answering.load(run, out), torch.tensor([ids]), features, [len(ids) - 1])[1]
    written = flow.write[0].numpy()
    box = source[3].target["box"]
    centre = [int((box[k] + box[k + 2]) / 2 / 32) for k in (0, 1)]  # patches of 32 pixels, objects below 32
    mine = patches_of(box, 128, 4)
    assert mine[centre[1] * 4 + centre[0]]
    assert row["target"] == pytest.approx(written[mine].mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere holds no trained VLM"),
        (["nowhere", "--examples", "1"], "--examples 1 must be at least 2"),
        ([], "RUN is missing"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, said, tmp_path, capsys):
    assert command.main([*arguments, "--out", str(tmp_path / "x.parquet")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
