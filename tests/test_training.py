"""What `fit` promises: exact steps, the same bits for the same seed, runs that can be ended, repeated, interrupted and resumed."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from same import assert_same, state

import chainrule as cr
from chainrule import nn
from chainrule.losses import losses
from chainrule.optim import optimizers
from chainrule.schedules import Schedule, schedules

Array = np.ndarray


def product(scores: Any, target: Any) -> Any:
    """A loss that is linear in the scores: constant gradients."""
    return scores * target


def data(rows: int = 20, inputs: int = 4, outputs: int = 2, seed: int = 0) -> tuple[Array, Array]:
    r = np.random.default_rng(seed)
    x = r.normal(size=(rows, inputs))
    return x, np.tanh(x @ r.normal(size=(inputs, outputs))) + 0.1 * r.normal(size=(rows, outputs))


def differ(a: dict[str, Array], b: dict[str, Array]) -> bool:
    return any(not np.array_equal(value, b[name]) for name, value in a.items())


def noisy() -> nn.Sequential:
    """Everything that could depend on order, step or chance."""
    return nn.Sequential(nn.Dense(6, "tanh"), nn.BatchNorm(), nn.Dropout(0.3), nn.Dense(5, "relu"), nn.Dropout(0.1), nn.Dense(2))


def at_zero(outputs: int = 1, bias: bool = True) -> nn.Dense:
    return nn.Dense(outputs, init="zeros", bias=bias)


def mse_step(w: Array, b: Array, x: Array, t: Array, weight: Array | None = None) -> tuple[float, Array, Array]:
    """Loss and gradients of y = x w + b under Σ ω (y - t)² / (Σ ω · outputs), by hand."""
    weight = np.ones(len(x)) if weight is None else np.asarray(weight, float)
    error = x @ w + b - t
    share = weight[:, None] / (weight.sum() * t.shape[1])
    return float(np.sum(share * error**2)), 2 * x.T @ (share * error), 2 * np.sum(share * error, axis=0)


# --------------------------------------------------------------------------------------------- everything registered can train


def target_for(name: str, kind: str, x: Array) -> Array:
    """A target that can be learnt from x, in the domain of the loss."""
    r = np.random.default_rng(5)
    s = x @ r.normal(size=(x.shape[1], 3))
    p = np.exp(s) / np.exp(s).sum(axis=1, keepdims=True)
    domains = {
        "identity": s,
        "exp": np.floor(np.exp(np.clip(s, -2, 2))),
        "sigmoid": (s > 0).astype(float),
        "softmax": p,
    }
    return np.sign(s) if name == "hinge" else domains[kind]


LOSSES = [(name, example.options) for name, loss in losses.items() for example in loss.examples]
LOSSES = [case for number, case in enumerate(LOSSES) if case not in LOSSES[:number]]


@pytest.mark.parametrize(("name", "options"), LOSSES, ids=[f"{n}-{'-'.join(o) or 'default'}" for n, o in LOSSES])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_with_every_loss(name: str, options: dict[str, Any], dtype: str) -> None:
    x, _ = data(32)
    loss = losses[name](**options)
    t = target_for(name, loss.link, x)
    targets = [t, t.argmax(axis=1)] if name == "cross_entropy" else [t]
    for target in targets:
        net = nn.Sequential(nn.Dense(8, "tanh"), nn.Dense(3))
        net.fit(x, target, loss=loss, epochs=0, dtype=dtype)
        before = net.evaluate(x, target, loss=loss)["loss"]
        net.check_gradients(x[:4], target[:4], loss=loss)
        run = net.fit(x, target, loss=loss, epochs=15, batch_size=8, optimizer=cr.Adam(0.02))
        after = net.evaluate(x, target)["loss"]
        assert max(after, run.loss[-1]) < run.loss[0]
        assert after < before - 0.1 * abs(before)


@pytest.mark.parametrize("name", list(losses))
def test_a_loss_by_name_is_the_loss_with_its_defaults(name: str) -> None:
    x, _ = data(8)
    t = target_for(name, losses[name].link, x)
    nets = [nn.Dense(3) for _ in range(2)]
    runs = [net.fit(x, t, loss=loss, epochs=2) for net, loss in zip(nets, (name, losses[name]()), strict=True)]
    assert runs[0].loss == runs[1].loss
    assert_same(nets[0].parameters, nets[1].parameters)


OPTIMIZERS = [(name, options) for name, rule in optimizers.items() for options in rule.examples]


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=[f"{n}-{'-'.join(o) or 'default'}" for n, o in OPTIMIZERS])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_with_every_optimizer(name: str, options: dict[str, Any], dtype: str) -> None:
    x, t = data(40)
    rate = {"lbfgs": 1.0, "adadelta": 1.0, "lion": 0.005}.get(name, 0.03)
    optimizer = optimizers[name](rate, **options)
    net = nn.Sequential(nn.Dense(8, "tanh"), nn.Dense(2))
    run = net.fit(x, t, optimizer=optimizer, epochs=25, batch_size=10, dtype=dtype)
    assert run.loss[-1] < 0.5 * run.loss[0]
    assert net.evaluate(x, t)["loss"] < 0.5 * run.loss[0]
    assert all(np.isfinite(value).all() for value in net.parameters.values())
    twin = nn.Sequential(nn.Dense(8, "tanh"), nn.Dense(2))
    twin.fit(x, t, optimizer=optimizer, epochs=25, batch_size=10, dtype=dtype)
    assert_same(twin.parameters, net.parameters)


@pytest.mark.parametrize("name", list(optimizers))
def test_an_optimizer_by_name_is_the_optimizer_with_its_defaults(name: str) -> None:
    x, t = data(8)
    nets = [nn.Dense(2) for _ in range(2)]
    for net, optimizer in zip(nets, (name, optimizers[name]()), strict=True):
        net.fit(x, t, optimizer=optimizer, epochs=3)
    assert_same(nets[0].parameters, nets[1].parameters)


def test_the_first_optimizer_is_adam() -> None:
    x, t = data(8)
    nets = [nn.Dense(2) for _ in range(2)]
    for net, optimizer in zip(nets, (None, cr.Adam()), strict=True):
        net.fit(x, t, optimizer=optimizer, epochs=2)
    assert_same(nets[0].parameters, nets[1].parameters)


# ------------------------------------------------------------------------------------------------------ steps, exactly by hand


@pytest.mark.parametrize(("rows", "batch"), [(7, 3), (7, 7), (7, 100), (8, 4), (5, 1)])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_every_batch_by_hand(rows: int, batch: int, weighted: bool) -> None:
    """The short last batch too: its mean is over its own rows, and the epoch's loss is the mean over all rows."""
    x, t = data(rows)
    weight = np.random.default_rng(1).uniform(0.5, 2.0, rows) if weighted else np.ones(rows)
    net = nn.Dense(2)
    net.fit(x, t, epochs=0, dtype="float64")
    w, b = net.parameters["weight"], net.parameters["bias"]
    expected = []
    for _ in range(3):
        total = 0.0
        for start in range(0, rows, batch):
            part = slice(start, start + batch)
            loss, gw, gb = mse_step(w, b, x[part], t[part], weight[part])
            w, b = w - 0.1 * gw, b - 0.1 * gb
            total += loss * weight[part].sum()
        expected.append(total / weight.sum())
    run = net.fit(
        x, t, epochs=3, batch_size=batch, shuffle=False, optimizer=cr.SGD(0.1), sample_weight=weight if weighted else None
    )
    np.testing.assert_allclose(net.parameters["weight"], w, rtol=1e-12)
    np.testing.assert_allclose(net.parameters["bias"], b, rtol=1e-12)
    np.testing.assert_allclose(run.loss, expected, rtol=1e-12)
    assert run.steps == 3 * math.ceil(rows / batch)


def test_momentum_by_hand() -> None:
    x, t = data(6)
    net = nn.Dense(2)
    net.fit(x, t, epochs=0, dtype="float64")
    w, b, m, n = net.parameters["weight"], net.parameters["bias"], 0.0, 0.0
    for start in (0, 4, 0, 4):
        _, gw, gb = mse_step(w, b, x[start : start + 4], t[start : start + 4])
        m, n = 0.9 * m + gw, 0.9 * n + gb
        w, b = w - 0.05 * m, b - 0.05 * n
    net.fit(x, t, epochs=2, batch_size=4, shuffle=False, optimizer=cr.SGD(0.05, momentum=0.9))
    np.testing.assert_allclose(net.parameters["weight"], w, rtol=1e-12)
    np.testing.assert_allclose(net.parameters["bias"], b, rtol=1e-12)


