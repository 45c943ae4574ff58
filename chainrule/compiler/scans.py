"""Loops of a graph: what is the same in every step goes out of them, and what one loop has computed another does not compute again.

In, out: a graph in normal form. A state to which sums that lie side by side are added (the gradient of an array whose parts are used
apart) becomes a state for each of them, which can be gathered over many steps (gather.py). A backward loop computes the inner values of
each step again from the state that the step began with (ops/loop.py). Here the forward loop is made to stack those of them that cost
much, as far as the backward loop reads them; what follows from these by a few operators is still computed again, so that less has to go
to memory and back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..graph.node import OPS, Graph, Node, Type, input_node, make, output_node, rebuilt
from ..normalize import node_key, normalize
from .former import EXPENSIVE, VIRTUAL
from .views import sliced

AGAIN = 16.0  # about so many instructions for each element may be spent to save that it is stored and read
COSTLY = 12.0  # of an expensive function


def improve(graph: Graph) -> Graph:
    """All of this for all loops of the graph, those inside loops first."""
    if not any(n.op == "scan" for n in graph.nodes()):
        return graph
    table: dict[Node, Node] = {i: i for i in graph.inputs}
    results: dict[Node, list[Node]] = {}  # of loops that have got more states
    for node in graph.nodes():
        if node in table:
            continue
        if node.op == "output" and node.args[0] in results:
            table[node] = results[node.args[0]][node.attrs["index"]]
            continue
        args = tuple(table[a] for a in node.args)
        attrs = {k: improve(v) if isinstance(v, Graph) else v for k, v in node.attrs.items()}
        new = rebuilt(node, args, attrs)
        table[node] = _hoisted(new) if new.op == "scan" else new
        if (apart := _sums_apart(table[node])) is not None:
            results[node] = apart
            table[node] = apart[0]  # who reads it without saying which reads a loop of one result
    graph = normalize(Graph(graph.inputs, tuple(table[o] for o in graph.outputs), graph.captures, graph.name))
    return _kept(graph)


# ---- what is the same in every step ------------------------------------------------------------------------------------------


def _hoisted(loop: Node) -> Node:
    """The loop with what depends on its constants alone computed before it."""
    body: Graph = loop.attrs["body"]
    first = loop.attrs["states"] + loop.attrs["sequences"]
    outside: dict[Node, Node] = dict(zip(body.inputs[first:], loop.args[first:], strict=True))
    chosen: dict[Node, Node] = {}
    table: dict[Node, Node] = {i: i for i in body.inputs}
    fixed = set(outside)
    nodes = body.nodes()
    for node in nodes:
        if node.args and all(a in fixed or a.op in ("constant", "iota") for a in node.args):
            fixed.add(node)
    ends = {a for n in nodes if n not in fixed for a in n.args if a in fixed} | (fixed & set(body.outputs))
    order = {n for n in ends if n.op != "input" and _is_worth_it(n, nodes, fixed)}
    if not order:
        return loop
    for node in _below(order):
        if node not in outside:
            outside[node] = rebuilt(node, tuple(outside[a] for a in node.args))
    for node in nodes:
        if node in order:
            chosen[node] = table[node] = input_node(Type(node.shape, node.dtype))
        elif node not in table:
            table[node] = rebuilt(node, tuple(table[a] for a in node.args))
    new = Graph((*body.inputs, *chosen.values()), tuple(table[o] for o in body.outputs))
    args = (*loop.args, *(outside[n] for n in chosen))
    return Node("scan", args, {**loop.attrs, "body": new}, loop.types, loop.source, loop.scope)


def _is_worth_it(node: Node, nodes: Sequence[Node], fixed: set[Node]) -> bool:
    """Whether it has to be computed at all: a change of index does not, except for an operand of a product."""
    if node.op not in VIRTUAL and len(node.types) == 1:
        return True
    return node.op == "transpose" and any(n.op == "contract" and node in n.args for n in nodes if n not in fixed)


def _below(roots: Iterable[Node]) -> list[Node]:
    return Graph((), tuple(roots)).nodes()


# ---- sums side by side -------------------------------------------------------------------------------------------------------


def _sums_apart(loop: Node) -> list[Node] | None:
    """The results of a loop with a state for each of the sums that are added side by side to one; None where there are none."""
    if loop.op != "scan":
        return None
    body: Graph = loop.attrs["body"]
    states = loop.attrs["states"]
    found = {k: joined for k in range(states) if (joined := _joined_sums(body, k)) is not None}
    if not found:
        return None
    first, inputs, outputs = list[Node](), list[Node](), list[Node]()
    for k in range(states):
        if k not in found:
            first.append(loop.args[k])
            inputs.append(body.inputs[k])
            outputs.append(body.outputs[k])
            continue
        at, axis = 0, found[k].attrs["axis"]
        for part in found[k].args:
            first.append(sliced(loop.args[k], axis, at, at + part.shape[axis]))
            inputs.append(input_node(part.type))
            outputs.append(make("add", (inputs[-1], part), {}, part.source, part.scope))
            at += part.shape[axis]
    new = Graph((*inputs, *body.inputs[states:]), (*outputs, *body.outputs[states:]))
    types = (*(o.type for o in outputs), *loop.types[states:])
    attrs = {**loop.attrs, "states": len(inputs), "body": new}
    made = Node("scan", (*first, *loop.args[states:]), attrs, types, loop.source, loop.scope)
    each = iter([output_node(made, i) for i in range(len(types))])
    return [_joined(found[k], [next(each) for _ in found[k].args]) if k in found else next(each) for k in range(len(loop.types))]


def _joined_sums(body: Graph, k: int) -> Node | None:
    """The sums, one after the other, that a step adds to a state; nothing else in it reads the state, before or after."""
    state, new = body.inputs[k], body.outputs[k]
    if new.op != "add" or state not in new.args or body.outputs.count(state) or body.outputs.count(new) > 1:
        return None
    if [n for n in body.nodes() if state in n.args or new in n.args] != [new]:
        return None
    joined = new.args[0] if new.args[1] is state else new.args[1]
    return joined if joined.op == "concatenate" and all(p.op in ("sum", "contract") for p in joined.args) else None


def _joined(like: Node, parts: Sequence[Node]) -> Node:
    return make("concatenate", tuple(parts), dict(like.attrs), like.source, like.scope)


# ---- what another loop has computed ------------------------------------------------------------------------------------------


def _kept(graph: Graph) -> Graph:
    """Loops that read what another has stacked take from it what both compute."""
    done: set[tuple[Node, Node]] = set()
    while True:
        pair = next((p for p in _pairs(graph) if p not in done), None)
        if pair is None:
            return graph
        forward, back = pair
        wanted = _wanted(forward, back)
        if not wanted:
            done.add(pair)
            continue
        graph = normalize(_with_more(graph, forward, back, wanted))


def _pairs(graph: Graph) -> Iterable[tuple[Node, Node]]:
    """(a loop, a later one that reads what it has stacked)."""
    for back in graph.nodes():
        if back.op == "scan":
            first = back.attrs["states"]
            for forward in dict.fromkeys(_loop(a) for a in back.args[first : first + back.attrs["sequences"]]):
                if forward is not None and forward.attrs["length"] == back.attrs["length"]:
                    yield forward, back


def _loop(node: Node) -> Node | None:
    """The loop whose result a node is."""
    if node.op == "output":
        node = node.args[0]
    return node if node.op == "scan" else None


def _wanted(forward: Node, back: Node) -> dict[Node, Node]:
    """Nodes of the later loop's step that shall be read instead of computed: -> the same in the step of the earlier one."""
    same = _same(forward, back)
    body: Graph = back.attrs["body"]
    nodes = body.nodes()
    outputs = set(body.outputs)
    read = {a for n in nodes if n not in same for a in n.args if a in same} | (outputs & same.keys())
    free = {n for n in nodes if n in same and n.op in ("input", "constant", "iota")}
    wanted: dict[Node, Node] = {}
    for node in nodes:
        if node in read and node not in free and len(node.types) == 1 and _price(node, free) > AGAIN:
            free.add(node)
            wanted[node] = same[node]
    return wanted


