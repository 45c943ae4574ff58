"""Initializers: the first values of a parameter.

In: a random generator and a shape. Out: a float64 array of that shape, drawn on the host; the network casts it.

An initializer is one class: a frozen dataclass whose fields are its options, called as `init(generator, shape)`. Weights are
(in, out) and convolution kernels (..., in, out): fan_in = in · Π of the leading axes, fan_out = out · Π of the leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np

from .errors import ShapeError, UsageError
from .records import record
from .registry import Registry

Shape = tuple[int, ...]


@record(frozen=True)
class Initializer:
    """What every initializer offers.

    To add one, write a subclass, a frozen dataclass, with `__call__`; `initializers.declare("name")`, the class having that name,
    makes it known by name too. Options are finite numbers.
    """

    def __post_init__(self) -> None:
        for field, value in vars(self).items():
            sized = field in ("gain", "std", "limit")  # sizes are not negative
            if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
                raise UsageError(f"{self.name}({field}={value!r}): {field} must be a finite number")
            if sized and value < 0:
                raise UsageError(f"{self.name}({field}={value!r}): {field} must be 0 or more")
            object.__setattr__(self, field, float(value))

    @property
    def name(self) -> str:
        """The name in the registry and in saved files, which is that of the class."""
        return type(self).__name__

    def __call__(self, generator: np.random.Generator, shape: Shape) -> np.ndarray:
        """First values. Returns: float64 of that shape. Raises: `ShapeError` if the shape does not suit the initializer."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__(generator, shape)")


initializers: Registry[type[Initializer]] = Registry("initializer")


def fans(initializer: Initializer, shape: Shape) -> tuple[int, int]:
    """(fan_in, fan_out): how many values each output sums up, and how many outputs each input reaches.

    >>> fans(glorot_uniform(), (3, 3, 16, 32))
    (144, 288)
    """
    if len(shape) < 2:
        raise ShapeError(
            f"{initializer.name} needs two axes or more, (in, out), but the parameter has shape {shape}: choose zeros, "
            "ones, constant, normal or uniform"
        )
    field = math.prod(shape[:-2])
    return field * shape[-2], field * shape[-1]


def _uniform(generator: np.random.Generator, shape: Shape, std: float) -> np.ndarray:
    """Uniform numbers of this standard deviation: within ± √3 std."""
    return generator.uniform(-math.sqrt(3) * std, math.sqrt(3) * std, shape)


@initializers.declare("glorot_uniform")
@record(frozen=True)
class glorot_uniform(Initializer):
    """Keeps the variance of activations and gradients alike near 1 for tanh and the like.

    w ~ U(-a, a), a = gain √(6 / (fan_in + fan_out))
    Source: Glorot & Bengio 2010, equation 16.

    >>> bool(abs(glorot_uniform()(np.random.default_rng(0), (50, 100))).max() <= 0.2)
    True
    """

    gain: float = 1.0

    def __call__(self, generator: np.random.Generator, shape: Shape) -> np.ndarray:
        return _uniform(generator, shape, self.gain * math.sqrt(2 / max(sum(fans(self, shape)), 1)))


@initializers.declare("glorot_normal")
@record(frozen=True)
class glorot_normal(Initializer):
    """As glorot_uniform, from a normal distribution.

    w ~ N(0, σ²), σ = gain √(2 / (fan_in + fan_out))
    Source: Glorot & Bengio 2010, equation 12. Differs: not truncated (Keras truncates at 2 σ).

    >>> glorot_normal()(np.random.default_rng(0), (3, 2)).shape
    (3, 2)
    """

    gain: float = 1.0

    def __call__(self, generator: np.random.Generator, shape: Shape) -> np.ndarray:
        return generator.normal(0.0, self.gain * math.sqrt(2 / max(sum(fans(self, shape)), 1)), shape)


