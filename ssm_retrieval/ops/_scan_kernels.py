"""The selective scan on a CPU: forward and backward kernels over blocks of 16 channels.

Sixteen neighbouring channels of one sequence fill a vector; the loop over time is sequential, the loop over
d_state runs inside it, and B_t[n], C_t[n] are the same for all channels. Nothing of size
(batch, length, d_inner, d_state) is ever stored: the forward pass keeps h at the start of every CHUNK of
tokens, the backward pass recomputes each chunk from there into a buffer that fits the cache.

Arrays are flattened; shapes below are (batch, tokens, channels) with channels a multiple of 16, and
"blocked" arrays (..., blocks, N, 16) hold a (..., channels, N) tensor with 16 channels innermost.
Work is split into tasks (sequence, group of blocks). A group's sums over channels (dB, dC) go to its own
slice, and slices are added in a fixed order afterwards, so results do not depend on the number of threads.
A task of the backward pass keeps the dB, dC of its blocks in vectors before it sums their lanes.
"""

from __future__ import annotations

from ssm_retrieval.ops import CHUNK, LANES, TILE
from ssm_retrieval.ops._compile import kernel
from ssm_retrieval.ops._simd import (
    add,
    aligned,
    fill,
    fma,
    fold1,
    fold2,
    fold4,
    fold8,
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
    h = aligned(NL, y)
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


@kernel(inline="always")
def _recompute(n, tokens, N, tok, A, a0, B, C, checkpoints, at, outputs, deltas, writes, hs, decays, ys):
    """States n .. n + 3 before a chunk and after each of its tokens, and their decays; `outputs`: adds to ys.

    tok: the chunk's first token in B and C. a0, at: where the block's states begin in A and checkpoints.
    hs: (CHUNK + 1, 4, 16); decays: (CHUNK, 4, 16).
    """
    i = n * LANES
    A0, A1 = load(A, a0 + i), load(A, a0 + i + LANES)
    A2, A3 = load(A, a0 + i + 2 * LANES), load(A, a0 + i + 3 * LANES)
    h0, h1 = load(checkpoints, at + i), load(checkpoints, at + i + LANES)
    h2, h3 = load(checkpoints, at + i + 2 * LANES), load(checkpoints, at + i + 3 * LANES)
    for t in range(tokens):
        k, m = t * LANES, (tok + t) * N + n
        s = TILE * k
        store(hs, s, h0)
        store(hs, s + LANES, h1)
        store(hs, s + 2 * LANES, h2)
        store(hs, s + 3 * LANES, h3)
        delta, write = load(deltas, k), load(writes, k)
        d0, d1 = exp2(mul(delta, A0)), exp2(mul(delta, A1))
        d2, d3 = exp2(mul(delta, A2)), exp2(mul(delta, A3))
        store(decays, s, d0)
        store(decays, s + LANES, d1)
        store(decays, s + 2 * LANES, d2)
        store(decays, s + 3 * LANES, d3)
        h0 = fma(d0, h0, mul(write, spread(B, m)))
        h1 = fma(d1, h1, mul(write, spread(B, m + 1)))
        h2 = fma(d2, h2, mul(write, spread(B, m + 2)))
        h3 = fma(d3, h3, mul(write, spread(B, m + 3)))
        if outputs:
            y = fma(h0, spread(C, m), load(ys, k))
            y = fma(h1, spread(C, m + 1), y)
            y = fma(h2, spread(C, m + 2), y)
            store(ys, k, fma(h3, spread(C, m + 3), y))
    end = tokens * TILE * LANES
    store(hs, end, h0)
    store(hs, end + LANES, h1)
    store(hs, end + 2 * LANES, h2)
    store(hs, end + 3 * LANES, h3)


@kernel(inline="always")
def _recompute_one(n, tokens, N, tok, A, a0, B, C, checkpoints, at, outputs, deltas, writes, hs, decays, ys):
    """`_recompute` of state n alone; hs: (CHUNK + 1, 16), decays: (CHUNK, 16)."""
    An, h = load(A, a0 + n * LANES), load(checkpoints, at + n * LANES)
    for t in range(tokens):
        k, m = t * LANES, (tok + t) * N + n
        store(hs, k, h)
        decay = exp2(mul(load(deltas, k), An))
        store(decays, k, decay)
        h = fma(decay, h, mul(load(writes, k), spread(B, m)))
        if outputs:
            store(ys, k, fma(h, spread(C, m), load(ys, k)))
    store(hs, tokens * LANES, h)


@kernel(inline="always")
def _quarters(a, b, c, d):
    """Four sums of four lanes each, of every vector."""
    return fold4(fold8(a, b), fold8(c, d))


@kernel(inline="always")
def _reverse(
    n, tokens, N, tok, A, a0, B, C, deltas, writes, gs, hs, decays, dA, dh, at, gstates, positions, p,
    p_start, t0, states_at, step, sumB, sumC, dwrites, dexponents,
):  # fmt: skip
    """From a chunk's last token to its first: gradients of the states n .. n + 3, and what they add to sums.

    at: where the block's states begin in dA and dh. gstates[states_at + q step]: those of stored position q;
    positions p, p - 1, .. p_start lie in the chunk. sumB, sumC: (N / 4, CHUNK, 16), quarters of four states.
    """
    i, r, end = n * LANES, n // TILE * CHUNK * LANES, tokens * TILE * LANES
    A0, A1 = load(A, a0 + i), load(A, a0 + i + LANES)
    A2, A3 = load(A, a0 + i + 2 * LANES), load(A, a0 + i + 3 * LANES)
    g0, g1 = load(dh, at + i), load(dh, at + i + LANES)
    g2, g3 = load(dh, at + i + 2 * LANES), load(dh, at + i + 3 * LANES)
    s0, s1 = load(dA, at + i), load(dA, at + i + LANES)
    s2, s3 = load(dA, at + i + 2 * LANES), load(dA, at + i + 3 * LANES)
    h0, h1 = load(hs, end), load(hs, end + LANES)
    h2, h3 = load(hs, end + 2 * LANES), load(hs, end + 3 * LANES)
    for t in range(tokens - 1, -1, -1):
        k, m = t * LANES, (tok + t) * N + n
        s = TILE * k
        if p >= p_start and positions[p] == t0 + t:
            q = states_at + p * step + i
            g0, g1 = add(g0, load(gstates, q)), add(g1, load(gstates, q + LANES))
            g2, g3 = add(g2, load(gstates, q + 2 * LANES)), add(g3, load(gstates, q + 3 * LANES))
            p -= 1
        delta, write, g = load(deltas, k), load(writes, k), load(gs, k)
        quarters = _quarters(mul(g, h0), mul(g, h1), mul(g, h2), mul(g, h3))
        store(sumC, r + k, add(quarters, load(sumC, r + k)))
        g0, g1 = fma(g, spread(C, m), g0), fma(g, spread(C, m + 1), g1)
        g2, g3 = fma(g, spread(C, m + 2), g2), fma(g, spread(C, m + 3), g3)
        quarters = _quarters(mul(g0, write), mul(g1, write), mul(g2, write), mul(g3, write))
        store(sumB, r + k, add(quarters, load(sumB, r + k)))
        dwrite = fma(g0, spread(B, m), load(dwrites, k))
        dwrite = fma(g1, spread(B, m + 1), dwrite)
        dwrite = fma(g2, spread(B, m + 2), dwrite)
        store(dwrites, k, fma(g3, spread(B, m + 3), dwrite))
        g0, g1 = mul(g0, load(decays, s)), mul(g1, load(decays, s + LANES))
        g2, g3 = mul(g2, load(decays, s + 2 * LANES)), mul(g3, load(decays, s + 3 * LANES))
        h0, h1 = load(hs, s), load(hs, s + LANES)
        h2, h3 = load(hs, s + 2 * LANES), load(hs, s + 3 * LANES)
        e0, e1, e2, e3 = mul(g0, h0), mul(g1, h1), mul(g2, h2), mul(g3, h3)  # gradients of delta * A
        dexponent = fma(e0, A0, load(dexponents, k))
        dexponent = fma(e1, A1, dexponent)
        dexponent = fma(e2, A2, dexponent)
        store(dexponents, k, fma(e3, A3, dexponent))
        s0, s1, s2, s3 = fma(e0, delta, s0), fma(e1, delta, s1), fma(e2, delta, s2), fma(e3, delta, s3)
    store(dh, at + i, g0)
    store(dh, at + i + LANES, g1)
    store(dh, at + i + 2 * LANES, g2)
    store(dh, at + i + 3 * LANES, g3)
    store(dA, at + i, s0)
    store(dA, at + i + LANES, s1)
    store(dA, at + i + 2 * LANES, s2)
    store(dA, at + i + 3 * LANES, s3)


@kernel(inline="always")
def _reverse_one(
    n, tokens, N, tok, A, a0, B, C, deltas, writes, gs, hs, decays, dA, dh, at, gstates, positions, p,
    p_start, t0, states_at, step, restB, restC, dwrites, dexponents,
):  # fmt: skip
    """`_reverse` of state n alone; restB, restC: (N % 4, CHUNK, 16)."""
    i, r = n * LANES, n % TILE * CHUNK * LANES
    An, gn, sn, h = load(A, a0 + i), load(dh, at + i), load(dA, at + i), load(hs, tokens * LANES)
    for t in range(tokens - 1, -1, -1):
        k, m = t * LANES, (tok + t) * N + n
        if p >= p_start and positions[p] == t0 + t:
            gn = add(gn, load(gstates, states_at + p * step + i))
            p -= 1
        g = load(gs, k)
        store(restC, r + k, fma(g, h, load(restC, r + k)))
        gn = fma(g, spread(C, m), gn)
        store(restB, r + k, fma(gn, load(writes, k), load(restB, r + k)))
        store(dwrites, k, fma(gn, spread(B, m), load(dwrites, k)))
        gn = mul(gn, load(decays, k))
        h = load(hs, k)
        e = mul(gn, h)
        store(dexponents, k, fma(e, An, load(dexponents, k)))
        sn = fma(e, load(deltas, k), sn)
    store(dh, at + i, gn)
    store(dA, at + i, sn)


@kernel(inline="always")
def _store_sums(out, at, tokens, rows, N, quarters, rest):
    """out[at + (n / 4) rows 4 + 4 t + n % 4] of a chunk, from quarters of four states and lanes of a rest."""
    for n in range(0, N - N % TILE, TILE):
        for t in range(0, tokens, 4):  # beyond the last token there are zeros, and room for them
            i = (n // TILE * CHUNK + t) * LANES
            a = fold2(load(quarters, i), load(quarters, i + LANES))
            b = fold2(load(quarters, i + 2 * LANES), load(quarters, i + 3 * LANES))
            store(out, at + n * rows + TILE * t, fold1(a, b))
    for n in range(N - N % TILE, N):
        for t in range(tokens):
            i = at + (n - n % TILE) * rows + TILE * t + n % TILE
            out[i] = total(load(rest, (n % TILE * CHUNK + t) * LANES))


@kernel(error_model="numpy")
def scan_backward(
    tasks, sizes, flags, u, dt, A, B, C, D, z, bias, checkpoints, positions, gy, gstates, glast,
    du, ddt, dA, dB, dC, dD, dz, dbias, dh0,
):  # fmt: skip
    """Tasks [first, stop) of the backward pass; a task is (sequence, group of blocks).

    sizes: length, blocks, N, stored positions, blocks of a group.
    gy: gradient of y (batch, L, E); gstates, glast: gradients of the stored states and the last state.
    du, ddt, dz: as u. dA: (batch, blocks, N, 16), dD, dbias: (batch, blocks, 16), to be summed over batch.
    dB, dC: (groups, batch, N / 4, L, 4), L and N up to multiples of 4, to be summed over groups. dh0:
    blocked. dA belongs to A without log2(e).
    """
    L, blocks, N, P, size_of_group = sizes
    softplus, has_D, has_z, has_states, has_last = flags
    E, NL = blocks * LANES, N * LANES
    chunks, groups = (L + CHUNK - 1) // CHUNK, (blocks + size_of_group - 1) // size_of_group
    batch = u.size // max(1, L * E)
    whole = N - N % TILE
    hs = aligned((CHUNK + 1) * TILE * LANES, gy)  # h before the chunk, then after each of its tokens
    decays = aligned(CHUNK * TILE * LANES, gy)
    deltas, writes = aligned(CHUNK * LANES, gy), aligned(CHUNK * LANES, gy)  # writes: delta * u
    ys, gs = aligned(CHUNK * LANES, gy), aligned(CHUNK * LANES, gy)  # y before the gate, its gradient
    dwrites, dexponents = aligned(CHUNK * LANES, gy), aligned(CHUNK * LANES, gy)
    size, rest = CHUNK * whole // TILE * LANES, CHUNK * TILE * LANES
    sumB, sumC, restB, restC = aligned(size, gy), aligned(size, gy), aligned(rest, gy), aligned(rest, gy)
    rows, tiles = L + -L % 4, (N + TILE - 1) // TILE
    zero, one, ln2 = fill(gy, 0.0), fill(gy, 1.0), fill(gy, 0.6931471805599453)
    for task in range(tasks[0], tasks[1]):
        b, group = task // groups, task % groups
        first = group * size_of_group
        stop = min(first + size_of_group, blocks)
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
            for i in range(0, size, LANES):
                store(sumB, i, zero)
                store(sumC, i, zero)
            for i in range(0, N % TILE * CHUNK * LANES, LANES):
                store(restB, i, zero)
                store(restC, i, zero)
            p_start = p_end
            while has_states and p_start > 0 and positions[p_start - 1] >= t0:
                p_start -= 1
            for block in range(first, stop):
                c0 = block * LANES
                blocked = (b * blocks + block) * NL
                skip = load(D, c0) if has_D else zero
                shift = load(bias, c0)
                at = ((b * chunks + chunk) * blocks + block) * NL
                tokens, tok, a0 = t1 - t0, b * L + t0, block * NL
                for t in range(tokens):  # what all states share
                    row, k = (tok + t) * E + c0, t * LANES
                    prefetch(u, row + AHEAD * E)
                    prefetch(dt, row + AHEAD * E)
                    prefetch(gy, row + AHEAD * E)
                    if has_z:
                        prefetch(z, row + AHEAD * E)
                    ut, g = load(u, row), load(gy, row)
                    delta = add(load(dt, row), shift)
                    if softplus:
                        delta = _softplus(gy, delta)
                    if has_z:  # out = y * z * sigmoid(z)
                        zt = load(z, row)
                        g = mul(g, mul(zt, sigmoid(gy, zt)))
                    store(deltas, k, delta)
                    store(writes, k, mul(delta, ut))
                    store(gs, k, g)
                    store(ys, k, mul(skip, ut))
                    store(dwrites, k, zero)
                    store(dexponents, k, zero)
                p, states_at, step = p_end - 1, (b * P * blocks + block) * NL, blocks * NL
                for n in range(0, whole, TILE):
                    _recompute(
                        n, tokens, N, tok, A, a0, B, C, checkpoints, at, has_z, deltas, writes, hs, decays, ys
                    )
                    _reverse(
                        n, tokens, N, tok, A, a0, B, C, deltas, writes, gs, hs, decays, dA, dh0, blocked,
                        gstates, positions, p, p_start, t0, states_at, step, sumB, sumC, dwrites, dexponents,
                    )  # fmt: skip
                for n in range(whole, N):
                    _recompute_one(
                        n, tokens, N, tok, A, a0, B, C, checkpoints, at, has_z, deltas, writes, hs, decays, ys
                    )
                    _reverse_one(
                        n, tokens, N, tok, A, a0, B, C, deltas, writes, gs, hs, decays, dA, dh0, blocked,
                        gstates, positions, p, p_start, t0, states_at, step, restB, restC, dwrites,
                        dexponents,
                    )  # fmt: skip
                sums = (b * blocks + block) * LANES
                sum_bias, sum_D = load(dbias, sums), load(dD, sums)
                for t in range(tokens - 1, -1, -1):
                    row, k = (tok + t) * E + c0, t * LANES
                    ut, g, dwrite = load(u, row), load(gs, k), load(dwrites, k)
                    if has_z:
                        zt = load(z, row)
                        opened = sigmoid(gy, zt)
                        slope = mul(opened, add(one, mul(zt, sub(one, opened))))
                        store(dz, row, mul(mul(load(gy, row), load(ys, k)), slope))
                    ddelta = fma(dwrite, ut, mul(ln2, load(dexponents, k)))
                    store(du, row, fma(dwrite, load(deltas, k), mul(g, skip)))
                    if softplus:
                        ddelta = mul(ddelta, sigmoid(gy, add(load(dt, row), shift)))
                    store(ddt, row, ddelta)
                    sum_bias, sum_D = add(sum_bias, ddelta), fma(g, ut, sum_D)
                store(dbias, sums, sum_bias)
                store(dD, sums, sum_D)
            p_end = p_start
            base = ((group * batch + b) * tiles * rows + t0) * TILE
            _store_sums(dB, base, t1 - t0, rows, N, sumB, restB)
            _store_sums(dC, base, t1 - t0, rows, N, sumC, restC)
