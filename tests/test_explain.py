"""What `cr.explain` prints of functions is true and reads well: the equations, read by an evaluator of their own, give the gradients."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from equations import Reader, agrees
from hypothesis import given
from markup import check_html, check_latex
from test_random_graphs import NUMPY, Program, programs

import chainrule as cr
from chainrule import losses, nn
from chainrule.explain import explain
from chainrule.ops.activations import activations

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


# ---- names, and what bad input gets ------------------------------------------------------------------------------------------


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
