"""Sets of parts taken away at once: against weights set to zero, and beside sets drawn at random."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hook_models import build

from probes.ablation import _like, knock_out, knock_out_together, parts
from ssm_retrieval import models
from ssm_retrieval.statistics import mean_interval
from synthetic import tasks

TASK = tasks.build("position", seq_len=5, num_symbols=9)
BATCH = TASK.batch(24, seed=0, index=0, queries=2)


def answers(model):
    with torch.no_grad():
        return model(BATCH.input_ids, logits_at=BATCH.answer_at).argmax(-1)


def batch_of(family):
    """What the whole model answers is right, but for the first five sequences."""
    labels = answers(build(family))
    labels[:5] += 1
    return replace(BATCH, labels=labels)


def right(model, batch):
    return batch.right(answers(model)).double().mean(1)


def last(model, layer):
    block = model.blocks[layer]
    return block.attention.dense if hasattr(block, "attention") else block.mixer.out_proj


@pytest.mark.parametrize("family", ["transformer", "mamba", "mamba2"])
def test_a_set_and_its_controls_are_models_with_columns_of_zeros(family):
    """The same sets, drawn again, in models whose last projections cannot read them, in any layer."""
    every = [part for layer in (0, 1) for part in parts(build(family), layer, 8)]
    chosen = [every[0], every[-1]]
    batch = batch_of(family)
    found = knock_out_together(
        build(family), batch, chosen, every, sets=3, replacement="zero", rows=10, seed=4
    )
    generator, rest = torch.Generator().manual_seed(4), [part for part in every if part not in chosen]
    intact, drops = right(build(family), batch), []
    for trial in [chosen, *(_like(chosen, rest, generator) for _ in range(3))]:
        model = build(family)
        with torch.no_grad():
            for part in trial:
                last(model, part.layer).weight[:, part.low : part.high] = 0
        drops.append((intact - right(model, batch)).numpy())
    assert (found.drop, found.drop_low, found.drop_high) == pytest.approx(
        mean_interval(drops[0], bounds=(-1, 1))
    )
    assert found.controls == pytest.approx([each.mean() for each in drops[1:]])
    assert found.accuracy_intact == pytest.approx(19 / 24) and found.drop > 0
    assert found.accuracy == pytest.approx(found.accuracy_intact - found.drop)
    as_large = sum(each.mean() >= drops[0].mean() for each in drops[1:])
    assert (found.share, found.p) == (as_large / 3, (1 + as_large) / 4)


@pytest.mark.parametrize("replacement", ["zero", "mean"])
def test_one_part_alone_is_what_knock_out_says(replacement):
    model, batch = build("mamba2"), batch_of("mamba2")
    table = knock_out(model, batch, replacement=replacement, control=False)
    for row, part in zip(
        table.to_dict("records"), [p for i in range(4) for p in parts(model, i)], strict=True
    ):
        if part.number < 2:
            found = knock_out_together(model, batch, [part], sets=1, replacement=replacement)
            assert (found.drop, found.accuracy) == pytest.approx((row["drop"], row["accuracy"]))


def test_controls_are_of_the_same_size_and_of_the_rest():
    every = [part for layer in (0, 1) for part in parts(build("mamba"), layer, 8)]
    wide = parts(build("mamba"), 2, 4)
    chosen, rest = [every[1], every[2], wide[0]], [*every[3:], *wide[1:]]
    generator = torch.Generator().manual_seed(0)
    drawn = [_like(chosen, rest, generator) for _ in range(40)]
    for trial in drawn:
        assert sorted(p.high - p.low for p in trial) == sorted(p.high - p.low for p in chosen)
        assert len(set(trial)) == 3 and set(trial) <= set(rest)
    assert {part for trial in drawn for part in trial} == set(rest)  # every part has its turn
    assert np.unique([hash(tuple(trial)) for trial in drawn]).size > 20


def test_refusals():
    model = build("mamba")
    every = parts(model, 0, 4)
    with pytest.raises(ValueError, match="3 parts of 8 channels leave 1 others"):
        knock_out_together(model, BATCH, every[:3], every)
    with pytest.raises(ValueError, match="0 parts, sets 20 and rows 64"):
        knock_out_together(model, BATCH, [])
    with pytest.raises(ValueError, match="sets 0"):
        knock_out_together(model, BATCH, every[:1], every, sets=0)
    with pytest.raises(ValueError, match="unknown replacement 'noise'"):
        knock_out_together(model, BATCH, every[:1], every, replacement="noise")


@pytest.mark.parametrize("family, more", [("transformer", dict(init_std=0.3)), ("mamba", dict(seed=3))])
def test_answers_may_stand_at_other_places_in_every_row(family, more):
    """Row by row, where all answers stand at the same places, against all rows at once."""
    task = tasks.build("mqar", seq_len=16, num_symbols=16, num_pairs=2)
    batch = task.batch(6, seed=0, index=0, queries=2)
    assert batch.answer_at.dim() == 2 and len(batch.answer_at.unique(dim=0)) > 1
    model = models.build(f"{family}-tiny", vocab_size=task.vocab_size, d_model=64, n_layer=1, **more)
    at = batch.answer_at
    with torch.no_grad():
        own = model(batch.input_ids).argmax(-1).gather(1, at)
    batch = replace(batch, labels=own)
    assert knock_out(model, batch, control=False)["accuracy_intact"].eq(1).all()
    split = [replace(row, answer_at=row.answer_at[0]) for row in batch.split(6)]
    every = parts(model, 0)
    whole = knock_out(model, batch, every, control=False, replacement="zero")
    alone = [knock_out(model, row, every, control=False, replacement="zero")["accuracy"] for row in split]
    assert whole["accuracy"].tolist() == pytest.approx(np.mean(alone, axis=0).tolist())
    assert whole["accuracy"].min() < 1
