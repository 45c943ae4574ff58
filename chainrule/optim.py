"""Optimizers: from gradients to new weights.

In: parameters, their gradients, slots (arrays kept for each parameter), shared scalars and hyper-parameters. Out: new parameters,
slots and scalars. The rules are pure NumPy: they run on arrays and are recorded when the arguments are traced. They read old
values only, so no weight changes before its last reader.

An optimizer is one class: a frozen dataclass whose fields are its options. Numbers that may vary without changing the program are
in `hyper()` and reach the rules as `h`; options that are None, 0 or a flag change the program and are read from the object. The
scalars in `h` and `shared` are 0-d arrays of the parameters' dtype (NumPy would turn a float32 result into float64 otherwise).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, field, fields
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np

from . import schedules
from .errors import UsageError
from .records import record
from .registry import Registry
from .schedules import Schedule

Array = Any  # a NumPy array or a traced array: both answer NumPy's protocols
Scalars = Mapping[str, Any]  # name -> 0-d array
Slots = Mapping[str, Array]  # name -> array of the parameter's shape
Evaluate = Callable[[np.ndarray], tuple[float, np.ndarray]]  # flat weights -> (value, flat gradient)

_RANGES: dict[str, Callable[[float], bool]] = {
    "0 or more": lambda x: 0 <= x < math.inf,
    "above 0": lambda x: 0 < x < math.inf,
    "at least 0 and less than 1": lambda x: 0 <= x < 1,
    "between 0 and 1, both excluded": lambda x: 0 < x < 1,
    "above 1": lambda x: 1 < x < math.inf,
}


def _number(default: float | None, allowed: str, switch: bool = False) -> Any:
    """A numeric option. `switch`: 0 leaves its part out of the program."""
    return field(default=default, metadata={"allowed": allowed, "switch": switch})


def _decays(default: float) -> Any:
    return _number(default, "at least 0 and less than 1")


@record(frozen=True)
class Optimizer:
    """What every optimizer offers, and the options that all of them share.

    g ← ∂objective/∂w + l1 sign(w) + l2 w, then each element clipped to ± clip_value, then all gradients scaled by
    clip_norm / max(clip_norm, ‖all gradients‖), then the rule, then w ← w - η · weight_decay · w with the old w on the right

    To add one, write a subclass, a frozen dataclass, with `update` (and `slots`, `shared`, `advance` where the rule keeps
    something); `optimizers.declare("name")`, the class's name in lower case, makes it known by name.

    Args: learning_rate, a number or a schedule; clip_norm, clip_value: above 0, or None; l1, l2, weight_decay: 0 or more, on
    parameters with two axes or more, not on biases and scales; accumulate: batches whose gradients are summed for one update.
    Source: clipping by norm: Pascanu, Mikolov & Bengio 2013, algorithm 1; decoupled weight decay: Loshchilov & Hutter 2019,
    algorithm 2.
    Differs: PyTorch's clip_grad_norm_ adds 1e-6 to the norm; its optimizers (but AdamW) call l2 weight_decay, biases
    included.
    """

    learning_rate: float | Schedule = 1e-3
    _: KW_ONLY
    clip_norm: float | None = _number(None, "above 0")
    clip_value: float | None = _number(None, "above 0")
    l1: float = _number(0.0, "0 or more", switch=True)
    l2: float = _number(0.0, "0 or more", switch=True)
    weight_decay: float = _number(0.0, "0 or more", switch=True)
    accumulate: int = 1

    driver: ClassVar[bool] = False  # True: not a rule for one step, but an algorithm that asks for gradients itself
    kept: ClassVar[tuple[str, ...]] = ()  # slots that start at 0
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)  # options for the tests that run over all registered optimizers

    def __post_init__(self) -> None:
        try:
            rate = schedules.resolve(self.learning_rate)
        except UsageError:
            self._refuse("learning_rate", "a finite number, 0 or more, or a schedule")
        object.__setattr__(self, "learning_rate", rate.learning_rate if type(rate) is schedules.constant else rate)
        for option in fields(self):
            value, allowed = getattr(self, option.name), option.metadata.get("allowed")
            if allowed is None or (value is None and option.default is None):
                continue
            known = isinstance(value, (float, np.number)) or (type(value) is int and abs(value) <= sys.float_info.max)
            if not known or not _RANGES[allowed](float(value)):
                none = ", or None" if option.default is None else ""
                self._refuse(option.name, f"a number {allowed}{none}")
            object.__setattr__(self, option.name, float(value))
        self._count("accumulate")

    def _refuse(self, option: str, allowed: str) -> NoReturn:
        raise UsageError(f"{type(self).__name__}({option}={getattr(self, option)!r}): {option} must be {allowed}")

    def fits(self, dtype: np.dtype[Any]) -> None:
        """Refuse numbers that a network of this type takes for infinite. Raises: `UsageError`."""
        end = float(np.finfo(dtype).max)
        numbers = {"learning_rate": getattr(self.schedule, "learning_rate", 0.0), **self.hyper()}
        for option, value in numbers.items():
            if abs(value) > end:
                raise UsageError(
                    f"{type(self).__name__}({option}={value!r}): {dtype} ends at {end:.3g}, so give a smaller {option}, or "
                    'build the network with dtype="float64"'
                )

    def _count(self, option: str) -> None:
        """Refuse an option that is not a whole number from 1 on."""
        value: Any = getattr(self, option)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            self._refuse(option, "a whole number, 1 or more")
        object.__setattr__(self, option, int(value))

    @property
    def name(self) -> str:
        """The name in the registry and in saved files: that of the class in lower case."""
        return type(self).__name__.lower()

    @property
    def schedule(self) -> Schedule:
        """The learning rate as a schedule."""
        return schedules.resolve(self.learning_rate)

    def hyper(self) -> dict[str, float]:
        """The numbers that reach the rules as `h`, without the learning rate.

        Those that are None, or 0 and then not needed, are left out: two optimizers of a class with the same keys and the same
        flags share one program.

        >>> SGD(0.1, momentum=0.9, clip_norm=1).hyper()
        {'clip_norm': 1.0, 'momentum': 0.9}
        """
        numbers = {f.name: (getattr(self, f.name), f.metadata["switch"]) for f in fields(self) if "switch" in f.metadata}
        return {name: value for name, (value, switch) in numbers.items() if value is not None and (value or not switch)}

    def slots(self, w: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays that the rule keeps for a parameter, as they are before the first step: zeros, named by `kept`."""
        return {name: np.zeros_like(w) for name in self.kept}

    def shared(self) -> dict[str, float]:
        """The scalars that the rule keeps for all parameters, as they are before the first step."""
        return {}

    def advance(self, shared: Scalars, h: Scalars) -> dict[str, Any]:
        """The shared scalars of the next step; done once, before the parameters are updated."""
        return dict(shared)

    def update(self, w: Array, g: Array, slots: Slots, shared: Scalars, h: Scalars) -> tuple[Array, dict[str, Array]]:
        """The rule for one parameter. Args: w, g and slots of one shape; shared as `advance` returned it; h: `hyper` and
        "learning_rate". Returns: new w, new slots."""
        raise NotImplementedError(f"{type(self).__name__} has no update(w, g, slots, shared, h)")


