"""Build what a run names: tokenizer, vision encoder, features, model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

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

ENCODERS, FEATURES = "encoders", "features"  # folders beside the runs


_own_words: dict[str, tokenizer.Text] = {}  # by the data that they are made of


def text_of(run: Run) -> tokenizer.Text:
    """Return the tokenizer of a run.

    Args:
        run: The run.

    Returns:
        The tokenizer that it names; "words" is made of the texts of all its stages, answers included.

    Raises:
        UserError: If the data are needed and a file of them is missing.
    """
    if run.tokenizer != tokenizer.WORDS:
        return text(run.tokenizer)
    data = [one for stage in run.stages for one in stage.data.values()]
    key = repr(data)
    if key not in _own_words:
        sources = [one.build(answers=True) for one in data]
        samples = (source[i] for source in sources for i in range(len(source)))
        _own_words[key] = tokenizer.from_words({chunk.text for s in samples for chunk in s.chunks})
    return _own_words[key]


@lru_cache(maxsize=4)
def text(name: str) -> tokenizer.Text:
    """Return a tokenizer that is the same for all runs.

    Args:
        name: "scenes", a name on the hub, or a local file or folder.

    Returns:
        The tokenizer; "scenes" is built from the text of rendered scenes.
    """
    if name != "scenes":
        return tokenizer.read(name)
    from vlm.scenes.source import SceneSource

    packed = [
        SceneSource(task, 400, turns=7) for task in ("caption", "describe", "vqa", "locate", "pointing")
    ]
    texts = [chunk.text for source in packed for i in range(400) for chunk in source[i].chunks]
    return tokenizer.from_words([*texts, *(f"{i / 100:.2f}" for i in range(101))])


@dataclass(frozen=True)
class Eyes:
    """A frozen vision encoder: pictures -> features (B, P, F).

    Attributes:
        module: The encoder.
        key: Names encoder, weights and image size.
        width: F, the width of the features.
        side: Patches along one side of the image; P = side^2.
        as_pixels: Pictures (height, width, 3) uint8 -> the pixels that `module` takes.
    """

    module: nn.Module
    key: str
    width: int
    side: int
    as_pixels: Callable[[Sequence[npt.NDArray[np.uint8]]], Tensor]

    @torch.no_grad()
    def __call__(self, pictures: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
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
    if name == "scenes":
        from vlm.scenes import encoder as scenes

        if image_size % scenes.PATCH:
            raise UserError(
                f"image_size={image_size} must be a multiple of the scenes encoder's {scenes.PATCH}"
            )
        module: nn.Module = scenes.trained(out / ENCODERS).to(device)

        def as_pixels(pictures: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
            return scenes.scaled(scenes.resized(pictures, image_size))

        key = f"{scenes.key()}-at-{image_size}px"
        return Eyes(module, key, scenes.WIDTH, image_size // scenes.PATCH, as_pixels)
    from PIL import Image

    built: Any = timm_encoder.build(name, image_size, pretrained=True, device=device)
    patch = built.patch_embed.patch_size[0]

    def pixels(pictures: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        return timm_encoder.pixels([Image.fromarray(picture) for picture in pictures], image_size, patch)

    return Eyes(built, f"{name}-{image_size}px", built.num_features, grid_side(image_size, patch), pixels)


def features(run: Run, image_size: int, out: Path, device: str = "cpu") -> FeatureCache | Uncached:
    """Return the features of a run's pictures.

    Args:
        run: The run.
        image_size: Pixels a side.
        out: Folder of the runs; features are kept in its folder `features`.
        device: Where the encoder runs.

    Returns:
        A cache on disk, or features computed on the fly if `run.cache` is False.
    """
    seen = eyes(run.encoder, image_size, out, device)
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
    words = len(text_of(run))
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
    words = text_of(run)
    return sequence(sample.chunks, words.encode, side, run.layout, markers=words.markers)
