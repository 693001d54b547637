"""Exponentials of the vectors of `_simd.py`, by polynomials: the same bits on every processor.

exp(v)  exp2(v)  log1p01(v), 0 <= v <= 1   sigmoid(like, v)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic

from ssm_retrieval.ops import LANES
from ssm_retrieval.ops._compile import kernel
from ssm_retrieval.ops._simd import FLAGS, add, const, div, fill, sub


@dataclass(frozen=True)
class _ExpConstants:
    low: float  # exponents of 2 are clamped to [low, high], the range of normal results
    high: float
    ln2: tuple[float, float]  # in two parts, the first exact in few bits: the remainder keeps precision
    degree: int  # of the polynomial for 2^r, |r| <= 1/2: the error is below the rounding of the type
    bits: int
    mantissa: int

    @property
    def magic(self) -> float:
        """Adding it rounds to an integer, which then stands in the lowest bits."""
        return 1.5 * 2.0**self.mantissa

    def coefficients(self, base: float) -> list[float]:
        """Power series of base^r, lowest power first; the result is 1 at r = 0 exactly."""
        return [math.log(base) ** n / math.factorial(n) for n in range(self.degree + 1)]


_EXP = {
    types.float32: _ExpConstants(-126.0, 127.0, (0.693359375, -2.12194440e-4), 6, 32, 23),
    types.float64: _ExpConstants(-1022.0, 1023.0, (0.6931471803691238, 1.9082149292705877e-10), 13, 64, 52),
}


def _clamp(builder: Any, x: Any, low: float, high: float) -> Any:
    bottom, top = const(x.type, low), const(x.type, high)
    x = builder.select(builder.fcmp_ordered("<", x, bottom), bottom, x)
    return builder.select(builder.fcmp_ordered(">", x, top), top, x)


def _polynomial_times_power(builder: Any, coefficients: list[float], r: Any, shifted: Any, c: Any) -> Any:
    """polynomial(r) * 2^k, the integer k in the lowest bits of `shifted`: added to the exponent bits."""
    ints = ir.VectorType(ir.IntType(c.bits), LANES)
    p = const(r.type, coefficients[-1])
    for term in coefficients[-2::-1]:
        p = builder.fadd(builder.fmul(p, r, flags=FLAGS), const(r.type, term), flags=FLAGS)
    exponent = builder.shl(builder.bitcast(shifted, ints), ir.Constant(ints, [c.mantissa] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(p, ints), exponent), r.type)


@intrinsic
def exp(typing_context, a):
    """exp(x) = 2^k exp(r), x = k ln 2 + r, |r| <= ln(2) / 2, by a polynomial; error about 1 ulp."""
    c = _EXP[a.dtype]

    def codegen(context, builder, signature, args):
        floats = args[0].type
        x = _clamp(builder, args[0], c.low * math.log(2), c.high * math.log(2))
        magic = const(floats, c.magic)
        shifted = builder.fadd(builder.fmul(x, const(floats, math.log2(math.e))), magic)
        k, r = builder.fsub(shifted, magic), x
        for part in c.ln2:
            r = builder.fadd(builder.fmul(k, const(floats, -part), flags=FLAGS), r, flags=FLAGS)
        return _polynomial_times_power(builder, c.coefficients(math.e), r, shifted, c)

    return a(a), codegen


@intrinsic
def exp2(typing_context, a):
    """2^x = 2^k 2^r, x = k + r, |r| <= 1/2: cheaper than exp, because k + r needs no multiplication."""
    c = _EXP[a.dtype]

    def codegen(context, builder, signature, args):
        x = _clamp(builder, args[0], c.low, c.high)
        magic = const(x.type, c.magic)
        shifted = builder.fadd(x, magic)
        r = builder.fsub(x, builder.fsub(shifted, magic))
        return _polynomial_times_power(builder, c.coefficients(2.0), r, shifted, c)

    return a(a), codegen


@intrinsic
def log1p01(typing_context, a):
    """log(1 + a) for 0 <= a <= 1: 2 artanh(s), s = a / (2 + a) <= 1/3, by its power series."""

    def codegen(context, builder, signature, args):
        vector = args[0].type
        terms = 8 if a.dtype == types.float32 else 17
        s = builder.fdiv(args[0], builder.fadd(args[0], const(vector, 2.0)))
        s2 = builder.fmul(s, s)
        p = const(vector, 2.0 / (2 * terms + 1))
        for k in reversed(range(terms)):
            p = builder.fadd(builder.fmul(p, s2, flags=FLAGS), const(vector, 2.0 / (2 * k + 1)), flags=FLAGS)
        return builder.fmul(p, s)

    return a(a), codegen


@kernel(inline="always")
def sigmoid(like, v):
    """1 / (1 + e^-v)."""
    one = fill(like, 1.0)
    return div(one, add(one, exp(sub(fill(like, 0.0), v))))
