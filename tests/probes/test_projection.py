"""What a state answers by itself: against logits of models in which nothing else answers, and edits."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import pytest
import torch
from hook_models import IDS, build

import probes
from analysis.plots import capacity as plots
from probes.projection import project, state_answers, state_blocks
from probes.readout import fork
from probes.suite import Options, capacity
from ssm_retrieval import models
from synthetic import tasks

QUESTIONS = torch.tensor([[3, 7, 7, 20, 0], [5, 1, 9, 2, 11]])


def read(model, ids=IDS):
    cache = model.init_cache()
    with torch.no_grad():
        model(ids, cache=cache, logits_at=torch.tensor([-1]))
    return cache


@pytest.mark.parametrize("d_conv", [1, 2])
def test_in_a_linear_layer_it_is_all_but_what_the_question_gives_itself(d_conv):
    """Logits at the question, less those of the model whose state was empty when it came."""
    model = build("linear", n_layer=1, d_conv=d_conv)
    cache = read(model)
    emptied = fork(cache, torch.arange(2))
    emptied.layers[0]["ssm"].zero_()
    for asked in QUESTIONS.T:
        with torch.no_grad():
            whole = model(torch.cat([IDS, asked[:, None]], dim=1))[:, -1]
            direct = model.step(asked, fork(emptied, torch.arange(2)))
        (found,) = project(model, cache, asked).values()
        torch.testing.assert_close(found, whole - direct, rtol=1e-9, atol=1e-9)
        assert (found - whole).abs().max() > 1e-3  # the question does give itself something


@pytest.mark.parametrize(
    "family",
    ["mamba", "mamba2", "linear", "hybrid-mamba", "hybrid-mamba2", "gated-deltanet", "kda", "gla", "mamba3"],
)
def test_it_is_what_a_layer_reads_of_its_state_alone(family):
    """The layer's output with its gate, but without its skip and what the question writes."""
    model, asked = build(family), QUESTIONS[:, 0]
    with torch.no_grad():
        for block in model.blocks:
            if hasattr(block, "mixer") and isinstance(getattr(block.mixer, "D", None), torch.nn.Parameter):
                block.mixer.D.zero_()
    cache = read(model)
    found = project(model, cache, asked)
    assert list(found) == state_blocks(model) and len(found) >= 1
    for i, logits in found.items():
        at, before = f"blocks.{i}.mixer.", cache.layers[i]["ssm"]
        with torch.no_grad(), probes.record(model, [f"{at}*"]) as seen:
            model.step(asked, fork(cache, torch.arange(2)))
        if f"{at}hook_before" in seen:  # what is left to add of the last write
            layer, weight = cache.layers[i], seen[f"{at}hook_before"][:, 0]
            last = torch.einsum("rhp,rhn,rh->rhpn", layer["last_v"], layer["last_k"], weight)
            before = before + last
        decay = seen[f"{at}hook_A_bar"][:, 0].view(*before.shape[:2], *(1,) * (before.dim() - 3), -1)
        if f"{at}hook_beta" in seen:  # a (1 - beta k k^T), from the right
            before, decay = before * decay, torch.ones_like(decay)
            k, beta = seen[f"{at}hook_k"][:, 0], seen[f"{at}hook_beta"][:, 0]
            before = before - torch.einsum("rhpn,rhn,rhm,rh->rhpm", before, k, k, beta)
        edits = {f"{at}hook_ssm_readout": lambda h, kept=(before * decay)[:, None]: kept.to(h.dtype)}
        with (
            torch.no_grad(),
            probes.intervene(model, edits),
            probes.record(model, [f"blocks.{i}.hook_mixer_out"]) as seen,
        ):
            model.step(asked, fork(cache, torch.arange(2)))
            wanted = model.head(model.norm(seen[f"blocks.{i}.hook_mixer_out"][:, 0]))
        torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)


