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

HELP = 'the demo needs gradio: pip install -e ".[demo]"'


@dataclass(frozen=True)
class Options:
    """Open a page on this machine where two trained VLMs answer the same question. Ctrl-C stops it."""

    run_a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_A")]
    """The model on the left: a folder that vlm.train printed."""
    run_b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_B")]
    """The model on the right."""
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
    use_threads(options.threads)
    contestants = [Answerer.open(folder) for folder in (options.run_a, options.run_b)]
    try:
        app.serve(app.build(contestants), options.port)
    except OSError:
        raise UserError(f"--port {options.port} is not free; choose another one") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
