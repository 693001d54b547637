"""Hook points: the named places of a forward pass where `probes` may read a tensor or replace it.

A module says

    x = self.tap("hook_conv", x)

and gets the same x back unless a probe has set the module's `hook`. Where the fast path never makes a
quantity (attention patterns, states, exp(dt A)), `ssm_retrieval.models.instrumented` replaces it while there
is a hook, asks the hook what it wants and makes only that. All modules keep three rules:

* A hook returns the very object it was given if nothing changed; the fast path's result then stands.
* What is only recorded is computed beside the fast path, at the recorded positions only.
* A name fires once per call.

`LanguageModel.hook_names()` lists the names, `points` finds the module behind each. Axes are written with the
letters of `ssm_retrieval.models.common` and M = width of the MLP, G = groups of heads that share B and C,
J = E + 2 G N = channels of Mamba-2's convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

from torch import Tensor, nn

# The letters of `hook_axes` whose size does not change from call to call -> the config field that has it.
SIZES = {
    "D": "d_model",
    "E": "d_inner",
    "N": "d_state",
    "H": "n_head",
    "P": "d_head",
    "M": "mlp_width",
    "G": "ngroups",
    "J": "conv_dim",
}


class Hook(Protocol):
    """What a module may ask the active probes. Names are local to the module ("hook_conv")."""

    def begin(self, batch: int, length: int, keys: int) -> None:
        """Called once before each forward pass.

        Args:
            batch: B.
            length: L.
            keys: S, the cached tokens and L.
        """

    def wants(self, name: str) -> bool:
        """Whether this name is edited or recorded."""

    def edits(self, name: str) -> list[int]:
        """The positions at which this name is edited, increasing."""

    def records(self, name: str) -> list[int]:
        """The positions at which this name is recorded, increasing."""

    def edit(self, name: str, x: Tensor, positions: list[int]) -> Tensor:
        """Apply all edits of a name.

        Args:
            name: The name.
            x: A tensor whose length axis holds `positions`.
            positions: Positions in the sequence, increasing.

        Returns:
            A tensor like x; x itself if nothing changed.
        """

    def record(self, name: str, x: Tensor, positions: list[int]) -> None:
        """Hand over a tensor.

        Args:
            name: Its name.
            x: A tensor whose length axis holds `positions`.
            positions: All recorded positions, and possibly more.
        """

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Edit, then record, a tensor that holds every position."""


class Hooked:
    """A module with hook points: it has a `config`, lists its names, and taps them in its `forward`."""

    config: Any
    hook: Hook | None = None
    hook_axes: ClassVar[dict[str, str]] = {}  # local name -> axes, such as "B L E N"
    hook_prefix: ClassVar[str] = ""  # of the names in this module; "" = what its parent calls it, and a dot

    def tap(self, name: str, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x after the active probes; x itself if there are none.

        Args:
            name: Local name of the hook point.
            x: (B, L, ...), zero where mask is False.
            mask: (B, L) bool, True = real token. An edited x is set to zero elsewhere, so that what is
                written to padding cannot reach real tokens.

        Returns:
            A tensor like x.
        """
        if self.hook is None:
            return x
        new = self.hook(name, x)
        return new if mask is None or new is x else new * mask.view(*mask.shape, *(1,) * (x.dim() - 2))

    def __getstate__(self) -> dict[str, Any]:
        """What `copy.deepcopy` and pickle copy: everything but the hook, whose probe knows the original."""
        return {name: value for name, value in self.__dict__.items() if name != "hook"}

    def hook_points(self) -> list[str]:
        """Local names of this module's own points; a subset of `hook_axes` where its config decides."""
        return list(self.hook_axes)

    def hook_sizes(self) -> dict[str, int]:
        """Size of every letter in `hook_axes` but B, L and S, by default from the config by `SIZES`."""
        letters = {letter for axes in self.hook_axes.values() for letter in axes.split()}
        return {x: getattr(self.config, SIZES[x]) for x in sorted(letters) if x in SIZES}

    def hook_children(self) -> dict[str, Hooked]:
        """Prefix of the names -> module, for the modules below this one."""
        children = cast(nn.Module, self).named_children()
        return {m.hook_prefix or f"{name}.": m for name, m in children if isinstance(m, Hooked)}


@dataclass(frozen=True)
class Point:
    """One hook point.

    Attributes:
        module: The module that fires it.
        prefix: Of the full name.
        local: The rest of it, as the module says it.
        axes: Letters, as in `Hooked.hook_axes`.
        sizes: Sizes by letter, for axes of fixed size.
    """

    module: Hooked
    prefix: str
    local: str
    axes: tuple[str, ...]
    sizes: dict[str, int]


def points(module: Hooked, prefix: str = "") -> dict[str, Point]:
    """Every hook point of a module and of those below it, by full name, in the order of the forward pass."""
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
    for below, child in children.items():  # of a module without names of its own
        found |= points(child, prefix + below)
    return found
