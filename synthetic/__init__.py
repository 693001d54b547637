"""Synthetic in-context retrieval tasks, and the trainer that shows which architecture learns them.

run = synthetic.train(synthetic.RunConfig(model="mamba", seq_len=64))
synthetic.compare([run, other])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synthetic.config import RunConfig
    from synthetic.runs import Run, compare, train

__all__ = ["Run", "RunConfig", "compare", "train"]


def __getattr__(name: str) -> Any:
    """What is public, imported when asked for: torch takes seconds, which `import synthetic` can spare."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(
        importlib.import_module("synthetic.config" if name == "RunConfig" else "synthetic.runs"), name
    )
