"""Files and folders of runs: who may write what, what a kill leaves, names as they are, signals."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from rich.table import Table

from ssm_retrieval import files
from ssm_retrieval.terminal import plain_console
from ssm_retrieval.training import store
from synthetic import records, run, sweep, trainer

SMALL = dict(
    seq_len=8, layers=1, d_state=4, queries=4, steps=4, eval_every=2, eval_examples=8, final_eval_examples=16,
    batch_tokens=64, device="cpu", precision="float32",
)  # fmt: skip


def command(out: Path | str, **more) -> list[str]:
    words = ["--model", "mamba", "--out", str(out)]
    for name, value in (SMALL | more).items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """--out of one finished run."""
    out = tmp_path_factory.mktemp("runs")
    assert run.main(command(out)) == 0
    return out


@pytest.fixture
def out(made, tmp_path):
    return shutil.copytree(made, tmp_path / "runs")


def folder_of(out: Path) -> Path:
    (folder,) = (path.parent for path in out.glob("*/config.json"))
    return folder


def snapshot(out: Path) -> dict[str, tuple]:
    found = {}
    for path in sorted(out.rglob("*")):
        about = path.lstat()
        found[str(path)] = (
            about.st_mtime_ns,
            about.st_ino,
            about.st_mode,
            path.is_file() and path.read_bytes(),
        )
    return found


# --- a finished run is read-only -------------------------------------------------------------------------


def test_repeating_a_finished_run_writes_nothing_and_takes_no_lock(out, capsys, monkeypatch):
    before = snapshot(out)
    opened = []
    monkeypatch.setattr(os, "replace", lambda *a: pytest.fail(f"renamed {a}"))
    monkeypatch.setattr(FileLock, "acquire", lambda self, *a, **k: opened.append(self.lock_file))
    assert run.main(command(out)) == 0
    said = capsys.readouterr().out
    assert "finished before" in said and "Single-query accuracy" in said
    assert snapshot(out) == before and not opened


def test_a_finished_run_is_shown_while_its_folder_is_locked(out, capsys):
    with FileLock(folder_of(out) / ".lock"):
        assert run.main(command(out)) == 0
    assert "finished before" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["results", "targets", "outcome.png"])
def test_what_a_kill_left_out_is_made_when_the_command_is_repeated(out, lost):
    folder = folder_of(out)
    before = records.result(folder)
    path = folder / lost if lost.endswith("png") else next((out / lost).glob("*.parquet"))
    path.unlink()
    assert run.main(command(out)) == 0
    assert path.exists() and records.result(folder) == before


# --- temporary files -------------------------------------------------------------------------------------


def leave(*paths: Path) -> list[Path]:
    """What a process leaves that is killed while it writes these files."""
    code = (
        "import contextlib, os, sys, pathlib; from ssm_retrieval.files import replacing\n"
        "with contextlib.ExitStack() as stack:\n"
        "    for path in map(pathlib.Path, sys.argv[1:]):\n"
        "        stack.enter_context(replacing(path)).write_bytes(b'half')\n"
        "    os._exit(9)"
    )
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=False)
    left = [found for path in paths for found in path.parent.glob(f".{path.name}.*.tmp")]
    assert len(left) == len(paths)
    return left


def test_what_killed_processes_left_is_collected_everywhere_a_run_writes(tmp_path):
    folder = tmp_path / "runs" / "run"
    places = (folder, tmp_path / "runs" / "results", tmp_path / "runs" / "targets")
    left = leave(*(place / "file" for place in places))
    store.prepare(folder, {}, 1)
    assert not any(path.exists() for path in left)


def test_a_live_process_keeps_its_temporary_files(tmp_path):
    """Of a probe that runs beside, say; and folders that are not a run's own are left alone."""
    folder = tmp_path / "runs" / "run"
    (folder / "probes").mkdir(parents=True)
    (dead_below,) = leave(folder / "probes" / "table.parquet")
    with (
        files.replacing(folder / "by_position.jsonl") as mine,
        files.replacing(folder / "probes" / "a.csv") as other,
    ):
        for path in (mine, other):
            path.write_text("half")
        store.prepare(folder, {}, 1)
        assert mine.exists() and other.exists() and dead_below.exists()
    assert (folder / "by_position.jsonl").read_text() == "half"


