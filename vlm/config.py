"""What a VLM is, what it is trained on and what it is asked: frozen, hashed, written next to every number.

A config file is Python whose get_config() returns a list of `Run`s, such as vlm/configs/cpu_tiny.py. A run
is a chain of stages; a stage is named by the hash of everything that decides its weights, the stages before
it included, so runs that begin alike share what they have in common.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from models.errors import UserError
from vlm.data.samples import Source
from vlm.prompts import LAYOUTS

TRAINING_VERSION = 1  # raise it when a config leads to other numbers than before


@dataclass(frozen=True)
class Scenes:
    """Samples of rendered scenes (`vlm.scenes.source.SceneSource`), an image each."""

    task: str
    images: int
    split: str = "train"
    seed: int = 0
    turns: int = 1

    def build(self, *, answers: bool) -> Source:
        from vlm.scenes.source import SceneSource

        return SceneSource(
            self.task, self.images, seed=self.seed, split=self.split,
            turns=self.turns, answers=answers,
        )  # fmt: skip

    def chance(self) -> float | None:
        """Of guessing among the answers that a question allows; None for boxes and captions."""
        from vlm.scenes import CHANCE

        return CHANCE.get(self.task)

    def training(self) -> Scenes | None:
        """What a guess without the image learns from; None for captions: no single answer."""
        return None if self.task == "caption" else dataclasses.replace(self, split="train", images=4000)


@dataclass(frozen=True)
class Files:
    """Samples of official files (`vlm.data.sources.FileSource`).

    dataset, split: of `vlm.data.registry`. annotations, images: folders. first: only so many samples; 0: all.
    regions, every_slot, published: of `vlm.data.turns.Rules`. filtered: without what the published training
    data leave out (`vlm.data.filters`). index: folder for what is read by number, of data sets that are too
    large for memory; options: the reader's own.
    """

    dataset: str
    split: str
    annotations: str
    images: str
    first: int = 0
    regions: str = "grounding"
    every_slot: bool = True
    published: bool = False
    filtered: bool = False
    index: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def build(self, *, answers: bool) -> Source:
        from vlm.data.sources import FileSource
        from vlm.data.turns import Rules

        rules = Rules(answers, self.regions, self.every_slot, self.published)
        source = FileSource(
            self.dataset, self.annotations, self.images, self.split,
            rules=rules, filtered=self.filtered, index_folder=self.index, **self.options,
        )  # fmt: skip
        return First(source, self.first) if self.first else source

    def chance(self) -> float | None:
        """Unknown: official questions differ in their answers."""
        return None

    def training(self) -> Files | None:
        """Training questions are another split's, which a guess without the image is not given here."""
        return None


class First:
    """The first samples of a source, and their pictures alone."""

    def __init__(self, source: Source, count: int):
        self.source, self.count, self.name = source, min(count, len(source)), source.name
        self.fingerprint, self.picture = source.fingerprint, source.picture

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.source[index]

    def keys(self) -> Sequence[str]:
        return list(dict.fromkeys(self.source[i].image for i in range(self.count)))


Data = Scenes | Files


