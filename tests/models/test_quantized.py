"""Weights in 8 bits: the error of a weight, both ways to multiply, and what whole models answer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from ssm_retrieval.models import quantized
from ssm_retrieval.models.quantized import FEW, Int8Linear, quantize
from ssm_retrieval.ops.linear import Linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer(n=6, k=10, seed=0, dtype=torch.float32, bias=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Linear(k, n, bias=bias)
        with torch.no_grad():
            made.weight.normal_()
    return made.to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 70), st.integers(0, 9), st.floats(-8, 4), st.sampled_from(DTYPES[:2])
)
def test_a_weight_is_off_by_half_a_step_at_most(n, k, seed, power, dtype):
    """A step is the row's largest weight / 127, in the dtype's rounding."""
    old = layer(n, k, seed, bias=False)
    with torch.no_grad():
        old.weight.mul_(10.0**power)
        old.weight[seed % n] = 0  # a row of zeros stays one
    old.to(dtype)
    new = Int8Linear(old)
    exact = new.quantized.double() * new.scale.double()[:, None]
    largest = old.weight.abs().amax(1).double()
    rounding = 2 * torch.finfo(dtype).eps  # of the scale, 127 times half of it at the largest weight
    error = (exact - old.weight.double()).abs().amax(1)
    assert bool((error <= largest * (0.5 / 127 + rounding) + 1e-300).all())
    assert new.quantized.abs().max() <= 127 and bool((new.quantized[seed % n] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [32, 70, 160])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (FEW,), (2, FEW // 2), (FEW + 1,), (3, 40), (0,), ()])
def test_both_ways_to_multiply_are_the_product_with_the_integers(dtype, bias, shape, k):
    """Against float64; a token at a time, and many at once, where the matrix is written out."""
    new = Int8Linear(layer(33, k, dtype=dtype, bias=bias))
    x = torch.randn(*shape, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ (new.quantized.double() * new.scale.double()[:, None]).T
    if bias:
        exact = exact + new.bias.double()
    found = new(x)
    assert found.dtype == dtype and found.shape == (*shape, 33)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=k * 4 * torch.finfo(dtype).eps)


def test_few_rows_are_multiplied_as_integers(monkeypatch):
    """So that a token reads a byte a weight: the matrix is not written out."""
    new = Int8Linear(layer(k=64))
    monkeypatch.setattr(Int8Linear, "weight", property(lambda self: pytest.fail("written out")))
    new(torch.ones(FEW, 64))
    with pytest.raises(pytest.fail.Exception, match="written out"):
        new(torch.ones(FEW + 1, 64))


def test_gradients_of_inputs_are_those_of_the_written_matrix():
    new = Int8Linear(layer(k=64))
    x = torch.randn(2, 64, requires_grad=True)
    new(x).square().sum().backward()
    exact = 2 * new(x).detach() @ new.weight
    torch.testing.assert_close(x.grad, exact)


def build(name, **more):
    return models.build(f"{name}-tiny", vocab_size=515, seed=0, **more).eval()


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_every_architecture_answers_alike_in_8_bits(name):
    """Perplexity of tokens that it draws itself is within 1 %, and it decodes what it reads at once."""
    model, old = build(name), build(name)
    model = quantize(model)
    ids = torch.randint(0, 515, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        was, now = (m(ids).log_softmax(-1) for m in (old, model))
        kl = (was.exp() * (was - now)).sum(-1).mean()  # log of the perplexities' ratio, for such tokens
        assert 0 < kl < 0.001
        cache = model.init_cache()
        steps = torch.cat([model(one, cache=cache) for one in ids.split(1, dim=1)], dim=1)
    torch.testing.assert_close(steps.log_softmax(-1), now, rtol=1e-3, atol=1e-3)


def test_what_steers_the_state_and_the_embedding_stay_as_they_are():
    model, old = quantize(build("mamba")), build("mamba")
    kept = dict(model.named_parameters())
    assert all(torch.equal(kept[name], p) for name, p in old.named_parameters() if name in kept)
    gone = {name.rsplit(".", 2)[-2] for name, _ in old.named_parameters()} - {
        name.rsplit(".", 2)[-2] for name in kept
    }
    assert gone == {"in_proj", "out_proj"} and "backbone.embedding.weight" in kept
    assert isinstance(model.head, Int8Linear) and not model.training


def test_models_in_8_bits_are_neither_saved_nor_grown_nor_quantised_again(tmp_path):
    model = quantize(build("transformer"))
    for what in (
        lambda: models.save(model, tmp_path / "m"),
        lambda: models.grow_vocabulary(model, 3),
        lambda: quantize(model),
    ):
        with pytest.raises(UserError, match="8 bits"):
            what()
    assert not (tmp_path / "m").exists() and quantized.is_quantized(model)
