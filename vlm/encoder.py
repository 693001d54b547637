"""Vision encoders of timm, and the pixels they take.

timm imports torchvision, which must match torch. Only this file imports it, and only when it is used.
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
    """Build a frozen encoder: normalised pixels (B, 3, S, S) -> features after its last norm (B, 1 + P, F).

    Args:
        name: A vision transformer of timm. The default is EVA-02-L.
        image_size: Pixels a side. The positions are interpolated for sizes other than the model's own, and
            pixels beyond the last whole patch are cropped (480 pixels: 34 x 34 patches of 14).
        pretrained: Whether to download weights.
        device: Device of the weights.

    Returns:
        The encoder; the class token comes first.

    Raises:
        MissingPackage: If timm is not installed or does not match torch.
        UserError: If timm does not know the name.
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
    size = image_size // patch * patch  # the published patch convolution ignores the rest
    context = torch.device(device if device is not None else "cpu")
    with context:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="", img_size=size)
    return model.eval().requires_grad_(False)


def pixels(images: Sequence[Image], image_size: int = 336, patch: int = 14) -> Tensor:
    """Turn Pillow images into the pixels of CLIP's encoders.

    Images are resized to `image_size` x `image_size` regardless of their shape (bilinear, as published). Rows
    and columns beyond the last whole patch are then cropped, as the published patch convolution ignores them.

    Args:
        images: B images.
        image_size: Pixels a side before cropping.
        patch: Pixels a side of a patch.

    Returns:
        (B, 3, S, S) float32, normalised; S is the largest multiple of `patch` in `image_size`.
    """
    size = image_size // patch * patch
    square = (image_size, image_size)
    arrays = [np.asarray(image.convert("RGB").resize(square, resample=2), np.float32) for image in images]
    x = torch.from_numpy(np.stack(arrays))[:, :size, :size].permute(0, 3, 1, 2) / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
