"""Files that the toolkit wrote and reads back damaged, foreign or half done: one line, file and remedy."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import threading

import pandas as pd
import pytest
from result_tables import run_rows, tables
from tiny_runs import by_family

from analysis import figures
from analysis.report import __main__ as report
from probes import run as probes
from ssm_retrieval.errors import UserError
from ssm_retrieval.training import records, store
from ssm_retrieval.training.tables import load
from synthetic import records as run_records


@pytest.fixture(scope="module")
def good():
    """Evaluations and targets of four runs."""
    return tables([run_rows(m, 8, s, [0.2, 0.97]) for m in ("mamba", "transformer") for s in (0, 1)])


def stored(folder, good, **changed):
    """A results store of these tables; changed: content instead of one of them."""
    for name, frame in zip(("results", "targets"), good, strict=True):
        path = folder / name / "x.parquet"
        path.parent.mkdir(parents=True)
        content = changed.get(name, frame)
        if isinstance(content, pd.DataFrame):
            content.to_parquet(path)
        else:
            path.write_bytes(content)
    return folder


def parquet(frame):
    content = io.BytesIO()
    frame.to_parquet(content)
    return content.getvalue()


def one_line(capsys, *words):
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said, said
    for word in words:
        assert word in said
    return said


DAMAGE = {
    "nothing": lambda t: b"",
    "garbage": lambda t: b"PAR1 but no more of it",
    "cut": lambda t: parquet(t)[:-30],
    "json": lambda t: b"[]",
    "no rows": lambda t: parquet(t.iloc[:0]),
    "a column gone": lambda t: parquet(t.drop(columns="kind")),
    "seq_len 0": lambda t: parquet(t.assign(seq_len=0)),
    "seq_len missing in a row": lambda t: parquet(t.assign(seq_len=t["seq_len"].where(t.index > 0))),
    "words for numbers": lambda t: parquet(t.assign(step="many")),
    "a chance of 2": lambda t: parquet(t.assign(chance=2.0)),
    "a family of the future": lambda t: parquet(t.assign(model="rwkv")),
}


@pytest.mark.parametrize("table", ["results", "targets"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tables(tmp_path, good, capsys, table, damage):
    content = DAMAGE[damage](good[table == "targets"])
    folder = stored(tmp_path / "runs", good, **{table: content})
    assert figures.main([str(folder), "--out", str(tmp_path / "out")]) == 2
    one_line(capsys, f"{folder / table / 'x.parquet'}")


def test_columns_of_other_types_do_not_join(tmp_path, good, capsys):
    folder = stored(tmp_path / "runs", good)
    good[0].assign(lr="fast").to_parquet(folder / "results" / "y.parquet")
    assert figures.main([str(folder), "--out", str(tmp_path / "out")]) == 2
    one_line(capsys, "differ in their columns' types")


@pytest.mark.parametrize("evaluations", [1, 2])
def test_curves_of_a_first_run_that_goes_on(tmp_path, good, capsys, evaluations):
    """What is there so far, without an end of any run."""
    begun = [t[(t["kind"] == "during") & (t["step"] <= 100 * evaluations)] for t in good]
    folder = stored(tmp_path / "runs", begun)
    assert figures.main([str(folder), "--out", str(tmp_path / "out")]) == 0
    assert f"{tmp_path / 'out' / 'accuracy_curves'}: csv pdf png svg" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("by_position*"))  # of final evaluations only


def test_curves_before_the_first_evaluation(tmp_path, capsys):
    for content, words in (({}, "train some"), ({"run": 1}, "wait for the first evaluation")):
        folder = tmp_path / words.replace(" ", "-") / "a-run"
        folder.mkdir(parents=True)
        if content:
            (folder / "config.json").write_text(json.dumps(content))
        assert figures.main([str(folder.parent), "--out", str(tmp_path / "out")]) == 2
        one_line(capsys, f"no results in {folder.parent}", words)


def test_a_table_that_is_replaced_while_it_is_read_is_the_old_or_the_new_one(tmp_path, good):
    """As a run does it: a whole file takes the place of another, here of another length, many times."""
    folder, stop, seen = stored(tmp_path, good), threading.Event(), set()
    path = folder / "results" / "x.parquet"
    versions = [parquet(pd.concat([good[0]] * k)) for k in (1, 40)]

    def write():
        while not stop.is_set():
            for content in versions:
                other = path.with_name(".new.tmp")
                other.write_bytes(content)
                other.replace(path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(60):
            seen.add(len(load(folder)))
    finally:
        stop.set()
        writer.join()
    assert seen <= {len(good[0]), 40 * len(good[0])}


@pytest.mark.parametrize(
    "config", ["[]", "{}", "null", '"text"', '{"plan": 1}', '{"plan": [1]}', '{"plan": {}}', '{"pl', ""]
)
def test_damaged_config_of_a_run(tmp_path, capsys, config):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(config)
    assert probes.main([str(run)]) == 2
    one_line(capsys, str(run), "damaged")
    assert report.main([str(run), "--out", str(tmp_path / "page.html")]) == 2
    one_line(capsys, str(run))


@pytest.fixture
def copied(probed_run, tmp_path):
    return shutil.copytree(probed_run, tmp_path / "copy")


def test_a_run_is_only_read(copied, tmp_path):
    """Another user's run: with an own --out nothing is written or touched beside it."""

    def state():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in [copied, *copied.rglob("*")]}

    before = state()
    call = ["--probe", "lens", "--examples", "24", "--out", str(tmp_path / "mine")]
    assert probes.main([str(copied), *call]) == 0
    assert report.main([str(copied), "--out", str(tmp_path / "page.html")]) == 0
    assert state() == before and (tmp_path / "mine" / "lens.mamba.parquet").exists()


