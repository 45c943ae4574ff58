"""What layers give and what scores hang on, against NumPy and central differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import chainrule as cr
from chainrule import nn

Array = np.ndarray
BACKENDS = ["native", "reference"]


def trained(net: nn.Module, x: Any, y: Any, loss: str = "cross_entropy", dtype: str = "float64") -> nn.Module:
    net.fit(x, y, loss=loss, epochs=2, dtype=dtype)
    return net


def images(rows: int = 600) -> tuple[Array, Array]:
    r = np.random.default_rng(0)
    return r.integers(0, 256, (rows, 4, 3), dtype=np.uint8), r.integers(0, 3, rows)


def network() -> nn.Sequential:
    inner = nn.Sequential(nn.Residual(nn.Dense(6)), nn.BatchNorm())
    return nn.Sequential(nn.Rescale(), nn.Flatten(), nn.Dense(6, "tanh"), nn.Dropout(0.5), inner, nn.Dense(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_are_what_each_layer_gives_in_evaluation_mode(backend: str) -> None:
    x, y = images()  # more than one batch, of which the last is short
    net = trained(network(), x, y)
    p, s = net.parameters, net.statistics
    flat = x.reshape(len(x), -1) / 255
    hidden = np.tanh(flat @ p["2.weight"] + p["2.bias"])
    inner = hidden @ p["4.0.layer.weight"] + p["4.0.layer.bias"]
    normal = (hidden + inner - s["4.1.mean"]) / np.sqrt(s["4.1.variance"] + 1e-5) * p["4.1.scale"] + p["4.1.shift"]
    expected = {
        "0": x / 255, "1": flat, "2": hidden, "3": hidden, "4.0.layer": inner, "4.0": hidden + inner, "4.1": normal,
        "5": normal @ p["5.weight"] + p["5.bias"],
    }  # fmt: skip
    found = cr.activations(net, x, backend=backend)
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-9, err_msg=name)
    np.testing.assert_array_equal(found["5"], net.predict(x, backend=backend))


class Twice(nn.Module):
    """The same layer called twice, a loop with a layer in it, and an output of its own."""

    def __init__(self) -> None:
        self.dense, self.sequence = nn.Dense(4), nn.GRU(3)

    def __call__(self, x: Any) -> Any:
        return self.sequence(self.dense(np.tanh(self.dense(x)))) * 2.0


def test_names_of_layers_that_are_called_twice_and_of_the_network_itself() -> None:
    x = np.random.default_rng(0).normal(size=(5, 7, 4))
    net = trained(Twice(), x, np.ones((5, 3)), "mse")
    found = cr.activations(net, x)
    assert list(found) == ["dense", "dense (2)", "sequence", ""]
    np.testing.assert_array_equal(found[""], net.predict(x))
    np.testing.assert_allclose(found[""], 2 * found["sequence"])
    again = np.tanh(found["dense"]) @ net.parameters["dense.weight"] + net.parameters["dense.bias"]
    np.testing.assert_allclose(found["dense (2)"], again)


def test_layers_whose_output_has_not_the_rows_first_are_left_out() -> None:
    x = np.random.default_rng(0).normal(size=(5, 7, 4))
    net = trained(nn.Sequential(nn.TimeDistributed(nn.Dense(2)), nn.Flatten(), nn.Dense(1)), x, np.ones((5, 1)), "mse")
    assert list(cr.activations(net, x)) == ["0", "1", "2"]


def test_one_layer_is_its_own_network() -> None:
    x = np.ones((4, 3))
    net = trained(nn.Dense(2), x, np.ones((4, 2)), "mse")
    assert list(cr.activations(net, x)) == [""]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [0, 2, None, "each"])
def test_saliency_against_central_differences(backend: str, label: Any) -> None:
    x = np.random.default_rng(1).uniform(0, 255, (9, 4, 3))
    net = trained(network(), x, np.arange(9) % 3)
    labels = np.arange(9) % 3 if label == "each" else net.predict(x).argmax(axis=1) if label is None else np.full(9, label)
    found = cr.saliency(net, x, labels if label == "each" else label, backend=backend)
    assert found.shape == x.shape
    for place in np.ndindex(4, 3):
        step = np.zeros_like(x)
        step[:, *place] = 1e-2
        rise = (net.predict(x + step) - net.predict(x - step)) / 2e-2
        np.testing.assert_allclose(found[:, *place], rise[np.arange(9), labels], rtol=1e-5, atol=1e-9)


def test_saliency_of_bytes_and_of_many_rows() -> None:
    x, y = images()
    net = trained(network(), x, y, dtype="float32")
    found = cr.saliency(net, x, 1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, cr.saliency(net, x.astype(np.float64), 1), rtol=1e-6)
    np.testing.assert_array_equal(found[550:], cr.saliency(net, x[512:], 1)[38:])


def test_saliency_of_a_network_with_one_score() -> None:
    x = np.random.default_rng(1).normal(size=(6, 3))
    net = trained(nn.Dense(1), x, np.arange(6) % 2, "binary_cross_entropy")
    w = net.parameters["weight"][:, 0]
    np.testing.assert_allclose(cr.saliency(net, x, 1), np.tile(w, (6, 1)))
    np.testing.assert_allclose(cr.saliency(net, x, 0), np.tile(-w, (6, 1)))
    sign = np.where(net.predict(x) > 0, 1, -1)
    np.testing.assert_allclose(cr.saliency(net, x), sign * w)


def test_what_is_refused() -> None:
    x, y = images(8)
    with pytest.raises(cr.NotBuiltError, match="activations"):
        cr.activations(network(), x)
    with pytest.raises(cr.NotBuiltError, match="saliency"):
        cr.saliency(network(), x)
    net = trained(network(), x, y)
    with pytest.raises(cr.ShapeError, match=r"rows of shape \(3, 4\)"):
        cr.activations(net, x.reshape(8, 3, 4))
    for label, message in ((3, "classes 0 to 2"), (-1, "classes 0 to 2"), (0.5, "number of a class"), ([0, 1], "8 rows")):
        with pytest.raises(cr.DataError, match=message):
            cr.saliency(net, x, label)
    words = trained(nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Dense(2)), np.ones((4, 3), int), np.zeros(4, int))
    with pytest.raises(cr.UsageError, match="an index has no gradient"):
        cr.saliency(words, np.ones((4, 3), int), 0)
    steps = trained(nn.GRU(2, return_sequences=True), np.ones((4, 3, 2)), np.ones((4, 3, 2)), "mse")
    with pytest.raises(cr.UsageError, match="a row of scores"):
        cr.saliency(steps, np.ones((4, 3, 2)), 0)
