"""Knocking out heads of attention and channels of SSM layers: what do a model's answers lose without them?

The vector that a mixer's last projection reads, (B, L, W), is split: by heads in attention (z, W = H P), by
equal groups of channels in SSM layers (y silu(z) of Mamba, the gated norm's output of Mamba-2, W = E). A part
is replaced at all positions, by zero or by its mean over the sequences at each position. The second ("mean
ablation", Wang et al. 2022, arXiv 2211.00593) keeps what the part says whatever the sequence.

`knock_out` takes parts away one at a time. `knock_out_together` takes a set away, and beside it random sets
of as many of the other parts: a set said to be responsible must hurt more than these (arXiv 2606.00930).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from probes.patch_sites import residuals, run_from
from probes.patch_states import captured, context_of, through_mlp
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.models.hybrid import ParallelBlock
from ssm_retrieval.models.transformer import TransformerBlock
from ssm_retrieval.ops.linear import linear
from ssm_retrieval.statistics import mean_interval, wilson
from synthetic.tasks import Batch

REPLACEMENTS = ("zero", "mean")


@dataclass(frozen=True)
class Part:
    """Channels low .. high - 1 of what the last projection of a block's mixer reads.

    Attributes:
        layer: Index of the block.
        kind: "head" or "channels".
        number: Of the head or group within its layer.
        low: First channel.
        high: Channel after the last.
    """

    layer: int
    kind: str  # "head" or "channels"
    number: int
    low: int
    high: int


def parts(model: LanguageModel, layer: int, groups: int = 16) -> list[Part]:
    """The parts of one block: heads of attention, Mamba-2 and delta rules, groups of channels of Mamba.

    Args:
        model: The model.
        layer: Index of the block.
        groups: Equal groups into which the channels of Mamba are split.

    Returns:
        The block's parts, in order of their channels.

    Raises:
        UserError: `groups` does not divide the channels, the block has branches in parallel, or its mixer is
            a user's own.
    """
    block: Any = model.blocks[layer]
    if isinstance(block, ParallelBlock):
        raise UserError(
            f"block {layer} has SSM and attention side by side; parts of such blocks are not known"
        )
    if isinstance(block, TransformerBlock):
        kind, width, count = "head", model.config.d_model, model.config.n_head
    elif not hasattr(block.mixer, "out_proj"):
        raise UserError(f"block {layer} has a mixer whose parts are not known")
    else:
        config = block.mixer.config
        kind, width, count = "channels", config.d_inner, getattr(config, "n_head", groups)
        if width % count:
            raise UserError(f"groups {count} must divide the {width} channels of block {layer}")
    size = width // count
    return [Part(layer, kind, i, i * size, (i + 1) * size) for i in range(count)]


@torch.no_grad()
def knock_out(
    model: LanguageModel,
    batch: Batch,
    chosen: Iterable[Part] | None = None,
    *,
    replacement: str = "mean",
    rows: int = 64,
    control: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Accuracy without each part, one row each.

    Args:
        model: The model.
        batch: Sequences with answers (`synthetic.tasks.Batch`).
        chosen: The parts to knock out, one at a time. None: all parts of all layers.
        replacement: "mean" or "zero".
        rows: Sequences that run side by side.
        control: Whether each layer also loses a random subspace of as many dimensions as a part.
        seed: Of these subspaces.

    Returns:
        Columns layer, kind, number, low and high of the part; replacement; control, "" for a part itself and
        "random" for the subspace (number, low and high are missing there); n, the answers; accuracy with its
        Wilson interval accuracy_low, accuracy_high; drop, the mean over sequences of the fraction right
        before minus after, with Student's interval; accuracy_intact, the same in every row.

    Raises:
        UserError: The replacement is unknown.
    """
    if replacement not in REPLACEMENTS:
        raise UserError(f"unknown replacement {replacement!r}; valid: {', '.join(REPLACEMENTS)}")
    wanted = list(chosen) if chosen is not None else _all_parts(model)
    generator = torch.Generator().manual_seed(seed)
    x = residuals(model, batch.input_ids)
    at = batch.answer_at[..., : batch.retrieved]
    intact = _right(model, model.config.n_layer, x[-1], batch, at, rows)
    table = []
    for layer in sorted({part.layer for part in wanted}):
        mixer = _Mixer(model, layer, x[layer], replacement)
        here = [part for part in wanted if part.layer == layer]
        trials: list[tuple[Part, str, Tensor]] = [(p, "", mixer.channels(p.low, p.high)) for p in here]
        if control:
            size = here[0].high - here[0].low
            trials.append((here[0], "random", mixer.random(size, generator)))
        for part, name, basis in trials:
            right = _right(model, layer + 1, x[layer + 1] + mixer.without(basis), batch, at, rows)
            table.append(_row(part, name, replacement, intact, right))
    frame = pd.DataFrame(table).astype(dict(number="Int64", low="Int64", high="Int64"))
    return frame.assign(accuracy_intact=float(intact.double().mean()))


