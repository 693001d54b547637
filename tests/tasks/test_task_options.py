"""Options of tasks without a flag: `--task-options` and `RunConfig.task_options`."""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import pytest
import tyro

from analysis.report.runs import Run
from ssm_retrieval.errors import UserError
from synthetic import tasks
from synthetic.config import RunConfig, plan, run_id
from synthetic.grid import Sweep, grid
from synthetic.options import flags
from synthetic.results import begin

BASE = RunConfig(task="mqar", seq_len=32, model="mamba", device="cpu", precision="float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Many(tasks.TASKS["induction"]):
    """Induction with an option of every type."""

    name: ClassVar[str] = "many"

    depth: int = 1
    share: float = 0.5
    loud: bool = False
    kind: str = "plain"
    side: Literal["left", "right"] = "left"
    level: Literal[1, 2] | None = None
    most: int | None = 7
    names: tuple[str, ...] = ()


@pytest.fixture
def many(monkeypatch):
    monkeypatch.setattr(tasks.TASKS, "_theirs", {"many": Many})
    return dataclasses.replace(BASE, task="many")


def options_of(config: RunConfig) -> dict:
    return plan(config, "mamba").task_options


def test_flags_are_the_options_that_the_command_line_always_had():
    assert flags(BASE) == [
        "seq_len", "layout", "num_symbols", "min_seq_len", "query_size", "answer_size", "blocks", "num_pairs",
        "num_tokens",
    ]  # fmt: skip


CAST = [
    ("depth=3", {"depth": 3}),
    ("share=2", {"share": 2.0}),
    ("loud=TRUE", {"loud": True}),
    ("kind=a=b", {"kind": "a=b"}),
    ("kind=7", {"kind": "7"}),
    ("side=right", {"side": "right"}),
    ("level=2", {"level": 2}),
    ("most=none", {"most": None}),
    ("most=8 depth=2", {"most": 8, "depth": 2}),
]


@pytest.mark.parametrize("words, wanted", CAST)
def test_words_and_values_of_python_give_one_run(many, words, wanted):
    """Each is of its field's type, and the run is that of `RunConfig(task_options=...)`."""
    said = tyro.cli(RunConfig, args=["--task-options", *words.split()], default=many)
    written = dataclasses.replace(many, task_options=wanted)
    found = options_of(said)
    assert found == options_of(written) == dict(seq_len=32, num_symbols=16) | wanted
    assert [type(found[name]) for name in wanted] == [type(value) for value in wanted.values()]
    assert run_id(plan(said, "mamba")) == run_id(plan(written, "mamba")) != run_id(plan(many, "mamba"))
    task = tasks.build("many", **json.loads(json.dumps(found)))
    assert {name: getattr(task, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    "given", [{"power": 0.01}, {"power": "0.01"}, {"random_fillers": True}, {"power": np.float64(0.01)}]
)
def test_asking_for_a_default_gives_the_run_of_not_asking(given):
    asked = plan(dataclasses.replace(BASE, task_options=given), "mamba")
    assert asked == plan(BASE, "mamba") and run_id(asked) == run_id(plan(BASE, "mamba"))


def test_integers_and_numbers_of_numpy_are_plain_numbers():
    one, two = ({"power": 1}, {"power": np.float32(1)})
    found = [options_of(dataclasses.replace(BASE, task_options=given))["power"] for given in (one, two)]
    assert found == [1.0, 1.0] and {type(power) for power in found} == {float}


BAD = [
    (
        {"deepth": 2},
        "no option 'deepth' .did you mean 'depth'..; it has depth, share, .*--seq-len, --layout, --num-sym",
    ),
    ({"depth": "x"}, "--task-options depth=x is not valid for task many; give an integer$"),
    ({"depth": 2.0}, "give an integer$"),
    ({"depth": True}, "give an integer$"),
    ({"depth": ""}, "--task-options depth has no value; give depth=VALUE"),
    ({"share": "nan"}, "give a number$"),
    ({"share": 10**400}, "give a number$"),
    ({"loud": 1}, "give true or false$"),
    ({"kind": 3}, "give text$"),
    ({"side": "up"}, "give one of left, right$"),
    ({"level": True}, "give one of 1, 2 or none$"),
    ({"most": "few"}, "give an integer or none$"),
    (
        {"names": ("a",)},
        r"options are int, float, bool, str, Literal or None, and it is tuple\[str, \.\.\.\]$",
    ),
    ({"num_symbols": 3}, "this option has a flag of its own; give --num-symbols 3"),
    ({"first_id": 3}, "no option 'first_id'"),
    ([("depth", 2)], "must be a mapping from names to values"),
]


@pytest.mark.parametrize("given, said", BAD)
def test_what_a_task_cannot_have_is_one_line(many, given, said):
    """The same in a plan, in a grid and in a sweep."""
    wrong = dataclasses.replace(many, task_options=given)
    for refused in (
        lambda: plan(wrong, "mamba"),
        lambda: grid(wrong, seed=1),
        lambda: Sweep(runs=[wrong]),
    ):
        with pytest.raises(UserError, match=said) as error:
            refused()
        assert "\n" not in str(error.value)


def test_options_are_an_axis_of_a_grid():
    runs = grid(BASE, task_options=[{"power": 0.5}, {"power": 2.0}], seed=(0, 1))
    assert [(run.task_options["power"], run.seed) for run in runs] == [(0.5, 0), (0.5, 1), (2.0, 0), (2.0, 1)]
    assert [run.task_options for run in grid(BASE, task_options={"power": 2.0})] == [{"power": 2.0}]
    assert len(set(runs)) == 4


def test_the_papers_switch_can_be_turned_on_alone():
    """supervise_bos is what `--protocol paper` sets; it is an option of the task as any other."""
    config = RunConfig(seq_len=16, queries=1, device="cpu", task_options={"supervise_bos": True})
    assert options_of(config)["supervise_bos"] is True
    paper = RunConfig(seq_len=16, protocol="paper", device="cpu", task_options={"supervise_bos": False})
    assert options_of(paper)["supervise_bos"] is False


def test_the_options_stand_in_the_runs_folder(tmp_path):
    config = dataclasses.replace(BASE, task_options={"random_fillers": False})
    begin(tmp_path / "run", config, plan(config, "mamba"))
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["run"]["task_options"] == {"random_fillers": False}
    assert kept["plan"]["task_options"] == dict(
        seq_len=32, num_symbols=8192, num_pairs=8, random_fillers=False
    )


def test_the_reports_command_gives_them_again():
    """What a page says a run was started with leads to the same run."""
    for given in ({}, {"power": 0.5, "random_fillers": False}):
        config = dataclasses.replace(BASE, task_options=given)
        asked = json.loads(json.dumps(vars(config)))
        empty = pd.DataFrame()
        page = Run({}, "", {}, asked, {}, empty, empty, {})
        assert ("--task-options" in page.train_command()) == bool(given)
        again = tyro.cli(RunConfig, args=shlex.split(page.train_command())[3:])
        assert plan(again, "mamba") == plan(config, "mamba")
