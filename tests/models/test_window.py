"""Sliding-window attention: what a token sees, what a cache keeps, and how a run asks for it."""

from __future__ import annotations

import pytest
import torch
from hook_models import IDS, L, build, recorded

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from synthetic.config import RunConfig, plan


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 4, L, L + 5])
def test_the_pattern_is_a_softmax_over_the_last_tokens(window):
    """The scores of the model without a window, and no weight further back than that."""
    model, name = build("transformer", n_layer=1, window=window), "blocks.0.attn.hook_"
    free = build("transformer", n_layer=1)
    free.load_state_dict(model.state_dict())
    scores = recorded(free, name + "attn_scores")[0][name + "attn_scores"]
    t = torch.arange(L)
    far = (t[:, None] - t[None, :]) >= window
    want = scores.masked_fill(far, -torch.inf).softmax(-1)
    cache, logits = recorded(model, name + "*")
    torch.testing.assert_close(cache[name + "pattern"], want)
    torch.testing.assert_close(cache[name + "z"], torch.einsum("bhls,bshp->blhp", want, cache[name + "v"]))
    assert torch.equal(logits, model(IDS))  # without probes
    assert torch.allclose(logits, free(IDS)) == (window >= L)


@torch.no_grad()
def test_what_lies_behind_the_window_changes_nothing():
    """Two layers of 4 tokens see 7: the last token, and 3 before each of 2 layers."""
    model = build("transformer", n_layer=2, window=4)
    want = model(IDS)[:, -1]
    for back in range(L):
        other = IDS.clone()
        other[:, L - 1 - back] = (other[:, L - 1 - back] + 1) % 20
        assert torch.allclose(model(other)[:, -1], want) == (back > 6), back


@torch.no_grad()
def test_decoding_keeps_the_window_and_no_more():
    model = build("transformer", n_layer=2, window=4)
    cache, logits = model.init_cache(), []
    for token in IDS.T:
        logits.append(model.step(token, cache))
        kept = [layer["k"].shape[2] for layer in cache.layers]
        assert kept == [min(len(logits), 3)] * 2
        assert cache.num_elements() == 2 * models.state_size(model.config, len(logits))
    torch.testing.assert_close(torch.stack(logits, 1), model(IDS))


def test_no_gradient_reaches_back_beyond_the_window():
    """Two layers of 3 tokens see 5: the last token, and 2 before each of 2 layers."""
    model = build("transformer", n_layer=2, window=3)
    embeddings = model.embed(IDS, torch.arange(L)).detach().requires_grad_()
    model(inputs_embeds=embeddings)[:, -1].square().sum().backward()
    reached = embeddings.grad.abs().amax((0, 2)) > 0
    assert reached.tolist() == [L - 1 - t <= 4 for t in range(L)]


def test_gradients_are_those_of_the_mask():
    """A window is the mask that says so, for every weight."""
    model = build("transformer", n_layer=2, window=3)
    model.loss(IDS, labels=IDS)[0].backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    from ssm_retrieval import ops

    with ops.backend("reference"):
        model.loss(IDS, labels=IDS)[0].backward()
    torch.testing.assert_close(got, [p.grad for p in model.parameters()])


def test_a_run_asks_for_a_window():
    run = RunConfig(seq_len=16, window=8, device="cpu")
    for family in ("transformer", "hybrid"):
        settled = plan(run, family)
        assert models.config(settled.model, **settled.model_overrides).window == 8
    assert plan(RunConfig(seq_len=16, device="cpu"), "hybrid").model_overrides.get("window") is None
    with pytest.raises(UserError, match="--window 8 is for models with attention, which --model mamba lacks"):
        plan(RunConfig(model=("mamba",), seq_len=16, window=8), "mamba")
    with pytest.raises(UserError, match="--window 0"):
        plan(RunConfig(seq_len=16, window=0), "transformer")


def test_transformers_has_no_class_for_a_window(tmp_path):
    model = build("transformer", torch.float32, window=4)
    again = models.load(models.save(model, tmp_path / "model"))
    assert again.config.window == 4 and torch.equal(again(IDS), model(IDS))
