"""The delta rule on a CPU: forward and backward kernels, 16 channels of a value at a time.

A row of the state belongs to one channel of the value and changes without the other rows, so 16 rows fill
the lanes of a vector, and q, k, the decay and beta are the same for all of them. As in `_scan_kernels.py`,
nothing of size (batch, tokens, P, N) is stored: the forward pass keeps the state at the start of every
DELTA_CHUNK tokens, and the backward pass computes each chunk again from there.

Arrays are flattened; shapes below are (batch, tokens, heads, channels), the channels of v padded to a
multiple of 16. "Blocked" arrays (..., heads, blocks, N, 16) hold a (..., heads, P, N) tensor. A task is one
head of one sequence, so the sums over channels (dq, dk) are complete within it, in a fixed order.
"""

from __future__ import annotations

import numpy as np

from ssm_retrieval.ops import DELTA_CHUNK, LANES
from ssm_retrieval.ops._compile import kernel
from ssm_retrieval.ops._simd import add, fill, fma, load, mul, spread, store, store_totals, sub, total

STEP = 4 * LANES  # four sums at a time: a single one would wait for each of its additions


@kernel(inline="always")
def _decays(a, k, N, width, at, row, kept, kept_k):
    """a_t[n] and a_t[n] k_t[n] for the token whose decay stands at `at` and whose key stands at `row`."""
    for n in range(N):
        decay = a[at + n] if width > 1 else a[at]
        kept[n] = decay
        kept_k[n] = decay * k[row + n]


