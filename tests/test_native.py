"""Native code against NumPy: every operator, layer, loss and optimizer; whole runs; memory; the same bits on any number of threads;
odd inputs, errors and interruptions."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_code
from expressions import function, listed
from native import (
    GUARD,
    POISONS,
    WIDTHS,
    Guards,
    Server,
    Threaded,
    assert_as_precise,
    assert_bits,
    backend_of,
    registered,
    untouched,
)
from same import assert_same, state
from test_layers import CASES as LAYER_CASES
from test_layers import IDS as LAYER_IDS
from test_layers import inputs as layer_inputs
from test_ops import COMPOSITION_CASES, OP_CASES, composition_graph, op_graph, single
from training import OPTIMIZERS, target_for

import chainrule as cr
import chainrule.run.native
from chainrule import nn, transforms
from chainrule.derive.backward import backward
from chainrule.graph.interpret import evaluate
from chainrule.graph.node import OPS, Graph, Type
from chainrule.graph.trace import build, inline, type_of
from chainrule.losses import losses
from chainrule.normalize import normalize
from chainrule.optim import optimizers
from chainrule.program import Input, ProgramBuilder, Variable
from chainrule.run.backend import Steps, backends
from chainrule.run.crew import Crew
from chainrule.train.objective import initial_slots, make_program

Array = np.ndarray
native_backend = backends["native"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


# ---- many graphs in one ------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A graph and arguments for it; where `exact` is None, float64 is compared with NumPy's float64."""

    name: str
    graph: Graph
    arrays: list[Array]
    exact: list[Array] | None = None


def joined(cases: Sequence[Case]) -> tuple[Graph, list[Array]]:
    """One graph that computes them all."""
    arrays = [np.asarray(a) for c in cases for a in c.arrays]

    def all_of(*xs: Any) -> list[Any]:
        results, at = [], 0
        for c in cases:
            results += inline(c.graph, xs[at : at + len(c.arrays)])
            at += len(c.arrays)
        return results

    graph = normalize(build(all_of, [type_of(a) for a in arrays]))
    return graph, [*arrays, *graph.captures]


def results_of(cases: Sequence[Case], width: str | None = None, level: int = 2, **options: Any) -> list[list[Array]]:
    graph, arrays = joined(cases)
    assert len(graph.inputs) == len(arrays)
    flat = iter(backend_of(width, level, **options).function(graph)(arrays))
    return [[next(flat) for _ in c.graph.outputs] for c in cases]


def faults(cases: Sequence[Case], width: str | None = None) -> list[str]:
    """What is wrong, case by case; a case that cannot be compiled is found by itself."""
    try:
        everything = results_of(cases, width)
    except Exception as error:
        if len(cases) == 1:
            return [f"{cases[0].name}: {type(error).__name__}: {error}"]
        half = len(cases) // 2
        return faults(cases[:half], width) + faults(cases[half:], width) or [f"only together: {[c.name for c in cases]}: {error}"]
    found = []
    for c, got in zip(cases, everything, strict=True):
        theirs = evaluate(c.graph, [*c.arrays, *c.graph.captures])
        for n, (a, b) in enumerate(zip(got, theirs, strict=True)):
            try:
                if c.exact is None:
                    compare_wide(a, b)
                else:
                    assert_as_precise(a, b, c.exact[n])
            except AssertionError as error:
                found.append(f"{c.name}, result {n}: {str(error).strip()[:600]}")
    return found


def compare_wide(got: Any, want: Any, rel: float = 1e-12) -> None:
    """float64 against NumPy's float64, which may be as far off itself; others exactly."""
    got, want = np.asarray(got), np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    if got.dtype.kind != "f":
        np.testing.assert_array_equal(got, want)
        return
    rel = rel if got.dtype == np.float64 else 1e-4
    largest = np.max(np.abs(want[np.isfinite(want)]), initial=0.0)
    np.testing.assert_allclose(got, want, rtol=rel, atol=rel * largest)


def with_gradients(graph: Graph, arrays: Sequence[Array]) -> tuple[Graph, list[Array]]:
    """Values and gradients from seeds that differ from place to place."""
    wrt = [i for i, a in enumerate(arrays) if np.asarray(a).dtype.kind == "f"]
    by = [i for i, o in enumerate(graph.outputs) if o.dtype.kind == "f"]
    if not wrt or not by:
        return graph, list(arrays)
    seeds = [np.cos(np.arange(o.type.size)).reshape(o.shape).astype(o.dtype) for o in (graph.outputs[i] for i in by)]
    return backward(graph, wrt, by, values=True), [*arrays, *seeds]


def registry_cases(narrow: bool) -> list[Case]:
    """The examples of all operators and compositions, values and gradients."""
    found = []
    for parameters, graph_of in ((OP_CASES, op_graph), (COMPOSITION_CASES, composition_graph)):
        for p in parameters:
            name, arrays, attrs = p.values
            if narrow and (name in ("call", "scan", "cast", "iota") or not any(a.dtype.kind == "f" for a in arrays)):
                continue
            wide, given = with_gradients(graph_of(name, arrays, attrs), arrays)
            if not narrow:
                found.append(Case(p.id, wide, given))
                continue
            graph, less = with_gradients(graph_of(name, single(arrays), attrs), single(arrays))
            exact = evaluate(wide, [np.asarray(a, n.dtype) for a, n in zip((*less, *wide.captures), wide.inputs, strict=True)])
            found.append(Case(p.id, graph, less, exact))
    return found