optimizers: Registry[type[Optimizer]] = Registry("optimizer")


def penalty(optimizer: Optimizer, parameters: Mapping[str, Array], h: Scalars) -> Array:
    """What l1 and l2 add to the objective: l1 Σ |w| + ½ l2 Σ w² over parameters with two axes or more; 0.0 without them.

    >>> penalty(SGD(l2=0.5), {"weight": np.array([[2.0]]), "bias": np.array([9.0])}, {"l2": 0.5})
    np.float64(1.0)
    """
    total: Array = 0.0
    for w in parameters.values():
        if w.ndim >= 2 and optimizer.l1:
            total = total + h["l1"] * np.sum(np.abs(w))
        if w.ndim >= 2 and optimizer.l2:
            total = total + 0.5 * h["l2"] * np.sum(w * w)
    return total


def apply_update(
    optimizer: Optimizer,
    parameters: Mapping[str, Array],
    gradients: Mapping[str, Array],
    slots: Mapping[str, Slots],
    shared: Scalars,
    h: Scalars,
) -> tuple[dict[str, Array], dict[str, dict[str, Array]], dict[str, Any]]:
    """One step for all parameters: penalties, clipping by value, clipping by the norm over all of them, the rule, weight decay.

    Returns: new parameters, new slots for each parameter, new shared scalars.

    >>> w = {"weight": np.array([[1.0]])}
    >>> apply_update(SGD(0.1), w, {"weight": np.array([[2.0]])}, {"weight": {}}, {}, {"learning_rate": 0.1})[0]
    {'weight': array([[0.8]])}
    """
    g = dict(gradients)
    for name, w in parameters.items():
        if w.ndim >= 2 and optimizer.l1:
            g[name] = g[name] + h["l1"] * np.sign(w)
        if w.ndim >= 2 and optimizer.l2:
            g[name] = g[name] + h["l2"] * w
        if optimizer.clip_value is not None:
            g[name] = np.minimum(np.maximum(g[name], -h["clip_value"]), h["clip_value"])
    if optimizer.clip_norm is not None:
        squares: Array = 0.0
        for name in parameters:
            squares = squares + np.sum(g[name] * g[name])
        scale = h["clip_norm"] / np.maximum(np.sqrt(squares), h["clip_norm"])  # exactly 1 below the limit, and never 0 / 0
        g = {name: g[name] * scale for name in parameters}
    new_shared = optimizer.advance(shared, h)
    new_parameters, new_slots = {}, {}
    for name, w in parameters.items():
        new_parameters[name], new_slots[name] = optimizer.update(w, g[name], slots[name], new_shared, h)
        if w.ndim >= 2 and optimizer.weight_decay:
            new_parameters[name] = new_parameters[name] - h["learning_rate"] * h["weight_decay"] * w
    return new_parameters, new_slots, new_shared


