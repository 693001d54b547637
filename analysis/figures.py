"""`python -m analysis.figures [RUNS]`: the paper's figures and tables, or those of your own runs."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ssm_retrieval.cli import Imports, guarded, parse
from ssm_retrieval.errors import UserError

if TYPE_CHECKING:  # seconds, in which Ctrl-C should already be heard
    import pandas as pd
    from matplotlib.figure import Figure

    from analysis.entries import Entry

FOLDER = Path("figures")
DIGITS = 10  # of numbers in CSV files


@dataclass(frozen=True)
class Options:
    """Draw the figures of your runs. Without RUNS, draw those of the paper and of this repository's studies.

    A folder of runs gives learning curves, costs against the context length, state sizes and accuracy by
    position (of synthetic.run or synthetic.sweep), or scores by resolution and layout (of vlm.evaluate).

    Runs that probes.run has probed (runs/<id>) give the figures of their probes, side by side.

    Every figure says whose numbers it shows. What cannot be drawn is left out, with a line that says why.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """A folder of runs or one of their Parquet files; or the folders of probed runs, one for each \
architecture."""
    published: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Draw only published numbers, and drawings."""
    columns: Literal[1, 2] = 2
    """Width of the figures of VLMs, in columns of a page. All other figures need both."""
    imports: Imports = ()
    """A Python module of yours that registers models or tasks (docs/extending.md). Runs name theirs \
themselves."""
    out: Path | None = None
    """Folder for the figures (PDF, SVG, PNG), the tables (Markdown, LaTeX), the CSV behind each, and \
index.json; by default figures/. Figures of probes (PDF, PNG) are by default put beside the probes' tables."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for bad input."""
    options = parse(Options, argv, "python -m analysis.figures")
    return guarded(lambda: _print_all(options), out=options.out or FOLDER)


def _print_all(options: Options) -> int:
    import matplotlib

    matplotlib.use("Agg")
    for line in write(options):
        print(line)
    return 0


def write(options: Options) -> Iterator[str]:
    """Write everything that the options ask for.

    Args:
        options: Those of the command line.

    Yields:
        One line for each figure or table that was written, then one for each that was left out.

    Raises:
        UserError: The sources are bad, or there is nothing in them to draw.
    """
    from ssm_retrieval import registry
    from ssm_retrieval.style import theme
    from ssm_retrieval.training.store import write_bytes

    if options.published and options.runs:
        raise UserError(f"--published and RUNS {options.runs[0]} exclude each other; give one of them")
    registry.use(options.imports)
    if (probed := probe_tables(options.runs)) is not None:
        yield from _probes(*probed, options.out)
        return
    if len(options.runs) > 1:
        raise UserError(f"RUNS {options.runs[1]}: several must be folders of runs (runs/<id>); give one")
    out = options.out or FOLDER
    index, left_out = [], []
    drawn = False
    with theme():
        for found in _entries(options):
            if isinstance(found, str):
                left_out.append(found)
                continue
            made, drawn = _write(out, found), True
            if found.draw is not None:
                about = dict(file=f"{found.name}.png", title=found.title, source=found.source)
                index.append(about | dict(caption=f"The table behind it: {found.name}.csv", files=made))
            yield f"{out / found.name}: {' '.join(sorted(file.rpartition('.')[2] for file in made))}"
    if not drawn:
        raise UserError(f"RUNS {options.runs[0]}: nothing to draw ({'; '.join(left_out)})")
    yield from left_out
    write_bytes(out / "index.json", (json.dumps(index, indent=2) + "\n").encode())


def _entries(options: Options) -> Iterator[Entry | str]:
    from analysis import entries
    from ssm_retrieval.style import DOUBLE, SINGLE

    width = {1: SINGLE, 2: DOUBLE}[options.columns]
    if options.runs:
        return entries.of_runs(options.runs[0], width)
    return entries.of_paper(width, studies=not options.published)


def _write(out: Path, entry: Entry) -> list[str]:
    """Write an entry's files; returns their names."""
    from ssm_retrieval.style import save
    from ssm_retrieval.training.store import write_bytes

    out.mkdir(parents=True, exist_ok=True)
    contents = {"csv": csv(entry.table)}
    contents |= {kind: text.encode() for kind, text in (entry.texts or {}).items()}
    for kind, content in contents.items():
        write_bytes(out / f"{entry.name}.{kind}", content)
    drawn: tuple[str, ...] = ()
    if entry.draw is not None:
        drawn = ("png", "pdf", "svg")
        save(labelled(entry.draw(), entry.source), out / entry.name, drawn, dpi=200)
    return [f"{entry.name}.{kind}" for kind in (*contents, *drawn)]


def csv(table: pd.DataFrame) -> bytes:
    """The CSV behind a figure, as UTF-8."""
    return table.to_csv(index=False, float_format=f"%.{DIGITS}g").encode()


def labelled(figure: Figure, source: str) -> Figure:
    """Write above the panels whose numbers the figure shows; a drawing shows none."""
    from analysis.entries import DRAWN

    if source != DRAWN:
        figure.suptitle(textwrap.fill(source, int(14 * figure.get_figwidth())), fontsize=7, color="0.35")
    return figure


# --- of the probes of runs ----------------------------------------------------------------------------------


def probe_tables(runs: Sequence[Path]) -> tuple[dict[str, Path], Path] | None:
    """Find the tables of probed runs.

    Args:
        runs: Folders of runs, or one folder of tables (`probes.run --out`).

    Returns:
        Family -> folder of its tables, and the folder for their figures; None if `runs` are neither.

    Raises:
        UserError: The runs have not been probed.
    """
    from probes.run import trained
    from ssm_retrieval.training import store

    if len(runs) == 1 and (names := _families(runs[0])):  # what probes.run --out has made
        return dict.fromkeys(names, runs[0]), runs[0]
    if not runs or not all((place / "config.json").is_file() for place in runs):
        return None
    models = trained(runs)
    places = {family: model.tables for family, model in models.items()}
    if not any(_families(place) for place in places.values()):
        asked = " ".join(map(str, runs))
        more = f", or give the folder that it lies in, {runs[0].parent}" if len(runs) == 1 else ""
        raise UserError(f"RUNS {asked}: not probed yet; run python -m probes.run {asked} first{more}")
    return places, store.view_of([model.folder for model in models.values()]) / "probes"


def _families(folder: Path) -> list[str]:
    """Families with tables of probes in a folder."""
    from analysis.plots import FIGURES

    return sorted({path.name.split(".")[1] for name in FIGURES for path in folder.glob(f"{name}.*.parquet")})


def _probes(places: dict[str, Path], own: Path, out: Path | None) -> Iterator[str]:
    """Draw the tables of probes.run, families side by side; yields a line on each figure."""
    from analysis.plots import FIGURES
    from probes.run import tables
    from ssm_retrieval.style import save, theme

    out = out or own
    out.mkdir(parents=True, exist_ok=True)
    drawn = False
    with theme():
        for name, draws in FIGURES.items():
            table = tables(places, name)
            if table is None:
                continue
            for suffix, draw in draws.items():
                if (figure := draw(table)) is None:
                    continue
                save(figure, out / f"{name}{suffix}")
                drawn = True
                yield f"{out / name}{suffix}.png .pdf"
    if not drawn:
        raise UserError("RUNS have only tables of another version; let probes.run make them again")


if __name__ == "__main__":
    sys.exit(main())
