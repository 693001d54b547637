"""Images per second of vlm.scenes on two cores, and against matplotlib drawing the same boxes.

    python -m benchmarks.scenes [--quick] [--images 8000]

The first number is images per second in two processes, which sample scenes, ask every task about them and
render them. The ratio is of time, in one process: matplotlib draws the same objects of the same scenes as
patches and texts into an Agg canvas and reads its pixels; ours is `render` alone.
"""

from __future__ import annotations

import multiprocessing
import time
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.common import command, finish, parse
from vlm.scenes import TASKS, Scene, make_example, render, sample_scene
from vlm.scenes.stamps import COLOURS

_CORES = 2


def make_range(bounds: tuple[int, int]) -> int:
    """Make scenes first to last - 1 with every question and their pixels, and return how many."""
    for index in range(*bounds):
        scene = sample_scene(0, "train", index)
        for task in TASKS:
            make_example(scene, task)
        render(scene)
    return bounds[1] - bounds[0]


def images_per_second(images: int) -> float:
    """The speed of making so many scenes in two warm processes."""
    edges = np.linspace(0, images, 4 * _CORES + 1).astype(int).tolist()
    with multiprocessing.get_context("spawn").Pool(_CORES) as pool:
        pool.map(make_range, [(0, 20)] * _CORES * 2, chunksize=1)  # imports and caches
        start = time.perf_counter()
        done = sum(pool.map(make_range, list(pairwise(edges)), chunksize=1))
        return done / (time.perf_counter() - start)


def draw_with_matplotlib(figure: Any, scene: Scene) -> np.ndarray:
    """(size, size, 3) uint8: the scene's objects as patches and texts. The figure is used again."""
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
    """Seconds of matplotlib over seconds of `render`, for the same scenes in this process."""
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
    """Run the benchmark."""
    parser = command(__doc__)
    parser.add_argument("--images", type=int, help="scenes to make on two cores (default: %(default)s)")
    args = parse(parser, dict(images=8000, drawn=200), quick=dict(images=80, drawn=10))
    if args.images < 8:
        parser.error(f"--images {args.images} is too few to time: give at least 8")
    print(f"{images_per_second(args.images):.1f} images per second on {_CORES} cores")
    finish(args, {"scenes_vs_matplotlib": ratio_to_matplotlib(args.drawn)})


if __name__ == "__main__":
    main()
