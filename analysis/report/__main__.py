"""The command line of the report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ssm_retrieval.cli import guarded, parse
from ssm_retrieval.errors import MissingPackage

LARGE = 10_000_000  # bytes: what mail servers and browsers take without trouble


@dataclass(frozen=True)
class Options:
    """Put everything about your runs on one HTML page that works without a network.

    RUNS are folders of runs (runs/<id>) of synthetic.run or synthetic.sweep, or a folder of such folders.
    Runs that differ only in the architecture are shown side by side. If you have run probes.run on them, the
    page shows what it found, too.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, or a folder that holds them."""
    out: Path = Path("report.html")
    """The HTML file to write."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad input gives one line and status 2."""
    options = parse(Options, argv, "python -m analysis.report")
    return guarded(lambda: write(options), out=options.out)


def write(options: Options) -> int:
    """Write the report that the options ask for, as `page` makes it; returns the exit status 0.

    Raises:
        MissingPackage: Plotly or Jinja2 is not installed.
    """
    try:
        from analysis.report.page import page
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise MissingPackage(f'the report needs {package}: pip install -e ".[report]"') from error
    from analysis.report.runs import read_all
    from ssm_retrieval.training.store import write_bytes

    content = page(read_all(options.runs)).encode()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(options.out, content)
    print(f"{options.out}  {len(content) / 1e6:.1f} MB")
    if len(content) > LARGE:
        print(
            f"warning: {options.out} is larger than {LARGE / 1e6:.0f} MB and slow to open; give fewer RUNS",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
