"""The console of the commands: it prints names and paths of users, as they are."""

from __future__ import annotations

from typing import Any


def plain_console(**options: Any) -> Any:
    """rich's Console without markup, emoji and highlighting: brackets and colons mean themselves."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)
