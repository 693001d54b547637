"""The probe that takes parts away: which ones it calls responsible, and on which sequences it says so."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from hook_models import build

from analysis.plots import knockout as plots
from probes.ablation import Part, knock_out, knock_out_together
from probes.suite import NotApplicable, Options, knockout
from ssm_retrieval import models
from synthetic import tasks

TASK = tasks.build("position", seq_len=5, num_symbols=9)


def own(model, index):
    """Sequences of which the whole model answers all but the first four right."""
    batch = TASK.batch(16, seed=0, index=index, queries=1)
    with torch.no_grad():
        labels = model(batch.input_ids, logits_at=batch.answer_at).argmax(-1)
    labels[:4] += 1
    return replace(batch, labels=labels)


def test_responsible_are_the_largest_drops_above_zero_at_most_half_of_a_width():
    widths = [4, 4, 4, 4, 8, 8]
    every = [Part(0, "head", i, 0, width) for i, width in enumerate(widths)]
    drop, low = [0.2, 0.5, 0.3, 0.0, 0.1, 0.9], [0.1, 0.4, 0.2, 0.0, -0.1, 0.8]
    found = knockout.responsible(every, pd.DataFrame({"drop": drop, "drop_low": low}))
    assert [part.number for part in found] == [5, 1, 2]  # 0 would be the third of four


@pytest.mark.parametrize("family", ["transformer", "mamba2"])
def test_parts_are_chosen_on_one_half_and_tried_on_the_other(monkeypatch, family):
    model = build(family)
    halves = [own(model, 0), own(model, 1)]
    monkeypatch.setattr(knockout, "batches", lambda *_: iter(halves))
    table = knockout.measure(model, TASK, Options(examples=32))
    single, (row,) = table[table["part"] == "part"], table[table["part"] == "set"].to_dict("records")
    alone = knock_out(model, halves[0], control=False)
    assert single["value"].tolist() == alone["drop"].tolist()
    assert single["value"].max() > 0 and single["intact"].eq(0.75).all()
    every = [Part(r.layer, r.kind, r.number, r.low, r.high) for r in alone.itertuples()]
    chosen = [part for part, yes in zip(every, single["chosen"], strict=True) if yes]
    assert 0 < len(chosen) == row["size"] <= len(every) // 2
    chosen.sort(key=lambda part: -alone["drop"][every.index(part)])
    found = knock_out_together(model, halves[1], chosen, every, sets=knockout.SETS)
    assert (row["value"], row["low"], row["high"], row["p"]) == (
        found.drop, found.drop_low, found.drop_high, found.p
    )  # fmt: skip
    controls = table.loc[table["part"] == "control", "value"]
    assert controls.tolist() == list(found.controls)
    words = knockout.summary(table.assign(family=family))
    assert f"| {family} | 0.750 | {len(chosen)} of {len(every)} |" in words
    figure = plots.draw(table.assign(family=family))
    assert len(figure.axes) == 2


def test_nothing_responsible_is_said(monkeypatch):
    """All answers are wrong, so nothing can be lost; there is no set then."""
    model = build("transformer")
    batch = own(model, 0)
    batch = replace(batch, labels=torch.full_like(batch.labels, TASK.vocab_size))
    monkeypatch.setattr(knockout, "batches", lambda *_: iter([batch, batch]))
    table = knockout.measure(model, TASK, Options())
    assert set(table["part"]) == {"part"} and not table["chosen"].any()
    words = knockout.summary(table.assign(family="transformer"))
    assert words.endswith(f"| transformer | 0.000 | 0 of {len(table)} | – | – | – |")
    plots.draw(table.assign(family="transformer"))


def test_blocks_of_which_no_parts_are_known_are_left_out():
    with pytest.raises(NotApplicable, match="side by side"):
        knockout.measure(build("hybrid-parallel"), TASK, Options(examples=4))
    record = models.from_mixer("identity", lambda d_model: torch.nn.Identity())
    theirs = record.model(record.config(vocab_size=TASK.vocab_size, d_model=8, n_layer=1), None)
    with pytest.raises(NotApplicable, match="block 0 has a mixer whose parts are not known"):
        knockout.measure(theirs, TASK, Options(examples=4))
