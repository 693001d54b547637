"""Shared by the tests: peers that only import with a helping hand."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import shutil
import sys
import types
from functools import lru_cache
from typing import Any

import pytest

# Idle threads of torch sleep: two test processes share the cores. Before torch is loaded, hence the order.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, by whichever test comes first

import torch
from hook_models import FAMILIES, build
from tiny_runs import tiny_runs

PEERS = ("mamba_ssm.modules.mamba_simple", "mamba_ssm.ops.selective_scan_interface",
         "mamba_ssm.ops.triton.ssd_combined",
         "causal_conv1d.causal_conv1d_interface")  # fmt: skip
KERNELS = ("selective_scan_cuda", "causal_conv1d_cuda")


def import_without_kernels(name: str) -> Any:
    """One of PEERS, from mamba-ssm or causal-conv1d built without CUDA: its kernels are empty modules.

    Skips the test, with the reason, where the packages are not installed (.ci/run installs them).
    """
    for package in ("triton", "einops", "mamba_ssm", "causal_conv1d"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; .ci/run says how")
    return _peers()[name]


@lru_cache(maxsize=1)
def _peers() -> dict[str, Any]:
    """Import them once, and hide them again: transformers would take the empty kernels for real ones."""
    before = set(sys.modules)
    for kernels in KERNELS:
        sys.modules.setdefault(kernels, types.ModuleType(kernels))
    peers = {name: importlib.import_module(name) for name in PEERS}
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in (*KERNELS, "mamba_ssm", "causal_conv1d"):
            del sys.modules[name]
    return peers


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    """What a test draws without a seed of its own does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    """Every architecture of `hook_models` in turn."""
    return request.param


@pytest.fixture(scope="module")
def model(family):
    """The model of `family`, shared by a file: tests leave it as it is."""
    return build(family)


@pytest.fixture(scope="session")
def probed_run(tmp_path_factory):
    """Folder of tiny runs of two families with the tables of all probes; tests leave it as it is."""
    from probes import run

    folder = tmp_path_factory.mktemp("runs")
    # beside RoPE, Mamba has no positions and four layers, so that probes have several to look at
    tiny_runs(folder, "position", "--seq-len", "8", "--model", "transformer", "mamba", "--position", "rope")
    assert run.main([str(folder), "--examples", "24"]) == 0
    return folder


@pytest.fixture(scope="session")
def report(probed_run, tmp_path_factory):
    """The report of `probed_run`: its path and text."""
    from report_pages import write

    path = tmp_path_factory.mktemp("report") / "report.html"
    return types.SimpleNamespace(path=path, text=write(path, probed_run))


@pytest.fixture(scope="session")
def two_stages(tmp_path_factory):
    """The folder of a VLM's run of two stages that was saved untrained; tests copy it."""
    import vlm_runs

    from ssm_retrieval.training import store
    from vlm import folders

    stage = vlm_runs.stage
    out = tmp_path_factory.mktemp("vlm")
    vlm_runs.save_encoder(out)
    wanted = dataclasses.replace(vlm_runs.run("mamba-tiny", name="two"), stages=(stage(), stage(lr=2e-3)))
    for number, name in enumerate(wanted.stage_ids()):
        kept = dataclasses.replace(wanted, stages=wanted.stages[: number + 1])
        assert kept.stage_ids()[-1] == name
        vlm_runs.save(kept, out)
        store.write_json(out / name / folders.CONFIG, {"version": 1, "plans": [wanted.to_dict()]})
    return out / wanted.stage_ids()[-1]


@pytest.fixture
def vlm_folder(two_stages, tmp_path):
    """A copy of `two_stages`."""
    from vlm import components

    shutil.copytree(two_stages.parent, tmp_path / "out")
    components.eyes.cache_clear()
    return tmp_path / "out" / two_stages.name
