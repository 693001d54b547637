"""The delta rule and linear attention with decay as Triton kernels: what both passes share, and the forward.

Notation of `_delta_chunks.py`: a chunk of Q tokens begins with the state S (P, N); G_t is the sum of its log
decays up to t and total the sum of all. With write u_t = beta_t r_t and

    A_ts = sum_n q_t k_s exp(G_t - G_s), s <= t              what t reads of the write of s
    M_ts = sum_n k_t k_s exp(G_t - G_s), s < t               what the key of t finds of it
    R = V                                                    without erasure
    R = X - K (beta X), X = V - (k exp(G)) S^T, K = M (I + beta M)^-1       with it

a chunk gives y = A u + (q exp(G)) S^T and leaves S exp(total) + u^T (k exp(total - G)). No exponent passes 0.

K serves both passes, because (I + beta M)^-1 = I - beta K and (I + M beta)^-1 = I - K beta: no division by a
beta that may be 0.

Programs take one head of one sequence and one chunk each, all at once; only the state goes from chunk to
chunk in a loop, a block of P by each program. Layouts: states are (batch, chunks + 1, heads, P, N) and K
is (batch, heads, chunks, Q, Q), both float32; R is (batch, length, heads, P). q and k may have fewer heads,
each for REP heads of v. Loads and stores are masked, so that any size works; blocks are powers of 2, at
least 16 where they enter a product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def product(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b with operands rounded to DOT and sums in float32."""
    a, b = a.to(DOT), b.to(DOT)
    if INTERPRETED:  # whose products do not know bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def place(pid, chunks, H):
    """Sequence, head and chunk of a program, as int64: offsets may pass 2^31."""
    pid = pid.to(tl.int64)
    return pid // chunks // H, pid // chunks % H, pid % chunks


@triton.jit
def tokens_of(chunk, starts, L, Q: tl.constexpr, SPLIT: tl.constexpr):
    """The tokens of a chunk, and which of them it has; with SPLIT it begins at starts[chunk]."""
    if SPLIT:
        first, end = tl.load(starts + chunk), tl.load(starts + chunk + 1)
    else:
        first, end = chunk * Q, tl.minimum(chunk * Q + Q, L)
    t = tl.arange(0, Q).to(tl.int64) + first
    return t, t < end


