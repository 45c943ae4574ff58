"""Where each value carries the rows (samples) of a batch.

In: a graph and the row axis of each of its inputs. Out: the row axis of its outputs, by the rule of each operator. A value with a
row axis depends, in each row, on that row of its arguments only, and on sums over all rows: this is what lets a thread take a block of
rows through a network. "mixed" is all that depends on rows in another way, so on their order perhaps.
"""

from __future__ import annotations

from collections.abc import Sequence

from .node import OPS, Graph, Node, Rows


def rows_of_nodes(graph: Graph, inputs: Sequence[Rows]) -> dict[tuple[Node, int], Rows]:
    """The row axis of every result of every node."""
    table: dict[tuple[Node, int], Rows] = {(n, 0): r for n, r in zip(graph.inputs, inputs, strict=True)}
    for node in graph.nodes():
        if node.op == "input":
            continue
        if node.op == "output":
            table[node, 0] = table[node.args[0], node.attrs["index"]]
            continue
        rows = [table[a, 0] for a in node.args]
        if "mixed" in rows:
            result: Rows | tuple[Rows, ...] = tuple("mixed" for _ in node.types)
        elif all(r is None for r in rows):
            result = tuple(None for _ in node.types)
        else:
            result = OPS[node.op].rows(rows, [a.type for a in node.args], **node.attrs)
        results = result if isinstance(result, tuple) else (result,)
        table.update({(node, i): r for i, r in enumerate(results)})
    return table


def propagate_rows(graph: Graph, inputs: Sequence[Rows]) -> list[Rows]:
    """The row axis of each output."""
    table = rows_of_nodes(graph, inputs)
    return [table[o, 0] for o in graph.outputs]
