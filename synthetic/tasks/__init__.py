"""The tasks by name: `build("position", seq_len=1024, num_symbols=1024, layout="suffix")`.

A task is one file with one frozen dataclass derived from `Task`, which says everything about itself: name,
options and their defaults, a line for the help page, its paper's schedule. A line in `TASKS` makes it known
to the trainer, the command line and the tests that run over every task. `register` does so for a user's own
task (docs/extending.md).
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, TypeVar

from ssm_retrieval.errors import UserError
from ssm_retrieval.registry import Registry
from synthetic.tasks.base import Batch, Course, Task
from synthetic.tasks.layouts import LAYOUTS

__all__ = ["LAYOUTS", "TASKS", "Batch", "Course", "Task", "build", "names", "options", "register"]

Kind = TypeVar("Kind", bound=type[Task])

TASKS: Registry[type[Task]] = Registry(
    "task",
    {
        "position": "synthetic.tasks.position:Position",
        "position-varlen": "synthetic.tasks.position:PositionVarlen",
        "grid": "synthetic.tasks.grid:Grid",
        "ngram": "synthetic.tasks.ngram:Ngram",
        "ngram-duplicate": "synthetic.tasks.ngram:NgramDuplicate",
        "mqar": "synthetic.tasks.mqar:Mqar",
        "selective-copy": "synthetic.tasks.selective_copy:SelectiveCopy",
        "induction": "synthetic.tasks.induction:Induction",
    },
)


def register(task: Kind) -> Kind:
    """Make a user's task known, as a decorator of its class: `@tasks.register`.

    Registering a name again replaces the task, so a notebook's cell can be run again.

    Raises:
        UserError: If the class has no name, version or help, or has the name of one of the toolkit's tasks.
    """
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UserError(f"{task!r} is no class derived from synthetic.tasks.Task; derive one")
    for what in ("name", "version", "help"):
        if not getattr(task, what, None):
            raise UserError(f"task {task.__name__} has no {what}; give it as a class variable")
    TASKS.add(task.name, task)
    return task


def names() -> list[str]:
    """Names of all tasks."""
    return list(TASKS)


def options(name: str) -> list[str]:
    """Names of the options of task `name`.

    Raises:
        UserError: If there is no such task.
    """
    return [field.name for field in fields(TASKS.find(name))]


def build(name: str, **chosen: Any) -> Task:
    """The task `name` with the options `chosen`.

    Raises:
        UserError: For an unknown task or option (the error lists the valid ones), a missing option, and
            values that the task rejects.
    """
    known = options(name)
    for option in chosen:
        if option not in known:
            raise UserError(f"task {name} has no option {option!r}; valid: {', '.join(known)}")
    for field in fields(TASKS[name]):
        if field.name not in chosen and field.default is MISSING:
            raise UserError(f"task {name} needs the option {field.name}")
    return TASKS[name](**chosen)
