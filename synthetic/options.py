"""The options of a run's task: the fields of the task's own record, however they are given.

Some have a field of `RunConfig` and a flag of the same name, such as `num_symbols` and `--num-symbols`. All
others, a user's own among them, come through `task_options`:

    python -m synthetic.run --task mqar --task-options power=0.5 random_fillers=false
    RunConfig(task="mqar", task_options={"power": 0.5, "random_fillers": False})
"""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any

import tyro

from synthetic.checks import check, option
from synthetic.tasks import TASKS, Task

if TYPE_CHECKING:
    from synthetic.config import RunConfig

NO_OPTION = "first_id"  # set by --init
WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "none"}
TRUTH = {"true": True, "false": False}

# `task_options` on the command line: NAME=VALUE, any number of them; `own` casts the values.
TaskOptions = typing.Annotated[
    Mapping[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME=VALUE [...]]",
        instance_from_str=lambda words: {name: value for name, _, value in (w.partition("=") for w in words)},
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: [f"{name}={one}" for name, one in value.items()],
    ),
]


def flags(config: RunConfig) -> list[str]:
    """Fields of `RunConfig` that are options of tasks: those that one of the toolkit's tasks has."""
    ours = {field.name for name in TASKS.ours for field in fields(TASKS[name])}
    return [field.name for field in fields(config) if field.name in ours]


def chosen(config: RunConfig) -> dict[str, Any]:
    """The task's options that the user chose, by flag, `task_options` or protocol.

    Raises:
        UserError: For an option that the task lacks, or a value of another type.
    """
    task, paper = TASKS.find(config.task), config.protocol == "paper"
    having = [name for name, known in TASKS.items() if known.paper]
    check(
        not paper or task.paper is not None,
        f"--protocol paper is for {', '.join(having)}; leave it out for --task {config.task}",
    )
    known = {field.name for field in fields(task)}
    options: dict[str, Any] = {}
    for name in flags(config):
        value, default = getattr(config, name), getattr(type(config), name)
        check(
            name in known or value == default,
            f"{option(name)} {value} is no option of --task {config.task}; leave it out",
        )
        if name in known and value is not None:
            options[name] = value
    return options | dict.fromkeys(task.paper.switches if task.paper else (), paper) | own(config)


def own(config: RunConfig) -> dict[str, Any]:
    """`config.task_options`, each value of its field's type.

    Raises:
        UserError: For an option that the task lacks, one that has a flag, or a value of another type.
    """
    given = config.task_options
    check(
        isinstance(given, Mapping) and all(isinstance(name, str) for name in given),
        f"task_options {given!r} must be a mapping from names to values",
    )
    if not given:
        return {}
    flagged, kinds = flags(config), typing.get_type_hints(TASKS.find(config.task))
    known = [field.name for field in fields(TASKS[config.task]) if field.name != NO_OPTION]
    having = [name for name in known if name not in flagged] + [option(n) for n in flagged if n in known]
    found = {}
    for name, value in given.items():
        said = f"--task-options {name}={value}"
        near = difflib.get_close_matches(name, known, n=1)
        check(
            name in known,
            f"{said}: task {config.task} has no option {name!r}"
            + (f" (did you mean {near[0]!r}?)" if near else "")
            + f"; it has {', '.join(having)}",
        )
        check(name not in flagged, f"{said}: this option has a flag of its own; give {option(name)} {value}")
        check(value != "", f"--task-options {name} has no value; give {name}=VALUE")
        found[name] = _cast(value, kinds[name], f"{said} is not valid for task {config.task}")
    return found


def _cast(value: Any, kind: Any, said: str) -> Any:
    """The value as the first of the types in `kind` that can hold it; text is parsed."""
    parts = _parts(kind)
    unknown = [part for part in parts if part not in WORDS and typing.get_origin(part) is not typing.Literal]
    check(not unknown, f"{said}: options are int, float, bool, str, Literal or None, and it is {kind}")
    for part in parts:
        try:
            return _as(value, part)
        except (ValueError, OverflowError):
            continue
    choices = [", ".join(map(str, typing.get_args(part))) for part in parts if part not in WORDS]
    wanted = [f"one of {names}" for names in choices] + [WORDS[part] for part in parts if part in WORDS]
    check(False, f"{said}; give {' or '.join(wanted)}")


def _parts(kind: Any) -> Sequence[Any]:
    """The members of a union; any other type alone."""
    if typing.get_origin(kind) in (typing.Union, UnionType):
        return [part for member in typing.get_args(kind) for part in _parts(member)]
    return [kind]


def _as(value: Any, kind: Any) -> Any:
    """`value` as int, float, bool, str, None or one of a Literal's choices. Raises ValueError."""
    text = isinstance(value, str)
    if typing.get_origin(kind) is typing.Literal:
        for choice in typing.get_args(kind):
            if (type(value), value) == (type(choice), choice) or (text and value == str(choice)):
                return choice
    elif kind is NoneType and (value is None or (text and value.lower() == "none")):
        return None
    elif kind is bool and (isinstance(value, bool) or (text and value.lower() in TRUTH)):
        return TRUTH[value.lower()] if text else value
    elif kind is str and text:
        return value
    elif kind in (int, float) and not isinstance(value, bool) and (text or isinstance(value, (int, kind))):
        number = kind(value)
        if math.isfinite(number):
            return number
    raise ValueError(value)


def settled(task: Task, config: RunConfig) -> dict[str, Any]:
    """The options that are part of a run's identity: asking for a default gives the run of not asking.

    Those without a flag are left out at their default, so a new option with one keeps the names of runs. So
    are those that are younger than the task's runs.
    """
    always = {*flags(config), *(task.paper.switches if task.paper else ())} - {*task.younger}
    options = {
        field.name: getattr(task, field.name)
        for field in fields(task)
        if field.name in always or getattr(task, field.name) != field.default
    }
    if "min_seq_len" in options and task.lengths()[0] == task.seq_len:
        options["min_seq_len"] = None  # no other length is drawn
    return options
