"""What a network tells: summary and repr, probabilities, scores."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from networks import data

import chainrule as cr
from chainrule import nn


def test_summary() -> None:
    x, t = data(6, 4, 2)
    net = nn.Sequential(nn.Dense(3, "relu"), nn.BatchNorm(), nn.Dense(2))
    net[0].trainable = False
    assert "Dense(3, 'relu', trainable=False)" in net.summary()
    net.fit(x, t, epochs=0)
    lines = net.summary().splitlines()
    rows = {line.split()[0]: line for line in lines[1:4]}
    assert re.search(r"Dense\(3, 'relu', trainable=False\).*\b15\b.*weight \(4, 3\), bias \(3,\)", rows["0"])
    assert re.search(r"BatchNorm\(\).*\b6\b", rows["1"])
    assert re.search(r"Dense\(2\).*\b8\b.*weight \(3, 2\), bias \(2,\)", rows["2"])
    assert re.search(r"29 parameters, 15 of them frozen", lines[-1])


def test_repr_can_be_read_back() -> None:
    net = nn.Sequential(nn.Dense(3, "relu"), nn.Dropout(0.5), nn.Residual(nn.Dense(3)), nn.Reshape(1, 3))
    text = repr(net)
    again = eval(text, vars(nn).copy())
    assert repr(again) == text == "Sequential(Dense(3, 'relu'), Dropout(0.5), Residual(Dense(3)), Reshape(1, 3))"


def test_probabilities_of_classes() -> None:
    x, _ = data()
    labels = np.arange(12) % 3
    net = nn.Dense(3)
    net.fit(x, labels, loss="cross_entropy", epochs=2, dtype="float64")
    e = np.exp(net.predict(x))
    np.testing.assert_allclose(net.predict_proba(x), e / e.sum(axis=1, keepdims=True), rtol=1e-12)


def test_probabilities_of_yes_and_no() -> None:
    x, _ = data()
    net = nn.Dense(1)
    net.fit(x, np.arange(12) % 2, loss="binary_cross_entropy", epochs=2, dtype="float64")
    p = 1 / (1 + np.exp(-net.predict(x)))
    np.testing.assert_allclose(net.predict_proba(x), np.hstack([1 - p, p]), rtol=1e-12)


def test_probabilities_of_several_labels() -> None:
    x, _ = data()
    net = nn.Dense(3)
    net.fit(x, np.eye(3)[np.arange(12) % 3], loss="binary_cross_entropy", epochs=2, dtype="float64")
    np.testing.assert_allclose(net.predict_proba(x), 1 / (1 + np.exp(-net.predict(x))), rtol=1e-12)


@pytest.mark.parametrize(
    "loss", ["mse", "hinge", "poisson", lambda s, t: (s - t) ** 2], ids=["mse", "hinge", "poisson", "function"]
)
def test_no_probabilities_without_a_classifier(loss: Any) -> None:
    x, _ = data()
    net = nn.Dense(1)
    net.fit(x, np.ones(12), loss=loss, epochs=1)
    with pytest.raises(cr.UsageError, match=r"probabilities.*cross_entropy"):
        net.predict_proba(x)


def test_before_the_first_use() -> None:
    x, t = data()
    net = nn.Sequential(nn.Dense(3), nn.Dropout(0.1))
    for call in (net.predict, net, lambda x: net.evaluate(x, t)):
        with pytest.raises(cr.NotBuiltError, match="fit"):
            call(x)
    with pytest.raises(cr.UsageError, match="train"):
        net.predict_proba(x)


def test_evaluate() -> None:
    x, t = data()
    net = nn.Sequential(nn.Dense(4, "tanh"), nn.BatchNorm(), nn.Dropout(0.5), nn.Dense(2))
    net.fit(x, t, epochs=2, dtype="float64")
    y = net.predict(x)
    scores = net.evaluate(x, t, metrics=("rmse", "mae", "r2"))
    assert list(scores) == ["loss", "rmse", "mae", "r2"]
    assert all(type(value) is float for value in scores.values())
    assert scores["loss"] == pytest.approx(np.mean((y - t) ** 2), rel=1e-12)
    assert scores["rmse"] == pytest.approx(math.sqrt(np.mean((y - t) ** 2)), rel=1e-12)
    assert scores["mae"] == pytest.approx(np.mean(np.abs(y - t)), rel=1e-12)
    assert scores["r2"] == pytest.approx(
        np.mean(1 - ((y - t) ** 2).sum(axis=0) / ((t - t.mean(axis=0)) ** 2).sum(axis=0)), rel=1e-12
    )
    assert net.evaluate(x, t, loss="mae")["loss"] == pytest.approx(np.mean(np.abs(y - t)), rel=1e-12)
    w = np.arange(12.0)
    weighted = net.evaluate(x, t, sample_weight=w, metrics=("mae",))
    assert weighted["loss"] == pytest.approx(np.sum(w[:, None] * (y - t) ** 2) / (2 * w.sum()), rel=1e-12)
    assert weighted["mae"] == pytest.approx(np.sum(w[:, None] * np.abs(y - t)) / (2 * w.sum()), rel=1e-12)


def test_evaluate_of_a_classifier() -> None:
    x, _ = data()
    labels = np.arange(12) % 3
    net = nn.Dense(3)
    net.fit(x, labels, loss="cross_entropy", epochs=2, dtype="float64")
    p = net.predict_proba(x)
    scores = net.evaluate(
        x, labels, metrics=("accuracy", "log_loss", lambda prediction, target: float(np.sum(prediction != target)))
    )
    assert scores["loss"] == pytest.approx(-np.mean(np.log(p[np.arange(12), labels])), rel=1e-12)
    assert scores["accuracy"] == np.mean(p.argmax(axis=1) == labels)
    assert list(scores.values())[-1] == np.sum(p.argmax(axis=1) != labels)
