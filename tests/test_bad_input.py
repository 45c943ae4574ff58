"""What bad input gets: an error that says what is wrong, where and what to do, and a network that has lost nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import chainrule as cr
from chainrule import nn

Array = np.ndarray

X = np.random.default_rng(0).normal(size=(6, 4))
Y = np.random.default_rng(1).normal(size=(6, 2))
LABELS = np.array([0, 1, 2, 0, 1, 2])


def state(net: nn.Module) -> dict[str, Array]:
    return {**net.parameters, **net.statistics}


def assert_same(a: dict[str, Array], b: dict[str, Array]) -> None:
    assert list(a) == list(b)
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)


def network(outputs: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Dense(5, "tanh"), nn.BatchNorm(), nn.Dense(outputs))


def but(a: Array, at: Any, value: Any) -> Array:
    """A copy with other elements at one place."""
    copied = a.copy()
    copied[at] = value
    return copied


class Bad(NamedTuple):
    """Arguments of `fit` that are wrong, and what must be said."""

    what: str
    said: str
    error: type[Exception] = cr.UsageError
    x: Any = X
    y: Any = Y
    options: Any = None
    outputs: int = 2


def options(what: str, said: str, error: type[Exception] = cr.UsageError, **given: Any) -> Bad:
    return Bad(what, said, error, options=given)


MASKED = np.ma.masked_array(X, mask=but(np.zeros(X.shape, bool), ([2, 4], [0, 1]), True))
CLASSES = {"loss": "cross_entropy"}

BAD_DATA = [
    Bad("lengths of x and y", r"x has 6 rows.*y has 5 rows", cr.ShapeError, y=Y[:5]),
    Bad("columns of y", r"\(B, 2\).*\(6, 3\)", cr.ShapeError, y=np.ones((6, 3))),
    Bad("y is not broadcast", r"\(B, 2\).*\(6, 1\)", cr.ShapeError, y=Y[:, :1]),
    Bad("y of one axis for two outputs", r"\(B, 2\).*\(6,\)", cr.ShapeError, y=Y[:, 0]),
    Bad("y of three axes", r"\(B, 2\).*\(6, 2, 1\)", cr.ShapeError, y=Y[..., None]),
    Bad("NaN in x", r"x holds 1 value .*row 3, column 1 \(nan\)", cr.DataError, x=but(X, (3, 1), np.nan)),
    Bad("infinity in x", r"x holds 3 values .*row 0, column 2 \(-inf\)", cr.DataError, x=but(X, ([0, 4, 5], [2, 0, 3]), -np.inf)),
    Bad("both infinities in x", r"x holds 2 values .*row 1, column 0", cr.DataError, x=but(X, ([1, 2], [0, 1]), [np.inf, -np.inf])),
    Bad("NaN in single precision", r"x holds 1 value", cr.DataError, x=but(X.astype(np.float32), (5, 3), np.nan)),
    Bad("NaN in half precision", r"x holds 1 value", cr.DataError, x=but(X.astype(np.float16), (5, 3), np.nan)),
    Bad("masked values in x", r"x holds 2 values that are masked, first in row 2, column 0.*fill", cr.DataError, x=MASKED),
    Bad("masked values in y", r"y holds 2 values that are masked, first in row 2, column 0", cr.DataError, y=MASKED[:, :2]),
    Bad("missing value in x", r"x .*row 2.*column 1|x holds.*None", cr.DataError, x=but(X.astype(object), (2, 1), None)),
    Bad("NaN in y", r"row 4, column 1.*nan", cr.DataError, y=but(Y, (4, 1), np.nan)),
    Bad("infinity in y", r"row 2, column 0.*inf", cr.DataError, y=but(Y, (2, 0), np.inf)),
    Bad("text in x", r"'red'.*text", cr.DataError, x=but(X.astype(object), (1, 1), "red")),
    Bad("all of x is text", r"text", cr.DataError, x=X.astype(str)),
    Bad("dates in x", r"not numbers", cr.DataError, x=X.astype("datetime64[s]")),
    Bad("complex x", r"complex", cr.DataError, x=X + 1j),
    Bad("ragged x", r"rows differ in length", cr.DataError, x=[[1.0, 2.0], [1.0]], y=Y[:2]),
    Bad("x is a number", r"x is a single number", cr.DataError, x=3.0),
    Bad("x is None", r"x .*None|None.*x", cr.DataError, x=None),
    Bad("no rows", r"x is empty \(shape \(0, 4\)\)", cr.DataError, x=X[:0], y=Y[:0]),
    Bad("no columns", r"x is empty \(shape \(6, 0\)\)", cr.DataError, x=X[:, :0]),
    Bad("no inputs", r"no input", cr.DataError, x={}),
    Bad("no inputs in a tuple", r"no input", cr.DataError, x=()),
    Bad("y is missing", r"target y", cr.DataError, y=None),
    Bad("y is a number", r"y is a single number", cr.DataError, y=1.0),
    Bad("ragged y", r"y|target", cr.DataError, y=[[1.0, 2.0]] * 5 + [[1.0]]),
    Bad("text in y", r"row 3.*'?\"?high", cr.DataError, y=but(Y.astype(object), (3, 0), "high")),
    Bad("inputs of different length", r"x\.0 has 6 rows.*x\.1 has 5 rows", cr.ShapeError, x=(X, X[:5])),
    Bad("NaN in a named input", r"x\.b .*row 2, column 0", cr.DataError, x={"a": X, "b": but(X, (2, 0), np.nan)}),
    Bad("NaN in the rows of an image", r"row 1, at \(2, 3\)", cr.DataError, x=but(np.ones((6, 4, 5)), (1, 2, 3), np.nan)),
    Bad("text labels", r'row 0.*"?cat"?.*np\.unique', cr.DataError, y=np.array(["cat", "dog"] * 3), options=CLASSES),
    Bad("a label too large", r"0 to 1.*row 2.*2", cr.DataError, y=LABELS, options=CLASSES),
    Bad("a negative label", r"0 to 1.*row 5.*-1", cr.DataError, y=but(LABELS % 2, 5, -1), options=CLASSES),
    Bad("half a label", r"row 1.*0\.5", cr.DataError, y=but(LABELS % 2.0, 1, 0.5), options=CLASSES),
    Bad("no label", r"row 1.*nan", cr.DataError, y=but(LABELS % 2.0, 1, np.nan), options=CLASSES),
    Bad("rows that are no probabilities", r"row 3", cr.DataError, y=but(np.full((6, 2), 0.5), (3, 0), 0.9), options=CLASSES),
    Bad("negative probabilities", r"row 3", cr.DataError, y=but(np.full((6, 2), 0.5), 3, [-0.5, 1.5]), options=CLASSES),
    Bad("no yes or no", r"row 2.*2", cr.DataError, y=but(np.ones((6, 2)), (2, 1), 2.0), options={"loss": "binary_cross_entropy"}),
    Bad("a negative count", r"row 4", cr.DataError, y=but(np.ones((6, 2)), (4, 1), -1.0), options={"loss": "poisson"}),
    Bad("no sign", r"row 4", cr.DataError, y=but(np.ones((6, 2)), (4, 1), 0.5), options={"loss": "hinge"}),
]  # fmt: skip

BAD_OPTIONS = [
    options("misspelt loss", r'no loss called "msee".*Did you mean "mse"', cr.UnknownNameError, loss="msee"),
    options("misspelt optimizer", r'no optimizer called "adamm".*Did you mean "adam', cr.UnknownNameError, optimizer="adamm"),
    options("swapped letters", r'no optimizer called "adma".*Did you mean "adam"', cr.UnknownNameError, optimizer="adma"),
    options("nothing near", r'no loss called "zzz"\. Known: .*mse', cr.UnknownNameError, loss="zzz"),
    options("misspelt metric", r'no metric called "acuracy".*Did you mean "accuracy"', cr.UnknownNameError, metrics=("acuracy",)),
    options("misspelt backend", r'no backend called "refrence".*Did you mean "reference"', cr.UnknownNameError, backend="refrence"),
    options("dtype", r'"float32" or "float64".*float16', dtype="float16"),
    options("whole numbers as dtype", r'"float32" or "float64"', dtype="int32"),
    options("loss", r"loss", loss=3),
    options("optimizer", r"optimizer", optimizer=0.1),
    options("metric", r"metric", metrics=(3,)),
    options("a metric of another task", r"accuracy.*mse|mse.*accuracy", metrics=("accuracy",)),
    options("epochs below 0", r"epochs.*-1", epochs=-1),
    options("half an epoch", r"epochs.*2\.5", epochs=2.5),
    options("epochs as text", r"epochs.*'3'", epochs="3"),
    options("batch of 0", r"batch_size.*0", batch_size=0),
    options("batch of 2.5", r"batch_size.*2\.5", batch_size=2.5),
    options("all rows as validation", r"validation.*1\.0", validation=1.0),
    options("negative validation", r"validation.*-0\.1", validation=-0.1),
    options("validation of four", r"validation", validation=(X, Y, Y, Y)),
    options("validation with lengths that are none", r"lengths.*6 rows.*\(6, 2\)", cr.ShapeError, validation=(X, Y, Y)),
    options("validation as text", r"validation", validation="0.1"),
    options("validation of other columns", r"\(3,\).*\(4,\)", cr.ShapeError, validation=(X[:, :3], Y)),
    options("validation of other lengths", r"6 rows.*4 rows", cr.ShapeError, validation=(X, Y[:4])),
    options("NaN in validation", r"row 2, column 1", cr.DataError, validation=(but(X, (2, 1), np.nan), Y)),
    options("negative seed", r"seed.*-1", seed=-1),
    options("seed of 1.5", r"seed.*1\.5", seed=1.5),
    options("weights of another length", r"6 rows.*\(5,\)", cr.ShapeError, sample_weight=np.ones(5)),
    options("weights of two axes", r"6 rows.*\(6, 2\)", cr.ShapeError, sample_weight=np.ones((6, 2))),
    options("negative weight", r"sample_weight.*negative", cr.DataError, sample_weight=[1, 1, 1, -1, 1, 1]),
    options("NaN as weight", r"sample_weight.*finite", cr.DataError, sample_weight=[1, 1, 1, np.nan, 1, 1]),
    options("no weight at all", r"sample_weight.*0", cr.DataError, sample_weight=np.zeros(6)),
    options("weights as text", r"sample_weight", cr.ChainruleError, sample_weight=["a"] * 6),
    options("classes of numbers", r"class_weight", cr.ChainruleError, class_weight="balanced"),
    options("misspelt balance", r"class_weight.*balanced", cr.ChainruleError, class_weight="balancd", **CLASSES),
    options("patience below 0", r"patience.*-1", early_stopping=-1),
    options("stopping as text", r"early.stopping.*'10'", early_stopping="10"),
    options("stopping by what is not there", r"acuracy.*loss", early_stopping=cr.EarlyStopping(3, monitor="acuracy")),
    options("stopping by no validation", r"validation_loss", early_stopping=cr.EarlyStopping(3, monitor="validation_loss")),
    options("callback", r"callback", callbacks=(3,)),
    options("a callback alone", r"callback", callbacks=3),
    options("threads below 1", r"threads.*0", threads=0),
    options("more threads than any machine has", r"threads is at most.*1000000000", threads=10**9),
    options("weights beyond the precision", r"weights of rows.*1e\+300.*float32.*scale", cr.DataError, sample_weight=np.full(6, 1e300)),
    options("a sum of weights beyond the precision", r"weights of rows.*float32", cr.DataError, sample_weight=np.full(6, 3e38)),
    options("weights that the precision takes for 0", r"weights of rows.*1e-300", cr.DataError, sample_weight=np.full(6, 1e-300)),
    options("masked weights", r"sample_weight holds 1 value that is masked.*row 2", cr.DataError, sample_weight=MASKED[:, 0]),
    options("a scalar loss with weights", r"weight", loss=lambda s, t: np.mean((s - t) ** 2), sample_weight=np.ones(6)),
    options("a loss that keeps no rows", r"\(2,\).*6 rows|6 rows.*\(2,\)", cr.ShapeError, loss=lambda s, t: np.mean((s - t) ** 2, axis=0)),
    options("a loss that does not fit", r"\(6, 3\).*\(2, 3\)", cr.ShapeError, loss=lambda s, t: s @ np.ones((2, 3)) @ np.ones((2, 3))),
    options("a loss that returns nothing", r"loss.*None", cr.ChainruleError, loss=lambda s, t: None),
    options("a loss that branches", r"np\.where|scan", cr.TraceError, loss=lambda s, t: s if np.sum(s) > 0 else t),
]  # fmt: skip

BAD_OPTIONS += [
    options("a rate beyond the precision", r"SGD\(learning_rate=1e\+300\): float32 ends at 3\.4e\+38.*float64", optimizer=cr.SGD(1e300)),
    options("an option beyond the precision", r"Adam\(clip_norm=1e\+300\): float32 ends", optimizer=cr.Adam(clip_norm=1e300)),
    options("a schedule beyond the precision", r"SGD\(learning_rate=1e\+39\)", optimizer=cr.SGD(cr.schedules.cosine(1e39))),
]  # fmt: skip

BAD = BAD_DATA + BAD_OPTIONS


@pytest.mark.parametrize("number", [10**400, -(10**400)])
def test_whole_numbers_that_no_float_holds(number: int) -> None:
    with pytest.raises(cr.UsageError, match=r"SGD\(learning_rate=.*finite number"):
        cr.SGD(number)
    with pytest.raises(cr.UsageError, match=r"momentum must be"):
        cr.SGD(0.1, momentum=number)


@pytest.mark.parametrize("units", [10**12, 10**30])
def test_layers_larger_than_any_memory(units: int) -> None:
    net = nn.Sequential(nn.Dense(units), nn.Dense(2))
    with pytest.raises(cr.UsageError, match=r'"0\.weight" of shape \(4, 10+\) takes .*fewer units'):
        net.fit(X, Y, epochs=1)
    assert not net.built


def spoilt(bad: Bad, net: nn.Module) -> str:
    given = {"epochs": 2, "verbose": False, **(bad.options or {})}
    with pytest.raises(bad.error, match=bad.said) as caught:
        net.fit(bad.x, LABELS % 2 if bad.options == {"class_weight": "balancd", **CLASSES} else bad.y, **given)
    assert isinstance(caught.value, cr.ChainruleError)
    assert isinstance(caught.value, (ValueError, TypeError))  # what a caller would catch anyway
    return str(caught.value)


@pytest.mark.parametrize("bad", BAD, ids=[bad.what for bad in BAD])
def test_a_new_network_stays_new(bad: Bad) -> None:
    net, untouched = network(), network()
    spoilt(bad, net)
    assert not net.built
    assert state(net) == {}
    for each in (net, untouched):
        each.fit(X[:, :3], Y, epochs=1, seed=3)
    assert_same(state(net), state(untouched))


# A network that is built says more about the shapes of its inputs: see WRONG_ROWS.
NEW_ONLY = ("no columns", "inputs of different length", "NaN in the rows of an image", "no inputs", "no inputs in a tuple")
BAD_LATER = [bad for bad in BAD if bad.what not in NEW_ONLY]


@pytest.mark.parametrize("bad", BAD_LATER, ids=[bad.what for bad in BAD_LATER])
def test_a_trained_network_loses_nothing(bad: Bad) -> None:
    nets = [network(), network()]
    for net in nets:
        net.fit(X, Y, epochs=3, optimizer=cr.SGD(0.05, momentum=0.9))
    if bad.options and "dtype" in bad.options:
        with pytest.raises(cr.UsageError, match="float32"):
            nets[0].fit(X, Y, **bad.options)
    elif bad.what == "NaN in a named input":
        with pytest.raises(cr.ChainruleError):
            nets[0].fit(bad.x, Y)
    else:
        spoilt(bad, nets[0])
    assert_same(state(nets[0]), state(nets[1]))
    runs = [net.fit(X, Y, epochs=2) for net in nets]  # slots, step numbers and the choice of optimizer are still there too
    assert_same(state(nets[0]), state(nets[1]))
    assert runs[0].loss == runs[1].loss


def test_a_bad_call_with_another_optimizer_keeps_the_slots() -> None:
    nets = [network(), network()]
    for net in nets:
        net.fit(X, Y, epochs=3, optimizer=cr.SGD(0.05, momentum=0.9))
    for bad in (
        {"backend": "refrence"},
        {"loss": lambda s, t: None},
        {"callbacks": (3,)},
        {"early_stopping": cr.EarlyStopping(monitor="x")},
    ):
        with pytest.raises(cr.ChainruleError):
            nets[0].fit(X, Y, optimizer=cr.Adam(), **bad)
    for net in nets:
        net.fit(X, Y, epochs=2)
    assert_same(state(nets[0]), state(nets[1]))


def test_a_trained_part_survives_a_failing_fit_of_a_new_whole() -> None:
    """Fine-tuning: a body that has been trained stands in a second network, whose first call is wrong."""
    body = nn.Sequential(nn.Dense(5, "tanh"), nn.Dense(3))
    body.fit(X, np.ones((6, 3)), epochs=2)
    before = body.parameters
    whole = nn.Sequential(body, nn.Dense(2))
    with pytest.raises(cr.ShapeError):
        whole.fit(X, np.ones((6, 7)))
    assert_same(body.parameters, before)
    whole.fit(X, Y, epochs=0)
    for name, value in before.items():
        np.testing.assert_array_equal(whole.parameters[f"0.{name}"], value)


# -------------------------------------------------------------------------------------------------- data for a trained network


READERS: dict[str, Callable[[nn.Module, Any, Any], Any]] = {
    "predict": lambda net, x, y: net.predict(x),
    "evaluate": lambda net, x, y: net.evaluate(x, y),
    "gradients": lambda net, x, y: net.gradients(x, y),
    "check_gradients": lambda net, x, y: net.check_gradients(x, y),
    "fit": lambda net, x, y: net.fit(x, y),
    "call": lambda net, x, y: net(x),
}
WRONG_ROWS: list[tuple[str, Any, type[Exception], str]] = [
    ("columns", X[:, :3], cr.ShapeError, r"\(3,\).*\(4,\)"),
    ("one row alone", X[0], cr.ShapeError, r"\(\).*\(4,\)"),
    ("axes", X[..., None], cr.ShapeError, r"\(4, 1\).*\(4,\)"),
    ("two inputs", (X, X), cr.ShapeError, r"x.*x\.0, x\.1"),
    ("named input", {"table": X}, cr.ShapeError, r"x.*x\.table"),
    ("NaN", but(X, (5, 0), np.nan), cr.DataError, r"row 5, column 0"),
    ("text", X.astype(str), cr.DataError, r"text"),
]


@pytest.mark.parametrize("reader", list(READERS))
@pytest.mark.parametrize(("x", "error", "said"), [w[1:] for w in WRONG_ROWS], ids=[w[0] for w in WRONG_ROWS])
def test_rows_that_a_network_was_not_built_for(reader: str, x: Any, error: type[Exception], said: str) -> None:
    net = network()
    net.fit(X, Y, epochs=1)
    with pytest.raises(error, match=said):
        READERS[reader](net, x, Y)


@pytest.mark.parametrize("reader", list(READERS))
def test_no_rows_for_a_trained_network(reader: str) -> None:
    """They have no mean, and nothing can be learnt from them; but they can be predicted."""
    net = network()
    net.fit(X, Y, epochs=1)
    if reader in ("predict", "call"):
        assert READERS[reader](net, X[:0], Y[:0]).shape == Y[:0].shape
        return
    with pytest.raises(cr.DataError, match="to learn from" if reader == "fit" else "to take the mean over"):
        READERS[reader](net, X[:0], Y[:0])


def test_wrong_names_and_numbers_of_inputs() -> None:
    class Two(nn.Module):
        def __call__(self, a: Any, b: Any) -> Any:
            return a * b * self.parameter("w", (4,), "ones")

    net = Two()
    for wrong in (X, (X,), (X, X, X), {"a": X}, {"a": X, "c": X}, {"a": X, "b": X, "c": X}):
        with pytest.raises((cr.ChainruleError, TypeError), match=r"\bb\b|\bc\b|argument"):
            net.fit(wrong, X)
        assert not net.built
    net.fit({"a": X, "b": X}, X, epochs=1)
    with pytest.raises(cr.ShapeError, match=r"x\.a, x\.b.*x\.a, x\.c"):
        net.predict({"a": X, "c": X})


@pytest.mark.parametrize("reader", ["evaluate", "gradients", "check_gradients", "fit"])
def test_a_target_that_does_not_fit(reader: str) -> None:
    net = network()
    net.fit(X, Y, epochs=1)
    for y, error, said in (
        (Y[:5], cr.ShapeError, r"6 rows.*5 rows"),
        (Y[:, :1], cr.ShapeError, r"\(B, 2\).*\(6, 1\)"),
        (but(Y, (1, 1), np.nan), cr.DataError, r"row 1, column 1"),
        (None, cr.DataError, r"target"),
    ):
        with pytest.raises(error, match=said):
            READERS[reader](net, X, y)


def test_numbers_that_the_precision_cannot_hold() -> None:
    """1e300 is finite, but not in float32: said as such, rather than as a divergence or a warning of NumPy's."""
    with pytest.raises(cr.DataError, match=r"row 2, column 1.*float32|float32.*row 2, column 1"):
        network().fit(but(X, (2, 1), 1e300), Y)
    with pytest.raises(cr.DataError, match=r"row 2, column 1.*float32|float32.*row 2, column 1"):
        network().fit(X, but(Y, (2, 1), 1e300))
    network().fit(but(X, (2, 1), 1e30), Y, epochs=0)
    net = network()
    net.fit(X, Y, epochs=1, dtype="float64")
    assert np.isfinite(net.predict(but(X, (2, 1), 1e300))).all()


