"""Functions of functions: gradients, products with Jacobians, native code.

In: a function written in NumPy on nests of arrays. Out: a function on the same arguments. Each call traces the function anew and
looks its code up by the graph, so a fresh lambda costs no new compilation; only `compile` skips tracing. Called on traced arrays
they are recorded, so they nest: `grad(grad(f))`.

Arguments: arrays and Python floats are traced; integers, booleans, strings and other objects are seen by the function as they are.
Keyword arguments are passed on; derivatives are by positional ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import numpy as np

from .derive.backward import backward
from .errors import DtypeError, ShapeError, UsageError
from .graph import tree as trees
from .graph.node import Array, Graph, Type
from .graph.trace import (
    Trace,
    apply,
    apply_many,
    array_of,
    build,
    here,
    inline,
    is_traced,
    located,
    type_of,
    without_global_random,
)
from .normalize import graph_key, normalize
from .ops.call import composition
from .ops.elementwise import convert
from .ops.loop import scan
from .recent import keep, recall
from .run.backend import Function, backends
from .run.native import NativeBackend

DEFAULT_BACKEND = NativeBackend.name


# ---- tracing with arguments that are not arrays ------------------------------------------------------------------------------


@dataclass
class Traced:
    """A function recorded on certain arguments. `inputs`: positions of the leaves that are inputs of the graph, in order."""

    graph: Graph
    out: trees.Structure
    leaves: list[Any]
    inputs: list[int]
    spans: list[tuple[int, int]]  # first and last leaf of each argument
    structures: list[trees.Structure]


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced, rather than passed on as it is."""
    return type(leaf) is float or is_traced(leaf) or isinstance(leaf, (np.ndarray, np.generic))


def trace_call(f: Callable[..., Any], args: Sequence[Any]) -> Traced:
    """Record `f(*args)`."""
    structures: list[trees.Structure] = []
    leaves: list[Any] = []
    spans: list[tuple[int, int]] = []
    for arg in args:
        more, structure = trees.flatten(arg)
        spans.append((len(leaves), len(leaves) + len(more)))
        leaves += more
        structures.append(structure)
    inputs = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    out: list[trees.Structure] = []

    def flat(*tracers: Any) -> list[Any]:
        filled = list(leaves)
        for i, t in zip(inputs, tracers, strict=True):
            filled[i] = t
        result = f(*(trees.unflatten(s, filled[a:b]) for s, (a, b) in zip(structures, spans, strict=True)))
        results, structure = trees.flatten(result)
        out.append(structure)
        return results

    graph = without_global_random(lambda: build(flat, [type_of(leaves[i]) for i in inputs]))
    return Traced(graph, out[0], leaves, inputs, spans, structures)


_functions: dict[Any, Function] = {}
_KEPT_FUNCTIONS = 256


def executable(graph: Graph) -> Function:
    """The backend's function for a graph; found by what the graph computes."""
    key = graph_key(graph)
    found = recall(_functions, key)
    return found or keep(_functions, key, backends[DEFAULT_BACKEND].function(normalize(graph)), _KEPT_FUNCTIONS)


def execute(graph: Graph, args: Sequence[Any]) -> list[Any]:
    """Run a graph, or record it where tracing stands. Captured values are added by themselves."""
    if Trace.current() is not None and is_traced(*args, *graph.captures):
        return inline(graph, args)
    arrays = [np.asarray(a, n.dtype) for a, n in zip((*args, *graph.captures), graph.inputs, strict=True)]
    return [_plain(r) for r in executable(graph)(arrays)]


def _plain(result: Array) -> Any:
    """An array; without axes, a number."""
    return result if result.ndim else result[()]


# ---- gradients ---------------------------------------------------------------------------------------------------------------


