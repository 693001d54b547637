"""`python -m vlm.evaluate RUN`: ask trained VLMs, score their answers, write the table of results."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import Tensor

from ssm_retrieval import registry
from ssm_retrieval.cli import Imports, guarded, parse, use_threads
from ssm_retrieval.errors import UserError
from ssm_retrieval.terminal import plain_console
from vlm import components, folders, results
from vlm.answering import answer_prompts, default_device, load
from vlm.config import Data, Run, read_file
from vlm.data.samples import Sample, Source
from vlm.guesses import asked, expected
from vlm.layout import image_ids, readings
from vlm.model import VLM

MOST_ACROSS = 4  # runs that fit side by side
# what the summary shows: metrics, and what stands behind the task where a number is no share of right answers
PRINTED = {
    "accuracy": "",
    "iou@0.5": "",
    "vqa_accuracy": "",
    "anls": " ANLS",
    "object_recall": " objects",
    "cider": " CIDEr",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Ask trained VLMs the questions that their config names, and score the answers.

    Prints the share of right answers per task, beside chance, a guess made without the image and one that
    ignores which object is asked for, and writes a table and all answers to OUT/results. Runs that have an
    up-to-date table are not evaluated again.
    """

    run: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Trained runs: folders that vlm.train printed, or config files, which stand for all their runs. Those \
of vlm/configs/released.py are released checkpoints."""
    out: Path = Path("runs/vlm")
    """Folder that vlm.train wrote to, or for the results of released checkpoints. Needed for config files \
only."""
    only: str = ""
    """Evaluate only the runs whose name contains this text."""
    threads: int = 0
    """CPU threads; 0 = PyTorch's default."""
    again: bool = False
    """Evaluate runs anew even if their table is up to date."""
    imports: Imports = ()
    """A Python module of yours that registers data sets or models (docs/data.md), here or on PYTHONPATH; \
may be given several times. The folder of a run remembers the modules that vlm.train was given."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input."""
    options = parse(Options, argv, "python -m vlm.evaluate")
    return guarded(lambda: evaluate_all(options), out=options.out)


def evaluate_all(options: Options) -> int:
    """Evaluate the runs of the command line and print a summary; returns the exit status.

    Raises:
        UserError: If no run is given, or a run is not trained.
    """
    import pandas as pd

    use_threads(options.threads)
    if not options.run:
        raise UserError("RUN is missing; give folders that vlm.train printed, or config files")
    console, tables = plain_console(), []
    if not console.is_terminal:
        console.width = 120  # a file has no width
    registry.use(options.imports)
    for path in options.run:
        if path.suffix == ".py":
            found, out = read_file(path, options.imports), options.out
        else:
            found, out = folders.saved_runs(path), path.resolve().parent
        for run in found:
            if options.only not in run.name:
                continue
            table = None if options.again else current(out, run)
            if table is None:
                rows, answers = evaluate(run, out, progress=console.is_terminal)
                table = results.write(out, run.name, rows, answers)
            tables.append(table)
    if not tables:
        raise UserError(f"--only {options.only}: no run has that in its name")
    console.print(summary(pd.concat(tables)))
    console.print(f"results: {out / results.RESULTS}", soft_wrap=True)
    return 0


def current(out: Path, run: Run) -> Any:
    """Return a run's table if it is up to date, else None.

    It is out of date if weights, questions or scores changed. A damaged table is reported on standard error
    and made anew.

    Args:
        out: Folder of the runs.
        run: The run.

    Returns:
        A data frame or None.
    """
    path = results.table_path(out, run.name)
    if not path.exists():
        return None
    try:
        table = results.read(path)
    except UserError as error:
        print(f"{error}; it is evaluated again", file=sys.stderr)
        return None
    made = set(zip(table["stage"], table["evaluation"], strict=True))
    return table if made == {(run.stage_ids()[-1], results.fingerprint(run))} else None


