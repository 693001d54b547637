"""Questions in a harness's words as prompts in the model's published wording, and its answers as text.

A harness hands over one string. That of a task of `vlm.harness.export_scenes` has a mark before each chunk of
the prompt, and is taken as it is. Any other is a question with the harness's own instructions around it; they
are replaced by the published ones, which the model was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from vlm import prompts
from vlm.prompts import INSTRUCTIONS, LETTERS, Chunk

MARK = "\x1e"  # between two chunks: the record separator of ASCII, which no question has
KEEP_CASE = ("ai2d", "docvqa", "infovqa", "infographic")  # in the names of tasks about diagrams and documents
# How requests for captions begin, in lmms-eval (coco, nocaps, textcaps) and VLMEvalKit (coco), in lower case.
CAPTIONS = ("provide a one-sentence caption", "describe the image", "please describe this image")
# What stands before the phrase of a request for a box: ours, and lmms-eval's (refcoco).
PHRASES = (INSTRUCTIONS["grounding"], "the bounding box coordinate of the region this sentence describes:")
# Lines that say how to answer, which the published instruction says already.
RULES = re.compile(
    r"(please )?answer (the question )?(using a single word or phrase|(with )?yes or no)"
    r"|answer with the option'?s letter .*"
    r"|please select the correct answer from the options( above)?"
    r"|when the provided information is insufficient, respond with 'unanswerable'"
    r"|(options|choices|there are several options|answer):?",
    re.IGNORECASE,
)
OPTION = re.compile(r"\(?([A-Z])[.):]\s*(\S.*)")


def packed(chunks: Sequence[Chunk]) -> str:
    """Return a prompt as one string that `worded` takes apart again."""
    return MARK.join(["", *(chunk.text for chunk in chunks)])


def is_packed(text: str) -> bool:
    """Return whether a string is that of `packed`."""
    return text.startswith(MARK)


def worded(text: str, task: str = "") -> list[Chunk]:
    """Return the prompt for a harness's text.

    Args:
        text: What the harness asks, or a prompt of `packed`.
        task: The harness's name of the task; decides whether capitals are kept.

    Returns:
        The prompt: of a caption, of a box, of a choice if options A, B, ... are listed, else of a question.
    """
    if is_packed(text):
        return [Chunk(part) for part in text.split(MARK)[1:]]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    whole = " ".join(lines)
    if whole.lower().startswith(CAPTIONS):
        return prompts.captioning()
    for said in PHRASES:
        if said in whole:
            return prompts.grounding([(whole.partition(said)[2], None)], 1, 1)
    keep_case = any(name in task.lower() for name in KEEP_CASE)
    lines = [line for line in lines if not RULES.fullmatch(line.rstrip(". "))]
    options = _options(lines)
    asked = lines[: len(lines) - len(options)] if options else lines
    question = " ".join(line.removeprefix("Question:").strip() for line in asked)
    if options:
        return prompts.multiple_choice([(question, options, None)], keep_case=keep_case)
    return prompts.vqa([(question, None)], keep_case=keep_case)


def _options(lines: Sequence[str]) -> list[str]:
    """The texts of two or more options at the end, lettered from A on; else []."""
    found: list[str] = []
    for line in lines:
        option = OPTION.fullmatch(line)
        wanted = LETTERS[len(found)] if len(found) < len(LETTERS) else None
        if option is not None and option[1] == wanted:
            found.append(option[2])
        else:
            found = [option[2]] if option is not None and option[1] == "A" else []
    return found if len(found) > 1 else []


def answered(asked: str, said: str, until: Iterable[str] = ()) -> str:
    """Return an answer as a harness expects it.

    Args:
        asked: The harness's text. The answer to one of `packed` is left as it is.
        said: The model's answer.
        until: Texts at which the answer ends.

    Returns:
        The answer, without the full stop that ends all published answers.
    """
    for stop in until:
        said = said.partition(stop)[0] if stop else said
    return said if is_packed(asked) else said.strip().removesuffix(".")
