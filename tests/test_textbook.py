"""The example that every textbook has: a 3-2-1 network of sigmoid units, one step of gradient descent, worked by hand.

Han & Kamber, "Data Mining: Concepts and Techniques", example of backpropagation: units 1 to 3 are the inputs, 4 and 5 hidden, 6 the
output. The book rounds to three digits; here every number is computed again by the book's formulas, and compared to six digits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import chainrule as cr
from chainrule import nn

RATE = 0.9
WEIGHTS = {
    "0.weight": [[0.2, -0.3], [0.4, 0.1], [-0.5, 0.2]],  # w14 w15, w24 w25, w34 w35
    "0.bias": [-0.4, 0.2],  # θ4 θ5
    "1.weight": [[-0.3], [-0.2]],  # w46, w56
    "1.bias": [0.1],  # θ6
}
SAMPLES = [((1, 0, 1), 1.0), ((0, 1, 1), 0.0), ((1, 1, 0), 1.0), ((0, 0, 1), 0.0), ((1, 1, 1), 1.0)]

Weights = dict[str, Any]


def half_squared_error(scores: Any, target: Any) -> Any:
    """E = ½ Σ (T - O)², the book's error."""
    return 0.5 * (target - scores) ** 2


def logistic(net_input: float) -> float:
    return 1 / (1 + math.exp(-net_input))


def forward(p: Weights, x: tuple[float, ...]) -> tuple[float, float, float]:
    """O4, O5, O6: each unit sums its weighted inputs and its bias, and squashes the sum."""
    o4, o5 = (logistic(sum(x[i] * p["0.weight"][i][j] for i in range(3)) + p["0.bias"][j]) for j in range(2))
    return o4, o5, logistic(o4 * p["1.weight"][0][0] + o5 * p["1.weight"][1][0] + p["1.bias"][0])


def errors(p: Weights, x: tuple[float, ...], target: float) -> tuple[float, float, float]:
    """Err6 = O6 (1 - O6) (T - O6); Err_j = O_j (1 - O_j) Err6 w_j6."""
    o4, o5, o6 = forward(p, x)
    e6 = o6 * (1 - o6) * (target - o6)
    return o4 * (1 - o4) * e6 * p["1.weight"][0][0], o5 * (1 - o5) * e6 * p["1.weight"][1][0], e6


def changes(p: Weights, x: tuple[float, ...], target: float) -> Weights:
    """Err_j O_i for each weight and Err_j for each bias, one sample alone: minus the gradient of E."""
    o4, o5, _ = forward(p, x)
    e4, e5, e6 = errors(p, x, target)
    return {
        "0.weight": [[x[i] * e4, x[i] * e5] for i in range(3)],
        "0.bias": [e4, e5],
        "1.weight": [[o4 * e6], [o5 * e6]],
        "1.bias": [e6],
    }


def moved(p: Weights, by: Weights, rate: float = RATE) -> Weights:
    return {name: (np.array(p[name]) + rate * np.array(by[name])).tolist() for name in p}


def network() -> nn.Sequential:
    net = nn.Sequential(nn.Dense(2, "sigmoid"), nn.Dense(1, "sigmoid"))
    net.fit(np.zeros((1, 3)), np.zeros((1, 1)), epochs=0, dtype="float64")
    net.load_parameters(WEIGHTS)
    return net


def assert_close(actual: dict[str, np.ndarray], expected: Weights) -> None:
    assert list(actual) == list(expected)
    for name, value in actual.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-12, atol=1e-15, err_msg=name)


