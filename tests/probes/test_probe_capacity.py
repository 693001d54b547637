"""Questions to copies of the cache: against whole sequences, a model whose memory is known, and runs."""

from __future__ import annotations

from itertools import permutations
from math import log2
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hook_models import VOCAB, build
from tiny_runs import by_family, tiny_run

from analysis.plots import capacity as plots
from probes import run as cli
from probes.readout import ask, fork, read_out
from probes.suite import Options, Probe, capacity
from probes.suite.common import batches
from ssm_retrieval import models
from ssm_retrieval.models import Cache
from ssm_retrieval.statistics import mean_interval, wilson
from ssm_retrieval.training import store
from synthetic import tasks
from synthetic.evaluate import heldout

TASKS = {  # of at most VOCAB tokens
    "position": dict(seq_len=6),
    "grid": dict(seq_len=4, num_symbols=8),
    "two-pass": dict(seq_len=5, layout="two-pass"),
}


class Window:
    """Finds the last k context symbols and answers "the first place" to all other questions."""

    def __init__(self, task, k):
        self.task, self.k = task, k
        self.config = SimpleNamespace(vocab_size=task.vocab_size, d_model=1, n_layer=1)

    def hook_names(self):
        return []

    def init_cache(self):
        return Cache([{}])

    def __call__(self, ids, *, cache, position_ids, logits_at=None):
        (layer,) = cache.layers
        layer["ids"] = torch.cat([layer["ids"], ids], dim=1) if layer else ids
        cache.length += ids.shape[1]
        if logits_at is None:  # a question
            context = layer["ids"][:, 1:-2]  # without <bos>, <query> and the question
            here = context == ids
            here[:, : -self.k] = False
            place = here.int().argmax(1, keepdim=True)  # 0 where there is none
            answer = place + self.task.vocabulary.first_position
            return torch.nn.functional.one_hot(answer, self.task.vocab_size)


def contexts(task, count=3, seed=0):
    """(count, N) 0-based symbols."""
    generator = torch.Generator().manual_seed(seed)
    n, v = task.seq_len, task.vocabulary.num_symbols
    return torch.stack([torch.randperm(v, generator=generator)[:n] for _ in range(count)])


@pytest.mark.parametrize("place", ["first", "gap"])
@pytest.mark.parametrize("name", TASKS)
def test_a_copy_of_the_cache_answers_as_the_whole_sequence_does(model, name, place):
    """Every question after every length, with caches of one question, of several, and of all at once.

    Questions stand where they do in the task's own batches, whose contexts begin first or end in a gap.
    """
    task = tasks.build("position" if name == "two-pass" else name, **TASKS[name])
    assert task.vocab_size <= VOCAB
    context, lengths = contexts(task), capacity.doublings(task.seq_len)
    asked_for = [capacity.questions_after(task, context[:, :n], place) for n in lengths]
    prompts, questions, positions = zip(*asked_for, strict=True)
    whole, tokens = [], []
    for n in lengths:
        asked = [task.assemble(context[:, :n].numpy(), np.full((3, 1), i)) for i in range(n)]
        asked = [task.part(batch) for batch in asked] if place == "gap" else asked
        where = {} if place == "first" else {"position_ids": torch.cat([b.position_ids for b in asked])}
        (at,) = asked[0].answer_at
        with torch.no_grad():  # (n, 3) sequences, all at once
            tokens_of = torch.cat([batch.input_ids for batch in asked])
            logits = model(tokens_of, logits_at=asked[0].answer_at, **where)
        whole.append(logits[:, 0].argmax(-1).view(n, 3).T)
        tokens.append(int(at))
    for budget in (1, 40_000, 2**28):
        found = list(read_out(model, prompts, questions, budget, positions))
        assert [readout.numbers for readout in found] == [models.state_size(model.config, t) for t in tokens]
        for readout, answers in zip(found, whole, strict=True):
            assert torch.equal(readout.predicted, answers)
    assert len(found[-1].predicted.unique()) > 1  # not one answer to all, which any code would give


