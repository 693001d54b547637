"""The tasks by name: `build("position", seq_len=1024, num_symbols=1024, layout="suffix")`.

A task is one file with one frozen dataclass derived from `Task`; adding it to `TASKS` makes it
known to the trainer, the command line and the tests that run over every task.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from ssm_retrieval.errors import UserError
from synthetic.tasks.base import Batch, Task
from synthetic.tasks.grid import Grid
from synthetic.tasks.induction import Induction
from synthetic.tasks.layouts import LAYOUTS
from synthetic.tasks.mqar import Mqar
from synthetic.tasks.ngram import Ngram, NgramDuplicate
from synthetic.tasks.position import Position, PositionVarlen
from synthetic.tasks.selective_copy import SelectiveCopy

__all__ = ["LAYOUTS", "TASKS", "Batch", "Task", "build", "names", "options"]

_ALL = (Position, PositionVarlen, Grid, Ngram, NgramDuplicate, Mqar, SelectiveCopy, Induction)
TASKS: dict[str, type[Task]] = {task.name: task for task in _ALL}


def names() -> list[str]:
    """Names of all tasks."""
    return list(TASKS)


def options(name: str) -> list[str]:
    """Names of the options of task `name`. Raises UserError if there is no such task."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; valid: {', '.join(TASKS)}")
    return [field.name for field in fields(TASKS[name])]


def build(name: str, **chosen: Any) -> Task:
    """The task `name` with the options `chosen`.

    Raises UserError, in one line, for unknown names and options (listing the valid ones), for a
    missing option and for values that the task rejects.
    """
    known = options(name)
    for option in chosen:
        if option not in known:
            raise UserError(f"task {name} has no option {option!r}; valid: {', '.join(known)}")
    for field in fields(TASKS[name]):
        if field.name not in chosen and field.default is MISSING:
            raise UserError(f"task {name} needs the option {field.name}")
    return TASKS[name](**chosen)
