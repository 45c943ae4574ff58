"""Metrics against scikit-learn, pairs counted one by one, and the cases that have no answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as sk

import chainrule as cr
from chainrule import losses, metrics, nn
from chainrule.errors import UnknownNameError, UsageError
from chainrule.losses import Loss
from chainrule.metrics import Metric, resolve
from chainrule.metrics import metrics as registry
from chainrule.train.data import row_weights

RNG = np.random.default_rng(0)
N = 60
WEIGHTS = {"plain": None, "weighted": RNG.integers(0, 4, N).astype(float)}
BINARY = RNG.normal(size=(N, 1)).round(1), (RNG.random((N, 1)) < 0.4).astype(float)  # rounded: many ties
CLASSES = RNG.normal(size=(N, 4)), RNG.integers(4, size=N)
NUMBERS = RNG.normal(size=(N, 3)), RNG.normal(size=(N, 3))


def softmax(scores: np.ndarray) -> np.ndarray:
    return losses.cross_entropy().apply_link(scores)


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_regression_against_scikit_learn(weight: np.ndarray | None) -> None:
    scores, target = NUMBERS
    expected = {
        "r2": sk.r2_score(target, scores, sample_weight=weight),
        "mae": sk.mean_absolute_error(target, scores, sample_weight=weight),
        "rmse": math.sqrt(sk.mean_squared_error(target, scores, sample_weight=weight)),
    }
    assert set(expected) == {name for name, metric in registry.items() if metric.task == "regression"}
    for name, value in expected.items():
        assert registry[name](losses.mse(), scores, target, weight) == pytest.approx(value, rel=1e-12)
    counts = np.exp(NUMBERS[1]).round()
    assert registry["r2"](losses.poisson(), scores, counts, weight) == pytest.approx(
        sk.r2_score(counts, np.exp(scores), sample_weight=weight), rel=1e-12
    )


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_binary_against_scikit_learn(weight: np.ndarray | None) -> None:
    scores, target = BINARY
    flat = target.ravel()
    probability = 1 / (1 + np.exp(-scores.ravel()))
    expected = {
        "accuracy": sk.accuracy_score(flat, scores.ravel() > 0, sample_weight=weight),
        "auc": sk.roc_auc_score(flat, scores.ravel(), sample_weight=weight),
        "log_loss": sk.log_loss(flat, probability, sample_weight=weight),
    }
    assert set(expected) == {name for name, metric in registry.items() if metric.task in ("classification", "probabilities")}
    for name, value in expected.items():
        assert registry[name](losses.binary_cross_entropy(0.1), scores, target, weight) == pytest.approx(value, rel=1e-12)
    for name in ("accuracy", "auc"):
        assert registry[name](losses.hinge(), scores, 2 * target - 1, weight) == pytest.approx(expected[name], rel=1e-12)
    two = np.hstack([np.zeros_like(scores), scores])
    for name, value in expected.items():
        assert registry[name](losses.cross_entropy(), two, flat.astype(int), weight) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_classes_against_scikit_learn(weight: np.ndarray | None) -> None:
    scores, target = CLASSES
    areas = [sk.roc_auc_score(target == k, softmax(scores)[:, k], sample_weight=weight) for k in range(4)]
    expected = {
        "accuracy": sk.accuracy_score(target, scores.argmax(axis=1), sample_weight=weight),
        "auc": np.mean(areas),
        "log_loss": sk.log_loss(target, softmax(scores), sample_weight=weight),
    }
    for name, value in expected.items():
        assert registry[name](losses.cross_entropy(), scores, target, weight) == pytest.approx(value, rel=1e-12)
        assert registry[name](losses.cross_entropy(), scores, np.eye(4)[target], weight) == pytest.approx(value, rel=1e-12)
    if weight is None:
        macro = sk.roc_auc_score(target, softmax(scores), multi_class="ovr", average="macro")
        assert expected["auc"] == pytest.approx(macro, rel=1e-12)
        assert registry["auc"](losses.kl_divergence(), scores, np.eye(4)[target]) == pytest.approx(macro, rel=1e-12)


def test_auc_counts_pairs() -> None:
    scores, target, weight = np.array([1.0, 1, 2, 3, 3, 0]), np.array([0, 1, 0, 1, 0, 1]), np.array([1.0, 2, 3, 4, 0, 2])
    pairs = total = 0.0
    for i in np.flatnonzero(target == 1):
        for j in np.flatnonzero(target == 0):
            total += weight[i] * weight[j]
            pairs += weight[i] * weight[j] * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
    value = registry["auc"](losses.binary_cross_entropy(), scores[:, None], target[:, None], weight)
    assert value == pytest.approx(pairs / total, rel=1e-14)


def test_auc_tells_apart_what_probabilities_round_together() -> None:
    """In float64, softmax gives 1 for both rows; their order still shows."""
    scores = np.array([[0.0, 40.0], [0.0, 50.0]])
    assert np.ptp(softmax(scores)[:, 1]) == 0
    assert registry["auc"](losses.cross_entropy(), scores, np.array([0, 1])) == 1.0


def test_undefined_cases_are_nan() -> None:
    auc, r2 = registry["auc"], registry["r2"]
    assert math.isnan(auc(losses.binary_cross_entropy(), np.ones((3, 1)), np.ones((3, 1))))
    assert math.isnan(auc(losses.cross_entropy(), RNG.normal(size=(3, 3)), np.zeros(3, int)))
    assert math.isnan(auc(losses.binary_cross_entropy(), np.array([[math.nan], [1.0]]), np.array([[0.0], [1.0]])))
    assert math.isnan(r2(losses.mse(), RNG.normal(size=(3, 1)), np.full((3, 1), 0.1)))
    assert math.isnan(r2(losses.mse(), np.zeros((0, 1)), np.zeros((0, 1))))
    for name, loss in [
        ("accuracy", losses.cross_entropy()),
        ("log_loss", losses.cross_entropy()),
        ("auc", losses.cross_entropy()),
    ]:
        assert math.isnan(registry[name](loss, np.ones((2, 3)), np.array([0, 1]), np.zeros(2)))
    for name in ("r2", "rmse", "mae"):
        assert math.isnan(registry[name](losses.mse(), np.ones((2, 1)), np.array([[0.0], [1.0]]), np.zeros(2)))


def test_a_missing_class_is_left_out_of_the_mean() -> None:
    scores, target = CLASSES
    kept = target != 3
    areas = [sk.roc_auc_score(target[kept] == k, softmax(scores[kept])[:, k]) for k in range(3)]
    assert registry["auc"](losses.cross_entropy(), scores[kept], target[kept]) == pytest.approx(np.mean(areas), rel=1e-12)


@pytest.mark.parametrize("name", registry)
def test_rows_of_no_weight_have_no_influence(name: str) -> None:
    """Masked elements may hold anything, NaN included, and a weight of 2 counts as two rows."""
    loss: Loss = losses.mse() if registry[name].task == "regression" else losses.cross_entropy()
    scores, target = NUMBERS if registry[name].task == "regression" else CLASSES
    weight = np.concatenate([np.full(40, 2.0), np.zeros(20)])
    spoilt = np.where(weight[:, None] > 0, scores, math.nan)
    expected = registry[name](loss, np.tile(scores[:40], (2, 1)), np.concatenate([target[:40]] * 2))
    assert registry[name](loss, spoilt, target, weight) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", registry)
def test_sequences_are_rows_of_steps(name: str) -> None:
    """Weights may be one for each step: a mask."""
    loss: Loss = losses.mse() if registry[name].task == "regression" else losses.cross_entropy()
    scores, target = NUMBERS if registry[name].task == "regression" else CLASSES
    mask = RNG.random((6, 10)) < 0.7
    weight = np.broadcast_to(mask[..., None], (6, 10, 3)) if registry[name].task == "regression" else mask
    value = registry[name](loss, scores.reshape(6, 10, -1), target.reshape(6, 10, *target.shape[1:]), weight)
    assert value == pytest.approx(registry[name](loss, scores, target, mask.ravel()), rel=1e-12)


def test_several_binary_outputs_are_taken_one_by_one() -> None:
    scores, target = RNG.normal(size=(N, 2)), (RNG.random((N, 2)) < 0.5).astype(float)
    loss = losses.binary_cross_entropy()
    for name in ("accuracy", "auc", "log_loss"):
        each = [registry[name](loss, scores[:, k : k + 1], target[:, k : k + 1]) for k in range(2)]
        assert registry[name](loss, scores, target) == pytest.approx(np.mean(each), rel=1e-12)


def test_float32_scores_are_summed_in_float64() -> None:
    scores = np.full((100_000, 1), 0.1, np.float32)
    assert registry["mae"](losses.mse(), scores, np.zeros_like(scores)) == pytest.approx(float(np.float32(0.1)), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "loss"),
    [("accuracy", losses.mse()), ("auc", losses.mae()), ("r2", losses.cross_entropy()), ("log_loss", losses.hinge())],
)
def test_a_metric_that_does_not_fit_the_loss(name: str, loss: Loss) -> None:
    with pytest.raises(UsageError, match=f'the metric "{name}" does not fit the loss {loss.name}; these do: '):
        registry[name](loss, np.ones((2, 1)), np.ones((2, 1)))


def test_which_way_is_up() -> None:
    assert {name for name, metric in registry.items() if metric.greater_is_better} == {"accuracy", "r2", "auc"}


def test_any_function_is_a_metric() -> None:
    def mistakes(prediction: np.ndarray, target: np.ndarray) -> int:
        return int(np.sum(prediction != target))

    metric = resolve(mistakes)
    assert (metric.name, metric.greater_is_better) == ("mistakes", None)
    assert metric(losses.cross_entropy(), np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([1, 1])) == 1.0
    assert metric(losses.binary_cross_entropy(), np.array([[2.0], [3.0]]), np.array([[1.0], [0.0]])) == 1.0
    mistakes.greater_is_better = False  # type: ignore[attr-defined]
    assert resolve(mistakes).greater_is_better is False


def test_resolve() -> None:
    assert resolve("auc") is registry["auc"]
    assert resolve(metrics.accuracy) is registry["accuracy"]
    own = Metric("own", lambda loss, scores, target, weight: 3.0, greater_is_better=True)
    assert resolve(own)(losses.mse(), np.ones((1, 1)), np.ones((1, 1))) == 3.0
    with pytest.raises(UnknownNameError, match='Did you mean "accuracy"'):
        resolve("acuracy")
    with pytest.raises(UsageError, match="a metric is a name"):
        resolve(3)


@pytest.mark.parametrize("name", registry)
def test_every_metric_is_documented(name: str) -> None:
    text = registry[name].function.__doc__
    assert text
    assert ">>>" in text


# ------------------------------------------------------------------------------------------------------ sums in the steps of a run


def task_data(loss: Loss) -> tuple[np.ndarray, np.ndarray, int]:
    """x, y and the outputs for a network with this loss."""
    r = np.random.default_rng(3)
    x = r.normal(size=(83, 3)).astype(np.float32)
    if loss.link == "softmax":
        return x, r.integers(3, size=83), 3
    if loss.is_classification:
        return x, r.integers(2, size=(83, 2)), 2
    return x, np.abs(r.normal(size=(83, 2))) + 0.1, 2


FITTING = [
    (name, loss())
    for name, metric in registry.items()
    for loss in losses.losses.values()
    if metric.fits(loss()) and metric.rows is not None and loss.__name__ != "kl_divergence"
]


@pytest.mark.parametrize(("name", "loss"), FITTING, ids=[f"{n}-{k.name}" for n, k in FITTING])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_sums_in_steps_give_what_all_scores_give(name: str, loss: Loss, backend: str, weighted: bool) -> None:
    """Nothing is learnt, so the scores of all steps are those of the network; weights, among them 0, and a short last batch."""
    x, y, outputs = task_data(loss)
    weight = np.arange(83.0) % 4 if weighted else None
    net = nn.Sequential(nn.Dense(4, "tanh"), nn.Dense(outputs))
    run = net.fit(
        x, y, loss=loss, metrics=(name,), optimizer=cr.SGD(0.0), batch_size=20, epochs=2, sample_weight=weight,
        validation=(x[:31], y[:31]), backend=backend, class_weight={0: 1.0, 1: 3.0, 2: 0.5} if y.ndim == 1 else None,
    )  # fmt: skip
    metric, scores, target = registry[name], net.predict(x), loss.check_target(y, (outputs,))
    whole = row_weights(83, weight, {0: 1.0, 1: 3.0, 2: 0.5} if y.ndim == 1 else None, target, True)
    assert metric.is_summed(loss)
    assert run.metrics[name] == pytest.approx([metric(loss, scores, target, whole)] * 2, rel=2e-6)
    assert run.metrics[f"validation_{name}"] == pytest.approx([metric(loss, scores[:31], target[:31])] * 2, rel=2e-6)
    found = net.evaluate(x, y, metrics=(name,), sample_weight=weight, backend=backend)[name]
    assert found == pytest.approx(metric(loss, scores, target, weight), rel=2e-6)


class Undecided(losses.binary_cross_entropy):
    """A user's loss, which decides in Python."""

    def decide(self, scores: np.ndarray) -> np.ndarray:
        return np.array([[1 if s > 0.1 else 0 for s in row] for row in scores.tolist()])


