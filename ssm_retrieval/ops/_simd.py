"""Sixteen-lane vectors inside numba functions.

LLVM's auto-vectoriser gives up on the scan (a recurrence in time, many arrays that might alias), so the
kernels say what they want: `Vec` values of 16 floats, compiled to one AVX-512, two AVX2 or four NEON/SSE
registers by the LLVM that numba brings along. Only what the kernels use is here.

    load(array, i)  store(array, i, v)  spread(array, i)  prefetch(array, i)  fill(like, x)
    total(v)  fold8 fold4 fold2 fold1(v, w): in groups of 16, 8, 4, 2 lanes of v and w, first half + second
    store_totals(out, at, vectors, count)
    add sub mul div  fma(a, b, c) = a * b + c   vmax(v, w)  vabs(v)

Exponentials are in `_simd_exp.py`. A vector may also be wider, several registers of the machine at once:

    zeros(like, lanes)  load_as(array, i, v)  spread_as(array, i, v)  narrow(v), to sixteen lanes

`array` is 1-D, contiguous, float32 or float64, and decides the element type. Where it ends is not looked at,
unless numba's NUMBA_BOUNDSCHECK is set: then load, store and spread raise IndexError outside of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import config
from numba.core.datamodel import models as data_models
from numba.core.extending import intrinsic, register_model

from ssm_retrieval.ops import LANES
from ssm_retrieval.ops._compile import kernel

FLAGS = ("contract", "nsz", "arcp")  # fused multiply-add allowed, no reordering: results stay deterministic


class Vec(types.Type):
    def __init__(self, dtype: types.Float, lanes: int = LANES):
        self.dtype, self.lanes = dtype, lanes
        super().__init__(name=f"Vec{lanes}({dtype})")


def _element(dtype: types.Float) -> ir.Type:
    return ir.FloatType() if dtype == types.float32 else ir.DoubleType()


@register_model(Vec)
class _VecModel(data_models.PrimitiveModel):
    def __init__(self, manager: Any, vec: Vec):
        super().__init__(manager, vec, ir.VectorType(_element(vec.dtype), vec.lanes))


def const(vector: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


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


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, lanes: int) -> Any:
    address = _address(context, builder, array_type, array, index, lanes)
    return builder.bitcast(address, ir.VectorType(_element(array_type.dtype), lanes).as_pointer())


def _align(dtype: types.Float) -> int:
    return 4 if dtype == types.float32 else 8


def _load(vec: Vec) -> Any:
    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1], vec.lanes)
        return builder.load(pointer, align=_align(vec.dtype))

    return codegen


@intrinsic
def load(typing_context, array, index):
    vec = Vec(array.dtype)
    return vec(array, types.intp), _load(vec)


@intrinsic
def load_as(typing_context, array, index, like):
    """A vector as wide as `like`."""
    vec = Vec(array.dtype, like.lanes)
    return vec(array, types.intp, like), _load(vec)


@intrinsic
def store(typing_context, array, index, value):
    def codegen(context, builder, signature, args):
        lanes = signature.args[2].lanes
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1], lanes)
        builder.store(args[2], pointer, align=_align(signature.args[0].dtype))
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


def _all_lanes(builder: Any, value: Any, lanes: int = LANES) -> Any:
    vector = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), mask)


@intrinsic
def fill(typing_context, like, value):
    """All lanes equal to `value`, cast to the element type of the array `like`."""
    vec = Vec(like.dtype)

    def codegen(context, builder, signature, args):
        return _all_lanes(builder, args[1])

    return vec(like, vec.dtype), codegen


@intrinsic
def zeros(typing_context, like, lanes):
    """Zeros of the element type of the array `like`, LANES of them for each element of the tuple `lanes`."""
    vec = Vec(like.dtype, LANES * len(lanes))

    def codegen(context, builder, signature, args):
        return const(ir.VectorType(_element(vec.dtype), vec.lanes), 0.0)

    return vec(like, lanes), codegen


def _spread(vec: Vec) -> Any:
    def codegen(context, builder, signature, args):
        address = _address(context, builder, signature.args[0], args[0], args[1], 1)
        return _all_lanes(builder, builder.load(address), vec.lanes)

    return codegen


@intrinsic
def spread(typing_context, array, index):
    """All lanes equal to array[index], without numba's handling of negative indices."""
    vec = Vec(array.dtype)
    return vec(array, types.intp), _spread(vec)


@intrinsic
def spread_as(typing_context, array, index, like):
    """`spread` over a vector as wide as `like`."""
    vec = Vec(array.dtype, like.lanes)
    return vec(array, types.intp, like), _spread(vec)


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


def _halved(builder: Any, x: Any, width: int) -> Any:
    """First half + second half, until `width` lanes are left: always the same order."""
    while x.type.count > width:
        half = x.type.count // 2
        undef = ir.Constant(x.type, ir.Undefined)
        index = ir.VectorType(ir.IntType(32), half)
        low = builder.shuffle_vector(x, undef, ir.Constant(index, list(range(half))))
        high = builder.shuffle_vector(x, undef, ir.Constant(index, list(range(half, 2 * half))))
        x = builder.fadd(low, high)
    return x


@intrinsic
def total(typing_context, v):
    """Sum of the lanes, as a tree: always the same order."""

    def codegen(context, builder, signature, args):
        x = _halved(builder, args[0], 1)
        return builder.extract_element(x, ir.Constant(ir.IntType(32), 0))

    return v.dtype(v), codegen


@intrinsic
def narrow(typing_context, v):
    """Sums of the lanes that are sixteen apart: a vector of sixteen."""

    def codegen(context, builder, signature, args):
        return _halved(builder, args[0], LANES)

    return Vec(v.dtype)(v), codegen


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
        zero = const(args[0].type, 0.0)
        negative = builder.fcmp_ordered("<", args[0], zero)
        return builder.select(negative, builder.fsub(zero, args[0]), args[0])

    return a(a), codegen


@kernel(inline="always")
def aligned(size, like):
    """(size,) zeros of the element type of the array `like`, at the start of a line of the cache.

    A vector that reaches over two lines costs two accesses, and the states of a kernel hold nothing else.
    """
    raw = np.zeros(size + LANES, like.dtype)
    skip = -(raw.ctypes.data // raw.itemsize) % (64 // raw.itemsize)
    return raw[skip : skip + size]
