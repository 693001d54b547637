"""What a sweep is: a Python file whose `get_config()` returns a `Sweep`, most of it made by `grid`.

    from synthetic.grid import Sweep, grid

    def get_config():
        return Sweep(
            runs=grid(model=("transformer", "mamba"), seq_len=(16, 64), seed=(0, 1, 2), steps=800),
            learning_rates=(1e-3, 2e-3),
            validation_seeds=(100,),
        )

The learning rate is chosen among the candidates once for each `Group`: task, family, size, position scheme
and the like. Runs with the validation seeds decide; these seeds must not be among those reported.
"""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssm_retrieval import registry
from ssm_retrieval.errors import UserError
from ssm_retrieval.training.store import Row
from synthetic import options
from synthetic.config import RunConfig, check, check_names

NOT_SWEPT = ("out", "threads", "plan")  # a sweep has one of each, and trains


@dataclass(frozen=True)
class Sweep:
    """Runs of one model each, and how their learning rates are found.

    Attributes:
        runs: Configurations with different settings; repeated ones run once.
        learning_rates: Candidates; if empty, every run has its own `lr`, or the default.
        validation_seeds: Seeds of the runs that choose among the candidates.
        tune: Makes, from a group's first run, the configuration in which candidates are compared; by default
            that run itself. It may be cheaper, but a rate that is best for short contexts can fail at long
            ones.
        out: Folder of runs and results; default: `runs/<name>`, by the file's name, or its folder's if the
            file is called config.py.
        slurm: Parameters of submitit's AutoExecutor for `--executor slurm`, such as slurm_partition,
            timeout_min.

    Raises:
        UserError: In one line, for impossible combinations.
    """

    runs: Sequence[RunConfig]
    learning_rates: tuple[float, ...] = ()
    validation_seeds: tuple[int, ...] = ()
    tune: Callable[[RunConfig], RunConfig] = lambda run: run
    out: str | None = None
    slurm: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(len(self.runs) > 0, "runs is empty; give at least one RunConfig")
        for name in ("runs", "learning_rates", "validation_seeds"):
            value = getattr(self, name)
            check(isinstance(value, (tuple, list)), f"{name} {value!r} must be a list or tuple")
        for run in self.runs:
            _check_values(run)
            check(len(run.model) == 1, f"model {run.model} of a sweep's run must be a single one")
        both = set(self.validation_seeds) & {run.seed for run in self.runs}
        check(not both, f"seeds {sorted(both)} both choose learning rates and are reported; separate them")
        check(
            bool(self.learning_rates) == bool(self.validation_seeds),
            "learning_rates and validation_seeds need each other; give both or neither",
        )
        own = {run.lr for run in self.runs if run.lr is not None}
        check(
            not own or not self.learning_rates, f"lr {sorted(own)} contradicts learning_rates; leave one out"
        )


def grid(base: RunConfig | None = None, **axes: Any) -> list[RunConfig]:
    """`base` with every combination of the axes, the last one fastest; a single value is an axis of one.

        grid(model=("mamba", "mamba2"), seed=range(3))  # six runs
        grid(task="mqar", task_options=[{"power": 0.01}, {"power": 1.0}])  # two

    Raises:
        UserError: For options or values that `RunConfig` or the task does not have.
    """
    _known(axes)
    values = [list(v) if _several(v) else [v] for v in axes.values()]
    runs = []
    for combination in itertools.product(*values):
        plain = (v.item() if isinstance(v, np.generic) else v for v in combination)
        chosen = dict(zip(axes, plain, strict=True))
        if isinstance(chosen.get("model"), str):
            chosen["model"] = (chosen["model"],)
        run = dataclasses.replace(base or RunConfig(), **chosen)
        _check_values(run)
        runs.append(run)
    return runs


def _several(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, Mapping))


def _known(options: Mapping[str, Any]) -> None:
    valid = [f.name for f in dataclasses.fields(RunConfig) if f.name not in NOT_SWEPT]
    for name in options:
        check(name in valid, f"a sweep has no option {name!r}; valid: {', '.join(valid)}")


