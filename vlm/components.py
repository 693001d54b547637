"""Build what a run names: tokenizer, vision encoder, features, model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.seeding import seeded
from vlm import encoder as timm_encoder
from vlm import tokenizer
from vlm.config import Run
from vlm.data.cache import FeatureCache, Uncached
from vlm.data.samples import Sample
from vlm.layout import grid_side, sequence
from vlm.model import VLM, prefix_tokens

if TYPE_CHECKING:
    from vlm.scenes.words import Told

ENCODERS, FEATURES = "encoders", "features"  # folders beside the runs
WORDS, PLACE = "words", 32  # the encoder of `vlm.scenes.words`, and the pixels of its places: 96 have 3 x 3


@lru_cache(maxsize=4)
def text(name: str) -> tokenizer.Text:
    """Return the tokenizer of a run.

    Args:
        name: "scenes", a name on the hub, or a local file or folder.

    Returns:
        The tokenizer; "scenes" is built from the text of rendered scenes.
    """
    if name != "scenes":
        return tokenizer.read(name)
    from vlm.scenes.source import SceneSource
    from vlm.scenes.words import CORNERS, NOTHING

    packed = [
        SceneSource(task, 400, turns=7) for task in ("caption", "describe", "vqa", "locate", "pointing")
    ]
    texts = [chunk.text for source in packed for i in range(400) for chunk in source[i].chunks]
    return tokenizer.from_words([*texts, *(f"{i / 100:.2f}" for i in range(101)), *CORNERS, NOTHING])


@dataclass(frozen=True)
class Eyes:
    """A frozen vision encoder: pictures -> features (B, P, F).

    Attributes:
        module: The encoder; None for `WORDS`.
        key: Names encoder, weights and image size.
        width: F, the width of the features; 0 if they are weights of words (`vlm.scenes.words`).
        side: Patches along one side of the image; P = side^2.
        as_pixels: Pictures (height, width, 3) uint8 -> the pixels that `module` takes.
    """

    module: nn.Module | None
    key: str
    width: int
    side: int
    as_pixels: Callable[[Sequence[npt.NDArray[np.uint8]]], Tensor]

    @torch.no_grad()
    def __call__(self, pictures: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        if self.module is None:
            raise UserError(
                f"encoder={WORDS!r} reads scenes in words, no pictures; use a run with another one"
            )
        device = next(self.module.parameters()).device
        tokens = self.module(self.as_pixels(pictures).to(device))
        return tokens[:, prefix_tokens(self.module) :]


@lru_cache(maxsize=4)
def eyes(name: str, image_size: int, out: Path, device: str = "cpu") -> Eyes:
    """Return the encoder of a run; it is trained (scenes) or downloaded (timm) on first use.

    Args:
        name: "scenes" or a name of timm.
        image_size: Pixels a side.
        out: Folder of the runs; encoders are kept in its folder `encoders`.
        device: Where the encoder runs.

    Returns:
        The encoder, frozen.

    Raises:
        UserError: If `image_size` is no multiple of the scenes encoder's patch.
    """
    from vlm.scenes import encoder as scenes

    if name == WORDS:
        return Eyes(
            None, WORDS, 0, grid_side(image_size, PLACE), partial(scenes.resized, image_size=image_size)
        )
    if name in scenes.ENCODERS:
        patch, _ = scenes.ENCODERS[name]
        if image_size % patch:
            raise UserError(f"image_size={image_size} must be a multiple of the {patch} of encoder {name!r}")
        module: nn.Module = scenes.trained(out / ENCODERS, name).to(device)

        def as_pixels(pictures: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
            return scenes.scaled(scenes.resized(pictures, image_size))

        key = f"{scenes.key(name)}-at-{image_size}px"
        return Eyes(module, key, scenes.WIDTH, image_size // patch, as_pixels)
    from PIL import Image

    built: Any = timm_encoder.build(name, image_size, pretrained=True, device=device)
    patch = built.patch_embed.patch_size[0]

    def pixels(pictures: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        return timm_encoder.pixels([Image.fromarray(picture) for picture in pictures], image_size, patch)

    return Eyes(built, f"{name}-{image_size}px", built.num_features, grid_side(image_size, patch), pixels)


def features(run: Run, image_size: int, out: Path, device: str = "cpu") -> FeatureCache | Uncached | Told:
    """Return the features of a run's pictures.

    Args:
        run: The run.
        image_size: Pixels a side.
        out: Folder of the runs; features are kept in its folder `features`.
        device: Where the encoder runs.

    Returns:
        A cache on disk, or features computed on the fly if `run.cache` is False; always for words.
    """
    seen = eyes(run.encoder, image_size, out, device)
    if seen.module is None:
        from vlm.scenes.words import Told

        words = text(run.tokenizer)
        return Told(words.encode, len(words), seen.side)
    return FeatureCache(out / FEATURES, seen.key, seen) if run.cache else Uncached(seen)


def model(run: Run, width: int) -> VLM:
    """Build the language model, with new weights or those of `run.init`, and a new connector.

    Args:
        run: Names the model, its seed and its tokenizer.
        width: F, the width of the encoder's features.

    Returns:
        The model, without an encoder.

    Raises:
        UserError: If the tokenizer has more tokens than the model.
    """
    words = len(text(run.tokenizer))
    if run.init is None:
        lm = models.build(run.model, seed=run.seed, **{"vocab_size": words, **run.model_overrides})
    else:
        lm = models.load(run.init)
    if words > lm.config.vocab_size:
        raise UserError(
            f"tokenizer={run.tokenizer!r} has {words} tokens and the model of run {run.name!r} "
            f"{lm.config.vocab_size}; use the tokenizer that the model was made with"
        )
    with seeded(run.seed):
        return VLM(lm, width)


def prompt(run: Run, sample: Sample, side: int) -> tuple[list[int], list[int]]:
    """Turn a sample into token ids, in the layout and with the tokenizer of a run.

    Args:
        run: The run.
        sample: Prompt and answers.
        side: Patches along one side of the image.

    Returns:
        input_ids and labels, of equal length.
    """
    words = text(run.tokenizer)
    return sequence(sample.chunks, words.encode, side, run.layout, markers=words.markers)
