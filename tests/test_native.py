"""Native code against NumPy: every operator, layer, loss and optimizer, and derivatives of functions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import native
import native_graphs
import numpy as np
import pytest
from native import WIDTHS, Array, Server
from native_graphs import (
    MATRICES,
    MORE_MATRICES,
    SIZES,
    compare_wide,
    flat_list,
    float_inputs,
    form_faults,
    matrix_faults,
    registry_faults,
)
from native_networks import Gain, check_layer, check_network, check_optimizer, compare_named, twins
from test_layers import CASES as LAYER_CASES
from test_layers import IDS as LAYER_IDS
from training import OPTIMIZERS, target_for

import chainrule as cr
from chainrule import nn, transforms
from chainrule.losses import losses
from chainrule.optim import optimizers
from chainrule.run.backend import backends
from chainrule.train.objective import initial_slots, make_program

server, native_functions = native.server, native_graphs.native_functions  # fixtures


# ---- operators ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("narrow", [False, True], ids=["float64", "float32"])
def test_every_operator_and_composition_with_its_gradient(server: Server, narrow: bool, width: str) -> None:
    assert server(registry_faults, narrow, width) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_elementwise_forms_of_every_type_at_special_values(server: Server, width: str) -> None:
    assert server(form_faults, (None,), width) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_elementwise_forms_of_every_type_and_size(server: Server, width: str) -> None:
    shapes = [(n,) for n in SIZES] + [(3, 17), (17, 3), (2, 3, 5), (1, 1, 1, 4), ()]
    assert server(form_faults, shapes, width) == []


def test_expressions_on_matrices(server: Server) -> None:
    assert server(matrix_faults, MATRICES[2:3], ("float32",), WIDTHS[0]) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", MATRICES + MORE_MATRICES)
def test_expressions_on_more_matrices(server: Server, shape: tuple[int, int], width: str) -> None:
    assert server(matrix_faults, [shape], ("float32", "float64"), width) == []


# ---- layers, losses, optimizers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "example"), LAYER_CASES, ids=LAYER_IDS)
def test_every_layer(name: str, example: dict[str, Any]) -> None:
    check_layer(name, example)


LOSS_CASES = [(name, e) for name, loss in losses.items() for e in loss.examples]


@pytest.mark.parametrize(("name", "example"), LOSS_CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(LOSS_CASES)])
def test_every_loss(name: str, example: Any) -> None:
    x = example.scores.astype(np.float32).astype(np.float64)
    nets = twins(lambda: Gain(None), x, x.shape[1:])
    check_network(nets, x, example.target, losses[name](**example.options), both=False)


SHARED = {"clip_norm": 0.5, "clip_value": 0.3, "l1": 0.01, "l2": 0.02, "weight_decay": 0.05, "accumulate": 2}
RULES = [c for c in OPTIMIZERS if c[0] != "lbfgs"] + [("sgd", SHARED), ("adam", SHARED)]


def updated(net: nn.Module, rule: Any, dtype: str, backend: str, steps: int = 4) -> dict[str, Array]:
    """Parameters and slots after some updates from gradients that every backend is given alike."""
    net = copy.deepcopy(net)
    task = net._task(losses["mse"](), np.zeros((3, 2)), False, rule, dtype)
    program = make_program(task, 3, ("update",))
    start = {n: v.astype(dtype) for n, v in net.parameters.items()}
    session = backends[backend].session({3: program}, {**start, **initial_slots(rule, start, np.dtype(dtype))})
    random = np.random.default_rng(3)
    for _ in range(steps):
        gradients = {f"gradient.{n}": random.normal(size=v.shape).astype(np.float32) for n, v in start.items()}
        hyper = {"learning_rate": np.float32(0.0625), **{f"hyper.{k}": np.float32(v) for k, v in rule.hyper().items()}}
        entry = program.entries["update"]
        session.call(3, "update", {k: np.asarray(v, dtype) for k, v in {**gradients, **hyper}.items() if k in entry.inputs})
    return session.state()


@pytest.mark.parametrize(("name", "options"), RULES, ids=[f"{n}-{'-'.join(o) or 'default'}" for n, o in RULES])
def test_updates_from_equal_gradients(name: str, options: dict[str, Any]) -> None:
    rule = optimizers[name](0.0625, **options)
    x = float_inputs((3, 5), "float32")
    net, _ = twins(lambda: nn.Sequential(nn.Dense(17, "tanh"), nn.Dense(2)), x, (2,))
    exact = updated(net, rule, "float64", "reference")
    compare_named(updated(net, rule, "float32", "native"), updated(net, rule, "float32", "reference"), exact)
    compare_named(updated(net, rule, "float64", "native"), exact, None)


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=[f"{n}-{'-'.join(o) or 'default'}" for n, o in OPTIMIZERS])
def test_epochs_with_every_optimizer(name: str, options: dict[str, Any]) -> None:
    check_optimizer(name, options)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [(n, e.options) for n, e in LOSS_CASES])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_epochs_with_every_loss(name: str, options: dict[str, Any], dtype: str) -> None:
    x = float_inputs((45, 4), "float32")
    t = target_for(name, losses[name].link, x)
    runs = []
    for backend in ("reference", "native"):
        net = nn.Sequential(nn.Dense(8, "tanh"), nn.BatchNorm(), nn.Dense(3))
        runs.append(
            net.fit(x, t, loss=losses[name](**options), epochs=6, batch_size=16, backend=backend, dtype=dtype, validation=0.2)
        )
    np.testing.assert_allclose(runs[1].loss, runs[0].loss, rtol=1e-4 if dtype == "float32" else 1e-10)
    np.testing.assert_allclose(runs[1].validation_loss, runs[0].validation_loss, rtol=1e-3 if dtype == "float32" else 1e-10)


# ---- derivatives -------------------------------------------------------------------------------------------------------------


def potential(w: Any, x: Any = None) -> Any:
    x = np.linspace(-1.0, 1.0, 21).reshape(7, 3).astype(w.dtype) if x is None else x
    h = np.tanh(x @ w)
    return np.sum(np.log1p(np.exp(h * h)) * np.sin(w[0])) + np.sum(cr.softmax(h) ** 2) + np.max(h)


DERIVATIVES: dict[str, Callable[[Array], Any]] = {
    "grad": lambda w: cr.grad(potential)(w),
    "value and grad": lambda w: cr.value_and_grad(potential)(w),
    "hvp": lambda w: cr.hvp(potential, w, np.cos(w)),
    "jacobian": lambda w: cr.jacobian(lambda v: np.tanh(v @ v.T) * np.sin(v[:, :1]))(w),
    "hessian": lambda w: cr.jacobian(cr.grad(potential))(w),
    "third": lambda w: cr.grad(lambda v: np.sum(cr.grad(lambda u: np.sum(cr.grad(potential)(u) ** 2))(v)))(w),
    "jvp": lambda w: cr.jvp(potential, [w], [np.cos(w)]),
    "vjp": lambda w: cr.vjp(lambda v: np.tanh(v @ v.T), w)[1](np.ones((3, 3), w.dtype)),
    "through a scan": lambda w: cr.grad(lambda v: np.sum(cr.scan(lambda h, r: (np.tanh(h @ v @ v.T + r), h), v[:, 0], v.T)[1]))(
        w
    ),
}


@pytest.mark.parametrize("name", list(DERIVATIVES))
def test_derivatives(name: str, native_functions: Callable[[str], None]) -> None:
    w = float_inputs((3, 4), "float64")
    native_functions("reference")
    want = flat_list(DERIVATIVES[name](w))
    native_functions("native")
    got = flat_list(DERIVATIVES[name](w))
    assert transforms._functions
    for a, b in zip(got, want, strict=True):
        compare_wide(a, b, 1e-11)
