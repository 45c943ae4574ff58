"""An evaluator of the equations that `cr.explain` prints. It knows NumPy, the functions that the remarks under "Where" explain, and loops;
it sees nothing but the text, the inputs, and the random numbers that were drawn."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import chainrule as cr
from chainrule.explain import Explanation, explain


def pad(x: Any, amounts: Any, fill: float = 0) -> np.ndarray:
    x = np.asarray(x)
    amounts = [(*a, 0) if len(a) == 2 else a for a in amounts]
    shape = [lo + hi + n + max(n - 1, 0) * mid for n, (lo, hi, mid) in zip(x.shape, amounts, strict=True)]
    y = np.full(shape, fill, np.result_type(x, float))
    places = [
        slice(lo, lo + (n - 1) * (mid + 1) + 1 if n else lo, mid + 1) for n, (lo, _, mid) in zip(x.shape, amounts, strict=True)
    ]
    y[tuple(places)] = x
    return y


def scatter_add(a: Any, i: Any, g: Any, axis: int = 0) -> np.ndarray:
    y = np.array(a, float)
    moved, i = np.moveaxis(y, axis, 0), np.asarray(i)
    parts = np.moveaxis(np.asarray(g).reshape(*y.shape[:axis], i.size, *y.shape[axis + 1 :]), axis, 0)
    for k, at in enumerate(i.reshape(-1)):
        moved[at] += parts[k]
    return y


def windows(x: Any, axes: Sequence[int], size: Sequence[int], stride: Any = None, dilation: Any = None) -> np.ndarray:
    x = np.asarray(x)
    stride, dilation = stride or (1,) * len(axes), dilation or (1,) * len(axes)
    counts = [(x.shape[a] - (k - 1) * d - 1) // s + 1 for a, k, s, d in zip(axes, size, stride, dilation, strict=True)]
    shape = list(x.shape)
    for a, c in zip(axes, counts, strict=True):
        shape[a] = c
    y = np.zeros((*shape, *size))
    for offset in np.ndindex(*size):
        pick: list[Any] = [slice(None)] * x.ndim
        for a, o, c, s, d in zip(axes, offset, counts, stride, dilation, strict=True):
            pick[a] = [o * d + k * s for k in range(c)]
        part = x
        for a in axes:
            part = np.take(part, pick[a], a)
        y[(..., *offset)] = part
    return y


def fold(w: Any, shape: Any, axes: Any, size: Any, stride: Any = None, dilation: Any = None) -> np.ndarray:
    """The adjoint of `windows`, by its matrix."""
    n = math.prod(shape)
    matrix = np.stack([windows(e.reshape(shape), axes, size, stride, dilation).reshape(-1) for e in np.eye(n)])
    return (matrix @ np.asarray(w).reshape(-1)).reshape(shape)


NUMPYS_OWN = """abs all any arange arccos arccosh arcsin arctan argmax broadcast_to concatenate cos einsum exp expm1 flip floor full log
    log1p max maximum mean min minimum ones reshape sign sin sqrt stack sum tan tanh transpose where zeros inf nan"""
NAMESPACE: dict[str, Any] = {
    **{name: getattr(np, name) for name in NUMPYS_OWN.split()},
    "erf": np.vectorize(math.erf, otypes=[float]),
    "float": lambda x: np.asarray(x, float),
    "int": lambda x: np.asarray(np.trunc(x), np.int64),
    "one_hot": lambda i, n: (np.asarray(i)[..., None] == np.arange(n)) * 1.0,
    "pad": pad,
    "range": range,
    "scatter_add": scatter_add,
    "windows": windows,
    "fold": fold,
}


class Steps:
    """A variable with a value for each step of the loops around it."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.lengths: list[int] = []
        self.at: dict[tuple[int, ...], Any] = {}

    def __getitem__(self, key: Any) -> Any:
        full = key if isinstance(key, tuple) else (key,)
        if all(isinstance(k, int) for k in full) and len(full) <= self.depth:
            return self.at[full] if len(full) == self.depth else self.whole(full)
        return self.whole(())[key]

    def whole(self, key: tuple[int, ...]) -> Any:
        if len(key) == self.depth:
            return self.at[key]
        return np.stack([self.whole((*key, i)) for i in range(self.lengths[len(key)])])


