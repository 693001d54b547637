"""Records of official files as samples: the turns of training, and the questions of evaluation.

Training packs what is asked about one image into the turns of one sample, at most as many as published.
Evaluation asks one question a sample, without its answer, and `target` has what metrics need:

    captions, domain                captioning
    answers, kind; label (POPE)     questions
    choices, answer                 multiple choice, answer = index of the right one, None where hidden
    boxes, answer, width, height    pointing
    label                           image-text match
    box, width, height              grounding, in pixels
    box, captions                   dense captioning
    caption, spans                  grounded captioning, spans = [start, end, boxes]
    text                            chat: the last turn
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeVar, cast

from ssm_retrieval.errors import UserError
from vlm import prompts
from vlm.data.files import MissingFile
from vlm.data.records import (
    Captioned,
    Choice,
    Conversation,
    Grounded,
    GroundedCaption,
    Question,
    Record,
    Statement,
)
from vlm.data.samples import Sample
from vlm.prompts import END, INSTRUCTIONS, Chunk

T = TypeVar("T")
Size = Callable[[Record], tuple[int, int]]  # width and height of a record's image

# Turns of a training sample, as published; 0: as many as there are. Others have one.
TURNS = {
    "vqav2": 20,
    "gqa": 20,
    "visual-genome-regions": 10,
    "visual-genome-qa": 10,
    "visual7w-telling": 3,
    "visual7w-pointing": 3,
    "refcoco": 0,
    "refcoco+": 0,
    "refcocog": 0,
    "docvqa": 0,
    "infographicvqa": 0,
    "textvqa": 0,
    "ocr-vqa": 0,
}
SCATTERED = ("gqa", "refcoco", "refcoco+", "refcocog")  # files where an image's records are not together
KEEP_CASE = ("ai2d", "docvqa", "infographicvqa")


@dataclass(frozen=True)
class Rules:
    """How records become samples.

    training: answers, several turns a sample; else evaluation. regions: what `Grounded` records ask for,
    "grounding" or "dense captioning". every_slot: training shows each multiple-choice question once per
    choice, with the right one at another place each time, as published. published: evaluation in the released
    evaluators' own wording, where that differs from the one of training (POPE, GQA, TextVQA, pointing).
    """

    training: bool = True
    regions: str = "grounding"
    every_slot: bool = True
    published: bool = False

    def __post_init__(self) -> None:
        if self.regions not in ("grounding", "dense captioning"):
            raise UserError(f"regions={self.regions!r} must be 'grounding' or 'dense captioning'")


def samples(records: Iterable[Record], rules: Rules, size: Size) -> Iterator[Sample]:
    """Samples of one data set's records, in the order of the records' images.

    size: asked for the images whose size the records lack but boxes need.
    Raises UserError for records without an answer in training, and boxes without area.
    """
    if not rules.training:
        for record in records:
            yield _asked(record, rules, size)
        return
    for group in _by_image(records):
        for turns in _packed(group, rules):
            yield _told(turns, rules, size)


# --- training -----------------------------------------------------------------------------------------------


def _by_image(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records of the same image; where files scatter them, all records are held in memory at once."""
    scattered: dict[str, list[Record]] = {}
    for image, group in groupby(records, lambda record: record.image):
        found = list(group)
        if found[0].source in SCATTERED:
            scattered.setdefault(image, []).extend(found)
        else:
            yield found
    yield from scattered.values()


