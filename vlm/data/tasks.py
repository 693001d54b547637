"""What can be asked about a record, one `Task` per kind of question: prompt, answer, and what metrics need.

The target of a sample, by name:

    captions, domain                captioning
    answers, kind; label (yes/no)   questions
    choices, answer                 multiple choice, answer = index of the right one, None if hidden
    boxes, answer, width, height    pointing
    label, relation                 image-text match
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
from typing import Any, TypeVar

from ssm_retrieval.errors import UserError
from vlm import prompts
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
from vlm.metrics.vqa import most_frequent
from vlm.prompts import END, Box, Chunk

T = TypeVar("T")
Size = Callable[[Record], tuple[int, int]]  # width and height of a record's image
Rounds = Iterable[Sequence[Any]]


def _one_round(group: Sequence[Any], every_slot: bool) -> Rounds:
    return [group]


@dataclass(frozen=True)
class Task:
    """A kind of question about records of one type.

    Attributes:
        name: `Sample.task`.
        record: The type of the records.
        prompt: (records about one image, whether answers are told, size, whether to print what the released
            code prints) -> chunks. Takes one record if answers are not told.
        target: (record, size) -> what metrics need to know of the right answer, as JSON values.
        rounds: (records about one image, whether choices come in every order) -> lists of records. No record
            of a list gives the answer of another one away; each list makes samples of its own.
    """

    name: str
    record: type[Record]
    prompt: Callable[[Sequence[Any], bool, Size, bool], list[Chunk]]
    target: Callable[[Any, Size], dict[str, Any]]
    rounds: Callable[[Sequence[Any], bool], Rounds] = _one_round


def known(record: Record, answer: T | None) -> T:
    """Return the answer of a record.

    Raises:
        UserError: If it is hidden.
    """
    if answer is None:
        raise UserError(f"split {record.split!r} has no answers, so it can be used for evaluation only")
    return answer


def _rounds(values: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Split values into rounds: the first value of every key, then the second of every key, and so on."""
    seen: Counter[Hashable] = Counter()
    rounds: list[list[T]] = []
    for value in values:
        turn = seen[key(value)]
        seen[key(value)] += 1
        rounds += [[]] if turn == len(rounds) else []
        rounds[turn].append(value)
    return rounds


def _sides(record: Record, size: Size) -> dict[str, int]:
    width, height = size(record)
    return {"width": width, "height": height}


# --- captions -----------------------------------------------------------------------------------------------


def _caption_rounds(group: Sequence[Captioned], every_slot: bool) -> Rounds:
    """Each caption by itself, with an id of its own."""
    for record in group:
        for i, caption in enumerate(record.captions):
            yield [replace(record, id=f"{record.id}#{i}", captions=(caption,))]


def _caption_prompt(turns: Sequence[Captioned], told: bool, size: Size, published: bool) -> list[Chunk]:
    return prompts.captioning(turns[0].captions[0] if told else None)


CAPTIONING = Task(
    "captioning", Captioned, _caption_prompt,
    lambda record, size: {"captions": record.captions, "domain": record.domain}, _caption_rounds,
)  # fmt: skip


def _spans(record: GroundedCaption) -> list[tuple[int, int, Sequence[Box]]]:
    """Spans inside the caption that do not overlap, with their non-empty boxes."""
    spans: list[tuple[int, int, Sequence[Box]]] = []
    end = 0
    for span in record.spans:
        boxes = [box for box in span.boxes if min(box) >= 0 and box[2] > box[0] and box[3] > box[1]]
        if boxes and end <= span.start < span.end <= len(record.caption):
            spans.append((span.start, span.end, boxes))
            end = span.end
    return spans


def _mention_prompt(turns: Sequence[GroundedCaption], told: bool, size: Size, published: bool) -> list[Chunk]:
    (record,) = turns
    spans, sides = _spans(record), size(record)
    chunks = prompts.grounded_captioning(record.caption, spans, *sides, published=published)
    return chunks if told else chunks[:-1]


def _mention_target(record: GroundedCaption, size: Size) -> dict[str, Any]:
    return {"caption": record.caption, "spans": [(s.start, s.end, s.boxes) for s in record.spans]}


GROUNDED_CAPTIONING = Task("grounded captioning", GroundedCaption, _mention_prompt, _mention_target)


# --- questions ----------------------------------------------------------------------------------------------


def questions(*, keep_case: bool = False, yes_no: bool = False) -> Task:
    """Make a task of open questions, trained on the most frequent answer.

    Args:
        keep_case: Whether to keep the case of questions and answers, for documents, whose capitals mean
            something.
        yes_no: Add the label "yes" to the target.

    Returns:
        The task.
    """

    def prompt(turns: Sequence[Question], told: bool, size: Size, published: bool) -> list[Chunk]:
        asked = [(t.question, known(t, most_frequent(t.answers)) if told else None) for t in turns]
        ocr = " ".join(turns[0].ocr)
        return prompts.vqa(asked, ocr=ocr, keep_case=keep_case, published=published)

    def target(record: Question, size: Size) -> dict[str, Any]:
        found: dict[str, Any] = {"answers": record.answers, "kind": record.kind}
        return found | ({"label": record.answers == ("yes",)} if yes_no else {})

    return Task("vqa", Question, prompt, target)