@dataclass(frozen=True)
class Together:
    """What a set of parts is worth, beside random sets of as many others.

    Attributes:
        accuracy_intact: Accuracy of the whole model.
        accuracy: Accuracy without the set.
        drop: Mean over sequences of the fraction right before minus after, with Student's interval.
        drop_low: Its lower end.
        drop_high: Its upper end.
        controls: Drop without each of the random sets.
        share: Share of the random sets whose drop is at least as large.
        p: (1 + how many) / (1 + sets), the p-value of the randomisation test; never 0.
    """

    accuracy_intact: float
    accuracy: float
    drop: float
    drop_low: float
    drop_high: float
    controls: tuple[float, ...]
    share: float
    p: float


@torch.no_grad()
def knock_out_together(
    model: LanguageModel,
    batch: Batch,
    chosen: Sequence[Part],
    among: Iterable[Part] | None = None,
    *,
    sets: int = 20,
    replacement: str = "mean",
    rows: int = 64,
    seed: int = 0,
) -> Together:
    """Accuracy without a set of parts, beside random sets of as many parts of the rest.

    A random set has as many parts of each width as the chosen one, so that it loses as many dimensions. Its
    parts may be of other layers.

    Args:
        model: The model.
        batch: Sequences with answers.
        chosen: The set, taken away at once.
        among: The parts that are compared with, the set itself left out. None: all parts of all layers.
        sets: Random sets.
        replacement: "mean" or "zero"; means are those of the intact model.
        rows: Sequences that run side by side.
        seed: Of the random sets.

    Returns:
        The drop of the set and of its controls.

    Raises:
        UserError: The replacement is unknown, the set is empty, a number is below 1, or the rest has fewer
            parts of a width than the set.
    """
    if replacement not in REPLACEMENTS:
        raise UserError(f"unknown replacement {replacement!r}; valid: {', '.join(REPLACEMENTS)}")
    if not chosen or min(sets, rows) < 1:
        raise UserError(f"{len(chosen)} parts, sets {sets} and rows {rows} must all be at least 1")
    rest = [part for part in (_all_parts(model) if among is None else among) if part not in chosen]
    generator = torch.Generator().manual_seed(seed)
    trials = [list(chosen), *(_like(chosen, rest, generator) for _ in range(sets))]
    x = residuals(model, batch.input_ids)
    means = {
        layer: _Mixer(model, layer, x[layer], replacement).base
        for layer in sorted({part.layer for trial in trials for part in trial})
    }
    at = batch.answer_at[..., : batch.retrieved]
    intact = _right(model, model.config.n_layer, x[-1], batch, at, rows)
    right = [_right_without(model, trial, means, batch, at, rows) for trial in trials]
    drops = [(intact.double() - found.double()).mean(1) for found in right]
    drop, low, high = mean_interval(drops[0].cpu().numpy(), bounds=(-1, 1))
    controls = tuple(float(each.mean()) for each in drops[1:])
    as_large = sum(control >= drop for control in controls)
    return Together(
        accuracy_intact=float(intact.double().mean()), accuracy=float(right[0].double().mean()),
        drop=drop, drop_low=low, drop_high=high,
        controls=controls, share=as_large / sets, p=(1 + as_large) / (1 + sets),
    )  # fmt: skip


def _like(chosen: Sequence[Part], rest: Sequence[Part], generator: torch.Generator) -> list[Part]:
    """As many random parts of the rest as are chosen, width by width."""
    found = []
    for width in sorted({part.high - part.low for part in chosen}):
        wanted = sum(part.high - part.low == width for part in chosen)
        pool = [part for part in rest if part.high - part.low == width]
        if len(pool) < wanted:
            raise UserError(
                f"{wanted} parts of {width} channels leave {len(pool)} others to compare with; "
                f"give at most {(wanted + len(pool)) // 2}, or split the layers into more groups"
            )
        found += [pool[i] for i in torch.randperm(len(pool), generator=generator)[:wanted].tolist()]
    return found


