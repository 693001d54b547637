"""Causal tracing: activations of clean runs are put into corrupted ones, at every layer and position.

A patch's effect is the normalised logit difference (Wang et al. 2022, arXiv 2211.00593; Zhang & Nanda 2023,
arXiv 2309.16042)

    (LD_patched - LD_corrupted) / (LD_clean - LD_corrupted)    LD = logit[clean answer] - logit[corrupted one]

read where the answer is due. It is 0 where the patch changes nothing, and 1 where it turns the corrupted run
into the clean one. `probes.patch_sites` says what is patched, `probes.patch_cells` which tokens together.

What a patch cannot change is computed once: a patch at layer l runs blocks l.. (l + 1.. inside a block), on
the tokens from the patched one on, from the cached states of the corrupted run, and reads logits at the
answer only. Patches of several positions run side by side as rows of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from probes.contrast_pairs import Pairs
from probes.patch_cells import Cell, chunks, everything, patch_cells
from probes.patch_effects import Key, Traced, logit_difference
from probes.patch_sites import SITES, Heads, advance, has_site, residuals, run_from
from probes.patch_states import ssm_state
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.common import Cache, LanguageModel

# Numbers a block holds for each token at its peak, in units of d_model: projections, scan or MLP, copies.
WIDTHS_PER_TOKEN = 32
# On a CPU, rows in one call save nothing beyond this, and cost the tokens before the patch of each.
CPU_TOKENS = 2048


def patch(
    model: LanguageModel,
    pairs: Pairs,
    sites: Iterable[str] = SITES,
    *,
    layers: Iterable[int] | None = None,
    max_positions: int = 64,
    controls: bool = True,
    memory_mb: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """The patching grid of a model as a tidy table: one row per site, layer, head and cell of tokens.

    A state has one value a token, so a cell of several tokens replaces the last one's, which holds what was
    written before. Sites that the model lacks are left out.

    Columns of the table:

        site, layer, head     layer l of residual is what enters block l, n_layer the last norm; of state and
                              head it is block l; head is missing except for site head
        role, low, high       the tokens low .. high - 1, see `probes.patch_cells.Cell`
        control, n            see below; pairs that have a token in this cell
        effect                `probes.patch_effects.effect`; its 95 % interval _low, _high
        effect_each           mean over pairs of their normalised logit differences; _low, _high
        accuracy              share of pairs that answer with the clean answer; Wilson's _low, _high
        gap, accuracy_clean, accuracy_corrupted
                              the same in every row: mean of LD_clean - LD_corrupted, and how often the
                              unpatched runs give the clean answer

    Values of control:

        ""           the patch itself
        self         the corrupted run's own activation: effect 0, bit for bit
        everything   (residual) all positions of a layer: effect 1
        unrelated    the activation of another pair's clean run, scaled to the norm of the one it stands for;
                     needs two pairs

    Args:
        model: The model.
        pairs: Clean and corrupted sequences (`probes.contrast_pairs`).
        sites: Of "residual", "state", "head".
        layers: Of 0 .. n_layer. None: all.
        max_positions: About how many cells of tokens, see `probes.patch_cells.patch_cells`.
        controls: Whether to run the controls as well.
        memory_mb: Bound of activations, MiB, about.
        progress: Called with (done, all) patched pairs after each chunk.

    Returns:
        The table.

    Raises:
        UserError: A site or layer is unknown, or controls are asked for a single pair.
    """
    traced = trace(
        model, pairs, patch_cells(pairs, max_positions), sites,
        layers=layers, controls=controls, memory_mb=memory_mb, progress=progress,
    )  # fmt: skip
    return traced.table()


@torch.no_grad()
def trace(
    model: LanguageModel,
    pairs: Pairs,
    what: list[Cell],
    sites: Iterable[str] = SITES,
    *,
    layers: Iterable[int] | None = None,
    controls: bool = True,
    memory_mb: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> Traced:
    """As `patch`, for chosen cells, with the results of every pair.

    Args:
        model: The model.
        pairs: Clean and corrupted sequences.
        what: The cells to patch.
        sites: Of "residual", "state", "head".
        layers: Of 0 .. n_layer. None: all.
        controls: Whether to run the controls as well.
        memory_mb: Bound of activations, MiB, about.
        progress: Called with (done, all) patched pairs after each chunk.

    Returns:
        Logit differences and answers of every patch and pair.

    Raises:
        UserError: A site or layer is unknown, or controls are asked for a single pair.
    """
    layers = _layers(model, layers)
    sites = list(sites)
    for site in sites:
        if site not in SITES:
            raise UserError(f"unknown site {site!r}; valid: {', '.join(SITES)}")
    if controls and len(pairs) < 2:
        raise UserError("the control with an unrelated run needs two pairs; give more, or controls=False")
    what = [*what, everything(pairs)]
    keys = list(_keys(model, sites, layers, len(what), controls))
    number = {key: i for i, key in enumerate(keys)}
    B, L = len(pairs), pairs.answer_at + 1
    difference = torch.full((len(keys), B), torch.nan, dtype=torch.float64)
    right = torch.zeros(len(keys), B, dtype=torch.bool)
    plain = []  # LD and correctness of clean and corrupted runs
    budget = memory_mb * 2**20 // (4 * model.config.d_model)  # vectors of the residual stream
    kept = 3 * (model.config.n_layer + 1) * L  # of one pair
    rows = max(1, min(B, budget // 2 // max(kept, WIDTHS_PER_TOKEN * L)))
    tokens = budget // 2 // WIDTHS_PER_TOKEN
    if pairs.answer.device.type == "cpu":
        tokens = min(tokens, CPU_TOKENS)
    for begin in range(0, B, rows):
        part = slice(begin, begin + rows)
        work = _Work(model, pairs, part, what, tokens // len(range(B)[part]))
        plain.append([work.measured(work.plain(name)) for name in ("clean", "corrupted")])
        for key_group, ld, hit in work.patches(sites, layers, controls):
            index = [number[key] for key in key_group]
            where = torch.stack([what[key.cell].where[part].any(1) for key in key_group]).cpu()
            difference[index, part] = ld.double().cpu().masked_fill(~where, torch.nan)
            right[index, part] = hit.cpu() & where
            if progress is not None:
                progress(begin, B)
        if progress is not None:
            progress(min(begin + rows, B), B)
    (clean, clean_right), (corrupted, corrupted_right) = (
        [torch.cat([block[i][j].flatten() for block in plain]).cpu() for j in (0, 1)] for i in (0, 1)
    )
    return Traced(
        keys, what, difference, right, clean.double(), corrupted.double(), clean_right, corrupted_right
    )


def _layers(model: LanguageModel, layers: Iterable[int] | None) -> list[int]:
    n = model.config.n_layer
    chosen = list(range(n + 1)) if layers is None else sorted(set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] > n:
        raise UserError(f"layers {chosen} must be some of 0 .. n_layer = {n}")
    return chosen


def _heads(model: LanguageModel, site: str, layer: int) -> list[int | None]:
    """The heads of a site in a layer: [None] where there are none, [] where there is no such site."""
    if site == "residual":
        return [None]
    if layer == model.config.n_layer or not has_site(model.blocks[layer], site):
        return []
    return list(range(model.config.n_head)) if site == "head" else [None]


def _keys(
    model: LanguageModel, sites: list[str], layers: list[int], count: int, controls: bool
) -> Iterator[Key]:
    """All keys in the order of the table; the last of `count` cells is "everything"."""
    for site in sites:
        for layer in layers:
            for head in _heads(model, site, layer):
                for cell in range(count - 1):
                    yield Key(site, layer, head, cell, "")
                if controls:
                    yield Key(site, layer, head, count - 1, "self")
                    if site == "residual":
                        yield Key(site, layer, head, count - 1, "everything")
                    for cell in range(count - 1):
                        yield Key(site, layer, head, cell, "unrelated")


class _Work:
    """The patches of some of the pairs: runs recorded once, then patched chunk by chunk."""

    def __init__(self, model: LanguageModel, pairs: Pairs, part: slice, what: list[Cell], budget: int):
        self.model, self.budget = model, budget
        self.at = pairs.answer_at
        self.answer, self.wrong = pairs.answer[part], pairs.corrupted_answer[part]
        ids = {name: getattr(pairs, name).input_ids[:, : self.at + 1] for name in ("clean", "corrupted")}
        ids["unrelated"] = ids["clean"].roll(1, dims=0)
        self.ids = {name: rows[part] for name, rows in ids.items()}
        self.x = {name: residuals(model, rows) for name, rows in self.ids.items()}
        self.where = torch.stack([cell.where[part] for cell in what])  # (C, B, L)

    def plain(self, name: str) -> Tensor:
        """Logits (1, B, V) of a run as it is."""
        return run_from(self.model, self.model.config.n_layer, self.x[name][-1][None], None, self.at)

    def measured(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logit difference and correctness, (c, B) each, of logits (c, B, V)."""
        c = len(logits)
        answer, wrong = (t.expand(c, -1) for t in (self.answer, self.wrong))
        return logit_difference(logits, answer, wrong), logits.argmax(-1) == answer

    def patches(
        self, sites: list[str], layers: list[int], controls: bool
    ) -> Iterator[tuple[list[Key], Tensor, Tensor]]:
        """Groups of keys with their logit differences and correctness, (keys, B) each."""
        last = len(self.where) - 1
        cache = self.model.init_cache()
        sources = {"": "clean"} | ({"unrelated": "unrelated"} if controls else {})
        for chosen, start in chunks(self.where[:last], self.budget):
            advance(self.model, self.ids["corrupted"], cache, start)
            yield from self._group(sites, layers, sources, chosen, start, cache)
        if controls:  # from the first token, with as many rows: the very same arithmetic as unpatched
            everywhere = {"self": "corrupted"}
            yield from self._group(sites, layers, everywhere, [last], 0, None)
            if "residual" in sites:
                yield from self._group(["residual"], layers, {"everything": "clean"}, [last], 0, None)

    def _group(
        self, sites: list[str], layers: list[int], sources: dict[str, str], chosen: list[int], start: int,
        cache: Cache | None,
    ) -> Iterator[tuple[list[Key], Tensor, Tensor]]:  # fmt: skip
        where = self.where[chosen]
        for site in sites:
            for layer in layers:
                if not _heads(self.model, site, layer):
                    continue
                for control, head, x in getattr(self, f"_{site}")(layer, where, start, sources):
                    behind = layer + (site != "residual")
                    logits = run_from(self.model, behind, x, cache, self.at - start)
                    yield [Key(site, layer, head, i, control) for i in chosen], *self.measured(logits)

    # Each site gives (control, head, residual stream (c, B, T, D) after its patches), source after source.

    def _residual(
        self, layer: int, where: Tensor, start: int, sources: dict[str, str]
    ) -> Iterator[tuple[str, int | None, Tensor]]:
        corrupted, clean = self.x["corrupted"][layer][:, start:], self.x["clean"][layer][:, start:]
        for control, name in sources.items():
            x = self.x[name][layer][:, start:]
            if control == "unrelated":
                x = of_norm(x, clean, 1)
            yield control, None, torch.where(where[:, :, start:, None], x, corrupted)

    def _state(
        self, layer: int, where: Tensor, start: int, sources: dict[str, str]
    ) -> Iterator[tuple[str, int | None, Tensor]]:
        block = self.model.blocks[layer]
        at = torch.where(where, torch.arange(where.shape[2], device=where.device), -1).amax(2).clamp(min=0)
        positions, index = at.unique(return_inverse=True)
        rows = torch.arange(at.shape[1], device=at.device)

        def states(name: str) -> Tensor:  # (c, B, *state)
            return ssm_state(block, self.x[name][layer]).states(positions.tolist())[rows, index]

        corrupted = ssm_state(block, self.x["corrupted"][layer])
        before = corrupted.states(positions.tolist())[rows, index]
        clean = states("clean")
        for control, name in sources.items():
            h = before if name == "corrupted" else clean if name == "clean" else states(name)
            if control == "unrelated":
                h = of_norm(h, clean, h.dim() - 2)
            x = self.x["corrupted"][layer + 1][:, start:] + corrupted.added(h - before, at, start)
            yield control, None, x

    def _head(
        self, layer: int, where: Tensor, start: int, sources: dict[str, str]
    ) -> Iterator[tuple[str, int | None, Tensor]]:
        block: Any = self.model.blocks[layer]
        runs = {name: Heads(block, self.x[name][layer]) for name in {"clean", "corrupted", *sources.values()}}
        corrupted = runs["corrupted"]
        mask = where[:, :, start:, None]
        for control, name in sources.items():
            for head in range(corrupted.z.shape[2]):
                z = {run: heads.z[:, start:, head] for run, heads in runs.items()}
                new = of_norm(z[name], z["clean"], 1) if control == "unrelated" else z[name]
                delta = torch.where(mask, new - z["corrupted"], 0)
                x = self.x["corrupted"][layer + 1][:, start:] + corrupted.added(delta, head, start)
                yield control, head, x


def of_norm(x: Tensor, like: Tensor, dims: int) -> Tensor:
    """Scale x to the norms of another tensor.

    Args:
        x: What to scale.
        like: Has the norms, same shape.
        dims: How many last axes a norm is taken over.

    Returns:
        x with the norms of `like`; zero stays zero.
    """
    axes = tuple(range(-dims, 0))
    norm, wanted = (torch.linalg.vector_norm(t, dim=axes, keepdim=True) for t in (x, like))
    return x * (wanted / norm.clamp(min=torch.finfo(norm.dtype).tiny))
