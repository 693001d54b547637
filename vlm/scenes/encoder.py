"""A small vision encoder for rendered scenes, trained on their annotation, then frozen like the big ones.

It stands where EVA-02-L stands in the paper, for machines without its weights: each patch learns to tell
which object it shows and where that object's box is. Every language model, layout and seed reads the same
frozen features, so what differs between them is how a sequence of patches is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from synthetic import store
from vlm.scenes.scene import Scene, sample_scene
from vlm.scenes.stamps import COLOURS, SHAPES, SIZES, TEXTURES, WORDS, render

PATCH = 8  # pixels a side
WIDTH = 128
IMAGES, EPOCHS, BATCH, LR = 20_000, 6, 64, 4e-3  # of its training
VERSION = 1  # raise it when training leads to other weights
# What a patch must tell of its object, with the number of answers; -1 = does not apply.
QUESTIONS = {
    "kind": 4,
    "name": len(SHAPES) + 10 + len(WORDS),
    "colour": len(COLOURS),
    "size": 2,
    "texture": 3,
}
_KINDS = ("none", "shape", "digit", "word")
_NAMES = (*SHAPES, *map(str, range(10)), *WORDS)


class SceneEncoder(nn.Module):
    """(B, 3, S, S) pixels, -1 .. 1 -> (B, P, 128), P = (S / 8)^2 in raster order; after the last norm.

    Convolutions to one vector per patch of 8 x 8 pixels, learned positions, one MLP, LayerNorm.
    """

    num_prefix_tokens = 0  # no class token (timm's name for it)

    def __init__(self, image_size: int, width: int = WIDTH):
        super().__init__()
        self.image_size = image_size
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, width // 4, 3, 2, 1), nn.GELU(),
            nn.Conv2d(width // 4, width // 2, 3, 2, 1), nn.GELU(),
            nn.Conv2d(width // 2, width, 3, 2, 1), nn.GELU(),
        )  # fmt: skip
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for _ in range(3))
        self.pos_embed = nn.Parameter(torch.randn((image_size // PATCH) ** 2, width) * 0.02)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels)
        for block in self.blocks:
            x = x + F.gelu(block(x))
        x = x.flatten(2).transpose(1, 2) + self.pos_embed
        return self.norm(x + self.mlp(self.norm_mlp(x)))


class Heads(nn.Module):
    """What is read off a patch's features in training: an answer to each of QUESTIONS, and the box."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.answers = nn.ModuleDict({name: nn.Linear(width, n) for name, n in QUESTIONS.items()})
        self.box = nn.Linear(width, 4)

    def loss(self, features: Tensor, labels: dict[str, Tensor], boxes: Tensor) -> Tensor:
        """Mean cross-entropies in nats plus 10 x mean absolute error of the boxes (shares of the side)."""
        total = features.new_zeros(())
        for name, head in self.answers.items():
            logits = head(features).flatten(0, 1).float()
            total = total + F.cross_entropy(logits, labels[name].flatten(), ignore_index=-1)
        seen = labels["kind"] > 0
        return total + 10 * F.l1_loss(self.box(features)[seen].float(), boxes[seen])


def annotation(scene: Scene, side: int) -> tuple[dict[str, npt.NDArray[np.int64]], npt.NDArray[np.float32]]:
    """({question: (side^2,) int64}, (side^2, 4) float32 boxes as shares of the image) of a scene's patches.

    A patch belongs to the object that covers most of it, if any covers a tenth.
    """
    labels = {name: np.full((side, side), -1) for name in QUESTIONS}
    labels["kind"][:] = 0
    boxes = np.zeros((side, side, 4), np.float32)
    best = np.full((side, side), 0.1)
    edges = np.arange(side) / side
    for item in scene.objects:
        x0, y0, x1, y1 = (value / scene.size for value in item.box)
        across = np.clip(np.minimum(edges + 1 / side, x1) - np.maximum(edges, x0), 0, None) * side
        down = np.clip(np.minimum(edges + 1 / side, y1) - np.maximum(edges, y0), 0, None) * side
        cover = down[:, None] * across
        mine = cover > best
        best = np.maximum(best, cover)
        labels["kind"][mine] = _KINDS.index(item.kind)
        labels["name"][mine] = _NAMES.index(item.name)
        labels["colour"][mine] = list(COLOURS).index(item.colour)
        shape = item.kind == "shape"
        labels["size"][mine] = SIZES.index(item.size) if shape else -1
        labels["texture"][mine] = TEXTURES.index(item.texture) if shape else -1
        boxes[mine] = x0, y0, x1, y1
    return {name: value.reshape(-1) for name, value in labels.items()}, boxes.reshape(-1, 4)


def as_pixels(pictures: Sequence[npt.NDArray[np.uint8]], image_size: int) -> Tensor:
    """(h, w, 3) uint8 pictures of any size -> (B, 3, S, S) float32, -1 .. 1, resized as elsewhere."""
    from PIL import Image

    square = (image_size, image_size)
    resized = [
        np.asarray(Image.fromarray(picture).resize(square, Image.Resampling.BILINEAR)) for picture in pictures
    ]
    x = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def key(image_size: int, images: int = IMAGES) -> str:
    """Names everything that an encoder's weights depend on."""
    return f"scenes-v{VERSION}-{image_size}px-{images}x{EPOCHS}"


def trained(folder: Path, image_size: int, *, images: int = IMAGES, progress: bool = True) -> SceneEncoder:
    """The frozen encoder for images of image_size x image_size pixels: from `folder`, or trained into it.

    images: how many training scenes it sees, EPOCHS times. Takes about a minute at 64 pixels on two cores.
    Raises ValueError for a size that is no multiple of PATCH.
    """
    if image_size % PATCH:
        raise ValueError(f"image_size={image_size} must be a multiple of the scenes encoder's patch, {PATCH}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key(image_size, images)}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder, heads = SceneEncoder(image_size), Heads()
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            _train(encoder, heads, images, progress)
            store.save_tensors(path, encoder.state_dict(), {"encoder": key(image_size, images)})
    encoder.load_state_dict(store.load_tensors(path)[0])
    return encoder.eval().requires_grad_(False)


def _train(encoder: SceneEncoder, heads: Heads, images: int, progress: bool) -> None:
    side = encoder.image_size // PATCH
    scenes = [sample_scene(0, "train", i) for i in range(images)]
    pixels = torch.cat(
        [
            as_pixels([render(scene) for scene in scenes[i : i + 500]], encoder.image_size).to(torch.float16)
            for i in range(0, images, 500)
        ]
    )
    annotated = [annotation(scene, side) for scene in scenes]
    labels = {name: torch.from_numpy(np.stack([a[0][name] for a in annotated])) for name in QUESTIONS}
    boxes = torch.from_numpy(np.stack([a[1] for a in annotated]))
    # torch's type for this call is missing
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = [*encoder.parameters(), *heads.parameters()]
    steps = images * EPOCHS // BATCH
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(images, generator=generator) for _ in range(EPOCHS)])
    for step in track(range(steps), f"vision encoder, {encoder.image_size} px", disable=not progress):
        rows = order[step * BATCH : (step + 1) * BATCH]
        x = pixels[rows].float().contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            loss = heads.loss(encoder(x), {name: y[rows] for name, y in labels.items()}, boxes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
