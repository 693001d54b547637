"""The selective scan on a CPU: forward and backward kernels over blocks of 16 channels.

Sixteen neighbouring channels of one sequence fill a vector; the loop over time is sequential, the loop over
d_state runs inside it, and B_t[n], C_t[n] are the same for all channels. Nothing of size
(batch, length, d_inner, d_state) is ever stored: the forward pass keeps h at the start of every CHUNK of
tokens, the backward pass recomputes each chunk from there into a buffer that fits the cache.

Arrays are flattened; shapes below are (batch, tokens, channels) with channels a multiple of 16, and
"blocked" arrays (..., blocks, N, 16) hold a (..., channels, N) tensor with 16 channels innermost.
Work is split into tasks (sequence, group of blocks). A group's sums over channels (dB, dC) go to its own
slice, and slices are added in a fixed order afterwards, so results do not depend on the number of threads.
A task of the backward pass keeps the dB, dC of GROUP blocks in vectors before it sums their lanes.
"""

from __future__ import annotations

import numpy as np

from ssm_retrieval.ops import CHUNK, GROUP, LANES
from ssm_retrieval.ops._compile import kernel
from ssm_retrieval.ops._simd import (
    add,
    fill,
    fma,
    load,
    mul,
    prefetch,
    spread,
    store,
    sub,
    total,
    vabs,
    vmax,
)
from ssm_retrieval.ops._simd_exp import exp, exp2, log1p01, sigmoid

AHEAD = 8  # tokens between asking for a row and using it


@kernel(inline="always")
def _softplus(like, x):
    """log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)."""
    zero = fill(like, 0.0)
    return add(vmax(x, zero), log1p01(exp(sub(zero, vabs(x)))))


