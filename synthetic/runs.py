"""Runs from Python, what `python -m synthetic.run` is in a shell:

import synthetic
from synthetic import RunConfig

run = synthetic.train(RunConfig(model="mamba", seq_len=64))
run.metrics                        # DataFrame, a row per evaluation
run.model()                        # the trained model
run.by_length                      # its final accuracy at every context length
synthetic.compare([run, other])    # both, and their learning curves
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ssm_retrieval.errors import UserError
from ssm_retrieval.training import store
from ssm_retrieval.training.records import finished
from synthetic import records
from synthetic.config import Plan, RunConfig, plan, run_id

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from ssm_retrieval.models import LanguageModel
    from synthetic.tasks import Task


@dataclass(frozen=True)
class Run:
    """A run in its folder, from `train` or from an earlier session: `Run(Path("runs/<id>"))`.

    Everything is read from the folder when it is asked for, and raises UserError, in one line, for what is
    damaged or not there yet.
    """

    folder: Path

    @cached_property
    def plan(self) -> Plan:
        """Every option of the run, settled."""
        return Plan(**records.config(self.folder)["plan"])

    @cached_property
    def task(self) -> Task:
        """What it was trained on."""
        from synthetic import tasks

        return tasks.build(self.plan.task, **self.plan.task_options)

    @property
    def metrics(self) -> pd.DataFrame:
        """A row per evaluation in training: step, tokens, length, accuracy, ci_low, ci_high, ..."""
        return metrics_of([self])

    @property
    def by_position(self) -> pd.DataFrame:
        """Final accuracy by the target's position: position, correct, count, rate, ci_low, ci_high."""
        import pandas as pd

        return pd.DataFrame(records.by_position(self.folder))

    @property
    def by_length(self) -> pd.DataFrame:
        """Final accuracy by context length: length, accuracy, ci_low, ci_high, chance, ..."""
        import pandas as pd

        return pd.DataFrame(records.by_length(self.folder))

    @property
    def result(self) -> dict[str, Any]:
        """The final evaluation: accuracy, ci_low, ci_high, step, tokens, parameters, ...

        Raises:
            UserError: If the run has not finished, or its file is damaged.
        """
        if not finished(self.folder):
            raise UserError(f"{self.folder} has not finished; train it with the same options")
        return records.result(self.folder)

    def model(self) -> LanguageModel:
        """The trained model, on the CPU, ready for inference."""
        model: LanguageModel = store.load_model(self.folder)
        return model


def train(config: RunConfig, progress: bool = True) -> Run:
    """Train the one model of `config` in <config.out>/<id>/, resume it there, or find it finished.

    Numbers, files and folder are those of `python -m synthetic.run` with the same options. Another process
    that trains the same is waited for.

    Args:
        config: Config of one model.
        progress: Whether to show a bar on a terminal, a line in a notebook, a line per evaluation elsewhere.

    Returns:
        The finished run.

    Raises:
        UserError: For impossible options, several models, or a folder of an older version.
    """
    from ssm_retrieval.ops.memory import keep_freed_memory
    from ssm_retrieval.terminal import plain_console
    from synthetic import memory
    from synthetic.display import Display
    from synthetic.results import begin, complete, train_recorded

    if len(config.model) != 1:
        raise UserError(
            f"model {' '.join(config.model) or '()'} is not one; train them one by one: "
            "[train(config.of(name)) for name in config.model]"
        )
    settled = plan(config, config.model[0])
    folder = Path(config.out) / run_id(settled)
    if complete(folder):
        return Run(folder)
    memory.require(settled)
    keep_freed_memory()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"), Display(settled, plain_console(quiet=not progress)) as display:
        begin(folder, config, settled)
        train_recorded(settled, folder, display)
    return Run(folder)


def compare(runs: Iterable[Run]) -> Figure:
    """Runs of different architectures, drawn together, as `synthetic.run` draws them.

    Raises:
        UserError: For no run, runs of different lengths, or two of one architecture.
    """
    from ssm_retrieval.training.learning_curve import outcome

    runs = list(runs)
    lengths = sorted({run.plan.seq_len for run in runs})
    families = [run.plan.family for run in runs]
    if len(lengths) != 1:
        raise UserError(f"runs have the lengths {lengths}; compare runs of one length")
    if len(set(families)) != len(families):
        raise UserError(f"runs are of {', '.join(families)}; compare one of each architecture")
    return outcome(lengths_of(runs), metrics_of(runs))


def lengths_of(runs: Iterable[Run]) -> pd.DataFrame:
    """Final accuracies by context length of several runs, one below the other.

    A run of before there was such a file has its one final evaluation.
    """
    import pandas as pd

    return pd.DataFrame([row for run in runs for row in records.by_length(run.folder) or [run.result]])


def metrics_of(runs: Iterable[Run]) -> pd.DataFrame:
    """Evaluations of several runs, one below the other."""
    import pandas as pd

    return pd.DataFrame([row for run in runs for row in records.metrics(run.folder)])
