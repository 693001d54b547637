"""Sweeps end with the same rows wherever and however often they are interrupted."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import analysis
from ssm_retrieval.training import store
from synthetic import results, sweep
from synthetic.config import plan, run_id
from synthetic.grid import grid
from synthetic.trainer import train

HEAD = """
from dataclasses import replace
from synthetic.config import RunConfig
from synthetic.grid import Sweep, grid
BASE = RunConfig(seq_len=8, layers=1, queries=4, curriculum=4, batch_tokens=128, eval_every=4,
                 eval_examples=16, final_eval_examples=32, device="cpu", precision="float32", stop_at=1.01)
def get_config():
    return """
RUNS = 'Sweep(grid(BASE, model=("transformer", "mamba"), seed=(0, 1), steps=8))'
FREE = ["seconds", "commit"]  # columns that may differ between repetitions


def write(folder: Path, text: str = RUNS) -> str:
    file = folder / "tiny.py"
    file.write_text(HEAD + text)
    return str(file)


def same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a.drop(columns=FREE), b.drop(columns=FREE))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished sweep of four runs, made by two processes."""
    folder = tmp_path_factory.mktemp("sweep")
    assert sweep.main([write(folder), "--out", str(folder / "runs"), "--workers", "2"]) == 0
    return folder / "runs"


@pytest.fixture
def one_thread():
    """As in a sweep's processes: another number of threads adds in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_rows_are_those_of_training_each_run_by_itself(finished, tmp_path, one_thread):
    from synthetic import grid as grids

    wanted = grids.load(Path(write(tmp_path)))
    table = analysis.load(finished)
    assert table["run"].nunique() == len(wanted.runs) == 4
    for run in wanted.runs:
        p = plan(run, run.model[0])
        folder = tmp_path / run_id(p)
        results.begin(folder, run, p)
        final = train(p, folder)
        mine = table[table["run"] == folder.name]
        during = store.read_rows(folder / "metrics.jsonl")
        assert mine["step"].tolist() == sorted(row["step"] for row in [*during, final])
        for name in ("accuracy", "loss", "tokens", "length"):
            expected = sorted(row[name] for row in [*during, final])
            np.testing.assert_array_equal(sorted(mine[name]), expected)
        last = mine[mine["kind"] == "final"].iloc[0]
        assert (last["correct"], last["count"], last["chance"]) == (final["correct"], 32, 1 / 8)
        assert (last["seed"], last["model"], last["lr"]) == (run.seed, run.model[0], p.lr)


def test_pandas_and_duckdb_read_the_data_set(finished):
    import duckdb

    table = analysis.load(finished)
    plain = pd.read_parquet(finished / "results")
    assert len(plain) == len(table) and set(plain.columns) == set(results.EVALUATION)
    query = f"select count(*), sum(correct), max(step) from '{finished}/results/*.parquet'"
    assert duckdb.sql(query).fetchall() == [(len(table), table["correct"].sum(), table["step"].max())]


def test_targets_add_up_to_the_evaluations(finished):
    table, targets = analysis.load(finished), analysis.load(finished, "targets")
    keys = ["run", "kind", "step", "length"]
    sums = targets.groupby(keys)[["correct", "count"]].sum()
    pd.testing.assert_frame_equal(
        sums, table.set_index(keys)[["correct", "count"]].sort_index(), check_like=True
    )
    assert (targets["target_low"] < targets["target_high"]).all()
    assert (targets["target_high"] <= targets["length"]).all()


def test_finished_runs_are_not_repeated(finished, tmp_path, monkeypatch, capsys):
    from ssm_retrieval.training import executors

    before = {path: path.stat().st_mtime_ns for path in finished.rglob("result.json")}
    monkeypatch.setattr(executors, "Local", None)  # no pool is made where nothing is left to do
    assert sweep.main([write(tmp_path), "--out", str(finished)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("result.json")}
    assert "4 of them finished before" in capsys.readouterr().out


def test_a_larger_file_adds_only_its_new_runs(finished, tmp_path, capsys):
    more = RUNS.replace("(0, 1)", "(0, 1, 2)")
    assert sweep.main([write(tmp_path, more), "--out", str(finished), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines) == ["finished"] * 4 + ["open"] * 2


def test_a_failed_run_is_reported_and_the_next_sweep_repeats_it(finished, tmp_path, capsys):
    out = tmp_path / "runs"
    (name,) = (r for r in set(analysis.load(finished)["run"]) if "mamba-s1" in r)
    (out / name).mkdir(parents=True)
    broken = out / name / "checkpoint.safetensors"
    broken.write_bytes(b"no checkpoint")
    words = [write(tmp_path), "--out", str(out), "--workers", "1"]
    assert sweep.main(words) == 1
    shown = capsys.readouterr().out
    assert "will be tried again" in shown and f"failed: {out / name}: " in shown
    assert "Traceback" in (out / name / "error.txt").read_text()
    assert analysis.load(out)["run"].nunique() == 3
    broken.unlink()
    assert sweep.main(words) == 0
    assert not (out / name / "error.txt").exists()
    same(analysis.load(out), analysis.load(finished))


@pytest.mark.parametrize("later", [-1, 10**15], ids=["usual", "the clock had stepped back"])
def test_what_a_kill_at_the_last_moment_left_out_is_made_up_for(finished, tmp_path, later):
    """The store is behind the run's own records, which say that it is finished, whatever times say."""
    before = analysis.load(finished)
    (path,) = (p for p in (finished / "results").glob("*mamba-s1*"))
    rows = pd.read_parquet(path)
    rows[rows["kind"] == "during"].to_parquet(path)
    result = next(finished.glob("*mamba-s1*/result.json"))
    os.utime(path, ns=(0, result.stat().st_mtime_ns + later))
    assert len(analysis.load(finished)) == len(before) - 1
    assert sweep.main([write(tmp_path), "--out", str(finished)]) == 0
    same(analysis.load(finished), before)


