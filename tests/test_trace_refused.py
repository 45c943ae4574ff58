"""What cannot be recorded says so, with the user's line and what to do instead."""

from __future__ import annotations

import math
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from tracing import trace_function

import chainrule as cr
from chainrule.errors import ChainruleError, DataError, DtypeError, ShapeError, TraceError, UsageError

# Each function breaks a rule in its second line; the message has to name that line of this file.

W = np.array([1.0, 2.0])


def if_on_a_traced_value(x: Any) -> Any:
    return x if x[0] > 0 else -x


def while_on_a_traced_value(x: Any) -> Any:
    while np.sum(x) < 1:
        x = x + 1
    return x


def truth_by_and(x: Any) -> Any:
    return x[0] > 0 and x[1] > 0


def chained_comparison(x: Any) -> Any:
    return 0 < x[0] < 1


def python_max(x: Any) -> Any:
    return max(x[0], x[1])


def to_float(x: Any) -> Any:
    return float(x[0])


def to_int(x: Any) -> Any:
    return int(x[0])


def to_complex(x: Any) -> Any:
    return complex(x[0])


def from_math(x: Any) -> Any:
    return math.sin(x[0])


def as_array(x: Any) -> Any:
    return np.asarray(x)


def list_of_traced(x: Any) -> Any:
    return np.array([x[0], x[1]])


def by_item(x: Any) -> Any:
    return x[0].item()


def by_tolist(x: Any) -> Any:
    return x.tolist()


def range_over(x: Any) -> Any:
    return list(range(x.astype(int)[0]))


def membership(x: Any) -> Any:
    return 1.0 in x


def set_item(x: Any) -> Any:
    x[0] = 1.0


def in_place_on_plain_array(x: Any) -> Any:
    np.zeros(2).__iadd__(x)


def out_of_a_ufunc(x: Any) -> Any:
    np.add(x, 1, out=np.zeros(2))


def out_is_traced(x: Any) -> Any:
    np.add(W, 1, out=x)


def out_of_a_function(x: Any) -> Any:
    np.sum(x, axis=0, out=np.zeros(()))


def mask(x: Any) -> Any:
    return x[x > 0]


def truth_as_index(x: Any) -> Any:
    return x[True]


def where_alone(x: Any) -> Any:
    return np.where(x > 0)


def traced_slice(x: Any) -> Any:
    return x[: x.astype(int)[0]]


def float_index(x: Any) -> Any:
    return x[x]


def plain_array_by_traced_index(x: Any) -> Any:
    return W[np.argmax(x)]


def plain_array_by_traced_indices(x: Any) -> Any:
    return W[x.astype(int)]


def unknown_function(x: Any) -> Any:
    return np.sort(x)


def unknown_ufunc_method(x: Any) -> Any:
    return np.add.accumulate(x)


def unknown_option(x: Any) -> Any:
    return np.sum(x, initial=1.0)


def unknown_ufunc_option(x: Any) -> Any:
    return np.exp(x, where=np.array([True, False]))


def wrong_option(x: Any) -> Any:
    return np.cumsum(x, dtype=np.float32)


def spectral_norm(x: Any) -> Any:
    return np.linalg.norm(x[None], 2)


def spectral_norm_over_axes(x: Any) -> Any:
    return np.linalg.norm(x[None], 2, axis=(0, 1))


def interpolation(x: Any) -> Any:
    return np.interp(x, W, W)


def column_order(x: Any) -> Any:
    return np.reshape(x, (1, 2), order="F")


def counted_repeats(x: Any) -> Any:
    return np.repeat(x, np.array([1, 2]))


def reflected(x: Any) -> Any:
    return np.pad(x, 1, mode="reflect")


def traced_repeats(x: Any) -> Any:
    return np.repeat(x, x.astype(int)[0])


def traced_shift(x: Any) -> Any:
    return np.roll(x, x.astype(int)[0])


def traced_axis(x: Any) -> Any:
    return np.sum(x, axis=x.astype(int)[0])


def traced_option(x: Any) -> Any:
    return cr.leaky_relu(x, x[0])


def small_integers(x: Any) -> Any:
    return np.exp(x.astype(np.int8))


def bits_of_numbers(x: Any) -> Any:
    return x.astype(int) & 1


def negative_truth(x: Any) -> Any:
    return -(x > 0)


def half_precision(x: Any) -> Any:
    return x.astype(np.float16)


def complex_constant(x: Any) -> Any:
    return x * np.array([1j, 2j])


BAD = [f for f in list(globals().values()) if isinstance(f, FunctionType) and f.__code__.co_varnames[:1] == ("x",)
       and f.__module__ == __name__]  # fmt: skip
