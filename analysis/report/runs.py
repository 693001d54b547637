"""A run folder, read: what was asked, metrics, final results, and the tables of its probes."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from ssm_retrieval.errors import UserError
from ssm_retrieval.style import FAMILIES, NAMES
from ssm_retrieval.training import records
from ssm_retrieval.training.store import Row
from synthetic.config import RunConfig

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
UNASKED = ("plan", "threads")  # options that a command to resume a run can do without


@dataclass(frozen=True)
class Run:
    """One folder of `synthetic.run` or `synthetic.sweep`.

    folder: as the user wrote it. letter: what tells it apart on the page, "" where it is the only one.
    plans: by family, in the order of every figure. asked: the options it was started with. metrics: rows of
    metrics.jsonl; positions: of by_position.jsonl. results: by family, of those that have finished.
    """

    folder: Path
    letter: str
    plans: dict[str, Row]
    asked: Row
    environment: Row
    metrics: pd.DataFrame
    positions: pd.DataFrame
    results: dict[str, Row]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

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
        return f"python -m probes.run {shlex.quote(str(self.folder))} --probe {probe}"

    def probe(self, name: str) -> pd.DataFrame | None:
        """A probe's tables of all families; None where it has not been run. Raises UserError for damage."""
        return _probe(self.folder / "probes", name, tuple(self.plans))

    def left_out(self, probe: str) -> dict[str, str]:
        """Family -> why it has no table of a probe, in the words of probes.run."""
        try:
            text = (self.folder / "probes" / "summary.md").read_text(encoding="utf-8")
        except OSError:
            return {}
        return dict(re.findall(rf"^- {probe} (\w+): left out, (.*)$", text, flags=re.MULTILINE))


@cache
def _probe(folder: Path, name: str, families: tuple[str, ...]) -> pd.DataFrame | None:
    from probes.run import tables

    return tables(folder, name, families)


def read_all(folders: Sequence[Path]) -> list[Run]:
    """Every run once, in the order given. Raises UserError, in one line, for what is not a run's folder."""
    if not folders:
        raise UserError("RUNS is missing; give one or several folders of runs (runs/<id>)")
    distinct = list({folder.resolve(): folder for folder in folders}.values())
    if len(distinct) > len(LETTERS):
        raise UserError(f"RUNS: {len(distinct)} are too many to tell apart; give {len(LETTERS)} at most")
    letters = LETTERS if len(distinct) > 1 else [""]
    return [read(folder, letter) for folder, letter in zip(distinct, letters, strict=False)]


def read(folder: Path, letter: str = "") -> Run:
    """One run. Raises UserError, in one line, if the folder is not a run's or a file in it is damaged."""
    if not (folder / "config.json").is_file():
        raise UserError(f"RUNS {folder} has no config.json; give folders of runs (runs/<id>)")
    saved = records.config(folder)
    plans = {plan["family"]: plan for plan in saved["plans"]}
    environment = folder / "environment.json"
    return Run(
        folder=folder,
        letter=letter,
        plans={family: plans[family] for family in FAMILIES if family in plans},
        asked=saved["run"],
        environment=records.environment(folder)["sessions"][-1] if environment.exists() else {},
        metrics=pd.DataFrame(records.metrics(folder)),
        positions=pd.DataFrame(records.by_position(folder)),
        results={
            family: records.result(folder / family)
            for family in plans
            if (folder / family / "result.json").exists()
        },
    )
