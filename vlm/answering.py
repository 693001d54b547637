"""Answer questions about pictures with a trained run or a released checkpoint.

The commands, the demo and the adapters of other harnesses all answer through this file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ssm_retrieval.errors import UserError
from vlm import components, folders
from vlm.config import Run
from vlm.folders import RESULT
from vlm.model import VLM
from vlm.pictures import Picture
from vlm.prompts import END, Chunk
from vlm.tokenizer import Text

BATCH = 64


def default_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(run: Run, out: Path, device: str = "cpu") -> VLM:
    """Load the model of a trained run or of a released checkpoint.

    Args:
        run: The run.
        out: Folder of the runs.
        device: Device of the model.

    Returns:
        The model, without encoder, in evaluation mode.

    Raises:
        UserError: If the run is not trained in `out`, or its checkpoint is not what the run says.
    """
    if run.checkpoint is not None:
        return components.released(run, components.eyes_of(run, out, device).width, device)
    folder = out / run.stage_ids()[-1]
    if not (folder / RESULT).exists():
        raise UserError(f"run {run.name!r} is not trained in {out}; run python -m vlm.train first")
    model = components.model(run, components.eyes_of(run, out, device).width)
    folders.load_weights(folder, model)
    return model.to(device).eval()


def alike(keys: Iterable[Hashable], size: int) -> Iterator[list[int]]:
    """Group things by equal keys, such as prompts by length, to get batches without padding.

    Args:
        keys: One per thing.
        size: Largest group.

    Yields:
        Numbers of things with equal keys.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        groups[key].append(number)
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))


@torch.no_grad()
def say(
    model: VLM, run: Run, input_ids: Tensor, features: Tensor, most: int | None = None
) -> list[list[int]]:
    """Generate greedy answers in the run's precision.

    Args:
        model: The model.
        run: Its run.
        input_ids: (B, L) int64, prompts of one length.
        features: (B, P, F).
        most: Length limit, if it is below the run's.

    Returns:
        B lists of ids up to the end token; rows that end early repeat it.
    """
    length = min(run.max_new_tokens, most or run.max_new_tokens)
    end = components.text_of(run).encode(END)[0]
    with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
        return model.generate(input_ids, features, length, eos_token_id=end).tolist()


def answer_prompts(
    model: VLM,
    run: Run,
    prompts: Sequence[Sequence[int]],
    features: Callable[[list[int]], Tensor],
    device: str,
    most: int | None = None,
    batch_size: int = BATCH,
) -> list[str]:
    """Answer prompts of any lengths, those of one length together.

    Args:
        model: The model.
        run: Its run.
        prompts: Token ids of N prompts.
        features: Numbers of B prompts -> features (B, P, F) of their pictures.
        device: Device of the model.
        most: Length limit of an answer, if it is below the run's.
        batch_size: Most prompts at once.

    Returns:
        N answers, without the end token.
    """
    text, answers = components.text_of(run), [""] * len(prompts)
    for numbers in alike(map(len, prompts), batch_size):
        ids = torch.tensor([prompts[i] for i in numbers], device=device)
        found = say(model, run, ids, features(numbers).to(device), most)
        for i, said in zip(numbers, found, strict=True):
            answers[i] = text.decode(said)
    return answers


@dataclass(frozen=True)
class Answerer:
    """A model that answers, its run, the folder of the runs, and the model's device."""

    run: Run
    out: Path
    model: VLM
    device: str = "cpu"

    @classmethod
    def open(cls, folder: Path, device: str = "cpu") -> Answerer:
        """Load a trained run or a released checkpoint.

        Args:
            folder: A folder that `vlm.train` printed, or one of a released checkpoint.
            device: Device of the model.

        Returns:
            The model, ready to answer.

        Raises:
            UserError: If the folder is neither.
        """
        return cls.of(*folders.saved_run(folder), device)

    @classmethod
    def of(cls, run: Run, out: Path, device: str = "cpu") -> Answerer:
        """Load the model of a run.

        Args:
            run: As for `load`.
            out: As for `load`.
            device: As for `load`.

        Returns:
            The model, ready to answer.
        """
        return cls(run, out, load(run, out, device), device)

    @property
    def eyes(self) -> components.Eyes:
        """The run's vision encoder."""
        return components.eyes_of(self.run, self.out, self.device)

    @property
    def text(self) -> Text:
        """The run's tokenizer."""
        return components.text_of(self.run)

    def ids(self, chunks: Sequence[Chunk]) -> list[int]:
        """Return the token ids of a prompt, in the run's layout."""
        return components.prompt(self.run, chunks, self.eyes.side)[0]

    def features(self, pictures: Sequence[Picture]) -> Tensor:
        """Return the features (B, P, F) of pictures, as precise as evaluation reads them."""
        seen = self.eyes(pictures)
        return seen.half() if self.run.cache else seen  # a cache on disk stores float16

    def answers(
        self,
        asked: Sequence[Sequence[Chunk]],
        pictures: Callable[[list[int]], Sequence[Picture]],
        most: int | None = None,
        batch_size: int = BATCH,
    ) -> list[str]:
        """Answer N questions.

        Args:
            asked: The prompts.
            pictures: Numbers of B prompts -> their pictures (height, width, 3) uint8, RGB.
            most: Length limit of an answer, if it is below the run's.
            batch_size: Most prompts at once.

        Returns:
            N answers, without the end token.
        """

        def features(numbers: list[int]) -> Tensor:
            return self.features(pictures(numbers))

        ids = [self.ids(chunks) for chunks in asked]
        return answer_prompts(self.model, self.run, ids, features, self.device, most, batch_size)

    def answer(self, picture: Picture, chunks: Sequence[Chunk], most: int | None = None) -> str:
        """Answer one question.

        Args:
            picture: (height, width, 3) uint8, RGB.
            chunks: The prompt.
            most: As for `answers`.

        Returns:
            The answer, without the end token.
        """
        return self.answers([chunks], lambda _: [picture], most)[0]