def registry_faults(narrow: bool, width: str) -> list[str]:
    return faults(registry_cases(narrow), width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("narrow", [False, True], ids=["float64", "float32"])
def test_every_operator_and_composition_with_its_gradient(server: Server, narrow: bool, width: str) -> None:
    assert server(registry_faults, narrow, width) == []


# ---- elementwise forms: every type and size ----------------------------------------------------------------------------------


SIZES = (0, 1, 3, 7, 16, 17, 33, 65)


def form_graph(case: Any, shape: tuple[int, ...], args: Sequence[Array]) -> tuple[Graph, list[Array]]:
    count = int(np.prod(shape))
    arrays = [np.resize(a, count).reshape(shape) if count else np.zeros(shape, a.dtype) for a in args]
    return op_graph(case.name, arrays, dict(case.attrs)), arrays


def form_faults(shapes: Sequence[tuple[int, ...] | None], width: str) -> list[str]:
    """Each elementwise form with all types that it takes; a shape of None stands for all special values with one another."""
    found = []
    for shape in shapes:
        tested, cases = [], []
        for case in test_code.CASES:
            args = test_code.arguments(case.name, case.dtypes)
            graph, arrays = form_graph(case, args[0].shape if shape is None else shape, args)
            tested.append(case)
            cases.append(Case(str(case), graph, arrays))
        for case, c, (got,) in zip(tested, cases, results_of(cases, width), strict=True):
            with np.errstate(all="ignore"):
                want = np.asarray(OPS[case.name].value(*c.arrays, **dict(case.attrs)))
            try:
                assert (got.shape, got.dtype) == (want.shape, want.dtype), (str(case), got.dtype, want.dtype)
                test_code.agree(case, got, want, c.arrays, shape)
            except AssertionError as error:
                found.append(str(error)[:500])
    return found


@pytest.mark.parametrize("width", WIDTHS)
def test_elementwise_forms_of_every_type_at_special_values(server: Server, width: str) -> None:
    assert server(form_faults, (None,), width) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_elementwise_forms_of_every_type_and_size(server: Server, width: str) -> None:
    shapes = [(n,) for n in SIZES] + [(3, 17), (17, 3), (2, 3, 5), (1, 1, 1, 4), ()]
    assert server(form_faults, shapes, width) == []


# ---- other forms: shapes -----------------------------------------------------------------------------------------------------

ON_MATRICES = """
np.sum(x); np.sum(x, 0); np.sum(x, 1); np.mean(x, 1, keepdims=True); np.var(x, 0); np.max(x, 0); np.min(x, 1); np.max(x);
np.cumsum(x, 0); np.cumsum(x, 1); x.T; x.T + 1.0; x[::-1]; x[:, ::-1]; x[::2, 1:]; x[:, ::3]; x[1:-1]; x[-1]; x[:, 0];
np.pad(x, ((1, 2), (0, 3))); np.concatenate([x, x * 2.0], 1); np.concatenate([x, np.sin(x), x[:1]], 0);
np.stack([x, x * x], 1); np.tile(x, (2, 3)); np.repeat(x, 2, 1); np.reshape(x, (-1,)) * 2.0; np.reshape(x.T, x.shape);
x @ x.T; x.T @ x; np.sin(x) @ np.cos(x.T); np.einsum("ij,ij->i", x, x); np.einsum("ij,ik->jk", x, x); x @ x[0]; x[:, 0] @ x;
np.einsum("ij,kj->ikj", x, x); np.outer(x[0], x[:, 0]); np.sum(x @ x.T, 0); np.tanh(x @ x.T + x[:, 0]); np.max(x @ x.T, 1);
x - np.mean(x, 0); (x - np.mean(x, 1, keepdims=True)) / np.sqrt(np.var(x, 1, keepdims=True) + 1e-3);
cr.softmax(x); cr.softmax(x, axis=0); cr.log_softmax(x); cr.logsumexp(x, axis=1); np.sum(np.maximum(x, x[:, :1]) * x);
np.take(x, np.array([0, -1, 0]), axis=0); np.take(x, np.array([[0, -1], [-1, 0]]), axis=1); x[np.array([0, 0, -1])];
np.where(x > 0.1, x, np.sin(x)); np.abs(x) ** 1.5; np.abs(x) ** 0.5; x ** 3; x[:, None] * x[None]; np.clip(x, -0.5, 0.5);
np.prod(np.tanh(x[:2, :2])); np.swapaxes(np.stack([x, x]), 0, 2); np.roll(x, 1, 0); np.diff(x, axis=1);
cr.scan(lambda h, r: (np.tanh(h + r), h * r), x[0], x); cr.scan(lambda h, r: (h * 0.5 + r, None), x[0], x, reverse=True);
cr.scan(lambda h, r: (np.tanh(h @ (x.T @ x) * 0.01 + r), h), x[0], x); cr.scan(lambda h, r: (h + np.sum(r), h), 0.0, x)
"""
ON_INDICES = (
    "np.argmax(x); np.argmax(x, 0); np.argmax(x, 1); np.argmin(x, 1); x > 0; x[:, 0] == x[0, 0]; cr.one_hot(np.argmax(x, 1), 4)"
)
MATRICES = [(1, 1), (3, 7), (17, 33), (65, 16)]
MORE_MATRICES = [(0, 3), (3, 0), (1, 65), (65, 1), (7, 3), (16, 16), (33, 17), (33, 65), (2, 130), (130, 2)]


def float_inputs(shape: tuple[int, ...], dtype: str, seed: int = 5) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def flat_list(result: Any) -> list[Any]:
    return [r for r in result if r is not None] if isinstance(result, (tuple, list)) else [result]


def weighted(results: Sequence[Any]) -> Any:
    # 0.1: the rounding of a long sum shall not decide where on its wave the sine is
    return sum(
        np.sum(np.sin(0.1 * r) * np.cos(np.arange(max(r.size, 1))[: r.size]).reshape(r.shape).astype(r.dtype)) for r in results
    )


def matrix_cases(shape: tuple[int, int], dtype: str) -> list[Case]:
    found = []
    for text in listed(ON_MATRICES) + listed(ON_INDICES):
        f = function(text, "x")

        def both(x: Any, f: Callable[..., Any] = f, text: str = text) -> list[Any]:
            values = flat_list(f(x))
            return values if text in ON_INDICES else [*values, cr.grad(lambda x: weighted(flat_list(f(x))))(x)]

        x = float_inputs(shape, dtype)
        try:
            graphs = {d: build(both, [type_of(x.astype(d))]) for d in {dtype, "float64"}}
        except (ValueError, IndexError, cr.ShapeError, cr.UsageError):
            assert 0 in shape or 1 in shape, text  # only such shapes may be refused
            continue
        wide = graphs["float64"]
        exact = evaluate(wide, [x.astype(np.float64), *wide.captures]) if dtype == "float32" else None
        found.append(Case(f"{text} of {dtype} {shape}", graphs[dtype], [x], exact))
    return found


def matrix_faults(shapes: Sequence[tuple[int, int]], dtypes: Sequence[str], width: str) -> list[str]:
    return [fault for shape in shapes for dtype in dtypes for fault in faults(matrix_cases(shape, dtype), width)]


def test_expressions_on_matrices(server: Server) -> None:
    assert server(matrix_faults, MATRICES[2:3], ("float32",), WIDTHS[0]) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", MATRICES + MORE_MATRICES)
def test_expressions_on_more_matrices(server: Server, shape: tuple[int, int], width: str) -> None:
    assert server(matrix_faults, [shape], ("float32", "float64"), width) == []


# ---- layers, losses, optimizers ----------------------------------------------------------------------------------------------


def compare_named(got: dict[str, Array], theirs: dict[str, Array], exact: dict[str, Array] | None) -> None:
    assert list(got) == list(theirs)
    for name, value in got.items():
        if exact is None:
            compare_wide(value, theirs[name])
        else:
            assert_as_precise(value, theirs[name], exact[name], name, multiple=8, ulps=32)


def twins(make: Callable[[], nn.Module], x: Any, outputs: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """A network in single and in double precision with the same random parameters, which single precision holds exactly."""
    nets = []
    for dtype in ("float32", "float64"):
        net = make()
        net.fit(x, np.zeros((len(x), *outputs)), loss=lambda s, t: np.mean(s), epochs=0, dtype=dtype)
        r = np.random.default_rng(1)
        values = {n: r.normal(size=v.shape).astype(np.float32) for n, v in net.parameters.items()}
        values |= {n: r.uniform(0.5, 2.0, v.shape).astype(np.float32) for n, v in net.statistics.items()}
        net.load_parameters(values)
        nets.append(net)
    return nets[0], nets[1]


class Gain(nn.Module):
    """layer(x) · gain, so that layers without parameters have a gradient too."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Any) -> Any:
        y = self.layer(x) if self.layer is not None else x
        return y * self.parameter("gain", y.shape[1:], "ones")


def check_network(nets: tuple[nn.Module, nn.Module], x: Any, t: Any, loss: Any, random: bool = False, both: bool = True) -> None:
    """Predictions, losses and gradients of the two precisions against NumPy."""
    for training in (True, False) if both else (True,):
        single, double = (
            [net.gradients(x, t, loss=loss, training=training, backend=b) for b in ("native", "reference")] for net in nets
        )
        compare_wide_all(double)
        compare_named(single[0], single[1], None if random and training else double[1])
    a, b, c = nets[0].predict(x, backend="native"), nets[0].predict(x), nets[1].predict(x)
    assert_as_precise(a, b, c, "predict")
    compare_wide(nets[1].predict(x, backend="native"), c)
    for net in nets:
        got, want = (net.evaluate(x, t, loss=loss, backend=b)["loss"] for b in ("native", "reference"))
        assert got == pytest.approx(want, rel=2e-6 if net is nets[0] else 1e-12)


def compare_wide_all(pair: Sequence[dict[str, Array]]) -> None:
    compare_named(pair[0], pair[1], None)


@pytest.mark.parametrize(("name", "example"), LAYER_CASES, ids=LAYER_IDS)
def test_every_layer(name: str, example: dict[str, Any]) -> None:
    x = layer_inputs(example).astype(np.float64)
    x = x.astype(np.int64) if "below" in example else x.astype(np.float32).astype(np.float64)
    make = lambda: Gain(nn.layers[name](*copy.deepcopy(example["args"])))
    probe = make()
    probe.fit(x, np.zeros((len(x), 1)), loss=lambda s, t: np.mean(s), epochs=0)
    outputs = probe.predict(x).shape[1:]
    t = np.random.default_rng(2).normal(size=(len(x), *outputs)).astype(np.float32)
    check_network(twins(make, x, outputs), x, t, "mse", random="Dropout" in name)


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
    x = float_inputs((40, 4), "float32")
    t = np.tanh(x @ float_inputs((4, 2), "float32"))
    rate = {"lbfgs": 1.0, "adadelta": 1.0, "lion": 0.005}.get(name, 0.03)
    runs = []
    for backend in ("reference", "native"):
        net = nn.Sequential(nn.Dense(8, "tanh"), nn.Dense(2))
        runs.append(
            net.fit(x, t, optimizer=optimizers[name](rate, **options), epochs=4, batch_size=16, backend=backend, dtype="float64")
        )
    np.testing.assert_allclose(runs[1].loss, runs[0].loss, rtol=1e-9)
    assert runs[0].steps == runs[1].steps


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


# ---- memory ------------------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """h ← tanh(x_t W + h U) over the time axis of x (B, T, I); the last h."""

    def __init__(self, units: int) -> None:
        self.units = units

    def __call__(self, x: Any) -> Any:
        w = self.parameter("w", (x.shape[2], self.units), "glorot_uniform")
        u = self.parameter("u", (self.units, self.units), "orthogonal")
        start = np.zeros((x.shape[0], self.units), x.dtype)
        return cr.scan(lambda h, now: (np.tanh(now @ w + h @ u), None), start, np.swapaxes(x, 0, 1))[0]


def dense_net() -> nn.Module:
    return nn.Sequential(nn.Dense(70, "relu"), nn.BatchNorm(), nn.Dropout(0.3), nn.Dense(33, "tanh"), nn.LayerNorm(), nn.Dense(3))


def token_net() -> nn.Module:
    return nn.Sequential(nn.Embedding(19, 6), Recurrent(21), nn.Dropout(0.2), nn.Dense(3))


NETS = {"dense": dense_net, "tokens": token_net}


def rows_for(kind: str, rows: int) -> tuple[Array, Array]:
    r = np.random.default_rng(rows)
    x = r.integers(0, 19, (rows, 7)) if kind == "tokens" else r.normal(size=(rows, 11)).astype(np.float32)
    return x, r.normal(size=(rows, 3)).astype(np.float32)


def trained(kind: str, rows: int, backend: str = "native", **options: Any) -> dict[str, Array]:
    x, t = rows_for(kind, rows)
    net = NETS[kind]()
    run = net.fit(x, t, **{"epochs": 2, "batch_size": 32, **options}, backend=backend)
    scores = net.predict(x, backend=backend)
    return {**state(net), "loss": np.array(run.loss), "scores": scores}


def trained_on(kind: str, rows: int, backend: Any, **options: Any) -> dict[str, Array]:
    with registered(backend) as name:
        return trained(kind, rows, name, **options)


@pytest.mark.parametrize("kind", list(NETS))
@pytest.mark.parametrize("threads", [1, 3])
def test_nothing_is_written_beside_arrays(kind: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained(kind, 64)
    guards = Guards()
    monkeypatch.setattr(chainrule.run.native, "aligned", guards)
    assert_same(trained_on(kind, 64, Threaded(threads)), plain)
    guards.check()
    assert len(guards.zones) > 4


@pytest.mark.parametrize("kind", list(NETS))
@pytest.mark.parametrize("threads", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_scratch_memory_between_buffers_stays_as_it_was(kind: str, threads: int) -> None:
    """All steps have the same rows, so one entry owns the memory; what it holds at first changes no bit."""
    x, t = rows_for(kind, 64)
    plain = trained(kind, 64)
    for poison in POISONS:
        backend = Threaded(threads, guard=GUARD, poison=poison)
        net = NETS[kind]()
        with registered(backend) as name:
            run = net.fit(x, t, epochs=2, batch_size=32, backend=name)
        assert_same({**state(net), "loss": np.array(run.loss)}, {k: v for k, v in plain.items() if k != "scores"})
        (session,) = backend.sessions
        (machine,) = session._known.values()
        assert session._arena.size == machine.code.arena.bytes
        untouched(session._arena, machine.code, poison)


def test_all_steps_of_a_session_work_in_the_same_memory() -> None:
    backend = Threaded(1)
    trained_on("dense", 77, backend, validation=0.3)
    assert max(len(session._known) for session in backend.sessions) > 2, "whole batches, a short one, and validation"
    for session in backend.sessions:
        assert session._arena.size == max(machine.code.arena.bytes for machine in session._known.values())
        for machine in session._known.values():
            ends = [start + buffer.bytes for buffer, start in machine.code.arena.offsets.items()]
            assert machine.code.arena.bytes - max(ends) < 64


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def growth(fits: int) -> int:
    """Bytes by which this process grows over so many fits, after the first few."""
    x, t = rows_for("dense", 40)
    at = []
    for n in range(fits + 50):
        nn.Sequential(nn.Dense(5, "tanh"), nn.Dropout(0.1), nn.Dense(3)).fit(x, t, epochs=1, batch_size=16, backend="native")
        if n in (49, fits + 49):
            gc.collect()
            at.append(resident())
    return at[1] - at[0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("fits", [50, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow(fits: int) -> None:
    server = Server(seconds=600)
    assert server(growth, fits) < 4_000_000
    server.stop()


# ---- the same bits -----------------------------------------------------------------------------------------------------------

THREADS = (2, 3, 5)


def check_threads(kind: str, rows: int, several: Sequence[int] = THREADS) -> None:
    plain = trained(kind, rows)
    for threads in several:
        assert_same(trained_on(kind, rows, Threaded(threads)), plain)


@pytest.mark.parametrize(("kind", "rest"), [("dense", 17), ("tokens", 1)])
def test_any_number_of_threads_gives_the_same_bits(kind: str, rest: int) -> None:
    check_threads(kind, 96 + rest, THREADS[1:] if kind == "tokens" else THREADS[1:2])


RESTS = [(kind, rest) for kind in NETS for rest in (0, 1, 2, 3, 5, 7, 8, 15, 16, 31)]
RESTS.remove(("dense", 1))  # batch norm refuses a batch of one row


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rest"), RESTS)
def test_any_number_of_threads_gives_the_same_bits_for_any_rest(kind: str, rest: int) -> None:
    check_threads(kind, 96 + rest)


def test_two_processes_give_the_same_bits(server: Server) -> None:
    for kind in NETS:
        assert_same(server(trained, kind, 101), trained(kind, 101))


def forked(kind: str, rows: int, threads: int) -> list[dict[str, Array]]:
    """What a network learns here, in a child made after that, and here again."""
    import pickle

    found = [trained_on(kind, rows, Threaded(threads))]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(writing, "wb") as file:
                pickle.dump(trained_on(kind, rows, Threaded(threads)), file)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        found.append(pickle.load(file))
    os.waitpid(child, 0)
    return [*found, trained_on(kind, rows, Threaded(threads))]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_forked_child_gives_the_same_bits(server: Server, threads: int) -> None:
    a, b, c = server(forked, "dense", 101, threads)
    assert_same(b, a)
    assert_same(c, a)


@pytest.mark.parametrize("threads", [1, 2])
def test_two_fits_at_once(threads: int) -> None:
    plain = {kind: trained(kind, 101, epochs=8) for kind in NETS}
    found: dict[str, Any] = {}
    with registered(Threaded(threads)) as name:

        def work(kind: str) -> None:
            found[kind] = trained(kind, 101, name, epochs=8)

        workers = [threading.Thread(target=work, args=(kind,)) for kind in NETS]
        for w in workers:
            w.start()
        for w in workers:
            w.join(60)
    for kind in NETS:
        assert_same(found[kind], plain[kind])


# ---- derivatives -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def native_functions(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def choose(name: str) -> None:
        monkeypatch.setattr(transforms, "DEFAULT_BACKEND", name)
        monkeypatch.setattr(transforms, "_functions", type(transforms._functions)())

    return choose


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


# ---- inputs ------------------------------------------------------------------------------------------------------------------


def unaligned(a: Array) -> Array:
    memory = np.zeros(a.nbytes + 1, np.uint8)
    view = memory[1:].view(np.uint8)[: a.nbytes]
    made = np.ndarray(a.shape, a.dtype, view.data)
    made[...] = a
    assert not made.flags.aligned or a.dtype.itemsize == 1 or a.size == 0
    return made


def strided(a: Array) -> Array:
    wide = np.zeros((2 * a.shape[0], *a.shape[1:-1], 3 * a.shape[-1]), a.dtype)
    wide[::2, ..., ::3] = a
    return wide[::2, ..., ::3]


def read_only(a: Array) -> Array:
    made = a.copy()
    made.flags.writeable = False
    return made


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "unaligned": unaligned,
    "strided": strided,
    "negative strides": lambda a: np.ascontiguousarray(a[::-1, ..., ::-1])[::-1, ..., ::-1],
    "read-only": read_only,
    "Fortran": np.asfortranarray,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "float16": lambda a: a.astype(np.float16),
    "float64": lambda a: a.astype(np.float64),
    "int8": lambda a: a.astype(np.int8),
    "int64": lambda a: a.astype(np.int64),
    "list": lambda a: a.tolist(),
}


@pytest.mark.parametrize("threads", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_every_layout_and_type_of_data(threads: int) -> None:
    x, t = rows_for("dense", 70)
    x, t = np.round(x * 4), np.round(t * 4)  # every type holds them
    weight = np.arange(1.0, 71.0, dtype=np.float32)

    def learnt(x: Any, t: Any, weight: Any) -> dict[str, Array]:
        net = nn.Sequential(nn.Dense(7, "relu"), nn.BatchNorm(), nn.Dense(3))
        with registered(Threaded(threads)) as name:
            run = net.fit(x, t, sample_weight=weight, epochs=1, backend=name)
            return {**state(net), "loss": np.array(run.loss), "scores": net.predict(x, backend=name)}

    plain = learnt(x, t, weight)
    for name, change in LAYOUTS.items():
        before = np.array(change(x))
        one, other = change(x), change(t)
        assert_same(learnt(one, other, weight), plain)
        np.testing.assert_array_equal(np.array(one), before, err_msg=name)
    for name in ("unaligned", "strided", "big-endian", "float64", "int64"):
        changed = weight[:, None].copy()
        assert_same(learnt(x, t, np.asarray(LAYOUTS[name](changed))[:, 0]), plain)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64", ">i4"])
def test_every_type_of_indices(dtype: str) -> None:
    x, t = rows_for("tokens", 40)
    results = []
    for indices in (x, x.astype(dtype)):
        net = token_net()
        run = net.fit(indices, t, epochs=1, backend="native")
        results.append({**state(net), "loss": np.array(run.loss)})
    assert_same(results[1], results[0])


def taking(b: Array) -> Callable[..., Any]:
    """A function that takes an array from outside."""
    return cr.compile(lambda a: (np.tanh(a) @ b.T, a[::-1] + b, np.sum(a)))


def test_every_layout_of_arguments(native_functions: Callable[[str], None]) -> None:
    native_functions("native")
    f = cr.compile(lambda a, b: (np.tanh(a) @ b.T, a[::-1] + b, np.sum(a)))
    for dtype in ("float32", "float64"):
        a, b = np.round(float_inputs((5, 7), dtype) * 3), float_inputs((5, 7), dtype, seed=9)
        want = f(a, b)
        for name in ("unaligned", "strided", "negative strides", "read-only", "Fortran", "big-endian"):
            assert_bits(f(LAYOUTS[name](a), LAYOUTS[name](b)), want, name)
            assert_bits(taking(LAYOUTS[name](b))(a), want, name)
        slope = cr.grad(lambda a: np.sum(np.tanh(a) ** 2))
        assert_bits([slope(LAYOUTS["big-endian"](a))], [slope(a)])
    np.testing.assert_array_equal(cr.compile(lambda b, i: b[i])(b, np.array([1, 0], ">i4")), b[[1, 0]])


def test_arguments_without_axes_and_without_elements(native_functions: Callable[[str], None]) -> None:
    native_functions("native")
    assert cr.compile(lambda a: a * 2.0)(np.array(3.0)) == 6.0
    assert cr.compile(lambda a, b: a * b)(np.float32(3.0), 0.5) == 1.5
    assert cr.grad(lambda a: a * a)(np.array(3.0)) == 6.0
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 4)):
        empty = np.zeros(shape)
        total, moved, joined_up = cr.compile(lambda a: (np.sum(a), np.sin(a) + 1.0, np.concatenate([a, a])))(empty)
        assert total == 0.0
        assert moved.shape == shape
        assert joined_up.shape == (2 * shape[0], *shape[1:])
    assert_bits(cr.compile(lambda a: (np.zeros((3, 0)) @ a, np.sum(a, 0)))(np.zeros((0, 4))), [np.zeros((3, 4)), np.zeros(4)])


def test_results_belong_to_the_caller(native_functions: Callable[[str], None]) -> None:
    native_functions("native")
    f = cr.compile(lambda a: (a, a * 1.0, a[1:]))
    a = np.arange(4.0)
    first = f(a)
    for r in first:
        r[...] = 7.0
    np.testing.assert_array_equal(a, np.arange(4.0))
    assert_bits(f(a), [np.arange(4.0), np.arange(4.0), np.arange(1.0, 4.0)])


def test_equal_entries_with_arrays_of_their_own() -> None:
    arrays = {"first": np.array([1.0, 2.0, 3.0]), "second": np.array([10.0, 20.0, 30.0])}
    builder = ProgramBuilder([], [Input("x", Type((4, 3), np.dtype("f8")), rows=0)], 4)
    for name, own in arrays.items():
        builder.entry(name, lambda s, g, own=own: ({"y": g["x"] * own}, {}), ["x"])
    session = native_backend.session({4: builder.build()}, {})
    for name, own in arrays.items():
        np.testing.assert_array_equal(session.call(4, name, {"x": np.ones((4, 3))})["y"], np.ones((4, 3)) * own)


# ---- indices out of range ----------------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """An embedding whose index is computed, so that nobody can check the data beforehand."""

    def __init__(self, by: int) -> None:
        self.by = by
        self.inner = nn.Embedding(9, 4)

    def __call__(self, x: Any) -> Any:
        return self.inner(x + self.by)


def index_session(backend: Any, threads: int = 1) -> tuple[Any, dict[str, Array], dict[str, Any]]:
    net = nn.Sequential(Shifted(1), nn.Flatten(), nn.Dense(5, "tanh"), nn.BatchNorm(), nn.Dense(2))
    x, t = np.arange(24).reshape(8, 3) % 8, float_inputs((8, 2), "float32")
    rule = cr.Adam(0.05)
    net.fit(x, t, epochs=0, optimizer=rule)
    program = make_program(net._task(losses["mse"](), t, False, rule), 4, ("step",))
    start = {**state(net), **initial_slots(rule, net.parameters, np.float32)}
    return backend.session({4: program}, start), {"x": x, "target": t}, program.inputs


def index_steps(data: dict[str, Array], inputs: dict[str, Any], order: Sequence[int]) -> Any:

    count = len(order) // 4
    name = next(n for n in inputs if inputs[n].type.dtype.kind == "i" and inputs[n].rows == 0)
    values = {
        "divisor": 4.0,
        "seed": np.array([1, 2]),
        "step": 0,
        "learning_rate": 0.05,
        **{f"hyper.{k}": v for k, v in cr.Adam(0.05).hyper().items()},
    }
    numbers = {n: np.stack([np.asarray(values[n], i.type.dtype)] * count) for n, i in inputs.items() if n in values}
    return Steps(["step"] * count, {name: data["x"], "target": data["target"]}, np.array(order), [4] * count, numbers, ("loss",))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [8, -11, 2**40, -(2**62)])
def test_an_index_out_of_range_in_a_step(bad: int, threads: int) -> None:
    good, wrong = [0, 1, 2, 3], [4, 5, 6, 7]
    texts, states = [], []
    for backend in (backends["reference"], Threaded(threads)):
        session, data, inputs = index_session(backend)
        session.run(index_steps(data, inputs, good))
        before = session.state()
        data["x"] = data["x"].copy()
        data["x"][6, 1] = bad
        with pytest.raises(cr.DataError) as caught:
            session.run(index_steps(data, inputs, wrong))
        texts.append(str(caught.value))
        assert_same(session.state(), before)
        with pytest.raises(cr.DataError):
            session.run(index_steps(data, inputs, [*good, *wrong, *good]))
        session.run(index_steps(data, inputs, good))
        states.append(session.state())
    assert texts[0] == texts[1]
    for name, value in states[0].items():
        np.testing.assert_allclose(states[1][name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [0, 63, 64, 127, 128, 191])
def test_an_index_out_of_range_where_no_state_is_written(bad: int, threads: int) -> None:
    """Such a step has one phase, at the end of which threads differ about what they have seen. The step is named all the same."""
    inputs = [Input("x", Type((64,), np.dtype("i8")), rows=0)]
    builder = ProgramBuilder([Variable("w", Type((10, 4), np.dtype("f4")), "parameter")], inputs, 64)
    builder.entry("look", lambda s, g: ({"y": s["w"][g["x"]]}, {}), ["x"])
    x = np.zeros(192, np.int64)
    x[bad] = 99
    steps = Steps(["look"] * 3, {"x": x}, np.arange(192), [64] * 3, {}, ("y",))
    for _ in range(30):
        session = Threaded(threads).session({64: builder.build()}, {"w": np.ones((10, 4), "f4")})
        with pytest.raises(cr.DataError, match=rf"index 99 \(element {bad % 64} of the indices\)"):
            session.run(steps)


@pytest.mark.parametrize("bad", [8, -11, 2**40])
def test_an_index_out_of_range_in_fit_and_predict(bad: int) -> None:
    x, t = np.arange(24).reshape(8, 3) % 8, float_inputs((8, 2), "float32")
    wrong = x.copy()
    wrong[5, 2] = bad
    texts = []
    for backend in ("reference", "native"):
        net = nn.Sequential(Shifted(1), nn.Flatten(), nn.Dense(2))
        net.fit(x, t, epochs=1, batch_size=4, backend=backend)
        before = state(net)
        with pytest.raises(cr.DataError) as caught:
            net.fit(wrong, t, epochs=2, batch_size=4, shuffle=False, backend=backend)
        texts.append(str(caught.value))
        with pytest.raises(cr.DataError) as caught:
            net.predict(wrong, backend=backend)
        texts.append(str(caught.value))
        assert_same(state(net), before)
        net.fit(x, t, epochs=1, batch_size=4, backend=backend)
        assert np.isfinite(net.predict(x, backend=backend)).all()
    assert texts[:2] == texts[2:]


INDEXING = """
np.take(w, i, axis=0); w[i]; np.take(w, i[:, None], axis=1); cr.grad(lambda w: np.sum(w[i] ** 2))(w);
cr.scan(lambda h, k: (h + w[k], None), w[0], i)[0]
"""


@pytest.mark.parametrize("text", listed(INDEXING))
@pytest.mark.parametrize("bad", [4, -5, 2**31])
def test_an_index_out_of_range_in_a_function(text: str, bad: int, native_functions: Callable[[str], None]) -> None:
    w, i = float_inputs((4, 4), "float64"), np.array([0, 3, -4, bad, 1, bad + 1])
    texts, values, f = [], [], function(text, "wi")
    for name in ("reference", "native"):
        native_functions(name)
        compiled = cr.compile(f)
        with pytest.raises(cr.DataError) as caught:
            compiled(w, i)
        texts.append(str(caught.value))
        values.append(compiled(w, i % 4))
    np.testing.assert_allclose(values[1], values[0], rtol=1e-12)
    assert texts[0] == texts[1]


def test_an_index_that_another_thread_changes_before_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy, asked which index it was, gets copies: it would crash if one changed between its check and its use."""
    w, i = float_inputs((4, 4), "float64"), np.array([0, 3, 9])
    real = chainrule.run.native.evaluate

    def changed(graph: Graph, values: Sequence[Any]) -> Any:
        i[2] = 1
        return real(graph, values)

    compiled = cr.compile(lambda w, i: w[i])
    with monkeypatch.context() as patch:
        patch.setattr(chainrule.run.native, "evaluate", changed)
        with pytest.raises(cr.DataError, match="index 9"):
            compiled(w, i)
    np.testing.assert_array_equal(compiled(w, i), w[[0, 3, 1]])
    with monkeypatch.context() as patch:
        patch.setattr(chainrule.run.native, "evaluate", lambda graph, values: [])
        with pytest.raises(cr.DataError, match="another thread, changes the data"):
            compiled(w, np.array([9]))


# ---- rounds ------------------------------------------------------------------------------------------------------------------


def rounds_program(rows: int) -> Any:
    """w ← w · 0.5 + a + Σ x · b, with results of each kind: a number, one a row, rows on the second axis."""
    f4 = np.dtype("f4")
    inputs = [
        Input("x", Type((rows, 2), f4), rows=0),
        *(Input(n, Type(s, f4)) for n, s in (("a", ()), ("b", (2,)), ("unread", ()))),
    ]
    builder = ProgramBuilder([Variable("w", Type((2,), f4), "parameter")], inputs, rows)

    def step(s: Any, g: Any) -> Any:
        y = g["x"] * g["b"]
        return {"loss": np.sum(s["w"]) + g["a"], "y": y, "across": np.transpose(y)}, {
            "w": 0.5 * s["w"] + g["a"] + np.sum(y, axis=0)
        }

    def look(s: Any, g: Any) -> Any:
        return {"loss": np.sum(s["w"]) * g["a"]}, {}

    builder.entry("step", step, ["x", "a", "b"], rows_of={"y": 0, "across": 1})
    builder.entry("look", look, ["a"])
    return builder.build()


ROUNDS = [
    (["step"], [4], 6),
    (["step", "step", "look", "step"], [4, 4, 4, 3], 5),
    (["look", "step", "step"], [3, 4, 3], 1),
    (["step"] * 100, [4] * 99 + [3], 3),
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("entries", "sizes", "rounds"), ROUNDS)
@pytest.mark.parametrize("slices", [(1,), (2, 5, 1), (1000,)])
def test_rounds_of_steps(
    entries: list[str], sizes: list[int], rounds: int, threads: int, slices: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orders and numbers of all rounds, of one, and a single number; however the steps are cut, and again in the same session."""
    r = np.random.default_rng(0)
    programs = {n: rounds_program(n) for n in (4, 3)}
    x, each, count = r.normal(size=(50, 2)), len(entries), rounds * len(entries)
    order = r.integers(0, 50, (rounds, sum(sizes)))
    of = {n: {"a": r.normal(size=n), "b": r.normal(size=(n, 2))} for n in (1, each, count)}
    turn = itertools.cycle(slices)
    monkeypatch.setattr(Crew, "steps", lambda self, pace, way, left: min(next(turn), left))
    sessions = [b.session(programs, {"w": np.ones(2, "f4")}) for b in (Threaded(threads), backends["reference"])]
    for rows in (order, order[0], order):
        for a, b in itertools.product(of, of):
            numbers = {"a": of[a]["a"], "b": of[b]["b"], "unread": np.zeros(1)}
            steps = Steps(entries, {"x": x}, rows, sizes, numbers, ("loss", "y", "across"), rounds)
            native, plain = (s.run(steps) for s in sessions)
            assert native.steps == plain.steps == count
            for name, value in plain.results.items():
                np.testing.assert_allclose(native.results[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(sessions[0].state()["w"], sessions[1].state()["w"], rtol=1e-4)
    for stop in range(1, min(count, 9)):
        turn = itertools.repeat(1)
        native, plain = (s.run(steps, lambda done, stop=stop: done < stop) for s in sessions)
        assert native.steps == plain.steps == stop
        for name, value in plain.results.items():
            np.testing.assert_allclose(native.results[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


# ---- interruptions -----------------------------------------------------------------------------------------------------------


# Where a signal happens to arrive inside a finaliser, Python drops the exception with a warning.
DROPPED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@DROPPED
@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_in_the_middle_of_an_epoch(threads: int) -> None:
    rows = 100_000
    x, t = float_inputs((rows, 16), "float32"), float_inputs((rows, 2), "float32", seed=2)
    make = lambda: nn.Sequential(nn.Dense(64, "tanh"), nn.Dense(2))
    options = {"batch_size": 1, "shuffle": False, "optimizer": cr.SGD(1e-4)}
    with registered(Threaded(threads)) as name:
        make().fit(x[:10], t[:10], epochs=1, backend=name, **options)  # compiled
        net, plain = make(), make()
        alarm = threading.Timer(0.8, lambda: os.kill(os.getpid(), signal.SIGINT))
        alarm.start()
        started = time.perf_counter()
        try:
            run = net.fit(x, t, epochs=10_000, backend=name, **options)
        finally:
            alarm.cancel()
            alarm.join()
        assert time.perf_counter() - started < 5
        assert run.interrupted
        assert run.steps > 0
        whole, part = divmod(run.steps, rows)
        assert run.epochs == whole
        if whole:
            plain.fit(x, t, epochs=whole, backend=name, **options)
        if part:
            plain.fit(x[:part], t[:part], epochs=1, backend=name, **options)
        assert_same(state(net), state(plain))
        assert not net.fit(x[:10], t[:10], epochs=1, backend=name, **options).interrupted


@DROPPED
def test_ctrl_c_at_any_moment() -> None:
    x, t = rows_for("dense", 64)
    for delay in (0.0, 0.002, 0.01, 0.03, 0.06, 0.1, 0.2):
        net = dense_net()
        net.fit(x, t, epochs=1, batch_size=8, backend="native")
        before = state(net)
        alarm = threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGINT))
        try:
            alarm.start()
            run = net.fit(
                x, t, epochs=10**5, batch_size=8, backend="native", callbacks=[lambda run: None] if delay > 0.05 else ()
            )
            assert run.interrupted
        except KeyboardInterrupt:
            assert_same(state(net), before)  # the programs were still being made
        finally:
            alarm.join()
        assert all(np.isfinite(v).all() for v in state(net).values())
        assert len(net.fit(x, t, epochs=1, batch_size=8, backend="native").loss) == 1


def test_an_exception_in_a_callback() -> None:
    x, t = rows_for("dense", 77)

    def fail(run: Any) -> None:
        if run.epochs == 2:
            raise RuntimeError("callback")

    net, plain = dense_net(), dense_net()
    with pytest.raises(RuntimeError, match="callback"):
        net.fit(x, t, epochs=5, backend="native", callbacks=[fail])
    plain.fit(x, t, epochs=2, backend="native")
    assert_same(state(net), state(plain))
    net.fit(x, t, epochs=1, backend="native")
    plain.fit(x, t, epochs=1, backend="native")
    assert_same(state(net), state(plain))


def test_divergence_is_found_as_by_the_reference() -> None:
    x, t = rows_for("dense", 64)
    texts = []
    for backend in ("reference", "native"):
        net = nn.Sequential(nn.Dense(4), nn.Dense(3))
        net.fit(x, t, epochs=1, backend=backend)
        before = state(net)
        with pytest.raises(cr.DivergenceError) as caught:
            net.fit(x, t, epochs=9, optimizer=cr.SGD(1e30), backend=backend)
        texts.append(str(caught.value))
        assert_same(state(net), before)
    assert texts[0] == texts[1]


def collected() -> None:
    """Code that only a cycle of references keeps."""
    for _ in range(20):
        f = backend_of().function(normalize(build(lambda x: [x * 2.0], [type_of(np.ones(3))])))
        chainrule.run.native._machines.clear()
        cycle: list[Any] = [f]
        cycle.append(cycle)
        del f, cycle
        gc.collect()


def test_code_in_a_cycle_of_references_is_freed(server: Server) -> None:
    server(collected)


def test_a_process_ends_in_silence() -> None:
    code = "import numpy as np, chainrule.run.native; from chainrule import nn; "
    code += "nn.Dense(2).fit(np.ones((4, 3)), np.ones((4, 2)), epochs=1, backend='native')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout + ended.stderr == ""
