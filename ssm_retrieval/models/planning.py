"""How much memory a training step needs, by arithmetic: nothing is allocated.

A step's peak is the largest of these moments (B rows of L tokens at a time; weights and the optimizer's state
are always there):

    loss        everything that the forward pass kept, and the head's gradients, which the loss makes at once
    block i     what blocks 0 .. i kept, the gradients of later blocks, and block i's own backward pass
    embedding   all gradients, and the table's once more
    update      all gradients, and what the optimizer needs beside them

What a block keeps follows from its equations: `Architecture.memory`, for ours a function in block_memory.py.

The formulas describe the CPU kernels, and for Mamba on a GPU the kernels in Triton. Other SSMs keep less
there than is said here, because their kernels take bfloat16 as it is; the reference scan keeps far more
(every state).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ssm_retrieval.errors import UserError
from ssm_retrieval.models import registry
from ssm_retrieval.models.block_memory import F32, BlockMemory, norm
from ssm_retrieval.models.block_memory import Step as Step
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.ops.cross_entropy import BLOCK_LOGITS, GPU_LOGITS

EIGHT_BIT_FROM, EIGHT_BIT_BLOCK = 4096, 256  # of bitsandbytes
INT64 = 8


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step.

    Attributes:
        parameters: How many numbers the weights have (not bytes).
        weights: The weights.
        gradients: Their gradients.
        optimizer: The optimizer's state.
        activations: What all blocks keep at the end of the forward pass.
        head: The final norm's and the loss's share, with their gradients.
        working: The most that a block's backward pass needs, recomputed activations included.
        peak: The largest moment; less than the sum of the others, which are not all there at once.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    working: int
    peak: int


def step_memory(model: LanguageModel, step: Step) -> Memory:
    """Memory of a training step of `model`, which may be on the meta device.

    Parameters that require no gradient have neither gradients nor moments.
    """
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    gradients = F32 * sum(p.numel() for p in trained.values())
    state = optimizer_state([tuple(p.shape) for p in trained.values()], step.optimizer)
    weights = F32 * sum(p.numel() for p in model.parameters())
    blocks = block_memory(model.config, step)
    own = [F32 * _trained_numbers(block) for block in model.blocks]
    table, head_table = (F32 * p.weight.numel() for p in (model.embedding, model.head))
    head, head_working = head_memory(model.config, step)
    held = [b.input if step.checkpointing else b.kept for b in blocks]
    casts = sum(b.casts for b in blocks) if step.checkpointing else 0  # autocast's cache, until the loss
    # before the last part's backward pass the gradients of the earlier parts are there
    early = gradients if step.accumulate > 1 else 0

    moments = [sum(held) + casts + head + head_working + early]
    moments.append(sum(held) + head + head_table + 2 * blocks[-1].input + early)  # the loss's backward pass
    working = [b.working + (b.kept - b.input if step.checkpointing else 0) for b in blocks]
    for i in range(len(blocks)):
        behind = max(early, head_table + sum(own[i:]))
        moments.append(sum(held[: i + 1]) + working[i] + behind)
    moments.append(gradients + table + 2 * blocks[0].input)
    largest = max(p.numel() for p in trained.values())
    moments.append(gradients + update_working(largest, step.optimizer))
    return Memory(
        parameters=sum(p.numel() for p in model.parameters()),
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=sum(held),
        head=head + head_working,
        working=max(working),
        peak=weights + state + max(moments),
    )


def evaluation_memory(model: LanguageModel, step: Step) -> int:
    """Bytes, beside weights and moments, of a forward pass without gradients over step.rows sequences.

    An upper bound: what one block would keep for its gradients or the logits twice, and autocast's copies of
    all weights.
    """
    whole = replace(step, accumulate=1)
    blocks = block_memory(model.config, whole)
    casts = sum(b.casts for b in blocks)
    logits = step.rows * step.answers * model.config.vocab_size * (step.itemsize + F32)
    head = step.itemsize * model.config.vocab_size * model.config.d_model if step.bfloat16 else 0
    return casts + max(max(b.kept - b.casts for b in blocks), logits + head)


def _trained_numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def optimizer_state(shapes: Sequence[tuple[int, ...]], optimizer: str) -> int:
    """Bytes of state for parameters of these shapes, without counters and shared tables."""
    return sum(_state(shape, optimizer) for shape in shapes)


def _state(shape: tuple[int, ...], optimizer: str) -> int:
    n = math.prod(shape)
    if optimizer == "adafactor":  # mean squares of rows and of columns
        return F32 * (n // shape[-1] + n // shape[-2] if len(shape) > 1 else n)
    if optimizer == "adamw-8bit" and n >= EIGHT_BIT_FROM:
        return 2 * (n + F32 * math.ceil(n / EIGHT_BIT_BLOCK))
    return 2 * F32 * n


def update_working(largest: int, optimizer: str) -> int:
    """Bytes that an update needs beside weights, gradients and state.

    Adafactor materialises the second moment, bitsandbytes on a CPU both moments and their codes.

    Args:
        largest: How many numbers the largest parameter has.
        optimizer: A name of ssm_retrieval/training/optimizers.py.

    Returns:
        Bytes.
    """
    return F32 * largest * {"adamw": 0, "adafactor": 1, "adamw-8bit": 5}[optimizer]


def block_memory(config: Any, step: Step) -> list[BlockMemory]:
    """The memory of every block, by the formula of the config's architecture.

    Raises:
        UserError: If it has none.
    """
    architecture = registry.architecture_of(config)
    if architecture.memory is None:
        raise UserError(
            f"{architecture.label} has no formula of its memory; give its Architecture one (memory=...)"
        )
    return architecture.memory(config, step)


def head_memory(config: Any, step: Step) -> tuple[int, int]:
    """Bytes that the final norm and the loss keep, and that the loss needs beside them while it runs."""
    D, V, c = config.d_model, config.vocab_size, step.itemsize
    rows = step.at_once * step.answers
    kept = 0 if config.norm == "none" else F32 * rows * D  # the rows with an answer, which the norm reads
    kept += norm(config.norm, rows, D)
    kept += (F32 * D + INT64) * rows  # the head's input and the labels, for a gradient of the gradients
    kept += F32 * rows * D + F32 * V * D  # the gradients of x and of the head's weights
    # on a GPU the kernel turns a block's logits into their gradients in place
    block, each = (GPU_LOGITS, c) if step.device == "cuda" else (BLOCK_LOGITS, F32 if c == 4 else 2 * c + F32)
    logits = min(rows, max(1, block // V)) * V * each
    weights = c * V * D if c == 2 else 0
    return kept, logits + weights + F32 * rows * D + c * V * D


@dataclass(frozen=True)
class Machine:
    """A machine that a run may be planned for.

    Attributes:
        name: Its name in the plan.
        devices: How many devices it has.
        gib: Memory of a device, in GiB.
        reserve: The part of it, in GiB, for the system, the libraries and fragments.
    """

    name: str
    devices: int
    gib: float
    reserve: float


MACHINES = (
    Machine("laptop, 16 GiB", 1, 16, 4),
    Machine("laptop, 32 GiB", 1, 32, 4),
    Machine("GPU, 24 GiB", 1, 24, 2),
    Machine("GPU, 40 GiB", 1, 40, 2),
    Machine("GPU, 80 GiB", 1, 80, 4),
    Machine("GPU, 141 GiB", 1, 141, 6),
    *(Machine(f"{n} node{'s' * (n > 1)} of 8 GPUs, 80 GiB, FSDP", 8 * n, 80, 6) for n in (1, 2, 4, 8)),
)


def device_peak(model: LanguageModel, step: Step, evaluation: Step, devices: int) -> int:
    """Peak of a run, in bytes, on each of several devices that share weights, gradients, moments and rows.

    With FSDP each holds the tables and two blocks whole, weights and gradients, while it works on a block.

    Args:
        model: The model; it may be on the meta device.
        step: A training step on all devices together.
        evaluation: An evaluation on all devices together.
        devices: How many there are.

    Returns:
        Bytes on each.
    """
    step, evaluation = (replace(s, rows=math.ceil(s.rows / devices)) for s in (step, evaluation))
    needed = step_memory(model, step)
    beside = evaluation_memory(model, evaluation)
    if devices == 1:
        return max(needed.peak, needed.weights + needed.optimizer + beside)
    tables = {id(p): p.numel() for part in (model.embedding, model.head) for p in part.parameters()}
    block = max(sum(int(p.numel()) for p in layer.parameters()) for layer in model.blocks)
    whole = 2 * F32 * (sum(tables.values()) + 2 * block)
    shared = needed.weights + needed.gradients + needed.optimizer
    activations = needed.activations + needed.head + needed.working
    return math.ceil(shared / devices) + whole + max(activations, beside)


def smallest_machine(model: LanguageModel, step: Step, evaluation: Step) -> Machine | None:
    """The first of `MACHINES` on which a run fits.

    Args:
        model: The model; it may be on the meta device.
        step: A training step.
        evaluation: An evaluation.

    Returns:
        The machine, or None if the run fits on none.
    """
    for machine in MACHINES:
        peak = device_peak(model, step, evaluation, machine.devices)
        if peak <= (machine.gib - machine.reserve) * 2**30:
            return machine
    return None