def test_shuffling_takes_every_row_once_an_epoch_in_a_new_order() -> None:
    n = 24
    ids = np.arange(n)
    net = nn.Embedding(n, 1, init="zeros")
    net.fit(ids, np.ones(n), loss=product, epochs=3, batch_size=6, optimizer=cr.SGD(6.0), dtype="float64")
    np.testing.assert_allclose(net.parameters["weight"], -3.0, rtol=1e-12)  # each row was seen once in each epoch
    orders: list[list[int]] = []
    for shuffle in (True, False):
        orders.clear()
        net = nn.Embedding(n, 1, init="zeros")

        def watch(run: cr.Run, net: nn.Module = net) -> None:
            """With a rate that falls tenfold a step, the digits of a weight tell the step that moved it."""
            moved = -net.parameters["weight"][:, 0] - sum(10.0 ** -np.array(order) for order in orders)
            orders.append(np.round(-np.log10(moved)).astype(int).tolist())

        tenfold = Stairs(1.0, every=1, factor=0.1, cycle=6)
        net.fit(ids, 4 * np.ones(n), loss=product, epochs=3, batch_size=4, shuffle=shuffle, optimizer=cr.SGD(tenfold),
                callbacks=[watch], dtype="float64")  # fmt: skip
        assert all(sorted(order) == [k // 4 for k in range(n)] for order in orders)
        in_order = [k // 4 for k in range(n)]
        assert (orders == [in_order] * 3) != shuffle
        assert len({tuple(order) for order in orders}) == (3 if shuffle else 1)


@dataclass(frozen=True)
class Stairs(Schedule):
    """A user's own schedule: times `factor` every `every` steps, starting over after `cycle` steps."""

    every: int = 1
    factor: float = 0.1
    cycle: int = 10**9

    def __call__(self, steps: Array, total: int) -> Array:
        return self.learning_rate * self.factor ** (np.asarray(steps) % self.cycle // self.every).astype(float)


# -------------------------------------------------------------------------------------------------------- accumulating gradients


@pytest.mark.parametrize(
    ("rows", "batch", "accumulate"),
    [(8, 2, 4), (7, 3, 3), (10, 2, 2), (12, 5, 2), (9, 1, 4)],
    ids=["whole", "short last batch", "short last group", "both", "single rows"],
)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("shuffle", [False, True], ids=["", "shuffled"])
def test_accumulation_equals_the_large_batch(rows: int, batch: int, accumulate: int, weighted: bool, shuffle: bool) -> None:
    x, t = data(rows)
    weight = np.random.default_rng(1).uniform(0.1, 3.0, rows) if weighted else None
    nets = []
    for size, times in ((batch, accumulate), (batch * accumulate, 1)):
        net = nn.Sequential(nn.Dense(3, "tanh"), nn.Dense(2))
        run = net.fit(
            x, t, epochs=3, batch_size=size, optimizer=cr.Adam(0.05, accumulate=times, clip_norm=0.5), sample_weight=weight,
            shuffle=shuffle, dtype="float64",
        )  # fmt: skip
        nets.append((net, run))
    for name, value in nets[0][0].parameters.items():
        np.testing.assert_allclose(value, nets[1][0].parameters[name], rtol=1e-8, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(nets[0][1].loss, nets[1][1].loss, rtol=1e-8)


# ------------------------------------------------------------------------------------------------------------ weights of rows


def test_a_weight_is_a_number_of_repetitions() -> None:
    x, t = data(6)
    times = np.array([1, 2, 0, 3, 1, 1])
    weighted, repeated = nn.Dense(2), nn.Dense(2)
    runs = [
        weighted.fit(x, t, sample_weight=times, epochs=4, batch_size=6, optimizer=cr.SGD(0.1), dtype="float64", metrics=("mae",)),
        repeated.fit(np.repeat(x, times, axis=0), np.repeat(t, times, axis=0), epochs=4, batch_size=8, optimizer=cr.SGD(0.1),
                     dtype="float64", metrics=("mae",)),
    ]  # fmt: skip
    for name, value in weighted.parameters.items():
        np.testing.assert_allclose(value, repeated.parameters[name], rtol=1e-12)
    np.testing.assert_allclose(runs[0].loss, runs[1].loss, rtol=1e-12)
    np.testing.assert_allclose(runs[0].metrics["mae"], runs[1].metrics["mae"], rtol=1e-12)


def test_a_batch_without_weight_does_not_count() -> None:
    """Σ w l / Σ w over the epoch, though all of the second batch weighs nothing; in validation the same."""
    x, t = data(6)
    weight = np.array([1.0, 2.0, 0.0, 0.0, 3.0, 1.0])
    net = nn.Dense(2)
    net.fit(x, t, epochs=0, dtype="float64")
    p = net.parameters
    loss, _, _ = mse_step(p["weight"], p["bias"], x, t, weight)
    run = net.fit(x, t, sample_weight=weight, epochs=1, batch_size=2, shuffle=False, optimizer=cr.SGD(0.0))
    assert run.loss[0] == pytest.approx(loss, rel=1e-12)
    held = net.fit(x, t, sample_weight=weight, epochs=1, validation=0.5, shuffle=False, optimizer=cr.SGD(0.0))
    assert held.validation_loss[0] == pytest.approx(mse_step(p["weight"], p["bias"], x[3:], t[3:], weight[3:])[0], rel=1e-12)


def test_only_the_ratio_of_weights_counts() -> None:
    x, t = data(6)
    weight = np.array([1.0, 2.0, 0.5, 3.0, 1.0, 1.0])
    nets = [nn.Dense(2) for _ in range(2)]
    for net, factor in zip(nets, (1, 1000), strict=True):
        net.fit(x, t, sample_weight=factor * weight, epochs=3, batch_size=4, optimizer=cr.SGD(0.1), dtype="float64")
    for name, value in nets[0].parameters.items():
        np.testing.assert_allclose(value, nets[1].parameters[name], rtol=1e-12)


def test_a_row_without_weight_teaches_nothing() -> None:
    x, t = data(8)
    poisoned = t.copy()
    poisoned[3] = 1e6
    weight = np.ones(8)
    weight[3] = 0.0
    nets = [nn.Dense(2) for _ in range(2)]
    for net, target in zip(nets, (t, poisoned), strict=True):
        net.fit(x, target, sample_weight=weight, epochs=3, batch_size=3, optimizer=cr.SGD(0.1), dtype="float64")
    assert_same(nets[0].parameters, nets[1].parameters)


CLASSES = np.array([0, 0, 0, 0, 0, 1, 1, 2, 2, 2])
CLASS_WEIGHTS = {
    "dict": ({0: 1.0, 1: 4.0, 2: 0.5}, np.array([1.0, 4.0, 0.5])),
    "balanced": ("balanced", 10 / (3 * np.array([5, 2, 3]))),
}


@pytest.mark.parametrize(("given", "each"), list(CLASS_WEIGHTS.values()), ids=list(CLASS_WEIGHTS))
@pytest.mark.parametrize("also", [False, True], ids=["", "with sample weights"])
def test_class_weights(given: Any, each: Array, also: bool) -> None:
    x, _ = data(10)
    own = np.random.default_rng(2).uniform(0.5, 2.0, 10) if also else np.ones(10)
    nets = [nn.Dense(3) for _ in range(2)]
    options: dict[str, Any] = {
        "loss": "cross_entropy",
        "epochs": 3,
        "batch_size": 4,
        "optimizer": cr.SGD(0.1),
        "dtype": "float64",
    }
    one = nets[0].fit(x, CLASSES, class_weight=given, sample_weight=own if also else None, **options)
    two = nets[1].fit(x, CLASSES, sample_weight=own * each[CLASSES], **options)
    for name, value in nets[0].parameters.items():
        np.testing.assert_allclose(value, nets[1].parameters[name], rtol=1e-12)
    np.testing.assert_allclose(one.loss, two.loss, rtol=1e-12)


def test_class_weights_of_two_classes() -> None:
    x, _ = data(10)
    t = (CLASSES > 0).astype(float)
    nets = [nn.Dense(1) for _ in range(3)]
    weights: list[dict[str, Any]] = [
        {"class_weight": "balanced"},
        {"class_weight": {0: 3.0, 1: 3.0}},
        {"sample_weight": np.where(t == 1, 10 / (2 * 5), 10 / (2 * 5))},
    ]
    for net, weight in zip(nets, weights, strict=True):
        net.fit(x, t, loss="binary_cross_entropy", epochs=2, dtype="float64", optimizer=cr.SGD(0.1), **weight)
    for net in nets[1:]:
        np.testing.assert_allclose(net.parameters["weight"], nets[0].parameters["weight"], rtol=1e-12)
    uneven = nn.Dense(1), nn.Dense(1)
    uneven[0].fit(x[:8], t[:8], loss="binary_cross_entropy", epochs=2, class_weight="balanced", dtype="float64")
    share = np.where(t[:8] == 1, 8 / (2 * 3), 8 / (2 * 5))
    uneven[1].fit(x[:8], t[:8], loss="binary_cross_entropy", epochs=2, sample_weight=share, dtype="float64")
    np.testing.assert_allclose(uneven[0].parameters["weight"], uneven[1].parameters["weight"], rtol=1e-10)


def test_label_smoothing_is_training_on_softer_targets() -> None:
    x, _ = data(10)
    soft = 0.9 * np.eye(3)[CLASSES] + 0.1 / 3
    nets = [nn.Dense(3) for _ in range(2)]
    nets[0].fit(x, CLASSES, loss=cr.losses.cross_entropy(label_smoothing=0.1), epochs=3, optimizer=cr.SGD(0.1), dtype="float64")
    nets[1].fit(x, soft, loss="cross_entropy", epochs=3, optimizer=cr.SGD(0.1), dtype="float64")
    for name, value in nets[0].parameters.items():
        np.testing.assert_allclose(value, nets[1].parameters[name], rtol=1e-12)


# ------------------------------------------------------------------------------------------- penalties, weight decay, clipping


def one_step(optimizer: cr.Optimizer) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array], cr.Run]:
    """Parameters before, gradients there, parameters after one full-batch step."""
    x, t = data(10)
    net = nn.Sequential(nn.Dense(3, "tanh"), nn.Dense(2))
    net.fit(x, 5 * t, epochs=0, dtype="float64")
    net.load_parameters({name: value + 0.25 for name, value in net.parameters.items()})
    before, g = net.parameters, net.gradients(x, 5 * t, loss="mse")
    run = net.fit(x, 5 * t, epochs=1, batch_size=10, optimizer=optimizer)
    return before, g, net.parameters, run


PENALTIES: dict[str, tuple[cr.Optimizer, Callable[[Array], Array], Callable[[Array], float]]] = {
    "l2": (cr.SGD(0.1, l2=0.3), lambda w: 0.3 * w, lambda w: 0.15 * np.sum(w**2)),
    "l1": (cr.SGD(0.1, l1=0.3), lambda w: 0.3 * np.sign(w), lambda w: 0.3 * np.sum(np.abs(w))),
    "both": (
        cr.SGD(0.1, l1=0.2, l2=0.3),
        lambda w: 0.2 * np.sign(w) + 0.3 * w,
        lambda w: 0.2 * np.abs(w).sum() + 0.15 * np.sum(w**2),
    ),
    "weight_decay": (cr.SGD(0.1, weight_decay=0.3), lambda w: 0.3 * w, lambda w: 0.0),
}


@pytest.mark.parametrize(("optimizer", "pull", "penalty"), list(PENALTIES.values()), ids=list(PENALTIES))
def test_penalties_act_on_weights_and_not_on_biases(
    optimizer: cr.Optimizer, pull: Callable[[Array], Array], penalty: Callable[[Array], float]
) -> None:
    before, g, after, run = one_step(optimizer)
    for name, w in before.items():
        extra = pull(w) if name.endswith("weight") else 0.0
        np.testing.assert_allclose(after[name], w - 0.1 * (g[name] + extra), rtol=1e-12, err_msg=name)
    plain = one_step(cr.SGD(0.1))[3]
    assert run.loss == plain.loss  # reported apart
    reported = [sum(penalty(w) for name, w in p.items() if name.endswith("weight")) for p in (before, after)]
    if reported[0]:
        assert any(run.penalty[0] == pytest.approx(value, rel=1e-12) for value in reported)
    assert plain.penalty in ([0.0], [])


def test_decoupled_weight_decay_of_adamw() -> None:
    before, g, after, _ = one_step(cr.AdamW(0.1, weight_decay=0.3))
    for name, w in before.items():
        decay = 0.3 * w if name.endswith("weight") else 0.0
        np.testing.assert_allclose(after[name], w - 0.1 * (np.sign(g[name]) + decay), rtol=1e-6, err_msg=name)


def norm(g: dict[str, Array]) -> float:
    return math.sqrt(sum(float(np.sum(value**2)) for value in g.values()))


def test_clipping_by_norm() -> None:
    before, g, after, _ = one_step(cr.SGD(0.1, clip_norm=0.5))
    assert norm(g) > 1
    for name, w in before.items():
        np.testing.assert_allclose(after[name], w - 0.1 * g[name] * 0.5 / norm(g), rtol=1e-12)
    assert norm({name: (before[name] - after[name]) / 0.1 for name in g}) == pytest.approx(0.5, rel=1e-12)
    before, g, after, _ = one_step(cr.SGD(0.1, clip_norm=1e3))
    for name, w in before.items():
        np.testing.assert_allclose(after[name], w - 0.1 * g[name], rtol=1e-12)


def test_clipping_by_value() -> None:
    before, g, after, _ = one_step(cr.SGD(0.1, clip_value=0.2))
    assert max(np.abs(value).max() for value in g.values()) > 0.2
    for name, w in before.items():
        np.testing.assert_allclose(after[name], w - 0.1 * np.clip(g[name], -0.2, 0.2), rtol=1e-12)


# --------------------------------------------------------------------------------------------------------- same seed, same bits


CONFIGS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": cr.Adam(0.01)},
    "momentum": {"optimizer": cr.SGD(0.05, momentum=0.9, nesterov=True)},
    "accumulation": {"optimizer": cr.Adam(0.01, accumulate=3, clip_norm=1.0)},
    "radam": {"optimizer": cr.RAdam(0.01, weight_decay=0.01, l2=0.01)},
    "nadam": {"optimizer": cr.Nadam(0.01)},
    "rprop": {"optimizer": cr.Rprop(0.01), "batch_size": 20},
    "float64": {"optimizer": cr.Adamax(0.01), "dtype": "float64"},
    "validation": {"optimizer": cr.Adam(0.01), "validation": 0.25},
    "in order": {"optimizer": cr.RMSprop(0.01, momentum=0.9), "shuffle": False},
    "stairs": {"optimizer": cr.SGD(cr.schedules.step(0.1, every=3, factor=0.5))},
    "plateau": {"optimizer": cr.SGD(cr.schedules.reduce_on_plateau(0.3, factor=0.5, patience=0, threshold=0.5))},
    "weights": {"optimizer": cr.Adagrad(0.05), "sample_weight": np.linspace(0.1, 2.0, 20)},
    "seed 7": {"optimizer": cr.Lion(0.001), "seed": 7},
}


def fit(net: nn.Module, epochs: int, **options: Any) -> cr.Run:
    x, t = data(20)
    return net.fit(x, t, epochs=epochs, **{"batch_size": 6, "metrics": ("mae",), **options})


@pytest.mark.parametrize("options", list(CONFIGS.values()), ids=list(CONFIGS))
def test_same_seed_same_bits(options: dict[str, Any]) -> None:
    one, two = noisy(), noisy()
    runs = [fit(net, 3, **options) for net in (one, two)]
    assert_same(state(one), state(two))
    assert runs[0].loss == runs[1].loss
    assert runs[0].validation_loss == runs[1].validation_loss
    assert runs[0].metrics == runs[1].metrics


@pytest.mark.parametrize("options", list(CONFIGS.values()), ids=list(CONFIGS))
def test_fit_twice_is_fit_of_two_epochs(options: dict[str, Any]) -> None:
    once, parts = noisy(), noisy()
    whole = fit(once, 3, **options)
    runs = [fit(parts, epochs, **options) for epochs in (1, 0, 2)]
    assert_same(state(parts), state(once))
    assert [loss for run in runs for loss in run.loss] == whole.loss
    assert [loss for run in runs for loss in run.validation_loss] == whole.validation_loss
    assert [rate for run in runs for rate in run.learning_rate] == whole.learning_rate
    assert [value for run in runs for value in run.metrics.get("mae", [])] == whole.metrics["mae"]
    assert whole.loss[0] != whole.loss[1]


def test_going_on_without_naming_the_optimizer_again() -> None:
    once, parts = noisy(), noisy()
    fit(once, 2, optimizer=cr.SGD(0.05, momentum=0.9))
    fit(parts, 1, optimizer=cr.SGD(0.05, momentum=0.9))
    fit(parts, 1)
    assert_same(state(parts), state(once))


def test_lbfgs_twice() -> None:
    x, t = data(20)
    nets = [nn.Sequential(nn.Dense(4, "tanh"), nn.Dense(2)) for _ in range(2)]
    nets[0].fit(x, t, epochs=8, optimizer="lbfgs", dtype="float64")
    nets[1].fit(x, t, epochs=3, optimizer="lbfgs", dtype="float64")
    nets[1].fit(x, t, epochs=5)
    assert_same(nets[0].parameters, nets[1].parameters)


CHANCES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "first weights": (lambda: nn.Dense(2), {"epochs": 0}),
    "order": (lambda: at_zero(2), {"epochs": 1, "batch_size": 4}),
    "dropout": (lambda: nn.Sequential(nn.Dropout(0.5), at_zero(2)), {"epochs": 1, "shuffle": False}),
    "validation rows": (lambda: at_zero(2), {"epochs": 1, "batch_size": 100, "validation": 0.5}),
}


@pytest.mark.parametrize(("network", "options"), list(CHANCES.values()), ids=list(CHANCES))
def test_another_seed_changes(network: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    x, t = data(20)
    results = []
    for seed in (0, 0, 1, 2**40):
        net = network()
        net.fit(x, t, optimizer=cr.SGD(0.1), dtype="float64", seed=seed, **options)
        results.append(net.parameters)
    assert_same(results[0], results[1])
    assert differ(results[0], results[2])
    assert differ(results[2], results[3])


def test_a_first_weight_depends_on_seed_and_name_only() -> None:
    x, t = data(20)
    short, long = nn.Sequential(nn.Dense(3), nn.Dense(2)), nn.Sequential(nn.Dense(3), nn.Dense(2), nn.Dense(2))
    for net in (short, long):
        net.fit(x, t, epochs=0)
    np.testing.assert_array_equal(short.parameters["0.weight"], long.parameters["0.weight"])
    np.testing.assert_array_equal(short.parameters["1.weight"], long.parameters["1.weight"])
    assert not np.array_equal(long.parameters["1.weight"][:2], long.parameters["2.weight"])


def test_no_seed_draws_one_and_records_it() -> None:
    nets = [noisy() for _ in range(3)]
    runs = [fit(net, 2, seed=None, validation=0.2) for net in nets[:2]]
    assert all(type(run.seed) is int and run.seed >= 0 for run in runs)
    assert runs[0].seed != runs[1].seed
    assert differ(state(nets[0]), state(nets[1]))
    again = fit(nets[2], 2, seed=runs[0].seed, validation=0.2)
    assert_same(state(nets[2]), state(nets[0]))
    assert (again.loss, again.validation_loss, again.seed) == (runs[0].loss, runs[0].validation_loss, runs[0].seed)


def test_numpys_own_generator_is_neither_read_nor_moved() -> None:
    np.random.seed(0)
    first = noisy()
    fit(first, 1)
    np.random.seed(1)
    before = np.random.get_state(legacy=False)["state"]
    second = noisy()
    fit(second, 1)
    assert_same(state(first), state(second))
    after = np.random.get_state(legacy=False)["state"]
    assert before["pos"] == after["pos"]
    np.testing.assert_array_equal(before["key"], after["key"])


def test_fit_of_no_epochs_only_builds() -> None:
    net, other = noisy(), noisy()
    run = fit(net, 0)
    assert (run.loss, run.steps, run.epochs, run.metrics.get("mae", [])) == ([], 0, 0, [])
    assert net.built
    assert len(net.parameters) == 8
    assert other.parameters == {}
    fit(net, 2)
    fit(other, 2)
    assert_same(state(net), state(other))
    before = state(net)
    fit(net, 0, optimizer=cr.SGD(9.0), seed=5)
    assert_same(state(net), before)


def test_a_different_optimizer_starts_new_slots() -> None:
    x, t = data(10)
    old, fresh = nn.Dense(2), nn.Dense(2)
    old.fit(x, t, epochs=5, batch_size=10, shuffle=False, optimizer=cr.SGD(0.05, momentum=0.9), dtype="float64")
    fresh.fit(x, t, epochs=0, dtype="float64")
    fresh.load_parameters(old.parameters)
    for net in (old, fresh):
        net.fit(x, t, epochs=2, batch_size=10, shuffle=False, optimizer=cr.Adam(0.05))
    assert_same(old.parameters, fresh.parameters)
    back = nn.Dense(2)
    back.fit(x, t, epochs=0, dtype="float64")
    back.load_parameters(old.parameters)
    for net in (old, back):
        net.fit(x, t, epochs=2, batch_size=10, shuffle=False, optimizer=cr.SGD(0.05, momentum=0.9))
    assert_same(old.parameters, back.parameters)


def test_momentum_that_is_switched_off_and_on_starts_anew() -> None:
    x, t = data(10)
    net, fresh = nn.Dense(2), nn.Dense(2)
    net.fit(x, t, epochs=3, optimizer=cr.SGD(0.05, momentum=0.9), dtype="float64", shuffle=False)
    net.fit(x, t, epochs=1, optimizer=cr.SGD(0.05), shuffle=False)
    fresh.fit(x, t, epochs=0, dtype="float64")
    fresh.load_parameters(net.parameters)
    for each in (net, fresh):
        each.fit(x, t, epochs=1, optimizer=cr.SGD(0.05, momentum=0.9, nesterov=True), shuffle=False)
    assert_same(net.parameters, fresh.parameters)


def test_parameters_are_independent_of_the_network() -> None:
    net = noisy()
    fit(net, 1)
    kept = {name: value.copy() for name, value in state(net).items()}
    shown = state(net)
    fit(net, 1)
    assert_same(shown, kept)
    assert differ(state(net), kept)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", np.float32), ("float64", np.float64), (np.float64, np.float64)])
def test_dtype_is_fixed_when_building(dtype: Any, expected: type) -> None:
    x, t = data(20)
    net = noisy()
    net.fit(x, t, epochs=1, dtype=dtype)
    net.fit(x.astype(np.float32), t.astype(np.float32), epochs=1)
    assert {value.dtype for value in state(net).values()} == {np.dtype(expected)}
    assert net.predict(x).dtype == expected
    assert {g.dtype for g in net.gradients(x, t).values()} == {np.dtype(expected)}


def test_double_precision_goes_beyond_single() -> None:
    x, t = data(20)
    nets = [nn.Dense(2) for _ in range(2)]
    for net, dtype in zip(nets, ("float32", "float64"), strict=True):
        net.fit(x, t, epochs=3, dtype=dtype)
    a, b = (net.parameters["weight"] for net in nets)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert np.any(b != b.astype(np.float32))


def test_data_in_any_container_gives_the_same_network() -> None:
    x, t = (np.round(a, 1).astype(np.float32) for a in data(20))
    frozen = x.copy()
    frozen.flags.writeable = False
    wide = np.zeros((40, 8), np.float32)
    wide[::2, ::2] = x
    expected = nn.Dense(2)
    expected.fit(x, t, epochs=2, dtype="float64")
    for other in (frozen, np.asfortranarray(x), wide[::2, ::2], x.tolist(), x.astype(np.float64)):
        net = nn.Dense(2)
        before = np.array(other)
        net.fit(other, t, epochs=2, dtype="float64")
        if isinstance(other, list):
            np.testing.assert_allclose(net.parameters["weight"], expected.parameters["weight"], rtol=1e-6)
        elif other.dtype == np.float32:
            assert_same(net.parameters, expected.parameters)
        np.testing.assert_array_equal(before, other)


def test_whole_numbers_are_data_too() -> None:
    x = np.random.default_rng(0).integers(0, 256, (20, 4), dtype=np.uint8)
    t = np.random.default_rng(1).integers(-3, 4, 20)
    nets = [nn.Dense(1) for _ in range(2)]
    for net, kind in zip(nets, (x.dtype, np.float64), strict=True):
        net.fit(x.astype(kind), t, epochs=2, dtype="float64")
    assert_same(nets[0].parameters, nets[1].parameters)
    np.testing.assert_array_equal(nets[0].predict(x), nets[1].predict(x.astype(float)))


def test_a_flat_target_is_one_output() -> None:
    x, t = data(20, outputs=1)
    nets = [nn.Dense(1) for _ in range(2)]
    for net, target in zip(nets, (t, t[:, 0]), strict=True):
        net.fit(x, target, epochs=2)
    assert_same(nets[0].parameters, nets[1].parameters)


# ------------------------------------------------------------------------------------------------------------- losses of a user


def test_a_function_is_a_loss() -> None:
    x, t = data(20)
    nets = [nn.Dense(2) for _ in range(3)]
    given: list[Any] = ["mse", lambda s, t: (s - t) ** 2, lambda s, t: np.mean((s - t) ** 2)]
    runs = [net.fit(x, t, loss=loss, epochs=3, batch_size=7, dtype="float64") for net, loss in zip(nets, given, strict=True)]
    for net, run in zip(nets[1:], runs[1:], strict=True):
        np.testing.assert_allclose(net.parameters["weight"], nets[0].parameters["weight"], rtol=1e-10)
        np.testing.assert_allclose(run.loss, runs[0].loss, rtol=1e-12)


def test_a_loss_of_rows() -> None:
    """One number a row is weighted and averaged by rows."""
    x, t = data(6)
    weight = np.array([1.0, 2.0, 3.0, 0.0, 1.0, 1.0])
    net = nn.Dense(2)
    run = net.fit(
        x, t, loss=lambda s, t: np.sum((s - t) ** 2, axis=-1), epochs=1, batch_size=6, optimizer=cr.SGD(0.0), sample_weight=weight,
        dtype="float64",
    )  # fmt: skip
    rows = np.sum((x @ net.parameters["weight"] + net.parameters["bias"] - t) ** 2, axis=1)
    assert run.loss[0] == pytest.approx(np.sum(weight * rows) / weight.sum(), rel=1e-12)


def test_a_scalar_loss_takes_no_weights() -> None:
    x, t = data(6)
    with pytest.raises(cr.UsageError, match="weight"):
        nn.Dense(2).fit(x, t, loss=lambda s, t: np.mean((s - t) ** 2), sample_weight=np.ones(6))


# ------------------------------------------------------------------------------------------------------------------- validation


def held_out(n: int, fraction: float, **options: Any) -> tuple[list[int], cr.Run]:
    """The rows that training never touched: those whose own weight is still exactly zero."""
    ids = np.arange(n)
    net = nn.Embedding(n, 1, init="zeros")
    run = net.fit(ids, 1.0 + ids, epochs=2, batch_size=3, optimizer=cr.SGD(0.1), validation=fraction, dtype="float64", **options)
    rows = np.flatnonzero(net.parameters["weight"] == 0).tolist()
    assert run.validation_loss[-1] == pytest.approx(net.evaluate(ids[rows], 1.0 + ids[rows])["loss"], rel=1e-12)
    return rows, run


def test_validation_on_random_rows_of_the_seed() -> None:
    rows, run = held_out(20, 0.25)
    assert len(rows) == 5 == len(run.validation_loss) + 3
    assert rows != list(range(15, 20))
    assert held_out(20, 0.25)[0] == rows
    others = [held_out(20, 0.25, seed=seed)[0] for seed in range(1, 9)]
    assert all(len(other) == 5 for other in others)
    assert len({row for other in others for row in other}) > 10


def test_validation_on_the_last_rows_without_shuffling() -> None:
    assert held_out(20, 0.25, shuffle=False)[0] == [15, 16, 17, 18, 19]
    assert held_out(20, 0.25, shuffle=False, seed=5)[0] == [15, 16, 17, 18, 19]


@pytest.mark.parametrize(("n", "fraction", "count"), [(20, 0.1, 2), (7, 0.1, 1), (2, 0.5, 1), (7, 0.9, 6), (3, 0.99, 2)])
def test_a_fraction_leaves_at_least_one_row_on_each_side(n: int, fraction: float, count: int) -> None:
    assert len(held_out(n, fraction)[0]) == count


def test_validation_with_a_pair() -> None:
    x, t = data(20)
    v, u = data(7, seed=1)
    watched, plain = noisy(), noisy()
    run = watched.fit(x, t, epochs=3, validation=(v, u), metrics=("mae", "rmse"), dtype="float64")
    plain.fit(x, t, epochs=3, dtype="float64")
    assert_same(state(watched), state(plain))
    scores = watched.evaluate(v, u, metrics=("mae", "rmse"))
    assert run.validation_loss[-1] == pytest.approx(scores["loss"], rel=1e-12)
    assert run.metrics["validation_mae"][-1] == pytest.approx(scores["mae"], rel=1e-12)
    assert run.metrics["validation_rmse"][-1] == pytest.approx(scores["rmse"], rel=1e-12)
    assert set(run.metrics) == {"mae", "rmse", "validation_mae", "validation_rmse"}


def test_no_validation_no_numbers() -> None:
    assert fit(noisy(), 2).validation_loss == []


# --------------------------------------------------------------------------------------------------------------- early stopping


def overfit(net: nn.Module, stopping: Any, epochs: int = 60, **options: Any) -> tuple[cr.Run, list[dict[str, Array]]]:
    """A large rate on few rows, and validation rows of another kind: the validation loss soon rises."""
    x, t = data(8)
    v, u = data(8, seed=3)
    seen: list[dict[str, Array]] = []
    run = net.fit(
        x, t, epochs=epochs, batch_size=4, optimizer=cr.SGD(0.05), validation=(v, u), early_stopping=stopping,
        callbacks=[lambda run: seen.append(state(net))], **options,
    )  # fmt: skip
    return run, seen


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Dense(8, "tanh"), nn.BatchNorm(), nn.Dense(2))


@pytest.mark.parametrize("stopping", [4, cr.EarlyStopping(4), cr.EarlyStopping(4, monitor="validation_loss")])
def test_early_stopping_brings_back_the_best_weights(stopping: Any) -> None:
    net = two_layers()
    run, seen = overfit(net, stopping)
    best = int(np.argmin(run.validation_loss)) + 1
    assert run.best_epoch == best
    assert run.epochs == len(run.loss) == best + 4 < 60
    assert run.stopped
    assert_same(state(net), seen[best - 1])
    assert differ(seen[best - 1], seen[-1])
    v, u = data(8, seed=3)
    assert net.evaluate(v, u)["loss"] == pytest.approx(min(run.validation_loss), rel=1e-6)


def test_early_stopping_restores_also_when_epochs_run_out() -> None:
    whole, _ = overfit(two_layers(), 4)
    net = two_layers()
    run, seen = overfit(net, 1000, epochs=whole.epochs)
    assert (run.best_epoch, run.stopped) == (whole.best_epoch, "")
    assert_same(state(net), seen[whole.best_epoch - 1])


def test_early_stopping_without_restoring() -> None:
    net = two_layers()
    run, seen = overfit(net, cr.EarlyStopping(4, restore_best=False))
    assert run.epochs < 60
    assert_same(state(net), seen[-1])


def test_early_stopping_watches_what_it_is_told() -> None:
    x = np.random.default_rng(0).normal(size=(20, 3))
    labels = (x[:, 0] > 0).astype(int)
    net = nn.Dense(2)
    run = net.fit(x, labels, loss="cross_entropy", epochs=50, optimizer=cr.SGD(0.01), metrics=("accuracy",),
                  early_stopping=cr.EarlyStopping(3, monitor="accuracy"))  # fmt: skip
    accuracy = run.metrics["accuracy"]
    assert run.best_epoch == int(np.argmax(accuracy)) + 1
    assert run.epochs == min(50, run.best_epoch + 3)
    improves = nn.Dense(2).fit(x, labels, loss="cross_entropy", epochs=10, early_stopping=1)
    assert improves.epochs == 10  # without validation the training loss is watched
    stalls = nn.Dense(2).fit(x, labels, loss="cross_entropy", epochs=10, early_stopping=cr.EarlyStopping(2, min_delta=100.0))
    assert (stalls.epochs, stalls.best_epoch) == (3, 1)


def test_a_metric_that_is_not_defined_at_first_is_no_best_value() -> None:
    values = iter([math.nan, 3.0, 2.0, math.nan, 1.0, 5.0, 5.0])

    def odd(prediction: Array, target: Array) -> float:
        return next(values)

    odd.greater_is_better = False  # type: ignore[attr-defined]
    x, t = data(8)
    run = nn.Dense(2).fit(x, t, epochs=7, metrics=(odd,), early_stopping=cr.EarlyStopping(2, monitor="odd"))
    assert (run.best_epoch, run.epochs) == (5, 7)


def test_early_stopping_true_is_a_patience_of_ten() -> None:
    run, _ = overfit(two_layers(), True)
    assert run.epochs == run.best_epoch + cr.EarlyStopping().patience == run.best_epoch + 10


# ---------------------------------------------------------------------------------------------------------- callbacks, history


def test_callbacks_see_each_epoch() -> None:
    x, t = data(20)
    net = noisy()
    calls: list[tuple[str, int, int]] = []

    def first(run: cr.Run) -> None:
        calls.append(("first", run.epochs, run.steps))
        assert run.network is net
        assert len(run.loss) == len(run.epoch_seconds) == len(run.learning_rate) == run.epochs
        assert run.planned_epochs == 3
        assert net.evaluate(x, t)["loss"] > 0  # the network can be used

    run = net.fit(x, t, epochs=3, batch_size=6, callbacks=[first, lambda run: calls.append(("second", run.epochs, run.steps))])
    assert calls == [(who, epoch, 4 * epoch) for epoch in (1, 2, 3) for who in ("first", "second")]
    assert run.stopped == ""
    assert not run.interrupted


def test_callbacks_see_the_weights_of_their_epoch() -> None:
    net, plain = noisy(), noisy()
    seen: list[dict[str, Array]] = []
    fit(net, 3, callbacks=[lambda run: seen.append(state(net))])
    for weights in seen:
        fit(plain, 1)
        assert_same(weights, state(plain))


def test_using_the_network_in_a_callback_changes_nothing() -> None:
    x, t = data(20)
    watched, plain = noisy(), noisy()

    def use(run: cr.Run) -> None:
        watched.gradients(x, t, loss="mae", seed=9)
        watched.predict(x)
        watched.check_gradients(x[:3], t[:3])
        watched.summary()

    fit(watched, 2, callbacks=[use])
    fit(plain, 2)
    assert_same(state(watched), state(plain))


def test_a_callback_ends_the_run() -> None:
    net, plain = noisy(), noisy()
    calls: list[int] = []

    def stop(run: cr.Run) -> None:
        if run.epochs == 2:
            run.stop("good enough")

    run = fit(net, 100, callbacks=[stop, lambda run: calls.append(run.epochs)])
    assert (run.epochs, run.stopped, calls) == (2, "good enough", [1, 2])
    fit(plain, 2)
    assert_same(state(net), state(plain))
    fit(net, 1)
    fit(plain, 1)
    assert_same(state(net), state(plain))


def test_a_callback_cannot_change_the_weights_under_the_run() -> None:
    """Refused, rather than lost with the next step."""
    x, t = data(20)
    net, plain = at_zero(2), at_zero(2)
    for change in (lambda: net.load_parameters({"weight": np.ones((4, 2)), "bias": [1, 2]}), net.reset, lambda: net.fit(x, t)):
        with pytest.raises(cr.BusyError, match="callback"):
            net.fit(x, t, epochs=2, callbacks=[lambda run, change=change: change()])
        plain.fit(x, t, epochs=1)
        assert_same(net.parameters, plain.parameters)


def test_the_history() -> None:
    run = fit(noisy(), 3, validation=0.25)
    assert run.epochs == run.planned_epochs == len(run.loss) == len(run.validation_loss) == len(run.epoch_seconds) == 3
    assert run.steps == 3 * 3
    assert 0 < sum(run.epoch_seconds) <= run.seconds + 1e-6
    assert all(type(value) is float for value in [*run.loss, *run.validation_loss, *run.learning_rate, *run.metrics["mae"]])
    table = run.table()
    assert {len(column) for column in table.values()} == {3}
    assert {"loss", "validation_loss", "mae", "validation_mae", "learning_rate"} <= set(table)
    assert table["loss"] == run.loss


def test_metrics_are_over_the_rows_as_they_were_seen() -> None:
    x, t = data(20)
    net = two_layers()
    net.fit(x, t, epochs=0, dtype="float64")
    net[1].trainable = False  # so that training and evaluation mode agree
    before = net.evaluate(x, t, metrics=("r2", "rmse", "mae"))

    def worst(prediction: Array, target: Array) -> float:
        return float(np.max(np.abs(prediction - target)))

    largest = float(np.max(np.abs(net.predict(x) - t)))
    run = net.fit(x, t, epochs=2, batch_size=20, metrics=("r2", "rmse", "mae", worst), optimizer=cr.SGD(0.1))
    for name in ("r2", "rmse", "mae"):
        assert run.metrics[name][0] == pytest.approx(before[name], rel=1e-10)
    assert run.metrics["worst"][0] == pytest.approx(largest, rel=1e-10)
    assert run.loss[0] == pytest.approx(before["loss"], rel=1e-12)


def test_metrics_over_several_batches_are_of_all_rows() -> None:
    x, t = data(10)
    net = nn.Dense(2)
    net.fit(x, t, epochs=0, dtype="float64")
    before = net.evaluate(x, t, metrics=("r2", "rmse"))
    run = net.fit(x, t, epochs=1, batch_size=3, metrics=("r2", "rmse"), optimizer=cr.SGD(0.0))
    assert run.metrics["r2"][0] == pytest.approx(before["r2"], rel=1e-10)
    assert run.metrics["rmse"][0] == pytest.approx(before["rmse"], rel=1e-10)


# --------------------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("name", list(schedules))
def test_every_schedule_sets_the_rate_of_each_step(name: str) -> None:
    """With a constant gradient of 1 the weight tells the sum of the rates."""
    x, t = np.ones((10, 1)), np.ones((10, 1))
    schedule = schedules[name](0.5)
    net = at_zero(bias=False)
    seen: list[float] = []
    run = net.fit(
        x, t, loss=product, epochs=6, batch_size=4, optimizer=cr.SGD(schedule), dtype="float64",
        callbacks=[lambda run: seen.append(net.parameters["weight"].item())],
    )  # fmt: skip
    rates = schedule(np.arange(18), 18)
    np.testing.assert_allclose(run.learning_rate, rates[2::3], rtol=1e-12)
    np.testing.assert_allclose(seen, -np.cumsum(rates)[2::3], rtol=1e-12)


def test_a_schedule_counts_updates_not_batches() -> None:
    x, t = np.ones((12, 1)), np.ones((12, 1))
    net = at_zero(bias=False)
    halving = Stairs(1.0, every=1, factor=0.5)
    net.fit(x, t, loss=product, epochs=2, batch_size=2, optimizer=cr.SGD(halving, accumulate=3), dtype="float64")
    np.testing.assert_allclose(net.parameters["weight"], -(1 + 0.5 + 0.25 + 0.125), rtol=1e-12)


def test_a_schedule_goes_on_where_the_last_run_ended() -> None:
    x, t = np.ones((6, 1)), np.ones((6, 1))
    net = at_zero(bias=False)
    for _ in range(2):
        net.fit(x, t, loss=product, epochs=1, batch_size=2, optimizer=cr.SGD(Stairs(1.0, every=1, factor=0.5)), dtype="float64")
    np.testing.assert_allclose(net.parameters["weight"], -sum(0.5**k for k in range(6)), rtol=1e-12)


@pytest.mark.parametrize("validated", [False, True], ids=["loss", "validation loss"])
def test_reduce_on_plateau(validated: bool) -> None:
    """Without a gradient the loss stands still: after patience + 1 epochs without progress the rate falls."""
    x, t = np.zeros((4, 1)), np.ones((4, 1))
    schedule = cr.schedules.reduce_on_plateau(1.0, factor=0.1, patience=1, minimum=0.01)
    run = at_zero(bias=False).fit(x, t, epochs=9, optimizer=cr.SGD(schedule), validation=(x, t) if validated else None)
    np.testing.assert_allclose(run.learning_rate, [1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01], rtol=1e-12)


TIED = {
    "cosine": cr.schedules.cosine(0.5),
    "warm-up in steps": cr.schedules.warmup_cosine(0.5, warmup=3),
    "warm-up as a part": cr.schedules.warmup_cosine(0.5, warmup=0.5),
    "one cycle": cr.schedules.one_cycle(0.5),
}


@pytest.mark.parametrize("schedule", list(TIED.values()), ids=list(TIED))
@pytest.mark.parametrize("batch", [10, 4], ids=["full batch", "batches"])
def test_a_schedule_that_ends_with_the_run_starts_anew_with_the_next(schedule: Schedule, batch: int) -> None:
    x, t = np.ones((10, 1)), np.ones((10, 1))
    net = at_zero(bias=False)
    runs = [net.fit(x, t, loss=product, epochs=5, batch_size=batch, optimizer=cr.SGD(schedule)) for _ in range(3)]
    per = math.ceil(10 / batch)
    for run in runs:
        np.testing.assert_allclose(run.learning_rate, schedule(np.arange(5 * per), 5 * per)[per - 1 :: per], rtol=1e-12)


def test_reduce_on_plateau_watches_the_validation_loss() -> None:
    x, t = data(20)
    far = np.full_like(t, 1e6)  # does not get better
    schedule = cr.schedules.reduce_on_plateau(0.01, patience=0)
    watched = nn.Dense(2).fit(x, t, epochs=4, optimizer=cr.SGD(schedule), validation=(x, far))
    plain = nn.Dense(2).fit(x, t, epochs=4, optimizer=cr.SGD(schedule))
    assert plain.learning_rate == [0.01] * 4
    assert watched.learning_rate[-1] < 0.01


# ------------------------------------------------------------------------------------------------- when something comes between


class Mine(Exception):
    """A user's own exception."""


def raise_at(epoch: int, error: BaseException) -> Callable[[cr.Run], None]:
    def callback(run: cr.Run) -> None:
        if run.epochs == epoch:
            raise error

    return callback


def test_an_exception_in_a_callback_leaves_a_usable_network() -> None:
    net, plain = noisy(), noisy()
    with pytest.raises(Mine):
        fit(net, 5, callbacks=[raise_at(2, Mine())])
    fit(plain, 2)
    assert_same(state(net), state(plain))
    fit(net, 1)
    fit(plain, 1)
    assert_same(state(net), state(plain))


def test_ctrl_c_in_a_callback_keeps_weights_and_history() -> None:
    net, plain = noisy(), noisy()
    handler = signal.getsignal(signal.SIGINT)
    run = fit(net, 5, callbacks=[raise_at(2, KeyboardInterrupt())])
    assert run.interrupted
    assert run.epochs == len(run.loss) == 2
    whole = fit(plain, 2)
    assert whole.loss == run.loss
    assert_same(state(net), state(plain))
    assert signal.getsignal(signal.SIGINT) is handler
    fit(net, 1)
    fit(plain, 1)
    assert_same(state(net), state(plain))


def test_ctrl_c_by_a_signal_in_a_callback() -> None:
    net = noisy()
    run = fit(net, 5, callbacks=[lambda run: signal.raise_signal(signal.SIGINT) if run.epochs == 2 else None])
    assert run.interrupted
    assert run.epochs == 2
    plain = noisy()
    fit(plain, 2)
    if run.steps == 8:
        assert_same(state(net), state(plain))


@pytest.mark.parametrize("where", ["metric", "metric of the validation rows"])
def test_ctrl_c_in_a_metric_leaves_a_history_of_whole_epochs(where: str) -> None:
    x, t = data(20)
    calls: list[int] = []

    def metric(prediction: Array, target: Array) -> float:
        calls.append(len(target))
        if len(calls) == (5 if where == "metric" else 6):  # twice an epoch; in the third one
            signal.raise_signal(signal.SIGINT)
        return 0.0

    net = noisy()
    run = net.fit(x, t, epochs=5, batch_size=6, metrics=(metric,), validation=0.25)
    assert run.interrupted
    assert run.epochs in (2, 3)
    assert {len(column) for column in run.table().values()} == {run.epochs}
    assert len(net.fit(x, t, epochs=1).loss) == 1


def test_an_exception_in_a_metric_leaves_a_usable_network() -> None:
    x, t = data(20)
    calls: list[int] = []

    def metric(prediction: Array, target: Array) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise Mine
        return 0.0

    net = noisy()
    with pytest.raises(Mine):
        net.fit(x, t, epochs=5, batch_size=6, metrics=(metric,))
    plain = noisy()
    plain.fit(x, t, epochs=2, batch_size=6)
    early = noisy()
    early.fit(x, t, epochs=1, batch_size=6)
    assert not differ(state(net), state(plain)) or not differ(state(net), state(early))
    assert len(net.fit(x, t, epochs=1).loss) == 1


@dataclass(frozen=True)
class Alarm(Schedule):
    """Ctrl-C comes `after` seconds after the first epoch has begun, wherever the run is then."""

    after: float = 0.0

    def __call__(self, steps: Array, total: int) -> Array:
        if not ALARMS:
            ALARMS.append(threading.Timer(self.after, lambda: os.kill(os.getpid(), signal.SIGINT)))
            ALARMS[0].start()
        return np.full(np.shape(steps), self.learning_rate)


ALARMS: list[threading.Timer] = []


@pytest.fixture(autouse=True)
def no_alarm_is_left() -> Iterator[None]:
    ALARMS.clear()
    yield
    for alarm in ALARMS:
        alarm.cancel()
        alarm.join()


# Where a signal happens to arrive inside a finaliser, Python drops the exception with a warning.
DROPPED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@DROPPED
def test_ctrl_c_within_an_epoch_keeps_the_steps_so_far() -> None:
    x, t = data(20_000)
    net, plain = nn.Dense(2), nn.Dense(2)
    slow: dict[str, Any] = {"batch_size": 1, "shuffle": False, "backend": "reference"}  # so that there is time to press a key
    run = net.fit(x, t, epochs=1, optimizer=cr.SGD(Alarm(1e-3, after=0.2)), **slow)
    assert run.interrupted
    assert run.epochs == 0
    assert 0 < run.steps < 20_000
    plain.fit(x[: run.steps], t[: run.steps], epochs=1, optimizer=cr.SGD(1e-3), **slow)
    assert_same(net.parameters, plain.parameters)


@DROPPED
def test_ctrl_c_after_the_numbers_broke_keeps_the_last_good_weights() -> None:
    """The epoch is long, its first steps lead to NaN, and the user has seen enough."""
    x, t = data(20_000)
    net = nn.Sequential(nn.Dense(4), nn.Dense(2))
    net.fit(x[:8], t[:8], epochs=1)
    before = net.parameters
    run = net.fit(x, t, epochs=1, batch_size=1, optimizer=cr.SGD(Alarm(1e30, after=0.2)), backend="reference")
    assert run.interrupted
    assert run.epochs == 0
    assert_same(net.parameters, before)


@DROPPED
@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1])
def test_ctrl_c_at_any_moment(delay: float) -> None:
    """A signal that arrives somewhere within a step ends the run after it; the weights are whole, the history too."""
    x, t = data(64)
    net = noisy()
    handler = signal.getsignal(signal.SIGINT)
    started = time.perf_counter()
    run = net.fit(x, t, epochs=10**5, batch_size=8, optimizer=cr.SGD(Alarm(1e-5, after=delay)), validation=0.2)
    assert time.perf_counter() - started < delay + 10
    assert run.interrupted
    assert {len(column) for column in run.table().values()} == {run.epochs}
    assert run.steps >= 7 * run.epochs
    assert signal.getsignal(signal.SIGINT) is handler
    assert all(np.isfinite(value).all() for value in state(net).values())
    going_on = net.fit(x, t, epochs=1, batch_size=8, optimizer="sgd")
    assert not going_on.interrupted
    assert len(going_on.loss) == 1


