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
    """Write what runs learned, and what their probes found, into one HTML file that needs no network.

    RUNS are folders of synthetic.run or synthetic.sweep (runs/<id>), one or several, or a folder that holds
    such. Those that differ in nothing but the architecture are shown as one comparison; where
    `python -m probes.run` has been run on them, its tables are shown too.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs."""
    out: Path = Path("report.html")
    """The file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad input gives one line and status 2."""
    options = parse(Options, argv, "python -m analysis.report")
    return guarded(lambda: write(options), out=options.out)


def write(options: Options) -> int:
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
