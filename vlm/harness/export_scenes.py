"""`python -m vlm.harness.export_scenes --out FOLDER`: questions about rendered scenes as tasks of lmms-eval.

    <out>/scenes.yaml           the group of all tasks
          scenes_<task>.yaml    a task: prompts, length of answers and metrics of vlm.evaluate
          <task>.parquet        its questions, with their pictures as PNG
          utils.py              the functions that the tasks name

The folder can be moved. lmms-eval takes it by `--include_path`.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ssm_retrieval.cli import guarded, parse
from ssm_retrieval.errors import UserError
from ssm_retrieval.training import store
from ssm_retrieval.training.parquet import to_parquet
from vlm import results
from vlm.config import Scenes
from vlm.harness.wording import packed
from vlm.scenes import TASKS, VERSION

UTILS = """\
from vlm.harness.scene_tasks import scene_documents, scene_results, scene_score, scene_visual  # noqa: F401
"""
TASK = """\
task: scenes_{task}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {task}.parquet
test_split: test
process_docs: !function utils.scene_documents
output_type: generate_until
doc_to_visual: !function utils.scene_visual
doc_to_text: prompt
doc_to_target: target
process_results: !function utils.scene_results
generation_kwargs:
  max_new_tokens: {most}
  until: []
metric_list:
{metrics}metadata:
  version: {version}
"""
METRIC = """\
  - metric: {name}
    aggregation: !function utils.scene_score
    higher_is_better: true
"""
COLUMNS = {
    "id": ("string", "number of the scene"),
    "image": ("binary", "PNG"),
    "prompt": ("string", "as vlm.harness.wording.packed writes it"),
    "source": ("string", "kind of question"),
    "target": ("string", "JSON: what metrics need"),
    "metrics": ("string", "JSON: names of the metrics"),
}


@dataclass(frozen=True)
class Options:
    """Write questions about rendered scenes as tasks of lmms-eval, one per kind of question."""

    out: Path
    """Folder to write to."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Kinds of questions."""
    images: int = 400
    """Scenes, with a question of each kind about each of them."""
    split: Literal["train", "heldout", "combination"] = "heldout"
    """Split of the scenes."""
    seed: int = 0
    """Seed of the scenes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input."""
    options = parse(Options, argv, "python -m vlm.harness.export_scenes")
    return guarded(lambda: export(options), out=options.out)


def export(options: Options) -> int:
    """Write the tasks of the command line; returns the exit status.

    Raises:
        UserError: If a task is unknown or asks several questions at once.
    """
    packs = [task for task in options.tasks if task not in TASKS]
    if packs:
        raise UserError(f"--tasks {packs[0]}: no kind of question; use {', '.join(TASKS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    written = [
        task
        for task in options.tasks
        if write_task(options.out, task, Scenes(task, options.images, options.split, options.seed))
    ]
    listed = "".join(f"  - scenes_{task}\n" for task in written)
    store.write_bytes(options.out / "utils.py", UTILS.encode())
    store.write_bytes(options.out / "scenes.yaml", f"group: scenes\ntask:\n{listed}".encode())
    print(f"lmms-eval --include_path {options.out} --tasks scenes")
    return 0


def write_task(out: Path, task: str, data: Scenes) -> bool:
    """Write one task.

    Args:
        out: Folder to write to.
        task: Name of the task.
        data: Its samples.

    Returns:
        Whether it was written; not if its answers cannot be scored.
    """
    source = data.build(answers=False)
    samples = [source[i] for i in range(len(source))]
    metrics = [row["metric"] for row in results.score(samples, [""] * len(samples))]
    if not metrics:
        return False
    rows = [
        dict(
            id=sample.id,
            image=_png(source.picture(sample.image)),
            prompt=packed(sample.chunks),
            source=sample.source,
            target=json.dumps(dict(sample.target)),
            metrics=json.dumps(metrics),
        )
        for sample in samples
    ]
    store.write_bytes(out / f"{task}.parquet", to_parquet(rows, COLUMNS))
    listed = "".join(METRIC.format(name=name) for name in metrics)
    most = data.declared().max_new_tokens
    text = TASK.format(task=task, most=most, metrics=listed, version=VERSION)
    store.write_bytes(out / f"scenes_{task}.yaml", text.encode())
    return True


def _png(picture: Any) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="PNG")
    return content.getvalue()


if __name__ == "__main__":
    sys.exit(main())
