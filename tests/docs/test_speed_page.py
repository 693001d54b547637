"""docs/speed.md and README's table of speeds are the committed results; benchmarks.all resumes."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import all as every
from benchmarks import common, goals, inference, page, probes, scan, start, train_step
from ssm_retrieval.ops import _scan_cpu
from ssm_retrieval.training import store

ROOT = Path(__file__).parents[2]
MACHINE = {
    "processor": "Some CPU (family 1, model 2)", "vectors": "AVX2", "threads": 2, "day": "2026-01-02",
    "commit": "0123456789abcdef", "packages": {"torch": "2.0"}, "peers": {"mambapy": "1.2.0"},
}  # fmt: skip


def write(folder: Path, name: str, ratios: dict, facts: dict | None = None, **more: object) -> None:
    path = folder / every.slug(MACHINE) / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    result = {"machine": MACHINE, "quick": False, "given": {}, "ratios": ratios, "facts": facts or {}}
    store.write_json(path, result | more)


def row(table: str, start: str) -> str:
    """The line of a table that starts with these words."""
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {start} |"))
    return line


@pytest.mark.parametrize("name", ["README.md", "docs/speed.md"])
def test_pages_have_the_committed_results(name):
    """If not: `python -m benchmarks.page`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert page.filled(text, page.read()) == text
    assert text.count("<!-- speed -->") + text.count("<!-- results -->") == 1


def test_a_machine_has_one_folder():
    assert every.slug(MACHINE) == "some-cpu-family-1-model-2-avx2-2-threads"
    assert re.fullmatch(r"[a-z0-9-]+", every.slug(common.where()))


def test_the_best_peer_counts(tmp_path):
    """Of mambapy and the compiled model: the one beside which we are least fast."""
    names = [f"step_mamba_tiny_float32_vs_{peer}" for peer in ("mambapy", "compiled")]
    write(tmp_path, "train_step", {names[0]: [8.0, 7.0, 9.0], names[1]: [12.0, 11.0, 13.0]})
    (results,) = page.read(tmp_path).values()
    what = "Mamba training step, width 128, float32"
    assert row(page.goals(results), what) == f"| {what} | ≥ 10 | 8 (7 to 9) | mambapy | **no** |"
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
    text = "\n".join(page.sections(page.read(tmp_path)))
    assert text.count("\n\nNot measured.") == 3  # speeds, costs by shape, shares
    assert page.short(page.read(tmp_path)) == page.short({}) == "Not measured."


def test_a_ratio_below_one_stands_out(tmp_path):
    write(tmp_path, "inference", {"decode_mamba-130m_vs_transformers": [0.5, 0.4, 0.6]})
    assert "| **0.5 (0.4 to 0.6)** transformers (" in page.short(page.read(tmp_path))


def test_costs_by_shape_and_where_they_come_from(tmp_path):
    grown = {
        f"mamba {shape}, width 128, threads 2": {"microseconds_per_token": cost, "peak_mib": 512.0}
        for shape, cost in (("1 x 256", 12.34), ("1 x 1024", 11.0), ("16 x 1024", 10.0))
    }
    other = MACHINE | {"commit": "fedcba9876543210+", "peers": {"transformers": "5.0"}}
    write(tmp_path, "train_step", {"step": 1.0}, {"growth": grown})
    write(tmp_path, "probes", {"grid": 1.0}, machine=other, given={"memory_gib": "4.0"})
    text = "\n".join(page.sections(page.read(tmp_path)))
    assert "| mamba 1 x 256, width 128, threads 2 | 12.3 | 0.50 |" in text
    assert re.findall(r"\| mamba (\d+ x \d+),", text) == ["1 x 256", "1 x 1024", "16 x 1024"]
    assert text.startswith("## Some CPU (family 1, model 2), AVX2, 2 threads\n")
    assert "| train_step | 2026-01-02 | 01234567 | torch 2.0, mambapy 1.2.0 |  |" in text
    assert "| probes | 2026-01-02 | fedcba98+ | torch 2.0, transformers 5.0 | memory_gib 4.0 |" in text


def test_a_goal_is_open_until_every_peer_was_measured(tmp_path):
    """Unless it is missed already; a peer that failed here is named, and no longer waited for."""
    names = {peer: f"step_transformer_tiny_bf16_vs_{peer}" for peer in ("eager", "compiled")}
    what = "GPT-NeoX training step, width 128, bfloat16"

    def said(*ratios: dict, **more: object) -> list[str]:
        write(tmp_path, "train_step", *ratios, **more)
        (results,) = page.read(tmp_path).values()
        return row(page.goals(results), what).split(" | ")[2:]

    half = "transformers (transformers, compiled not measured)"
    assert said({names["eager"]: 1.2}) == ["1.2", half, "open |"]
    assert said({names["eager"]: 1.1}) == ["1.1", half, "**no** |"]
    assert said({names["eager"]: 1.2, names["compiled"]: 1.3}) == ["1.2", "transformers", "yes |"]
    failed = {"transformer_tiny_bf16_vs_compiled": "RuntimeError: no compiler"}
    assert said({names["eager"]: 1.2}, left_out=failed) == [
        "1.2", "transformers (transformers, compiled failed)", "yes |"
    ]  # fmt: skip


def test_what_a_goal_needs_beside_ratios(tmp_path):
    """KL is the logarithm of how perplexity grows; of two numbers of threads the larger peak counts."""
    write(tmp_path, "inference", {}, {"mamba-130m_8bit_vs_bfloat16": {"kl": math.log(1.02)}})
    (results,) = page.read(tmp_path).values()
    found = goals.numbers(results["inference"])
    assert found == {"perplexity_mamba-130m": pytest.approx(2)}
    shape = "mamba 1 x 16384, width 128"
    peaks = {f"{shape}, threads {n}": {"peak_mib": 1024 * gib} for n, gib in ((1, 9), (2, 7))}
    assert goals.numbers({"ratios": {}, "facts": {"growth": peaks}}) == {f"gib {shape}": 9}


