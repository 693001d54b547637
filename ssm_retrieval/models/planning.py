"""How much memory a training step needs, by arithmetic: nothing is allocated.

A step's peak is the largest of four moments (B rows of L tokens at a time, weights and moments always there):

    loss        everything that the forward pass kept, and the head's gradients, which it makes at once
    block i     what blocks 0 .. i kept, gradients of the blocks behind, and block i's own backward pass
    embedding   all gradients, and the table's once more
    update      all gradients, and what the optimizer needs beside them

What a block keeps follows from its equations: each term of `attention`, `mamba` and `mamba2` is a tensor that
an autograd function of that file (or of ops/) saves. The letters are those of common.py,
T = B * L, and c the bytes of a product's operand: 4, or 2 under bfloat16 autocast, which then also keeps a
copy of each weight. The tests count saved tensors, `benchmarks/plan.py` measures processes.

The formulas are of the CPU kernels. The CUDA kernels of mamba-ssm and causal-conv1d keep less (operands in
bfloat16), torch's reference scan keeps far more (every state).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ssm_retrieval.models import registry
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.models.hybrid import HybridConfig
from ssm_retrieval.models.mamba import MambaConfig
from ssm_retrieval.models.mamba2 import Mamba2Config
from ssm_retrieval.models.transformer import TransformerConfig
from ssm_retrieval.ops import LANES
from ssm_retrieval.ops.cross_entropy import BLOCK_LOGITS

SCAN_CHUNK = 64  # tokens between the states that the scan keeps (ssm_retrieval/ops/_scan_kernels.py)
SCAN_GROUP = 8  # blocks of channels whose dB, dC are summed before they are stored (the same file)
EIGHT_BIT_FROM, EIGHT_BIT_BLOCK = 4096, 256  # of bitsandbytes
F32 = 4


@dataclass(frozen=True)
class Step:
    """What of a training step decides its memory."""

    rows: int  # sequences of a whole batch
    length: int  # tokens of each
    answers: int  # positions of each whose logits the loss needs
    bfloat16: bool = False  # autocast
    optimizer: str = "adamw"  # as in ssm_retrieval/training/optimizers.py
    accumulate: int = 1
    checkpointing: bool = False

    @property
    def at_once(self) -> int:
        """Rows of the largest part of a batch."""
        return math.ceil(self.rows / min(self.accumulate, self.rows))

    @property
    def itemsize(self) -> int:
        return 2 if self.bfloat16 else 4


@dataclass(frozen=True)
class BlockMemory:
    """Bytes of one block."""

    input: int  # the residual stream that it reads: all that checkpointing keeps
    kept: int  # from its forward to its backward pass, input included
    casts: int  # of that, copies of weights in autocast's dtype
    working: int  # beside what is kept, at most, in its backward pass


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step; `peak` is less than the sum: the others are not all there at once."""

    parameters: int  # numbers, not bytes
    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept by all blocks at the end of the forward pass
    head: int  # the final norm's, the loss's and their gradients
    working: int  # of the block whose backward pass needs most, recomputed activations included
    peak: int


def step_memory(model: LanguageModel, step: Step) -> Memory:
    """Memory of training `model` (on the meta device, or any other); parameters that require no gradient
    have neither gradients nor moments."""
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    gradients = F32 * sum(p.numel() for p in trained.values())
    state = optimizer_state([tuple(p.shape) for p in trained.values()], step.optimizer)
    weights = F32 * sum(p.numel() for p in model.parameters())
    blocks = [block_memory(config, step) for config in block_configs(model.config)]
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
    """Bytes beside weights and moments of a forward pass without gradients over step.rows sequences: no more
    than a block would keep for its gradients, autocast's copies of all weights, and logits, twice."""
    whole = replace(step, accumulate=1)
    blocks = [block_memory(config, whole) for config in block_configs(model.config)]
    casts = sum(b.casts for b in blocks)
    logits = step.rows * step.answers * model.config.vocab_size * (step.itemsize + F32)
    head = step.itemsize * model.config.vocab_size * model.config.d_model if step.bfloat16 else 0
    return casts + max(max(b.kept - b.casts for b in blocks), logits + head)


