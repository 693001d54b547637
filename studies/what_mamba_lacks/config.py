"""The runs of README.md beside this file, in six sweeps, the most informative first:

    python -m synthetic.sweep studies/what_mamba_lacks/core.py      # Mamba: all, each one removed, none
    python -m synthetic.sweep studies/what_mamba_lacks/families.py  # positions x attention
    python -m synthetic.sweep studies/what_mamba_lacks/mamba2.py    # Mamba-2
    python -m synthetic.sweep studies/what_mamba_lacks/rest.py      # the other cells of Mamba's factorial
    python -m synthetic.sweep studies/what_mamba_lacks/rope.py      # Transformer with full RoPE
    python -m synthetic.sweep studies/what_mamba_lacks/keyed.py     # layers with keys, and Mamba-3

Every model reads N symbols, then queries, and says at which place each queried symbol stood. A cell is a
choice of four ingredients:

    positions     none, or learned vectors that are added to the embedding
    convolution   default (4 random taps), identity (4 taps, the last is 1), or none (1 tap, which is 1)
    memory        default, or long: exp(dt A) = 0.99966 for every token
    tie           random: B and C apart; or tied: C = B at first

SSMs have one layer of width 64 with 64 states a channel, so that by the recall law (arXiv 2609.07681) the
state has room for more than 128 facts. Learning rates are chosen for every cell on a seed that is not
reported, at length 64 in 400 steps; runs of length 128 take the rate of their cell.

Cost, by process time on one thread of two (float32, 1,024 tokens a step): 28 ms a step for Mamba, 33 ms for
Mamba-2 and for two layers of a Transformer, about 75 ms for three of a hybrid. A run that is not there has
800 steps, or 1,200 of about 45 ms at length 128, so that a cell costs 4 x 400 + 5 x 800 = 5,600 steps:

    core       8 cells x 5,600 x 28 ms = 21 min;  at length 128 6 cells x 5 x 1,200 x 45 ms = 27 min
    families   Transformer 3 x 5,600 x 33 ms = 9 min;  hybrid 2 x 5,600 x 75 ms = 14 min
    mamba2     10 cells x 5,600 x 33 ms = 31 min;  at length 128 1 cell x 5 x 1,200 x 50 ms = 5 min
    rest       6 cells x 5,600 x 28 ms = 16 min;  without positions 10 x (1,600 + 3 x 800) x 28 ms = 19 min
    rope       5,600 x 33 ms = 3 min
    keyed      30 cells x 5,600 x 13 to 21 ms = 48 min

Together 193 minutes of one core, and a sixth more for the evaluations. It is an upper bound: runs stop when
they are there.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from synthetic.config import RunConfig
from synthetic.grid import Sweep, grid

SEEDS, FEW_SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), (0, 1, 2), 100
RATES = (1e-3, 2.5e-3, 6.3e-3, 1.6e-2)
LENGTH, LONG_LENGTH = 64, 128
STEPS, LONG_STEPS, TUNING_STEPS = 800, 1200, 400
# The same growth of contexts in every cell: only learned positions allow another than the first n places.
GROWTH: dict[str, Any] = dict(curriculum=2, growth="prefix")
BASE = RunConfig(
    seq_len=LENGTH,
    d_model=64,
    queries=64,
    batch_tokens=1024,
    steps=STEPS,
    schedule="constant",
    stop_at=0.98,
    eval_every=25,
    final_eval_examples=512,
    device="cpu",
    precision="float32",
    **GROWTH,
)
LEVELS = {  # factor: its levels, the published default first
    "positions": ("none", "learned"),
    "convolution": ("default", "identity", "none"),
    "memory": ("default", "long"),
    "tie": ("random", "tied"),
}
PARTS = {"identity": "identity", "long": "long", "tied": "tied"}  # level: its part of `ssm_init`


@dataclass(frozen=True)
class Cell:
    """One choice of ingredients; the defaults have all of them.

    Attributes:
        positions: Level of `LEVELS`, as the others are.
        convolution: "none" has a single tap, whose first value is 1.
        memory: Whether the state fades at first.
        tie: Whether C is B at first.
    """

    positions: str = "learned"
    convolution: str = "identity"
    memory: str = "long"
    tie: str = "tied"

    @property
    def ssm_init(self) -> str:
        """The value of `--ssm-init`."""
        wanted = ("identity" if self.convolution == "none" else self.convolution, self.memory, self.tie)
        found = [part for part in wanted if part in PARTS]
        return "recall" if len(found) == len(PARTS) else "+".join(found) or "default"

    def options(self) -> dict[str, Any]:
        """Options of a run that make the cell."""
        taps = 1 if self.convolution == "none" else 4
        return dict(position=self.positions, ssm_init=self.ssm_init, d_conv=taps)


ALL, NOTHING = Cell(), Cell("none", "default", "default", "random")
POSITIONS_ALONE = dataclasses.replace(NOTHING, positions="learned")
WITHOUT_CONVOLUTION = Cell(convolution="none")
ONE_REMOVED = [dataclasses.replace(ALL, **{name: getattr(NOTHING, name)}) for name in LEVELS]
CORE = [ALL, *ONE_REMOVED, NOTHING, POSITIONS_ALONE, WITHOUT_CONVOLUTION]
REST = [
    cell for cell in (Cell(*levels) for levels in itertools.product(*LEVELS.values())) if cell not in CORE
]
MAMBA2 = [
    Cell(convolution=convolution, memory=memory, tie=tie)
    for convolution in ("identity", "default")
    for memory in ("long", "default")
    for tie in ("tied", "random")
]
# Layers with keys. DeltaNet never forgets; GLA and Mamba-3 have no convolution
_WITH_TAPS = [ALL, *ONE_REMOVED, POSITIONS_ALONE, WITHOUT_CONVOLUTION]
_WITHOUT = [
    dataclasses.replace(cell, convolution="none")
    for cell in (ALL, ONE_REMOVED[0], *ONE_REMOVED[2:], POSITIONS_ALONE)
]
WITHOUT_TAPS = ("mamba3", "gla")
KEYED: dict[str, list[Cell]] = {
    **dict.fromkeys(WITHOUT_TAPS, _WITHOUT),
    "deltanet": [cell for cell in _WITH_TAPS if cell != ONE_REMOVED[2]],
    "gated-deltanet": _WITH_TAPS,
    "kda": _WITH_TAPS,
}
ROPE: dict[str, Any] = dict(model="transformer", position="rope")


def ssm(model: str, cells: Iterable[Cell], **more: Any) -> list[RunConfig]:
    """One run of a state space model for every cell.

    Args:
        model: A state space model, or one of `KEYED`.
        cells: Their ingredients.
        **more: Further options, the same for all.

    Returns:
        The runs, in the order of the cells.
    """
    size: dict[str, Any] = dict(model=model, layers=1, d_state=64)
    chosen = [cell.options() for cell in cells]
    if model in WITHOUT_TAPS:
        chosen = [{name: value for name, value in made.items() if name != "d_conv"} for made in chosen]
    return [run for options in chosen for run in grid(BASE, **size, **options, **more)]


def long(model: str, cells: Iterable[Cell]) -> list[RunConfig]:
    """The runs of the longer context, all of the first seed first."""
    size: dict[str, Any] = dict(seq_len=LONG_LENGTH, steps=LONG_STEPS)
    cells = list(cells)
    return [run for seed in SEEDS for run in ssm(model, cells, seed=seed, **size)]


def core() -> list[RunConfig]:
    """Mamba with all ingredients, each one removed, and none."""
    runs = [run for seed in SEEDS for run in ssm("mamba", CORE, seed=seed)]
    return runs + long("mamba", [ALL, *ONE_REMOVED, WITHOUT_CONVOLUTION])


def families() -> list[RunConfig]:
    """Positions x architectures with attention, of the preset's depth."""
    hybrid: dict[str, Any] = dict(model="hybrid", d_state=64, ssm_init="default")
    runs = []
    for seed in SEEDS:
        runs += grid(BASE, seed=seed, model="transformer", position=("learned", "none"))
        runs += grid(BASE, seed=seed, rotary_pct=0.25, **ROPE)
        runs += grid(BASE, seed=seed, position=("learned", "none"), **hybrid)
    return runs