@pytest.mark.parametrize("table", ["results", "targets"])
@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"PAR1PAR1", None], ids=["empty", "garbage", "marks", "cut"]
)
def test_a_damaged_table_is_made_anew(finished, tmp_path, content, table):
    """One cut file of a finished sweep: its run's own records have everything."""
    before = analysis.load(finished, table)
    (path,) = (p for p in (finished / table).glob("*mamba-s1*"))
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    assert sweep.main([write(tmp_path), "--out", str(finished)]) == 0
    same(analysis.load(finished, table), before)


def test_a_loop_of_links_is_one_line(tmp_path, capsys):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert sweep.main([write(tmp_path), "--out", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --out") and error.count("\n") == 1


def test_a_seed_that_is_reported_after_all_is_no_longer_validation(finished, tmp_path):
    path = next(finished.glob("*mamba-s1*/config.json"))
    before = analysis.load(finished)
    store.write_json(path, store.read_json(path) | {"purpose": "validation"})
    results.record(path.parent)
    assert "validation" in set(analysis.load(finished)["purpose"])
    assert sweep.main([write(tmp_path), "--out", str(finished)]) == 0
    same(analysis.load(finished), before)


def test_learning_rates_are_chosen_on_validation_seeds(tmp_path):
    text = """Sweep(grid(BASE, model="transformer", seed=(0, 1), steps=16),
        learning_rates=(1e-5, 3e-3), validation_seeds=(7,), 
        tune=lambda run: replace(run, seq_len=5, curriculum=0, steps=60))"""
    out = tmp_path / "runs"
    assert sweep.main([write(tmp_path, text), "--out", str(out), "--workers", "1"]) == 0
    table = analysis.load(out)
    assert set(table.loc[table["purpose"] == "validation", "seed"]) == {7}
    assert set(table.loc[table["purpose"] == "validation", "seq_len"]) == {5}
    reported = table[table["purpose"] == "report"]
    assert set(reported["seed"]) == {0, 1} and set(reported["lr"]) == {
        3e-3
    }  # 1e-5 learns nothing in 60 steps
    chosen = json.loads((out / "learning_rates.json").read_text())
    assert {row["candidate"]: row["lr"] for row in chosen} == {1e-5: 3e-3, 3e-3: 3e-3}


@pytest.mark.parametrize("executor", [pytest.param("ray", marks=pytest.mark.slow), "slurm"])
def test_other_executors_give_the_same_rows(executor, finished, tmp_path, monkeypatch):
    pytest.importorskip({"ray": "ray", "slurm": "submitit"}[executor])
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # or Ray writes a token into the home folder
    text = RUNS[:-1] + ', slurm=dict(cluster="local"))'  # submitit's own processes stand in for SLURM
    words = [write(tmp_path, text), "--out", str(tmp_path / "runs"), "--workers", "2", "--executor", executor]
    result = subprocess.run([sys.executable, "-m", "synthetic.sweep", *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    same(analysis.load(tmp_path / "runs"), analysis.load(finished))


BAD = [
    (["no.py"], "FILE no.py does not exist"),
    (["FILE", "--workers", "-1"], "--workers -1 must be at least 0"),
    (["FILE", "--threads", "0"], "--threads 0 must be at least 1"),
    *(
        (["FILE", f"--{name}", str(10**20)], f"--{name} {10**20} is too large; use at most")
        for name in ("workers", "threads", "retries")
    ),
    (["FILE", "--out", ""], "--out is empty; give a folder"),
    (["FILE", "--address", "auto"], "--address auto is for --executor ray"),
]


VALUES = [
    ("weight_decay=float('nan')", "--weight-decay nan is not a number"),
    ("weight_decay=float('inf')", "--weight-decay inf is too large"),
    ("steps=10**20", "is too large"),
    ("position='rope'", "--position rope is for attention, which --model mamba lacks"),
    ("out='x'", "a sweep has no option 'out'"),
]


@pytest.mark.parametrize("option, message", VALUES)
def test_values_that_no_run_can_have(option, message, tmp_path, capsys):
    file = write(tmp_path, f"Sweep(grid(model='mamba', {option}))")
    assert sweep.main([file, "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: FILE {file}: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_closed_terminal_stops_a_sweep_in_one_line(number, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "sweep", lambda wanted: os.kill(os.getpid(), number) or signal.pause())
    kept = signal.getsignal(number)
    if kept is signal.SIG_IGN:  # pytest was started by nohup or behind `&`; the sweep would rightly not mind
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual)
    try:
        assert sweep.main([write(tmp_path), "--out", str(tmp_path / "runs")]) == 130
    finally:
        signal.signal(number, kept)
    assert capsys.readouterr().err == sweep.STOPPED + "\n"


@pytest.mark.parametrize("words, message", BAD)
def test_bad_input_gives_one_line_and_status_2(words, message, tmp_path, capsys):
    file = write(tmp_path)
    assert sweep.main([file if word == "FILE" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_impossible_runs_are_found_before_anything_starts(tmp_path, capsys):
    text = 'Sweep(grid(BASE, model="mamba", seed=(0, 1), num_symbols=(8, 2)))'
    assert sweep.main([write(tmp_path, text), "--out", str(tmp_path / "runs")]) == 2
    assert "num_symbols 2" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_store_is_written_once_per_evaluation_and_at_the_end(tmp_path, monkeypatch):
    from synthetic import grid as grids

    (run, *_) = grids.load(Path(write(tmp_path))).runs
    p = plan(run, run.model[0])
    folder = tmp_path / "runs" / run_id(p)
    results.begin(folder, run, p)
    real, steps = results.record, []

    def counted(*words):
        real(*words)
        steps.append(len(store.read_rows(folder / "metrics.jsonl")))

    monkeypatch.setattr(results, "record", counted)
    heard = []
    results.train_recorded(p, folder, lambda event, row: heard.append((event, row["step"])))
    # the curriculum makes two rows of an evaluation, at its own and at the full length
    assert steps == [2, 4, 4] and [h for h in heard if h[0] == "evaluation"] == [
        ("evaluation", n) for n in (4, 4, 8, 8)
    ]
    assert len(analysis.load(tmp_path / "runs")) == 5


# --- the store under concurrent writers ------------------------------------------------------------------


def _write_many(out: str, seeds: list[int], times: int) -> None:
    for _ in range(times):
        for seed in seeds:
            results.record(Path(out) / f"run-{seed}")


def test_two_writers_at_once_lose_nothing_and_readers_see_whole_files(tmp_path):
    p = plan(grid(model="mamba", seq_len=8, device="cpu")[0], "mamba")
    template = dict(
        model="mamba", step=1, examples=8, tokens=88, seconds=1.0, train_length=8, length=8,
        split="validation", loss=1.0, train_loss=1.0, train_accuracy=0.5, accuracy=0.5, correct=1, count=2,
        ci_low=0.1, ci_high=0.9, chance=0.125, parameters=9, parameters_without_embeddings=5,
        targets=[[0, 8, 1, 2]],
    )  # fmt: skip
    seeds = list(range(8))
    for seed in seeds:
        folder = tmp_path / f"run-{seed}"
        results.begin(folder, grid(model="mamba")[0], p)
        store.write_rows(folder / "metrics.jsonl", [template | dict(step=i, seed=seed) for i in range(20)])
    context = multiprocessing.get_context("spawn")
    shares = (seeds[:5], seeds[3:])  # two runs are written by both
    writers = [context.Process(target=_write_many, args=(str(tmp_path), share, 15)) for share in shares]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if (tmp_path / "results").is_dir() and list((tmp_path / "results").glob("*.parquet")):
            assert (analysis.load(tmp_path).groupby("run").size() == 20).all()
    assert [writer.exitcode for writer in writers] == [0, 0]
    table = analysis.load(tmp_path)
    assert sorted(zip(table["run"], table["step"], strict=True)) == sorted(
        (f"run-{seed}", i) for seed in seeds for i in range(20)
    )
    assert not list((tmp_path / "results").glob(".*"))


def test_nothing_to_load(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        analysis.load(tmp_path / "runs")
    with pytest.raises(ValueError, match="no results in"):
        analysis.load(tmp_path)


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path):
    script = Path(__file__).parent / "kill_sweep.py"
    words = [sys.executable, str(script), "--kills", "3", "--out", str(tmp_path)]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