@pytest.mark.parametrize(
    "name, age, goes",
    [
        (".a.00000000-1-00000000.tmp", 0, False),  # of another machine: who knows
        (".a.00000000-1-00000000.tmp", 2 * files.ABANDONED, True),
        (".a.0123456789ab.tmp", 0, False),  # of a version that did not say whose
        (".a.0123456789ab.tmp", 2 * files.ABANDONED, True),
        (".a.{here}-{us}-00000000.tmp", 0, False),
        (".a.{here}-{beyond}-00000000.tmp", 0, True),  # beyond the largest number of a process
        ("a.tmp", 2 * files.ABANDONED, False),
        (".a.txt", 2 * files.ABANDONED, False),
    ],
)
def test_whose_temporary_files_go(tmp_path, name, age, goes):
    path = tmp_path / name.format(here=files._machine(), us=os.getpid(), beyond=2**22 + 1)
    path.write_text("")
    os.utime(path, (time.time() - age,) * 2)
    files.collect(tmp_path, tmp_path / "absent")
    assert path.exists() != goes


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt(), ValueError("bug")])
def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), files.replacing(path) as temporary:
        temporary.write_text("new")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_user_chose(tmp_path, mask, mode):
    import torch

    before = os.umask(mask)
    try:
        store.save_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(3)}, {"step": 1})
        store.write_json(tmp_path / "result.json", {})
        store.append_row(tmp_path / "metrics.jsonl", {})
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        name: mode for name in ("model.safetensors", "result.json", "metrics.jsonl")
    }


# --- names are printed as they are -----------------------------------------------------------------------

NAMES = [
    "x[/red]",
    "[bold]",
    ":smile:",
    "[/]",
    "[link=a]b",
    "a[0]",
    r"\[x]",
    "[red]x[/red]",
    "{x}",
    "%s",
    "ö [1/2]",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_run_names_its_folder(made, tmp_path, capsys, name):
    place = shutil.copytree(made, tmp_path / name)
    assert run.main(command(place)) == 0
    said = capsys.readouterr().out
    assert str(folder_of(place)) in said.splitlines() and f"figure: {folder_of(place)}" in said


def test_a_run_and_a_sweep_in_a_folder_with_brackets(tmp_path, capsys):
    place = tmp_path / "x[/red] :smile:"
    assert run.main(command(place)) == 0
    assert str(folder_of(place)) in capsys.readouterr().out.splitlines()
    file = tmp_path / "file.py"
    file.write_text(
        "from synthetic.grid import Sweep, grid\n"
        f"def get_config(): return Sweep(grid(model='mamba', **{SMALL!r}))\n"
    )
    assert sweep.main([str(file), "--out", str(place)]) == 0  # the run that is there already
    assert f"results: {place / 'results'} (Parquet)" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_cells_of_tables_are_as_they_are(name):
    """A checkpoint's folder, which a table shows as the size of its models, may have any name."""
    console = plain_console(file=io.StringIO(), width=100)
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    console.print(table)
    assert console.file.getvalue().count(name) == 3


@pytest.mark.parametrize("columns", ["0", " 0 ", "", "nonsense", "60"])
def test_columns_that_say_nothing(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    console = plain_console(file=io.StringIO())
    console.print("some words")
    assert console.width == (60 if columns == "60" else 80) and "some words" in console.file.getvalue()


# --- signals and places ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_closed_terminal_leaves_a_checkpoint(tmp_path, capsys, monkeypatch, number):
    """As SIGTERM and Ctrl-C do: the step is ended, the state kept, and the same command goes on."""
    real, calls = trainer.update, []

    def update(*a, **k):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return real(*a, **k)

    monkeypatch.setattr(trainer, "update", update)
    before = signal.getsignal(number)
    assert run.main(command(tmp_path / "runs")) == 130
    assert "stopped at step 2; nothing is lost" in capsys.readouterr().out
    folder = folder_of(tmp_path / "runs")
    assert store.load_tensors(folder / store.CHECKPOINT)[1]["step"] == 2
    assert signal.getsignal(number) == before
    assert run.main(command(tmp_path / "runs")) == 0 and len(calls) == 4


def test_a_loop_of_links_as_out(tmp_path, capsys):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert run.main(command(tmp_path / "a")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --out") and error.count("\n") == 1


def test_a_run_that_diverges_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "update", lambda *a: (float("nan"), 0.0))
    assert run.main(command(tmp_path / "runs")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: mamba: the training loss is nan") and error.count("\n") == 1
    assert not list((tmp_path / "runs").glob("*/result.json"))
