"""Losses: how far raw scores are from their targets, one number per element.

In: raw scores of the network and targets. Out: losses, not reduced; the objective Σ w l / Σ w is formed once, where training is
set up. The bodies are plain NumPy, so the same lines run on arrays and are recorded when the arguments are traced, those of `decide`
and `apply_link` too; `check_target` runs on the host only.

A loss is one class: a frozen dataclass whose fields are its options. Every kink uses `where` or `abs`, so that the derivative
there does not depend on how an operator treats ties; each docstring says what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .errors import DataError, ShapeError, UsageError
from .ops.activations import sigmoid
from .ops.call import composition
from .ops.index import one_hot
from .ops.reduce import log_softmax, softmax
from .records import record
from .registry import Registry

Array = Any  # a NumPy array or a traced array: both answer NumPy's protocols

TEXT_REMEDY = "number the classes first: classes, y = np.unique(y, return_inverse=True)"


class Example(NamedTuple):
    """What a test may feed to a loss: its options, scores away from any kink, and a target of the loss's kind."""

    options: dict[str, Any]
    scores: np.ndarray
    target: np.ndarray


class Loss:
    """What every loss offers.

    To add one, write a subclass (a frozen dataclass if it has options) with `__call__`, and pass an instance to `fit`;
    `losses.declare("name")`, the class having that name, makes it known by name too.

    Attributes:
        link: what turns raw scores into predictions: "identity", "exp", "sigmoid" or "softmax".
        is_classification: whether `decide` answers with a class rather than a number.
        examples: inputs for the tests that run over all registered losses.
    """

    link: str = "identity"
    is_classification: bool = False
    examples: tuple[Example, ...] = ()

    @property
    def name(self) -> str:
        """The name in the registry and in saved files, which is that of the class."""
        return type(self).__name__

    def __call__(self, scores: Array, target: Array) -> Array:
        """Losses per element. Args: scores (B, ...), target as `check_target` returns it. Returns: (B, ...)."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__(scores, target)")

    def check_target(self, target: Any, outputs: tuple[int, ...]) -> np.ndarray:
        """The target as training needs it: numeric, finite, of the scores' shape, in the loss's domain.

        Args: target (B, ...), or (B,) for one output; outputs: the shape of the scores without the batch.
        Returns: (B, *outputs), float32 as it came, everything else as float64.
        Raises: `ShapeError` if the shapes differ (they never broadcast), `DataError` with the first bad row.
        """
        return _match(self, _numbers(self, target), outputs)

    def decide(self, scores: Array) -> Array:
        """The prediction: a class index (softmax: over the last axis; sigmoid: 0 or 1 for each score) or a number."""
        if self.link == "softmax":
            return np.argmax(scores, axis=-1)
        return (scores > 0).astype(np.int64) if self.link == "sigmoid" else self.apply_link(scores)

    def apply_link(self, scores: Array) -> Array:
        """Raw scores as means or probabilities of the same shape; a sigmoid gives the probability of class 1."""
        return LINKS[self.link](scores)


losses: Registry[type[Loss]] = Registry("loss")


def _option(loss: Loss, field: str, allowed: str, test: Callable[[float], bool]) -> None:
    """Refuse an option that is no number or fails the test; keep it as a plain float."""
    value: Any = getattr(loss, field)
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not test(float(value)):
        raise UsageError(f"{loss.name}({field}={value!r}): {field} must be {allowed}")
    object.__setattr__(loss, field, float(value))


# ---------------------------------------------------------------------------------------------------------------- regression

_SCORES = np.array([[0.3, -1.2], [2.5, 0.7], [-0.4, 4.0]])
_VALUES = np.array([[1.0, -1.5], [0.25, 0.5], [3.0, -1.0]])


@losses.declare("mse")
@record(frozen=True)
class mse(Loss):
    """Squared error: the mean of the target.

    l = (s - t)²
    Args: scores (B, K), target (B, K) in any unit. Returns: (B, K) in that unit squared.
    Source: Gauss 1809. Differs: no factor ½ (scikit-learn's MLP has one).

    >>> mse()(np.array([[3.0]]), np.array([[1.0]]))
    array([[4.]])
    """

    examples = (Example({}, _SCORES, _VALUES),)

    def __call__(self, scores: Array, target: Array) -> Array:
        error = scores - target
        return error * error


@losses.declare("mae")
@record(frozen=True)
class mae(Loss):
    """Absolute error: the median of the target.

    l = |s - t|, with derivative 0 at s = t
    Args: scores (B, K), target (B, K) in any unit. Returns: (B, K) in that unit.
    Source: Laplace 1774.

    >>> mae()(np.array([[3.0]]), np.array([[1.0]]))
    array([[2.]])
    """

    examples = (Example({}, _SCORES, _VALUES),)

    def __call__(self, scores: Array, target: Array) -> Array:
        return np.abs(scores - target)


@losses.declare("huber")
@record(frozen=True)
class huber(Loss):
    """Squared near the target, absolute far from it, so that outliers pull with bounded force.

    l = ½ e² if |e| <= delta, else delta (|e| - ½ delta), with e = s - t; the derivative is continuous
    Args: scores (B, K), target (B, K) in any unit; delta > 0 in that unit. Returns: (B, K) in that unit squared.
    Source: Huber 1964.

    >>> huber(delta=1.0)(np.array([[0.5, 3.0]]), np.zeros((1, 2)))
    array([[0.125, 2.5  ]])
    """

    delta: float = 1.0
    examples = (Example({}, _SCORES, _VALUES), Example({"delta": 0.6}, _SCORES, _VALUES))

    def __post_init__(self) -> None:
        _option(self, "delta", "a finite number above 0", lambda x: 0 < x < math.inf)

    def __call__(self, scores: Array, target: Array) -> Array:
        error = scores - target
        size = np.abs(error)
        return np.where(size <= self.delta, 0.5 * error * error, self.delta * (size - 0.5 * self.delta))


@losses.declare("log_cosh")
@record(frozen=True)
class log_cosh(Loss):
    """Like ½ e² near the target and like |e| far from it, smooth everywhere.

    l = log cosh e, with e = s - t; computed as -½ log(1 - tanh² e) where |e| < 1, else as |e| + log(1 + exp(-2|e|)) - log 2:
    neither cancels, and all derivatives at e = 0 are right
    Args: scores (B, K), target (B, K) of order one: e is taken as it is. Returns: (B, K).
    Source: Green 1990.

    >>> log_cosh()(np.array([[0.0, 1000.0]]), np.zeros((1, 2))).round(3)
    array([[  0.   , 999.307]])
    """

    examples = (Example({}, _SCORES, _VALUES),)

    def __call__(self, scores: Array, target: Array) -> Array:
        error = scores - target
        size = np.abs(error)
        near = size < 1
        slope = np.tanh(np.where(near, error, 0.0))
        return np.where(near, -0.5 * np.log1p(-slope * slope), size + np.log1p(np.exp(-2 * size)) - math.log(2))


@losses.declare("poisson")
@record(frozen=True)
class poisson(Loss):
    """The negative log-likelihood of counts; the score is the logarithm of the expected count.

    l = exp(s) - t s, with link exp
    Args: scores (B, K), target (B, K) >= 0, counts or rates. Returns: (B, K).
    Source: McCullagh & Nelder 1989, section 6. Differs: log t! is left out, which moves no gradient, so the loss may be negative.
    Scores above 88 (float32) or 709 (float64) overflow to infinity, as their means do.

    >>> poisson()(np.array([[0.0]]), np.array([[2.0]]))
    array([[1.]])
    """

    link = "exp"
    examples = (Example({}, _SCORES, np.array([[0.0, 1.0], [7.0, 2.5], [3.0, 40.0]])),)

    def __call__(self, scores: Array, target: Array) -> Array:
        return np.exp(scores) - target * scores

    def check_target(self, target: Any, outputs: tuple[int, ...]) -> np.ndarray:
        """As for any number, and not negative."""
        checked = super().check_target(target, outputs)
        _refuse(self, checked, checked < 0, "needs targets of 0 or more", "correct them or choose mse")
        return checked


@losses.declare("quantile")
@record(frozen=True)
class quantile(Loss):
    """The pinball loss: its minimum is the q-quantile of the target.

    l = q e if e >= 0, else (q - 1) e, with e = t - s; computed as (q - ½) e + ½ |e|, so the derivative by s at e = 0 is ½ - q
    Args: scores (B, K), target (B, K) in any unit; 0 < q < 1, the share of targets below the prediction. Returns: (B, K).
    Source: Koenker & Bassett 1978.

    >>> quantile(q=0.9)(np.array([[1.0, 3.0]]), np.array([[2.0, 2.0]]))
    array([[0.9, 0.1]])
    """

    q: float = 0.5
    examples = (Example({}, _SCORES, _VALUES), Example({"q": 0.9}, _SCORES, _VALUES))

    def __post_init__(self) -> None:
        _option(self, "q", "a number between 0 and 1, both excluded", lambda x: 0 < x < 1)

    def __call__(self, scores: Array, target: Array) -> Array:
        error = target - scores
        return (self.q - 0.5) * error + 0.5 * np.abs(error)


# ------------------------------------------------------------------------------------------------------------ classification


@composition(
    "logistic_loss",
    derivative=(lambda g, y, s, t: g * (sigmoid(s) - t), lambda g, y, s, t: -g * s),
    elementwise=True,
    examples=lambda r: [([r.normal(size=(3, 2)), r.uniform(size=(3, 2))], {})],
)
def logistic_loss(scores: Array, target: Array) -> Array:
    """-t log σ(s) - (1 - t) log(1 - σ(s)), without overflow or cancellation; its derivative by s is σ(s) - t."""
    positive = scores > 0
    linear = np.where(positive, (1 - target) * scores, -target * scores)
    return linear + np.log1p(np.exp(np.where(positive, -scores, scores)))


@losses.declare("binary_cross_entropy")
@record(frozen=True)
class binary_cross_entropy(Loss):
    """The negative log-likelihood of yes and no, for one question or several independent ones.

    l = -t log p - (1 - t) log(1 - p), with p = 1 / (1 + exp(-s)); computed as (1 - t) s + log(1 + exp(-s)) where s > 0, else as
    -t s + log(1 + exp(s)), so nothing overflows or cancels and all derivatives at s = 0 are right
    Args: scores (B, K), the log-odds of class 1; target (B, K) in [0, 1]; label_smoothing ε in [0, 1): t becomes (1 - ε) t + ½ ε.
    Returns: (B, K) in nats.
    Source: Bishop 2006, equation 4.90; smoothing: Szegedy et al. 2016, section 7. `decide` says 1 where s > 0.

    >>> binary_cross_entropy()(np.array([[0.0, 1e4]]), np.array([[1.0, 1.0]])).round(4)
    array([[0.6931, 0.    ]])
    """

    label_smoothing: float = 0.0
    link = "sigmoid"
    is_classification = True
    examples = (
        Example({}, _SCORES, np.array([[0.0, 1.0], [1.0, 0.25], [1.0, 0.0]])),
        Example({"label_smoothing": 0.1}, _SCORES, np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])),
    )

    def __post_init__(self) -> None:
        _option(self, "label_smoothing", "a number of at least 0 and less than 1", lambda x: 0 <= x < 1)

    def __call__(self, scores: Array, target: Array) -> Array:
        if self.label_smoothing:
            target = (1 - self.label_smoothing) * target + 0.5 * self.label_smoothing
        return logistic_loss(scores, target)

    def check_target(self, target: Any, outputs: tuple[int, ...]) -> np.ndarray:
        """As for any number, and between 0 and 1."""
        checked = super().check_target(target, outputs)
        remedy = "code classes as 0 and 1; for more than two choose cross_entropy"
        _refuse(self, checked, (checked < 0) | (checked > 1), "needs targets from 0 to 1", remedy)
        return checked


# These are named functions with a written derivative, because that is the shorter one: δ = softmax(s) - t, which nobody would
# guess from the derivative of its parts. Its own derivative, and so every higher one, follows from it.


def _example_rows(r: np.random.Generator) -> list[Any]:
    return [([r.normal(size=(3, 4)), r.dirichlet(np.ones(4), 3)], {})]


@composition(
    "cross_entropy_of_rows",
    derivative=(
        lambda g, y, s, t: np.expand_dims(g, -1) * (softmax(s) * np.sum(t, axis=-1, keepdims=True) - t),
        lambda g, y, s, t: -np.expand_dims(g, -1) * log_softmax(s),
    ),
    examples=_example_rows,
)
def cross_entropy_of_rows(scores: Array, target: Array) -> Array:
    """-Σ_c t_c log softmax(s)_c over the last axis, for rows t of probabilities."""
    return np.sum(target * -log_softmax(scores), axis=-1)


@composition(
    "cross_entropy_of_classes",
    derivative=(lambda g, y, s, t: np.expand_dims(g, -1) * (softmax(s) - one_hot(t, s.shape[-1], s.dtype)), None),
    examples=lambda r: [([r.normal(size=(3, 4)), np.array([3, 0, 1])], {})],
)
def cross_entropy_of_classes(scores: Array, target: Array) -> Array:
    """-log softmax(s)_t over the last axis, for classes t."""
    return np.sum(np.where(one_hot(target, scores.shape[-1], bool), -log_softmax(scores), 0.0), axis=-1)


_LOGITS = np.array([[0.3, -1.2, 2.0], [2.5, 0.7, 0.1], [-0.4, 4.0, 1.0]])
_ROWS = np.array([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.1, 0.1, 0.8]])


@losses.declare("cross_entropy")
@record(frozen=True)
class cross_entropy(Loss):
    """The negative log-likelihood of one class among C, over the last axis.

    l = -Σ_c t_c log p_c, with p = softmax(s) and log p_c = s_c - log Σ_k exp(s_k); for an integer target only its class counts
    Args: scores (B, ..., C); target: integers 0..C-1 (B, ...) or rows of probabilities (B, ..., C); label_smoothing ε in [0, 1):
    t becomes (1 - ε) t + ε / C. Returns: (B, ...) in nats.
    Source: Bishop 2006, equation 4.108; smoothing: Szegedy et al. 2016, section 7.

    >>> cross_entropy()(np.array([[0.0, 0.0], [1e4, 0.0]]), np.array([1, 0])).round(4)
    array([0.6931, 0.    ])
    """

    label_smoothing: float = 0.0
    link = "softmax"
    is_classification = True
    examples = (
        Example({}, _LOGITS, np.array([2, 0, 2])),
        Example({}, _LOGITS, _ROWS),
        Example({"label_smoothing": 0.1}, _LOGITS, np.array([2, 0, 2])),
        Example({"label_smoothing": 0.1}, _LOGITS, _ROWS),
        Example({}, np.stack([_LOGITS, -_LOGITS]), np.array([[2, 0, 1], [0, 1, 1]])),
    )

    def __post_init__(self) -> None:
        _option(self, "label_smoothing", "a number of at least 0 and less than 1", lambda x: 0 <= x < 1)

    def __call__(self, scores: Array, target: Array) -> Array:
        share = self.label_smoothing / scores.shape[-1]
        if target.ndim == scores.ndim:
            return cross_entropy_of_rows(scores, (1 - self.label_smoothing) * target + share if share else target)
        if share:
            return (1 - self.label_smoothing) * cross_entropy_of_classes(scores, target) - share * np.sum(
                log_softmax(scores), axis=-1
            )
        return cross_entropy_of_classes(scores, target)

    def check_target(self, target: Any, outputs: tuple[int, ...]) -> np.ndarray:
        """Integers 0..C-1 (B, ...) as int64, or rows of probabilities (B, ..., C) that add up to 1."""
        if not outputs or outputs[-1] < 2:
            raise UsageError(
                "cross_entropy over fewer than two scores is always 0: give the last layer one output for each class, "
                "or choose binary_cross_entropy for one output"
            )
        checked = _numbers(self, target)
        if checked.shape[1:] == outputs:
            return _distributions(self, checked)
        if checked.shape[1:] != outputs[:-1]:
            raise ShapeError(
                f"cross_entropy over scores of shape {_text(outputs)} takes integers of shape {_text(outputs[:-1])} or rows of "
                f"probabilities of shape {_text(outputs)}; the target has shape {checked.shape}"
            )
        outside = (checked < 0) | (checked >= outputs[-1]) | (checked != np.floor(checked))
        remedy = f"give the last layer one output for each class, or {TEXT_REMEDY}"
        _refuse(self, checked, outside, f"over {outputs[-1]} outputs needs integers from 0 to {outputs[-1] - 1}", remedy)
        return checked.astype(np.int64)


@losses.declare("hinge")
@record(frozen=True)
class hinge(Loss):
    """The margin loss of support vector machines.

    l = 1 - t s where t s < 1, else 0, with derivative 0 at the kink
    Args: scores (B, K), target (B, K) of -1 and +1; `check_target` takes 0 and 1 too and turns 0 into -1. Returns: (B, K).
    Source: Cortes & Vapnik 1995. The scores are no log-odds: there are no probabilities. `decide` says +1 where s > 0, else -1.

    >>> hinge()(np.array([[0.5, -2.0]]), np.array([[1.0, -1.0]]))
    array([[0.5, 0. ]])
    """

    is_classification = True
    examples = (Example({}, _SCORES, np.array([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])),)

    def __call__(self, scores: Array, target: Array) -> Array:
        gap = 1 - target * scores
        return np.where(gap > 0, gap, 0.0)

    def check_target(self, target: Any, outputs: tuple[int, ...]) -> np.ndarray:
        """-1 and +1; a target of nothing but 0 and 1 is turned into these."""
        checked = super().check_target(target, outputs)
        if np.isin(checked, (0, 1)).all():
            checked = 2 * checked - 1
        _refuse(self, checked, np.abs(checked) != 1, "needs targets of -1 and +1 (or of 0 and 1 only)", "recode the two classes")
        return checked

    def decide(self, scores: Array) -> Array:
        """+1 or -1 for each score."""
        return np.where(scores > 0, 1, -1)


@losses.declare("kl_divergence")
@record(frozen=True)
class kl_divergence(Loss):
    """How far softmax(s) is from a given distribution, over the last axis; 0 if they agree.

    l = Σ_c t_c (log t_c - log p_c), with p = softmax(s) and 0 log 0 = 0
    Args: scores (B, ..., C), target (B, ..., C), rows of probabilities. Returns: (B, ...) in nats.
    Source: Kullback & Leibler 1951. Differs: takes raw scores (PyTorch: logarithms of probabilities). Its gradient by the scores
    is that of cross_entropy.

    >>> kl_divergence()(np.array([[0.0, 0.0]]), np.array([[1.0, 0.0]])).round(4)
    array([0.6931])
    """

    link = "softmax"
    is_classification = True
    examples = (Example({}, _LOGITS, _ROWS), Example({}, np.stack([_LOGITS, -_LOGITS]), np.stack([_ROWS, _ROWS[::-1]])))

    def __call__(self, scores: Array, target: Array) -> Array:
        entropy = np.where(target > 0, target * np.log(np.where(target > 0, target, 1.0)), 0.0)
        return np.sum(entropy, axis=-1) + cross_entropy_of_rows(scores, target)

    def check_target(self, target: Any, outputs: tuple[int, ...]) -> np.ndarray:
        """Rows of probabilities (B, ..., C) that add up to 1."""
        checked = _numbers(self, target)
        if checked.shape[1:] != outputs:
            raise ShapeError(f"kl_divergence needs a target of the scores' shape {_text(outputs)}; it has shape {checked.shape}")
        return _distributions(self, checked)


@record(frozen=True)
class CustomLoss(Loss):
    """Any function of (scores, target) written in NumPy: it returns losses per element (B, ...) or a scalar.

    Args: function; link, if the scores are no plain numbers ("sigmoid" and "softmax" make it a classification). A scalar is
    accepted where neither weights nor masks are used. The target may have any shape; integers stay integers.

    >>> CustomLoss(lambda s, t: abs(s - t) ** 3)(np.array([[2.0]]), np.array([[0.0]]))
    array([[8.]])
    """

    function: Callable[[Any, Any], Any]
    link: str = "identity"

    def __post_init__(self) -> None:
        if self.link not in LINKS:
            raise UsageError(f"CustomLoss(link={self.link!r}): the links are {', '.join(LINKS)}")
        object.__setattr__(self, "is_classification", self.link in ("sigmoid", "softmax"))

    @property
    def name(self) -> str:
        """The name of the function."""
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def __call__(self, scores: Array, target: Array) -> Array:
        return self.function(scores, target)

    def check_target(self, target: Any, outputs: tuple[int, ...]) -> np.ndarray:
        """Numeric and finite; (B,) becomes (B, 1) for one output, any other shape is the function's affair."""
        checked = _numbers(self, target)
        checked = np.asarray(target) if np.asarray(target).dtype.kind in "biu" else checked
        return checked[:, None] if checked.ndim == 1 and outputs == (1,) else checked


# -------------------------------------------------------------------------------------------------------------- by name, by file


def resolve(thing: object) -> Loss:
    """The loss that a name, an instance, a class or any function of (scores, target) stands for.

    Raises: `UnknownNameError` for a name that is not registered, `UsageError` for anything else.

    >>> resolve("huber")
    huber(delta=1.0)
    """
    if isinstance(thing, Loss):
        return thing
    if isinstance(thing, str):
        return losses[thing]()
    if isinstance(thing, type) and issubclass(thing, Loss):
        return thing()
    if callable(thing):
        return CustomLoss(thing)
    raise UsageError(f"a loss is a name ({', '.join(losses)}), a Loss, or a function of (scores, target); not {thing!r}")


def config(loss: Loss) -> dict[str, Any]:
    """The loss as plain values that JSON can hold; a function is kept by its name only.

    >>> config(huber(2.0))
    {'name': 'huber', 'delta': 2.0}
    """
    if isinstance(loss, CustomLoss):
        return {"name": "custom", "function": loss.name, "link": loss.link}
    return {"name": loss.name, **vars(loss)}


def from_config(settings: Mapping[str, Any]) -> Loss:
    """The loss that `config` described.

    Raises: `UnknownNameError`; `UsageError` for options that the loss does not have and for a function, which no file can hold.
    """
    options = dict(settings)
    if options.get("name") == "custom":
        function = options.get("function")
        raise UsageError(f"the loss was your own function {function!r}, which no file can hold: pass it again as loss=")
    return losses.make(options)  # type: ignore[no-any-return]  # classes of this registry


# ------------------------------------------------------------------------------------------------------------- links and checks


LINKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda scores: scores,
    "exp": np.exp,
    "sigmoid": sigmoid,
    "softmax": softmax,
}


