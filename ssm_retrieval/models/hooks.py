"""Hook points: the named places of a forward pass where `probes` may look at a tensor or replace it.

A module with hook points has the attribute `hook`, None unless a probe is at work, and says

    if self.hook is not None:
        x = self.hook("hook_conv", x)

so that without a probe nothing is paid but the comparison. Where the fast path never makes a quantity
(attention patterns, states, exp(dt A)) the module asks the hook what is wanted and makes just that.
Rules that all modules keep:

  * a hook returns the very object it was given if nothing changed; the fast path is then left alone;
  * what is only recorded is computed beside the fast path, at the recorded positions only;
  * a name fires once per call.

`LanguageModel.hook_names()` lists the names, `points` finds the module behind each. Axes are written with the
letters of `ssm_retrieval.models.common` and M = width of the MLP, G = groups of heads that share B and C,
J = E + 2 G N = channels of Mamba-2's convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

STATE_NAMES = ("hook_A_bar", "hook_ssm_state", "hook_ssm_readout")


class Hook(Protocol):
    """What a module may ask of the probes at work. Names are local to the module ("hook_conv")."""

    def begin(self, batch: int, length: int, keys: int) -> None:
        """Said once before each forward pass: B, L, and S = cached tokens + L."""

    def wants(self, name: str) -> bool:
        """Whether this name is edited or recorded."""

    def edits(self, name: str) -> list[int]:
        """The positions at which this name is edited, increasing."""

    def records(self, name: str) -> list[int]:
        """The positions at which this name is recorded, increasing."""

    def edit(self, name: str, x: Tensor, positions: list[int]) -> Tensor:
        """x, whose length axis holds these positions, after all edits; x itself if nothing changed."""

    def record(self, name: str, x: Tensor, positions: list[int]) -> None:
        """Hand over x, whose length axis holds these positions (all that are recorded, and maybe more)."""

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Edit, then record, a tensor that holds every position."""


class Hooked:
    """What a module with hook points defines beside its `forward`."""

    hook: Hook | None = None
    hook_axes: ClassVar[dict[str, str]] = {}  # local name -> axes, such as "B L E N"

    def __getstate__(self) -> dict[str, Any]:
        """What `copy.deepcopy` and pickle take along: no hook, for a copy is not what a probe was put on."""
        return {name: value for name, value in self.__dict__.items() if name != "hook"}

    def hook_points(self) -> list[str]:
        """Local names of this module's own points; a subset of `hook_axes` where its config decides."""
        return list(self.hook_axes)

    def hook_sizes(self) -> dict[str, int]:
        """Size of every letter in `hook_axes` but B, L and S."""
        return {}

    def hook_children(self) -> dict[str, Hooked]:
        """Prefix of the names -> module, for the modules below this one."""
        return {}


@dataclass(frozen=True)
class Point:
    """One name: the module that fires it, its name there, its axes and their fixed sizes."""

    module: Hooked
    prefix: str
    local: str
    axes: tuple[str, ...]
    sizes: dict[str, int]


def points(module: Hooked, prefix: str = "") -> dict[str, Point]:
    """Every hook point of a module and those below it, by full name, in the order of the forward pass."""
    sizes = module.hook_sizes()
    own = {
        prefix + name: Point(module, prefix, name, tuple(module.hook_axes[name].split()), sizes)
        for name in module.hook_points()
    }
    found: dict[str, Point] = {}
    children = module.hook_children()
    for i, (name, point) in enumerate(own.items()):
        for below in list(children):  # "attn." stands before "hook_attn_out", the blocks before the last name
            if point.local == f"hook_{below[:-1]}_out" or i == len(own) - 1:
                found |= points(children.pop(below), prefix + below)
        found[name] = point
    return found


def masked_hook(hook: Hook, name: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, L, ...) after the hook, zero again at padding: an edit there must not reach real tokens."""
    new = hook(name, x)
    return new if mask is None or new is x else new * mask.view(*mask.shape, *(1,) * (x.dim() - 2))


class Recurrence(Protocol):
    """A linear recurrence whose arguments are settled, to be run in pieces.

        h_t = decay_t * h_{t-1} + write_t            y_t = read(h_t)

    States are (B, *state), outputs (B, length, *out).
    """

    @property
    def length(self) -> int: ...

    def scan(self, start: int, stop: int, h: Tensor | None, at: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens start..stop-1 on the fast path, from h_{start-1} = h: y, the last state, and the states
        (B, len(at), *state) after the tokens start + at[i]."""

    def decay(self, positions: list[int]) -> Tensor:
        """A_bar at these positions, (B, len(positions), ...)."""

    def step(self, t: int, h: Tensor | None, decay: Tensor) -> Tensor:
        """One step written out: h_t (B, *state) from h_{t-1} and A_bar_t (B, ...)."""

    def read(self, t: int, h: Tensor) -> Tensor:
        """y_t (B, 1, *out) from h_t."""