def test_a_fork_goes_on_alone(model):
    """To the last digit; the cache that it was taken from neither changes nor is shared."""
    ids = torch.randint(VOCAB, (2, 7), generator=torch.Generator().manual_seed(2))
    last = torch.tensor([3, 4, 5])
    with torch.no_grad():
        cache = model.init_cache()
        model(ids, cache=cache)
        before = [{name: x.clone() for name, x in layer.items()} for layer in cache.layers]
        logits = model.step(last, fork(cache, torch.tensor([1, 0, 1])))
        ask(model, cache, ids)
        whole = model(torch.cat([ids[[1, 0, 1]], last[:, None]], dim=1))[:, -1]
    torch.testing.assert_close(logits, whole, rtol=1e-9, atol=1e-9)
    assert cache.length == 7
    for layer, kept in zip(cache.layers, before, strict=True):
        assert layer.keys() == kept.keys() and all(torch.equal(layer[name], kept[name]) for name in kept)


def test_prompts_may_leave_the_whole_and_meet_it_again():
    model = build("mamba")
    whole = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    prompt = whole[:, :6].clone()
    prompt[:, 2] = (prompt[:, 2] + 1) % VOCAB
    questions = whole[:, :4]
    for found, read in zip(read_out(model, [prompt, whole], 2 * [questions]), (prompt, whole), strict=True):
        for i in range(4):
            with torch.no_grad():
                logits = model(torch.cat([read, questions[:, i : i + 1]], dim=1))
            assert torch.equal(found.predicted[:, i], logits[:, -1].argmax(-1))


@pytest.mark.parametrize("k", [1, 5, 16])
def test_a_model_with_a_window_knows_what_is_in_it(k):
    task = tasks.build("position", seq_len=16)
    table = capacity.measure(Window(task, k), task, Options(examples=6))
    facts = table[table["part"] == "facts"].set_index("shown")
    assert facts.index.tolist() == [2, 4, 8, 16]
    for n, row in facts.iterrows():
        found = min(n, k) + (n > k)  # and the first, for which "the first place" is right
        assert row["value"] == found and row["low"] < found <= row["high"] <= n == row["asked"]
        assert row["known"] == pytest.approx((found - 1) / (1 - 1 / n))
        assert (row["chance"], row["numbers"], row["n"]) == (1, n + 2, 6)  # <bos>, n symbols, <query>
        assert row["bits"] == pytest.approx(capacity.bits(n, row["known"]))
    if k == 5:
        assert facts.loc[16, "recent"] == 1  # 5 / (1 - 1 / 16) are known: the last five are asked
        assert facts.loc[8, "recent"] == pytest.approx(5 / 6)  # 5 / (1 - 1 / 8) rounds to six
    for n in facts.index:
        at = table[(table["part"] == "place") & (table["shown"] == n)].set_index("place")["value"]
        assert at.index.tolist() == list(range(n))
        assert [place for place in at.index if at[place] == 1] == sorted({0, *range(max(0, n - k), n)})
        whole = table[(table["part"] == "accuracy") & (table["shown"] == n)]["value"]
        assert whole.item() * n == pytest.approx(at.sum()) == facts.loc[n, "value"]


def test_long_contexts_are_put_in_cells():
    task = tasks.build("position", seq_len=300)
    table = capacity.measure(Window(task, 100), task, Options(examples=2))
    at = table[(table["part"] == "place") & (table["shown"] == 300)].set_index("place")
    assert (
        at.index[0] == 0 and (at.index[1:] == (at.index + at["size"])[:-1]).all() and at["size"].sum() == 300
    )
    assert at["size"].iloc[[0, -1]].tolist() == [1, 1] and len(at) == 20
    for place, row in at.iterrows():  # the first, and those from 200 on
        found = (place == 0) + max(0, min(row["size"], place + row["size"] - 200))
        assert row["value"] == pytest.approx(found / row["size"])
    facts = table[table["part"] == "facts"].set_index("shown")["value"]
    assert facts.to_dict() == {2: 2, 4: 4, 8: 8, 16: 16, 32: 32, 64: 64, 128: 101, 256: 101, 300: 101}


def test_symbols_that_repeat_are_not_asked_for():
    """Of five symbols at 12 places hardly one occurs once; Window answers those and no others."""
    task = tasks.build("position-varlen", seq_len=12, num_symbols=5)
    table = capacity.measure(Window(task, 12), task, Options(examples=50))
    facts = table[table["part"] == "facts"].set_index("shown")
    (batch,) = task.batch(50, seed=0, index=0, split="heldout", queries=1, length=12).split(1)
    context = batch.input_ids[:, 1:13].tolist()
    for n, row in facts.iterrows():
        once = [sum(row[:n].count(symbol) == 1 for symbol in row[:n]) for row in context]
        assert row["asked"] == row["value"] == row["known"] == pytest.approx(np.mean(once))
        assert row["chance"] == pytest.approx(np.mean(once) / n)
    assert facts["asked"].iloc[-1] < 3


