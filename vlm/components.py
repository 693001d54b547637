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
from vlm import model as vlm_model
from vlm import pretrained, tokenizer
from vlm.config import Run
from vlm.data.cache import FeatureCache, Uncached
from vlm.layout import grid_side, sequence
from vlm.model import VLM, prefix_tokens
from vlm.prompts import Chunk

if TYPE_CHECKING:
    from vlm.scenes.words import Told

ENCODERS, FEATURES = "encoders", "features"  # folders beside the runs
# The encoder of `vlm.scenes.words`, another name when its features change, and the pixels of its places.
WORDS, PLACE = "words", 32


_own_words: dict[str, tokenizer.Text] = {}  # by the data that they are made of


def text_of(run: Run) -> tokenizer.Text:
    """Return the tokenizer of a run.

    Args:
        run: The run.

    Returns:
        The tokenizer that it names; "own" is made of the texts of all its stages, answers included.

    Raises:
        UserError: If the data are needed and a file of them is missing.
    """
    if run.tokenizer != tokenizer.OWN:
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
        module: The encoder; None for `WORDS`.
        key: Names encoder, weights and image size.
        width: F, the width of the features.
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
def eyes(name: str, image_size: int, out: Path, device: str = "cpu", checkpoint: str | None = None) -> Eyes:
    """Return an encoder; it is trained (scenes) or downloaded (timm) on first use.

    Args:
        name: As for `Run.encoder`.
        image_size: Pixels a side.
        out: Folder of the runs; encoders are kept in its folder `encoders`.
        device: Where the encoder runs.
        checkpoint: A released checkpoint. If it has the encoder's weights, they are used instead.

    Returns:
        The encoder, frozen.

    Raises:
        UserError: If `image_size` is no multiple of the scenes encoder's patch, or a checkpoint's weights are
            not those of this encoder at this size.
    """
    from vlm.scenes import encoder as scenes

    if name == WORDS:
        from vlm.scenes.words import VOCABULARY

        resized = partial(scenes.resized, image_size=image_size)
        return Eyes(None, WORDS, len(VOCABULARY), grid_side(image_size, PLACE), resized)
    place = None if checkpoint is None else vlm_model.encoder_folder(checkpoint)
    weights = "" if place is None else f"-of-{vlm_model.state(place)}"
    if name in scenes.ENCODERS:
        patch, _ = scenes.ENCODERS[name]
        if image_size % patch:
            raise UserError(f"image_size={image_size} must be a multiple of the {patch} of encoder {name!r}")
        module: nn.Module = scenes.SceneEncoder(name) if place else scenes.trained(out / ENCODERS, name)

        def as_pixels(pictures: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
            return scenes.scaled(scenes.resized(pictures, image_size))

        key = f"{scenes.key(name)}-at-{image_size}px{weights}"
        return Eyes(_placed(module, place, device), key, scenes.WIDTH, image_size // patch, as_pixels)
    from PIL import Image

    built: Any = timm_encoder.build(name, image_size, pretrained=place is None)
    patch = built.patch_embed.patch_size[0]

    def pixels(pictures: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        return timm_encoder.pixels([Image.fromarray(picture) for picture in pictures], image_size, patch)

    width, side = built.num_features, grid_side(image_size, patch)
    return Eyes(_placed(built, place, device), f"{name}-{image_size}px{weights}", width, side, pixels)


def _placed(module: nn.Module, place: Path | None, device: str) -> nn.Module:
    """The encoder, frozen, on its device, with a released checkpoint's weights if `place` is one."""
    if place is not None:
        vlm_model.load_encoder(place, module)
    return module.to(device).eval().requires_grad_(False)


def eyes_of(run: Run, out: Path, device: str = "cpu") -> Eyes:
    """Return the encoder that a run is asked with.

    Args:
        run: The run.
        out: Folder of the runs.
        device: Where the encoder runs.

    Returns:
        The encoder, as `eyes` gives it.
    """
    return eyes(run.encoder, run.image_size, out, device, run.checkpoint)


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
    seen = eyes(run.encoder, image_size, out, device, run.checkpoint)
    if seen.module is None:
        from vlm.scenes.words import Told

        return Told(seen.side)
    return FeatureCache(out / FEATURES, seen.key, seen) if run.cache else Uncached(seen)


def model(run: Run, width: int) -> VLM:
    """Build the language model, with new weights or those of `run.init`, and a new connector.

    Args:
        run: Names the model, its seed and its tokenizer.
        width: F, the width of the encoder's features.

    Returns:
        The model, without an encoder.

    Raises:
        UserError: If the tokenizer has more tokens than the model, or `init` is of another family.
    """
    words = len(text_of(run))
    if run.init is None:
        lm = models.build(run.model, seed=run.seed, **{"vocab_size": words, **run.model_overrides})
    else:
        given = run.init in pretrained.INITS
        lm = models.load(pretrained.folder(run.family, run.init) if given else run.init)
        if models.architecture_of(lm.config).name != run.family:
            raise UserError(
                f"init={run.init!r} of run {run.name!r} is no {run.family}, as model={run.model!r} says; "
                "name a preset of its family"
            )
    _check_words(run, lm.config.vocab_size)
    with seeded(run.seed):
        made = VLM(lm, width)
        if run.encoder == WORDS:
            from vlm.scenes.words import connector

            made.vision_embed_tokens = connector(lm.embedding.weight, text_of(run).encode)
    return made


def _check_words(run: Run, known: int) -> None:
    words = len(text_of(run))
    if words > known:
        raise UserError(
            f"tokenizer={run.tokenizer!r} has {words} tokens and the model of run {run.name!r} "
            f"{known}; use the tokenizer that the model was made with"
        )


def released(run: Run, width: int, device: str = "cpu") -> VLM:
    """Load the released checkpoint of a run, in float32.

    Args:
        run: Names the checkpoint, the family of its model and its tokenizer.
        width: F, the width of the encoder's features.
        device: Device of the model.

    Returns:
        The model, without an encoder, in evaluation mode.

    Raises:
        UserError: If it is no such checkpoint, or family, tokenizer or encoder are not those of the run.
    """
    assert run.checkpoint is not None
    found = vlm_model.load(run.checkpoint, dtype=torch.float32, device=device)
    where = f"checkpoint={run.checkpoint!r} of run {run.name!r}"
    family = models.architecture_of(found.lm.config).name
    if family != run.family:
        raise UserError(f"{where} is a {family}, but model={run.model!r}; name a preset of {family}")
    taken = found.vision_embed_tokens[0].in_features
    if taken != width:
        raise UserError(
            f"{where} takes features of width {taken}, but those of encoder={run.encoder!r} have {width}; "
            "name the encoder that it was trained with"
        )
    _check_words(run, found.lm.config.vocab_size)
    return found


def prompt(run: Run, chunks: Sequence[Chunk], side: int) -> tuple[list[int], list[int]]:
    """Turn a prompt into token ids, in the layout and with the tokenizer of a run.

    Args:
        run: The run.
        chunks: Prompt and answers.
        side: Patches along one side of the image.

    Returns:
        input_ids and labels, of equal length.
    """
    words = text_of(run)
    return sequence(chunks, words.encode, side, run.layout, markers=words.markers)