def test_a_loss_that_decides_in_lines_that_cannot_be_recorded() -> None:
    x, y, _ = task_data(losses.binary_cross_entropy())
    net = nn.Dense(2)
    run = net.fit(x, y, loss=Undecided(), metrics=("accuracy",), optimizer=cr.SGD(0.0), epochs=1)
    assert run.metrics["accuracy"] == [np.mean((net.predict(x) > 0.1) == y)]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_squares_that_float32_cannot_hold(backend: str) -> None:
    x, y = np.ones((10, 1)), np.full((10, 1), 1e25)
    run = nn.Dense(1).fit(x, y, loss="mae", metrics=("rmse",), epochs=2, optimizer=cr.SGD(0.0), backend=backend)
    assert run.metrics["rmse"] == pytest.approx([1e25] * 2)


def test_a_metric_of_the_users_own_with_rows_sees_all_scores() -> None:
    """Only what is registered is recorded: other lines may read whatever they like."""
    own = Metric("own", lambda loss, scores, target, weight: float(len(scores)), None, rows=lambda loss, scores, target: scores)
    x, y, _ = task_data(losses.mse())
    run = nn.Dense(2).fit(x, y, metrics=(own,), epochs=2, batch_size=20)
    assert run.metrics["own"] == [83.0] * 2