class Reader:
    """Runs an explanation's text."""

    def __init__(self, text: str, inputs: dict[str, Any], draws: dict[str, Any]) -> None:
        blocks = {b.splitlines()[0]: b.splitlines()[1:] for b in text.split("\n\n")[1:]}
        self.inputs = [re.split(r"\s{2,}", line.strip())[0] for line in blocks.get("Names", [])]
        lines = [line for title in ("Forward pass", "Backward pass") for line in blocks[title]]
        self.lines = [(len(line) - len(line.lstrip()), re.split(r"\s{2,}", line.strip())[0]) for line in lines]
        self.draws = draws
        self.space = dict(NAMESPACE)
        self.alias: dict[str, str] = {}
        self.loops: list[int] = []  # the numbers of steps of the loops around
        for name in self.inputs:
            self.set(name, (), inputs[name])
        for line in blocks.get("Where", []):
            if " = " in line:
                self.function(re.split(r"\s{3,}", line.strip())[0])
        self.run(0, len(self.lines))

    def plain(self, name: str) -> str:
        """A name as a Python identifier."""
        if name.isidentifier():
            return name
        return self.alias.setdefault(name, f"name_{len(self.alias)}")

    def code(self, text: str) -> str:
        for name in sorted(self.alias, key=len, reverse=True):
            text = text.replace(name, self.alias[name])
        return text.replace("'(", "_prime(")

    def set(self, name: str, key: tuple[int, ...], value: Any) -> None:
        plain = self.plain(name)
        if not key:
            self.space[plain] = value
            return
        if not isinstance(self.space.get(plain), Steps):
            self.space[plain] = Steps(len(key))
        self.space[plain].at[key] = value
        if len(self.loops) == len(key):
            self.space[plain].lengths = list(self.loops)

    def value(self, text: str) -> Any:
        tree = ast.parse(self.code(text), mode="eval")
        steps = {n for n, v in self.space.items() if isinstance(v, Steps)}

        class Whole(ast.NodeTransformer):
            def visit_Subscript(self, node: ast.Subscript) -> Any:
                if isinstance(node.value, ast.Name):
                    node.slice = self.visit(node.slice)
                    return node
                return self.generic_visit(node)

            def visit_Name(self, node: ast.Name) -> Any:
                if node.id in steps:
                    return ast.copy_location(ast.parse(f"{node.id}.whole(())", mode="eval").body, node)
                return node

        code = ast.fix_missing_locations(Whole().visit(tree))
        with np.errstate(all="ignore"):
            return eval(compile(code, text, "eval"), {**self.space, "__builtins__": {}})

    def function(self, line: str) -> None:
        """`f(x, axis=0) = u + 1 with u = exp(x), ...`"""
        left, right = re.split(r"(?<=\)) = ", line, maxsplit=1)
        right, *parts = re.split(r" with |, (?=[uvw]\d* = )", right)
        call = ast.parse(self.code(left), mode="eval").body
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Name)
        parameters = [a.id for a in call.args if isinstance(a, ast.Name)]
        options = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        before = self.space.get(call.func.id)

        def defined(*args: Any, **given: Any) -> Any:
            if given != options and callable(before):
                return before(*args, **given)
            assert given == options
            kept = self.space
            self.space = {**kept, **dict(zip(parameters, args, strict=True))}
            try:
                for part in parts:
                    name, _, value = part.partition(" = ")
                    self.space[name] = self.value(value)
                return self.value(right)
            finally:
                self.space = kept

        self.space[call.func.id] = defined

    def run(self, first: int, last: int) -> None:
        at = first
        while at < last:
            indent, line = self.lines[at]
            loop = re.fullmatch(r"for (\w+) = (\d+) … (\d+):", line)
            if loop:
                end = next((k for k in range(at + 1, last) if self.lines[k][0] <= indent), last)
                a, b = int(loop[2]), int(loop[3])
                self.loops.append(abs(a - b) + 1)
                for step in range(a, b + 1) if a <= b else range(a, b - 1, -1):
                    self.space[loop[1]] = step
                    self.run(at + 1, end)
                del self.space[loop[1]]
                self.loops.pop()
                at = end
                continue
            at += 1
            equation = re.match(r"(.*?) (=|\+=|~) (.*)", line)
            if equation is None:
                assert line.startswith(("Layer", "Loss")), line
                continue
            left, sign, right = equation.groups()
            name, key = self.target(left)
            if sign == "~":
                assert right == "uniform[0, 1)"
                drawn = self.draws[name]
                value = drawn[key] if key else drawn
            else:
                value = self.value(right)
            if sign == "+=":
                old = self.space[self.plain(name)]
                value = (old[key] if key else old) + value
            self.set(name, key, value)

    def target(self, left: str) -> tuple[str, tuple[int, ...]]:
        """What a line gives a value to: a name and a step."""
        if left.removeprefix("∂L/∂") in self.inputs or not left.endswith("]"):
            return left, ()
        name, _, steps = left[:-1].rpartition("[")
        return name, tuple(int(self.value(s)) for s in steps.split(", "))

    def __getitem__(self, name: str) -> np.ndarray:
        value = self.space[self.plain(name)]
        return np.asarray(value.whole(()) if isinstance(value, Steps) else value)


def agrees(f: Callable[..., Any], *args: Any, rtol: float = 1e-7) -> Explanation:
    """The equations of `f` give its value and all its gradients; so do the values kept with them."""
    e = explain(f, *args, numbers=True)
    plain = explain(f, *args)
    reader = Reader(plain.text, e.values, e.values)
    floats = tuple(i for i, a in enumerate(args) if all(np.asarray(leaf).dtype.kind == "f" for leaf in leaves(a)))
    value, gradients = cr.value_and_grad(f, floats)(*args)
    np.testing.assert_allclose(reader["L"], value, rtol=rtol, atol=1e-9)
    wanted = [np.asarray(leaf) for g in gradients for leaf in leaves(g)]
    order = {v.name: k for k, v in enumerate(n.var for n in plain.document.names)}
    names = sorted((n for n in e.values if n.startswith("∂L/∂") and n[4:] in reader.inputs), key=lambda n: order[n[4:]])
    assert len(names) == len(wanted), plain.text
    for name, want in zip(names, wanted, strict=True):
        for found in (reader[name], e.values[name]):
            assert np.shape(found) == want.shape
            scale = max(1.0, float(np.max(np.abs(want), initial=0.0)))
            np.testing.assert_allclose(found, want, rtol=rtol, atol=rtol * scale, err_msg=f"{name}\n{plain.text}")
    return plain


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for k in sorted(tree) for leaf in leaves(tree[k])]
    if isinstance(tree, (list, tuple)):
        return [leaf for part in tree for leaf in leaves(part)]
    return [tree]
