"""Learned positions of SSMs: the Transformer's, and nothing else about the model changes."""

from __future__ import annotations

import json

import pytest
import torch

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.planning import Step, step_memory
from synthetic.config import RunConfig, plan
from synthetic.results import config_columns

SHAPE = dict(vocab_size=23, d_model=32, n_layer=2)
LEARNED = dict(position="learned", max_position_embeddings=40)
IDS = torch.randint(0, 23, (2, 30), generator=torch.Generator().manual_seed(0))
BOTH = pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny", "gated-deltanet-tiny"])


@BOTH
def test_the_table_is_all_that_learned_positions_add(name):
    """Every other weight is that of the model without positions; the table is drawn as the embedding is."""
    plain = dict(models.build(name, **SHAPE).named_parameters())
    learned = dict(models.build(name, **SHAPE, **LEARNED, embedding_std=0.02).named_parameters())
    (table,) = (learned.pop(key) for key in [*learned] if key.endswith(".embed_pos.weight"))
    assert learned.keys() == plain.keys() and all(learned[key].equal(plain[key]) for key in plain)
    assert table.shape == (40, 32) and table.std().item() == pytest.approx(0.02, rel=0.1)


@BOTH
@torch.no_grad()
def test_a_token_is_read_with_the_vector_of_its_position(name):
    """Given as vectors, token + table[position] has the same logits in a model that has no positions."""
    model, plain = models.build(name, **SHAPE, **LEARNED).eval(), models.build(name, **SHAPE).eval()
    table = model.embed_pos.weight
    torch.testing.assert_close(model(IDS), plain(inputs_embeds=plain.embedding(IDS) + table[:30]))
    seq_ids = (torch.arange(30) >= 12).long().expand(2, -1)
    packed = model(IDS, seq_ids=seq_ids)
    torch.testing.assert_close(
        packed[:, 12:], plain(inputs_embeds=plain.embedding(IDS[:, 12:]) + table[:18]), rtol=1e-4, atol=1e-6
    )


@BOTH
def test_longer_than_the_table_is_one_line(name):
    model = models.build(name, **SHAPE, **LEARNED)
    cache = model.init_cache()
    model(IDS, cache=cache)
    with pytest.raises(UserError, match="sequence of 41 tokens exceeds max_position_embeddings=40; build a"):
        model(IDS[:, :11], cache=cache)


@BOTH
def test_rotary_positions_are_of_attention(name):
    said = "position='rope' rotates the queries and keys of attention layers, .* has none .* use 'learned'"
    with pytest.raises(UserError, match=said):
        models.build(name, position="rope")
    with pytest.raises(UserError, match=r"--position rope is for attention, .* lacks; use learned or none"):
        family = name.removesuffix("-tiny")
        plan(RunConfig(seq_len=8, model=(family,), position="rope"), family)


@BOTH
def test_what_no_class_of_transformers_has_is_saved_in_our_form(name, tmp_path):
    """And without positions the initialisation changes nothing about transformers' form."""
    for options, kind in (
        (LEARNED, "ssm-retrieval"),
        (dict(ssm_init="recall"), name.removesuffix("-tiny").replace("-", "_")),
    ):
        model = models.build(name, **SHAPE, **options).eval()
        folder = models.save(model, tmp_path / kind)
        assert json.loads((folder / "config.json").read_text())["model_type"] == kind
        again = models.load(folder)
        assert again.config == model.config and torch.equal(again(IDS), model(IDS))


@BOTH
def test_the_plan_of_memory_counts_the_table(name):
    """Its weights, gradients and two moments: 16 bytes for each of its 700 * 32 numbers."""
    step = Step(rows=2, length=64, answers=3)
    table = dict(position="learned", max_position_embeddings=700)
    with_it, without = (step_memory(models.build(name, **SHAPE, **o), step) for o in (table, {}))
    assert with_it.weights - without.weights == with_it.gradients - without.gradients == 4 * 700 * 32
    assert with_it.optimizer - without.optimizer == 8 * 700 * 32
    assert with_it.parameters - without.parameters == 700 * 32
    sizes = {models.state_size(models.config(name, **SHAPE, **o), 64) for o in (table, {})}
    assert len(sizes) == 1  # the table is a weight, not a part of the state


def test_a_run_asks_for_them_by_one_option():
    """Room for the longest sequence, query and answers included, as for the Transformer."""
    config = RunConfig(seq_len=16, model=("transformer", "mamba", "mamba2"), position="learned", device="cpu")
    rooms = {f: plan(config, f).model_overrides["max_position_embeddings"] for f in config.model}
    assert len(set(rooms.values())) == 1
    assert {plan(config, f).model_overrides["position"] for f in config.model} == {"learned"}
    bare = RunConfig(seq_len=16, device="cpu", position="none")
    assert "position" not in plan(bare, "mamba").model_overrides


def test_the_results_table_tells_them_apart():
    """A Mamba without positions has no entry, as in tables of earlier runs."""
    asked = [dict(), dict(position="none"), dict(position="learned")]
    plans = [plan(RunConfig(seq_len=16, device="cpu", **options), "mamba") for options in asked]
    assert [config_columns(p.to_dict())["position"] for p in plans] == ["learned", None, "learned"]
