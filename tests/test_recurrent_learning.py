"""What recurrent networks must learn."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from recurrent import Array, data, made

import chainrule as cr
from chainrule import nn


def adding(rows: int, steps: int, seed: int) -> tuple[Array, Array]:
    """Numbers, two of them marked: what is their sum? The variance of the answer is 1/6. (Hochreiter & Schmidhuber 1997.)"""
    r = np.random.default_rng(seed)
    marks = np.zeros((rows, steps))
    first, second = r.integers(0, steps // 2, rows), r.integers(steps // 2, steps, rows)
    marks[np.arange(rows), first] = marks[np.arange(rows), second] = 1.0
    numbers = r.uniform(size=(rows, steps))
    x = np.stack([numbers, marks], axis=-1)
    return x, np.sum(numbers * marks, axis=1)[:, None]


def until(loss: float) -> Callable[[Any], None]:
    return lambda run: run.stop() if run.loss[-1] < loss else None


def irnn() -> nn.Module:
    return nn.RNN(64, "relu", init=cr.initializers.normal(0.001), init_hidden="identity")


@pytest.mark.parametrize(
    ("layer", "rate", "epochs"),
    [(lambda: nn.LSTM(32), 0.01, 20), (lambda: nn.GRU(32), 0.01, 20), (irnn, 0.001, 60)],
    ids=["LSTM", "GRU", "IRNN"],
)
def test_the_adding_problem_over_a_hundred_steps_is_learnt(layer: Callable[[], nn.Module], rate: float, epochs: int) -> None:
    x, y = adding(5000, 100, 0)
    net = nn.Sequential(layer(), nn.Dense(1))
    rule = cr.Adam(rate, clip_norm=1.0)
    net.fit(x, y, epochs=epochs, batch_size=50, optimizer=rule, callbacks=[until(0.004)])
    assert net.evaluate(*adding(1000, 100, 1))["loss"] < 0.01  # a constant reaches 1/6


def test_a_simple_network_with_small_weights_does_not_learn_the_adding_problem() -> None:
    """The gradient of a mark that lies far back has vanished, which the norms show."""
    x, y = adding(5000, 100, 0)
    small = cr.initializers.normal(0.01)
    net = nn.Sequential(nn.RNN(32, init=small, init_hidden=small), nn.Dense(1))
    net.fit(x, y, epochs=5, batch_size=50, optimizer=cr.Adam(0.001, clip_norm=1.0))
    assert net.evaluate(*adding(1000, 100, 1))["loss"] == pytest.approx(1 / 6, rel=0.1)
    norms = net.gradients(x[:50], y[:50], through_time=True)["0.hidden"]
    assert norms[0] < 1e-6 * norms[-1]


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_a_symbol_is_remembered_over_a_lag(kind: str) -> None:
    """The first of 20 symbols, the others being noise, is asked for at the end."""
    symbols = np.random.default_rng(0).integers(0, 4, (1000, 20))
    net = nn.Sequential(nn.Embedding(4, 8), made(kind, 32), nn.Dense(4))
    rule = cr.Adam(0.003, clip_norm=1.0)
    net.fit(symbols[:800], symbols[:800, 0], loss="cross_entropy", epochs=100, optimizer=rule, callbacks=[until(0.02)])
    assert net.evaluate(symbols[800:], symbols[800:, 0], metrics=["accuracy"])["accuracy"] > 0.97


def test_the_parity_of_bits_is_learnt_at_each_step_of_sequences_of_any_length() -> None:
    r = np.random.default_rng(0)
    bits = [r.integers(0, 2, n) for n in r.integers(1, 12, 600)]
    x, y = [b[:, None] * 2.0 - 1 for b in bits], [(np.cumsum(b) % 2)[:, None] for b in bits]
    net = nn.Sequential(nn.GRU(16, True), nn.Dense(1))
    options = {"loss": "binary_cross_entropy", "optimizer": cr.Adam(0.01), "epochs": 100}
    net.fit(x[:500], y[:500], callbacks=[until(0.01)], **options)
    assert net.evaluate(x[500:], y[500:], metrics=["accuracy"])["accuracy"] == 1.0
    longer = r.integers(0, 2, (20, 40))  # a rule, not a table
    assert (
        net.evaluate(longer[..., None] * 2.0 - 1, (np.cumsum(longer, axis=1) % 2)[..., None], metrics=["accuracy"])["accuracy"]
        > 0.95
    )


def test_the_words_of_the_summary_and_errors_name_layers() -> None:
    net = nn.Sequential(nn.Bidirectional(nn.LSTM(3)), nn.Dense(2))
    net.fit(data(), data()[:, 0], epochs=0)
    assert re.search(r"0\.backward +LSTM\(3\)", net.summary())
