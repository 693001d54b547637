"""Records by name, ours and users': each stands in the file of the thing that it describes.

    ARCHITECTURES["mamba"]      the `Architecture` at the end of ssm_retrieval/models/mamba.py
    synthetic.tasks.TASKS       the same for tasks

A record of ours is imported when it is first read, so names cost nothing: a help page needs no torch. A
user's module registers its own records, and `--import my_module` (`use`) makes every command know them.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from ssm_retrieval.errors import UserError

Record = TypeVar("Record")
NAME = re.compile(r"[a-z][a-z0-9_.-]*")  # names are also those of folders
MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


class Registry(Mapping[str, Record], Generic[Record]):
    """Records by name, in the order of every table and figure: ours first, then users' as they came.

    Args:
        kind: What the records are, for errors: "model".
        ours: Maps a name to "module:attribute" of its record.
    """

    def __init__(self, kind: str, ours: Mapping[str, str]):
        self.kind, self.ours = kind, dict(ours)
        self._records: dict[str, Record] = {}
        self._theirs: dict[str, Record] = {}

    def __iter__(self) -> Iterator[str]:
        return iter((*self.ours, *self._theirs))

    def __len__(self) -> int:
        return len(self.ours) + len(self._theirs)

    def __contains__(self, name: object) -> bool:
        return name in self.ours or name in self._theirs

    def __getitem__(self, name: str) -> Record:
        if name in self._theirs:
            return self._theirs[name]
        if name not in self._records:
            module, _, attribute = self.ours[name].partition(":")
            self._records[name] = getattr(importlib.import_module(module), attribute)
        return self._records[name]

    def add(self, name: str, record: Record) -> None:
        """Make a user's record known. It replaces a user's earlier record with the same name.

        Args:
            name: Its name.
            record: The record.

        Raises:
            UserError: If the name is one of ours, or cannot be the name of a folder.
        """
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(f"a {self.kind} cannot be named {name!r}; use small letters, digits, -, _ and .")
        if name in self.ours:
            raise UserError(f"{self.kind} {name} is one of this toolkit's; give yours another name")
        self._theirs[name] = record

    def find(self, name: str) -> Record:
        """The record with this name.

        Raises:
            UserError: If there is none; the line has the nearest name and how to make one's own known.
        """
        if name in self:
            return self[name]
        raise UserError(self.unknown(name, list(self)))

    def unknown(
        self, name: str, valid: Sequence[str], nearest: str | None = None, shown: Sequence[str] | None = None
    ) -> str:
        """The error message for an unknown name.

        Args:
            name: The name.
            valid: All valid names.
            nearest: The name that was probably meant. Default: the most similar one.
            shown: How the message lists the valid names, where that is shorter.

        Returns:
            One line.
        """
        close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.6)
        near = nearest or (close[0] if close else None)
        hint = f" (did you mean {near!r}?)" if near else ""
        names = ", ".join(shown or valid)
        return (
            f"unknown {self.kind} {name!r}{hint}; valid: {names}; a {self.kind} of your own "
            "needs --import and the module that registers it"
        )


ARCHITECTURES: Registry[Any] = Registry(  # Any is `Architecture`, which needs torch and is a layer above
    "model",
    {
        "transformer": "ssm_retrieval.models.transformer:ARCHITECTURE",
        "mamba": "ssm_retrieval.models.mamba:ARCHITECTURE",
        "mamba2": "ssm_retrieval.models.mamba2:ARCHITECTURE",
        "mamba3": "ssm_retrieval.models.mamba3:ARCHITECTURE",
        "hybrid": "ssm_retrieval.models.hybrid:ARCHITECTURE",
        "linear": "ssm_retrieval.models.linear_ssm:ARCHITECTURE",
        "deltanet": "ssm_retrieval.models.deltanet:ARCHITECTURE",
        "gated-deltanet": "ssm_retrieval.models.gated_deltanet:ARCHITECTURE",
        "kda": "ssm_retrieval.models.kda:ARCHITECTURE",
        "gla": "ssm_retrieval.models.gla:ARCHITECTURE",
    },
)


def use(modules: Iterable[str], where: str = "") -> None:
    """Import users' modules, which register their records. The working directory is searched too.

    Args:
        modules: Names of modules.
        where: What names them, such as a run's folder, for errors. Default: the option `--import`.

    Raises:
        UserError: If a module is not found. What a module itself raises keeps its traceback.
    """
    for name in modules:
        if not MODULE.fullmatch(name) or name.endswith(".py"):
            raise UserError(f"--import {name} is no name of a module; for my_module.py give my_module")
        here = os.getcwd()
        if not {"", here} & {*sys.path}:
            sys.path.insert(0, here)
        importlib.invalidate_caches()
        try:
            importlib.import_module(name)
        except UserError as error:
            raise UserError(f"--import {name}: {error}") from error
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if name != missing and not name.startswith(f"{missing}."):
                raise  # the module is there, and itself lacks one
            said = f"{where} was made with --import {name}, but" if where else f"--import {name}:"
            raise UserError(
                f"{said} there is no module {missing}; run the command in the folder of {missing}.py, or add "
                "that folder to PYTHONPATH"
            ) from error


def run_file(path: Path) -> ModuleType:
    """Run a user's Python file, such as a config file.

    As after an import, it is in `sys.modules`, where dataclasses look for the module of a class.

    Args:
        path: The file. What it raises keeps its traceback.

    Returns:
        The module.
    """
    name = f"_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, f"the name of {path} must end in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