def _right_without(
    model: LanguageModel,
    gone: Sequence[Part],
    means: Mapping[int, Tensor],
    batch: Batch,
    at: Tensor,
    rows: int,
) -> Tensor:
    """(B, K) bool: which answers are right in forward passes without some parts.

    Every block runs on what the blocks before it put out without theirs. `means` has (L, W) by layer.
    """

    def replaced(base: Tensor, parts: Sequence[Part]) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            read = inputs[0].clone()
            for part in parts:
                read[..., part.low : part.high] = base[:, part.low : part.high].to(read.dtype)
            return read, *inputs[1:]

        return hook

    handles = []
    for layer in sorted({part.layer for part in gone}):
        mine = [part for part in gone if part.layer == layer]
        hook = replaced(means[layer], mine)
        handles.append(_last_projection(model.blocks[layer]).register_forward_pre_hook(hook))
    try:
        found = []
        for begin in range(0, len(batch.input_ids), rows):
            some = slice(begin, begin + rows)
            x = residuals(model, batch.input_ids[some])[-1]
            places = at if at.dim() == 1 else at[some]
            found.append(run_from(model, model.config.n_layer, x[None], None, places)[0].argmax(-1))
        return batch.right(torch.cat(found))
    finally:
        for handle in handles:
            handle.remove()


def _all_parts(model: LanguageModel) -> list[Part]:
    return [part for layer in range(model.config.n_layer) for part in parts(model, layer)]


def _row(part: Part, control: str, replacement: str, intact: Tensor, right: Tensor) -> dict[str, Any]:
    hits, n = int(right.sum()), right.numel()
    low, high = wilson(hits, n)
    drop = mean_interval((intact.double() - right.double()).mean(1).cpu().numpy(), bounds=(-1, 1))
    named = dict(number=part.number, low=part.low, high=part.high)
    return dict(
        layer=part.layer, kind=part.kind, **(named if not control else dict.fromkeys(named, None)),
        replacement=replacement, control=control, n=n,
        accuracy=hits / n, accuracy_low=low, accuracy_high=high,
        drop=drop[0], drop_low=drop[1], drop_high=drop[2],
    )  # fmt: skip


def _right(model: LanguageModel, layer: int, x: Tensor, batch: Batch, at: Tensor, rows: int) -> Tensor:
    """(B, K) bool: which answers are right when blocks layer.. run on x (B, L, D)."""
    found = []
    for begin in range(0, len(x), rows):
        part = slice(begin, begin + rows)
        places = at if at.dim() == 1 else at[part]
        logits = run_from(model, layer, x[None, part], None, places)
        found.append(logits[0].argmax(-1))
    return batch.right(torch.cat(found))


def _last_projection(block: Any) -> Any:
    """The projection by which a block's attention or SSM adds to the residual stream."""
    return block.attention.dense if isinstance(block, TransformerBlock) else block.mixer.out_proj


class _Mixer:
    """One block at work: what its last projection reads, and what the block's output loses without a part."""

    def __init__(self, model: LanguageModel, layer: int, x: Tensor, replacement: str):
        self.block: Any = model.blocks[layer]
        self.projection = _last_projection(self.block)
        with captured(out=self.projection) as seen:
            self.block(x, context_of(x))
        self.read, self.middle = seen["out_in"], x + seen["out_out"]
        self.base = self.read.mean(0) if replacement == "mean" else torch.zeros_like(self.read[0])

    def channels(self, low: int, high: int) -> Tensor:
        """(W, high - low) orthonormal basis of some channels."""
        return torch.eye(self.read.shape[-1], dtype=self.read.dtype, device=self.read.device)[:, low:high]

    def random(self, size: int, generator: torch.Generator) -> Tensor:
        """(W, size) orthonormal basis of a uniformly random subspace."""
        matrix = torch.randn(self.read.shape[-1], size, generator=generator)
        return torch.linalg.qr(matrix).Q.to(self.read)

    def without(self, basis: Tensor) -> Tensor:
        """(B, L, D) that replacing what `read` has in the span of the basis adds to the block's output."""
        change = linear((self.base - self.read) @ basis, self.projection.weight @ basis)
        return through_mlp(self.block, change, self.middle)
