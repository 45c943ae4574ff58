"""Functions of functions: derivatives that are stopped or written by a user, products with Jacobians, Hessians, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from differences import central, check

import chainrule as cr
from chainrule.derive.backward import backward
from chainrule.errors import ChainruleError, DataError, DtypeError, ShapeError, UsageError
from chainrule.graph.interpret import evaluate
from chainrule.graph.trace import build, type_of

Array = np.ndarray

# ---- stop_gradient and custom_gradient ---------------------------------------------------------------------------------------


def test_stop_gradient() -> None:
    assert cr.grad(lambda x: x * cr.stop_gradient(x))(3.0) == 3
    assert cr.grad(cr.grad(lambda x: x * x * cr.stop_gradient(x * x)))(3.0) == 18
    assert cr.grad(lambda x: np.sin(cr.stop_gradient(x)))(3.0) == 0
    nest = {"a": np.ones(2), "b": [2.0]}
    same = cr.stop_gradient(nest)
    assert same["a"] is nest["a"]
    g = cr.grad(lambda p: np.sum(p["a"] * cr.stop_gradient(p)["a"]) + p["b"][0] * cr.stop_gradient(p)["b"][0])(nest)
    assert (g["a"].tolist(), float(g["b"][0])) == ([1.0, 1.0], 2.0)
    assert cr.jvp(lambda x: x * cr.stop_gradient(x), [3.0], [2.0])[1] == 6
    assert cr.grad(lambda x: cr.scan(lambda h, _: (cr.stop_gradient(h) * x, None), x, None, length=3)[0])(2.0) == 8


def test_custom_gradient_replaces_the_derivative_at_every_order() -> None:
    @cr.custom_gradient
    def cube(x: Any) -> Any:
        return x**3, lambda g: g * 7.0 * x**2  # wrong on purpose, so that it can be recognised

    assert cube(2.0) == 8
    assert cr.grad(cube)(2.0) == 28
    assert cr.grad(cr.grad(cube))(3.0) == 42  # d(7 x²)/dx = 14 x
    assert cr.grad(lambda x: cube(x) ** 2)(2.0) == 2 * 8 * 28
    assert cr.compile(cr.grad(cube))(2.0) == 28
    assert cr.jvp(cube, [2.0], [1.0])[1] == 28
    np.testing.assert_array_equal(cr.jacobian(cube)(np.array([1.0, 2.0])), np.diag([7.0, 28.0]))
    assert cr.grad(lambda x: cr.scan(lambda h, _: (cube(h), None), x, None, length=2)[0])(1.0) == 49


def test_custom_gradient_takes_from_outside_and_gives_nothing_back() -> None:
    a = np.array([1.0, 2.0])

    def f(x: Any, w: Any) -> Any:
        scale = np.sum(w) * 2

        @cr.custom_gradient
        def inner(x: Any) -> Any:
            return x * scale + a, lambda g: g * (scale + a) * w

        return np.sum(inner(x))

    x, w = np.ones(2), np.array([0.5, 1.5])
    gx, gw = cr.grad(f, (0, 1))(x, w)
    np.testing.assert_array_equal(gx, (4 + a) * w)
    np.testing.assert_array_equal(gw, np.zeros(2))
    again = cr.grad(lambda w: np.sum(cr.grad(f)(x, w)))(w)
    np.testing.assert_allclose(again, central(lambda w: float(np.sum((2 * np.sum(w) + a) * w)), [w], 0), rtol=1e-8)


def test_custom_gradient_of_several_arguments_and_nests() -> None:
    @cr.custom_gradient
    def f(p: Any, x: Any) -> Any:
        def pull(g: Any) -> Any:
            return {"w": g[0] * 2 * x, "b": [g[1]["y"] * 3]}, g[0] * 5 * p["w"]

        return (p["w"] * x, {"y": p["b"][0] + 0 * x}), pull

    p, x = {"w": np.array([1.0, 2.0]), "b": [np.array([3.0, 4.0])]}, np.array([5.0, 6.0])

    def loss(p: Any, x: Any) -> Any:
        a, rest = f(p, x)
        return np.sum(a) + np.sum(rest["y"] * rest["y"])

    gp, gx = cr.grad(loss, (0, 1))(p, x)
    np.testing.assert_array_equal(gp["w"], 2 * x)
    np.testing.assert_array_equal(gp["b"][0], 3 * 2 * p["b"][0])
    np.testing.assert_array_equal(gx, 5 * p["w"])
    only_one = cr.grad(lambda p: np.sum(f(p, x)[0]))(p)
    np.testing.assert_array_equal(only_one["b"][0], np.zeros(2))


def test_custom_gradient_sees_static_arguments_as_they_are() -> None:
    @cr.custom_gradient
    def total(x: Any, axis: int, mode: str) -> Any:
        assert (type(axis), type(mode)) == (int, str)
        return np.sum(x, axis=axis), lambda g: (np.expand_dims(g, axis) * np.ones_like(x) * len(mode), None, None)

    np.testing.assert_array_equal(cr.grad(lambda x: np.sum(total(x, 1, "abc")))(np.ones((2, 3))), np.full((2, 3), 3.0))


def test_custom_gradient_of_a_nest_that_holds_whole_numbers() -> None:
    @cr.custom_gradient
    def pick(p: Any, axis: int) -> Any:
        return p["x"][p["at"]], lambda g: ({"at": p["at"] * 0, "x": cr.scatter_add(p["x"] * 0, p["at"], 5 * g, axis)}, None)

    p = {"at": np.array([2, 2]), "x": np.ones(3)}
    g = cr.grad(lambda x: np.sum(pick({"at": p["at"], "x": x}, 0)))(p["x"])
    np.testing.assert_array_equal(g, [0.0, 0.0, 10.0])


def test_custom_gradient_keeps_types_and_refuses_other_shapes() -> None:
    wide = cr.custom_gradient(lambda x: (x * 2, lambda g: g * np.full(3, 2.0)))
    assert cr.grad(lambda x: np.sum(wide(x)))(np.ones(3, np.float32)).dtype == np.float32
    wrong = cr.custom_gradient(lambda x: (x * 2, lambda g: np.sum(g)))
    with pytest.raises(ShapeError, match=r"\(3,\).*\(\)") as caught:
        cr.grad(lambda x: np.sum(wrong(x)))(np.ones(3))
    assert __file__ in str(caught.value)


def test_custom_gradient_draws_the_same_numbers_in_value_and_derivative() -> None:
    def f(x: Any) -> Any:
        @cr.custom_gradient
        def drop(x: Any) -> Any:
            mask = cr.random.bernoulli(x.shape, 0.5)
            return np.where(mask, x, 0.0), lambda g: np.where(mask, g, 0.0)

        other = cr.random.bernoulli(x.shape, 0.5)
        return drop(x), other

    x = np.ones(64)
    graph = build(lambda x: list(f(x)), [type_of(x)], key=lambda: np.array([1, 2], np.uint32))
    value, other = evaluate(graph, [x])
    (gradient,) = evaluate(backward(graph, [0], [0]), [x, np.ones(64)])
    np.testing.assert_array_equal(gradient, value)
    assert not np.array_equal(value, other)


# ---- products with Jacobians -------------------------------------------------------------------------------------------------


def two(a: Any, b: Any) -> Any:
    return {"u": np.tanh(a @ b), "v": [np.sum(a * a, axis=0), b[0] * 3.0]}


A, B = np.random.default_rng(1).normal(size=(2, 3, 3))


def flat(nest: Any) -> Array:
    from chainrule.graph.tree import flatten

    return np.concatenate([np.ravel(leaf) for leaf in flatten(nest)[0]])


def full_jacobian() -> Array:
    """∂(all results)/∂(all arguments) by central differences."""
    columns = []
    for i, x in enumerate((A, B)):
        for place in np.ndindex(*x.shape):
            up, down = [A.copy(), B.copy()], [A.copy(), B.copy()]
            up[i][place] += 1e-6
            down[i][place] -= 1e-6
            columns.append((flat(two(*up)) - flat(two(*down))) / 2e-6)
    return np.stack(columns, axis=1)


def test_vjp_jvp_and_jacobian_are_one_matrix() -> None:
    J = full_jacobian()
    random = np.random.default_rng(2)
    jacobian = cr.jacobian(two, (0, 1))(A, B)
    parts = [np.concatenate([np.reshape(d, (-1, 9)) for d in row], axis=1) for row in (jacobian["u"], *jacobian["v"])]
    np.testing.assert_allclose(np.concatenate(parts), J, atol=1e-8)
    value, pull = cr.vjp(two, A, B)
    g = {"u": random.normal(size=(3, 3)), "v": [random.normal(size=3), random.normal(size=3)]}
    np.testing.assert_allclose(flat(value), flat(two(A, B)), rtol=1e-14)
    np.testing.assert_allclose(flat(pull(g)), flat(g) @ J, atol=1e-7)
    tangents = random.normal(size=(2, 3, 3))
    value, d = cr.jvp(two, (A, B), tuple(tangents))
    np.testing.assert_allclose(flat(value), flat(two(A, B)), rtol=1e-14)
    np.testing.assert_allclose(flat(d), J @ tangents.ravel(), atol=1e-7)
    np.testing.assert_allclose(flat(g) @ flat(d), flat(pull(g)) @ tangents.ravel(), rtol=1e-12)


def energy(x: Any) -> Any:
    return np.sum(np.sin(x) * np.exp(x @ A)) + np.prod(x)


X3 = np.array([0.3, -0.7, 1.1])


def test_hessians_every_way() -> None:
    H = cr.jacobian(cr.grad(energy))(X3)
    np.testing.assert_allclose(H, H.T, rtol=1e-12)
    for i in range(3):
        e = np.eye(3)[i]
        np.testing.assert_allclose(H[i], central(lambda x, e=e: float(cr.grad(energy)(x) @ e), [X3], 0), rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(cr.hvp(energy, X3, e), H[i], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(cr.jvp(cr.grad(energy), [X3], [e])[1], H[i], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(cr.grad(lambda x, e=e: cr.jvp(energy, [x], [e])[1])(X3), H[i], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(cr.vjp(cr.grad(energy), X3)[1](e)[0], H[i], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(cr.jacobian(lambda x: cr.jacobian(energy)(x))(X3), H, rtol=1e-12, atol=1e-14)
    for f in (lambda x: cr.jacobian(cr.grad(energy))(x), lambda x: cr.jacobian(cr.jacobian(energy))(x)):
        np.testing.assert_allclose(cr.compile(f)(X3), H, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(cr.compile(lambda x, v: cr.hvp(energy, x, v))(X3, X3), H @ X3, rtol=1e-12)
    third = cr.jacobian(cr.jacobian(cr.grad(energy)))(X3)
    for order in ((1, 0, 2), (2, 1, 0)):
        np.testing.assert_allclose(third, np.transpose(third, order), rtol=1e-11, atol=1e-13)
    g = cr.grad(lambda x: np.sum(cr.hvp(energy, x, X3) * X3))(X3)
    np.testing.assert_allclose(g, np.einsum("ijk,i,j->k", third, X3, X3), rtol=1e-11)


def test_transforms_inside_loops_and_each_other() -> None:
    def step(x: Any, v: Any) -> Any:
        value, d = cr.jvp(np.tanh, [x], [v])
        _, pull = cr.vjp(np.sin, value)
        return value, pull(d)[0]

    def total(x: Any) -> Any:
        h, ys = cr.scan(step, x, np.array([[1.0, 2.0, 3.0], [0.5, 0.1, -0.2]]))
        return np.sum(h * h) + np.sum(ys)

    check(total, X3)
    got = cr.compile(cr.value_and_grad(total))(X3)
    for a, b in zip(got, cr.value_and_grad(total)(X3), strict=True):
        np.testing.assert_array_equal(a, b)


def test_value_and_grad_of_nests_and_several_arguments() -> None:
    f = lambda p, c, n: np.sum(p["w"] ** n) * c
    value, (gp, gc) = cr.value_and_grad(f, (0, 1))({"w": np.array([1.0, 2.0])}, 3.0, 2)
    assert (float(value), gp["w"].tolist(), float(gc)) == (15.0, [6.0, 12.0], 5.0)
    assert cr.grad(f, -2)({"w": np.array([1.0, 2.0])}, 3.0, 2) == 5.0
    assert cr.grad(f, (1,))({"w": np.array([1.0, 2.0])}, 3.0, 2) == (5.0,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cr.grad(lambda x: x * 2)(np.ones(3)), ShapeError, r"one floating-point number.*float64\[3\]"),
        (lambda: cr.grad(lambda x: (x, x))(1.0), ShapeError, "one floating-point number"),
        (lambda: cr.grad(lambda x: None)(1.0), ShapeError, "one floating-point number"),
        (lambda: cr.grad(lambda x: np.argmax(x))(np.ones(3)), ShapeError, "int64"),
        (lambda: cr.grad(lambda x: x * 1.0)(np.array(3)), DtypeError, "no derivative"),
        (lambda: cr.grad(lambda x, n: x, 1)(1.0, 2), DtypeError, "argnums"),
        (lambda: cr.grad(lambda x: x, 3)(1.0), UsageError, "argnums=3"),
        (lambda: cr.jacobian(lambda x: np.argmax(x))(np.ones(3)), DtypeError, "int64"),
        (lambda: cr.vjp(lambda x: x, np.ones(3))[1](np.ones(2)), ShapeError, r"\(3,\).*\(2,\)"),
        (lambda: cr.vjp(lambda x: (x, x), np.ones(3))[1](np.ones(3)), ShapeError, "tuple"),
        (lambda: cr.jvp(lambda x: x, [np.ones(3)], [np.ones(2)]), ShapeError, r"\(2,\).*\(3,\)"),
        (lambda: cr.jvp(lambda x: x, [np.ones(3)], [np.ones(3), 1.0]), UsageError, "nests"),
        (lambda: cr.check_gradients(lambda n: n * 2, 3), UsageError, "floating-point"),
        (lambda: cr.check_gradients(np.log, -1.0), DataError, "not finite"),
    ],
)
def test_what_cannot_be_differentiated(call: Callable[[], Any], error: type[ChainruleError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
