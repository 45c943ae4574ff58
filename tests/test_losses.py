"""Losses against their formulas in 50 digits, extremes in float32, and what bad targets get."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest

from chainrule import losses
from chainrule.errors import DataError, ShapeError, UnknownNameError, UsageError
from chainrule.losses import CustomLoss, Example, Loss, resolve
from chainrule.losses import losses as registry

mp = mpmath.mp.clone()
mp.dps = 50

CASES = [(name, example) for name, loss in registry.items() for example in loss.examples]
IDS = [f"{name}-{number}" for number, (name, _) in enumerate(CASES)]


def elementwise(formula: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """A formula of two 50-digit numbers, over arrays."""

    def over(scores: np.ndarray, target: np.ndarray, **options: float) -> np.ndarray:
        pairs = zip(scores.ravel().tolist(), target.ravel().tolist(), strict=True)
        return np.array([float(formula(mp.mpf(s), mp.mpf(t), **options)) for s, t in pairs]).reshape(scores.shape)

    return over


def over_classes(formula: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """A formula of log-probabilities and target probabilities of one row, over rows; labels become rows first."""

    def over(scores: np.ndarray, target: np.ndarray, **options: float) -> np.ndarray:
        classes = scores.shape[-1]
        rows = np.eye(classes)[target] if target.ndim < scores.ndim else target
        values = []
        for s, t in zip(scores.reshape(-1, classes).tolist(), rows.reshape(-1, classes).tolist(), strict=True):
            total = mp.log(mp.fsum(mp.exp(mp.mpf(x)) for x in s))
            values.append(float(formula([mp.mpf(x) - total for x in s], [mp.mpf(x) for x in t], **options)))
        return np.array(values).reshape(scores.shape[:-1])

    return over


def binary(s: Any, t: Any, label_smoothing: float = 0.0) -> Any:
    t = (1 - mp.mpf(label_smoothing)) * t + mp.mpf(label_smoothing) / 2
    return t * mp.log1p(mp.exp(-s)) + (1 - t) * mp.log1p(mp.exp(s))


def categorical(logs: list[Any], t: list[Any], label_smoothing: float = 0.0) -> Any:
    e = mp.mpf(label_smoothing)
    return -mp.fsum(((1 - e) * q + e / len(t)) * log for q, log in zip(t, logs, strict=True))


FORMULAS: dict[str, Callable[..., np.ndarray]] = {
    "mse": elementwise(lambda s, t: (s - t) ** 2),
    "mae": elementwise(lambda s, t: abs(s - t)),
    "huber": elementwise(lambda s, t, delta=1.0: (s - t) ** 2 / 2 if abs(s - t) <= delta else delta * (abs(s - t) - delta / 2)),
    "log_cosh": elementwise(lambda s, t: mp.log(mp.cosh(s - t))),
    "poisson": elementwise(lambda s, t: mp.exp(s) - t * s),
    "quantile": elementwise(lambda s, t, q=0.5: max(q * (t - s), (q - 1) * (t - s))),
    "binary_cross_entropy": elementwise(binary),
    "cross_entropy": over_classes(categorical),
    "hinge": elementwise(lambda s, t: max(0, 1 - t * s)),
    "kl_divergence": over_classes(
        lambda logs, t: mp.fsum(q * (mp.log(q) - log) for q, log in zip(t, logs, strict=True) if q > 0),
    ),
}

EXTREMES = np.array([-1e4, -200.0, -88.0, -17.0, -1.0, -1e-3, -1e-6, 0.0, 1e-6, 1e-3, 1.0, 17.0, 88.0, 200.0, 1e4])


@pytest.mark.parametrize(("name", "example"), CASES, ids=IDS)
def test_every_loss_follows_its_formula(name: str, example: Example) -> None:
    loss = registry[name](**example.options)
    expected = FORMULAS[name](example.scores, example.target, **example.options)
    np.testing.assert_allclose(loss(example.scores, example.target), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("name", "example"), CASES, ids=IDS)
def test_every_loss_keeps_the_contract(name: str, example: Example) -> None:
    loss = registry[name](**example.options)
    scores = example.scores.astype(np.float32)
    target = example.target if example.target.dtype.kind == "i" else example.target.astype(np.float32)
    elements = loss(scores, target)
    assert elements.dtype == np.float32
    assert elements.shape == (scores.shape[:-1] if loss.link == "softmax" else scores.shape)
    np.testing.assert_allclose(elements, loss(example.scores, example.target), rtol=1e-5, atol=1e-6)

    checked = loss.check_target(example.target.tolist(), example.scores.shape[1:])
    np.testing.assert_array_equal(checked, example.target)
    assert loss.check_target(target, example.scores.shape[1:]).dtype == target.dtype

    predicted = loss.apply_link(scores)
    assert predicted.shape == scores.shape
    assert predicted.dtype == np.float32
    decided = loss.decide(scores)
    assert decided.shape == (scores.shape[:-1] if loss.link == "softmax" else scores.shape)
    assert (decided.dtype.kind == "i") == loss.is_classification

    assert loss.name == name
    assert losses.from_config(json.loads(json.dumps(losses.config(loss)))) == loss
    assert loss.__doc__
    assert ">>>" in loss.__doc__


@pytest.mark.parametrize("name", [n for n in registry if registry[n].link != "softmax" and n != "poisson"])
def test_extreme_scores_elementwise(name: str) -> None:
    target = {"binary_cross_entropy": [0.0, 1.0, 0.25], "hinge": [-1.0, 1.0]}.get(name, [0.0, 1.0, -3.0])
    s, t = np.meshgrid(EXTREMES, np.array(target))
    exact = FORMULAS[name](s, t)
    np.testing.assert_allclose(registry[name]()(s, t), exact, rtol=1e-14, atol=1e-300)
    s, t = s.astype(np.float32), t.astype(np.float32)
    exact = FORMULAS[name](s, t)
    np.testing.assert_allclose(registry[name]()(s, t), exact, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("name", ["cross_entropy", "kl_divergence"])
def test_extreme_scores_over_classes(name: str) -> None:
    scores = np.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4 - 1, 1e4], [88.9, 0.0, -90.0], [0.2, -0.7, 0.999]])
    for row in ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.2, 0.5, 0.3]):
        target = np.tile(row, (5, 1))
        for dtype, rtol in ((np.float64, 1e-14), (np.float32, 1e-6)):
            s, t = scores.astype(dtype), target.astype(dtype)
            np.testing.assert_allclose(registry[name]()(s, t), FORMULAS[name](s, t), rtol=rtol, atol=4 * np.finfo(dtype).eps)


def test_labels_and_rows_of_probabilities_agree() -> None:
    scores, labels = np.random.default_rng(0).normal(size=(6, 2, 4)), np.random.default_rng(1).integers(4, size=(6, 2))
    for smoothing in (0.0, 0.2):
        loss = losses.cross_entropy(smoothing)
        np.testing.assert_allclose(loss(scores, labels), loss(scores, np.eye(4)[labels]), rtol=1e-14)


def test_two_class_cross_entropy_is_binary_cross_entropy() -> None:
    s, t = np.linspace(-5, 5, 7)[:, None], np.array([0, 1, 1, 0, 1, 0, 1])
    two = losses.cross_entropy(0.1)(np.hstack([np.zeros_like(s), s]), t)
    np.testing.assert_allclose(losses.binary_cross_entropy(0.1)(s, t[:, None])[:, 0], two, rtol=1e-13)


def test_poisson_overflows_only_where_its_mean_does() -> None:
    scores = np.array([-1e4, -88.0, 0.0, 88.0], np.float32)
    assert np.isfinite(losses.poisson()(scores, np.float32(3))).all()
    with np.errstate(over="ignore"):
        assert losses.poisson()(np.float32(89), np.float32(3)) == np.inf


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_quantile_is_least_at_the_quantile(q: float) -> None:
    sample = np.random.default_rng(0).exponential(size=1001)
    grid = np.linspace(0, 4, 2001)
    best = grid[np.argmin([losses.quantile(q)(c, sample).mean() for c in grid])]
    assert abs(best - np.quantile(sample, q)) < 5e-3


def test_links() -> None:
    scores = np.array([[-1e4, -50.0, 0.0, 50.0, 1e4]])
    sigmoid = losses.binary_cross_entropy().apply_link(scores)
    np.testing.assert_allclose(sigmoid, [[0, math.exp(-50), 0.5, 1, 1]], rtol=1e-15)
    softmax = losses.cross_entropy().apply_link(scores)
    np.testing.assert_allclose(softmax, [[0, 0, 0, 0, 1]])
    np.testing.assert_allclose(losses.poisson().apply_link(np.log([[2.0, 3.0]])), [[2, 3]])
    np.testing.assert_array_equal(losses.mse().apply_link(scores), scores)


def test_decisions() -> None:
    scores = np.array([[0.1, -2.0, 3.0], [0.0, -1.0, -2.0]])
    assert losses.cross_entropy().decide(scores).tolist() == [2, 0]
    assert losses.kl_divergence().decide(scores).tolist() == [2, 0]
    assert losses.binary_cross_entropy().decide(scores).tolist() == [[1, 0, 1], [0, 0, 0]]
    assert losses.hinge().decide(scores).tolist() == [[1, -1, 1], [-1, -1, -1]]
    assert losses.huber().decide(scores).tolist() == scores.tolist()
    np.testing.assert_array_equal(losses.poisson().decide(scores), np.exp(scores))


# ------------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("name", [n for n in registry if registry[n].link != "softmax"])
def test_one_output_takes_a_flat_target_and_nothing_broadcasts(name: str) -> None:
    loss = registry[name]()
    assert loss.check_target(np.ones(4), (1,)).shape == (4, 1)
    assert loss.check_target(np.ones((4, 5)), (5, 1)).shape == (4, 5, 1)
    assert loss.check_target(np.ones((0, 2)), (2,)).shape == (0, 2)
    for shape, outputs in [((4,), (4,)), ((4, 1), (3,)), ((4, 2), (1,)), ((4, 1), ()), ((1, 4), (4, 4))]:
        with pytest.raises(ShapeError, match=rf"{name} compares scores of shape \(B,.*the target has shape \({shape[0]},"):
            loss.check_target(np.ones(shape), outputs)
    with pytest.raises(ShapeError, match="one row for each row"):
        loss.check_target(1.0, ())


@pytest.mark.parametrize(
    ("loss", "target", "message"),
    [
        (
            "mse",
            [1.0, math.nan, 2.0, math.nan],
            r"finite numbers, but row 1 .* is nan \(and 1 more are wrong\): remove these rows or fill in",
        ),
        ("mse", [1.0, 2.0, -math.inf], r"row 2 .* is -inf"),
        ("mse", ["a", "b"], r'row 0 .* is "a" .*: turn the text into numbers'),
        ("mse", np.array([1.0, None], object), r"row 1 .* is None: remove these rows or fill in"),
        ("mse", np.array([1, "b"], object), r'row 1 .* is "b": turn the text into numbers'),
        ("mse", np.array([1j, 2]), r"the target's dtype is complex128; convert"),
        ("mse", np.array(["2024-01-01"], "M8[D]"), r"dtype is datetime64\[D\]"),
        ("binary_cross_entropy", [0.0, 1.5, 1.0], r"targets from 0 to 1, but row 1 .* is 1.5: code classes as 0 and 1"),
        ("binary_cross_entropy", [0.0, -1.0], r"row 1 .* is -1"),
        ("poisson", [0.0, 3.0, -2.0], r"0 or more, but row 2 .* is -2.0"),
        ("hinge", [1.0, -1.0, 0.0], r"-1 and \+1 .*, but row 2 .* is 0.0"),
        ("hinge", [1.0, 2.0], r"row 1 .* is 2.0"),
    ],
)
def test_bad_targets(loss: str, target: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        registry[loss]().check_target(target, (1,))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            [0, 1, 3, 2, 4],
            r"over 3 outputs needs integers from 0 to 2, but row 2 .* is 3.0 \(and 1 more .*\): give the last layer one",
        ),
        ([0, -1, 1], r"row 1 .* is -1"),
        ([0.0, 0.5], r"row 1 .* is 0.5"),
        (["cat", "dog"], r'row 0 .* is "cat" .*: number the classes first: classes, y = np.unique'),
        ([0.0, math.nan], r"finite numbers, but row 1"),
        ([[0.5, 0.5, 0.0], [0.5, 0.6, 0.0]], r"add up to 1, but row 1 .* is 1.1: this is the sum .* divide each row by its sum"),
        ([[0.5, 0.7, -0.2]], r"rows of probabilities, but row 0, column 2 .* is -0.2: none may be negative"),
    ],
)
def test_bad_classes(target: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        losses.cross_entropy().check_target(target, (3,))


def test_classes_are_cast() -> None:
    loss = losses.cross_entropy()
    for labels in (np.array([0, 2], np.uint8), np.array([0.0, 2.0]), [0, 2], np.array([0, 2], object)):
        checked = loss.check_target(labels, (3,))
        assert (checked.tolist(), checked.dtype) == ([0, 2], np.int64)
    assert loss.check_target(np.array([True, False]), (2,)).tolist() == [1, 0]
    assert loss.check_target(np.eye(3, dtype=int), (3,)).dtype == np.float64


@pytest.mark.parametrize(("shape", "outputs"), [((4, 1), (3,)), ((4, 2), (3,)), ((4,), (5, 3)), ((4, 3), (5, 3))])
def test_class_shapes(shape: tuple[int, ...], outputs: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"cross_entropy over scores of shape \(B, .* takes integers of shape .* the target has"):
        losses.cross_entropy().check_target(np.zeros(shape), outputs)
    with pytest.raises(ShapeError, match=r"kl_divergence needs a target of the scores' shape"):
        losses.kl_divergence().check_target(np.zeros(shape), outputs)


def test_cross_entropy_needs_two_scores() -> None:
    with pytest.raises(UsageError, match="choose binary_cross_entropy for one output"):
        losses.cross_entropy().check_target([0, 0], (1,))


def test_hinge_takes_zero_and_one() -> None:
    assert losses.hinge().check_target([0, 1, 1], (1,)).ravel().tolist() == [-1, 1, 1]
    assert losses.hinge().check_target([1, 1], (1,)).ravel().tolist() == [1, 1]
    assert losses.hinge().check_target([-1, -1], (1,)).ravel().tolist() == [-1, -1]


# ------------------------------------------------------------------------------------------------------- names, options, own ones


def cubic(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.abs(scores - target) ** 3


def test_resolve() -> None:
    assert resolve("huber") == losses.huber()
    assert resolve(losses.huber(2.0)) == losses.huber(2.0)
    assert resolve(losses.quantile) == losses.quantile()
    with pytest.raises(UnknownNameError, match='Did you mean "cross_entropy"'):
        resolve("crossentropy")
    with pytest.raises(UsageError, match="a loss is a name"):
        resolve(3)


def test_any_function_is_a_loss() -> None:
    loss = resolve(cubic)
    assert isinstance(loss, CustomLoss)
    assert (loss.name, loss.link, loss.is_classification) == ("cubic", "identity", False)
    np.testing.assert_array_equal(loss(np.array([[2.0]]), np.array([[0.0]])), [[8.0]])
    assert loss.check_target([1, 2], (1,)).tolist() == [[1], [2]]
    assert loss.check_target([1, 2], (3,)).dtype.kind == "i"  # labels for a loss of its own over classes
    assert loss.check_target([0.5, 2], (1,)).dtype == np.float64
    with pytest.raises(DataError, match="cubic needs finite numbers"):
        loss.check_target([0.5, math.nan], (1,))
    with pytest.raises(UsageError, match=r"your own function 'cubic'.* pass it again"):
        losses.from_config(json.loads(json.dumps(losses.config(loss))))


def test_a_function_with_a_link() -> None:
    loss = CustomLoss(cubic, link="softmax")
    assert loss.is_classification
    assert loss.decide(np.array([[0.0, 1.0]])).tolist() == [1]
    with pytest.raises(UsageError, match="the links are identity, exp, sigmoid, softmax"):
        CustomLoss(cubic, link="probit")


def test_a_class_of_its_own_needs_no_name() -> None:
    class Fourth(Loss):
        def __call__(self, scores: np.ndarray, target: np.ndarray) -> np.ndarray:
            return (scores - target) ** 4

    loss = resolve(Fourth)
    assert loss.name == "Fourth"
    assert loss(np.array([2.0]), loss.check_target([0.0], ())).tolist() == [16]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("huber", {"delta": 0.0}),
        ("huber", {"delta": math.inf}),
        ("huber", {"delta": "1"}),
        ("quantile", {"q": 1.0}),
        ("quantile", {"q": math.nan}),
        ("cross_entropy", {"label_smoothing": 1.0}),
        ("cross_entropy", {"label_smoothing": True}),
        ("binary_cross_entropy", {"label_smoothing": -0.1}),
    ],
)
def test_bad_options(name: str, options: dict[str, Any]) -> None:
    (option,) = options
    with pytest.raises(UsageError, match=rf"{name}\({option}=.*\): {option} must be a"):
        registry[name](**options)
    with pytest.raises(UsageError, match="does not take these options"):
        losses.from_config({"name": name, "colour": 1})
