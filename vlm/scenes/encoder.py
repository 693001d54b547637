"""A small vision encoder for rendered scenes, trained on their annotation and then frozen.

It takes the place of the paper's EVA-02-L on machines without those weights. Each patch learns to tell which
object it shows and where that object's box is. Every language model, layout and seed reads the same frozen
features, so models differ only in how they read a sequence of patches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.models.seeding import seeded
from ssm_retrieval.training import store
from vlm import schema
from vlm.scenes import VERSION as SCENES_VERSION
from vlm.scenes.patches import owners
from vlm.scenes.scene import Scene, sample_scene
from vlm.scenes.stamps import COLOURS, SHAPES, SIZES, TEXTURES, WORDS, render

# Encoder -> pixels of a patch's side, and of the images that it is trained on, in turn.
ENCODERS: dict[str, tuple[int, tuple[int, ...]]] = {
    "scenes": (8, (64, 96)),
    "scenes-16px": (16, (64, 96)),
    "scenes-32px": (32, (96,)),  # nine patches of 96 pixels: the cells of a scene, one object each
}
WIDTH = 128
STEPS = 101  # 0.00 .. 1.00
IMAGES, EPOCHS, BATCH, LR = 16_000, 8, 64, 4e-3  # of its training
VERSION = 2  # raise it when training leads to other weights
# What a patch must tell of its object, with the number of answers; -1 = does not apply.
QUESTIONS = {
    "kind": 4,
    "name": len(SHAPES) + 10 + len(WORDS),
    "colour": len(COLOURS),
    "size": 2,
    "texture": 3,
}
GIVEN = Path(__file__).parent / "pretrained"  # encoders that come with the toolkit, in float16
_KINDS = ("none", "shape", "digit", "word")
_NAMES = (*SHAPES, *map(str, range(10)), *WORDS)


class SceneEncoder(nn.Module):
    """Pixels (B, 3, S, S), -1 .. 1 -> features after the last norm (B, P, 128).

    There are P = (S / patch)^2 patches in raster order. Convolutions to one vector per patch, learned
    positions, one MLP, LayerNorm. The positions are those of the first size that it is trained on,
    interpolated for other sizes, as in large encoders.

    Args:
        name: One of ENCODERS.
        width: Width of the features.
    """

    num_prefix_tokens = 0  # no class token (timm's name for it)

    def __init__(self, name: str = "scenes", width: int = WIDTH):
        super().__init__()
        patch, trained_on = ENCODERS[name]
        halvings = patch.bit_length() - 1
        widths = [3, *(width >> max(2 - k, 0) for k in range(halvings))]
        convolutions = [nn.Conv2d(i, o, 3, 2, 1) for i, o in pairwise(widths)]
        self.patch_embed = nn.Sequential(*(layer for conv in convolutions for layer in (conv, nn.GELU())))
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for _ in range(3))
        side = trained_on[0] // patch
        self.pos_embed = nn.Parameter(torch.randn(1, width, side, side) * 0.02)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features (B, P, width) of pixels (B, 3, S, S)."""
        x = self.patch_embed(pixels)
        for block in self.blocks:
            x = x + F.gelu(block(x))
        place = F.interpolate(self.pos_embed, x.shape[-2:], mode="bicubic", align_corners=False)
        x = (x + place).flatten(2).transpose(1, 2)
        return self.norm(x + self.mlp(self.norm_mlp(x)))


class Heads(nn.Module):
    """What is read off a patch's features in training: an answer to each of QUESTIONS, and the box.

    Args:
        width: Width of the features.
    """

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.answers = nn.ModuleDict({name: nn.Linear(width, n) for name, n in QUESTIONS.items()})
        self.box = nn.Linear(width, 4 * STEPS)

    def loss(self, features: Tensor, labels: dict[str, Tensor], boxes: Tensor) -> Tensor:
        """Return the sum of mean cross-entropies, in nats, over QUESTIONS and the box.

        The box's corners are classes, hundredths of the side, because answers print hundredths: a language
        model soon reads a class from features that are linearly separable by it.

        Args:
            features: (B, P, width).
            labels: (B, P) int64, a column per question; -1 = does not apply.
            boxes: (B, P, 4), as shares of the image.

        Returns:
            A scalar.
        """
        total = features.new_zeros(())
        for name, head in self.answers.items():
            logits = head(features).flatten(0, 1).float()
            total = total + F.cross_entropy(logits, labels[name].flatten(), ignore_index=-1)
        seen = labels["kind"] > 0
        corners = self.box(features[seen]).float().view(-1, STEPS)
        return total + F.cross_entropy(corners, (boxes[seen] * 100).round().long().flatten())


