"""A function recorded on nests of arrays or types, without what the transforms add (static arguments, execution)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from chainrule.graph import tree as trees
from chainrule.graph.node import Graph, Type
from chainrule.graph.trace import build, type_of, without_global_random


def trace_function(f: Callable[..., Any], args: Sequence[Any], *, key: Any = None) -> tuple[Graph, trees.Structure]:
    """The graph of `f(*args)`, whose inputs are the leaves of the arguments in order, and the structure of its result."""
    leaves, structure = trees.flatten(tuple(args))
    types = [leaf if isinstance(leaf, Type) else type_of(leaf) for leaf in leaves]
    out: list[trees.Structure] = []

    def flat(*tracers: Any) -> list[Any]:
        results, result_structure = trees.flatten(f(*trees.unflatten(structure, tracers)))
        out.append(result_structure)
        return results

    return without_global_random(lambda: build(flat, types, key=key)), out[0]
