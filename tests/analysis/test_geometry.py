"""Geometry of position tokens: closed forms, and the right rows of a trained model."""

from __future__ import annotations

import dataclasses

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import geometry
from ssm_retrieval import models
from ssm_retrieval.training import store
from synthetic import results, tasks
from synthetic.config import plan, run_id
from synthetic.grid import grid


def circle(n: int, turns: float = 1.0) -> np.ndarray:
    angle = 2 * np.pi * turns * np.arange(n) / n
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_cosines_of_a_circle():
    n = 12
    i, j = np.indices((n, n))
    expected = np.cos(2 * np.pi * (i - j) / n)
    np.testing.assert_allclose(geometry.cosines(circle(n)), expected, atol=1e-12)
    # neither a common offset nor the norms matter
    np.testing.assert_allclose(geometry.cosines(5 + 3 * circle(n)), expected, atol=1e-12)


def test_principal_components_against_the_covariance():
    rows = np.random.default_rng(0).normal(size=(40, 6)) * [5, 3, 1, 1, 1, 1]
    where, share = geometry.principal(rows)
    values = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
    np.testing.assert_allclose(share, values[:2] / values.sum())
    np.testing.assert_allclose(where.var(axis=0, ddof=1), values[:2])


def test_locality_of_an_arc_a_line_and_of_noise():
    assert geometry.locality(geometry.cosines(circle(40, turns=0.2))) > 0.8
    noise = geometry.cosines(np.random.default_rng(1).normal(size=(40, 64)))
    low, high = geometry.shuffled_locality(noise)
    assert low < geometry.locality(noise) < high and low < 0 < high
    with pytest.raises(ValueError, match="at least 3"):
        geometry.locality(np.eye(2))


def test_shuffled_range_is_that_of_shuffled_maps():
    cosine = geometry.cosines(np.random.default_rng(3).normal(size=(12, 5)).cumsum(axis=0))
    rng = np.random.default_rng(7)
    values = []
    for _ in range(50):
        order = rng.permutation(12)
        values.append(geometry.locality(cosine[np.ix_(order, order)]))
    found = geometry.shuffled_locality(cosine, shuffles=50, seed=7)
    assert found == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-9)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_locality_does_not_depend_on_the_direction(seed):
    rows = np.random.default_rng(seed).normal(size=(10, 4)).cumsum(axis=0)
    cosine = geometry.cosines(rows)
    assert geometry.locality(cosine) == pytest.approx(geometry.locality(cosine[::-1, ::-1]), abs=1e-9)
    assert -1 <= geometry.locality(cosine) <= 1


def finished_run(out, model: str, seed: int, **overrides):
    """A run that was never trained but says it learned everything; returns its folder and its model."""
    scheme = "learned" if model == "transformer" else "none"
    config = grid(model=model, seq_len=8, num_symbols=30, steps=1, seed=seed, device="cpu", position=scheme)[
        0
    ]
    p = plan(config, model)
    folder = out / run_id(p)
    p = dataclasses.replace(p, model_overrides=p.model_overrides | overrides)
    results.begin(folder, config, p)
    built = models.build(p.model, seed=seed, **p.model_overrides)
    store.save_tensors(folder / "model.safetensors", dict(built.named_parameters()), {})
    row = dict(model=model, seed=seed, step=1, examples=1, tokens=1, seconds=1.0, train_length=8, length=8,
               loss=0.0, accuracy=1.0, correct=4, count=4, ci_low=0.5, ci_high=1.0, chance=1 / 8)  # fmt: skip
    store.write_json(folder / "result.json", row)
    store.write_rows(folder / "metrics.jsonl", [row | dict(targets=[[0, 8, 4, 4]])])
    results.record(folder)
    return folder, built


def test_rows_are_those_of_the_position_tokens(tmp_path):
    own, built = finished_run(tmp_path, "transformer", 0, tie_word_embeddings=False)
    first = tasks.build("position", seq_len=8, num_symbols=30).vocabulary.first_position
    assert first > 30  # behind the symbols, of which there are more than positions
    found = geometry.position_rows(own)
    embedding, head = built.embedding, built.head
    np.testing.assert_array_equal(found["readout"], head.weight[first : first + 8].detach())
    np.testing.assert_array_equal(found["input"], embedding.weight[first : first + 8].detach())
    (table,) = (p for name, p in built.named_parameters() if "embed_pos" in name)
    np.testing.assert_array_equal(found["learned"], table[1:9].detach())  # <bos> stands at 0


@pytest.mark.parametrize("layout", ["suffix", "prefix", "instruction"])
@pytest.mark.parametrize("name", ["position", "grid"])
def test_places_of_the_context(name, layout):
    """Whichever symbols an example has, those of its context stand there, in order."""
    task = tasks.build(name, seq_len=16, layout=layout)
    places = geometry.context_places(task)
    context, target = task.draw(np.random.default_rng(5), 3, 16, 1)
    ids = task.assemble(context, target).input_ids.numpy()
    np.testing.assert_array_equal(ids[:, places], context + task.vocabulary.first_symbol)


def test_tied_embeddings_are_one_table(tmp_path):
    own, _ = finished_run(tmp_path, "mamba", 0)
    assert set(geometry.position_rows(own)) == {"readout"}


def test_tasks_without_position_tokens_are_refused(tmp_path):
    config = grid(model="mamba", task="mqar", seq_len=20, num_symbols=64, num_pairs=3, device="cpu")[0]
    p = plan(config, "mamba")
    results.begin(tmp_path / "run", config, p)
    with pytest.raises(ValueError, match=r"task mqar of .* has no position tokens"):
        geometry.position_rows(tmp_path / "run")


def test_measure_and_draw(tmp_path):
    for seed in (0, 1):
        for model in ("transformer", "mamba"):
            finished_run(tmp_path, model, seed)
    summary, maps, points = geometry.measure(tmp_path)
    assert summary.groupby("variant")["table"].nunique().to_dict() == {"Mamba": 1, "Transformer": 2}
    assert set(summary["seed"]) == {0, 1} and set(maps["seed"]) == {0}
    # untrained rows have no order
    assert (summary["locality"] < summary["shuffled_high"] + 0.3).all()
    assert len(maps) == 3 * 8 * 8 and len(points) == 3 * 8
    figure = geometry.geometry(summary, maps, points)
    assert sum("length 8" in ax.get_title() for ax in figure.axes) == 3
    plt.close(figure)
