"""`python -m probes.run RUNS`: what trained models keep, write, attend to and can be read from.

    runs/<id>/probes/<probe>.<family>.parquet   tidy table (`probes.suite.common` says what all have)
                     <probe>.<family>.json      what it was made with; not run again while that holds
                     <probe>.csv                the same of all runs
                     summary.md                 what was measured, with intervals and controls

With several runs, each run's folder has its tables, and runs/compare-<hash>/probes/ has the CSV files and the
summary of all. With `--out` one folder has everything. `python -m analysis.figures RUNS` draws the tables.

Files are written under a temporary name and renamed. A stop loses at most one probe of one model, and the
same command goes on from there.
"""

from __future__ import annotations

import hashlib
import io
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ssm_retrieval.cli import guarded, parse, use_threads
from ssm_retrieval.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from probes.suite import Probe
    from synthetic.tasks import Task

COLUMNS = ("family", "weights", "layer", "part", "quantity", "value", "low", "high", "n")  # of every table
STOPPED = "stopped; finished probes are kept, the same command goes on"
LEFT_OUT = "left_out"  # in the record of a probe that a model or task lacks something for: what
DIGITS = 6  # of numbers in CSV files
MOST = 10**5  # sequences of a probe: some GB of recorded numbers
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """Measure what trained models do inside: tables with intervals and controls.

    RUNS are folders of finished runs that synthetic.run or synthetic.sweep has made (runs/<id>), or folders
    of such: one run of each architecture, all of the same task. The probes, each beside its control:

    * updates: what every token writes into an SSM's state, by its role and position.
    * retention: how much of it is left when the answer is due; hidden attention maps.
    * capacity: how many symbols the model itself can still find, each being asked for.
    * linear: which symbols can be read off the state and the residual stream linearly.
    * patch: which activations carry the answer from a clean to a corrupted run.
    * attention: retrieval, induction and previous-token scores of heads.
    * lens: after which layer the model's own head can read the answer.
    * erasure: what layers with keys and a state write, erase and keep, and what is left of it.
    * knockout: which heads and channels the model needs, more than random ones.

    Probes that were finished before are not run again. `python -m analysis.figures RUNS` draws the tables.
    """

    runs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS", help_behavior_hint="")
    ]
    """Folders of finished runs, or folders of such."""
    probe: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ("all",)
    """Probes to run: some of those above, or all."""
    out: Annotated[
        Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: probes/ in each run)")
    ] = None
    """One folder for all tables."""
    examples: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: each probe's own)")
    ] = None
    """Held-out sequences of every probe; more make narrower intervals. Probe linear needs 20 or more."""
    seed: int = 0
    """Of the held-out sequences and of the controls."""
    threads: Annotated[int, tyro.conf.arg(metavar="N", help_behavior_hint="(default: PyTorch's choice)")] = 0
    """CPU threads."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; bad input gives one line and status 2."""
    options = parse(Options, argv, "python -m probes.run")
    return guarded(lambda: run(options), out=options.out or "", stopped=STOPPED)


@dataclass(frozen=True)
class Model:
    """A trained model.

    Attributes:
        folder: Of its run.
        tables: Folder of its probes' tables.
        task: The task it was trained on.
    """

    folder: Path
    tables: Path
    task: Task


def run(options: Options) -> int:
    """Run the probes that are not there yet, then write the summary.

    Args:
        options: The command line.

    Returns:
        The exit status, 0.

    Raises:
        UserError: An option is out of range, no run can be probed, or another process writes the same tables.
    """
    from filelock import FileLock, Timeout
    from rich.console import Console

    from ssm_retrieval.ops.memory import keep_freed_memory
    from ssm_retrieval.training import store

    keep_freed_memory()
    use_threads(options.threads)
    names = chosen(options.probe)
    if options.examples is not None and not 2 <= options.examples <= MOST:
        raise UserError(
            f"--examples {options.examples} must lie in 2 .. {MOST:,}: intervals need two sequences, and "
            "all are kept in memory; choose another"
        )
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed {options.seed} must lie in 0 .. 2**63 - 1; choose another")
    models = trained(options.runs, options.out)
    out = options.out or store.view_of([model.folder for model in models.values()]) / "probes"
    places = sorted({out, *(model.tables for model in models.values())})
    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    with ExitStack() as locks:
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            try:
                locks.enter_context(FileLock(place / ".lock", timeout=0))
            except Timeout:
                raise UserError(f"{place}: another process probes into it; wait for it or stop it") from None
        return _probe_all(options, names, models, out, console, say)


