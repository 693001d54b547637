"""Depthwise causal convolution with an optional silu, forward and backward, 16 channels at a time.

Layout (batch, tokens, channels) throughout, so the transposes that torch's conv1d needs disappear.
weight: (taps, channels), the last tap on the current token. before: (batch, taps - 1, channels), the inputs
that precede the sequence, or empty for zeros. Tasks are (sequence, block of 16 channels); each first copies
its inputs, `before` in front, into a buffer that stays in the cache, so no loop has to ask where it starts.
"""

from __future__ import annotations

from ssm_retrieval.ops import LANES
from ssm_retrieval.ops._compile import kernel
from ssm_retrieval.ops._simd import add, aligned, fill, fma, load, mul, store, sub
from ssm_retrieval.ops._simd_exp import sigmoid


@kernel()
def _gather(inputs, x, before, b, c0, L, K, E):
    """inputs[s] = the 16 channels of token s - (K - 1), for s < L + K - 1."""
    for s in range(K - 1):
        kept = load(before, (b * (K - 1) + s) * E + c0) if before.size else fill(x, 0.0)
        store(inputs, s * LANES, kept)
    for t in range(L):
        store(inputs, (K - 1 + t) * LANES, load(x, (b * L + t) * E + c0))


@kernel(error_model="numpy")
def conv_forward(tasks, sizes, silu, x, weight, bias, before, y):
    """y_t = bias + sum_k weight[k] x[t - K + 1 + k], then silu."""
    L, blocks, K = sizes
    E = blocks * LANES
    inputs = aligned((L + K) * LANES, x)
    for task in range(tasks[0], tasks[1]):
        b, c0 = task // blocks, task % blocks * LANES
        _gather(inputs, x, before, b, c0, L, K, E)
        shift = load(bias, c0)
        for t in range(L):
            out = shift
            for k in range(K):
                out = fma(load(weight, k * E + c0), load(inputs, (t + k) * LANES), out)
            if silu:
                out = mul(out, sigmoid(x, out))
            store(y, (b * L + t) * E + c0, out)


@kernel(error_model="numpy")
def conv_backward(tasks, sizes, silu, x, weight, bias, before, gy, dx, dweight, dbias, dbefore):
    """dweight: (batch, taps, channels), dbias: (batch, channels), to be summed over the batch."""
    L, blocks, K = sizes
    E = blocks * LANES
    zero, one = fill(x, 0.0), fill(x, 1.0)
    inputs = aligned((L + K) * LANES, x)
    grads = aligned((L + 2 * K) * LANES, x)  # of the sums before silu, K - 1 zeros at either end
    for task in range(tasks[0], tasks[1]):
        b, c0 = task // blocks, task % blocks * LANES
        _gather(inputs, x, before, b, c0, L, K, E)
        shift, sum_bias = load(bias, c0), zero
        for t in range(L):
            g = load(gy, (b * L + t) * E + c0)
            if silu:  # the derivative is s (1 + v (1 - s)) with s = sigmoid(v)
                out = shift
                for k in range(K):
                    out = fma(load(weight, k * E + c0), load(inputs, (t + k) * LANES), out)
                s = sigmoid(x, out)
                g = mul(g, mul(s, add(one, mul(out, sub(one, s)))))
            sum_bias = add(sum_bias, g)
            store(grads, (t + K - 1) * LANES, g)
        store(dbias, b * E + c0, sum_bias)
        for k in range(K):
            total = zero
            for t in range(L):
                total = fma(load(grads, (t + K - 1) * LANES), load(inputs, (t + k) * LANES), total)
            store(dweight, (b * K + k) * E + c0, total)
        for s in range(L + K - 1):  # input s entered the outputs s - k
            d = zero
            for k in range(K):
                d = fma(load(weight, k * E + c0), load(grads, (s - k + K - 1) * LANES), d)
            if s >= K - 1:
                store(dx, (b * L + s - K + 1) * E + c0, d)
            elif before.size:
                store(dbefore, (b * (K - 1) + s) * E + c0, d)
