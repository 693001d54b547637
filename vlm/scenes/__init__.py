"""Rendered scenes with exact annotation: `sample_scene`, `render`, `make_example`."""

from vlm.scenes.questions import CHANCE, TASKS, Example, make_example
from vlm.scenes.scene import SPLITS, Box, Object, Scene, sample_scene
from vlm.scenes.stamps import render

# Raise it when scenes, their pictures or what is asked about them change: names of features, of encoders and
# of trained stages have it, so none made from others is taken for one of these.
VERSION = 1

__all__ = [
    "CHANCE", "SPLITS", "TASKS", "VERSION", "Box", "Example", "Object", "Scene",
    "make_example", "render", "sample_scene",
]  # fmt: skip