def test_speeds_and_shares(tmp_path):
    fact = {
        "seconds": {"ours, 16 bits": {"prefill": [1.0, 2.0, 4.0], "decode": [8.0]}},
        "peak_mib": {"ours, 16 bits": 512.0}, "kl": 0.00123, "work": {"prefill": 1024, "decode": 128},
    }  # fmt: skip
    write(tmp_path, "inference", {}, {"mamba-130m_vs_llama_cpp": fact})
    rates = {"float32": 4e11, "bfloat16": 8e11, "copy": 1e10, "read": 2e10, "exp": 5e9}
    facts = {"linear": {"seconds": 0.002, "floor": 0.001, "by": "copies"}}
    write(tmp_path, "limits", {"share_linear": 0.5}, facts, rates=rates)
    (results,) = page.read(tmp_path).values()
    assert page.speeds(results).splitlines()[-1] == (
        "| `mamba-130m_vs_llama_cpp` | ours, 16 bits | 512 | 16 | 0.50 | 1.2e-03 |"
    )
    table = page.shares(results)
    assert "400 GFLOP/s in float32" in table and "reading 20 GB/s; 5 billion exponentials/s" in table
    assert table.splitlines()[-1] == "| linear | 2.00 | 1.00 | copies | 50% |"


def test_goals_ask_for_numbers_that_benchmarks_write(monkeypatch, tmp_path):
    """In full: a misspelt name would stay "not measured" for ever."""
    sizes = SimpleNamespace(families=list(train_step.PRESETS), sizes=list(train_step.SIZES))
    known = {f"step_{name}" for name, *_ in train_step.comparisons(sizes)}
    shapes = {shape for shapes in train_step.GROWTH.values() for shape in shapes}
    known |= {f"gib {f} {b} x {n}, width {w}" for f in train_step.PRESETS for b, n, w in shapes}
    monkeypatch.setattr(inference, "NEEDED", dict.fromkeys(inference.PEERS, "torch"))  # as if all were there
    monkeypatch.setattr(inference, "build", lambda name: None)
    monkeypatch.setattr(inference, "write", lambda model, path, kind: path.touch() or path)
    asked = SimpleNamespace(length=8, tokens=2, peers=inference.PEERS)
    for model in inference.MODELS:
        for end, _ in inference.rows(model, asked, tmp_path):
            known |= {f"{call}_{end}" for call in inference.CALLS}
        known.add(f"perplexity_{model}")
    known.add(f"states_at_64_vs_transformer_lens_eager_scan_{probes.GRID_LENGTH}")
    source = Path(start.__file__).read_text(encoding="utf-8")
    known |= set(re.findall(r'"(\w+)": (?:paired|spread)\(', source))
    known |= {"scan_vs_mambapy_kept_memory", "scan_idle_share_32_cores"}
    known |= {f"patch_grid_vs_transformer_lens{end}" for end in ("", "_neox")}
    for goal in goals.GOALS:
        assert set(goal.numbers) <= known, goal.row


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
    write(tmp_path, "scan", {"ratio": 1.0}, given={"pairs": "1"})  # a part
    assert not every.current(path, MACHINE["commit"])
    write(tmp_path, "scan", {"ratio": 1.0})
    assert every.current(path, MACHINE["commit"]) and not every.current(path, "another")


def test_results_are_of_a_commit_though_pages_and_results_have_changed(tmp_path, monkeypatch):
    """Else the first result would make every later one be of another commit, and nothing would resume."""

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    for name in ("README.md", "docs/speed.md", "benchmarks/results/here/scan.json", "benchmarks/scan.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(store, "environment", lambda threads: {"commit": "0123+"})
    for name in ("README.md", "docs/speed.md", "benchmarks/results/here/scan.json"):
        (tmp_path / name).write_text("after")
    assert not common.changed() and common.where()["commit"] == "0123"
    (tmp_path / "benchmarks/scan.py").write_text("after")
    assert common.changed() and common.where()["commit"] == "0123+"


@pytest.mark.parametrize(
    "cores, batch, d_inner, share", [(32, 1, 5120, 0.0), (16, 1, 5120, 0.0), (64, 1, 16, 63 / 64)]
)
def test_idle_cores_by_counting_tasks(cores, batch, d_inner, share):
    assert scan.idle_share(cores, batch, d_inner) == pytest.approx(share)


@pytest.mark.parametrize("batch, d_inner", [(1, 5120), (3, 208)])
def test_tasks_are_counted_as_the_scan_has_them(batch, d_inner, monkeypatch):
    """With as many cores as it starts tasks none is idle; with one core more, one is."""
    started, run = [], _scan_cpu.run_tasks
    monkeypatch.setattr(_scan_cpu, "run_tasks", lambda call, tasks: started.append(tasks) or run(call, tasks))
    generator = torch.Generator().manual_seed(0)
    u, dt = (torch.rand(batch, 2, d_inner, generator=generator).requires_grad_() for _ in range(2))
    b, c = (torch.rand(batch, 2, 1, generator=generator) for _ in range(2))
    scan.selective_scan(u, dt, -torch.ones(d_inner, 1), b, c, backend="cpu").sum().backward()
    tasks = started[-1]
    assert scan.idle_share(tasks, batch, d_inner) == 0
    assert scan.idle_share(tasks + 1, batch, d_inner) == pytest.approx(1 / (tasks + 1))
