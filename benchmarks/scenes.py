"""Images per second of vlm.scenes on two cores, and against matplotlib drawing the same boxes.

    python -m benchmarks.scenes

`images_per_second_2_cores`: drawing, asking every task and rendering, in two processes. The peer draws the
same objects of the same scenes as matplotlib patches and texts into an Agg canvas and reads its pixels,
in one process, against `render` alone in that process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from itertools import pairwise
from typing import Any

import numpy as np

from vlm.scenes import TASKS, Scene, make_example, render, sample_scene
from vlm.scenes.stamps import COLOURS

_CORES = 2


def make_range(bounds: tuple[int, int]) -> int:
    """Scenes first .. last - 1 with every question and its pixels; returns how many."""
    for index in range(*bounds):
        scene = sample_scene(0, "train", index)
        for task in TASKS:
            make_example(scene, task)
        render(scene)
    return bounds[1] - bounds[0]


def images_per_second(images: int) -> float:
    """Over `images` scenes in two warm processes."""
    edges = np.linspace(0, images, 4 * _CORES + 1).astype(int).tolist()
    with multiprocessing.get_context("spawn").Pool(_CORES) as pool:
        pool.map(make_range, [(0, 20)] * _CORES * 2, chunksize=1)  # imports and caches
        start = time.perf_counter()
        done = sum(pool.map(make_range, list(pairwise(edges)), chunksize=1))
        return done / (time.perf_counter() - start)


def draw_with_matplotlib(figure: Any, scene: Scene) -> np.ndarray:
    """(size, size, 3) uint8 of the scene's objects as patches and texts; `figure` is reused."""
    from matplotlib.patches import Ellipse, Rectangle

    figure.clear()
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, scene.size), ylim=(scene.size, 0))
    axes.axis("off")
    for item in scene.objects:
        x1, y1, x2, y2 = item.box
        colour = tuple(value / 255 for value in COLOURS[item.colour])
        if item.kind != "shape":
            axes.text(x1, y2, item.name, color=colour, fontsize=12)
        elif item.name == "circle":
            axes.add_patch(Ellipse(((x1 + x2) / 2, (y1 + y2) / 2), x2 - x1, y2 - y1, color=colour))
        else:
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, color=colour))
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def ratio_to_matplotlib(images: int) -> float:
    """Seconds of matplotlib over seconds of `render`, the same scenes in this process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scenes = [sample_scene(0, "train", index) for index in range(images)]
    figure = Figure(figsize=(1.28, 1.28), dpi=100)
    FigureCanvasAgg(figure)
    seconds = []
    for draw in (render, lambda scene: draw_with_matplotlib(figure, scene)):
        draw(scenes[0])
        start = time.perf_counter()
        for scene in scenes:
            draw(scene)
        seconds.append(time.perf_counter() - start)
    return seconds[1] / seconds[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=8000, help="scenes to make on two cores")
    args = parser.parse_args()
    if args.images < 8:
        parser.error(f"--images {args.images} is too few to time: give at least 8")
    print(
        json.dumps(
            {
                "images_per_second_2_cores": round(images_per_second(args.images), 1),
                "matplotlib_seconds_over_ours": round(ratio_to_matplotlib(200), 1),
            }
        )
    )


if __name__ == "__main__":
    main()