REMEDY = {
    if_on_a_traced_value: r"np\.where",
    while_on_a_traced_value: r"cr\.scan",
    mask: r"np\.where",
    plain_array_by_traced_index: r"cr\.lookup",
    plain_array_by_traced_indices: r"cr\.lookup",
    spectral_norm: "ord=2",
    spectral_norm_over_axes: "ord=2",
    reflected: "reflect",
    traced_option: "plain Python value",
    list_of_traced: r"np\.stack",
    set_item: r"np\.where",
    out_of_a_ufunc: "bind the result",
    unknown_function: "np.sort is not recorded",
    half_precision: "float16 is not known",
    where_alone: "size depends on the data",
}


def line_after(f: Any) -> str:
    """Where the body of a function starts, as messages and nodes name it."""
    return f"{__file__}:{f.__code__.co_firstlineno + 1}"


@pytest.mark.parametrize("bad", BAD, ids=lambda f: f.__name__)
def test_what_cannot_be_recorded_names_the_line(bad: Any) -> None:
    for transformed in (cr.compile(bad), cr.grad(bad), lambda x: trace_function(bad, [x])):
        with pytest.raises(ChainruleError, match=REMEDY.get(bad, ".")) as caught:
            transformed(np.array([0.5, 1.5]))
        assert line_after(bad) in str(caught.value)
    assert issubclass(caught.type, (TypeError, ValueError))


def test_assigning_a_traced_value_into_a_plain_array_is_numpys_error_caused_by_ours() -> None:
    def f(x: Any) -> Any:
        np.zeros(2)[0] = x[0]

    with pytest.raises(ValueError, match="setting an array element") as caught:
        cr.compile(f)(np.ones(2))
    assert isinstance(caught.value.__cause__, TraceError)
    assert line_after(f) in str(caught.value.__cause__)


def test_a_result_that_is_no_array() -> None:
    with pytest.raises(DtypeError, match="U4"):
        cr.compile(lambda x: "text")(np.ones(2))


def test_the_list_of_bad_functions_is_not_empty() -> None:
    assert len(BAD) >= 46
    assert set(REMEDY) <= set(BAD)


@pytest.mark.parametrize(
    ("f", "shapes"),
    [
        (lambda a, b: a + b, ["(3,)", "(4,)"]),
        (lambda a, b: a @ b, ["(3,)", "(4,)"]),
        (lambda a, b: np.concatenate([a[None], b[None]]), ["float64[1, 3]", "float64[1, 4]"]),
        (lambda a, b: np.stack([a, b]), ["(3,)", "(4,)"]),
        (lambda a, b: np.einsum("i,i", a, b), ["(3,)", "(4,)"]),
        (lambda a, b: np.where(a > 0, a, b), ["(3,)", "(4,)"]),
        (lambda a, b: np.reshape(a, (2, 2)), ["(3,)", "(2, 2)"]),
        (lambda a, b: np.broadcast_to(a, (4,)), ["(3,)", "(4,)"]),
        (lambda a, b: np.sum(a, axis=1), ["axis 1", "1 axes"]),
        (lambda a, b: a[0, 0], ["2 indices", "(3,)"]),
        (lambda a, b: np.split(a, 2), ["(3,)", "2"]),
        (lambda a, b: np.squeeze(a, 0), ["(3,)"]),
        (lambda a, b: np.max(a[:0]), ["(0,)"]),
        (lambda a, b: np.diagonal(a), ["axes 0 and 1", "(3,)"]),
        (lambda a, b: np.trace(a[None], 0, 1, -1), ["axes 1 and -1", "(1, 3)"]),
        (lambda a, b: np.einsum("ii", a[None]), ['"i"', "(1, 3)"]),
    ],
)
def test_shapes_that_do_not_fit_give_both_and_the_line(f: Any, shapes: list[str]) -> None:
    with pytest.raises(ShapeError) as caught:
        trace_function(f, [np.ones(3), np.ones(4)])
    for shape in [*shapes, f"{__file__}:{f.__code__.co_firstlineno}"]:
        assert shape in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_indices_out_of_range() -> None:
    x = np.arange(4.0)
    for index in (4, -5, np.array([0, 4]), [-5]):
        with pytest.raises(IndexError, match="length 4"):
            cr.compile(lambda x, index=index: x[index])(x)
    for bad in (4, -5):  # known only when running: an error too, and never clamped
        with pytest.raises(DataError, match=str(bad)):
            cr.compile(lambda x, i: x[i])(x, np.array([0, bad]))
        with pytest.raises(DataError, match=str(bad)):
            cr.compile(lambda x, i: cr.scatter_add(x, i, np.ones(2)))(x, np.array([0, bad]))
    assert cr.compile(lambda x, i: x[i])(x, np.array([-1, 3])).tolist() == [3.0, 3.0]


