"""A forward and a backward kernel as one differentiable function, and as operators for torch.compile.

`differentiable` is for recurrences: their kernels take arguments in the kernels' layout, of which the last is
the first state, and return y, the last state, states at chosen positions, and those that the backward pass
starts from. `differentiable_map` is for kernels with one result, which their backward pass does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssm_retrieval.ops._route import differentiable_gradients, traced

Results = tuple[Tensor, Tensor, Tensor, Tensor]


def differentiable(
    name: str,
    forward: Callable[..., Results],
    backward: Callable[..., Sequence[Tensor]],
    by_chunks: Callable[..., list[Tensor]],
) -> tuple[Callable[..., Results], Any, Any]:
    """Tie two kernels together.

    Args:
        name: Of the operator, "selective_scan"; the other is called "selective_scan_backward".
        forward: Maps (*arguments, flag, positions, keep) to y, last state, states and checkpoints.
        backward: Maps (*arguments without the first state, checkpoints, flag, positions, gradients of y, last
            state and states, or None) to the gradients of all arguments.
        by_chunks: Maps (flag, positions, *arguments) to y, last state and states by PyTorch's operations,
            which a gradient of gradients goes through.

    Returns:
        A differentiable function of (*arguments, flag, positions) with forward's results, which keeps
        checkpoints only where a gradient is wanted, and the two operators, which still need what they return
        for fake tensors (`register_fake`).
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        *arguments, flag, positions, _ = inputs
        ctx.save_for_backward(*arguments, output[3])
        ctx.flag, ctx.positions = flag, positions
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *arguments, checkpoints = ctx.saved_tensors
        if torch.is_grad_enabled():  # of the backward pass itself, whose own gradient somebody will want
            function = partial(by_chunks, ctx.flag, ctx.positions)
            found: list[Tensor | None] = differentiable_gradients(function, arguments, grads[:3])
        else:
            run: Any = backward_operator if traced(*arguments) else backward
            made = run(*arguments[:-1], checkpoints, ctx.flag, ctx.positions, *grads[:3])
            found = [None if x is None else grad for x, grad in zip(arguments, made, strict=True)]
        return (*found, None, None, None)

    apply, forward_operator, backward_operator = _tied(name, forward, backward, save, gradients, kept=3)

    def call(*given: Any) -> Results:
        *arguments, _, _ = given
        keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments)
        run = forward_operator if traced(*arguments) else apply if keep else forward
        return run(*given, keep)

    return call, forward_operator, backward_operator


def differentiable_map(
    name: str,
    forward: Callable[..., Tensor],
    backward: Callable[..., Sequence[Tensor]],
    by_torch: Callable[..., Tensor],
) -> tuple[Callable[..., Tensor], Any, Any]:
    """Tie two kernels together.

    Args:
        name: Of the operator; the other is called by it and "_backward".
        forward: Maps (*arguments, flag) to y.
        backward: Maps (*arguments, flag, gradient of y) to the gradients of all arguments.
        by_torch: As forward, by PyTorch's operations, which a gradient of gradients goes through.

    Returns:
        A differentiable function with forward's arguments and result, and the two operators, as
        `differentiable` does.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *arguments, ctx.flag = inputs
        ctx.save_for_backward(*arguments)

    def gradients(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        arguments = ctx.saved_tensors
        if torch.is_grad_enabled():  # of the backward pass itself, whose own gradient somebody will want

            def again(*own: Tensor | None) -> list[Tensor]:
                return [by_torch(*own, ctx.flag)]

            return (*differentiable_gradients(again, arguments, [gy]), None)
        run: Any = backward_operator if traced(*arguments) else backward
        found = run(*arguments, ctx.flag, gy)
        return (*(None if x is None else grad for x, grad in zip(arguments, found, strict=True)), None)

    apply, forward_operator, backward_operator = _tied(name, forward, backward, save, gradients)

    def call(*given: Any) -> Tensor:
        return (forward_operator if traced(*given[:-1]) else apply)(*given)

    return call, forward_operator, backward_operator


def _tied(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Sequence[Tensor]],
    save: Callable[..., None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
    kept: int | None = None,
) -> tuple[Callable[..., Any], Any, Any]:
    """A node of autograd's graph that runs `forward`, and both kernels as operators.

    `kept` is the number of the result, if any, that is only there for the backward pass.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)  # the kernel
            if kept is not None:
                ctx.mark_non_differentiable(output[kept])
            save(ctx, inputs, output)
            return output

        backward = staticmethod(gradients)

    forward_operator = torch.library.custom_op(f"ssm_retrieval::{name}", forward, mutates_args=())
    backward_operator = torch.library.custom_op(f"ssm_retrieval::{name}_backward", backward, mutates_args=())
    forward_operator.register_autograd(gradients, setup_context=save)
    return Function.apply, forward_operator, backward_operator
