"""The numbers of an example: equations computed by NumPy, as they stand.

In: equations and the arrays of the inputs. Out: an array for each name. Loops run step by step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..graph.node import OPS
from ..ops.random import unit_interval, unit_interval64
from .equations import Item, Loop, added
from .terms import Function, Index, Term, Terms, Var, matrix_product, walk

Array = Any


class Values:
    """Values of variables; `steps` holds those that belong to steps of loops."""

    def __init__(self, terms: Terms, given: Mapping[Var, Array]) -> None:
        self.terms = terms
        self.whole: dict[Var, Array] = dict(given)
        self.steps: dict[Var, dict[tuple[int, ...], Array]] = {}
        self.counters: dict[Index, int] = {}

    def run(self, items: Sequence[Item]) -> None:
        with np.errstate(all="ignore"):
            self._run(items)

    def _run(self, items: Sequence[Item]) -> None:
        for item in items:
            if isinstance(item, Loop):
                first, last = item.span
                for step in range(first, last - 1, -1) if item.reverse else range(first, last + 1):
                    self.counters[item.index] = step
                    self._run(item.items)
                self.counters.pop(item.index, None)
                continue
            var = item.var
            if item.mode == "add":
                self._set(var, self._sum_key(var), self._get(var, self._sum_key(var)) + self.term(added(self.terms, item)))
            elif var.role == "sum":
                self._set(var, self._sum_key(var), self.term(item.term))
            else:
                self._set(var, tuple(k if ix is None else self.counters[ix] + k for ix, k in item.left), self.term(item.term))

    def _sum_key(self, var: Var) -> tuple[int, ...]:
        return tuple(self.counters[ix] for ix in var.indices[:-1])

    def _set(self, var: Var, key: tuple[int, ...], value: Array) -> None:
        if key:
            self.steps.setdefault(var, {})[key] = value
        else:
            self.whole[var] = value

    def _get(self, var: Var, key: tuple[int, ...]) -> Array:
        return self.steps[var][key] if key else self.whole[var]

    def of(self, var: Var) -> Array | None:
        """All values of a variable as one array: a first axis for each loop around it. None if it was not computed."""
        if var in self.whole:
            return self.whole[var]
        return self._stack(var, (), 0) if var in self.steps else None

    def _stack(self, var: Var, key: tuple[int, ...], offset: int) -> Array:
        loops = var.indices[:-1] if var.role == "sum" else var.indices
        if len(key) == len(loops):
            return self.steps[var][key]
        last = len(key) == len(loops) - 1
        return np.stack([self._stack(var, (*key, i + (offset if last else 0)), offset) for i in range(loops[len(key)].length)])

    # ---- terms ---------------------------------------------------------------------------------------------------------------

    def term(self, t: Term) -> Array:
        done: dict[Term, Array] = {}
        for each in walk(t):
            done[each] = self._one(each, [done[a] for a in each.args])
        return np.asarray(done[t])

    def _one(self, t: Term, args: list[Array]) -> Array:
        method = getattr(self, f"_{t.op}", None)
        if method is not None:
            return method(t, *args)
        if t.attrs[:1] == ("generic",):
            return OPS[t.op].value(*args, **dict(t.attrs[1:]))
        return OPS[t.op].value(*(np.asarray(a) for a in args))

    def _var(self, t: Term) -> Array:
        return self.of(t.attrs[0])

    def _at(self, t: Term) -> Array:
        var, places = t.attrs
        key = tuple(k if ix is None else self.counters[ix] + k for ix, k in places)
        return self._get(var, key[:-1] if var.role == "sum" else key)

    def _sequence(self, t: Term) -> Array:
        var, offset = t.attrs
        return self._stack(var, tuple(self.counters[ix] for ix in var.indices[:-1]), offset)

    def _const(self, t: Term) -> Array:
        value = t.attrs[0].value
        return int(value) if t.kind == "i" and value.denominator == 1 else float(value)

    def _special(self, t: Term) -> Array:
        value = t.attrs[0]
        return value if isinstance(value, bool) else float(value)

    def _index(self, t: Term) -> Array:
        return self.counters[t.attrs[0]]

    def _pick(self, t: Term, x: Array) -> Array:
        ix, axis = t.attrs
        return np.take(x, self.counters[ix], axis)

    def _add(self, t: Term, *args: Array) -> Array:
        total: Any = 0
        for r, a in zip(t.attrs[0], args, strict=True):
            total = total + _scaled(r, a)
        return total

    def _mul(self, t: Term, *args: Array) -> Array:
        by, powers = t.attrs
        product: Any = 1
        for a, e, x in zip(args, powers, t.args, strict=True):
            if x.op != "iverson":
                product = product * a**e if e > 0 else product / a ** (-e)
        product = _scaled(by, product)
        for a, x in zip(args, t.args, strict=True):
            if x.op == "iverson":
                product = np.where(a != 0, product, np.zeros((), np.asarray(product).dtype))
        return product

    def _iverson(self, t: Term, c: Array) -> Array:
        return np.asarray(c).astype(np.int8)

    def _cast(self, t: Term, x: Array) -> Array:
        return np.asarray(x, np.float64)

    def _trunc(self, t: Term, x: Array) -> Array:
        return np.asarray(x).astype(np.int64)

    def _sign(self, t: Term, x: Array) -> Array:
        return np.sign(x)

    def _sum(self, t: Term, x: Array) -> Array:
        axes, keep = t.attrs
        x = np.asarray(x)
        return np.sum(x if x.dtype != np.int8 else x.astype(np.int64), axis=axes, keepdims=keep)

    def _max(self, t: Term, x: Array) -> Array:
        return np.max(x, axis=t.attrs[0], keepdims=t.attrs[1])

    def _min(self, t: Term, x: Array) -> Array:
        return np.min(x, axis=t.attrs[0], keepdims=t.attrs[1])

    def _argmax(self, t: Term, x: Array) -> Array:
        return np.argmax(x, axis=t.attrs[0])

    def _expand(self, t: Term, x: Array) -> Array:
        return np.reshape(x, t.shape)

    _reshape = _expand

    def _slice(self, t: Term, x: Array) -> Array:
        return x[tuple(slice(a, b, s) if stays else a for a, b, s, stays in t.attrs[0])]

    def _transpose(self, t: Term, x: Array) -> Array:
        return np.transpose(x, t.attrs[0])

    def _broadcast_to(self, t: Term, x: Array) -> Array:
        return np.broadcast_to(x, t.shape)

    _full = _broadcast_to

    def _iota(self, t: Term) -> Array:
        return np.arange(t.attrs[0])

    def _flip(self, t: Term, x: Array) -> Array:
        return np.flip(x, t.attrs[0])

    def _pad(self, t: Term, x: Array, fill: Array) -> Array:
        return OPS["pad"].value(np.asarray(x), np.asarray(fill, np.asarray(x).dtype), amounts=t.attrs[0])

    def _concatenate(self, t: Term, *xs: Array) -> Array:
        return np.concatenate(xs, t.attrs[0])

    def _take(self, t: Term, x: Array, at: Array) -> Array:
        return np.take(x, at, t.attrs[0])

    def _scatter_add(self, t: Term, x: Array, at: Array, g: Array) -> Array:
        x, g = np.asarray(x), np.asarray(g)
        n = x.shape[t.attrs[0]]
        return OPS["scatter_add"].value(x.astype(np.result_type(x, g)), np.where(at < 0, at + n, at), g, axis=t.attrs[0])

    def _item(self, t: Term, x: Array) -> Array:
        return x[t.attrs[0]]

    def _window(self, t: Term, x: Array) -> Array:
        return OPS[t.op].value(np.asarray(x), **dict(t.attrs))

    _fold = _window

    def _contract(self, t: Term, a: Array, b: Array) -> Array:
        left, right, out = t.attrs
        product = matrix_product(left, right, out)
        if product is None:
            return np.einsum(f"{left},{right}->{out}", a, b)
        swapped, first, second = product
        a, b = (b, a) if swapped else (a, b)
        return np.matmul(np.swapaxes(a, -1, -2) if first else a, np.swapaxes(b, -1, -2) if second else b)

    def _random_bits(self, t: Term, key: Array, offset: Array) -> Array:
        shape, stream = t.attrs
        return OPS["random_bits"].value(np.asarray(key, np.uint32), np.asarray(offset, np.uint32), shape=shape, stream=stream)

    def _uniform(self, t: Term, *bits: Array) -> Array:
        return unit_interval(bits[0]) if len(bits) == 1 else unit_interval64(*bits)

    def _call(self, t: Term, *args: Array) -> Array:
        function: Function = t.attrs[0]
        inner = Values(self.terms, dict(zip(function.parameters, args, strict=True)))
        for var, part in function.parts:
            inner.whole[var] = inner.term(part)
        return inner.term(function.definition)


def _scaled(r: Any, x: Array) -> Array:
    if r.num == r.den:
        return x
    num = int(r.num) if r.num.denominator == 1 else float(r.num)
    return x * num if r.den == 1 else x * num / r.den
