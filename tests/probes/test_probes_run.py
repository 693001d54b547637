"""`python -m probes.run`: every probe of a tiny run, files and columns, resuming, bad input."""

from __future__ import annotations

import json
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_runs import by_family, tiny_run

from analysis import figures
from probes import run as cli
from probes.linear import split
from probes.suite import PROBES, NotApplicable, Options, linear, updates
from probes.suite.common import coarse
from ssm_retrieval import models
from synthetic import tasks

SSM_ONLY = ("updates", "retention")
DELTA_ONLY = ("erasure",)  # tests/probes/test_probe_delta.py has such models


@pytest.fixture(scope="module")
def position(probed_run):
    return probed_run


@pytest.fixture(scope="module")
def probed(probed_run):
    """Where the figures of both are."""
    (view,) = probed_run.glob("compare-*/probes")
    return view


@pytest.fixture(scope="module")
def tables(probed_run):
    """(probe, family) -> path of the table."""
    runs = by_family(probed_run)
    return lambda name, family: runs[family] / "probes" / f"{name}.{family}.parquet"


def test_every_probe_leaves_tables_and_a_summary(probed, tables):
    text = (probed / "summary.md").read_text()
    for name, probe in PROBES.items():
        if name in DELTA_ONLY:
            assert not any(tables(name, family).exists() for family in ("mamba", "transformer"))
            assert f"{name} mamba: left out, it has no layers with keys and a state" in text
            continue
        families = ("mamba",) if name in SSM_ONLY else ("mamba", "transformer")
        found = [pd.read_parquet(tables(name, family)) for family in families]
        assert len(pd.read_csv(probed / f"{name}.csv")) == sum(map(len, found))
        for table in found:
            assert not [c for c in (*cli.COLUMNS, *probe.columns) if c not in table]
            assert set(table["weights"]) == ({"trained", "untrained"} if probe.untrained else {"trained"})
            bounded = table[table["low"].notna() & np.isfinite(table["value"])]
            assert len(bounded)
            slack = 1e-9 * bounded["value"].abs().clip(1)
            assert (bounded["low"] <= bounded["value"] + slack).all()
            assert (bounded["value"] <= bounded["high"] + slack).all()
        assert f"## {name}: {probe.title}" in text
    for name in SSM_ONLY:
        assert not tables(name, "transformer").exists()
        assert (
            f"{name} transformer: left out, it has no layers with the recurrence of Mamba or Mamba-2" in text
        )
    assert not list(probed.glob(".*.tmp"))


def test_identities_hold(tables):
    retention = pd.read_parquet(tables("retention", "mamba"))
    assert (retention.loc[retention["part"] == "reconstruction", "value"] < 1e-5).all()
    rows = retention[(retention["part"] == "map") & (retention["weights"] == "trained")]
    assert np.allclose(rows.groupby(["layer", "query"])["value"].sum(), 1, atol=1e-5)
    for family in ("mamba", "transformer"):
        patch = pd.read_parquet(tables("patch", family))
        assert (patch.loc[patch["control"] == "self", "value"] == 0).all()
        assert np.allclose(patch.loc[patch["control"] == "everything", "value"], 1, atol=1e-3)


def test_updates_of_one_sequence_are_those_of_a_sequence_of_the_task(tables):
    rows = pd.read_parquet(tables("updates", "mamba"))
    rows = rows[(rows["part"] == "sequence") & (rows["layer"] == 0) & (rows["weights"] == "trained")]
    tokens, kinds = rows["token"].tolist(), rows["role"].tolist()
    assert rows["position"].tolist() == list(range(1 + 8 + 2))
    assert tokens[0] == "<bos>" and tokens[-2] == "<query>" and kinds[-1] == "query"
    assert sorted(tokens[1:9]) == [f"<s{i}>" for i in range(8)]
    assert tokens[kinds.index("target")] == tokens[-1]
    assert np.isnan(rows["value"].iloc[0]) and (rows["value"].iloc[1:] > 0).all()


