"""What comes with the toolkit, so that a VLM need not begin with nothing: language models and an encoder.

    python -m vlm.train vlm/configs/words.py             # pretrains one language model of each family
    python -m vlm.pretrained --encoder scenes-32px       # writes them to vlm/scenes/pretrained

A run with init="scenes" begins with the language model of its family, which knows scenes in words, the
questions behind them; init="scenes-any-order" with one that has seen questions before them as well. An
encoder that is there is not trained again.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ssm_retrieval.cli import guarded, parse
from ssm_retrieval.errors import UserError
from ssm_retrieval.training import store

if TYPE_CHECKING:
    from vlm.config import Run

FOLDER = Path(__file__).parent / "scenes" / "pretrained"
INITS = SCENES, ANY_ORDER = "scenes", "scenes-any-order"  # of runs that begin with a model of FOLDER
CONFIG = Path(__file__).parent / "configs" / "words.py"
MADE = "made.json"  # beside the weights: what they were made of


def folder(family: str, init: str = SCENES) -> Path:
    """Return the folder of a family's language model.

    Args:
        family: Architecture of the language model, such as "mamba".
        init: SCENES or ANY_ORDER.

    Returns:
        The folder, for `models.load`.

    Raises:
        UserError: If there is no such model.
    """
    kind = init.removeprefix(SCENES)  # a suffix of folders
    if not (FOLDER / f"{family}{kind}" / MADE).exists():
        suffix = ANY_ORDER.removeprefix(SCENES)
        names = {path.parent.name for path in FOLDER.glob(f"*/{MADE}")}
        both = {name for name in names if name.endswith(suffix)}
        known = ", ".join(sorted(name.removesuffix(suffix) for name in (both if kind else names - both)))
        raise UserError(
            f"init={init!r}: no language model of {family!r} was pretrained, only of {known or 'none'}; "
            "leave init out, or add a run to vlm/configs/words.py"
        )
    return FOLDER / f"{family}{kind}"


def kind_of(run: Run) -> str:
    """Return the `init` of runs that begin with a pretrained run: of several layouts, or one."""
    return ANY_ORDER if len(run.stages[-1].layouts) > 1 else SCENES


def digest(family: str, init: str = SCENES) -> str:
    """Return a hash of the weights of a family's language model, as for `folder`."""
    content = (folder(family, init) / store.WEIGHTS).read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True)
class Options:
    """Write the language models of trained runs to the toolkit, from where others begin."""

    config: Annotated[Path, tyro.conf.Positional] = CONFIG
    """The config file that they were trained with."""
    out: Path = Path("runs/vlm")
    """Folder that vlm.train wrote to."""
    only: str = ""
    """Only the runs whose name contains this."""
    encoder: str = ""
    """An encoder of scenes (vlm.scenes.encoder.ENCODERS) to write as well, in half precision."""
    to: Path = FOLDER
    """Folder of the language models, one folder a family, and of the encoder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input."""
    options = parse(Options, argv, "python -m vlm.pretrained")
    return guarded(lambda: write(options), out=options.to)


def write(options: Options) -> int:
    """Write the language models of the command line; returns the exit status.

    Raises:
        UserError: If a run is not trained.
    """
    from ssm_retrieval import models
    from vlm import answering, folders
    from vlm.config import read_file

    runs = [run for run in read_file(options.config) if options.only in run.name]
    if not runs:
        raise UserError(f"--only {options.only}: no run of {options.config} has that in its name")
    for run in runs:
        lm = answering.load(run, options.out).lm
        stage = run.stage_ids()[-1]
        spent = [folders.finished(options.out / name) for name in run.stage_ids()]
        made = {
            "config": options.config.name, "run": run.name, "stage": stage,
            "commit": folders.commit(options.out / stage), "parameters": lm.num_parameters(),
            "steps": [one.steps for one in spent], "seconds": [round(one.seconds) for one in spent],
        }  # fmt: skip
        place = options.to / f"{run.family}{kind_of(run).removeprefix(SCENES)}"
        options.to.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.to) as temporary:
            models.save(lm, Path(temporary) / "model")
            store.write_json(Path(temporary) / "model" / MADE, made)
            if place.exists():
                shutil.rmtree(place)
            (Path(temporary) / "model").rename(place)
        print(place)
    if options.encoder:
        print(_write_encoder(options))
    return 0


def _write_encoder(options: Options) -> Path:
    from vlm.components import ENCODERS
    from vlm.scenes import encoder

    if options.encoder not in encoder.ENCODERS:
        raise UserError(f"--encoder {options.encoder} is none of {', '.join(encoder.ENCODERS)}")
    options.to.mkdir(parents=True, exist_ok=True)
    trained = encoder.trained(options.out / ENCODERS, options.encoder)
    path = options.to / f"{encoder.key(options.encoder)}.safetensors"
    half = {name: tensor.half() for name, tensor in trained.state_dict().items()}
    store.save_tensors(path, half, {"encoder": options.encoder})
    return path


if __name__ == "__main__":
    sys.exit(main())
