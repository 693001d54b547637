"""The study of what a state holds: its grid, what a model is asked, and the page's tables."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from readme_commands import ROOT

from analysis.capacity_law import facts_at, fit_constants, recall_probability
from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from studies.capacity import config, measure, report
from synthetic import tasks
from synthetic.config import plan, run_id

TOKENS = dict(vocab_size=40, max_position_embeddings=40)
SMALL = {
    "linear": dict(d_model=16, d_state=4, d_conv=2),
    "mamba": dict(d_model=16, d_state=4, d_conv=2, n_layer=1),
    "mamba2": dict(d_model=16, d_state=4, d_conv=2, n_layer=1, headdim=32),
    "transformer": dict(d_model=16, n_layer=2, n_head=1),
    "hybrid": dict(d_model=16, d_state=4, n_layer=3, pattern="M M A", n_head=1),
    "gated-deltanet": dict(d_model=16, d_state=4, d_conv=2, n_layer=1, headdim=32),
}


def test_every_family_has_every_shape_and_every_seed(monkeypatch):
    assert range(5) == config.SEEDS
    monkeypatch.setattr(config, "SEEDS", range(2))  # five take seconds
    runs = config.get_config().runs
    plans = [plan(run, run.model[0]) for run in runs if run.seed == 0]
    assert len({run_id(p) for p in plans}) == len(plans)
    grown = {(p.growth, p.curriculum, p.seq_len) for p in plans if p.task == "position"}
    assert grown == {("gap", 4, 64)}
    table = pd.DataFrame([(r.task, r.model[0], r.d_model, r.d_state, r.seed) for r in runs],
                         columns=["task", "model", "D", "N", "seed"])  # fmt: skip
    assert (table.groupby(["task", "model", "D", "N"], dropna=False)["seed"].nunique() == 2).all()
    position = table[table["task"] == "position"].groupby("model")["seed"].size()
    keyed = dict.fromkeys(config.KEYED, 8)
    assert position.to_dict() == dict(linear=12, mamba=12, mamba2=12, transformer=4, hybrid=4, **keyed)
    assert set(table["model"][table["task"] == "mqar"]) == {"mamba2", "transformer", "hybrid"}
    first = table[table["seed"] == 0]
    assert len(first) * 2 == len(table) and first.index.max() + 1 == len(first)  # seed after seed


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("task", ["position", "mqar"])
def test_numbers_are_those_of_the_architecture_s_formula(family, task):
    """Counted in the cache after n facts: n symbols and `<bos>`, or n pairs."""
    positions = {} if family in ("linear", "mamba", "mamba2", "gated-deltanet") else {"position": "learned"}
    model = models.build(f"{family}-tiny", **TOKENS, **SMALL[family], **positions)
    asked = tasks.build(task, seq_len=32, **({"num_symbols": 32} if task == "mqar" else {}))
    for n in (2, 8):
        read = 2 * n if task == "mqar" else n + 1
        assert measure.numbers_held(model, asked, n) == models.state_size(model.config, read)


class Lookup(torch.nn.Module):
    """Recalls the first `room` pairs of a sequence of mqar by looking them up, and no other."""

    def __init__(self, position, room):
        super().__init__()
        self.config, self.room = SimpleNamespace(position=position), room

    def forward(self, input_ids, logits_at, position_ids=None):
        logits = torch.zeros(*logits_at.shape, int(input_ids.max()) + 2)
        for i, (row, at) in enumerate(zip(input_ids.tolist(), logits_at.expand(len(input_ids), -1).tolist(),
                                          strict=True)):  # fmt: skip
            n = len(at)
            facts = dict(zip(row[: 2 * n : 2], row[1 : 2 * n : 2], strict=True))
            assert len(row) == 4 * n and len(facts) == n and sorted(row[j] for j in at) == sorted(facts)
            known = list(facts)[: self.room]
            for k, j in enumerate(at):
                logits[i, k, facts[row[j]] if row[j] in known else -1] = 1
        return logits


def test_a_question_has_n_pairs_and_asks_for_all(monkeypatch):
    """Models with position vectors are not asked beyond their training."""
    monkeypatch.setattr(measure, "SEQUENCES", 4)
    task = tasks.build("mqar", seq_len=64, num_symbols=512, num_pairs=16)
    found = measure.asked(Lookup("none", room=5), task)
    assert found["n_facts"].tolist() == [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    assert found["count"].tolist() == [4 * n for n in found["n_facts"]]
    assert found["correct"].tolist() == [4 * min(n, 5) for n in found["n_facts"]]
    assert found["chance"].tolist() == [1 / n for n in found["n_facts"]]
    assert measure.asked(Lookup("learned", room=5), task)["n_facts"].max() == 16


@pytest.fixture
def run(monkeypatch):
    """A run of the position task that has come to eight facts of its sixteen."""
    monkeypatch.setattr(
        measure, "environment", lambda folder: {"sessions": [{"commit": "old"}, {"commit": "c"}]}
    )
    sizes = dict(vocab_size=40, max_position_embeddings=20, position="learned")
    rows = [(4, 24, 1 / 4), (8, 18, 1 / 8), (16, 2, 1 / 16)]
    by_length = pd.DataFrame(rows, columns=["length", "correct", "chance"]).assign(count=24)
    return SimpleNamespace(
        folder=Path("some/position-run"),
        plan=SimpleNamespace(task="position", family="mamba", seed=3),
        task=tasks.build("position", seq_len=16),
        model=lambda: models.build("mamba-tiny", **SMALL["mamba"], **sizes),
        result=dict(seconds=2.5, train_length=8),
        by_length=by_length,
    )


def test_the_position_task_is_read_from_the_run_up_to_the_length_of_its_training(run):
    found = measure.curve(run)
    assert found[["n_facts", "correct", "count", "chance", "trained_facts"]].to_numpy().tolist() == [
        [4, 24, 24, 1 / 4, 8],
        [8, 18, 24, 1 / 8, 8],
    ]
    shape = run.model().config
    assert found["numbers"].tolist() == [models.state_size(shape, 5), models.state_size(shape, 9)]
    same = found[
        ["task", "model", "n_layer", "d_model", "d_state", "vocab_size", "seed", "seconds", "run", "commit"]
    ]
    assert same.drop_duplicates().to_numpy().tolist() == [
        ["position", "mamba", 1, 16, 4, 40, 3, 2.5, "position-run", "c"]
    ]


def test_a_run_is_measured_once_and_dropped_with_its_folder(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "MEASURED", tmp_path / "measured.csv")
    monkeypatch.setattr(measure, "use_threads", lambda n: None)
    finished = [tmp_path / "a", tmp_path / "b"]
    monkeypatch.setattr(measure, "_finished", lambda folder: finished)
    monkeypatch.setattr(measure, "Run", lambda folder: SimpleNamespace(**vars(run) | {"folder": folder}))
    for printed, kept in ((["a", "b"], "ab"), ([], "ab"), ([], "b")):
        if kept == "b":
            del finished[0]
        measure.main("runs")
        assert sorted(capsys.readouterr().out.split()) == printed
        assert sorted(set(pd.read_csv(tmp_path / "measured.csv")["run"])) == list(kept)


def test_other_tasks_are_refused(run):
    run.task = tasks.build("induction", seq_len=16)
    with pytest.raises(UserError, match="task induction is not of this study; give runs of position or mqar"):
        measure.curve(run)


def test_missing_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"RUNS .*gone does not exist; run the sweep first"):
        measure.main(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="RUNS is missing"):
        measure.main()


def observations(a=0.5, failed=("mamba", 64, 8, 0)):
    """Answers of models that obey the law, and of one run that learned nothing."""
    rows = []
    for model, D, N, seed in [("mamba", D, N, s) for D in (32, 64) for N in (4, 8) for s in range(3)]:
        for n in (2, 4, 8, 16, 32, 64):
            p = 1 / n if (model, D, N, seed) == failed else float(recall_probability(n, D, N, 131, a=a))
            rows.append(dict(
                task="position", model=model, n_layer=1, d_model=D, d_state=N, vocab_size=131, seed=seed,
                trained_facts=64, n_facts=n, numbers=2 * D * (N + 1), correct=round(4096 * p), count=4096,
                chance=1 / n, seconds=30.0, run=f"{model}-{D}-{N}-{seed}", commit="c",
            ))  # fmt: skip
    return pd.DataFrame(rows)


def test_a_run_that_learned_nothing_is_counted_and_left_out():
    table = observations()
    assert set(table["run"]) - set(report.learned(table)["run"]) == {"mamba-64-8-0"}
    lines = report.runs_table(table).splitlines()
    cell = "| position | Mamba | 1 | 64 | 8 | 2 of 3 [0.09, 0.99] | "
    (facts,) = (line.removeprefix(cell) for line in lines if line.startswith(cell))
    assert re.fullmatch(r"4\d, 4\d \| 30 \|", facts)  # the law: 44.7
    fitted = report.fits_table(report.learned(table)).splitlines()[-1].split(" | ")
    assert fitted[1:3] == ["Mamba", "0.5"] and fitted[3].startswith("0.50 [")


def test_layers_with_keys_stand_beside_mamba():
    """Medians over seeds, one of which has learned nothing and holds nothing."""
    mamba, keyed = observations(), observations(a=0.25, failed=("mamba", 64, 4, 0))
    assert report.keyed_table(mamba) == "Not run yet."
    keyed = keyed.assign(model="kda", run="kda-" + keyed["run"])
    lines = report.keyed_table(pd.concat([mamba, keyed])).splitlines()
    header, found = (
        [cell.strip() for cell in next(x for x in lines if x.startswith(begin)).strip("|").split("|")]
        for begin in ("| D | N |", "| 64 | 4 |")
    )
    cells = dict(zip(header, found, strict=True))
    exact = [float(facts_at(64, 4, 131, 1, a)) for a in (0.5, 0.25)]
    bracketed = re.compile(r"(\d+) \[(\d+), (\d+)\]")
    of_mamba, of_kda = (bracketed.fullmatch(cells[name]) for name in ("Mamba", "KDA"))
    assert [float(x) for x in of_mamba.groups()] == pytest.approx([exact[0]] * 3, rel=0.06)
    assert [float(x) for x in of_kda.groups()] == pytest.approx([exact[1], 0, exact[1]], rel=0.06)
    assert cells["GLA"] == cells["DeltaNet"] == "not run"
    assert any(line.startswith("| position | KDA | – | 0.25 [") for line in lines)


def test_curves_that_collapse_have_one_constant_in_every_cell():
    cells = report.cells_table(report.learned(observations())).splitlines()[2:]
    constants = [float(found) for line in cells for found in re.findall(r"(\d\.\d\d) \[", line)]
    assert len(cells) == 2 and len(constants) == 4 and constants == pytest.approx([0.5] * 4, abs=0.02)


def test_the_prediction_is_the_law_s_at_the_published_shapes():
    """790 M: 48 layers of 16 states and width 1,536. By hand: m_V = 4.085, need = 5.730, one layer
    (0.03046 - 0.00065) 16 * 1536 / 0.5 = 1,465 or 1,444 without rounding."""
    lines = report.prediction_table(pd.DataFrame(columns=["task", "model"])).splitlines()
    assert len(lines) == 2 + 3 * 2
    first = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert first[:3] == ["mamba-790m", "48 × 16 × 1536", "0.50 (published, trained Mamba)"]
    assert float(first[3].replace(",", "")) == pytest.approx(1450, rel=0.02)
    assert float(first[4].replace(",", "")) == pytest.approx(48 * float(first[3].replace(",", "")), rel=0.01)
    recalls = np.array(first[5:], float)
    assert (recalls[:2] > 0.95).all() and (recalls[2:] > 0.99).all()


def test_the_page_says_what_was_not_run():
    table = observations()
    assert report.not_run(table) == (
        "Not run yet: position: Transformer, Mamba-2, Mamba-3, Hybrid, Linear SSM, DeltaNet, Gated DeltaNet, "
        "KDA, GLA; "
        "mqar: Transformer, Mamba, Mamba-2, Hybrid, Linear SSM."
    )
    families = (*SMALL, *config.KEYED)
    everything = [table.assign(task=task, model=m) for task in ("position", "mqar") for m in families]
    assert report.not_run(pd.concat(everything)) == ""
    own = "has not fitted a constant of its own"
    fits = fit_constants(report.learned(table), by=("task", "model"))
    assert own not in report.prediction(fits) and own in report.prediction(fits.iloc[:0])


def test_tables_of_the_page_are_its_results():
    """If not: `python -m studies.capacity.report`."""
    page = (report.HERE / "README.md").read_text(encoding="utf-8")
    assert report.filled(page, pd.read_csv(report.MEASURED)) == page
    figures = {file.name for file in ROOT.joinpath("studies", "capacity").glob("*.png")}
    assert figures == set(re.findall(r"\]\(([^)]*\.png)\)", page))
