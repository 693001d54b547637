"""The selective scan in Triton: five kernels, each a grid over (sequence, tile of tokens, block of channels).

A tile is BT tokens of BE channels. A state is carried over tiles in three steps, so that all tiles of a long
sequence run at once, and nothing of size (batch, length, d_inner, d_state) is stored:

    tile_ends       what a tile writes by itself: its last state if it had started from zeros
    carry           the state that each tile starts from, one after the other, elementwise and cheap
    scan_forward    outputs, from those states

and in the same way backwards (`tile_starts`, `carry` in reverse, `scan_backward`), where the states inside a
tile are computed again. Inside a tile the loop over d_state is the outer one, and tokens are scanned as pairs
(decay, write). Decays are exponentials of sums of steps that begin where the state is needed, and nothing is
divided by a decay: where A is negative none exceeds 1, and none loses digits.

Layouts, contiguous but for what has strides: u, dt, z, gy and their gradients (batch, length, channels), B, C
(batch, length, N), A (N, channels) times log2(e), D, bias (channels,), states (batch, ..., N, channels).
Strides are those of sequences and of tokens; neighbours on the last axis are neighbours in memory. What grows
with batch and length is counted in int64. `slots`, (length,), holds a token's place in `states`, or -1.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)

# Sizes of which the compiler is to assume nothing. It would see that rows are aligned, give every thread
# several neighbouring channels and spread tokens over threads, so that each step of a scan goes through
# shuffles. So a warp's threads are channels, and the tokens of a tile stay in their registers.
_jit = triton.jit(
    do_not_specialize=[
        *("L", "E", "P", "u_b", "u_t", "dt_b", "dt_t", "B_b", "B_t", "C_b", "C_t", "z_b", "z_t"),
        *("gy_b", "gy_t"),
    ]
)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(x * -LOG2E))


@triton.jit
def _softplus(x):
    """max(x, 0) + log(1 + v) with v = e^-|x|; v / ((1 + v) - 1) makes up for the rounding of 1 + v."""
    v = tl.exp2(tl.abs(x) * -LOG2E)
    w = 1 + v
    tiny = w == 1
    return tl.maximum(x, 0) + tl.where(tiny, v, tl.log(w) * (v / tl.where(tiny, 1, w - 1)))


@triton.jit
def _after(decay, write, decay_next, write_next):
    """One affine map of the state after another."""
    return decay * decay_next, write * decay_next + write_next


@triton.jit
def _then(decay, state, reach, held, decay_next, state_next, reach_next, held_next):
    """As `_after`, with the same two numbers for all but the last token of a stretch.

    So a scan also gives the state before each token, without a division of the one after it.
    """
    return (
        decay * decay_next,
        state * decay_next + state_next,
        decay * reach_next,
        state * reach_next + held_next,
    )


@triton.jit
def _place(L, E, BT: tl.constexpr, BE: tl.constexpr):
    """Sequence, tile and number of tiles of this program, its tokens (int64) and channels."""
    pid, blocks, tiles = tl.program_id(0), tl.cdiv(E, BE), tl.cdiv(L, BT)
    rest = (pid // blocks).to(tl.int64)
    b, tile = rest // tiles, rest % tiles
    return b, tile, tiles, tile * BT + tl.arange(0, BT), pid % blocks * BE + tl.arange(0, BE)


@triton.jit
def _tile(x, b, t, e, x_b, x_t, mask, WIDE: tl.constexpr):
    """x[b, t, e], 0 where the mask is off."""
    return tl.load(x + b * x_b + t[:, None] * x_t + e[None, :], mask=mask, other=0).to(WIDE)


@triton.jit
def _column(x, b, t, n, x_b, x_t, mask, WIDE: tl.constexpr):
    """x[b, t, n] of one n, 0 where the mask is off."""
    return tl.load(x + b * x_b + t * x_t + n, mask=mask, other=0).to(WIDE)


@triton.jit
def _steps(dt, b, t, e, dt_b, dt_t, shift, mask, SOFTPLUS: tl.constexpr, WIDE: tl.constexpr):
    """delta = softplus(dt + bias), 0 where the mask is off: such a token leaves a state as it is."""
    step = _tile(dt, b, t, e, dt_b, dt_t, mask, WIDE) + shift[None, :]
    if SOFTPLUS:
        step = _softplus(step)
    return tl.where(mask, step, 0)


@triton.jit
def _per_channel(x, e, E, GIVEN: tl.constexpr, WIDE: tl.constexpr):
    """x[e], or zeros if there is no x."""
    if GIVEN:
        return tl.load(x + e, mask=e < E, other=0).to(WIDE)
    else:
        return tl.zeros(e.shape, WIDE)


@_jit
def tile_ends(
    u, dt, A, B, bias, ends, sums, L, E, u_b, u_t, dt_b, dt_t, B_b, B_t,
    N: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """ends (batch, tiles, N, channels): sum_t exp(A sum_{s > t} delta_s) delta_t u_t B_t over a tile.

    sums (batch, tiles, channels): the sum of its steps.
    """
    b, tile, tiles, t, e = _place(L, E, BT, BE)
    here, mask = t < L, (t < L)[:, None] & (e < E)[None, :]
    shift = _per_channel(bias, e, E, HAS_BIAS, WIDE)
    delta = _steps(dt, b, t, e, dt_b, dt_t, shift, mask, SOFTPLUS, WIDE)
    follows = (t % BT < BT - 1) & (t + 1 < L)
    later = _steps(dt, b, t + 1, e, dt_b, dt_t, shift, follows[:, None] & (e < E)[None, :], SOFTPLUS, WIDE)
    later = tl.cumsum(later, axis=0, reverse=True)
    write = delta * _tile(u, b, t, e, u_b, u_t, mask, WIDE)
    at = b * tiles + tile
    tl.store(sums + at * E + e, tl.sum(delta, axis=0), mask=e < E)
    for n in range(N):
        rate = tl.load(A + n * E + e, mask=e < E, other=0)
        into = write * _column(B, b, t, n, B_b, B_t, here, WIDE)[:, None]
        end = tl.sum(tl.exp2(later * rate[None, :]) * into, axis=0)
        tl.store(ends + (at * N + n) * E + e, end, mask=e < E)


@_jit
def tile_starts(
    gy, dt, A, C, z, bias, gstates, slots, starts, sums, L, E, P, gy_b, gy_t, dt_b, dt_t, C_b, C_t, z_b, z_t,
    N: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_STATES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """starts (batch, tiles, N, channels): the gradient of the state before a tile by what the tile returns.

    That is sum_t exp(A sum_{s <= t} delta_s) (C_t g_t + gstates_t). sums: as in `tile_ends`.
    """
    b, tile, tiles, t, e = _place(L, E, BT, BE)
    here, mask = t < L, (t < L)[:, None] & (e < E)[None, :]
    shift = _per_channel(bias, e, E, HAS_BIAS, WIDE)
    delta = _steps(dt, b, t, e, dt_b, dt_t, shift, mask, SOFTPLUS, WIDE)
    g = _tile(gy, b, t, e, gy_b, gy_t, mask, WIDE)
    if HAS_Z:
        gate = _tile(z, b, t, e, z_b, z_t, mask, WIDE)
        g *= gate * _sigmoid(gate)
    at = b * tiles + tile
    tl.store(sums + at * E + e, tl.sum(delta, axis=0), mask=e < E)
    sofar = tl.cumsum(delta, axis=0)
    slot = _slots(slots, t, L, HAS_STATES)
    for n in range(N):
        rate = tl.load(A + n * E + e, mask=e < E, other=0)
        come = g * _column(C, b, t, n, C_b, C_t, here, WIDE)[:, None]
        if HAS_STATES:
            come += _state_rows(gstates, slot, b, n, e, E, P, N)
        start = tl.sum(tl.exp2(sofar * rate[None, :]) * come, axis=0)
        tl.store(starts + (at * N + n) * E + e, start, mask=e < E)


@triton.jit
def _slots(slots, t, L, GIVEN: tl.constexpr):
    """The place of each token among the stored states, -1 where it has none."""
    if GIVEN:
        return tl.load(slots + t, mask=t < L, other=-1).to(tl.int64)
    else:
        return t - t - 1


@triton.jit
def _state_rows(states, slot, b, n, e, E, P, N: tl.constexpr):
    """states[b, slot, n, e] of a tile's tokens, 0 for those that have no slot."""
    at = states + (b * P * N + n) * E + slot[:, None] * (N * E) + e[None, :]
    return tl.load(at, mask=(slot >= 0)[:, None] & (e < E)[None, :], other=0)


