"""What the toolkit knows of a data set, as one object that readers, evaluator, configs and docs use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.records import Record
from vlm.data.samples import Sample
from vlm.data.tasks import Task
from vlm.metrics import Metric
from vlm.prompts import Chunk

Guess = Callable[[Sequence[Sample], Sequence[Sample]], list[str]]
Sighted = Callable[[Any], list[tuple[str, ...]]]
Read = Callable[[], Iterable[Record]]
Keep = Callable[[Read, Path, Path], Iterable[Record]]
Reword = Callable[[Record, Sequence[Chunk]], list[Chunk]]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """How answers are scored, for official files and scenes alike.

    Attributes:
        name: Name of the data set or the task; `Sample.source`.
        metric: Scores answers; None if there is none.
        max_new_tokens: Length limit of an answer. A run may allow fewer.
        blind: (training samples, questions) -> answers without the image; None if none can be learned.
        sighted: (source of questions) -> for each question the answers that serve equally well who sees the
            picture and ignores which object is asked for; None if there is no such guess.
        chance: Accuracy of a guess among the answers that a question allows; None if unknown.
    """

    name: str
    metric: Metric | None
    max_new_tokens: int
    blind: Guess | None = None
    sighted: Sighted | None = None
    chance: float | None = None


@dataclass(frozen=True, kw_only=True)
class DataSet(Scored):
    """Official files: where they are, what is asked about them, and how answers are scored.

    Attributes:
        reader: (folder, split, **options) -> records of the split, in the files' order.
        splits: Splits that the reader knows.
        files: Below the folder of annotations; {split}, SHARD, KEY and IMAGE stand for varying parts.
        task: Prompt, answer and target of a record.
        images: Folder of the pictures below the data set's own folder; "." where `Record.image` begins with
            the folders of the official archive.
        installed: () -> the data set's own folder in an installed package; None = no package has it.
        turns: Largest number of questions in a training sample; 0 = all questions about an image.
        scattered: Whether the records of one image lie apart in the files.
        keep: (read, annotations, images) -> the records that the published training data keep; None = all.
        opens_pictures: Whether the samples depend on the pictures: on their size, or by `keep`.
        reword: (record, chunks) -> the prompt of the released evaluators, if it differs from training's.
        asked: Splits that the paper evaluates, the main one first.
    """

    reader: Callable[..., Iterable[Record]]
    splits: tuple[str, ...]
    files: tuple[str, ...]
    task: Task
    images: str = "images"
    installed: Callable[[], Path] | None = None
    turns: int = 1
    scattered: bool = False
    keep: Keep | None = None
    opens_pictures: bool = False
    reword: Reword | None = None
    asked: tuple[str, ...] = ()
    max_new_tokens: int = 40