def annotation(scene: Scene, side: int) -> tuple[dict[str, npt.NDArray[np.int64]], npt.NDArray[np.float32]]:
    """Annotate the patches of a scene with the objects that they belong to (`patches.owners`).

    Args:
        scene: The scene.
        side: Patches along one side.

    Returns:
        By question, (side^2,) int64, -1 = does not apply; and boxes (side^2, 4) float32, as shares of the
        image.
    """
    labels = {name: np.full((side, side), -1) for name in QUESTIONS}
    labels["kind"][:] = 0
    boxes = np.zeros((side, side, 4), np.float32)
    belongs = owners(scene, side)
    for k, item in enumerate(scene.objects):
        mine = belongs == k
        labels["kind"][mine] = _KINDS.index(item.kind)
        labels["name"][mine] = _NAMES.index(item.name)
        labels["colour"][mine] = list(COLOURS).index(item.colour)
        shape = item.kind == "shape"
        labels["size"][mine] = SIZES.index(item.size) if shape else -1
        labels["texture"][mine] = TEXTURES.index(item.texture) if shape else -1
        boxes[mine] = [value / scene.size for value in item.box]
    return {name: value.reshape(-1) for name, value in labels.items()}, boxes.reshape(-1, 4)


def resized(pictures: Sequence[npt.NDArray[np.uint8]], image_size: int) -> Tensor:
    """Resize pictures to squares, regardless of their shape.

    Args:
        pictures: B pictures (height, width, 3) uint8, of any sizes.
        image_size: S, pixels a side.

    Returns:
        (B, 3, S, S) uint8.
    """
    from PIL import Image

    square = (image_size, image_size)
    made = [Image.fromarray(picture).resize(square, Image.Resampling.BILINEAR) for picture in pictures]
    return torch.from_numpy(np.stack([np.asarray(image) for image in made])).permute(0, 3, 1, 2)


def scaled(pixels: Tensor) -> Tensor:
    """Scale pixels 0 .. 255 to -1 .. 1, float32."""
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def key(name: str = "scenes", images: int = IMAGES) -> str:
    """Return a name for everything that an encoder's weights depend on.

    Args:
        name: One of ENCODERS.
        images: Number of training scenes.

    Returns:
        The name, which files can have.
    """
    patch, trained_on = ENCODERS[name]
    sizes = "-".join(map(str, trained_on))
    more = hashlib.sha256(repr((SCENES_VERSION, patch, WIDTH, STEPS, BATCH, LR)).encode()).hexdigest()[:8]
    return f"{name}-v{VERSION}-{sizes}px-{images}x{EPOCHS}-{more}"


def trained(
    folder: Path, name: str = "scenes", *, images: int = IMAGES, progress: bool = True
) -> SceneEncoder:
    """Return a frozen encoder: the toolkit's own (GIVEN), or from disk, or trained first.

    Training takes about three minutes on two cores.

    Args:
        folder: Folder of the weights.
        name: One of ENCODERS.
        images: Number of training scenes; each is seen EPOCHS times, at the encoder's sizes in turn.
        progress: Whether to show a bar.

    Returns:
        The encoder.

    Raises:
        UserError: If the file of the weights is damaged.
    """
    with seeded(0):
        encoder, heads = SceneEncoder(name), Heads()
    path = GIVEN / f"{key(name, images)}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / path.name
        with FileLock(path.with_suffix(".lock")):
            schema.remove_left(path)
            if not path.exists():
                _train(encoder, heads, ENCODERS[name], images, progress)
                store.save_tensors(path, encoder.state_dict(), {"encoder": key(name, images)})
    remedy = "delete it, and it is trained anew, which takes about three minutes"
    found, _ = schema.tensors(path, remedy)
    schema.check_tensors(path, found, encoder.state_dict(), remedy)
    encoder.load_state_dict(found)
    return encoder.eval().requires_grad_(False)


@dataclass(frozen=True)
class _Set:
    """Training images of one size: pixels (N, 3, S, S) uint8, labels and boxes of their patches."""

    pixels: Tensor
    labels: dict[str, Tensor]
    boxes: Tensor

    @staticmethod
    def of(scenes: Sequence[Scene], size: int, patch: int) -> _Set:
        made = [resized([render(s) for s in scenes[i : i + 500]], size) for i in range(0, len(scenes), 500)]
        annotated = [annotation(scene, size // patch) for scene in scenes]
        labels = {name: torch.from_numpy(np.stack([a[0][name] for a in annotated])) for name in QUESTIONS}
        return _Set(torch.cat(made), labels, torch.from_numpy(np.stack([a[1] for a in annotated])))


def _train(
    encoder: SceneEncoder, heads: Heads, sizes: tuple[int, tuple[int, ...]], images: int, progress: bool
) -> None:
    scenes = [sample_scene(0, "train", i) for i in range(images)]
    patch, trained_on = sizes
    sets = [_Set.of(scenes, size, patch) for size in trained_on]
    # torch's type for this call is missing
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = [*encoder.parameters(), *heads.parameters()]
    steps = images * EPOCHS // BATCH
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(images, generator=generator) for _ in range(EPOCHS)])
    for step in track(range(steps), "vision encoder", disable=not progress):
        rows, seen = order[step * BATCH : (step + 1) * BATCH], sets[step % len(sets)]
        labels = {name: y[rows] for name, y in seen.labels.items()}
        loss = heads.loss(encoder(scaled(seen.pixels[rows])), labels, seen.boxes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