def _price(node: Node, free: set[Node]) -> float:
    """About how many instructions an element takes, if those in `free` are in memory."""
    total, seen, stack = 0.0, set(free), [node]
    while stack and total <= AGAIN:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.op not in VIRTUAL:
            total += (COSTLY if n.op in EXPENSIVE else 1.0) if OPS[n.op].elementwise else AGAIN + 1
        stack += n.args
    return total


def _same(forward: Node, back: Node) -> dict[Node, Node]:
    """The nodes of the later loop's step that have, at each time, the value of a node of the earlier one's."""
    one, other = forward.attrs["body"], back.attrs["body"]
    known: dict[Any, Node] = {}
    numbers: dict[Node, int] = {}
    for node in one.nodes():
        if node.op != "input":
            known.setdefault(node_key(node, tuple(numbers.setdefault(a, len(numbers)) for a in node.args)), node)
    states, sequences = forward.attrs["states"], forward.attrs["sequences"]
    along = dict(zip(forward.args[states : states + sequences], one.inputs[states : states + sequences], strict=True))
    fixed = dict(zip(forward.args[states + sequences :], one.inputs[states + sequences :], strict=True))
    at, last = back.attrs["states"], back.attrs["states"] + back.attrs["sequences"]
    same: dict[Node, Node] = {}
    for place, (arg, node) in enumerate(zip(back.args, other.inputs, strict=True)):
        if at <= place < last:
            found = along.get(arg)
            if arg.op == "output" and arg.args[0] is forward and arg.attrs["index"] >= states:
                found = one.outputs[arg.attrs["index"]]
        else:
            found = fixed.get(arg) if place >= last else None
        if found is not None:
            same[node] = found
    for node in other.nodes():
        if node.op == "input" or not all(a in same for a in node.args):
            continue
        counterpart = known.get(node_key(node, tuple(numbers.get(same[a], -1) for a in node.args)))
        if counterpart is not None:
            same[node] = counterpart
    return same