def chosen(asked: Sequence[str]) -> list[str]:
    """The probes asked for.

    Args:
        asked: Names, or "all".

    Returns:
        Names in the registry's order, each once.

    Raises:
        UserError: A name is unknown, or there is none.
    """
    from probes.suite import PROBES

    for name in asked:
        if name not in (*PROBES, "all"):
            raise UserError(f"--probe {name} is unknown; use {', '.join(PROBES)} or all")
    if not asked:
        raise UserError(f"--probe needs a name; use {', '.join(PROBES)} or all")
    return [name for name in PROBES if name in asked or "all" in asked]


def trained(places: Sequence[Path], out: Path | None = None) -> dict[str, Model]:
    """The finished runs among some folders.

    Args:
        places: Folders of runs, or folders that hold them.
        out: Folder for the tables. None: that of each run.

    Returns:
        Family to its model, in the order of every figure.

    Raises:
        UserError: There is no finished run, two are of one family, or they are of different tasks.
    """
    from ssm_retrieval.style import FAMILIES
    from ssm_retrieval.training import store
    from synthetic import records, tasks

    if not places:
        raise UserError("RUNS is missing; give one or several folders of runs (runs/<id>)")
    found: dict[str, Model] = {}
    plans: list[dict[str, Any]] = []
    for folder in store.run_folders(places):
        plan = records.config(folder)["plan"]
        if not (folder / store.WEIGHTS).exists():
            continue
        family, options = plan["family"], plan["task_options"]
        if family in found:
            raise UserError(
                f"RUNS {found[family].folder} and {folder} are both of {family}; give one of them"
            )
        if plans and (plan["task"], options) != (plans[0]["task"], plans[0]["task_options"]):
            other = next(iter(found.values())).folder
            raise UserError(f"RUNS {other} and {folder} are of different tasks; give runs of one")
        plans.append(plan)
        found[family] = Model(folder, out or folder / "probes", tasks.build(plan["task"], **options))
    if not found:
        raise UserError(
            f"RUNS {', '.join(map(str, places))} has no finished model; let synthetic.run finish it first"
        )
    return {family: found[family] for family in FAMILIES if family in found}