def test_a_run_that_cannot_be_read_is_not_called_damaged(copied, tmp_path, capsys, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    for module in (records, run_records):
        monkeypatch.setattr(module, "text_of", refused)
    for call in (
        probes.main([str(copied)]),
        report.main([str(copied), "--out", str(tmp_path / "page.html")]),
    ):
        assert call == 2
    lines = capsys.readouterr().err.splitlines()
    wanted = (
        f"error: {store.runs_in(copied)[0] / 'config.json'}: Permission denied; give yourself access to it"
    )
    assert len(lines) == 2 and all(line.startswith(wanted) for line in lines)


@pytest.mark.parametrize("content", [b"", b"garbage", b"[]"])
def test_damaged_probe_tables(copied, tmp_path, capsys, content):
    path = by_family(copied)["mamba"] / "probes" / "lens.mamba.parquet"
    path.write_bytes(content)
    assert report.main([str(copied), "--out", str(tmp_path / "page.html")]) == 2
    one_line(capsys, str(path), "delete it")


def test_a_probe_table_of_another_version_is_made_again(copied, tmp_path, capsys):
    """Without a column that is needed now: the report says what to run, and the other probes go on."""
    path = by_family(copied)["mamba"] / "probes" / "linear.mamba.parquet"
    pd.read_parquet(path).drop(columns="half").to_parquet(path)
    page = tmp_path / "page.html"
    assert report.main([str(copied), "--out", str(page)]) == 0
    assert "Not probed yet: Mamba" in page.read_text(encoding="utf-8")
    assert probes.main([str(copied), "--probe", "lens", "--examples", "24"]) == 0
    with pytest.raises(UserError, match="--probe lense is unknown"):
        probes.chosen(["lense"])


def test_a_run_of_several_sessions_shows_the_last_one(copied):
    from analysis.report.runs import read

    mamba = by_family(copied)["mamba"]
    path = mamba / "environment.json"
    (session,) = json.loads(path.read_text())["sessions"]
    first, last = session | {"threads": 1}, session | {"threads": 8}
    path.write_text(json.dumps({"sessions": [first, last]}))
    assert read({"mamba": mamba}).environment == last
    path.write_text(json.dumps(first))  # as version 0.1 wrote it
    assert read({"mamba": mamba}).environment == first


@pytest.mark.parametrize("name", ["metrics.jsonl", "by_position.jsonl"])
@pytest.mark.parametrize("rows", ["[]\n", "null\n", "1\n", '"text"\n', '{"model": "mamba"}\n'])
def test_damaged_rows_of_a_run(copied, tmp_path, capsys, name, rows):
    (by_family(copied)["mamba"] / name).write_text(rows)
    assert report.main([str(copied), "--out", str(tmp_path / "page.html")]) == 2
    one_line(capsys, str(copied))
