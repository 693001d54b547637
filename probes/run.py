"""`python -m probes.run RUN_DIR --probe updates|retention|linear|patch|attention|lens|all`: probes of a run.

    RUN_DIR/probes/<probe>.<family>.parquet   tidy table (`probes.suite.common` says what all have in common)
                   <probe>.<family>.json      what it was made with; not run again while that holds
                   <probe>.csv                the same of all families
                   <probe>*.png .pdf          figures, families side by side
                   summary.md                 what was measured, with intervals and controls

Files are written under a temporary name and renamed, so that a stop at any moment loses one probe of one
model at most, and the same command goes on.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Callable, Sequence
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
DIGITS = 6  # of numbers in CSV files
MOST = 10**5  # sequences of a probe: some GB of recorded numbers
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """Probe the trained models of a run: updates, retention, linear, patch, attention, lens, or all of them.

    RUN_DIR is a folder that synthetic.run or synthetic.sweep has made (runs/<id>); every family in it that
    has finished training is probed.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run."""
    probe: tuple[str, ...] = ("all",)
    """updates, retention, linear, patch, attention, lens; or all."""
    out: Path | None = None
    """Folder for tables and figures; by default RUN_DIR/probes."""
    examples: int | None = None
    """Held-out sequences of every probe; by default each probe's own number for the run's length."""
    seed: int = 0
    """Seed of the held-out sequences and of the controls."""
    threads: int = 0
    """CPU threads; 0 = as many as PyTorch takes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad input gives one line and status 2."""
    options = parse(Options, argv, "python -m probes.run")
    out = options.out or options.run / "probes"
    return guarded(lambda: run(options, out), out=out, stopped=STOPPED)


def run(options: Options, out: Path) -> int:
    """Run the probes that are not there yet, then draw and summarise. Raises UserError for bad input."""
    import matplotlib
    from filelock import FileLock, Timeout
    from rich.console import Console

    from ssm_retrieval.ops.memory import keep_freed_memory

    matplotlib.use("Agg")
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
    models = trained(options.run)
    out.mkdir(parents=True, exist_ok=True)
    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    try:
        with FileLock(out / ".lock", timeout=0):
            return _probe_all(options, names, models, out, console, say)
    except Timeout:
        raise UserError(f"--out {out}: another process probes into it; wait for it or stop it") from None


def chosen(asked: Sequence[str]) -> list[str]:
    """Names of the probes, in the registry's order. Raises UserError for unknown ones."""
    from probes.suite import PROBES

    for name in asked:
        if name not in (*PROBES, "all"):
            raise UserError(f"--probe {name} is unknown; use {', '.join(PROBES)} or all")
    if not asked:
        raise UserError(f"--probe needs a name; use {', '.join(PROBES)} or all")
    return [name for name in PROBES if name in asked or "all" in asked]


def trained(folder: Path) -> dict[str, tuple[Path, Task]]:
    """Family -> (folder of its model, its task) of every finished one. Raises UserError if there is none."""
    from ssm_retrieval.training import records
    from synthetic import tasks

    if not (folder / "config.json").is_file():
        raise UserError(f"RUN_DIR {folder} has no config.json; give the folder of one run (runs/<id>)")
    found = {}
    for plan in records.config(folder)["plans"]:
        place = folder / plan["family"]
        if (place / "model.safetensors").exists():
            found[plan["family"]] = place, tasks.build(plan["task"], **plan["task_options"])
    if not found:
        raise UserError(f"RUN_DIR {folder} has no finished model; let synthetic.run finish training it first")
    return found


