"""The model `ssm_retrieval_vlm` of lmms-eval, which finds it by the entry point in pyproject.toml.

lmms-eval --model ssm_retrieval_vlm --model_args run=runs/vlm/<run> --tasks pope --batch_size 16
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from lmms_eval.api.model import lmms

from ssm_retrieval.errors import UserError
from vlm import pictures
from vlm.answering import BATCH, alike
from vlm.harness import NAME
from vlm.harness.opening import opened
from vlm.harness.wording import answered, worded
from vlm.pictures import Picture


class RetrievalVLM(lmms):
    """A trained run or a released checkpoint that answers requests of the kind `generate_until`.

    Args:
        run: A trained run: a folder that `vlm.train` printed. Give this or `checkpoint`.
        checkpoint: The folder of a released Mamba-VL or Pythia-VL.
        batch_size: Most questions at once; "auto" stands for 64.
        max_batch_size: Not needed; the command line passes it.
        device: Device of the model; None = a GPU if there is one.
        **more: As for `vlm.harness.opening.opened`.

    Raises:
        UserError: If an argument is unknown, missing or no such folder.
    """

    is_simple = True

    def __init__(
        self,
        run: str | None = None,
        checkpoint: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **more: Any,
    ):
        super().__init__()
        self.batch_size = _batch(batch_size)
        self.answerer = opened(run, checkpoint, device, more)
        self.warned: set[str] = set()

    @property
    def device(self) -> str:
        """Device of the model."""
        return self.answerer.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer questions about one picture each.

        `max_new_tokens` and `until` of a request are respected. The answers are greedy; a request that asks
        for anything else is answered with a warning.

        Args:
            requests: Instances whose `args` are (text, generation options, doc_to_visual, number of the
                document, task, split).

        Returns:
            One answer per request.

        Raises:
            UserError: If a request has no picture, or more than one.
        """
        every = [request.args for request in requests]
        answers = [""] * len(every)
        # one task at a time, as in vlm.evaluate: the same questions meet in a batch
        for numbers in alike(((task, repr(options)) for _, options, _, _, task, _ in every), len(every)):
            options = every[numbers[0]][1]
            self._warn(options)
            until = options.get("until") or []
            said = self.answerer.answers(
                [worded(every[i][0], every[i][4]) for i in numbers],
                self._pictures([every[i] for i in numbers]),
                options.get("max_new_tokens"),
                self.batch_size,
            )
            for i, text in zip(numbers, said, strict=True):
                answers[i] = answered(every[i][0], text, [until] if isinstance(until, str) else until)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Raise UserError: nobody has scored given answers with these models."""
        _refuse("loglikelihood", requests)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Raise UserError: these models were evaluated with one question at a time."""
        _refuse("generate_until_multi_round", requests)

    def _pictures(self, asked: Sequence[Any]) -> Callable[[list[int]], list[Picture]]:
        def read(numbers: list[int]) -> list[Picture]:
            return [self._picture(*asked[i][2:]) for i in numbers]

        return read

    def _picture(self, doc_to_visual: Callable[[Any], Any], number: int, task: str, split: str) -> Picture:
        found = doc_to_visual(self.task_dict[task][split][number]) or []
        if len(found) != 1 or not hasattr(found[0], "convert"):
            kinds = ", ".join(type(visual).__name__ for visual in found) or "none"
            raise UserError(
                f"task {task}, document {number} has the visuals: {kinds}; {NAME} reads one picture per "
                "question, so leave this task out"
            )
        return pictures.rgb(found[0])

    def _warn(self, options: Mapping[str, Any]) -> None:
        """Say once per option that answers are greedy nevertheless."""
        odd = {
            "do_sample": bool(options.get("do_sample")),
            "num_beams": (options.get("num_beams") or 1) != 1,
        }
        for name in (name for name, set_ in odd.items() if set_ and name not in self.warned):
            self.warned.add(name)
            print(f"warning: {name}={options[name]} is ignored; {NAME} answers greedily", file=sys.stderr)


def _batch(given: int | str | None) -> int:
    text = str(BATCH if given in (None, "auto") else given)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"batch_size={given} must be a number from 1 on, or auto")
    return int(text)


def _refuse(kind: str, requests: Sequence[Any]) -> NoReturn:
    task = requests[0].task_name if requests else "?"
    raise UserError(f"task {task} needs {kind}, but {NAME} only generates answers; leave this task out")
