"""Run folders, read: what was asked, metrics, final results, and the tables of their probes.

Runs that differ in nothing but the architecture are one comparison, which the page shows side by side.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from ssm_retrieval.errors import UserError
from ssm_retrieval.style import FAMILIES, NAMES
from ssm_retrieval.training import store
from ssm_retrieval.training.records import environment, finished
from ssm_retrieval.training.store import Row
from synthetic import records
from synthetic.config import RunConfig
from synthetic.identity import Plan, comparison

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
UNASKED = ("plan", "threads")  # options that a command to resume a run can do without


@dataclass(frozen=True)
class Run:
    """A comparison: runs with the same options, one for each architecture.

    Attributes:
        folders: Family -> folder, in the order of every figure, as the user wrote them.
        letter: Tells this comparison apart on the page; "" where it is the only one.
        plans: Family -> plan.
        asked: The options that the runs were started with.
        environment: The machine and the packages of the last session.
        metrics: Rows of metrics.jsonl.
        positions: Rows of by_position.jsonl.
        results: Family -> result.json, of the runs that have finished.
    """

    folders: dict[str, Path]
    letter: str
    plans: dict[str, Row]
    asked: Row
    environment: Row
    metrics: pd.DataFrame
    positions: pd.DataFrame
    results: dict[str, Row]

    @property
    def name(self) -> str:
        """The names of its folders."""
        return ", ".join(folder.resolve().name for folder in self.folders.values())

    def title(self, family: str) -> str:
        """`Mamba`, or `Mamba, run A` where there are several runs."""
        return f"{NAMES[family]}, run {self.letter}" if self.letter else NAMES[family]

    def train_command(self) -> str:
        """The command line that began this run, and resumes it."""
        words = ["python -m synthetic.run"]
        for field in dataclasses.fields(RunConfig):
            value = self.asked.get(field.name, field.default)
            if field.name == "imports":
                words += [word for module in value for word in ("--import", shlex.quote(module))]
                continue
            if field.name == "task_options":
                own = self.asked.get(field.name, {}).items()
                words += ["--task-options", *(shlex.quote(f"{name}={v}") for name, v in own)] if own else []
                continue
            usual = list(field.default) if isinstance(field.default, tuple) else field.default
            if value != usual and value != field.default and field.name not in UNASKED:
                given = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
                words += ["--" + field.name.replace("_", "-"), *(shlex.quote(str(v)) for v in given)]
        return " ".join(words)

    def probe_command(self, probe: str) -> str:
        """The command line that makes a probe's tables."""
        folders = " ".join(shlex.quote(str(folder)) for folder in self.folders.values())
        return f"python -m probes.run {folders} --probe {probe}"

    def probe(self, name: str) -> pd.DataFrame | None:
        """A probe's tables of all families in one; None if it has not been run."""
        return _probe(name, tuple((family, folder / "probes") for family, folder in self.folders.items()))

    def left_out(self, probe: str) -> dict[str, str]:
        """Family -> why it has no table of a probe, in the words of probes.run."""
        from probes.run import LEFT_OUT

        found = {}
        for family, folder in self.folders.items():
            record = folder / "probes" / f"{probe}.{family}.json"
            if record.exists() and LEFT_OUT in (said := store.read_json(record)):
                found[family] = str(said[LEFT_OUT])
        return found


@cache
def _probe(name: str, places: tuple[tuple[str, Path], ...]) -> pd.DataFrame | None:
    from probes.run import tables

    return tables(dict(places), name)


def read_all(places: Sequence[Path]) -> list[Run]:
    """Read runs, and put those together that differ in nothing but the architecture.

    Args:
        places: Folders of runs, or folders that hold such.

    Returns:
        The comparisons, in the order in which their first runs are given.

    Raises:
        UserError: A place is no run, or there are more comparisons than letters.
    """
    if not places:
        raise UserError("RUNS is missing; give one or several folders of runs (runs/<id>)")
    groups: list[tuple[Row, dict[str, Path]]] = []
    for folder in store.run_folders(places):
        saved = records.config(folder)
        family = saved["plan"]["family"]
        shared = comparison(Plan(**saved["plan"]), saved["run"])
        group = next((g for s, g in groups if s == shared and family not in g), None)
        if group is None:
            groups.append((shared, {family: folder}))
        else:
            group[family] = folder
    if len(groups) > len(LETTERS):
        raise UserError(f"RUNS: {len(groups)} are too many to tell apart; give {len(LETTERS)} at most")
    letters = LETTERS if len(groups) > 1 else [""]
    return [read(folders, letter) for (_, folders), letter in zip(groups, letters, strict=False)]


def read(folders: Mapping[str, Path], letter: str = "") -> Run:
    """Read one comparison; a damaged file raises UserError.

    Args:
        folders: Family -> folder of its run.
        letter: What tells the comparison apart on the page.

    Returns:
        The comparison.
    """
    folders = {family: folders[family] for family in FAMILIES if family in folders}
    saved = {family: records.config(folder) for family, folder in folders.items()}
    asked: Row = {"model": list(saved)}
    for one in saved.values():  # options that an architecture lacks stand at their default in its run
        given = {k: v for k, v in one["run"].items() if k != "model" and v != getattr(RunConfig, k, None)}
        if given.get("position") == "none" and asked.get("position") == "rope":
            del given["position"]  # what `RunConfig.of` makes of rope for a state space model
        asked |= given
    sessions = [
        environment(folder)["sessions"][-1]
        for folder in folders.values()
        if (folder / store.ENVIRONMENT).exists()
    ]
    return Run(
        folders=folders,
        letter=letter,
        plans={family: one["plan"] for family, one in saved.items()},
        asked=asked,
        environment=sessions[0] if sessions else {},
        metrics=pd.DataFrame([row for folder in folders.values() for row in records.metrics(folder)]),
        positions=pd.DataFrame([row for folder in folders.values() for row in records.by_position(folder)]),
        results={family: records.result(folder) for family, folder in folders.items() if finished(folder)},
    )