def test_answers_do_not_depend_on_the_budget_and_leave_the_cache():
    model = build("mamba2")
    cache = read(model)
    before = [{name: x.clone() for name, x in layer.items()} for layer in cache.layers]
    found = [state_answers(model, cache, QUESTIONS, budget) for budget in (1, 2**28)]
    for i in state_blocks(model):
        each = [project(model, cache, asked)[i].argmax(-1) for asked in QUESTIONS.T]
        assert torch.equal(found[0][i], torch.stack(each, 1)) and torch.equal(found[1][i], found[0][i])
    assert cache.length == IDS.shape[1]
    for layer, kept in zip(cache.layers, before, strict=True):
        assert all(torch.equal(layer[name], kept[name]) for name in kept)


def test_without_states_there_is_nothing_to_project():
    """The parallel blocks of a hybrid scale their branches, so that only the plain one is projected."""
    for family, blocks in (("transformer", []), ("hybrid-parallel", [2])):
        model = build(family)
        assert list(state_answers(model, read(model), QUESTIONS)) == state_blocks(model) == blocks


def lookup(task):
    """A linear layer made by hand that knows every place: keys are one-hot, and so are the values.

    It reads symbols with learned positions: channel s + V of the embedding of symbol s is its key, and
    the position vector of place p writes the value p.
    """
    V, n = task.vocab_size, task.seq_len
    width = 2 * V
    model = models.build(
        "linear-tiny", vocab_size=V, d_model=width, n_layer=1, d_state=V, d_conv=1, expand=1,
        position="learned", max_position_embeddings=64, tie_word_embeddings=False,
    ).double()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        mixer = model.blocks[0].mixer
        model.embedding.weight[:, V:] = torch.eye(V)
        for place in range(n):  # behind <bos>
            model.embed_pos.weight[1 + place, task.vocabulary.first_position + place] = 1
        mixer.in_proj.weight.copy_(torch.eye(width))
        mixer.conv1d.weight.fill_(1)
        mixer.x_proj.weight[:V, V:] = torch.eye(V)  # B: the key
        mixer.x_proj.weight[V:, V:] = torch.eye(V)  # C: the same
        mixer.out_proj.weight.copy_(torch.eye(width))
        model.head.weight[:, :V] = torch.eye(V)
    return model


def test_the_probe_finds_a_state_that_knows_every_place():
    task = tasks.build("position", seq_len=6, num_symbols=8)
    table = capacity.measure(lookup(task), task, Options(examples=16))
    whole = table[(table["part"] == "accuracy") & (table["shown"] == 6)].iloc[0]
    alone = table[table["part"] == "projection"].iloc[0]
    assert whole["value"] == alone["value"] == 1 and (alone["layer"], alone["n"]) == (0, 16)
    grid = table[table["part"] == "map"].pivot_table(index="place", columns="answer", values="value")
    np.testing.assert_array_equal(grid, np.eye(6))
    made = pd.concat([table.assign(family="linear", weights=w) for w in ("trained", "untrained")])
    assert "What each layer's state answers" in capacity.summary(made)
    figure = plots.draw_projection(made)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), np.eye(6))
    assert figure.axes[0].get_title().endswith("layer 0: 1.00 right")
    assert plots.draw_projection(made[made["part"] != "map"]) is None


def test_a_map_has_the_cells_of_places_and_only_what_can_be_asked():
    answered = np.array([[0, 5, 70, -3] + [9] * 76] * 3)
    once = np.ones_like(answered, dtype=bool)
    once[:, 4:] = False
    rows = pd.DataFrame(capacity._projected(answered, once, 2))
    maps = rows[rows["part"] == "map"].set_index(["place", "answer"])["value"]
    assert maps[0, 0] == 1 and maps[0].sum() == 1
    start, cell = 2, max(edge for edge in capacity.cells(80) if edge <= 70)
    assert maps[start, cell] > 0
    assert maps[max(e for e in capacity.cells(80) if e <= 3)].sum() < 1  # -3 is no place
    assert rows.loc[0, "value"] == 1 / 4 and rows.loc[0, "part"] == "projection"
    assert np.isnan(maps[capacity.cells(80)[-2]]).all()
    assert capacity._projected(answered, np.zeros_like(once), 0) == []