def _probe_all(
    options: Options,
    names: list[str],
    models: dict[str, tuple[Path, Task]],
    out: Path,
    console: Any,
    say: Say,
) -> int:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from probes.suite import PROBES, NotApplicable
    from ssm_retrieval.training import store

    for left in out.glob(".*.tmp"):  # this process holds the lock, so these are a killed one's
        left.unlink(missing_ok=True)
    changed: set[str] = set()
    missing: list[str] = []
    bar = Progress(
        TextColumn("{task.description:24}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(), console=console,
    )  # fmt: skip
    with bar:
        for name in names:
            for family, (folder, task) in models.items():
                record = out / f"{name}.{family}.json"
                wanted = _configuration(name, PROBES[name], options, folder)
                if _made_with(record) == wanted and (out / f"{name}.{family}.parquet").exists():
                    say(f"{name} {family}: finished before")
                    continue
                line = bar.add_task(f"{name} {family}", total=1.0)
                try:
                    table = _measure(PROBES[name], options, folder, task, partial(_advance, bar, line))
                except NotApplicable as reason:
                    bar.remove_task(line)
                    missing.append(f"{name} {family}: left out, {reason}")
                    say(missing[-1])
                    continue
                bar.update(line, completed=1.0)
                table.insert(0, "family", family)
                record.unlink(missing_ok=True)  # the table is the new one before the record says so
                store.write_bytes(out / f"{name}.{family}.parquet", _parquet(table))
                store.write_json(record, wanted)
                changed.add(name)
    drawn = [name for name in names if _drawn(out, name, name in changed, models, say)]
    if not drawn:
        raise UserError("nothing was measured: " + "; ".join(missing))
    summarise(options.run, out, list(models), missing)
    say(f"{out / 'summary.md'}")
    return 0


def _advance(bar: Any, line: Any, share: float) -> None:
    bar.update(line, completed=share)


def _configuration(name: str, probe: Probe, options: Options, folder: Path) -> dict[str, Any]:
    """Everything that decides a probe's numbers, with its hash."""
    import json

    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    made: dict[str, Any] = dict(
        probe=name, version=probe.version, examples=options.examples, seed=options.seed, weights=weights,
        config=json.loads((folder.parent / "config.json").read_text())["plans"],
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
    probe: Probe, options: Options, folder: Path, task: Task, progress: Callable[[float], None]
) -> pd.DataFrame:
    """The table of one probe and model, with that of the untrained model if it is a control."""
    import pandas as pd

    from probes.suite import Options as ProbeOptions
    from ssm_retrieval.models import build
    from ssm_retrieval.training import store

    saved = store.read_json(folder / "config.json")
    models = {"trained": store.load_model(folder)}
    if probe.untrained:
        models["untrained"] = build(saved["name"], **saved["config"], seed=options.seed).eval()
    tables = []
    for i, (weights, model) in enumerate(models.items()):

        def share(x: float, i: int = i) -> None:
            progress((i + x) / len(models))

        made = probe.measure(model, task, ProbeOptions(options.examples, options.seed, share))
        made.insert(0, "weights", weights)
        tables.append(made)
    return pd.concat(tables, ignore_index=True)


def _parquet(table: pd.DataFrame) -> bytes:
    content = io.BytesIO()
    table.to_parquet(content, compression="zstd", index=False)
    return content.getvalue()


def tables(out: Path, name: str, families: Sequence[str]) -> pd.DataFrame | None:
    """A probe's tables of all families in one; None if there is none.

    Tables that lack columns are another version's and count as not there. Raises UserError for damaged ones.
    """
    import pandas as pd

    from probes.suite import PROBES
    from ssm_retrieval.training.tables import read

    paths = [out / f"{name}.{family}.parquet" for family in families]
    parts = [read(path) for path in paths if path.exists() and path.with_suffix(".json").exists()]
    needed = {*COLUMNS, *PROBES[name].columns}
    parts = [part for part in parts if needed <= set(part.columns)]
    return pd.concat(parts, ignore_index=True) if parts else None


def _drawn(out: Path, name: str, changed: bool, models: dict[str, Any], say: Say) -> bool:
    """Draw a probe's figures unless they are there; False if there is nothing to draw."""
    from probes.suite import PROBES
    from ssm_retrieval.style import save, theme
    from ssm_retrieval.training.store import write_bytes

    table = tables(out, name, list(models))
    if table is None:
        return False
    paths = [out / f"{name}{suffix}.{kind}" for suffix in PROBES[name].figures for kind in ("png", "pdf")]
    if not changed and all(path.exists() for path in [*paths, out / f"{name}.csv"]):
        return True
    write_bytes(out / f"{name}.csv", table.to_csv(index=False, float_format=f"%.{DIGITS}g").encode())
    with theme():
        for suffix, draw in PROBES[name].figures.items():
            save(draw(table), out / f"{name}{suffix}")
            say(f"{out / name}{suffix}.png .pdf")
    return True


def summarise(run: Path, out: Path, families: Sequence[str], missing: Sequence[str]) -> None:
    """Write summary.md on all probes whose tables are there."""
    from probes.suite import PROBES
    from ssm_retrieval.training.store import write_bytes

    text = [f"# Probes of {run.resolve().name}\n"]
    for name, probe in PROBES.items():
        table = tables(out, name, families)
        lacking = [line for line in missing if line.startswith(f"{name} ")]
        if table is None and not lacking:
            continue
        text.append(f"## {name}: {probe.title}\n")
        text += [f"- {line}\n" for line in lacking]
        if table is not None:
            figures = " ".join(f"![{name}{suffix}]({name}{suffix}.png)" for suffix in probe.figures)
            text.append(f"{probe.summary(table)}\n{figures}\n")
    write_bytes(out / "summary.md", "\n".join(text).encode())


if __name__ == "__main__":
    sys.exit(main())
