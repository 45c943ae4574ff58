"""What an explanation knows of networks: names of parameters and of the values of layers.

In: the objective of a network as a graph with named inputs. Out: W0, b0 for its parameters, z0, a0 for what its layers compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..graph.node import OPS, Array, Graph, Node

_PARAMETERS = {"weight": "W", "bias": "b"}
_INPUTS = {
    "target": ("y", "target"),
    "weight": ("r", "weight of each row"),
    "divisor": ("n", "rows, or the sum of their weights"),
    "seed": ("seed", "seed of the random numbers"),
    "step": ("step", "number of the step"),
}


class Objective(Protocol):
    """What a network tells about itself: the objective as a graph [objective, scores] of named inputs, and its layers.

    wrt: which inputs are trainable parameters. layers: path -> what the layer is.
    """

    graph: Graph
    names: Sequence[str]
    values: Sequence[Array]
    wrt: Sequence[int]
    layers: Mapping[str, str]


@dataclass(frozen=True)
class Input:
    """An input of a graph: its symbol, what to say about it, and the layer that it belongs to."""

    symbol: str
    about: str = ""
    scope: str = ""


def suffix(path: str) -> str:
    """A layer's name as the end of a variable's.

    >>> suffix("0"), suffix("2.1"), suffix("encoder.0")
    ('0', '2_1', '_encoder_0')
    """
    word = "".join(c if c.isalnum() else "_" for c in path)
    return word if not word or word[0].isdigit() else f"_{word}"


def network_input(name: str) -> Input:
    """The symbol for an input of a network's objective.

    >>> network_input("0.weight").symbol, network_input("2.scale").symbol, network_input("target").symbol
    ('W0', 'scale2', 'y')
    """
    path, _, last = name.rpartition(".")
    if not path:
        symbol, about = _INPUTS.get(name, (name, "input"))
        return Input(symbol, about)
    word = "".join(c if c.isalnum() else "_" for c in last)
    return Input(_PARAMETERS.get(word, word) + suffix(path), name, path)


def layer_values(graph: Graph) -> list[tuple[Node, str, str]]:
    """The values of each layer that every textbook has a name for: (node, "z" or "a", layer).

    z is what a layer computes by products and sums with its parameters; a is what it passes on. A layer that is used twice or
    that has several such z (attention) keeps no name for them.
    """
    order = graph.nodes()
    users: dict[Node, list[Node]] = {}
    layers: dict[str, list[Node]] = {}
    for node in order:
        for arg in node.args:
            users.setdefault(arg, []).append(node)
        if node.scope and node.op not in ("input", "constant"):
            layers.setdefault(node.scope, []).append(node)
    found = []
    for scope, nodes in layers.items():
        passed = [n for n in nodes if n in graph.outputs or any(u.scope != scope for u in users.get(n, ()))]
        passed = [n for n in passed if n.dtype.kind == "f" and len(n.types) == 1]
        affine: dict[Node, None] = {}
        for n in nodes:
            if (
                n.op == "contract"
                or (n.op == "reshape" and n.args[0] in affine)  # groups of filters side by side
                or (n.op in ("add", "subtract") and _is_affine_sum(n, affine))
            ):
                affine[n] = None
        tops = [n for n in affine if n in graph.outputs or any(u not in affine for u in users.get(n, ()))]
        z = tops[0] if len(tops) == 1 else None
        a = passed[0] if len(passed) == 1 else None
        if a is not None and not affine and len(a.args) == 1 and a.args[0].scope == scope and _is_activation(a):
            z = a.args[0]
        if z is not None:
            found.append((z, "z", scope))
        if a is not None and a is not z:
            found.append((a, "a", scope))
    return found


def _is_activation(node: Node) -> bool:
    return node.op == "call" or (node.op in OPS and OPS[node.op].elementwise)


def _is_affine_sum(node: Node, affine: Mapping[Node, None]) -> bool:
    """Whether a sum adds a parameter, or another such value, to what is computed so."""
    a, b = node.args
    for one, other in ((a, b), (b, a)):
        if one in affine:
            while other.op in ("broadcast", "reshape"):
                other = other.args[0]
            return other.op == "input" or other in affine
    return False
