"""Benchmarks are not run by the tests, but must be able to run whatever the registry holds."""

from __future__ import annotations

import pytest

from benchmarks import data
from synthetic import tasks


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_makes_the_benchmark_batches(name):
    for length in data.LENGTHS:
        task = data.make_task(name, length, "suffix")
        assert task.seq_len == length
    assert data.batches(data.make_task(name, 16, "suffix"), "heldout")().length == 16
