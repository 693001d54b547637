"""What every training shows while it runs, wherever that is; a tool says what stands in it."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from typing_extensions import Self

PAUSE = 0.5  # seconds, at least, between two changes of a notebook's line


class Display:
    """A live bar on a terminal, a line that is kept up to date in a notebook, and lines elsewhere.

    Args:
        title: What is trained.
        console: Where to show it; a quiet one shows nothing.
        total: Steps, or whatever `show` counts; None if only `show` knows it.
        left: What stands before the time that remains.
    """

    def __init__(self, title: str, console: Console, total: int | None = None, left: str = "left"):
        self.title, self.console, self.total = title, console, total
        self.bar = Progress(
            TextColumn("{task.description:<11}", style="bold", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
            TextColumn(left),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=total, numbers="starting")
        self.notebook = _Notebook(title) if console.is_jupyter and not console.quiet else None

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def show(self, done: int, numbers: str, total: int | None = None, at_once: bool = False) -> None:
        """Move the bar, or a notebook's line.

        Args:
            done: How much of `total` is done.
            numbers: How it goes: a loss, an accuracy.
            total: If it was not known before.
            at_once: Whether a notebook's line changes even if it did a moment ago.
        """
        self.total = self.total if total is None else total
        self.bar.update(self.task, completed=done, total=self.total, numbers=numbers)
        if self.notebook is not None:
            self.notebook.show(f"{done:,}/{self.total or 0:,}  {numbers}", at_once)

    def line(self, text: str) -> None:
        """Print a line where there is neither a bar nor a notebook's line to look at."""
        if self.notebook is None and not self.console.is_terminal:
            self.console.print(text, soft_wrap=True)


class _Notebook:
    """One line of a notebook's output, which needs no widget."""

    def __init__(self, title: str):
        from IPython.display import display

        self.head = f"{title:<11}"
        self.handle: Any = display({"text/plain": self.head}, raw=True, display_id=True)
        self.told = 0.0

    def show(self, text: str, at_once: bool) -> None:
        if at_once or time.monotonic() - self.told > PAUSE:
            self.told = time.monotonic()
            self.handle.update({"text/plain": f"{self.head} {text}"}, raw=True)