def test_lengths():
    assert [capacity.doublings(n) for n in (1, 2, 3, 8, 9)] == [[1], [2], [2, 3], [2, 4, 8], [2, 4, 8, 9]]


def test_bits_count_the_ways_to_place_symbols():
    ways = [len([*permutations(range(5), known)]) for known in range(6)]
    assert [capacity.bits(5, known) for known in range(6)] == pytest.approx([log2(way) for way in ways])


def test_intervals_are_over_sequences_but_never_without_width():
    asked = np.ones((20, 50), dtype=bool)
    same = capacity.share(asked, asked)  # no spread: Wilson's of a thousand questions
    assert (same["value"], same["high"]) == (1, 1) and same["low"] == wilson(1000, 1000)[0] < 1
    apart = asked.copy()
    apart[:10] = False  # all or nothing: twenty numbers, not a thousand
    found = capacity.share(apart, asked)
    np.testing.assert_allclose([*found.values()], mean_interval(apart.mean(1)))
    assert found["high"] - found["low"] > 5 * np.ptp(wilson(500, 1000))
    assert np.isnan([*capacity.share(asked, ~asked).values()]).all()


class Told:
    """Reads the query first, and finds it if it is among the last k context symbols."""

    def __init__(self, task, k):
        self.task, self.k = task, k
        self.config = models.config("mamba-tiny", vocab_size=task.vocab_size, n_layer=1)

    def __call__(self, ids, *, logits_at, position_ids=None):
        assert logits_at.tolist() == [ids.shape[1] - 1]
        query, context = ids[:, 1:2], ids[:, 3:]  # <query> q <bos> x1 .. xN
        here = context == query
        here[:, : -self.k] = False
        place = here.int().argmax(1, keepdim=True)  # 0 where there is none
        answer = place + self.task.vocabulary.first_position
        return torch.nn.functional.one_hot(answer, self.task.vocab_size)


@pytest.mark.parametrize("k", [1, 5, 16])
def test_a_query_before_the_context_has_a_sequence_of_its_own(k):
    task = tasks.build("position", seq_len=16, layout="prefix")
    table = capacity.measure(Told(task, k), task, Options(examples=6))
    facts = table[table["part"] == "facts"].set_index("shown")
    # the last k, and the first place, which every other question is answered with
    assert facts["value"].to_dict() == {n: min(k + (k < n), n) for n in (2, 4, 8, 16)}
    assert set(table["part"]) == {"facts", "accuracy", "place"}


@pytest.mark.parametrize(
    "name, options",
    [("mqar", dict(seq_len=16, num_pairs=4)), ("selective-copy", dict(seq_len=12, num_tokens=3))],
)
def test_other_tasks_ask_their_own_questions(name, options):
    """Against whole logits, sequence by sequence; an answer of several tokens must be right in all."""
    task = tasks.build(name, **options)
    model = models.build("mamba-tiny", vocab_size=task.vocab_size, n_layer=1, d_model=16, seed=1)
    (batch,) = batches(task, 12, 12, Options(seed=3))
    right = []
    for row in batch.split(12):
        with torch.no_grad():
            logits = model(row.input_ids)[0]
        at = row.answer_at if row.answer_at.dim() == 1 else row.answer_at[0]
        told = logits[at].argmax(-1)
        right.append((told == row.labels[0])[: row.retrieved].reshape(-1, row.answer_tokens).all(1))
    table = capacity.measure(model, task, Options(examples=12, seed=3))
    facts = table.set_index("part").loc["facts"]
    assert facts["value"] == pytest.approx(sum(int(r.sum()) for r in right) / 12)
    assert facts["asked"] == len(right[0]) and facts["n"] == 12
    assert facts["numbers"] == models.state_size(model.config, batch.input_ids.shape[1])
    first = int(batch.target_index[0, 0])
    there = torch.cat([row[where == first] for row, where in zip(right, batch.target_index, strict=True)])
    places = table[table["part"] == "place"].set_index("place")["value"]
    assert places[first] == pytest.approx(float(there.double().mean()))
    assert set(places.index) == set(batch.target_index.unique().tolist())


