"""Where short contexts lie, how they grow, and that a model is told their positions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from synthetic import curricula, tasks, trainer
from synthetic.config import RunConfig, plan

RUN = RunConfig(seq_len=32, num_symbols=40, queries=4, curriculum=4, batch_tokens=2048, device="cpu")
POSITIONS = [
    ("position", dict(layout="suffix")),
    ("position", dict(layout="instruction")),
    ("position", dict(layout="prefix")),
    ("position-varlen", dict(layout="suffix")),
]


def batch_of(name: str, place: str, length: int, index: int = 0, rows: int = 16, **options):
    task = tasks.build(name, seq_len=32, num_symbols=40, **options)
    return task, task.batch(rows, seed=1, index=index, queries=3, length=length, place=place)


def asked(task, batch) -> np.ndarray:
    """[B, K] where in input_ids the context symbol stands that each query names."""
    v, ids = task.vocabulary, batch.input_ids.numpy()
    found = np.empty(batch.target_index.shape, dtype=int)
    for row, targets in enumerate(batch.target_index.tolist()):
        n, layout = batch.length, task.layout
        first = {"suffix": 1, "instruction": 2, "prefix": 5}[layout]  # prefix: <query> q1 q2 q3 <bos>
        queries = ids[row, 1:4] if layout == "prefix" else ids[row, -3:]
        symbols = np.flatnonzero((ids[row] >= v.first_symbol) & (ids[row] < v.first_position))
        context = [at for at in symbols if at >= first][: n if layout != "prefix" else None]
        for k, query in enumerate(queries[: len(targets)]):
            (found[row, k],) = (at for at in context if ids[row, at] == query)
    return found


@pytest.mark.parametrize(("name", "options"), POSITIONS)
def test_in_a_window_the_answer_is_where_the_model_is_told_that_the_symbol_stands(name, options):
    task, batch = batch_of(name, "window", 8, **options)
    ids, places = batch.input_ids, batch.position_ids.numpy()
    first = {"suffix": 1, "instruction": 2, "prefix": 5}[task.layout]
    told = np.take_along_axis(places, asked(task, batch), axis=1) - first
    assert np.array_equal(told, batch.labels[:, :3].numpy() - task.vocabulary.first_position)
    assert ids.shape[1] == task.batch(1, seed=1, index=0, queries=3, length=8).input_ids.shape[1]
    assert (np.diff(places, axis=1) == 1).all() and len(np.unique(places[:, 0])) > 1
    assert places.max() < task.max_length(3)


def test_answers_that_are_read_again_move_with_the_window():
    """The prefix layout feeds answers back: they must be those of the labels."""
    _task, batch = batch_of("position", "window", 8, layout="prefix")
    assert torch.equal(batch.input_ids[:, -2:], batch.labels[:, :2])


def test_a_window_of_an_image_begins_with_a_row():
    task = tasks.build("grid", seq_len=36, num_symbols=40)
    batch = task.batch(64, seed=0, index=0, queries=2, length=12, place="window")
    v, ids, places = task.vocabulary, batch.input_ids.numpy(), batch.position_ids.numpy()
    whole = task.batch(1, seed=0, index=0).input_ids.numpy()[0]
    patches = [i for i, token in enumerate(whole[:-2]) if v.first_symbol <= token < v.first_position]
    for row in range(64):
        for k in range(2):
            (at,) = (i for i in range(ids.shape[1] - 2) if ids[row, i] == ids[row, -2 + k])
            # a patch is where its number says in the whole image, separators counted
            assert places[row, at] == patches[batch.labels[row, k] - v.first_position]
    assert set(places[:, 0]) == {0, 7, 14, 21, 28}


@pytest.mark.parametrize("length", [1, 8, 31])
def test_every_position_is_trained_from_the_first_length_on(length):
    """Starts are uniform over all places where the context fits (chi-squared, p = 1e-4)."""
    from scipy.stats import chisquare

    starts = [
        batch_of("position", "window", length, index=i, rows=200)[1].position_ids[:, 0].numpy()
        if length > 2
        else tasks.build("position", seq_len=32, num_symbols=80)
        .batch(200, seed=1, index=i, queries=1, length=length, place="window")
        .position_ids[:, 0]
        .numpy()
        for i in range(10)
    ]
    count = np.bincount(np.concatenate(starts), minlength=32 - length + 1)
    assert len(count) == 32 - length + 1
    assert chisquare(count).pvalue > 1e-4


def test_windows_hold_the_contexts_of_the_first_positions():
    (_task, first), (_, window) = (batch_of("position", place, 8) for place in ("first", "window"))
    assert first.position_ids is None
    assert torch.equal(first.input_ids, window.input_ids)
    assert torch.equal(first.target_index, window.target_index)
    shift = window.position_ids[:, :1]
    assert torch.equal(first.labels + shift, window.labels)


@pytest.mark.parametrize("name", ["position", "position-varlen", "grid"])
def test_filled_contexts_have_the_full_length_and_true_answers(name):
    options = {} if name == "grid" else {"layout": "suffix"}
    task = tasks.build(name, seq_len=36, num_symbols=40, **options)
    batch = task.batch(32, seed=0, index=0, queries=2, length=12, place="filled")
    v, ids = task.vocabulary, batch.input_ids.numpy()
    assert ids.shape == task.batch(32, seed=0, index=0, queries=2).input_ids.shape
    assert (batch.length, batch.chance, batch.position_ids) == (12, 1 / 12, None)
    assert ((ids[:, 1:-3] == v.bos).sum(1) == 36 - 12).all()
    for row in range(32):
        context = [t for t in ids[row, 1:-3] if t == v.bos or v.first_symbol <= t < v.first_position]
        for k in range(2):
            assert context[batch.labels[row, k] - v.first_position] == ids[row, -2 + k]


def test_mixed_batches_repeat_the_lengths_that_were_passed():
    p = plan(dataclasses.replace(RUN, growth="mixed"), "transformer")
    task = tasks.build(p.task, **p.task_options)
    now = trainer.Progress(length=16)
    seen = [curricula.next_batch(task, p, dataclasses.replace(now, step=i)).length for i in range(400)]
    assert set(seen) == {4, 8, 16}
    assert 160 < seen.count(16) < 240 and abs(seen.count(4) - seen.count(8)) < 60  # four sigma each
    other = plan(dataclasses.replace(RUN, growth="mixed"), "mamba")
    again = [curricula.next_length(other, dataclasses.replace(now, step=i)) for i in range(400)]
    assert seen == again
    first = trainer.Progress(length=4)
    assert {curricula.next_length(p, dataclasses.replace(first, step=i)) for i in range(20)} == {4}


def test_repeated_lengths_do_not_count_for_the_next_doubling(tmp_path):
    p = plan(dataclasses.replace(RUN, growth="mixed", steps=30), "transformer")
    session = trainer.Session(p, tmp_path, lambda event, row: None)
    session.progress.length = 16
    batch = session.next_batch()
    for _ in range(20):  # all right, at whatever length
        before, repeated = session.progress.accuracy, not session.longest
        session.stepped(batch, {"loss": 1.0, "accuracy": 0.5})
        assert (session.progress.accuracy == before) == repeated
        session.progress.step += 1
        batch = session.next_batch()


@pytest.mark.parametrize("name", ["position", "position-varlen", "grid"])
@pytest.mark.parametrize("layout", ["suffix", "instruction", "prefix", "two-pass"])
def test_behind_a_gap_queries_stand_where_they_do_at_full_length(name, layout):
    task = tasks.build(name, seq_len=36, num_symbols=40, layout=layout)
    short = task.batch(8, seed=0, index=0, queries=3, length=12, place="gap")
    plain = task.batch(8, seed=0, index=0, queries=3, length=12)
    full = task.batch(8, seed=0, index=0, queries=3)
    assert torch.equal(short.input_ids, plain.input_ids) and torch.equal(short.labels, plain.labels)
    v, places = task.vocabulary, short.position_ids[0].tolist()
    kind = lambda ids: ["symbol" if v.first_symbol <= i < v.first_position else "other" for i in ids]  # noqa: E731
    queries = slice(1, 4) if layout == "prefix" else slice(-3, None)
    at = torch.arange(full.input_ids.shape[1])
    assert places[queries] == at[queries].tolist()
    # the first symbols of every reading are where they are in a full context
    of_full = [i for i, k in enumerate(kind(full.input_ids[0].tolist())) if k == "symbol"]
    of_short = [p for p, k in zip(places, kind(short.input_ids[0].tolist()), strict=True) if k == "symbol"]
    readings = 2 if layout == "two-pass" else 1
    begin = 3 if layout == "prefix" else 0
    for i in range(readings):
        assert of_short[begin + 12 * i :][:12] == of_full[begin + 36 * i :][:12]
    assert len(set(places)) == len(places) and max(places) == int(at[-1])


@pytest.mark.parametrize("growth", ["prefix", "gap", "window", "filled"])
def test_growth_ends_at_the_full_length_with_ordinary_contexts(growth):
    p = plan(dataclasses.replace(RUN, growth=growth), "mamba")
    task, now = tasks.build(p.task, **p.task_options), trainer.Progress(length=32)
    batch = curricula.next_batch(task, p, now)
    rows = len(batch.input_ids)
    assert torch.equal(batch.input_ids, task.batch(rows, seed=0, index=0, queries=4).input_ids)
    assert batch.position_ids is None


# --- what a model is told -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["transformer", "mamba", "mamba2", "linear", "hybrid"])
def test_position_ids_choose_the_learned_vectors(family):
    model = models.build(
        family, vocab_size=50, d_model=32, n_layer=2, position="learned", max_position_embeddings=20,
        **({"n_head": 2} if models.config(family).__dict__.get("n_head") else {}),
    )  # fmt: skip
    ids = torch.randint(50, (3, 6))
    places = torch.tensor([0, 4, 14])[:, None] + torch.arange(6)
    vectors = model.embedding(ids) + model.embed_pos.weight[places]
    # embeddings given as such get no positions
    assert torch.allclose(model(ids, position_ids=places), model(inputs_embeds=vectors), atol=1e-5)
    assert torch.equal(model(ids, position_ids=torch.arange(6)), model(ids))


def test_rope_sees_differences_of_position_ids_only():
    model = models.build("transformer", vocab_size=50, d_model=32, n_layer=2, n_head=2, position="rope")
    ids = torch.randint(50, (2, 6))
    places = torch.tensor([0, 3, 4, 5, 6, 7])
    with torch.no_grad():
        here, there = (model(ids, position_ids=places + shift) for shift in (0, 11))
        apart = float((here - model(ids)).abs().max())
    assert float((here - there).abs().max()) < apart / 20


def test_position_ids_that_do_not_fit_are_refused():
    model = models.build("mamba-tiny", position="learned", max_position_embeddings=8)
    ids = torch.zeros(2, 4, dtype=torch.int64)
    for bad in (torch.arange(5), torch.zeros(3, 4, dtype=torch.int64), torch.zeros(4)):
        with pytest.raises(UserError, match="position_ids must be"):
            model(ids, position_ids=bad)
    with pytest.raises(UserError, match="without seq_ids"):
        model(ids, position_ids=torch.arange(4), seq_ids=torch.zeros_like(ids))
    with pytest.raises(UserError, match="exceeds max_position_embeddings=8"):
        model(ids, position_ids=torch.arange(4) + 5)


# --- defaults and refusals ----------------------------------------------------------------------------------


def test_every_family_is_told_positions_alike():
    plans = {name: plan(RUN, name) for name in ("transformer", "mamba", "mamba2", "linear", "hybrid")}
    assert {p.model_overrides["position"] for p in plans.values()} == {"learned"}
    assert {p.growth for p in plans.values()} == {"gap"}
    first = {name: p.model_overrides.get("ssm_init") for name, p in plans.items()}
    assert first["mamba"] == first["mamba2"] == "recall" and first["transformer"] is None


def test_first_weights_are_as_published_unless_answers_are_learned_positions():
    for config in (
        dataclasses.replace(RUN, position="none"),
        dataclasses.replace(RUN, ssm_init="default"),
        RunConfig(task="mqar", seq_len=32, num_pairs=4),
        RunConfig(seq_len=32, protocol="paper"),
    ):
        assert plan(config, "mamba").model_overrides.get("ssm_init", "default") == "default"


def test_the_papers_give_positions_to_attention_alone():
    config = RunConfig(seq_len=32, protocol="paper")
    scheme = {name: plan(config, name).model_overrides.get("position") for name in ("transformer", "mamba")}
    assert scheme == {"transformer": "rope", "mamba": None}


def test_beside_rope_a_state_space_model_has_no_positions():
    config = dataclasses.replace(RUN, position="rope", model=("transformer", "mamba"))
    assert "position" not in plan(config, "mamba").model_overrides
    assert plan(config.of("mamba"), "mamba") == plan(config, "mamba")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(growth="window", position="none"), "--growth window needs --position learned"),
        (dict(growth="gap", position="rope", model=("transformer",)), "the model has rope; give --growth"),
        (
            dict(growth="gap", task="mqar", num_symbols=None, position="learned"),
            "not --task mqar; use prefix",
        ),
        (dict(growth="filled", task="mqar", num_symbols=None), "--growth filled is for tasks whose answers"),
    ],
)
def test_growth_that_hides_the_answer_is_refused(changed, message):
    config = dataclasses.replace(RUN, **changed)
    with pytest.raises(UserError, match=message):
        plan(config, config.model[0])


def test_without_a_curriculum_nothing_grows():
    plans = [
        plan(dataclasses.replace(RUN, curriculum=0, growth=g), "mamba")
        for g in (None, "prefix", "gap", "window", "filled", "mixed")
    ]
    assert len({str(p) for p in plans}) == 1
