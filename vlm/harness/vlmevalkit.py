"""The model class of VLMEvalKit; docs/harnesses.md has the lines to add to its vlmeval/config.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssm_retrieval.errors import UserError
from vlm import pictures
from vlm.harness import NAME
from vlm.harness.opening import opened
from vlm.harness.wording import answered, worded

try:
    from vlmeval.vlm.base import BaseModel
except ImportError:  # VLMEvalKit is not on PyPI; without it there is nobody to ask
    BaseModel = object


class RetrievalVLM(BaseModel):
    """A trained run or a released checkpoint that answers VLMEvalKit's messages.

    Args:
        run: A trained run: a folder that `vlm.train` printed. Give this or `checkpoint`.
        checkpoint: The folder of a released Mamba-VL or Pythia-VL.
        max_new_tokens: Length limit of an answer, if it is below the run's.
        device: Device of the model; None = a GPU if there is one.
        **more: As for `vlm.harness.opening.opened`.

    Raises:
        UserError: If an argument is unknown, missing or no such folder.
    """

    INSTALL_REQ = False
    INTERLEAVE = False

    def __init__(
        self,
        run: str | None = None,
        checkpoint: str | None = None,
        max_new_tokens: int | None = None,
        device: str | None = None,
        **more: Any,
    ):
        super().__init__()
        self.answerer = opened(run, checkpoint, device, more)
        self.max_new_tokens = max_new_tokens

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """Answer a question about one picture.

        Args:
            message: Items with type ("image" or "text") and value (a file, or a text).
            dataset: Name of the data set; decides whether capitals are kept.

        Returns:
            The answer.

        Raises:
            UserError: If the message has no picture, or more than one.
        """
        shown = [item["value"] for item in message if item["type"] == "image"]
        if len(shown) != 1:
            raise UserError(
                f"data set {dataset} asks about {len(shown)} pictures at once; {NAME} reads one per "
                "question, so leave this data set out"
            )
        asked = "\n".join(item["value"] for item in message if item["type"] == "text")
        chunks = worded(asked, dataset or "")
        return answered(asked, self.answerer.answer(pictures.read(shown[0]), chunks, self.max_new_tokens))
