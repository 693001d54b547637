"""Models and tasks of users: the examples of docs/extending.md, run as they stand there, from elsewhere."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro
from torch import nn

from ssm_retrieval import models, registry
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.registry import preset_of
from ssm_retrieval.registry import ARCHITECTURES
from ssm_retrieval.style import NAMES, family_colors
from ssm_retrieval.training.records import FORMAT
from synthetic import records, run, tasks
from synthetic.config import RunConfig, plan, run_id
from synthetic.grid import grid

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'```python title="(\w+\.py)"\n(.*?)```', PAGE, flags=re.DOTALL))
SHORT = [
    "--steps",
    "2",
    "--eval-every",
    "1",
    "--eval-examples",
    "4",
    "--final-eval-examples",
    "8",
    "--batch-tokens",
    "64",
    "--seq-len",
    "8",
]


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder with the files of the page, outside this project."""
    folder = tmp_path_factory.mktemp("theirs")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def theirs(outside, monkeypatch):
    """The working directory is `outside`; what is registered there is forgotten afterwards."""
    monkeypatch.chdir(outside)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(ARCHITECTURES, "_theirs", {})
    monkeypatch.setattr(tasks.TASKS, "_theirs", {})
    yield outside
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)


@pytest.fixture
def linear_attention(theirs):
    registry.use(["my_mixer"])
    return models.build(
        "linear-attention-tiny", vocab_size=30, d_model=16, n_layer=2, n_head=2, position="none"
    ).eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 30, shape, generator=torch.Generator().manual_seed(0))