def test_large_finite_numbers_are_no_infinities() -> None:
    """Their sum overflows in float32; each of them is fine."""
    x = np.full((6, 4), 3e38, np.float32)
    net = nn.Sequential(lambda x: x * 1e-38, nn.Dense(2))
    assert np.isfinite(net.fit(x, Y, epochs=2).loss).all()


# ----------------------------------------------------------------------------------------------------------- lines of the user


def line_of(text: str) -> int:
    """The number of the line in this file that has the comment `text`."""
    lines = [n for n, line in enumerate(Path(__file__).read_text(encoding="utf-8").splitlines(), 1) if f"# {text}" in line]
    assert len(lines) == 1, lines
    return lines[0]


class Head(nn.Module):
    def __call__(self, x: Any) -> Any:
        w = self.parameter("weight", (3, 2))
        return x @ w  # the rows have 5 numbers


class Adds(nn.Module):
    def __init__(self) -> None:
        self.a, self.b = nn.Dense(3), nn.Dense(4)

    def __call__(self, x: Any) -> Any:
        return self.a(x) + self.b(x)  # 3 and 4 units


def test_a_shape_error_names_shapes_layer_file_and_line() -> None:
    net = nn.Sequential(nn.Dense(5), nn.Sequential(nn.Dropout(0.1), Head()))
    with pytest.raises(cr.ShapeError) as caught:
        net.fit(X, Y)
    said = str(caught.value)
    assert re.search(r"\(\w+, 5\).*\(3, 2\)", said)
    assert 'layer "1.1"' in said
    assert f"test_bad_input.py:{line_of('the rows have 5 numbers')}" in said

    with pytest.raises(cr.ShapeError) as caught:
        nn.Sequential(nn.Dense(5), Adds()).fit(X, Y)
    said = str(caught.value)
    assert re.search(r"\(\w+, 3\).*\(\w+, 4\)", said)
    assert 'layer "1"' in said
    assert f"test_bad_input.py:{line_of('3 and 4 units')}" in said


