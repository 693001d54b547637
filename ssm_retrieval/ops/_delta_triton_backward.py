"""The backward kernels of the delta rule; notation and layouts of `_delta_triton_kernels.py`.

With dy, and D the gradient of the state that a chunk leaves, the gradient of its writes is

    du = A^T dy + (k exp(total - G)) D^T
    lam = du                              without erasure
    lam = du - K^T (beta du)              with it: that of V - (k exp(G)) S^T - M u

so that dv = beta lam and dbeta = lam . r, and the gradient of the state that the chunk began with is
D exp(total) + dy^T (q exp(G)) - (beta lam)^T (k exp(G)), the last term with erasure only. All that q, k and
the decays enter are A, M and the products with S and D, whose gradients are

    dA = dy u^T     dM = -(beta lam) u^T     d(q exp(G)) = dy S     d(k exp(G)) = -(beta lam) S
    d(k exp(total - G)) = u D                d exp(total) = sum_p S D

q_t and k_t come with exp(G_t) wherever token t is the later of a pair, and with exp(-G_t) where it is the
earlier: dG_t = q_t dq_t + k_t (dk_t as the later) - k_t (dk_t as the earlier). A token's log decay is in all
G from there on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssm_retrieval.ops._delta_triton_kernels import (
    between,
    numbers,
    pairs,
    place,
    product,
    rows,
    scores,
    square,
    state_block,
    store_rows,
    summed_decays,
    tokens_of,
)


@triton.jit(do_not_specialize=["L", "chunks"])
def write_gradients(
    q, q_strides, k, k_strides, log, log_strides, starts, dy, y_strides, D, lam, L, H, P, N, chunks,
    REP: tl.constexpr, ERASE: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
    CHANNEL: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """du of every chunk; with ERASE only A^T dy, the part that does not wait for D."""
    b, h, c = place(tl.program_id(0), chunks, H)
    p = tl.program_id(1) * PB + tl.arange(0, PB)
    t, inside = tokens_of(c, starts, L, Q, SPLIT)
    A = scores(
        q, q_strides, k, k_strides, log, log_strides, b, h, t, inside, N, REP, Q, NB, CHANNEL, DOT, PRECISION
    )
    found = product(tl.trans(A), rows(dy, y_strides, b, h, t, inside, p, P), DOT, PRECISION)
    if not ERASE:
        for start in range(0, N, NB):
            n = start + tl.arange(0, NB)
            G, total = summed_decays(log, log_strides, b, h, t, inside, n, N, CHANNEL)
            ks = rows(k, k_strides, b, h // REP, t, inside, n, N) * tl.exp(total - G)
            at = state_block(D, (b * chunks + c) * H + h, p, n, P, N)
            grad = tl.load(at, mask=pairs(p, n, P, N), other=0.0)
            found += product(ks, tl.trans(grad), DOT, PRECISION)
    store_rows(found, lam, y_strides, b, h, t, inside, p, P)


@triton.jit(do_not_specialize=["L", "chunks", "stored"])
def state_gradients(
    q, q_strides, k, k_strides, beta, beta_strides, log, log_strides, starts, slots, K, dy, y_strides, dlast,
    dstates, D, lam, dh0, L, H, P, N, chunks, stored, REP: tl.constexpr, ERASE: tl.constexpr,
    LAST: tl.constexpr, STORED: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
    CHANNEL: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """D of every chunk and the gradient of the first state; with ERASE (as in `states`) lam from A^T dy."""
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // H, pid % H
    p = tl.program_id(1) * PB + tl.arange(0, PB)
    n = tl.program_id(2) * NB + tl.arange(0, NB)
    there = pairs(p, n, P, N)
    if LAST:
        grad = tl.load(state_block(dlast, pid, p, n, P, N), mask=there, other=0.0)
    else:
        grad = tl.zeros((PB, NB), tl.float32)
    for i in range(chunks):
        c = chunks - 1 - i
        if STORED:  # slots[c]: which of the stored states the chunk ends with, or -1
            slot = tl.load(slots + c).to(tl.int64)
            if slot >= 0:
                at = state_block(dstates, (b * stored + slot) * H + h, p, n, P, N)
                grad += tl.load(at, mask=there, other=0.0)
        tl.store(state_block(D, (b * chunks + c) * H + h, p, n, P, N), grad, mask=there)
        t, inside = tokens_of(c, starts, L, Q, SPLIT)
        G, total = summed_decays(log, log_strides, b, h, t, inside, n, N, CHANNEL)
        qs = rows(q, q_strides, b, h // REP, t, inside, n, N) * tl.exp(G)
        dys = rows(dy, y_strides, b, h, t, inside, p, P)
        new = grad * tl.exp(total) + product(tl.trans(dys), qs, DOT, PRECISION)
        if ERASE:
            ks = rows(k, k_strides, b, h // REP, t, inside, n, N)
            strength = numbers(beta, beta_strides, b, h, t, inside)[:, None]
            du = rows(lam, y_strides, b, h, t, inside, p, P)
            du += product(ks * tl.exp(total - G), tl.trans(grad), DOT, PRECISION)
            found = tl.load(square(K, pid * chunks + c, Q))
            du -= product(tl.trans(found), strength * du, DOT, PRECISION)
            store_rows(du, lam, y_strides, b, h, t, inside, p, P)
            new -= product(tl.trans(strength * du), ks * tl.exp(G), DOT, PRECISION)
        grad = new
    tl.store(state_block(dh0, pid, p, n, P, N), grad, mask=there)


@triton.jit(do_not_specialize=["L", "chunks"])
def key_gradients(
    q, q_strides, k, k_strides, r, r_strides, beta, beta_strides, log, log_strides, starts, dy, y_strides,
    lam, S, D, dq, dk, dlog, B, L, H, P, N, chunks, REP: tl.constexpr, SHARED: tl.constexpr,
    ERASE: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, CHANNEL: tl.constexpr,
    SPLIT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of q, k and the log decays, for a block of N.

    A program takes SHARED heads with the same q and k: dq and dk are (batch, length, H / SHARED, N). dlog is
    (batch, length, H, N), or without CHANNEL (blocks of N, batch, length, H), each block's part of the sum.
    """
    b, g, c = place(tl.program_id(0), chunks, H // SHARED)
    n = tl.program_id(1) * NB + tl.arange(0, NB)
    t, inside = tokens_of(c, starts, L, Q, SPLIT)
    i = tl.arange(0, Q)
    qs = rows(q, q_strides, b, g * SHARED // REP, t, inside, n, N)
    ks = rows(k, k_strides, b, g * SHARED // REP, t, inside, n, N)
    all_q, all_k = tl.zeros((Q, NB), tl.float32), tl.zeros((Q, NB), tl.float32)
    for head in range(SHARED):
        h = g * SHARED + head
        G, total = summed_decays(log, log_strides, b, h, t, inside, n, N, CHANNEL)
        strength = numbers(beta, beta_strides, b, h, t, inside)[:, None]
        dA, dM = tl.zeros((Q, Q), tl.float32), tl.zeros((Q, Q), tl.float32)
        later_q, later_k = tl.zeros((Q, NB), tl.float32), tl.zeros((Q, NB), tl.float32)
        ends, carried = tl.zeros((Q, NB), tl.float32), tl.zeros((NB,), tl.float32)
        for start in range(0, P, PB):
            p = start + tl.arange(0, PB)
            dys = rows(dy, y_strides, b, h, t, inside, p, P)
            u = strength * rows(r, r_strides, b, h, t, inside, p, P)
            there = pairs(p, n, P, N)
            at = state_block(S, (b * (chunks + 1) + c) * H + h, p, n, P, N)
            state = tl.load(at, mask=there, other=0.0)
            at = state_block(D, (b * chunks + c) * H + h, p, n, P, N)
            grad = tl.load(at, mask=there, other=0.0)
            dA += product(dys, tl.trans(u), DOT, PRECISION)
            later_q += product(dys, state, DOT, PRECISION)
            ends += product(u, grad, DOT, PRECISION)
            carried += tl.sum(state * grad, 0)
            if ERASE:
                eta = strength * rows(lam, y_strides, b, h, t, inside, p, P)
                dM -= product(eta, tl.trans(u), DOT, PRECISION)
                later_k -= product(eta, state, DOT, PRECISION)
        later_q *= tl.exp(G)
        later_k *= tl.exp(G)
        ends *= tl.exp(total - G)
        carried = carried * tl.sum(tl.exp(total), 0) + tl.sum(ks * ends, 0)  # the sum drops an axis of size 1
        weight = between(G, Q, CHANNEL)
        dM = tl.where(i[:, None] > i[None, :], dM, 0.0)
        if CHANNEL:
            read, found = dA[:, :, None] * weight, dM[:, :, None] * weight
            later_q += tl.sum(read * ks[None, :, :], 1)
            ends += tl.sum(read * qs[:, None, :] + found * ks[:, None, :], 0)
            later_k += tl.sum(found * ks[None, :, :], 1)
        else:
            read, found = dA * weight, dM * weight
            later_q += product(read, ks, DOT, PRECISION)
            ends += product(tl.trans(read), qs, DOT, PRECISION)
            if ERASE:
                later_k += product(found, ks, DOT, PRECISION)
                ends += product(tl.trans(found), ks, DOT, PRECISION)
        all_q += later_q
        all_k += later_k + ends
        dG = qs * later_q + ks * (later_k - ends)
        if CHANNEL:
            to = dlog + ((b * L + t[:, None]) * H + h) * N + n[None, :]
            found = tl.cumsum(dG, 0, reverse=True) + carried[None, :]
            tl.store(to, found, mask=inside[:, None] & (n < N)[None, :])
        else:
            to = dlog + ((tl.program_id(1) * B + b) * L + t) * H + h
            tl.store(to, tl.cumsum(tl.sum(dG, 1), 0, reverse=True) + tl.sum(carried, 0), mask=inside)
    to = ((b * L + t[:, None]) * (H // SHARED) + g) * N + n[None, :]
    there = inside[:, None] & (n < N)[None, :]
    tl.store(dq + to, all_q, mask=there)
    tl.store(dk + to, all_k, mask=there)