@pytest.mark.parametrize("length, size", [(128, 1), (300, 5)])
def test_updates_by_position_are_means_over_sequences_and_tokens(length, size):
    values = torch.rand(7, length, generator=torch.Generator().manual_seed(0))
    values[:, 0] = torch.nan  # as relative updates of the first token
    table = pd.DataFrame(updates.positions(values, 3, "relative")).set_index("position")
    assert table.index.tolist() == list(range(0, length, size)) and (table["layer"] == 3).all()
    for start in table.index[1:]:
        each = values[:, start : start + size].mean(1).double().numpy()
        half = 2.4469 * each.std(ddof=1) / 7**0.5  # Student's t, 6 degrees of freedom
        found = table.loc[start, ["value", "low", "high"]].to_numpy(float)
        np.testing.assert_allclose(found, each.mean() + np.array([0, -half, half]), rtol=1e-4)
    first = values[:, 1:size].mean() if size > 1 else torch.nan
    np.testing.assert_allclose(table.loc[0, "value"], first, rtol=1e-5)


def test_untrained_weights_treat_the_target_as_any_symbol():
    """Where nothing is known of the query, the ratios of target to distractors are 1."""
    task = tasks.build("position", seq_len=16)
    model = models.build("mamba-tiny", vocab_size=task.vocab_size, n_layer=1, d_model=16).eval()
    for name in SSM_ONLY:
        table = PROBES[name].measure(model, task, Options(examples=512))
        contrast = table[table["part"] == "contrast"]
        assert (contrast["low"] < 1.05).all() and (contrast["high"] > 0.95).all()
        assert ((contrast["value"] - 1).abs() < 0.05).all()


def test_capacity_is_not_noise():
    plan = linear.Plan.of(tasks.build("position", seq_len=1024))
    tokens = pd.DataFrame(
        dict(accuracy=1 / 16, low=0.03, high=0.1, shuffled=0.07, count=200), index=plan.lags
    )
    assert linear._capacity(tokens, plan, 4096)["value"] == pytest.approx(0)
    tokens.loc[[0, 1, 3], ["accuracy", "low", "high"]] = 1.0
    assert 4 <= linear._capacity(tokens, plan, 4096)["value"] < 6
    tokens.loc[[1023], ["accuracy", "low", "high"]] = 1.0  # the first symbol, and it alone
    assert 5 <= linear._capacity(tokens, plan, 4096)["value"] < 7


def test_what_is_finished_is_skipped(position, probed, capsys):
    places = [probed, *position.glob("position*/probes")]
    before = {p: p.stat().st_mtime_ns for at in places for p in at.iterdir() if p.name != "summary.md"}
    assert len(places) == 3
    assert cli.main([str(position), "--examples", "24"]) == 0
    words = capsys.readouterr().out
    assert "lens mamba: finished before" in words
    said = [str(run) for run in by_family(position).values()]
    assert sorted(words.splitlines()[-1].split()[4:]) == sorted(said)
    assert {
        p: p.stat().st_mtime_ns for at in places for p in at.iterdir() if p.name != "summary.md"
    } == before


def test_a_run_is_measured_once_whatever_it_is_compared_with(position, tmp_path, capsys):
    """Alone its figures lie beside its tables, which those of both runs are drawn from."""
    shutil.copytree(position, tmp_path / "runs")
    runs = by_family(tmp_path / "runs")
    call = ["--probe", "lens", "--examples", "24"]
    assert cli.main([str(runs["mamba"]), *call]) == 0
    assert "lens mamba: finished before" in capsys.readouterr().out
    alone = pd.read_csv(runs["mamba"] / "probes" / "lens.csv")
    (both,) = (tmp_path / "runs").glob("compare-*/probes")
    table = pd.read_csv(both / "lens.csv")
    assert set(alone["family"]) == {"mamba"} and set(table["family"]) == {"mamba", "transformer"}
    pd.testing.assert_frame_equal(table[table["family"] == "mamba"].reset_index(drop=True)[[*alone]], alone)
    assert cli.main([str(runs["mamba"]), str(runs["transformer"]), *call]) == 0  # as the folder of both
    assert capsys.readouterr().out.count("finished before") == 2


