"""Initial weights: a function of the seed alone, drawn without a trace."""

from __future__ import annotations

import pytest
import torch

from ssm_retrieval import models
from ssm_retrieval.models.layers import init_normal
from ssm_retrieval.models.registry import ARCHITECTURES
from ssm_retrieval.models.seeding import seeded
from ssm_retrieval.training.lora import add_adapters

SMALL = dict(vocab_size=40, d_model=16, n_layer=3)
HEADS = {
    "transformer": dict(n_head=2),
    "hybrid": dict(n_head=2, pattern="M M A"),
    "mamba2": dict(headdim=8),
    "deltanet": dict(headdim=8, d_state=8),
    "gated-deltanet": dict(headdim=8, d_state=8),
    "kda": dict(headdim=8, d_state=8),
    "gla": dict(headdim=8, d_state=8),
    "mamba3": dict(headdim=8, d_state=8),
}


def small(family, **more):
    return models.config(family, **SMALL, **HEADS.get(family, {}), **more)


def draw_everything(seed=3):
    """Everything that a run draws on the way to its first step."""
    model = models.from_config(small("hybrid"), seed=seed)
    models.grow_vocabulary(model, 3, seed=seed)
    pytest.importorskip("peft")
    add_adapters(model, 2, seed)
    return model


@pytest.fixture(params=list(ARCHITECTURES))
def family(request):
    return request.param


def test_weights_are_those_of_torch_seeded_by_hand(family):
    """So that a seed goes on naming the weights that it has named so far."""
    config = small(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        wanted = ARCHITECTURES[family].model(config, None).state_dict()
    got = models.from_config(config, seed=11).state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_no_generator_is_seeded_or_moved(monkeypatch):
    """Neither the CPU's, nor those of GPUs, which `torch.manual_seed` seeds wherever they are."""
    seen = []
    for backend in (torch.cuda, torch.xpu):
        for name in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(backend, name, lambda seed, name=name: seen.append(name))
    torch.manual_seed(5)
    assert seen  # the spy sees what torch does
    seen.clear()
    wanted = torch.rand(3)
    torch.default_generator.manual_seed(5)
    draw_everything()
    assert torch.equal(torch.rand(3), wanted)
    assert seen == []


def test_an_error_while_weights_are_drawn_leaves_no_trace(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError(float(torch.rand(1)))

    before = torch.get_rng_state()
    monkeypatch.setattr(torch.nn, "Embedding", broken)
    with pytest.raises(ZeroDivisionError):
        models.from_config(small("mamba"), seed=1)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torch_defaults_change_the_dtype_not_the_weights(family, default):
    config = small(family)
    wanted = models.from_config(config, seed=2).state_dict()
    grown = models.grow_vocabulary(models.from_config(config, seed=2), 4, seed=1).embedding.weight
    torch.set_default_dtype(default)
    try:
        model = models.from_config(config, seed=2)
        asked = models.from_config(config, seed=2, dtype=torch.float32).state_dict()
        more = models.grow_vocabulary(models.from_config(config, seed=2), 4, seed=1).embedding.weight
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == default and torch.equal(tensor, wanted[name].to(default)), name
        assert torch.equal(asked[name], wanted[name]), name
    assert torch.equal(more, grown.to(default))


def test_the_default_device_is_where_the_model_ends_up():
    with torch.device("meta"):
        model = models.from_config(small("mamba"), seed=2)
        drawn = models.from_config(small("mamba"), seed=2, device="cpu").state_dict()
    assert all(p.is_meta for p in model.parameters())
    wanted = models.from_config(small("mamba"), seed=2).state_dict()
    assert all(torch.equal(drawn[name], wanted[name]) for name in wanted)


def test_adapters_of_a_seed(family):
    pytest.importorskip("peft")

    def adapters(seed):
        model = models.from_config(small(family))
        add_adapters(model, 2, seed)
        return {name: p for name, p in model.named_parameters() if "lora_A" in name}

    a, b, c = adapters(1), adapters(1), adapters(2)
    assert a and all(torch.equal(a[name], b[name]) for name in a)
    assert all(not torch.equal(a[name], c[name]) for name in a)


def test_a_frozen_embedding_stays_frozen_when_the_vocabulary_grows(family):
    for tied in (True, False):
        for frozen in (True, False):
            model = models.from_config(small(family, tie_word_embeddings=tied))
            embedding, head = model.embedding, model.head
            embedding.requires_grad_(not frozen)
            models.grow_vocabulary(model, 2)
            assert embedding.weight.shape[0] == 42 and embedding.weight.requires_grad == (not frozen)
            assert head.weight.requires_grad == (not (tied and frozen))


def test_normal_weights_are_drawn_in_float32_whatever_the_default():
    weight, wanted = torch.empty(8, 8), torch.empty(8, 8)
    with seeded(4):
        init_normal(wanted, 0.3)
    torch.set_default_dtype(torch.float64)
    try:
        with seeded(4):
            init_normal(weight, 0.3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(weight, wanted)
