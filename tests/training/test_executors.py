"""Executors run any job: a folder and a way to train, whatever it trains."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout

from ssm_retrieval.training.executors import PROBLEM, execute


@dataclass(frozen=True)
class Square:
    """Writes the square of a number, and refuses negative ones."""

    folder: Path
    number: int
    threads: int = 1

    def train(self) -> None:
        with pytest.raises(Timeout):  # nobody else may work here meanwhile
            FileLock(self.folder / ".lock").acquire(timeout=0)
        if self.number < 0:
            raise ArithmeticError(f"{self.number} is negative")
        (self.folder / "square").write_text(str(self.number**2 * torch.get_num_threads()))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_job_is_trained_in_its_folder_with_its_threads(tmp_path):
    job = pickle.loads(pickle.dumps(Square(tmp_path / "new" / "three", 3, threads=3)))
    execute(job)
    assert (job.folder / "square").read_text() == "27"
    assert not (job.folder / PROBLEM).exists()


def test_a_failure_is_raised_and_leaves_its_traceback_until_the_job_succeeds(tmp_path):
    with pytest.raises(ArithmeticError, match="-1 is negative"):
        execute(Square(tmp_path, -1))
    said = (tmp_path / PROBLEM).read_text()
    assert said.startswith("Traceback") and "ArithmeticError: -1 is negative" in said
    execute(Square(tmp_path, 2))
    assert not (tmp_path / PROBLEM).exists()
