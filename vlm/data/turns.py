"""Records of official files as samples: the turns of training, and the questions of evaluation.

Training packs the questions about one image into the turns of a sample, at most as many as published.
Evaluation asks one question per sample, without its answer; `target` has what metrics need
(`vlm.data.tasks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ssm_retrieval.errors import UserError
from vlm.data.declaration import DataSet
from vlm.data.files import MissingFile
from vlm.data.records import Record
from vlm.data.samples import Sample
from vlm.data.tasks import Size
from vlm.prompts import Chunk


@dataclass(frozen=True)
class Rules:
    """How records become samples.

    Attributes:
        training: True for samples with answers and several turns, False for evaluation.
        regions: What `Grounded` records ask for, "grounding" or "dense captioning".
        every_slot: Training shows a multiple-choice question once per choice, with the right one at another
            place each time, as published.
        published: Print exactly what the released code prints, in training and evaluation, instead of better
            text (docs/data.md lists the differences). Its evaluators have wordings of their own
            (`DataSet.reword`).
    """

    training: bool = True
    regions: str = "grounding"
    every_slot: bool = True
    published: bool = False

    def __post_init__(self) -> None:
        if self.regions not in ("grounding", "dense captioning"):
            raise UserError(f"regions={self.regions!r} must be 'grounding' or 'dense captioning'")


def samples(records: Iterable[Record], dataset: DataSet, rules: Rules, size: Size) -> Iterator[Sample]:
    """Yield samples of a data set's records, in the order of the records' images.

    Args:
        records: Records of one data set.
        dataset: Its declaration.
        rules: How records become samples.
        size: Gives width and height of an image; called if the record lacks them and boxes need them.

    Yields:
        Samples.

    Raises:
        UserError: If a record for training has no answer, or a box is empty.
    """

    def sized(record: Record) -> tuple[int, int]:
        return (record.width, record.height) if record.width and record.height else size(record)

    if not rules.training:
        for record in records:
            yield _asked(record, dataset, rules, sized)
        return
    for group in _by_image(records, dataset.scattered):
        for turns in _packed(group, dataset, rules):
            first, chunks = turns[0], _prompt(turns, dataset, rules, sized)
            yield Sample(first.id, first.source, first.image, dataset.task.name, tuple(chunks))


def _by_image(records: Iterable[Record], scattered: bool) -> Iterator[list[Record]]:
    """Records of the same image; where files scatter them, all records are held in memory at once."""
    images: dict[str, list[Record]] = {}
    for image, group in groupby(records, lambda record: record.image):
        if scattered:
            images.setdefault(image, []).extend(group)
        else:
            yield list(group)
    yield from images.values()


def _packed(group: Sequence[Record], dataset: DataSet, rules: Rules) -> Iterator[Sequence[Record]]:
    """The records of one image as turns of samples, with ids of their own.

    No sample asks the same thing twice, or its first answer could be copied: a multiple-choice question
    with the right choice in another slot, another expression for the same box, go into another sample.
    """
    for turns in dataset.task.rounds(group, rules.every_slot):
        step = dataset.turns or len(turns)
        yield from (turns[i : i + step] for i in range(0, len(turns), step))


def _asked(record: Record, dataset: DataSet, rules: Rules, size: Size) -> Sample:
    """A sample without its answer, which `target` has."""
    task, chunks = dataset.task, _prompt([record], dataset, rules, size)
    if rules.published and dataset.reword is not None:
        chunks = dataset.reword(record, chunks)
    target = task.target(record, size)
    return Sample(record.id, record.source, record.image, task.name, tuple(chunks), target)


def _prompt(turns: Sequence[Record], dataset: DataSet, rules: Rules, size: Size) -> list[Chunk]:
    try:
        return dataset.task.prompt(turns, rules.training, size, rules.published)
    except MissingFile:  # its message says everything
        raise
    except ValueError as error:
        raise UserError(f"{turns[0].source} {turns[0].id}: {error}") from error
