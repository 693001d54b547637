"""The operators as `benchmarks.cuda` runs them, in the shapes of a preset: errors, their limits, floors.

**Errors** are largest differences from the float64 reference (the equations, token by token, on the same
inputs widened), over the largest value there. **Limits** are measured on the same numbers:

    limit = 2 max(e_reference, e_chunks, u) + r e_rounding

The first term is what plain PyTorch, in its two ways, is off by in this dtype, or the unit roundoff u of the
result's own dtype if that is more, and as much again (Triton's interpreter cuts bfloat16 off, within 2 u).
e_rounding is what becomes of a result in float64 if arguments are off by one unit roundoff, up or down at
random: those that are operands of the kernel's matrix products, or all of them, by that of float32, where it
has none. r is how many numbers on the way to a result are rounded so, counted from the algorithm
(`Operator.roundings`; gradients have come that way twice).

**Floors** are bytes that must move, whatever the algorithm. Forward, each input is read and each output
written; backward, the inputs and the outputs' gradients are read and the inputs' gradients are written:

    forward  I + O               forward and backward  3 I + 2 O       (labels and predictions: no gradient)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssm_retrieval import ops
from ssm_retrieval.models.registry import architecture_of
from ssm_retrieval.ops.causal_conv1d import causal_conv1d
from ssm_retrieval.ops.cross_entropy import linear_cross_entropy
from ssm_retrieval.ops.delta_rule import delta_rule
from ssm_retrieval.ops.selective_scan import selective_scan
from ssm_retrieval.ops.ssd import ssd

Inputs = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
BACKENDS = {"mamba-ssm": "cuda", "triton": "triton", "chunks": "chunks"}  # a route's name in `ops.backend`
PLAIN = ("reference", "chunks")  # ways to compute in plain PyTorch
TF32 = 2.0**-11  # unit roundoff of Triton's default product of float32 matrices, which mamba-ssm takes


@dataclass(frozen=True)
class Operator:
    """An operator, and what the benchmark must know of it.

    Attributes:
        package: Whose kernel the route "mamba-ssm" takes; None where neither package has one.
        shapes: Maps config, batch and length to the shapes of all arguments; `initial_state` is optional.
        outputs: Likewise, of what a plain call returns.
        call: Maps arguments, and whether first, last and chosen states are wanted, to results by name.
        roundings: Numbers that are rounded on the way to a result.
        products: Whether they are operands of matrix products, which have the dtype of the arguments.
        single: Arguments that are float32 whatever the others are.
        made: How standard normal numbers become an argument.
    """

    package: str | None
    shapes: Callable[[Any, int, int], Shapes]
    outputs: Callable[[Any, int, int], Shapes]
    call: Callable[[Inputs, bool], Inputs]
    roundings: int
    products: bool = True
    single: frozenset[str] = frozenset()
    made: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _named(function: Callable[..., Any], states: bool, length: int, inputs: Inputs, **options: Any) -> Inputs:
    """Results of an operator with states: y, or with `states` also h at the end and at three positions."""
    if not states:
        return {"y": function(**inputs, **options)}
    at = sorted({0, length // 2, length - 1})
    y, last, chosen = function(**inputs, **options, return_last_state=True, states_at=at)
    return {"y": y, "last_state": last, "states": chosen}


def _scan(inputs: Inputs, states: bool) -> Inputs:
    return _named(selective_scan, states, inputs["u"].shape[1], inputs, dt_softplus=True)


def _scan_shapes(c: Any, B: int, L: int) -> Shapes:
    E, N = c.d_inner, c.d_state
    return dict(u=(B, L, E), dt=(B, L, E), A=(E, N), B=(B, L, N), C=(B, L, N), D=(E,), z=(B, L, E),
                dt_bias=(E,), initial_state=(B, E, N))  # fmt: skip


def _conv(inputs: Inputs, states: bool) -> Inputs:
    given: dict[str, Any] = dict(inputs)
    found = causal_conv1d(**given, activation="silu", return_last_state=states)
    return dict(zip(("y", "last_state"), found, strict=True)) if states else {"y": found}


def _channels(c: Any) -> int:
    return getattr(c, "conv_dim", c.d_inner)


def _conv_shapes(c: Any, B: int, L: int) -> Shapes:
    E, K = _channels(c), c.d_conv
    return dict(x=(B, L, E), weight=(E, K), bias=(E,), initial_state=(B, K - 1, E))


def _ssd_shapes(c: Any, B: int, L: int) -> Shapes:
    H, P, G, N = c.n_head, c.headdim, c.ngroups, c.d_state
    return dict(x=(B, L, H, P), dt=(B, L, H), A=(H,), B=(B, L, G, N), C=(B, L, G, N),
                initial_state=(B, H, P, N))  # fmt: skip


def _delta_shapes(c: Any, B: int, L: int) -> Shapes:
    H, P, N = c.n_head, c.headdim, c.d_state
    return dict(q=(B, L, H, N), k=(B, L, H, N), v=(B, L, H, P), beta=(B, L, H), log_decay=(B, L, H),
                initial_state=(B, H, P, N))  # fmt: skip


def _head(inputs: Inputs, states: bool) -> Inputs:
    loss, predictions = linear_cross_entropy(inputs["x"], inputs["weight"], inputs["labels"])
    return {"loss": loss, "predictions": predictions}


def _head_shapes(c: Any, B: int, L: int) -> Shapes:
    return dict(x=(B, L, c.d_model), weight=(c.vocab_size, c.d_model), labels=(B, L))


OPERATORS = {
    "selective_scan": Operator(
        "mamba_ssm", _scan_shapes, lambda c, B, L: {"y": (B, L, c.d_inner)}, _scan,
        4, False,  # a step, its product with A, the exponential of that, what is written
        frozenset({"A", "D", "dt_bias", "initial_state"}), {"A": lambda x: -x.exp()},
    ),
    "causal_conv1d": Operator(
        "causal_conv1d", _conv_shapes, lambda c, B, L: {"y": (B, L, _channels(c))}, _conv,
        2, False,  # the sum, its sigmoid
    ),
    "ssd": Operator(
        "mamba_ssm", _ssd_shapes, lambda c, B, L: {"y": (B, L, c.n_head, c.headdim)},
        lambda inputs, states: _named(ssd, states, inputs["x"].shape[1], inputs),
        4, True,  # x times dt, the weights of a chunk, what it adds to the state, the state
        frozenset({"dt", "A", "initial_state"}), {"dt": F.softplus, "A": lambda x: -x.exp()},
    ),
    "delta_rule": Operator(
        None, _delta_shapes, lambda c, B, L: {"y": (B, L, c.n_head, c.headdim)},
        lambda inputs, states: _named(delta_rule, states, inputs["v"].shape[1], inputs),
        4, True,  # what a token writes, the weights of a chunk, the keys with their decay, the state
        frozenset({"beta", "log_decay", "initial_state"}),
        {"q": _unit, "k": _unit, "beta": torch.sigmoid, "log_decay": lambda x: -F.softplus(x)},
    ),
    "linear_cross_entropy": Operator(
        None, _head_shapes, lambda c, B, L: {"loss": (), "predictions": (B, L)}, _head,
        2, True,  # the logits, their gradient
        made={"weight": lambda x: x / math.sqrt(x.shape[-1])},
    ),
}  # fmt: skip
PARTS = {
    "mamba": ("selective_scan", "causal_conv1d", "linear_cross_entropy"),
    "mamba2": ("ssd", "causal_conv1d", "linear_cross_entropy"),
    "gated-deltanet": ("delta_rule", "causal_conv1d", "linear_cross_entropy"),
}
INTEGERS = ("labels", "predictions")


def parts(config: Any) -> tuple[str, ...]:
    """Names of the operators that a model of this config spends its time in."""
    return PARTS.get(architecture_of(config).name, ("linear_cross_entropy",))


def make_inputs(
    name: str, config: Any, batch: int, length: int, dtype: torch.dtype, device: str, states: bool
) -> Inputs:
    """Random arguments of an operator, drawn on the CPU, so that every device gets the same.

    Args:
        name: Of the operator.
        config: Of the model whose shapes it has.
        batch: Sequences.
        length: Tokens in each.
        dtype: Of the arguments that may be narrow.
        device: Where they go.
        states: Whether there is a first state, where the operator has one.

    Returns:
        Arguments by name; the floating ones are leaves of the graph.
    """
    g, operator = torch.Generator().manual_seed(0), OPERATORS[name]
    found: Inputs = {}
    for key, shape in operator.shapes(config, batch, length).items():
        if key in INTEGERS:
            found[key] = torch.randint(0, config.vocab_size, shape, generator=g).to(device)
        elif states or key != "initial_state":
            x = operator.made.get(key, lambda x: x)(torch.randn(shape, generator=g))
            found[key] = x.to(device, torch.float32 if key in operator.single else dtype).requires_grad_()
    return found


def forward_and_backward(name: str, inputs: Inputs, states: bool) -> Inputs:
    """Run an operator, by the backend of the enclosing `ops.backend`.

    Args:
        name: Of the operator.
        inputs: From `make_inputs`.
        states: Whether to return last and chosen states, too.

    Returns:
        Its floating results, and the gradients of their weighted sum as `d<argument>`.
    """
    found = {key: x for key, x in OPERATORS[name].call(inputs, states).items() if x.is_floating_point()}
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g).to(x) for x in found.values()]
    leaves = {key: x for key, x in inputs.items() if x.requires_grad}
    grads = torch.autograd.grad(list(found.values()), list(leaves.values()), weights)
    results = {key: x.detach() for key, x in found.items()}
    return results | {f"d{key}": grad for key, grad in zip(leaves, grads, strict=True)}


def widened(inputs: Inputs, roundoff: float = 0.0, exact: Collection[str] = ()) -> Inputs:
    """Arguments in float64.

    Args:
        inputs: From `make_inputs`.
        roundoff: By how much of itself each number is off, up or down at random.
        exact: Arguments that are not.

    Returns:
        New leaves of the graph; integers as they are.
    """
    g, found = torch.Generator().manual_seed(2), {}
    for key, x in inputs.items():
        if x.is_floating_point():
            signs = 2.0 * torch.randint(0, 2, x.shape, generator=g).double() - 1.0
            off = 0.0 if key in exact else roundoff
            found[key] = (x.detach().double() * (1.0 + off * signs.to(x.device))).requires_grad_()
        else:
            found[key] = x
    return found


def errors(got: Inputs, want: Inputs) -> dict[str, float]:
    """Largest difference of each result, over the largest value it should have."""
    found = {}
    for key, x in want.items():
        difference, size = (got[key].double() - x).abs().amax(), x.abs().amax()
        found[key] = float(difference / size) if size > 0 else float(difference)
    return found


def compare(name: str, inputs: Inputs, states: bool, roundoff: float) -> tuple[Inputs, dict[str, float]]:
    """The float64 reference, and the limit of each result's error (see the module's docstring).

    Args:
        name: Of the operator.
        inputs: From `make_inputs`.
        states: As in `forward_and_backward`.
        roundoff: From `roundoff_of`.

    Returns:
        What every way should return, and the limits.
    """
    operator = OPERATORS[name]
    exact = operator.single - {"initial_state"} if operator.products else ()  # are no operands of products
    with ops.backend("reference"):
        want = forward_and_backward(name, widened(inputs), states)
        nudged = errors(forward_and_backward(name, widened(inputs, roundoff, exact), states), want)
    plain = {key: 0.0 for key in want}
    for backend in PLAIN:
        with ops.backend(backend):
            got = forward_and_backward(name, inputs, states)
        for key, error in errors(got, want).items():
            plain[key] = max(plain[key], error, float(torch.finfo(got[key].dtype).eps) / 2)
    limits = {
        key: 2 * plain[key] + operator.roundings * (1 + key.startswith("d")) * nudged[key] for key in want
    }
    return want, limits


def roundoff_of(name: str, dtype: torch.dtype, route: str) -> float:
    """Unit roundoff of what a kernel computes with.

    Args:
        name: Of the operator.
        dtype: Of its arguments.
        route: Whose kernel.

    Returns:
        Half the distance from 1 to the next number.
    """
    exact = float(torch.finfo(dtype if OPERATORS[name].products else torch.float32).eps) / 2
    return max(exact, TF32) if OPERATORS[name].products and route == "mamba-ssm" else exact


def moved(name: str, config: Any, batch: int, length: int, dtype: torch.dtype) -> dict[str, int]:
    """The floor: bytes that must move in a plain call.

    Args:
        name: Of the operator.
        config: Of the model whose shapes it has.
        batch: Sequences.
        length: Tokens in each.
        dtype: Of the arguments that may be narrow.

    Returns:
        Bytes "forward", and "both" forward and backward.
    """
    operator = OPERATORS[name]

    def size(key: str, shape: tuple[int, ...]) -> int:
        wide = key in operator.single or key == "loss"
        return math.prod(shape) * (8 if key in INTEGERS else 4 if wide else dtype.itemsize)

    given = {k: size(k, s) for k, s in operator.shapes(config, batch, length).items() if k != "initial_state"}
    made = {k: size(k, s) for k, s in operator.outputs(config, batch, length).items()}
    forward = sum(given.values()) + sum(made.values())
    gradients = sum(n for k, n in given.items() if k not in INTEGERS)
    dy = sum(n for k, n in made.items() if k not in INTEGERS)
    return {"forward": forward, "both": forward + sum(given.values()) + gradients + dy}
