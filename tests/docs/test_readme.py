"""What the documents promise: every command parses and can be planned, snippets run, tables match results."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex

import pandas as pd
import pytest
import torch
import tyro
from readme_commands import COMMANDS, DOCUMENTS, README, ROOT, parsed

import analysis
from analysis import entries, figures
from ssm_retrieval import models
from ssm_retrieval.models.planning import device_peak
from studies.learnability import report
from studies.learnability.run import BASE, DIETS, VARIANTS, grid, tuning
from studies.retrieval_cpu import report as retrieval
from studies.why_mamba_lags import contrasts
from synthetic import memory, sweep
from synthetic.config import RunConfig, plan
from synthetic.grid import Group, group, load
from synthetic.results import config_columns


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_documents_can_be_planned(command, tmp_path):
    """With a small checkpoint of the same kind in place of one on the hub."""
    if "--help" in command or "--version" in command or "--import" in command:
        return  # test_run.py and test_cli.py look at it, and test_extending.py has the modules
    config = parsed(command)
    if config.init is not None:
        small = models.build(f"{config.model[0]}-tiny", vocab_size=40)
        config = dataclasses.replace(config, init=str(models.save(small, tmp_path / "small")))
    for family in config.model:
        assert plan(config, family).seq_len == config.seq_len


GPU_LINES = [
    line for text in DOCUMENTS for line in re.findall(r"^python -m synthetic\.run.*# GPU.*$", text, re.M)
]


@pytest.mark.parametrize("line", GPU_LINES)
def test_a_command_for_a_gpu_fits_the_gpu_that_its_comment_names(line):
    command, _, comment = line.partition("#")
    config = tyro.cli(RunConfig, args=shlex.split(command)[3:])
    gib = int(re.fullmatch(r"GPU, (\d+) GiB", comment.strip())[1])
    assert config.device == "cuda"
    for family in config.model:
        planned = plan(config, family, elsewhere=True)
        step = max(memory.training_steps(planned), key=lambda s: s.at_once * s.length)
        peak = device_peak(memory.meta_model(planned), step, memory.evaluation_step(planned), devices=1)
        assert peak < gib * 2**30


def test_the_page_on_speed_has_the_rows_that_lose():
    """As docs/scale.md measured them."""
    scale, speed = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("scale", "speed"))
    faster, slower = re.findall(r"times as fast\*?\*? \| \*?\*?([\d.]+)\*?\*? \| \*?\*?([\d.]+)", scale)
    rows = re.findall(r"^\|.*2\.8 B in bfloat16.*\n\|.*decoding 32 tokens.*$", speed, re.M)
    for row, measured in zip(rows, (faster, slower), strict=True):
        assert re.findall(r"\*?\*?([\d.]+)\*?\*? \|$", row, re.M) == list(measured)


SWEEPS = sorted(
    {line for text in DOCUMENTS for line in re.findall(r"^python -m synthetic\.sweep [^#\n]*", text, re.M)}
)
FIGURES = sorted(
    {line for text in DOCUMENTS for line in re.findall(r"^python -m analysis\.figures [^#\n]*", text, re.M)}
)


@pytest.mark.parametrize("command", SWEEPS)
def test_sweeps_of_the_documents_can_be_planned(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = tyro.cli(sweep.Options, args=shlex.split(command)[3:])
    for run in load(options.file).runs:
        assert plan(run, run.model[0], elsewhere=True).seq_len == run.seq_len


@pytest.mark.parametrize("command", FIGURES)
def test_figure_commands_of_the_documents_parse(command):
    out = tyro.cli(figures.Options, args=shlex.split(command)[3:]).out
    assert out.name == "figures" if "--out" in command else out is None


def test_sweep_file_of_the_documents(tmp_path):
    text = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    first, second, *_ = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "sweep.py").write_text(first)
    assert len(load(tmp_path / "sweep.py").runs) == 2 * 2 * 3 + 2 * 3
    study = ROOT / "studies" / "retrieval_cpu" / "results.parquet"
    names: dict = {}
    exec(second.replace('"runs/retrieval_cpu"', repr(str(study))), names)
    assert {"Transformer", "Mamba", "Mamba-2", "Hybrid"} < set(names["laws"]["variant"])


@pytest.mark.parametrize("script", [retrieval, contrasts], ids=lambda script: script.__name__)
def test_tables_of_a_study_are_its_results(script):
    """If not: run the script."""
    text = (script.HERE / "README.md").read_text(encoding="utf-8")
    assert script.filled(text) == text


def test_results_of_the_retrieval_study_are_all_of_its_runs_and_no_others():
    folder = ROOT / "studies" / "retrieval_cpu"
    wanted = load(folder / "config.py")
    rates = json.loads((folder / "learning_rates.json").read_text())
    chosen = {
        tuple(row.get(name) for name in Group._fields): row["lr"] for row in rates
    }  # of before --window
    rates_of = [chosen[group(run)] for run in wanted.runs]
    runs = [dataclasses.replace(run, lr=lr) for run, lr in zip(wanted.runs, rates_of, strict=True)]
    table = analysis.load(folder / "results.parquet")
    reported = table[table["purpose"] == "report"].drop_duplicates("run")
    # by what was asked, not by name: a TRAINING_VERSION later a run of the same plan has another name
    asked = ["task", "layout", "seq_len", "num_symbols", "model", "preset", "position", "n_layer", "d_state",
             "queries", "lr", "steps", "eval_every", "seed", "precision", "device"]  # fmt: skip
    planned = pd.DataFrame(
        [config_columns(plan(run, run.model[0]).to_dict()) for run in runs]
    ).drop_duplicates()
    rows = [frame[asked].astype(object).fillna("-").values.tolist() for frame in (reported, planned)]
    assert sorted(map(repr, rows[0])) == sorted(map(repr, rows[1]))
    tuning = {name for row in rates for name in row["runs"]}
    assert set(table.loc[table["purpose"] == "validation", "run"]) == tuning
    for kind, part in table.groupby("kind"):
        assert kind == "during" or not part["run"].duplicated().any()


def test_figures_of_the_retrieval_study_come_from_its_results(tmp_path):
    """The tables behind them, number by number; the geometry needs the trained models."""
    folder = ROOT / "studies" / "retrieval_cpu"
    found = [
        e for e in entries.of_synthetic(folder / "results.parquet", "here") if isinstance(e, entries.Entry)
    ]
    assert {"scaling", "by_position", "position_step"} <= {entry.name for entry in found}
    for entry in found:
        kept = pd.read_csv(folder / "figures" / f"{entry.name}.csv")
        text = io.StringIO(entry.table.to_csv(index=False, float_format="%.10g"))
        pd.testing.assert_frame_equal(pd.read_csv(text), kept)


def test_snippets_of_the_probes_page():
    text = (ROOT / "docs" / "probes.md").read_text(encoding="utf-8")
    hooks, functions, derivatives = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {}
    exec(derivatives, names)
    model, ids = names["model"], names["ids"]
    for i in range(len(ids)):  # by the kernels, one sequence after the other
        loss, _ = model.loss(ids[i : i + 1, :-1], labels=ids[i : i + 1, 1:])
        for (name, _), wanted in zip(
            model.named_parameters(), torch.autograd.grad(loss, model.parameters()), strict=True
        ):
            for found in (names["each"], names["same"]):
                torch.testing.assert_close(found[name][i], wanted, rtol=1e-3, atol=1e-5)
    names = {}
    exec(hooks, names)
    assert names["state"].shape == (2, 2, 256, 16)
    assert not torch.equal(
        names["gone"][:, 6:], names["unread"][:, 6:]
    )  # one edit goes on, the other does not
    torch.testing.assert_close(names["gone"][:, :5], names["unread"][:, :5])
    exec(functions, names)
    name = "blocks.1.mixer.hook_ssm_state"
    with torch.no_grad(), names["probes"].record(names["model"], name, positions=[0]) as cache:
        names["model"](names["ids"])
    first = cache[name].flatten(1).norm(dim=1)  # the state after one token is what it wrote
    torch.testing.assert_close(names["write"][:, 0], first)
    assert (names["left"][:, :-1] < 1).all() and (names["left"][:, -1] == 1).all()
    torch.testing.assert_close(names["pattern"].sum(-1), torch.ones(2, 1, 20))


def test_readme_starts_with_the_two_commands():
    first, second = re.search(r"```bash\n(.*?)\n(.*?)\n```", README).groups()
    assert first.endswith("&& pip install -c constraints.txt -e . && python -m synthetic.run")
    assert second == 'pip install -c constraints.txt -e ".[dev]" && python -m pytest'
    install, run = (ROOT / ".ci" / "run").read_text(encoding="utf-8"), "\npython -m pytest\n"
    assert '-c constraints.txt -e ".[dev,docs,ray]"' in install and run in install


def test_sizes_of_the_default_models():
    """Weights, and what each keeps: a state of one size, or keys and values of every token."""
    said = {}
    for family in ("transformer", "mamba"):
        settled = plan(RunConfig(), family)
        said[family] = models.build(settled.model, device="meta", **settled.model_overrides)
    transformer, mamba = (said[family].num_parameters() for family in said)
    assert f"a Transformer ({transformer:,} weights) and a Mamba ({mamba:,})" in README
    kept = {models.state_size(said["mamba"].config, length) for length in (2, 1024)}
    assert f"Mamba's one layer keeps {kept.pop():,} numbers" in README and not kept
    assert 500_000 < models.state_size(said["transformer"].config, 1024) < 550_000  # half a million


def test_python_snippet_of_the_tour_runs(monkeypatch, capsys, tmp_path):
    """With the arguments of its last line defined, and a run of one step."""
    monkeypatch.chdir(tmp_path)
    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", tour, flags=re.DOTALL)
    shorter = {"steps=200": "steps=1, eval_examples=4, final_eval_examples=8"}
    for old, new in (shorter | {'build("mamba-130m")': 'build("mamba-130m", device="meta")'}).items():
        assert old in snippet
        snippet = snippet.replace(old, new)
    names: dict = {k: torch.randn(1, 101, 8) for k in ("u", "dt")}
    names |= dict(A=-torch.rand(8, 4), B=torch.randn(1, 101, 4), C=torch.randn(1, 101, 4))
    exec(snippet, names)
    assert names["h"].shape == (1, 2, 8, 4) and "<query>" in capsys.readouterr().out
    assert names["run"].result["step"] == 1 and len(names["figure"].axes) == 3


def test_links_lead_somewhere():
    for text, folder in ((README, ROOT), *((t, ROOT / "docs") for t in DOCUMENTS[1:])):
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (folder / link).exists(), link


@pytest.mark.parametrize("name, jobs", [("grid", grid), ("tuning", tuning)])
def test_learnability_tables_are_the_results(name, jobs):
    """docs/learnability.md shows the results, every run of the study once, and no other."""
    results = pd.read_csv(report.HERE / f"{name}.csv")
    assert report.TABLES[name](results) in report.DOCUMENT.read_text(encoding="utf-8")
    planned = [(v, d, c.seed, plan(c, c.model[0]).lr) for v, d, c in jobs()]
    found = list(results[["variant", "diet", "seed", "lr"]].itertuples(index=False, name=None))
    assert sorted(found) == sorted(planned)
    assert set(results.variant) <= set(VARIANTS) and set(results.diet) <= set(DIETS)
    assert results.steps.max() <= BASE.steps