def evaluate(
    run: Run, out: Path, progress: bool = False, device: str | None = None
) -> tuple[list[results.Row], list[results.Row]]:
    """Ask and score a trained model, or a released one.

    Args:
        run: The run.
        out: Folder of the runs.
        progress: Whether to show a bar.
        device: Device of the model; None = a GPU if there is one.

    Returns:
        Rows of the results table (`vlm.results.COLUMNS`), and one row per answer.

    Raises:
        UserError: If the run has no evaluation, or is not trained in `out`.
    """
    from rich.markup import escape
    from rich.progress import track

    device = device or default_device()
    model = load(run, out, device)
    features = components.features(run, run.image_size, out, device)
    side = components.eyes_of(run, out, device).side
    if not run.evaluation:
        raise UserError(f"run {run.name!r} has no evaluation; evaluate a config file that gives it some data")
    fixed = dict(
        run=run.name,
        stage=run.stage_ids()[-1],
        evaluation=results.fingerprint(run),
        family=run.family,
        model=run.model,
        init=run.init or "",
        layout=run.layout,
        image_size=run.image_size,
        image_tokens=len(image_ids(side)) * readings(run.layout),
        seed=run.seed,
        parameters=sum(p.numel() for p in model.parameters()),
        **_cost(run, out),
    )
    rows: list[dict[str, Any]] = []
    written: list[dict[str, Any]] = []
    for task, data in track(run.evaluation.items(), escape(run.name), disable=not progress):
        source = data.build(answers=False)
        features.fill(source, progress=False)
        samples = _samples(source)
        answers = answer_all(model, run, features, source, samples, side, device)
        about = fixed | dict(task=task, split=data.split, chance=data.declared().chance)
        blind, sighted = guesses(data)
        for row in results.score(samples, answers):
            name = row["metric"]
            rows.append(about | dict(question_only=blind.get(name), image_only=sighted.get(name)) | row)
        for sample, said in zip(samples, answers, strict=True):
            written.append(
                dict(task=task, id=sample.id, image=sample.image, asked=asked(sample))
                | dict(said=said, right=results.right(sample, said), target=dict(sample.target))
            )
    return rows, written


def _cost(run: Run, out: Path) -> dict[str, Any]:
    """What training has cost, and the project's commit; unknown for a released checkpoint."""
    if run.checkpoint is not None:
        return dict(steps=None, seconds=None, commit=None)
    spent = [folders.finished(out / name) for name in run.stage_ids()]
    return dict(
        steps=sum(stage.steps for stage in spent),
        seconds=sum(stage.seconds for stage in spent),
        commit=folders.commit(out / run.stage_ids()[-1]),
    )


def guesses(data: Data) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Score what a model must do better than.

    Args:
        data: What is asked.

    Returns:
        Values by metric, {} if the data declare no such guess: of answers given without the image, learned
        from training samples of the same kind; and of answers to a scene, whichever object is asked for.
    """
    key = repr((data, data.declared()))
    if key not in _guesses:
        _guesses[key] = _blind(data), _sighted(data)
    return _guesses[key]


_guesses: dict[str, tuple[Mapping[str, float], Mapping[str, float]]] = {}  # by data, shared by all runs


def _blind(data: Data) -> Mapping[str, float]:
    training, guess = data.training(), data.declared().blind
    if training is None or guess is None:
        return {}
    known, test = (_samples(one.build(answers=False)) for one in (training, data))
    return {row["metric"]: row["value"] for row in results.score(test, guess(known, test))}


def _sighted(data: Data) -> Mapping[str, float]:
    guess, metric = data.declared().sighted, data.declared().metric
    if guess is None or metric is None:
        return {}
    source = data.build(answers=False)
    return {metric.name: expected(metric, _samples(source), guess(source))}


def _samples(source: Source) -> list[Sample]:
    return [source[i] for i in range(len(source))]


def answer_all(
    model: VLM, run: Run, features: Any, source: Source, samples: Sequence[Sample], side: int, device: str
) -> list[str]:
    """Answer the samples of a source.

    Args:
        model: The model.
        run: Its run.
        features: Features of the source's pictures.
        source: Source of the samples.
        samples: Prompts without answers.
        side: Patches along one side of an image.
        device: Device of the model.

    Returns:
        One answer per sample.
    """
    prompts = [components.prompt(run, sample.chunks, side)[0] for sample in samples]

    def seen(numbers: list[int]) -> Tensor:
        return features.get(source, [samples[i].image for i in numbers])

    most = results.declared(samples[0]).max_new_tokens
    return answer_prompts(model, run, prompts, seen, device, most)


def summary(rows: Any) -> Any:
    """Return a printable table in per cent.

    Tasks are rows and runs columns; with many runs it is the other way round.
    """
    from rich import box
    from rich.table import Table

    main = rows[rows["metric"].isin(PRINTED)]
    runs = list(dict.fromkeys(main["run"]))
    cells = [["", "chance", "question only", "image only", *runs]]
    for (task, split, metric), part in main.groupby(["task", "split", "metric"], sort=False):
        values = part.drop_duplicates("run").set_index("run")
        guessed = values.iloc[0][list(results.GUESSES)]
        numbers = [*guessed, *(values["value"].get(name) for name in runs)]
        printed = ["-" if cell is None or cell != cell else f"{100 * cell:.1f}" for cell in numbers]
        cells.append([f"{task} ({split}){PRINTED[metric]}", *printed])
    if len(runs) > MOST_ACROSS:
        cells = [list(line) for line in zip(*cells, strict=True)]
    table = Table(title="Right answers in per cent", box=box.SIMPLE_HEAD, padding=(0, 1))
    for i, name in enumerate(cells[0]):
        table.add_column(name, justify="right" if i else "left", overflow="fold", no_wrap=not i)
    for line in cells[1:]:
        table.add_row(*line)
    return table


if __name__ == "__main__":
    sys.exit(main())