def _check_values(run: RunConfig) -> None:
    """Check types and choices, as the command line does; nothing else checks them in a Python file."""
    kinds = typing.get_type_hints(RunConfig)
    del kinds["task_options"]  # which `options.own` checks
    for name, kind in kinds.items():
        value = getattr(run, name)
        choices, types = _allowed(kind)
        for one in value if isinstance(value, tuple) else (value,):
            check(
                one in choices or (isinstance(one, types) and isinstance(one, bool) == (bool in types)),
                f"{name} {one!r} is not valid; "
                + (
                    f"choose from {', '.join(map(str, choices))}"
                    if choices
                    else f"its type is {getattr(kind, '__name__', kind)}"
                ),
            )
    check_names(run)
    options.own(run)


def _allowed(kind: Any) -> tuple[tuple[Any, ...], tuple[type, ...]]:
    """Choices (of Literals, and None) and plain types in a type hint; int counts as float."""
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind), ()
    if kind is type(None):
        return (None,), ()
    parts = [_allowed(part) for part in typing.get_args(kind) if part is not Ellipsis]
    if not parts:
        return (), (int, float) if kind is float else (kind,)
    return sum((p[0] for p in parts), ()), sum((p[1] for p in parts), ())


def load(file: Path) -> Sweep:
    """The Sweep of a Python file.

    Raises:
        UserError: In one line, if the file has none or raises an error itself.
    """
    check(file.is_file(), f"FILE {file} does not exist; give a Python file with a get_config()")
    check(file.suffix == ".py", f"FILE {file} is no Python file; its name ends in .py")
    try:
        module = registry.run_file(file)
        get_config: Callable[[], Sweep] | None = getattr(module, "get_config", None)
        if get_config is None:
            raise UserError("defines no get_config()")
        sweep = get_config()
    except Exception as error:  # anything: it is the user's program
        raise UserError(f"FILE {file}: {type(error).__name__}: {error}") from error
    check(isinstance(sweep, Sweep), f"FILE {file}: get_config() returns {type(sweep).__name__}, not a Sweep")
    return sweep


def default_out(file: Path) -> str:
    """`runs/<name>`: the file's name, or its folder's if the file is called config.py."""
    stem = file.resolve().parent.name if file.stem == "config" else file.stem
    return f"runs/{stem}"


class Group(NamedTuple):
    """What runs with one learning rate share; the fields are those of `RunConfig`."""

    task: str
    model: str
    preset: str  # or the checkpoint of --init
    position: str | None
    layers: int | None
    d_model: int | None
    d_conv: int | None
    window: int | None
    ssm_init: str | None
    rotary_pct: float
    growth: str | None


def group(run: RunConfig) -> Group:
    """The group of a run."""
    named = {name: getattr(run, name) for name in Group._fields}
    return Group(**named | {"model": run.model[0], "preset": run.init or run.preset})


def validation_runs(sweep: Sweep) -> dict[Group, dict[float, list[RunConfig]]]:
    """For every group, the runs that decide on each candidate, one per validation seed.

    Raises:
        UserError: If `tune` fails or returns no RunConfig.
    """
    first: dict[Group, RunConfig] = {}
    for run in sweep.runs:
        first.setdefault(group(run), run)
    try:
        tuned = {name: sweep.tune(run) for name, run in first.items()}
    except Exception as error:  # anything: it is the user's program
        raise UserError(f"tune: {type(error).__name__}: {error}") from error
    for run in tuned.values():
        check(isinstance(run, RunConfig), f"tune returns {type(run).__name__}, not a RunConfig")
        _check_values(run)
    return {
        name: {
            lr: [dataclasses.replace(run, lr=lr, seed=seed) for seed in sweep.validation_seeds]
            for lr in sweep.learning_rates
        }
        for name, run in tuned.items()
    }


def score(rows: Sequence[Row], total: int, by: str = "step") -> float:
    """Mean validation accuracy over a run's whole budget: it rewards learning fast and learning far.

    The accuracy between two evaluations counts as the earlier one's: 0 before the first, and the last one's
    after an early stop.

    Args:
        rows: The run's evaluations at its full length, in order, with the columns `by` and accuracy.
        total: The whole budget, in the unit of `by`.
        by: "step" or "examples".

    Returns:
        A number from 0 to 1.
    """
    at = np.minimum([0, *(row[by] for row in rows), total], total)
    accuracy = np.array([0.0, *(row["accuracy"] for row in rows)])
    return float((np.diff(at) * accuracy).sum() / total)


def choose(scores: Mapping[float, Sequence[float]]) -> float:
    """The candidate with the highest mean score; the smallest of equal ones."""
    return min(scores, key=lambda lr: (-float(np.mean(scores[lr])), lr))
