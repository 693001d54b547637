"""When training stops: two passes on validation sequences that share none; held-out ones only report."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ssm_retrieval.training import store
from synthetic import run, trainer
from synthetic.config import RunConfig, plan
from synthetic.evaluate import Evaluation, heldout
from synthetic.results import record

SMALL = RunConfig(
    seq_len=16,
    num_symbols=40,
    queries=8,
    curriculum=4,
    steps=12,
    eval_every=4,
    eval_examples=20,
    final_eval_examples=50,
    batch_tokens=256,
    precision="float32",
    d_state=4,
    model=("mamba",),
    layers=1,
)


class Coins:
    """In place of a model's evaluation: answers that are right with a given probability, independently."""

    def __init__(self, accuracy: float, seed: int = 0):
        self.accuracy, self.rng, self.asked = accuracy, np.random.default_rng(seed), []

    def __call__(self, split: str, examples: int, length: int, start: int = 0) -> Evaluation:
        self.asked.append((split, examples, length, start))
        right = self.rng.random(examples) < self.accuracy
        return Evaluation(length, right, np.zeros(examples, dtype=np.int64), 1.0, 1 / length)


def reaches(session: trainer.Session, coins: Coins, evaluations: int) -> bool:
    """Whether a model of this accuracy "reaches" the goal in so many evaluations."""
    session._unseen, session.progress.stopped = coins, False
    for _ in range(evaluations):
        session.evaluate({"loss": 0.0, "accuracy": 0.0})
        if session.progress.stopped:
            return True
    return False


@pytest.fixture
def session(tmp_path):
    config = dataclasses.replace(
        SMALL, curriculum=0, stop_at=0.95, eval_examples=128, final_eval_examples=1024
    )
    made = trainer.Session(plan(config, "mamba"), tmp_path, lambda event, row: None)
    made.world = SimpleNamespace(main=False)  # writes no rows
    return made


def test_a_model_of_accuracy_0_93_rarely_reaches_0_95(session):
    """One look would let nine of ten such models pass in ten evaluations; two let one in a hundred."""
    first, second = (stats.binom.sf(np.ceil(0.95 * n) - 1, n, 0.93) for n in (128, 1024))
    once, twice = (1 - (1 - rate) ** 10 for rate in (first, first * second))
    assert once > 0.85 and twice < 0.03
    coins, runs = Coins(0.93), 400
    passed = sum(reaches(session, coins, 10) for _ in range(runs))
    assert stats.binomtest(passed, runs, twice).pvalue > 1e-3
    assert stats.binomtest(passed, runs, once).pvalue < 1e-9


def test_a_model_above_the_goal_reaches_it(session):
    coins = Coins(0.99)
    assert all(reaches(session, coins, 3) for _ in range(100))


def test_the_second_look_is_at_other_validation_sequences(tmp_path, monkeypatch):
    """And the last evaluation is at held-out ones, so nothing that is reported has decided anything."""
    asked = []

    def spy(task, examples, length, split="heldout", start=0, place="first"):
        asked.append((split, examples, length, start))
        return heldout(task, examples, length, split, start, place)

    monkeypatch.setattr(trainer, "heldout", spy)
    monkeypatch.setattr(Evaluation, "accuracy", 1.0)
    result = trainer.train(plan(dataclasses.replace(SMALL, curriculum=0), "mamba"), tmp_path)
    assert result["reached"] and result["step"] < SMALL.steps
    assert asked == [("validation", 20, 16, 0), ("validation", 50, 16, 20), ("heldout", 50, 16, 0)]
    last = store.read_rows(tmp_path / "metrics.jsonl")[-1]
    assert last["split"] == "validation" and last["confirm_count"] == 50 and result["split"] == "heldout"


@pytest.mark.parametrize(
    "looks, final, stopped, agrees",
    [
        ([1.0, 1.0], 1.0, True, True),
        ([1.0, 1.0], 0.5, True, False),
        ([1.0, 0.5, 0.5], 0.5, False, False),
        ([1.0, 0.5, 0.5], 1.0, False, True),
    ],
)
def test_reached_and_whether_the_final_evaluation_agrees(
    tmp_path, monkeypatch, looks, final, stopped, agrees
):
    """looks: accuracies of validation in turn; a pass that is not confirmed does not stop training."""
    remaining = iter([*looks, *[0.0] * 9])

    def unseen(self, split, examples, length, start=0):
        accuracy = final if split == "heldout" else next(remaining)
        right = np.arange(examples) < round(accuracy * examples)
        return Evaluation(length, right, np.zeros(examples, dtype=np.int64), 1.0, 1 / length)

    monkeypatch.setattr(trainer.Session, "_unseen", unseen)
    result = trainer.train(plan(dataclasses.replace(SMALL, curriculum=0), "mamba"), tmp_path)
    assert (result["step"] == 4) == stopped and result["reached"] is stopped
    assert result["heldout_reached"] is agrees
    rows = store.read_rows(tmp_path / "metrics.jsonl")
    confirmed = [row.get("confirm_correct") for row in rows]  # a second look only where the first passed
    assert confirmed == [round(looks[1] * 50), *[None] * (len(rows) - 1)]


def test_tables_say_which_sequences_and_whether_the_goal_was_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluation, "accuracy", 1.0)
    words = ["--out", str(tmp_path / "runs"), "--curriculum", "0"]
    for name in ("seq_len", "num_symbols", "queries", "steps", "eval_every", "eval_examples",
                 "final_eval_examples", "batch_tokens", "precision", "d_state", "layers"):  # fmt: skip
        words += ["--" + name.replace("_", "-"), str(getattr(SMALL, name))]
    assert run.main([*words, "--model", "mamba"]) == 0
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/config.json"))
    record(folder)
    table = pd.read_parquet(tmp_path / "runs" / "results")
    during, final = table[table.kind == "during"], table[table.kind == "final"]
    assert set(during.split) == {"validation"} and set(final.split) == {"heldout"}
    assert during.confirm_count.tolist()[-1] == 50 and final.confirm_count.isna().all()
    assert final.reached.tolist() == [True] and during.reached.isna().all()
    assert final.heldout_reached.tolist() == [True] and during.heldout_reached.isna().all()
