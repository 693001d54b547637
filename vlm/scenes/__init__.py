"""Rendered scenes with exact annotation: `sample_scene`, `render`, `make_example`."""

from vlm.scenes.questions import CHANCE, TASKS, Example, make_example
from vlm.scenes.scene import SPLITS, Box, Object, Scene, sample_scene
from vlm.scenes.stamps import render

# Raise it when scenes, their pictures or their questions change. It is part of the names of features,
# encoders and trained stages, so old ones are not mistaken for new ones.
VERSION = 1

__all__ = [
    "CHANCE", "SPLITS", "TASKS", "VERSION", "Box", "Example", "Object", "Scene",
    "make_example", "render", "sample_scene",
]  # fmt: skip