def _trained_numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def plan_memory(name: str, step: Step, **overrides: Any) -> Memory:
    """`step_memory` of a preset, without a single weight in memory."""
    return step_memory(registry.build(name, device="meta", **overrides), step)


def optimizer_state(shapes: Sequence[tuple[int, ...]], optimizer: str) -> int:
    """Bytes of state for parameters of these shapes; counters and shared tables not counted."""
    return sum(_state(shape, optimizer) for shape in shapes)


def _state(shape: tuple[int, ...], optimizer: str) -> int:
    n = math.prod(shape)
    if optimizer == "adafactor":  # mean squares of rows and of columns
        return F32 * (n // shape[-1] + n // shape[-2] if len(shape) > 1 else n)
    if optimizer == "adamw-8bit" and n >= EIGHT_BIT_FROM:
        return 2 * (n + F32 * math.ceil(n / EIGHT_BIT_BLOCK))
    return 2 * F32 * n


def update_working(largest: int, optimizer: str) -> int:
    """Bytes that an update needs beside weights, gradients and state; `largest`: numbers of a parameter.

    Adafactor writes the second moment out, bitsandbytes on a CPU both moments and their codes.
    """
    return F32 * largest * {"adamw": 0, "adafactor": 1, "adamw-8bit": 5}[optimizer]


def block_configs(config: Any) -> list[tuple[Any, ...]]:
    """The config of each block: a hybrid's are those of its parents, of two if the block is parallel."""
    if not isinstance(config, HybridConfig):
        return [(config,)] * config.n_layer
    return [tuple(config.parent_config(name) for name in mixers) for mixers in config.layout()]


def block_memory(configs: tuple[Any, ...], step: Step) -> BlockMemory:
    branches = [_branch(config, step) for config in configs]
    return branches[0] if len(branches) == 1 else parallel(branches[0], branches[1], configs[0], step)


def parallel(first: BlockMemory, second: BlockMemory, config: Any, step: Step) -> BlockMemory:
    """Of two branches that read one residual stream; tanh(beta) keeps what the second adds."""
    added = step.itemsize * step.at_once * step.length * config.d_model
    kept = first.kept + second.kept - first.input + added
    working = max(first.working, second.working) + added
    return BlockMemory(first.input, kept, first.casts + second.casts, working)


def _branch(config: Any, step: Step) -> BlockMemory:
    kinds: dict[type, Callable[[Any, Step], BlockMemory]] = {
        TransformerConfig: attention,
        MambaConfig: mamba,
        Mamba2Config: mamba2,
    }
    return kinds[type(config)](config, step)


def head_memory(config: Any, step: Step) -> tuple[int, int]:
    """What the final norm and the loss keep, and what the loss needs beside it while it runs."""
    D, V, c = config.d_model, config.vocab_size, step.itemsize
    rows = step.at_once * step.answers
    kept = F32 * rows * D + _norm(config.norm, rows, D)  # the rows with an answer
    kept += F32 * rows * D + F32 * V * D  # the gradients of x and of the head's weights
    logits = min(rows, max(1, BLOCK_LOGITS // V)) * V * (F32 if c == 4 else 2 * c + F32)
    weights = c * V * D if c == 2 else 0
    return kept, logits + weights + F32 * rows * D + c * V * D


def _norm(kind: str, T: int, D: int) -> int:
    """Beside its input: the statistics, and what RMSNorm multiplies with its weight."""
    return 8 * T if kind == "layer" else F32 * T + F32 * T * D


def attention(config: TransformerConfig, step: Step) -> BlockMemory:
    """norm, qkv, rotation, attention, dense; norm, MLP."""
    B, L, c = step.at_once, step.length, step.itemsize
    D, H, M, T = config.d_model, config.n_head, config.mlp_width, B * L
    x = F32 * T * D
    kept = x + 2 * (_norm(config.norm, T, D) + c * T * D)
    kept += 0 if config.parallel_residual else x
    kept += 3 * c * T * D + F32 * B * H * L  # qkv, log of the softmax's sums
    kept += c * T * D  # the output
    if config.rotary_dims > 0:
        kept += 2 * c * T * D + 2 * F32 * L * config.rotary_dims
    kept += 2 * c * T * M  # before and after the activation function
    casts = 2 * (4 * D * D + 2 * D * M) if step.bfloat16 else 0
    # two gradients of the MLP's width, when what it read last is freed; the residual stream's
    return BlockMemory(x, kept + casts, casts, c * T * M + 2 * x + c * T * D)


def mamba(config: MambaConfig, step: Step) -> BlockMemory:
    """norm, in_proj, convolution, x_proj, dt_proj, scan, out_proj."""
    B, L, c = step.at_once, step.length, step.itemsize
    D, E, N, R, T = config.d_model, config.d_inner, config.d_state, config.rank, B * L
    wide = -(-E // LANES) * LANES  # the kernels' channels
    x, channels = F32 * T * D, F32 * T * wide
    kept = x + _norm(config.norm, T, D) + c * T * D
    kept += channels + F32 * config.d_conv * wide  # convolution
    kept += 3 * channels + (c * T * E if c == 2 else 0)  # u, dt, z in float32; u also as x_proj reads it
    kept += c * T * (R + 2 * N) + 2 * F32 * T * N + 2 * F32 * E * N  # x_proj's output, B, C, A
    kept += F32 * B * math.ceil(L / SCAN_CHUNK) * wide * N  # states
    kept += c * T * E  # y
    casts = 2 * (2 * D * E + E * (R + 2 * N) + R * E + E * D) if step.bfloat16 else 0
    # gradients of y (freed), u, dt, z, and of B and C for each group of channels
    groups = math.ceil(wide / LANES / SCAN_GROUP)
    working = 4 * channels - c * T * E + 2 * F32 * groups * T * N + 2 * x
    return BlockMemory(x, kept + casts, casts, working)


def mamba2(config: Mamba2Config, step: Step) -> BlockMemory:
    """norm, in_proj, convolution, the chunks of `ssd`, gated norm, out_proj."""
    B, L, c = step.at_once, step.length, step.itemsize
    D, E, N, H, G, T = config.d_model, config.d_inner, config.d_state, config.n_head, config.ngroups, B * L
    J, Q = E + 2 * G * N, min(config.chunk_size, L)
    chunks = math.ceil(L / Q)
    P, state = B * chunks * Q, B * E * N  # padded tokens; numbers of a state
    x, inside = F32 * T * D, P * Q  # inside: pairs of tokens of a chunk
    kept = x + _norm(config.norm, T, D) + c * T * D
    kept += F32 * T * J + F32 * config.d_conv * J + c * T * J  # convolution, its input and output
    kept += 2 * F32 * T * H + (0 if P == T else c * P * J + F32 * P * H)  # dt before and after softplus
    kept += F32 * H * inside + c * G * inside + c * H * inside + Q * Q  # decay, scores, their product
    kept += c * P * E  # x times dt, as a matrix product reads it
    if chunks > 1:
        kept += 2 * F32 * P * H + 2 * c * P * E + 2 * c * P * H * N  # to the end, from the start; x, B, C
        kept += (
            F32 * (chunks - 1) * state + c * state + c * chunks * state + c * P * E
        )  # states, their outputs
    kept += c * T * (J + E + H) if c == 4 else F32 * T * E  # z
    kept += 3 * F32 * T * E + F32 * T * G + F32 * T * E + c * T * E  # gate, y, gated norm, out_proj
    casts = 2 * (D * (J + E + H) + E * D) if step.bfloat16 else 0
    # gradients of decay and product; under autocast in both dtypes
    working = (2 * F32 if c == 4 else 3 * F32 + c) * H * inside + 2 * x
    return BlockMemory(x, kept + casts, casts, working)


@dataclass(frozen=True)
class Machine:
    name: str
    devices: int
    gib: float  # a device's memory
    reserve: float  # of it, GiB for the system, the libraries and fragments


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
    """Bytes of a run's peak on each of `devices` that share weights, gradients, moments and rows (FSDP).

    Each holds the tables and two blocks whole while it works on one of them, weights and gradients.
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
    """The first of `MACHINES` on which training and evaluation fit; None if they fit on none."""
    for machine in MACHINES:
        peak = device_peak(model, step, evaluation, machine.devices)
        if peak <= (machine.gib - machine.reserve) * 2**30:
            return machine
    return None