@triton.jit
def carry(
    A, first, parts, sums, tiles, E, N: tl.constexpr, BE: tl.constexpr, HAS_FIRST: tl.constexpr,
    REVERSE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """h <- exp(A sums_tile) h + parts_tile over the tiles; each of the parts becomes the h before it.

    The grid is (sequence, d_state, block of channels). first (batch, N, channels): h before all of them.
    REVERSE: from the last tile to the first.
    """
    pid, blocks = tl.program_id(0), tl.cdiv(E, BE)
    e, rest = pid % blocks * BE + tl.arange(0, BE), (pid // blocks).to(tl.int64)
    b, n = rest // N, rest % N
    rate = tl.load(A + n * E + e, mask=e < E, other=0)
    h = _per_channel(first + (b * N + n) * E, e, E, HAS_FIRST, WIDE)
    for i in range(tiles):
        at = b * tiles + (tiles - 1 - i if REVERSE else i)
        part = tl.load(parts + (at * N + n) * E + e, mask=e < E, other=0)
        step = tl.load(sums + at * E + e, mask=e < E, other=0)
        tl.store(parts + (at * N + n) * E + e, h, mask=e < E)
        h = tl.exp2(step * rate) * h + part


@_jit
def scan_forward(
    u, dt, A, B, C, D, z, bias, starts, slots, y, states, last, L, E, P,
    u_b, u_t, dt_b, dt_t, B_b, B_t, C_b, C_t, z_b, z_t,
    N: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_STATES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y, the states of tokens with a slot and that of the last token, given the state before each tile."""
    b, tile, tiles, t, e = _place(L, E, BT, BE)
    here, mask = t < L, (t < L)[:, None] & (e < E)[None, :]
    shift = _per_channel(bias, e, E, HAS_BIAS, WIDE)
    delta = _steps(dt, b, t, e, dt_b, dt_t, shift, mask, SOFTPLUS, WIDE)
    given = _tile(u, b, t, e, u_b, u_t, mask, WIDE)
    write = delta * given
    out = _per_channel(D, e, E, HAS_D, WIDE)[None, :] * given
    slot = _slots(slots, t, L, HAS_STATES)
    begins = (t % BT == 0)[:, None]
    for n in range(N):
        decay = tl.exp2(delta * tl.load(A + n * E + e, mask=e < E, other=0)[None, :])
        into = write * _column(B, b, t, n, B_b, B_t, here, WIDE)[:, None]
        before = tl.load(starts + ((b * tiles + tile) * N + n) * E + e, mask=e < E, other=0)[None, :]
        into += tl.where(begins, decay * before, 0)
        h = tl.associative_scan((decay, into), 0, _after)[1]
        out += h * _column(C, b, t, n, C_b, C_t, here, WIDE)[:, None]
        if HAS_STATES:
            at = states + (b * P * N + n) * E + slot[:, None] * (N * E) + e[None, :]
            tl.store(at, h, mask=(slot >= 0)[:, None] & mask)
        if tile == tiles - 1:
            to = tl.broadcast_to(last + (b * N + n) * E + e[None, :], [BT, BE])
            tl.store(to, h, mask=(t == L - 1)[:, None] & mask)
    if HAS_Z:
        gate = _tile(z, b, t, e, z_b, z_t, mask, WIDE)
        out *= gate * _sigmoid(gate)
    tl.store(y + (b * L + t[:, None]) * E + e[None, :], out, mask=mask)


@_jit
def scan_backward(
    u, dt, A, B, C, D, z, bias, starts, ends, gy, gstates, slots, du, ddt, dB, dC, dD, dz, dbias, dh0,
    L, E, P,
    u_b, u_t, dt_b, dt_t, B_b, B_t, C_b, C_t, z_b, z_t, gy_b, gy_t,
    N: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_STATES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All gradients, given the state before each tile and the gradient of the state after it (`ends`).

    `ends` becomes the tile's part of the gradient of A, to be summed over sequences and tiles, as are dD and
    dbias (batch, tiles, channels). dB, dC (batch, blocks, length, N): to be summed over blocks of channels.
    Sums by torch instead of atomic additions, whose order, and with it the rounding, changes from run to run.
    """
    b, tile, tiles, t, e = _place(L, E, BT, BE)
    here, mask = t < L, (t < L)[:, None] & (e < E)[None, :]
    first, final = (t % BT == 0)[:, None], (t % BT == BT - 1)[:, None]
    shift = _per_channel(bias, e, E, HAS_BIAS, WIDE)
    skip = _per_channel(D, e, E, HAS_D, WIDE)[None, :]
    delta = _steps(dt, b, t, e, dt_b, dt_t, shift, mask, SOFTPLUS, WIDE)
    given = _tile(u, b, t, e, u_b, u_t, mask, WIDE)
    write, out = delta * given, skip * given
    g = _tile(gy, b, t, e, gy_b, gy_t, mask, WIDE)
    if HAS_Z:
        gate = _tile(z, b, t, e, z_b, z_t, mask, WIDE)
        g *= gate * _sigmoid(gate)
    none, whole = tl.zeros_like(delta), tl.zeros_like(delta) + 1
    dwrite, dstep = none, none
    slot, blocks = _slots(slots, t, L, HAS_STATES), tl.cdiv(E, BE)
    for n in range(N):
        rate = tl.load(A + n * E + e, mask=e < E, other=0)[None, :]
        place = ((b * tiles + tile) * N + n) * E + e
        Bn, Cn = _column(B, b, t, n, B_b, B_t, here, WIDE), _column(C, b, t, n, C_b, C_t, here, WIDE)
        decay = tl.exp2(delta * rate)
        before = tl.load(starts + place, mask=e < E, other=0)[None, :]
        into = write * Bn[:, None] + tl.where(first, decay * before, 0)
        _, h, _, held = tl.associative_scan((decay, into, whole, none), 0, _then)
        held = tl.where(first, before, held)
        beyond = tl.load(ends + place, mask=e < E, other=0)[None, :]
        come = g * Cn[:, None]
        if HAS_STATES:
            come += _state_rows(gstates, slot, b, n, e, E, P, N)
        back = decay * (come + tl.where(final, beyond, 0))
        _, dheld, _, dh = tl.associative_scan((decay, back, whole, none), 0, _then, reverse=True)
        dh = come + tl.where(final, beyond, dh)
        at = ((b * blocks + tl.program_id(0) % blocks) * L + t) * N + n
        tl.store(dB + at, tl.sum(dh * write, axis=1), mask=here)
        tl.store(dC + at, tl.sum(g * h, axis=1), mask=here)
        out += h * Cn[:, None]
        dwrite += dh * Bn[:, None]
        if tile == 0:
            to = tl.broadcast_to(dh0 + (b * N + n) * E + e[None, :], [BT, BE])
            tl.store(to, dheld, mask=first & mask)
        dexponent = dheld * held
        dstep += dexponent * rate
        tl.store(ends + place, tl.sum(dexponent * delta, axis=0), mask=e < E)
    # read again: what is needed only now need not wait in registers
    given = _tile(u, b, t, e, u_b, u_t, mask, WIDE)
    dstep = dwrite * given + dstep * LN2
    if SOFTPLUS:
        dstep *= _sigmoid(_tile(dt, b, t, e, dt_b, dt_t, mask, WIDE) + shift[None, :])
    to = (b * L + t[:, None]) * E + e[None, :]
    tl.store(ddt + to, dstep, mask=mask)
    tl.store(du + to, dwrite * delta + g * skip, mask=mask)
    sums = (b * tiles + tile) * E + e
    if HAS_BIAS:
        tl.store(dbias + sums, tl.sum(tl.where(mask, dstep, 0), axis=0), mask=e < E)
    if HAS_D:
        tl.store(dD + sums, tl.sum(g * given, axis=0), mask=e < E)
    if HAS_Z:
        gate = _tile(z, b, t, e, z_b, z_t, mask, WIDE)
        opened = _sigmoid(gate)
        slope = opened * (1 + gate * (1 - opened))
        tl.store(dz + to, _tile(gy, b, t, e, gy_b, gy_t, mask, WIDE) * slope * out, mask=mask)
