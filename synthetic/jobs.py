"""A run of a sweep as a job, which an executor (`ssm_retrieval.training.executors`) can send anywhere."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthetic.config import Plan, RunConfig

HEARTBEAT = 1.0  # seconds between the notes that a run leaves for the live table
NOTE = "progress.json"


@dataclass(frozen=True)
class Job:
    """One model to be trained in its folder.

    Attributes:
        config: What was asked for.
        plan: What `config` comes to.
        folder: Folder of the run.
        purpose: "report", or "validation" for runs that choose a learning rate.
        threads: CPU threads that it may use.
    """

    config: RunConfig
    plan: Plan
    folder: Path
    purpose: str = "report"
    threads: int = 1

    def finished(self) -> bool:
        """Whether the run has its result."""
        from ssm_retrieval.training import records

        return records.finished(self.folder)

    def bring_up_to_date(self) -> None:
        """Mend what a kill after a run's last word, or another sweep's purpose for the run, left behind."""
        from ssm_retrieval.training import store
        from synthetic import records, results

        if not self.finished():
            return
        saved = records.config(self.folder)
        if saved.get("purpose") != self.purpose:
            store.write_json(self.folder / store.CONFIG, saved | {"purpose": self.purpose})
        elif not results.behind(self.folder, self.purpose):
            return
        results.record(self.folder)

    def train(self) -> None:
        """Train the model, resuming what is there, and keep its part of the results store up to date.

        The caller holds the folder's lock.
        """
        from ssm_retrieval import registry
        from ssm_retrieval.training import store
        from synthetic import memory
        from synthetic.results import begin, train_recorded

        told = 0.0

        def listener(event: str, row: dict[str, Any]) -> None:
            nonlocal told
            if event == "step" and time.monotonic() - told > HEARTBEAT:
                told = time.monotonic()
                note = {key: row[key] for key in ("step", "length", "accuracy", "validation", "seconds")}
                store.write_json(self.folder / NOTE, note)

        registry.use(self.config.imports)
        memory.require(self.plan)
        begin(self.folder, self.config, self.plan, self.purpose)
        train_recorded(self.plan, self.folder, listener)