def mamba2() -> list[RunConfig]:
    """Mamba-2: convolution x memory x tie with positions, and all and none of them without."""
    cells = [*MAMBA2, dataclasses.replace(ALL, positions="none"), NOTHING]
    return [run for seed in SEEDS for run in ssm("mamba2", cells, seed=seed)] + long("mamba2", [ALL])


def rest() -> list[RunConfig]:
    """The cells of Mamba's factorial that `core` lacks; those without positions have fewer seeds."""
    runs = []
    for seed in SEEDS:
        wanted = [cell for cell in REST if cell.positions == "learned" or seed in FEW_SEEDS]
        runs += ssm("mamba", wanted, seed=seed)
    return runs


def keyed() -> list[RunConfig]:
    """Layers with keys, and Mamba-3: all ingredients, each one removed, and positions alone."""
    return [run for seed in SEEDS for model, cells in KEYED.items() for run in ssm(model, cells, seed=seed)]


def rope() -> list[RunConfig]:
    """The Transformer that rotates all dimensions of its heads."""
    return grid(BASE, seed=SEEDS, rotary_pct=1.0, **ROPE)


SWEEPS: dict[str, Callable[[], list[RunConfig]]] = {
    made.__name__: made for made in (core, families, mamba2, rest, rope, keyed)
}


def tune(run: RunConfig) -> RunConfig:
    """Learning rates are compared at the shorter length and in fewer steps."""
    return dataclasses.replace(run, seq_len=LENGTH, steps=TUNING_STEPS)


def sweep(name: str) -> Sweep:
    """One of the study's sweeps.

    Args:
        name: A key of `SWEEPS`.

    Returns:
        The sweep, with a folder of its own.
    """
    return Sweep(
        runs=SWEEPS[name](),
        learning_rates=RATES,
        validation_seeds=(TUNING_SEED,),
        tune=tune,
        out=f"runs/what_mamba_lacks/{name}",
    )
