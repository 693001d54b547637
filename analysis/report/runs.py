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
from ssm_retrieval.training.records import environment
from ssm_retrieval.training.store import Row
from synthetic import records
from synthetic.config import RunConfig

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OF_A_MODEL = ("family", "model", "model_overrides", "lr", "init")  # in a plan: what a comparison is between
UNASKED = ("plan", "threads")  # options that a command to resume a run can do without


@dataclass(frozen=True)
class Run:
    """Runs of `synthetic.run` or `synthetic.sweep` with the same options, one for each architecture.

    folders: by family, in the order of every figure, as the user wrote them. letter: what tells this
    comparison apart on the page, "" where it is the only one. plans: by family. asked: the options it was
    started with. metrics: rows of metrics.jsonl; positions: of by_position.jsonl. results: by family, of
    those that have finished.
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
        """A probe's tables of all families; None where it has not been run. Raises UserError for damage."""
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
    """The comparisons of all runs in the order given. Raises UserError, in one line, for what is no run."""
    if not places:
        raise UserError("RUNS is missing; give one or several folders of runs (runs/<id>)")
    groups: list[tuple[Row, dict[str, Path]]] = []
    for folder in store.run_folders(places):
        saved = records.config(folder)
        plan, family = saved["plan"], saved["plan"]["family"]
        shared = {k: v for k, v in plan.items() if k not in OF_A_MODEL}
        shared |= {k: saved["run"].get(k) for k in ("lr", "preset", "layers", "init")}
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
    """One comparison. Raises UserError, in one line, if a file in it is damaged."""
    folders = {family: folders[family] for family in FAMILIES if family in folders}
    saved = {family: records.config(folder) for family, folder in folders.items()}
    asked: Row = {"model": list(saved)}
    for one in saved.values():  # options that an architecture lacks stand at their default in its run
        asked |= {k: v for k, v in one["run"].items() if k != "model" and v != getattr(RunConfig, k, None)}
    sessions = [
        environment(folder)["sessions"][-1]
        for folder in folders.values()
        if (folder / "environment.json").exists()
    ]
    return Run(
        folders=folders,
        letter=letter,
        plans={family: one["plan"] for family, one in saved.items()},
        asked=asked,
        environment=sessions[0] if sessions else {},
        metrics=pd.DataFrame([row for folder in folders.values() for row in records.metrics(folder)]),
        positions=pd.DataFrame([row for folder in folders.values() for row in records.by_position(folder)]),
        results={
            family: records.result(folder)
            for family, folder in folders.items()
            if (folder / "result.json").exists()
        },
    )
