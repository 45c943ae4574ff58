"""What `cr.explain` prints is true: the equations, read by an evaluator of their own, give the gradients."""

from __future__ import annotations

import ast
import math
import re
import time
import unicodedata
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from test_random_graphs import NUMPY, Program, programs

import chainrule as cr
from chainrule import losses, nn, optim
from chainrule.explain import Explanation, explain
from chainrule.ops.activations import activations

# ---- an evaluator of the printed text ----------------------------------------------------------------------------------------
# It knows NumPy, the functions that the remarks under "Where" explain, and loops. It sees nothing but the text, the inputs, and
# the random numbers that were drawn.


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


# ---- functions that nobody foresaw -------------------------------------------------------------------------------------------

RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape)


CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}


def case(*args: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def declare(f: Callable[..., Any]) -> Callable[..., Any]:
        CASES[f.__name__] = (f, args)
        return f

    return declare


@case(normal(2, 1), normal(4, 2), normal(4, 1))
def regression(w: Any, x: Any, y: Any) -> Any:
    return np.mean((np.tanh(x @ w) - y) ** 2)


@case({"w 1": normal(2, 3), "b": np.zeros(3)}, normal(4, 2))
def fan_out(p: Any, x: Any) -> Any:
    h = np.maximum(x @ p["w 1"] + p["b"], 0)
    e = np.exp(-h)
    return np.sum(e * h) + np.sum(np.where(x > 0, np.log(x), 0.0))


@case([normal(2, 3), {"a b": normal(3), "<b>": normal(1)}], normal(4, 2))
def nests(p: Any, x: Any) -> Any:
    w, q = p
    return np.sum(np.tanh(x @ w + q["a b"]) * q["<b>"])


@case(normal(3, 2), normal(4, 3), normal(2))
def unused(w: Any, x: Any, z: Any) -> Any:
    return np.sum(x @ w)


@case(normal(2, 3, 4), normal(2, 3, 4))
def einsums(a: Any, b: Any) -> Any:
    s = cr.softmax(np.einsum("bik,bjk->bij", a, b))
    third = np.einsum("bij,bkj,k->b", a, b, s[0, 0])
    return np.max(np.einsum("bij,bjk->bik", s, a)) + np.sum(np.einsum("ij,ij->", a[0], b[1])) + np.sum(third * third)


@case(normal(2, 3, 4), normal(2, 4, 3))
def products(a: Any, b: Any) -> Any:
    c = a @ b
    turned = np.transpose(c, (1, 0, 2))[0] * np.swapaxes(c, -1, -2)[:, 0]
    return np.sum(turned) + np.trace(c[0]) + np.sum(np.outer(a[0, 0], b[0, 0])) + a[0, 1] @ b[1, :, 2] + np.sum(a[1, 0] @ b[0])


@case(normal(4, 3), normal(3, 3), normal(2, 3), normal(5, 2, 4))
def recurrent(wx: Any, wh: Any, h0: Any, x: Any) -> Any:
    def step(h: Any, xt: Any) -> Any:
        h = np.tanh(xt @ wx + h @ wh)
        return h, h

    h, ys = cr.scan(step, h0, x)
    return np.sum(ys**2) + np.sum(h)


@case(normal(3, 2), normal(2, 3), normal(6, 4, 2))
def backwards_in_time(w: Any, b: Any, x: Any) -> Any:
    def step(h: Any, xt: Any) -> Any:
        z = xt @ w.T
        new = np.tanh(z + h @ (w @ b))
        return new, (new * 2, h)

    h, (ys, hs) = cr.scan(step, np.zeros((4, 3)), x, reverse=True)
    return np.sum(ys * hs) + np.sum(h) + np.sum(hs[0])


@case(normal(3), normal(4, 5, 3))
def loop_in_a_loop(w: Any, x: Any) -> Any:
    def outer(c: Any, xt: Any) -> Any:
        def inner(h: Any, xs: Any) -> Any:
            h = np.tanh(h * w + xs + np.sum(c))
            return h, h * xs

        h, ys = cr.scan(inner, c * 0.5, xt)
        return h, np.sum(ys) + np.sum(ys[1] * w)

    c, ys = cr.scan(outer, np.ones(3), x)
    return np.sum(ys**2) + np.sum(c)


@case(normal(3), normal(4, 3), normal(5, 3))
def loop_over_a_loops_states(w: Any, x: Any, k: Any) -> Any:
    _, hs = cr.scan(lambda h, xt: (np.tanh(h * w + xt), h * xt), np.ones(3), k)

    def outer(c: Any, xt: Any) -> Any:
        c, _ = cr.scan(lambda h, a: (np.sin(h * w + a), None), c + xt, hs)
        free, _ = cr.scan(lambda h, a: (h * np.cos(a), None), w, k)  # the same in each step of the outer loop
        return c, free

    c, ys = cr.scan(outer, np.zeros(3), x)
    again, _ = cr.scan(lambda h, a: (h * np.cos(a), None), w, k)
    return np.sum(c**2) + np.sum(ys) + np.sum(again * c)


@case(normal(3), normal(5, 3))
def gradient_of_a_loop(w: Any, x: Any) -> Any:
    def inner(v: Any) -> Any:
        h, ys = cr.scan(lambda h, xt: (np.tanh(h * v + xt), h), np.zeros(3), x)
        return np.sum(ys * ys) + np.sum(h)

    g = cr.grad(inner)(w)
    return np.sum(g * g)


@case(normal(3, 3), normal(5, 3))
def second_derivative(w: Any, x: Any) -> Any:
    g = cr.grad(lambda v: np.sum(np.tanh(v @ w) ** 2))(x)
    return np.sum(g * g)


@case(np.abs(normal(3, 4)), normal(4))
def exponentials(x: Any, y: Any) -> Any:
    sums = np.sum(cr.logsumexp(x * y, axis=0)) + np.sum(cr.log_softmax(x) ** 2) + np.sum(cr.softmax(x, axis=0) * y)
    return sums + np.sum(np.hypot(x, y)) + np.sum(np.logaddexp(x, 2 * x))


@case(normal(4, 3), normal(3))
def reductions(x: Any, y: Any) -> Any:
    extremes = np.max(x) + np.sum(np.min(x * y, axis=0)) + np.sum(np.max(x, axis=1, keepdims=True) * x)
    spread = np.std(x) + np.var(x, axis=0).sum() + np.linalg.norm(y)
    return extremes + spread + np.prod(y) + np.sum(np.cumsum(x, axis=1) * x)


@case(normal(5, 4), np.array([0, -1, 2]), normal(3, 4))
def indices(t: Any, i: Any, x: Any) -> Any:
    a = t[i]
    moved = np.sum(t[1:4, ::2]) + np.sum(t[:, i][::-1] ** 2) + np.sum(np.pad(x, ((1, 2), (0, 1))) * 2)
    order = np.argsort(np.arange(12).reshape(3, 4)) % 4
    return np.sum(a * x) + moved + np.sum(np.take_along_axis(x, order, axis=1) * x)


@case(normal(2, 6, 5, 3), normal(3, 2, 3, 4))
def convolution(x: Any, w: Any) -> Any:
    p = cr.windows(x, [1, 2], [3, 2], [2, 1])
    y = np.einsum("bhwcij,cjio->bhwo", p, w)
    return np.sum(np.maximum(y, 0) ** 2)


@case(normal(3, 4), normal(3, 4) > 0)
def cases(x: Any, c: Any) -> Any:
    rooted = np.sum(np.where(c, np.sqrt(np.where(x > 0, x, 1.0)), x**3)) + np.sum(
        np.where((x > 0) & (x < 1), np.log1p(x * x), np.exp(x))
    )
    bounded = np.sum(np.clip(x, -0.5, 0.5) ** 2) + np.sum(np.maximum(x, x.T.reshape(3, 4)))
    return rooted + bounded + np.sum(np.abs(x)) + np.sum(np.sign(x) * x) + np.sum((x > 0) * x) + np.sum((x > 0).astype(float) - x)


@case(normal(3, 4), normal(5, 4))
def attention(q: Any, k: Any) -> Any:
    s = q @ k.T / np.sqrt(4.0)
    p = np.exp(s - np.max(s, axis=1, keepdims=True))
    p = p / np.sum(p, axis=1, keepdims=True)
    return np.sum((p @ k) ** 2)


@case(normal(3, 3))
def powers(x: Any) -> Any:
    plain = np.sum(np.abs(x) ** 1.5) + np.sum(x**4) + np.sum((x * x + 1) ** -1) + np.sum(2.0**x) + np.sum(np.abs(x) ** (x + 2))
    return plain + np.sum(np.arctan(x) + np.sin(x) * np.cos(x)) + np.sum(np.expm1(x) / (1 + np.exp(x))) + np.sum(np.tan(x / 4))


@case(normal(4, 3), normal(3))
def moments(x: Any, w: Any) -> Any:
    m = np.mean(x, axis=0)
    v = np.mean((x - m) ** 2, axis=0)
    return np.sum((x - m) / np.sqrt(v + 1e-5) * w) ** 2


@case(normal(4), normal(3))
def rearranged(a: Any, b: Any) -> Any:
    big = a[:, None] * b[None, :]
    repeated = np.repeat(b, 3)
    joined = (
        np.sum(np.tile(a, 2) * np.concatenate([a, a[::-1]]))
        + np.sum(np.roll(repeated, 2) * np.arange(9))
        + np.sum(np.diff(a) ** 2)
    )
    return np.sum(np.kron(big, big)) + joined + np.sum(np.triu(np.outer(b, b))) + cr.stop_gradient(np.sum(a)) * np.sum(b)


@case(normal(5, 2), normal(4, 4))
def own_derivative(table: Any, x: Any) -> Any:
    @cr.custom_gradient
    def clipped(x: Any) -> Any:
        return x * 1.0, lambda g: np.clip(g, -1, 1)

    @cr.custom_gradient
    def doubled(x: Any, y: Any) -> Any:
        return (x * y, x + y), lambda g: (2 * g[0] * y, g[1] + g[0] * x)

    @cr.custom_gradient
    def summed(x: Any) -> Any:
        h, _ = cr.scan(lambda h, a: (h + np.sin(a), None), np.zeros(x.shape[1:]), x)
        return h, lambda g: np.cos(x) * g

    product, total = doubled(x, x.T)
    product = product * summed(x) * summed(2 * x)
    return np.sum(clipped(table[:3]) * x[1:, ::2]) + np.sum(product) + np.sum(total * x)


@case(normal(4, 3))
def random_numbers(x: Any) -> Any:
    return np.sum(np.where(cr.random.bernoulli((4, 3), 0.5, seed=3), x, 0.0) ** 2)


@case(normal(3) / 3)
def unrolled(x: Any) -> Any:
    for i in range(30):
        x = np.tanh(x * 1.1 + 0.1 * i) * np.sum(x) / 3
    return np.sum(x)


for _name, _function in activations.items():
    CASES[f"activation {_name}"] = (lambda x, f=_function: np.sum(f(x) ** 2) + np.sum(f(x)), (normal(4, 3),))
for _name, _class in losses.losses.items():
    for _k, _example in enumerate(_class.examples):
        _loss, _target = _class(**_example.options), np.asarray(_example.target)
        CASES[f"loss {_name} {_k}"] = (lambda s, loss=_loss, t=_target: np.mean(loss(s, t)), (np.asarray(_example.scores),))


@pytest.mark.parametrize("name", CASES)
def test_the_equations_of_a_function_give_its_gradients(name: str) -> None:
    f, args = CASES[name]
    e = agrees(f, *args)
    assert max(map(len, e.text.splitlines())) < 180
    check_latex(e.latex)
    check_html(e.html)


@given(programs(without=("test",)))  # a comparison may stand at the very number at which `clip` cut off
def test_the_equations_of_random_programs_give_their_gradients(program: Program) -> None:
    agrees(program.loss(NUMPY), *program.inputs(1))


def test_a_wrong_equation_is_noticed() -> None:
    """The evaluator reads the text and nothing else."""
    f, args = CASES["regression"]
    e = explain(f, *args, numbers=True)
    text = explain(f, *args).text
    right = Reader(text, e.values, {})["∂L/∂w"]
    wrong = Reader(text.replace("1 - v1**2", "1 - v1**3"), e.values, {})["∂L/∂w"]
    np.testing.assert_allclose(right, cr.grad(f)(*args))
    assert not np.allclose(wrong, right)


# ---- how it reads ------------------------------------------------------------------------------------------------------------


def test_a_chain_of_operations_is_one_expression_and_the_users_names_stay() -> None:
    f, args = CASES["fan_out"]
    assert (
        explain(f, *args).text
        == """\
L = fan_out(p, x)

Names
  p.b        (3,)
  p['w 1']   (2, 3)
  x          (4, 2)

Forward pass
  v1 = x @ p['w 1'] + p.b                        (4, 3)
  h = maximum(v1, 0)                             (4, 3)
  e = exp(-h)                                    (4, 3)
  L = sum(e * h) + sum(where(x > 0, log(x), 0))  number

Backward pass
  ∂L/∂h = (1 - h) * e                                          (4, 3)
  ∂L/∂v1 = where(v1 > 0, ∂L/∂h, where(v1 == 0, ∂L/∂h / 2, 0))  (4, 3)
  ∂L/∂p.b = sum(∂L/∂v1, axis=0)                                (3,)
  ∂L/∂p['w 1'] = x.T @ ∂L/∂v1                                  (2, 3)
  ∂L/∂x = where(x > 0, 1 / x, 0) + ∂L/∂v1 @ p['w 1'].T         (4, 2)

Where
  where(c, a, 0) is a where c holds, and 0 elsewhere, whatever a is there"""
    )


def test_a_loop_stays_a_loop() -> None:
    f, (wx, wh, h0, _) = CASES["recurrent"]
    assert (
        explain(f, wx, wh, h0, normal(7, 2, 4)).text
        == """\
L = recurrent(wx, wh, h0, x)

Names
  wx   (4, 3)
  wh   (3, 3)
  h0   (2, 3)
  x    (7, 2, 4)

Forward pass
  h[-1] = h0                                (2, 3)
  for t = 0 … 6:
      h[t] = tanh(x[t] @ wx + h[t-1] @ wh)  (2, 3)
  L = sum(h**2) + sum(h[6])                 number

Backward pass
  δh[6] = ones((2, 3))                            (2, 3)
  ∂L/∂wx = zeros((4, 3))                          (4, 3)
  ∂L/∂wh = zeros((3, 3))                          (3, 3)
  for t = 6 … 0:
      g1[t] = (δh[t] + 2 * h[t]) * (1 - h[t]**2)  (2, 3)
      δh[t-1] = g1[t] @ wh.T                      (2, 3)
      ∂L/∂wx += x[t].T @ g1[t]                    (4, 3)
      ∂L/∂wh += h[t-1].T @ g1[t]                  (3, 3)
      ∂L/∂x[t] = g1[t] @ wx.T                     (2, 4)
  ∂L/∂h0 = δh[-1]                                 (2, 3)"""
    )
    assert len(explain(f, wx, wh, h0, normal(500, 2, 4)).text.splitlines()) == 25


def test_the_numbers_of_a_loop_are_those_of_all_steps() -> None:
    text = explain(lambda x: cr.scan(lambda h, a: (h * a, h + a), 1.0, x)[0], np.array([2.0, 3.0, 4.0]), numbers=True).text
    assert (
        text.split("\n\n", 2)[2]
        == """\
Forward pass
  h[-1] = 1                 number
  for t = 0 … 2:
      h[t] = h[t-1] * x[t]  number
        [ 2.  6. 24.]
  L = h[2]                  number
    24.

Backward pass
  δh[2] = 1                      number
  for t = 2 … 0:
      δh[t-1] = δh[t] * x[t]     number
        [12.  4.  1.]
      ∂L/∂x[t] = δh[t] * h[t-1]  number
        [12.  8.  6.]"""
    )


def test_functions_are_defined_by_their_bodies() -> None:
    x = normal(3)
    text = explain(lambda x: np.sum(cr.sigmoid(x) * cr.gelu(x)) + np.sum(cr.leaky_relu(x, slope=0.3)), x).text
    assert "L = sum(σ(x) * gelu(x)) + sum(leaky_relu(x, slope=0.3))" in text
    assert "  σ(x) = 1 / (1 + exp(-x))\n" in text
    assert "  gelu(x) = x * (1 + erf(0.7071067812 * x)) / 2\n" in text
    assert "  leaky_relu(x, slope=0.3) = where(x > 0, x, 0.3 * x)\n" in text
    assert "gelu'(x) = " in text


def test_small_arrays_are_shown_and_large_ones_summed_up() -> None:
    f, args = CASES["regression"]
    text = explain(f, np.ones((2, 1)), np.ones((4, 2)), np.zeros((4, 1)), numbers=True).text
    assert "[[0.964028]" in text
    large = explain(f, np.ones((2, 1)), np.ones((400, 2)), np.zeros((400, 1)), numbers=True)
    assert "mean 0.964028, norm 19.2806, least 0.964028, largest 0.964028" in large.text
    assert large.values["v1"].shape == (400, 1)
    assert explain(f, *args).values == {}
    check_latex(large.latex)
    check_html(large.html)


# ---- networks ----------------------------------------------------------------------------------------------------------------

NETWORKS: dict[str, tuple[Callable[[], Any], Any, Any, str]] = {
    "textbook": (
        lambda: nn.Sequential(nn.Dense(3, "sigmoid"), nn.Dense(1)), normal(4, 2), np.array([0, 1, 1, 0]), "binary_cross_entropy",
    ),
    "deep": (
        lambda: nn.Sequential(nn.Dense(3, "relu"), nn.Dropout(0.2), nn.BatchNorm(), nn.Dense(4)),
        normal(6, 2),
        np.array([0, 1, 2, 3, 0, 1]),
        "cross_entropy",
    ),
    "residual": (
        lambda: nn.Sequential(
            nn.Embedding(5, 3), nn.Flatten(), nn.Residual(nn.Sequential(nn.Dense(6, "gelu"), nn.Dense(6))), nn.LayerNorm(),
            nn.Activation("tanh"), nn.Reshape(2, 3), nn.Flatten(), nn.Dense(1),
        ),
        RANDOM.integers(0, 5, (4, 2)),
        normal(4),
        "mse",
    ),
    "images": (
        lambda: nn.Sequential(
            nn.Conv2D(4, 3, 2, "same", "tanh", groups=2), nn.BatchNorm(), nn.MaxPool2D(3, 1, 1), nn.Dropout2D(0.2),
            nn.Residual(nn.Conv2D(4, 2), nn.AvgPool2D(2, 1)), nn.Flatten(), nn.Dense(1),
        ),
        normal(3, 6, 5, 2),
        normal(3),
        "mse",
    ),
    "time": (
        lambda: nn.Sequential(
            nn.Conv1D(3, 2, padding="causal", dilation=2, activation="softplus"), nn.MaxPool1D(2), nn.AvgPool1D(2, padding="same"),
            nn.GlobalAvgPool(), nn.Dense(3),
        ),
        normal(4, 7, 2),
        np.array([0, 1, 2, 0]),
        "cross_entropy",
    ),
    "functions": (
        lambda: nn.Sequential(nn.Dense(4, "silu"), lambda x: x * np.cos(x), nn.Dense(2, "softplus")), normal(5, 3), normal(5, 2), "huber",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_the_equations_of_a_network_give_its_gradients(name: str, training: bool) -> None:
    make, x, y, loss = NETWORKS[name]
    net = make()
    net.fit(x, y, loss=loss, epochs=0, seed=1, dtype="float64")
    kept = explain(net, x, y, loss=loss, training=training, seed=3, numbers=True)
    plain = explain(net, x, y, loss=loss, training=training, seed=3)
    reader = Reader(plain.text, kept.values, kept.values)
    symbols = {n.about: n.var.name for n in plain.document.names}
    gradients = net.gradients(x, y, loss=loss, training=training, seed=3)
    np.testing.assert_allclose(reader["L"], kept.values["L"], rtol=1e-9)
    for parameter, want in gradients.items():
        for found in (reader[f"∂L/∂{symbols[parameter]}"], kept.values[f"∂L/∂{symbols[parameter]}"]):
            np.testing.assert_allclose(found, want, rtol=1e-7, atol=1e-10, err_msg=f"{parameter}\n{plain.text}")
    check_latex(kept.latex)
    check_html(kept.html)


def test_a_convolution_has_one_z_and_one_a() -> None:
    net = nn.Sequential(nn.Conv2D(4, 3, activation="tanh", groups=2), nn.GlobalAvgPool(), nn.Dense(1))
    lines = [line.split("  (")[0].strip() for line in explain(net, normal(2, 4, 5, 2), normal(2), loss="mse").text.splitlines()]
    at = lines.index("Layer 0: Conv2D(4, 3, activation='tanh', groups=2)")
    assert lines[at + 2 : at + 4] == [
        'z0 = reshape(einsum("ijklmno,nomlp->ijklp", v1, reshape(W0, (3, 3, 1, 2, 2))), (2, 2, 3, 4)) + b0',
        "a0 = tanh(z0)",
    ]


def test_the_textbook_network_reads_like_the_textbook() -> None:
    make, x, y, loss = NETWORKS["textbook"]
    assert (
        explain(make(), x, y, loss=loss, optimizer=cr.SGD(0.5)).text
        == """\
Sequential: 4 parameters to train, loss binary_cross_entropy

Names
  W0   (2, 3)       0.weight
  b0   (3,)         0.bias
  W1   (3, 1)       1.weight
  b1   (1,)         1.bias
  x    (4, 2)       input
  y    (4, 1)       target
  n    = 4          rows, or the sum of their weights

Forward pass
  Layer 0: Dense(3, 'sigmoid')
    z0 = x @ W0 + b0                   (4, 3)
    a0 = σ(z0)                         (4, 3)
  Layer 1: Dense(1)
    z1 = a0 @ W1 + b1                  (4, 1)
  Loss
    L = sum(logistic_loss(z1, y)) / n  number

Backward pass
  Layer 1: Dense(1)
    δ1 = (σ(z1) - y) / n              (4, 1)  ∂L/∂z1
    ∂L/∂W1 = a0.T @ δ1                (3, 1)
    ∂L/∂b1 = sum(δ1, axis=0)          (1,)
  Layer 0: Dense(3, 'sigmoid')
    δ0 = (δ1 @ W1.T) * a0 * (1 - a0)  (4, 3)  ∂L/∂z0
    ∂L/∂W0 = x.T @ δ0                 (2, 3)
    ∂L/∂b0 = sum(δ0, axis=0)          (3,)

Update: SGD
  η = 0.5 (learning_rate)
  W0 ← W0 - η * ∂L/∂W0  (2, 3)
  b0 ← b0 - η * ∂L/∂b0  (3,)
  W1 ← W1 - η * ∂L/∂W1  (3, 1)
  b1 ← b1 - η * ∂L/∂b1  (1,)

Where
  σ(x) = 1 / (1 + exp(-x))
  logistic_loss(scores, target) = log1p(exp(scores)) - target * scores"""
    )


def test_a_large_network_is_explained_within_a_second() -> None:
    net = nn.Sequential(nn.Dense(256, "relu"), nn.Dense(128, "relu"), nn.Dense(10))
    x, y = normal(128, 784), RANDOM.integers(0, 10, 128)
    net.fit(x, y, loss="cross_entropy", epochs=0)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        e = explain(net, x, y, loss="cross_entropy", optimizer="adam")
        assert all((e.text, e.latex, e.html))
        times.append(time.perf_counter() - start)
    assert min(times) < 1


# ---- updates -----------------------------------------------------------------------------------------------------------------

OPTIMIZERS = [o(**options) for o in optim.optimizers.values() if not o.driver for options in o.examples]
OPTIMIZERS += [
    cr.SGD(0.1, momentum=0.9, clip_norm=0.5, l1=0.01, l2=0.1, weight_decay=0.2),
    cr.Adam(0.1, clip_value=0.02, l2=0.1),
    cr.AdamW(0.1),
    cr.Lion(0.1, clip_norm=0.1),
    cr.SGD(cr.schedules.exponential(0.1, 0.5)),
]


def updated(text: str, values: dict[str, np.ndarray], parameters: Sequence[str]) -> dict[str, np.ndarray]:
    """The parameters after two steps of the printed rule, with the same gradient in both."""
    block = next(b for b in text.split("\n\n") if b.startswith("Update: "))
    space = {**NAMESPACE, **{f"d_{p}": values[f"∂L/∂{p}"] for p in parameters}, **{p: values[p] for p in parameters}}
    lines = block.splitlines()[1:]
    for symbol, value in re.findall(
        r"(\S+) = ([-\d.e]+)", "\n".join(li for li in lines if "(" in li and " = " in li and "←" not in li)
    ):
        space.setdefault(unicodedata.normalize("NFKC", symbol), float(value))
    starts = dict(re.findall(r"(\S+) = ([-\d.e]+)", next((li for li in lines if "before the first step" in li), "")))
    groups: list[tuple[str, list[str]]] = []
    for line in lines:
        if re.match(r"  (Once|For every)", line):
            groups.append((line, []))
        elif "←" in line or re.match(r" +k\d+ = ", line):
            if not groups:
                groups.append(("", []))
            groups[-1][1].append(re.split(r"\s{2,}", line.strip())[0])
    own: dict[str, dict[str, Any]] = {p: {} for p in parameters}
    for k, v in starts.items():
        space[unicodedata.normalize("NFKC", k)] = float(v)

    def run(equations: Sequence[str], names: dict[str, Any]) -> None:
        for equation in equations:
            left, right = re.split(r" (?:←|=) ", equation, maxsplit=1)
            code = unicodedata.normalize("NFKC", right.replace("∂L/∂", "d_"))
            for slot in set(re.findall(r"\b[a-z]+_[Wb]\d\b", code)):  # slots of one parameter: m_W0
                names.setdefault(slot, float(starts.get(slot.split("_")[0], 0)))
            names[unicodedata.normalize("NFKC", left)] = eval(code, {**names, "__builtins__": {}})

    for _ in range(2):
        for heading, equations in groups:
            if not heading.startswith("  For every"):
                run(equations, space)
                continue
            for p in parameters:
                wide = values[p].ndim >= 2
                if ("two axes or more" in heading and not wide) or ("less than two" in heading and wide):
                    continue
                slots = {
                    unicodedata.normalize("NFKC", k): float(v) for k, v in starts.items() if "β" not in k and k not in SHARED
                }
                names = {**space, **slots, **own[p], "w": space[p], "g": space[f"d_{p}"]}
                run(equations, names)
                space[p] = names["w"]
                own[p] = {k: names[k] for k in slots}
    return {p: space[p] for p in parameters}


SHARED = ("decay_power", "mu_product", "sum_", "ramp")


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_the_update_that_is_printed_is_the_update(optimizer: cr.Optimizer) -> None:
    make, x, y, loss = NETWORKS["textbook"]
    net = make()
    net.fit(x, y, loss=loss, epochs=0, seed=1, dtype="float64")
    e = explain(net, x, y, loss=loss, optimizer=optimizer, numbers=True)
    plain = explain(net, x, y, loss=loss, optimizer=optimizer)
    names = ["W0", "b0", "W1", "b1"]
    found = updated(plain.text, e.values, names)
    w = {n: e.values[n] for n in names}
    g = {n: e.values[f"∂L/∂{n}"] for n in names}
    slots = {n: optimizer.slots(v) for n, v in w.items()}
    shared: Any = optimizer.shared()
    h = {"learning_rate": float(optimizer.schedule(np.zeros(1), 1)[0]), **optimizer.hyper()}
    for step in range(2):
        w, slots, shared = optim.apply_update(optimizer, w, g, slots, shared, h)
        if step == 0:
            for name, value in e.document.after:
                np.testing.assert_allclose(value, w[name], rtol=1e-9)
    for n in names:
        np.testing.assert_allclose(found[n], w[n], rtol=1e-6, atol=1e-9, err_msg=plain.text)
    check_latex(e.latex)
    check_html(e.html)


def test_an_algorithm_that_asks_for_gradients_itself_is_named() -> None:
    make, x, y, loss = NETWORKS["textbook"]
    text = explain(make(), x, y, loss=loss, optimizer="lbfgs").text
    assert "Update: LBFGS\n  Newton's method" in text


# ---- LaTeX and HTML ----------------------------------------------------------------------------------------------------------

MACROS = frozenset(
    [
        r"\section",
        r"\subsection",
        r"\paragraph",
        r"\begin",
        r"\end",
        r"\text",
        r"\mathrm",
        r"\mathbf",
        r"\mathrel",
        r"\operatorname",
        r"\frac",
        r"\sqrt",
        r"\sum",
        r"\left",
        r"\right",
        r"\odot",
        r"\top",
        r"\partial",
        r"\le",
        r"\ge",
        r"\ne",
        r"\wedge",
        r"\vee",
        r"\neg",
        r"\cdot",
        r"\infty",
        r"\leftarrow",
        r"\sim",
        r"\dots",
        r"\prime",
        r"\lfloor",
        r"\rfloor",
        r"\times",
        r"\to",
        r"\quad",
        r"\exp",
        r"\log",
        r"\sin",
        r"\cos",
        r"\tanh",
        r"\arcsin",
        r"\arccos",
        r"\tan",
        r"\arctan",
        r"\max",
        r"\min",
        r"\textbackslash",
        r"\textasciicircum",
        r"\textasciitilde",
        r"\textless",
        r"\textgreater",
        r"\textbar",
        r"\textquotedbl",
        r"\,",
        r"\{",
        r"\}",
        r"\$",
        r"\&",
        r"\#",
        r"\%",
        r"\_",
        r"\\",
        r"\alpha",
        r"\beta",
        r"\gamma",
        r"\delta",
        r"\varepsilon",
        r"\zeta",
        r"\eta",
        r"\theta",
        r"\iota",
        r"\kappa",
        r"\lambda",
        r"\mu",
        r"\nu",
        r"\xi",
        r"\pi",
        r"\rho",
        r"\sigma",
        r"\tau",
        r"\upsilon",
        r"\varphi",
        r"\chi",
        r"\psi",
        r"\omega",
        r"\Gamma",
        r"\Delta",
        r"\Theta",
        r"\Lambda",
        r"\Xi",
        r"\Pi",
        r"\Sigma",
        r"\Phi",
        r"\Psi",
        r"\Omega",
    ]
)


def check_latex(text: str) -> None:
    """Balanced, ASCII, and made of macros of LaTeX and amsmath only."""
    assert text.isascii()
    tokens = re.findall(r"\\(?:[A-Za-z]+|.|\n)|[{}$&]|[^\\{}$&]+", text)
    stack: list[str] = []
    for k, token in enumerate(tokens):
        if token.startswith("\\"):
            assert token in MACROS, token
        if token in ("\\begin", "\\end"):
            name = tokens[k + 2]
            assert name in ("align*", "cases", "pmatrix", "tabular")
            if token == "\\begin":
                stack.append(name)
            else:
                assert stack.pop() == name
        elif token == "{":
            stack.append("{")
        elif token == "}":
            assert stack.pop() == "{"
        elif token == "\\left":
            stack.append("left")
        elif token == "\\right":
            assert stack.pop() == "left"
        elif token == "$":
            stack.pop() if stack and stack[-1] == "$" else stack.append("$")
        elif token == "&":
            assert any(s in ("align*", "cases", "pmatrix", "tabular") for s in stack)
    assert not stack
    assert "\n\n\\end{align*}" not in text
    assert "\\begin{align*}\n\\end" not in text


MATHML = "math mrow mi mn mo mtext mspace mfrac msub msup msubsup msqrt munder mtable mtr mtd"
HTML = "html head meta title style body div h2 h3 h4 p span table tr td"


class Checker(HTMLParser):
    """Well-formed, of known elements, and nothing fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in MATHML.split() + HTML.split(), tag
        assert {k for k, _ in attrs} <= {
            "class", "style", "lang", "charset", "name", "content", "title", "mathvariant", "fence", "stretchy", "lspace", "rspace",
            "width", "movablelimits", "displaystyle",
        }  # fmt: skip
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)


def check_html(page: str) -> list[str]:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    assert "url(" not in page
    assert "http" not in page
    return checker.texts


EVIL = ["<script>alert(1)</script>", "\\end{align*}\\input{x}", "a\nb  c = 1", "${}#%&~^_", "π😀", "\"'"]


def test_names_cannot_break_out() -> None:
    p = {name: normal(2) for name in EVIL}
    e = explain(lambda p: sum(np.sum(p[name] ** 2) for name in EVIL), p, numbers=True)
    check_latex(e.latex)
    texts = check_html(e.html)
    assert any("<script>" in t for t in texts)
    assert all("\n" not in re.split(r" {2,}", line)[0] for line in e.text.splitlines())
    agrees(
        lambda p: sum(np.sum(np.sin(p[name])) for name in EVIL if "  " not in name), {k: v for k, v in p.items() if "  " not in k}
    )


def test_layers_cannot_break_out() -> None:
    class Evil(nn.Module):
        def __call__(self, x: Any) -> Any:
            return x * self.parameter("π_ö", (1,), "ones")

        def __repr__(self) -> str:
            return "<img src=x onerror=alert(1)>\\end{align*}\n  L = 0"

    e = explain(nn.Sequential(Evil(), nn.Dense(1)), normal(3, 2), normal(3), loss="mse", optimizer="sgd")
    check_latex(e.latex)
    check_html(e.html)
    assert e.text.count("\n  L = 0") == 0


def test_names_that_the_text_needs_are_not_taken() -> None:
    def f(sum: Any, L: Any, t: Any, maximum: Any) -> Any:
        exp = np.tanh(sum * t) * maximum
        h, _ = cr.scan(lambda h, x: (h + x * L, None), np.float64(0), exp)
        return h + np.sum(exp)

    e = agrees(f, normal(3), normal(), normal(3), normal(3))
    assert "sum_" in e.text
    assert "for s = " in e.text


def test_it_shows_itself() -> None:
    e = explain(*(lambda c: (c[0], *c[1]))(CASES["regression"]))
    assert str(e) == e.text
    assert e._repr_latex_() == e.latex
    assert e._repr_html_() in e.html
    assert "<html" not in e._repr_html_()
    assert "color-scheme" in e.html


# ---- what bad input gets -----------------------------------------------------------------------------------------------------


def test_errors() -> None:
    x = normal(3)
    with pytest.raises(cr.ShapeError, match=r"one floating-point number; this one returns float64\[3\]"):
        explain(np.tanh, x)
    with pytest.raises(cr.DtypeError, match="nothing to differentiate"):
        explain(lambda i: np.sum(i * 0.5), np.arange(3))
    with pytest.raises(cr.DtypeError, match="has no derivative"):
        explain(lambda x, i: np.sum(x[i]), x, np.array([0, 1]), argnums=1)
    with pytest.raises(cr.UsageError, match="argnums=2"):
        explain(lambda x: np.sum(x), x, argnums=2)
    with pytest.raises(cr.UsageError, match="a function or a network"):
        explain(3, x)
    with pytest.raises(cr.UsageError, match="loss= is for networks"):
        explain(lambda x: np.sum(x), x, loss="mse")
    with pytest.raises(cr.UnknownNameError, match="adam"):
        explain(lambda x: np.sum(x), x, optimizer="adma")
    net = nn.Sequential(nn.Dense(1))
    with pytest.raises(cr.UsageError, match="takes x and y"):
        explain(net, normal(3, 2), loss="mse")
    with pytest.raises(cr.UsageError, match="argnums= is for functions"):
        explain(net, normal(3, 2), normal(3), loss="mse", argnums=0)
