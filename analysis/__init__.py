"""Statistics, curves and figures from the tables that runs leave behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssm_retrieval.training.tables import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`load`, imported when asked for: commands answer Ctrl-C before torch and pandas are there."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ssm_retrieval.training.tables import load

    return load