def shell(folder: Path, *words: str) -> tuple[int, str]:
    """A command as a user gives it: in their folder, which is not this project's."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


# --- the examples ------------------------------------------------------------------------------------


def test_the_example_mixer_is_the_recurrence_of_its_paper(theirs):
    """S_t = S_{t-1} + k_t v_t^T, z_t = z_{t-1} + k_t, y_t = S_t^T q_t / z_t . q_t (equations 10 to 12)."""
    mixer = importlib.import_module("my_mixer").LinearAttention(8, n_head=2)
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    q, k, v = (t.unflatten(-1, (2, 4))[0] for t in mixer.qkv(x).chunk(3, dim=-1))  # (L, H, P)
    feature = lambda t: torch.where(t > 0, t + 1, t.exp())  # noqa: E731
    S, z, wanted = torch.zeros(2, 4, 4), torch.zeros(2, 4), []
    for t in range(6):
        S = S + feature(k[t])[:, :, None] * v[t][:, None, :]
        z = z + feature(k[t])
        wanted.append(
            torch.einsum("hkv,hk->hv", S, feature(q[t])) / (z * feature(q[t])).sum(-1, keepdim=True)
        )
    torch.testing.assert_close(mixer(x)[0], mixer.out(torch.stack(wanted).flatten(-2)))


@pytest.mark.parametrize("gap", [1, 3])
def test_the_example_task_asks_what_it_says(theirs, gap):
    registry.use(["my_task"])
    task = tasks.build("before", seq_len=8, gap=gap)
    batch = task.batch(16, seed=0, index=0)
    for ids, label in zip(batch.input_ids.tolist(), batch.labels[:, 0].tolist(), strict=True):
        *context, marker, asked = ids
        assert marker == task.vocabulary.query and len(set(context)) == 8
        assert context[context.index(asked) - gap] == label and context.index(asked) >= gap
        assert batch.answer_at.tolist() == [len(ids) - 1]


# --- from_mixer --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(3,), tuple(range(1, 9))])
def test_decoding_in_pieces_equals_one_pass(linear_attention, cuts):
    ids, cache = tokens(2, 9), linear_attention.init_cache()
    parts = [linear_attention(part, cache=cache) for part in ids.tensor_split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), linear_attention(ids))
    assert cache.num_elements() == 2 * models.state_size(linear_attention.config, 9)


@torch.no_grad()
@pytest.mark.parametrize("position", ["learned", "none"])
@pytest.mark.parametrize("row", ["...012345", "012345...", ".01.234.5", "01234...5"])
def test_padding_changes_nothing_with_a_cache_too(theirs, position, row):
    """Wherever it stands, whatever is there: a dot, which is token 29."""
    registry.use(["my_mixer"])
    options = dict(vocab_size=30, d_model=16, n_head=2, position=position)
    model = models.build("linear-attention-tiny", **options).eval()
    ids = tokens(1, 6)
    padded = torch.tensor([[29 if c == "." else int(ids[0, int(c)]) for c in row]])
    mask = torch.tensor([[c != "." for c in row]])
    wanted = model(ids)
    torch.testing.assert_close(model(padded, attention_mask=mask)[mask], wanted[0])
    cache = model.init_cache()
    pieces = [model(padded[:, a:b], attention_mask=mask[:, a:b], cache=cache) for a, b in ((0, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(pieces, dim=1)[mask], wanted[0])


@torch.no_grad()
def test_positions_decide_whether_order_counts(theirs):
    """Attention is a sum over the past: without positions the last logits do not see its order."""
    registry.use(["my_mixer"])
    options = dict(vocab_size=30, d_model=16, n_layer=1, n_head=2)
    ids = tokens(1, 7)
    other = torch.cat([ids[:, :-1].flip(1), ids[:, -1:]], dim=1)
    ends = {
        position: [
            models.build("linear-attention-tiny", position=position, **options)(x)[0, -1]
            for x in (ids, other)
        ]
        for position in ("none", "learned")
    }
    torch.testing.assert_close(*ends["none"])
    assert (ends["learned"][0] - ends["learned"][1]).abs().max() > 1e-3


def test_a_saved_model_is_loaded_with_the_options_of_its_mixer(linear_attention, tmp_path):
    place = models.save(linear_attention, tmp_path / "kept")
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["n_head"] == 2
    loaded, ids = models.load(place), tokens(1, 5)
    assert loaded.blocks[0].mixer.inner.n_head == 2
    torch.testing.assert_close(loaded(ids), linear_attention(ids))


def test_a_model_that_nobody_registered_is_one_line(linear_attention, tmp_path, monkeypatch):
    place = models.save(linear_attention, tmp_path / "kept")
    monkeypatch.setattr(ARCHITECTURES, "_theirs", {})
    with pytest.raises(UserError, match=r"family='linear-attention' is unknown; .*--import"):
        models.load(place)


class NoDefault(nn.Module):
    def __init__(self, d_model, width: int):
        super().__init__()


class Text(nn.Module):
    def __init__(self, d_model, kind: str = "a"):
        super().__init__()


class Taken(nn.Module):
    def __init__(self, d_model, norm: int = 1):
        super().__init__()


class Narrow(nn.Module):
    def __init__(self, d_model):
        super().__init__()

    def forward(self, x):
        return x[..., :1]


@pytest.mark.parametrize(
    "mixer, said",
    [
        (NoDefault, "option width .* needs a default"),
        (Text, "option kind .*int, float, bool"),
        (Taken, "option norm"),
    ],
)
def test_options_that_a_config_cannot_have(mixer, said):
    with pytest.raises(UserError, match=said):
        models.from_mixer("mine", mixer)


def test_a_mixer_of_another_shape_is_one_line(theirs):
    models.register(models.from_mixer("narrow", Narrow))
    model = models.build("narrow-tiny", vocab_size=30)
    with pytest.raises(
        UserError, match=r"Narrow must map \(1, 3, 128\) to the same shape; it returned \(1, 3, 1\)"
    ):
        model(tokens(1, 3))


# --- records and names -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_state_size_is_what_a_cache_holds(name):
    shape = dict(vocab_size=30, d_model=16, n_layer=3)
    heads = {
        name: dict(headdim=8) for name in ("mamba2", "mamba3", "deltanet", "gated-deltanet", "kda", "gla")
    }
    shape |= {"mamba": {}, "linear": {}, **heads}.get(name, dict(n_head=2))
    model = models.build(f"{name}-tiny", **shape)
    cache = model.init_cache()
    with torch.no_grad():
        model(tokens(1, 11), cache=cache)
    assert models.state_size(model.config, 11) == cache.num_elements()


def test_every_record_stands_under_its_own_name_with_looks_of_its_own():
    for known in (ARCHITECTURES, tasks.TASKS):
        assert all(known[name].name == name for name in known)
    assert all(task.help for task in tasks.TASKS.values())
    for looks in (family_colors().values(), NAMES.values(), [a.marker for a in ARCHITECTURES.values()]):
        assert len(set(looks)) == len(ARCHITECTURES)


def test_a_users_model_has_label_and_a_colour_that_is_free(theirs):
    registry.use(["my_mixer"])
    assert NAMES["linear-attention"] == "Linear attention" and list(NAMES)[-1] == "linear-attention"
    assert len(set(family_colors().values())) == len(ARCHITECTURES.ours) + 1


OURS, IMPOSSIBLE = "is one of this toolkit's", "cannot be named"


@pytest.mark.parametrize(
    "name, said", [("mamba", OURS), ("pythia", OURS), ("A/b", IMPOSSIBLE), ("x y", IMPOSSIBLE)]
)
def test_names_that_a_users_model_cannot_have(theirs, name, said):
    with pytest.raises(UserError, match=said):
        models.register(models.from_mixer(name, nn.Identity))
    assert len(ARCHITECTURES) == len(ARCHITECTURES.ours)


def test_a_config_is_of_one_model(theirs):
    """Weights are read by the class of their config: two models of one class could not be told apart."""
    mamba = ARCHITECTURES["mamba"]
    with pytest.raises(UserError, match="MambaConfig is the config of model mamba; derive your own"):
        models.register(models.Architecture(name="mine", config=mamba.config, model=mamba.model))


def test_registering_again_replaces(theirs):
    for label in ("first", "second"):
        models.register(models.from_mixer("mine", Narrow, label=label))
    assert NAMES["mine"] == "second" and len(ARCHITECTURES) == len(ARCHITECTURES.ours) + 1


def test_tasks_that_cannot_be_registered(theirs):
    class Nameless(tasks.Task):
        version = 1

    class Ours(tasks.TASKS["position"]):
        pass

    for task, said in ((Nameless, "has no name"), (Ours, "one of this toolkit's"), (int, "derived from")):
        with pytest.raises(UserError, match=said):
            tasks.register(task)


def test_sizes_that_are_compared_stand_for_each_other_in_preset_only():
    assert (
        preset_of("mamba", "160m") == "mamba-130m" and preset_of("transformer", "130m") == "transformer-160m"
    )
    assert preset_of("mamba2", "1b") == "mamba2-780m" and preset_of("mamba", "150m") == "mamba-150m"
    with pytest.raises(UserError, match=r"did you mean 'mamba2-780m'\?"):
        models.build("mamba2-1b")


# --- --import ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        (["--model", "linear-atention"], "did you mean 'linear-attention'?"),
        (["--model", "rwkv"], "a model of your own needs --import"),
        (["--task", "befor"], "did you mean 'before'?"),
        (
            ["--import", "my_other"],
            "--import my_other: there is no module my_other; run the command in the folder",
        ),
        (
            ["--import", "my_mixer.py"],
            "--import my_mixer.py is no name of a module; for my_module.py give my_module",
        ),
        (["--model", "linear-attention", "--preset", "1b"], "has no size '1b'; it has tiny, 160m"),
        (
            ["--model", "linear-attention", "--position", "rope"],
            "none of --model linear-attention's; use learned, none",
        ),
        (["--model", "linear-attention", "--d-state", "4"], "--d-state 4 is for state space models"),
        (["--model", "linear-attention", "--plan"], "Linear attention has no formula of its memory"),
        (
            ["--task", "before", "--protocol", "paper"],
            "--protocol paper is for position, position-varlen, grid, ngram",
        ),
        (["--task", "before", "--layout", "prefix"], "--layout prefix is no option of --task before"),
        (
            ["--task", "before", "--task-options", "gpa=2"],
            "task before has no option 'gpa' (did you mean 'gap'?); it has gap, --seq-len, --num-symbols",
        ),
        (["--task", "before", "--task-options", "gap=two"], "not valid for task before; give an integer"),
        (["--task", "before", "--task-options", "gap=0"], "gap 0 must be at least 1"),
    ],
)
def test_what_is_unknown_is_one_line(theirs, capsys, words, said):
    assert run.main([*SHORT, "--import", "my_mixer", "--import", "my_task", *words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and said in line
    assert not (theirs / "runs").exists()


def test_a_module_that_fails_itself_keeps_its_traceback(theirs, capsys):
    (theirs / "broken_inside.py").write_text("import no_such_package\n")
    assert run.main(["--import", "broken_inside"]) == 1
    assert "No module named 'no_such_package'" in capsys.readouterr().err


def test_a_sweeps_file_names_its_modules(theirs):
    (found,) = grid(RunConfig(imports=("my_mixer",)), model="linear-attention")
    assert found.imports == ("my_mixer",) and "linear-attention" in ARCHITECTURES
    with pytest.raises(UserError, match="--task before: unknown task 'before'"):
        grid(task="before")


def test_a_users_task_has_options_of_its_own(theirs):
    """By flag, in Python and in a grid alike; a default that is asked for gives the run of not asking."""
    base = RunConfig(task="before", seq_len=8, model="mamba", imports=("my_task",), device="cpu")
    found = [plan(run, "mamba") for run in grid(base, task_options=[{}, {"gap": 1}, {"gap": 2}])]
    assert [p.task_options.get("gap") for p in found] == [None, None, 2]
    assert len({run_id(p) for p in found}) == 2
    words = "--task before --seq-len 8 --model mamba --import my_task --device cpu --task-options gap=2"
    assert run_id(plan(tyro.cli(RunConfig, args=words.split()), "mamba")) == run_id(found[2])
    with pytest.raises(UserError, match="task before has no option 'depth'; it has gap"):
        grid(base, task_options={"depth": 2})


@pytest.mark.parametrize("modules", ["my_mixer", [1], None])
def test_a_damaged_list_of_modules_is_one_line(theirs, tmp_path, modules):
    settled = plan(RunConfig(seq_len=8), "mamba").to_dict()
    kept = dict(format=FORMAT, run={"imports": modules}, plan=settled)
    (tmp_path / "config.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match=r"config.json: run.imports is .*, not a list of names"):
        records.config(tmp_path)


def test_a_help_page_needs_no_torch():
    code = "import sys, synthetic.config as c; print(*c.ARCHITECTURES, *c.TASKS, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [*ARCHITECTURES, *tasks.TASKS, "False"], done.stderr


@pytest.mark.slow
def test_both_are_trained_resumed_probed_and_drawn_from_outside(outside, tmp_path):
    """By the commands of the page, with fewer steps; the later ones are not told the modules."""
    (command,) = re.findall(r"^python -m (synthetic\.run --import my_mixer.*)$", PAGE, flags=re.MULTILINE)
    status, said = shell(outside, *command.split(), *SHORT)
    assert status == 0 and "Linear attention" in said, said
    assert "finished before" in shell(outside, *command.split(), *SHORT)[1]
    folder = outside / "runs"
    for path in folder.glob("*/config.json"):
        kept = json.loads(path.read_text())
        assert kept["run"]["imports"] == ["my_mixer", "my_task"]
        assert kept["plan"]["task_options"] == dict(seq_len=8, num_symbols=64, gap=2)
    assert len(list(folder.glob("before-*-linear-attention-*"))) == 1
    status, said = shell(
        outside, "probes.run", str(folder), "--probe", "lens", "attention", "--examples", "4"
    )
    assert status == 0 and "attention linear-attention: left out, it has neither" in said, said
    (view,) = folder.glob("compare-*/probes")
    assert "linear-attention" in (view / "lens.csv").read_text()
    assert shell(outside, "analysis.report", str(folder), "--out", "report.html")[0] == 0
    assert "Linear attention" in (outside / "report.html").read_text()
    assert shell(outside, "analysis.figures", "runs", "--out", "figures")[0] == 0
    assert "Linear attention" in (outside / "figures" / "accuracy_curves.svg").read_text()
    status, said = shell(tmp_path, "probes.run", str(folder))
    assert status == 2 and said.count("\n") == 1 and "was made with --import my_mixer" in said


@pytest.mark.slow
def test_a_sweeps_workers_know_them_too(outside):
    (outside / "sweep.py").write_text(
        "from synthetic.config import RunConfig\nfrom synthetic.grid import Sweep, grid\n\n"
        "def get_config():\n"
        "    base = RunConfig(seq_len=8, steps=1, eval_examples=4, final_eval_examples=4, batch_tokens=64)\n"
        "    return Sweep(runs=grid(base, model='linear-attention', task='before'), out='swept')\n"
    )
    modules = ["--import", "my_mixer", "--import", "my_task"]
    assert shell(outside, "synthetic.sweep", "sweep.py", "--workers", "1")[0] == 2
    status, said = shell(outside, "synthetic.sweep", "sweep.py", "--workers", "1", *modules)
    assert status == 0 and "linear-attention" in said, said
