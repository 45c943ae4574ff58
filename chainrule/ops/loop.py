"""A loop that stays a loop: `scan`, and what is made of it.

In: a closed step graph, the first state, and arrays whose first axis is time. Out: the last state and the stacked results. Its
derivative is a scan as well, run the other way, so it can be differentiated again.

The state on entry of each step is one more stacked result, which the derivative reads; where nothing reads it, `normalize.py` takes
it away. Whether a backend keeps the inner values of a step or computes them again from that state is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod as product
from typing import Any

import numpy as np

from ..errors import ShapeError, UsageError
from ..graph import tree as trees
from ..graph.interpret import evaluate, plan_of
from ..graph.node import OPS, Array, Graph, Op, Rows, Type
from ..graph.rows import propagate_rows
from ..graph.trace import Trace, Tracer, answers, apply_many, build, here, inline, is_traced, located, type_of
from ..sizes import bytes_of
from .elementwise import convert
from .layout import moveaxis, normal_axes, normal_axis, ravel, reshape, transpose
from .random import fold_in
from .reduce import kept, wanted


def _split(values: Sequence[Any], states: int, sequences: int) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    return values[:states], values[states : states + sequences], values[states + sequences :]


def _infer(
    *types: Type, body: Graph, states: int, sequences: int, length: int, reverse: bool, memory: int | None = None
) -> tuple[Type, ...]:
    """Arguments: states, sequences (length, ...), constants. Body: the same with one time step. Results: states, stacked results."""
    first, xs, constants = _split(types, states, sequences)
    if any(not x.shape or x.shape[0] != length for x in xs):
        raise ShapeError(f"scan over {length} steps got sequences of shapes {[x.shape for x in xs]}")
    expected = [
        *((t.shape, t.dtype) for t in first),
        *((t.shape[1:], t.dtype) for t in xs),
        *((t.shape, t.dtype) for t in constants),
    ]
    if [(i.shape, i.dtype) for i in body.inputs] != expected:
        raise ShapeError(f"the step takes {[str(i.type) for i in body.inputs]}, scan gives {expected}")
    outputs = [o.type for o in body.outputs]
    for before, after in zip(first, outputs, strict=False):
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise ShapeError(
                f"the state of a scan must keep shape and type: it enters the step as {before} and leaves it as {after}"
            )
    return tuple(
        [Type(t.shape, t.dtype) for t in outputs[:states]] + [Type((length, *t.shape), t.dtype) for t in outputs[states:]]
    )


def _value(
    *arrays: Array, body: Graph, states: int, sequences: int, length: int, reverse: bool, memory: int | None = None
) -> Any:
    state, xs, constants = (list(v) for v in _split(arrays, states, sequences))
    plan = plan_of(body)
    stacked = [np.empty((length, *o.shape), o.dtype) for o in body.outputs[states:]]
    for t in range(length - 1, -1, -1) if reverse else range(length):
        results = plan([*state, *[x[t] for x in xs], *constants])
        state = results[:states]
        for place, y in zip(stacked, results[states:], strict=True):
            place[t] = y
    return (*state, *stacked) if len(body.outputs) > 1 else [*state, *stacked][0]


def _derivative(need: Sequence[bool], g: Sequence[Any], y: Sequence[Any], *args: Any, body: Graph, states: int, sequences: int,
                length: int, reverse: bool, sweep: Callable[..., Graph], memory: int | None = None) -> list[Any]:  # fmt: skip
    """Backpropagation through time: from the last step to the first, carrying the gradient of the state and the sums for the
    constants. Each step computes its inner values again from the state it began with, which the forward scan has stacked."""
    by = [i for i, o in enumerate(body.outputs) if o.dtype.kind == "f" and (i < states or g[i] is not None)]
    wrt_state = [i for i in range(states) if i in by]
    wrt_xs = [i for i in range(states, states + sequences) if need[i]]
    wrt_fixed = [i for i in range(states + sequences, len(args)) if need[i]]
    back = sweep(body, [*wrt_state, *wrt_xs, *wrt_fixed], by)

    first, xs, fixed = _split(args, states, sequences)
    entered = y[len(y) - states :]
    if body.outputs[len(y) - states :] != body.inputs[:states]:  # a loop in normal form, from which they were taken away
        entered = record_scan(lambda *v: [*inline(body, v)[:states], *v[:states]], first, xs, fixed, length, reverse)[states:]
    seeds = [g[i] if g[i] is not None else np.zeros_like(y[i]) for i in by]
    d_last, d_results = seeds[: len(wrt_state)], seeds[len(wrt_state) :]

    def step(*values: Any) -> list[Any]:
        carried, along, constants = _split(values, len(wrt_state) + len(wrt_fixed), states + sequences + len(d_results))
        d_after, sums = carried[: len(wrt_state)], carried[len(wrt_state) :]
        before_and_x, d_y = along[: states + sequences], along[states + sequences :]
        d_before, d_x, d_fixed = _split(inline(back, [*before_and_x, *constants, *d_after, *d_y]), len(wrt_state), len(wrt_xs))
        return [*d_before, *(s + d for s, d in zip(sums, d_fixed, strict=True)), *d_x]

    start = [*d_last, *(np.zeros_like(args[i]) for i in wrt_fixed)]
    out = record_scan(step, start, [*entered, *xs, *d_results], fixed, length, not reverse)
    gradients = dict(zip([*wrt_state, *wrt_fixed, *wrt_xs], out, strict=True))
    return [gradients.get(i) for i in range(len(args))]


def _rows(rows: Sequence[Rows], types: Sequence[Type], *, body: Graph, states: int, sequences: int, **attrs: Any) -> Any:
    """The state's row axis is what the step makes of it, found by repetition: it can only turn from none to one to mixed."""
    state, xs, constants = _split(rows, states, sequences)
    if 0 in xs:
        return tuple("mixed" for _ in body.outputs)
    inner = [x - 1 if isinstance(x, int) else x for x in xs]
    while True:
        out = propagate_rows(body, [*state, *inner, *constants])
        merged: list[Rows] = [a if a == b or b is None else b if a is None else "mixed" for a, b in zip(state, out, strict=False)]
        if merged == list(state):
            return (*state, *(r + 1 if isinstance(r, int) else r for r in out[states:]))
        state = merged