def _chosen(traced: Traced, argnums: int | Sequence[int], name: str) -> list[list[int]]:
    """For each argument to differentiate by, the positions of its leaves among the graph's inputs."""
    wanted = list(argnums) if isinstance(argnums, (list, tuple, range)) else [argnums]
    position = {leaf: at for at, leaf in enumerate(traced.inputs)}
    chosen = []
    for a in wanted:
        if isinstance(a, bool) or not isinstance(a, (int, np.integer)) or (a is argnums and not isinstance(a, int)):
            raise UsageError(f"{name}: argnums={argnums!r}, but arguments are chosen by their numbers, such as 0 or (0, 2)")
        if not -len(traced.spans) <= a < len(traced.spans):
            raise UsageError(f"{name}: argnums={a}, but the function got {len(traced.spans)} arguments")
        first, last = traced.spans[a]
        for i in range(first, last):
            if i not in position or type_of(traced.leaves[i]).dtype.kind != "f":
                raise DtypeError(
                    f"{name}: argument {a} holds {traced.leaves[i]!r:.60}, which has no derivative: "
                    "pass floating-point numbers, or choose other arguments with argnums"
                )
        chosen.append([position[i] for i in range(first, last)])
    return chosen


def _nest(traced: Traced, argnums: int | Sequence[int], values: Sequence[Any]) -> Any:
    """Flat gradients as the nests of the arguments they belong to."""
    at, parts = 0, []
    for a in [argnums] if isinstance(argnums, int) else argnums:
        n = traced.structures[a].leaves
        parts.append(trees.unflatten(traced.structures[a], values[at : at + n]))
        at += n
    return parts[0] if isinstance(argnums, int) else tuple(parts)


def _inputs(traced: Traced) -> list[Any]:
    return [traced.leaves[i] for i in traced.inputs]


def value_and_grad(f: Callable[..., Any], argnums: int | Sequence[int] = 0) -> Callable[..., Any]:
    """The function (value, gradient) of a scalar function, both from one forward and one backward pass.

    Args: f: returns one number; argnums: the argument to differentiate by, or several.
    Returns: a function of f's arguments that gives (f, ∂f/∂argument), the gradient a nest like the argument (a tuple for several).
    Raises: `ShapeError` if f returns anything but one number; `DtypeError` for an argument that is not floating-point.

    >>> import numpy as np
    >>> value, g = value_and_grad(lambda x: np.sum(x ** 2))(np.array([1.0, 3.0]))
    >>> float(value), g.tolist()
    (10.0, [2.0, 6.0])
    """

    @wraps(f)
    def function(*args: Any, **kwargs: Any) -> Any:
        traced = trace_call(partial(f, **kwargs), args)
        outputs = traced.graph.outputs
        if len(outputs) != 1 or outputs[0].shape != () or outputs[0].dtype.kind != "f":
            raise ShapeError(
                "grad needs a function that returns one floating-point number; this one returns "
                f"{', '.join(str(o.type) for o in outputs) or 'nothing'}"
                " (use np.sum or np.mean, or cr.jacobian or cr.vjp for several numbers)"
            )
        wrt = [i for group in _chosen(traced, argnums, "grad") for i in group]
        back = backward(traced.graph, wrt, values=True)
        value, *gradients = execute(back, [*_inputs(traced), np.ones((), outputs[0].dtype)])
        return value, _nest(traced, argnums, gradients)

    return function


def grad(f: Callable[..., Any], argnums: int | Sequence[int] = 0) -> Callable[..., Any]:
    """The gradient of a scalar function: ∂f/∂argument, as a function of f's arguments.

    Where a function has a kink, the derivative is: |x|, sign and norms at 0: 0; `cr.relu` at 0: 0; np.maximum and np.minimum of equal
    numbers: half to each; np.max and np.min: shared in equal parts among the largest (smallest); np.clip on its bounds: 1; floor,
    round and comparisons: 0. sqrt at 0 has an infinite slope, as has log; where the gradient that comes in is 0 they pass on 0, so
    that np.where lets neither infinity nor NaN of the branch not taken through.

    See `value_and_grad` for arguments and errors.

    >>> import numpy as np
    >>> grad(np.tanh)(0.0) == 1
    np.True_
    """
    both = value_and_grad(f, argnums)

    @wraps(f)
    def function(*args: Any, **kwargs: Any) -> Any:
        return both(*args, **kwargs)[1]

    return function


