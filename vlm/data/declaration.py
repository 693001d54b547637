"""What the toolkit knows of a data set, in one object that readers, evaluator, configs and docs read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm.data.records import Record
from vlm.data.samples import Sample
from vlm.data.tasks import Task
from vlm.metrics.scores import Metric
from vlm.prompts import Chunk

Guess = Callable[[Sequence[Sample], Sequence[Sample]], list[str]]
Read = Callable[[], Iterable[Record]]
Keep = Callable[[Read, Path, Path], Iterable[Record]]
Reword = Callable[[Record, Sequence[Chunk]], list[Chunk]]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """How answers are scored, to official files and to scenes alike.

    Attributes:
        name: of the data set or the task; `Sample.source`.
        metric: what an answer is worth; None where there is none.
        max_new_tokens: of an answer. A run may allow fewer.
        blind: (training samples, questions) -> answers without the image; None where none can be learned.
        chance: accuracy of a guess among the answers that a question allows; None where that is unknown.
    """

    name: str
    metric: Metric | None
    max_new_tokens: int
    blind: Guess | None = None
    chance: float | None = None


@dataclass(frozen=True, kw_only=True)
class DataSet(Scored):
    """Official files: where they are, what is asked about them, and how answers are scored.

    Attributes:
        reader: (folder, split, **options) -> records of the split, in the files' order.
        splits: that the reader knows.
        files: below the folder of annotations; {split}, SHARD, KEY and IMAGE vary.
        task: prompt, answer and target of a record.
        images: folder of the pictures below the data set's own.
        turns: of a training sample at most; 0 = as many as there are about an image.
        scattered: whether the files have an image's records apart from each other.
        keep: (read, annotations, images) -> the records that the published training data keep; None = all.
        reword: (record, chunks) -> the prompt of the released evaluators, where that is another one.
        asked: splits that the paper evaluates, the main one first.
    """

    reader: Callable[..., Iterable[Record]]
    splits: tuple[str, ...]
    files: tuple[str, ...]
    task: Task
    images: str = "images"
    turns: int = 1
    scattered: bool = False
    keep: Keep | None = None
    reword: Reword | None = None
    asked: tuple[str, ...] = ()
    max_new_tokens: int = 40