def test_a_shape_error_in_a_function_names_shapes_and_line() -> None:
    def f(w: Any) -> Any:
        return np.sum(X @ w)  # w has 3 rows

    with pytest.raises(cr.ShapeError) as caught:
        cr.grad(f)(np.ones((3, 2)))
    said = str(caught.value)
    assert re.search(r"\(6, 4\).*\(3, 2\)", said)
    assert f"test_bad_input.py:{line_of('w has 3 rows')}" in said


def test_a_shape_error_in_a_loss_names_the_line() -> None:
    def loss(s: Any, t: Any) -> Any:
        return s - np.ones((1, 3))  # there are two scores

    with pytest.raises(cr.ShapeError) as caught:
        network().fit(X, Y, loss=loss)
    said = str(caught.value)
    assert re.search(r"\(\w+, 2\).*\(1, 3\)", said)
    assert f"test_bad_input.py:{line_of('there are two scores')}" in said


# ---------------------------------------------------------------------------------------------------------- names and arguments

NAMES = [
    (lambda: nn.layers["Densse"], "layer", "Dense"),
    (lambda: nn.layers["batchnorm"], "layer", "BatchNorm"),
    (lambda: nn.Dense(3, "rellu"), "activation", "relu"),
    (lambda: nn.Dense(3, init="glorot_unifrom"), "initializer", "glorot_uniform"),
    (lambda: cr.losses.losses["cros_entropy"], "loss", "cross_entropy"),
    (lambda: cr.optim.optimizers["rmspropp"], "optimizer", "rmsprop"),
    (lambda: cr.schedules.schedules["cosin"], "schedule", "cosine"),
]