def test_lookup_in_a_table_from_outside_counts_from_the_front_only() -> None:
    table = np.arange(6.0).reshape(3, 2)
    for f in (cr.lookup, cr.compile(cr.lookup), lambda t, i: cr.compile(lambda i: cr.lookup(t, i))(i)):
        np.testing.assert_array_equal(f(table, np.array([[2, 0]])), table[np.array([[2, 0]])])
        for bad in (-1, 3):
            with pytest.raises(DataError, match=str(bad)):
                f(table, np.array([0, bad]))
    np.testing.assert_array_equal(cr.grad(lambda t: np.sum(cr.lookup(t, np.array([1, 1]))))(table), [[0, 0], [2, 2], [0, 0]])


MASKED = np.ma.masked_array(np.arange(4.0), mask=[False, True, False, True])


@pytest.mark.parametrize(
    "call",
    [
        lambda: cr.compile(np.sin)(MASKED),
        lambda: cr.compile(lambda x, y: x["a"] + y)({"a": np.ones(4)}, MASKED),
        lambda: cr.compile(lambda x: x * MASKED)(np.ones(4)),
        lambda: cr.grad(np.sum)(MASKED),
        lambda: cr.grad(lambda x: np.sum(np.where(x > 0, x, MASKED)))(np.ones(4)),
        lambda: cr.vjp(np.sin, np.ones(4))[1](MASKED),
        lambda: cr.jvp(np.sin, [np.ones(4)], [MASKED]),
        lambda: cr.hvp(lambda x: np.sum(x**3), np.ones(4), MASKED),
        lambda: cr.jacobian(np.sin)(MASKED),
        lambda: cr.check_gradients(np.sum, MASKED),
        lambda: cr.explain(np.sum, MASKED),
        lambda: cr.compile(lambda xs: cr.scan(lambda h, x: (h + x, h), 0.0, xs))(MASKED),
    ],
)
def test_masked_arrays_are_refused(call: Any) -> None:
    with pytest.raises(cr.DataError, match=r"shape \(4,\) has 2 masked values.*numpy\.ma\.filled"):
        call()


def test_a_masked_array_is_refused_where_a_plain_one_was_taken_before() -> None:
    double = cr.compile(lambda x: 2 * x)
    assert double(np.ones(4)).tolist() == [2] * 4
    with pytest.raises(cr.DataError, match="masked"):
        double(MASKED)
    assert double(np.ma.masked_array(np.ones(4))).tolist() == [2] * 4  # nothing is masked


def test_nests_that_no_function_can_take() -> None:
    inside: list[Any] = [1.0]
    inside.append(inside)
    deep: Any = 1.0
    for _ in range(5000):
        deep = [deep]
    for nest in (inside, deep):
        for call in (cr.compile(lambda x: x), cr.grad(lambda x: 1.0), lambda x: cr.vjp(lambda y: y, x)):
            with pytest.raises(UsageError, match="contains itself, or is hundreds of levels deep"):
                call(nest)


@pytest.mark.parametrize("argnums", ["x", 0.0, None, True, (0, "x"), [None]])
def test_arguments_are_chosen_by_numbers(argnums: Any) -> None:
    with pytest.raises(UsageError, match=r"argnums=.*by their numbers"):
        cr.grad(lambda x: x, argnums=argnums)(1.0)


def test_numpys_global_generator_is_refused() -> None:
    for draw in (lambda: np.random.normal(), lambda: np.random.rand(3), lambda: np.random.permutation(3)):
        with pytest.raises(TraceError, match=r"cr\.random"):
            cr.grad(lambda x, draw=draw: (draw(), np.sum(x))[1])(np.ones(3))
        with pytest.raises(TraceError, match=r"cr\.random"):
            cr.compile(lambda x, draw=draw: (draw(), x)[1])(np.ones(3))
    own = np.random.default_rng(0)
    noise = own.normal(size=3)
    np.testing.assert_array_equal(cr.compile(lambda x: x + noise)(np.zeros(3)), noise)


def test_in_place_operators_bind_a_new_array() -> None:
    def f(x: Any) -> Any:
        y = x
        y += 1.0
        y *= x
        y -= 2
        y /= 2.0
        y **= 2
        y @= np.eye(2)
        return y, x

    x = np.array([1.0, 2.0])
    got, same = cr.compile(f)(x)
    np.testing.assert_array_equal(same, x)
    np.testing.assert_allclose(got, (((x + 1) * x - 2) / 2) ** 2)
    np.testing.assert_array_equal(x, [1.0, 2.0])