def _with_more(graph: Graph, forward: Node, back: Node, wanted: Mapping[Node, Node]) -> Graph:
    """The graph in which the earlier loop stacks what the later one wants."""
    table: dict[Node, Node] = {i: i for i in graph.inputs}
    more: list[Node] = []
    for node in graph.nodes():
        if node in table:
            continue
        args = tuple(table[a] for a in node.args)
        if node is forward:
            table[node] = new = _stacking(node, args, list(dict.fromkeys(wanted.values())))
            more = [output_node(new, i) for i in range(len(node.types), len(new.types))]
            if len(node.types) == 1:
                table[node] = output_node(new, 0)
        elif node is back:
            stacked = dict(zip(dict.fromkeys(wanted.values()), more, strict=True))
            table[node] = _reading(node, args, {n: stacked[w] for n, w in wanted.items()})
        else:
            table[node] = rebuilt(node, args)
    return Graph(graph.inputs, tuple(table[o] for o in graph.outputs), graph.captures, graph.name)


def _stacking(loop: Node, args: tuple[Node, ...], wanted: Sequence[Node]) -> Node:
    body: Graph = loop.attrs["body"]
    length = loop.attrs["length"]
    new = Graph(body.inputs, (*body.outputs, *wanted))
    types = (*loop.types, *(Type((length, *n.shape), n.dtype) for n in wanted))
    return Node("scan", args, {**loop.attrs, "body": new}, types, loop.source, loop.scope)


def _reading(loop: Node, args: tuple[Node, ...], wanted: Mapping[Node, Node]) -> Node:
    """The loop with more sequences, which stand in place of nodes of its step."""
    body: Graph = loop.attrs["body"]
    last = loop.attrs["states"] + loop.attrs["sequences"]
    table: dict[Node, Node] = {i: i for i in body.inputs}
    inputs = {n: input_node(Type(n.shape, n.dtype)) for n in wanted}
    for node in body.nodes():
        if node in inputs:
            table[node] = inputs[node]
        elif node not in table:
            table[node] = rebuilt(node, tuple(table[a] for a in node.args))
    new = Graph((*body.inputs[:last], *inputs.values(), *body.inputs[last:]), tuple(table[o] for o in body.outputs))
    attrs = {**loop.attrs, "body": new, "sequences": loop.attrs["sequences"] + len(inputs)}
    return Node("scan", (*args[:last], *wanted.values(), *args[last:]), attrs, loop.types, loop.source, loop.scope)
