"""The data of a config: rendered scenes or official files, and how many of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Tag

from ssm_retrieval.errors import UserError
from vlm.data.samples import Source
from vlm.schema import Natural, Positive, Seed, Text, checked

if TYPE_CHECKING:
    from vlm.data.declaration import DataSet, Scored

LEARNED = 4000  # training questions that a guess without the image learns from


@checked
class Scenes:
    """Samples of rendered scenes, one image each (`vlm.scenes.source.SceneSource`).

    Attributes:
        task: What is asked, one of `vlm.scenes.source.SOURCES`.
        images: Number of scenes.
        split: "train", "heldout" or "combination".
        seed: Seed of the scenes.
        turns: Most questions in a sample.
        draws: Samples of each scene, with questions of their own.
        shapes: Shapes of a scene.
    """

    task: str
    images: Positive
    split: Literal["train", "heldout", "combination"] = "train"
    seed: Seed = 0
    turns: Positive = 1
    draws: Positive = 1
    shapes: Positive = 6

    def __post_init__(self) -> None:
        self.build(answers=True)  # checks the values

    def build(self, *, answers: bool) -> Source:
        """Return the samples; `answers`: whether the prompts contain the answers."""
        from vlm.scenes.source import SceneSource

        return SceneSource(
            self.task, self.images, seed=self.seed, split=self.split,
            turns=self.turns, draws=self.draws, shapes=self.shapes, answers=answers,
        )  # fmt: skip

    def stamps(self) -> list[tuple[str, int, int]]:
        """Return nothing: scenes depend on no files."""
        return []

    def declared(self) -> Scored:
        """Return how answers are scored."""
        from vlm.scenes.declared import SCENES

        return SCENES[self.task]

    def training(self) -> Scenes | None:
        """Return what a guess without the image learns from.

        None if no such guess is declared, or if these are training scenes, whose answers it would know.
        """
        if self.declared().blind is None or self.split == "train":
            return None
        return dataclasses.replace(self, split="train", images=LEARNED, draws=1)


@checked
class Files:
    """Samples of official files (`vlm.data.sources.FileSource`).

    Attributes:
        dataset: Name in `vlm.data.registry`.
        split: One of its splits.
        annotations: Folder of the official files; None = those of an installed package (`DataSet.installed`).
        images: Folder of the pictures; None if `annotations` is.
        first: Use only this many samples; 0 = all.
        regions: What region descriptions ask for (`vlm.data.turns.Rules`).
        every_slot: As in `vlm.data.turns.Rules`.
        published: As in `vlm.data.turns.Rules`.
        filtered: Leave out what the published training data leave out (`vlm.data.filters`).
        index: Folder for an index on disk, for data sets that do not fit into memory.
        options: Options of the data set's reader.
    """

    dataset: str
    split: str
    annotations: Text | None = None
    images: Text | None = None
    first: Natural = 0
    regions: Literal["grounding", "dense captioning"] = "grounding"
    every_slot: bool = True
    published: bool = False
    filtered: bool = False
    index: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from vlm.data import registry

        found = registry.check(self.dataset, self.split)
        if (self.annotations is None) != (self.images is None):
            raise UserError(
                f"annotations={self.annotations!r} and images={self.images!r}: give both folders or none"
            )
        if self.annotations is None and found.installed is None:
            raise UserError(f"annotations=None and images=None: give the two folders of {self.dataset}")

    def build(self, *, answers: bool) -> Source:
        """Return the samples; `answers`: whether the prompts contain the answers."""
        from vlm.data.sources import FileSource
        from vlm.data.turns import Rules

        rules = Rules(answers, self.regions, self.every_slot, self.published)
        source = FileSource(
            self.dataset, *self.folders(), self.split,
            rules=rules, filtered=self.filtered, index_folder=self.index, **self.options,
        )  # fmt: skip
        return First(source, self.first) if self.first else source

    def folders(self) -> tuple[str | Path, str | Path]:
        """Return the folders of annotations and pictures.

        Raises:
            MissingPackage: If they are those of a package that is not installed.
        """
        from vlm.data import registry

        if self.annotations is not None and self.images is not None:
            return self.annotations, self.images
        found = registry.DATASETS[self.dataset]
        assert found.installed is not None
        return found.installed(), found.installed() / found.images

    def stamps(self) -> list[tuple[str, int, int]]:
        """Return path, size and time of the official files (`vlm.data.sources.stamps`)."""
        from vlm.data.sources import stamps

        return stamps(self.dataset, Path(self.folders()[0]), Path(self.index) if self.index else None)

    def declared(self) -> DataSet:
        """Return what is asked, and how answers are scored."""
        from vlm.data import registry

        return registry.asked_for(registry.DATASETS[self.dataset], self.regions)

    def training(self) -> Files | None:
        """Return what a guess without the image learns from.

        None if no such guess is declared, if there is no training split, or if this is the training split,
        whose answers it would know.
        """
        from vlm.data import registry

        if self.declared().blind is None or self.split == "train":
            return None
        if "train" not in registry.DATASETS[self.dataset].splits:
            return None
        return dataclasses.replace(self, split="train", first=LEARNED)


class First:
    """The first samples of a source, and only their pictures."""

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


def _kind_of_data(value: Any) -> str:
    files = isinstance(value, Files) or (isinstance(value, Mapping) and "dataset" in value)
    return "files" if files else "scenes"


_AnyData = Annotated[
    Annotated[Scenes, Tag("scenes")] | Annotated[Files, Tag("files")], Discriminator(_kind_of_data)
]
Sources = Mapping[Text, _AnyData]