@initializers.declare("he_uniform")
@record(frozen=True)
class he_uniform(Initializer):
    """Keeps the variance of activations near 1 for relu, which passes half of it on.

    w ~ U(-a, a), a = gain √(6 / ((1 + slope²) fan_in)); slope: that of a leaky relu below 0
    Source: He et al. 2015, equations 10 and 15.

    >>> he_uniform()(np.random.default_rng(0), (3, 2)).shape
    (3, 2)
    """

    gain: float = 1.0
    slope: float = 0.0

    def __call__(self, generator: np.random.Generator, shape: Shape) -> np.ndarray:
        return _uniform(generator, shape, self.gain * math.sqrt(2 / (1 + self.slope**2) / max(fans(self, shape)[0], 1)))


@initializers.declare("he_normal")
@record(frozen=True)
class he_normal(Initializer):
    """As he_uniform, from a normal distribution.

    w ~ N(0, σ²), σ = gain √(2 / ((1 + slope²) fan_in))
    Source: He et al. 2015, equations 10 and 15. Differs: not truncated (Keras truncates at 2 σ).

    >>> he_normal()(np.random.default_rng(0), (3, 2)).shape
    (3, 2)
    """

    gain: float = 1.0
    slope: float = 0.0

    def __call__(self, generator: np.random.Generator, shape: Shape) -> np.ndarray:
        return generator.normal(0.0, self.gain * math.sqrt(2 / (1 + self.slope**2) / max(fans(self, shape)[0], 1)), shape)


@initializers.declare("lecun_normal")
@record(frozen=True)
class lecun_normal(Initializer):
    """Keeps the variance of sums at that of the inputs; the choice for selu.

    w ~ N(0, σ²), σ = gain √(1 / fan_in)
    Source: LeCun et al. 1998 (Efficient BackProp), equation 16; Klambauer et al. 2017 for selu. Differs: not truncated.

    >>> lecun_normal()(np.random.default_rng(0), (3, 2)).shape
    (3, 2)
    """

    gain: float = 1.0

    def __call__(self, generator: np.random.Generator, shape: Shape) -> np.ndarray:
        return generator.normal(0.0, self.gain / math.sqrt(max(fans(self, shape)[0], 1)), shape)


@initializers.declare("orthogonal")
@record(frozen=True)
class orthogonal(Initializer):
    """Columns (or rows, if they are fewer) at right angles and of length `gain`, uniform among all such matrices.

    w = gain Q, with Q R = a normal matrix and the signs chosen so that R has a positive diagonal; a kernel (..., in, out) is
    taken as a matrix with `out` columns
    Source: Saxe et al. 2014; the signs: Mezzadri 2007.

    >>> w = orthogonal()(np.random.default_rng(0), (4, 2))
    >>> bool(np.allclose(w.T @ w, np.eye(2)))
    True
    """

    gain: float = 1.0

    def __call__(self, generator: np.random.Generator, shape: Shape) -> np.ndarray:
        fans(self, shape)
        rows, columns = math.prod(shape[:-1]), shape[-1]
        q, r = np.linalg.qr(generator.normal(size=(max(rows, columns), min(rows, columns))))
        q = q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
        return np.asarray(self.gain * (q if rows >= columns else q.T)).reshape(shape)