@kernel(error_model="numpy")
def scan_forward(
    tasks, sizes, flags, u, dt, A, B, C, D, z, bias, h0, positions, y, checkpoints, states, last
):
    """Tasks [first, stop) of the forward pass.

    sizes: length, blocks, N, stored positions. flags: softplus, has D, has z, has h0, keep checkpoints.
    A: blocked, times log2(e), since 2^x is cheaper than e^x. h0, last: blocked.
    positions: increasing int64; states: (batch, positions, blocks, N, 16);
    checkpoints: (batch, chunks, blocks, N, 16), h before the first token of each chunk.
    """
    L, blocks, N, P = sizes
    softplus, has_D, has_z, has_h0, keep = flags
    E, NL = blocks * LANES, N * LANES
    chunks = (L + CHUNK - 1) // CHUNK
    h = np.zeros(NL, y.dtype)
    zero = fill(y, 0.0)
    for task in range(tasks[0], tasks[1]):
        b, block = task // blocks, task % blocks
        c0 = block * LANES
        blocked = (b * blocks + block) * NL
        for i in range(0, NL, LANES):
            store(h, i, load(h0, blocked + i) if has_h0 else zero)
        skip = load(D, c0) if has_D else zero
        shift = load(bias, c0)
        p = 0
        for t in range(L):
            if keep and t % CHUNK == 0:
                at = ((b * chunks + t // CHUNK) * blocks + block) * NL
                for i in range(0, NL, LANES):
                    store(checkpoints, at + i, load(h, i))
            row = (b * L + t) * E + c0
            prefetch(u, row + AHEAD * E)
            prefetch(dt, row + AHEAD * E)
            if has_z:
                prefetch(z, row + AHEAD * E)
            ut = load(u, row)
            delta = add(load(dt, row), shift)
            if softplus:
                delta = _softplus(y, delta)
            write = mul(delta, ut)
            out = mul(skip, ut)
            bc = (b * L + t) * N
            for n in range(N):
                decay = exp2(mul(delta, load(A, block * NL + n * LANES)))
                ht = fma(decay, load(h, n * LANES), mul(write, spread(B, bc + n)))
                store(h, n * LANES, ht)
                out = fma(ht, spread(C, bc + n), out)
            if has_z:
                zt = load(z, row)
                out = mul(out, mul(zt, sigmoid(y, zt)))
            store(y, row, out)
            if p < P and positions[p] == t:
                at = ((b * P + p) * blocks + block) * NL
                for i in range(0, NL, LANES):
                    store(states, at + i, load(h, i))
                p += 1
        for i in range(0, NL, LANES):
            store(last, blocked + i, load(h, i))


@kernel(error_model="numpy")
def scan_backward(
    tasks, sizes, flags, u, dt, A, B, C, D, z, bias, checkpoints, positions, gy, gstates, glast,
    du, ddt, dA, dB, dC, dD, dz, dbias, dh0,
):  # fmt: skip
    """Tasks [first, stop) of the backward pass; a task is (sequence, group of GROUP blocks).

    gy: gradient of y (batch, L, E); gstates, glast: gradients of the stored states and the last state.
    du, ddt, dz: as u. dA: (batch, blocks, N, 16), dD, dbias: (batch, blocks, 16), to be summed over batch.
    dB, dC: (groups, batch, L, N), to be summed over groups. dh0: blocked. dA belongs to A without log2(e).
    """
    L, blocks, N, P = sizes
    softplus, has_D, has_z, has_states, has_last = flags
    E, NL = blocks * LANES, N * LANES
    chunks, groups = (L + CHUNK - 1) // CHUNK, (blocks + GROUP - 1) // GROUP
    batch = u.size // max(1, L * E)
    hs = np.empty((CHUNK + 1) * NL, gy.dtype)  # h before the chunk, then after each of its tokens
    decays = np.empty(CHUNK * NL, gy.dtype)
    deltas = np.empty(CHUNK * LANES, gy.dtype)
    ys = np.empty(CHUNK * LANES, gy.dtype)  # y before the gate
    sumB, sumC = np.empty(CHUNK * NL, gy.dtype), np.empty(CHUNK * NL, gy.dtype)
    zero, one, ln2 = fill(gy, 0.0), fill(gy, 1.0), fill(gy, 0.6931471805599453)
    for task in range(tasks[0], tasks[1]):
        b, group = task // groups, task % groups
        first, stop = group * GROUP, min(group * GROUP + GROUP, blocks)
        for block in range(first, stop):  # dh0 doubles as the running dh of each block, from last to first
            blocked = (b * blocks + block) * NL
            for i in range(0, NL, LANES):
                store(dh0, blocked + i, load(glast, blocked + i) if has_last else zero)
                store(dA, blocked + i, zero)
            store(dD, (b * blocks + block) * LANES, zero)
            store(dbias, (b * blocks + block) * LANES, zero)
        p_end = P
        for chunk in range(chunks - 1, -1, -1):
            t0, t1 = chunk * CHUNK, min(chunk * CHUNK + CHUNK, L)
            for i in range(0, (t1 - t0) * NL, LANES):
                store(sumB, i, zero)
                store(sumC, i, zero)
            p_start = p_end
            while has_states and p_start > 0 and positions[p_start - 1] >= t0:
                p_start -= 1
            for block in range(first, stop):
                c0 = block * LANES
                blocked = (b * blocks + block) * NL
                skip = load(D, c0) if has_D else zero
                shift = load(bias, c0)
                at = ((b * chunks + chunk) * blocks + block) * NL
                for i in range(0, NL, LANES):
                    store(hs, i, load(checkpoints, at + i))
                for t in range(t0, t1):  # recompute the chunk
                    row, s = (b * L + t) * E + c0, (t - t0) * NL
                    prefetch(u, row + AHEAD * E)
                    prefetch(dt, row + AHEAD * E)
                    prefetch(gy, row)
                    if has_z:
                        prefetch(z, row)
                    ut = load(u, row)
                    delta = add(load(dt, row), shift)
                    if softplus:
                        delta = _softplus(gy, delta)
                    store(deltas, (t - t0) * LANES, delta)
                    write = mul(delta, ut)
                    out = mul(skip, ut)
                    bc = (b * L + t) * N
                    for n in range(N):
                        i = s + n * LANES
                        decay = exp2(mul(delta, load(A, block * NL + n * LANES)))
                        store(decays, i, decay)
                        ht = fma(decay, load(hs, i), mul(write, spread(B, bc + n)))
                        store(hs, i + NL, ht)
                        if has_z:
                            out = fma(ht, spread(C, bc + n), out)
                    store(ys, (t - t0) * LANES, out)
                p = p_end - 1
                for t in range(t1 - 1, t0 - 1, -1):
                    row, s = (b * L + t) * E + c0, (t - t0) * NL
                    if has_states and p >= p_start and positions[p] == t:
                        at = ((b * P + p) * blocks + block) * NL
                        for i in range(0, NL, LANES):
                            store(dh0, blocked + i, add(load(dh0, blocked + i), load(gstates, at + i)))
                        p -= 1
                    ut, g = load(u, row), load(gy, row)
                    if has_z:  # out = y * z * sigmoid(z)
                        zt = load(z, row)
                        opened = sigmoid(gy, zt)
                        gate = mul(zt, opened)
                        slope = mul(opened, add(one, mul(zt, sub(one, opened))))
                        store(dz, row, mul(mul(g, load(ys, (t - t0) * LANES)), slope))
                        g = mul(g, gate)
                    delta = load(deltas, (t - t0) * LANES)
                    write = mul(delta, ut)
                    dwrite, dexponent = zero, zero
                    bc = (b * L + t) * N
                    for n in range(N):
                        i, carry = s + n * LANES, blocked + n * LANES
                        dh = fma(g, spread(C, bc + n), load(dh0, carry))
                        store(sumC, i, fma(g, load(hs, i + NL), load(sumC, i)))
                        store(sumB, i, fma(dh, write, load(sumB, i)))
                        dwrite = fma(dh, spread(B, bc + n), dwrite)
                        dh = mul(dh, load(decays, i))
                        store(dh0, carry, dh)
                        ddecay = mul(dh, load(hs, i))  # gradient of the exponent delta * A
                        dexponent = fma(ddecay, load(A, block * NL + n * LANES), dexponent)
                        store(dA, carry, fma(ddecay, delta, load(dA, carry)))
                    ddelta = fma(dwrite, ut, mul(ln2, dexponent))
                    store(du, row, fma(dwrite, delta, mul(g, skip)))
                    if softplus:
                        ddelta = mul(ddelta, sigmoid(gy, add(load(dt, row), shift)))
                    store(ddt, row, ddelta)
                    sums = (b * blocks + block) * LANES
                    store(dbias, sums, add(load(dbias, sums), ddelta))
                    store(dD, sums, fma(g, ut, load(dD, sums)))
            p_end = p_start
            base = ((group * batch + b) * L + t0) * N
            for i in range((t1 - t0) * N):
                dB[base + i] = total(load(sumB, i * LANES))
                dC[base + i] = total(load(sumC, i * LANES))
