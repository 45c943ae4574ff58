"""Random numbers without a state.

In: a key (two words) and a counter. Out: bits that are a pure function of key, counter and the element's place, the same on every
backend. A network's key is its seed folded with the step; a loop folds in the time; each use in the program text has a stream of
its own. Nothing is drawn in an order, so nothing depends on threads, and a backward pass that recomputes gets the same numbers.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011: Philox-4x32-10.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import numpy as np

from ..errors import ShapeError, UsageError
from ..graph.node import OPS, Array, Op, Rows, Type
from ..graph.trace import Trace, apply, is_traced, located, type_of
from .call import composition
from .elementwise import convert

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_START = np.zeros((), np.uint32)


def philox(counter: Sequence[Array], key: Sequence[int]) -> list[Array]:
    """Four words of 32 bits for each counter of four words (uint64 arrays that hold 32 bits)."""
    c0, c1, c2, c3 = counter
    k0, k1 = (int(k) for k in key)
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def _infer(key: Type, offset: Type, *, shape: tuple[int, ...], stream: int) -> Type:
    if key.shape != (2,) or key.dtype != np.uint32 or offset.shape != () or offset.dtype != np.uint32:
        raise ShapeError(f"random bits take a key of two uint32 and a counter of one, not {key} and {offset}")
    return Type(tuple(shape), np.dtype(np.uint32))


def _value(key: Array, offset: Array, *, shape: tuple[int, ...], stream: int) -> Array:
    """Element e of row r (the first axis) is word e % 4 of Philox(e // 4, r, counter, stream)."""
    rows, width = (shape[0], prod(shape[1:])) if shape else (1, 1)
    groups = -(-width // 4)
    word = [
        np.tile(np.arange(groups, dtype=np.uint64), rows),
        np.repeat(np.arange(rows, dtype=np.uint64), groups),
        np.full(rows * groups, int(offset), np.uint64),
        np.full(rows * groups, stream, np.uint64),
    ]
    bits = np.stack(philox(word, key.tolist()), axis=-1).reshape(rows, groups * 4)[:, :width]
    return bits.astype(np.uint32).reshape(shape)


def _rows(rows: Sequence[Rows], types: Sequence[Type], **attrs: Any) -> Rows:
    return "mixed"  # a key that differs by rows has no meaning


def _examples(r: np.random.Generator) -> Iterable[Any]:
    yield [np.array([1, 2], np.uint32), np.uint32(3)], {"shape": (2, 5), "stream": 4}


OPS.add("random_bits", Op("random_bits", _infer, _value, (None, None), _rows, _examples, smooth=False))


def key_of(seed: int) -> Array:
    """A key from a non-negative integer.

    Raises: `UsageError` for anything else.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= int(seed) < 2**64:
        raise UsageError(f"a seed is an integer from 0 to 2**64 - 1, not {seed!r}")
    return np.array([int(seed) & 0xFFFFFFFF, int(seed) >> 32], np.uint32)


def fold_in(key: Any, number: Any) -> Any:
    """A new key from a key and an integer: for a step, or a time within a loop."""
    return apply("random_bits", key, convert(number, np.uint32), shape=(2,), stream=0)


def _bits(shape: tuple[int, ...], seed: Any) -> Any:
    if seed is not None:
        key = key_of(seed) if not is_traced(seed) else None
        if key is None:
            key = fold_in(np.zeros(2, np.uint32), seed)
        return lambda part: apply("random_bits", key, _START, shape=shape, stream=1 + part)
    trace = Trace.current()
    key = trace.random_key() if trace is not None else None
    if trace is None or key is None:
        raise UsageError(located("cr.random outside a network needs a seed: cr.random.normal(shape, seed=0)"))
    stream = trace.next_stream()
    return lambda part: apply("random_bits", key, _START, shape=shape, stream=4 * stream + part)


def _shape(shape: Any) -> tuple[int, ...]:
    return (int(shape),) if isinstance(shape, (int, np.integer)) else tuple(int(n) for n in shape)


@composition("unit_interval", examples=lambda r: [([r.integers(0, 2**32, 7, dtype=np.uint32)], {})], smooth=False)
def unit_interval(bits: Any) -> Any:
    """The top 24 bits as a float32 number in [0, 1)."""
    return np.right_shift(bits, np.array(8, np.uint32)).astype(np.float32) * 2.0**-24


@composition("unit_interval64", examples=lambda r: [([r.integers(0, 2**32, 7, dtype=np.uint32)] * 2, {})], smooth=False)
def unit_interval64(high: Any, low: Any) -> Any:
    """53 bits of two words as a float64 number in [0, 1)."""
    top = np.right_shift(high, np.array(5, np.uint32)).astype(np.float64) * 2.0**26
    return (top + np.right_shift(low, np.array(6, np.uint32)).astype(np.float64)) * 2.0**-53


def uniform(shape: Any = (), low: Any = 0.0, high: Any = 1.0, *, seed: int | None = None, dtype: Any = np.float32) -> Any:
    """Uniform numbers in [low, high).

    Args: shape; low, high numbers or arrays that broadcast to it; seed needed outside a network, where it must be given;
    dtype float32 or float64. Returns: an array of `shape`.

    >>> uniform(2, seed=0).shape
    (2,)
    """
    shape, bits = _shape(shape), _bits(_shape(shape), seed)
    dtype = _float(dtype)
    u = unit_interval64(bits(0), bits(1)) if dtype == np.float64 else unit_interval(bits(0))
    return (
        _plain(u, dtype)
        if (type(low), low, type(high), high) == (float, 0.0, float, 1.0)
        else _plain(low + (high - low) * u, dtype)
    )


def normal(shape: Any = (), mean: Any = 0.0, std: Any = 1.0, *, seed: int | None = None, dtype: Any = np.float32) -> Any:
    """Normally distributed numbers, by Box and Muller's transform of two uniform ones (Annals of Math. Statistics 29, 1958).

    >>> float(abs(normal((10000,), seed=1).mean())) < 0.05
    True
    """
    shape, bits = _shape(shape), _bits(_shape(shape), seed)
    dtype = _float(dtype)
    if dtype == np.float64:
        u, v = unit_interval64(bits(0), bits(1)), unit_interval64(bits(2), bits(3))
    else:
        u, v = unit_interval(bits(0)), unit_interval(bits(1))
    radius = np.sqrt(-2.0 * np.log1p(-u))  # 1 - u lies in (0, 1]
    return _plain(mean + std * (radius * np.cos(2 * math.pi * v)), dtype)


def bernoulli(shape: Any = (), p: Any = 0.5, *, seed: int | None = None) -> Any:
    """True with probability `p` (a number or an array that broadcasts to `shape`).

    >>> bool(bernoulli((3,), 1.0, seed=0).all())
    True
    """
    return np.less(unit_interval(_bits(_shape(shape), seed)(0)), convert(p, np.float32))


def _float(dtype: Any) -> Any:
    if np.dtype(dtype) not in (np.dtype("f4"), np.dtype("f8")):
        raise UsageError(located(f"random numbers come as float32 or float64, not {np.dtype(dtype)}"))
    return np.dtype(dtype)


def _plain(x: Any, dtype: Any) -> Any:
    return convert(x, dtype) if type_of(x).dtype != dtype else x
