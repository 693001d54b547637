"""The console of all commands: text appears as it is, whatever a path or a name looks like."""

from __future__ import annotations

import os
import shutil
from typing import Any

from rich.console import Console


def plain_console(**options: Any) -> Console:
    """A console that does not read [brackets] and :names: as markup. Colours come from styles and `Text`.

    COLUMNS=0, which some schedulers set, counts as an unknown width.
    """
    if os.environ.get("COLUMNS", "").strip() == "0":
        options.setdefault("width", shutil.get_terminal_size().columns)
    return Console(markup=False, emoji=False, highlight=False, **options)
