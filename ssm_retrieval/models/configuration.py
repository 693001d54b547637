"""Configs: frozen dataclasses that check their values when they are made, by one table for all."""

from __future__ import annotations

import dataclasses
import math
import numbers
import reprlib
import sys
from collections.abc import Iterable
from typing import Any, cast

from ssm_retrieval.errors import UserError
from ssm_retrieval.ops.selective_scan import MAX_D_STATE

POSITIONS = ("rope", "learned", "none")
# "recall" has the three parts together (models.ssm_init); one spelling for one set of weights
SSM_INITS = ("default", "identity", "long", "tied", "identity+long", "identity+tied", "long+tied", "recall")
LARGEST = 2**31 - 1  # no tensor of any machine has more along an axis
# Ranges of numbers, ends included. The rule for all others: whole numbers from 1, other numbers above 0
RANGES: dict[str, tuple[float, float]] = {
    "n_layer": (1, 100_000),  # a million blocks fill a machine with their Python objects alone
    "d_state": (1, MAX_D_STATE),
    "dt_rank": (0, LARGEST),
    "dt_max": (1e-4, math.inf),  # the floor of dt at initialisation
    "d_mlp": (0, LARGEST),
    "window": (0, LARGEST),
    "rotary_pct": (0, 1),
    "rope_fraction": (0, 1),
    "norm_eps": (0, math.inf),
    "embedding_std": (0, math.inf),
    "init_std": (0, math.inf),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "norm": ("rms", "layer"),
    "position": POSITIONS,
    "ssm_init": SSM_INITS,
}


def require(condition: bool, message: str) -> None:
    """Do nothing if the condition holds.

    Raises:
        UserError: With this one-line message, if it does not.
    """
    if not condition:
        raise UserError(message)


def check_ssm(config: Any) -> None:
    """Do nothing if dt_min <= dt_max (where there is a dt) and the position scheme can be an SSM's.

    Raises:
        UserError: If they are not.
    """
    if hasattr(config, "dt_min"):
        low, high = config.dt_min, config.dt_max
        require(low <= high, f"dt_min={low} is above dt_max={high}; exchange them or change one")
    require(
        config.position != "rope",
        "position='rope' rotates the queries and keys of attention layers, of which this model has none "
        "(Mamba-3, which rotates B and C, is another architecture); use 'learned' or 'none'",
    )


class Config:
    """Base of the frozen dataclass configs; it refuses unknown fields and bad values.

    Subclasses extend `__post_init__` with conditions on several fields.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(cast(Any, self)):
            check(field.name, str(field.type), getattr(self, field.name))

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(cast(Any, self))

    def replace(self, **overrides: Any) -> Any:
        """A copy with some fields changed.

        Args:
            **overrides: New values by field.

        Returns:
            A config of the same class.

        Raises:
            UserError: For unknown fields and bad values.
        """
        known = [f.name for f in dataclasses.fields(cast(Any, self))]
        for key in overrides:
            if key not in known:
                raise UserError(f"{type(self).__name__} has no option {key!r}; it has {', '.join(known)}")
        return dataclasses.replace(cast(Any, self), **overrides)


class HeadsConfig(Config):
    """Base of configs whose states belong to heads: d_inner channels in heads of headdim."""

    d_model: int
    expand: float
    headdim: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ssm(self)
        width = self.expand * self.d_model
        said = f"expand={self.expand} times d_model={self.d_model} is {width:g}"
        require(width == round(width), f"{said}, which is no number of channels; change one of them")
        require(
            self.d_inner % self.headdim == 0,
            f"headdim={self.headdim} does not divide d_inner={self.d_inner}; use a divisor",
        )
        groups = getattr(self, "ngroups", 1)
        require(
            self.n_head % groups == 0,
            f"ngroups={groups} does not divide the {self.n_head} heads; use a divisor",
        )

    @property
    def d_inner(self) -> int:
        """Channels of all heads."""
        return round(self.expand * self.d_model)

    @property
    def n_head(self) -> int:
        return self.d_inner // self.headdim

    @property
    def d_head(self) -> int:
        return self.headdim


def derived(name: str, base: type[Config], fields: Iterable[tuple[str, Any, Any]]) -> type[Config]:
    """A config class for an architecture that a user describes without writing one.

    Args:
        name: The architecture.
        base: The config class to derive from.
        fields: Name, type and default of each further field.

    Returns:
        The class, a frozen dataclass.
    """
    words = name.replace(".", "-").split("-")
    return dataclasses.make_dataclass(
        "".join(word.capitalize() for word in words) + "Config",
        fields,
        bases=(base,),
        frozen=True,
        namespace={"__doc__": f"`{base.__name__}` with the options of {name}.", "__module__": __name__},
    )


def check(name: str, kind: str, value: Any) -> None:
    """Do nothing if the value has the field's kind and is in its range.

    Args:
        name: The field.
        kind: Its annotation, "int", "float", "bool" or "str".
        value: The value.

    Raises:
        UserError: If it has not; the line names field, value and remedy.
    """
    said = f"{name}={reprlib.repr(value)}"
    if kind == "str" and name not in CHOICES:
        require(isinstance(value, str), f"{said} must be a string")
    elif kind == "str":
        require(value in CHOICES[name], f"{said} is unknown; use {', '.join(map(repr, CHOICES[name]))}")
    elif kind == "bool":
        require(isinstance(value, bool), f"{said} must be True or False")
    else:
        whole = kind == "int"
        fits = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
        require(fits, f"{said} must be {'a whole number' if whole else 'a number'}")
        require(
            abs(value) <= sys.float_info.max, f"{said} must be finite"
        )  # math.isfinite(10**400) overflows
        low, high = RANGES.get(name, (1, LARGEST) if whole else (0, math.inf))
        if whole or name in RANGES:
            wanted = f"{low} or more" if high >= LARGEST > value else f"{low} to {high}"
            require(low <= value <= high, f"{said} is not supported; use {wanted}")
        else:
            require(value > 0, f"{said} is not supported; use a number above 0")
