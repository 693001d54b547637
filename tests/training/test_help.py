"""The help page of `synthetic.run`: defaults that it names are those of a run; a reader may stop reading."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from synthetic import run, tasks
from synthetic.config import RunConfig, plan

ROOT = Path(__file__).parents[2]


@pytest.fixture
def page(capsys, monkeypatch):
    """The help page as one line."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as done:
        run.main(["--help"])
    assert done.value.code == 0
    return " ".join(line.strip("│ ") for line in capsys.readouterr().out.splitlines())


def named(page: str, flag: str) -> float:
    """The number that stands first in an option's default."""
    (found,) = re.findall(rf"--{flag} (?:INT|FLOAT) [^(]*(?:\([^d][^(]*)*\(default: ([\d.e-]+)", page)
    return float(found)


def test_defaults_that_depend_are_named_rightly(page):
    p = plan(RunConfig(model="transformer", device="cpu", precision="float32"), "transformer")
    for name in ("steps", "stop_at", "warmup", "eval_every", "curriculum", "queries", "lr"):
        assert named(page, name.replace("_", "-")) == getattr(p, name), name
    for task, names in {
        "ngram-duplicate": ["query_size", "answer_size", "blocks"],
        "mqar": ["num_pairs"],
        "selective-copy": ["num_tokens"],
    }.items():
        for name in names:
            assert named(page, name.replace("_", "-")) == getattr(tasks.TASKS[task], name), name


def test_no_default_is_none(page):
    assert "None" not in page and "(default: random weights)" in page


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    "code",
    [
        "from dataclasses import make_dataclass; from ssm_retrieval.cli import parse; "
        "parse(make_dataclass('Options', [('n', int, 1)]), ['--help'], 'command')",
        "import sys; from ssm_retrieval.cli import guarded; sys.exit(guarded(lambda: print('a line') or 0))",
    ],
)
def test_a_reader_that_has_read_enough_gets_no_traceback(code, buffered):
    """As `python -m synthetic.run --help | head -1` does, whose pipe closes early."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    environment |= {} if buffered else {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, env=environment
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