def vjp(f: Callable[..., Any], *args: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """Value, and the product of a vector with the Jacobian: pull(g) = (gᵀ ∂f/∂argument, ...).

    Args: f and its arguments. Returns: (f(*args), pull); pull takes a nest like the value and returns a tuple with a nest for each
    argument (None for leaves without derivative).

    >>> import numpy as np
    >>> y, pull = vjp(lambda x: x * x, np.array([2.0, 3.0]))
    >>> pull(np.array([1.0, 10.0]))[0].tolist()
    [4.0, 60.0]
    """
    traced = trace_call(f, args)
    floats = [i for i, n in enumerate(traced.graph.inputs[: len(traced.inputs)]) if n.dtype.kind == "f"]
    inputs = [x if is_traced(x) else np.array(x) for x in _inputs(traced)]  # as they are now: `pull` may be called later
    values = execute(traced.graph, inputs)
    back = backward(traced.graph, floats)

    def pull(g: Any) -> tuple[Any, ...]:
        seeds = _like_outputs(traced, g, "vjp")
        gradients = execute(back, [*inputs, *seeds])
        leaves: list[Any] = [None] * len(traced.leaves)
        for i, d in zip(floats, gradients, strict=True):
            leaves[traced.inputs[i]] = d
        return tuple(trees.unflatten(s, leaves[a:b]) for s, (a, b) in zip(traced.structures, traced.spans, strict=True))

    return trees.unflatten(traced.out, values), pull


def _like_outputs(traced: Traced, g: Any, name: str) -> list[Any]:
    seeds, structure = trees.flatten(g)
    outputs = traced.graph.outputs
    shapes = [np.shape(s) for s in seeds]
    if structure != traced.out or shapes != [o.shape for o in outputs]:
        raise ShapeError(
            f"{name}: the vector must be like the function's value, {trees.describe(traced.out)} of shapes {[o.shape for o in outputs]}, "
            f"not {trees.describe(structure)} of shapes {shapes}"
        )
    return [s if is_traced(s) else np.asarray(array_of(s), o.dtype) for s, o in zip(seeds, outputs, strict=True)]


def jvp(f: Callable[..., Any], args: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """Value, and the product of the Jacobian with a vector: Σ ∂f/∂argument · tangent.

    It is the backward pass of the backward pass, which is linear in its seed; what only the seed needed falls away.

    Args: args, tangents: sequences of the same nests. Returns: (f(*args), derivative in the direction of the tangents).
    Source: Townsend, "A new trick for calculating Jacobian vector products", 2017.

    >>> import numpy as np
    >>> jvp(np.sin, [0.0], [2.0])[1] == 2
    np.True_
    """
    traced = trace_call(f, args)
    leaves, structure = trees.flatten(tuple(tangents))
    if structure != trees.flatten(tuple(args))[1]:
        raise UsageError(f"jvp: the tangents must be nests like the arguments, {len(traced.leaves)} leaves, got {len(leaves)}")
    directions, floats = [], []
    for at, i in enumerate(traced.inputs):
        node = traced.graph.inputs[at]
        if node.dtype.kind == "f":
            if np.shape(leaves[i]) != node.shape:
                raise ShapeError(f"jvp: a tangent of shape {np.shape(leaves[i])} for an argument of shape {node.shape}")
            floats.append(at)
            directions.append(leaves[i] if is_traced(leaves[i]) else np.asarray(array_of(leaves[i]), node.dtype))
    by = [i for i, o in enumerate(traced.graph.outputs) if o.dtype.kind == "f"]
    back = backward(traced.graph, floats, by)  # gradients = seeds · J
    first_seed = len(traced.inputs)
    forth = backward(back, list(range(first_seed, first_seed + len(by))))  # by the seeds: J · directions
    inputs = _inputs(traced)
    zeros = [np.zeros(traced.graph.outputs[i].shape, traced.graph.outputs[i].dtype) for i in by]
    values = execute(traced.graph, inputs)
    out: list[Any] = [np.zeros(o.shape, o.dtype) for o in traced.graph.outputs]
    for i, d in zip(by, execute(forth, [*inputs, *zeros, *directions]), strict=True):
        out[i] = d
    return trees.unflatten(traced.out, values), trees.unflatten(traced.out, out)


def hvp(f: Callable[[Any], Any], x: Any, v: Any) -> Any:
    """Product of the Hessian of a scalar function with a vector, without the Hessian: ∂²f/∂x² · v.

    Args: f of one nest; x, v nests of the same shapes. Returns: a nest like x.
    Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6, 1994.

    >>> import numpy as np
    >>> hvp(lambda x: np.sum(x ** 3), np.array([1.0, 2.0]), np.array([1.0, 1.0])).tolist()
    [6.0, 12.0]
    """
    gradient = grad(f)
    return vjp(gradient, x)[1](v)[0]  # the Hessian is symmetric: vᵀ H = H v


def jacobian(f: Callable[..., Any], argnums: int | Sequence[int] = 0) -> Callable[..., Any]:
    """All derivatives of all results: for a result of shape R and an argument of shape A an array of shape R + A.

    One backward pass for each number in the result, in a loop that stays a loop.

    >>> import numpy as np
    >>> jacobian(lambda x: x ** 2)(np.array([1.0, 2.0])).tolist()
    [[2.0, 0.0], [0.0, 4.0]]
    """

    @wraps(f)
    def function(*args: Any, **kwargs: Any) -> Any:
        traced = trace_call(partial(f, **kwargs), args)
        wrt = [i for group in _chosen(traced, argnums, "jacobian") for i in group]
        inputs = _inputs(traced)
        shapes = [traced.graph.inputs[i].shape for i in wrt]
        rows = []
        for at, output in enumerate(traced.graph.outputs):
            if output.dtype.kind != "f":
                raise DtypeError(f"jacobian: result {at} is of {output.dtype}, which has no derivative")
            back = backward(traced.graph, wrt, [at])
            rows.append(_jacobian_of(back, inputs, output.type, shapes))
        nested = [_nest(traced, argnums, row) for row in rows]
        return trees.unflatten(traced.out, nested)

    return function


def _jacobian_of(back: Graph, inputs: list[Any], output: Type, shapes: list[tuple[int, ...]]) -> list[Any]:
    captures = list(back.captures)
    closed = Graph(back.inputs, back.outputs)
    seed_at = len(back.inputs) - len(captures) - 1

    def all_rows(*values: Any) -> list[Any]:
        def step(_: Any, seed: Any) -> tuple[Any, Any]:
            full = [*values[:seed_at], np.reshape(seed, output.shape), *values[seed_at:-1]]
            return None, tuple(inline(closed, full))

        index = apply("iota", length=output.size, dtype=np.dtype(np.int64))
        basis = np.equal(values[-1][:, None], index[None, :]).astype(output.dtype)
        return list(scan(step, None, basis)[1])

    values = [*inputs, *captures]
    numbers = np.arange(output.size)
    types = [
        *(Type(n.shape, n.dtype, n.type.weak) for n in (*back.inputs[:seed_at], *back.inputs[seed_at + 1 :])),
        type_of(numbers),
    ]
    stacked = execute(build(all_rows, types), [*values, numbers])
    return [np.reshape(s, (*output.shape, *shape))[()] for s, shape in zip(stacked, shapes, strict=True)]


# ---- what the derivative sees ------------------------------------------------------------------------------------------------


@composition("stop_gradient", derivative=(None,), smooth=False)
def _stop(x: Any) -> Any:
    """x, as a constant to the derivative."""
    return x


def stop_gradient(x: Any) -> Any:
    """`x` (any nest), through which no gradient flows.

    >>> import numpy as np
    >>> grad(lambda x: x * stop_gradient(x))(3.0) == 3
    np.True_
    """
    return trees.tree_map(lambda leaf: _stop(leaf) if is_traced(leaf) else leaf, x)


def custom_gradient(f: Callable[..., tuple[Any, Callable[..., Any]]]) -> Callable[..., Any]:
    """A function that brings its own derivative.

    Args: f(*args) returns (value, pull); pull(g) takes the gradient by the value, a nest like it, and returns the gradient by each
    argument (a tuple if there are several; anything for arguments without floating-point numbers). Values that f takes from outside
    get no gradient. Returns: the function args -> value.

    >>> import numpy as np
    >>> @custom_gradient
    ... def clipped(x):
    ...     return x, lambda g: np.clip(g, -1, 1)
    >>> grad(lambda x: 5 * clipped(x))(2.0) == 1
    np.True_
    """

    @wraps(f)
    def function(*args: Any) -> Any:
        if Trace.current() is None:
            return f(*args)[0]
        leaves, structure = trees.flatten(args)
        inputs = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
        types = [type_of(leaves[i]) for i in inputs]
        floats = [at for at, t in enumerate(types) if t.dtype.kind == "f"]
        out: list[trees.Structure] = []

        def call(values: Sequence[Any]) -> tuple[Any, Callable[..., Any]]:
            filled = list(leaves)
            for i, value in zip(inputs, values, strict=True):
                filled[i] = value
            return f(*trees.unflatten(structure, filled))

        def forward(*values: Any) -> list[Any]:
            results, out_structure = trees.flatten(call(values)[0])
            out[:] = [out_structure]
            return results

        def pull(*values: Any) -> list[Any]:
            gradients = call(values[: len(inputs)])[1](trees.unflatten(out[0], values[len(inputs) :]))
            found = _gradients_of(gradients if len(args) > 1 else (gradients,), structure, [inputs[at] for at in floats])
            if [np.shape(d) for d in found] != [types[at].shape for at in floats]:
                raise ShapeError(located(
                    f"custom_gradient: pull must return gradients like the arguments, {[types[at].shape for at in floats]}, "
                    f"not {[np.shape(d) for d in found]}"
                ))  # fmt: skip
            return [convert(d, types[at].dtype) for at, d in zip(floats, found, strict=True)]

        drawn = here("custom_gradient").streams
        body = build(forward, types)
        results = [Type(o.shape, o.dtype) for o in body.outputs]
        here("custom_gradient").streams = drawn  # random numbers are the same in value and derivative
        back = build(pull, [*types, *results])
        n, m = len(inputs), len(body.captures)
        spare = back.inputs[n + len(results) :]  # what only `pull` takes from outside: carried along, for the backward pass
        closed = Graph((*body.inputs, *spare), body.outputs)
        back_closed = Graph(back.inputs, back.outputs)

        def derivative(need: Sequence[bool], g: Any, y: Any, *values: Any) -> list[Any]:
            ys, gs = (y, g) if isinstance(y, list) else ([y], [g])
            seeds = [np.zeros_like(a) if b is None else b for a, b in zip(ys, gs, strict=True)]
            gradients: list[Any] = [None] * len(values)
            for at, d in zip(floats, inline(back_closed, [*values[:n], *seeds, *values[n + m :]]), strict=True):
                gradients[at] = d
            return gradients

        arguments = [*(leaves[i] for i in inputs), *body.captures, *back.captures]
        if not is_traced(*arguments):
            return f(*args)[0]
        made = apply_many("call", arguments, body=closed, derivative=derivative, name=getattr(f, "__name__", "custom"))
        return trees.unflatten(out[0], made)

    return function


def _gradients_of(parts: Any, structure: trees.Structure, leaves: Sequence[int]) -> list[Any]:
    """From gradients by each argument, those by certain leaves; those of arguments that hold none of them may be anything."""
    found: list[Any] = []
    first = 0
    for part, wanted in zip(parts if isinstance(parts, (tuple, list)) else (), structure.children, strict=False):
        own = [i - first for i in leaves if first <= i < first + wanted.leaves]
        values, same = trees.flatten(part)
        if own and same == wanted:
            found += [values[i] for i in own]
        first += wanted.leaves
    return found


# ---- compiling ---------------------------------------------------------------------------------------------------------------


def compile(f: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, recorded once for each combination of nest, shapes, types and static arguments, then run without Python.

    Args: f written in NumPy; its integer, boolean and string arguments are static: a new value is a new program. Python floats are
    numbers like any other. Arrays that f takes from outside keep the value they had when it was recorded.
    A call takes some microseconds beside the work of f. The calling thread does that work alone, as for all functions of this module;
    programs of networks, such as those of `fit`, run on several threads. Several threads may call the same function at once.

    >>> import numpy as np
    >>> fast = compile(lambda x, n: x * n)
    >>> fast(np.array([1.0, 2.0]), 3).tolist()
    [3.0, 6.0]
    """
    known: dict[Any, Callable[[Sequence[Any]], Any]] = {}
    quick: dict[Any, Callable[[Sequence[Any]], Any]] = {}  # the same, found with less effort

    @wraps(f)
    def function(*args: Any, **kwargs: Any) -> Any:
        if Trace.current() is not None:
            return f(*args, **kwargs)  # recorded, or computed at once, with what is around it
        short, arrays = _quick_key(args, kwargs)
        run = quick.get(short)
        if run is not None:
            return run(arrays)
        leaves, structure = trees.flatten((*args, kwargs))
        key = (structure, tuple(_compile_key(leaf) for leaf in leaves))
        try:
            run = recall(known, key)
        except TypeError:
            raise UsageError("compile: an argument is neither an array nor hashable, so it cannot be static") from None
        if run is None:
            traced = trace_call(lambda *values: f(*values[:-1], **values[-1]), (*args, kwargs))
            if len(known) >= _KEPT_FUNCTIONS:
                quick.clear()
            run = keep(known, key, _compiled(traced), _KEPT_FUNCTIONS)
        if short is not None:
            quick[short] = run
        return run([leaf for leaf in leaves if is_array(leaf)])

    return function


def _compiled(traced: Traced) -> Callable[[Sequence[Any]], Any]:
    """The traced function, of the leaves that are arrays. What it took from outside is copied."""
    run, graph, fill = executable(traced.graph), traced.graph, trees.filler(traced.out)
    if graph.captures:
        run = run.bound(graph.captures)

    def call(arrays: Sequence[Any]) -> Any:
        return fill(iter([r if r.ndim else r[()] for r in run(arrays)]))

    def call_one(arrays: Sequence[Any]) -> Any:
        (result,) = run(arrays)
        return result if result.ndim else result[()]

    return call_one if traced.out == trees.LEAF else call


_STATIC = frozenset([bool, int, str, bytes, type(None)])


def _quick_key(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...] | None, list[Any]]:
    """What tells the programs of these arguments apart, and their arrays and numbers in the order of `trees.flatten`. No key where
    there are others than arrays, numbers, texts and plain nests of them."""
    key: list[Any] = []
    arrays: list[Any] = []
    try:
        known = _add(args, key, arrays)
        if kwargs and known:
            key.append("keywords")
            known = _add((kwargs,), key, arrays)
    except RecursionError:
        known = False
    return (tuple(key) if known else None), arrays


def _add(values: Iterable[Any], key: list[Any], arrays: list[Any]) -> bool:
    """False if there are others. The first item of the key for a value says how many belong to it, so no two nests share a key."""
    for a in values:
        kind = type(a)
        if kind is np.ndarray:
            key += a.shape, a.dtype
            arrays.append(a)
        elif kind is float:
            key.append(kind)
            arrays.append(a)
        elif kind in _STATIC:
            key += kind, a
        elif kind is list or kind is tuple:
            key += kind, len(a)
            if not _add(a, key, arrays):
                return False
        elif kind is dict:
            for name in a:
                if type(name) is not str:
                    return False
            names = sorted(a)
            key += kind, tuple(names)
            if not _add([a[name] for name in names], key, arrays):
                return False
        elif issubclass(kind, np.generic):
            key.append(kind)
            arrays.append(a)
        else:
            return False
    return True


def _compile_key(leaf: Any) -> Any:
    if type(leaf) is float:
        return float
    if isinstance(leaf, (np.ndarray, np.generic)):
        leaf = array_of(leaf)
        return (leaf.shape, leaf.dtype.str)
    return (type(leaf), leaf)
