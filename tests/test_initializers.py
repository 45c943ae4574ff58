"""Initializers: their distributions, their fans, and what they refuse."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from chainrule import initializers
from chainrule.errors import ShapeError, UnknownNameError, UsageError
from chainrule.initializers import Initializer, fans, resolve
from chainrule.initializers import initializers as registry

BIG = (400, 300)
STD = {  # name -> standard deviation for BIG, from the papers
    "glorot_uniform": math.sqrt(2 / 700),
    "glorot_normal": math.sqrt(2 / 700),
    "he_uniform": math.sqrt(2 / 400),
    "he_normal": math.sqrt(2 / 400),
    "lecun_normal": math.sqrt(1 / 400),
    "orthogonal": math.sqrt(1 / 400),
    "normal": 0.05,
    "uniform": 0.05 / math.sqrt(3),
}


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


@pytest.mark.parametrize("name", registry)
def test_every_initializer_keeps_the_contract(name: str) -> None:
    init = registry[name]()
    for shape in [(4, 6), (6, 4), (3, 3, 2, 5), (5, 1, 4)]:
        values = init(generator(), shape)
        assert values.shape == shape
        assert values.dtype == np.float64
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(values, init(generator(), shape))
    assert init.name == name
    assert initializers.from_config(json.loads(json.dumps(initializers.config(init)))) == init
    assert init.__doc__
    assert ">>>" in init.__doc__


@pytest.mark.parametrize("name", STD)
def test_mean_and_standard_deviation(name: str) -> None:
    values = registry[name]()(generator(), BIG)
    assert abs(values.mean()) < 4 * STD[name] / math.sqrt(values.size)
    np.testing.assert_allclose(values.std(), STD[name], rtol=0.01)


@pytest.mark.parametrize("name", ["glorot_uniform", "he_uniform", "uniform"])
def test_uniform_ones_fill_their_interval(name: str) -> None:
    values = np.abs(registry[name]()(generator(), BIG))
    limit = math.sqrt(3) * STD[name]
    assert 0.999 * limit < values.max() <= limit


def test_fans_of_weights_and_kernels() -> None:
    assert fans(initializers.zeros(), (3, 7)) == (3, 7)
    assert fans(initializers.zeros(), (5, 3, 7)) == (15, 35)
    assert fans(initializers.zeros(), (5, 5, 3, 7)) == (75, 175)
    kernel = initializers.he_normal()(generator(), (5, 5, 16, 64))
    np.testing.assert_allclose(kernel.std(), math.sqrt(2 / 400), rtol=0.02)


def test_gain_and_slope() -> None:
    plain = initializers.glorot_normal()(generator(), BIG)
    np.testing.assert_allclose(initializers.glorot_normal(gain=3.0)(generator(), BIG), 3 * plain)
    np.testing.assert_allclose(initializers.he_uniform(slope=1.0)(generator(), BIG).std(), math.sqrt(1 / 400), rtol=0.01)


@pytest.mark.parametrize("shape", [(8, 3), (3, 8), (5, 5), (2, 2, 3, 6)])
def test_orthogonal_is_orthogonal(shape: tuple[int, ...]) -> None:
    w = initializers.orthogonal(gain=2.0)(generator(), shape).reshape(-1, shape[-1])
    gram = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
    np.testing.assert_allclose(gram, 4 * np.eye(len(gram)), atol=1e-12)


def test_orthogonal_has_no_preferred_sign() -> None:
    """Without the correction of the signs, the QR decomposition gives a diagonal of one sign far more often."""
    first = [initializers.orthogonal()(generator(seed), (3, 3))[0, 0] for seed in range(300)]
    assert abs(np.mean(np.sign(first))) < 0.2


def test_identity_of_matrices_and_kernels() -> None:
    np.testing.assert_array_equal(initializers.identity(2.0)(generator(), (3, 2)), [[2, 0], [0, 2], [0, 0]])
    kernel = initializers.identity()(generator(), (3, 3, 2, 2))
    np.testing.assert_array_equal(kernel[1, 1], np.eye(2))
    assert kernel.sum() == 2


@pytest.mark.parametrize("name", ["glorot_uniform", "he_normal", "lecun_normal", "orthogonal", "identity"])
def test_a_vector_has_no_fans(name: str) -> None:
    with pytest.raises(ShapeError, match=rf"{name} needs two axes or more.*\(3,\).*choose zeros"):
        registry[name]()(generator(), (3,))


@pytest.mark.parametrize("name", ["zeros", "ones", "constant", "normal", "uniform"])
def test_others_take_any_shape(name: str) -> None:
    for shape in [(), (3,), (2, 2)]:
        assert registry[name]()(generator(), shape).shape == shape


def test_empty_parameters() -> None:
    for name in registry:
        assert registry[name]()(generator(), (0, 3)).shape == (0, 3)


def test_resolve() -> None:
    assert resolve("zeros") == initializers.zeros()
    assert resolve(initializers.normal(0.1)) == initializers.normal(0.1)
    assert resolve(initializers.ones) == initializers.ones()
    assert resolve(0.5) == initializers.constant(0.5)

    def own(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return generator.normal(size=shape)

    assert resolve(own) is own
    with pytest.raises(UnknownNameError, match='Did you mean "he_normal"'):
        resolve("he_norml")
    with pytest.raises(UsageError, match="an initializer is a name"):
        resolve(None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: initializers.normal(-1),
        lambda: initializers.glorot_uniform(gain=math.nan),
        lambda: initializers.uniform(math.inf),
        lambda: initializers.constant("a"),  # type: ignore[arg-type]
        lambda: initializers.from_config({"name": "normal", "sigma": 1}),
    ],
)
def test_bad_options(make: object) -> None:
    with pytest.raises(UsageError):
        make()  # type: ignore[operator]


def test_a_new_one_is_one_declaration() -> None:
    class half(Initializer):
        def __call__(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
            return np.full(shape, 0.5)

    assert resolve(half)(generator(), (2,)).tolist() == [0.5, 0.5]
