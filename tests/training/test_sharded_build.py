"""A model that is built in shards has the weights of one process, and is never whole in any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODELS = ("transformer", "mamba", "hybrid", "late", "init")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes saw, by model."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launcher, str(HERE / "sharded_build.py"), str(folder)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": str(HERE.parents[1]),
        },
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("family", MODELS)
def test_shards_hold_the_weights_of_one_process(ranks, family):
    """Bit by bit, also where a constructor draws weights again after its blocks."""
    first, second = (rank[family] for rank in ranks)
    assert first["other"] == [] and first["kept"] == first["names"]
    assert second["kept"] == []
    for rank in (first, second):
        sharded, alone = rank["losses"]
        assert sharded == pytest.approx(alone, rel=1e-5)
        assert rank["shards"] < 0.6 * rank["whole"]


@pytest.mark.parametrize("wrote", ["several", "single"])
def test_a_checkpoint_goes_into_shards_of_another_model(ranks, wrote):
    """Weights and moments, whether several processes or one wrote them; the other model has another seed."""
    assert [rank["resumed"][wrote] for rank in ranks] == [[], []]


def test_a_checkpoint_of_one_process_is_read_tensor_by_tensor(ranks):
    for found in (rank["resumed"] for rank in ranks):
        assert found["largest"] <= found["most"] <= 2 * found["largest"]


def test_kernels_in_triton_run_in_several_processes(ranks):
    """Under DDP and FSDP, in Triton's interpreter: the gradients of the equations in one process."""
    if ranks[0]["triton"] is None:
        pytest.skip("Triton is not installed")
    assert [rank["triton"] for rank in ranks] == [[], []]


@pytest.mark.parametrize("family", MODELS)
def test_no_process_holds_a_whole_model_before_it_is_sharded(ranks, family):
    """At most the largest block, and what lies outside of the blocks."""
    for rank in (rank[family] for rank in ranks):
        # a tied head has a table of its own until it is tied
        outside, table = rank["whole"] - sum(rank["blocks"]), 4 * 48 * 32
        limit = max(rank["blocks"]) + outside + table
        assert rank["most"] <= limit < 0.7 * rank["whole"]
        assert rank["all_at_once"] >= rank["whole"]  # the counter sees a whole model where there is one