def _examples(r: np.random.Generator) -> Iterable[Any]:
    def step(h: Any, x: Any, w: Any) -> list[Any]:
        new = np.tanh(h * w + x)
        return [new, new * x, h]

    f8 = np.dtype("f8")
    body = build(step, [Type((3,), f8)] * 3)
    attrs = {"body": body, "states": 1, "sequences": 1, "length": 4}
    for reverse in (False, True):
        yield [r.normal(size=3), r.normal(size=(4, 3)), r.normal(size=3)], {**attrs, "reverse": reverse}


OPS.add("scan", Op("scan", _infer, _value, _derivative, _rows, _examples))


def record_scan(step: Callable[..., Sequence[Any]], first: Sequence[Any], xs: Sequence[Any], constants: Sequence[Any], length: int,
                reverse: bool, memory: int | None = None) -> list[Any]:  # fmt: skip
    """Record a scan of `step(*state, *x, *constants) -> [*state, *results]` on flat lists. The states that steps begin with are
    stacked behind the results, as every scan node has them; they are not among what is returned."""
    trace = here("scan")
    first = [Tracer(trace.lift(s), trace) for s in first]
    xs = [Tracer(trace.lift(x), trace) for x in xs]
    constants = [Tracer(trace.lift(c), trace) for c in constants]

    def with_entry(*values: Any) -> list[Any]:
        return [*step(*values), *values[: len(first)]]

    types = [
        *(strong(s.node.type) for s in first),
        *(Type(x.shape[1:], x.dtype) for x in xs),
        *(strong(c.node.type) for c in constants),
    ]
    body = build(with_entry, types, key=None)
    count = len(body.outputs) - len(first)
    closed = Graph(body.inputs, body.outputs)
    budget = {} if memory is None else {"memory": memory}
    results = apply_many(
        "scan", [*first, *xs, *constants, *body.captures],
        body=closed, states=len(first), sequences=len(xs), length=length, reverse=reverse, **budget,
    )  # fmt: skip
    return results[:count]


