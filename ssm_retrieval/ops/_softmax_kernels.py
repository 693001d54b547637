"""Rows of logits into their cross-entropy, arg-max and gradient, one pass over a row after the other.

A row's logits stay in the first-level cache between its three loops (maximum, exponentials and their sum,
scaling), where torch's separate operations read and write a block of rows each time.
"""

from __future__ import annotations

import numpy as np

from ssm_retrieval.ops import LANES
from ssm_retrieval.ops._compile import kernel
from ssm_retrieval.ops._simd import add, fill, load, mul, store, sub, total, vmax
from ssm_retrieval.ops._simd_exp import exp


@kernel(error_model="numpy")
def softmax_rows(rows, V, ignore, scale, logits, labels, loss, predictions):
    """Rows [first, stop) of logits (M, V), replaced by scale * (softmax - onehot(label)).

    loss: (M,) logsumexp - logit of the label, predictions: (M,) arg-max, the first of equals.
    A row whose label is `ignore` gets loss 0 and gradient 0.
    """
    whole = V - V % LANES
    zero, lanes = fill(logits, 0.0), np.empty(LANES, logits.dtype)
    for m in range(rows[0], rows[1]):
        start = m * V
        top = fill(logits, -np.inf)
        for j in range(0, whole, LANES):
            top = vmax(top, load(logits, start + j))
        store(lanes, 0, top)
        best = lanes.max()
        for j in range(whole, V):
            best = max(best, logits[start + j])
        predictions[m] = 0
        for j in range(V):
            if logits[start + j] == best:
                predictions[m] = j
                break
        label = labels[m]
        if label == ignore:
            loss[m] = 0.0
            for j in range(V):
                logits[start + j] = 0.0
            continue
        chosen = logits[start + label] - best
        shift, sums = fill(logits, best), zero
        for j in range(0, whole, LANES):
            e = exp(sub(load(logits, start + j), shift))
            sums = add(sums, e)
            store(logits, start + j, e)
        norm = total(sums)
        for j in range(whole, V):
            logits[start + j] = np.exp(logits[start + j] - best)
            norm += logits[start + j]
        loss[m] = np.log(norm) - chosen
        inverse = fill(logits, scale / norm)
        for j in range(0, whole, LANES):
            store(logits, start + j, mul(load(logits, start + j), inverse))
        for j in range(whole, V):
            logits[start + j] *= scale / norm
        logits[start + label] -= scale