def arrays(samples: list[tuple[tuple[int, ...], float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([x for x, _ in samples], float), np.array([[t] for _, t in samples])


def test_the_hand_computation_gives_the_books_numbers() -> None:
    """Three digits, as printed in the book: outputs, errors and new weights and biases."""
    x, target = SAMPLES[0]
    np.testing.assert_allclose(forward(WEIGHTS, x), (0.332, 0.525, 0.474), atol=5e-4)
    np.testing.assert_allclose(errors(WEIGHTS, x, target), (-0.0087, -0.0065, 0.1311), atol=1e-4)  # the book rounds on the way
    new = moved(WEIGHTS, changes(WEIGHTS, x, target))
    book = {
        "0.weight": [[0.192, -0.306], [0.4, 0.1], [-0.508, 0.194]],
        "0.bias": [-0.408, 0.194],
        "1.weight": [[-0.261], [-0.138]],
        "1.bias": [0.218],
    }
    for name, value in book.items():
        np.testing.assert_allclose(new[name], value, rtol=0, atol=5.1e-4, err_msg=name)


def test_the_same_to_six_digits() -> None:
    """The numbers written out, so that the formulas above are checked too.

    O4 = σ(-0.7) = 0.331812, O5 = σ(0.1) = 0.524979, O6 = σ(-0.104539) = 0.473889
    Err6 = 0.473889 · 0.526111 · 0.526111 = 0.131169
    Err4 = 0.331812 · 0.668188 · 0.131169 · -0.3 = -0.008725, Err5 = 0.524979 · 0.475021 · 0.131169 · -0.2 = -0.006542
    w46 = -0.3 + 0.9 · 0.131169 · 0.331812 = -0.260829, and so on
    """
    x, target = SAMPLES[0]
    net = network()
    assert [f"{o:.6f}" for o in forward(WEIGHTS, x)] == ["0.331812", "0.524979", "0.473889"]
    assert [f"{e:.6f}" for e in errors(WEIGHTS, x, target)] == ["-0.008725", "-0.006542", "0.131169"]
    a = np.array([x], float)
    o6 = net.predict(a).item()
    assert f"{o6:.6f}" == "0.473889"
    net.fit(a, np.array([[target]]), loss=half_squared_error, epochs=1, batch_size=1, optimizer=cr.SGD(RATE))
    six = {name: np.round(value, 6).tolist() for name, value in net.parameters.items()}
    assert six == {
        "0.weight": [[0.192148, -0.305888], [0.4, 0.1], [-0.507852, 0.194112]],
        "0.bias": [-0.407852, 0.194112],
        "1.weight": [[-0.260829], [-0.138025]],
        "1.bias": [0.218052],
    }


def test_forward_backward_and_update_of_one_sample() -> None:
    x, target = SAMPLES[0]
    net = network()
    a, t = arrays(SAMPLES[:1])
    assert net.predict(a).item() == pytest.approx(forward(WEIGHTS, x)[2], rel=1e-12)
    assert_close({name: -g for name, g in net.gradients(a, t, loss=half_squared_error).items()}, changes(WEIGHTS, x, target))
    run = net.fit(a, t, loss=half_squared_error, epochs=1, batch_size=1, optimizer=cr.SGD(RATE))
    assert_close(net.parameters, moved(WEIGHTS, changes(WEIGHTS, x, target)))
    assert run.loss == [pytest.approx(0.5 * (target - forward(WEIGHTS, x)[2]) ** 2, rel=1e-12)]
    assert f"{net.predict(a).item():.6f}" > "0.473889"  # the output has moved towards the target


@pytest.mark.parametrize("count", [2, 3, 5])
def test_no_weight_moves_before_the_sum_over_all_samples_is_complete(count: int) -> None:
    """A full-batch step is the sum of the samples' own changes, all of them computed with the old weights."""
    samples = SAMPLES[:count]
    total = {name: np.sum([changes(WEIGHTS, x, t)[name] for x, t in samples], axis=0).tolist() for name in WEIGHTS}
    net = network()
    x, t = arrays(samples)
    # The loss is a mean, so the rate is multiplied by the number of samples to move by the book's sum.
    net.fit(x, t, loss=half_squared_error, epochs=1, batch_size=count, shuffle=False, optimizer=cr.SGD(RATE * count))
    assert_close(net.parameters, moved(WEIGHTS, total))

    one_by_one = WEIGHTS
    for sample, target in samples:
        one_by_one = moved(one_by_one, changes(one_by_one, sample, target))
    for name, value in net.parameters.items():
        assert np.abs(value - np.array(one_by_one[name])).max() > 1e-4, name


def test_case_updating_one_sample_after_the_other() -> None:
    """With one row a batch the second sample sees the weights that the first one has moved."""
    net = network()
    x, t = arrays(SAMPLES)
    net.fit(x, t, loss=half_squared_error, epochs=2, batch_size=1, shuffle=False, optimizer=cr.SGD(RATE))
    expected = WEIGHTS
    for _ in range(2):
        for sample, target in SAMPLES:
            expected = moved(expected, changes(expected, sample, target))
    assert_close(net.parameters, expected)


def test_gradients_of_several_samples_are_the_mean_of_their_own() -> None:
    x, t = arrays(SAMPLES)
    net = network()
    together = net.gradients(x, t, loss=half_squared_error)
    alone = [net.gradients(x[k : k + 1], t[k : k + 1], loss=half_squared_error) for k in range(len(x))]
    for name, g in together.items():
        np.testing.assert_allclose(g, np.mean([a[name] for a in alone], axis=0), rtol=1e-12, atol=1e-16)


def test_a_hidden_error_uses_the_old_weight_of_the_output() -> None:
    """Err4 is computed with w46 before its update; with the new one the hidden weights would end elsewhere."""
    x, target = SAMPLES[0]
    new = moved(WEIGHTS, changes(WEIGHTS, x, target))
    o4, _, _ = forward(WEIGHTS, x)
    _, _, e6 = errors(WEIGHTS, x, target)
    right, wrong = (0.2 + RATE * o4 * (1 - o4) * e6 * w["1.weight"][0][0] for w in (WEIGHTS, new))
    net = network()
    net.fit(*arrays(SAMPLES[:1]), loss=half_squared_error, epochs=1, optimizer=cr.SGD(RATE))
    assert net.parameters["0.weight"][0, 0] == pytest.approx(right, rel=1e-12)
    assert abs(right - wrong) > 1e-4
