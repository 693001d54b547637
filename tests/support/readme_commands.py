"""The commands that README and docs name."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import tyro

from synthetic.config import RunConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [README, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))]


def commands(text: str) -> list[str]:
    """The lines of a document that run the experiment, continued ones joined, without their comments."""
    lines = re.findall(r"^python -m synthetic\.run.*$", re.sub(r"\\\n\s*", "", text), flags=re.MULTILINE)
    return [line.partition("#")[0].strip() for line in lines]


def parsed(command: str) -> RunConfig:
    return dataclasses.replace(tyro.cli(RunConfig, args=shlex.split(command)[3:]), device="cpu")


COMMANDS = sorted({command for text in DOCUMENTS for command in commands(text)})
