"""`python -m analysis.figures [RUNS]`: the paper's figures and tables, or those of one run's probes."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import tyro
from matplotlib.figure import Figure

from analysis import curves, diagrams, published, vlm_plots
from analysis.plots import FIGURES
from ssm_retrieval import registry
from ssm_retrieval.cli import Imports, guarded, parse
from ssm_retrieval.errors import UserError
from ssm_retrieval.style import DOUBLE, SINGLE, save, theme
from ssm_retrieval.training import store
from ssm_retrieval.training.store import write_bytes
from ssm_retrieval.training.tables import concatenated, files, load

STUDIES = Path(__file__).resolve().parent.parent / "studies"
SYNTHETIC, VLM = "retrieval_cpu", "vlm_cpu"  # studies whose committed tables are drawn by default
ABSENT = "the studies' tables come with the repository, not with the package; give your own RUNS"
DRAWN = "a drawing, no measurement"
FOLDER = Path("figures")
WIDTHS = {1: SINGLE, 2: DOUBLE}


@dataclass(frozen=True)
class Options:
    """Draw the figures of the paper and this toolkit's own beside them.

    Without options: what is published, and the tables of the studies in this repository. Every figure says
    which of the two it shows. What a source does not have is left out, with a line that says why.
    Of runs that probes.run has probed (runs/<id>) the figures of their probes, side by side.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Your own runs instead of the studies: a folder with results of synthetic.run, synthetic.sweep or
vlm.evaluate, or one of their Parquet files; or the folders of probed runs, one for each architecture."""
    published: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only what is published, and drawings."""
    columns: Literal[1, 2] = 2
    """How wide figures of VLMs' results are, in columns of a page. Drawings and the synthetic task's curves \
need both."""
    imports: Imports = ()
    """A Python module of yours that registers models or tasks (docs/extending.md); runs name theirs \
themselves."""
    out: Path | None = None
    """Folder for figures (PDF, SVG, PNG), tables (Markdown, LaTeX), the CSV behind each and index.json; by \
default figures/. Figures of probes (PDF, PNG) stand beside the probes' tables by default."""


@dataclass(frozen=True)
class Entry:
    """One figure or table: its name, title, source, and the table behind it; draw None: the table only."""

    name: str
    title: str
    source: str
    table: pd.DataFrame
    draw: Callable[[], Any] | None = None
    texts: dict[str, str] | None = None  # files of text beside it, by ending


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input."""
    options = parse(Options, argv, "python -m analysis.figures")
    return guarded(lambda: _print_all(options), out=options.out or FOLDER)


def _print_all(options: Options) -> int:
    import matplotlib

    matplotlib.use("Agg")
    for line in write(options):
        print(line)
    return 0


def write(options: Options) -> Iterator[str]:
    """Write everything that the options ask for; yields a line on each. Raises UserError for bad sources."""
    if options.published and options.runs:
        raise UserError(f"--published and RUNS {options.runs[0]} exclude each other; give one of them")
    registry.use(options.imports)
    if (probed := probe_tables(options.runs)) is not None:
        yield from _probes(*probed, options.out)
        return
    if len(options.runs) > 1:
        raise UserError(f"RUNS {options.runs[1]}: several must be folders of runs (runs/<id>); give one")
    out = options.out or FOLDER
    out.mkdir(parents=True, exist_ok=True)
    index = []
    with theme():
        for found in entries(options):
            if isinstance(found, str):
                yield found
                continue
            made = _write(out, found)
            if found.draw is not None:
                about = dict(file=f"{found.name}.png", title=found.title, source=found.source)
                index.append(about | dict(caption=f"The table behind it: {found.name}.csv", files=made))
            yield f"{out / found.name}: {' '.join(sorted(file.rpartition('.')[2] for file in made))}"
    write_bytes(out / "index.json", (json.dumps(index, indent=2) + "\n").encode())


def probe_tables(runs: Sequence[Path]) -> tuple[dict[str, Path], Path] | None:
    """Family -> folder of its probes' tables, and the folder of their figures; None for other places.

    Raises UserError for runs that have not been probed.
    """
    from probes.run import trained

    if len(runs) == 1 and (names := list(_families(runs[0]))):  # what probes.run --out has made
        return dict.fromkeys(names, runs[0]), runs[0]
    if not runs or not all((place / "config.json").is_file() for place in runs):
        return None
    models = trained(runs)
    places = {family: model.tables for family, model in models.items()}
    if not any(list(_families(place)) for place in places.values()):
        asked = " ".join(map(str, runs))
        more = f", or give the folder that it lies in, {runs[0].parent}" if len(runs) == 1 else ""
        raise UserError(f"RUNS {asked}: not probed yet; run python -m probes.run {asked} first{more}")
    return places, store.view_of([model.folder for model in models.values()]) / "probes"


def _families(folder: Path) -> Iterator[str]:
    """Families with tables of probes in a folder."""
    found = {path.name.split(".")[1] for name in FIGURES for path in folder.glob(f"{name}.*.parquet")}
    return iter(sorted(found))


def _probes(places: dict[str, Path], own: Path, out: Path | None) -> Iterator[str]:
    """Draw the tables of probes.run, families side by side; yields a line on each figure."""
    from probes.run import tables

    out = out or own
    out.mkdir(parents=True, exist_ok=True)
    drawn = False
    with theme():
        for name, draws in FIGURES.items():
            table = tables(places, name)
            if table is None:
                continue
            for suffix, draw in draws.items():
                save(draw(table), out / f"{name}{suffix}")
                drawn = True
                yield f"{out / name}{suffix}.png .pdf"
    if not drawn:
        raise UserError("RUNS have tables of another version only; let probes.run make them again")


def entries(options: Options) -> Iterator[Entry | str]:
    """Figures in the order of the paper, or a line on why one is left out."""
    asked = diagrams.task_table()
    yield Entry("fig1_architecture", "Mamba-VL and Pythia-VL", DRAWN, _parts(), diagrams.architecture)
    yield Entry(
        "fig2_tasks", "What each task asks and answers", DRAWN, asked, lambda: diagrams.task_overview(asked)
    )
    yield from _vlm(options)
    tokens = diagrams.synthetic_table()
    yield Entry("fig5_synthetic_task", "The synthetic retrieval task", DRAWN, tokens,
                lambda: diagrams.synthetic_task(tokens))  # fmt: skip
    yield from _synthetic(options)
    if not options.runs:
        yield from _published(WIDTHS[options.columns])


def _parts() -> pd.DataFrame:
    """Lengths of the sequence that Fig. 1 draws."""
    from vlm.layout import grid_side, image_ids

    rows = [
        dict(pixels=pixels, grid=grid_side(pixels), patches=grid_side(pixels) ** 2,
             image_tokens=len(image_ids(grid_side(pixels))))
        for pixels in (224, 336, 480)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _published(width: float) -> Iterator[Entry]:
    table = published.results()
    gaps, means = published.gaps(table), published.mean_gaps(table)
    yield Entry("gap_vs_scale", "Grounding gap against scale", published.SOURCE, gaps,
                lambda: vlm_plots.gap_vs_scale(table, width))  # fmt: skip
    yield Entry("mean_gaps", "Mean gaps, with and without the suspect cell", published.SOURCE, means)
    texts = {"md": vlm_plots.markdown(table), "tex": vlm_plots.latex(table)}
    yield Entry("results", "Published results", published.SOURCE, table, texts=texts)


def _vlm(options: Options) -> Iterator[Entry | str]:
    """Figs. 3 and 4: the paper's own numbers of them are published nowhere that could be read."""
    names = ("fig3_resolution", "fig4_layouts")
    if options.published:
        for name in names:
            yield f"{name}: left out, its numbers are in the paper's figure only; it is drawn from runs"
        return
    place = options.runs[0] if options.runs else STUDIES / VLM / "results.parquet"
    found = _table(place, "metric")
    if not place.exists():
        for name in names:
            yield f"{name}: left out, {ABSENT}"
        return
    if found is None:
        for name in names:
            yield f"{name}: left out, {place} has no results of vlm.evaluate"
        return
    source = f"measured: {'your runs' if options.runs else f'studies/{VLM}'}"
    for name, title, make, draw in (
        (names[0], "Resolution", vlm_plots.resolution_table, vlm_plots.resolution),
        (names[1], "Layouts against agnostic", vlm_plots.layout_table, vlm_plots.layouts),
    ):
        table = make(found)
        if table.empty:
            what = "resolution" if name == names[0] else "layout"
            yield f"{name}: left out, the runs have one {what} only"
        else:
            yield Entry(name, title, source, table, partial(draw, table, WIDTHS[options.columns]))


