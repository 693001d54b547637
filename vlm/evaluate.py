"""`python -m vlm.evaluate RUN`: ask trained VLMs, score their answers, write the table of results."""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from ssm_retrieval import registry
from ssm_retrieval.cli import Imports, guarded, parse, use_threads
from ssm_retrieval.errors import UserError
from ssm_retrieval.terminal import plain_console
from vlm import components, folders, results
from vlm.config import Data, Run, read_file
from vlm.data.samples import Sample, Source
from vlm.folders import RESULT
from vlm.guesses import asked
from vlm.layout import image_ids
from vlm.model import VLM
from vlm.prompts import END

BATCH = 64
MOST_ACROSS = 4  # runs that fit side by side


@dataclasses.dataclass(frozen=True)
class Options:
    """Ask trained VLMs the questions that their config names, and score the answers.

    Prints the share of right answers per task, beside chance and a guess made without the image, and writes a
    table and all answers to OUT/results. Runs that have an up-to-date table are not evaluated again.
    """

    run: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Trained runs: folders that vlm.train printed, or config files, which stand for all their runs."""
    out: Path = Path("runs/vlm")
    """Folder that vlm.train wrote to. Needed for config files only."""
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


def load(run: Run, out: Path, device: str = "cpu") -> VLM:
    """Load a trained model.

    Args:
        run: The run.
        out: Folder of the runs.
        device: Device of the model.

    Returns:
        The model, without encoder, in evaluation mode.

    Raises:
        UserError: If the run is not trained in `out`.
    """
    folder = out / run.stage_ids()[-1]
    if not (folder / RESULT).exists():
        raise UserError(f"run {run.name!r} is not trained in {out}; run python -m vlm.train first")
    model = components.model(run, components.eyes(run.encoder, run.image_size, out, device).width)
    folders.load_weights(folder, model)
    return model.to(device).eval()


def evaluate(
    run: Run, out: Path, progress: bool = False, device: str | None = None
) -> tuple[list[results.Row], list[results.Row]]:
    """Ask and score a trained model.

    Args:
        run: The run.
        out: Folder of the runs.
        progress: Whether to show a bar.
        device: Device of the model; None = a GPU if there is one.

    Returns:
        Rows of the results table (`vlm.results.COLUMNS`), and one row per answer.
    """
    from rich.markup import escape
    from rich.progress import track

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(run, out, device)
    features = components.features(run, run.image_size, out, device)
    side = components.eyes(run.encoder, run.image_size, out, device).side
    folder = out / run.stage_ids()[-1]
    spent = [folders.finished(out / name) for name in run.stage_ids()]
    fixed = dict(
        run=run.name,
        stage=folder.name,
        evaluation=results.fingerprint(run),
        family=run.family,
        model=run.model,
        layout=run.layout,
        image_size=run.image_size,
        image_tokens=len(image_ids(side)),
        seed=run.seed,
        parameters=sum(p.numel() for p in model.parameters()),
        steps=sum(stage.steps for stage in spent),
        seconds=sum(stage.seconds for stage in spent),
        commit=folders.commit(folder),
    )
    rows: list[dict[str, Any]] = []
    written: list[dict[str, Any]] = []
    for task, data in track(run.evaluation.items(), escape(run.name), disable=not progress):
        source = data.build(answers=False)
        features.fill(source, progress=False)
        samples = _samples(source)
        answers = answer_all(model, run, features, source, samples, side, device)
        blind, chance = blind_rows(data), data.declared().chance
        for row in results.score(samples, answers):
            more = dict(task=task, split=data.split, chance=chance, question_only=blind.get(row["metric"]))
            rows.append(fixed | more | row)
        for sample, said in zip(samples, answers, strict=True):
            written.append(
                dict(task=task, id=sample.id, image=sample.image, asked=asked(sample))
                | dict(said=said, right=results.right(sample, said), target=dict(sample.target))
            )
    return rows, written


def blind_rows(data: Data) -> Mapping[str, float]:
    """Score answers given without the image, learned from training samples of the same kind.

    Returns:
        Values by metric; {} if the data declare no such guess.
    """
    training, guess = data.training(), data.declared().blind
    if training is None or guess is None:
        return {}
    key = repr((data, guess))
    if key not in _blind:
        known, test = (_samples(one.build(answers=False)) for one in (training, data))
        _blind[key] = {row["metric"]: row["value"] for row in results.score(test, guess(known, test))}
    return _blind[key]


_blind: dict[str, Mapping[str, float]] = {}  # by data and guess, shared by all runs


def _samples(source: Source) -> list[Sample]:
    return [source[i] for i in range(len(source))]


def alike(keys: Iterable[Hashable], size: int) -> Iterator[list[int]]:
    """Group things by equal keys, such as prompts by length, to get batches without padding.

    Args:
        keys: One per thing.
        size: Largest group.

    Yields:
        Numbers of things with equal keys.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        groups[key].append(number)
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))


@torch.no_grad()
def say(
    model: VLM, run: Run, input_ids: Tensor, features: Tensor, most: int | None = None
) -> list[list[int]]:
    """Generate greedy answers in the run's precision.

    Args:
        model: The model.
        run: Its run.
        input_ids: (B, L) int64, prompts of one length.
        features: (B, P, F).
        most: Length limit, if it is below the run's.

    Returns:
        B lists of ids up to the end token; rows that end early repeat it.
    """
    length = min(run.max_new_tokens, most or run.max_new_tokens)
    end = components.text_of(run).encode(END)[0]
    with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
        return model.generate(input_ids, features, length, eos_token_id=end).tolist()


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
    text = components.text_of(run)
    prompts = [components.prompt(run, sample, side)[0] for sample in samples]
    answers, most = [""] * len(samples), results.declared(samples[0]).max_new_tokens
    for numbers in alike(map(len, prompts), BATCH):
        ids = torch.tensor([prompts[i] for i in numbers], device=device)
        seen = features.get(source, [samples[i].image for i in numbers]).to(device)
        for i, said in zip(numbers, say(model, run, ids, seen, most), strict=True):
            answers[i] = text.decode(said)
    return answers


def summary(rows: Any) -> Any:
    """Return a printable table in per cent.

    Tasks are rows and runs columns; with many runs it is the other way round.
    """
    from rich import box
    from rich.table import Table

    main = rows[rows["metric"].isin(["accuracy", "iou@0.5"])]
    runs = list(dict.fromkeys(main["run"]))
    cells = [["", "chance", "question only", *runs]]
    for (task, split), part in main.groupby(["task", "split"], sort=False):
        values = part.drop_duplicates("run").set_index("run")
        first = values.iloc[0]
        numbers = [first["chance"], first["question_only"], *(values["value"].get(name) for name in runs)]
        printed = ["-" if cell is None or cell != cell else f"{100 * cell:.1f}" for cell in numbers]
        cells.append([f"{task} ({split})", *printed])
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
