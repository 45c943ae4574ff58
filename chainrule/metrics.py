"""Metrics: how good predictions are, in numbers that people read.

In: the loss (which knows its link and its kind of target), raw scores, the target as `Loss.check_target` returned it, weights.
Out: one float, in float64; NaN where the metric is not defined, and over no weight at all.

Most are made of sums over rows: such a metric says in NumPy what each row adds, and the training records these lines into its steps, so
that no scores need to be kept. The others see all scores.

Weights are one for each row (B,) or one for each element of the loss; elements of weight 0 (masked ones) have no influence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from .errors import UsageError
from .losses import Loss, binary_cross_entropy, cross_entropy
from .records import record
from .registry import Registry

Task = Literal["regression", "classification", "probabilities", "any"]
Function = Callable[[Loss, np.ndarray, np.ndarray, "np.ndarray | None"], float]
Rows = Callable[[Loss, Any, Any], Any]  # (loss, scores, target) -> (B, ...)
Finish = Callable[[np.ndarray, np.ndarray, "np.ndarray | None"], float]


@record(frozen=True)
class Metric:
    """A metric and what is known about it.

    Attributes: name; function(loss, scores, target, weight); greater_is_better, None where nobody said; task: the losses it fits,
    "probabilities" being classification whose link is sigmoid or softmax; rows(loss, scores, target), what is summed over the rows, and
    finish(sums, target, weight), the metric from these sums, or None where it takes more than sums.
    """

    name: str
    function: Function
    greater_is_better: bool | None
    task: Task = "any"
    rows: Rows | None = None
    finish: Finish | None = None

    def is_summed(self, loss: Loss) -> bool:
        """Whether the sums can be part of a step: of registered metrics, and not where a loss of the user's may decide in lines that
        cannot be recorded."""
        return self.rows is not None and self in metrics.values() and type(loss).__module__ == Loss.__module__

    def sums(self, loss: Loss, scores: Any, target: Any, weight: Any = None) -> Any:
        """Σ w r over the rows, of arrays or while tracing; weight (B,) or as the elements of r."""
        assert self.rows is not None
        values = self.rows(loss, scores, target).astype(np.float64)
        if weight is None:
            return np.sum(values, axis=0)
        w = np.reshape(weight, (*weight.shape, *(1,) * (values.ndim - weight.ndim)))
        return np.sum(np.where(w > 0, values, 0.0) * w, axis=0)

    def finished(self, sums: np.ndarray, target: np.ndarray, weight: np.ndarray | None = None) -> float:
        """The metric from the sums over all rows, of which these are target and weight."""
        assert self.finish is not None
        return float(self.finish(np.asarray(sums, np.float64), target, weight))

    def fits(self, loss: Loss) -> bool:
        """Whether the metric makes sense for networks trained with this loss."""
        if self.task == "probabilities":
            return loss.is_classification and loss.link in ("sigmoid", "softmax")
        return self.task == "any" or loss.is_classification == (self.task == "classification")

    def check(self, loss: Loss) -> None:
        """Raise `UsageError` unless the metric fits the loss."""
        if not self.fits(loss):
            fitting = [name for name, other in metrics.items() if other.fits(loss)]
            raise UsageError(f'the metric "{self.name}" does not fit the loss {loss.name}; these do: {", ".join(fitting)}')

    def __call__(self, loss: Loss, scores: np.ndarray, target: np.ndarray, weight: np.ndarray | None = None) -> float:
        """The metric. Args: scores (B, ...), target as `loss.check_target` gave it, weight (B,) or as the elements of the loss.
        Raises: `UsageError` if it does not fit the loss."""
        self.check(loss)
        return float(self.function(loss, np.asarray(scores, np.float64), np.asarray(target), weight))


metrics: Registry[Metric] = Registry("metric")


def _declare(greater_is_better: bool, task: Task) -> Callable[[Function], Function]:
    """Register a function under its own name."""

    def declare(function: Function) -> Function:
        metrics.add(function.__name__, Metric(function.__name__, function, greater_is_better, task))
        return function

    return declare


def _spread(weight: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """One weight for each element, whether given so or for each row."""
    if weight is None:
        return np.ones(shape)
    given = np.asarray(weight, np.float64)
    return np.broadcast_to(given.reshape(given.shape + (1,) * (len(shape) - given.ndim)), shape)


def _mean(sums: np.ndarray, target: np.ndarray, weight: np.ndarray | None) -> float:
    """Σ w r / Σ w from the sums over the rows; the mean over the elements of a row is taken as well."""
    total = _spread(weight, (len(target), *sums.shape)).sum()
    return float(sums.sum() / total) if total > 0 else math.nan


def _root(sums: np.ndarray, target: np.ndarray, weight: np.ndarray | None) -> float:
    return math.sqrt(_mean(sums, target, weight))


def _explained(sums: np.ndarray, target: np.ndarray, weight: np.ndarray | None) -> float:
    """1 - Σ w r / Σ w (t - mean t)² for each output, which is the last axis; the mean over the outputs."""
    columns = sums.shape[-1] if sums.ndim else 1
    w = _spread(weight, target.shape).reshape(-1, columns)
    t = np.where(w > 0, target.reshape(-1, columns).astype(np.float64), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        about = np.sum(w * (t - np.sum(w * t, axis=0) / np.sum(w, axis=0)) ** 2, axis=0)
        constant = np.array([np.ptp(t[w[:, k] > 0, k]) == 0 if np.any(w[:, k] > 0) else True for k in range(columns)])
        return float(np.mean(np.where(constant, math.nan, 1 - sums.reshape(-1, columns).sum(axis=0) / about)))


def _summed(greater_is_better: bool, task: Task, finish: Finish = _mean) -> Callable[[Rows], Function]:
    """Register, under its name, the metric that `finish` makes of the sums over what the function says of each row."""

    def declare(rows: Rows) -> Function:
        def function(loss: Loss, scores: np.ndarray, target: np.ndarray, weight: np.ndarray | None = None) -> float:
            return metric.finished(metric.sums(loss, np.asarray(scores, np.float64), target, weight), target, weight)

        function.__name__ = function.__qualname__ = rows.__name__
        function.__doc__, function.__module__ = rows.__doc__, rows.__module__
        metric = Metric(rows.__name__, function, greater_is_better, task, rows, finish)
        metrics.add(rows.__name__, metric)
        return function

    return declare


def labels(loss: Loss, target: Any, scores: Any) -> Any:
    """The target in the words of `loss.decide`: classes for a classification (a row of probabilities counts as its largest, a
    probability as 1 above one half), else the numbers themselves."""
    if loss.link == "softmax":
        return np.argmax(target, axis=-1) if target.ndim == scores.ndim else target
    return (target > 0.5).astype(np.int64) if loss.link == "sigmoid" else target


@_summed(greater_is_better=True, task="classification")
def accuracy(loss: Loss, scores: Any, target: Any) -> Any:
    """The share of right decisions.

    Σ w [decision = class] / Σ w
    Differs: several binary outputs count one by one (scikit-learn wants all of a row right).

    >>> accuracy(binary_cross_entropy(), np.array([[2.0], [-1.0]]), np.array([[1.0], [1.0]]))
    0.5
    """
    return loss.decide(scores) == labels(loss, target, scores)


@_summed(greater_is_better=True, task="regression", finish=_explained)
def r2(loss: Loss, scores: Any, target: Any) -> Any:
    """The share of the target's variance that is explained.

    1 - Σ w (t - y)² / Σ w (t - mean t)², the mean over the outputs (the last axis)
    NaN if an output's target is constant. Differs: scikit-learn gives 0 or 1 there.

    >>> from chainrule.losses import mse
    >>> r2(mse(), np.array([[1.0], [2.0], [4.0]]), np.array([[1.0], [2.0], [3.0]]))
    0.5
    """
    return _squared_error(loss, scores, target)


def _squared_error(loss: Loss, scores: Any, target: Any) -> Any:
    """(t - y)², in float64: the square of a number that float32 holds may be too large for it."""
    error = (loss.apply_link(scores) - target).astype(np.float64)
    return error * error


@_summed(greater_is_better=False, task="regression", finish=_root)
def rmse(loss: Loss, scores: Any, target: Any) -> Any:
    """The root of the mean squared error, in the target's unit.

    √(Σ w (t - y)² / Σ w)
    Differs: over several outputs the root of the mean over all (scikit-learn: the mean of the roots).

    >>> from chainrule.losses import mse
    >>> rmse(mse(), np.array([[1.0], [5.0]]), np.array([[2.0], [-2.0]]))
    5.0
    """
    return _squared_error(loss, scores, target)


@_summed(greater_is_better=False, task="regression")
def mae(loss: Loss, scores: Any, target: Any) -> Any:
    """The mean absolute error, in the target's unit.

    Σ w |t - y| / Σ w

    >>> from chainrule.losses import mse
    >>> mae(mse(), np.array([[1.0], [5.0]]), np.array([[2.0], [-2.0]]))
    4.0
    """
    return np.abs(loss.apply_link(scores) - target)


@_summed(greater_is_better=False, task="probabilities")
def log_loss(loss: Loss, scores: Any, target: Any) -> Any:
    """The negative log-likelihood of the classes, in nats, without label smoothing.

    -Σ w log p(class) / Σ w
    Differs: from raw scores, so nothing has to be clipped.

    >>> log_loss(binary_cross_entropy(0.1), np.array([[0.0]]), np.array([[1.0]]))
    0.6931471805599453
    """
    plain: Loss = binary_cross_entropy() if loss.link == "sigmoid" else cross_entropy()
    return plain(scores, target)


@_declare(greater_is_better=True, task="classification")
def auc(loss: Loss, scores: np.ndarray, target: np.ndarray, weight: np.ndarray | None = None) -> float:
    """The area under the ROC curve: how often a positive row outranks a negative one, ties counting half.

    Σ w_i w_j ([s_i > s_j] + ½ [s_i = s_j]) / Σ w_i w_j over positive i and negative j, exact, by ranks
    Several classes: each against the rest, ranked by its probability, and the plain mean. Several binary outputs: the plain mean.
    Classes that no row, or every row, belongs to are left out; NaN if none remains, or if a score is NaN.
    Source: Hanley & McNeil 1982. Differs: scikit-learn refuses several classes of which one is missing.

    >>> auc(binary_cross_entropy(), np.array([[0.1], [0.4], [0.4], [0.8]]), np.array([[0.0], [0.0], [1.0], [1.0]]))
    0.875
    """
    if loss.link == "softmax":
        shifted = scores - scores.max(axis=-1, keepdims=True)
        # A logarithm keeps apart what a probability near 1 would round together; two classes are ranked by the difference.
        ranked = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        ranked = ranked if scores.shape[-1] != 2 else (scores[..., 1] - scores[..., 0])[..., None]
        classes = np.arange(scores.shape[-1]) if scores.shape[-1] != 2 else np.array([1])
        positive = labels(loss, target, scores)[..., None] == classes
        spread = _spread(weight, scores.shape[:-1])[..., None] + np.zeros(len(classes))
    else:
        ranked, positive = scores, target > (0.5 if loss.link == "sigmoid" else 0)
        spread = _spread(weight, scores.shape)
    columns = ranked.shape[-1] if ranked.ndim > 1 else 1
    ranked, positive, spread = (a.reshape(-1, columns) for a in (ranked, positive, spread))
    areas = [_area(ranked[:, k], positive[:, k], spread[:, k]) for k in range(columns)]
    defined = [area for area in areas if area is not None]
    return float(np.mean(defined)) if defined else math.nan


def _area(scores: np.ndarray, positive: np.ndarray, weight: np.ndarray) -> float | None:
    """AUC of one column; None where it is not defined because one of the two classes is empty."""
    counted = weight > 0
    scores, positive, weight = scores[counted], positive[counted], weight[counted]
    if np.isnan(scores).any():
        return math.nan
    values, group = np.unique(scores, return_inverse=True)
    up = np.bincount(group, weights=weight * positive, minlength=len(values))
    down = np.bincount(group, weights=weight * ~positive, minlength=len(values))
    pairs = up.sum() * down.sum()
    return float(np.sum(up * (np.cumsum(down) - 0.5 * down)) / pairs) if pairs > 0 else None


# ------------------------------------------------------------------------------------------------------------------- by name


def resolve(thing: object) -> Metric:
    """The metric that a name, a `Metric` or any function(prediction, target) -> float stands for.

    Such a function gets what `loss.decide` says (classes for a classification) and the target alike, without weights. Its
    `__name__` names it; an attribute `greater_is_better`, if it has one, tells early stopping which way is up.
    Raises: `UnknownNameError` for a name that is not registered, `UsageError` for anything else.

    >>> resolve("accuracy").greater_is_better
    True
    """
    if isinstance(thing, Metric):
        return thing
    if isinstance(thing, str):
        return metrics[thing]
    if not callable(thing):
        raise UsageError(f"a metric is a name ({', '.join(metrics)}) or a function of (prediction, target); not {thing!r}")
    for metric in metrics.values():
        if metric.function is thing:
            return metric

    def function(loss: Loss, scores: np.ndarray, target: np.ndarray, weight: np.ndarray | None) -> float:
        return float(thing(loss.decide(scores), labels(loss, target, scores)))

    name = str(getattr(thing, "__name__", type(thing).__name__))
    return Metric(name, function, getattr(thing, "greater_is_better", None))
