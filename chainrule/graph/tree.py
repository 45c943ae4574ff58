"""Nested dicts, lists, tuples, named tuples and dataclasses of arrays.

In: any such nest. Out: its leaves in a fixed order, and a hashable structure that puts leaves back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import UsageError


@dataclasses.dataclass(frozen=True)
class Structure:
    """The shape of a nest. `kind` is the container's class, `keys` its keys or fields; a leaf has kind None."""

    kind: Any = None
    keys: tuple[Any, ...] = ()
    children: tuple[Structure, ...] = ()

    @property
    def leaves(self) -> int:
        return 1 if self.kind is None else sum(c.leaves for c in self.children)


LEAF = Structure()


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """Leaves and structure of `tree`. `None` is an empty container; dicts of any class are plain ones, their keys sorted.

    >>> leaves, structure = flatten({"b": [1, 2], "a": (3,)})
    >>> leaves
    [3, 1, 2]
    >>> unflatten(structure, ["x", "y", "z"])
    {'a': ('x',), 'b': ['y', 'z']}
    """
    leaves: list[Any] = []
    try:
        return leaves, _flatten(tree, leaves)
    except RecursionError:
        raise UsageError(
            "a nest contains itself, or is hundreds of levels deep; pass its arrays in a flat list or dict"
        ) from None


def _flatten(tree: Any, leaves: list[Any]) -> Structure:
    if tree is None:
        return Structure(type(None))
    if isinstance(tree, dict):
        keys = tuple(sorted(tree, key=lambda k: (type(k).__name__, k)))
        return Structure(dict, keys, tuple(_flatten(tree[k], leaves) for k in keys))
    if isinstance(tree, (list, tuple)):
        return Structure(type(tree), (), tuple(_flatten(t, leaves) for t in tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type) and not hasattr(tree, "__array__"):
        names = tuple(f.name for f in dataclasses.fields(tree) if f.init)
        return Structure(type(tree), names, tuple(_flatten(getattr(tree, n), leaves) for n in names))
    leaves.append(tree)
    return LEAF


def unflatten(structure: Structure, leaves: Sequence[Any]) -> Any:
    """The nest of this structure with these leaves."""
    if structure.leaves != len(leaves):
        raise UsageError(f"a tree of {structure.leaves} leaves cannot be filled with {len(leaves)}")
    return filler(structure)(iter(leaves))


def filler(s: Structure) -> Callable[[Iterator[Any]], Any]:
    """`unflatten` for nests of this structure, of as many leaves as it has: quick, for a call that takes microseconds."""
    kind, keys = s.kind, s.keys
    if kind is None:
        return next
    if kind is type(None):
        return lambda leaves: None
    fill = [filler(c) for c in s.children]
    if kind is dict:
        return lambda leaves: {k: f(leaves) for k, f in zip(keys, fill, strict=True)}
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return lambda leaves: kind(*[f(leaves) for f in fill])
    if issubclass(kind, (list, tuple)):
        return lambda leaves: kind([f(leaves) for f in fill])
    return lambda leaves: kind(**{k: f(leaves) for k, f in zip(keys, fill, strict=True)})


def tree_map(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`f` of each leaf (and of the leaves of trees of the same structure).

    >>> tree_map(lambda a, b: a + b, {"x": 1}, {"x": 2})
    {'x': 3}
    """
    leaves, structure = flatten(tree)
    rest = []
    for other in others:
        more, same = flatten(other)
        if same != structure:
            raise UsageError(f"trees of different structure: {describe(structure)} and {describe(same)}")
        rest.append(more)
    return unflatten(structure, [f(*group) for group in zip(leaves, *rest, strict=True)])


def describe(s: Structure) -> str:
    """A structure as a short text, for messages."""
    if s.kind is None:
        return "*"
    if s.kind is type(None):
        return "None"
    if s.keys:
        return f"{s.kind.__name__}({', '.join(f'{k}: {describe(c)}' for k, c in zip(s.keys, s.children, strict=True))})"
    return f"{s.kind.__name__}({', '.join(map(describe, s.children))})"


def paths(structure: Structure, prefix: str = "") -> list[str]:
    """A name for each leaf: "0.weight", "layers.1"."""
    if structure.kind is None:
        return [prefix]
    names = structure.keys or tuple(range(len(structure.children)))
    parts = zip(names, structure.children, strict=True)
    return [p for name, child in parts for p in paths(child, f"{prefix}.{name}" if prefix else str(name))]