def hooked_scan(hook: Hook, recurrence: Recurrence, h: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run a recurrence with the three state names of `STATE_NAMES`: y (B, L, *out) and the last state.

    hook_A_bar edits the decay of a step; hook_ssm_state edits h_t, from which the recurrence goes on;
    hook_ssm_readout edits the h_t that C_t reads, and nothing after it. Functions see (B, 1, ...), position
    after position. The fast path runs over the whole sequence first; if an edit changes nothing, its output
    stands, bit for bit. From the first change on it runs between the edited positions.
    """
    L = recurrence.length
    decays = _edited_decays(hook, recurrence)
    stops = sorted({*decays, *hook.edits("hook_ssm_state"), *hook.edits("hook_ssm_readout")})
    records = sorted({*hook.records("hook_ssm_state"), *hook.records("hook_ssm_readout")})
    if not stops:
        y, last, seen = recurrence.scan(0, L, h, records)
        _record(hook, seen, seen, records)
        return y, last
    begin, pieces = 0, []
    states: dict[int, Tensor] = {}  # h_t as it is kept, and below as it is read, where it is recorded
    reads: dict[int, Tensor] = {}
    if not decays:
        y, last, seen = recurrence.scan(0, L, h, records + stops)
        states.update(zip(records, seen.unbind(1), strict=False))
        reads.update(states)
        for t, h_t in zip(stops, seen[:, len(records) :].unbind(1), strict=True):
            state, read = _edited(hook, h_t, t)
            if state is not h_t or read is not h_t:
                pieces, begin, h = [y[:, :t], recurrence.read(t, read)], t + 1, state
                states[t], reads[t] = state, read
                break
        else:
            _record_each(hook, states, reads, records)
            return y, last
        del seen
    wanted = set(records)
    for t in [*(stop for stop in stops if stop >= begin), L]:
        if t > begin:
            inside = [r for r in records if begin <= r < t]
            y, h, seen = recurrence.scan(begin, t, h, [r - begin for r in inside])
            pieces.append(y)
            states.update(zip(inside, seen.unbind(1), strict=True))
            reads.update(zip(inside, seen.unbind(1), strict=True))
        if t < L:
            decay = decays[t] if t in decays else recurrence.decay([t])[:, 0]
            state, read = _edited(hook, recurrence.step(t, h, decay), t)
            pieces.append(recurrence.read(t, read))
            begin, h = t + 1, state
            if t in wanted:
                states[t], reads[t] = state, read
    _record_each(hook, states, reads, records)
    assert h is not None
    return torch.cat(pieces, dim=1), h


def _edited_decays(hook: Hook, recurrence: Recurrence) -> dict[int, Tensor]:
    """A_bar (B, ...) at the positions where an edit changes it; records A_bar with the edits in it."""
    changed = {}
    for t in hook.edits("hook_A_bar"):
        decay = recurrence.decay([t])
        new = hook.edit("hook_A_bar", decay, [t])
        if new is not decay:
            changed[t] = new[:, 0]
    records = hook.records("hook_A_bar")
    if records:
        decay = recurrence.decay(records)
        replaced = [t for t in records if t in changed]
        if replaced:
            index = torch.tensor([records.index(t) for t in replaced], device=decay.device)
            decay = decay.index_copy(1, index, torch.stack([changed[t] for t in replaced], dim=1))
        hook.record("hook_A_bar", decay, records)
    return changed


def _edited(hook: Hook, h: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """h_t (B, *state) as it is kept and as C_t reads it; h itself where nothing changed."""
    state, x = h, h.unsqueeze(1)
    new = hook.edit("hook_ssm_state", x, [t])
    if new is not x:
        state, x = new[:, 0], new
    read = hook.edit("hook_ssm_readout", x, [t])
    return state, state if read is x else read[:, 0]


def _record(hook: Hook, states: Tensor, reads: Tensor, records: list[int]) -> None:
    if records:
        hook.record("hook_ssm_state", states, records)
        hook.record("hook_ssm_readout", reads, records)


def _record_each(hook: Hook, states: dict[int, Tensor], reads: dict[int, Tensor], records: list[int]) -> None:
    if records:
        kept, read = (torch.stack([x[t] for t in records], dim=1) for x in (states, reads))
        _record(hook, kept, read, records)
