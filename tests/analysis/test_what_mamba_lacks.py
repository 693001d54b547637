"""What Mamba lacks: runs are the factorial, measures have their closed forms, the page has its numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from readme_commands import ROOT

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from studies.what_mamba_lacks import built, config, effects, report
from studies.what_mamba_lacks.config import (
    ALL,
    LEVELS,
    NOTHING,
    ONE_REMOVED,
    POSITIONS_ALONE,
    WITHOUT_CONVOLUTION,
    Cell,
)
from synthetic import tasks
from synthetic.config import plan, run_id
from synthetic.evaluate import heldout
from synthetic.grid import load

FOLDER = ROOT / "studies" / "what_mamba_lacks"


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    return {name: make() for name, make in config.SWEEPS.items()}


def test_every_kind_of_run_can_be_planned(made):
    """One of each: planning all of them takes a while."""
    kinds = {(run.model, run.position, run.seq_len): run for runs in made.values() for run in runs}
    plans = [plan(run, run.model[0]) for run in kinds.values()]
    assert len({run_id(p) for p in plans}) == len(kinds) >= 12
    for p in plans:
        assert (p.curriculum, p.schedule, p.batch_tokens, p.stop_at) == (2, "constant", 1024, 0.98)
        assert p.steps == {64: 800, 128: 1200}[p.seq_len] and p.task_options["layout"] == "suffix"


def test_no_two_runs_are_the_same(made):
    runs = [run for each in made.values() for run in each]
    assert len({repr(run) for run in runs}) == len(runs) and {run.seed for run in runs} == set(range(5))


@pytest.mark.parametrize("name", config.SWEEPS)
def test_files_are_the_sweeps_and_tune_at_the_shorter_length(name, made, monkeypatch):
    some = made[name][-2:]
    monkeypatch.setitem(config.SWEEPS, name, lambda: some)
    found = load(FOLDER / f"{name}.py")
    assert (found.runs, found.out) == (some, f"runs/what_mamba_lacks/{name}")
    assert (found.learning_rates, found.validation_seeds) == ((1e-3, 2.5e-3, 6.3e-3, 1.6e-2), (100,))
    assert [(run.seq_len, run.steps) for run in map(found.tune, some)] == [(64, 400)] * 2


def test_core_and_rest_are_the_whole_factorial_of_mamba(made):
    runs = [run for name in ("core", "rest") for run in made[name] if run.seq_len == 64]
    found = Counter((run.seed, run.position, run.d_conv, run.ssm_init) for run in runs)
    parts = [
        (conv, "+".join(filter(None, (first, memory, tie))) or "default")
        for conv, first in ((4, ""), (4, "identity"), (1, "identity"))
        for memory in ("", "long")
        for tie in ("", "tied")
    ]
    cells = {(conv, "recall" if init == "identity+long+tied" else init) for conv, init in parts}
    assert set(found.values()) == {1} and len(cells) == 12
    for seed in range(5):
        assert {cell[2:] for cell in found if cell[:2] == (seed, "learned")} == cells
    assert {cell[2:] for cell in found if cell[:2] == (2, "none")} == cells  # the last seed that all have


def test_each_removed_cell_lacks_one_ingredient():
    for factor, cell in zip(LEVELS, ONE_REMOVED, strict=True):
        differ = [name for name in LEVELS if getattr(cell, name) != getattr(ALL, name)]
        assert differ == [factor] and getattr(cell, factor) == LEVELS[factor][0]
    assert {getattr(NOTHING, name) == levels[0] for name, levels in LEVELS.items()} == {True}


# --- measures -----------------------------------------------------------------------------------------------


def model_and_batch(family: str, cell: Cell, layers: int = 1):
    (run,) = config.ssm(family, [cell], seq_len=8, queries=8, num_symbols=64)
    p = plan(dataclasses.replace(run, layers=layers), family)
    (batch,) = heldout(tasks.build(p.task, **p.task_options), 16, 8, "validation")
    return models.build(p.model, seed=0, **p.model_overrides), batch


@pytest.mark.parametrize("family", effects.FACTORIALS)
def test_recall_has_every_ingredient(family):
    """Without positions B and C are functions of the symbol alone, so that a tie makes them equal."""
    model, batch = model_and_batch(family, dataclasses.replace(ALL, positions="none"), layers=2)
    assert built.identity_share(model).tolist() == [1.0, 1.0]
    lives = built.half_life(model, batch)
    torch.testing.assert_close(lives, torch.full_like(lives, math.log(2) * math.exp(8)))
    same, others = built.alignment(model, batch)
    assert same[0] == pytest.approx(1.0, abs=1e-5) and others[0] < 0.5


@pytest.mark.parametrize("family", effects.FACTORIALS)
def test_published_weights_have_none(family):
    model, batch = model_and_batch(family, NOTHING)
    assert built.identity_share(model).item() == pytest.approx(0.25, abs=0.05)  # of taps alike on average
    found = built.measure(model, batch)
    assert found["half_life"] < 8 and found["long"] < 0.1
    assert abs(found["same"] - found["others"]) < 0.2


@torch.no_grad()
def test_half_lives_and_shares_of_chosen_weights():
    """exp(dt A)^n = 1/2: with dt = 2 and A = -log(2) / 10 after 5 tokens, in half of the states after 50."""
    model, batch = model_and_batch("mamba", POSITIONS_ALONE)
    mixer = model.blocks[0].mixer
    mixer.conv1d.weight.copy_(torch.tensor([1.0, 1.0, 1.0, 3.0]))
    mixer.dt_proj.weight.zero_()
    mixer.dt_proj.bias.fill_(math.log(math.expm1(2.0)))
    mixer.A_log.fill_(math.log(math.log(2) / 10))
    mixer.A_log[:, ::2] -= math.log(10)
    lives = built.half_life(model, batch)[0]
    torch.testing.assert_close(lives[:, 1::2], torch.full((128, 32), 5.0))
    torch.testing.assert_close(lives[:, ::2], torch.full((128, 32), 50.0))
    assert built.identity_share(model).item() == pytest.approx(9 / 12)


@torch.no_grad()
def test_half_life_is_of_context_tokens():
    """Where dt depends on the token, `<bos>` and the query change nothing."""
    model, batch = model_and_batch("mamba", dataclasses.replace(ALL, positions="none"))
    before = built.half_life(model, batch)
    mixer = model.blocks[0].mixer
    mixer.dt_proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    found = built.half_life(model, batch)
    assert not torch.allclose(found, before)
    changed = batch.input_ids.clone()
    changed[:, 9] = batch.input_ids[:, 0]  # <query> becomes <bos>
    torch.testing.assert_close(built.half_life(model, dataclasses.replace(batch, input_ids=changed)), found)


def test_alignment_belongs_to_the_queried_symbol():
    model, batch = model_and_batch("mamba", dataclasses.replace(ALL, positions="none"))
    wrong = dataclasses.replace(batch, target_index=(batch.target_index + 1) % 8)
    same, others = built.alignment(model, batch)
    away, rest = built.alignment(model, wrong)
    assert away < 0.5 < same
    torch.testing.assert_close(same + 7 * others, away + 7 * rest)  # of the same eight cosines


def test_a_watched_run_has_a_row_before_training_and_one_per_evaluation():
    (run,) = config.ssm("mamba", [POSITIONS_ALONE], seed=3, lr=1e-3, seq_len=8, queries=8, steps=4)
    run = dataclasses.replace(
        run, num_symbols=64, d_model=16, d_state=4, eval_every=2, eval_examples=8, final_eval_examples=8
    )
    rows = built.watched(run)
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert {(row["model"], row["seed"], row["lr"]) for row in rows} == {("mamba", 3, 1e-3)}
    first, _, last = (row["identity"] for row in rows)
    assert first == pytest.approx(0.25, abs=0.15) and first != last


def test_rates_are_those_that_the_sweep_chose(tmp_path):
    with pytest.raises(UserError, match=r"has no core/learning_rates\.json; run python -m synthetic\.sweep"):
        built.rate(tmp_path, "mamba")
    rows = [
        dict(model="mamba", **cell.options(), lr=lr) for cell, lr in ((ALL, 1e-3), (POSITIONS_ALONE, 4e-3))
    ]
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "learning_rates.json").write_text(json.dumps(rows))
    assert built.rate(tmp_path, "mamba") == 4e-3
    (tmp_path / "core" / "learning_rates.json").write_text(json.dumps(rows[:1]))
    with pytest.raises(UserError, match="has no rate for"):
        built.rate(tmp_path, "mamba")


# --- report -------------------------------------------------------------------------------------------------


def rows_of(name: str, cell: dict, seed: int, at: int | None, longest: int, **more) -> list[dict]:
    """A run that passes 0.95 at step `at`, or never, with evaluations every 100 of 300 steps."""
    fixed = dict(
        run=f"{name}-{seed}", purpose="report", model="mamba", seq_len=64, seed=seed, lr=2e-3, steps=300,
        rotary_pct=np.nan, chance=1 / 64, split="", train_length=64, length=64, **cell,
    )  # fmt: skip
    end = at or 300
    steps = range(100, end + 1, 100)
    rows = [dict(kind="during", step=s, seconds=s / 10, accuracy=1.0 if s == at else 0.5) for s in steps]
    rows.append(
        dict(kind="final", step=end, seconds=end / 10, accuracy=1.0 if at else 0.5, longest_length=longest)
    )
    return [fixed | row | more for row in rows]


def two_cells() -> pd.DataFrame:
    """All ingredients: 200, 200, never; with 1 tap: 100. None: never, never, and a run without an end."""
    rows = [
        row
        for seed, at in enumerate((200, 200, None))
        for row in rows_of("all", ALL.options(), seed, at, 64 if at else 16)
    ]
    rows += rows_of("tap", WITHOUT_CONVOLUTION.options(), 0, 100, 64)
    none = dict(NOTHING.options(), position=None)  # the store leaves "none" of a plain SSM out
    for seed in range(3):
        rows += rows_of("none", none, seed, None, 4)
    rows = rows[:-1]  # the third was killed
    rows += rows_of("rate", ALL.options(), 100, 100, 64, purpose="validation")
    return pd.DataFrame(rows)


def line(table: str, begin: str) -> list[str]:
    (found,) = [text for text in table.splitlines() if text.startswith(f"| {begin} |")]
    return [entry.strip() for entry in found.strip("|").split("|")]


def test_numbers_of_the_page_follow_from_its_runs():
    runs = effects.outcomes(two_cells())
    assert len(runs) == 6
    table = report.removed(runs)
    with_all = line(table, "Mamba | 64 | with all four ingredients")[3:]
    # 2 of 3, exact interval: scipy.stats.binomtest(2, 3).proportion_ci()
    assert with_all == ["2 of 3 [0.09, 0.99]", "(100, 200]", "64, 64, 16", "1.00, 1.00, 0.50", "0.002"]
    assert line(table, "Mamba | 64 | without a convolution")[3:5] == ["1 of 1 [0.03, 1.00]", "(0, 100]"]
    none = line(table, "Mamba | 64 | with none")[3:]
    assert none == ["0 of 2 [0.00, 0.84]", "more than 300", "4, 4", "0.50, 0.50", "0.002"]
    assert line(report.cells_table(runs), "Mamba | 64 | none | default | default | random")[6:] == none
    assert line(report.families(runs), "Mamba | none | published")[3:] == none
    said = report.findings(runs, pd.DataFrame(columns=["model"]))
    assert "ingredients: 2 of 3 seeds reach 0.95, the median after 100 to 200 steps. Without" in said
    assert "With none: 0 of 2 seeds reach 0.95 in 300 steps." in said
    more = [row for seed in range(2) for row in rows_of("p", ONE_REMOVED[0].options(), seed, None, 4)]
    both = effects.outcomes(pd.concat([two_cells(), pd.DataFrame(more)]))
    said = report.findings(both, pd.DataFrame(columns=["model"]))
    assert "Without positions, with none: 0 of 2 seeds reach 0.95 in 300 steps." in said
    assert line(report.cost(runs), "Mamba | 64")[2:] == ["6", "2"]  # 10 + 20 + 20 + 3 x 30 s


def test_an_incomplete_factorial_has_no_effects():
    assert report.effects_table(effects.outcomes(two_cells())) == ""


def test_effects_are_differences_of_cell_means():
    """Mamba-2: the tie alone decides, 2 steps of evaluation against never, and 64 symbols against 16."""
    rows = []
    for i, cell in enumerate(config.MAMBA2):
        tied = cell.tie == "tied"
        for seed in range(2):
            at, longest = (200, 64) if tied else (None, 16)
            rows += rows_of(str(i), cell.options(), seed, at, longest, model="mamba2")
    rows += rows_of("none", NOTHING.options(), 0, None, 2, model="mamba2")  # no part of the factorial
    runs = effects.outcomes(pd.DataFrame(rows))
    found = effects.effects(effects.factorial(runs, "mamba2"), "mamba2")
    assert set(found["runs"]) == {16}
    found = found.set_index(["outcome", "term"])["effect"]
    assert found["share at 0.95", "tie"] == 1
    assert found["log2 of steps to 0.95", "tie"] == pytest.approx(math.log2(200 / 300))
    assert found["log2 of longest context", "tie"] == 2
    others = found[found.index.get_level_values("term") != "tie"]
    assert len(others) == 15 and others.abs().max() < 1e-12
    text = report.effects_table(runs)
    assert line(text, "tie: tied - random")[1].startswith("1.00 [") and "Mamba-2, 16 runs, 6 effects" in text


def test_attention_is_told_apart_by_its_positions():
    blank = dict(d_conv=np.nan, ssm_init=None)
    rows = []
    for i, (scheme, pct) in enumerate((("rope", 0.25), ("rope", 1.0), ("none", np.nan))):
        cell = dict(position=scheme, **blank)
        rows += rows_of(str(i), cell, 0, 100 if i else None, 64, model="transformer", rotary_pct=pct)
    table = report.families(effects.outcomes(pd.DataFrame(rows)))
    reached = {
        name: line(table, f"Transformer | {name}")[3][:6] for name in ("RoPE 25 %", "RoPE 100 %", "none")
    }
    assert reached == {"RoPE 25 %": "0 of 1", "RoPE 100 %": "1 of 1", "none": "1 of 1"}


def test_what_is_built_says_when():
    steps = [0, 100, 200]
    grown = pd.DataFrame(
        dict(model="mamba", seed=seed, step=steps, train_length=[2, 8, end], identity=[0.25, share, 0.75],
             long=0.1, gap=[0.0, 0.2, 0.3 - 0.6 * seed])
        for seed, share, end in ((0, 0.5, 16), (1, 0.4, 32))
    ).explode(["step", "train_length", "identity", "gap"])  # fmt: skip
    table = report.built_table(grown)
    identity, long, tie = (line(table, f"Mamba | {words}")[2:] for words in report.THERE)
    assert identity == ["0.25, 0.25", "0.75, 0.75", "0.5", "100, 200", "16, 32"]
    assert long[3] == "never, never" and tie[3] == "200, 200"
    said = report.findings(pd.DataFrame(columns=["model", "seq_len", *LEVELS]), grown)
    assert "identity in 2 of 2 seeds, long memory in 0 of 2 seeds, tie in 2 of 2 seeds" in said


def test_sweeps_are_collected_with_their_names(tmp_path):
    with pytest.raises(UserError, match="has none of the folders core, families, mamba2, rest, rope"):
        report.collect(tmp_path)


def test_the_page_is_made_of_its_results():
    """If not: `python -m studies.what_mamba_lacks.report`."""
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert report.filled(page, report.finished(), report.rates(), report.growth()) == page
