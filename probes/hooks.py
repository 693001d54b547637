"""Replace named tensors in a forward pass: `intervene`, and the machinery it shares with `record`.

    with probes.intervene(model, {"blocks.1.hook_mixer_out": lambda x: 0 * x}):
        logits = model(ids)

All probes active on one model form a stack in a `Session`. Edits run in the order of the `with` statements,
the outermost first; recordings see the values after all edits, wherever they stand in the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probes.names import resolve
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.models.hooks import Hook, Hooked, Point, points

Change = Callable[[Tensor], Tensor] | Tensor


@dataclass(frozen=True)
class At:
    """A change of chosen positions only; `at` makes it.

    Attributes:
        positions: Positions along the length axis, negative ones counted from the end.
        change: A function of the values at these positions, or their new values.
    """

    positions: tuple[int, ...]
    change: Change


def at(positions: int | Sequence[int], change: Change) -> At:
    """Restrict a change to positions along the length axis.

    Args:
        positions: One position or several, each once; negative ones count from the end.
        change: A function, which gets the values at these positions alone, in this order, (B, len(positions),
            ...) or, of attention scores and patterns, (B, H, len(positions), S); or a tensor that is or
            broadcasts to their new values.

    Returns:
        A change for `intervene`.

    Raises:
        UserError: A position is named twice.
    """
    chosen = (positions,) if isinstance(positions, int) else tuple(int(p) for p in positions)
    if len(set(chosen)) < len(chosen):
        raise UserError(f"at() got positions {list(chosen)}; name each once")
    return At(chosen, change)


def absolute(positions: Sequence[int], length: int, what: str) -> list[int]:
    """Positions of a call as indices from its start.

    Args:
        positions: Positions, negative ones counted from the end.
        length: Tokens of the call.
        what: Who asks, the first words of the error message.

    Returns:
        The same positions in 0 .. length - 1.

    Raises:
        UserError: A position lies outside the call.
    """
    wrong = [p for p in positions if not -length <= p < length]
    if wrong:
        raise UserError(f"{what}: position {wrong[0]} does not exist in a call of {length} tokens")
    return [p % length for p in positions]


class Probe:
    """One active `record` or `intervene`, the base class of both. It wants nothing; names are full names."""

    names: frozenset[str] = frozenset()

    def begin(self, batch: int, length: int, keys: int) -> None:
        """A forward pass starts.

        Args:
            batch: Sequences, B.
            length: Tokens of this call, L.
            keys: Tokens that attention sees, S: those of this call and of a cache.
        """

    def edits(self, name: str) -> list[int]:
        """Positions at which the probe edits this name."""
        return []

    def records(self, name: str) -> list[int]:
        """Positions at which the probe records this name."""
        return []

    def edit(self, name: str, x: Tensor, positions: list[int]) -> Tensor:
        """The value of this name after the probe's edits.

        Args:
            name: A full name.
            x: Its value at `positions`.
            positions: Positions along the length axis that `x` holds.

        Returns:
            The new value, of the same shape and dtype.
        """
        return x

    def record(self, name: str, x: Tensor, positions: list[int]) -> None:
        """Take the value of this name.

        Args:
            name: A full name.
            x: Its value at `positions`, after all edits.
            positions: Positions along the length axis that `x` holds.
        """
        pass


@dataclass
class Session:
    """The probes active on one model.

    Attributes:
        points: The model's hook points by full name.
        length: Tokens of the current call.
        probes: The active probes, the outermost first.
        wanted: All names that a probe wants.
    """

    points: dict[str, Point]
    length: int = 0
    probes: list[Probe] = field(default_factory=list)
    wanted: frozenset[str] = frozenset()


@dataclass
class ModuleHook:
    """The `ssm_retrieval.models.hooks.Hook` of one module: it completes local names and asks the session's
    probes.
    """

    session: Session
    prefix: str

    def begin(self, batch: int, length: int, keys: int) -> None:
        """Tell all probes that a forward pass starts; arguments as in `Probe.begin`.

        Args:
            batch: Sequences, B.
            length: Tokens of this call, L.
            keys: Tokens that attention sees, S.
        """
        self.session.length = length
        for probe in self.session.probes:
            probe.begin(batch, length, keys)

    def _interested(self, name: str) -> Iterator[Probe]:
        return (probe for probe in self.session.probes if self.prefix + name in probe.names)

    def wants(self, name: str) -> bool:
        """Whether a probe wants this local name."""
        return self.prefix + name in self.session.wanted

    def edits(self, name: str) -> list[int]:
        """Positions, in order, at which a probe edits this local name."""
        return sorted({t for probe in self._interested(name) for t in probe.edits(self.prefix + name)})

    def records(self, name: str) -> list[int]:
        """Positions, in order, at which a probe records this local name."""
        return sorted({t for probe in self._interested(name) for t in probe.records(self.prefix + name)})

    def edit(self, name: str, x: Tensor, positions: list[int]) -> Tensor:
        """The value after the edits of all probes, see `Probe.edit`.

        Args:
            name: A local name.
            x: Its value at `positions`.
            positions: Positions along the length axis that `x` holds.

        Returns:
            The new value.
        """
        for probe in self._interested(name):
            x = probe.edit(self.prefix + name, x, positions)
        return x

    def record(self, name: str, x: Tensor, positions: list[int]) -> None:
        """Hand the value to all probes, see `Probe.record`.

        Args:
            name: A local name.
            x: Its value at `positions`.
            positions: Positions along the length axis that `x` holds.
        """
        for probe in self._interested(name):
            probe.record(self.prefix + name, x, positions)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if not self.wants(name):
            return x
        positions = list(range(self.session.length))
        x = self.edit(name, x, positions)
        self.record(name, x, positions)
        return x


@contextmanager
def at_work(model: LanguageModel, probe: Probe) -> Iterator[None]:
    """Activate a probe on a model for the time of a `with` statement."""
    hook = model.hook
    session = hook.session if isinstance(hook, ModuleHook) else Session(points(model))
    session.probes.append(probe)
    _attach(model, session)
    try:
        yield
    finally:
        session.probes = [other for other in session.probes if other is not probe]
        _attach(model, session)


def _attach(model: LanguageModel, session: Session) -> None:
    """Give a hook to the modules whose names are wanted, and take it from all others."""
    session.wanted = frozenset().union(*(probe.names for probe in session.probes))
    hooks: dict[int, tuple[Hooked, Hook | None]] = {}
    for name, point in session.points.items():
        if name in session.wanted or id(point.module) not in hooks:
            wanted = name in session.wanted or (point.module is model and session.probes)
            hooks[id(point.module)] = point.module, ModuleHook(session, point.prefix) if wanted else None
    for module, hook in hooks.values():
        module.__dict__.pop("hook", None)  # back to the class attribute, None
        if hook is not None:
            module.hook = hook


@contextmanager
def intervene(model: LanguageModel, changes: Mapping[str, Any]) -> Iterator[None]:
    """Replace named tensors in every forward pass inside the `with` statement.

    `mixer.hook_ssm_state`, `mixer.hook_ssm_readout` and `mixer.hook_A_bar` are edited position after
    position, because each state depends on the one before: their functions get (B, 1, ...) for each t in
    turn.

    An edit that changes no value leaves the output the same, bit for bit. The one exception is `mixer.hook_y`
    of Mamba: its use takes the gate out of the fused scan, which changes roundings. Gradients flow through
    edits.

    Args:
        model: Any model of the library.
        changes: Name or pattern to change, or to a list of changes made one after the other. A change is a
            function from a tensor to its replacement (same shape; it gets a copy, so it may work in place), a
            tensor that is or broadcasts to the replacement, or `at(positions, change)`. `probes.NAMES` has
            the shapes.

    Yields:
        Nothing.

    Raises:
        UserError: A name is unknown or a change is neither function nor tensor; in the forward pass, a
            position does not exist or a shape does not fit.
    """
    listed: dict[str, list[At | Change]] = {}
    for pattern, change in changes.items():
        several = list(change) if isinstance(change, list | tuple) else [change]
        for one in several:
            value = one.change if isinstance(one, At) else one
            if not callable(value) and not isinstance(value, Tensor):
                kind = type(value).__name__
                raise UserError(f"the change of {pattern!r} is a {kind}; give a function or a tensor")
        for name in resolve(model, pattern):
            listed.setdefault(name, []).extend(several)
    with at_work(model, Intervention(points(model), listed)):
        yield


class Intervention(Probe):
    """The probe of `intervene`: changes by full name, in the order in which they are made."""

    def __init__(self, known: dict[str, Point], changes: dict[str, list[At | Change]]):
        self.names = frozenset(changes)
        self._axis = {name: known[name].axes.index("L") for name in changes}
        self._changes = changes
        self._length = 0

    def begin(self, batch: int, length: int, keys: int) -> None:
        """Refuse positions that do not exist before anything is computed.

        Args:
            batch: Sequences, B.
            length: Tokens of this call, L.
            keys: Tokens that attention sees, S.
        """
        self._length = length
        for name in self.names:
            self.edits(name)  # refuses positions that do not exist before anything is computed

    def _positions(self, name: str, change: At | Change) -> list[int]:
        if isinstance(change, At):
            return absolute(change.positions, self._length, f"intervene on {name}")
        return list(range(self._length))

    def edits(self, name: str) -> list[int]:
        return sorted({t for change in self._changes[name] for t in self._positions(name, change)})

    def edit(self, name: str, x: Tensor, positions: list[int]) -> Tensor:
        where = {t: i for i, t in enumerate(positions)}
        axis = self._axis[name]
        for change in self._changes[name]:
            targets = self._positions(name, change)
            present = [i for i, t in enumerate(targets) if t in where]  # into the values of the change
            if not present:
                continue
            rows = [where[targets[i]] for i in present]  # into x
            whole = rows == list(range(x.shape[axis]))
            index = torch.tensor(rows, device=x.device)
            part = x if whole else x.index_select(axis, index)
            new = _changed(
                change.change if isinstance(change, At) else change, part, axis, present, targets, name
            )
            if new is not part:
                x = new if whole else x.index_copy(axis, index, new)
        return x


def _changed(
    change: Change, part: Tensor, axis: int, present: list[int], targets: list[int], name: str
) -> Tensor:
    """The new value of `part` in its dtype; `part` itself if no value and no gradient differs."""
    copy = part.clone()  # functions may work in place
    graph = copy.grad_fn
    if isinstance(change, Tensor):
        new: Any = change
        if change.dim() == part.dim() and change.shape[axis] == len(targets) > len(present):
            new = change.index_select(axis, torch.tensor(present, device=change.device))
    else:
        new = change(copy)
    if not isinstance(new, Tensor):
        raise UserError(f"the function for {name} returned {type(new).__name__}, not a tensor")
    new = new.to(part)
    if new.shape != part.shape:
        try:
            new = new.expand(part.shape)
        except RuntimeError:
            raise UserError(
                f"the change of {name} gives shape {tuple(new.shape)} where {tuple(part.shape)} is needed"
            ) from None
    same_graph = new.grad_fn is graph or not (new.requires_grad or part.requires_grad)
    return part if same_graph and torch.equal(new, part) else new
