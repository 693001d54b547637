"""The live table of a sweep follows the notes that runs leave, and has room for the runs that matter."""

from __future__ import annotations

import io

import pytest
from result_tables import run_rows, tables
from rich.console import Console

from ssm_retrieval.training import store
from synthetic.board import Board
from synthetic.config import plan
from synthetic.display import cells
from synthetic.grid import grid
from synthetic.jobs import Job


@pytest.fixture
def jobs(tmp_path):
    made = []
    for run in grid(model="mamba", seq_len=8, seed=range(4), steps=60, device="cpu"):
        folder = tmp_path / f"run-{run.seed}"
        folder.mkdir(parents=True)
        made.append(Job(run, plan(run, "mamba"), folder))
    return made


def finish(job: Job, accuracy: float) -> None:
    result = dict(
        model="mamba", seed=0, step=60, examples=600, tokens=6000, seconds=3.0, train_length=8, length=8,
        loss=1.0, accuracy=accuracy, correct=1, count=2, ci_low=0.0, ci_high=1.0, chance=0.125,
        parameters=10, parameters_without_embeddings=5, reached=False, longest_length=0,
    )  # fmt: skip
    store.write_json(job.folder / "result.json", result)


def note(job: Job, step: int) -> None:
    progress = dict(step=step, length=4, accuracy=0.9, validation=0.25, seconds=1.0)
    store.write_json(job.folder / "progress.json", progress)


def shown(board: Board) -> list[str]:
    with board.console.capture() as capture:
        board.console.print(board.table())
    return [line.rstrip() for line in capture.get().splitlines()]


def terminal(height: int = 20) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, height=height, color_system=None)


def test_states_follow_the_notes(jobs):
    finish(jobs[0], 0.5)
    note(jobs[1], 10)  # left by a sweep that was killed: no sign that the run has begun again
    board = Board(jobs, terminal(), "2 processes")
    assert [board.state[job.folder] for job in jobs] == ["done", "waiting", "waiting", "waiting"]
    note(jobs[1], 20)
    board.refresh()
    assert board.state[jobs[1].folder] == "running"
    text = shown(board)
    assert text[0].startswith("1 running, 0 failed, 2 waiting, 1 done of 4 runs on 2 processes")
    (line,) = (line for line in text if "run-1" in line)
    assert line.split()[1:] == ["running", "20/60", "4", "0.250", "1"]
    finish(jobs[1], 0.75)
    board.ended(jobs[1], None, final=True)
    board.ended(jobs[2], "OSError: no space", final=False)
    board.ended(jobs[3], "ValueError: damaged", final=True)
    assert [board.state[job.folder] for job in jobs] == ["done", "done", "waiting", "failed"]
    text = shown(board)
    assert [line.split()[0] for line in text if "run-" in line] == ["run-3", "run-2", "run-0", "run-1"]
    assert any("ValueError: damaged" in line for line in text)


def test_what_does_not_fit_is_counted(jobs):
    finish(jobs[0], 0.5)
    text = shown(Board(jobs, terminal(height=8), "2 processes"))
    assert "1 more not shown" in text[0] and sum("run-" in line for line in text) == 3
    assert not any("run-0" in line for line in text)  # the finished one


def test_runs_that_count_sequences_and_problems_with_brackets(tmp_path):
    (run,) = grid(model="mamba", seq_len=8, budget=500, device="cpu")
    job = Job(run, plan(run, "mamba"), tmp_path / "run-0")
    job.folder.mkdir(parents=True)
    board = Board([job], terminal(), "2 processes")
    note(job, 20)
    board.refresh()
    (line,) = (line for line in shown(board) if "run-0" in line)
    assert line.split()[1:3] == ["running", "20"]
    board.ended(job, "RuntimeError: [/x] no memory", final=True)
    assert any("[/x] no memory" in line for line in shown(board))


def test_without_a_terminal_there_is_a_line_per_run(jobs):
    file = io.StringIO()
    with Board(jobs, Console(file=file, width=100), "2 processes") as board:
        finish(jobs[2], 0.5)
        board.ended(jobs[2], None, final=True)
        board.ended(jobs[1], "OSError: no space", final=False)
        board.refresh()
    lines = file.getvalue().splitlines()
    assert lines[0] == "4 runs on 2 processes, 0 of them finished before"
    assert "1/4" in lines[1] and "0.500 after    60 steps, 3 s" in lines[1]
    assert lines[2].endswith("failed, will be tried again: OSError: no space") and len(lines) == 3


def test_cells_show_what_differs_and_the_range_of_seeds():
    runs = [run_rows("mamba", 8, seed, [0.96], d_state=state) for seed in (0, 1) for state in (4, 16)]
    runs.append(run_rows("transformer", 8, 0, [0.5]))
    console = Console(file=io.StringIO(), width=110, color_system=None)
    console.print(cells(tables(runs)[0]))
    lines = console.file.getvalue().splitlines()
    head = next(line for line in lines if "model" in line)
    assert "d state" in head and "seq len" not in head and "n layer" not in head
    found = [line.split() for line in lines if line.strip().startswith(("mamba", "transformer"))]
    assert [row[:3] for row in found] == [
        ["mamba", "4", "2/2"],
        ["mamba", "16", "2/2"],
        ["transformer", "-", "0/1"],
    ]
    # Clopper and Pearson: 2 of 2 is 0.025^(1/2) and more, 0 of 1 is 0.975 and less
    assert " ".join(found[0][3:]) == "[0.16, 1.00] 0.960 (0.960-0.960) 0-1,000 8"
    assert " ".join(found[2][3:]) == "[0.00, 0.97] 0.500 > 1,000 0"  # one seed has no range
