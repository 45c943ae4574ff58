"""Products summed over shared axes: matmul, dot, einsum.

In: two arrays and one letter for each of their axes. Out: the sum of products over the letters that the result lacks. One core
form, so one derivative and one kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import prod
from string import ascii_letters
from typing import Any

import numpy as np

from ..errors import ShapeError
from ..graph.node import OPS, Array, Op, Rows, Type
from ..graph.trace import answers, apply, located, type_of
from .elementwise import convert, multiply
from .layout import moveaxis, normal_axis, reshape, transpose


def parse(spec: str) -> tuple[str, str, str]:
    """ "ij,jk->ik" as its three words."""
    arguments, out = spec.split("->")
    a, b = arguments.split(",")
    return a, b, out


def _infer(a: Type, b: Type, *, spec: str) -> Type:
    left, right, out = parse(spec)
    if len(left) != len(a.shape) or len(right) != len(b.shape) or a.dtype != b.dtype:
        raise ShapeError(f"a product of {a} and {b} by {spec}: axes or types do not fit")
    if any(len(set(word)) != len(word) for word in (left, right, out)) or not (
        set(left) - set(right) <= set(out) and set(right) - set(left) <= set(out) and set(out) <= set(left + right)
    ):
        raise ShapeError(f"a product by {spec}: a letter may stand once in each word, and one that is summed in both arguments")
    sizes = dict(zip(left, a.shape, strict=True))
    for letter, n in zip(right, b.shape, strict=True):
        if sizes.setdefault(letter, n) != n:
            raise ShapeError(
                f"a product of shapes {a.shape} and {b.shape}: axis {left.index(letter)} of the first has length {sizes[letter]}, "
                f"axis {right.index(letter)} of the second {n}; they must be equal"
            )
    return Type(tuple(sizes[c] for c in out), a.dtype)


@lru_cache(maxsize=1024)
def _plan(spec: str) -> tuple[Any, ...]:
    """Orders of axes that turn the product into one batched matrix product: batch, free, summed."""
    left, right, out = parse(spec)
    batch = [c for c in left if c in right and c in out]
    summed = [c for c in left if c in right and c not in out]
    free_a = [c for c in left if c not in right]
    free_b = [c for c in right if c not in left]
    order_a = tuple(left.index(c) for c in (*batch, *free_a, *summed))
    order_b = tuple(right.index(c) for c in (*batch, *summed, *free_b))
    made = [*batch, *free_a, *free_b]
    return order_a, order_b, tuple(made.index(c) for c in out), len(batch), len(free_a), len(summed), len(free_b)


def _value(a: Array, b: Array, *, spec: str) -> Any:
    order_a, order_b, order_y, batch, free_a, summed, free_b = _plan(spec)
    a, b = a.transpose(order_a), b.transpose(order_b)
    if (free_a, summed, free_b) == (1, 1, 1):
        return np.matmul(a, b).transpose(order_y)
    shape = (*a.shape[: batch + free_a], *b.shape[batch + summed :])
    groups = a.shape[:batch]
    k = prod(a.shape[batch + free_a :])
    a = a.reshape(*groups, prod(a.shape[batch : batch + free_a]), k)
    b = b.reshape(*groups, k, prod(b.shape[batch + summed :]))
    return np.matmul(a, b).reshape(shape).transpose(order_y)


def _rule_a(g: Any, y: Any, a: Any, b: Any, *, spec: str) -> Any:
    left, right, out = parse(spec)
    return apply("contract", g, b, spec=f"{out},{right}->{left}")


def _rule_b(g: Any, y: Any, a: Any, b: Any, *, spec: str) -> Any:
    left, right, out = parse(spec)
    return apply("contract", a, g, spec=f"{left},{out}->{right}")


def _rows(rows: Sequence[Rows], types: Sequence[Type], *, spec: str) -> Rows:
    left, right, out = parse(spec)
    letters = {word[r] for word, r in zip((left, right), rows, strict=True) if isinstance(r, int)}
    if len(letters) != 1:
        return "mixed"
    letter = letters.pop()
    return out.index(letter) if letter in out else None


def _examples(r: np.random.Generator) -> Iterable[Any]:
    yield [r.normal(size=(3, 4)), r.normal(size=(4, 2))], {"spec": "ij,jk->ik"}
    yield [r.normal(size=(2, 3, 4)), r.normal(size=(2, 4, 2))], {"spec": "bij,bjk->bik"}
    yield [r.normal(size=(3, 4)), r.normal(size=(4, 3, 2))], {"spec": "ij,jik->k"}
    yield [r.normal(size=(3,)), r.normal(size=(2,))], {"spec": "i,j->ji"}


OPS.add("contract", Op("contract", _infer, _value, (_rule_a, _rule_b), _rows, _examples))


def contract(spec: str, a: Any, b: Any) -> Any:
    """Σ a b by `spec`; types promoted as NumPy does."""
    dtype = np.result_type(type_of(a).dtype, type_of(b).dtype)
    return apply("contract", convert(a, dtype), convert(b, dtype), spec=spec)


@answers(np.matmul)
def matmul(a: Any, b: Any) -> Any:
    """Matrix product over the last axis of `a` and the second to last of `b`; leading axes are a batch and broadcast."""
    if not np.ndim(a) or not np.ndim(b):
        raise ShapeError(
            located(f"a matrix product needs axes on both sides, got shapes {np.shape(a)} and {np.shape(b)}; use * for numbers")
        )
    left, right = np.ndim(a) == 1, np.ndim(b) == 1
    batch_a, batch_b = np.shape(a)[:-2], np.shape(b)[:-2]
    inner_a, inner_b = np.shape(a)[-1], np.shape(b)[-1 if right else -2]
    if inner_a != inner_b:
        raise ShapeError(located(
            f"a product of shapes {np.shape(a)} and {np.shape(b)}: the first has {inner_a} columns, the second {inner_b} rows; "
            "they must be equal"
        ))  # fmt: skip
    try:
        batch = np.broadcast_shapes(batch_a, batch_b)
    except ValueError:
        raise ShapeError(
            located(f"a product of shapes {np.shape(a)} and {np.shape(b)}: the leading axes do not fit together")
        ) from None
    letters = ascii_letters[: len(batch)]
    words = []
    operands = []
    for x, shape, core in ((a, batch_a, "Y" if left else "XY"), (b, batch_b, "Y" if right else "YZ")):
        own = letters[len(batch) - len(shape) :]
        stretched = [i for i, (n, c) in enumerate(zip(shape, own, strict=True)) if n == 1 and batch[letters.index(c)] != 1]
        words.append("".join(c for i, c in enumerate(own) if i not in stretched) + core)
        operands.append(np.squeeze(x, tuple(stretched)) if stretched else x)
    out = letters + ("" if left else "X") + ("" if right else "Z")
    return contract(f"{words[0]},{words[1]}->{out}", *operands)


@answers(np.dot, method="dot")
def dot(a: Any, b: Any) -> Any:
    if not np.ndim(a) or not np.ndim(b):
        return multiply(a, b)
    if np.ndim(a) <= 2 and np.ndim(b) <= 2:
        return matmul(a, b)
    x, y = ascii_letters[: np.ndim(a)], ascii_letters[26 : 26 + np.ndim(b)]
    at = len(y) - 2 if len(y) > 1 else 0
    y = y[:at] + x[-1] + y[at + 1 :]
    return contract(f"{x},{y}->{x[:-1]}{y.replace(x[-1], '')}", a, b)


@answers(np.outer)
def outer(a: Any, b: Any) -> Any:
    return contract("i,j->ij", np.ravel(a), np.ravel(b))


@answers(np.inner)
def inner(a: Any, b: Any) -> Any:
    return tensordot(a, b, ([-1], [-1])) if np.ndim(a) and np.ndim(b) else multiply(a, b)


@answers(np.vdot)
def vdot(a: Any, b: Any) -> Any:
    return matmul(np.ravel(a), np.ravel(b))


@answers(np.tensordot)
def tensordot(a: Any, b: Any, axes: Any = 2) -> Any:
    if isinstance(axes, int):
        axes = (list(range(np.ndim(a) - axes, np.ndim(a))), list(range(axes)))
    axes = [[x] if isinstance(x, int) else list(x) for x in axes]
    left, right = list(ascii_letters[: np.ndim(a)]), list(ascii_letters[26 : 26 + np.ndim(b)])
    for i, j in zip(*axes, strict=True):
        right[j] = left[i]
    out = [c for c in (*left, *right) if (c in left) != (c in right)]
    return contract(f"{''.join(left)},{''.join(right)}->{''.join(out)}", a, b)


@answers(np.einsum)
def einsum(subscripts: str, *operands: Any, optimize: Any = False) -> Any:
    """Einstein summation, taken from left to right two operands at a time. Ellipses and repeated letters are allowed."""
    words, out = _letters(subscripts, operands)
    parts = [_diagonals(word, x) for word, x in zip(words, operands, strict=True)]
    sizes: dict[str, int] = {}
    for word, x in parts:
        sizes.update({c: n for c, n in zip(word, np.shape(x), strict=True) if sizes.get(c, 1) == 1})
    parts = [_without_stretched(word, x, sizes) for word, x in parts]
    word, x = _sum_lonely(*parts[0], {*out, *"".join(w for w, _ in parts[1:])})
    for i, part in enumerate(parts[1:], 2):
        later = {*out, *"".join(w for w, _ in parts[i:])}
        other, y = _sum_lonely(*part, {*later, *word})
        word, x = _sum_lonely(word, x, {*later, *other})
        made = "".join(c for c in dict.fromkeys(word + other) if c in later)
        word, x = made, contract(f"{word},{other}->{made}", x, y)
    return transpose(x, [word.index(c) for c in out])


def _letters(subscripts: str, operands: Sequence[Any]) -> tuple[list[str], str]:
    """The words of each operand and of the result, ellipses written out."""
    text = subscripts.replace(" ", "")
    arguments, arrow, out = text.partition("->")
    words = arguments.split(",")
    if len(words) != len(operands):
        raise ShapeError(located(f'einsum "{subscripts}" names {len(words)} operands, got {len(operands)}'))
    unused = [c for c in ascii_letters[::-1] if c not in text]
    longest = max((np.ndim(x) - len(w.replace("...", "")) for w, x in zip(words, operands, strict=True) if "..." in w), default=0)
    batch = "".join(unused[:longest])
    full = []
    for word, x in zip(words, operands, strict=True):
        n = np.ndim(x) - len(word.replace("...", ""))
        word = word.replace("...", batch[longest - n :] if n > 0 else "")
        if len(word) != np.ndim(x):
            raise ShapeError(
                located(f'einsum "{subscripts}": "{word}" does not name the {np.ndim(x)} axes of shape {np.shape(x)}')
            )
        full.append(word)
    if not arrow:
        joined = "".join(full)
        out = batch + "".join(sorted(c for c in set(joined) if joined.count(c) == 1 and c not in batch))
    out = out.replace("...", batch)
    if any(c not in "".join(full) for c in out) or len(set(out)) != len(out):
        raise ShapeError(located(f'einsum "{subscripts}": the result "{out}" must use each letter of the operands at most once'))
    return full, out


def _diagonals(word: str, x: Any) -> tuple[str, Any]:
    """A repeated letter means the diagonal. Its axis comes last."""
    for letter in dict.fromkeys(word):
        while word.count(letter) > 1:
            at, again = word.index(letter), word.rindex(letter)
            if np.shape(x)[at] != np.shape(x)[again]:
                raise ShapeError(
                    located(f'einsum: the repeated letter "{letter}" stands for axes of different length in shape {np.shape(x)}')
                )
            x = np.diagonal(x, 0, at, again)
            word = word[:at] + word[at + 1 : again] + word[again + 1 :] + letter
    return word, x


def _sum_lonely(word: str, x: Any, others: set[str]) -> tuple[str, Any]:
    """Letters that nobody else needs are summed at once."""
    axes = tuple(i for i, c in enumerate(word) if c not in others)
    return ("".join(c for c in word if c in others), np.sum(x, axis=axes, dtype=x.dtype)) if axes else (word, x)


def _without_stretched(word: str, x: Any, sizes: dict[str, int]) -> tuple[str, Any]:
    """Axes of length 1 that meet longer ones broadcast: a product does not need them."""
    axes = tuple(i for i, (c, n) in enumerate(zip(word, np.shape(x), strict=True)) if n == 1 and sizes[c] != 1)
    return "".join(c for i, c in enumerate(word) if i not in axes), np.squeeze(x, axes) if axes else x


@answers(np.trace, method="trace")
def trace(x: Any, offset: int = 0, axis1: int = 0, axis2: int = 1, dtype: Any = None) -> Any:
    return np.sum(diagonal(x, offset, axis1, axis2), axis=-1, dtype=dtype)


@answers(np.diagonal, method="diagonal")
def diagonal(x: Any, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Any:
    """Every (columns + 1)th element of the matrix written row by row. The others are not read, so they may be infinite or NaN."""
    if x.ndim < 2 or normal_axis(axis1, x.ndim) == normal_axis(axis2, x.ndim):
        raise ShapeError(located(f"a diagonal lies between two axes, not axes {axis1} and {axis2} of shape {x.shape}"))
    x = moveaxis(x, [axis1, axis2], [-2, -1])
    *batch, rows, columns = x.shape
    length = max(0, min(rows + min(offset, 0), columns - max(offset, 0)))
    first = max(offset, -offset * columns)
    return reshape(x, (*batch, rows * columns))[..., first : first + length * (columns + 1) : columns + 1]


@answers(np.kron)
def kron(a: Any, b: Any) -> Any:
    """Each axis of the result counts through those of both: the longer way round in `a`."""
    n = max(np.ndim(a), np.ndim(b))
    left, right = ((1,) * (n - np.ndim(x)) + np.shape(x) for x in (a, b))
    y = np.reshape(a, tuple(k for m in left for k in (m, 1))) * np.reshape(b, tuple(k for m in right for k in (1, m)))
    return reshape(y, tuple(i * j for i, j in zip(left, right, strict=True)))
