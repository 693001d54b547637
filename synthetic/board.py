"""What a sweep shows: a live table of all runs on a terminal, a line per finished run elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ssm_retrieval.errors import UserError
from ssm_retrieval.training import store
from synthetic import records
from synthetic.jobs import NOTE, Job

STATES = ("running", "failed", "waiting", "done")  # in the order in which they are listed
COLORS = {"running": "yellow", "failed": "red", "waiting": "dim", "done": "green"}
FRAME = 5  # lines that the table needs beside its rows


class Board:
    """Follows the jobs of a sweep through the notes they leave in their folders."""

    def __init__(self, jobs: list[Job], console: Console, workers: str):
        self.jobs, self.console, self.workers = jobs, console, workers
        self.state = {job.folder: "done" if job.finished() else "waiting" for job in jobs}
        self.note: dict[Any, dict[str, Any]] = {}
        self.before = {job.folder: self._read(job) for job in jobs if not job.finished()}
        self.started = time.monotonic()
        self.live = Live(console=console, auto_refresh=False, get_renderable=self.table)
        for job in jobs:
            if job.finished():
                self._remember(job)

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self.live.start()
        else:
            done = sum(state == "done" for state in self.state.values())
            self.console.print(f"{len(self.jobs)} runs on {self.workers}, {done} of them finished before")
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.update(self.table(), refresh=True)
            self.live.stop()

    def refresh(self) -> None:
        """Look at the notes of all unfinished runs; costs a small file each."""
        if not self.console.is_terminal:
            return
        for job in self.jobs:
            if self.state[job.folder] in ("waiting", "running"):
                note = self._read(job)
                if note is not None and note != self.before.get(job.folder):
                    self.state[job.folder], self.note[job.folder] = "running", note
        self.live.refresh()

    def ended(self, job: Job, problem: str | None, final: bool) -> None:
        """A job has ended.

        Args:
            job: Job which.
            problem: What went wrong, in one line; None if nothing did.
            final: False if it will be tried again.
        """
        if problem is None:
            self.state[job.folder] = "done"
            self._remember(job)
        elif final:
            self.state[job.folder], self.note[job.folder] = "failed", {"problem": problem}
        else:
            self.state[job.folder] = "waiting"
        if not self.console.is_terminal:
            self.console.print(self._line(job, problem, final), soft_wrap=True)

    def _line(self, job: Job, problem: str | None, final: bool) -> str:
        counts = Counter(self.state.values())
        head = f"{counts['done'] + counts['failed']:>4}/{len(self.jobs)}  {job.folder.name:<58}"
        if problem is not None:
            return f"{head} failed{'' if final else ', will be tried again'}: {problem}"
        note = self.note[job.folder]
        return f"{head} {note['validation']:.3f} after {note['step']:>5} steps, {note['seconds']:.0f} s"

    def _read(self, job: Job) -> dict[str, Any] | None:
        try:
            return store.read_json(job.folder / NOTE)
        except (OSError, UserError):
            return None

    def _remember(self, job: Job) -> None:
        result = records.result(job.folder)
        self.note[job.folder] = dict(
            step=result["step"],
            length=result["train_length"],
            validation=result["accuracy"],
            seconds=result["seconds"],
        )

    def table(self) -> Group:
        """Counts, and as many runs as there is room for: running, failed, waiting, then done."""
        counts = Counter(self.state.values())
        room = max(3, self.console.height - FRAME)
        order = sorted(self.jobs, key=lambda job: STATES.index(self.state[job.folder]))
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), expand=True)
        table.add_column("run", ratio=1, no_wrap=True, overflow="ellipsis")
        for name in ("state", "step", "training at", "accuracy", "seconds"):
            table.add_column(name, justify="right", no_wrap=True)
        for job in order[:room]:
            table.add_row(Text(job.folder.name), *self._cells(job))
        spent = time.monotonic() - self.started
        text = ", ".join(f"{counts[state]} {state}" for state in STATES)
        hidden = f"; {len(order) - room} more not shown" if len(order) > room else ""
        return Group(Text(f"{text} of {len(self.jobs)} runs on {self.workers}, {spent:.0f} s{hidden}"), table)

    def _cells(self, job: Job) -> list[Text | str]:
        state, note = self.state[job.folder], self.note.get(job.folder, {})
        if "problem" in note:
            return [Text(state, style=COLORS[state]), "", "", Text(note["problem"][:40]), ""]
        total = f"/{job.plan.steps:,}" if job.plan.steps is not None else ""
        return [
            Text(state, style=COLORS[state]),
            f"{note['step']:,}{total}" if note else "",
            str(note["length"]) if note else "",
            f"{note['validation']:.3f}" if note else "",
            f"{note['seconds']:.0f}" if note else "",
        ]
