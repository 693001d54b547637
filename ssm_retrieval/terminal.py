"""The console of all commands: what is printed appears as it is, whatever a path or a name looks like."""

from __future__ import annotations

import os
import shutil
from typing import Any

from rich.console import Console


def plain_console(**options: Any) -> Console:
    """A console for which [brackets] and :names: are no markup. Colours come from styles and `Text`.

    COLUMNS=0, which some schedulers set, means an unknown width and not a terminal without columns.
    """
    if os.environ.get("COLUMNS", "").strip() == "0":
        options.setdefault("width", shutil.get_terminal_size().columns)
    return Console(markup=False, emoji=False, highlight=False, **options)
