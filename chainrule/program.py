"""A program: several entries over one named state.

In: Python functions of state and inputs. Out: a `Program` that backends run and that is tied to none of them. State is of three
kinds: parameters, which gradients move; slots, which optimizers keep; statistics, which layers measure. An entry reads all its old
state before it writes any: its graph gives the new values, and only then are they put in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from .derive.backward import backward
from .errors import GraphError
from .graph import tree as trees
from .graph.node import Array, Graph, Node, Rows, Type, constant_node, make, rebuilt
from .graph.rows import propagate_rows
from .graph.text import graph_text
from .graph.trace import build, here, inline, type_of, without_global_random
from .normalize import graph_key, normalize

Kind = Literal["parameter", "slot", "statistic"]


@dataclass(frozen=True, slots=True)
class Variable:
    """One array of the state, in logical layout. `rows`: its row axis, for state that belongs to the rows of a batch."""

    name: str
    type: Type
    kind: Kind
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Input:
    """One input. `rows`: its row axis (0), or None for a number that is the same for all rows: rate, divisor, key."""

    name: str
    type: Type
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing a program can do. The graph's inputs are the state in `reads`, then `inputs`, then captured arrays; its outputs
    are `results`, then the new values of the state in `writes`."""

    name: str
    graph: Graph
    reads: tuple[str, ...]
    inputs: tuple[str, ...]
    results: tuple[str, ...]
    writes: tuple[str, ...]
    result_rows: tuple[Rows, ...]

    @property
    def captures(self) -> tuple[Array, ...]:
        return self.graph.captures


@dataclass(frozen=True, slots=True)
class Program:
    """Entries over one state, for batches of `rows` rows. memory: so many bytes may be kept between forward and backward pass."""

    state: Mapping[str, Variable]
    inputs: Mapping[str, Input]
    entries: Mapping[str, Entry]
    rows: int
    key: tuple[Any, ...] = field(default=(), compare=False)
    memory: int | None = None

    def text(self) -> str:
        """All entries, readable."""
        parts = [f"{v.kind} {v.name} {v.type}" for v in self.state.values()]
        parts += [
            f"input {i.name} {i.type}" + ("" if i.rows is None else f" rows on axis {i.rows}") for i in self.inputs.values()
        ]
        for entry in self.entries.values():
            parts.append(f"\n{entry.name}: reads {', '.join(entry.reads) or '-'}; inputs {', '.join(entry.inputs) or '-'}")
            parts.append(graph_text(entry.graph, indent="    "))
            parts.append(f"    -> {', '.join((*entry.results, *(f'new {w}' for w in entry.writes)))}")
        return "\n".join(parts)