def _packed(group: Sequence[Record], rules: Rules) -> Iterator[Sequence[Record]]:
    """The records of one image as turns of samples, with ids of their own.

    No sample asks the same thing twice, or its first answer could be copied: a multiple-choice question
    with the right choice in another slot, another expression for the same box, go into another sample.
    """
    first = group[0]
    if isinstance(first, Captioned):
        rounds: Iterable[list[Any]] = (
            [replace(record, id=f"{record.id}#{i}", captions=(caption,))]
            for record in cast(Sequence[Captioned], group)
            for i, caption in enumerate(record.captions)
        )
    elif isinstance(first, Choice) and rules.every_slot:
        slots = [slot for record in cast(Sequence[Choice], group) for slot in _every_slot(record)]
        rounds = _rounds(slots, lambda choice: choice.id.rpartition("#")[0])
    elif isinstance(first, Grounded):
        rounds = _rounds(cast(Sequence[Grounded], group), lambda grounded: grounded.box)
    else:
        rounds = [list(group)]
    limit = TURNS.get(first.source, 1)
    for turns in rounds:
        step = limit or len(turns)
        yield from (turns[i : i + step] for i in range(0, len(turns), step))


def _rounds(values: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """The first value of every key, the second ones, and so on."""
    seen: Counter[Hashable] = Counter()
    rounds: list[list[T]] = []
    for value in values:
        turn = seen[key(value)]
        seen[key(value)] += 1
        rounds += [[]] if turn == len(rounds) else []
        rounds[turn].append(value)
    return rounds


def _every_slot(record: Choice) -> Iterator[Choice]:
    """The question once per choice, the right one in each slot once, in an order that its id decides.

    The right choice is swapped with the one in the slot; of Visual7W it is moved there, as published.
    """
    right = _known(record, record.answer)
    places = range(len(record.choices))
    for slot in random.Random(f"{record.source} {record.id}").sample(places, len(places)):
        order = list(places)
        if record.source.startswith("visual7w"):
            order.insert(slot, order.pop(right))
        else:
            order[slot], order[right] = order[right], order[slot]
        yield replace(
            record,
            id=f"{record.id}#{slot}",
            choices=tuple(record.choices[i] for i in order),
            boxes=tuple(record.boxes[i] for i in order) if record.boxes else (),
            answer=slot,
        )


def _told(turns: Sequence[Record], rules: Rules, size: Size) -> Sample:
    """A sample with its answers."""
    task, chunks = _prompt(turns, rules, size)
    return Sample(turns[0].id, turns[0].source, turns[0].image, task, tuple(chunks))


def _known(record: Record, answer: T | None) -> T:
    if answer is None:
        raise UserError(f"split {record.split!r} has no answers, so it can be asked but not trained on")
    return answer


def usual(answers: Sequence[str]) -> str | None:
    """What most annotators said, the first of equally frequent ones; None without answers."""
    return Counter(answers).most_common(1)[0][0] if answers else None


# --- evaluation ---------------------------------------------------------------------------------------------


def _asked(record: Record, rules: Rules, size: Size) -> Sample:
    """A sample without its answer, which `target` has."""
    task, chunks = _prompt([record], rules, size)
    if rules.published:
        chunks = _released(record, chunks)
    return Sample(record.id, record.source, record.image, task, tuple(chunks), _target(record, rules, size))


def _target(record: Record, rules: Rules, size: Size) -> dict[str, Any]:
    match record:
        case Captioned():
            found: dict[str, Any] = {"captions": record.captions, "domain": record.domain}
        case Question():
            found = {"answers": record.answers, "kind": record.kind}
            if record.source == "pope":
                found["label"] = record.answers == ("yes",)
        case Choice(boxes=()):
            found = {"choices": record.choices, "answer": record.answer}
        case Choice():
            found = {"boxes": record.boxes, "answer": record.answer} | _sides(record, size)
        case Statement():
            found = {"label": record.label, "relation": record.relation}
        case Grounded() if rules.regions == "grounding":
            found = {"box": record.box} | _sides(record, size)
        case Grounded():
            found = {"box": record.box, "captions": [record.phrase]}
        case GroundedCaption():
            spans = [(span.start, span.end, span.boxes) for span in record.spans]
            found = {"caption": record.caption, "spans": spans}
        case Conversation():
            found = {"text": record.turns[-1].text}
        case _:
            raise TypeError(f"{type(record).__name__} has no rule")
    return found


def _sides(record: Record, size: Size) -> dict[str, int]:
    width, height = _size(record, size)
    return {"width": width, "height": height}


def _released(record: Record, chunks: Sequence[Chunk]) -> list[Chunk]:
    """The prompt of the released evaluators."""
    if record.source in ("gqa", "textvqa"):
        return [Chunk("".join(chunk.text for chunk in chunks))]
    if record.source == "pope" and isinstance(record, Question):
        return [Chunk(INSTRUCTIONS["vqa"] + "\n"), Chunk(prompts.sentence(record.question) + "\n")]
    if record.source == "visual7w-pointing" and isinstance(record, Choice):
        return [chunks[0], Chunk(f"Question: {record.question}\n"), *chunks[2:]]
    return list(chunks)


# --- one rule a type of record ------------------------------------------------------------------------------


def _prompt(turns: Sequence[Any], rules: Rules, size: Size) -> tuple[str, list[Chunk]]:
    """Task and chunks of records of one type about one image; in evaluation of one record, unanswered."""
    try:
        return _chunks(turns, rules, size)
    except MissingFile:  # which says all
        raise
    except ValueError as error:
        raise UserError(f"{turns[0].source} {turns[0].id}: {error}") from error


def _chunks(turns: Sequence[Any], rules: Rules, size: Size) -> tuple[str, list[Chunk]]:
    first, told = turns[0], rules.training
    keep_case = first.source in KEEP_CASE
    match first:
        case Captioned():
            return "captioning", prompts.captioning(first.captions[0] if told else None)
        case Question():
            asked = [(t.question, _known(t, usual(t.answers)) if told else None) for t in turns]
            return "vqa", prompts.vqa(asked, ocr=" ".join(first.ocr), keep_case=keep_case)
        case Choice(boxes=()):
            offered = [(t.question, t.choices, _known(t, t.answer) if told else None) for t in turns]
            return "multiple choice", prompts.multiple_choice(offered, ocr=first.ocr, keep_case=keep_case)
        case Choice():
            shown = [(t.question, t.boxes, _known(t, t.answer) if told else None) for t in turns]
            return "pointing", prompts.pointing(shown, *_size(first, size))
        case Statement():
            return "image-text match", prompts.image_text_match(
                first.statement, first.label if told else None
            )
        case Grounded() if rules.regions == "grounding":
            named = [(t.phrase, t.box if told else None) for t in turns]
            return "grounding", prompts.grounding(named, *_size(first, size))
        case Grounded():
            marked = [(t.box, t.phrase if told else None) for t in turns]
            return "dense captioning", prompts.dense_captioning(marked, *_size(first, size))
        case GroundedCaption():
            chunks = prompts.grounded_captioning(first.caption, _usable(first), *_size(first, size))
            return "grounded captioning", chunks if told else chunks[:-1]
        case Conversation():
            task, chunks = _conversation(first)
            return task, chunks if told else chunks[:-1]
    raise TypeError(f"{type(first).__name__} has no rule")


def _conversation(record: Conversation) -> tuple[str, list[Chunk]]:
    if record.source == "llava-pretrain":
        request, caption = record.turns
        answer = prompts.sentence(caption.text) + END
        return "captioning", [Chunk(request.text + "\n"), Chunk(answer, supervised=True)]
    roles = {"human": "human", "assistant": "gpt"}
    return "chat", prompts.chat([(roles[turn.role], turn.text) for turn in record.turns])


def _usable(record: GroundedCaption) -> list[tuple[int, int, Sequence[prompts.Box]]]:
    """Spans inside the caption that start behind the last one kept, with their boxes that have an area."""
    spans: list[tuple[int, int, Sequence[prompts.Box]]] = []
    end = 0
    for span in record.spans:
        boxes = [box for box in span.boxes if min(box) >= 0 and box[2] > box[0] and box[3] > box[1]]
        if boxes and end <= span.start < span.end <= len(record.caption):
            spans.append((span.start, span.end, boxes))
            end = span.end
    return spans


def _size(record: Record, size: Size) -> tuple[int, int]:
    return (record.width, record.height) if record.width and record.height else size(record)
