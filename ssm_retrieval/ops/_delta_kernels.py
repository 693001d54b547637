"""The delta rule on a CPU: forward and backward kernels, W channels of a value at a time.

A row of the state belongs to one channel of the value and changes without the other rows, so W rows fill the
lanes of a vector, and q, k, the decay and beta are the same for all of them. W is 64 or 16: LANES times the
length of the tuple `lanes`, which is known when a kernel is compiled. As in `_scan_kernels.py`, nothing of
size (batch, tokens, P, N) is stored: the forward pass keeps the state at the start of every DELTA_CHUNK
tokens, and the backward pass computes each chunk again from there.

Arrays are flattened; shapes below are (batch, tokens, heads, channels), the channels of v padded to a
multiple of W. "Blocked" arrays (..., heads, blocks, N, W) hold a (..., heads, P, N) tensor. A task is one
head of one sequence, so the sums over channels (dq, dk) are complete within it, in a fixed order. The rows of
a head lie H rows apart, which no hardware prefetcher follows: the kernels ask for them, AHEAD tokens before.
"""

from __future__ import annotations

from ssm_retrieval.ops import DELTA_CHUNK, LANES
from ssm_retrieval.ops._compile import kernel
from ssm_retrieval.ops._simd import (
    add,
    aligned,
    fill,
    fma,
    load,
    load_as,
    mul,
    narrow,
    prefetch,
    spread,
    spread_as,
    store,
    store_totals,
    sub,
    total,
    zeros,
)

AHEAD = 4


@kernel(inline="always")
def _decays(a, k, N, width, at, row, kept, kept_k):
    """a_t[n] and a_t[n] k_t[n] for the token whose decay stands at `at` and whose key stands at `row`."""
    if width > 1:
        for n in range(N):
            kept[n] = a[at + n]
            kept_k[n] = a[at + n] * k[row + n]
    else:
        decay = a[at]
        for n in range(N):
            kept[n] = decay
            kept_k[n] = decay * k[row + n]


@kernel(inline="always")
def _held(h, at, kept_k, N, W, zero):
    """sum_n a[n] h[n] k[n]: what the state, once it has faded, holds under the key."""
    s0, s1 = zero, zero  # two sums at a time: a single one would wait for each of its additions
    for n in range(0, N - N % 2, 2):
        i = at + n * W
        s0 = fma(load_as(h, i, zero), spread_as(kept_k, n, zero), s0)
        s1 = fma(load_as(h, i + W, zero), spread_as(kept_k, n + 1, zero), s1)
    if N % 2:
        s0 = fma(load_as(h, at + (N - 1) * W, zero), spread_as(kept_k, N - 1, zero), s0)
    return add(s0, s1)


