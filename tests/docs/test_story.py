"""What README says was found: the committed results, and equal to what one works out from them by hand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from studies import story

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOUND = README.split("<!-- findings -->\n")[1].split("\n<!--")[0].split("\n* ")


def test_findings_are_the_committed_results():
    """If not: `python -m studies.story`, and read what changed."""
    assert story.filled(README) == README


def test_accuracies_are_those_of_the_default_runs():
    measured = pd.read_csv(ROOT / "studies" / "retrieval_cpu" / "default_run.csv")
    measured = measured.assign(right=100 * measured["correct"] / measured["count"])
    said = {
        ("transformer", 1024): re.search(r"Transformer finds ([\d.]+) to ([\d.]+) %", FOUND[0]),
        ("mamba", 1024): re.search(r"%, Mamba ([\d.]+) to ([\d.]+) %", FOUND[0]),
        ("mamba", 256): re.search(r"Of 256 symbols Mamba finds ([\d.]+) to ([\d.]+) %", FOUND[0]),
    }
    for (model, length), match in said.items():
        values = measured[measured["model"].eq(model) & measured["length"].eq(length)]["right"]
        assert len(values) == 3 and match is not None
        assert [float(x) for x in match.groups()] == pytest.approx([values.min(), values.max()], abs=0.051)
    assert "3 seeds; chance 0.1 %" in FOUND[0]


def test_seeds_that_learn_are_those_of_the_study():
    page = (ROOT / "studies" / "what_mamba_lacks" / "README.md").read_text(encoding="utf-8")
    for name in ("with none", "with all four ingredients"):
        cell = re.search(rf"^\| Mamba \| 64 \| {name} \| (\d of \d \[[^]]*\])", page, re.M)
        assert cell is not None and cell[1] in FOUND[1]
    fits = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    row = re.search(r"^\| position \| Mamba \| (\S+) \| ([^|]*\]) \|", fits, re.M)
    assert row is not None and f"constant of {row[2]}; {row[1]} was published" in FOUND[1]


def test_differences_in_pictures_by_students_quantiles():
    found = pd.read_parquet(ROOT / "studies" / "vlm_retrieval" / "results.parquet")
    found = found[found["metric"].eq("iou@0.5") & found["run"].str.contains("-base-")]
    wide = 100 * found.pivot_table(index="seed", columns=["family", "task"], values="value")
    comparisons = int(re.search(r"all (\d+) comparisons", FOUND[2])[1])  # type: ignore[index]
    for task, sign, words in (("grounding", 1, "fewer objects"), ("grounding-combination", -1, "more of")):
        apart = sign * (wide["transformer", task] - wide["mamba", task])
        half = stats.t.ppf(1 - 0.025 / comparisons, 7) * apart.std() / np.sqrt(8)
        shown = re.search(rf"([\d.]+) \[([\d.]+), ([\d.]+)\] points {words}", FOUND[2])
        assert shown is not None
        wanted = apart.mean(), apart.mean() - half, apart.mean() + half
        assert [float(x) for x in shown.groups()] == pytest.approx(wanted, abs=0.051)