@pytest.mark.parametrize("layout", ["suffix", "instruction", "two-pass"])
def test_the_answer_to_the_runs_own_question_is_the_one_it_was_scored_for(layout):
    """On held-out sequences, as `synthetic.evaluate` draws them, and with the options that change them."""
    task = tasks.build("position", seq_len=8, layout=layout, supervise_bos=True)
    model = build("mamba", torch.float32)
    (batch,) = heldout(task, 24, 8)
    with torch.no_grad():
        scored = model(batch.input_ids, logits_at=batch.answer_at[:1])[:, 0].argmax(-1)
    context = capacity.shown_symbols(task, batch)
    prompt, questions, _ = capacity.questions_after(task, context)
    (found,) = read_out(model, [prompt], [questions])
    assert torch.equal(found.predicted.gather(1, batch.target_index)[:, 0], scored)


@pytest.mark.parametrize("growth, place", [("gap", "gap"), ("window", "first"), ("prefix", "first")])
def test_a_probe_is_told_where_contexts_lay_in_training(tmp_path, growth, place):
    more = ["--model", "mamba", "--layers", "1", "--d-state", "4", "--steps", "1", "--growth", growth]
    folder, seen = tiny_run(tmp_path, "position", "--seq-len", "8", *more), []

    def measure(model, task, options):
        seen.append(options.place)
        return pd.DataFrame({"layer": [0]})

    trained = cli.Model(folder, tmp_path, tasks.build("position", seq_len=8))
    probe = Probe("?", measure, lambda table: "")
    cli._measure(probe, cli.Options((folder,)), trained, lambda share: None)
    assert seen == [place, place]  # of the trained weights and of untrained ones


@pytest.mark.slow
def test_facts_of_a_run_agree_with_its_accuracy(tmp_path):
    """Of a model that has learned some: facts / N and held-out accuracy, within their intervals."""
    more = ["--seq-len", "8", "--model", "transformer", "--layers", "1", "--steps", "40", "--lr", "2e-3"]
    folder = tiny_run(tmp_path, "position", *more, "--batch-tokens", "512", "--final-eval-examples", "256")
    result = store.read_json(folder / "result.json")
    assert 1.5 / 8 < result["accuracy"] < 0.9  # more than chance and less than all, or any would agree
    assert cli.main([str(folder), "--probe", "capacity"]) == 0
    table = pd.read_parquet(folder / "probes" / "capacity.transformer.parquet")
    facts = table[(table["part"] == "facts") & (table["shown"] == 8)].set_index("weights")
    row = facts.loc["trained"]
    assert row["n"] == capacity.EXAMPLES and row["asked"] == 8
    assert row["low"] / 8 <= result["ci_high"] and result["ci_low"] <= row["high"] / 8
    assert row["low"] > facts.loc["untrained", "high"]
    text = (folder / "probes" / "summary.md").read_text()
    assert f"| transformer | 8 | {row['value']:.4g} [{row['low']:.4g}, {row['high']:.4g}] |" in text


def test_the_figure_draws_the_table(probed_run):
    parts = [
        pd.read_parquet(folder / "probes" / f"capacity.{family}.parquet")
        for family, folder in by_family(probed_run).items()
    ]
    table = pd.concat(parts, ignore_index=True)
    figure = plots.draw(table)
    left, right = figure.axes
    lines = {
        ax: [[*map(tuple, zip(*line.get_data(), strict=True))] for line in ax.lines] for ax in (left, right)
    }
    for (_, _), rows in table.groupby(["family", "weights"]):
        facts = rows[rows["part"] == "facts"].sort_values("shown")
        assert [*zip(facts["shown"], facts["value"], strict=True)] in lines[left]
        last = rows[(rows["part"] == "place") & (rows["shown"] == 8)].sort_values("place")
        assert [*zip(range(8), last["value"], strict=True)] in lines[right]
    assert [(2, 2), (4, 4), (8, 8)] in lines[left]  # all that is shown
    assert len(lines[left]) == 6 and len(lines[right]) == 5
    plt.close(figure)
