"""What one block keeps for its gradients, by arithmetic: the terms that `planning` adds up.

Each term of a formula is a tensor that an autograd function in that architecture's file (or in ops/) saves.
The letters are those of common.py, T = B * L, and c is the bytes of a product's operand: 4, or 2 under
bfloat16 autocast, which also keeps a copy of each weight. The tests count saved tensors;
`benchmarks/plan.py` measures processes. The formulas describe the CPU kernels, that of Mamba on a GPU the
kernels in Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ssm_retrieval.ops import CHUNK, DELTA_CHUNK, LANES, padded_values, scan_group
from ssm_retrieval.ops._scan_triton import TILE

F32 = 4


@dataclass(frozen=True)
class Step:
    """What decides the memory of a training step.

    Attributes:
        rows: Sequences in a whole batch.
        length: Tokens in each.
        answers: Positions in each whose logits the loss needs.
        bfloat16: Whether autocast is on.
        optimizer: A name of ssm_retrieval/training/optimizers.py.
        accumulate: Parts that a batch is computed in.
        checkpointing: Whether a block keeps its input only (`LanguageModel.checkpointing`).
        device: "cpu", "cuda" or "mps".
    """

    rows: int
    length: int
    answers: int
    bfloat16: bool = False
    optimizer: str = "adamw"
    accumulate: int = 1
    checkpointing: bool = False
    device: str = "cpu"

    @property
    def at_once(self) -> int:
        """Rows in the largest part of a batch."""
        return math.ceil(self.rows / min(self.accumulate, self.rows))

    @property
    def itemsize(self) -> int:
        return 2 if self.bfloat16 else 4


@dataclass(frozen=True)
class BlockMemory:
    """Bytes that one block needs.

    Attributes:
        input: The residual stream that it reads, which is all that checkpointing keeps.
        kept: Everything from its forward to its backward pass, input included.
        casts: The part of `kept` that is copies of weights in autocast's dtype.
        working: The most that its backward pass needs beside `kept`.
    """

    input: int
    kept: int
    casts: int
    working: int


def norm(kind: str, T: int, D: int) -> int:
    """What a norm keeps beside its input: the statistics, and what RMSNorm multiplies by its weight.

    Args:
        kind: "layer", "rms" or "none".
        T: Tokens.
        D: Channels.

    Returns:
        Bytes.
    """
    return {"none": 0, "layer": 8 * T, "rms": F32 * T + F32 * T * D}[kind]


def attention(config: Any, step: Step) -> BlockMemory:
    """An attention block: norm, qkv, rotation, attention, dense; norm, MLP."""
    B, L, c = step.at_once, step.length, step.itemsize
    D, H, M, T = config.d_model, config.n_head, config.mlp_width, B * L
    x = F32 * T * D
    kept = x + 2 * (norm(config.norm, T, D) + c * T * D)
    kept += 0 if config.parallel_residual else x
    kept += 3 * c * T * D + F32 * B * H * L  # qkv, log of the softmax's sums
    kept += c * T * D  # the output
    if config.rotary_dims > 0:
        kept += 2 * c * T * D + 2 * F32 * L * config.rotary_dims
    kept += c * L * L if 0 < config.window < L else 0  # the mask of the window
    kept += 2 * c * T * M  # before and after the activation function
    casts = 2 * (4 * D * D + 2 * D * M) if step.bfloat16 else 0
    # two gradients of the MLP's width, when what it read last is freed; the residual stream's
    return BlockMemory(x, kept + casts, casts, c * T * M + 2 * x + c * T * D)


def mamba(config: Any, step: Step) -> BlockMemory:
    """A Mamba block: norm, in_proj, convolution, x_proj, dt_proj, scan, out_proj."""
    if step.device == "cuda":
        return mamba_on_gpu(config, step)
    B, L, c = step.at_once, step.length, step.itemsize
    D, E, N, R, T = config.d_model, config.d_inner, config.d_state, config.rank, B * L
    wide = -(-E // LANES) * LANES  # the kernels' channels
    x, channels = F32 * T * D, F32 * T * wide
    kept = x + norm(config.norm, T, D) + c * T * D
    kept += channels + F32 * config.d_conv * wide  # convolution
    kept += 3 * channels + (c * T * E if c == 2 else 0)  # u, dt, z in float32; u also as x_proj reads it
    kept += c * T * (R + 2 * N) + 2 * F32 * T * N + 2 * F32 * E * N  # x_proj's output, B, C, A
    kept += F32 * B * math.ceil(L / CHUNK) * wide * N  # states
    kept += c * T * E  # y
    casts = 2 * (2 * D * E + E * (R + 2 * N) + R * E + E * D) if step.bfloat16 else 0
    # gradients of y (freed), u, dt, z, and of B and C for each group of channels
    groups = math.ceil(wide / LANES / scan_group(B, wide // LANES))
    working = 4 * channels - c * T * E + 2 * F32 * groups * T * N + 2 * x
    return BlockMemory(x, kept + casts, casts, working)


def mamba_on_gpu(config: Any, step: Step) -> BlockMemory:
    """A Mamba block on a GPU, where what lies between in_proj and out_proj runs twice (`mamba.runs_twice`).

    Kept are only the stream, its norm as in_proj reads it, in_proj's output and what out_proj reads:

        kept = x + norm + c T (D + 2 E + E)

    While the block's gradients are made, `recomputed` is there again, and beside it what the scan's backward
    pass makes: gradients of y, u, dt and z; in float32, for each tile, states from both sides and three
    numbers for each channel; and those of B and C for each block of channels:

        4 c T E + 4 B S E (2 N + 3) + 8 T N ceil(E / 32),  S = ceil(L / 16)
    """
    B, L, c = step.at_once, step.length, step.itemsize
    D, E, N, T = config.d_model, config.d_inner, config.d_state, B * L
    x = F32 * T * D
    kept = x + norm(config.norm, T, D) + c * T * (D + 3 * E)
    casts = 2 * (2 * D * E + E * D) if step.bfloat16 else 0  # others' copies go when the loss is there
    tiles, blocks = B * math.ceil(L / TILE[0]), math.ceil(E / TILE[1])
    gradients = 4 * c * T * E + F32 * tiles * E * (2 * N + 3) + 2 * F32 * T * N * blocks
    return BlockMemory(x, kept + casts, casts, recomputed(config, step) + gradients + 2 * x)


def recomputed(config: Any, step: Step) -> int:
    """Bytes that convolution, step sizes and scan of a Mamba block keep with the kernels in Triton.

    These keep their arguments, where and as they are, and nothing else; no tensor has the axes (B, L, E, N):

        c T (2 E + R + 2 N)    u, dt, and x_proj's output, of which B and C are parts
        4 (2 E N)              A, twice

    Args:
        config: The model's.
        step: The training step.

    Returns:
        Bytes, beside in_proj's output.
    """
    E, N, T = config.d_inner, config.d_state, step.at_once * step.length
    return step.itemsize * T * (2 * E + config.rank + 2 * N) + 2 * F32 * E * N


def mamba2(config: Any, step: Step) -> BlockMemory:
    """A Mamba-2 block: norm, in_proj, convolution, the chunks of `ssd`, gated norm, out_proj."""
    B, L, c = step.at_once, step.length, step.itemsize
    D, E, N, H, G, T = config.d_model, config.d_inner, config.d_state, config.n_head, config.ngroups, B * L
    J, Q = E + 2 * G * N, min(config.chunk_size, L)
    chunks = math.ceil(L / Q)
    P, state = B * chunks * Q, B * E * N  # padded tokens; numbers of a state
    x, inside = F32 * T * D, P * Q  # inside: pairs of tokens of a chunk
    kept = x + norm(config.norm, T, D) + c * T * D
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


def mamba3(config: Any, step: Step) -> BlockMemory:
    """A Mamba-3 block: norm, in_proj, B and C of each head turned, linear attention, gate, out_proj."""
    B, L, c = step.at_once, step.length, step.itemsize
    D, E, N, H, G, T = config.d_model, config.d_inner, config.d_state, config.n_head, config.ngroups, B * L
    S, copies = config.n_angle, c == 2  # autocast's outputs are widened, which keeps copies
    J, wide = 2 * E + 2 * G * N + 3 * H + S, H * padded_values(config.headdim)
    x, keys = F32 * T * D, F32 * T * H * N
    kept = x + norm(config.norm, T, D) + c * T * (D + J)
    kept += F32 * T * (H * (13 + copies) + 2 * S + 3 * H * S)  # dt, A, lam; angles, phases, cosines, sines
    kept += 2 * F32 * T * G * (1 + N * (1 + copies))  # norms of B and C
    kept += 5 * keys  # B and C before and after they turn, and B as the kernel reads it, one token behind
    kept += F32 * (T * wide + B * math.ceil(L / DELTA_CHUNK) * wide * N)  # x likewise; states
    kept += F32 * T * E * (5 + copies) + copies * c * T * E  # x as written; what is read, y, gate
    casts = 2 * (J * D + E * D) if copies else 0
    # gradients of q, k, and of k one token behind; of x twice
    return BlockMemory(x, kept + casts, casts, 2 * x + 3 * keys + 2 * F32 * T * E)


def linear_ssm(config: Any, step: Step) -> BlockMemory:
    """A block of a linear SSM: in_proj, convolution, x_proj, scan, out_proj."""
    B, L, c = step.at_once, step.length, step.itemsize
    D, E, N, T = config.d_model, config.d_inner, config.d_state, B * L
    wide = -(-E // LANES) * LANES
    x, channels = F32 * T * D, F32 * T * wide
    kept = c * T * D  # the stream as in_proj reads it
    kept += channels + F32 * config.d_conv * wide  # convolution
    kept += 2 * channels + (c * T * E if c == 2 else 0)  # u and dt in float32; u also as x_proj reads it
    kept += 2 * F32 * T * N + F32 * wide * N  # B, C, A
    kept += F32 * B * math.ceil(L / CHUNK) * wide * N  # states
    kept += c * T * E  # y
    casts = 2 * (2 * D * E + 2 * E * N) if step.bfloat16 else 0
    groups = math.ceil(wide / LANES / scan_group(B, wide // LANES))
    working = 4 * channels - c * T * E + 2 * F32 * groups * T * N + 2 * x
    return BlockMemory(x, kept + casts, casts, working)


def delta(config: Any, step: Step, decay: str = "none") -> BlockMemory:
    """A block of DeltaNet or its kin: norm, projections, convolution, delta rule, norm; norm, SwiGLU.

    Args:
        config: The model's.
        step: The training step.
        decay: Whether there is one: "none", one for a "head" or each "channel" of its key.

    Returns:
        Its memory.
    """
    B, L, c = step.at_once, step.length, step.itemsize
    D, E, N, H, P, T = config.d_model, config.d_inner, config.d_state, config.n_head, config.headdim, B * L
    J, copies = config.conv_dim, c == 2  # autocast copies what each projection reads
    decays, by_channel = decay != "none", decay == "channel"
    low_rank = 2 * c * T * P if by_channel else 0  # between the projections to decay and gate
    rates = F32 * T * H * (N if by_channel else 1)
    x, keys = F32 * T * D, F32 * T * H * N
    kept = _read(T, D, c, 4 + decays + config.gate) + low_rank
    kept += F32 * (T * J + (config.d_conv + 1) * J) if config.short_conv else c * T * J
    kept += (2 * keys if copies else F32 * T * J) + 2 * F32 * T * H  # q and k before they have length 1
    kept += _rule(config, B, L) + F32 * T * H + rates * (1 + 2 * decays)  # beta; decay
    kept += F32 * T * (3 - by_channel) * E * config.gate + c * T * E + _swiglu(config, T, c)
    gate = (1 + by_channel) * P * E if by_channel else E * D
    weights = J * D + (1 + decays) * H * D + config.gate * gate + E * D + 3 * D * config.mlp_width
    casts = 2 * weights if copies else 0
    # gradients of q, k, v, and of what the convolution reads; or three of the MLP's width
    return BlockMemory(x, kept + casts, casts, 2 * x + max(3 * F32 * T * J, 3 * c * T * config.mlp_width))


def gla(config: Any, step: Step, rank: int) -> BlockMemory:
    """A block of gated linear attention: norm, projections, recurrence, norm; norm, SwiGLU.

    Args:
        config: The model's.
        step: The training step.
        rank: Channels between the projections to the decay.

    Returns:
        Its memory.
    """
    B, L, c = step.at_once, step.length, step.itemsize
    D, E, N, H, T = config.d_model, config.d_inner, config.d_state, config.n_head, B * L
    J, copies = config.conv_dim, c == 2
    x, keys = F32 * T * D, F32 * T * H * N
    kept = _read(T, D, c, 4 + config.gate) + c * T * rank
    kept += F32 * (T * J + (config.d_conv + 1) * J) if config.short_conv else 0
    kept += _rule(config, B, L) + 3 * keys  # before the sigmoid, what its logarithm keeps, the decay
    kept += 3 * F32 * T * E * config.gate + c * T * E + _swiglu(config, T, c)
    weights = J * D + rank * (D + H * N) + (1 + config.gate) * E * D + 3 * D * config.mlp_width
    casts = 2 * weights if copies else 0
    return BlockMemory(x, kept + casts, casts, 2 * x + max(3 * F32 * T * J, 3 * c * T * config.mlp_width))


def _read(T: int, D: int, c: int, projections: int) -> int:
    """The residual stream, its norm, and what that many projections read."""
    return F32 * T * D + norm("rms", T, D) + (projections if c == 2 else 1) * c * T * D


def _rule(config: Any, B: int, L: int) -> int:
    """What `ops.delta_rule` keeps but for the decay: q, k, v, beta, states; and the norm of its output."""
    H, N, P, E, T = config.n_head, config.d_state, config.headdim, config.d_inner, B * L
    wide = H * padded_values(P)
    states = B * math.ceil(L / DELTA_CHUNK) * wide * N
    return F32 * (2 * T * H * N + T * wide + T * H + states + T * (wide + H + E))


def _swiglu(config: Any, T: int, c: int) -> int:
    """The second half of a block: norm and SwiGLU."""
    D = config.d_model
    return F32 * T * D + norm("rms", T, D) + (1 + (c == 2)) * c * T * D + 4 * c * T * config.mlp_width


def parallel(first: BlockMemory, second: BlockMemory, config: Any, step: Step) -> BlockMemory:
    """Two branches that read one residual stream.

    Args:
        first: The branch that counts fully.
        second: The branch that tanh(beta) scales; the product keeps what this branch adds.
        config: The hybrid's config.
        step: The training step.

    Returns:
        The memory of the whole block.
    """
    added = step.itemsize * step.at_once * step.length * config.d_model
    kept = first.kept + second.kept - first.input + added
    working = max(first.working, second.working) + added
    return BlockMemory(first.input, kept, first.casts + second.casts, working)


def every_block(block: Callable[[Any, Step], BlockMemory]) -> Callable[[Any, Step], list[BlockMemory]]:
    """The formula for a model whose blocks are all alike."""
    return lambda config, step: [block(config, step)] * config.n_layer