@dataclass(frozen=True)
class Stage:
    """One stretch of training: so many steps, or so many epochs of all its data.

    data, weights: sources by name and their shares (`vlm.data.mixture.Mixture`). train: "connector", or "all"
    for connector and language model; the vision encoder is frozen always. layouts: of the prompts, those of
    consecutive batches taking turns; empty = the run's. image_size: 0 = the run's. warmup: share of the
    steps; the rate then falls as a cosine to 0. group: batches that are sorted by length together.
    """

    data: Mapping[str, Data]
    batch_size: int
    lr: float
    steps: int = 0
    epochs: float = 0.0
    weights: Mapping[str, float] | None = None
    train: Literal["connector", "all"] = "all"
    layouts: tuple[str, ...] = ()
    image_size: int = 0
    warmup: float = 0.03
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    max_length: int | None = None
    group: int = 1
    accumulate: int = 1
    workers: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; the sources as pairs, since their order decides which example comes when."""
        data = [(name, dataclasses.asdict(source)) for name, source in self.data.items()]
        return dataclasses.asdict(self) | {"data": data}


@dataclass(frozen=True)
class Run:
    """A model, its stages and what it is evaluated on.

    model, model_overrides: `models.build`; init: a published language model's weights (`models.load`).
    encoder: "scenes" (trained on rendered scenes when first needed) or a name of timm (`vlm.encoder.build`),
    whose weights are fetched. tokenizer: "scenes", or a name or folder that `tokenizers` reads. seed: of
    weights and of the order of data. cache: keep features on disk. evaluation: sources by name.
    max_new_tokens: of answers.
    """

    name: str
    model: str
    stages: tuple[Stage, ...]
    evaluation: Mapping[str, Data]
    model_overrides: Mapping[str, Any] = field(default_factory=dict)
    init: str | None = None
    encoder: str = "scenes"
    image_size: int = 64
    tokenizer: str = "scenes"
    layout: str = "agnostic"
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    max_new_tokens: int = 16
    cache: bool = True

    def __post_init__(self) -> None:
        for layout in (self.layout, *(name for stage in self.stages for name in stage.layouts)):
            if layout not in LAYOUTS:
                raise UserError(f"layout {layout!r} is unknown; use {', '.join(LAYOUTS)}")
        if not self.stages:
            raise UserError(f"run {self.name!r} has no stages; give at least one")
        if self.image_size < 16:
            raise UserError(
                f"image_size={self.image_size} of run {self.name!r} is too small; use at least 16"
            )
        for stage in self.stages:
            if (stage.steps > 0) == (stage.epochs > 0):
                raise UserError(
                    f"steps={stage.steps} and epochs={stage.epochs} of run {self.name!r}: give one of them"
                )
            for name in ("batch_size", "accumulate", "group"):
                if getattr(stage, name) < 1:
                    raise UserError(f"{name}={getattr(stage, name)} of run {self.name!r} must be at least 1")

    @property
    def family(self) -> str:
        """What the language model is: "mamba", "transformer", ..."""
        import models

        name = self.model if self.model in models.FAMILIES else models.resolve(self.model)
        return name.partition("-")[0]

    def size(self, stage: Stage) -> int:
        """Pixels a side of a stage's images."""
        return stage.image_size or self.image_size

    def stage_ids(self) -> list[str]:
        """The folder name of every stage's outcome."""
        said: Any = {"version": TRAINING_VERSION} | {
            name: getattr(self, name)
            for name in ("model", "model_overrides", "init", "encoder", "tokenizer", "seed", "precision")
        }
        names = []
        for stage in self.stages:
            settled = stage.to_dict()
            settled |= {"layouts": stage.layouts or (self.layout,), "image_size": self.size(stage)}
            del settled["workers"]  # they change no number
            del settled["steps" if stage.epochs else "epochs"]
            said = {"before": said, "stage": settled}
            digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
            names.append(f"{self.family}-{self.size(stage)}px-seed{self.seed}-{digest[:10]}")
        return names

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"stages": [stage.to_dict() for stage in self.stages]}


def from_dict(saved: Mapping[str, Any]) -> Run:
    """The run that `Run.to_dict` has written, as read from JSON."""
    stages = tuple(
        Stage(**{**stage, "data": _data(dict(stage["data"])), "layouts": tuple(stage["layouts"])})
        for stage in saved["stages"]
    )
    return Run(**{**saved, "stages": stages, "evaluation": _data(saved["evaluation"])})


def _data(saved: Mapping[str, Any]) -> dict[str, Data]:
    return {name: Files(**v) if "dataset" in v else Scenes(**v) for name, v in saved.items()}


def read_file(path: str | Path) -> list[Run]:
    """The runs of a config file. Raises UserError, in one line, for a file that has none."""
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(
            f"{path} is no Python file with get_config(); give one such as vlm/configs/cpu_tiny.py"
        )
    spec = importlib.util.spec_from_file_location(f"_vlm_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runs: Sequence[Run] = module.get_config() if hasattr(module, "get_config") else ()
    if not runs or not all(isinstance(run, Run) for run in runs):
        raise UserError(f"{path} must have get_config() that returns a list of vlm.config.Run")
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path} names two runs {twice[0]!r}; give each a name of its own")
    return list(runs)
