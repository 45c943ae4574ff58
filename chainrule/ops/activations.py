"""Activation functions.

In: an array. Out: an array of the same shape. Each is written in NumPy, so it runs on plain arrays as well. To add one, declare it
here: networks, the command line and the tests find it by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..registry import Registry
from .call import composition, named
from .elementwise import logistic, normal_cdf, strong_multiply, tanh_softplus
from .reduce import softmax

activations: Registry[Callable[..., Any]] = Registry("activation")


def activation(name: str, *, derivative: Any = None, notation: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare an elementwise activation."""

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        return activations.add(name, composition(name, derivative=derivative, elementwise=True, notation=notation)(function))

    return declare


activations.add("softmax", softmax)
activations.add("tanh", np.tanh)


@activations.declare("identity")
def identity(x: Any) -> Any:
    """x"""
    return x


@activation("relu", derivative=(lambda g, y, x: np.where(x > 0, g, 0.0),))
def relu(x: Any) -> Any:
    """max(x, 0); the derivative at 0 is 0. NaN stays NaN.

    Source: Nair & Hinton, "Rectified linear units improve restricted Boltzmann machines", ICML 2010.

    >>> import numpy as np
    >>> relu(np.array([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """
    return np.where(x <= 0, 0.0, x)


@activation("leaky_relu")
def leaky_relu(x: Any, slope: float = 0.01) -> Any:
    """x for x > 0, slope x otherwise; the derivative at 0 is `slope`.

    Source: Maas, Hannun, Ng, "Rectifier nonlinearities improve neural network acoustic models", ICML 2013.
    """
    return np.where(x > 0, x, slope * x)


@activation("elu")
def elu(x: Any, alpha: float = 1.0) -> Any:
    """x for x > 0, alpha (exp(x) - 1) otherwise.

    Source: Clevert, Unterthiner, Hochreiter, "Fast and accurate deep network learning by exponential linear units", ICLR 2016, eq. 15.
    """
    return np.where(x > 0, x, alpha * np.expm1(np.where(x > 0, 0.0, x)))


@activation("selu")
def selu(x: Any) -> Any:
    """λ x for x > 0, λ α (exp(x) - 1) otherwise, λ = 1.0507, α = 1.6733.

    Source: Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017, eq. 2 and 14.
    """
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    return np.where(x > 0, scale * x, scale * alpha * np.expm1(np.where(x > 0, 0.0, x)))


def _gelu_slope(x: Any) -> Any:
    """Φ(x) + x φ(x), 0 and 1 at the infinities. As one number: derived from x Φ(x), three arrays are kept for the way back."""
    return normal_cdf(x) + strong_multiply(1 / math.sqrt(2 * math.pi) * np.exp(-0.5 * (x * x)), x)


_slope = named("gelu'", _gelu_slope)


@activation("gelu", derivative=(lambda g, y, x: strong_multiply(g, _slope(x)),))
def gelu(x: Any) -> Any:
    """x Φ(x), Φ(x) = (1 + erf(x / √2)) / 2 the distribution function of the normal distribution (no approximation by tanh).

    Source: Hendrycks & Gimpel, "Gaussian error linear units", 2016, eq. in section 2.
    """
    return x * normal_cdf(x)


@activation("sigmoid", derivative=(lambda g, y, x: strong_multiply(g, y * (1 - y)),), notation="σ")
def sigmoid(x: Any) -> Any:
    """σ(x) = 1 / (1 + exp(-x)). Nothing overflows, and small values keep their digits.

    >>> import numpy as np
    >>> sigmoid(np.array([0.0, -1000.0])).tolist()
    [0.5, 0.0]
    """
    return logistic(x)


@activation("softplus", derivative=(lambda g, y, x: strong_multiply(g, sigmoid(x)),))
def softplus(x: Any) -> Any:
    """log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)).

    Source: Dugas et al., "Incorporating second-order functional knowledge for better option pricing", NeurIPS 2000.
    """
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


@activation("silu")
def silu(x: Any) -> Any:
    """x σ(x), also known as swish.

    Source: Elfwing, Uchibe, Doya, "Sigmoid-weighted linear units", Neural Networks 107, 2018.
    """
    return x * sigmoid(x)


@activation("mish")
def mish(x: Any) -> Any:
    """x tanh(softplus(x)).

    Source: Misra, "Mish: a self regularized non-monotonic activation function", BMVC 2020, eq. 2.
    """
    return x * tanh_softplus(x)


@activation("softsign")
def softsign(x: Any) -> Any:
    """x / (1 + |x|).

    Source: Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS 2010.
    """
    return x / (1.0 + np.abs(x))
