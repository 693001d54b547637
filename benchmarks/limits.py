"""What this machine can do at most, and how much of it each operator reaches.

    python -m benchmarks.limits [--quick]

Measured first: products of large square matrices (float32, bfloat16), copies of more than any cache holds,
and exponentials of what a cache holds, by `torch.exp`. An operator's floor is the longest of

    arithmetic of matrix products / the rate of its dtype
    bytes that must be read and written once / the rate of copies, or that must be read / that of a sum
    exponentials / the rate of exponentials

and its share is the floor over the time it takes; forward and backward, float32 unless a row says otherwise.
Of a scan the exponentials dominate: one for each token, channel and state, forward and again backward. The
last lines are the shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.common import command, finish, machine, parse, seconds
from ssm_retrieval.ops.attention import attention
from ssm_retrieval.ops.causal_conv1d import causal_conv1d
from ssm_retrieval.ops.cross_entropy import linear_cross_entropy
from ssm_retrieval.ops.delta_rule import delta_rule
from ssm_retrieval.ops.linear import linear
from ssm_retrieval.ops.memory import keep_freed_memory
from ssm_retrieval.ops.selective_scan import selective_scan
from ssm_retrieval.ops.ssd import ssd

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Row:
    """An operator's call and what it must do at least.

    Attributes:
        name: Of the row.
        call: What is timed.
        flops: Floating point operations of matrix products.
        bytes: Read and written once.
        read: Bytes that are read once, where next to nothing is written.
        exps: Exponentials.
        dtype: Of the products.
    """

    name: str
    call: Callable[[], Any]
    flops: float = 0.0
    bytes: float = 0.0
    read: float = 0.0
    exps: float = 0.0
    dtype: torch.dtype = torch.float32


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers that want a gradient."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def gradients(run: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> Callable[[], Any]:
    """A call of the forward and the backward pass."""
    return lambda: torch.autograd.grad(run().sum(), inputs)


def rates(side: int, copied: int, repeats: int) -> dict[str, float]:
    """The machine's rates: FLOP/s of products by dtype, bytes/s of a copy and of a sum, exponentials/s.

    Args:
        side: Of the square matrices.
        copied: Bytes of the copy.
        repeats: Rounds, of which the median counts.

    Returns:
        By "float32", "bfloat16", "copy", "read" and "exp".
    """
    found, small = {}, torch.randn(1 << 14)
    with torch.no_grad():
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
            found[name] = 2 * side**3 / seconds({"": partial(linear, a, b)}, repeats)[""]
        source, target = torch.ones(copied // FLOAT), torch.empty(copied // FLOAT)
        found["copy"] = 2 * copied / seconds({"": lambda: target.copy_(source)}, repeats)[""]
        found["read"] = copied / seconds({"": source.sum}, repeats)[""]
        many = 64 * torch.get_num_threads()  # each thread's part stays in its cache
        big = small.repeat(many)
        out = torch.empty_like(big)
        found["exp"] = big.numel() / seconds({"": lambda: torch.exp(big, out=out)}, repeats)[""]
    return found


def rows(batch: int, length: int, width: int) -> Iterator[Row]:
    """Yield every operator at the shapes of a model's layers: d_inner is twice the width, heads of 64."""
    B, L, D, E, N, P = batch, length, width, 2 * width, 16, 64
    H, V, tokens = D // P, 50280, batch * length
    x, weight = normal(B, L, D), normal(2 * E, D)
    products = 3 * 2 * tokens * D * 2 * E
    moved = FLOAT * 2 * (tokens * (D + 2 * E) + 2 * E * D)
    yield Row("linear", gradients(lambda: linear(x, weight), x, weight), products, moved)
    half, narrow = (t.detach().bfloat16().requires_grad_() for t in (x, weight))
    yield Row(
        "linear, bfloat16", gradients(lambda: linear(half, narrow), half, narrow), products, moved / 2,
        dtype=torch.bfloat16,
    )  # fmt: skip

    u, dt = normal(B, L, E), torch.nn.functional.softplus(normal(B, L, E) - 3).detach().requires_grad_()
    A = (-torch.arange(1.0, N + 1).repeat(E, 1)).requires_grad_()
    b, c = normal(B, L, N), normal(B, L, N)
    scan: Any = selective_scan
    # reads u and dt, writes y; then reads u, dt and y's gradient, writes two gradients; B and C are small
    yield Row(
        "selective scan", gradients(lambda: scan(u, dt, A, b, c), u, dt, A, b, c),
        bytes=FLOAT * 8 * tokens * E, exps=2 * tokens * E * N,
    )  # fmt: skip

    heads = normal(B, L, E // P, P)
    step = torch.nn.functional.softplus(normal(B, L, E // P) - 3).detach().requires_grad_()
    decay, keys, queries = (-torch.ones(E // P)).requires_grad_(), normal(B, L, 1, P), normal(B, L, 1, P)
    chunk = 64
    inner = 2 * tokens * E * (2 * P + chunk) + 2 * tokens * chunk * P  # states in and out, and within a chunk
    given = (heads, step, decay, keys, queries)
    yield Row(
        "SSD, 64 states", gradients(lambda: ssd(*given), *given),
        flops=3 * inner, bytes=FLOAT * 5 * tokens * E,
    )  # fmt: skip

    q, k, v = (normal(B, L, H, P) for _ in range(3))
    beta, log_decay = (
        normal(B, L, H).sigmoid().detach().requires_grad_(),
        (-0.1 * normal(B, L, H).abs()).detach(),
    )
    log_decay.requires_grad_()
    rule = 2 * tokens * H * P * P * 3  # what is recalled, what is written, what is read
    yield Row(
        "gated delta rule", gradients(lambda: delta_rule(q, k, v, beta, log_decay), q, k, v, beta, log_decay),
        flops=3 * rule, bytes=FLOAT * 10 * tokens * D,
    )  # fmt: skip

    taps, bias = normal(E, 4), normal(E)
    conv: Any = causal_conv1d
    yield Row(
        "causal convolution", gradients(lambda: conv(u, taps, bias, activation="silu"), u, taps, bias),
        bytes=FLOAT * 5 * tokens * E, exps=2 * tokens * E,
    )  # fmt: skip

    wide = (normal(B, H, L, P), normal(B, H, L, P), normal(B, H, L, P))
    pairs = tokens * L / 2  # causal
    yield Row(
        "attention, causal", gradients(lambda: attention(wide[0], wide[1], wide[2], causal=True), *wide),
        flops=7 * 2 * pairs * D, bytes=FLOAT * 11 * tokens * D, exps=2 * pairs * H,
    )  # fmt: skip

    last, table = normal(tokens, D), normal(V, D)
    labels = torch.randint(0, V, (tokens,), generator=torch.Generator().manual_seed(0))
    loss: Any = linear_cross_entropy
    yield Row(
        "cross-entropy of 50,280 tokens", gradients(lambda: loss(last, table, labels)[0], last, table),
        flops=3 * 2 * tokens * D * V, bytes=FLOAT * 2 * (tokens * D + V * D), exps=2 * tokens * V,
    )  # fmt: skip

    one, matrix = torch.randn(1, 4 * D).bfloat16(), torch.randn(8 * D, 4 * D).bfloat16()
    with torch.no_grad():
        yield Row(
            "one token's product, bfloat16, forward", lambda: linear(one, matrix), read=2 * matrix.numel(),
        )  # fmt: skip


def floor(row: Row, rate: dict[str, float]) -> tuple[float, str]:
    """Return the seconds that a row must take at least, and what takes them."""
    kind = str(row.dtype).removeprefix("torch.")
    each = {
        f"products in {kind}": row.flops / rate[kind],
        "copies": row.bytes / rate["copy"],
        "reading": row.read / rate["read"],
        "exponentials": row.exps / rate["exp"],
    }
    what = max(each, key=lambda name: each[name])
    return each[what], what


def main() -> None:
    """Run the benchmark."""
    full = dict(batch=4, length=1024, width=768, repeats=7, side=4096, copied=1 << 30)
    quick = dict(batch=1, length=128, width=128, repeats=1, side=256, copied=1 << 20)
    sizes = parse(command(__doc__), full, quick)
    keep_freed_memory()
    print(machine())
    rate = rates(sizes.side, sizes.copied, sizes.repeats)
    print(f"products of {sizes.side} x {sizes.side}: ", end="")
    print(f"float32 {rate['float32'] / 1e9:.0f}, bfloat16 {rate['bfloat16'] / 1e9:.0f} GFLOP/s; ", end="")
    print(
        f"copies {rate['copy'] / 1e9:.1f} GB/s read and written, reading {rate['read'] / 1e9:.1f} GB/s; ",
        end="",
    )
    print(f"{rate['exp'] / 1e9:.2f} billion exponentials/s")
    print(f"batch {sizes.batch}, length {sizes.length}, width {sizes.width}")
    shares, facts = {}, {}
    for row in rows(sizes.batch, sizes.length, sizes.width):
        took = seconds({"": row.call}, sizes.repeats)[""]
        least, what = floor(row, rate)
        print(
            f"  {row.name:40} {took * 1e3:9.2f} ms  floor {least * 1e3:9.2f} ms ({what})  {least / took:6.1%}"
        )
        key = row.name.replace(",", "").replace(" ", "_").replace("'", "")
        shares[f"share_{key}"] = least / took
        facts[row.name] = {"seconds": took, "floor": least, "by": what}
    finish(sizes, shares, rates=rate, facts=facts)


if __name__ == "__main__":
    main()
