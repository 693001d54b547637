"""Where a trained VLM looks: what its answer reads from each patch of the image, and what each patch writes.

    attention   layers with attention: softmax(q k^T) from an answer's position to the patches. SSM layers:
                hidden attention |alpha| with rows normalised (`probes.retention`), by head in Mamba-2, the
                mean over channels in Mamba, as in the probe "attention"
    write       ||dt_i x_i B_i^T||, what patch i writes into the state (`probes.updates.write_norm`)
    kept        ||c(i -> t)|| / ||c(i -> i)||, the part of that write which the decays between have left at
                the answer's position t (`probes.retention.retention`)
    share       ||c(i -> t)|| / ||h_t||, what is left in units of the state that it is in

`python -m vlm.looking RUN... --out looks.parquet` compares, on grounding questions about held-out scenes, the
patches of the object that is asked for with those of the other shapes. The shape asked for is drawn among
the shapes of a scene, so where patches are read and written without regard to the question the two are alike.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import tyro
from torch import Tensor

from probes import record
from probes.retention import attention_pattern, retention
from probes.scan import Scan, layers_with, scan_names, scan_of
from probes.updates import write_norm
from ssm_retrieval.cli import guarded, parse
from ssm_retrieval.errors import UserError
from ssm_retrieval.ops.memory import keep_freed_memory
from ssm_retrieval.statistics import ratio_of_means
from ssm_retrieval.terminal import plain_console
from ssm_retrieval.training import store
from ssm_retrieval.training.parquet import to_parquet
from vlm import components
from vlm.config import Run, Scenes
from vlm.evaluate import alike, load
from vlm.folders import saved_run
from vlm.layout import IGNORE
from vlm.model import VLM
from vlm.scenes.encoder import annotation, coverage
from vlm.scenes.scene import Box, Scene, sample_scene

if TYPE_CHECKING:
    import pandas as pd

BATCH = 16
COLUMNS = {
    "run": ("string", "name in the config file"),
    "family": ("string", "mamba, transformer, ..."),
    "layout": ("string", "agnostic, instruction-first or query-first"),
    "image_size": ("int64", "pixels a side that the encoder sees"),
    "seed": ("int64", "of weights and order of data"),
    "layer": ("int64", "block, 0-based"),
    "quantity": ("string", "attention, write, kept or share"),
    "at": (
        "string",
        "where it is read: first = where the answer's first token is predicted; answer = mean over the "
        "positions that predict the right answer's tokens; patch = at the patch itself",
    ),
    "example": ("int64", "scene of the held-out split"),
    "target": ("float64", "mean over the patches of the object asked for"),
    "distractor": ("float64", "mean over the scene's other shapes of the same"),
    "background": ("float64", "mean over the patches that show no object"),
    "target_relative": ("float64", "as target, of values divided by the mean over examples at that patch"),
    "distractor_relative": ("float64", "as distractor, of such values"),
}
KEYS = ("run", "family", "layout", "image_size", "seed", "layer", "quantity", "at")  # what was measured


@dataclass(frozen=True)
class Look:
    """What one layer does with the P patches of B images, seen from A positions.

    attention: (B, A, H, P); over all tokens of the sequence, patches or not, it sums to 1. An SSM layer of
    Mamba counts as one head. write: (B, P); kept, share: (B, A, P); None in layers with attention.
    """

    attention: Tensor
    write: Tensor | None = None
    kept: Tensor | None = None
    share: Tensor | None = None

    def quantities(self) -> dict[str, Tensor]:
        """name -> (B, A, P), attention as the mean over heads, `write` with A = 1; only those there are."""
        write = None if self.write is None else self.write[:, None]
        named = dict(attention=self.attention.mean(2), write=write, kept=self.kept, share=self.share)
        return {name: value for name, value in named.items() if value is not None}


def patch_places(input_ids: Tensor) -> Tensor:
    """(B, P) int64 positions of the patches' placeholders in sequences (B, L), in raster order."""
    return (input_ids < 0).nonzero()[:, 1].view(len(input_ids), -1)


def answer_places(labels: Sequence[int]) -> list[int]:
    """The positions that predict a sequence's supervised tokens, from its unshifted labels (L,)."""
    return [i - 1 for i, label in enumerate(labels) if label != IGNORE]