def strong(t: Type) -> Type:
    return Type(t.shape, t.dtype)


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]], h0: Any, xs: Any, *, length: int | None = None, reverse: bool = False,
    memory: str | int | None = None,
) -> Any:  # fmt: skip
    """A loop over the first axis of `xs`: h, y = step(h, x) for each x. It is recorded as a loop, never unrolled.

    Args: step(h, x) -> (h, y), any nests of arrays, written in NumPy; h0 first state; xs nest of arrays with a common first axis
    T, or None with `length` given; reverse: from the last to the first; memory: so much ("64MB", or bytes) of the inner values of the
    steps is kept at most for the backward pass in native code, the rest is computed again: its gradient has the same bits. A budget
    that cannot be kept is refused when the gradient is compiled, also one for less than what a loop keeps that stands in another. Where
    there is no backward pass nothing is kept for one. Returns: (last state, ys), each y stacked on a first axis T.
    Raises: `ShapeError` if the state changes its shape or type, `UsageError` if lengths differ or memory is no amount.

    >>> import numpy as np
    >>> h, ys = scan(lambda h, x: (h + x, h * x), np.float64(0), np.arange(4.0))
    >>> float(h), ys.tolist()
    (6.0, [0.0, 0.0, 2.0, 9.0])
    """
    leaves, structure = trees.flatten(h0)
    x_leaves, x_structure = trees.flatten(xs)
    lengths = {np.shape(x)[0] if np.ndim(x) else None for x in x_leaves} | ({length} if length is not None else set())
    if len(lengths) != 1 or None in lengths:
        raise UsageError(
            located(f"scan needs one number of steps; the first axes of xs and `length` give {sorted(map(str, lengths))}")
        )
    (steps,) = lengths
    assert steps is not None
    budget = None if memory is None else bytes_of(memory)
    types = [type_of(x) for x in leaves]
    out: list[Any] = []

    def flat(*values: Any) -> list[Any]:
        time, state, x = values[len(leaves)], values[: len(leaves)], values[len(leaves) + 1 :]
        trace = here("scan")
        outer = trace.parent
        if outer is not None and outer.random_key() is not None:
            trace.derive_key(lambda: fold_in(outer.random_key(), time))
        pair = step(trees.unflatten(structure, state), trees.unflatten(x_structure, x))
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise UsageError(located("the step of a scan returns a pair (state, result); result may be None"))
        new, new_structure = trees.flatten(pair[0])
        if new_structure != structure:
            raise UsageError(
                located(
                    f"the state of a scan must keep its structure: {trees.describe(structure)} became {trees.describe(new_structure)}"
                )
            )
        ys, y_structure = trees.flatten(pair[1])
        out[:] = [y_structure]
        return [*(_settle(n, t) for n, t in zip(new, types, strict=True)), *ys]

    if is_traced(*leaves, *x_leaves) or Trace.current() is not None:
        types = _state_types(flat, types, x_leaves)
        first = [convert(s, t.dtype) for s, t in zip(leaves, types, strict=True)]
        results = record_scan(flat, first, [apply_iota(steps), *x_leaves], [], steps, reverse, budget)
    else:
        types = _state_types(flat, types, x_leaves)
        arrays = [np.asarray(s, t.dtype) for s, t in zip(leaves, types, strict=True)]
        graph = build(lambda *v: record_scan(flat, v[: len(leaves)], [apply_iota(steps), *v[len(leaves) :]], [], steps, reverse),
                      [*map(strong, types), *(type_of(x) for x in x_leaves)])  # fmt: skip
        results = evaluate(graph, [*arrays, *(np.asarray(x) for x in x_leaves)])
    return trees.unflatten(structure, results[: len(leaves)]), trees.unflatten(out[0], results[len(leaves) :])