def test_ctrl_c_while_a_loss_is_traced() -> None:
    """Before the first step there is nothing to keep: the interrupt reaches the caller, and the network stays usable."""
    x, t = data(8)

    def loss(s: Any, t: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return (s - t) ** 2

    net = nn.Dense(2)
    try:
        run = net.fit(x, t, loss=loss, epochs=2)
        assert run.interrupted
    except KeyboardInterrupt:
        pass
    assert len(net.fit(x, t, epochs=2).loss) == 2


def test_two_threads() -> None:
    x, t = data(20)
    net = noisy()
    running, release = threading.Event(), threading.Event()

    def wait(run: cr.Run) -> None:
        running.set()
        assert release.wait(20)

    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(fit(net, 2, callbacks=[wait])))
    thread.start()
    try:
        assert running.wait(20)
        with pytest.raises(cr.BusyError, match=r"another thread"):
            net.fit(x, t, epochs=1)
        assert results == []
    finally:
        release.set()
        thread.join(20)
    assert results[0].epochs == 2
    plain = noisy()
    fit(plain, 2)
    assert_same(state(net), state(plain))
    net.fit(x, t, epochs=1)


def test_two_networks_in_two_threads() -> None:
    nets = [noisy(), noisy()]
    threads = [threading.Thread(target=fit, args=(net, 5)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    plain = noisy()
    fit(plain, 5)
    for net in nets:
        assert_same(state(net), state(plain))


@pytest.mark.parametrize("options", list(CONFIGS.values()), ids=list(CONFIGS))
def test_interrupted_saved_loaded_and_resumed_equals_uninterrupted(options: dict[str, Any], tmp_path: Path) -> None:
    whole, parts = noisy(), noisy()
    run = fit(whole, 5, **options)
    first = fit(parts, 5, callbacks=[raise_at(2, KeyboardInterrupt())], **options)
    parts.save(tmp_path / "net.safetensors")
    resumed = cr.load(tmp_path / "net.safetensors")
    second = fit(resumed, 3, **options)
    assert_same(state(resumed), state(whole))
    assert first.loss + second.loss == run.loss
    assert first.validation_loss + second.validation_loss == run.validation_loss
    assert first.learning_rate + second.learning_rate == run.learning_rate


# ------------------------------------------------------------------------------------------------------------------- divergence


@dataclass(frozen=True)
class Leap(Schedule):
    """A rate that is huge from one step on."""

    at: int = 0

    def __call__(self, steps: Array, total: int) -> Array:
        return np.where(np.asarray(steps) >= self.at, 1e30, self.learning_rate)


def test_divergence_names_epoch_step_and_layer_and_loses_nothing() -> None:
    x, t = data(12)
    net, good = (nn.Sequential(nn.Dense(4, "relu"), nn.Dense(4), nn.BatchNorm(), nn.Dense(2)) for _ in range(2))
    with pytest.raises(cr.DivergenceError) as caught:
        net.fit(x, t, epochs=9, batch_size=4, optimizer=cr.SGD(Leap(0.01, at=6)), validation=(x, t))
    message = str(caught.value)
    assert "epoch 3" in message
    assert "step 2 of 3" in message
    assert 'layer "1"' in message  # 1e30 is within float32, what layer "1" makes of it is not
    assert isinstance(caught.value, ArithmeticError)
    run = caught.value.run
    assert (run.epochs, len(run.loss), len(run.validation_loss)) == (2, 2, 2)
    whole = good.fit(x, t, epochs=2, batch_size=4, optimizer=cr.SGD(Leap(0.01, at=6)), validation=(x, t))
    assert whole.loss == run.loss
    assert_same(state(net), state(good))
    assert np.isfinite(net.predict(x)).all()
    assert len(net.fit(x, t, epochs=1, optimizer=cr.SGD(0.01)).loss) == 1


def test_after_a_divergence_training_goes_on_as_if_it_had_not_been() -> None:
    x, t = data(12)
    nets = [noisy(), noisy()]
    for net in nets:
        net.fit(x, t, epochs=1, batch_size=5, optimizer=cr.SGD(0.05, momentum=0.9))
    with pytest.raises(cr.DivergenceError):
        nets[0].fit(x, t, epochs=3, batch_size=5, optimizer=cr.SGD(1e36, momentum=0.9))
    for net in nets:
        net.fit(x, t, epochs=2, batch_size=5, optimizer=cr.SGD(0.05, momentum=0.9))
    assert_same(state(nets[0]), state(nets[1]))


def test_divergence_in_a_users_layer() -> None:
    class Log(nn.Module):
        def __call__(self, x: Any) -> Any:
            return np.log(x)

    x, t = data(12)
    net = nn.Sequential(nn.Dense(4), nn.Sequential(nn.Dense(4), Log()), nn.Dense(2))
    with pytest.raises(cr.DivergenceError, match=r'epoch 1, step 1 .*"1\.1"'):
        net.fit(x, t, epochs=2)
    assert all(np.isfinite(value).all() for value in net.parameters.values())


def test_a_last_step_that_breaks_the_weights_is_noticed() -> None:
    """The loss of the only step is finite, the update overflows: the network must not end up with infinite weights."""
    x, t = data(8)
    net = nn.Dense(2)
    net.fit(x, 1e6 * t, epochs=0)
    before = net.parameters
    with pytest.raises(cr.DivergenceError, match="epoch 1, step 1"):
        net.fit(x, 1e6 * t, epochs=1, batch_size=8, optimizer=cr.SGD(1e35))
    assert_same(net.parameters, before)


def test_divergence_with_lbfgs_and_accumulation() -> None:
    x, t = data(8)
    net = nn.Sequential(nn.Dense(3), nn.Dense(2, lambda z: np.log(z - 1e3)))
    for optimizer in ("lbfgs", cr.SGD(0.1, accumulate=4)):
        with pytest.raises(cr.DivergenceError, match=r'epoch 1.*layer "1"'):
            net.fit(x, t, epochs=2, optimizer=optimizer)
    net = nn.Dense(2)
    net.fit(x, t, epochs=0)
    before = net.parameters
    with pytest.raises(cr.DivergenceError):
        net.fit(x, t, epochs=1, batch_size=2, optimizer=cr.SGD(1e38, accumulate=2))
    assert_same(net.parameters, before)


def test_divergence_warns_about_nothing_else() -> None:
    """NumPy's own warnings on overflow would hide the message (warnings are errors in these tests)."""
    x, t = data(8)
    with pytest.raises(cr.DivergenceError):
        nn.Sequential(nn.Dense(4, np.exp), nn.Dense(2)).fit(1e3 * x, t, epochs=50, optimizer=cr.SGD(1.0))


# --------------------------------------------------------------------------------------------------------------------- progress


def test_silent_when_standard_error_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    fit(noisy(), 2, verbose=True, validation=0.2)
    assert capfd.readouterr() == ("", "")


SHOW = """
import sys
import numpy as np
from chainrule import nn
x = np.random.default_rng(0).normal(size=(64, 4))
net = nn.Dense(2)
print("quiet", file=sys.stderr)
net.fit(x, x[:, :2], epochs=3, verbose=False)
print("loud", file=sys.stderr, flush=True)
net.fit(x, x[:, :2], epochs=400, batch_size=4, validation=0.25)
print("end", file=sys.stderr)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are a matter of Unix")
def test_progress_on_a_terminal() -> None:
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", SHOW], stderr=theirs, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    os.close(theirs)
    text = b""
    try:
        while True:
            part = os.read(ours, 65536)
            if not part:
                break
            text += part
    except OSError:  # Linux says so when the other side has gone
        pass
    finally:
        os.close(ours)
        out, _ = process.communicate(timeout=60)
    said = text.decode()
    assert (process.returncode, out) == (0, b""), said
    quiet, loud = said.split("loud")
    assert quiet.strip() == "quiet"
    shown = loud.split("end")[0]
    for word in ("epoch", "400", "loss", "val", "left"):
        assert word in shown, shown
    assert "\r" in shown  # one line, written over


def test_an_interrupted_group_of_batches_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of four batches are summed when Ctrl-C comes: no weight has moved, and their sum must not enter the next update."""
    x, t = data()

    def fit(net: nn.Module) -> cr.Run:
        return net.fit(x, t, optimizer=cr.SGD(0.1, accumulate=4), batch_size=5, epochs=1, backend="reference")

    def build() -> nn.Sequential:
        return nn.Sequential(nn.Dense(3, "tanh"), nn.Dense(2))

    def interrupt(self: object, done: int, of: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    net, twin = build(), build()
    with monkeypatch.context() as patch:
        patch.setattr("chainrule.train.fit.Progress.step", interrupt)
        assert fit(net).interrupted
    fit(net)
    fit(twin)
    assert_same(state(net), state(twin))