@torch.no_grad()
def look(model: VLM, input_ids: Tensor, features: Tensor, at: Sequence[int]) -> dict[int, Look]:
    """layer -> `Look`, of every layer, in one precision: no autocast.

    input_ids: (B, L) int64 without padding, as `vlm.layout.sequence` makes them; features: (B, P, F).
    at: A positions that look, the same in all sequences; the last one of a prompt predicts its answer.
    """
    lm, places, at = model.lm, patch_places(input_ids), list(at)
    attending, scanning = layers_with(lm, "attn.hook_pattern"), layers_with(lm, "mixer.hook_dt")
    vectors = model.embed(input_ids, features)
    found = {}
    if attending:
        with record(lm, [f"blocks.{i}.attn.hook_pattern" for i in attending], positions=at) as cache:
            _run(model, vectors)
        for i in attending:
            rows = cache[f"blocks.{i}.attn.hook_pattern"].transpose(1, 2)  # (B, A, H, L)
            found[i] = Look(_of_patches(rows, places))
    if scanning:
        states = [f"blocks.{i}.mixer.hook_ssm_state" for i in scanning]
        with record(lm, scan_names(scanning)) as cache, record(lm, states, positions=at) as last:
            _run(model, vectors)
        for i, name in zip(scanning, states, strict=True):
            norm = last[name].flatten(2).norm(dim=2)  # (B, A)
            found[i] = scan_look(scan_of(lm, cache, i), norm, places, at)
    return dict(sorted(found.items()))


def scan_look(scan: Scan, norm: Tensor, places: Tensor, at: Sequence[int]) -> Look:
    """The look of an SSM layer. norm: (B, A), of its state at the A positions; places: (B, P)."""
    (B, L), positions = scan.x.shape[:2], torch.as_tensor(at, device=places.device)
    norms = norm.new_zeros(B, L)
    norms[:, positions] = norm
    left = retention(scan, places[:, None], positions[None, :, None], state_norm=norms)
    return Look(
        _of_patches(attention_pattern(scan, positions).transpose(1, 2), places),
        write_norm(scan).gather(1, places),
        left.kept,
        left.share,
    )


def _run(model: VLM, vectors: Tensor) -> None:
    """A forward pass for what is recorded in it; no logits."""
    model.lm.hidden(inputs_embeds=vectors, at=torch.zeros(0, dtype=torch.int64, device=vectors.device))


def _of_patches(rows: Tensor, places: Tensor) -> Tensor:
    """(B, A, H, L) at the places (B, P): (B, A, H, P)."""
    B, A, H, _ = rows.shape
    return rows.gather(3, places[:, None, None].expand(B, A, H, -1))


# --- the target against the rest ----------------------------------------------------------------------------


def patches_of(box: Box, size: int, side: int) -> npt.NDArray[np.bool_]:
    """(side^2,) the patches that a box in an image of `size` pixels covers by more than half.

    Where there are none, as may be of small objects, the one that it covers most.
    """
    cover = coverage([value / size for value in box], side).reshape(-1)
    return cover > 0.5 if (cover > 0.5).any() else cover == cover.max()


def averages(scene: Scene, target: Box, side: int) -> dict[str, npt.NDArray[np.float64]]:
    """Weights (side^2,) that make means over the patches of the target, the other shapes, and none.

    target: the box of one of the scene's shapes. Each of the others counts alike, whatever its size, and the
    digit and the word are left out, as they are never asked for: only so is the target one of them by chance.
    """
    shapes = {item.box: _mean(patches_of(item.box, scene.size, side)) for item in scene.shapes}
    others = [weights for box, weights in shapes.items() if box != target]
    nothing = annotation(scene, side)[0]["kind"] == 0
    return {"target": shapes[target], "distractor": np.mean(others, axis=0), "background": _mean(nothing)}


