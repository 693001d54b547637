"""Rendered, exactly annotated scenes: `sample_scene`, `render`, `make_example`, `question_only_baseline`."""

from vlm.scenes.baseline import question_only_baseline
from vlm.scenes.questions import CHANCE, TASKS, Example, make_example
from vlm.scenes.scene import SPLITS, Box, Object, Scene, sample_scene
from vlm.scenes.stamps import render

__all__ = [
    "CHANCE", "SPLITS", "TASKS", "Box", "Example", "Object", "Scene",
    "make_example", "question_only_baseline", "render", "sample_scene",
]  # fmt: skip
