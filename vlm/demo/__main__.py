"""Ask two trained VLMs the same question in a browser, and see what each one read and wrote."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ssm_retrieval.cli import guarded, parse, use_threads
from ssm_retrieval.errors import MissingPackage, UserError
from vlm.answering import Answerer
from vlm.demo import given

HELP = 'the demo needs gradio: pip install -e ".[demo]"'


@dataclass(frozen=True)
class Options:
    """Open a page on this machine where two trained VLMs answer the same question. Ctrl-C stops it.

    Without runs it shows the two of the quick start (vlm/configs/cpu_tiny.py, seed 0), which come with the
    toolkit.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN_A RUN_B")] = ()
    """The models on the left and on the right: folders that vlm.train printed."""
    port: int = 7860
    """The page is http://127.0.0.1:PORT."""
    threads: int = 0
    """CPU threads; 0 = PyTorch's default."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input."""
    options = parse(Options, argv, "python -m vlm.demo")
    return guarded(lambda: serve(options))


def serve(options: Options) -> int:
    """Open the page; returns the exit status when it is stopped.

    Raises:
        MissingPackage: If gradio is not installed.
        UserError: If a run is not trained, or the port is invalid or taken.
    """
    try:
        from vlm.demo import app
    except ImportError as error:
        raise MissingPackage(f"{HELP} ({error})") from error
    if not 1 <= options.port <= 65535:
        raise UserError(f"--port {options.port} must lie in 1 .. 65535; choose another one")
    if len(options.runs) not in (0, 2):
        raise UserError(f"{len(options.runs)} runs given; give two, or none for those of the toolkit")
    use_threads(options.threads)
    contestants = [Answerer.open(folder) for folder in options.runs or given()]
    try:
        app.serve(app.build(contestants), options.port)
    except OSError:
        raise UserError(f"--port {options.port} is not free; choose another one") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
