"""Sixteen-lane vectors inside numba functions.

LLVM's auto-vectoriser gives up on the scan (a recurrence in time, many arrays that might alias), so the
kernels say what they want: `Vec` values of 16 floats, compiled to one AVX-512, two AVX2 or four NEON/SSE
registers by the LLVM that numba brings along. Only what the kernels use is here.

    load(array, i)  store(array, i, v)  spread(array, i)  prefetch(array, i)  fill(like, x)
    total(v)  fold8 fold4 fold2 fold1(v, w): in groups of 16, 8, 4, 2 lanes of v and w, first half + second
    store_totals(out, at, vectors, count)
    add sub mul div  fma(a, b, c) = a * b + c   vmax(v, w)  vabs(v)
    exp(v)  exp2(v)  log1p01(v), 0 <= v <= 1   sigmoid(like, v)

`array` is 1-D, contiguous, float32 or float64, and decides the element type. Where it ends is not looked at,
unless numba's NUMBA_BOUNDSCHECK is set: then load, store and spread raise IndexError outside of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import config
from numba.core.datamodel import models as data_models
from numba.core.extending import intrinsic, register_model

from ssm_retrieval.ops import LANES
from ssm_retrieval.ops._compile import kernel

FLAGS = ("contract", "nsz", "arcp")  # fused multiply-add allowed, no reordering: results stay deterministic


class Vec(types.Type):
    def __init__(self, dtype: types.Float):
        self.dtype = dtype
        super().__init__(name=f"Vec{LANES}({dtype})")


def _element(dtype: types.Float) -> ir.Type:
    return ir.FloatType() if dtype == types.float32 else ir.DoubleType()


@register_model(Vec)
class _VecModel(data_models.PrimitiveModel):
    def __init__(self, manager: Any, vec: Vec):
        super().__init__(manager, vec, ir.VectorType(_element(vec.dtype), LANES))


def _const(vector: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * LANES)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any, width: int) -> Any:
    """Address of array[index], where `width` elements are wanted; 0 may lie anywhere."""
    struct = context.make_array(array_type)(context, builder, array)
    if config.BOUNDSCHECK and width:
        stop = builder.add(index, ir.Constant(index.type, width))
        negative = builder.icmp_signed("<", index, ir.Constant(index.type, 0))
        outside = builder.or_(negative, builder.icmp_signed(">", stop, struct.nitems))
        with builder.if_then(outside, likely=False):
            context.call_conv.return_user_exc(builder, IndexError, ("a vector reaches outside of its array",))
    return builder.gep(struct.data, [index])


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    address = _address(context, builder, array_type, array, index, LANES)
    return builder.bitcast(address, ir.VectorType(_element(array_type.dtype), LANES).as_pointer())


def _align(dtype: types.Float) -> int:
    return 4 if dtype == types.float32 else 8


@intrinsic
def load(typing_context, array, index):
    vec = Vec(array.dtype)

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], *args)
        return builder.load(pointer, align=_align(vec.dtype))

    return vec(array, types.intp), codegen


@intrinsic
def store(typing_context, array, index, value):
    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1])
        builder.store(args[2], pointer, align=_align(signature.args[0].dtype))
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


def _all_lanes(builder: Any, value: Any) -> Any:
    vector = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), mask)


@intrinsic
def fill(typing_context, like, value):
    """All lanes equal to `value`, cast to the element type of the array `like`."""
    vec = Vec(like.dtype)

    def codegen(context, builder, signature, args):
        return _all_lanes(builder, args[1])

    return vec(like, vec.dtype), codegen


@intrinsic
def spread(typing_context, array, index):
    """All lanes equal to array[index], without numba's handling of negative indices."""

    def codegen(context, builder, signature, args):
        return _all_lanes(builder, builder.load(_address(context, builder, signature.args[0], *args, 1)))

    return Vec(array.dtype)(array, types.intp), codegen


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of array[index]; the index may lie outside the array.

    Rows are a page apart or nearly so, where hardware prefetchers see no pattern.
    """

    def codegen(context, builder, signature, args):
        address = _address(context, builder, signature.args[0], *args, 0)
        pointer = builder.bitcast(address, ir.IntType(8).as_pointer())
        int32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, int32, int32, int32])
        function = builder.module.declare_intrinsic("llvm.prefetch", (pointer.type,), kind)
        builder.call(function, [pointer, *(ir.Constant(int32, v) for v in (0, 3, 1))])  # read, keep, data
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


@intrinsic
def total(typing_context, v):
    """Sum of the lanes, as a tree: always the same order."""

    def codegen(context, builder, signature, args):
        x, width = args[0], LANES
        while width > 1:
            width //= 2
            undef = ir.Constant(x.type, ir.Undefined)
            index = ir.VectorType(ir.IntType(32), width)
            low = builder.shuffle_vector(x, undef, ir.Constant(index, list(range(width))))
            high = builder.shuffle_vector(x, undef, ir.Constant(index, list(range(width, 2 * width))))
            x = builder.fadd(low, high)
        return builder.extract_element(x, ir.Constant(ir.IntType(32), 0))

    return v.dtype(v), codegen


def _fold(width: int) -> Any:
    @intrinsic
    def operation(typing_context, a, b):
        def codegen(context, builder, signature, args):
            starts = range(0, 2 * LANES, 2 * width)  # of the groups of both vectors

            def lanes(first: int) -> Any:
                index = [start + first + i for start in starts for i in range(width)]
                mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), index)
                return builder.shuffle_vector(args[0], args[1], mask)

            return builder.fadd(lanes(0), lanes(width))

        return a(a, b), codegen

    return operation


fold8, fold4, fold2, fold1 = (_fold(width) for width in (8, 4, 2, 1))


@kernel(inline="always")
def _four(vectors, i):
    """Four sums of each of four vectors."""
    first = fold8(load(vectors, i), load(vectors, i + LANES))
    return fold4(first, fold8(load(vectors, i + 2 * LANES), load(vectors, i + 3 * LANES)))


@kernel(inline="always")
def store_totals(out, at, vectors, count):
    """out[at + n] = total(vectors[16 n : 16 n + 16]) for n < count, sixteen at a time."""
    for n in range(0, count - count % LANES, LANES):
        i = n * LANES
        a = _four(vectors, i)
        b = _four(vectors, i + 4 * LANES)
        c = _four(vectors, i + 8 * LANES)
        d = _four(vectors, i + 12 * LANES)
        store(out, at + n, fold1(fold2(a, b), fold2(c, d)))
    for n in range(count - count % LANES, count):
        out[at + n] = total(load(vectors, n * LANES))


def _binary(method: str) -> Any:
    @intrinsic
    def operation(typing_context, a, b):
        def codegen(context, builder, signature, args):
            return getattr(builder, method)(args[0], args[1], flags=FLAGS)

        return a(a, b), codegen

    return operation


add, sub, mul, div = (_binary(m) for m in ("fadd", "fsub", "fmul", "fdiv"))


@intrinsic
def fma(typing_context, a, b, c):
    def codegen(context, builder, signature, args):
        return builder.fadd(builder.fmul(args[0], args[1], flags=FLAGS), args[2], flags=FLAGS)

    return a(a, b, c), codegen


@intrinsic
def vmax(typing_context, a, b):
    def codegen(context, builder, signature, args):
        greater = builder.fcmp_ordered(">", args[0], args[1])
        return builder.select(greater, args[0], args[1])

    return a(a, b), codegen


@intrinsic
def vabs(typing_context, a):
    def codegen(context, builder, signature, args):
        zero = _const(args[0].type, 0.0)
        negative = builder.fcmp_ordered("<", args[0], zero)
        return builder.select(negative, builder.fsub(zero, args[0]), args[0])

    return a(a), codegen


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
    bottom, top = _const(x.type, low), _const(x.type, high)
    x = builder.select(builder.fcmp_ordered("<", x, bottom), bottom, x)
    return builder.select(builder.fcmp_ordered(">", x, top), top, x)


def _polynomial_times_power(builder: Any, coefficients: list[float], r: Any, shifted: Any, c: Any) -> Any:
    """polynomial(r) * 2^k, the integer k in the lowest bits of `shifted`: added to the exponent bits."""
    ints = ir.VectorType(ir.IntType(c.bits), LANES)
    p = _const(r.type, coefficients[-1])
    for term in coefficients[-2::-1]:
        p = builder.fadd(builder.fmul(p, r, flags=FLAGS), _const(r.type, term), flags=FLAGS)
    exponent = builder.shl(builder.bitcast(shifted, ints), ir.Constant(ints, [c.mantissa] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(p, ints), exponent), r.type)


@intrinsic
def exp(typing_context, a):
    """exp(x) = 2^k exp(r), x = k ln 2 + r, |r| <= ln(2) / 2, by a polynomial; error about 1 ulp."""
    c = _EXP[a.dtype]

    def codegen(context, builder, signature, args):
        floats = args[0].type
        x = _clamp(builder, args[0], c.low * math.log(2), c.high * math.log(2))
        magic = _const(floats, c.magic)
        shifted = builder.fadd(builder.fmul(x, _const(floats, math.log2(math.e))), magic)
        k, r = builder.fsub(shifted, magic), x
        for part in c.ln2:
            r = builder.fadd(builder.fmul(k, _const(floats, -part), flags=FLAGS), r, flags=FLAGS)
        return _polynomial_times_power(builder, c.coefficients(math.e), r, shifted, c)

    return a(a), codegen


@intrinsic
def exp2(typing_context, a):
    """2^x = 2^k 2^r, x = k + r, |r| <= 1/2: cheaper than exp, because k + r needs no multiplication."""
    c = _EXP[a.dtype]

    def codegen(context, builder, signature, args):
        x = _clamp(builder, args[0], c.low, c.high)
        magic = _const(x.type, c.magic)
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
        s = builder.fdiv(args[0], builder.fadd(args[0], _const(vector, 2.0)))
        s2 = builder.fmul(s, s)
        p = _const(vector, 2.0 / (2 * terms + 1))
        for k in reversed(range(terms)):
            p = builder.fadd(builder.fmul(p, s2, flags=FLAGS), _const(vector, 2.0 / (2 * k + 1)), flags=FLAGS)
        return builder.fmul(p, s)

    return a(a), codegen


@kernel(inline="always")
def sigmoid(like, v):
    """1 / (1 + e^-v)."""
    one = fill(like, 1.0)
    return div(one, add(one, exp(sub(fill(like, 0.0), v))))
