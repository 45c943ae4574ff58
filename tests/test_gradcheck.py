"""The checker of gradients is checked: a rule or a user's derivative that is wrong by a thousandth is found; kinks are told apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import chainrule as cr
from chainrule.errors import GradientMismatch
from chainrule.gradcheck import GradientReport, check_graph
from chainrule.graph.node import OPS
from chainrule.graph.trace import build, type_of
from chainrule.ops.loop import apply_many

Array = np.ndarray


@contextmanager
def declared(name: str, **changes: Any) -> Iterator[None]:
    """An operator with a changed declaration, for a while."""
    kept = OPS[name]
    OPS._things[name] = dataclasses.replace(kept, **changes)
    try:
        yield
    finally:
        OPS._things[name] = kept


def off_by(factor: float, name: str, at: int) -> Any:
    """The derivative of an operator with its rule for argument `at` wrong by a factor."""
    rules = OPS[name].derivative
    if isinstance(rules, tuple):
        return tuple(
            (lambda *a, rule=rule, **k: rule(*a, **k) * factor) if i == at and rule is not None else rule
            for i, rule in enumerate(rules)
        )
    return lambda need, *a, **k: [d if d is None or i != at else d * factor for i, d in enumerate(rules(need, *a, **k))]


def _wrong_rules() -> list[Any]:
    cases = []
    for name, op in OPS.items():
        if not op.smooth:
            continue
        arrays, attrs = next(iter(op.examples(np.random.default_rng(0))), ([], {}))
        for at, a in enumerate(arrays):
            if np.asarray(a).dtype.kind == "f":
                cases.append(pytest.param(name, [np.asarray(x) for x in arrays], attrs, at, id=f"{name}-{at}"))
    return cases


def wrong_in(mismatch: GradientMismatch) -> list[str]:
    """What the report of a failed check says is wrong."""
    assert isinstance(mismatch.report, GradientReport)
    return [c.name for c in mismatch.report.comparisons if c.error > 1e-6]


@pytest.mark.parametrize(("name", "arrays", "attrs", "at"), _wrong_rules())
def test_check_gradients_catches_a_rule_wrong_by_a_thousandth(name: str, arrays: list[Array], attrs: Any, at: int) -> None:
    graph = build(lambda *xs: apply_many(name, xs, **attrs), [type_of(a) for a in arrays])
    wrt = [i for i, a in enumerate(arrays) if a.dtype.kind == "f"]
    names = [f"argument {i}" for i in wrt]
    assert check_graph(graph, list(arrays), wrt, names).ok
    with declared(name, derivative=off_by(1.001, name, at)), pytest.raises(GradientMismatch) as caught:
        check_graph(graph, list(arrays), wrt, names)
    assert wrong_in(caught.value) == [f"argument {at}"]
    assert f"argument {at}" in str(caught.value)


def test_check_gradients_catches_a_custom_gradient_in_a_deep_function() -> None:
    def network(factor: float) -> Callable[..., Any]:
        act = cr.custom_gradient(lambda x: (np.tanh(x), lambda g: factor * g * (1 - np.tanh(x) ** 2)))
        return lambda w, x: np.mean((act(act(x @ w["a"]) @ w["b"]) - 0.5) ** 2)

    random = np.random.default_rng(4)
    w, x = {"a": random.normal(size=(3, 4)), "b": random.normal(size=(4, 2))}, random.normal(size=(5, 3))
    report = cr.check_gradients(network(1.0), w, x)
    assert report.ok
    assert [c.name for c in report.comparisons] == ["0.a", "0.b", "1"]
    assert [c.checked for c in report.comparisons] == [12, 8, 15]
    assert report.error < 1e-6
    with pytest.raises(GradientMismatch) as caught:
        cr.check_gradients(network(1.001), w, x)
    assert wrong_in(caught.value) == ["0.a", "0.b", "1"]
    assert isinstance(caught.value, AssertionError)


def test_check_gradients_catches_a_gradient_of_zero_and_of_nan() -> None:
    for pull in (lambda g: 0.0 * g, lambda g: g * np.nan):
        with pytest.raises(GradientMismatch):
            cr.check_gradients(cr.custom_gradient(lambda x, pull=pull: (x * 2, pull)), np.ones(2))
    with pytest.raises(GradientMismatch):  # also where the function is flat
        cr.check_gradients(cr.custom_gradient(lambda x: (x * 0, lambda g: g * 0.01)), np.ones(2))


def test_check_gradients_counts_kinks_and_leaves_them_out() -> None:
    x = np.array([0.0, 1.0, -2.0, 0.0])
    for f in (cr.relu, np.abs, lambda x: np.maximum(x, 0.0), lambda x: np.clip(x, 0.0, 5.0)):
        report = cr.check_gradients(f, x)
        (c,) = report.comparisons
        assert (c.checked, c.kinks) == (2, 2)
        assert "kinks" in str(report)
    wrong = cr.custom_gradient(lambda x: (np.abs(x), lambda g: g * 3.0))  # 3 is no slope of |x|, on neither side of 0
    with pytest.raises(GradientMismatch):
        cr.check_gradients(wrong, np.array([0.0]))
    noisy = cr.check_gradients(lambda x: np.sum(cr.relu(x) * np.array([0.3, 0.7, 1.1])) + 1 / 3, np.array([0.0, 0.0, 0.0]))
    assert noisy.comparisons[0].kinks == 3  # one-sided differences carry rounding
    ties = cr.check_gradients(np.max, np.array([1.0, 1.0, 0.5]))
    assert (ties.comparisons[0].checked, ties.comparisons[0].kinks) == (1, 2)


def test_check_gradients_is_always_double_and_leaves_its_arguments_alone() -> None:
    x = np.linspace(0.1, 1, 5, dtype=np.float32)
    kept = x.copy()
    assert cr.check_gradients(lambda x: np.sum(np.exp(x)), x).error < 1e-7
    np.testing.assert_array_equal(x, kept)
    assert x.dtype == np.float32
    report = cr.check_gradients(lambda x, n: x**n, np.full((30, 30), 1.5), 3, most=50)
    assert report.comparisons[0].checked == 50
    assert cr.check_gradients(lambda a, b: a * b, 2.0, 3.0, argnums=1).comparisons[0].name == "1"
    again = cr.check_gradients(lambda x: np.sum(x * x), np.ones(500), most=10, seed=3)
    assert str(again) == str(cr.check_gradients(lambda x: np.sum(x * x), np.ones(500), most=10, seed=3))