def _probe_all(
    options: Options,
    names: list[str],
    models: dict[str, Model],
    out: Path,
    console: Any,
    say: Say,
) -> int:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from probes.suite import PROBES, NotApplicable
    from ssm_retrieval.training import store

    for place in {out, *(model.tables for model in models.values())}:
        for left in place.glob(".*.tmp"):  # this process holds the lock, so these are a killed one's
            left.unlink(missing_ok=True)
    missing: list[str] = []
    bar = Progress(
        TextColumn("{task.description:24}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(), console=console,
    )  # fmt: skip
    with bar:
        for name in names:
            for family, model in models.items():
                record = model.tables / f"{name}.{family}.json"
                wanted = _configuration(name, PROBES[name], options, model.folder)
                if _made_with(record) == wanted and record.with_suffix(".parquet").exists():
                    say(f"{name} {family}: finished before")
                    continue
                line = bar.add_task(f"{name} {family}", total=1.0)
                try:
                    table = _measure(PROBES[name], options, model, partial(_advance, bar, line))
                except NotApplicable as reason:
                    bar.remove_task(line)
                    record.with_suffix(".parquet").unlink(missing_ok=True)
                    if _made_with(record) != (said := wanted | {LEFT_OUT: str(reason)}):
                        store.write_json(record, said)
                    missing.append(f"{name} {family}: left out, {reason}")
                    say(missing[-1])
                    continue
                bar.update(line, completed=1.0)
                table.insert(0, "family", family)
                record.unlink(missing_ok=True)  # the table is the new one before the record says so
                store.write_bytes(record.with_suffix(".parquet"), _parquet(table))
                store.write_json(record, wanted)
    places = {family: model.tables for family, model in models.items()}
    if not [name for name in names if _joined(out, name, places)]:
        raise UserError("nothing was measured: " + "; ".join(missing))
    summarise([model.folder for model in models.values()], out, places, missing)
    say(f"{out / 'summary.md'}")
    drawn = [options.out] if options.out else [model.folder for model in models.values()]
    say(f"figures: python -m analysis.figures {shlex.join(map(str, drawn))}")
    return 0


def _advance(bar: Any, line: Any, share: float) -> None:
    bar.update(line, completed=share)


def _configuration(name: str, probe: Probe, options: Options, folder: Path) -> dict[str, Any]:
    """Everything that decides a probe's numbers, with its hash."""
    import json

    from ssm_retrieval.training import store

    weights = hashlib.sha256((folder / store.WEIGHTS).read_bytes()).hexdigest()
    made: dict[str, Any] = dict(
        probe=name, version=probe.version, examples=options.examples, seed=options.seed, weights=weights,
        config=json.loads((folder / store.CONFIG).read_text())["plan"],
    )  # fmt: skip
    text = json.dumps(made, sort_keys=True)
    return made | {"hash": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _made_with(record: Path) -> Any:
    from ssm_retrieval.training import store

    try:
        return store.read_json(record)
    except (OSError, ValueError):  # none, or one that a full disk has cut short
        return None


def _measure(
    probe: Probe, options: Options, trained: Model, progress: Callable[[float], None]
) -> pd.DataFrame:
    """The table of one probe and model, with that of the untrained model if it is a control."""
    import pandas as pd

    from probes.suite import Options as ProbeOptions
    from ssm_retrieval.models import build
    from ssm_retrieval.training import store
    from synthetic import records
    from synthetic.curricula import short_place

    plan = records.config(trained.folder)["plan"]
    place = short_place(plan.get("growth", "prefix"))
    models = {"trained": store.load_model(trained.folder)}
    if probe.untrained:
        models["untrained"] = build(plan["model"], **plan["model_overrides"], seed=options.seed).eval()
    tables = []
    for i, (weights, model) in enumerate(models.items()):

        def share(x: float, i: int = i) -> None:
            progress((i + x) / len(models))

        told = ProbeOptions(options.examples, options.seed, share, place)
        made = probe.measure(model, trained.task, told)
        made.insert(0, "weights", weights)
        tables.append(made)
    return pd.concat(tables, ignore_index=True)


def _parquet(table: pd.DataFrame) -> bytes:
    content = io.BytesIO()
    table.to_parquet(content, compression="zstd", index=False)
    return content.getvalue()


def tables(places: Mapping[str, Path], name: str) -> pd.DataFrame | None:
    """A probe's tables of all families in one.

    Tables that lack columns were made by another version and are left out.

    Args:
        places: Family to the folder of its tables.
        name: Of the probe.

    Returns:
        The table; None if there is none.
    """
    import pandas as pd

    from probes.suite import PROBES
    from ssm_retrieval.training.tables import read

    paths = [place / f"{name}.{family}.parquet" for family, place in places.items()]
    parts = [read(path) for path in paths if path.exists() and path.with_suffix(".json").exists()]
    needed = {*COLUMNS, *PROBES[name].columns}
    parts = [part for part in parts if needed <= set(part.columns)]
    return pd.concat(parts, ignore_index=True) if parts else None


def _joined(out: Path, name: str, places: Mapping[str, Path]) -> bool:
    """Write a probe's table of all families as CSV unless it is there; False if there is no table."""
    from ssm_retrieval.training.store import write_bytes

    table = tables(places, name)
    if table is None:
        return False
    csv, numbers = out / f"{name}.csv", table.to_csv(index=False, float_format=f"%.{DIGITS}g").encode()
    if not csv.exists() or csv.read_bytes() != numbers:
        write_bytes(csv, numbers)
    return True


def summarise(runs: Sequence[Path], out: Path, places: Mapping[str, Path], missing: Sequence[str]) -> None:
    """Write summary.md on all probes whose tables are there.

    Args:
        runs: Folders of the runs, for the title.
        out: Folder to write to.
        places: Family to the folder of its tables.
        missing: Lines on probes that were left out.
    """
    from probes.suite import PROBES
    from ssm_retrieval.training.store import write_bytes

    text = [f"# Probes of {', '.join(run.resolve().name for run in runs)}\n"]
    for name, probe in PROBES.items():
        table = tables(places, name)
        lacking = [line for line in missing if line.startswith(f"{name} ")]
        if table is None and not lacking:
            continue
        text.append(f"## {name}: {probe.title}\n")
        text += [f"- {line}\n" for line in lacking]
        if table is not None:
            text.append(f"{probe.summary(table)}\n\n")
    write_bytes(out / "summary.md", "\n".join(text).encode())


if __name__ == "__main__":
    sys.exit(main())
