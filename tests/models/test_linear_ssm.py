"""The linear SSM of the recall scaling laws: its equations, what it is in the registry, and its circuit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from probes.scan import iterate_states, record_scans
from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.registry import preset_of
from synthetic import tasks
from synthetic.config import RunConfig, plan

VOCAB = 23
SHAPES = {
    "one block": dict(),
    "three blocks": dict(n_layer=3),
    "no window": dict(d_conv=1, expand=1),
    "long window": dict(d_conv=4, n_layer=2, expand=3),
    "positions": dict(position="learned", max_position_embeddings=16),
}


def build(**options):
    """A small model, float64, whose blocks are loud enough that each of them matters."""
    shape = dict(vocab_size=VOCAB, d_model=6, d_state=3) | options
    model = models.build("linear", seed=1, dtype=torch.float64, **shape)
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.out_proj.weight.mul_(3)
    return model


def tokens(*shape, seed=0):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def by_hand(model, ids):
    """The equations by cumulative sums over whole sequences: no scan, no kernel, no cache.

    Returns:
        Logits (B, L, V), and the states of every block (B, L, E, N).
    """
    config, found = model.config, []
    x = model.embedding.weight[ids]
    if config.position == "learned":
        x = x + model.embed_pos.weight[: ids.shape[1]]
    for block in model.blocks:
        mixer = block.mixer
        into, taps = x @ mixer.in_proj.weight.T, mixer.conv1d.weight[:, 0]
        u = torch.zeros_like(into)
        for back in range(config.d_conv):  # the last tap is the token's own
            u = u + F.pad(into, (0, 0, back, 0))[:, : ids.shape[1]] * taps[:, config.d_conv - 1 - back]
        write, read = (u @ half.T for half in mixer.x_proj.weight.chunk(2))
        h = torch.einsum("ble,bln->blen", u, write).cumsum(1)
        out = torch.einsum("blen,bln->ble", h, read) @ mixer.out_proj.weight.T
        x = out if config.n_layer == 1 else x + out
        found.append(h)
    return x @ model.embedding.weight.T, found


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_are_those_of_cumulative_sums(shape):
    model, ids = build(**SHAPES[shape]), tokens(2, 13)
    got, (want, _) = model(ids), by_hand(model, ids)
    torch.testing.assert_close(got, want)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(2)).double()
    leaves = list(model.parameters())
    torch.testing.assert_close(*(torch.autograd.grad((x * weight).sum(), leaves) for x in (got, want)))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_cache_continues_and_holds_the_state(shape):
    """In pieces and token by token; the cache has h, and as many numbers as `state_size` says."""
    model, ids = build(**SHAPES[shape]), tokens(2, 12)
    want, states = by_hand(model, ids)
    cache = model.init_cache()
    pieces = [model(ids[:, :5], cache=cache), model(ids[:, 5:7], cache=cache)]
    pieces += [model.step(ids[:, t], cache)[:, None] for t in range(7, 12)]
    torch.testing.assert_close(torch.cat(pieces, 1), want)
    for layer, h in zip(cache.layers, states, strict=True):
        torch.testing.assert_close(layer["ssm"], h[:, -1])
    assert 2 * models.state_size(model.config, 12) == cache.num_elements()


@torch.no_grad()
def test_the_scan_that_probes_record_is_the_layer():
    model, ids = build(n_layer=2), tokens(2, 9)
    _, want = by_hand(model, ids)
    scans = record_scans(model, ids)
    assert set(scans) == {0, 1}
    for layer, scan in scans.items():
        h = torch.cat([states for _, states in iterate_states(scan)], dim=1).squeeze(-2)  # heads of width 1
        torch.testing.assert_close(h, want[layer])
        assert (scan.A == 0).all() and (scan.dt == 1).all()


def test_it_has_no_other_parameters():
    """No norm, gate, bias, decay, step size or skip: four matrices and a convolution per block."""
    model = build(n_layer=2)
    block = {f"mixer.{name}.weight" for name in ("in_proj", "conv1d", "x_proj", "out_proj")}
    wanted = {f"blocks.{i}.{name}" for i in range(2) for name in block} | {"embedding.weight"}
    assert {name for name, _ in model.named_parameters()} == wanted
    assert model.head.weight is model.embedding.weight


@torch.no_grad()
def test_initial_weights_are_those_of_torch_as_in_the_papers_code():
    model = models.build("linear", seed=0, vocab_size=400, d_model=64, d_state=32, n_layer=2)
    assert model.embedding.weight.std().item() == pytest.approx(1.0, abs=0.02)
    for block in model.blocks:  # uniform within 1 / sqrt(inputs), not smaller where there are several blocks
        mixer = block.mixer
        for name, inputs in (("in_proj", 64), ("x_proj", 128), ("out_proj", 128), ("conv1d", 2)):
            weight = getattr(mixer, name).weight
            assert weight.abs().max().item() == pytest.approx(inputs**-0.5, rel=0.02), name
            assert weight.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.1), name


@torch.no_grad()
def test_the_designed_circuit_recalls():
    """The paper's figure 2 with one-hot keys and values: duplicate, shift the copy, hash, read the value.

    With as many states as symbols nothing collides, so every answer of MQAR is right; with the window's taps
    exchanged a value is filed under the key that follows it.
    """
    task = tasks.build("mqar", seq_len=32, num_symbols=16, num_pairs=4, power=1.0, random_fillers=False)
    D = V = task.vocab_size
    model = models.build("linear", vocab_size=V, d_model=D, d_state=V)
    mixer, one, none = model.blocks[0].mixer, torch.eye(D), torch.zeros(D, D)
    model.embedding.weight.copy_(one)
    mixer.in_proj.weight.copy_(torch.cat([one, one]))  # channels: what was before, what is now
    before, now = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    mixer.conv1d.weight.copy_(torch.stack([before] * D + [now] * D)[:, None])
    mixer.x_proj.weight.copy_(torch.cat([torch.cat([one, none], 1), torch.cat([none, one], 1)]))
    mixer.out_proj.weight.copy_(torch.cat([none, one], 1))
    batch = task.batch(50, seed=0, index=0, split="heldout", queries=4)
    right = lambda: batch.right(model(batch.input_ids, logits_at=batch.answer_at).argmax(-1))  # noqa: E731
    assert right().all()
    mixer.conv1d.weight.copy_(mixer.conv1d.weight.flip(-1))
    assert right().float().mean() < 0.2


def test_its_blocks_stand_in_hybrids():
    hybrid = models.build(
        "hybrid-tiny", vocab_size=VOCAB, d_model=8, n_head=1, n_layer=4, pattern="linear linear+A"
    )
    cache = hybrid.init_cache()
    logits = hybrid(tokens(1, 6), cache=cache)
    torch.testing.assert_close(logits, hybrid(tokens(1, 6)))
    assert hybrid.to(torch.bfloat16)(tokens(1, 6)).isfinite().all()  # whose stream stays float32
    assert models.state_size(hybrid.config, 6) == cache.num_elements()


def test_runs_choose_its_positions_and_its_state():
    for position, wanted in ((dict(position="none"), "none"), ({}, "learned")):
        p = plan(RunConfig(model="linear", seq_len=16, d_state=8, device="cpu", **position), "linear")
        config = models.config(p.model, **p.model_overrides)
        assert (config.position, config.d_state, config.n_layer, config.residual) == (wanted, 8, 1, False)
        assert "embedding_std" not in p.model_overrides and config.embedding_std == 1.0  # the paper's code's
        assert wanted == "none" or config.max_position_embeddings >= 16 + p.queries
    with pytest.raises(UserError, match="--position rope is for attention, which --model linear lacks; use"):
        plan(RunConfig(model="linear", position="rope", rotary_pct=1.0), "linear")
    with pytest.raises(UserError, match="position='rope' is not a linear SSM's; use"):
        models.config("linear", position="rope")
    with pytest.raises(UserError, match="model linear has no size '130m'; it has tiny"):
        preset_of("linear", "130m")


def test_a_model_comes_back_from_its_folder(tmp_path):
    model = build(n_layer=2, position="learned", max_position_embeddings=16).eval()
    again = models.load(models.save(model, tmp_path / "model"))
    assert again.config == model.config and again.head.weight is again.embedding.weight
    assert torch.equal(again(tokens(1, 9)), model(tokens(1, 9)))