def _text(outputs: tuple[int, ...]) -> str:
    return f"({', '.join(['B', *map(str, outputs)])}{'' if outputs else ','})"


def _refuse(loss: Loss, target: np.ndarray, bad: np.ndarray, rule: str, remedy: str) -> None:
    """Raise `DataError` about the first bad element, if there is one."""
    if np.any(bad):
        place = np.unravel_index(int(np.argmax(bad)), bad.shape)
        column = f", column {', '.join(str(i) for i in place[1:])}" if len(place) > 1 and bad[0].size > 1 else ""
        value = f'"{target[place]}"' if isinstance(target[place], (str, bytes)) else str(target[place])
        more = f" (and {np.count_nonzero(bad) - 1} more are wrong)" if np.count_nonzero(bad) > 1 else ""
        raise DataError(
            f"{loss.name} {rule}, but row {place[0]}{column} of the target, counted from 0, is {value}{more}: {remedy}"
        )


def _numbers(loss: Loss, target: Any) -> np.ndarray:
    """The target as finite float32 or float64."""
    array = np.asarray(target)
    if not array.ndim:
        raise ShapeError(f"a target holds one row for each row of the data; this one is the single value {array!s}")
    words = TEXT_REMEDY if loss.is_classification else "turn the text into numbers, or choose a loss for classes"
    if array.dtype.kind == "O":
        bad = np.frompyfunc(lambda v: not isinstance(v, (int, float, np.number, np.bool_)), 1, 1)(array).astype(bool)
        text = np.frompyfunc(lambda v: isinstance(v, (str, bytes)), 1, 1)(array).astype(bool)
        _refuse(loss, array, np.asarray(text), "needs numbers", words)
        _refuse(loss, array, np.asarray(bad), "needs numbers", "remove these rows or fill in a number")
    elif array.dtype.kind not in "biuf":
        remedy = words if array.dtype.kind in "SU" else f"the target's dtype is {array.dtype}; convert it to numbers first"
        _refuse(loss, array, np.ones(array.shape, bool), "needs numbers", remedy)
    array = array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)
    _refuse(loss, array, ~np.isfinite(array), "needs finite numbers", "remove these rows or fill in a number")
    return array


def _match(loss: Loss, target: np.ndarray, outputs: tuple[int, ...]) -> np.ndarray:
    """The target in the shape of the scores: a missing axis of one output is added, nothing else is broadcast."""
    if target.shape[1:] == outputs:
        return target
    if (*target.shape[1:], 1) == outputs:
        return target[..., None]
    raise ShapeError(
        f"{loss.name} compares scores of shape {_text(outputs)} with a target of the same shape; the target has shape "
        f"{target.shape}. Give the last layer as many outputs as the target has columns, or reshape the target"
    )


def _distributions(loss: Loss, target: np.ndarray) -> np.ndarray:
    """Rows of probabilities: not negative, each adding up to 1 within 0.001."""
    _refuse(loss, target, target < 0, "needs rows of probabilities", "none may be negative")
    sums = target.sum(axis=-1)
    remedy = "this is the sum of its probabilities; divide each row by its sum"
    _refuse(loss, sums, np.abs(sums - 1) > 1e-3, "needs rows of probabilities that add up to 1", remedy)
    return target