def apply_iota(length: int) -> Any:
    return apply_many("iota", [], length=length, dtype=np.dtype(np.uint32))[0]


def _state_types(flat: Callable[..., Any], types: list[Type], xs: Sequence[Any]) -> list[Type]:
    """A first state given as a Python number takes the type that the step makes of it."""
    while any(t.weak for t in types):  # one may depend on another: until none takes on a type any more
        inner = [*types, Type((), np.dtype(np.uint32)), *(Type(np.shape(x)[1:], type_of(x).dtype) for x in xs)]
        outputs = build(flat, inner).outputs[: len(types)]
        settled = [strong(o.type) if t.weak and not o.type.weak else t for t, o in zip(types, outputs, strict=True)]
        types[:] = settled if settled != types else [strong(o.type if t.weak else t) for t, o in zip(types, outputs, strict=True)]
    return types


def _settle(new: Any, wanted: Type) -> Any:
    """A state that the step made weak (a Python number) takes the type it entered with, if that can hold it."""
    made = type_of(new)
    fits = made.weak and not wanted.weak and (made.dtype.kind == wanted.dtype.kind or wanted.dtype.kind == "f")
    return convert(new, wanted.dtype) if fits else new


# ---- made of scan ------------------------------------------------------------------------------------------------------------


def _summable(x: Any) -> Any:
    """NumPy adds and multiplies small integers in the platform's integer."""
    return convert(x, np.sum(np.zeros(0, x.dtype)).dtype) if x.dtype.kind in "biu" else x


def _cumulate(x: Any, axis: int | None, combine: Callable[[Any, Any], Any], start: float) -> Any:
    x = _summable(x)
    x, axis = (ravel(x), 0) if axis is None else (x, normal_axis(axis, x.ndim))
    rows = moveaxis(x, axis, 0)

    def step(h: Any, row: Any) -> tuple[Any, Any]:
        new = combine(h, row)
        return new, new

    _, ys = scan(step, np.full_like(rows[0], start) if rows.shape[0] else np.zeros(rows.shape[1:], x.dtype), rows)
    return moveaxis(ys, 0, axis)


@answers(np.cumsum, method="cumsum")
def cumsum(x: Any, axis: int | None = None) -> Any:
    return _cumulate(x, axis, lambda h, row: h + row, 0)


@answers(np.cumprod, method="cumprod")
def cumprod(x: Any, axis: int | None = None) -> Any:
    return _cumulate(x, axis, lambda h, row: h * row, 1)


@answers(np.prod, method="prod")
def prod(x: Any, axis: Any = None, keepdims: Any = False) -> Any:
    """The product, as a loop, so that its derivative is right where factors are 0."""
    x, axes = _summable(x), normal_axes(axis, x.ndim)
    rest = [i for i in range(x.ndim) if i not in axes]
    shape = tuple(x.shape[i] for i in rest)
    rows = reshape(transpose(x, [*axes, *rest]), (product(x.shape[i] for i in axes), *shape))
    y, _ = scan(lambda h, row: (h * row, None), np.ones(shape, x.dtype), rows)
    return reshape(y, kept(x.shape, axes)) if wanted(keepdims) else y


@answers(np.diff)
def diff(x: Any, n: int = 1, axis: int = -1) -> Any:
    axis = normal_axis(axis, x.ndim)
    for _ in range(n):
        before = (slice(None),) * axis
        x = x[(*before, slice(1, None))] - x[(*before, slice(None, -1))]
    return x