def test_runs_that_cannot_be_shown_together(position, tmp_path, capsys):
    mamba = by_family(position)["mamba"]
    copy = shutil.copytree(mamba, tmp_path / "copy")
    assert cli.main([str(mamba), str(copy)]) == 2
    assert f"error: RUNS {mamba} and {copy} are both of mamba; give one" in capsys.readouterr().err
    path = copy / "config.json"
    saved = json.loads(path.read_text())
    saved["plan"] |= {"family": "mamba2", "task_options": saved["plan"]["task_options"] | {"seq_len": 9}}
    path.write_text(json.dumps(saved))
    assert cli.main([str(mamba), str(copy)]) == 2
    assert f"error: RUNS {mamba} and {copy} are of different tasks" in capsys.readouterr().err


def test_other_options_run_again(position, tmp_path, capsys):
    call = [str(position), "--probe", "lens", "--examples", "4", "--out", str(tmp_path), "--seed"]
    found = []
    for seed in ("0", "1"):
        assert cli.main([*call, seed]) == 0
        assert "finished before" not in capsys.readouterr().out
        found.append(
            (json.loads((tmp_path / "lens.mamba.json").read_text()), (tmp_path / "lens.csv").read_bytes())
        )
    (first, numbers), (second, others) = found
    assert first["hash"] != second["hash"] and numbers != others
    assert (first["seed"], second["seed"], second["examples"]) == (0, 1, 4)


def test_a_stop_between_table_and_record_is_repaired(position, tmp_path, capsys):
    tmp_path = tmp_path / "[bold]" / "new"  # printed as it is, and made with its parent
    call = [str(position), "--probe", "lens", "--examples", "4", "--out", str(tmp_path)]
    assert cli.main(call) == 0
    assert str(tmp_path / "summary.md") in capsys.readouterr().out.splitlines()
    whole = (tmp_path / "lens.csv").read_bytes()
    (tmp_path / "lens.mamba.json").write_text("{")
    (tmp_path / ".lens.mamba.parquet.1.tmp").write_bytes(b"half")
    capsys.readouterr()
    assert cli.main(call) == 0
    assert "lens transformer: finished before" in capsys.readouterr().out
    assert (tmp_path / "lens.csv").read_bytes() == whole
    assert not list(tmp_path.glob(".*.tmp"))