@kernel(error_model="numpy")
def delta_forward(tasks, sizes, flags, q, k, v, beta, a, h0, positions, y, checkpoints, states, last, lanes):
    """Tasks [first, stop) of the forward pass.

    sizes: tokens, heads, blocks, N, width of the decay (1 or N), stored positions.
    flags: whether a write erases, has h0, keep checkpoints.
    a: the decays, (batch, tokens, heads, width). beta: (batch, tokens, heads).
    positions: increasing int64. states: (batch, positions, heads, blocks, N, W).
    checkpoints: (batch, chunks, heads, blocks, N, W), the state before the first token of each chunk.
    """
    L, H, blocks, N, width, S = sizes
    erase, has_h0, keep = flags
    W = LANES * len(lanes)
    NL, P = N * W, blocks * W
    size, chunks = blocks * NL, (L + DELTA_CHUNK - 1) // DELTA_CHUNK
    h, kept, kept_k = aligned(size, y), aligned(N, y), aligned(N, y)
    zero, nothing = zeros(y, lanes), fill(y, 0.0)
    for task in range(tasks[0], tasks[1]):
        b, head = task // H, task % H
        for i in range(0, size, LANES):
            store(h, i, load(h0, task * size + i) if has_h0 else nothing)
        s = 0
        for t in range(L):
            if keep and t % DELTA_CHUNK == 0:
                at = ((b * chunks + t // DELTA_CHUNK) * H + head) * size
                for i in range(0, size, LANES):
                    store(checkpoints, at + i, load(h, i))
            token = (b * L + t) * H + head
            row, later = token * N, token + AHEAD * H
            for i in range(0, N, LANES):
                prefetch(q, later * N + i)
                prefetch(k, later * N + i)
            for i in range(0, P, LANES):
                prefetch(v, later * P + i)
            _decays(a, k, N, width, token * width, row, kept, kept_k)
            strength = spread_as(beta, token, zero)
            for block in range(blocks):
                at, place = block * NL, token * P + block * W
                u = load_as(v, place, zero)
                if erase:
                    u = sub(u, _held(h, at, kept_k, N, W, zero))
                u = mul(strength, u)
                y_t = zero
                for n in range(N):
                    i = at + n * W
                    faded = mul(spread_as(kept, n, zero), load_as(h, i, zero))
                    h_t = fma(u, spread_as(k, row + n, zero), faded)
                    store(h, i, h_t)
                    y_t = fma(h_t, spread_as(q, row + n, zero), y_t)
                store(y, place, y_t)
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
    dq, dk, dv, dbeta, da, dh0, lanes,
):  # fmt: skip
    """Tasks [first, stop) of the backward pass.

    flags: whether a write erases, has gstates, has glast. gy, gstates, glast: gradients of y, of the stored
    states and of the last one. dq, dk: as q; dv: as v; dbeta: as beta; da: as a; dh0: blocked.
    """
    L, H, blocks, N, width, S = sizes
    erase, has_states, has_last = flags
    W = LANES * len(lanes)
    NL, P = N * W, blocks * W
    size, chunks = blocks * NL, (L + DELTA_CHUNK - 1) // DELTA_CHUNK
    hs = aligned((DELTA_CHUNK + 1) * size, gy)  # states of the chunk, and the one before it
    left = aligned(DELTA_CHUNK * P, gy)  # v less what the state held already
    dh, kept, kept_k = aligned(size, gy), aligned(N, gy), aligned(N, gy)
    sum_q, sum_k, sum_a = aligned(N * LANES, gy), aligned(N * LANES, gy), aligned(N * LANES, gy)
    zero, nothing = zeros(gy, lanes), fill(gy, 0.0)
    for task in range(tasks[0], tasks[1]):
        b, head = task // H, task % H
        for i in range(0, size, LANES):
            store(dh, i, load(glast, task * size + i) if has_last else nothing)
        s = S - 1
        for chunk in range(chunks - 1, -1, -1):
            t0, t1 = chunk * DELTA_CHUNK, min(chunk * DELTA_CHUNK + DELTA_CHUNK, L)
            at = ((b * chunks + chunk) * H + head) * size
            for i in range(0, size, LANES):
                store(hs, i, load(checkpoints, at + i))
            for t in range(t0, t1):  # compute the chunk again
                token = (b * L + t) * H + head
                row, later = token * N, token + AHEAD * H
                for i in range(0, N, LANES):
                    prefetch(k, later * N + i)
                for i in range(0, P, LANES):
                    prefetch(v, later * P + i)
                _decays(a, k, N, width, token * width, row, kept, kept_k)
                strength = spread_as(beta, token, zero)
                for block in range(blocks):
                    at = (t - t0) * size + block * NL
                    u = load_as(v, token * P + block * W, zero)
                    if erase:
                        u = sub(u, _held(hs, at, kept_k, N, W, zero))
                    store(left, (t - t0) * P + block * W, u)
                    u = mul(strength, u)
                    for n in range(N):
                        i = at + n * W
                        faded = mul(spread_as(kept, n, zero), load_as(hs, i, zero))
                        store(hs, i + size, fma(u, spread_as(k, row + n, zero), faded))
            for t in range(t1 - 1, t0 - 1, -1):
                token = (b * L + t) * H + head
                row, later = token * N, token - AHEAD * H
                if has_states and s >= 0 and positions[s] == t:
                    at = ((b * S + s) * H + head) * size
                    for i in range(0, size, LANES):
                        store(dh, i, add(load(dh, i), load(gstates, at + i)))
                    s -= 1
                for i in range(0, N, LANES):
                    prefetch(q, later * N + i)
                    prefetch(dq, later * N + i)
                    prefetch(dk, later * N + i)
                for i in range(0, P, LANES):
                    prefetch(gy, later * P + i)
                    prefetch(dv, later * P + i)
                _decays(a, k, N, width, token * width, row, kept, kept_k)
                strength = spread_as(beta, token, zero)
                dstrength, decayed = zero, zero
                for block in range(blocks):
                    at, place = block * NL, token * P + block * W
                    here = (t - t0) * size + at  # h_{t-1}; h_t stands `size` behind it
                    g = load_as(gy, place, zero)
                    r = load_as(left, (t - t0) * P + block * W, zero)
                    u, du = mul(strength, r), zero
                    for n in range(N):  # y_t = h_t q_t, and what is written is u k_t
                        i, place_n = at + n * W, n * LANES
                        d = fma(g, spread_as(q, row + n, zero), load_as(dh, i, zero))
                        store(dh, i, d)
                        of_q = narrow(mul(g, load_as(hs, here + size + n * W, zero)))
                        of_k = narrow(mul(d, u))
                        du = fma(d, spread_as(k, row + n, zero), du)
                        if block > 0:
                            of_q = add(of_q, load(sum_q, place_n))
                            of_k = add(of_k, load(sum_k, place_n))
                        store(sum_q, place_n, of_q)
                        store(sum_k, place_n, of_k)
                    dstrength = fma(du, r, dstrength)
                    du = mul(du, strength)
                    store(dv, place, du)
                    for n in range(N):  # u = beta (v - a h_{t-1} k_t), and h_t = a h_{t-1} + u k_t
                        i, place_n = at + n * W, n * LANES
                        d, before = load_as(dh, i, zero), load_as(hs, here + n * W, zero)
                        if erase:
                            d = sub(d, mul(du, spread_as(k, row + n, zero)))
                            lost = mul(narrow(mul(du, before)), spread(kept, n))
                            store(sum_k, place_n, sub(load(sum_k, place_n), lost))
                        if width > 1:
                            of_a = narrow(mul(d, before))
                            if block > 0:
                                of_a = add(of_a, load(sum_a, place_n))
                            store(sum_a, place_n, of_a)
                        else:
                            decayed = fma(d, before, decayed)
                        store(dh, i, mul(d, spread_as(kept, n, zero)))
                store_totals(dq, row, sum_q, N)
                store_totals(dk, row, sum_k, N)
                if width > 1:
                    store_totals(da, row, sum_a, N)
                else:
                    da[token] = total(decayed)
                dbeta[token] = total(dstrength)
        for i in range(0, size, LANES):
            store(dh0, task * size + i, load(dh, i))
