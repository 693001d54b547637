"""Vision encoders of timm, and the pixels they want.

timm imports torchvision, and both must match torch, so only this file imports it, and only on use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ssm_retrieval.errors import MissingPackage, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT = "eva02_large_patch14_clip_336"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, RGB
STD = (0.26862954, 0.26130258, 0.27577711)
TIMM_HELP = (
    'vision encoders need timm: pip install -e ".[vlm]" (timm imports torchvision, whose release must be '
    "the one made for the installed torch)"
)


def build(
    name: str = DEFAULT,
    image_size: int = 336,
    *,
    pretrained: bool = False,
    device: Any = None,
) -> nn.Module:
    """A frozen encoder: (B, 3, S, S) normalised pixels -> (B, 1 + P, F), class token first.

    What it gives has passed its last norm.

    name: of a vision transformer in timm: EVA-02-L by default, CLIP and SigLIP ones, tiny ones.
    image_size: other sizes than the model's own interpolate its positions; what is no multiple of the patch
    is cropped (480 pixels: 34 x 34 patches of 14). pretrained: fetches the weights, which needs the network.
    Raises ImportError, in one line, without timm; ValueError for an unknown name.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision made for another torch
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise MissingPackage(f"{TIMM_HELP}; importing it said: {said}") from error
    if name not in timm.list_models():
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise UserError(f"encoder {name!r} is unknown to timm {timm.__version__}; it has {near}, ...")
    patch = int(name.partition("patch")[2].split("_")[0] or 16)
    size = image_size // patch * patch  # as the published patch convolution: the rest is not seen
    context = torch.device(device if device is not None else "cpu")
    with context:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="", img_size=size)
    return model.eval().requires_grad_(False)


def pixels(images: Sequence[Image], image_size: int = 336, patch: int = 14) -> Tensor:
    """(B, 3, S, S) float32, S the largest multiple of `patch` in image_size.

    Resized to image_size x image_size whatever their shape, bilinear, as published; then the last rows and
    columns that make no patch are cut off, which the published patch convolution ignores.
    """
    size = image_size // patch * patch
    square = (image_size, image_size)
    arrays = [np.asarray(image.convert("RGB").resize(square, resample=2), np.float32) for image in images]
    x = torch.from_numpy(np.stack(arrays))[:, :size, :size].permute(0, 3, 1, 2) / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