@pytest.mark.parametrize(("look_up", "kind", "meant"), NAMES, ids=[meant for _, _, meant in NAMES])
def test_did_you_mean(look_up: Callable[[], Any], kind: str, meant: str) -> None:
    with pytest.raises(cr.UnknownNameError, match=rf'there is no {kind} called ".*Did you mean "{meant}"') as caught:
        look_up()
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, KeyError)
    assert not str(caught.value).startswith(("'", '"'))  # as a KeyError would print itself


@pytest.mark.parametrize(("name", "meant"), [("Denss", "Dense"), ("LayerNrom", "LayerNorm"), ("Sequental", "Sequential")])
def test_a_misspelt_layer_as_an_attribute(name: str, meant: str) -> None:
    with pytest.raises(AttributeError, match=f'Did you mean "{meant}"'):
        getattr(nn, name)
    assert not hasattr(nn, "__wrapped__")


def test_labels_for_which_class_weight_has_none() -> None:
    with pytest.raises(cr.ChainruleError, match=r"class_weight.*class 2"):
        nn.Dense(3).fit(X, LABELS, loss="cross_entropy", class_weight={0: 1.0, 1: 2.0})
    for wrong in ({0: 1.0, 1: -2.0, 2: 1.0}, {0: np.nan, 1: 1.0, 2: 1.0}, {"a": 1.0}, 3):
        with pytest.raises(cr.ChainruleError, match=r"class_weight"):
            nn.Dense(3).fit(X, LABELS, loss="cross_entropy", class_weight=wrong)


