"""docs/speed.md and README's table of speeds are the committed results; benchmarks.all resumes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmarks import all as every
from benchmarks import page, scan
from benchmarks.common import where
from ssm_retrieval.training import store

ROOT = Path(__file__).parents[2]
MACHINE = {
    "processor": "Some CPU (family 1, model 2)", "vectors": "AVX2", "threads": 2, "day": "2026-01-02",
    "commit": "0123456789abcdef", "packages": {"torch": "2.0"}, "peers": {"mambapy": "1.2.0"},
}  # fmt: skip


def write(folder: Path, name: str, ratios: dict, quick: bool = False, **facts: object) -> None:
    path = folder / every.slug(MACHINE) / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    store.write_json(path, {"machine": MACHINE, "quick": quick, "ratios": ratios, "facts": facts})


@pytest.mark.parametrize("name", ["README.md", "docs/speed.md"])
def test_pages_have_the_committed_results(name):
    """If not: `python -m benchmarks.page`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert page.filled(text, page.read()) == text
    assert text.count("<!-- speed -->") + text.count("<!-- results -->") == 1


def test_a_machine_has_one_folder():
    assert every.slug(MACHINE) == "some-cpu-family-1-model-2-avx2-2-threads"
    assert re.fullmatch(r"[a-z0-9-]+", every.slug(where()))


def test_the_best_peer_counts(tmp_path):
    """Of mambapy and the compiled model: the one beside which we are least fast."""
    names = [f"step_mamba_tiny_float32_vs_{peer}" for peer in ("mambapy", "compiled")]
    write(tmp_path, "train_step", {names[0]: [8.0, 7.0, 9.0], names[1]: [12.0, 11.0, 13.0]})
    (results,) = page.read(tmp_path).values()
    rows = page.goals(results).splitlines()
    (row,) = (line for line in rows if "Mamba training step, width 128, float32" in line)
    assert row == "| Mamba training step, width 128, float32 | ≥ 10 | 8 (7 to 9) | mambapy | **no** |"
    assert "| 8 (7 to 9) mambapy |" in page.short(page.read(tmp_path))


def test_goals_are_reached_from_their_side(tmp_path):
    write(
        tmp_path, "scan", {"scan_vs_mambapy_kept_memory": [36.0, 30.0, 40.0], "scan_idle_share_32_cores": 0.0}
    )
    write(tmp_path, "start", {"help_seconds": [0.4, 0.3, 0.5]})
    (results,) = page.read(tmp_path).values()
    table = page.goals(results)
    assert "| selective scan, forward + backward | ≥ 35 | 36 (30 to 40) | mambapy | yes |" in table
    assert "| idle share of 32 cores, backward scan | ≤ 0 | 0 |  | yes |" in table
    assert "| `synthetic.run --help` | ≤ 0.3 s | 0.4 s (0.3 to 0.5) |  | **no** |" in table


def test_what_is_missing_says_so_and_quick_runs_are_no_measurements(tmp_path):
    write(tmp_path, "scan", {"scan_vs_mambapy_kept_memory": 99.0}, quick=True)
    assert page.read(tmp_path) == {}
    assert page.filled("<!-- results -->\n<!-- /results -->", {}) == (
        "<!-- results -->\nNot measured.\n<!-- /results -->"
    )
    write(tmp_path, "start", {"help_seconds": 0.2})
    (results,) = page.read(tmp_path).values()
    table = page.goals(results)
    assert "99" not in table and table.count("not measured") == len(page.GOALS) - 1


def test_a_ratio_below_one_stands_out(tmp_path):
    write(tmp_path, "inference", {"decode_mamba-130m_vs_transformers": [0.5, 0.4, 0.6]})
    assert "| **0.5 (0.4 to 0.6)** transformers |" in page.short(page.read(tmp_path))


def test_costs_by_shape_and_where_they_come_from(tmp_path):
    grown = {"mamba 1 x 256, width 128, threads 2": {"microseconds_per_token": 12.34, "peak_mib": 512.0}}
    write(tmp_path, "train_step", {"step": 1.0}, growth=grown)
    text = "\n".join(page.sections(page.read(tmp_path)))
    assert "| mamba 1 x 256, width 128, threads 2 | 12.3 | 0.50 |" in text
    assert "Some CPU (family 1, model 2), AVX2, 2 threads; torch 2.0, mambapy 1.2.0; commit 01234567" in text


def test_all_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """What this commit measured is not measured again; what failed is named, what lacks a peer is not."""
    monkeypatch.setattr(every, "RESULTS", tmp_path)
    monkeypatch.setattr(every, "where", lambda: MACHINE)
    monkeypatch.setattr(page, "main", lambda: None)
    statuses, asked = {"limits": 1, "probes": 2}, []
    monkeypatch.setattr(every, "run", lambda name, path, quick: asked.append(name) or statuses.get(name, 0))
    write(tmp_path, "scan", {"ratio": 1.0})
    monkeypatch.setattr(sys, "argv", ["all", "--only", "scan", "limits", "probes"])
    assert every.main() == 1
    assert asked == ["limits", "probes"]
    assert capsys.readouterr().err == "failed: limits\n"
    monkeypatch.setattr(sys, "argv", ["all", "--only", "scan", "--again"])
    assert every.main() == 0 and asked[2:] == ["scan"]


def test_results_of_another_commit_or_of_a_quick_run_are_not_current(tmp_path):
    path = tmp_path / every.slug(MACHINE) / "scan.json"
    assert not every.current(path, MACHINE["commit"])
    write(tmp_path, "scan", {"ratio": 1.0}, quick=True)
    assert not every.current(path, MACHINE["commit"])
    write(tmp_path, "scan", {"ratio": 1.0})
    assert every.current(path, MACHINE["commit"]) and not every.current(path, "another")


@pytest.mark.parametrize(
    "cores, batch, d_inner, share", [(32, 1, 5120, 0.0), (16, 1, 5120, 0.0), (64, 1, 16, 63 / 64)]
)
def test_idle_cores_by_counting_tasks(cores, batch, d_inner, share):
    assert scan.idle_share(cores, batch, d_inner) == pytest.approx(share)