def _match_prompt(turns: Sequence[Statement], told: bool, size: Size, published: bool) -> list[Chunk]:
    return prompts.image_text_match(turns[0].statement, turns[0].label if told else None)


MATCH = Task(
    "image-text match", Statement, _match_prompt,
    lambda record, size: {"label": record.label, "relation": record.relation},
)  # fmt: skip


# --- choices ------------------------------------------------------------------------------------------------


def _every_slot(record: Choice, moved: bool) -> Iterator[Choice]:
    """The question once per choice, the right one in each slot once, in an order that its id decides.

    The right choice is swapped with the one in the slot, or moved there.
    """
    right = known(record, record.answer)
    places = range(len(record.choices))
    for slot in random.Random(f"{record.source} {record.id}").sample(places, len(places)):
        order = list(places)
        if moved:
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


def _choice_rounds(moved: bool) -> Callable[[Sequence[Choice], bool], Rounds]:
    def rounds(group: Sequence[Choice], every_slot: bool) -> Rounds:
        if not every_slot:
            return [group]
        slots = [slot for record in group for slot in _every_slot(record, moved)]
        return _rounds(slots, lambda choice: choice.id.rpartition("#")[0])

    return rounds


def choices(*, keep_case: bool = False, moved: bool = False) -> Task:
    """Make a task that asks for the letter of one of several texts.

    Args:
        keep_case: Whether to keep the case of questions, for diagrams.
        moved: How training puts the right choice into another slot. True moves it there, as published for
            Visual7W; False swaps it with the choice that is there.

    Returns:
        The task.
    """

    def prompt(turns: Sequence[Choice], told: bool, size: Size, published: bool) -> list[Chunk]:
        offered = [(t.question, t.choices, known(t, t.answer) if told else None) for t in turns]
        return prompts.multiple_choice(offered, ocr=turns[0].ocr, keep_case=keep_case)

    def target(record: Choice, size: Size) -> dict[str, Any]:
        return {"choices": record.choices, "answer": record.answer}

    return Task("multiple choice", Choice, prompt, target, _choice_rounds(moved))


def _pointing_prompt(turns: Sequence[Choice], told: bool, size: Size, published: bool) -> list[Chunk]:
    shown = [(t.question, t.boxes, known(t, t.answer) if told else None) for t in turns]
    return prompts.pointing(shown, *size(turns[0]), published=published)


POINTING = Task(
    "pointing", Choice, _pointing_prompt,
    lambda record, size: {"boxes": record.boxes, "answer": record.answer} | _sides(record, size),
    _choice_rounds(moved=True),
)  # fmt: skip


# --- boxes --------------------------------------------------------------------------------------------------


def _box_rounds(group: Sequence[Grounded], every_slot: bool) -> Rounds:
    return _rounds(group, lambda grounded: grounded.box)


def _grounding_prompt(turns: Sequence[Grounded], told: bool, size: Size, published: bool) -> list[Chunk]:
    asked = [(t.phrase, t.box if told else None) for t in turns]
    return prompts.grounding(asked, *size(turns[0]), published=published)


def _dense_prompt(turns: Sequence[Grounded], told: bool, size: Size, published: bool) -> list[Chunk]:
    asked = [(t.box, t.phrase if told else None) for t in turns]
    return prompts.dense_captioning(asked, *size(turns[0]), published=published)


GROUNDING = Task(
    "grounding", Grounded, _grounding_prompt,
    lambda record, size: {"box": record.box} | _sides(record, size), _box_rounds,
)  # fmt: skip
DENSE_CAPTIONING = Task(
    "dense captioning", Grounded, _dense_prompt,
    lambda record, size: {"box": record.box, "captions": [record.phrase]}, _box_rounds,
)  # fmt: skip


# --- conversations ------------------------------------------------------------------------------------------


def _last_turn(record: Conversation, size: Size) -> dict[str, Any]:
    return {"text": prompts.without_marker(record.turns[-1].text)}


def _request_prompt(turns: Sequence[Conversation], told: bool, size: Size, published: bool) -> list[Chunk]:
    request, caption = (prompts.without_marker(turn.text) for turn in turns[0].turns)
    answer = [Chunk(prompts.sentence(caption) + END, supervised=True)]
    return [Chunk(request + "\n"), *(answer if told else [])]


def _chat_prompt(turns: Sequence[Conversation], told: bool, size: Size, published: bool) -> list[Chunk]:
    roles = {"human": "human", "assistant": "gpt"}
    said = [(roles[turn.role], turn.text) for turn in turns[0].turns]
    chunks = prompts.chat(said, published=published)
    return chunks if told else chunks[:-1]


# a caption in answer to a request in the data set's words
REQUESTED_CAPTION = Task("captioning", Conversation, _request_prompt, _last_turn)
CHAT = Task("chat", Conversation, _chat_prompt, _last_turn)