def _mean(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    return mask / mask.sum()


def table(run: Run, out: Path, examples: int = 100, device: str = "cpu") -> pd.DataFrame:
    """COLUMNS of a run that `vlm.train` has trained in `out`: a row per example, layer, quantity and `at`.

    The questions are grounding questions about the first `examples` held-out scenes, in the run's layout,
    followed by the right answer. Raises UserError, in one line, for runs that are not trained.
    """
    import pandas as pd

    model, seen = load(run, out, device), components.eyes(run.encoder, run.image_size, out, device)
    source: Any = Scenes("grounding", examples, "heldout").build(answers=True)
    features = components.features(run, run.image_size, out, device)
    features.fill(source, progress=False)
    values: dict[tuple[int, str, str], npt.NDArray[np.float64]] = defaultdict(
        lambda: np.zeros((examples, seen.side**2))
    )
    for numbers, input_ids, at in _prompts(run, source, seen.side):
        ids = torch.tensor(input_ids, device=device)
        looks = look(model, ids, features.get(source, [str(i) for i in numbers]).to(device), at)
        for layer, found in looks.items():
            for quantity, read in found.quantities().items():
                for name, value in _by_place(quantity, read).items():
                    values[layer, quantity, name][numbers] = value.double().cpu().numpy()
    weights = [
        averages(sample_scene(0, "heldout", i), tuple(source[i].target["box"]), seen.side)
        for i in range(examples)
    ]
    fixed = dict(run=run.name, family=run.family, layout=run.layout, image_size=run.image_size, seed=run.seed)
    rows = [
        fixed | dict(layer=layer, quantity=quantity, at=at, example=i) | group
        for (layer, quantity, at), each in sorted(values.items())
        for i, group in enumerate(_groups(each, weights))
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _groups(
    values: npt.NDArray[np.float64], weights: Sequence[Mapping[str, npt.NDArray[np.float64]]]
) -> Iterator[dict[str, float]]:
    """The columns from "target" on, example by example, of values (examples, P)."""
    usual = values.mean(0)
    relative = np.divide(values, usual, out=np.ones_like(values), where=usual > 0)
    for value, share, means in zip(values, relative, weights, strict=True):
        found = {name: float(value @ mean) for name, mean in means.items()}
        yield found | {f"{name}_relative": float(share @ means[name]) for name in ("target", "distractor")}


def _by_place(quantity: str, values: Tensor) -> dict[str, Tensor]:
    """(B, A, P) as values of the column `at`, each (B, P)."""
    return (
        {"patch": values[:, 0]} if quantity == "write" else {"first": values[:, 0], "answer": values.mean(1)}
    )


def _prompts(run: Run, source: Any, side: int) -> Iterator[tuple[list[int], list[list[int]], list[int]]]:
    """(numbers of samples, their input_ids, their answer's places), equally long ones together."""
    prompts = [components.prompt(run, source[number], side) for number in range(len(source))]
    places = [answer_places(labels) for _, labels in prompts]
    for numbers in alike(((len(prompts[i][0]), *at) for i, at in enumerate(places)), BATCH):
        yield numbers, [prompts[i][0] for i in numbers], places[numbers[0]]


def contrast(looks: pd.DataFrame, by: Sequence[str] = KEYS, confidence: float = 0.95) -> pd.DataFrame:
    """Target over distractors: columns `by`, ratio, low, high, raw, raw_low, raw_high, examples.

    1 is what a question makes that does not matter. `ratio` is of the relative columns, without what the
    place in the image does (of early patches an SSM keeps less), `raw` of the others. Ratios of means over
    examples, as the mean of ratios exceeds 1 even where target and distractors are alike.
    """
    import pandas as pd

    rows = []
    groups: Any = looks.groupby(list(by), sort=False)
    for key, group in groups:
        row = dict(zip(by, key, strict=True))
        for columns, names in (
            (("target_relative", "distractor_relative"), ("ratio", "low", "high")),
            (("target", "distractor"), ("raw", "raw_low", "raw_high")),
        ):
            above, below = (group[column].to_numpy() for column in columns)
            row |= dict(zip(names, ratio_of_means(above, below, confidence), strict=True))
        rows.append(row | dict(examples=len(group)))
    return pd.DataFrame(rows)


# --- the command --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Where trained VLMs look: the target's patches against those of other shapes."""

    run: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that vlm.train printed."""
    out: Path
    """Parquet file to write, a row per run, layer, quantity and example."""
    examples: int = 100
    """Held-out grounding questions a run is asked."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input."""
    keep_freed_memory()
    options = parse(Options, argv, "python -m vlm.looking")
    return guarded(lambda: measure(options), out=options.out)


def measure(options: Options) -> int:
    import pandas as pd

    if not options.run:
        raise UserError("RUN is missing; give folders that vlm.train printed")
    if options.examples < 2:
        raise UserError(f"--examples {options.examples} must be at least 2, for an interval")
    looks = pd.concat([table(*saved_run(path), options.examples) for path in options.run])
    rows: list[Any] = looks.to_dict("records")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    store.write_bytes(options.out, to_parquet(rows, COLUMNS))
    show(contrast(looks))
    print(options.out)
    return 0


def show(contrasts: pd.DataFrame) -> None:
    """A table per run: a line per layer, quantity and `at`."""
    from rich import box
    from rich.table import Table

    console = plain_console()
    for run, part in contrasts.groupby("run", sort=False):
        title = f"{run}: target's patches over other shapes' [95 % interval]"
        lines = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1))
        for name in ("layer", "quantity", "at", "at the same place", "as measured"):
            lines.add_column(name, no_wrap=True)
        for row in part.to_dict("records"):
            relative = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
            raw = f"{row['raw']:.2f} [{row['raw_low']:.2f}, {row['raw_high']:.2f}]"
            lines.add_row(str(row["layer"]), row["quantity"], row["at"], relative, raw)
        console.print(lines)


if __name__ == "__main__":
    sys.exit(main())