@triton.jit
def rows(x, strides, b, h, t, inside, columns, width):
    """(Q, block) of x (batch, length, heads, width), in float32; zeros where there is nothing."""
    at = x + b * strides[0] + h * strides[2] + t[:, None] * strides[1] + columns[None, :]
    return tl.load(at, mask=inside[:, None] & (columns < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_rows(values, x, strides, b, h, t, inside, columns, width):
    """Store what `rows` would load."""
    at = x + b * strides[0] + h * strides[2] + t[:, None] * strides[1] + columns[None, :]
    tl.store(at, values.to(x.dtype.element_ty), mask=inside[:, None] & (columns < width)[None, :])


@triton.jit
def numbers(x, strides, b, h, t, inside):
    """(Q,) of x (batch, length, heads), in float32."""
    at = x + b * strides[0] + h * strides[2] + t * strides[1]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def summed_decays(log, strides, b, h, t, inside, n, N, CHANNEL: tl.constexpr):
    """G and total: (Q, block of N) and (1, block), or (Q, 1) and (1, 1) for one decay a head."""
    if CHANNEL:
        x = rows(log, strides, b, h, t, inside, n, N)
        return tl.cumsum(x, 0), tl.sum(x, 0)[None, :]
    else:
        each = numbers(log, strides, b, h, t, inside)
        return tl.cumsum(each, 0)[:, None], tl.sum(each, 0)[None, None]


@triton.jit
def between(G, Q: tl.constexpr, CHANNEL: tl.constexpr):
    """exp(G_t - G_s) for s <= t, otherwise 0: (Q, Q), or (Q, Q, block)."""
    i = tl.arange(0, Q)
    causal = i[:, None] >= i[None, :]
    if CHANNEL:
        return tl.exp(tl.where(causal[:, :, None], G[:, None, :] - G[None, :, :], -float("inf")))
    else:
        return tl.exp(tl.where(causal, G - tl.trans(G), -float("inf")))


@triton.jit
def scores(
    x, x_strides, k, k_strides, log, log_strides, b, h, t, inside, N, REP: tl.constexpr, Q: tl.constexpr,
    NB: tl.constexpr, CHANNEL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_n x_t k_s exp(G_t - G_s) for s <= t, otherwise 0: (Q, Q)."""
    found = tl.zeros((Q, Q), tl.float32)
    for start in range(0, N, NB):
        n = start + tl.arange(0, NB)
        xs = rows(x, x_strides, b, h // REP, t, inside, n, N)
        ks = rows(k, k_strides, b, h // REP, t, inside, n, N)
        if CHANNEL:  # no product of matrices: exp(G_t) exp(-G_s) would overflow
            G, _ = summed_decays(log, log_strides, b, h, t, inside, n, N, CHANNEL)
            found += tl.sum(xs[:, None, :] * ks[None, :, :] * between(G, Q, CHANNEL), 2)
        else:
            found += product(xs, tl.trans(ks), DOT, PRECISION)
    if not CHANNEL:
        G, _ = summed_decays(log, log_strides, b, h, t, inside, t, N, CHANNEL)
        found *= between(G, Q, CHANNEL)
    return found


@triton.jit
def square(x, at, Q: tl.constexpr):
    """Pointers to the matrix (Q, Q) with number `at` of x."""
    i = tl.arange(0, Q)
    return x + at * Q * Q + i[:, None] * Q + i[None, :]


@triton.jit
def state_block(x, at, p, n, P, N):
    """Pointers to the block (p, n) of the state (P, N) with number `at` of x."""
    return x + at * P * N + p[:, None] * N + n[None, :]


@triton.jit
def pairs(p, n, P, N):
    """Which of a block (p, n) of the state there is."""
    return (p < P)[:, None] & (n < N)[None, :]


@triton.jit(do_not_specialize=["L", "chunks"])
def overlaps(
    k, k_strides, beta, beta_strides, log, log_strides, starts, K, L, H, N, chunks, REP: tl.constexpr,
    Q: tl.constexpr, NB: tl.constexpr, CHANNEL: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """K = M (I + beta M)^-1 of every chunk.

    Let D be the inverses of a triangular matrix's blocks of `width` on the diagonal. The blocks of twice the
    width have the inverses D - D X D, where X is what these blocks hold beside the former. So it grows from 1
    to Q in log Q steps, as stable as substitution row by row: no power of M is formed.
    """
    pid = tl.program_id(0)
    b, h, c = place(pid, chunks, H)
    t, inside = tokens_of(c, starts, L, Q, SPLIT)
    row, column = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    M = scores(
        k, k_strides, k, k_strides, log, log_strides, b, h, t, inside, N, REP, Q, NB, CHANNEL, DOT, PRECISION
    )
    M = tl.where(row > column, M, 0.0)
    weighed = M * numbers(beta, beta_strides, b, h, t, inside)[:, None]
    inverse = tl.where(row == column, 1.0, 0.0)
    width = 1
    while width < Q:
        below = (row // (2 * width) == column // (2 * width)) & (row // width > column // width)
        right = product(tl.where(below, weighed, 0.0), inverse, tl.float32, PRECISION)
        inverse -= product(inverse, right, tl.float32, PRECISION)
        width *= 2
    found = product(M, inverse, tl.float32, PRECISION)
    tl.store(square(K, pid.to(tl.int64), Q), found)


@triton.jit(do_not_specialize=["L", "chunks"])
def states(
    k, k_strides, v, v_strides, beta, beta_strides, log, log_strides, starts, K, h0, S, R, y_strides, L, H,
    P, N, chunks, REP: tl.constexpr, ERASE: tl.constexpr, STARTED: tl.constexpr, Q: tl.constexpr,
    PB: tl.constexpr, NB: tl.constexpr, CHANNEL: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before every chunk and after the last; with ERASE (then NB holds all of N) also R."""
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // H, pid % H
    p = tl.program_id(1) * PB + tl.arange(0, PB)
    n = tl.program_id(2) * NB + tl.arange(0, NB)
    there = pairs(p, n, P, N)
    if STARTED:
        state = tl.load(state_block(h0, pid, p, n, P, N), mask=there, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((PB, NB), tl.float32)
    for c in range(chunks):
        tl.store(state_block(S, (b * (chunks + 1) + c) * H + h, p, n, P, N), state, mask=there)
        t, inside = tokens_of(c, starts, L, Q, SPLIT)
        ks = rows(k, k_strides, b, h // REP, t, inside, n, N)
        G, total = summed_decays(log, log_strides, b, h, t, inside, n, N, CHANNEL)
        strength = numbers(beta, beta_strides, b, h, t, inside)[:, None]
        r = rows(v, v_strides, b, h, t, inside, p, P)
        if ERASE:
            r -= product(ks * tl.exp(G), tl.trans(state), DOT, PRECISION)
            r -= product(tl.load(square(K, pid * chunks + c, Q)), strength * r, DOT, PRECISION)
            store_rows(r, R, y_strides, b, h, t, inside, p, P)
        written = product(tl.trans(strength * r), ks * tl.exp(total - G), DOT, PRECISION)
        state = state * tl.exp(total) + written
    tl.store(state_block(S, (b * (chunks + 1) + chunks) * H + h, p, n, P, N), state, mask=there)


@triton.jit(do_not_specialize=["L", "chunks"])
def outputs(
    q, q_strides, k, k_strides, r, r_strides, beta, beta_strides, log, log_strides, starts, S, y, y_strides,
    L, H, P, N, chunks, REP: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
    CHANNEL: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of every chunk, from the state before it."""
    b, h, c = place(tl.program_id(0), chunks, H)
    p = tl.program_id(1) * PB + tl.arange(0, PB)
    t, inside = tokens_of(c, starts, L, Q, SPLIT)
    A = scores(
        q, q_strides, k, k_strides, log, log_strides, b, h, t, inside, N, REP, Q, NB, CHANNEL, DOT, PRECISION
    )
    strength = numbers(beta, beta_strides, b, h, t, inside)[:, None]
    found = product(A, strength * rows(r, r_strides, b, h, t, inside, p, P), DOT, PRECISION)
    for start in range(0, N, NB):
        n = start + tl.arange(0, NB)
        G, _ = summed_decays(log, log_strides, b, h, t, inside, n, N, CHANNEL)
        qs = rows(q, q_strides, b, h // REP, t, inside, n, N) * tl.exp(G)
        at = state_block(S, (b * (chunks + 1) + c) * H + h, p, n, P, N)
        state = tl.load(at, mask=pairs(p, n, P, N), other=0.0)
        found += product(qs, tl.trans(state), DOT, PRECISION)
    store_rows(found, y, y_strides, b, h, t, inside, p, P)