@kernel(inline="always")
def _held(h, at, kept_k, NL):
    """sum_n a[n] h[n] k[n]: what the state, once it has faded, holds under the key."""
    zero = fill(h, 0.0)
    s0, s1, s2, s3 = zero, zero, zero, zero
    whole = NL - NL % STEP
    for i in range(0, whole, STEP):
        n = i // LANES
        s0 = fma(load(h, at + i), spread(kept_k, n), s0)
        s1 = fma(load(h, at + i + LANES), spread(kept_k, n + 1), s1)
        s2 = fma(load(h, at + i + 2 * LANES), spread(kept_k, n + 2), s2)
        s3 = fma(load(h, at + i + 3 * LANES), spread(kept_k, n + 3), s3)
    for i in range(whole, NL, LANES):
        s0 = fma(load(h, at + i), spread(kept_k, i // LANES), s0)
    return add(add(s0, s1), add(s2, s3))


@kernel(error_model="numpy")
def delta_forward(tasks, sizes, flags, q, k, v, beta, a, h0, positions, y, checkpoints, states, last):
    """Tasks [first, stop) of the forward pass.

    sizes: tokens, heads, blocks, N, width of the decay (1 or N), stored positions.
    flags: whether a write erases, has h0, keep checkpoints.
    a: the decays, (batch, tokens, heads, width). beta: (batch, tokens, heads).
    positions: increasing int64. states: (batch, positions, heads, blocks, N, 16).
    checkpoints: (batch, chunks, heads, blocks, N, 16), the state before the first token of each chunk.
    """
    L, H, blocks, N, width, S = sizes
    erase, has_h0, keep = flags
    NL, P = N * LANES, blocks * LANES
    size, chunks = blocks * NL, (L + DELTA_CHUNK - 1) // DELTA_CHUNK
    h, kept, kept_k = np.zeros(size, y.dtype), np.zeros(N, y.dtype), np.zeros(N, y.dtype)
    zero = fill(y, 0.0)
    whole = NL - NL % STEP
    for task in range(tasks[0], tasks[1]):
        b, head = task // H, task % H
        for i in range(0, size, LANES):
            store(h, i, load(h0, task * size + i) if has_h0 else zero)
        s = 0
        for t in range(L):
            if keep and t % DELTA_CHUNK == 0:
                at = ((b * chunks + t // DELTA_CHUNK) * H + head) * size
                for i in range(0, size, LANES):
                    store(checkpoints, at + i, load(h, i))
            token = (b * L + t) * H + head
            row = token * N
            _decays(a, k, N, width, token * width, row, kept, kept_k)
            strength = spread(beta, token)
            for block in range(blocks):
                at, place = block * NL, token * P + block * LANES
                u = load(v, place)
                if erase:
                    u = sub(u, _held(h, at, kept_k, NL))
                u = mul(strength, u)
                y0, y1, y2, y3 = zero, zero, zero, zero
                for i in range(0, whole, STEP):
                    n = i // LANES
                    h_t = fma(u, spread(k, row + n), mul(spread(kept, n), load(h, at + i)))
                    store(h, at + i, h_t)
                    y0 = fma(h_t, spread(q, row + n), y0)
                    j = at + i + LANES
                    h_t = fma(u, spread(k, row + n + 1), mul(spread(kept, n + 1), load(h, j)))
                    store(h, j, h_t)
                    y1 = fma(h_t, spread(q, row + n + 1), y1)
                    j = at + i + 2 * LANES
                    h_t = fma(u, spread(k, row + n + 2), mul(spread(kept, n + 2), load(h, j)))
                    store(h, j, h_t)
                    y2 = fma(h_t, spread(q, row + n + 2), y2)
                    j = at + i + 3 * LANES
                    h_t = fma(u, spread(k, row + n + 3), mul(spread(kept, n + 3), load(h, j)))
                    store(h, j, h_t)
                    y3 = fma(h_t, spread(q, row + n + 3), y3)
                for i in range(whole, NL, LANES):
                    n = i // LANES
                    h_t = fma(u, spread(k, row + n), mul(spread(kept, n), load(h, at + i)))
                    store(h, at + i, h_t)
                    y0 = fma(h_t, spread(q, row + n), y0)
                store(y, place, add(add(y0, y1), add(y2, y3)))
            if s < S and positions[s] == t:
                at = ((b * S + s) * H + head) * size
                for i in range(0, size, LANES):
                    store(states, at + i, load(h, i))
                s += 1
        for i in range(0, size, LANES):
            store(last, task * size + i, load(h, i))


@kernel(error_model="numpy")
def delta_backward(
    tasks, sizes, flags, q, k, v, beta, a, checkpoints, positions, gy, gstates, glast,
    dq, dk, dv, dbeta, da, dh0,
):  # fmt: skip
    """Tasks [first, stop) of the backward pass.

    flags: whether a write erases, has gstates, has glast. gy, gstates, glast: gradients of y, of the stored
    states and of the last one. dq, dk: as q; dv: as v; dbeta: as beta; da: as a; dh0: blocked.
    """
    L, H, blocks, N, width, S = sizes
    erase, has_states, has_last = flags
    NL, P = N * LANES, blocks * LANES
    size, chunks = blocks * NL, (L + DELTA_CHUNK - 1) // DELTA_CHUNK
    dtype = gy.dtype
    hs = np.zeros((DELTA_CHUNK + 1) * size, dtype)  # states of the chunk, and the one before it
    left = np.zeros(DELTA_CHUNK * P, dtype)  # v less what the state held already
    dh = np.zeros(size, dtype)
    sum_q, sum_k, sum_a = np.zeros(NL, dtype), np.zeros(NL, dtype), np.zeros(NL, dtype)
    kept, kept_k = np.zeros(N, dtype), np.zeros(N, dtype)
    zero = fill(gy, 0.0)
    for task in range(tasks[0], tasks[1]):
        b, head = task // H, task % H
        for i in range(0, size, LANES):
            store(dh, i, load(glast, task * size + i) if has_last else zero)
        s = S - 1
        for chunk in range(chunks - 1, -1, -1):
            t0, t1 = chunk * DELTA_CHUNK, min(chunk * DELTA_CHUNK + DELTA_CHUNK, L)
            at = ((b * chunks + chunk) * H + head) * size
            for i in range(0, size, LANES):
                store(hs, i, load(checkpoints, at + i))
            for t in range(t0, t1):  # compute the chunk again
                token = (b * L + t) * H + head
                row = token * N
                _decays(a, k, N, width, token * width, row, kept, kept_k)
                strength = spread(beta, token)
                for block in range(blocks):
                    at = (t - t0) * size + block * NL
                    u = load(v, token * P + block * LANES)
                    if erase:
                        u = sub(u, _held(hs, at, kept_k, NL))
                    store(left, (t - t0) * P + block * LANES, u)
                    u = mul(strength, u)
                    for n in range(N):
                        i = at + n * LANES
                        store(hs, i + size, fma(u, spread(k, row + n), mul(spread(kept, n), load(hs, i))))
            for t in range(t1 - 1, t0 - 1, -1):
                token = (b * L + t) * H + head
                row = token * N
                if has_states and s >= 0 and positions[s] == t:
                    at = ((b * S + s) * H + head) * size
                    for i in range(0, size, LANES):
                        store(dh, i, add(load(dh, i), load(gstates, at + i)))
                    s -= 1
                _decays(a, k, N, width, token * width, row, kept, kept_k)
                strength = spread(beta, token)
                for i in range(0, NL, LANES):
                    store(sum_q, i, zero)
                    store(sum_k, i, zero)
                    store(sum_a, i, zero)
                dstrength, decayed = zero, zero
                for block in range(blocks):
                    at, place = block * NL, token * P + block * LANES
                    here = (t - t0) * size + at  # h_{t-1}; h_t stands `size` behind it
                    g = load(gy, place)
                    r = load(left, (t - t0) * P + block * LANES)
                    u = mul(strength, r)
                    du0, du1 = zero, zero
                    for n in range(N):  # y_t = h_t q_t, and what is written is u k_t
                        i = n * LANES
                        d = fma(g, spread(q, row + n), load(dh, at + i))
                        store(dh, at + i, d)
                        store(sum_q, i, fma(g, load(hs, here + size + i), load(sum_q, i)))
                        store(sum_k, i, fma(d, u, load(sum_k, i)))
                        if n % 2:
                            du1 = fma(d, spread(k, row + n), du1)
                        else:
                            du0 = fma(d, spread(k, row + n), du0)
                    du = add(du0, du1)
                    dstrength = fma(du, r, dstrength)
                    du = mul(du, strength)
                    store(dv, place, du)
                    for n in range(N):  # u = beta (v - a h_{t-1} k_t), and h_t = a h_{t-1} + u k_t
                        i = n * LANES
                        d, before = load(dh, at + i), load(hs, here + i)
                        if erase:
                            d = sub(d, mul(du, spread(k, row + n)))
                            lost = mul(du, before)
                            store(sum_k, i, sub(load(sum_k, i), mul(lost, spread(kept, n))))
                        if width > 1:
                            store(sum_a, i, fma(d, before, load(sum_a, i)))
                        else:
                            decayed = fma(d, before, decayed)
                        store(dh, at + i, mul(d, spread(kept, n)))
                store_totals(dq, row, sum_q, N)
                store_totals(dk, row, sum_k, N)
                if width > 1:
                    store_totals(da, row, sum_a, N)
                else:
                    da[token] = total(decayed)
                dbeta[token] = total(dstrength)
        for i in range(0, size, LANES):
            store(dh0, task * size + i, load(dh, i))
