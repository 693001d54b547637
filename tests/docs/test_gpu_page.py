"""docs/gpu.md: it says first that nothing was measured, and its arithmetic follows from its formulas."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from ssm_retrieval.models import block_memory
from ssm_retrieval.models.planning import Step
from synthetic.config import RunConfig, plan
from synthetic.memory import meta_model

PAGE = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
FLAT = " ".join(PAGE.split())
TOKENS = 20_000_000 * 1028
PEAKS = {"H100": 989e12, "A100": 312e12}


@pytest.fixture(scope="module")
def paper():
    """Models and configs of the paper's protocol."""
    asked = RunConfig(protocol="paper", preset="150m", device="cuda")
    plans = {family: plan(asked, family, elsewhere=True) for family in ("transformer", "mamba")}
    assert plans["mamba"].budget == 20_000_000
    return {family: meta_model(p) for family, p in plans.items()}


def flop(model, family):
    """Of a token, by the page's formula."""
    c, P = model.config, model.num_parameters()
    if family == "transformer":
        return 6 * P + 6 * 1028 * c.d_model * c.n_layer
    E, N, R = c.d_inner, c.d_state, c.rank
    assert c.d_conv == 4
    again = 2 * E * (2 * R + 2 * N) + 8 * E * N + 8 * E
    return 6 * P + c.n_layer * (24 * E * N + again)


def test_the_first_line_says_that_nothing_was_measured():
    first = PAGE.partition("\n\n")[2].splitlines()[0]
    assert first.startswith("**Nothing on this page was measured") and "`python -m benchmarks.cuda`" in first


def test_hours_are_the_formula(paper):
    said = re.findall(r"([\d.]+e19)(?: FLOP)? for (?:the )?(Transformer|Mamba)", FLAT)
    assert len(said) == 2
    for number, name in said:
        assert float(number) == pytest.approx(TOKENS * flop(paper[name.lower()], name.lower()), rel=3e-3)
    for gpu, peak in PEAKS.items():
        row = re.search(rf"^\| {gpu}, 46 % to 21 % \| (.*) \| (.*) \|$", PAGE, re.M)
        for cell, family in zip(row.groups(), paper, strict=True):
            low, high = map(float, re.fullmatch(r"([\d.]+) to ([\d.]+) h", cell).groups())
            seconds = TOKENS * flop(paper[family], family) / peak
            assert (low, high) == pytest.approx((seconds / 0.46 / 3600, seconds / 0.21 / 3600), abs=0.051)


def test_bytes_of_mambas_blocks(paper):
    c = paper["mamba"].config
    found = block_memory.mamba(c, Step(128, 1028, 2, bfloat16=True, device="cuda"))
    token = (found.kept - found.casts) / (128 * 1028)
    assert f"{token / 1e3:.1f} KB a token and layer, of which {4 * c.d_model / 1e3:.1f} KB" in FLAT
    hours = 2 * token * c.n_layer * TOKENS / 3.35e12 / 3600
    assert f"takes {hours:.1f} h of an H100's 3.35 TB/s" in FLAT


def test_the_snippet_runs(tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "snippet.py").write_text(snippet)
    assert runpy.run_path(str(tmp_path / "snippet.py"))["loss"].isfinite()
