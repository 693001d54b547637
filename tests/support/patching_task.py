"""The task on which patching is tested."""

from __future__ import annotations

from synthetic import tasks

POSITION_TYPE = ("position", "position-varlen", "grid")
TASK = tasks.build("position", seq_len=8, num_symbols=24)