def test_a_class_in_predict_never_seen_is_no_error_but_one_outside_is() -> None:
    net = nn.Dense(3)
    net.fit(X, np.array([0, 1, 0, 1, 0, 1]), loss="cross_entropy", epochs=1)
    assert np.isfinite(net.evaluate(X, LABELS)["loss"])
    with pytest.raises(cr.DataError, match=r"0 to 2.*row 4.*3"):
        net.evaluate(X, but(LABELS, 4, 3))


def test_one_row() -> None:
    assert len(nn.Dense(2).fit(X[:1], Y[:1], epochs=2).loss) == 2
    with pytest.raises(cr.UsageError, match="2 rows"):
        nn.Dense(2).fit(X[:1], Y[:1], validation=0.5)


def test_check_gradients_and_gradients_say_what_they_need() -> None:
    for call in (nn.Dense(2).gradients, nn.Dense(2).check_gradients):
        with pytest.raises(cr.UsageError, match='loss="mse"'):
            call(X, Y)
    net = network()
    net.fit(X, Y, epochs=1)
    with pytest.raises(cr.UsageError, match="float16"):
        net.gradients(X, Y, dtype="float16")
    with pytest.raises(cr.UnknownNameError, match='Did you mean "mse"'):
        net.evaluate(X, Y, loss="msee")
    with pytest.raises(cr.UnknownNameError, match='Did you mean "reference"'):
        net.predict(X, backend="refrence")


def test_errors_can_be_copied_and_shown() -> None:
    """What notebooks and process pools do with exceptions."""
    for error in (
        cr.ShapeError("a"),
        cr.DataError("b"),
        cr.UnknownNameError("c"),
        cr.DivergenceError("d", None),
        cr.UsageError("e"),
        cr.BudgetError("f", 7),
    ):
        assert str(copy.copy(error)) == str(error)
