"""Depthwise causal convolution with an optional silu, forward and backward, 16 channels at a time.

Layout (batch, tokens, channels) throughout, so the transposes that torch's conv1d needs disappear.
weight: (taps, channels), the last tap on the current token. before: (batch, taps - 1, channels), the inputs
that precede the sequence, or empty for zeros. Tasks are (sequence, block of 16 channels).
"""

from __future__ import annotations

from numba import njit

from models.ops._simd import LANES, add, div, exp, fill, fma, load, mul, store, sub


@njit(cache=True, nogil=True, inline="always")
def _input(x, before, b, t, L, K, E, c0):
    """x at token t, which may be negative: then it lies in `before`."""
    if t >= 0:
        return load(x, (b * L + t) * E + c0)
    if before.size == 0:
        return fill(x, 0.0)
    return load(before, (b * (K - 1) + K - 1 + t) * E + c0)


@njit(cache=True, nogil=True, inline="always")
def _sigmoid(x, v):
    one = fill(x, 1.0)
    return div(one, add(one, exp(sub(fill(x, 0.0), v))))


@njit(cache=True, nogil=True, error_model="numpy")
def conv_forward(tasks, sizes, silu, x, weight, bias, before, y):
    """y_t = bias + sum_k weight[k] x[t - K + 1 + k], then silu."""
    L, blocks, K = sizes
    E = blocks * LANES
    for task in range(tasks[0], tasks[1]):
        b, c0 = task // blocks, task % blocks * LANES
        for t in range(L):
            out = load(bias, c0)
            for k in range(K):
                out = fma(load(weight, k * E + c0), _input(x, before, b, t - K + 1 + k, L, K, E, c0), out)
            if silu:
                out = mul(out, _sigmoid(x, out))
            store(y, (b * L + t) * E + c0, out)


@njit(cache=True, nogil=True, error_model="numpy")
def conv_backward(tasks, sizes, silu, x, weight, bias, before, gy, dx, dweight, dbias, dbefore):
    """dweight: (batch, taps, channels), dbias: (batch, channels), to be summed over the batch.

    dx and dbefore arrive as zeros and collect gradient * weight from every output that read them.
    """
    L, blocks, K = sizes
    E = blocks * LANES
    zero, one = fill(x, 0.0), fill(x, 1.0)
    for task in range(tasks[0], tasks[1]):
        b, c0 = task // blocks, task % blocks * LANES
        for k in range(K):
            store(dweight, (b * K + k) * E + c0, zero)
        sum_bias = zero
        for t in range(L):
            g = load(gy, (b * L + t) * E + c0)
            if silu:
                out = load(bias, c0)
                for k in range(K):
                    out = fma(load(weight, k * E + c0), _input(x, before, b, t - K + 1 + k, L, K, E, c0), out)
                s = _sigmoid(x, out)
                g = mul(g, mul(s, add(one, mul(out, sub(one, s)))))
            sum_bias = add(sum_bias, g)
            for k in range(K):
                source = t - K + 1 + k
                at = (b * K + k) * E + c0
                store(dweight, at, fma(g, _input(x, before, b, source, L, K, E, c0), load(dweight, at)))
                w = load(weight, k * E + c0)
                if source >= 0:
                    at = (b * L + source) * E + c0
                    store(dx, at, fma(g, w, load(dx, at)))
                elif before.size > 0:
                    at = (b * (K - 1) + K - 1 + source) * E + c0
                    store(dbefore, at, fma(g, w, load(dbefore, at)))
        store(dbias, b * E + c0, sum_bias)
