"""Checking a derivative against central differences.

In: a function and arguments. Out: a report of the largest disagreement for each argument, or `GradientMismatch`. Everything is
computed in float64; the function is evaluated by its recorded graph, the derivative by the graph of the sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any

import numpy as np

from .derive.backward import backward
from .errors import DataError, GradientMismatch, UsageError
from .graph import tree as trees
from .graph.interpret import evaluate
from .graph.node import Array, Graph
from .graph.trace import array_of
from .records import record
from .transforms import trace_call


@record(frozen=True)
class Comparison:
    """One array: its name, how many elements were compared, how many stand at a kink, and the worst disagreement."""

    name: str
    shape: tuple[int, ...]
    checked: int
    kinks: int
    error: float
    worst: tuple[int, ...]
    derivative: float
    difference: float


@record(frozen=True)
class GradientReport:
    """What `check_gradients` found. `error` is the largest relative error |derivative - difference| / max(scale, |difference|)."""

    comparisons: list[Comparison] = field(default_factory=list)
    tolerance: float = 0.0

    @property
    def error(self) -> float:
        return max((c.error for c in self.comparisons), default=0.0)

    @property
    def ok(self) -> bool:
        return not self.error > self.tolerance

    def __str__(self) -> str:
        width = max((len(c.name) for c in self.comparisons), default=4)
        lines = [f"{'array':<{width}}  {'shape':<14} {'checked':>8} {'kinks':>6} {'largest relative error':>23}"]
        for c in self.comparisons:
            mark = (
                ""
                if c.error <= self.tolerance
                else f"   <- at {c.worst}: derivative {c.derivative:.9g}, difference {c.difference:.9g}"
            )
            lines.append(f"{c.name:<{width}}  {c.shape!s:<14} {c.checked:>8} {c.kinks:>6} {c.error:>23.2e}{mark}")
        verdict = (
            "all derivatives agree with central differences" if self.ok else "NOT all derivatives agree with central differences"
        )
        return "\n".join([*lines, f"{verdict} (tolerance {self.tolerance:g}, float64)"])


def check_gradients(f: Callable[..., Any], *args: Any, argnums: int | Sequence[int] | None = None, epsilon: float = 1e-6,
                    tolerance: float = 1e-6, most: int = 200, seed: int = 0) -> GradientReport:  # fmt: skip
    """Compare the derivative of `f` with central differences (f(x + ε) - f(x - ε)) / 2ε.

    A function that returns several numbers is checked along one random direction of them. Elements at which the two one-sided
    differences disagree stand at a kink, where no derivative exists; they are counted and left out.

    Args: f and its arguments (nests; floating-point arrays are checked in float64); argnums: which arguments, default all that are
    floating-point; epsilon: step, relative to max(1, |x|); tolerance: largest relative error allowed; most: elements checked of
    each array, chosen at random by `seed`.
    Returns: a `GradientReport`; print it for a table.
    Raises: `GradientMismatch` (with `.report`) if an array disagrees; `DataError` if the function is not finite at the arguments.

    >>> import numpy as np
    >>> check_gradients(lambda x: np.sum(np.sin(x)), np.array([0.1, 2.0])).ok
    True
    """
    doubled = [trees.tree_map(_double, a) for a in args]
    traced = trace_call(f, doubled)
    wanted = range(len(args)) if argnums is None else [argnums] if isinstance(argnums, int) else list(argnums)
    leaves = {i for a in wanted for i in range(*traced.spans[a])}
    wrt = [at for at, i in enumerate(traced.inputs) if i in leaves and traced.graph.inputs[at].dtype.kind == "f"]
    if not wrt:
        raise UsageError("check_gradients: none of the chosen arguments holds floating-point numbers")
    names = [n for a in range(len(args)) for n in trees.paths(traced.structures[a], str(a) if len(args) > 1 else "")]
    inputs = [np.array(traced.leaves[i]) for i in traced.inputs]
    labels = [names[traced.inputs[at]] or "x" for at in wrt]
    return check_graph(traced.graph, inputs, wrt, labels, epsilon=epsilon, tolerance=tolerance, most=most, seed=seed)


def _double(leaf: Any) -> Any:
    if type(leaf) is float:
        return np.float64(leaf)
    return (
        np.asarray(array_of(leaf), np.float64) if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind == "f" else leaf
    )


def check_graph(graph: Graph, inputs: list[Array], wrt: Sequence[int], names: Sequence[str], *, epsilon: float = 1e-6,
                tolerance: float = 1e-6, most: int = 200, seed: int = 0) -> GradientReport:  # fmt: skip
    """`check_gradients` for a graph and its inputs (captured values excepted)."""
    random = np.random.Generator(np.random.Philox(seed))
    by = [i for i, o in enumerate(graph.outputs) if o.dtype.kind == "f"]
    directions = [np.asarray(random.uniform(0.5, 1.5, graph.outputs[i].shape)) for i in by]
    if [graph.outputs[i].shape for i in by] == [()]:
        directions = [np.ones(())]

    def value() -> float:
        results = evaluate(graph, inputs)
        return float(sum(np.sum(results[i] * d) for i, d in zip(by, directions, strict=True)))

    if not np.isfinite(value()):
        raise DataError("check_gradients: the function is not finite at these arguments, so it has no derivative there")
    derivatives = evaluate(backward(graph, wrt, by), [*inputs, *directions])
    comparisons = []
    for at, name, derivative in zip(wrt, names, derivatives, strict=True):
        inputs[at] = x = np.array(inputs[at], np.float64)
        comparisons.append(_compare(name, x, np.asarray(derivative), value, random, epsilon, most))
    report = GradientReport(comparisons, tolerance)
    if not report.ok:
        raise GradientMismatch(f"the derivative disagrees with central differences\n{report}", report)
    return report


def _compare(name: str, x: Array, derivative: Array, value: Callable[[], float], random: np.random.Generator, epsilon: float,
             most: int) -> Comparison:  # fmt: skip
    """Move one element at a time. The error is relative to the larger of the element's and the array's typical derivative."""
    places = list(np.ndindex(*x.shape))
    if len(places) > most:
        places = [places[i] for i in np.sort(random.choice(len(places), most, replace=False))]
    middle = value()
    typical = float(np.sqrt(np.mean(derivative**2))) if derivative.size else 0.0
    # A difference of two values near f carries their rounding, about 1e-16 |f| / epsilon: below that scale it says nothing.
    scale = max(typical, 1e-3 * max(1.0, abs(middle)), 1e-8)
    kinks = 0
    worst: tuple[float, tuple[int, ...], float, float] = (0.0, (), 0.0, 0.0)
    for place in places:
        kept = x[place]
        step = epsilon * max(1.0, abs(float(kept)))
        x[place] = kept + step
        above = value()
        x[place] = kept - step
        below = value()
        x[place] = kept
        difference, exact = (above - below) / (2 * step), float(derivative[place])
        error = abs(difference - exact) / max(scale, abs(difference))
        left, right = (middle - below) / step, (above - middle) / step
        bend = abs(right - left)
        if bend > 1e-2 * max(scale, abs(difference)) and abs(difference - exact) <= 0.501 * bend:  # exact lies between the two
            kinks += 1
        elif not error <= worst[0]:
            worst = (error if error == error else np.inf, place, exact, difference)
    return Comparison(name, x.shape, len(places) - kinks, kinks, *worst)
