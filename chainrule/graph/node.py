"""What a computation is made of.

In: nothing. Out: `Type`, `Node`, `Graph`, and `Op`, the record by which an operator declares all that is known of it. Nodes name
their operator by a string and look it up in `OPS`, so this layer never imports the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import numpy as np

from ..registry import Registry

Array = np.ndarray[Any, np.dtype[Any]]
Attrs = Mapping[str, Any]

# Where a value carries the rows (samples) of a batch: on this axis; on none: it is the same for all rows, or belongs to the batch as a
# whole, like a sum over rows or bits that are drawn for it; or in a way that no longer keeps rows apart.
Rows = int | None | Literal["mixed"]

DTYPES = tuple(np.dtype(t) for t in ("bool", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"))


@dataclass(frozen=True, slots=True)
class Type:
    """Shape and data type of one value. `weak`: a Python number that takes on the type of what it meets (NumPy 2, NEP 50)."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    weak: bool = False

    @property
    def size(self) -> int:
        return prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One operation applied to the results of others. Frozen; compared by identity.

    `source` is the user's line that asked for it ("model.py:12"), `scope` the name of the layer in which it did.
    Most operators have one result; a node with several is read through nodes of the operator "output".
    """

    op: str
    args: tuple[Node, ...]
    attrs: Attrs
    types: tuple[Type, ...]
    source: str = ""
    scope: str = ""

    @property
    def type(self) -> Type:
        return self.types[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.types[0].shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.types[0].dtype

    def __repr__(self) -> str:
        return f"<{self.op} {', '.join(map(str, self.types))}>"


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Graph:
    """A closed computation: every leaf is one of `inputs` or a constant. The last `len(captures)` inputs stand for values that
    the traced function took from outside, held in `captures`."""

    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    captures: tuple[Any, ...] = ()
    name: str = ""
    _order: list[Node] | None = field(default=None, init=False, repr=False)

    def nodes(self) -> list[Node]:
        """All nodes in an order in which arguments come before their users; inputs that nothing reads are not among them."""
        if self._order is None:
            object.__setattr__(self, "_order", topological(self.outputs))
        return self._order or []


# A rule gives the gradient by one argument: rule(g, y, *arguments, **attributes), all traced arrays.
Rule = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Op:
    """Everything that is known of one core form.

    infer(*types, **attrs) -> Type or a tuple of them; raises `ShapeError`.
    value(*arrays, **attrs) -> the result by NumPy: the definition that every backend is tested against.
    derivative: one rule for each argument, None where the derivative is zero; or, for forms with any number of arguments, one
        function of (need, g, y, *arguments, **attrs) that returns a list, where `need` tells which entries will be used.
    rows(rows, types, **attrs) -> where the result carries the rows, from where the arguments do.
    examples: pairs of arguments (arrays) and attributes; tests run over all of them.
    """

    name: str
    infer: Callable[..., Type | tuple[Type, ...]]
    value: Callable[..., Any]
    derivative: tuple[Rule | None, ...] | Callable[..., list[Any]]
    rows: Callable[..., Rows | tuple[Rows, ...]]
    examples: Callable[[np.random.Generator], Iterable[tuple[Sequence[Any], dict[str, Any]]]]
    elementwise: bool = False
    smooth: bool = field(default=True)  # False: the derivative by central differences has no meaning (comparisons, floor, bits)


OPS: Registry[Op] = Registry("operator")


def make(op: str, args: tuple[Node, ...], attrs: dict[str, Any], source: str = "", scope: str = "") -> Node:
    """A new node, its types inferred by the operator's own rule."""
    types = OPS[op].infer(*(a.type for a in args), **attrs)
    return Node(op, args, attrs, types if isinstance(types, tuple) else (types,), source, scope)


def input_node(type: Type, name: str = "", source: str = "") -> Node:
    """A new input; every one is different."""
    return Node("input", (), {"name": name}, (type,), source)


def constant_node(value: Any, dtype: Any, source: str = "", weak: bool = False) -> Node:
    """A number known when tracing. Kept as a NumPy scalar, so that it can be a key."""
    array = np.asarray(value, dtype)
    return Node("constant", (), {"value": array[()]}, (Type((), array.dtype, weak),), source)


def output_node(node: Node, index: int) -> Node:
    """One result of a node that has several."""
    return Node("output", (node,), {"index": index}, (node.types[index],), node.source, node.scope)


def rebuilt(node: Node, args: tuple[Node, ...], attrs: Attrs | None = None) -> Node:
    """`node` with other arguments or attributes; the same node if nothing is different."""
    attrs = node.attrs if attrs is None or all(attrs[k] is node.attrs[k] for k in node.attrs) else attrs
    if args == node.args and attrs is node.attrs:
        return node
    return Node(node.op, args, attrs, node.types, node.source, node.scope)


def topological(outputs: Iterable[Node]) -> list[Node]:
    """Nodes that `outputs` depend on, arguments first, without recursion: chains may be longer than Python's stack."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[Any] = list(outputs)[::-1]  # None: the one below it has all its arguments
    while stack:
        node = stack.pop()
        if node is None:
            order.append(stack.pop())
        elif node not in seen:
            seen.add(node)
            stack += (node, None, *node.args[::-1])
    return order