def _synthetic(options: Options) -> Iterator[Entry | str]:
    if options.published:
        yield "synthetic curves: left out, the paper's numbers of them are in its figure only"
        return
    place = options.runs[0] if options.runs else STUDIES / SYNTHETIC
    found = _table(place, "accuracy")
    if not place.exists():
        yield f"synthetic curves: left out, {ABSENT}"
        return
    if found is None:
        yield f"synthetic curves: left out, {place} has no results of synthetic.run"
        return
    if "metric" not in found:  # of synthetic.run alone: once more, with everything that curves need
        found = load(place)
    beside = load(place, "targets") if files(place, "targets") else None
    evaluations, targets, early = curves.reported(found, beside)
    if early:
        yield f"synthetic curves: {early} runs have no evaluation at their full length yet and are left out"
    elif evaluations.empty:
        yield f"synthetic curves: left out, {place} has no reported runs yet, only validation"
    source = f"measured: {'your runs' if options.runs else f'studies/{SYNTHETIC}'}"
    for task in sorted(evaluations["task"].unique()):
        for name, drawn, draw in curves.figures(*(t[t["task"] == task] for t in (evaluations, targets))):
            if len(drawn):
                yield Entry(f"{task}_{name}", f"{task}: {name.replace('_', ' ')}", source, drawn, draw)


def _table(place: Path, column: str) -> pd.DataFrame | None:
    """The results table at `place`, if it has this column. Raises UserError where nothing can be read."""
    if not place.exists():
        if place.is_relative_to(STUDIES):
            return None
        raise UserError(f"RUNS {place} does not exist; give a folder of runs or a results.parquet")
    found = concatenated(files(place))
    return found if found is not None and column in found.columns else None


def _write(out: Path, entry: Entry) -> list[str]:
    """Write an entry's files; returns their names."""
    contents = {"csv": curves.csv(entry.table)}
    contents |= {kind: text.encode() for kind, text in (entry.texts or {}).items()}
    for kind, content in contents.items():
        write_bytes(out / f"{entry.name}.{kind}", content)
    drawn: tuple[str, ...] = ()
    if entry.draw is not None:
        drawn = ("png", "pdf", "svg")
        save(labelled(entry.draw(), entry.source), out / entry.name, drawn, dpi=200)
    return [f"{entry.name}.{kind}" for kind in (*contents, *drawn)]


def labelled(figure: Figure, source: str) -> Figure:
    """The same figure, which now says above its panels whose numbers it shows; a drawing shows none."""
    if source != DRAWN:
        figure.suptitle(textwrap.fill(source, int(14 * figure.get_figwidth())), fontsize=7, color="0.35")
    return figure


if __name__ == "__main__":
    sys.exit(main())
