"""Configuration of a VLM: model, training stages, evaluation. Frozen, hashed, saved beside every number.

A config file is Python with a function `get_config()` that returns a list of `Run`, such as
vlm/configs/cpu_tiny.py. A run is a chain of stages. The id of a stage is a hash of everything that decides
its weights, including the stages before it, so runs that begin alike share stages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ssm_retrieval import registry
from ssm_retrieval.errors import UserError
from vlm import schema, tokenizer
from vlm.data.config import Data, Files, Scenes, Sources
from vlm.prompts import Layout
from vlm.schema import AsTuple, FileName, Momentum, Natural, NonNegative, Positive, Seed, Text, checked

__all__ = ["Data", "Files", "Run", "Scenes", "Stage", "from_dict", "read_file"]

TRAINING_VERSION = 2  # raise it when a config leads to different numbers
ImageSize = Annotated[int, Field(ge=16, le=4096)]


def _pairs(value: Any) -> Any:
    """Turn the pairs of `Stage.to_dict` back into a dict of sources."""
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return {name: source for name, source in value if isinstance(name, str)}
    return value


@checked
class Stage:
    """One stage of training: a number of steps, or of epochs over all its data.

    Attributes:
        data: Sources by name.
        batch_size: Examples per forward pass.
        lr: Peak learning rate.
        steps: Optimiser steps; give this or `epochs`.
        epochs: Passes over all data.
        weights: Shares of the sources (`vlm.data.mixture.Mixture`); None shuffles all examples together.
        until: Running losses by source, in nats; the stage ends when all are below, after `steps` at the
            latest. Its rate stays at the peak.
        box_spread: Standard deviation of the soft targets of a box's numbers, in hundredths; 0 = hard ones.
        train: "connector", or "all" for connector and language model. The vision encoder is always frozen.
        layouts: Layouts of the prompts; consecutive batches take turns. Empty = the run's layout.
        image_size: Pixels a side; 0 = the run's.
        warmup: Share of the steps in which the rate rises; it then falls to 0 as a cosine.
        weight_decay: Weight decay of AdamW.
        betas: Betas of AdamW.
        grad_clip: Largest norm of the gradient; 0 = no limit.
        max_length: Tokens at which a sequence is cut.
        group: Number of batches whose examples are sorted by length together.
        accumulate: Forward passes per optimiser step.
        workers: Processes that prepare batches.

    Raises:
        UserError: For values out of range and invalid combinations.
    """

    data: Annotated[Sources, BeforeValidator(_pairs), Field(min_length=1)]
    batch_size: Positive
    lr: Annotated[float, Field(gt=0, le=100)]
    steps: Natural = 0
    epochs: NonNegative = 0.0
    weights: Mapping[str, NonNegative] | None = None
    until: Mapping[str, Annotated[float, Field(gt=0)]] = field(default_factory=dict)
    box_spread: Annotated[float, Field(ge=0, le=100)] = 0.0
    train: Literal["connector", "all"] = "all"
    layouts: Annotated[tuple[Layout, ...], AsTuple] = ()
    image_size: Annotated[int, Field(ge=0, le=4096)] = 0
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.03
    weight_decay: NonNegative = 0.0
    betas: Annotated[tuple[Momentum, Momentum], AsTuple] = (0.9, 0.95)
    grad_clip: NonNegative = 1.0
    max_length: Positive | None = None
    group: Positive = 1
    accumulate: Positive = 1
    workers: Annotated[int, Field(ge=0, le=1024)] = 0

    def __post_init__(self) -> None:
        if (self.steps > 0) == (self.epochs > 0):
            raise UserError(f"steps={self.steps} and epochs={self.epochs}: give one of them")
        if 0 < self.image_size < 16:
            raise UserError(f"image_size={self.image_size} is too small; use at least 16, or 0 for the run's")
        if self.until and (self.epochs or not self.until.keys() <= self.data.keys()):
            raise UserError(
                f"until={dict(self.until)} must name sources of data ({', '.join(self.data)}) "
                "and stand beside steps, not epochs"
            )
        if self.weights is not None and self.weights.keys() != self.data.keys():
            odd = ", ".join(sorted(self.weights.keys() ^ self.data.keys()))
            raise UserError(f"weights and data must have the same names; only one of them has {odd}")

    def to_dict(self) -> dict[str, Any]:
        """Return the stage as JSON values.

        Sources are a list of pairs, because their order decides which example comes when.
        """
        data = [(name, dataclasses.asdict(source)) for name, source in self.data.items()]
        return dataclasses.asdict(self) | {"data": data}


@checked
class Run:
    """A model, its training stages, and what it is evaluated on.

    A run with `checkpoint` is a released model: it has no stages and can only be evaluated and asked.

    Attributes:
        name: Names the tables of results.
        model: Preset of the language model (`models.build`); with `checkpoint` one of its family.
        stages: Run one after the other; none with `checkpoint`.
        evaluation: Sources by name.
        model_overrides: Options that differ from the preset's.
        init: Pretrained weights of the language model: "scenes" or "scenes-any-order", those of its family
            that come with the toolkit (`vlm.pretrained`), whose shape decides, or a name or folder for
            `models.load`.
        encoder: "scenes", "scenes-16px" or "scenes-32px" (trained on rendered scenes on first use); "words",
            scenes in words (`vlm.scenes.words`); or a name of timm, whose weights are downloaded
            (`vlm.encoder.build`).
        image_size: Pixels a side.
        tokenizer: "scenes"; "own", made of the run's own training texts; or a name or folder that
            `tokenizers` reads.
        layout: Where the image stands in the prompt.
        seed: Seed of weights and order of data.
        precision: Precision of training and evaluation; "no" = float32. Processors without bfloat16 emulate
            it, many times slower.
        max_new_tokens: Most tokens of an answer.
        cache: Keep features on disk.
        checkpoint: A released Mamba-VL or Pythia-VL, as `vlm.model.load` takes it. The encoder has the
            weights that are in it, and must be of its kind and size.
        imports: Your own modules that register data sets or models. Commands that are given the run's folder
            import them again. They are not part of a stage's id.

    Raises:
        UserError: For values out of range and invalid combinations.
    """

    name: FileName
    model: str
    stages: Annotated[tuple[Stage, ...], AsTuple]
    evaluation: Sources
    model_overrides: Mapping[str, Any] = field(default_factory=dict)
    init: Text | None = None
    encoder: Text = "scenes"
    image_size: ImageSize = 64
    tokenizer: Text = "scenes"
    layout: Layout = "agnostic"
    seed: Seed = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 16
    cache: bool = True
    checkpoint: Text | None = None
    imports: Annotated[tuple[Text, ...], AsTuple] = ()

    def __post_init__(self) -> None:
        from ssm_retrieval import models

        if self.checkpoint is None and not self.stages:
            raise UserError(f"run {self.name!r} has no stages; give at least one, or a released checkpoint")
        if self.checkpoint is not None and (self.stages or self.init or self.model_overrides):
            raise UserError(
                f"run {self.name!r} has checkpoint={self.checkpoint!r}, which is a whole model; give it "
                "neither stages nor init nor model_overrides"
            )
        if self.checkpoint is not None and self.tokenizer == tokenizer.OWN:
            raise UserError(
                f"tokenizer={tokenizer.OWN!r} of run {self.name!r} is made of training texts, and a released "
                "checkpoint has none; give the tokenizer that it was trained with"
            )
        try:
            json.dumps(dict(self.model_overrides), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"model_overrides of run {self.name!r} must be plain finite values ({error})"
            ) from None
        try:
            models.config(self.model, **self.model_overrides)
        except (UserError, TypeError) as error:
            raise UserError(f"model {self.model!r} of run {self.name!r}: {error}") from None

    @property
    def family(self) -> str:
        """Architecture of the language model: "mamba", "transformer", ..."""
        from ssm_retrieval import models

        return models.architecture_of(models.config(self.model)).name

    def size(self, stage: Stage) -> int:
        """Return the pixels a side of a stage's images."""
        return stage.image_size or self.image_size

    def stage_ids(self) -> list[str]:
        """Return the folder name of every stage; that of a checkpoint names its files, and is no folder.

        Raises:
            UserError: If the tokenizer is made of training texts and a file of them is missing.
        """
        from vlm import components, pretrained
        from vlm.data import sources
        from vlm.model import state
        from vlm.scenes import VERSION, encoder

        said: Any = {"version": TRAINING_VERSION} | {
            name: getattr(self, name) for name in ("model", "model_overrides", "init", "seed", "precision")
        }
        if self.init in pretrained.INITS:
            said["init"] = f"{self.init}-{pretrained.digest(self.family, self.init)}"
        said["encoder"] = encoder.key(self.encoder) if self.encoder in encoder.ENCODERS else self.encoder
        if self.tokenizer == tokenizer.OWN:
            said["tokenizer"] = f"own-{components.text_of(self).digest()}"
        else:
            said["tokenizer"] = tokenizer.fingerprint(self.tokenizer)
        if self.checkpoint is not None:
            said |= {"checkpoint": state(self.checkpoint), "image_size": self.image_size}
            return [f"{self.family}-{self.image_size}px-released-{_digest(said)}"]
        names = []
        for number, stage in enumerate(self.stages):
            settled = stage.to_dict()
            settled |= {"layouts": stage.layouts or (self.layout,), "image_size": self.size(stage)}
            del settled["workers"]  # they change no number
            del settled["steps" if stage.epochs else "epochs"]
            if any(isinstance(source, Scenes) for source in stage.data.values()):
                settled["scenes"] = VERSION
            declared = [source.declared() for source in stage.data.values() if isinstance(source, Files)]
            if declared:  # of a data set of yours, what it declares may change
                settled["files"] = [sources.VERSION, [(d.task.name, d.turns, d.scattered) for d in declared]]
            if number == len(self.stages) - 1:  # a folder's model is asked in one layout, at one size
                if settled["layouts"] != (self.layout,):
                    settled["asked"] = self.layout
                if settled["image_size"] != self.image_size:
                    settled["asked_size"] = self.image_size
            said = {"before": said, "stage": settled}
            names.append(f"{self.family}-{self.size(stage)}px-seed{self.seed}-{_digest(said)}")
        return names

    def to_dict(self) -> dict[str, Any]:
        stages = [stage.to_dict() for stage in self.stages]
        return dataclasses.asdict(self) | {"stages": stages}