class ProgramBuilder:
    """Collects entries over one state.

    Args: state: the variables; inputs: all inputs that any entry may take; rows: rows of a batch; memory: see `Program`.
    """

    def __init__(self, state: Sequence[Variable], inputs: Sequence[Input], rows: int, memory: int | None = None) -> None:
        self.state = {v.name: v for v in state}
        self.inputs = {i.name: i for i in inputs}
        self.rows, self.memory = rows, memory
        self.entries: dict[str, Entry] = {}

    def entry(self, name: str, function: Callable[..., tuple[Mapping[str, Any], Mapping[str, Any]]], inputs: Sequence[str],
              key: Callable[[Mapping[str, Any]], Any] | None = None, rows_of: Mapping[str, int] | None = None) -> None:  # fmt: skip
        """Record `function(state, inputs) -> (results, writes)`, all of them mappings from names to arrays.

        Only state that the graph reads becomes part of the entry. `key(inputs)` is the key that random numbers start from.
        `rows_of`: results that are known to carry the rows on this axis, also where their operators cannot tell.
        """
        names = list(self.state)
        types = [*(v.type for v in self.state.values()), *(self.inputs[i].type for i in inputs)]
        made: list[tuple[list[str], list[str]]] = []
        at: dict[str, Any] = {}  # the key, made when the first random numbers are asked for

        def flat(*values: Any) -> list[Any]:
            state = dict(zip(names, values, strict=False))
            given = dict(zip(inputs, values[len(names) :], strict=True))
            at["inputs"] = given
            results, writes = function(state, given)
            made.append((list(results), list(writes)))
            return [*results.values(), *writes.values()]

        def random_key() -> Any:
            assert key is not None
            return key(at["inputs"])

        graph = without_global_random(lambda: build(flat, types, key=random_key if key else None))
        graph = normalize(_without_patterns(graph))
        results, writes = made[0]
        for write, output in zip(writes, graph.outputs[len(results) :], strict=True):
            if write not in self.state:
                raise GraphError(
                    f'entry "{name}" writes "{write}", which is no state: {", ".join(self.state) or "there is none"}'
                )
            wanted = self.state[write].type
            if (output.shape, output.dtype) != (wanted.shape, wanted.dtype):
                raise GraphError(f'entry "{name}" writes {output.type} to "{write}", which is {wanted}')
        live = {*graph.nodes(), *graph.inputs[len(names) + len(inputs) :]}
        state_read = [n for n, node in zip(names, graph.inputs, strict=False) if node in live]
        used = [i for i, node in zip(inputs, graph.inputs[len(names) :], strict=False) if node in live]
        kept = [n for i, n in enumerate(graph.inputs) if i >= len(names) + len(inputs) or n in live]
        graph = Graph(tuple(kept), graph.outputs, graph.captures, name)
        rows: list[Rows] = [self.state[n].rows for n in state_read]
        rows += [self.inputs[i].rows for i in used] + [None] * len(graph.captures)
        carried = dict(zip(results, propagate_rows(graph, rows), strict=False)) | dict(rows_of or {})
        self.entries[name] = Entry(
            name, graph, tuple(state_read), tuple(used), tuple(results), tuple(writes), tuple(carried[r] for r in results)
        )

    def build(self) -> Program:
        entries = tuple(
            (e.name, e.reads, e.inputs, e.results, e.writes, e.result_rows, graph_key(e.graph)) for e in self.entries.values()
        )
        state = tuple((v.name, v.type.shape, v.type.dtype.str, v.kind, v.rows) for v in self.state.values())
        inputs = tuple((i.name, i.type.shape, i.type.dtype.str, i.rows) for i in self.inputs.values())
        key = (self.rows, self.memory, state, inputs, entries)
        return Program(self.state, self.inputs, self.entries, self.rows, key, self.memory)


def _without_patterns(graph: Graph) -> Graph:
    """Captured arrays that are one number or 0, 1, 2, ... become nodes: they often have the batch's size, and no program should
    hold them as data."""
    table: dict[Node, Node] = {}
    kept = []
    own = len(graph.inputs) - len(graph.captures)
    for node, value in zip(graph.inputs[own:], graph.captures, strict=True):
        array = np.asarray(value)
        if array.ndim == 0:
            table[node] = constant_node(array, array.dtype, node.source)
        elif array.size > 1 and _one_number(array):
            table[node] = make("broadcast", (constant_node(array.flat[0], array.dtype),), {"shape": array.shape}, node.source)
        elif array.ndim == 1 and array.size > 1 and array.dtype.kind in "iu" and np.array_equal(array, np.arange(array.size)):
            table[node] = make("iota", (), {"length": array.size, "dtype": array.dtype}, node.source)
        else:
            kept.append((node, value))
    if not table:
        return graph
    for node in graph.nodes():
        table.setdefault(node, rebuilt(node, tuple(table[a] for a in node.args)))
    inputs = (*graph.inputs[:own], *(n for n, _ in kept))
    return Graph(inputs, tuple(table[o] for o in graph.outputs), tuple(v for _, v in kept), graph.name)


def _one_number(array: Array) -> bool:
    """-0.0 and 0.0 are two."""
    first = array.flat[0]
    return bool(np.all(array == first)) and (array.dtype.kind != "f" or bool(np.all(np.signbit(array) == np.signbit(first))))


def differentiate(f: Callable[[Any], tuple[Any, Any]], at: Any) -> tuple[Any, Any, Any]:
    """While tracing: value, auxiliary results and gradient of `f(tree) -> (scalar, auxiliary tree)` at the traced tree `at`.

    The forward values are shared between the three.
    """
    leaves, structure = trees.flatten(at)
    out: list[trees.Structure] = []

    def flat(*values: Any) -> list[Any]:
        value, auxiliary = f(trees.unflatten(structure, values))
        more, aux_structure = trees.flatten(auxiliary)
        out.append(aux_structure)
        return [value, *more]

    here("differentiate")
    graph = build(flat, [type_of(leaf) for leaf in leaves])
    back = backward(graph, range(len(leaves)), [0], values=True)
    one = np.ones((), graph.outputs[0].dtype)
    results = inline(back, [*leaves, one])
    count = len(graph.outputs)
    return results[0], trees.unflatten(out[0], results[1:count]), trees.unflatten(structure, results[count:])