@initializers.declare("identity")
@record(frozen=True)
class identity(Initializer):
    """Each output copies the input of its own number: for recurrent weights with relu, and layers that start by doing nothing.

    w = gain I; of a kernel (..., in, out) the middle tap does so and the others are 0. Surplus inputs or outputs get 0.
    Source: Le, Jaitly & Hinton 2015.

    >>> identity()(np.random.default_rng(0), (2, 3))
    array([[1., 0., 0.],
           [0., 1., 0.]])
    """

    gain: float = 1.0

    def __call__(self, generator: np.random.Generator, shape: Shape) -> np.ndarray:
        fans(self, shape)
        values = np.zeros(shape)
        values[tuple(length // 2 for length in shape[:-2])] = self.gain * np.eye(shape[-2], shape[-1])
        return values


@initializers.declare("zeros")
@record(frozen=True)
class zeros(Initializer):
    """Nothing but 0: for biases. A hidden layer whose weights all start so cannot learn, for its units stay equal.

    >>> zeros()(np.random.default_rng(0), (2,))
    array([0., 0.])
    """

    def __call__(self, generator: np.random.Generator, shape: Shape) -> np.ndarray:
        return np.zeros(shape)


@initializers.declare("ones")
@record(frozen=True)
class ones(Initializer):
    """Nothing but 1: for the scales of normalisation.

    >>> ones()(np.random.default_rng(0), (2,))
    array([1., 1.])
    """

    def __call__(self, generator: np.random.Generator, shape: Shape) -> np.ndarray:
        return np.ones(shape)


@initializers.declare("constant")
@record(frozen=True)
class constant(Initializer):
    """The same number everywhere, such as 1 for the forget gates of an LSTM.

    >>> constant(0.5)(np.random.default_rng(0), (2,))
    array([0.5, 0.5])
    """

    value: float = 0.0

    def __call__(self, generator: np.random.Generator, shape: Shape) -> np.ndarray:
        return np.full(shape, self.value)


@initializers.declare("normal")
@record(frozen=True)
class normal(Initializer):
    """w ~ N(0, std²), whatever the shape: for embeddings, and where a paper says so.

    >>> normal(std=0.02)(np.random.default_rng(0), (1000, 4)).std().round(3)
    np.float64(0.02)
    """

    std: float = 0.05

    def __call__(self, generator: np.random.Generator, shape: Shape) -> np.ndarray:
        return generator.normal(0.0, self.std, shape)


@initializers.declare("uniform")
@record(frozen=True)
class uniform(Initializer):
    """w ~ U(-limit, limit), whatever the shape.

    >>> bool(abs(uniform(limit=0.1)(np.random.default_rng(0), (100,))).max() <= 0.1)
    True
    """

    limit: float = 0.05

    def __call__(self, generator: np.random.Generator, shape: Shape) -> np.ndarray:
        return generator.uniform(-self.limit, self.limit, shape)


# -------------------------------------------------------------------------------------------------------------- by name, by file

Init = Callable[[np.random.Generator, Shape], np.ndarray]


@record(frozen=True)
class PerPart:
    """The same initializer for each part by itself of a weight whose parts, gates or groups of filters, lie side by side on the last axis.

    >>> PerPart(identity(), 2)(np.random.default_rng(0), (2, 4))
    array([[1., 0., 1., 0.],
           [0., 1., 0., 1.]])
    """

    init: Init
    parts: int

    def __call__(self, generator: np.random.Generator, shape: Shape) -> np.ndarray:
        each = (*shape[:-1], shape[-1] // self.parts)
        return np.concatenate([self.init(generator, each) for _ in range(self.parts)], axis=-1)


def resolve(thing: object) -> Init:
    """What a name, an instance, a class, a number (that constant) or any function of (generator, shape) stands for.

    Raises: `UnknownNameError` for a name that is not registered, `UsageError` for anything else.

    >>> resolve("he_normal")
    he_normal(gain=1.0, slope=0.0)
    """
    if isinstance(thing, str):
        return initializers[thing]()
    if isinstance(thing, type) and issubclass(thing, Initializer):
        return thing()
    if isinstance(thing, (int, float, np.number)) and not isinstance(thing, bool):
        return constant(float(thing))
    if callable(thing):
        return cast(Init, thing)
    raise UsageError(
        f"an initializer is a name ({', '.join(initializers)}), a number or a function of (generator, shape); not {thing!r}"
    )


def config(initializer: Initializer) -> dict[str, Any]:
    """The initializer as plain values that JSON can hold.

    >>> config(normal(0.1))
    {'name': 'normal', 'std': 0.1}
    """
    return {"name": initializer.name, **vars(initializer)}


def from_config(settings: Mapping[str, Any]) -> Initializer:
    """The initializer that `config` described. Raises: `UnknownNameError`; `UsageError` for options that it does not have."""
    return initializers.make(settings)  # type: ignore[no-any-return]  # classes of this registry
