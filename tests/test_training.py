"""What the steps of `fit` compute: every loss and optimizer learns; batches, weights of rows, penalties and schedules as by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from same import assert_same
from training import OPTIMIZERS, Array, at_zero, data, target_for

import chainrule as cr
from chainrule import nn
from chainrule.losses import losses
from chainrule.optim import optimizers
from chainrule.schedules import Schedule, schedules


def product(scores: Any, target: Any) -> Any:
    """A loss that is linear in the scores: constant gradients."""
    return scores * target


def mse_step(w: Array, b: Array, x: Array, t: Array, weight: Array | None = None) -> tuple[float, Array, Array]:
    """Loss and gradients of y = x w + b under Σ ω (y - t)² / (Σ ω · outputs), by hand."""
    weight = np.ones(len(x)) if weight is None else np.asarray(weight, float)
    error = x @ w + b - t
    share = weight[:, None] / (weight.sum() * t.shape[1])
    return float(np.sum(share * error**2)), 2 * x.T @ (share * error), 2 * np.sum(share * error, axis=0)


# --------------------------------------------------------------------------------------------- everything registered can train


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
