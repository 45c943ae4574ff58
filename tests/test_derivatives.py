"""First and second derivatives of every registered loss, activation, layer and optimizer, against central differences in float64.

The operators have theirs in test_ops.py. Nothing is listed here: the registries and the examples in the declarations are the list.
"""

from __future__ import annotations

import copy
import zlib
from typing import Any

import numpy as np
import pytest

import chainrule as cr
from chainrule import losses, nn, optim
from chainrule.ops.activations import activations
from chainrule.transforms import is_array

FIRST, SECOND = 1e-6, 1e-5

LOSSES = [(name, i) for name, cls in losses.losses.items() for i in range(len(cls.examples))]
OPTIMIZERS = [name for name, cls in optim.optimizers.items() if not getattr(cls, "driver", False)]


@pytest.fixture
def random(request: pytest.FixtureRequest) -> np.random.Generator:
    """Numbers that depend on the test alone, not on which ran before it."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


def curvature(f: Any, *args: Any) -> None:
    """Check the derivative of the gradient of f along fixed directions."""
    random = np.random.default_rng(len(args))
    directions = [random.uniform(0.5, 1.5, np.shape(a)) for a in args]

    def slope(*values: Any) -> Any:
        gradients = cr.grad(f, tuple(range(len(args))))(*values)
        return sum(np.sum(g * d) for g, d in zip(gradients, directions, strict=True))

    cr.check_gradients(slope, *args, tolerance=SECOND)


@pytest.mark.parametrize(("name", "index"), LOSSES)
def test_losses(name: str, index: int, random: np.random.Generator) -> None:
    cls = losses.losses[name]
    example = cls.examples[index]
    loss = cls(**example.options)
    scores, target = np.asarray(example.scores, np.float64), np.asarray(example.target)
    weights = random.uniform(0.5, 1.5, np.shape(loss(scores, target)))

    def f(s: Any) -> Any:
        return np.sum(loss(s, target) * weights)

    np.testing.assert_allclose(cr.compile(f)(scores), f(scores), rtol=1e-12)
    cr.check_gradients(f, scores, tolerance=FIRST)
    curvature(f, scores)


@pytest.mark.parametrize("name", ["binary_cross_entropy", "cross_entropy", "log_cosh", "kl_divergence"])
def test_losses_stay_finite_far_out(name: str) -> None:
    loss = losses.losses[name]()
    scores = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    target = np.array([0, 1]) if name == "cross_entropy" else np.array([[1, 0], [0, 1]], np.float32)
    g = cr.grad(lambda s: np.sum(loss(s, target)))(scores)
    assert g.dtype == np.float32
    assert np.all(np.isfinite(g))
    assert np.all(np.abs(g) <= 1)


@pytest.mark.parametrize("name", list(activations))
def test_activations(name: str) -> None:
    function = activations[name]
    x = np.array([[-3.0, -0.7, -0.1], [0.2, 1.1, 4.0]])

    def f(v: Any) -> Any:
        return np.sum(function(v) * np.arange(1.0, 4.0))

    np.testing.assert_allclose(cr.compile(f)(x), f(x), rtol=1e-12)
    cr.check_gradients(f, x, tolerance=FIRST)
    curvature(f, x)
    far = function(np.array([-1e4, 1e4], np.float32))
    assert far.dtype == np.float32
    assert np.all(np.isfinite(far))


@pytest.mark.parametrize(("name", "index"), [(n, i) for n, cls in nn.layers.items() for i in range(len(cls.examples))])
def test_layers(name: str, index: int, random: np.random.Generator) -> None:
    """By the input and, through the network's own check, by the parameters in training and evaluation."""
    example = nn.layers[name].examples[index]
    layer = nn.layers[name](*copy.deepcopy(example["args"]))  # layers among them would stay built
    shape = example["input"]
    whole = "below" in example
    x = random.integers(0, example["below"], shape) if whole else random.normal(size=shape)
    net = nn.Sequential(layer, nn.Flatten(), nn.Dense(1))
    net.fit(x, np.arange(float(shape[0])), epochs=0, dtype="float64")
    net.check_gradients(x, random.normal(size=shape[0]), loss="mse", tolerance=FIRST)
    if not whole:
        cr.check_gradients(lambda v: np.sum(net(v) ** 2), x, tolerance=FIRST)
        curvature(lambda v: np.sum(np.sin(net(v))), x)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, random: np.random.Generator) -> None:
    """The update is a function like any other: recorded it gives what NumPy gives, and it has derivatives by w and g."""
    rule = optim.optimizers[name](learning_rate=0.1, clip_norm=10.0, l2=0.01, weight_decay=0.01)
    w, g = random.uniform(0.5, 1.5, (3, 2)), random.uniform(0.5, 1.5, (3, 2))
    h = {"learning_rate": np.float64(0.1), **{k: np.float64(v) for k, v in rule.hyper().items()}}
    shared = {k: np.float64(v) for k, v in rule.shared().items()}
    slots = {k: np.asarray(v, np.float64) for k, v in rule.slots(w).items()}
    # One step first, so that no slot stands at 0, where square roots have no slope.
    parameters, new_slots, shared = optim.apply_update(rule, {"w": w}, {"w": g}, {"w": slots}, shared, h)
    w, slots = parameters["w"], new_slots["w"]

    def step(w: Any, g: Any) -> Any:
        return optim.apply_update(rule, {"w": w}, {"w": g}, {"w": slots}, shared, h)

    plain = step(w, 0.9 * g)
    recorded = cr.compile(step)(w, 0.9 * g)
    for a, b in zip(cr.graph.tree.flatten(plain)[0], cr.graph.tree.flatten(recorded)[0], strict=True):
        assert not is_array(b) or np.shape(a) == np.shape(b)
        np.testing.assert_allclose(a, b, rtol=1e-13)

    def moved(w: Any, g: Any) -> Any:
        return np.sum(np.sin(step(w, g)[0]["w"]))

    cr.check_gradients(moved, w, 0.9 * g, tolerance=FIRST)
    curvature(moved, w, 0.9 * g)