def _digest(said: Any) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:10]


def from_dict(saved: Mapping[str, Any]) -> Run:
    """Return the run that `Run.to_dict` saved; its modules are imported first.

    Args:
        saved: The dictionary, as read from JSON.

    Returns:
        The run.

    Raises:
        UserError: If `saved` is no such dictionary, or a module is not found.
    """
    use_modules_of([saved], "a saved run")
    return schema.parsed(Run, json.dumps(saved).encode(), Path("a saved run"), "save it again")


def use_modules_of(saved: Any, where: str) -> None:
    """Import the modules of saved runs, which must be known before the runs are parsed.

    Args:
        saved: Runs, as read from JSON. What is no run is left to the parser, which says so.
        where: Names the runs in errors.

    Raises:
        UserError: If a module is not found.
    """
    runs = [one for one in saved if isinstance(one, Mapping)] if isinstance(saved, list) else []
    for names in (run.get("imports") for run in runs):
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            registry.use(names, where=where)


def read_file(path: str | Path, imports: Sequence[str] = ()) -> list[Run]:
    """Return the runs of a config file.

    Args:
        path: A Python file with `get_config()`.
        imports: The user's modules (`--import`), imported first and added to every run.

    Returns:
        At least one run.

    Raises:
        UserError: If the file has no runs, names two runs alike, or is wrong (with the number of the line),
            or if a module is not found.
    """
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(
            f"{path} is no Python file with get_config(); give one such as vlm/configs/cpu_tiny.py"
        )
    registry.use(imports)
    runs: Any = ()
    try:
        module = registry.run_file(path)
        if callable(getattr(module, "get_config", None)):
            runs = module.get_config()
            runs = list(runs) if isinstance(runs, Sequence) and not isinstance(runs, str) else ()
    except Exception as error:
        line = _line_of(str(path.absolute()), error)
        if line is None:
            raise
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{path} line {line}: {kind}{error}") from error
    if not runs or not all(isinstance(run, Run) for run in runs):
        raise UserError(f"{path} must have get_config() that returns a list of vlm.config.Run")
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path} names two runs {twice[0]!r}; give each a name of its own")
    return [dataclasses.replace(run, imports=tuple(dict.fromkeys([*run.imports, *imports]))) for run in runs]


def _line_of(file: str, error: Exception) -> int | None:
    """The line of a config file that caused an exception; None if the exception is a bug of ours.

    A bug is an exception other than UserError that code of this project raised.
    """
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    here = [i for i, frame in enumerate(frames) if frame.filename == file]
    if not here:
        called = bool(frames) and Path(frames[-1].filename) == Path(__file__)  # get_config takes arguments
        return 1 if called or isinstance(error, SyntaxError | ValueError) else None
    ours = Path(__file__).parents[1]
    below = [Path(frame.filename) for frame in frames[here[-1] + 1 :]]
    if not isinstance(error, UserError) and any(other.is_relative_to(ours) for other in below):
        return None
    return frames[here[-1]].lineno