def test_another_task_works_or_says_why_not(tmp_path, capsys):
    more = ["--seq-len", "16", "--num-pairs", "2", "--model", "mamba"]
    folder = tiny_run(tmp_path, "mqar", *more)
    assert cli.main([str(folder), "--examples", "4"]) == 0
    words = capsys.readouterr().out
    for name in ("updates", "retention", "linear", "patch"):
        assert f"{name} mamba: left out, {name} needs the roles of tokens, which task mqar lacks" in words
        record = json.loads((folder / "probes" / f"{name}.mamba.json").read_text())  # for the report
        assert "needs the roles of tokens, which task mqar lacks" in record["left_out"]
    assert figures.main(shlex.split(words.splitlines()[-1])[4:]) == 0  # the command of the last line
    drawn = {path.name for path in (folder / "probes").glob("*.png")}
    assert drawn == {"attention.png", "attention_maps.png", "capacity.png", "knockout.png", "lens.png"}
    capsys.readouterr()
    assert cli.main([str(folder), "--probe", "patch"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: nothing was measured: patch mamba") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--probe", "lense"], "--probe lense is unknown; use updates"),
        (["--examples", "1"], "--examples 1 must lie in 2 .. 100,000: intervals need two sequences"),
        (["--examples", str(10**20)], f"--examples {10**20} must lie in 2 .. 100,000"),
        (["--seed", "-1"], "--seed -1 must lie in"),
    ],
)
def test_bad_options(position, more, words, capsys):
    assert cli.main([str(position), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}") and error.count("\n") == 1


def test_bad_folders(position, tmp_path, capsys):
    assert cli.main([str(tmp_path)]) == 2
    assert "has no config.json; give the folder of a run" in capsys.readouterr().err
    (tmp_path / "config.json").write_text((by_family(position)["mamba"] / "config.json").read_text())
    assert cli.main([str(tmp_path)]) == 2
    assert "has no finished model" in capsys.readouterr().err
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cli.main([str(position), "--probe", "lens", "--out", str(blocked / "x")]) == 2
    assert capsys.readouterr().err.startswith(f"error: --out {blocked}")
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("error: RUNS is missing")


def test_states_of_every_size_are_probed_alike():
    """As many sequences and features whatever the state's size, and four sequences for each feature."""
    task = tasks.build("position", seq_len=8)
    found = {}
    for d_state in (8, 32):
        model = models.build("mamba-tiny", vocab_size=task.vocab_size, n_layer=1, d_state=d_state).eval()
        table = linear.measure(model, task, Options(examples=60))
        row = table[(table["part"] == "capacity") & (table["site"] == "state")].iloc[0]
        found[d_state] = row["n"], row["features"]
        assert row["numbers"] == 256 * d_state
        residual = table[(table["part"] == "capacity") & (table["site"] == "residual")]
        assert set(residual["features"]) == set(residual["numbers"]) == {128}  # small enough as it is
        assert "control" not in table and "selectivity" not in table
    assert set(found.values()) == {(36, 512)}
    usual = len(split(linear.EXAMPLES, 0).train)
    assert usual >= linear.ENOUGH * linear.WIDTH


def test_a_capacity_says_what_half_of_the_sequences_give():
    """Eight places of four symbols, one-hot in noise: enough sequences saturate the probe, few do not."""
    task = tasks.build("position", seq_len=8, num_symbols=8)
    plan = linear.Plan.of(task)

    def capacity(n):
        generator = torch.Generator().manual_seed(0)
        labels = torch.stack([torch.randperm(8, generator=generator) for _ in range(n)])
        hot = torch.nn.functional.one_hot(labels, 8).float().flatten(1)
        x = hot @ torch.randn(64, 200, generator=generator) + 2 * torch.randn(n, 200, generator=generator)
        table = linear._probed(x, labels, labels[:, :1], plan, 8, 0, 200)
        return table[table["part"] == "capacity"].iloc[0]

    few, many = capacity(150), capacity(3000)
    assert few["half"] < few["value"] - 1 and many["value"] > 7.5
    assert many["value"] - many["half"] < 0.2
    assert (few["n"], many["n"]) == (90, 1800)


def test_the_summary_warns_of_too_few_sequences(probed, tables):
    words = "fewer than 4 sequences for each feature"
    assert words in (probed / "summary.md").read_text()  # 14 sequences train
    table = pd.read_parquet(tables("linear", "mamba")).assign(n=5000)
    text = linear.summary(table)
    assert words not in text and "| 5000 | 512 | 4096 |" in text


def test_too_few_sequences_for_a_split():
    task = tasks.build("position", seq_len=8)
    with pytest.raises(NotApplicable, match="give --examples 20 or more"):
        linear.measure(None, task, Options(examples=4))


@pytest.mark.parametrize("seq_len", [16, 200])
def test_probed_places_hold_symbols_of_their_own(seq_len):
    task = tasks.build("position", seq_len=seq_len)
    plan = linear.Plan.of(task)
    batch, context = linear._contexts(task, plan, 40, seed=3, index=0)
    assert (np.sort(context, axis=1) == np.arange(seq_len)).all()  # still permutations
    symbols = batch.input_ids - task.vocabulary.first_symbol
    asked = np.take_along_axis(context, batch.target_index.numpy(), axis=1)[:, 0]
    assert (symbols[:, -1].numpy() == asked).all()  # the query is the target's symbol
    labels = plan.labels(torch.from_numpy(context))
    assert plan.pooled == (seq_len == 200)
    assert int(labels.min()) >= 0 and int(labels.max()) < plan.classes


def test_coarse_maps_keep_their_mass():
    weights = torch.rand(300, 300).tril()
    weights /= weights.sum(1, keepdim=True)
    small, size = coarse(weights)
    assert size == 5 and small.shape == (60, 60)
    assert torch.allclose(small.sum(1), torch.ones(60))
    assert coarse(weights[:100, :100])[1] == 1