def first_step(optimizer: Optimizer, w: float, g: float) -> float:
    """Where the first step takes a single weight whose gradient is g: for examples.

    >>> first_step(SGD(0.1), w=1.0, g=2.0)
    0.8
    """
    scalars = {"learning_rate": float(optimizer.schedule(np.zeros(1), 1)[0]), **optimizer.hyper()}
    start = np.array([[w]])
    moved, _, _ = apply_update(
        optimizer, {"w": start}, {"w": np.array([[g]])}, {"w": optimizer.slots(start)}, optimizer.shared(), scalars
    )
    return round(float(moved["w"][0, 0]), 9)


@optimizers.declare("sgd")
@record(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent, with momentum if asked for.

    m ← μ m + g;  w ← w - η m, or with Nesterov's momentum w ← w - η (g + μ m)
    Args: learning_rate η; momentum μ in [0, 1); nesterov.
    Source: Robbins & Monro 1951; Polyak 1964; Sutskever et al. 2013, equations 3 and 4. Differs: as in PyTorch, η is outside the
    momentum, so that a change of η acts at once, and Nesterov's form is written for the point looked ahead to.

    >>> first_step(SGD(0.1, momentum=0.5, nesterov=True), w=1.0, g=2.0)
    0.7
    """

    _: KW_ONLY
    momentum: float = _number(0.0, "at least 0 and less than 1", switch=True)
    nesterov: bool = False
    examples = ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not self.momentum:
            self._refuse("nesterov", "False where momentum is 0: give momentum=0.9, say")

    def slots(self, w: np.ndarray) -> dict[str, np.ndarray]:
        """m, if there is momentum."""
        return {"m": np.zeros_like(w)} if self.momentum else {}

    def update(self, w: Array, g: Array, slots: Slots, shared: Scalars, h: Scalars) -> tuple[Array, dict[str, Array]]:
        if not self.momentum:
            return w - h["learning_rate"] * g, {}
        m = h["momentum"] * slots["m"] + g
        return w - h["learning_rate"] * (g + h["momentum"] * m if self.nesterov else m), {"m": m}


@optimizers.declare("adagrad")
@record(frozen=True)
class Adagrad(Optimizer):
    """Steps that shrink with the sum of all squared gradients of a weight: for sparse features.

    v ← v + g²;  w ← w - η g / (√v + ε)
    Args: learning_rate η; eps ε > 0.
    Source: Duchi, Hazan & Singer 2011, the diagonal form. Differs: as in PyTorch, ε is outside the root; no decay of η (use a
    schedule).

    >>> first_step(Adagrad(0.1), w=1.0, g=4.0)
    0.9
    """

    learning_rate: float | Schedule = 1e-2
    _: KW_ONLY
    eps: float = _number(1e-10, "above 0")
    kept = ("v",)

    def update(self, w: Array, g: Array, slots: Slots, shared: Scalars, h: Scalars) -> tuple[Array, dict[str, Array]]:
        v = slots["v"] + g * g
        return w - h["learning_rate"] * g / (np.sqrt(v) + h["eps"]), {"v": v}


@optimizers.declare("adadelta")
@record(frozen=True)
class Adadelta(Optimizer):
    """Steps in the weights' own unit: the ratio of the last steps to the last gradients.

    v ← ρ v + (1 - ρ) g²;  d = √((u + ε) / (v + ε)) g;  u ← ρ u + (1 - ρ) d²;  w ← w - η d
    Args: learning_rate η, 1 in the paper; rho ρ in [0, 1); eps ε > 0.
    Source: Zeiler 2012, algorithm 1, with PyTorch's defaults. Differs: one root of the ratio, not the ratio of two roots.

    >>> round(first_step(Adadelta(), w=1.0, g=4.0), 6)
    0.996838
    """

    learning_rate: float | Schedule = 1.0
    _: KW_ONLY
    rho: float = _decays(0.9)
    eps: float = _number(1e-6, "above 0")
    kept = ("v", "u")

    def update(self, w: Array, g: Array, slots: Slots, shared: Scalars, h: Scalars) -> tuple[Array, dict[str, Array]]:
        v = h["rho"] * slots["v"] + (1 - h["rho"]) * g * g
        d = np.sqrt((slots["u"] + h["eps"]) / (v + h["eps"])) * g
        return w - h["learning_rate"] * d, {"v": v, "u": h["rho"] * slots["u"] + (1 - h["rho"]) * d * d}


@optimizers.declare("rmsprop")
@record(frozen=True)
class RMSprop(Optimizer):
    """Gradients divided by their recent size, or by their recent standard deviation if centered.

    v ← ρ v + (1 - ρ) g²;  a ← ρ a + (1 - ρ) g if centered, else 0;  d = g / (√(v - a²) + ε);  m ← μ m + d;  w ← w - η m
    Args: learning_rate η; rho ρ in [0, 1); eps ε > 0; momentum μ in [0, 1); centered.
    Source: Tieleman & Hinton 2012, lecture 6e; centered: Graves 2013, equations 38 to 41. Differs: as in PyTorch (whose alpha is
    ρ), ε is outside the root, η outside the momentum; v - a² is kept from falling below 0 by rounding.

    >>> round(first_step(RMSprop(0.1), w=1.0, g=4.0), 6)
    0.0
    """

    learning_rate: float | Schedule = 1e-2
    _: KW_ONLY
    rho: float = _decays(0.99)
    eps: float = _number(1e-8, "above 0")
    momentum: float = _number(0.0, "at least 0 and less than 1", switch=True)
    centered: bool = False
    examples = ({}, {"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True})

    def slots(self, w: np.ndarray) -> dict[str, np.ndarray]:
        """v, a if centered, m if there is momentum."""
        kept = {"v": True, "a": self.centered, "m": self.momentum > 0}
        return {name: np.zeros_like(w) for name, used in kept.items() if used}

    def update(self, w: Array, g: Array, slots: Slots, shared: Scalars, h: Scalars) -> tuple[Array, dict[str, Array]]:
        new = {"v": h["rho"] * slots["v"] + (1 - h["rho"]) * g * g}
        spread = new["v"]
        if self.centered:
            new["a"] = h["rho"] * slots["a"] + (1 - h["rho"]) * g
            spread = np.maximum(new["v"] - new["a"] * new["a"], 0.0)
        d = g / (np.sqrt(spread) + h["eps"])
        if self.momentum:
            new["m"] = d = h["momentum"] * slots["m"] + d
        return w - h["learning_rate"] * d, new


@optimizers.declare("rprop")
@record(frozen=True)
class Rprop(Optimizer):
    """Steps of each weight's own size, which follow the gradient's sign only. For full batches: noise turns the signs at random.

    s ← s · grow where g has the sign it had, s · shrink where it has the other one (and g counts as 0), kept within
    [smallest, largest];  w ← w - s sign(g)
    Args: learning_rate, the first s of every weight: later values of a schedule have no effect; 0 < shrink < 1; grow > 1;
    smallest, largest > 0 in the weights' unit.
    Source: Riedmiller & Braun 1993; as iRprop- in Igel & Hüsken 2000, like PyTorch. Differs: the sign is kept, not the gradient,
    so the product of two small gradients cannot vanish.

    >>> first_step(Rprop(0.1), w=1.0, g=4.0)
    0.9
    """

    learning_rate: float | Schedule = 1e-2
    _: KW_ONLY
    shrink: float = _number(0.5, "between 0 and 1, both excluded")
    grow: float = _number(1.2, "above 1")
    smallest: float = _number(1e-6, "above 0")
    largest: float = _number(50.0, "above 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smallest > self.largest:
            self._refuse("smallest", f"at most largest, {self.largest}")

    def slots(self, w: np.ndarray) -> dict[str, np.ndarray]:
        """sign, of the last gradient that counted, and size, the step s."""
        return {"sign": np.zeros_like(w), "size": np.full_like(w, self.schedule.learning_rate)}

    def update(self, w: Array, g: Array, slots: Slots, shared: Scalars, h: Scalars) -> tuple[Array, dict[str, Array]]:
        sign = np.sign(g)
        agree = sign * slots["sign"]
        factor = np.where(agree > 0, h["grow"], np.where(agree < 0, h["shrink"], 1.0))
        size = np.minimum(np.maximum(slots["size"] * factor, h["smallest"]), h["largest"])
        sign = np.where(agree < 0, 0.0, sign)
        return w - size * sign, {"sign": sign, "size": size}


@record(frozen=True)
class _Moments(Optimizer):
    """What the family of Adam has in common: two moving averages and, where a rule needs it, the powers of their factors."""

    _: KW_ONLY
    beta1: float = _decays(0.9)
    beta2: float = _decays(0.999)
    eps: float = _number(1e-8, "above 0")
    kept = ("m", "v")

    def shared(self) -> dict[str, float]:
        """β₁ᵗ and β₂ᵗ."""
        return {"beta1_power": 1.0, "beta2_power": 1.0}

    def advance(self, shared: Scalars, h: Scalars) -> dict[str, Any]:
        """One power more."""
        return {name: power * h[name.removesuffix("_power")] for name, power in shared.items()}

    def averages(self, g: Array, slots: Slots, h: Scalars) -> dict[str, Array]:
        """m ← β₁ m + (1 - β₁) g;  v ← β₂ v + (1 - β₂) g²."""
        m = h["beta1"] * slots["m"] + (1 - h["beta1"]) * g
        return {"m": m, "v": h["beta2"] * slots["v"] + (1 - h["beta2"]) * g * g}


@optimizers.declare("adam")
@record(frozen=True)
class Adam(_Moments):
    """Momentum, divided by the recent size of the gradient.

    m ← β₁ m + (1 - β₁) g;  v ← β₂ v + (1 - β₂) g²;  w ← w - η m̂ / (√v̂ + ε), m̂ = m / (1 - β₁ᵗ), v̂ = v / (1 - β₂ᵗ)
    Args: learning_rate η; beta1, beta2 in [0, 1); eps ε > 0.
    Source: Kingma & Ba 2015, algorithm 1. Differs: both corrections are moved into the scalars η √(1 - β₂ᵗ) / (1 - β₁ᵗ) and
    ε √(1 - β₂ᵗ), the same value with one division for each weight.

    >>> first_step(Adam(0.1), w=1.0, g=4.0)
    0.9
    """

    def update(self, w: Array, g: Array, slots: Slots, shared: Scalars, h: Scalars) -> tuple[Array, dict[str, Array]]:
        new = self.averages(g, slots, h)
        root = np.sqrt(1 - shared["beta2_power"])
        rate = h["learning_rate"] * root / (1 - shared["beta1_power"])
        return w - rate * new["m"] / (np.sqrt(new["v"]) + h["eps"] * root), new


@optimizers.declare("adamw")
@record(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay: the same rule, weight_decay 0.01.

    w ← w - η m̂ / (√v̂ + ε) - η λ w
    Args: as Adam; weight_decay λ.
    Source: Loshchilov & Hutter 2019, algorithm 2. Differs: λ is multiplied by η as in PyTorch (the paper keeps them apart), and
    acts on parameters with two axes or more.

    >>> first_step(AdamW(0.1), w=1.0, g=4.0)
    0.899
    """

    _: KW_ONLY
    weight_decay: float = _number(0.01, "0 or more", switch=True)


@optimizers.declare("adamax")
@record(frozen=True)
class Adamax(_Moments):
    """Adam with the largest recent gradient in place of the root mean square.

    m ← β₁ m + (1 - β₁) g;  u ← max(β₂ u, |g| + ε);  w ← w - η / (1 - β₁ᵗ) · m / u
    Args: learning_rate η; beta1, beta2 in [0, 1); eps ε > 0.
    Source: Kingma & Ba 2015, algorithm 2. Differs: + ε as in PyTorch, so that a gradient of 0 does not divide 0 by 0.

    >>> first_step(Adamax(0.1), w=1.0, g=4.0)
    0.9
    """

    learning_rate: float | Schedule = 2e-3
    kept = ("m", "u")

    def shared(self) -> dict[str, float]:
        """β₁ᵗ."""
        return {"beta1_power": 1.0}

    def update(self, w: Array, g: Array, slots: Slots, shared: Scalars, h: Scalars) -> tuple[Array, dict[str, Array]]:
        m = h["beta1"] * slots["m"] + (1 - h["beta1"]) * g
        u = np.maximum(h["beta2"] * slots["u"], np.abs(g) + h["eps"])
        return w - h["learning_rate"] / (1 - shared["beta1_power"]) * m / u, {"m": m, "u": u}


@optimizers.declare("nadam")
@record(frozen=True)
class Nadam(_Moments):
    """Adam with Nesterov's momentum, whose factor rises with time.

    m and v as in Adam;  μₜ = β₁ (1 - ½ 0.96^(tψ)),  Πₜ = μ₁ ⋯ μₜ;  w ← w - η m̂ / (√v̂ + ε),
    m̂ = μₜ₊₁ m / (1 - Πₜ μₜ₊₁) + (1 - μₜ) g / (1 - Πₜ)
    Args: learning_rate η; beta1, beta2 in [0, 1); eps ε > 0; momentum_decay ψ >= 0.
    Source: Dozat 2016, algorithm 2. Differs: as in PyTorch, m is averaged with β₁ rather than μₜ.

    >>> first_step(Nadam(0.1), w=1.0, g=4.0) < 0.9
    True
    """

    learning_rate: float | Schedule = 2e-3
    _: KW_ONLY
    momentum_decay: float = _number(4e-3, "0 or more")

    def shared(self) -> dict[str, float]:
        """β₂ᵗ, 0.96^(tψ) and Πₜ."""
        return {"beta2_power": 1.0, "decay_power": 1.0, "mu_product": 1.0}

    def advance(self, shared: Scalars, h: Scalars) -> dict[str, Any]:
        """One step more."""
        power = shared["decay_power"] * self._decay(h)
        product = shared["mu_product"] * h["beta1"] * (1 - 0.5 * power)
        return {"beta2_power": shared["beta2_power"] * h["beta2"], "decay_power": power, "mu_product": product}

    def update(self, w: Array, g: Array, slots: Slots, shared: Scalars, h: Scalars) -> tuple[Array, dict[str, Array]]:
        new = self.averages(g, slots, h)
        power, product = shared["decay_power"], shared["mu_product"]
        following = h["beta1"] * (1 - 0.5 * power * self._decay(h))
        mean = following / (1 - product * following) * new["m"] + (1 - h["beta1"] * (1 - 0.5 * power)) / (1 - product) * g
        root = np.sqrt(1 - shared["beta2_power"])
        return w - h["learning_rate"] * root * mean / (np.sqrt(new["v"]) + h["eps"] * root), new

    def _decay(self, h: Scalars) -> Array:
        return np.exp(math.log(0.96) * h["momentum_decay"])


@optimizers.declare("radam")
@record(frozen=True)
class RAdam(_Moments):
    """Adam that waits until its second average can be trusted, and until then steps by momentum alone.

    m, v, m̂ as in Adam;  w ← w - η m̂ r √(1 - β₂ᵗ) / (√v + ε) if ρₜ > 5, else w ← w - η m̂,
    ρ∞ = 2 / (1 - β₂) - 1,  ρₜ = ρ∞ - 2 t β₂ᵗ / (1 - β₂ᵗ),  r² = (ρₜ - 4)(ρₜ - 2) ρ∞ / ((ρ∞ - 4)(ρ∞ - 2) ρₜ)
    Args: learning_rate η; beta1 in [0, 1); beta2 in (0.6, 1), for ρ∞ must exceed 4; eps ε > 0.
    Source: Liu et al. 2020, algorithm 2. Differs: the threshold is 5 as in PyTorch (paper: 4); ρₜ comes as 2 Q / S - 1 from the
    sums S = Σ β₂ʲ and Q = Σ (j + 1) β₂ʲ over j < t, in which nothing cancels, so that float32 takes the same branch as float64.

    >>> first_step(RAdam(0.1), w=1.0, g=4.0)
    0.6
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 / (1 - self.beta2) - 1 > 4:
            self._refuse("beta2", "above 0.6 and less than 1")

    def shared(self) -> dict[str, float]:
        """β₁ᵗ, S and Q."""
        return {"beta1_power": 1.0, "sum": 0.0, "ramp": 0.0}

    def advance(self, shared: Scalars, h: Scalars) -> dict[str, Any]:
        """One term more, by Horner's rule."""
        total = 1 + h["beta2"] * shared["sum"]
        return {"beta1_power": shared["beta1_power"] * h["beta1"], "sum": total, "ramp": total + h["beta2"] * shared["ramp"]}

    def update(self, w: Array, g: Array, slots: Slots, shared: Scalars, h: Scalars) -> tuple[Array, dict[str, Array]]:
        new = self.averages(g, slots, h)
        limit = 2 / (1 - h["beta2"]) - 1
        rho = 2 * shared["ramp"] / shared["sum"] - 1
        trusted = rho > 5
        safe = np.where(trusted, rho, 6.0)  # no root of a negative number on the side not taken
        ratio = (safe - 4) * (safe - 2) * limit / ((limit - 4) * (limit - 2) * safe)
        scale = np.sqrt(ratio * (1 - h["beta2"]) * shared["sum"])
        step = h["learning_rate"] / (1 - shared["beta1_power"]) * new["m"]
        return w - step * np.where(trusted, scale / (np.sqrt(new["v"]) + h["eps"]), 1.0), new


@optimizers.declare("lion")
@record(frozen=True)
class Lion(Optimizer):
    """Steps of equal size for all weights, in the direction of the sign of the momentum. Wants a tenth of Adam's learning rate.

    w ← w - η sign(β₁ m + (1 - β₁) g);  m ← β₂ m + (1 - β₂) g
    Args: learning_rate η; beta1, beta2 in [0, 1).
    Source: Chen et al. 2023, algorithm 2; its weight decay is the common option. Not in PyTorch.

    >>> first_step(Lion(0.1), w=1.0, g=4.0)
    0.9
    """

    learning_rate: float | Schedule = 1e-4
    _: KW_ONLY
    beta1: float = _decays(0.9)
    beta2: float = _decays(0.99)
    kept = ("m",)

    def update(self, w: Array, g: Array, slots: Slots, shared: Scalars, h: Scalars) -> tuple[Array, dict[str, Array]]:
        direction = np.sign(h["beta1"] * slots["m"] + (1 - h["beta1"]) * g)
        return w - h["learning_rate"] * direction, {"m": h["beta2"] * slots["m"] + (1 - h["beta2"]) * g}


# ---------------------------------------------------------------------------------------------------------------- full batches


class _Point(NamedTuple):
    """Where a line search looked: w + step · direction. A value that is not finite stands as infinity."""

    step: float
    value: float
    slope: float
    w: np.ndarray
    gradient: np.ndarray


@optimizers.declare("lbfgs")
@record(frozen=True)
class LBFGS(Optimizer):
    """Newton's method with curvature learnt from the last steps, over the full batch: few, exact iterations for small problems.

    w ← w + α d, d = -H g by the two-loop recursion over the last `history` pairs (Δw, Δg), α by a line search for the strong
    Wolfe conditions with c₁ = 1e-4, c₂ = 0.9
    Args: learning_rate, the first α that is tried (a number; 1 suits the method); history: pairs kept; gradient_tolerance: done
    when no element of the gradient is larger; change_tolerance: done when the value falls by no more than this times max(1,
    |value|); max_evaluations of the objective in one line search. Of the common options only l1 and l2 make sense.
    Source: Nocedal & Wright 2006, algorithms 7.4 and 7.5, line search 3.5 and 3.6 with cubic interpolation (equation 3.59).
    Differs: always with a line search (PyTorch: on request), one iteration a call, 10 pairs (PyTorch: 100).

    >>> w, state = np.array([3.0, -4.0]), {}
    >>> for _ in range(5):
    ...     w, value, state = LBFGS().iterate(lambda w: (float(w @ w), 2 * w), w, state)
    >>> state["converged"], value < 1e-12
    (True, True)
    """

    learning_rate: float | Schedule = 1.0
    _: KW_ONLY
    history: int = 10
    gradient_tolerance: float = field(default=1e-7, metadata={"allowed": "0 or more"})
    change_tolerance: float = field(default=1e-9, metadata={"allowed": "0 or more"})
    max_evaluations: int = 25
    driver = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.learning_rate, float) or self.learning_rate <= 0:
            self._refuse("learning_rate", "a number above 0: the line search takes the place of a schedule")
        for option, off in {"clip_norm": None, "clip_value": None, "weight_decay": 0.0, "accumulate": 1}.items():
            if getattr(self, option) != off:
                self._refuse(option, f"{off}: this method needs the true gradient of the objective (l2 is part of it)")
        self._count("history")
        self._count("max_evaluations")

    def renew(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state for another fit, perhaps on other data: the pairs stay, value and gradient are taken anew."""
        return {name: state[name] for name in ("s", "y", "evaluations") if name in state}

    def iterate(self, evaluate: Evaluate, w: np.ndarray, state: Mapping[str, Any]) -> tuple[np.ndarray, float, dict[str, Any]]:
        """One iteration.

        Args: evaluate(w) -> (objective, gradient), flat float64 (N,); w (N,), the weights; state: {} at first, then what the last
        call returned: s and y (pairs, N), value and gradient at w, evaluations so far, converged. Arrays and scalars only.
        Returns: new w, its value (never above the one before), new state. A trial point whose value is not finite shortens the
        step. If no lower point is found, w stays and the pairs are dropped, or, if there were none, the search has converged. A
        start that is not finite stays where it is, and its value says so.
        """
        s, y = state.get("s", np.empty((0, w.size))), state.get("y", np.empty((0, w.size)))
        evaluations = int(state.get("evaluations", 0))
        if "gradient" in state:
            start = _Point(0.0, float(state["value"]), 0.0, w, state["gradient"])
        else:
            value, gradient = evaluate(w)
            evaluations += 1
            start = _Point(0.0, float(value), 0.0, w, np.array(gradient, np.float64))

        def result(point: _Point, converged: bool) -> tuple[np.ndarray, float, dict[str, Any]]:
            kept = {"s": s, "y": y, "value": point.value, "gradient": point.gradient}
            return point.w, point.value, {**kept, "evaluations": evaluations, "converged": converged}

        if not (math.isfinite(start.value) and np.all(np.isfinite(start.gradient))):
            return result(start, False)
        if np.max(np.abs(start.gradient), initial=0.0) <= self.gradient_tolerance:
            return result(start, True)
        direction = _two_loops(start.gradient, s, y)
        slope = float(direction @ start.gradient)
        if not (-math.inf < slope < 0):  # pairs spoilt by rounding
            s, y = s[:0], y[:0]
            direction, slope = -start.gradient, -float(start.gradient @ start.gradient)
        first = self.schedule.learning_rate * (1.0 if len(s) else min(1.0, 1 / float(np.sum(np.abs(start.gradient)))))
        found, used = _strong_wolfe(evaluate, start._replace(slope=slope), direction, first, self.max_evaluations)
        evaluations += used
        if found is None:
            converged = not len(s)
            s, y = s[:0], y[:0]
            return result(start, converged)
        moved, turned = found.w - w, found.gradient - start.gradient
        if moved @ turned > np.finfo(np.float64).eps * (turned @ turned):  # keeps H positive definite
            s, y = np.vstack([s, moved])[-self.history :], np.vstack([y, turned])[-self.history :]
        flat = np.max(np.abs(found.gradient)) <= self.gradient_tolerance
        still = start.value - found.value <= self.change_tolerance * max(1.0, abs(found.value))
        return result(found, bool(flat or still))


def _two_loops(gradient: np.ndarray, s: np.ndarray, y: np.ndarray) -> Any:
    """-H g: Nocedal & Wright 2006, algorithm 7.4 with the scale of equation 7.20. Args: g (N,); s, y (pairs, N), oldest first."""
    q = -gradient
    if not len(s):
        return q
    inverse = 1 / np.sum(s * y, axis=1)
    alpha = np.zeros(len(s))
    for i in reversed(range(len(s))):
        alpha[i] = inverse[i] * (s[i] @ q)
        q = q - alpha[i] * y[i]
    q = q / (inverse[-1] * (y[-1] @ y[-1]))
    for i in range(len(s)):
        q = q + (alpha[i] - inverse[i] * (y[i] @ q)) * s[i]
    return q


def _strong_wolfe(
    evaluate: Evaluate, start: _Point, direction: np.ndarray, first: float, budget: int
) -> tuple[_Point | None, int]:
    """(a lower point, or None; evaluations used): Nocedal & Wright 2006, algorithms 3.5 (the first loop) and 3.6 (the second).

    The point meets the strong Wolfe conditions, or at least that of sufficient decrease where the budget ends before.
    """

    def at(step: float) -> _Point:
        with np.errstate(all="ignore"):
            w = start.w + step * direction
            value, gradient = evaluate(w)
            gradient = np.array(gradient, np.float64)
            slope = float(gradient @ direction)
        finite = math.isfinite(value) and math.isfinite(slope)
        return _Point(step, float(value) if finite else math.inf, slope, w, gradient)

    def too_high(point: _Point) -> bool:
        return point.value > start.value + 1e-4 * point.step * start.slope or (low is not start and point.value >= low.value)

    def flat(point: _Point) -> bool:
        return abs(point.slope) <= -0.9 * start.slope

    low, top, step, used = start, None, first, 0
    while top is None and used < budget:
        point, used = at(step), used + 1
        if too_high(point):
            top = point
        elif flat(point):
            return point, used
        elif point.slope >= 0:
            low, top = point, low
        else:
            guess = _cubic(low, point)
            step = min(max(guess, 2 * step), 10 * step) if math.isfinite(guess) else 4 * step
            low = point
    while top is not None and used < budget:
        width = top.step - low.step
        share = (_cubic(low, top) - low.step) / width if math.isfinite(top.value) else 0.1
        point, used = at(low.step + width * (min(max(share, 0.1), 0.9) if math.isfinite(share) else 0.5)), used + 1
        if np.array_equal(point.w, low.w):
            break  # the interval is narrower than the weights' rounding
        if too_high(point) or point.value >= low.value:
            top = point
        elif flat(point):
            return point, used
        else:
            top = low if point.slope * width >= 0 else top
            low = point
    return (low if low is not start else None), used


def _cubic(a: _Point, b: _Point) -> float:
    """Where the cubic through two values and slopes is least (Nocedal & Wright 2006, equation 3.59); NaN if nowhere."""
    bend = a.slope + b.slope - 3 * (a.value - b.value) / (a.step - b.step)
    square = bend * bend - a.slope * b.slope
    if not square >= 0:
        return math.nan
    root = math.copysign(math.sqrt(square), b.step - a.step)
    below = b.slope - a.slope + 2 * root
    return b.step - (b.step - a.step) * (b.slope + root - bend) / below if below else math.nan


# -------------------------------------------------------------------------------------------------------------- by name, by file


def resolve(thing: object) -> Optimizer:
    """The optimizer that a name (in any case), an instance or a class stands for.

    Raises: `UnknownNameError` for a name that is not registered, `UsageError` for anything else.

    >>> resolve("Adam").learning_rate
    0.001
    """
    if isinstance(thing, Optimizer):
        return thing
    if isinstance(thing, str):
        return optimizers[thing.lower()]()
    if isinstance(thing, type) and issubclass(thing, Optimizer):
        return thing()
    raise UsageError(f"an optimizer is a name ({', '.join(optimizers)}) or an Optimizer such as cr.Adam(1e-3); not {thing!r}")


def config(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer as plain values that JSON can hold; a schedule becomes what `schedules.config` says.

    >>> config(SGD(0.1))["learning_rate"]
    0.1
    """
    values = {"name": optimizer.name, **vars(optimizer)}
    if isinstance(optimizer.learning_rate, Schedule):
        values["learning_rate"] = schedules.config(optimizer.learning_rate)
    return values


def from_config(settings: Mapping[str, Any]) -> Optimizer:
    """The optimizer that `config` described. Raises: `UnknownNameError`; `UsageError` for options that it does not have."""
    options = dict(settings)
    if isinstance(options.get("learning_rate"), Mapping):
        options["learning_rate"] = schedules.from_config(options["learning_rate"])
    return optimizers.make(options)  # type: ignore[no-any-return]  # classes of this registry
